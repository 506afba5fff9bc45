"""What freshly drawn weights look like: each option of the initialisation, and what it leaves alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support import small_config
from txl_train.model.transformer_xl import TransformerXL


def drawn(**changes: Any) -> dict[str, Tensor]:
    """Draw a model with every kind of weight that is not of an attention of its own."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 4000, "d_model": 64, "d_embed": 32, "d_inner": 256, "d_head": 32}
    return TransformerXL(small_config(**{**sizes, "tie_weights": False, "cutoffs": (500,), "mem_len": 7, **changes})).parameters_by_name()


def is_normal(values: Tensor, std: float, mean: float = 0.0) -> bool:
    """Say whether mean, deviation and, of many, the largest value are those of a normal distribution."""
    error = 4 * std / math.sqrt(values.numel())
    within = abs(values.mean().item() - mean) < error and abs(values.std().item() - std) < error
    uniform_ends_at = math.sqrt(3) * std
    return within and (values.numel() < 500 or bool((values - mean).abs().max() > 1.2 * uniform_ends_at))


def is_uniform(values: Tensor, half_width: float) -> bool:
    within = bool(values.abs().max() <= half_width) and bool(values.abs().max() > 0.95 * half_width)
    return within and abs(values.std().item() - half_width / math.sqrt(3)) < 0.05 * half_width


def test_weights_are_normal_as_the_reference_s_are() -> None:
    weights = drawn()
    for name, values in weights.items():
        if "_norm.weight" in name:
            assert is_normal(values, 0.02, mean=1.0), name
        elif "projections" in name:
            assert is_normal(values, 0.01), name
        elif name.endswith((".bias", "cluster_bias")) or "biases." in name:
            assert not values.any(), name
        else:
            assert is_normal(values, 0.02), name


def test_init_std_widens_all_but_the_projections_and_proj_init_std_these() -> None:
    weights = drawn(init_std=0.1, proj_init_std=0.3)
    assert is_normal(weights["layers.0.attention.qkv.weight"], 0.1)
    assert is_normal(weights["embedding.weights.0"], 0.1)
    assert is_normal(weights["layers.1.attention_norm.weight"], 0.1, mean=1.0)
    assert is_normal(weights["embedding.projections.0"], 0.3)
    assert is_normal(weights["head.projections.0"], 0.3)


def test_uniform_weights_lie_within_init_range_while_projections_and_norms_stay_normal() -> None:
    weights = drawn(init="uniform", init_range=0.25)
    for name in ("layers.0.attention.qkv.weight", "layers.1.feed_forward.inner.weight", "embedding.weights.0", "head.weights.0"):
        assert is_uniform(weights[name], 0.25), name
    assert is_normal(weights["embedding.projections.0"], 0.01)
    assert is_normal(weights["layers.0.feed_forward_norm.weight"], 0.02, mean=1.0)
    assert not weights["layers.0.feed_forward.inner.bias"].any()


def test_embeddings_have_a_distribution_of_their_own_if_asked_for() -> None:
    weights = drawn(emb_init="uniform", emb_init_range=0.4)
    assert is_uniform(weights["embedding.weights.0"], 0.4)
    assert is_normal(weights["head.weights.0"], 0.02)
    assert is_normal(weights["layers.0.attention.qkv.weight"], 0.02)
    weights = drawn(init="uniform", emb_init="normal", init_std=0.05)
    assert is_normal(weights["embedding.weights.0"], 0.05)
    assert is_uniform(weights["head.weights.0"], 0.1)


def test_emb_init_range_alone_changes_nothing() -> None:
    assert torch.equal(drawn(emb_init_range=0.4)["embedding.weights.0"], drawn()["embedding.weights.0"])


def test_a_tied_output_matrix_is_drawn_as_the_embeddings() -> None:
    torch.manual_seed(0)
    model = TransformerXL(small_config(vocab_size=4000, emb_init="uniform", emb_init_range=0.4))
    assert is_uniform(model.head.weights[0].detach(), 0.4)


@pytest.mark.parametrize("init", ["normal", "uniform"])
@pytest.mark.parametrize(("kind", "learned"), [("shaw", "distance_keys"), ("learned", "position_embedding")])
def test_learned_positions_are_drawn_as_other_weights_and_their_biases_are_zero(kind: str, learned: str, init: str) -> None:
    weights = drawn(attn_type=kind, position_rows=100, init=init)
    for layer in range(2):
        values = weights[f"layers.{layer}.attention.{learned}"]
        assert is_normal(values, 0.02) if init == "normal" else is_uniform(values, 0.1)
    if kind == "shaw":
        assert not weights["layers.0.attention.distance_bias"].any()
        assert weights["layers.0.attention.content_bias"].any()
