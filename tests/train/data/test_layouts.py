"""Files become tokens the same way however they are read: in small blocks, in portions, whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from txl_train.data import bpe, layouts
from txl_train.data.datasets import DatasetSpec, get_dataset
from txl_train.data.layouts import Found, Portion, portions, read, rule_of
from txl_train.errors import DataError

WORDS = st.text(st.sampled_from("ab \n\t\r\u00a0\u3000\u00e9\x1c"), min_size=1, max_size=80)
small_blocks = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def _blocks_of_7_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layouts, "CHUNK_BYTES", 7)


def tokens(path: Path, spec: DatasetSpec, *, n: int = 1) -> list[str]:
    """Read a file in `n` portions and write its tokens out."""
    rule = rule_of(path, spec)
    written: list[str] = []
    for portion in portions(path, rule, n):
        found = Found()
        numbers = np.concatenate([np.empty(0, dtype=np.int32), *read(path, rule, portion, found)])
        written += np.array([*found.numbers, ""])[numbers].tolist()
    return written


def subwords(path: Path, *, n: int = 1, dataset: str = "text") -> tuple[list[int], int]:
    """Read a file in `n` portions as GPT-2's subwords; return their ids, and the number of words and line ends."""
    rule = rule_of(path, get_dataset(dataset), subwords=True)
    ids: list[int] = []
    n_words = 0
    for portion in portions(path, rule, n):
        found = Found()
        for numbers in read(path, rule, portion, found):
            ids += numbers.tolist()
        n_words += found.n_words
    return ids, n_words


@pytest.mark.usefixtures("_blocks_of_7_bytes")
@small_blocks
@given(WORDS, st.integers(1, 4))
def test_words_are_those_that_python_splits_line_by_line(tmp_path: Path, text: str, n: int) -> None:
    path = tmp_path / "train.txt"
    path.write_bytes((text + "x").encode())
    with path.open(encoding="utf-8") as lines:
        expected = [token for line in lines for token in [*line.split(), "<eos>"]]
    assert tokens(path, get_dataset("text"), n=n) == expected


@pytest.mark.usefixtures("_blocks_of_7_bytes")
@small_blocks
@given(st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("ab  \n'1"), max_size=60), st.integers(1, 4))
def test_subwords_give_the_text_back_and_are_those_of_each_line(tmp_path: Path, text: str, n: int) -> None:
    pytest.importorskip("tiktoken")
    path = tmp_path / "train.txt"
    path.write_bytes((text + "x").encode())
    ids, _ = subwords(path, n=n)
    assert bpe.decode(ids) == (text + "x").removeprefix("\ufeff")
    encode = bpe.encoder()
    lines = (text + "x").removeprefix("\ufeff").split("\n")
    assert ids == [i for line in lines for i in [bpe.NEWLINE_ID, *encode(line)]][1:]


@pytest.mark.usefixtures("_blocks_of_7_bytes")
@pytest.mark.parametrize("n", [1, 3])
def test_blanks_in_a_row_stay_together_among_subwords(tmp_path: Path, n: int) -> None:
    pytest.importorskip("tiktoken")
    path = tmp_path / "train.txt"
    for before in range(8):
        line = "x" * before + " " * 9 + "y   z"
        path.write_text(line)
        assert subwords(path, n=n)[0] == bpe.encoder()(line)


@pytest.mark.parametrize("text", ["a b\n\nc", "a b\n\nc\n", "\u00a0 x  y \n"])
def test_words_are_counted_alike_whatever_the_tokens_are(tmp_path: Path, text: str) -> None:
    pytest.importorskip("tiktoken")
    path = tmp_path / "train.txt"
    path.write_text(text)
    assert subwords(path)[1] == len(tokens(path, get_dataset("text")))


def test_one_billion_word_has_a_boundary_on_both_sides_of_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "train.txt"
    path.write_text("A b .\nC .")
    assert tokens(path, get_dataset("lm1b")) == ["<S>", "A", "b", ".", "<S>", "C", ".", "<S>"]
    assert tokens(path, get_dataset("lm1b"), n=2) == ["<S>", "A", "b", ".", "<S>", "C", ".", "<S>"]
    pytest.importorskip("tiktoken")
    assert bpe.decode(subwords(path, dataset="lm1b")[0]) == "\nA b .\nC .\n"


@pytest.mark.usefixtures("_blocks_of_7_bytes")
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize(
    ("dataset", "text", "expected"),
    [
        ("text8", b"T h e _ c a t\n_ s a t \n", "the_cat_sat"),
        ("text8", b" the cat  sat \n", "the_cat__sat"),
        ("enwik8", b"97 98 99\n97 98 \n", "97 98 99 10 97 98 10"),
        ("enwik8", b"\xef\xbb\xbfa\n\xff", "239 187 191 97 10 255"),
    ],
)
def test_characters_and_bytes_in_blocks_and_portions(tmp_path: Path, dataset: str, text: bytes, expected: str, n: int) -> None:
    path = tmp_path / "train.txt"
    path.write_bytes(text)
    assert ("" if dataset == "text8" else " ").join(tokens(path, get_dataset(dataset), n=n)) == expected


def test_tokens_are_numbered_as_they_appear(tmp_path: Path) -> None:
    path = tmp_path / "train.txt"
    path.write_bytes(b"zebra and zebra")
    for dataset, first in (("text", ["zebra", "and", "<eos>"]), ("text8", ["z", "e", "b", "r", "a", "_"]), ("enwik8", ["122", "101"])):
        found = Found()
        size = path.stat().st_size
        list(read(path, rule_of(path, get_dataset(dataset)), Portion(0, size, size), found))
        assert list(found.numbers)[: len(first)] == first


@pytest.mark.parametrize("n", [1, 2, 5, 50])
def test_portions_cover_a_file_and_meet_between_words(tmp_path: Path, n: int) -> None:
    path = tmp_path / "train.txt"
    content = b"some words and\nlines of words\n" * 20
    path.write_bytes(content)
    found = portions(path, rule_of(path, get_dataset("text")), n)
    assert 1 <= len(found) <= n
    assert found[0].is_first
    assert found[-1].is_last
    assert all(a.end == b.start and a.start < a.end for a, b in zip(found, found[1:], strict=False))
    assert all(content[portion.end - 1 : portion.end] in (b" ", b"\n") for portion in found)


def test_a_text_without_blanks_is_one_portion(tmp_path: Path) -> None:
    path = tmp_path / "train.txt"
    path.write_bytes(b"x" * 1000)
    assert len(portions(path, rule_of(path, get_dataset("text")), 4)) == 1


@pytest.mark.usefixtures("_blocks_of_7_bytes")
def test_a_character_cut_by_the_end_of_a_block_is_whole_again(tmp_path: Path) -> None:
    path = tmp_path / "train.txt"
    path.write_text("\u65e5\u672c\u8a9e\u65e5\u672c \u8a9e")
    assert tokens(path, get_dataset("text"))[0] == "\u65e5\u672c\u8a9e\u65e5\u672c"


@pytest.mark.parametrize(("content", "line"), [(b"fine\nna\xefve\n", 2), (b"\xff", 1)])
def test_what_is_not_utf8_is_named_with_its_line(tmp_path: Path, content: bytes, line: int) -> None:
    path = tmp_path / "train.txt"
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"train\.txt, line {line}: not UTF-8"):
        tokens(path, get_dataset("text"))
