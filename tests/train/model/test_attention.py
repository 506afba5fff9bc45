"""The shift, the mask and the positions, against loops over queries, keys and distances."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.support import build_model, random_ids, small_config
from txl_train.config import AttentionKind
from txl_train.model import relative
from txl_train.model.attention import visible_keys
from txl_train.model.positional import encode_distances, shared_positions
from txl_train.model.relative import rel_shift


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


@pytest.mark.parametrize("attn_type", ["relative", "shaw"])
@pytest.mark.parametrize("tgt_len", [4, 11])
def test_training_has_the_hidden_states_of_evaluation_whatever_lines_are_filled_up_to(
    attn_type: AttentionKind, tgt_len: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relative, "in_whole_lines", lambda term: F.pad(term, [0, -term.shape[2] % 8]))  # as on a GPU
    config = small_config(attn_type=attn_type, position_rows=30, dropout=0.0, mem_len=9)
    model = build_model(config)
    memory = model.initial_memory(2)
    for number in range(4):
        ids = torch.from_numpy(random_ids(config, 2, tgt_len, seed=number))
        training, evaluation = model.train()(ids, memory)[0], model.eval()(ids, memory)[0]
        torch.testing.assert_close(training, evaluation, rtol=1e-5, atol=1e-5)
        memory = model(ids, memory)[1]


@pytest.mark.parametrize("attn_type", ["relative", "shaw"])
def test_scores_of_training_in_half_precision_are_summed_in_float32_and_nowhere_rounded(attn_type: AttentionKind) -> None:
    config = small_config(attn_type=attn_type, position_rows=20, dropout=0.0)
    attention = build_model(config).layers[0].attention.train()
    generator = torch.Generator().manual_seed(0)
    Q, K, W = 4, 10, config.n_head * config.d_head
    query = 30 * torch.randn(2, Q, W, generator=generator)
    key = torch.randn(2, config.n_head, K, config.d_head, generator=generator)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        term = attention.position_term(shared_positions(config, K))
        both = attention.scores(query, key, term)
        content, position = attention.scores(query, key, 0 * term), attention.scores(query, 0 * key, term)
    assert both.dtype == torch.float32
    seen = (torch.arange(Q)[:, None] + K - Q - torch.arange(K)[None, :]) >= 0
    assert torch.equal((content + position)[:, :, seen], both[:, :, seen])


@pytest.mark.parametrize("ext_len", [0, 2, 5])
@pytest.mark.parametrize("max_distance", [None, 4, 3])
def test_a_key_is_visible_if_it_is_not_ahead_not_too_far_and_filled(max_distance: int | None, ext_len: int) -> None:
    tgt_len, mem_len, lengths = 3, 4, [0, 1, 2, 4, 4 + ext_len]
    visible = visible_keys(tgt_len, mem_len, max_distance, torch.tensor(lengths), ext_len)
    n_queries, n_keys = ext_len + tgt_len, mem_len + ext_len + tgt_len
    assert visible.shape == (len(lengths), 1, n_queries, n_keys)
    for b, length in enumerate(lengths):
        for q in range(n_queries):
            for k in range(n_keys):
                distance = q + mem_len - k
                before_the_segment = mem_len + ext_len - k
                expected = 0 <= distance <= (max_distance if max_distance is not None else 99) and before_the_segment <= length
                assert bool(visible[b, 0, q, k]) == expected, (b, q, k)


def test_encodings_are_sines_then_cosines_of_the_clamped_distance() -> None:
    positions = shared_positions(small_config(d_model=4, clamp_len=3), 6)
    expected = encode_distances(torch.tensor([3, 3, 3, 2, 1, 0, 0]), 4)
    assert torch.equal(positions, expected)
    angles = torch.tensor([2.0, 0.02])  # distance 2 at frequencies 1 and 10000^(-2/4)
    torch.testing.assert_close(expected[3], torch.cat([angles.sin(), angles.cos()]))


def test_positions_that_are_added_are_counted_back_from_the_last_token() -> None:
    positions = shared_positions(small_config(attn_type="sinusoidal", d_model=4, clamp_len=3), 6)
    assert torch.equal(positions, encode_distances(torch.tensor([3, 3, 3, 2, 1, 0]), 4))


@pytest.mark.parametrize(
    ("position_rows", "clamp_len", "expected"),
    [
        (6, None, [0, 1, 2, 3, 4, 5]),
        (9, None, [3, 4, 5, 6, 7, 8]),
        (4, None, [0, 0, 0, 1, 2, 3]),
        (6, 4, [2, 2, 2, 3, 4, 5]),
        (6, 1, [5, 5, 5, 5, 5, 5]),
        (4, 9, [0, 0, 0, 1, 2, 3]),
    ],
)
def test_the_last_row_is_the_nearest_and_the_farthest_in_use_serves_all_beyond(
    position_rows: int, clamp_len: int | None, expected: list[int]
) -> None:
    learned = small_config(attn_type="learned", position_rows=position_rows, clamp_len=clamp_len)
    assert shared_positions(learned, 6).tolist() == expected
    shaw = small_config(attn_type="shaw", position_rows=position_rows, clamp_len=clamp_len)
    assert shared_positions(shaw, 6).tolist() == [*expected, position_rows - 1]  # the key in the future
