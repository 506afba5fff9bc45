"""The tokens of an imported model: from its own file, from another file, or counted from the text it was trained on."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from txl_train.data import bpe
from txl_train.data.corpus import check_vocabulary, load_corpus
from txl_train.data.datasets import DATASETS, EOS, SENTENCE, SPLITS, DatasetSpec, get_dataset
from txl_train.data.layouts import BYTE_TOKENS, NEWLINE_TOKEN
from txl_train.data.vocabulary import FORMAT, Vocabulary
from txl_train.errors import CheckpointError, DataError, UsageError, nearest
from txl_train.interop.foreign import ordered
from txl_train.interop.huggingface import VOCABULARY_NAMES
from txl_train.interop.pickles import PLAIN, Inert, inert, printable, read_pickle
from txl_train.interop.torch_files import LEGACY_MAGIC, TORCH, open_torch

LARGEST_FILE_BYTES = 1 << 28
"""Twenty times the vocabulary of the One Billion Word corpus."""

MOST_LEFT_OUT = 3
"""Tokens beyond the embedding's rows: Hugging Face adds some to a vocabulary without telling the model."""

COUNTED_OTHERWISE: dict[str, DatasetSpec] = {"wt2": dataclasses.replace(DATASETS["wt103"], counted_splits=SPLITS)}
"""Data sets of the authors' program that are read like one of ours, but whose vocabulary is counted over other splits."""

_CACHE_NAMES = {**TORCH, **VOCABULARY_NAMES, **inert("data_utils.Corpus", "utils.vocabulary.Vocab", "vocabulary.Vocab")}


def resolve_dataset(named: str | None, recorded: str | None, symbols: tuple[str, ...]) -> str:
    """Return our name of the data set: the one the user names, or the recorded one, or the one whose tokens look like these.

    Raises `UsageError` where none of these says it.
    """
    for name in (named, recorded):
        if name in DATASETS:
            return str(name)
        if name in COUNTED_OTHERWISE:
            return COUNTED_OTHERWISE[name].name
        if name is not None:
            raise UsageError(
                f"The data set `{name}` is not known here.{nearest(name, DATASETS)}",
                remedy=f"Say with `--dataset` how its text becomes tokens: {', '.join(DATASETS)}.",
            )
    if all(len(symbol) == 1 for symbol in symbols):
        return "text8"
    if all(symbol in BYTE_TOKENS for symbol in symbols):
        return "enwik8"
    if EOS in symbols or _is_gpt2(symbols):
        return "wt103"
    if SENTENCE in symbols:
        return "lm1b"
    raise UsageError(
        f"It is not recorded which data set the model was trained on, and its vocabulary has no `{EOS}` to tell it by.",
        remedy=f"Give it with `--dataset`: {', '.join(DATASETS)}.",
    )


def fit_symbols(symbols: tuple[str, ...], vocab_size: int, where: str) -> tuple[tuple[str, ...], str | None]:
    """Return the tokens of a model that has `vocab_size` of them, and a note where a few beyond that were left out.

    Raises `CheckpointError` where there are too few, or many too many.
    """
    if len(symbols) == vocab_size:
        return symbols, None
    left_out = ", ".join(f"`{printable(symbol)}`" for symbol in symbols[vocab_size : vocab_size + MOST_LEFT_OUT])
    if not vocab_size < len(symbols) <= vocab_size + MOST_LEFT_OUT:
        raise CheckpointError(
            f"{where} is a vocabulary of {len(symbols)} tokens, but the model has {vocab_size}.",
            remedy="Give the vocabulary it was trained with: `--vocab FILE`, or its text with `--data DIR --dataset NAME`.",
        )
    return symbols[:vocab_size], f"The vocabulary's last tokens, {left_out}, have no row in the embedding, and were left out."


