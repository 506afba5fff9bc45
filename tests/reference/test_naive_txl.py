"""The oracle is believed because NVIDIA's recorded numbers come out of it, and because it keeps the model's own laws."""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from tests.reference.naive_txl import (
    Ids,
    Memory,
    Parameters,
    attend,
    empty_memory,
    encode_distance,
    learned_row,
    naive_forward,
    naive_log_probs,
    naive_nll,
    parameter_shapes,
    random_parameters,
)
from tests.reference.nvidia import (
    ReferenceCase,
    encode_split,
    encode_text,
    load_nvidia_checkpoint,
    map_config,
    map_parameters,
    nvidia_segments,
    read_cases,
)
from txl_train.config import ModelConfig

TINY = ModelConfig(vocab_size=23, n_layer=2, n_head=2, d_head=3, d_model=8, d_inner=12, mem_len=6)
ADAPTIVE = dataclasses.replace(TINY, adaptive=True, cutoffs=(5, 9, 16))

HEADS = {
    "one softmax": TINY,
    "untied": dataclasses.replace(TINY, tie_weights=False),
    "projected": dataclasses.replace(TINY, d_embed=4),
    "adaptive": ADAPTIVE,
    "adaptive, untied": dataclasses.replace(ADAPTIVE, tie_weights=False),
    "adaptive, projected": dataclasses.replace(ADAPTIVE, d_embed=4),
    "adaptive, projected, no projection tied": dataclasses.replace(ADAPTIVE, d_embed=4, tie_projections=(False,) * 4),
    "div_val": dataclasses.replace(ADAPTIVE, div_val=2),
    "div_val, all projections tied": dataclasses.replace(ADAPTIVE, div_val=2, tie_projections=(True,) * 4),
    "div_val, untied": dataclasses.replace(ADAPTIVE, div_val=2, tie_weights=False, tie_projections=(False,) * 4),
}
BODIES = {
    "post-norm": TINY,
    "pre-norm": dataclasses.replace(TINY, pre_lnorm=True),
    "a bias pair per layer": dataclasses.replace(TINY, untie_biases=True),
    "clamped": dataclasses.replace(TINY, clamp_len=3),
    "learned distances": dataclasses.replace(TINY, attn_type="shaw", position_rows=5),
}
ADDED_POSITIONS = {
    "sinusoidal": dataclasses.replace(TINY, attn_type="sinusoidal"),
    "learned": dataclasses.replace(TINY, attn_type="learned", position_rows=5),
}

# The files are float32. A hidden state of size 14 has an ulp of 1e-6 and collects a few of them over four layers.
HIDDEN_ATOL = 1e-5
# The agreement to expect from an independent FP32 implementation, in nats.
NLL_ATOL = 5e-6


def rng_ids(*shape: int, seed: int = 1) -> Ids:
    return np.random.default_rng(seed).integers(0, TINY.vocab_size, shape)


# What NVIDIA's code computed


@pytest.mark.parametrize("name", ["seed2019_plain", "text8"])
def test_hidden_nll_and_memory_of_the_reference_are_reproduced_over_successive_segments(reference_cases: Path, name: str) -> None:
    about = json.loads((reference_cases / f"segments/{name}.json").read_text())
    recorded = np.load(reference_cases / f"segments/{name}.npz")
    checkpoint = load_nvidia_checkpoint(reference_cases / about["checkpoint"])
    assert checkpoint.lineage == about["lineage"]
    assert about["clamp_len"] == -1
    config = dataclasses.replace(checkpoint.config, mem_len=about["mem_len"], same_length=about["same_length"])
    tokens_NB, T = recorded["tokens"], about["tgt_len"]
    memory: Memory | None = None
    for s in range(about["segments"]):
        hidden_BTD, memory = naive_forward(config, checkpoint.parameters, tokens_NB[s * T : s * T + T].T, memory)
        nll_BT = naive_nll(config, checkpoint.parameters, hidden_BTD, tokens_NB[s * T + 1 : s * T + T + 1].T)
        assert_allclose(hidden_BTD, recorded[f"hidden{s}"].swapaxes(0, 1), rtol=0, atol=HIDDEN_ATOL)
        assert_allclose(nll_BT, recorded[f"nll{s}"].T, rtol=0, atol=NLL_ATOL)
        for layer in range(config.n_layer):
            assert_allclose(np.stack(memory[layer], axis=1), recorded[f"mems{s}"][layer], rtol=0, atol=HIDDEN_ATOL)
        if f"logprob{s}" in recorded:
            log_probs_BTV = np.apply_along_axis(lambda hidden_D: naive_log_probs(config, checkpoint.parameters, hidden_D), 2, hidden_BTD)
            assert_allclose(log_probs_BTV, recorded[f"logprob{s}"].swapaxes(0, 1), rtol=0, atol=2 * NLL_ATOL)  # improbable ones are larger
        for b, t in np.ndindex(*nll_BT.shape):
            best_first = np.argsort(-naive_log_probs(config, checkpoint.parameters, hidden_BTD[b, t]))
            assert_array_equal(best_first[:5], recorded[f"top5_{s}"][t, b])


