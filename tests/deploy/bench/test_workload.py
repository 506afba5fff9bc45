"""Which tokens come at which step, and how batch sizes are spelled."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from txl_deploy.bench.workload import Workload, parse_batch_sizes
from txl_train.errors import DataError, UsageError


def workload(n_tokens: int, *, batch_size: int = 2, tgt_len: int = 4) -> Workload:
    return Workload(ids_N=np.arange(n_tokens), batch_size=batch_size, tgt_len=tgt_len)


def test_each_stream_reads_its_part_of_the_text_in_order():
    text = workload(33)  # 32 targets: two streams of 16, four segments
    assert text.steps_per_pass == 4
    assert text.segment(1).input_ids_BT.tolist() == [[4, 5, 6, 7], [20, 21, 22, 23]]
    assert text.segment(1).target_ids_BT.tolist() == [[5, 6, 7, 8], [21, 22, 23, 24]]


def test_after_the_last_segment_comes_the_first_from_a_cold_start():
    text = workload(33)
    assert [step for step in range(10) if text.starts_cold(step)] == [0, 4, 8]
    assert np.array_equal(text.segment(4).input_ids_BT, text.segment(0).input_ids_BT)


def test_processes_read_their_part_of_the_streams_and_all_of_them_together_the_whole():
    text = workload(65, batch_size=4)
    parts = [dataclasses.replace(text, streams=slice(first, first + 2)) for first in (0, 2)]
    assert [part.n_streams for part in parts] == [2, 2]
    assert text.n_streams == 4
    assert all(part.steps_per_pass == text.steps_per_pass and not part.is_padded for part in parts)
    for step in range(6):
        both = np.concatenate([part.segment(step).target_ids_BT for part in parts])
        assert np.array_equal(both, text.segment(step).target_ids_BT)


def test_a_last_segment_with_padding_is_left_out_where_there_are_others():
    text = workload(37)
    assert text.steps_per_pass == 4
    assert all(text.segment(step).counted_BT.all() for step in range(8))
    assert not text.is_padded


def test_a_text_shorter_than_one_segment_is_read_with_padding():
    text = workload(6)
    assert (text.steps_per_pass, text.is_padded) == (1, True)
    assert text.segment(0).counted_BT.sum() == 5


def test_a_text_with_fewer_tokens_than_streams_is_refused_at_once():
    with pytest.raises(DataError, match="too few for 8 streams"):
        workload(5, batch_size=8)


def test_segments_become_tensors_of_ids_on_the_device():
    text = workload(33)
    input_ids_BT, target_ids_BT = text.tensors(text.segment(0), "cpu")
    assert input_ids_BT.tolist() == [[0, 1, 2, 3], [16, 17, 18, 19]]
    assert str(target_ids_BT.dtype) == "torch.int64"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1..32", (1, 2, 4, 8, 16, 32)),
        ("3..20", (3, 6, 12, 20)),
        ("1-5", (1, 2, 3, 4, 5)),
        ("4", (4,)),
        ("1,3,5", (1, 3, 5)),
        ("8, 1..4 ,8, 30-31", (8, 1, 2, 4, 30, 31)),
        ("16..16", (16,)),
    ],
)
def test_batch_sizes_double_count_up_or_are_listed(text, expected):
    assert parse_batch_sizes(text) == expected


@pytest.mark.parametrize("text", ["", "0", "1,,2", "-1", "4-2", "8..1", "1...4", "one", "1..", "..4", "1.5", "1-999999999", "0..8", "²"])
def test_wrong_batch_sizes_are_an_error_with_a_remedy(text):
    with pytest.raises(UsageError) as caught:
        parse_batch_sizes(text)
    assert "--batch-sizes 1..32" in caught.value.remedy
