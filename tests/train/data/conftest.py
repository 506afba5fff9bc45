"""Small corpora on disk, and a cache of their own for each test."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from txl_train.data.corpus import Corpus, VocabKind, load_corpus
from txl_train.data.datasets import get_dataset
from txl_train.data.vocabulary import Vocabulary

MakeFolder = Callable[..., Path]
OpenCorpus = Callable[..., Corpus]


@pytest.fixture
def make_folder(tmp_path: Path) -> MakeFolder:
    """Write splits into a folder: make_folder(train="a b\\n", valid=..., test=...); str or bytes; None leaves a file out."""

    def make(name: str = "corpus", **splits: str | bytes | None) -> Path:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        for split, text in splits.items():
            if text is not None:
                (folder / f"{split}.txt").write_bytes(text.encode() if isinstance(text, str) else text)
        return folder

    return make


@pytest.fixture
def open_corpus(tmp_path: Path) -> OpenCorpus:
    """Open a folder with a cache below the test's own folder."""

    def open_it(
        folder: Path, dataset: str, *, vocabulary: Vocabulary | None = None, min_count: int = 1, vocab: VocabKind = "word"
    ) -> Corpus:
        return load_corpus(
            folder, get_dataset(dataset), cache_dir=tmp_path / "cache", vocabulary=vocabulary, min_count=min_count, vocab=vocab
        )

    return open_it
