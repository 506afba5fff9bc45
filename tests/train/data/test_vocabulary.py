"""Vocabularies: order, lookup, what is kept on disk and what is refused."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from txl_train.data.vocabulary import MISSING, Vocabulary
from txl_train.errors import DataError


def counts(text: str) -> Counter[str]:
    """Count words in order of appearance."""
    return Counter(text.split())


def test_words_come_by_descending_count_and_ties_by_first_appearance() -> None:
    vocabulary = Vocabulary.from_counts(counts("b a c a c d e"), unit="word", specials=("<eos>",))
    assert vocabulary.symbols == ("<eos>", "a", "c", "b", "d", "e")
    assert vocabulary.eos_id == 0
    assert vocabulary.unk_id is None


def test_eos_written_in_the_text_is_the_same_token() -> None:
    assert Vocabulary.from_counts(counts("<eos> <eos> a"), unit="word", specials=("<eos>",)).symbols == ("<eos>", "a")


def test_rare_words_give_their_counts_to_unk_which_takes_its_place_by_count() -> None:
    vocabulary = Vocabulary.from_counts(counts("a a a a b b x y z"), unit="word", min_count=2, maps_unknown=True)
    assert vocabulary.symbols == ("a", "<unk>", "b")


def test_unk_written_in_the_text_and_rare_words_are_one_token() -> None:
    vocabulary = Vocabulary.from_counts(counts("a a a <unk> <unk> b b b c c c x y"), unit="word", min_count=2, maps_unknown=True)
    assert vocabulary.symbols == ("<unk>", "a", "b", "c")


def test_unk_is_there_even_when_nothing_is_rare() -> None:
    assert Vocabulary.from_counts(counts("a a b"), unit="word", maps_unknown=True).symbols == ("a", "b", "<unk>")


def test_unknown_words_may_have_another_name() -> None:
    vocabulary = Vocabulary.from_counts(counts("a a x"), unit="word", specials=("<S>",), min_count=2, maps_unknown=True, unk="<UNK>")
    assert vocabulary.symbols == ("<S>", "a", "<UNK>")
    assert (vocabulary.eos_id, vocabulary.unk_id) == (0, 2)


@pytest.mark.parametrize(("unit", "expected"), [("word", False), ("subword", False), ("char", True), ("byte", True)])
def test_characters_and_bytes_are_scored_in_bits(unit: Any, expected: bool) -> None:
    assert Vocabulary(["a"], unit=unit).counts_characters is expected


def test_encode_and_decode_are_inverse() -> None:
    vocabulary = Vocabulary(["<eos>", "a", "b"], unit="word")
    ids = vocabulary.encode(["b", "a", "<eos>"])
    assert ids.dtype == np.int64
    assert ids.tolist() == [2, 1, 0]
    assert vocabulary.decode(ids) == ["b", "a", "<eos>"]


def test_an_unknown_word_becomes_unk() -> None:
    assert Vocabulary(["a", "<unk>"], unit="word").encode(["a", "zebra"]).tolist() == [0, 1]


def test_an_unknown_word_without_unk_is_named() -> None:
    with pytest.raises(DataError, match="`zebra`"):
        Vocabulary(["a"], unit="word").encode(["a", "zebra"])


def test_find_marks_what_is_missing() -> None:
    assert Vocabulary(["a", "<unk>"], unit="word").find(["x", "a"]).tolist() == [MISSING, 0]


@pytest.mark.parametrize("i", [-1, 2])
def test_an_id_outside_the_vocabulary_is_refused(i: int) -> None:
    with pytest.raises(DataError, match=f"no token with id {i}"):
        Vocabulary(["a", "b"], unit="char").decode([i])


def test_characters_have_neither_eos_nor_unk() -> None:
    vocabulary = Vocabulary(["<eos>", "<unk>"], unit="char")
    assert vocabulary.eos_id is None
    assert vocabulary.unk_id is None


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, unique=True))
def test_any_vocabulary_survives_its_dict(symbols: list[str]) -> None:
    vocabulary = Vocabulary(symbols, unit="word")
    again = Vocabulary.from_dict(json.loads(json.dumps(vocabulary.to_dict())))
    assert again == vocabulary
    assert again.sha256 == vocabulary.sha256


def test_save_and_load_keep_everything(tmp_path: Path) -> None:
    vocabulary = Vocabulary(["<eos>", "na\u00efve", "\u6771\u4eac", '"', "\\", "\x1f"], unit="word")
    vocabulary.save(tmp_path / "v.json")
    assert Vocabulary.load(tmp_path / "v.json") == vocabulary


def test_the_hash_is_of_the_content_and_stays_the_same() -> None:
    # A fixed value: caches and checkpoints written earlier rely on it.
    assert Vocabulary(["<eos>", "caf\u00e9"], unit="word").sha256 == "090b06bb3976823994853ac15c9833725c07c8c5de3e13008fc8dfcfc6c6e7dd"
    assert Vocabulary(["a", "b"], unit="word").sha256 != Vocabulary(["b", "a"], unit="word").sha256
    assert Vocabulary(["a", "b"], unit="word").sha256 != Vocabulary(["a", "b"], unit="char").sha256


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"symbols": ["a", "b", "a"]}, "`a` twice"),
        ({"symbols": ["a", 3]}, "must be a string"),
        ({"symbols": ["a", ["b"]]}, "must be a string"),
        ({"symbols": []}, "no tokens"),
        ({"symbols": "ab"}, "no list"),
        ({"symbols": ["a", "c"]}, "was changed"),
        ({"unit": "syllable"}, "unit"),
        ({"format": "other"}, "no vocabulary"),
        ({"version": 99}, "version 99"),
    ],
)
def test_a_damaged_vocabulary_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "v.json"
    path.write_text(json.dumps(Vocabulary(["a", "b"], unit="word").to_dict() | change))
    with pytest.raises(DataError, match=message) as caught:
        Vocabulary.load(path)
    assert str(path) in caught.value.message


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[1, 2]", b"null"])
def test_a_file_that_is_no_vocabulary_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "v.json").write_bytes(content)
    with pytest.raises(DataError, match=r"v\.json"):
        Vocabulary.load(tmp_path / "v.json")


def test_a_missing_vocabulary_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.json cannot be read"):
        Vocabulary.load(tmp_path / "none.json")
