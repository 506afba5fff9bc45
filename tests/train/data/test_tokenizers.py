"""Raw text becomes the tokens its data set was built with."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from txl_train.data import tokenizers
from txl_train.data.corpus import encode_text
from txl_train.data.datasets import DATASETS, get_dataset
from txl_train.data.tokenizers import raw_lines, subword_lines, tokenize_raw, tokenized
from txl_train.data.vocabulary import Vocabulary
from txl_train.errors import ConfigError, EnvironmentUnfitError


@pytest.mark.parametrize(
    ("raw", "tokens"),
    [
        ("1,000,000", "1 @,@ 000 @,@ 000"),
        ("1,2,3", "1 @,@ 2 @,@ 3"),
        ("3.5", "3 @.@ 5"),
        ("well-known", "well @-@ known"),
        ("It's isn't", "It 's isn 't"),
        ("the \u201ccurly\u201d one\u2019s", 'the " curly " one \'s'),
        ("by <formula>.", "by <formula> ."),
        ("a <unk> & [b] | c", "a <unk> & [ b ] | c"),
        ("in the U.S. (1.5 km), e.g. there.", "in the U.S. ( 1 @.@ 5 km ) , e.g. there ."),
        ("1990\u20132000", "1990 \u2013 2000"),
        ("The END", "The END"),
        ("", ""),
        ("one.\ntwo.", "one . two ."),
    ],
)
def test_wikitext_tokens(raw: str, tokens: str) -> None:
    assert " ".join(tokenize_raw(raw, "wt103")) == tokens


@pytest.mark.parametrize(
    ("raw", "tokens"),
    [
        ('The built-in "len()" of 3.11 isn\u2019t slow.', 'The built @-@ in " len ( ) " of 3 @.@ 11 isn \'t slow .'),
        ('"object.__new__(cls[, ...])"', '" object @.@ __new__ ( cls [ , ... ] ) "'),
        ("x**2 != 1,000 (e.g., a[1,2])", "x ** 2 != 1 @,@ 000 ( e.g. , a [ 1 , 2 ] )"),
        ("see http://python.org/doc. Then", "see http://python.org/doc . Then"),
        ("the class\u2019s \u2018suite\u2019 \u2014 it\u2019s", "the class 's ' suite ' \u2014 it 's"),
    ],
)
def test_pydoc_tokens(raw: str, tokens: str) -> None:
    assert " ".join(tokenize_raw(raw, "pydoc")) == tokens


@pytest.mark.parametrize(
    ("raw", "tokens"),
    [
        ("It's $1,000 - 3.5% (well-known).", "It 's $ 1,000 - 3.5 % ( well-known ) ."),
        ("the \u201ccurly\u201d & <one>", 'the " curly " & < one >'),
        ("one.\ntwo.", "one . two ."),
    ],
)
def test_one_billion_words_tokens(raw: str, tokens: str) -> None:
    assert " ".join(tokenize_raw(raw, "lm1b")) == tokens


def test_text_is_cut_at_blanks_only() -> None:
    assert tokenize_raw("It's  well-known.\n", "text") == ["It's", "well-known."]


def test_text8_keeps_27_characters_and_spells_digits() -> None:
    assert "".join(tokenize_raw(" It's 20 na\u00efve\nTests! ", "text8")) == "it_s_two_zero_na_ve_tests"
    assert tokenize_raw("?!", "text8") == []


def test_enwik8_is_utf8_bytes() -> None:
    assert tokenize_raw("a\n\u00e9", "enwik8") == ["97", "10", "195", "169"]


def test_an_unknown_data_set_is_refused() -> None:
    with pytest.raises(ConfigError, match="Did you mean `pydoc`"):
        tokenize_raw("a", "pydocs")


def test_every_data_set_has_a_rule() -> None:
    assert tokenizers._RULES.keys() == DATASETS.keys()


def test_without_sacremoses_the_message_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    tokenizers._moses.cache_clear()
    with pytest.raises(EnvironmentUnfitError) as caught:
        tokenize_raw("hello", "wt103")
    assert "pip install sacremoses" in str(caught.value.remedy)


def test_raw_text_of_several_lines_can_be_encoded() -> None:
    word = Vocabulary(["<eos>", "well", "@-@", "known", "<unk>"], unit="word")
    assert encode_text(raw_lines("well-known\nzebra", "wt103"), get_dataset("wt103"), word).tolist() == [1, 2, 3, 0, 4, 0]
    byte = Vocabulary(["97", "98", "10"], unit="byte")
    assert encode_text(raw_lines("a\nb\n", "enwik8"), get_dataset("enwik8"), byte).tolist() == [0, 2, 1, 2]
    char = Vocabulary(["a", "b", "_"], unit="char")
    assert encode_text(raw_lines("a\nB", "text8"), get_dataset("text8"), char).tolist() == [0, 2, 1]


def test_a_model_of_subwords_is_given_lines_as_its_data_set_has_them() -> None:
    assert subword_lines("A well-known cat.\nB", get_dataset("wt103")) == [" A well @-@ known cat . ", " B "]
    assert subword_lines("It's.", get_dataset("lm1b")) == ["It 's ."]
    assert subword_lines("As  it is, isn't\tit?\n", get_dataset("text")) == ["As  it is, isn't\tit?"]


@pytest.mark.parametrize(
    ("dataset", "raw", "written"),
    [
        ("wt103", "A well-known cat.\n\nB", " A well @-@ known cat . \n  \n B "),
        ("lm1b", "It's.\nA cat.\n", "It 's .\nA cat .\n"),
        ("text8", "It's\n20, ?\nB", "i t _ s _ t w o _ z e r o _ b"),
        ("text8", "\n ?\n", ""),
        ("enwik8", "a\n\nb\n", "97\n\n98\n"),
    ],
)
def test_raw_text_is_written_line_by_line_as_a_prepared_file(dataset: str, raw: str, written: str) -> None:
    assert "".join(tokenized(raw.splitlines(keepends=True), get_dataset(dataset))) == written


def test_raw_sentences_come_back_as_they_were_tokenised(shared_dir: Path) -> None:
    sacremoses = pytest.importorskip("sacremoses")
    join = sacremoses.MosesDetokenizer("en").detokenize
    text = (shared_dir / "data" / "lm1b" / "1b_benchmark.test.tokens").read_text(encoding="utf-8")
    lines = [line.split() for line in text.splitlines()][::12]
    exact = sum(tokenize_raw(join(line, unescape=False), "lm1b") == line for line in lines)
    assert exact >= 0.985 * len(lines)  # 99.3 % over the whole file


def test_raw_wikitext_comes_back_as_it_was_tokenised(shared_dir: Path) -> None:
    sacremoses = pytest.importorskip("sacremoses")
    join = sacremoses.MosesDetokenizer("en").detokenize
    text = (shared_dir / "data" / "wikitext-2-raw" / "wiki.test.raw").read_text(encoding="utf-8")
    lines = [line.translate(tokenizers._CURLY_QUOTES).split() for line in text.splitlines() if line.strip()][::5]
    raw = [join(re.sub(r" @([-,.])@ ", r"\1", " ".join(line)).split(), unescape=False) for line in lines]
    exact = sum(tokenize_raw(text, "wt103") == line for text, line in zip(raw, lines, strict=True))
    assert exact >= 0.99 * len(lines)  # 99.4 % over the whole split; what is left is mostly Chinese and Japanese


def test_the_27_letter_filter_gives_the_sample_that_was_made_with_it(shared_dir: Path) -> None:
    raw = (shared_dir / "data" / "wikitext-2-raw" / "wiki.test.raw").read_text(encoding="utf-8")
    sample = (shared_dir / "data" / "text8" / "sample.txt").read_text().strip()
    assert "".join(tokenize_raw(raw, "text8")).startswith(sample.replace(" ", "_"))
