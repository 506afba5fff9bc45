"""Corpora: what each data set's text becomes, what the cache keeps, and what is refused."""

from __future__ import annotations

import concurrent.futures
import json
import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from txl_train.data import bpe
from txl_train.data import corpus as corpus_module
from txl_train.data.corpus import Corpus, default_cache_dir, encode_text, load_corpus
from txl_train.data.datasets import get_dataset
from txl_train.data.idcache import HEADER_BYTES
from txl_train.data.layouts import detect_form
from txl_train.data.sentences import ShuffledSentences
from txl_train.data.vocabulary import Vocabulary
from txl_train.errors import ConfigError, DataError, EnvironmentUnfitError

from .conftest import MakeFolder, OpenCorpus

TRAIN = "the cat sat\n\nthe dog sat on the mat\n"


def words(corpus: Corpus, split: str) -> str:
    """Write a split's ids out as tokens again."""
    return " ".join(corpus.vocabulary.decode(corpus.ids(split)))


# --- words ---


def test_every_line_also_an_empty_one_ends_with_eos(make_folder: MakeFolder, open_corpus: OpenCorpus) -> None:
    corpus = open_corpus(make_folder(train=TRAIN, valid="the cat", test="\n\nmat\n"), "wt103")
    assert words(corpus, "train") == "the cat sat <eos> <eos> the dog sat on the mat <eos>"
    assert words(corpus, "valid") == "the cat <eos>"
    assert words(corpus, "test") == "<eos> <eos> mat <eos>"
    assert corpus.n_tokens("train") == 12


def test_the_vocabulary_is_eos_then_words_of_train_by_count(make_folder: MakeFolder, open_corpus: OpenCorpus) -> None:
    corpus = open_corpus(make_folder(train=TRAIN, valid="cat\n", test="dog\n"), "wt103")
    assert corpus.vocabulary.symbols == ("<eos>", "the", "sat", "cat", "dog", "on", "mat")


def test_case_is_kept(make_folder: MakeFolder, open_corpus: OpenCorpus) -> None:
    corpus = open_corpus(make_folder(train="The the THE\n", valid="The\n", test="the\n"), "text")
    assert len(corpus.vocabulary) == 5


def test_line_breaks_of_other_systems_and_a_byte_order_mark_make_no_difference(make_folder: MakeFolder, open_corpus: OpenCorpus) -> None:
    windows = ("\ufeff" + TRAIN.replace("\n", "\r\n")).encode()
    corpus = open_corpus(make_folder(train=TRAIN, valid=windows, test=TRAIN.replace("\n", "\r")), "wt103")
    assert corpus.ids("train").tolist() == corpus.ids("valid").tolist() == corpus.ids("test").tolist()


def test_text_maps_unknown_words_to_unk_and_counts_them(make_folder: MakeFolder, open_corpus: OpenCorpus) -> None:
    corpus = open_corpus(make_folder(train=TRAIN, valid="the zebra <unk> sat\n", test="cat\n"), "text")
    assert words(corpus, "valid") == "the <unk> <unk> sat <eos>"
    assert corpus.oov("valid") == 1
    assert corpus.oov("train") == corpus.oov("test") == 0


def test_min_count_makes_rare_words_unk(make_folder: MakeFolder, open_corpus: OpenCorpus) -> None:
    corpus = open_corpus(make_folder(train=TRAIN, valid="cat\n", test="the\n"), "text", min_count=2)
    assert corpus.vocabulary.symbols == ("<eos>", "<unk>", "the", "sat")
    assert words(corpus, "train") == "the <unk> sat <eos> <eos> the <unk> sat <unk> the <unk> <eos>"
    assert corpus.oov("train") == 4


def test_each_min_count_has_a_vocabulary_of_its_own(make_folder: MakeFolder, open_corpus: OpenCorpus) -> None:
    folder = make_folder(train=TRAIN, valid="cat\n", test="the\n")
    assert [len(open_corpus(folder, "text", min_count=n).vocabulary) for n in (1, 2, 3)] == [8, 4, 3]


def test_text_and_wt103_agree_where_train_has_unk_itself(make_folder: MakeFolder, open_corpus: OpenCorpus) -> None:
    folder = make_folder(train="a <unk> b <unk> a\n", valid="new\n", test="a\n")
    assert open_corpus(folder, "text").vocabulary == open_corpus(folder, "wt103").vocabulary
    assert words(open_corpus(folder, "wt103"), "valid") == "<unk> <eos>"