def test_the_loss_of_every_manual_text_is_reproduced(reference_cases: Path) -> None:
    """Cold starts of different lengths, both lineages, adaptive softmax, clamp_len and same_length; one text takes four segments."""
    cases = [case for case in read_cases(reference_cases) if case.manual_ids is not None and case.ext_len == 0]
    assert {case.lineage for case in cases} == {"2019", "2023"}
    for case in cases:
        checkpoint = load_nvidia_checkpoint(case.checkpoint)
        loss, n_tokens = evaluate_as_the_reference(case.model_config(checkpoint.config), checkpoint.parameters, case, checkpoint.symbols)
        assert n_tokens == case.tokens_scored, case.id
        assert loss == pytest.approx(case.expected_loss_nats, rel=0, abs=NLL_ATOL), case.id


@pytest.mark.parametrize("run", ["adam", "samelen", "divval2"])
def test_the_loss_before_the_first_training_step_is_reproduced(reference_cases: Path, run: str) -> None:
    """With the initial weights and without dropout; `divval2` is tied with narrower clusters, `samelen` has clamp_len 12."""
    about = json.loads((reference_cases / "trajectories/trajectories.json").read_text())[run]
    args = about["args"]
    recorded = np.load(reference_cases / f"trajectories/{run}.npz")
    state = {name.removeprefix("init/"): recorded[name] for name in recorded if name.startswith("init/")}
    config = map_config(about["model_config"], "2023")
    symbols = load_nvidia_checkpoint(reference_cases / f"checkpoints/{'text8' if args['dataset'] == 'text8' else 'adaptive'}.pt").symbols
    ids = encode_text((reference_cases / args["data"] / "train.txt").read_text(encoding="utf-8"), symbols, args["dataset"])
    input_ids_BT, target_ids_BT, _ = next(nvidia_segments(ids, args["batch_size"], args["tgt_len"], 0, "2023"))
    parameters = map_parameters(state, config)
    hidden_BTD, _ = naive_forward(config, parameters, input_ids_BT)
    nll_BT = naive_nll(config, parameters, hidden_BTD, target_ids_BT)
    assert nll_BT.size == about["steps"][0]["tokens"]
    assert nll_BT.mean() == pytest.approx(about["steps"][0]["loss"], rel=0, abs=NLL_ATOL)


def evaluate_as_the_reference(config: ModelConfig, parameters: Parameters, case: ReferenceCase, symbols: list[str]) -> tuple[float, int]:
    nll_sum, n_tokens, memory = 0.0, 0, None
    for input_ids_BT, target_ids_BT, counted in case.evaluation_segments(encode_split(case, symbols)):
        hidden_BTD, memory = naive_forward(config, parameters, input_ids_BT, memory)
        if counted:
            nll_sum += naive_nll(config, parameters, hidden_BTD, target_ids_BT).sum()
            n_tokens += target_ids_BT.size
    return nll_sum / n_tokens, n_tokens


# What can be worked out by hand


def test_a_distance_is_all_its_sines_then_all_its_cosines() -> None:
    config = ModelConfig(d_model=4, clamp_len=3)
    assert_allclose(encode_distance(config, 2), [math.sin(2), math.sin(0.02), math.cos(2), math.cos(0.02)], rtol=1e-14)
    assert_allclose(encode_distance(config, 9), [math.sin(3), math.sin(0.03), math.cos(3), math.cos(0.03)], rtol=1e-14)


