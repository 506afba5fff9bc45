"""Cut a corpus into parallel streams and these into segments, each token scored exactly once.

The N-1 tokens that have a predecessor are the targets. They are cut into `batch_size` contiguous streams, whose lengths differ by at most
one; each stream is read in order, `tgt_len` targets at a time, so that a memory carried from segment to segment always holds what
stands just before. Segments have one shape: where a stream has ended, the rest is padding and not counted. Nothing is trimmed:
the sum over counted targets is the same at every batch size.

With `ext_len`, the input of a segment begins with the tokens just before it, right-aligned; what would lie before the stream is padding.

Shape letters: B streams, T tokens of the segment (at most tgt_len), E ext_len, N tokens of the corpus.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from txl_train.errors import ConfigError, DataError


class TokenSource(Protocol):
    """A row of token ids, such as an array, that gives those at an array of positions."""

    def __len__(self) -> int: ...

    def __getitem__(self, positions: npt.NDArray[np.int64], /) -> Any: ...


@dataclass(frozen=True)
class Segment:
    """The next targets of every stream, with the tokens before them."""

    input_ids_BT: npt.NDArray[np.int64]
    """Inputs [B, E+T]; the last T are the tokens before the targets. 0 where there is none."""
    target_ids_BT: npt.NDArray[np.int64]
    """Tokens to be predicted [B, T]. 0 where not counted."""
    counted_BT: npt.NDArray[np.bool_]
    """True for targets that are scored [B, T], False for padding at a stream's end."""
    index: int
    """Number of the segment, from 0."""


class SegmentIterator:
    """The segments of a corpus in order; iterate, or ask for one by number with `segment(i)` to go on in the middle.

    Every iteration begins at segment 0. `ids_N` may be memory-mapped; it is never copied whole. A corpus of fewer than 2 tokens, or with
    fewer targets than streams, is a `DataError`.

    Args:
        ids_N: the tokens.
        batch_size: number of streams the corpus is cut into.
        tgt_len: targets per stream and segment.
        ext_len: tokens before each segment that its input begins with.
        streams: which of the streams to read, for several processes that share them; None means all.
        shifts_B: for each of all streams, how far it is rotated: target t of it is what otherwise is target (t + shift) modulo its length.
        bounds: where segments begin and the last one ends, from 0, instead of every `tgt_len`; None is the rule.
        equal: cut all streams to the length of the shortest, so that up to `batch_size` - 1 targets are dropped, and end with a shorter
            segment rather than with padding, as NVIDIA's code does. (Its streams have one token each in common with no other.)
    """

    def __init__(
        self,
        ids_N: TokenSource,
        *,
        batch_size: int,
        tgt_len: int,
        ext_len: int = 0,
        streams: slice | None = None,
        shifts_B: Sequence[int] | npt.NDArray[np.int64] | None = None,
        bounds: Sequence[int] | None = None,
        equal: bool = False,
    ) -> None:
        for name, value, least in (("batch_size", batch_size, 1), ("tgt_len", tgt_len, 1), ("ext_len", ext_len, 0)):
            if value < least:
                raise ConfigError(f"`{name}` must be {least} or more, but is {value} instead.")
        self._ids_N = ids_N
        n_targets = len(ids_N) - 1
        if n_targets < 1:
            raise DataError(f"A corpus of {len(ids_N)} tokens has nothing to predict: it takes at least 2.", remedy="Give a longer text.")
        if n_targets < batch_size or (equal and len(ids_N) // batch_size < 2):
            raise DataError(
                f"A corpus of {n_targets + 1} tokens has {n_targets} to predict, too few for {batch_size} streams.",
                remedy=f"Give `--batch-size {n_targets}` or smaller, or a longer text.",
            )
        chosen = slice(None) if streams is None else streams
        if equal:  # N // B tokens a stream; its first one is never a target
            rows = len(ids_N) // batch_size
            length_B = np.full(batch_size, rows - 1, dtype=np.int64)
            start_B = np.arange(batch_size, dtype=np.int64) * rows
        else:
            shortest, n_longer = divmod(n_targets, batch_size)
            length_B = np.full(batch_size, shortest, dtype=np.int64)
            length_B[:n_longer] += 1
            start_B = np.concatenate([[0], np.cumsum(length_B)[:-1]])
        longest = int(length_B[0])
        self.tgt_len = tgt_len
        self.ext_len = ext_len
        self._equal = equal
        self._all_lengths_B = length_B
        self._length_B, self._start_B = length_B[chosen], start_B[chosen]
        self._shift_B = np.zeros_like(self._length_B) if shifts_B is None else np.asarray(shifts_B, dtype=np.int64)[chosen]
        self._bounds = None if bounds is None else list(bounds)  # a billion of them would be larger than the text
        self._end = longest if equal else -(-longest // tgt_len) * tgt_len
        self.batch_size = len(self._length_B)

    @property
    def n_counted(self) -> int:
        """Number of targets over all segments of the streams that are read: N-1 if these are all."""
        return int(self._length_B.sum())

    def n_counted_in(self, index: int) -> int:
        """Number of targets in segment `index` over all streams, also those that are not read here."""
        first, end = self._span(index)
        return int((self._all_lengths_B.clip(max=end) - first).clip(min=0).sum())

    @property
    def n_targets(self) -> int:
        """Number of targets of the longest of all streams."""
        return int(self._all_lengths_B[0])

    def __len__(self) -> int:
        """Return the number of segments."""
        return -(-self._end // self.tgt_len) if self._bounds is None else len(self._bounds) - 1

    def __iter__(self) -> Iterator[Segment]:
        return map(self.segment, range(len(self)))

    def segment(self, index: int) -> Segment:
        """Return segment `index` (0..len-1); an `IndexError` outside."""
        if not 0 <= index < len(self):
            raise IndexError(f"There is no segment {index}: there are {len(self)}, from 0.")
        first, end = self._span(index)
        offset_Q = np.arange(first - self.ext_len, end)
        exists_BQ = (offset_Q >= 0)[None, :] & (offset_Q[None, :] < self._length_B[:, None])
        input_ids_BQ = self._read(offset_Q, exists_BQ, 0)
        counted_BT = np.ascontiguousarray(exists_BQ[:, self.ext_len :])
        target_ids_BT = self._read(offset_Q[self.ext_len :], counted_BT, 1)
        return Segment(input_ids_BT=input_ids_BQ, target_ids_BT=target_ids_BT, counted_BT=counted_BT, index=index)

    def _span(self, index: int) -> tuple[int, int]:
        """Where segment `index` begins, and where it ends."""
        if self._bounds is None:
            return index * self.tgt_len, min((index + 1) * self.tgt_len, self._end)
        return self._bounds[index], self._bounds[index + 1]

    def _read(self, offset_Q: npt.NDArray[np.int64], exists_BQ: npt.NDArray[np.bool_], ahead: int) -> npt.NDArray[np.int64]:
        """The tokens `ahead` positions after each offset into its stream, 0 where there is none."""
        place_BQ = offset_Q[None, :] + ahead
        if self._equal:  # a rotation of all the stream's tokens, as NVIDIA's
            place_BQ = (place_BQ + self._shift_B[:, None]) % (self._length_B + 1)[:, None]
        elif self._shift_B.any():  # a rotation of its targets, each with its own predecessor
            place_BQ = (offset_Q[None, :] + self._shift_B[:, None]) % self._length_B[:, None] + ahead
        position_BQ = np.where(exists_BQ, self._start_B[:, None] + place_BQ, 0)
        return np.where(exists_BQ, np.asarray(self._ids_N[position_BQ]), 0).astype(np.int64)
