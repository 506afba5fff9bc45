"""Cut a corpus into parallel streams and these into segments, each token scored exactly once.

The N-1 tokens that have a predecessor are the targets. They are cut into `batch_size` contiguous streams, whose lengths differ by at most
one; each stream is read in order, `tgt_len` targets at a time, so that a memory carried from segment to segment always holds what
stands just before. Segments all have one shape: where a stream has ended, the rest is padding and not counted. Nothing is trimmed:
the sum over counted targets is the same at every batch size.

Shape letters: B batch_size (streams), T tgt_len, N tokens of the corpus.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from txl_train.data.corpus import IdArray
from txl_train.errors import ConfigError, DataError


@dataclass(frozen=True)
class Segment:
    """The next `tgt_len` targets of every stream, with the tokens before them."""

    input_ids_BT: npt.NDArray[np.int64]
    """Inputs; position t is the token before target t. 0 where not counted."""
    target_ids_BT: npt.NDArray[np.int64]
    """Tokens to be predicted. 0 where not counted."""
    counted_BT: npt.NDArray[np.bool_]
    """True for targets of the corpus, False for padding at a stream's end."""
    index: int
    """Number of the segment, from 0."""


class SegmentIterator:
    """The segments of a corpus in order; iterate, or ask for one by number with `segment(i)` to go on in the middle.

    Every iteration begins at segment 0. `ids_N` may be memory-mapped; it is never copied whole. A corpus of fewer than 2 tokens, or with
    fewer targets than streams, is a `DataError`.
    """

    def __init__(self, ids_N: IdArray, *, batch_size: int, tgt_len: int) -> None:
        for name, value in (("batch_size", batch_size), ("tgt_len", tgt_len)):
            if value < 1:
                raise ConfigError(f"`{name}` must be 1 or more, but is {value} instead.")
        self._ids_N = np.asarray(ids_N)
        assert self._ids_N.ndim == 1, f"token ids must be a row, not of shape {self._ids_N.shape}"
        n_targets = len(self._ids_N) - 1
        if n_targets < 1:
            raise DataError(
                f"A corpus of {len(self._ids_N)} tokens has nothing to predict: it takes at least 2.", remedy="Give a longer text."
            )
        if n_targets < batch_size:
            raise DataError(
                f"A corpus of {n_targets + 1} tokens has {n_targets} to predict, too few for {batch_size} streams.",
                remedy=f"Give `--batch-size {n_targets}` or smaller, or a longer text.",
            )
        self.batch_size = batch_size
        self.tgt_len = tgt_len
        shortest, n_longer = divmod(n_targets, batch_size)
        self._length_B = np.full(batch_size, shortest, dtype=np.int64)
        self._length_B[:n_longer] += 1
        self._start_B = np.concatenate([[0], np.cumsum(self._length_B)[:-1]])
        self._n_segments = -(-int(self._length_B[0]) // tgt_len)

    @property
    def n_counted(self) -> int:
        """Number of targets over all segments: N-1."""
        return len(self._ids_N) - 1

    def __len__(self) -> int:
        """Return the number of segments."""
        return self._n_segments

    def __iter__(self) -> Iterator[Segment]:
        return map(self.segment, range(self._n_segments))

    def segment(self, index: int) -> Segment:
        """Return segment `index` (0..len-1); an `IndexError` outside."""
        if not 0 <= index < self._n_segments:
            raise IndexError(f"There is no segment {index}: there are {self._n_segments}, from 0.")
        offset_T = np.arange(index * self.tgt_len, (index + 1) * self.tgt_len)
        counted_BT = offset_T[None, :] < self._length_B[:, None]
        position_BT = np.where(counted_BT, self._start_B[:, None] + offset_T[None, :], 0)
        return Segment(
            input_ids_BT=np.where(counted_BT, self._ids_N[position_BT], 0).astype(np.int64),
            target_ids_BT=np.where(counted_BT, self._ids_N[position_BT + 1], 0).astype(np.int64),
            counted_BT=counted_BT,
            index=index,
        )
