"""The data sets this toolkit knows: their files, their unit, how lines end, what happens to unknown words.

A data set is a `DatasetSpec`, a row of the table `DATASETS`; whoever reads text asks the spec and never the name. Also here: the
checks of a data set's folder. How the text becomes tokens is known to `txl_train.data.layouts`, where the data sets come from to
`txl_train.data.prepare`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from txl_train.errors import ConfigError, DataError, nearest

Unit = Literal["word", "char", "byte", "subword"]
Layout = Literal["words", "text8", "enwik8"]

SPLITS: tuple[str, ...] = ("train", "valid", "test")
"""Names of the splits, in the order in which vocabularies over all of them are counted."""

EOS = "<eos>"
"""The token that ends every line of a word-level data set; always id 0."""
UNK = "<unk>"
"""The token that stands for a word the vocabulary lacks."""
SENTENCE = "<S>"
"""The token between the sentences of One Billion Word."""
LM1B_UNK = "<UNK>"
"""The token that stands for a word the vocabulary lacks in One Billion Word."""

WT103_VOCAB_SIZE = 267_735
"""Tokens in the vocabulary of WikiText-103, `<eos>` included; the cutoffs below belong to it."""
WT103_CUTOFFS = (19_997, 39_997, 199_997)
"""Ids at which the tail clusters start (the specification's values)."""
LM1B_VOCAB_SIZE = 793_471
"""Tokens in the published vocabulary of One Billion Word; the cutoffs below belong to it."""
LM1B_CUTOFFS = (59_997, 99_997, 639_997)
"""Ids at which the tail clusters start (NVIDIA's train.py; the authors' are 60,000, 100,000 and 640,000)."""
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
    """What one token is: a word, a character or a byte. Read by BPE (`--vocab bpe`) any data set of words is one of subwords."""
    layout: Layout
    """How a file is written: words and lines; text8's or enwik8's blank-separated symbols (or their raw form)."""
    description: str
    """One sentence for the help text."""
    files: Mapping[str, str] = field(default_factory=_same_names)
    """Split to file name within the folder."""
    line_end: Literal["eos", "sentence", "none", "byte"] = "eos"
    """What a line break becomes: the token `<eos>`; `<S>`, which then also begins the text; nothing; or the byte 10."""
    line_padding: str = ""
    """What stands at both ends of each line in the published files: nothing to words, but part of the text to subwords."""
    maps_unknown: bool = False
    """Rare and unknown words become `<unk>`, which is then always in the vocabulary."""
    unk: str = UNK
    """The token that stands for unknown words, where they are mapped."""
    vocab_file: str | None = None
    """A file of the folder that is the vocabulary, one word and its count a line; where it is missing, words are counted."""
    counted_splits: tuple[str, ...] = ("train",)
    """Splits over which the vocabulary is counted."""
    cutoffs: tuple[int, ...] = ()
    """Ids at which the tail clusters of the adaptive softmax start, for the full data set; see `default_cutoffs`."""
    full_vocab_size: int = WT103_VOCAB_SIZE
    """Tokens in the full data set's vocabulary, which the cutoffs belong to."""
    ties_projections: bool = True
    """Output projections of the tail clusters are the embedding's own; see `default_tie_projections`."""
    shuffles_sentences: bool = False
    """Lines stand alone, so training reads them in a random order (`txl_train.data.sentences`); evaluation reads them as they come."""
    built_in: bool = False
    """The text comes with Python; `txl_train.data.pydoc.build` writes it."""

    @property
    def line_token(self) -> str | None:
        """The token that ends every line, None where there is none."""
        return {"eos": EOS, "sentence": SENTENCE}.get(self.line_end)


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
                line_padding=" ",
                cutoffs=WT103_CUTOFFS,
                description="WikiText-103 (or -2): tokenised words; a word that train.txt lacks is an error unless <unk> stands for it.",
            ),
            DatasetSpec(
                name="lm1b",
                unit="word",
                layout="words",
                line_end="sentence",
                maps_unknown=True,
                unk=LM1B_UNK,
                vocab_file="1b_word_vocab.txt",
                cutoffs=LM1B_CUTOFFS,
                full_vocab_size=LM1B_VOCAB_SIZE,
                ties_projections=False,
                shuffles_sentences=True,
                description="One Billion Word: one sentence a line, shuffled in training; words as in 1b_word_vocab.txt if it is there.",
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

    The data set's own where the vocabulary reaches beyond them; the same proportions of the full vocabulary for a smaller one;
    none (a plain softmax) below `SMALLEST_ADAPTIVE_VOCAB` tokens or where the data set has none. GPT-2's subwords are numbered in the
    order in which they were merged, which is roughly, not exactly, by frequency: clusters save less with them than with words.
    """
    if not spec.cutoffs or vocab_size < SMALLEST_ADAPTIVE_VOCAB:
        return ()
    if vocab_size > spec.cutoffs[-1]:
        return spec.cutoffs
    return tuple(max(1, cutoff * vocab_size // spec.full_vocab_size) for cutoff in spec.cutoffs)


def default_tie_projections(spec: DatasetSpec, n_clusters: int) -> tuple[bool, ...] | None:
    """Return for the head and each of `n_clusters` tail clusters whether the output projection is the embedding's; None is the usual rule.

    The usual rule, of WikiText-103, ties all but the head's; One Billion Word ties none (train.py of the authors and of NVIDIA).
    """
    return None if spec.ties_projections else (False,) * (n_clusters + 1)


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
            remedy=f"Give the folder that holds {wanted} with `--data`." + _how_to_get(spec, directory),
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
                f"Data set `{spec.name}` has no {split} split: {path} is missing.", remedy=_remedy_for_missing(path, split, spec)
            )
        if path.stat().st_size == 0:
            raise DataError(
                f"The {split} split of data set `{spec.name}` is empty: {path} has 0 bytes.",
                remedy="Copy or build the file again; an interrupted download or a full disk leaves empty files.",
            )
    return paths


def _remedy_for_missing(path: Path, split: str, spec: DatasetSpec) -> str:
    """Say how to get the missing file, pointing at a file that looks like it under another name."""
    for other in (f"wiki.{split}.tokens", f"wiki.{split}.raw", f"{split}.tokens", f"ptb.{split}.txt", f"{split}.txt.raw"):
        if (path.parent / other).is_file():
            return f"Rename {other} to {path.name} if that is the {split} split."
    wanted = " ".join(spec.files.values())
    return f"Put {wanted} into {path.parent}, or give another folder with `--data`." + _how_to_get(spec, path.parent)


def _how_to_get(spec: DatasetSpec, directory: Path) -> str:
    """Name the command that makes the folder, for data sets that have one."""
    return "" if spec.name == "text" else f" `txl data prepare {spec.name} --out {directory}` makes one."
