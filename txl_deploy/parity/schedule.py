"""When the rows of a comparison start, start anew and end: at different times, as streams do that are served together.

One row runs from the first segment to the last, so that it goes as far as the text does. Of the others some start late, some end early,
in the middle of a segment, and each is put back to a cold start once. What a row is given before its start and after its end is padding:
it is run, since a batch has one shape, and counts for nothing. Knows segments only; what is run and compared is `rollout`'s business.
"""

# Shape suffixes: B batch, Q inputs (ext_len + tgt_len), T tgt_len

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from txl_train.data.segments import Segment

FEWEST_TO_SHIFT = 4
"""Segments of the shortest rollout in which rows start late and end early: below that there would be nothing in between."""


@dataclass(frozen=True)
class Turn:
    """One segment as it is run."""

    segment: Segment
    """With padding in place of what a row that has not started, or has ended, would be given."""
    resets: list[int]
    """Rows that begin here at a cold start, after others were run in their place or their own text was."""
    age_B: npt.NDArray[np.int64]
    """Segments that each row has run since its cold start, before this one."""

    @property
    def live_B(self) -> npt.NDArray[np.bool_]:
        """Rows that score anything here."""
        return np.asarray(self.segment.counted_BT.any(axis=1))

    @property
    def whole_B(self) -> npt.NDArray[np.bool_]:
        """Rows without padding here, whose memory is theirs throughout."""
        return np.asarray(self.segment.counted_BT.all(axis=1))


@dataclass(frozen=True)
class Row:
    """When one row runs, in segments from 0."""

    start: int
    last: int
    """The last segment it runs in; only the first half of it if that is not the last of all."""
    reset: int | None
    """The segment it starts anew at."""


def rows_of(n_segments: int, batch_size: int) -> list[Row]:
    """Return when each row runs in a rollout of so many segments: the first throughout, odd ones start late, even ones end early.

    Resets are spread over the first half, so that what follows is long enough to fill a memory again. Of two rows the second does both.
    """
    rows = [Row(0, n_segments - 1, None)]
    spread = max(1, n_segments // 8)
    for b in range(1, batch_size):
        start, last = 0, n_segments - 1
        if n_segments >= FEWEST_TO_SHIFT:
            turn = b // 2 % spread
            start = 1 + turn if b % 2 else 0
            last -= 1 + turn if b % 2 == 0 or batch_size == 2 else 0
        reset = max(start + 1, 1 + b * n_segments // (2 * batch_size))
        rows.append(Row(start, last, reset if reset <= last else None))
    return rows


def schedule(segments: Sequence[Segment]) -> list[Turn]:
    """Return the segments as they are run, in order. All must be of one batch size; their numbers (`index`) are kept."""
    if not segments:
        return []
    B, T = segments[0].target_ids_BT.shape
    rows = rows_of(len(segments), B)
    age_B = np.zeros(B, dtype=np.int64)
    turns = []
    for number, segment in enumerate(segments):
        given_BT = np.ones((B, T), dtype=bool)
        resets = []
        for b, row in enumerate(rows):
            if number > 0 and number in (row.start, row.reset):
                resets.append(b)
                age_B[b] = 0
            if not row.start <= number <= row.last:
                given_BT[b] = False
            elif number == row.last < len(segments) - 1:
                given_BT[b, (T + 1) // 2 :] = False
        turns.append(Turn(_padded(segment, given_BT), resets, age_B.copy()))
        age_B += 1
    return turns


def _padded(segment: Segment, given_BT: npt.NDArray[np.bool_]) -> Segment:
    """Return the segment with zeros, not counted, where nothing is given; the tokens before it (`ext_len`) stay where anything is."""
    ext_len = segment.input_ids_BT.shape[1] - segment.target_ids_BT.shape[1]
    before_BE = np.repeat(given_BT.any(axis=1, keepdims=True), ext_len, axis=1)
    return dataclasses.replace(
        segment,
        input_ids_BT=np.where(np.concatenate([before_BE, given_BT], axis=1), segment.input_ids_BT, 0),
        target_ids_BT=np.where(given_BT, segment.target_ids_BT, 0),
        counted_BT=segment.counted_BT & given_BT,
    )