def test_attention_of_two_tokens_is_what_the_four_terms_give_by_hand() -> None:
    """Two tokens (1, 0) and (0, 1), one head. In its first place q = 1, 2; k = 1, 2; value = 3, 5; r = sin(distance); u = 0.5; v = 0.25.

    Its other three places are zero and count in the divisor only: sqrt(4).
    """
    config = ModelConfig(vocab_size=2, n_layer=1, n_head=1, d_head=4, d_model=2, d_inner=1)
    zeros = [[0.0, 0.0]] * 3
    weights = {
        "layers.0.attention.qkv.weight": np.array([[1.0, 2.0], *zeros, [1.0, 2.0], *zeros, [3.0, 5.0], *zeros]),
        "layers.0.attention.position.weight": np.array([[1.0, 0.0], *zeros]),
        "layers.0.attention.output.weight": np.array([[1.0, 0.0, 0.0, 0.0], [10.0, 0.0, 0.0, 0.0]]),
        "content_bias": np.array([[0.5, 0.0, 0.0, 0.0]]),
        "position_bias": np.array([[0.25, 0.0, 0.0, 0.0]]),
    }
    to_itself = (2 * 2 + 2 * 0 + 0.5 * 2 + 0.25 * 0) / 2
    to_the_first = (2 * 1 + 2 * math.sin(1) + 0.5 * 1 + 0.25 * math.sin(1)) / 2
    mean = (5 * math.exp(to_itself) + 3 * math.exp(to_the_first)) / (math.exp(to_itself) + math.exp(to_the_first))
    in_one_segment = attend(config, weights, 0, np.eye(2), np.zeros((0, 2)))
    assert_allclose(in_one_segment, [[3.0, 30.0], [mean, 10 * mean]], rtol=1e-14)
    with_the_first_in_memory = attend(config, weights, 0, np.eye(2)[1:], np.eye(2)[:1])
    assert_allclose(with_the_first_in_memory, [[mean, 10 * mean]], rtol=1e-14)


def test_learned_distances_have_a_key_and_a_bias_and_the_query_s_bias_is_for_content_alone() -> None:
    """The same two tokens; distance 0 has key 0.3 and bias 0.7, distance 1 key 0.4 and bias 0.9, and there is no other."""
    config = ModelConfig(vocab_size=2, n_layer=1, n_head=1, d_head=4, d_model=2, d_inner=1, attn_type="shaw", position_rows=2)
    zeros = [[0.0, 0.0]] * 3
    weights = {
        "layers.0.attention.qkv.weight": np.array([[1.0, 2.0], *zeros, [1.0, 2.0], *zeros, [3.0, 5.0], *zeros]),
        "layers.0.attention.distance_keys": np.array([[[0.4, 0.0, 0.0, 0.0]], [[0.3, 0.0, 0.0, 0.0]]]),
        "layers.0.attention.distance_bias": np.array([[0.9], [0.7]]),
        "layers.0.attention.output.weight": np.array([[1.0, 0.0, 0.0, 0.0], [10.0, 0.0, 0.0, 0.0]]),
        "layers.0.attention.content_bias": np.array([[0.5, 0.0, 0.0, 0.0]]),
    }
    to_itself = ((2 + 0.5) * 2 + 2 * 0.3 + 0.7) / 2
    to_the_first = ((2 + 0.5) * 1 + 2 * 0.4 + 0.9) / 2
    mean = (5 * math.exp(to_itself) + 3 * math.exp(to_the_first)) / (math.exp(to_itself) + math.exp(to_the_first))
    assert_allclose(attend(config, weights, 0, np.eye(2), np.zeros((0, 2))), [[3.0, 30.0], [mean, 10 * mean]], rtol=1e-14)
    assert_allclose(attend(config, weights, 0, np.eye(2)[1:], np.eye(2)[:1]), [[mean, 10 * mean]], rtol=1e-14)


def test_the_last_row_of_a_learned_table_is_distance_0_and_clamp_len_leaves_so_many_rows() -> None:
    config = ModelConfig(attn_type="learned", position_rows=4)
    assert [learned_row(config, distance) for distance in range(6)] == [3, 2, 1, 0, 0, 0]
    clamped = dataclasses.replace(config, clamp_len=2)
    assert [learned_row(clamped, distance) for distance in range(6)] == [3, 2, 2, 2, 2, 2]
    assert [learned_row(dataclasses.replace(config, clamp_len=9), distance) for distance in (3, 8)] == [0, 0]


@pytest.mark.parametrize("name", ADDED_POSITIONS)
def test_positions_counted_from_the_end_are_added_once_or_in_every_layer(name: str) -> None:
    config = dataclasses.replace(ADDED_POSITIONS[name], pre_lnorm=True)
    parameters, ids = random_parameters(config), rng_ids(1, 3)
    for parameter, values in parameters.items():
        if ".attention.output." in parameter or ".outer." in parameter:
            values[:] = 0.0
    hidden_BTD, _ = naive_forward(config, parameters, ids)
    embedded_TD = parameters["embedding.weights.0"][ids[0]] * math.sqrt(config.d_model)
    if name == "sinusoidal":
        added_TD = np.array([encode_distance(config, from_end) for from_end in (2, 1, 0)])
    else:
        added_TD = sum(parameters[f"layers.{layer}.attention.position_embedding"][2:] for layer in range(2))
    assert_allclose(hidden_BTD[0], embedded_TD + added_TD, rtol=1e-12)


