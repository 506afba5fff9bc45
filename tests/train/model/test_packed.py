"""Packed matrices compute what plain ones do, for every kind of model, and leave the model they are packed from as it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support import MODEL_CONFIGS, build_model, random_ids, small_config
from txl_train.config import MemoryKind
from txl_train.model.adaptive import cluster_rows, log_sum_exp
from txl_train.model.inference import InferenceStep
from txl_train.model.memory import best_memory_kind
from txl_train.model.packed import PackedFeedForward, PackedLinear, PackedLogSoftmax, can_pack, in_packs, pack_step

pytestmark = pytest.mark.skipif(not can_pack(), reason="this PyTorch was built without oneDNN")


@pytest.mark.parametrize("shape", [(1, 8), (2, 5, 8), (0, 8)])
@pytest.mark.parametrize("relu", [False, True])
def test_a_packed_product_is_the_plain_one(shape: tuple[int, ...], relu: bool) -> None:
    plain, x = torch.nn.Linear(8, 13), torch.randn(shape)
    with torch.inference_mode():
        expected = torch.relu(plain(x)) if relu else plain(x)
        torch.testing.assert_close(PackedLinear(plain, relu=relu)(x), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("memory", ["best", "hidden"])
@pytest.mark.parametrize("changes", MODEL_CONFIGS.values(), ids=MODEL_CONFIGS.keys())
def test_a_packed_step_scores_as_the_plain_one(changes: dict[str, Any], memory: str) -> None:
    model = build_model(small_config(**changes)).eval()
    config = model.config
    kind: MemoryKind = best_memory_kind(config) if memory == "best" else "hidden"
    before = {name: weight.clone() for name, weight in model.parameters_by_name().items()}
    plain, packed = InferenceStep(model, 4, kind).eval(), InferenceStep(in_packs(model, kind), 4, kind).eval()
    pack_step(packed)
    ids_BN = torch.from_numpy(random_ids(config, 2, config.ext_len + 4 * 3 + 1))
    memories = [step.initial_memory(2) for step in (plain, packed)]
    for start in range(0, 12, 4):
        inputs, targets = ids_BN[:, start : start + config.ext_len + 4], ids_BN[:, start + config.ext_len + 1 :][:, :4].contiguous()
        rows = cluster_rows(targets.reshape(-1), list(config.cluster_ends))
        found = []
        for i, step in enumerate((plain, packed)):
            with torch.inference_mode():
                nll, length, states = step(inputs, targets, rows, memories[i].length_B, memories[i].states)
            memories[i] = memories[i]._replace(length_B=length, states=states)
            found.append(nll)
        torch.testing.assert_close(found[1], found[0], atol=2e-5, rtol=2e-5)
    assert before.keys() == model.parameters_by_name().keys()
    assert all(torch.equal(weight, before[name]) for name, weight in model.parameters_by_name().items())
    assert not any(isinstance(module, (PackedLinear, PackedFeedForward)) for module in model.modules())


def test_what_is_not_packed_is_shared_and_what_is_packed_is_not_packed_again() -> None:
    model = build_model(small_config(cutoffs=(5, 9))).eval()
    packed = in_packs(model, "kv")
    assert packed.embedding.weights[0] is model.embedding.weights[0]
    assert packed.layers[0].get_parameter("attention_norm.weight") is model.layers[0].get_parameter("attention_norm.weight")
    assert in_packs(packed, "kv") is packed


@pytest.mark.parametrize("scores_at_once", [1, 2 * 4 * 11 * 2, 10**9])
def test_streams_taken_some_at_a_time_are_scored_as_all_at_once(scores_at_once: int) -> None:
    model = build_model(small_config(cutoffs=(5, 9))).eval()
    step = InferenceStep(model, 4).eval()
    ids_BT = torch.from_numpy(random_ids(model.config, 5, 4))
    memory = step.initial_memory(5)
    arguments = (ids_BT, ids_BT, cluster_rows(ids_BT.reshape(-1), list(model.config.cluster_ends)), memory.length_B, memory.states)
    with torch.inference_mode():
        expected = step(*arguments)[0]
        for layer in model.decoder_layers():
            layer.attention.scores_at_once = scores_at_once
        torch.testing.assert_close(step(*arguments)[0], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("tgt_len", "ext_len", "clamp_len", "n_columns"),
    [(4, 0, 3, 4 + 3), (1, 0, 3, 1 + 3), (4, 2, 3, 6 + 3), (4, 0, 40, 12), (4, 0, None, 12)],
)
def test_distances_encoded_alike_are_multiplied_once_and_scores_stay(
    tgt_len: int, ext_len: int, clamp_len: int | None, n_columns: int
) -> None:
    model = build_model(small_config(mem_len=7, ext_len=ext_len, clamp_len=clamp_len)).eval()
    plain, packed = InferenceStep(model, tgt_len).eval(), InferenceStep(in_packs(model, "kv"), tgt_len).eval()
    pack_step(packed)
    assert packed.position_terms[0].shape[2] == n_columns
    ids = torch.from_numpy(random_ids(model.config, 2, ext_len + 6 * tgt_len))
    memories = [plain.initial_memory(2), packed.initial_memory(2)]
    for start in range(0, 5 * tgt_len, tgt_len):
        found = []
        for i, step in enumerate((plain, packed)):
            with torch.inference_mode():
                x, length, states = step.run_layers(ids[:, start : start + ext_len + tgt_len], memories[i].length_B, memories[i].states)
            memories[i] = memories[i]._replace(length_B=length, states=states)
            found.append(x)
        torch.testing.assert_close(found[1], found[0], atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("n_rows", [0, 1, 2, 7])
@pytest.mark.parametrize("has_more", [False, True])
def test_a_normaliser_in_parts_is_that_of_all(monkeypatch: pytest.MonkeyPatch, n_rows: int, has_more: bool) -> None:
    monkeypatch.setattr("txl_train.model.packed.SUMMED_AT_ONCE", 25)  # two rows at a time
    head = InferenceStep(build_model(small_config(cutoffs=(5, 9))), 4).head
    scores, more = 100 * torch.randn(n_rows, 11), 100 * torch.randn(n_rows, 2) if has_more else None
    with torch.inference_mode():
        expected = log_sum_exp(scores, more) if n_rows else torch.empty(0)
        torch.testing.assert_close(PackedLogSoftmax(head).normaliser(scores.clone(), more), expected)
