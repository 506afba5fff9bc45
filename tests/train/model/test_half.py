"""A float16 copy of a model: what is rounded, what is not, and what is refused."""

from __future__ import annotations

import pytest
import torch

from tests.support import build_model, small_config
from txl_train.errors import ValidationError
from txl_train.model.half import in_half, stays_float32


def test_matrices_are_rounded_and_normalisations_are_not() -> None:
    model = build_model(small_config(cutoffs=(5, 9), div_val=2))
    twin = in_half(model)
    exact = dict(model.named_parameters())
    for name, weight in twin.named_parameters():
        assert weight.dtype == (torch.float32 if stays_float32(name) else torch.float16), name
        assert torch.equal(weight, exact[name].to(weight.dtype)), name
    assert {name.rsplit(".", 2)[-2] for name in exact if stays_float32(name)} == {"attention_norm", "feed_forward_norm"}


def test_the_model_itself_is_left_as_it_is() -> None:
    model = build_model(small_config())
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    twin = in_half(model)
    with torch.no_grad():
        for weight in twin.parameters():
            weight.zero_()
    for name, weight in model.named_parameters():
        assert weight.dtype == torch.float32
        assert torch.equal(weight, before[name])


def test_tied_weights_stay_tied() -> None:
    twin = in_half(build_model(small_config(cutoffs=(5, 9), div_val=2)))
    assert twin.head.weights[1] is twin.embedding.weights[1]
    assert twin.head.projections[1] is twin.embedding.projections[1]
    assert twin.layers[0].attention.content_bias is twin.layers[1].attention.content_bias


@pytest.mark.parametrize("value", [65520.0, -1e5, float("inf"), float("nan")])
def test_a_weight_that_float16_cannot_hold_is_named(value: float) -> None:
    model = build_model(small_config())
    with torch.no_grad():
        model.layers[1].feed_forward.inner.weight[0, 0] = value
    with pytest.raises(ValidationError, match=r"layers\.1\.feed_forward\.inner\.weight") as caught:
        in_half(model)
    assert "--dtype fp32" in (caught.value.remedy or "")


def test_a_normalisation_s_weight_may_be_larger() -> None:
    model = build_model(small_config())
    with torch.no_grad():
        model.layers[0].attention_norm.weight[0] = 1e6
    assert in_half(model).layers[0].attention_norm.weight[0] == 1e6