def test_wt103_names_the_unknown_word_with_file_line_and_remedy(make_folder: MakeFolder, open_corpus: OpenCorpus) -> None:
    corpus = open_corpus(make_folder(train=TRAIN, valid="the cat\nthe zebra sat\n", test="the\n"), "wt103")
    with pytest.raises(DataError, match=r"valid\.txt, line 2: the word `zebra`") as caught:
        corpus.ids("valid")
    assert "--dataset text" in str(caught.value.remedy)


def test_min_count_is_refused_where_rare_words_are_kept(make_folder: MakeFolder, open_corpus: OpenCorpus) -> None:
    with pytest.raises(ConfigError, match="`min_count` must be 1"):
        open_corpus(make_folder(train=TRAIN, valid="the\n", test="the\n"), "wt103", min_count=2)


def test_a_file_without_words_is_refused(make_folder: MakeFolder, open_corpus: OpenCorpus) -> None:
    with pytest.raises(DataError, match=r"valid\.txt holds no words"):
        open_corpus(make_folder(train=TRAIN, valid=" \n\n", test="the\n"), "text").ids("valid")


def test_text_that_is_not_utf8_is_named_with_its_line(make_folder: MakeFolder, open_corpus: OpenCorpus) -> None:
    with pytest.raises(DataError, match=r"train\.txt, line 2: not UTF-8"):
        open_corpus(make_folder(train=b"fine\nna\xefve\n", valid="a\n", test="a\n"), "text")


# --- characters and bytes ---


def test_text8_as_prepared_and_raw_give_the_same_ids(make_folder: MakeFolder, open_corpus: OpenCorpus) -> None:
    raw = {"train": " the cat sat ", "valid": "a cat\n", "test": "the hat"}
    prepared = {split: " ".join(text.strip().replace(" ", "_")) for split, text in raw.items()}
    a, b = open_corpus(make_folder("raw", **raw), "text8"), open_corpus(make_folder("prepared", **prepared), "text8")
    assert words(a, "train") == "t h e _ c a t _ s a t"
    assert a.vocabulary == b.vocabulary
    assert all((a.ids(split) == b.ids(split)).all() for split in raw)


def test_text8_is_counted_over_all_splits_and_has_no_eos(make_folder: MakeFolder, open_corpus: OpenCorpus) -> None:
    corpus = open_corpus(make_folder(train="a _ b", valid="z _ z", test="z\n_ c"), "text8")
    assert corpus.vocabulary.symbols == ("_", "z", "a", "b", "c")
    assert words(corpus, "test") == "z _ c"


def test_text8_that_could_be_either_form_is_refused(make_folder: MakeFolder, open_corpus: OpenCorpus) -> None:
    with pytest.raises(DataError, match="prep_text8 writes it or raw"):
        open_corpus(make_folder(train="a b c", valid="a _ b", test="a _ b"), "text8")


@pytest.mark.parametrize("text", ["Hello, world", "the_cat", "ab cd 12"])
def test_text8_of_more_than_27_characters_is_refused(make_folder: MakeFolder, open_corpus: OpenCorpus, text: str) -> None:
    with pytest.raises(DataError, match="neither text8 as prep_text8") as caught:
        open_corpus(make_folder(train=text, valid="a _ b", test="a _ b"), "text8")
    assert "enwik8" in str(caught.value.remedy)


def test_raw_text8_with_a_line_break_inside_is_refused(make_folder: MakeFolder, open_corpus: OpenCorpus) -> None:
    with pytest.raises(DataError, match="a line break"):
        open_corpus(make_folder(train="the cat\nsat", valid="a _ b", test="a _ b"), "text8")


def test_a_prepared_file_that_changes_its_form_is_refused_where_it_does(make_folder: MakeFolder, open_corpus: OpenCorpus) -> None:
    text = "a _ b\n" * 20_000 + "a _ whole word\n"
    with pytest.raises(DataError, match=r"train\.txt, line 20001: `whole` is no token of text8"):
        open_corpus(make_folder(train=text, valid="a _ b", test="a _ b"), "text8")


