"""Rows of a comparison start, start anew and end at different times, and what they are given in between is their own text."""

from __future__ import annotations

import numpy as np
import pytest

from tests.support import small_config
from txl_deploy.parity.rollout import random_segments
from txl_deploy.parity.schedule import rows_of, schedule

CONFIG = small_config(ext_len=3)
TGT_LEN = 5


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
@pytest.mark.parametrize("n_segments", [4, 6, 40])
def test_the_first_row_runs_throughout_and_every_other_starts_anew_once(n_segments: int, batch_size: int) -> None:
    first, *others = rows_of(n_segments, batch_size)
    assert (first.start, first.last, first.reset) == (0, n_segments - 1, None)
    for row in others:
        assert row.reset is not None
        assert row.start < row.reset <= row.last
        assert row.start > 0 or row.last < n_segments - 1
        assert row.reset <= n_segments // 2 + 1, "what follows is long enough to fill a memory again"


def test_rows_start_start_anew_and_end_at_different_times() -> None:
    rows = rows_of(40, 8)
    assert len({row.start for row in rows[1::2]}) > 1
    assert len({row.last for row in rows[2::2]}) > 1
    assert len({row.reset for row in rows[1:]}) == 7


def test_two_rows_are_enough_for_all_of_it() -> None:
    _, second = rows_of(6, 2)
    assert second.start > 0
    assert second.last < 5
    assert second.reset is not None


def test_a_rollout_of_few_segments_leaves_nothing_out() -> None:
    for n_segments in (1, 2, 3):
        segments = random_segments(CONFIG, tgt_len=TGT_LEN, n_segments=n_segments)
        assert all(turn.segment.counted_BT.all() for turn in schedule(segments))
    assert schedule([]) == []


def test_a_row_is_given_its_own_text_and_padding_that_does_not_count() -> None:
    segments = random_segments(CONFIG, tgt_len=TGT_LEN, n_segments=6)
    turns = schedule(segments)
    late, early = turns[0].segment, turns[4].segment
    assert late.counted_BT.any(axis=1).tolist() == [True, False, True]
    assert not late.input_ids_BT[1].any()
    assert early.counted_BT.sum(axis=1).tolist() == [5, 5, 3], "it ends in the middle of a segment"
    assert turns[5].segment.counted_BT.any(axis=1).tolist() == [True, True, False]
    for turn, segment in zip(turns, segments):
        given = turn.segment
        assert given.index == segment.index
        np.testing.assert_array_equal(given.target_ids_BT[given.counted_BT], segment.target_ids_BT[given.counted_BT])
        np.testing.assert_array_equal(given.input_ids_BT[:, 3:][given.counted_BT], segment.input_ids_BT[:, 3:][given.counted_BT])
        np.testing.assert_array_equal(given.input_ids_BT[turn.live_B, :3], segment.input_ids_BT[turn.live_B, :3])
        assert not given.target_ids_BT[~given.counted_BT].any()
    assert segments[0].counted_BT.all(), "what was given is left as it is"


def test_the_age_of_a_row_counts_from_its_last_cold_start() -> None:
    turns = schedule(random_segments(CONFIG, tgt_len=TGT_LEN, n_segments=6))
    assert [turn.resets for turn in turns] == [[], [1], [1], [2], [], []]
    assert [turn.age_B.tolist() for turn in turns] == [[0, 0, 0], [1, 0, 1], [2, 0, 2], [3, 1, 0], [4, 2, 1], [5, 3, 2]]
