"""A text read with its sentences in random order, without copying it.

For data sets whose sentences stand alone (One Billion Word): training reads them in another order each epoch, evaluation in that of the
file. Only offsets are kept, 8 bytes a sentence; the tokens are looked up where they lie.

Letters: N tokens, S sentences.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from txl_train.errors import DataError

_SCAN_TOKENS = 1 << 22
"""Tokens searched for boundaries at a time: bounds the memory that takes."""

_Offsets = npt.NDArray[np.unsignedinteger[Any]]


class ShuffledSentences:
    """The tokens of `ids_N` with whole sentences in another order; as long as it, and indexed like it.

    A sentence is what stands between two boundaries, with the boundary at its end. Boundaries at the very beginning stay there, so that
    every sentence has one before it; tokens after the last boundary, if there are any, are a sentence too.

    The order depends on `seed` alone, on every machine and with every version of numpy: sentences are sorted by numbers drawn from
    PCG64, whose raw stream numpy keeps as it is.

    Args:
        ids_N: the tokens, [N]; may be memory-mapped.
        boundary_id: the token between sentences.
        seed: 0 or more.

    Raises:
        DataError: there is no boundary among the tokens.
    """

    def __init__(self, ids_N: npt.NDArray[np.integer[Any]], boundary_id: int, *, seed: int) -> None:
        self._ids_N = ids_N
        n_tokens = len(ids_N)
        ends_S = _ends(ids_N, boundary_id, np.dtype(np.uint32 if n_tokens < 1 << 32 else np.uint64))
        if not len(ends_S):
            raise DataError(
                f"The text has no token {boundary_id} between sentences, so they cannot be shuffled.",
                remedy="Give a text with one sentence a line.",
            )
        if ends_S[-1] != n_tokens:
            ends_S = np.append(ends_S, ends_S.dtype.type(n_tokens))
        opening = int(ends_S[0]) == 1 and len(ends_S) > 1  # a boundary that ends no sentence but stands before the first
        starts_S = ends_S[:-1] if opening else np.concatenate([ends_S[:1] * 0, ends_S[:-1]])
        lengths_S = ends_S[opening:] - starts_S
        order_S = np.argsort(np.random.PCG64(seed).random_raw(len(starts_S)), kind="stable")
        self._source_S: _Offsets = starts_S[order_S]
        """Where the sentence that is read k-th begins in the text, [S]."""
        self._start_S: _Offsets = np.cumsum(lengths_S[order_S], dtype=ends_S.dtype) - lengths_S[order_S] + ends_S.dtype.type(opening)
        """Where it begins in this order, [S]."""

    @property
    def n_sentences(self) -> int:
        """Number of sentences S."""
        return len(self._start_S)

    def __len__(self) -> int:
        """Return the number of tokens N."""
        return len(self._ids_N)

    def __getitem__(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.integer[Any]]:
        """Return the tokens at `positions` (0..N-1, any shape) of this order."""
        place = np.asarray(positions)
        sentence = np.maximum(np.searchsorted(self._start_S, place.astype(self._start_S.dtype), side="right") - 1, 0)
        source = self._source_S[sentence].astype(np.int64) + place - self._start_S[sentence].astype(np.int64)
        found: npt.NDArray[np.integer[Any]] = np.asarray(self._ids_N[source])  # before the first: the boundary before it in the text
        return found


def _ends(ids_N: npt.NDArray[np.integer[Any]], boundary_id: int, dtype: np.dtype[Any]) -> _Offsets:
    """Return the positions just after each boundary, in order."""
    parts = [
        (np.flatnonzero(ids_N[start : start + _SCAN_TOKENS] == boundary_id) + (start + 1)).astype(dtype)
        for start in range(0, len(ids_N), _SCAN_TOKENS)
    ]
    return np.concatenate(parts) if parts else np.empty(0, dtype)
