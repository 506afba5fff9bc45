"""Where an imported model's tokens come from."""

from __future__ import annotations

import json
import pickle
from collections import OrderedDict
from pathlib import Path

import pytest

from tests.train.interop.foreign_files import classes, save, symbols, write_vocab_pkl
from txl_train.data.datasets import DATASETS
from txl_train.data.vocabulary import Vocabulary
from txl_train.errors import CheckpointError, UsageError
from txl_train.interop.vocabularies import count_symbols, make_vocabulary, read_symbols, resolve_dataset

WORDS = symbols(9)


def test_a_text_of_one_token_a_line_is_a_vocabulary(tmp_path: Path) -> None:
    (tmp_path / "v.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    assert read_symbols(tmp_path / "v.txt") == tuple(WORDS)
    (tmp_path / "counted.txt").write_text("".join(f"{word} {100 - i}\n" for i, word in enumerate(WORDS)), encoding="utf-8")
    assert read_symbols(tmp_path / "counted.txt") == tuple(WORDS)


def test_our_own_vocabulary_is_one(tmp_path: Path) -> None:
    Vocabulary(WORDS, unit="word").save(tmp_path / "vocabulary.json")
    assert read_symbols(tmp_path / "vocabulary.json") == tuple(WORDS)


def test_json_lists_and_tables_are_too(tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text(json.dumps(WORDS), encoding="utf-8")
    (tmp_path / "table.json").write_text(json.dumps({word: i for i, word in reversed(list(enumerate(WORDS)))}), encoding="utf-8")
    assert read_symbols(tmp_path / "list.json") == read_symbols(tmp_path / "table.json") == tuple(WORDS)


@pytest.mark.parametrize("plain", [True, False])
def test_hugging_faces_vocab_pkl_is_read_in_both_its_forms(tmp_path: Path, plain: bool) -> None:
    write_vocab_pkl(tmp_path / "vocab.pkl", WORDS, plain=plain)
    assert read_symbols(tmp_path / "vocab.pkl")[: len(WORDS)] == tuple(WORDS)


@pytest.mark.parametrize("legacy", [True, False])
def test_a_cache_of_the_authors_corpus_is_read(tmp_path: Path, legacy: bool) -> None:
    with classes("data_utils.Corpus", "utils.vocabulary.Vocab") as made:
        corpus, vocab = made.Corpus(), made.Vocab()
        vocab.idx2sym, vocab.sym2idx = WORDS, OrderedDict((word, i) for i, word in enumerate(WORDS))
        corpus.vocab, corpus.dataset = vocab, "wt103"
        save(corpus, tmp_path / "cache.pt", legacy=legacy)
        save({"sym2idx": vocab.sym2idx}, tmp_path / "vocab.bin", legacy=legacy)
    assert read_symbols(tmp_path / "cache.pt") == tuple(WORDS)
    assert read_symbols(tmp_path / "vocab.bin") == tuple(WORDS)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("v.txt", b"a\n\nb\n", "empty lines"),
        ("v.txt", b"\xff\xfe\x00", "neither text, nor JSON, nor a pickle"),
        ("v.json", b'{"a": 0, "b": 2}', "not 0, 1, 2"),
        ("v.json", b'{"a": 0, "b": 0}', "not 0, 1, 2"),
        ("v.json", b'{"a": 0, "b": true}', "not 0, 1, 2"),
        ("v.json", b"[1, 2]", "neither a list of tokens nor a table"),
        ("v.json", b"{", "but is none"),
        ("v.json", b'{"format": "txl-vocabulary", "version": 1, "unit": "word", "symbols": ["a"], "sha256": "0"}', "was changed"),
        ("v.pkl", pickle.dumps({"idx2sym": ["a"]}), "no table of tokens"),
        ("v.pkl", pickle.dumps(["a"]), "no table of tokens"),
        ("v.pkl", pickle.dumps(Path("x")), "which is no part of"),
    ],
)
def test_what_is_no_vocabulary_is_refused_with_the_reason(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_symbols(tmp_path / name)
    assert expected in caught.value.message


def test_a_missing_file_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no vocabulary"):
        read_symbols(tmp_path / "nothing")


def test_a_token_that_is_there_twice_is_refused() -> None:
    with pytest.raises(CheckpointError, match="twice"):
        make_vocabulary(("<eos>", "a", "a"), "wt103", "the file")


def test_words_for_a_data_set_of_lines_need_its_line_end() -> None:
    with pytest.raises(CheckpointError, match="<eos>"):
        make_vocabulary(("a", "b"), "wt103", "the file")


@pytest.mark.parametrize(
    ("named", "recorded", "tokens", "expected"),
    [
        ("text", "wt103", ("<eos>", "ab"), "text"),
        (None, "enwik8", ("<eos>", "ab"), "enwik8"),
        (None, "wt2", ("<eos>", "ab"), "wt103"),
        (None, None, ("<eos>", "ab"), "wt103"),
        (None, None, ("<S>", "<UNK>", "ab"), "lm1b"),
        (None, None, ("_", "e", "t"), "text8"),
        (None, None, ("32", "101", "8"), "enwik8"),
    ],
)
def test_the_data_set_is_the_named_the_recorded_or_the_one_its_tokens_look_like(
    named: str | None, recorded: str | None, tokens: tuple[str, ...], expected: str
) -> None:
    assert resolve_dataset(named, recorded, tokens) == expected


def test_an_unknown_data_set_asks_for_one_of_ours() -> None:
    with pytest.raises(UsageError) as caught:
        resolve_dataset(None, "ptb", ("<eos>",))
    assert "`ptb` is not known" in caught.value.message
    assert all(name in str(caught.value) for name in DATASETS)
    with pytest.raises(UsageError, match="not recorded"):
        resolve_dataset(None, None, ("ab", "cd"))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TXL_CACHE_DIR", str(tmp_path / "cache"))
    data = tmp_path / "data"
    data.mkdir()
    return data


def test_words_are_counted_as_the_originals_do(folder: Path) -> None:
    for name, text in (("train", "b a b\nc\n"), ("valid", "a a a a\n"), ("test", "a\n")):
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    assert count_symbols(folder, "wt103") == ("<eos>", "b", "a", "c")
    assert count_symbols(folder, "wt2") == ("<eos>", "a", "b", "c")  # over all splits


def test_the_line_breaks_of_enwik8_have_no_token_in_the_originals(folder: Path) -> None:
    for name in ("train", "valid", "test"):
        (folder / f"{name}.txt").write_text("97 98 97\n97 32\n", encoding="utf-8")
    assert count_symbols(folder, "enwik8") == ("97", "98", "32")