@pytest.mark.parametrize("kept", [0, 1])
def test_each_head_has_its_own_rows_of_every_weight(kept: int) -> None:
    """With one of two heads cut off at the output, nothing that is that head's matters, and everything that is the other's does."""
    weights, x_TD = random_parameters(TINY), np.random.default_rng(0).normal(size=(5, TINY.d_model))
    output_weight_DHE = weights["layers.0.attention.output.weight"].reshape(TINY.d_model, 2, TINY.d_head)
    output_weight_DHE[:, 1 - kept] = 0.0
    attended_TD = attend(TINY, weights, 0, x_TD, np.zeros((0, TINY.d_model)))
    for name, n_blocks in [
        ("layers.0.attention.qkv.weight", 3),
        ("layers.0.attention.position.weight", 1),
        ("content_bias", 1),
        ("position_bias", 1),
    ]:
        for head in (0, 1):
            changed = weights[name].copy()
            changed.reshape(n_blocks, 2, -1)[:, head] += 0.5
            moved_TD = attend(TINY, {**weights, name: changed}, 0, x_TD, np.zeros((0, TINY.d_model))) - attended_TD
            assert (np.abs(moved_TD).max() > 1e-6) == (head == kept), (name, head)


def test_the_feed_forward_block_lets_nothing_negative_through() -> None:
    config = dataclasses.replace(TINY, pre_lnorm=True, n_layer=1)
    parameters, ids = random_parameters(config), rng_ids(1, 3)
    parameters["layers.0.attention.output.weight"][:] = 0.0
    parameters["layers.0.feed_forward.inner.bias"][:] = -100.0
    hidden_BTD, _ = naive_forward(config, parameters, ids)
    embedded_TD = parameters["embedding.weights.0"][ids[0]] * math.sqrt(config.d_model)
    assert_allclose(hidden_BTD[0], embedded_TD + parameters["layers.0.feed_forward.outer.bias"], rtol=1e-13)


def test_layers_that_add_nothing_leave_the_scaled_embedding_or_its_norm() -> None:
    ids = rng_ids(1, 3)
    for pre_lnorm in (True, False):
        config = dataclasses.replace(TINY, pre_lnorm=pre_lnorm)
        parameters = random_parameters(config)
        for name, values in parameters.items():
            if ".attention.output." in name or ".outer." in name or "_norm.bias" in name:
                values[:] = 0.0
            if "_norm.weight" in name:
                values[:] = 1.0
        hidden_BTD, _ = naive_forward(config, parameters, ids)
        embedded_TD = parameters["embedding.weights.0"][ids[0]] * math.sqrt(config.d_model)
        normed_TD = (embedded_TD - embedded_TD.mean(-1, keepdims=True)) / embedded_TD.std(-1, keepdims=True)
        # each of the four norms divides by sqrt(variance + 1e-5), not by the plain deviation
        expected_TD = embedded_TD if pre_lnorm else normed_TD
        assert_allclose(hidden_BTD[0], expected_TD, rtol=1e-4)


# Memory


@pytest.mark.parametrize("name", BODIES)
def test_segments_with_a_long_memory_equal_one_long_segment(name: str) -> None:
    config = dataclasses.replace(BODIES[name], mem_len=20)
    parameters, ids = random_parameters(config), rng_ids(2, 12)
    whole_BTD, _ = naive_forward(config, parameters, ids)
    assert_allclose(forward_in_pieces(config, parameters, ids, [5, 1, 4, 2]), whole_BTD, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ADDED_POSITIONS)
def test_with_added_positions_the_last_segment_of_one_layer_equals_that_of_one_long_segment(name: str) -> None:
    """Its memory holds embeddings, which get the positions of the segment that reads them, however long ago they came."""
    config = dataclasses.replace(ADDED_POSITIONS[name], mem_len=20, n_layer=1)
    parameters, ids = random_parameters(config), rng_ids(2, 12)
    whole_BTD, _ = naive_forward(config, parameters, ids)
    in_pieces_BTD = forward_in_pieces(config, parameters, ids, [3, 1, 2, 4, 2])
    assert_allclose(in_pieces_BTD[:, -2:], whole_BTD[:, -2:], rtol=0, atol=1e-12)
    assert np.abs(in_pieces_BTD[:, :-2] - whole_BTD[:, :-2]).max() > 1e-2


@pytest.mark.parametrize("rule", ["mem_len+1", "mem_len"])
@pytest.mark.parametrize("name", BODIES)
def test_with_same_length_the_cuts_between_segments_leave_no_trace(name: str, rule: Any) -> None:
    config = dataclasses.replace(BODIES[name], mem_len=4, same_length=True, same_length_rule=rule)
    parameters, ids = random_parameters(config), rng_ids(2, 12)
    whole_BTD, _ = naive_forward(config, parameters, ids)
    assert_allclose(forward_in_pieces(config, parameters, ids, [5, 1, 4, 2]), whole_BTD, rtol=0, atol=1e-12)


