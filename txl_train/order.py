"""In which order training reads its text: epochs of segments, shifted, of random length or shuffled by sentence, all from the seed.

Every epoch depends on the settings and its own number alone, never on how many processes share the streams or how often training was
interrupted: an epoch can be entered in its middle.
"""

# Shape suffixes: B streams

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from txl_train.config import Compat
from txl_train.data.segments import SegmentIterator, TokenSource
from txl_train.data.sentences import ShuffledSentences

_ROLL, _VARLEN, _SENTENCES = 1, 2, 3
"""Kinds of random numbers, each drawn from a generator of its own."""

_WHOLE_SHARE = 0.95
_DEVIATION = 5
_SHORTEST = 5
_MOST_DEVIATIONS = 3
"""Random lengths as in the authors' code: normal around tgt_len, for one in twenty around half of it, with this deviation and limits."""


@dataclass(frozen=True, kw_only=True)
class TrainingOrder:
    """What `epoch` needs to know of the text and the settings."""

    ids_N: TokenSource
    batch_size: int
    """Streams over all processes."""
    tgt_len: int
    ext_len: int = 0
    streams: slice | None = None
    """Those this process reads; None means all."""
    roll: bool = False
    varlen: bool = False
    sentence_end: int | None = None
    """Id that ends each sentence, if whole sentences are to be shuffled in each epoch."""
    compat: Compat | None = None
    seed: int = 0

    def epoch(self, number: int) -> SegmentIterator:
        """Return the segments of epoch `number`, from 1.

        Raises:
            DataError: the text is too short for so many streams.
        """
        source: TokenSource = self.ids_N
        if self.sentence_end is not None:
            drawn = int(self._generator(number, _SENTENCES).integers(1 << 62))
            source = ShuffledSentences(np.asarray(self.ids_N), self.sentence_end, seed=drawn)
        plain = self._iterator(source, None, None)
        shifts_B = self._shifts(plain, number) if self.roll else None
        bounds = self._bounds(plain.n_targets, number) if self.varlen else None
        return plain if shifts_B is None and bounds is None else self._iterator(source, shifts_B, bounds)

    def _iterator(self, source: TokenSource, shifts_B: npt.NDArray[np.int64] | None, bounds: list[int] | None) -> SegmentIterator:
        return SegmentIterator(
            source,
            batch_size=self.batch_size,
            tgt_len=self.tgt_len,
            ext_len=self.ext_len,
            streams=self.streams,
            shifts_B=shifts_B,
            bounds=bounds,
            equal=self.compat is not None,
        )

    def _shifts(self, plain: SegmentIterator, number: int) -> npt.NDArray[np.int64]:
        """How far each of all streams is rotated in this epoch."""
        longest = plain.n_targets
        if self.compat is None:
            return self._generator(number, _ROLL).integers(0, longest, self.batch_size)
        return _nvidia_shifts(longest + 1, self.batch_size, self.streams, self.seed, number)

    def _bounds(self, n_targets: int, number: int) -> list[int]:
        """Where the segments of this epoch begin, and where the last one ends."""
        if self.compat is None:
            return self._drawn_bounds(n_targets, self._generator(number, _VARLEN))
        generator = np.random.RandomState(self.seed)  # which NVIDIA's code draws from through all epochs, and stops a target early
        bounds: list[int] = []
        for _ in range(number):
            bounds = self._drawn_bounds(n_targets, generator, leave=1)
        return bounds

    def _drawn_bounds(self, n_targets: int, generator: np.random.Generator | np.random.RandomState, leave: int = 0) -> list[int]:
        bounds = [0]
        while bounds[-1] < n_targets - leave:
            middle = self.tgt_len if generator.random() < _WHOLE_SHARE else self.tgt_len / 2
            drawn = int(generator.normal(middle, _DEVIATION))
            length = min(self.tgt_len + _MOST_DEVIATIONS * _DEVIATION, max(_SHORTEST, drawn))
            bounds.append(min(bounds[-1] + length, n_targets))
        return bounds

    def _generator(self, number: int, kind: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, number, kind])


def _nvidia_shifts(rows: int, batch_size: int, streams: slice | None, seed: int, number: int) -> npt.NDArray[np.int64]:
    """The shifts of NVIDIA's code of 2023: each process draws those of its own streams from PyTorch's generator, seeded with
    seed + epoch, and each epoch's shift adds to those before."""
    chosen = range(batch_size)[streams or slice(None)]
    total = np.zeros(batch_size, dtype=np.int64)
    for epoch in range(1, number + 1):
        generator = torch.Generator().manual_seed(seed + epoch)
        for stream in chosen:
            total[stream] += int(torch.randint(0, rows, (1,), generator=generator))
    return total % rows
