"""The model against the oracle that computes the paper's equations one number at a time, and the laws it keeps."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.reference.naive_txl import naive_forward, naive_log_probs, naive_nll, random_parameters
from tests.support import ATTENTION_KINDS, MODEL_CONFIGS, build_model, random_ids, segment_of, small_config
from txl_train.config import ModelConfig
from txl_train.errors import CheckpointError, ConfigError
from txl_train.evaluate import ModelStepper
from txl_train.model.inference import InferenceStep, with_lengths
from txl_train.model.memory import Memory
from txl_train.model.transformer_xl import TransformerXL

B, T, SEGMENTS = 2, 5, 4
# float32 against float64; hidden states are normalised to magnitude 1 (before: up to 10), logits reach about 10
HIDDEN_TOLERANCE, NLL_TOLERANCE = 2e-5, 5e-5

WITH_KV_MEMORY = [name for name, changes in MODEL_CONFIGS.items() if changes.get("attn_type") not in ("sinusoidal", "learned")]


def run_beside_the_oracle(config: ModelConfig, *, tgt_len: int = T, segments: int = SEGMENTS, seed: int = 0) -> None:
    parameters = random_parameters(config, seed)
    model = build_model(config, parameters)
    ids = random_ids(config, B, segments * tgt_len + 1)
    memory, naive_memory = model.initial_memory(B), None
    for s in range(segments):
        input_ids, target_ids, n_absent = segment_of(config, ids, s, tgt_len)
        with torch.no_grad():
            hidden, memory = model(torch.from_numpy(input_ids), memory)
            nll = model.nll(hidden, torch.from_numpy(target_ids))
        naive_hidden, naive_memory = naive_forward(config, parameters, input_ids[:, n_absent:], naive_memory, tgt_len)
        np.testing.assert_allclose(hidden, naive_hidden, atol=HIDDEN_TOLERANCE, rtol=1e-5)
        np.testing.assert_allclose(nll, naive_nll(config, parameters, naive_hidden, target_ids), atol=NLL_TOLERANCE)
        for b in range(B):
            filled = len(naive_memory[0][b])
            assert int(memory.length_B[b]) == min((s + 1) * tgt_len, config.mem_len + config.ext_len)
            assert max(0, int(memory.length_B[b]) - config.ext_len) == filled
            for layer in range(config.n_layer):
                kept = memory.states[layer][b, config.mem_len - filled :]
                np.testing.assert_allclose(kept, naive_memory[layer][b], atol=HIDDEN_TOLERANCE, rtol=1e-5)


@pytest.mark.parametrize("name", MODEL_CONFIGS)
def test_four_segments_from_a_cold_start_equal_the_oracle(name: str) -> None:
    run_beside_the_oracle(small_config(**MODEL_CONFIGS[name]))


@given(
    kind=st.sampled_from(list(ATTENTION_KINDS)),
    position_rows=st.integers(1, 20),
    tgt_len=st.integers(1, 5),
    mem_len=st.integers(0, 9),
    ext_len=st.integers(0, 7),
    clamp_len=st.none() | st.integers(1, 12),
    same_length=st.sampled_from([None, "mem_len+1", "mem_len"]),
    pre_lnorm=st.booleans(),
)
@settings(max_examples=50, derandomize=True)
def test_any_lengths_of_any_kind_equal_the_oracle(same_length: str | None, tgt_len: int, kind: str, **changes: Any) -> None:
    assume(same_length != "mem_len" or changes["mem_len"] > 0)
    rule = {"same_length": same_length is not None, "same_length_rule": same_length or "mem_len+1"}
    run_beside_the_oracle(small_config(attn_type=kind, **rule, **changes), tgt_len=tgt_len, segments=3)


@pytest.mark.parametrize(("name", "kind"), [*((name, "hidden") for name in MODEL_CONFIGS), *((name, "kv") for name in WITH_KV_MEMORY)])
def test_a_deployed_step_equals_the_model_with_either_memory(name: str, kind: Any) -> None:
    config = small_config(**MODEL_CONFIGS[name])
    model = build_model(config)
    stepper = ModelStepper(model, tgt_len=T, memory=kind)
    ids = random_ids(config, B, SEGMENTS * T + 1)
    ours, theirs = model.initial_memory(B), stepper.initial_memory(B)
    for s in range(SEGMENTS):
        input_ids, target_ids = (torch.from_numpy(part) for part in segment_of(config, ids, s, T)[:2])
        with torch.no_grad():
            hidden, ours = model(input_ids, ours)
            expected = model.nll(hidden, target_ids)
        nll, theirs = stepper.step(input_ids, target_ids, theirs)
        torch.testing.assert_close(nll, expected, atol=1e-5, rtol=1e-5)  # the same products, in another order
        assert torch.equal(ours.length_B, theirs.length_B)


@pytest.mark.parametrize("kind", ATTENTION_KINDS)
def test_a_model_is_evaluated_at_lengths_it_was_not_made_for(kind: str) -> None:
    config = small_config(**ATTENTION_KINDS[kind])
    parameters = random_parameters(config)
    model = build_model(config, parameters)
    for lengths in ({"mem_len": 12}, {"mem_len": 2, "ext_len": 4}, {"mem_len": 9, "clamp_len": 3, "same_length": True}):
        other = with_lengths(config, **lengths)
        stepper = ModelStepper(model, tgt_len=3, memory="hidden", config=other)
        ids = random_ids(other, B, 6 * 3 + 1)
        memory, naive_memory = stepper.initial_memory(B), None
        for s in range(6):
            input_ids, target_ids, n_absent = segment_of(other, ids, s, 3)
            nll, memory = stepper.step(torch.from_numpy(input_ids), torch.from_numpy(target_ids), memory)
            naive_hidden, naive_memory = naive_forward(other, parameters, input_ids[:, n_absent:], naive_memory, 3)
            np.testing.assert_allclose(nll, naive_nll(other, parameters, naive_hidden, target_ids), atol=NLL_TOLERANCE)


# Memory


def in_pieces(model: TransformerXL, ids: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    pieces, memory = [], model.initial_memory(len(ids))
    for part in ids.split(lengths, dim=1):
        with torch.no_grad():
            hidden, memory = model(part, memory)
        pieces.append(hidden)
    return torch.cat(pieces, dim=1)


def test_a_memory_shorter_than_the_past_serves_the_first_token_after_it_in_full() -> None:
    model = build_model(small_config(mem_len=6))
    ids = torch.from_numpy(random_ids(model.config, B, 12))
    # of the second segment only the first token has all its past in a memory of 6 positions in every layer
    torch.testing.assert_close(in_pieces(model, ids, [6, 6])[:, :7], in_pieces(model, ids, [12])[:, :7], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["relative", "shaw"])
def test_where_only_distances_count_cuts_under_a_long_memory_leave_no_trace(kind: str) -> None:
    model = build_model(small_config(**ATTENTION_KINDS[kind], mem_len=12))
    ids = torch.from_numpy(random_ids(model.config, B, 12))
    torch.testing.assert_close(in_pieces(model, ids, [3, 1, 6, 2]), in_pieces(model, ids, [12]), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("pre_lnorm", [False, True])
@pytest.mark.parametrize("kind", ["sinusoidal", "learned"])
def test_where_positions_are_added_the_last_segment_of_one_layer_equals_that_of_one_long_segment(kind: str, pre_lnorm: bool) -> None:
    """Only one layer: deeper memories were computed when their tokens had other positions. A token in the memory has one, not several."""
    model = build_model(small_config(**ATTENTION_KINDS[kind], n_layer=1, mem_len=12, pre_lnorm=pre_lnorm))
    ids = torch.from_numpy(random_ids(model.config, B, 12))
    pieces, whole = in_pieces(model, ids, [3, 1, 2, 4, 2]), in_pieces(model, ids, [12])
    torch.testing.assert_close(pieces[:, -2:], whole[:, -2:], atol=1e-5, rtol=1e-5)
    assert (pieces[:, :-2] - whole[:, :-2]).abs().max() > 1e-2  # these stood elsewhere


def test_where_all_positions_are_alike_cuts_leave_no_trace_in_any_layer() -> None:
    model = build_model(small_config(attn_type="learned", position_rows=1, mem_len=12))
    ids = torch.from_numpy(random_ids(model.config, B, 12))
    torch.testing.assert_close(in_pieces(model, ids, [3, 1, 6, 2]), in_pieces(model, ids, [12]), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ATTENTION_KINDS)
def test_the_first_layer_s_memory_is_the_embeddings_without_positions(kind: str) -> None:
    model = build_model(small_config(**ATTENTION_KINDS[kind]))
    ids = torch.from_numpy(random_ids(model.config, B, 12))
    memory = model.initial_memory(B)
    with torch.no_grad():
        for part in ids.split(3, dim=1):
            _, memory = model(part, memory)
        torch.testing.assert_close(memory.states[0], model.embedding(ids[:, -7:]))


@pytest.mark.parametrize("kind", ATTENTION_KINDS)
def test_one_layer_that_reads_tokens_once_more_equals_one_with_so_much_more_memory(kind: str) -> None:
    """Only one layer: deeper ones see in the extension what was computed anew, from less of the past."""
    one = small_config(**ATTENTION_KINDS[kind], n_layer=1, mem_len=8)
    parameters = random_parameters(one)
    reread = dataclasses.replace(one, mem_len=5, ext_len=3)
    ids = random_ids(one, B, 4 * T + 1)
    results = []
    for config in (one, reread):
        model = build_model(config, parameters)
        memory, pieces = model.initial_memory(B), []
        for s in range(4):
            with torch.no_grad():
                hidden, memory = model(torch.from_numpy(segment_of(config, ids, s, T)[0]), memory)
            pieces.append(hidden)
        results.append(torch.cat(pieces, dim=1))
    torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("ext_len", [0, 3])
@pytest.mark.parametrize("kind", ATTENTION_KINDS)
def test_what_lies_beyond_the_valid_length_is_never_read(kind: str, ext_len: int) -> None:
    model = build_model(small_config(**ATTENTION_KINDS[kind], ext_len=ext_len))
    ids = torch.from_numpy(random_ids(model.config, B, ext_len + T))
    other = ids.clone()
    other[:, :ext_len] = (ids[:, :ext_len] + 1) % model.config.vocab_size
    cold = model.initial_memory(B)
    dirty = Memory([torch.full_like(state, 1e4) for state in cold.states], cold.length_B)
    with torch.no_grad():
        assert torch.equal(model(ids, cold)[0], model(other, dirty)[0])


@pytest.mark.parametrize("ext_len", [0, 3])
def test_a_stream_that_is_reset_alone_equals_a_cold_start(ext_len: int) -> None:
    config = small_config(ext_len=ext_len)
    model = build_model(config)
    ids = random_ids(config, B, 3 * T + 1)
    first, second, third = (torch.from_numpy(segment_of(config, ids, s, T)[0]) for s in range(3))
    with torch.no_grad():
        _, memory = model(first, model.initial_memory(B))
        warm, warm_memory = model(second, memory)
        mixed, mixed_memory = model(second, Memory(memory.states, memory.length_B * torch.tensor([1, 0])))
        cold, cold_memory = model(second, model.initial_memory(B))
        assert mixed_memory.length_B.tolist() == [int(warm_memory.length_B[0]), T]
        after, after_mixed, after_cold = (model(third, memory)[0] for memory in (warm_memory, mixed_memory, cold_memory))
    torch.testing.assert_close(mixed[1], cold[1])
    torch.testing.assert_close(mixed[0], warm[0])
    torch.testing.assert_close(after_mixed[1], after_cold[1])
    torch.testing.assert_close(after_mixed[0], after[0])
    assert not torch.allclose(mixed[1], warm[1])


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", ATTENTION_KINDS)
def test_a_call_changes_neither_the_model_nor_its_arguments(kind: str, training: bool) -> None:
    model = build_model(small_config(**ATTENTION_KINDS[kind], cutoffs=(5, 9), ext_len=2)).train(training)
    ids = torch.from_numpy(random_ids(model.config, B, 2 + T))
    _, memory = model(ids, model.initial_memory(B))
    before = [tensor.clone() for tensor in (ids, *memory.states, memory.length_B, *model.state_dict().values())]
    once, new = model(ids, memory)
    once.sum().backward()
    twice, _ = model(ids, memory)
    for state in new.states:
        state.fill_(1e4)
    assert torch.equal(once, twice)
    after = (ids, *memory.states, memory.length_B, *model.state_dict().values())
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("kind", ["sinusoidal", "learned"])
def test_keys_and_values_are_refused_where_they_depend_on_the_position_at_use(kind: str) -> None:
    model = build_model(small_config(**ATTENTION_KINDS[kind]))
    with pytest.raises(ConfigError, match=rf"(?s)attn_type` {kind}.*--memory hidden"):
        InferenceStep(model, T, "kv")


def test_a_step_made_of_a_model_in_training_mode_has_no_dropout_in_its_positions() -> None:
    for changes in ATTENTION_KINDS.values():
        model = build_model(small_config(**changes, dropout=0.5))
        expected = InferenceStep(model, T, "hidden").position_terms
        model.train()
        assert all(torch.equal(a, b) for a, b in zip(expected, InferenceStep(model, T, "hidden").position_terms, strict=True))


def test_sinusoids_are_kept_for_the_one_layer_that_adds_them() -> None:
    terms = InferenceStep(build_model(small_config(attn_type="sinusoidal")), T, "hidden").position_terms
    assert [tuple(term.shape) for term in terms] == [(7 + T, 8), (0, 8)]


def test_an_input_without_a_segment_after_the_context_is_refused() -> None:
    model = build_model(small_config(ext_len=3))
    with pytest.raises(ConfigError, match="`ext_len` of 3"):
        model(torch.zeros((B, 3), dtype=torch.int64), model.initial_memory(B))


# Weights


@pytest.mark.parametrize("changes", [*ATTENTION_KINDS.values(), {"cutoffs": (5, 9, 16), "div_val": 2, "ext_len": 3}])
def test_gradients_reach_every_parameter_and_stop_at_the_memory(changes: dict[str, Any]) -> None:
    config = small_config(**changes)
    model = build_model(config).train()
    ids = random_ids(config, B, 4 * T + 1)
    memory = model.initial_memory(B)
    for s in range(2):
        input_ids, target_ids, _ = segment_of(config, ids, s, 2 * T)
        assert not any(state.requires_grad for state in memory.states)
        hidden, memory = model(torch.from_numpy(input_ids), memory)
    model.nll(hidden, torch.from_numpy(target_ids)).mean().backward()
    without = [name for name, p in model.named_parameters() if p.numel() and (p.grad is None or not p.grad.any())]
    assert without == []


def test_the_full_distribution_sums_to_one_and_contains_the_scored_targets() -> None:
    config = small_config(cutoffs=(5, 9, 16), div_val=2)
    parameters = random_parameters(config)
    model = build_model(config, parameters)
    ids = torch.from_numpy(random_ids(config, 3, 9))
    with torch.no_grad():
        hidden, _ = model(ids[:, :-1], model.initial_memory(3))
        log_probs = model.log_probs(hidden)
        nll = model.nll(hidden, ids[:, 1:])
    torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(3, 8), atol=1e-5, rtol=0)
    torch.testing.assert_close(-log_probs.gather(-1, ids[:, 1:, None]).squeeze(-1), nll, atol=1e-5, rtol=1e-5)
    expected = naive_log_probs(config, parameters, hidden[1, 2].double().numpy())
    np.testing.assert_allclose(log_probs[1, 2], expected, atol=NLL_TOLERANCE)


@pytest.mark.parametrize("target", [0, 4, 5, 8, 9, 15, 16, 22], ids=lambda target: f"id {target}")
def test_targets_at_both_edges_of_every_cluster_are_scored(target: int) -> None:
    config = small_config(cutoffs=(5, 9, 16), div_val=2)
    parameters = random_parameters(config)
    model = build_model(config, parameters)
    hidden = torch.randn(2, 3, config.d_model, generator=torch.Generator().manual_seed(1))
    targets = torch.full((2, 3), target)
    expected = naive_nll(config, parameters, hidden.double().numpy(), targets.numpy())
    with torch.no_grad():
        np.testing.assert_allclose(model.nll(hidden, targets), expected, atol=NLL_TOLERANCE)


def test_tied_weights_are_one_tensor_and_stored_once() -> None:
    model = build_model(small_config(cutoffs=(5, 9), div_val=2))
    names = model.parameters_by_name()
    assert not any(name.startswith("head.weights") for name in names)
    assert model.head.weights[1] is model.embedding.weights[1]


def test_parameters_of_another_shape_are_refused_and_nothing_is_copied() -> None:
    model, other = build_model(small_config()), build_model(small_config(), seed=1)
    given = {**other.parameters_by_name(), "position_bias": torch.zeros(2, 4)}
    before = {name: value.clone() for name, value in model.parameters_by_name().items()}
    with pytest.raises(CheckpointError, match="position_bias"):
        model.load_parameters(given)
    with pytest.raises(CheckpointError, match=r"missing \['position_bias'\]"):
        model.load_parameters({name: value for name, value in given.items() if name != "position_bias"})
    assert all(torch.equal(before[name], value) for name, value in model.parameters_by_name().items())


def test_a_model_without_a_vocabulary_size_is_refused() -> None:
    with pytest.raises(ConfigError, match="vocab_size"):
        TransformerXL(small_config(vocab_size=0))


@pytest.mark.parametrize("kind", ["shaw", "learned"])
def test_a_model_that_learns_no_position_is_refused(kind: str) -> None:
    with pytest.raises(ConfigError, match="`position_rows` must be 1 or more"):
        TransformerXL(small_config(attn_type=kind))


@pytest.mark.parametrize("changes", MODEL_CONFIGS.values(), ids=MODEL_CONFIGS.keys())
def test_a_model_made_from_weights_has_these_very_tensors_and_its_ties(changes: dict[str, Any]) -> None:
    drawn = TransformerXL(small_config(**changes))
    weights = drawn.parameters_by_name()
    before = torch.get_rng_state()
    made = TransformerXL.from_parameters(drawn.config, weights)
    assert torch.equal(torch.get_rng_state(), before), "a weight was drawn"
    assert {name: weight.data_ptr() for name, weight in made.named_parameters()} == {n: w.data_ptr() for n, w in weights.items()}
    assert all(weight.requires_grad for weight in made.parameters())


def test_a_model_is_not_made_from_weights_that_do_not_fit() -> None:
    drawn = TransformerXL(small_config())
    weights = drawn.parameters_by_name()
    del weights["layers.0.attention.qkv.weight"]
    with pytest.raises(CheckpointError, match=r"missing \['layers.0.attention.qkv.weight'\]"):
        TransformerXL.from_parameters(drawn.config, weights)
