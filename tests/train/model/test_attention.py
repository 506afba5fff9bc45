"""The shift and the mask, against loops over queries, keys and distances."""

from __future__ import annotations

import pytest
import torch

from txl_train.model.attention import rel_shift, visible_keys
from txl_train.model.positional import encode_distances, relative_positions


@pytest.mark.parametrize(("tgt_len", "mem_len"), [(1, 0), (1, 6), (4, 0), (3, 5), (5, 2)])
def test_rel_shift_gives_each_key_the_score_of_its_distance(tgt_len: int, mem_len: int) -> None:
    key_len = tgt_len + mem_len
    by_distance = torch.randn(2, 3, tgt_len, key_len + 1)
    shifted = rel_shift(by_distance)
    assert shifted.shape == (2, 3, tgt_len, key_len)
    for t in range(tgt_len):
        for k in range(key_len):
            distance = t + mem_len - k
            if distance >= 0:
                assert torch.equal(shifted[:, :, t, k], by_distance[:, :, t, key_len - 1 - distance])


@pytest.mark.parametrize("max_distance", [None, 4, 3])
def test_a_key_is_visible_if_it_is_not_ahead_not_too_far_and_filled(max_distance: int | None) -> None:
    tgt_len, mem_len, lengths = 3, 4, [0, 2, 4]
    visible = visible_keys(tgt_len, mem_len, max_distance, torch.tensor(lengths))
    assert visible.shape == (3, 1, tgt_len, mem_len + tgt_len)
    for b, length in enumerate(lengths):
        for t in range(tgt_len):
            for k in range(mem_len + tgt_len):
                distance = t + mem_len - k
                expected = 0 <= distance <= (max_distance if max_distance is not None else 99) and k >= mem_len - length
                assert bool(visible[b, 0, t, k]) == expected, (b, t, k)


def test_encodings_are_sines_then_cosines_of_the_clamped_distance() -> None:
    positions = relative_positions(6, 4, clamp_len=3)
    expected = encode_distances(torch.tensor([3, 3, 3, 2, 1, 0, 0]), 4)
    assert torch.equal(positions, expected)
    angles = torch.tensor([2.0, 0.02])  # distance 2 at frequencies 1 and 10000^(-2/4)
    torch.testing.assert_close(expected[3], torch.cat([angles.sin(), angles.cos()]))
