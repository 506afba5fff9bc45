"""What is read from a checkpoint of another family, in words that all families share, before it becomes one of ours."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from txl_train.config import AttentionKind, ModelConfig
from txl_train.errors import CheckpointError, TxlError
from txl_train.interop.pickles import Inert, shown
from txl_train.interop.tensors import StoredTensor

Family = Literal["nvidia", "kimiyoung", "huggingface"]
Lineage = Literal["nvidia-2019", "nvidia-2023", "kimiyoung", "huggingface"]

LARGEST_NUMBER = 1 << 31
"""No size or length of a model is larger."""
LARGEST_LENGTH = 1 << 20
"""No memory or segment of a model is longer, in tokens: evaluating it would need terabytes."""

ATTENTION: tuple[AttentionKind, ...] = ("relative", "shaw", "sinusoidal", "learned")
"""Their attn_type 0 to 3."""


@dataclass(frozen=True, kw_only=True)
class Foreign:
    """A model of another family."""

    family: Family
    lineage: Lineage
    """The family, and for NVIDIA which of its two formats: it decides what `same_length` means and how their evaluation begins."""
    form: str
    """How the file is written, in a few words."""
    config: ModelConfig
    """As the model will be here: of more words than theirs by `n_empty`."""
    tensors: dict[str, StoredTensor]
    """By the names of their state dict, without a prefix such as `transformer.`."""
    clusters_reversed: bool
    """Tail cluster i has the head's column -i, as with NVIDIA and the authors, rather than shortlist + i - 1."""
    n_empty: int
    """Number of tail clusters without words, which become words at the end of the shortlist; see `make_config`."""
    symbols: tuple[str, ...] | None
    """Tokens in the order of their ids, if the file holds them."""
    dataset: str | None
    """Their name of the data set, if recorded."""
    data: str | None = None
    """The folder of the text, as it was named when the model was trained."""
    tgt_len: int | None = None
    eval_tgt_len: int | None = None
    progress: dict[str, Any] = field(default_factory=dict)
    """step, epoch, best_valid_nll, as far as recorded."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """The settings it was trained with, as plain values under their own names."""
    dropped: tuple[str, ...] = ()
    """What the file holds besides the model, which is not imported."""
    notes: tuple[str, ...] = ()
    """What a user should know: sentences."""

    @property
    def vocab_size(self) -> int:
        """Number of their tokens."""
        return self.config.vocab_size - self.n_empty

    def with_empty_clusters(self, symbols: tuple[str, ...]) -> tuple[str, ...]:
        """Return the tokens with one for each empty cluster, at the end of the shortlist; no text holds them."""
        at = self.config.cluster_ends[1] - self.n_empty
        return (*symbols[:at], *(f"<empty-cluster-{self.config.n_cluster + 1 + i}>" for i in range(self.n_empty)), *symbols[at:])


class Values:
    """Named values of a file, checked one by one: what is missing or of another kind is a `CheckpointError` that names it."""

    def __init__(self, values: Mapping[Any, Any], where: str) -> None:
        self.values = values
        self.where = where

    def integer(self, name: str, *, low: int = 0, high: int = LARGEST_NUMBER, default: int | None = None) -> int:
        """Return a whole number within `low`..`high`; `default` where it is missing or None, if there is one."""
        value = self._get(name, default)
        if type(value) is not int or not low <= value <= high:
            raise self._wrong(name, value, f"a whole number within {low}..{high}")
        return value

    def length(self, name: str, *, default: int | None = None) -> int:
        """Return a number of tokens."""
        return self.integer(name, high=LARGEST_LENGTH, default=default)

    def optional_length(self, name: str) -> int | None:
        """Return a number of tokens, or None where it is missing, None, 0 or negative."""
        value = self.values.get(name)
        return None if value is None or (type(value) is int and value <= 0) else self.length(name)

    def share(self, name: str, *, default: float | None = None) -> float:
        """Return a probability."""
        value = self._get(name, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < 1:
            raise self._wrong(name, value, "a number within 0..1")
        return float(value)

    def flag(self, name: str, *, default: bool | None = None) -> bool:
        """Return a truth value."""
        value = self._get(name, default)
        if type(value) is not bool:
            raise self._wrong(name, value, "true or false")
        return value

    def integers(self, name: str) -> tuple[int, ...]:
        """Return a list of whole numbers."""
        value = self._get(name, None)
        if not isinstance(value, (list, tuple)) or any(type(item) is not int or not 0 <= item <= LARGEST_NUMBER for item in value):
            raise self._wrong(name, value, "a list of whole numbers")
        return tuple(value)

    def flags(self, name: str) -> tuple[bool, ...]:
        """Return a list of truth values."""
        value = self._get(name, None)
        if not isinstance(value, (list, tuple)) or any(type(item) is not bool for item in value):
            raise self._wrong(name, value, "a list of true and false")
        return tuple(value)

    def text(self, name: str) -> str | None:
        """Return a text, or None where it is missing or None."""
        value = self.values.get(name)
        if value is not None and not isinstance(value, str):
            raise self._wrong(name, value, "a text")
        return value

    def _get(self, name: str, default: object) -> Any:
        value = self.values.get(name)
        return default if value is None else value

    def _wrong(self, name: str, value: object, expected: str) -> CheckpointError:
        has = "is missing" if value is None else f"is {shown(value)}"
        return CheckpointError(f"{self.where}: `{name}` {has}, where {expected} is expected.")


def make_config(where: str, *, vocab_size: int, cutoffs: tuple[int, ...], div_val: int, **values: Any) -> tuple[ModelConfig, int]:
    """Return the configuration and the number of empty clusters, or a `CheckpointError` where the values contradict each other.

    Cutoffs beyond the vocabulary, which are fixed in the originals whatever the text, make clusters without words. Their columns take a
    share of the head's softmax all the same. Here they become words of the shortlist, as which they take the same share.
    """
    live = tuple(cutoff for cutoff in cutoffs if cutoff < vocab_size)
    n_empty = len(cutoffs) - len(live)
    if n_empty and div_val > 1:
        raise CheckpointError(f"{where}: its cutoffs {list(cutoffs)} reach beyond its {vocab_size} tokens, and `div_val` is {div_val}.")
    if n_empty:
        values["tie_projections"] = values["tie_projections"][: len(live) + 1]
    try:
        config = ModelConfig(
            vocab_size=vocab_size + n_empty,
            adaptive=bool(live),
            cutoffs=tuple(cutoff + n_empty for cutoff in live),
            div_val=div_val,
            **values,
        )
    except TxlError as error:
        raise CheckpointError(f"{where}: {error.message}") from error
    return config, n_empty


def plain_values(values: Mapping[Any, Any]) -> dict[str, Any]:
    """Return the entries that are texts, finite numbers, truth values, or short lists of these: what a checkpoint may keep."""
    kept = {}
    for name, value in values.items():
        if isinstance(name, str) and (_is_plain(value) or (isinstance(value, (list, tuple)) and all(map(_is_plain, value[:64])))):
            kept[name] = list(value[:64]) if isinstance(value, (list, tuple)) else value
    return kept


def _is_plain(value: object) -> bool:
    if isinstance(value, str):
        return len(value) <= 1000
    return value is None or isinstance(value, (bool, int)) or (isinstance(value, float) and math.isfinite(value))


def attributes(value: object, kinds: tuple[str, ...], where: str) -> dict[str, Any]:
    """Return the attributes of an object whose class has one of these names."""
    if not isinstance(value, Inert) or value.class_name not in kinds:
        raise CheckpointError(f"{where} is {shown(value)}, where {' or '.join(kinds)} is expected.")
    return value.attributes


def ordered(table: Mapping[Any, Any], where: str) -> tuple[str, ...]:
    """Return the tokens of a table of token to id in the order of their ids, which must be 0, 1, 2 …"""
    by_id: list[str | None] = [None] * len(table)
    for symbol, i in table.items():
        if not isinstance(symbol, str) or type(i) is not int or not 0 <= i < len(by_id) or by_id[i] is not None:
            raise CheckpointError(f"{where}: the ids of its tokens are not 0, 1, 2 … {len(table) - 1}, each once.")
        by_id[i] = symbol
    return tuple(symbol for symbol in by_id if symbol is not None)
