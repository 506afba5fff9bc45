"""Linear layers in int8 on a CPU: weights rounded once, by one scale for each output, and inputs in each call, by one for each token.

Products of whole numbers are summed in int32, by oneDNN. Everything else stays float32, and so do the states: products of attention and of
positions, normalisations, softmax, log-sum-exp, embeddings with their projections and those before the softmax. `export.quantize` makes
nearly the same of a graph, from the same weights; ONNX Runtime rounds inputs by one scale for all tokens of a step, though. Here no token
takes part in the rounding of another, so what stands beside a stream does not change it, and errors are smaller by a quarter.

Of a weight, a quarter of the bytes is read. Where a step of few tokens does nothing but wait for its weights, that is what counts.
"""

# Shape suffixes: N tokens, I inputs of a layer, O outputs, T tokens of a segment, D d_model, W width of a cluster's embeddings, V its words

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from txl_train.errors import EnvironmentUnfitError, ValidationError
from txl_train.model.packed import PackedLogSoftmax, Packing
from txl_train.model.transformer_xl import FeedForward

LARGEST = 127
"""Weights are rounded to whole numbers up to this. -128 is left out, so that positive and negative ones are rounded alike."""

SMALLEST_SCALE = 1e-37
"""Its reciprocal is a number in float32 too. Inputs that are smaller than it become 0."""


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
    """Raise `EnvironmentUnfitError` where this PyTorch, or this processor, has no products of int8 by oneDNN."""
    has_onednn: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    reason = "it was built without oneDNN"
    if has_onednn:
        try:
            sums_exactly()
            return
        except (AttributeError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
    raise EnvironmentUnfitError(
        f"This PyTorch has no products of int8 on this machine: {reason}.",
        remedy="Use `txl export --format onnx --dtype int8`, or `--dtype fp32`.",
    )


@functools.cache
def sums_exactly() -> bool:
    """Return whether products of the largest numbers, 255 x 127, are summed exactly here, for one token and for many.

    Processors without VNNI add them in pairs in 16 bits, which hold no more than half of such a pair; of 127 x 127 they do.
    """
    weight_OI = torch.full((64, 512), LARGEST, dtype=torch.int8)
    packed = torch.ops.onednn.qlinear_prepack(weight_OI, None)
    inputs = [torch.full((n_token, 512), 255, dtype=torch.uint8) for n_token in (1, 64)]
    return all(bool((_whole_product(x_NI, 0, packed, torch.ones(64)) == 512 * 255 * LARGEST).all()) for x_NI in inputs)


class Int8Linear(nn.Module):
    """A linear layer whose weight is int8.

    Args:
        weight_OI: float32, of the layer that this is the twin of.
        bias_O: shared with that; None if it has none.
        relu: apply a ReLU to the result.
        after_relu: inputs are never negative, so that they may have twice as many steps.

    Raises:
        ValidationError: the weight holds numbers that are not finite.
    """

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None, *, relu: bool = False, after_relu: bool = False) -> None:
        super().__init__()
        try:
            whole_OI, self.scale_O = rounded_weight(weight_OI)
        except ValueError as error:
            raise ValidationError(
                f"A weight of shape {list(weight_OI.shape)} cannot be int8: {error}.", remedy="Use `--dtype fp32`."
            ) from error
        self.bias = bias_O
        self.packed: Tensor = torch.ops.onednn.qlinear_prepack(whole_OI, None)
        """The whole numbers, int8, as only oneDNN can read them."""
        self._relu, self._after_relu = relu, after_relu
        self._is_exact = sums_exactly()
        steps = 255 if self._is_exact else 127
        self._zero_point = 0 if after_relu else (steps + 1) // 2
        self._per_step = 1.0 / (steps if after_relu else steps // 2)
        # what is taken for a signed number of 8 bits and has its first bit turned over is an unsigned one, 128 larger
        self._shift = float(self._zero_point - 128 if self._is_exact else self._zero_point)

    @property
    def weight(self) -> Tensor:
        """The scales: who has an input for a layer asks its weight which type that must have."""
        return self.scale_O

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O]. Of a token that is not finite, no result is."""
        largest = x.amax(dim=-1, keepdim=True)
        if not self._after_relu:
            largest = torch.maximum(largest, x.amin(dim=-1, keepdim=True).neg_())
        scale = largest.mul_(self._per_step).clamp_(min=SMALLEST_SCALE)
        steps = x * scale.reciprocal()
        if self._shift:
            steps += self._shift
        whole = steps.round_().to(torch.int8)
        if self._is_exact:
            whole.bitwise_xor_(-128)
        whole_NI = whole.view(torch.uint8).reshape(-1, x.shape[-1])
        out = _whole_product(whole_NI, self._zero_point, self.packed, self.scale_O).view(*x.shape[:-1], self.scale_O.shape[0])
        out = out.mul_(scale) if self.bias is None else torch.addcmul(self.bias, out, scale, out=out)
        return out.relu_() if self._relu else out


def in_int8(linear: nn.Linear) -> Int8Linear:
    """Return the twin of a linear layer."""
    return Int8Linear(linear.weight, linear.bias)


class Int8FeedForward(nn.Module):
    """`FeedForward` in int8."""

    def __init__(self, plain: FeedForward) -> None:
        super().__init__()
        self.inner = Int8Linear(plain.inner.weight, plain.inner.bias, relu=True)
        self.outer = Int8Linear(plain.outer.weight, plain.outer.bias, after_relu=True)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        out_BTD: Tensor = self.outer(self.inner(x_BTD))
        return out_BTD


class Int8LogSoftmax(PackedLogSoftmax):
    """`AdaptiveLogSoftmax` with the tables of the shortlist and of all tails in int8, beside the float32 ones that embeddings look up."""

    def pack(self) -> None:
        """Round the tables."""
        self.tables_int8 = nn.ModuleList(Int8Linear(weight_VW, bias_V) for weight_VW, bias_V in zip(*self.tables(), strict=True))

    def scores(self, hidden_ND: Tensor, cluster: int, weight_VW: Tensor, bias_V: Tensor) -> Tensor:
        """Return the logits [N, V_cluster] within a cluster."""
        scores_NV: Tensor = self.tables_int8[cluster](self.project(hidden_ND, cluster))
        return scores_NV


INT8 = Packing(in_int8, Int8FeedForward, Int8LogSoftmax)
"""What `packed.in_packs` makes of a model."""


def int8_weights(step: nn.Module) -> list[Tensor]:
    """Return all weights of a step that are int8, as oneDNN keeps them."""
    return [layer.packed for layer in step.modules() if isinstance(layer, Int8Linear)]


def _whole_product(x_NI: Tensor, zero_point: int, packed: Tensor, scale_O: Tensor) -> Tensor:
    """Return (x - zero_point) times the weight, float32 [N, O]; what each token's inputs are scaled by is left to the caller."""
    if x_NI.numel() == 0:
        return torch.zeros(x_NI.shape[0], scale_O.shape[0])
    zero_point_O = torch.zeros(1, dtype=torch.int32)  # of the weights, which need none
    out_NO: Tensor = torch.ops.onednn.qlinear_pointwise(
        x_NI, 1.0, zero_point, packed, scale_O, zero_point_O, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return out_NO