def test_enwik8_as_prepared_and_raw_give_the_same_ids(make_folder: MakeFolder, open_corpus: OpenCorpus) -> None:
    raw = {"train": b"<page>\n na\xc3\xafve\n\n", "valid": b"<a>\n", "test": b"\npage\n"}
    prepared = {split: " ".join(str(byte) if byte != 10 else "\n" for byte in text) for split, text in raw.items()}
    a, b = open_corpus(make_folder("raw", **raw), "enwik8"), open_corpus(make_folder("prepared", **prepared), "enwik8")
    assert bytes(map(int, words(a, "train").split())) == raw["train"]
    assert a.vocabulary == b.vocabulary
    assert all((a.ids(split) == b.ids(split)).all() for split in raw)


@pytest.mark.parametrize("form", ["raw", "prepared"])
def test_enwik8_drops_line_breaks_only_for_a_vocabulary_without_them(make_folder: MakeFolder, open_corpus: OpenCorpus, form: str) -> None:
    text: bytes | str = b"ab\nab\n" if form == "raw" else "97 98 \n 97 98 \n"
    folder = make_folder(train=text, valid=text, test=text)
    assert words(open_corpus(folder, "enwik8"), "train") == "97 98 10 97 98 10"
    imported = Vocabulary(["97", "98"], unit="byte")
    assert words(open_corpus(folder, "enwik8", vocabulary=imported), "train") == "97 98 97 98"


def test_enwik8_that_could_be_either_form_is_refused(make_folder: MakeFolder, open_corpus: OpenCorpus) -> None:
    with pytest.raises(DataError, match="3 of its first 4 pieces"):
        open_corpus(make_folder(train="97 98 <unk> 99", valid="97", test="97"), "enwik8")


def test_a_character_without_an_id_is_named(make_folder: MakeFolder, open_corpus: OpenCorpus) -> None:
    folder = make_folder(test="a _ q")
    with pytest.raises(DataError, match="the character `q` is not in the vocabulary"):
        open_corpus(folder, "text8", vocabulary=Vocabulary(["a", "_"], unit="char")).ids("test")


# --- One Billion Word ---

SENTENCES = "A cat .\nA dog .\n"


def test_sentences_have_a_boundary_before_and_after_and_are_counted(make_folder: MakeFolder, open_corpus: OpenCorpus) -> None:
    corpus = open_corpus(make_folder(train=SENTENCES, valid="A bird .\n", test="A\n"), "lm1b")
    assert corpus.vocabulary.symbols == ("<S>", "A", ".", "cat", "dog", "<UNK>")
    assert words(corpus, "train") == "<S> A cat . <S> A dog . <S>"
    assert words(corpus, "valid") == "<S> A <UNK> . <S>"
    assert corpus.oov("valid") == 1
    assert corpus.vocabulary.eos_id == 0
    assert corpus.vocabulary.unk_id == 5
    assert corpus.n_words("train") == 8  # as many as have a predecessor


def test_rare_words_of_sentences_become_unk(make_folder: MakeFolder, open_corpus: OpenCorpus) -> None:
    corpus = open_corpus(make_folder(train=SENTENCES, valid="A\n", test="A\n"), "lm1b", min_count=2)
    assert corpus.vocabulary.symbols == ("<S>", "A", ".", "<UNK>")


def test_the_vocabularys_file_is_taken_as_it_is(make_folder: MakeFolder, open_corpus: OpenCorpus) -> None:
    folder = make_folder(train=SENTENCES, valid="A\n", test="A\n")
    (folder / "1b_word_vocab.txt").write_text("</S> 9\n<S> 9\n<UNK> 7\nA 5\nA 4\ndog 1\n")
    corpus = open_corpus(folder, "lm1b")
    assert corpus.vocabulary.symbols == ("</S>", "<S>", "<UNK>", "A", "dog")
    assert corpus.ids("train").tolist() == [1, 3, 2, 2, 1, 3, 4, 2, 1]


@pytest.mark.parametrize(("content", "words_of_it"), [(b"<S> 1\nA 1\n", "no `<UNK>`"), (b"A\xff 1\n", "not UTF-8")])
def test_a_file_that_is_no_vocabulary_is_refused(
    make_folder: MakeFolder, open_corpus: OpenCorpus, content: bytes, words_of_it: str
) -> None:
    folder = make_folder(train=SENTENCES, valid="A\n", test="A\n")
    (folder / "1b_word_vocab.txt").write_bytes(content)
    with pytest.raises(DataError, match=words_of_it):
        open_corpus(folder, "lm1b")


