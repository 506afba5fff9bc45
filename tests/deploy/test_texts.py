"""Files become units: as many as there are lines, documents or files, with the ids that the data set's own files would give."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

from tests.support import words
from txl_deploy.corpora import ModelData
from txl_deploy.texts import Texts
from txl_train.data import bpe
from txl_train.data.corpus import load_corpus
from txl_train.data.datasets import get_dataset
from txl_train.data.vocabulary import Vocabulary
from txl_train.errors import DataError

WORDS = Vocabulary(words(12), unit="word")
BYTES = Vocabulary([str(value) for value in range(256)], unit="byte")
LETTERS = Vocabulary(["_", *"abcdefghijklmnopqrstuvwxyz"], unit="char")


def units(path: Path, *, vocabulary: Vocabulary = WORDS, dataset: str = "text", **given) -> list[tuple]:
    options = {"dataset": None, "per": "line", "context": "eos", "tokenized": False} | given
    return list(Texts(ModelData(dataset, vocabulary, None), **options).units([path]))


def written(folder: Path, content: bytes) -> Path:
    path = folder / "text.txt"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("per", "expected"),
    [
        ("line", [(0, 1, [0, 2, 0]), (1, 2, [0, 3, 0]), (2, 3, [0, 0]), (3, 4, [0, 0]), (4, 5, [0, 1, 0])]),
        ("document", [(0, 1, [0, 2, 0, 3, 0]), (1, 5, [0, 1, 0])]),
        ("file", [(0, 1, [0, 2, 0, 3, 0, 0, 0, 1, 0])]),
    ],
)
def test_a_unit_is_a_line_a_document_or_a_file(tmp_path: Path, per: str, expected: list) -> None:
    found = units(written(tmp_path, b"word0\nword1\r\n\n \nnobody\n"), per=per)
    assert [(unit.index, unit.line, ids.tolist()) for unit, ids in found] == expected
    assert sum(unit.n_oov for unit, _ in found) == 1
    assert sum(unit.n_words for unit, _ in found) == 3


@pytest.mark.parametrize("content", [b"a b\nc\n", b"a\n\n", b"\n\na", b"a\x0cb\x1dc\n", "a\u2028b\u0085c\nd\n".encode()])
def test_a_file_has_the_ids_that_it_has_as_a_data_set(tmp_path: Path, content: bytes) -> None:
    """Empty lines at the end, and characters at which Python, but no editor, ends a line."""
    for split in ("train", "valid", "test"):
        (tmp_path / f"{split}.txt").write_bytes(content)
    corpus = load_corpus(tmp_path, get_dataset("text"), cache_dir=tmp_path / "cache")
    ((unit, ids),) = units(tmp_path / "test.txt", vocabulary=corpus.vocabulary, per="file", context="none", tokenized=True)
    assert ids.tolist() == corpus.ids("test").tolist()
    assert unit.n_oov == corpus.oov("test")
    (raw,) = units(tmp_path / "test.txt", vocabulary=corpus.vocabulary, per="file", context="none")
    assert raw[1].tolist() == ids.tolist()
    assert len(units(tmp_path / "test.txt", vocabulary=corpus.vocabulary)) == content.count(b"\n") + (not content.endswith(b"\n"))


@pytest.mark.parametrize(("per", "count"), [("line", 0), ("document", 0), ("file", 1)])
def test_an_empty_file_holds_no_line_and_is_a_file_all_the_same(tmp_path: Path, per: str, count: int) -> None:
    found = units(written(tmp_path, b""), per=per)
    assert [ids.tolist() for _, ids in found] == [[]] * count


def test_without_a_line_before_it_the_first_token_has_no_predecessor(tmp_path: Path) -> None:
    ((_, ids),) = units(written(tmp_path, b"word0 word1"), context="none")
    assert ids.tolist() == [2, 3, 0]


def test_raw_text_is_tokenised_as_the_data_set_was(tmp_path: Path) -> None:
    vocabulary = Vocabulary(["<eos>", "<unk>", "well", "@-@", "known"], unit="word")
    path = written(tmp_path, b"well-known\n")
    assert units(path, vocabulary=vocabulary, dataset="wt103")[0][1].tolist() == [0, 2, 3, 4, 0]
    assert units(path, vocabulary=vocabulary, dataset="wt103", tokenized=True)[0][1].tolist() == [0, 1, 0]


def test_a_model_of_bytes_reads_any_file(tmp_path: Path) -> None:
    content = bytes(range(256)) + b"\r\n\xff"
    ((_, ids),) = units(written(tmp_path, content), vocabulary=BYTES, dataset="enwik8", per="file")
    assert ids.tolist() == list(content)


def test_a_model_of_letters_sees_one_text(tmp_path: Path) -> None:
    ((_, ids),) = units(written(tmp_path, b"Ab\nc\n"), vocabulary=LETTERS, dataset="text8", per="file")
    assert ids.tolist() == [1, 2, 0, 3]


def test_subwords_lack_nothing(tmp_path: Path) -> None:
    ((unit, ids),) = units(written(tmp_path, b"Zyzzyva!\n"), vocabulary=bpe.vocabulary(), dataset="text")
    assert unit.n_oov == 0
    assert ids[0] == ids[-1] == bpe.NEWLINE_ID
    assert bpe.decode(ids[1:-1]) == "Zyzzyva!"


def test_sentences_of_lm1b_begin_with_their_own_token(tmp_path: Path) -> None:
    vocabulary = Vocabulary(["<S>", "<UNK>", "cat"], unit="word")
    for context in ("eos", "none"):
        ((_, ids),) = units(written(tmp_path, b"cat\n"), vocabulary=vocabulary, dataset="lm1b", context=context)
        assert ids.tolist() == [0, 2, 0]


def test_what_is_no_text_is_told_by_file_and_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"Line 2 of .*text.txt is not UTF-8"):
        units(written(tmp_path, b"word0\n\x89PNG\xff\n"))
    with pytest.raises(DataError, match=r"text.txt, line 2: The word `dog`"):
        units(written(tmp_path, b"cat\ndog\n"), vocabulary=Vocabulary(["<eos>", "cat"], unit="word"), dataset="wt103", tokenized=True)
    with pytest.raises(DataError, match="cannot be read: No such file"):
        units(tmp_path / "nowhere")
    with pytest.raises(DataError, match="cannot be read: Is a directory"):
        units(tmp_path)


def test_standard_input_may_be_a_stand_in_or_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"word0\n")))
    assert [ids.tolist() for _, ids in units(Path("-"))] == [[0, 2, 0]]
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(DataError, match="no standard input"):
        units(Path("-"))