def test_memory_holds_the_inputs_of_each_layer_and_grows_to_mem_len() -> None:
    for pre_lnorm in (False, True):
        config = dataclasses.replace(TINY, pre_lnorm=pre_lnorm)
        parameters, ids = random_parameters(config), rng_ids(2, 12)
        memory = empty_memory(config, 2)
        for n_segment in range(3):
            _, memory = naive_forward(config, parameters, ids[:, n_segment * 4 : n_segment * 4 + 4], memory)
            assert [[len(past) for past in streams] for streams in memory] == [[min(6, 4 * n_segment + 4)] * 2] * 2
        embedded_BTD = parameters["embedding.weights.0"][ids[:, -6:]] * math.sqrt(config.d_model)
        assert_allclose(np.stack(memory[0]), embedded_BTD, rtol=1e-14)


def test_an_empty_memory_is_not_a_memory_of_zeros() -> None:
    parameters, ids = random_parameters(TINY), rng_ids(1, 3)
    cold_BTD, _ = naive_forward(TINY, parameters, ids)
    assert_array_equal(naive_forward(TINY, parameters, ids, empty_memory(TINY, 1))[0], cold_BTD)
    zeros: Memory = [[np.zeros((TINY.mem_len, TINY.d_model))] for _ in range(TINY.n_layer)]
    assert np.abs(naive_forward(TINY, parameters, ids, zeros)[0] - cold_BTD).max() > 1e-3


def test_without_memory_length_nothing_is_kept() -> None:
    config = dataclasses.replace(TINY, mem_len=0)
    parameters, ids = random_parameters(config), rng_ids(1, 4)
    _, memory = naive_forward(config, parameters, ids)
    assert [past.shape for streams in memory for past in streams] == [(0, 8)] * 2
    assert_array_equal(naive_forward(config, parameters, ids, memory)[0], naive_forward(config, parameters, ids)[0])


def test_streams_with_memories_of_different_length_do_not_meet() -> None:
    parameters, ids = random_parameters(TINY), rng_ids(2, 4)
    _, warm = naive_forward(TINY, parameters, rng_ids(1, 5, seed=2))
    mixed: Memory = [[np.zeros((0, TINY.d_model)), streams[0]] for streams in warm]
    both_BTD, both_memory = naive_forward(TINY, parameters, ids, mixed)
    assert_array_equal(both_BTD[:1], naive_forward(TINY, parameters, ids[:1])[0])
    assert_array_equal(both_BTD[1:], naive_forward(TINY, parameters, ids[1:], warm)[0])
    assert [[len(past) for past in streams] for streams in both_memory] == [[4, 6]] * 2


def test_a_call_changes_none_of_its_arguments() -> None:
    parameters, ids = random_parameters(TINY), rng_ids(1, 4)
    _, memory = naive_forward(TINY, parameters, ids)
    before = pickle.dumps((parameters, ids, memory))
    _, new_memory = naive_forward(TINY, parameters, ids, memory)
    new_memory[0][0][:] = 0.0
    assert pickle.dumps((parameters, ids, memory)) == before


def test_the_memory_ends_where_the_next_input_begins() -> None:
    config = dataclasses.replace(TINY, ext_len=3)
    parameters, ids = random_parameters(config), rng_ids(1, 12)
    memory = None
    for start, expected in [(0, slice(0, 0)), (2, slice(0, 1)), (4, slice(0, 3)), (6, slice(0, 5)), (8, slice(1, 7)), (10, slice(3, 9))]:
        _, memory = naive_forward(config, parameters, ids[:, max(0, start - 3) : start + 2], memory, tgt_len=2)
        embedded_MD = parameters["embedding.weights.0"][ids[0, expected]] * math.sqrt(config.d_model)
        assert_allclose(memory[0][0], embedded_MD, rtol=1e-14)


@pytest.mark.parametrize("name", [*BODIES, *ADDED_POSITIONS])
def test_without_memory_the_context_read_once_more_is_all_there_is(name: str) -> None:
    config = dataclasses.replace({**BODIES, **ADDED_POSITIONS}[name], mem_len=0, ext_len=4)
    parameters, ids = random_parameters(config), rng_ids(2, 9)
    _, memory = naive_forward(config, parameters, ids[:, :6], tgt_len=6)
    hidden_BTD, _ = naive_forward(config, parameters, ids[:, 2:], memory, tgt_len=3)
    assert_array_equal(hidden_BTD, naive_forward(config, parameters, ids[:, 2:])[0][:, -3:])


