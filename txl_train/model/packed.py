"""A model's matrices in the order in which this CPU multiplies fastest, for inference in float32.

A matrix product first brings its matrix into blocks that suit the processor, at every call. Here oneDNN does that once, as
`torch.compile` has it do for frozen weights; on the base model's 64 rows the product is then up to twice as fast, and on processors for
which PyTorch's own library (MKL) is not made, more. The numbers are the same but for rounding.
"""

# Shape suffixes: N tokens, D d_model, V words of the shortlist

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from txl_train.config import MemoryKind, ModelConfig
from txl_train.model.adaptive import AdaptiveEmbedding, AdaptiveLogSoftmax
from txl_train.model.inference import FixedStep
from txl_train.model.relative import RelativeAttention, nearer
from txl_train.model.transformer_xl import FeedForward, TransformerXL

SCORES_AT_ONCE = 1_500_000
"""Attention takes as many streams at a time as have so many scores: 6 MB stay in a CPU's caches from the product to the softmax. With
the base model, 16 streams at once take 1.3 times as long."""


SUMMED_AT_ONCE = 300_000
"""A normaliser is summed over as many rows at a time as have so many scores: 1 MB, read three times and written once, stays in a cache."""


def can_pack() -> bool:
    """Return whether this PyTorch has oneDNN and these two operators of it."""
    names = ("_reorder_linear_weight", "_linear_pointwise")
    has_onednn: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return has_onednn and all(hasattr(torch.ops.mkldnn, name) for name in names)


class PackedLinear(nn.Module):
    """`nn.Linear` in float32 on a CPU, without gradient; `linear` is its plain twin.

    Args:
        linear: whose weight is packed; the bias is shared.
        relu: apply a ReLU to the result within the product.
    """

    def __init__(self, linear: nn.Linear, *, relu: bool = False) -> None:
        super().__init__()
        self.weight = pack_weight(linear.weight)
        self.bias = linear.bias
        self._then = "relu" if relu else "none"

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return _product(x, self.weight, self.bias, self._then)


class PackedFeedForward(nn.Module):
    """`FeedForward` with packed matrices and the ReLU within the first product."""

    def __init__(self, plain: FeedForward) -> None:
        super().__init__()
        self.inner = PackedLinear(plain.inner, relu=True)
        self.outer = PackedLinear(plain.outer)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        out_BTD: Tensor = self.outer(self.inner(x_BTD))
        return out_BTD


class PackedLogSoftmax(AdaptiveLogSoftmax):
    """`AdaptiveLogSoftmax` with the shortlist's matrix packed, sharing all weights with `plain`.

    The tails' are read as they are, by the same product: few tokens meet them, and packed ones would be a second copy of the largest
    weights there are.
    """

    def __init__(self, plain: AdaptiveLogSoftmax) -> None:
        nn.Module.__init__(self)
        self.__dict__.update({name: copy.copy(value) for name, value in plain.__dict__.items()})
        self.pack()

    def pack(self) -> None:
        """Make of the tables what `scores` reads."""
        self._shortlist = pack_weight(self.tables()[0][0])

    def cut(self, config: ModelConfig, embedding: AdaptiveEmbedding | None) -> PackedLogSoftmax:
        """Return this: a step needs no other tables than the packed ones, and so those of all lengths share them."""
        return self

    def scores(self, hidden_ND: Tensor, cluster: int, weight_VW: Tensor, bias_V: Tensor) -> Tensor:
        """Return the logits [N, V_cluster] within a cluster."""
        projected_NW = self.project(hidden_ND, cluster)
        if projected_NW.shape[0] == 0:
            return super().scores(hidden_ND, cluster, weight_VW, bias_V)
        return _product(projected_NW, self._shortlist if cluster == 0 else weight_VW, bias_V, "none")

    def normaliser(self, scores_NV: Tensor, more_NC: Tensor | None) -> Tensor:
        """Return `log_sum_exp`, a few rows at a time, in the place of the scores."""
        some = max(1, SUMMED_AT_ONCE // scores_NV.shape[1])
        parts = [torch.empty(0)]
        more_parts = itertools.repeat(None) if more_NC is None else torch.split(more_NC, some)
        for part_NV, more in zip(torch.split(scores_NV, some), more_parts):
            largest_N1 = part_NV.amax(dim=1, keepdim=True)
            if more is not None:
                largest_N1 = torch.maximum(largest_N1, more.amax(dim=1, keepdim=True))
            total_N = part_NV.sub_(largest_N1).exp_().sum(dim=1)
            if more is not None:
                total_N += (more - largest_N1).exp_().sum(dim=1)
            parts.append(total_N.log_() + largest_N1.squeeze(1))
        return torch.cat(parts)


class Packing(NamedTuple):
    """What the parts of a model become: linear layers, feed-forward layers and the softmax."""

    linear: Callable[[nn.Linear], nn.Module]
    feed_forward: Callable[[FeedForward], nn.Module]
    head: Callable[[AdaptiveLogSoftmax], AdaptiveLogSoftmax]


PACKED = Packing(PackedLinear, PackedFeedForward, PackedLogSoftmax)
"""The same numbers, packed by oneDNN. What computes in int8 is `int8.INT8`."""


def pack_step(step: FixedStep) -> None:
    """Leave out what a step of a packed model has and needs not: distances that are encoded alike."""
    for i, layer in enumerate(step.decoder.layers):
        if isinstance(layer.attention, RelativeAttention):
            term = nearer(step.position_terms[i], step.config.clamp_len, step.ext_len + step.tgt_len)
            step.position_terms[i] = nn.Parameter(term, requires_grad=False)


def pack_weight(weight: Tensor) -> Tensor:
    """Return a weight [out, in] as oneDNN wants it: a tensor that only its operators can read."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())
    return packed


def _product(x: Tensor, packed: Tensor, bias: Tensor | None, then: str) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, then, [], "")
    return out


def in_packs(model: TransformerXL, memory: MemoryKind, packing: Packing = PACKED) -> TransformerXL:
    """Return a copy of a float32 model on a CPU with the matrices of its layers and softmax packed, for inference alone.

    All other weights are shared. With a memory of hidden states the projections to keys and values stay as they are, since memory and
    input need parts of them. A model that was packed is returned as it is.

    Raises:
        ValueError: the model was packed in another way.
    """
    if isinstance(model.head, PackedLogSoftmax):
        if type(model.head) is not packing.head:
            raise ValueError(f"This model has {type(model.head).__name__} already.")
        return model
    shared: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters()}
    twin = copy.deepcopy(model, memo=shared)
    for layer in twin.decoder_layers():
        attention, feed_forward = layer.attention, layer.feed_forward
        if memory == "kv":
            attention.register_module("qkv", packing.linear(attention.qkv))
        attention.register_module("output", packing.linear(attention.output))
        attention.scores_at_once = SCORES_AT_ONCE
        layer.register_module("feed_forward", packing.feed_forward(feed_forward))
    twin.head = packing.head(twin.head)
    return twin