def test_real_sentences_are_shuffled_whole(shared_dir: Path, make_folder: MakeFolder, open_corpus: OpenCorpus) -> None:
    lines = (shared_dir / "data" / "lm1b" / "1b_benchmark.dev.tokens").read_text(encoding="utf-8").splitlines(keepends=True)
    corpus = open_corpus(make_folder(train="".join(lines[:2000]), valid=lines[-2], test=lines[-1]), "lm1b")
    ids, boundary = corpus.ids("train"), corpus.vocabulary.eos_id
    assert boundary is not None
    shuffled = ShuffledSentences(ids, boundary, seed=5)
    assert shuffled.n_sentences == 2000
    again = "".join(corpus.vocabulary.decode(shuffled[np.arange(len(ids))])).split("<S>")[1:-1]
    assert sorted(again) == sorted("".join(line.split()) for line in lines[:2000])
    assert again != ["".join(line.split()) for line in lines[:2000]]


# --- GPT-2's subwords ---


def test_any_words_may_be_read_as_subwords(make_folder: MakeFolder, open_corpus: OpenCorpus) -> None:
    pytest.importorskip("tiktoken")
    text = " the  cat\n\n na\u00efve \u65e5\u672c\n"
    corpus = open_corpus(make_folder(train=text, valid="Hello world\n", test="a"), "wt103", vocab="bpe")
    assert bpe.decode(corpus.ids("train")) == text
    assert corpus.ids("valid").tolist() == [15496, 995, 198]
    assert corpus.ids("valid").dtype == np.uint16
    assert len(corpus.vocabulary) == 50_257
    assert corpus.vocabulary.unit == "subword"
    assert corpus.oov("train") == 0
    assert [corpus.n_words(split) for split in ("train", "valid", "test")] == [7, 3, 2]


def test_a_checkpoints_subwords_read_text_as_subwords_again(make_folder: MakeFolder, open_corpus: OpenCorpus) -> None:
    pytest.importorskip("tiktoken")
    folder = make_folder(train="a\n", valid="b\n", test="Hello world\n")
    kept = Vocabulary.from_dict(json.loads(json.dumps(bpe.vocabulary().to_dict())))
    assert open_corpus(folder, "text", vocabulary=kept).ids("test").tolist() == [15496, 995, 198]


def test_subwords_and_words_of_one_text_have_entries_of_their_own(make_folder: MakeFolder, open_corpus: OpenCorpus) -> None:
    pytest.importorskip("tiktoken")
    folder = make_folder(train=TRAIN, valid="cat\n", test="the\n")
    assert open_corpus(folder, "text").ids("train").tolist() != open_corpus(folder, "text", vocab="bpe").ids("train").tolist()