@pytest.mark.parametrize("name", [*BODIES, *ADDED_POSITIONS])
def test_one_layer_sees_in_memory_and_context_together_what_it_sees_in_a_longer_memory(name: str) -> None:
    plain = dataclasses.replace({**BODIES, **ADDED_POSITIONS}[name], n_layer=1, mem_len=7)
    reread = dataclasses.replace(plain, mem_len=4, ext_len=3)
    parameters, ids = random_parameters(plain), rng_ids(2, 15)
    expected_BTD = forward_in_pieces(plain, parameters, ids, [3] * 5)
    pieces, memory = [], None
    for start in range(0, 15, 3):
        hidden_BTD, memory = naive_forward(reread, parameters, ids[:, max(0, start - 3) : start + 3], memory, tgt_len=3)
        pieces.append(hidden_BTD)
    assert_allclose(np.concatenate(pieces, axis=1), expected_BTD, rtol=0, atol=1e-12)


def forward_in_pieces(config: ModelConfig, parameters: Parameters, ids: Ids, lengths: list[int]) -> Any:
    pieces, memory, start = [], None, 0
    for length in lengths:
        hidden_BTD, memory = naive_forward(config, parameters, ids[:, start : start + length], memory)
        pieces.append(hidden_BTD)
        start += length
    assert start == ids.shape[1]
    return np.concatenate(pieces, axis=1)


# What a token can see: with one layer, exactly the tokens that change its hidden state


@pytest.mark.parametrize(
    ("same_length", "rule", "segments", "farthest"),
    [
        (False, "mem_len+1", [9], 8),
        (False, "mem_len+1", [8, 1], 4),  # the memory's length
        (False, "mem_len+1", [6, 3], 6),  # and the segment itself
        (True, "mem_len+1", [9], 4),
        (True, "mem_len+1", [6, 3], 4),
        (True, "mem_len", [9], 3),
        (True, "mem_len", [6, 3], 3),
    ],
)
def test_the_last_token_sees_back_to(same_length: bool, rule: Any, segments: list[int], farthest: int) -> None:
    config = dataclasses.replace(TINY, n_layer=1, mem_len=4, same_length=same_length, same_length_rule=rule)
    parameters, ids = random_parameters(config), rng_ids(1, 9)
    last_D = forward_in_pieces(config, parameters, ids, segments)[0, -1]
    for distance in range(9):
        changed = ids.copy()
        changed[0, 8 - distance] = (ids[0, 8 - distance] + 1) % TINY.vocab_size
        moved = np.abs(forward_in_pieces(config, parameters, changed, segments)[0, -1] - last_D).max()
        assert (moved > 1e-6) == (distance <= farthest), distance


def test_no_token_sees_what_follows_it() -> None:
    parameters, ids = random_parameters(TINY), rng_ids(1, 7)
    changed = ids.copy()
    changed[0, 4] += 1 if ids[0, 4] == 0 else -1
    hidden_TD, changed_TD = naive_forward(TINY, parameters, ids)[0][0], naive_forward(TINY, parameters, changed)[0][0]
    assert_array_equal(hidden_TD[:4], changed_TD[:4])
    assert (np.abs(hidden_TD[4:] - changed_TD[4:]).max(axis=1) > 1e-6).all()


def test_beyond_clamp_len_the_order_of_tokens_is_lost() -> None:
    ids = np.arange(8)[None]
    swapped = np.array([[1, 0, 2, 3, 4, 5, 6, 7]])
    for clamp_len, order_lost_from in [(1, 2), (3, 4), (6, 7), (7, 8), (None, 8)]:
        config = dataclasses.replace(TINY, n_layer=1, clamp_len=clamp_len)
        parameters = random_parameters(config)
        moved_T = np.abs(naive_forward(config, parameters, ids)[0] - naive_forward(config, parameters, swapped)[0])[0].max(axis=1)
        # the token at position p has the swapped two at distances p and p - 1
        assert (moved_T[2:order_lost_from] > 1e-6).all()
        assert (moved_T[order_lost_from:] < 1e-12).all()


def test_each_layer_uses_its_own_biases_where_there_are_several() -> None:
    untied = BODIES["a bias pair per layer"]
    parameters, ids = random_parameters(untied), rng_ids(1, 5)
    hidden_BTD, _ = naive_forward(untied, parameters, ids)
    for name in [f"layers.{layer}.attention.{bias}" for layer in range(2) for bias in ("content_bias", "position_bias")]:
        changed = {**parameters, name: parameters[name] + 0.5}
        assert np.abs(naive_forward(untied, changed, ids)[0] - hidden_BTD).max() > 1e-6, name
    same = {name: values for name, values in parameters.items() if "_bias" not in name or "attention." not in name}
    for bias in ("content_bias", "position_bias"):
        same[bias] = parameters[f"layers.0.attention.{bias}"]
        parameters[f"layers.1.attention.{bias}"] = parameters[f"layers.0.attention.{bias}"]
    assert_array_equal(naive_forward(TINY, same, ids)[0], naive_forward(untied, parameters, ids)[0])


