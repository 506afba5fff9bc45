"""Corpora: what each data set's text becomes, what the cache keeps, and what is refused."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from txl_train.data import corpus as corpus_module
from txl_train.data.corpus import HEADER_BYTES, Corpus, default_cache_dir, encode_text, load_corpus
from txl_train.data.datasets import get_dataset
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


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(st.sampled_from("ab \n\t\u00a0\u00e9"), min_size=1, max_size=60))
def test_reading_in_small_portions_changes_nothing(make_folder: MakeFolder, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    folder = make_folder(train=text + "x")
    monkeypatch.setattr(corpus_module, "CHUNK_CHARS", 7)
    tokens = [token for part in corpus_module.read_tokens(folder / "train.txt", get_dataset("text")) for token in part]
    assert tokens == [token for line in (text + "x").split("\n") for token in [*line.split(), "<eos>"]]


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

    monkeypatch.setattr(corpus_module, "read_tokens", unexpected)
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
    assert len(cached_ids(tmp_path)) == 2


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
    assert [path.suffixes for path in (tmp_path / "cache").iterdir()] == [[".vocab", ".json"]]


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
    assert corpus_module.detect_form(shared_dir / "data" / "enwik8" / "enwik5.txt", get_dataset("enwik8")) == "raw"
    assert corpus_module.detect_form(shared_dir / "data" / "text8" / "sample.txt", get_dataset("text8")) == "raw"


def test_the_references_character_corpus_is_seen_to_be_prepared(reference_cases: Path, open_corpus: OpenCorpus) -> None:
    corpus = open_corpus(reference_cases / "data" / "char", "text8")
    assert "".join(corpus.vocabulary.symbols[:8]) == "_etanoir"
    assert len(corpus.vocabulary) == 27
    assert corpus.n_tokens("train") == 599_998
