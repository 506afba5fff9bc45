"""Linear layers in int8 on a CPU: weights rounded once, one scale for each output, and inputs in each call, by one scale for all.

Products of whole numbers are summed in int32, by oneDNN. All that is no linear layer stays float32, and so do the states: products of
attention and of positions, normalisations, softmax, log-sum-exp, embeddings that are looked up. `export.quantize` makes the same of a
graph, with the same weights; there, inputs are rounded to the nearest of as many numbers.

Of a weight, a quarter of the bytes is read. Where a step of few tokens does nothing but wait for its weights, that is what counts.
"""

# Shape suffixes: N tokens, I inputs of a layer, O outputs, D d_model, W width of a cluster's embeddings, V words of a cluster

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor, nn

from txl_train.errors import EnvironmentUnfitError, ValidationError
from txl_train.model.packed import PackedLogSoftmax

LARGEST = 127
"""Weights are rounded to whole numbers up to this. -128 is left out, so that positive and negative ones are rounded alike."""


def rounded_weight(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """Return int8 [O, I] and float32 scales [O] whose product is `weight_OI` to within half a scale.

    Raises:
        ValueError: it holds numbers that are not finite.
    """
    largest_O = weight_OI.detach().float().abs().amax(dim=1)
    if not bool(torch.isfinite(largest_O).all()):
        raise ValueError("it holds numbers that are not finite")
    scale_O = largest_O / LARGEST
    scale_O[scale_O < torch.finfo(torch.float32).tiny] = 1.0  # nothing but zeros, or as good as that
    whole_OI = (weight_OI.detach().float() / scale_O[:, None]).round_().clamp_(-LARGEST, LARGEST)
    return whole_OI.to(torch.int8), scale_O


def require_int8() -> None:
    """Raise `EnvironmentUnfitError` where this PyTorch has no products of int8 by oneDNN."""
    has_onednn: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if not has_onednn or not all(hasattr(torch.ops.onednn, name) for name in ("qlinear_prepack", "qlinear_pointwise")):
        raise EnvironmentUnfitError(
            "This PyTorch has no products of int8 (it was built without oneDNN).",
            remedy="Use `txl export --format onnx --dtype int8`, or `--dtype fp32`.",
        )


@functools.cache
def largest_input() -> int:
    """Return the largest whole number that inputs are rounded to: 255, or 127 on a CPU that does not sum the largest products exactly.

    Without VNNI, products are added in pairs in 16 bits, which saturate: 2 x 255 x 127 is twice what they hold. So it is tried here.
    """
    x, weight = torch.full((1, 4), 255, dtype=torch.uint8), torch.full((16, 4), LARGEST, dtype=torch.int8)
    packed, scale_O, zero_point_O = torch.ops.onednn.qlinear_prepack(weight, None), torch.ones(16), torch.zeros(16, dtype=torch.int32)
    found: Tensor = torch.ops.onednn.qlinear_pointwise(
        x, 1.0, 0, packed, scale_O, zero_point_O, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return 255 if bool((found == 4 * 255 * LARGEST).all()) else 127


class Int8Linear(nn.Module):
    """A linear layer whose weight is int8.

    Args:
        weight_OI: float32, of the layer that this is the twin of.
        bias_O: shared with that; None if it has none.
        relu: apply a ReLU to the result within the product.

    Raises:
        ValidationError: the weight holds numbers that are not finite.
    """

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None, *, relu: bool = False) -> None:
        super().__init__()
        try:
            whole_OI, self.scale_O = rounded_weight(weight_OI)
        except ValueError as error:
            raise ValidationError(f"A weight cannot be int8: {error}.", remedy="Use `--dtype fp32`.") from error
        self.bias = bias_O
        self._zero_point_O = torch.zeros(whole_OI.shape[0], dtype=torch.int32)  # of weights, which need none
        self.packed: Tensor = torch.ops.onednn.qlinear_prepack(whole_OI, None)
        """The whole numbers, int8, as only oneDNN can read them."""
        self._then = "relu" if relu else "none"

    @property
    def weight(self) -> Tensor:
        """The scales: who has an input for a layer asks its weight which type that must have."""
        return self.scale_O

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O]; what is not finite makes the whole result NaN, as all of it shares one scale."""
        out_shape = (*x.shape[:-1], self.scale_O.shape[0])
        if x.numel() == 0:
            return x.new_zeros(out_shape)
        lowest, highest = (float(value) for value in torch.aminmax(x))
        if not math.isfinite(highest - lowest):
            return x.new_full(out_shape, math.nan)
        lowest, highest = min(lowest, 0.0), max(highest, 0.0)  # 0 is a whole number too, as ReLU leaves many
        scale = (highest - lowest) / largest_input() or 1.0
        zero_point = math.floor(-lowest / scale)
        # half a step more, and what is cut off rounds to the nearest; no result is below -1/2 or above 255 + 1/2
        whole_NI = torch.add(x.new_full((), zero_point + 0.5), x, alpha=1.0 / scale).to(torch.uint8).reshape(-1, x.shape[-1])
        out_NO: Tensor = torch.ops.onednn.qlinear_pointwise(
            whole_NI, scale, zero_point, self.packed, self.scale_O, self._zero_point_O, self.bias, 1.0, 0, x.dtype, self._then, [], ""
        )
        return out_NO.view(out_shape)


def in_int8(linear: nn.Linear, *, relu: bool = False) -> Int8Linear:
    """Return the twin of a linear layer: what `packed.in_packs` takes for packing."""
    return Int8Linear(linear.weight, linear.bias, relu=relu)


class Int8LogSoftmax(PackedLogSoftmax):
    """`AdaptiveLogSoftmax` with the tables of the shortlist and of all tails in int8, beside the float32 ones that embeddings look up."""

    def pack(self) -> None:
        """Round the tables."""
        self.tables_int8 = nn.ModuleList(Int8Linear(weight_VW, bias_V) for weight_VW, bias_V in zip(*self.tables(), strict=True))

    def scores(self, hidden_ND: Tensor, cluster: int, weight_VW: Tensor, bias_V: Tensor) -> Tensor:
        """Return the logits [N, V_cluster] within a cluster."""
        scores_NV: Tensor = self.tables_int8[cluster](self.project(hidden_ND, cluster))
        return scores_NV


def int8_weights(step: nn.Module) -> list[Tensor]:
    """Return all weights of a step that are int8, as oneDNN keeps them."""
    return [layer.packed for layer in step.modules() if isinstance(layer, Int8Linear)]