# Embedding and softmax


@pytest.mark.parametrize("name", HEADS)
def test_probabilities_of_all_tokens_sum_to_one_and_give_the_nll(name: str) -> None:
    config = HEADS[name]
    parameters, ids = random_parameters(config), rng_ids(1, 24)
    hidden_BTD, _ = naive_forward(config, parameters, ids[:, :1])
    log_probs_V = naive_log_probs(config, parameters, hidden_BTD[0, 0])
    assert log_probs_V.shape == (config.vocab_size,)
    assert np.exp(log_probs_V).sum() == pytest.approx(1.0, rel=1e-13)
    every_token = np.arange(config.vocab_size)[None]
    repeated_BTD = np.repeat(hidden_BTD, config.vocab_size, axis=1)
    assert_array_equal(naive_nll(config, parameters, repeated_BTD, every_token)[0], -log_probs_V)


@pytest.mark.parametrize("name", HEADS)
def test_every_parameter_matters(name: str) -> None:
    config = HEADS[name]
    parameters, ids = random_parameters(config), np.arange(config.vocab_size)[None]

    def loss(parameters: Parameters) -> float:
        hidden_BTD, _ = naive_forward(config, parameters, ids)
        return float(naive_nll(config, parameters, hidden_BTD, ids[:, ::-1]).mean())

    first = loss(parameters)
    for parameter, values in parameters.items():
        other = np.random.default_rng(3).normal(0.0, 0.4, values.shape)
        assert abs(loss({**parameters, parameter: other}) - first) > 1e-9, parameter


@pytest.mark.parametrize("name", ["learned distances", *ADDED_POSITIONS])
def test_every_parameter_of_every_kind_of_position_matters(name: str) -> None:
    config = {**BODIES, **ADDED_POSITIONS}[name]
    parameters, ids = random_parameters(config), np.arange(6)[None]
    hidden_BTD, _ = naive_forward(config, parameters, ids)
    for parameter, values in parameters.items():
        for row in range(len(values)) if "distance" in parameter or "position" in parameter else [slice(None)]:
            other = values.copy()
            other[row] += np.random.default_rng(3).normal(0.0, 0.4, values[row].shape)
            moved = np.abs(naive_forward(config, {**parameters, parameter: other}, ids)[0] - hidden_BTD).max()
            assert moved > 1e-9 or parameter.startswith("head."), (parameter, row)


def test_a_tail_cluster_is_chosen_by_its_own_column_in_ascending_order() -> None:
    parameters = random_parameters(ADAPTIVE)
    hidden_D = np.random.default_rng(0).normal(size=ADAPTIVE.d_model)
    ends = (5, 9, 16, 23)
    for i in range(3):
        favoured = {**parameters, "head.cluster_bias": np.eye(3)[i] * 50.0}
        probs_V = np.exp(naive_log_probs(ADAPTIVE, favoured, hidden_D))
        assert probs_V[ends[i] : ends[i + 1]].sum() == pytest.approx(1.0, abs=1e-12)


def test_an_adaptive_softmax_without_effect_is_a_plain_one() -> None:
    """Give each cluster's column the log-sum-exp of its words: then p(cluster) p(word | cluster) is p(word) of one softmax."""
    parameters = random_parameters(TINY)
    hidden_D = np.random.default_rng(0).normal(size=TINY.d_model)
    logits_V = parameters["embedding.weights.0"] @ hidden_D + parameters["head.biases.0"]
    cut = {}
    for i, (low, high) in enumerate([(0, 5), (5, 9), (9, 16), (16, 23)]):
        cut[f"embedding.weights.{i}"] = parameters["embedding.weights.0"][low:high]
        cut[f"head.biases.{i}"] = parameters["head.biases.0"][low:high]
    cut["head.cluster_weight"] = np.zeros((3, TINY.d_model))
    cut["head.cluster_bias"] = np.array([np.log(np.exp(logits_V[low:high]).sum()) for low, high in [(5, 9), (9, 16), (16, 23)]])
    assert_allclose(naive_log_probs(ADAPTIVE, cut, hidden_D), naive_log_probs(TINY, parameters, hidden_D), rtol=1e-12)


def test_tokens_outside_the_vocabulary_are_an_error() -> None:
    for token in (-1, TINY.vocab_size):
        with pytest.raises(IndexError, match="outside the vocabulary"):
            naive_forward(TINY, random_parameters(TINY), np.array([[token]]))


# Reading what NVIDIA's code wrote


