"""The data sets this toolkit knows: their files, their unit, how lines end, what happens to unknown words.

A data set is a `DatasetSpec`, a row of the table `DATASETS`; whoever reads text asks the spec and never the name. Also here: the
checks of a data set's folder, and writing a file so that it is either whole or absent. How the text becomes tokens is known to
`txl_train.data.corpus`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from txl_train.errors import ConfigError, DataError, nearest

Unit = Literal["word", "char", "byte"]
Layout = Literal["words", "text8", "enwik8"]

SPLITS: tuple[str, ...] = ("train", "valid", "test")
"""Names of the splits, in the order in which vocabularies over all of them are counted."""

EOS = "<eos>"
"""The token that ends every line of a word-level data set; always id 0."""
UNK = "<unk>"
"""The token that stands for a word the vocabulary lacks."""

WT103_VOCAB_SIZE = 267_735
"""Tokens in the vocabulary of WikiText-103, `<eos>` included; the cutoffs below belong to it."""
WT103_CUTOFFS = (19_997, 39_997, 199_997)
"""Ids at which the tail clusters start (the specification's values)."""
SMALLEST_ADAPTIVE_VOCAB = 2_000
"""Below this many tokens an adaptive softmax saves nothing."""


def _same_names() -> Mapping[str, str]:
    return MappingProxyType({split: f"{split}.txt" for split in SPLITS})


@dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """How the text of one data set is laid out and becomes tokens."""

    name: str
    """The value of `--dataset`."""
    unit: Unit
    """What one token is; perplexity is per word, bits per character per char or byte."""
    layout: Layout
    """How a file is written: words and lines; text8's or enwik8's blank-separated symbols (or their raw form)."""
    description: str
    """One sentence for the help text."""
    files: Mapping[str, str] = field(default_factory=_same_names)
    """Split to file name within the folder."""
    line_end: Literal["eos", "none", "byte"] = "eos"
    """What a line break becomes: the token `<eos>`, nothing, or the byte 10."""
    maps_unknown: bool = False
    """Rare and unknown words become `<unk>`, which is then always in the vocabulary."""
    counted_splits: tuple[str, ...] = ("train",)
    """Splits over which the vocabulary is counted."""
    cutoffs: tuple[int, ...] = ()
    """Ids at which the tail clusters of the adaptive softmax start, for the full data set; see `default_cutoffs`."""
    built_in: bool = False
    """The text comes with Python; `txl_train.data.pydoc.build` writes it."""

    @property
    def tokenizer_id(self) -> str:
        """Names the rule that turns a file into tokens, with its version: part of every cache key."""
        return f"{self.layout}/1"


DATASETS: Mapping[str, DatasetSpec] = MappingProxyType(
    {
        spec.name: spec
        for spec in (
            DatasetSpec(
                name="pydoc",
                unit="word",
                layout="words",
                maps_unknown=True,
                cutoffs=WT103_CUTOFFS,
                built_in=True,
                description="Built-in corpus of about 58 thousand tokens: the prose of Python's own language help.",
            ),
            DatasetSpec(
                name="text",
                unit="word",
                layout="words",
                maps_unknown=True,
                cutoffs=WT103_CUTOFFS,
                description="Any folder of train.txt, valid.txt and test.txt with words separated by blanks; unknown words become <unk>.",
            ),
            DatasetSpec(
                name="wt103",
                unit="word",
                layout="words",
                cutoffs=WT103_CUTOFFS,
                description="WikiText-103 (or -2): tokenised words; a word that train.txt lacks is an error unless <unk> stands for it.",
            ),
            DatasetSpec(
                name="text8",
                unit="char",
                layout="text8",
                line_end="none",
                counted_splits=SPLITS,
                description="text8: the letters a-z and the blank, as prep_text8 writes them (blanks between, _ for a blank) or raw.",
            ),
            DatasetSpec(
                name="enwik8",
                unit="byte",
                layout="enwik8",
                line_end="byte",
                counted_splits=SPLITS,
                description="enwik8: bytes, as prep_enwik8 writes them (decimal values, blanks between) or raw.",
            ),
        )
    }
)
"""All data sets by name."""


def get_dataset(name: str) -> DatasetSpec:
    """Return the data set called `name`; otherwise a `ConfigError` with the nearest name."""
    try:
        return DATASETS[name]
    except KeyError:
        raise ConfigError(
            f"`{name}` is no data set.{nearest(name, DATASETS)}",
            remedy=f"Choose one of {', '.join(DATASETS)}; any folder of train.txt, valid.txt and test.txt is `text`.",
        ) from None


def default_cutoffs(spec: DatasetSpec, vocab_size: int) -> tuple[int, ...]:
    """Return cutoffs for the adaptive softmax of a vocabulary of `vocab_size` tokens; every cluster gets at least one token.

    The data set's own where the vocabulary reaches beyond them; the same proportions of WikiText-103 for a smaller vocabulary;
    none (a plain softmax) below `SMALLEST_ADAPTIVE_VOCAB` tokens or where the data set has none.
    """
    if not spec.cutoffs or vocab_size < SMALLEST_ADAPTIVE_VOCAB:
        return ()
    if vocab_size > spec.cutoffs[-1]:
        return spec.cutoffs
    return tuple(max(1, cutoff * vocab_size // WT103_VOCAB_SIZE) for cutoff in spec.cutoffs)


def check_folder(directory: Path, spec: DatasetSpec, splits: Iterable[str] = SPLITS) -> dict[str, Path]:
    """Return the path of each split's file; a `DataError` names the first that is missing or empty, and what to do."""
    try:
        return _checked_paths(directory, spec, splits)
    except OSError as error:
        raise DataError(
            f"{error.filename or directory} cannot be read: {error.strerror or error}.", remedy="Allow reading it, or copy it elsewhere."
        ) from error


def _checked_paths(directory: Path, spec: DatasetSpec, splits: Iterable[str]) -> dict[str, Path]:
    wanted = " ".join(spec.files.values())
    if not directory.exists():
        raise DataError(
            f"There is no folder {directory} to read data set `{spec.name}` from.",
            remedy=f"Give the folder that holds {wanted} with `--data`.",
        )
    if not directory.is_dir():
        raise DataError(
            f"{directory} is a file, but `{spec.name}` is read from a folder that holds {wanted}.",
            remedy=f"Give its folder with `--data {directory.parent}`.",
        )
    paths = {split: directory / spec.files[split] for split in splits}
    for split, path in paths.items():
        if not path.is_file():
            raise DataError(
                f"Data set `{spec.name}` has no {split} split: {path} is missing.", remedy=_remedy_for_missing(path, split, wanted)
            )
        if path.stat().st_size == 0:
            raise DataError(
                f"The {split} split of data set `{spec.name}` is empty: {path} has 0 bytes.",
                remedy="Copy or build the file again; an interrupted download or a full disk leaves empty files.",
            )
    return paths


def _remedy_for_missing(path: Path, split: str, wanted: str) -> str:
    """Say how to get the missing file, pointing at a file that looks like it under another name."""
    for other in (f"wiki.{split}.tokens", f"wiki.{split}.raw", f"{split}.tokens", f"ptb.{split}.txt", f"{split}.txt.raw"):
        if (path.parent / other).is_file():
            return f"Rename {other} to {path.name} if that is the {split} split."
    return f"Put {wanted} into {path.parent}, or give another folder with `--data`."
