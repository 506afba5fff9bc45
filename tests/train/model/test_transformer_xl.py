"""The model against the oracle that computes the paper's equations one number at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.reference.naive_txl import naive_forward, naive_log_probs, naive_nll, random_parameters
from tests.support import MODEL_CONFIGS, build_model, random_ids, small_config
from txl_train.errors import CheckpointError, ConfigError
from txl_train.evaluate import ModelStepper
from txl_train.model.memory import Memory
from txl_train.model.transformer_xl import TransformerXL

B, T, SEGMENTS = 2, 5, 4
# float32 against float64; hidden states are normalised to magnitude 1, logits reach about 10
HIDDEN_TOLERANCE, NLL_TOLERANCE = 2e-5, 5e-5


@pytest.mark.parametrize("name", MODEL_CONFIGS)
def test_four_segments_from_a_cold_start_equal_the_oracle(name: str) -> None:
    config = small_config(**MODEL_CONFIGS[name])
    parameters = random_parameters(config)
    model = build_model(config, parameters)
    ids = random_ids(config, B, SEGMENTS * T + 1)
    memory, naive_memory = model.initial_memory(B), None
    for s in range(SEGMENTS):
        input_ids, target_ids = ids[:, s * T : s * T + T], ids[:, s * T + 1 : s * T + T + 1]
        with torch.no_grad():
            hidden, memory = model(torch.from_numpy(input_ids.copy()), memory)
            nll = model.nll(hidden, torch.from_numpy(target_ids.copy()))
        naive_hidden, naive_memory = naive_forward(config, parameters, input_ids, naive_memory)
        np.testing.assert_allclose(hidden, naive_hidden, atol=HIDDEN_TOLERANCE)
        np.testing.assert_allclose(nll, naive_nll(config, parameters, naive_hidden, target_ids), atol=NLL_TOLERANCE)
        for b in range(B):
            filled = int(memory.length_B[b])
            assert filled == len(naive_memory[0][b])
            for layer in range(config.n_layer):
                kept = memory.states[layer][b, config.mem_len - filled :]
                np.testing.assert_allclose(kept, naive_memory[layer][b], atol=HIDDEN_TOLERANCE)


@pytest.mark.parametrize("kind", ["kv", "hidden"])
@pytest.mark.parametrize("name", MODEL_CONFIGS)
def test_a_deployed_step_equals_the_model_with_either_memory(name: str, kind: str) -> None:
    config = small_config(**MODEL_CONFIGS[name])
    model = build_model(config)
    stepper = ModelStepper(model, tgt_len=T, memory=kind)
    ids = torch.from_numpy(random_ids(config, B, SEGMENTS * T + 1))
    ours, theirs = model.initial_memory(B), stepper.initial_memory(B)
    for s in range(SEGMENTS):
        input_ids, target_ids = ids[:, s * T : s * T + T], ids[:, s * T + 1 : s * T + T + 1]
        with torch.no_grad():
            hidden, ours = model(input_ids, ours)
            expected = model.nll(hidden, target_ids)
        nll, theirs = stepper.step(input_ids, target_ids, theirs)
        torch.testing.assert_close(nll, expected, atol=1e-5, rtol=1e-5)  # the same products, in another order
        assert torch.equal(ours.length_B, theirs.length_B)


def test_two_segments_with_memory_equal_one_long_segment() -> None:
    config = small_config(mem_len=6)
    model = build_model(config)
    ids = torch.from_numpy(random_ids(config, B, 12))
    with torch.no_grad():
        first, memory = model(ids[:, :6], model.initial_memory(B))
        second, _ = model(ids[:, 6:], memory)
        whole, _ = model(ids, model.initial_memory(B))
    # of the second segment only the first token has all its past in a memory of 6 positions in every layer
    torch.testing.assert_close(torch.cat([first, second[:, :1]], dim=1), whole[:, :7], atol=1e-5, rtol=1e-5)


def test_what_lies_beyond_the_valid_length_is_never_read() -> None:
    config = small_config()
    model = build_model(config)
    ids = torch.from_numpy(random_ids(config, B, T))
    cold = model.initial_memory(B)
    dirty = Memory([torch.full_like(state, 1e4) for state in cold.states], cold.length_B)
    with torch.no_grad():
        assert torch.equal(model(ids, cold)[0], model(ids, dirty)[0])


def test_a_stream_that_is_reset_alone_equals_a_cold_start() -> None:
    config = small_config()
    model = build_model(config)
    ids = torch.from_numpy(random_ids(config, B, 2 * T))
    with torch.no_grad():
        _, memory = model(ids[:, :T], model.initial_memory(B))
        mixed, _ = model(ids[:, T:], Memory(memory.states, memory.length_B * torch.tensor([1, 0])))
        cold, _ = model(ids[:, T:], model.initial_memory(B))
        warm, _ = model(ids[:, T:], memory)
    torch.testing.assert_close(mixed[1], cold[1])
    torch.testing.assert_close(mixed[0], warm[0])
    assert not torch.allclose(mixed[1], warm[1])


def test_a_call_changes_neither_the_model_nor_its_arguments() -> None:
    config = small_config(cutoffs=(5, 9))
    model = build_model(config)
    ids = torch.from_numpy(random_ids(config, B, T))
    with torch.no_grad():
        _, memory = model(ids, model.initial_memory(B))
        states = [state.clone() for state in memory.states]
        once, _ = model(ids, memory)
        twice, _ = model(ids, memory)
    assert torch.equal(once, twice)
    assert all(torch.equal(before, after) for before, after in zip(states, memory.states))


def test_gradients_reach_every_parameter_and_stop_at_the_memory() -> None:
    config = small_config(cutoffs=(5, 9, 16), div_val=2)
    model = build_model(config).train()
    ids = torch.from_numpy(random_ids(config, B, 3 * T + 1))
    _, memory = model(ids[:, :T], model.initial_memory(B))
    assert not any(state.requires_grad for state in memory.states)
    hidden, _ = model(ids[:, T : 3 * T], memory)
    model.nll(hidden, ids[:, T + 1 : 3 * T + 1]).mean().backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()]
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


def test_initial_weights_have_the_reference_distributions() -> None:
    torch.manual_seed(0)
    model = TransformerXL(small_config(vocab_size=4000, d_model=64, d_embed=32, d_inner=256, d_head=32))
    weights = model.parameters_by_name()
    assert weights["embedding.weights.0"].std().item() == pytest.approx(0.02, rel=0.02)
    assert weights["embedding.projections.0"].std().item() == pytest.approx(0.01, rel=0.1)
    assert weights["layers.0.attention.qkv.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    assert weights["layers.0.attention_norm.weight"].mean().item() == pytest.approx(1.0, abs=0.01)
    assert weights["content_bias"].std().item() > 0
    assert not weights["head.biases.0"].any()
    assert not weights["layers.1.feed_forward.inner.bias"].any()


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