@pytest.mark.parametrize(
    ("name", "lineage", "vocab_size", "first_symbol"),
    [
        ("adaptive", "2023", 13777, "<eos>"),
        ("divval2nt", "2023", 13777, "<eos>"),
        ("text8", "2023", 27, "_"),
        ("seed2019", "2019", 13777, "<eos>"),
    ],
)
def test_checkpoints_of_both_lineages_are_read_in_full(
    reference_cases: Path, name: str, lineage: str, vocab_size: int, first_symbol: str
) -> None:
    checkpoint = load_nvidia_checkpoint(reference_cases / f"checkpoints/{name}.pt")
    assert checkpoint.lineage == lineage
    assert checkpoint.symbols[0] == first_symbol
    assert len(checkpoint.symbols) == checkpoint.config.vocab_size == vocab_size
    shapes = {parameter: values.shape for parameter, values in checkpoint.parameters.items()}
    assert shapes == parameter_shapes(checkpoint.config)


def test_rows_of_the_clusters_are_reversed_into_our_order(reference_cases: Path) -> None:
    recorded = np.load(reference_cases / "trajectories/divval2.npz")
    state = {name.removeprefix("final/"): recorded[name] for name in recorded if name.startswith("final/")}
    about = json.loads((reference_cases / "trajectories/trajectories.json").read_text())["divval2"]
    config = map_config(about["model_config"], "2023")
    parameters = map_parameters(state, config)
    assert_array_equal(parameters["head.cluster_weight"], state["crit.cluster_weight"][[2, 1, 0]])
    assert_array_equal(parameters["head.cluster_bias"], state["crit.cluster_bias"][[2, 1, 0]])
    with pytest.raises(ValueError, match="surprise"):
        map_parameters({**state, "surprise": np.zeros(1)}, config)
    with pytest.raises(ValueError, match="should be tied"):
        map_parameters({**state, "crit.shared_out_projs.1": state["crit.shared_out_projs.1"] + 1}, config)


def test_a_checkpoint_that_asks_for_another_class_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return Path.touch, (str(tmp_path / "ran"),)

    path = tmp_path / "hostile.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"model_state": Hostile()}))
    with pytest.raises(pickle.UnpicklingError, match="not among the classes known"):
        load_nvidia_checkpoint(path)
    assert not (tmp_path / "ran").exists()


# The reference's evaluation order


def test_evaluation_of_2019_drops_the_rest_and_ends_with_a_shorter_segment() -> None:
    segments = [(x.tolist(), y.tolist(), counted) for x, y, counted in nvidia_segments(np.arange(11), 2, 3, 4, "2019")]
    assert segments == [
        ([[0, 1, 2], [5, 6, 7]], [[1, 2, 3], [6, 7, 8]], True),
        ([[3], [8]], [[4], [9]], True),
    ]


def test_evaluation_of_2023_warms_up_on_the_end_of_the_previous_column() -> None:
    segments = [(x.tolist(), y.tolist(), counted) for x, y, counted in nvidia_segments(np.arange(11), 2, 3, 2, "2023")]
    assert segments == [
        ([[7, 8, 9], [2, 3, 4]], [[8, 9, 0], [3, 4, 5]], False),
        ([[0, 1, 2], [5, 6, 7]], [[1, 2, 3], [6, 7, 8]], True),
        ([[3], [8]], [[4], [9]], True),
    ]
    without_memory = nvidia_segments(np.arange(11), 2, 3, 0, "2023")
    assert [counted for _, _, counted in without_memory] == [True, True]


def test_the_order_has_the_segments_and_tokens_of_every_recorded_evaluation(reference_cases: Path) -> None:
    cases = [case for case in read_cases(reference_cases) if case.expected_loss_nats is not None and case.world_size == 1]
    assert len(cases) > 1
    symbols = {path: load_nvidia_checkpoint(path).symbols for path in {case.checkpoint for case in cases}}
    for case in cases:
        passes = list(case.evaluation_segments(encode_split(case, symbols[case.checkpoint]))) * case.repeat
        assert len(passes) == case.segments, case.id
        assert sum(targets.size for _, targets, counted in passes if counted) == case.tokens_scored, case.id
        assert sum(targets.shape[1] for _, targets, counted in passes if counted) == case.rows_scored, case.id


def test_lines_of_wikitext_end_with_eos_and_characters_of_text8_do_not() -> None:
    symbols = ["<eos>", "a", "B"]
    assert encode_text(" a B\n\n a", symbols, "wt103").tolist() == [1, 2, 0, 0, 1, 0]
    assert encode_text("a\n", symbols, "wt103").tolist() == [1, 0]
    assert encode_text("_ a\n_", ["_", "a"], "text8").tolist() == [0, 1, 0]
    with pytest.raises(KeyError, match="unknown"):
        encode_text("a unknown", symbols, "wt103")
