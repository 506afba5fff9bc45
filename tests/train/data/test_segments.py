"""Segments: every target once, in order, whatever the batch size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from txl_train.data.segments import SegmentIterator
from txl_train.errors import ConfigError, DataError

sizes = {"n_tokens": st.integers(2, 300), "batch_size": st.integers(1, 40), "tgt_len": st.integers(1, 40)}


def numbered(n_tokens: int) -> np.ndarray:
    """Make a corpus in which every token is different and none is 0, so that a token tells its own place."""
    return np.arange(1, n_tokens + 1, dtype=np.uint16)


@given(**sizes)
def test_every_token_with_a_predecessor_is_a_target_exactly_once(n_tokens: int, batch_size: int, tgt_len: int) -> None:
    assume(batch_size < n_tokens)
    segments = SegmentIterator(numbered(n_tokens), batch_size=batch_size, tgt_len=tgt_len)
    targets = np.concatenate([segment.target_ids_BT[segment.counted_BT] for segment in segments])
    assert sorted(targets) == list(range(2, n_tokens + 1))
    assert len(targets) == segments.n_counted == n_tokens - 1


@given(**sizes)
def test_the_input_is_always_the_token_before_the_target(n_tokens: int, batch_size: int, tgt_len: int) -> None:
    assume(batch_size < n_tokens)
    for segment in SegmentIterator(numbered(n_tokens), batch_size=batch_size, tgt_len=tgt_len):
        assert (segment.input_ids_BT[segment.counted_BT] + 1 == segment.target_ids_BT[segment.counted_BT]).all()


@given(**sizes)
def test_each_stream_is_one_piece_of_the_corpus_read_in_order(n_tokens: int, batch_size: int, tgt_len: int) -> None:
    assume(batch_size < n_tokens)
    segments = list(SegmentIterator(numbered(n_tokens), batch_size=batch_size, tgt_len=tgt_len))
    streams = [np.concatenate([s.target_ids_BT[b][s.counted_BT[b]] for s in segments]) for b in range(batch_size)]
    assert np.concatenate(streams).tolist() == list(range(2, n_tokens + 1))
    assert max(map(len, streams)) - min(map(len, streams)) <= 1


@given(**sizes)
def test_all_segments_have_one_shape_and_padding_only_at_the_end(n_tokens: int, batch_size: int, tgt_len: int) -> None:
    assume(batch_size < n_tokens)
    segments = SegmentIterator(numbered(n_tokens), batch_size=batch_size, tgt_len=tgt_len)
    for i, segment in enumerate(segments):
        assert segment.index == i
        assert segment.input_ids_BT.shape == segment.target_ids_BT.shape == segment.counted_BT.shape == (batch_size, tgt_len)
        assert segment.input_ids_BT.dtype == segment.target_ids_BT.dtype == np.int64
        assert not segment.input_ids_BT[~segment.counted_BT].any()
        assert not segment.target_ids_BT[~segment.counted_BT].any()
        assert i == len(segments) - 1 or segment.counted_BT[:, :-1].all()
        assert segment.counted_BT.any()
        assert (np.diff(segment.counted_BT.astype(int), axis=1) <= 0).all()
    assert i == len(segments) - 1


def test_segments_asked_for_by_number_equal_those_iterated() -> None:
    segments = SegmentIterator(numbered(50), batch_size=3, tgt_len=4)
    for segment in segments:
        again = segments.segment(segment.index)
        assert (again.input_ids_BT == segment.input_ids_BT).all()
        assert (again.target_ids_BT == segment.target_ids_BT).all()
        assert (again.counted_BT == segment.counted_BT).all()


def test_a_segment_that_is_not_there_is_an_index_error() -> None:
    segments = SegmentIterator(numbered(50), batch_size=3, tgt_len=4)
    for index in (-1, len(segments)):
        with pytest.raises(IndexError):
            segments.segment(index)


def test_a_small_corpus_by_hand() -> None:
    (first, second) = SegmentIterator(np.array([5, 6, 7, 8, 9, 10]), batch_size=2, tgt_len=2)
    assert first.input_ids_BT.tolist() == [[5, 6], [8, 9]]
    assert first.target_ids_BT.tolist() == [[6, 7], [9, 10]]
    assert second.input_ids_BT.tolist() == [[7, 0], [0, 0]]
    assert second.target_ids_BT.tolist() == [[8, 0], [0, 0]]
    assert second.counted_BT.tolist() == [[True, False], [False, False]]


def test_a_memory_mapped_corpus_gives_the_same_segments(tmp_path: Path) -> None:
    numbered(100).tofile(tmp_path / "ids")
    mapped = np.memmap(tmp_path / "ids", dtype=np.uint16, mode="r")
    for a, b in zip(SegmentIterator(mapped, batch_size=3, tgt_len=7), SegmentIterator(numbered(100), batch_size=3, tgt_len=7), strict=True):
        assert (a.target_ids_BT == b.target_ids_BT).all()


@pytest.mark.parametrize("n_tokens", [0, 1])
def test_a_corpus_with_nothing_to_predict_is_refused(n_tokens: int) -> None:
    with pytest.raises(DataError, match="nothing to predict"):
        SegmentIterator(numbered(n_tokens), batch_size=1, tgt_len=4)


def test_more_streams_than_targets_names_a_batch_size_that_fits() -> None:
    with pytest.raises(DataError, match="too few for 8 streams") as caught:
        SegmentIterator(numbered(8), batch_size=8, tgt_len=4)
    assert "--batch-size 7" in str(caught.value.remedy)
    assert len(SegmentIterator(numbered(8), batch_size=7, tgt_len=4)) == 1


@pytest.mark.parametrize(("batch_size", "tgt_len"), [(0, 4), (4, 0)])
def test_sizes_below_one_are_refused(batch_size: int, tgt_len: int) -> None:
    with pytest.raises(ConfigError, match="must be 1 or more"):
        SegmentIterator(numbered(50), batch_size=batch_size, tgt_len=tgt_len)
