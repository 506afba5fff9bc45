"""What is fed to the runtimes: real text, cut into segments, over and over.

Knows which segment comes at which step and where a memory starts cold again. How a runtime turns a segment into numbers, and when the
clock runs, is the harness's business.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from txl_train.data.segments import Segment, SegmentIterator
from txl_train.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

MAX_BATCH_SIZES = 256
"""More sizes in one request are taken for a slip of the finger."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A stream of token ids read by `batch_size` streams in segments of `tgt_len` tokens, for as many steps as it takes.

    After the last segment comes the first again, with a cold memory. A corpus' last segment is partly padding, so it is left out where
    there are others: each step then has exactly batch_size * tgt_len target tokens. (Evaluation, unlike this, scores every token once.)
    A corpus with fewer tokens to predict than streams is a `DataError`.
    """

    ids_N: NDArray[np.integer]
    batch_size: int
    tgt_len: int
    ext_len: int = 0
    """Tokens before each segment that its input begins with."""
    dataset: str = ""
    """Name of the data set, for the record."""
    split: str = ""
    streams: slice | None = None
    """The part of the `batch_size` streams that is read here, where several processes share them; None means all."""

    def __post_init__(self) -> None:
        _ = self._segments  # refuses now what cannot be cut, not after minutes of measuring

    @cached_property
    def _segments(self) -> SegmentIterator:
        return SegmentIterator(self.ids_N, batch_size=self.batch_size, tgt_len=self.tgt_len, ext_len=self.ext_len, streams=self.streams)

    @property
    def n_streams(self) -> int:
        """Number of streams that are read here."""
        return self._segments.batch_size

    @cached_property
    def steps_per_pass(self) -> int:
        """Number of steps after which the text begins anew."""
        whole = (len(self.ids_N) - 1) // self.batch_size // self.tgt_len
        return max(1, whole)

    @property
    def is_padded(self) -> bool:
        """True if the corpus does not even fill one segment: part of every step is padding, and not counted."""
        return len(self.ids_N) - 1 < self.batch_size * self.tgt_len

    def starts_cold(self, step: int) -> bool:
        """True if the memory is to be reset before this step (steps count from 0)."""
        return step % self.steps_per_pass == 0

    def segment(self, step: int) -> Segment:
        """Return what is read here at this step; the same step gives the same tokens to every runtime."""
        return self._segments.segment(step % self.steps_per_pass)

    def tensors(self, segment: Segment, device: str) -> tuple[Tensor, Tensor]:
        """Return the segment's input ids, int64 [B, E+T], and target ids, [B, T], on the device."""
        import torch

        input_ids_BQ = torch.from_numpy(np.ascontiguousarray(segment.input_ids_BT)).to(device)
        target_ids_BT = torch.from_numpy(np.ascontiguousarray(segment.target_ids_BT)).to(device)
        return input_ids_BQ, target_ids_BT

    def joined(self, segments: Sequence[Segment], device: str) -> tuple[Tensor, Tensor]:
        """Return the same of segments that follow each other, as one, where there is no extension."""
        import torch

        inputs, targets = zip(*(self.tensors(segment, device) for segment in segments))
        return torch.cat(inputs, dim=1), torch.cat(targets, dim=1)


def parse_batch_sizes(text: str) -> tuple[int, ...]:
    """Read batch sizes, in the order given and each once: "1..32" doubles (1,2,4,8,16,32), "1-4" is each of 1,2,3,4, "1,3,5" a list.

    A list may hold the other two: "1..8,12,30-32". A doubling that misses its end ends with it: "1..24" is 1,2,4,8,16,24.
    """
    remedy = "Write them like `--batch-sizes 1..32` (doubling), `--batch-sizes 1-8` (each) or `--batch-sizes 1,3,5`."
    sizes: dict[int, None] = {}
    for part in text.split(","):
        part = part.strip()
        separator = ".." if ".." in part else "-" if "-" in part[1:] else ""
        ends = part.split(separator, 1) if separator else [part, part]
        if not all(end.strip().isascii() and end.strip().isdigit() for end in ends):
            raise UsageError(f"`{part}` is no batch size." if part else "A batch size is empty.", remedy=remedy)
        first, last = (int(end) for end in ends)
        if first < 1:
            raise UsageError(f"A batch size must be 1 or more, but one is {first} instead.", remedy=remedy)
        if last < first:
            raise UsageError(f"`{part}` runs backwards.", remedy=remedy)
        if separator == "..":
            size = first
            while size < last:
                sizes[size] = None
                size *= 2
            sizes[last] = None
        elif last - first < MAX_BATCH_SIZES:
            sizes |= dict.fromkeys(range(first, last + 1))
        else:
            raise UsageError(f"`{part}` asks for {last - first + 1} batch sizes, more than {MAX_BATCH_SIZES}.", remedy=remedy)
    if len(sizes) > MAX_BATCH_SIZES:
        raise UsageError(f"`{text}` asks for {len(sizes)} batch sizes, more than {MAX_BATCH_SIZES}.", remedy=remedy)
    return tuple(sizes)