@pytest.mark.parametrize(
    ("dataset", "min_count", "message"), [("text8", 1, "BPE cannot read"), ("enwik8", 1, "bytes"), ("text", 2, "`min_count` must be 1")]
)
def test_what_subwords_cannot_be_is_refused(
    make_folder: MakeFolder, open_corpus: OpenCorpus, dataset: str, min_count: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        open_corpus(make_folder(train="a _ b", valid="a _ b", test="a _ b"), dataset, vocab="bpe", min_count=min_count)


def test_subwords_of_somebody_else_are_refused(make_folder: MakeFolder, open_corpus: OpenCorpus) -> None:
    with pytest.raises(DataError, match="not GPT-2's"):
        open_corpus(make_folder(test="a\n"), "text", vocabulary=Vocabulary(["a"], unit="subword"))
    with pytest.raises(DataError, match="one of subwords, but data set `text8`"):
        open_corpus(make_folder(test="a\n"), "text8", vocabulary=bpe.vocabulary())


def test_lines_in_memory_give_the_subwords_of_the_same_file(make_folder: MakeFolder, open_corpus: OpenCorpus) -> None:
    pytest.importorskip("tiktoken")
    for dataset in ("text", "lm1b"):
        corpus = open_corpus(make_folder(train="A cat .\n\nB\n", valid="a\n", test="a\n"), dataset, vocab="bpe")
        assert encode_text(["A cat .", "", "B"], corpus.spec, corpus.vocabulary).tolist() == corpus.ids("train").tolist()


def test_wikitext_2_has_fewer_than_two_subwords_a_word(shared_dir: Path, open_corpus: OpenCorpus) -> None:
    pytest.importorskip("tiktoken")
    corpus = open_corpus(shared_dir / "data" / "wikitext-2", "wt103", vocab="bpe")
    assert corpus.n_tokens("test") == 295_877
    assert corpus.n_words("test") == 245_569
    assert bpe.decode(corpus.ids("test")) == (shared_dir / "data" / "wikitext-2" / "test.txt").read_text(encoding="utf-8")


# --- a vocabulary that is given ---


def test_a_given_vocabulary_is_used_as_it_is_and_needs_only_the_split_asked_for(make_folder: MakeFolder, open_corpus: OpenCorpus) -> None:
    vocabulary = Vocabulary(["<eos>", "sat", "<unk>", "the"], unit="word")
    corpus = open_corpus(make_folder(test="the zebra sat\n"), "wt103", vocabulary=vocabulary, min_count=3)
    assert corpus.ids("test").tolist() == [3, 2, 1, 0]
    assert corpus.vocabulary is vocabulary
    with pytest.raises(DataError, match=r"train\.txt is missing"):
        corpus.ids("train")


def test_a_vocabulary_of_another_unit_is_refused(make_folder: MakeFolder, open_corpus: OpenCorpus) -> None:
    with pytest.raises(DataError, match="one of chars, but data set `text` is made of words"):
        open_corpus(make_folder(test="a\n"), "text", vocabulary=Vocabulary(["a"], unit="char"))


def test_a_word_vocabulary_without_eos_is_refused(make_folder: MakeFolder, open_corpus: OpenCorpus) -> None:
    with pytest.raises(DataError, match="no token `<eos>`"):
        open_corpus(make_folder(test="a\n"), "text", vocabulary=Vocabulary(["a", "<unk>"], unit="word"))


def test_a_misspelt_split_names_the_nearest(make_folder: MakeFolder, open_corpus: OpenCorpus) -> None:
    with pytest.raises(ConfigError, match="Did you mean `valid`"):
        open_corpus(make_folder(train=TRAIN, valid="the\n", test="the\n"), "text").ids("vaild")


# --- the cache ---


@pytest.fixture
def folder(make_folder: MakeFolder) -> Path:
    """Give a small word-level corpus."""
    return make_folder(train=TRAIN, valid="the cat\n", test="the zebra\n")


def cached_ids(tmp_path: Path) -> list[Path]:
    """List the cache's entries of ids."""
    return sorted((tmp_path / "cache").glob("*.ids"))


def test_ids_are_mapped_read_only_in_the_smallest_type(folder: Path, open_corpus: OpenCorpus) -> None:
    ids = open_corpus(folder, "text").ids("train")
    assert isinstance(ids, np.memmap)
    assert ids.dtype == np.uint16
    with pytest.raises(ValueError, match="read-only"):
        ids[0] = 1


def test_a_large_vocabulary_takes_wider_ids(folder: Path, open_corpus: OpenCorpus) -> None:
    several = [f"w{i}" for i in range(1 << 16)]
    exactly = open_corpus(folder, "text", vocabulary=Vocabulary(["<eos>", "<unk>", *several[:-2]], unit="word"))
    above = open_corpus(folder, "text", vocabulary=Vocabulary(["<eos>", *several[:-1], "<unk>"], unit="word"))
    assert exactly.ids("test").dtype == np.uint16
    assert above.ids("test").dtype == np.int32
    assert above.ids("test").tolist() == [1 << 16, 1 << 16, 0]


def test_the_second_opening_reads_the_cache_and_not_the_text(
    folder: Path, open_corpus: OpenCorpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = open_corpus(folder, "text")
    expected = first.ids("test").tolist(), first.oov("test")

    def unexpected(*_: object) -> None:
        raise AssertionError("the text was tokenised again")

    monkeypatch.setattr(corpus_module, "scan_text", unexpected)
    second = open_corpus(folder, "text")
    assert (second.ids("test").tolist(), second.oov("test")) == expected
    assert second.vocabulary == first.vocabulary


def test_a_changed_text_is_never_served_from_the_cache(make_folder: MakeFolder, folder: Path, open_corpus: OpenCorpus) -> None:
    before = open_corpus(folder, "text")
    before_ids, before_hash = before.ids("valid").tolist(), before.sha256("valid")
    stat = (folder / "valid.txt").stat()
    make_folder(valid="the dog\n")
    os.utime(folder / "valid.txt", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    after = open_corpus(folder, "text")
    assert words(after, "valid") == "the dog <eos>"
    assert after.ids("valid").tolist() != before_ids
    assert after.sha256("valid") != before_hash


def test_the_same_text_under_another_vocabulary_or_data_set_has_its_own_entry(
    folder: Path, open_corpus: OpenCorpus, tmp_path: Path
) -> None:
    other = Vocabulary(["<eos>", "cat", "the"], unit="word")
    assert open_corpus(folder, "text").ids("valid").tolist() != open_corpus(folder, "text", vocabulary=other).ids("valid").tolist()
    assert len(cached_ids(tmp_path)) == 3  # train.txt's was written when its words were counted


def _truncated(content: bytes) -> bytes:
    return content[:-1]


def _longer(content: bytes) -> bytes:
    return content + b"\0\0"


def _empty(content: bytes) -> bytes:
    return b""


def _header_changed(content: bytes) -> bytes:
    return content.replace(b'"n_unknown": 0', b'"n_unknown": 7', 1)


def _header_only(content: bytes) -> bytes:
    return content[:HEADER_BYTES]


def _id_changed(content: bytes) -> bytes:
    return content[:-2] + bytes([content[-2] ^ 1, content[-1]])


def _rubbish(content: bytes) -> bytes:
    return b"\xff" * len(content)


@pytest.mark.parametrize("damage", [_truncated, _longer, _empty, _header_changed, _header_only, _id_changed, _rubbish])
def test_a_damaged_entry_is_built_anew(folder: Path, open_corpus: OpenCorpus, tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    expected = open_corpus(folder, "text").ids("train").tolist()
    (entry,) = cached_ids(tmp_path)
    good = entry.read_bytes()
    bad = damage(good)
    assert bad != good
    entry.write_bytes(bad)
    corpus = open_corpus(folder, "text")
    assert corpus.ids("train").tolist() == expected
    assert corpus.oov("train") == 0
    assert entry.read_bytes() == good


def test_an_entry_of_another_text_under_this_name_is_built_anew(folder: Path, open_corpus: OpenCorpus, tmp_path: Path) -> None:
    corpus = open_corpus(folder, "text")
    corpus.ids("train")
    (train,) = cached_ids(tmp_path)
    corpus.ids("valid")
    (valid,) = set(cached_ids(tmp_path)) - {train}
    valid.write_bytes(train.read_bytes())
    assert words(open_corpus(folder, "text"), "valid") == "the cat <eos>"


def test_a_damaged_cached_vocabulary_is_built_anew(folder: Path, open_corpus: OpenCorpus, tmp_path: Path) -> None:
    expected = open_corpus(folder, "text").vocabulary
    (entry,) = (tmp_path / "cache").glob("*.vocab.json")
    entry.write_text(entry.read_text().replace("cat", "cut"))
    assert open_corpus(folder, "text").vocabulary == expected
    json.loads(entry.read_text())


def test_a_failed_encoding_leaves_nothing_in_the_cache(folder: Path, open_corpus: OpenCorpus, tmp_path: Path) -> None:
    corpus = open_corpus(folder, "wt103")
    with pytest.raises(DataError):
        corpus.ids("test")
    assert sorted(path.suffixes for path in (tmp_path / "cache").iterdir()) == [[".ids"], [".vocab", ".json"]]  # train.txt's alone


def test_a_cache_that_cannot_be_written_names_the_variable(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "in-the-way").write_text("")
    with pytest.raises(EnvironmentUnfitError, match=r"token cache in .*in-the-way") as caught:
        load_corpus(folder, get_dataset("text"), cache_dir=tmp_path / "in-the-way")
    assert "TXL_CACHE_DIR" in str(caught.value.remedy)


def _open_and_sum(folder: Path, cache: Path) -> int:
    return int(load_corpus(folder, get_dataset("text"), cache_dir=cache).ids("train").sum())


def test_several_processes_may_build_the_same_entry_at_once(make_folder: MakeFolder, tmp_path: Path) -> None:
    folder = make_folder(train="a b c d e f g h\n" * 5_000, valid="a\n", test="a\n")
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        sums = pool.starmap(_open_and_sum, [(folder, tmp_path / "cache")] * 6)
    assert len(set(sums)) == 1
    assert not list((tmp_path / "cache").glob("*.tmp"))


def test_who_asks_for_a_text_that_is_being_prepared_waits_for_it(
    make_folder: MakeFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_folder(train="a b\n", valid="a\n", test="b\n")
    began, scans = threading.Event(), []
    scan = corpus_module.scan_text

    def slow(path: Path, *args: Any, **kwargs: Any) -> Any:
        scans.append(path.name)
        began.set()
        time.sleep(0.3)
        return scan(path, *args, **kwargs)

    monkeypatch.setattr(corpus_module, "scan_text", slow)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        first = pool.submit(_open_and_sum, folder, tmp_path / "cache")
        assert began.wait(10)
        second = pool.submit(_open_and_sum, folder, tmp_path / "cache")
        assert first.result() == second.result()
    assert scans == ["train.txt"]
    assert sorted(path.suffix for path in (tmp_path / "cache").iterdir()) == [".ids", ".json"]


def test_a_text_that_changes_while_it_is_read_is_not_kept(make_folder: MakeFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_folder(train="a b\n", valid="a\n", test="b\n")
    scan = corpus_module.scan_text

    def changed(path: Path, *args: Any, **kwargs: Any) -> Any:
        path.write_text("somebody writes\n")
        return scan(path, *args, **kwargs)

    monkeypatch.setattr(corpus_module, "scan_text", changed)
    with pytest.raises(DataError, match=r"train\.txt was changed while it was read"):
        load_corpus(folder, get_dataset("text"), cache_dir=tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("TXL_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert default_cache_dir() == tmp_path / ".cache" / "txl"
    monkeypatch.setenv("XDG_CACHE_HOME", "/some/cache")
    assert default_cache_dir() == Path("/some/cache/txl")
    monkeypatch.setenv("TXL_CACHE_DIR", "/my/cache")
    assert default_cache_dir() == Path("/my/cache")


# --- text in memory ---


def test_lines_in_memory_give_the_ids_of_the_same_file(folder: Path, open_corpus: OpenCorpus) -> None:
    corpus = open_corpus(folder, "text")
    assert encode_text(TRAIN.splitlines(), corpus.spec, corpus.vocabulary).tolist() == corpus.ids("train").tolist()


def test_bytes_in_memory_have_a_line_break_between_lines_only() -> None:
    vocabulary = Vocabulary(["97", "98", "10"], unit="byte")
    assert encode_text(["97 98", "97"], get_dataset("enwik8"), vocabulary).tolist() == [0, 1, 2, 0]


# --- real text ---


def test_wikitext_2_has_the_published_counts(shared_dir: Path, open_corpus: OpenCorpus) -> None:
    corpus = open_corpus(shared_dir / "data" / "wikitext-2", "wt103")
    assert len(corpus.vocabulary) == 33_278
    assert [corpus.n_tokens(split) for split in ("train", "valid", "test")] == [2_088_628, 217_646, 245_569]
    assert corpus.oov("test") == 0


def test_wikitext_103_test_split_alone_can_be_scored(shared_dir: Path, open_corpus: OpenCorpus) -> None:
    vocabulary = open_corpus(shared_dir / "data" / "wikitext-2", "wt103").vocabulary
    corpus = open_corpus(shared_dir / "data" / "wikitext-103-eval", "wt103", vocabulary=vocabulary)
    assert corpus.n_tokens("test") == 245_569
    assert corpus.oov("test") > 0


def test_real_enwik8_bytes_are_seen_to_be_raw(shared_dir: Path) -> None:
    assert detect_form(shared_dir / "data" / "enwik8" / "enwik5.txt", get_dataset("enwik8")) == "raw"
    assert detect_form(shared_dir / "data" / "text8" / "sample.txt", get_dataset("text8")) == "raw"


def test_the_references_character_corpus_is_seen_to_be_prepared(reference_cases: Path, open_corpus: OpenCorpus) -> None:
    corpus = open_corpus(reference_cases / "data" / "char", "text8")
    assert "".join(corpus.vocabulary.symbols[:8]) == "_etanoir"
    assert len(corpus.vocabulary) == 27
    assert corpus.n_tokens("train") == 599_998