def make_vocabulary(symbols: tuple[str, ...], dataset: str, where: str) -> Vocabulary:
    """Return the vocabulary. Raises `CheckpointError` where a token is there twice, or where they are not of the data set's kind."""
    spec = get_dataset(dataset)
    try:
        vocabulary = Vocabulary(symbols, unit="subword" if _is_gpt2(symbols) else spec.unit)
        check_vocabulary(vocabulary, spec)
    except DataError as error:
        raise CheckpointError(f"{where}: {error.message}", remedy=error.remedy) from error
    return vocabulary


def _is_gpt2(symbols: tuple[str, ...]) -> bool:
    """True if these are GPT-2's subwords; NVIDIA adds words until their number is a multiple of 8."""
    return len(symbols) >= bpe.SIZE and symbols[: bpe.SIZE] == bpe.vocabulary().symbols


def count_symbols(folder: Path, dataset: str) -> tuple[str, ...]:
    """Count the tokens of a folder as the reference does; without the byte of line breaks, which it loses in enwik8.

    Raises `DataError` where the folder is not what its data set says.
    """
    spec = COUNTED_OTHERWISE.get(dataset) or get_dataset(dataset)
    symbols = load_corpus(folder, spec).vocabulary.symbols
    return tuple(symbol for symbol in symbols if symbol != NEWLINE_TOKEN) if spec.unit == "byte" else symbols


def read_symbols(path: Path) -> tuple[str, ...]:
    """Return the tokens of a vocabulary's file, in the order of their ids.

    Understood are: a text of one token a line (what follows its first blank, a count say, is not looked at), our vocabulary.json, a
    JSON list of tokens or table of token to id, Hugging Face's vocab.pkl or vocab.bin, and the cache.pt of the authors and of NVIDIA.

    Raises:
        UsageError: there is no such file.
        CheckpointError: it is none of these, or is refused.
    """
    if not path.is_file():
        raise UsageError(f"There is no vocabulary {path}.")
    with path.open("rb") as file:
        start = file.read(len(LEGACY_MAGIC))
    if start.startswith(b"PK\x03\x04") or start == LEGACY_MAGIC:
        with open_torch(path, _CACHE_NAMES) as value:
            return _symbols_of(value, path)
    if path.stat().st_size > LARGEST_FILE_BYTES:
        raise CheckpointError(f"{path} has {path.stat().st_size >> 20} MiB, as no vocabulary has.")
    data = path.read_bytes()
    if start[:1] == b"\x80":
        return _symbols_of(read_pickle(data, {**PLAIN, **VOCABULARY_NAMES}, what=str(path))[0], path)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is no vocabulary: neither text, nor JSON, nor a pickle.") from error
    if start[:1] in (b"{", b"["):
        return _symbols_of_json(text, path)
    lines = text.splitlines()
    symbols = tuple(line.split()[0] for line in lines if line.split())
    if len(symbols) != len(lines):
        raise CheckpointError(f"{path} has empty lines, but a vocabulary has a token in every line.")
    return symbols


def _symbols_of(value: Any, path: Path) -> tuple[str, ...]:
    """Find the table of token to id in what a file of theirs holds."""
    for _ in range(2):
        if isinstance(value, Inert):
            value = value.attributes
        if isinstance(value, dict) and "sym2idx" not in value and isinstance(value.get("vocab"), Inert):
            value = value["vocab"]
    table = value.get("sym2idx") if isinstance(value, dict) else None
    if not isinstance(table, dict):
        raise CheckpointError(f"{path} holds no table of tokens (`sym2idx`).")
    return ordered(table, str(path))


def _symbols_of_json(text: str, path: Path) -> tuple[str, ...]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} begins like JSON, but is none: {error}.") from error
    if isinstance(value, dict) and value.get("format") == FORMAT:
        try:
            return Vocabulary.from_dict(value).symbols
        except DataError as error:
            raise CheckpointError(f"{path}: {error.message}", remedy=error.remedy) from error
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return tuple(value)
    if isinstance(value, dict):
        return ordered(value, str(path))
    raise CheckpointError(f"{path} is JSON, but neither a list of tokens nor a table of token to id.")
