"""A model in float16: which weights are, and which stay float32.

Matrices, embeddings and biases of products become float16. The normalisations keep float32 weights, and with them what runs from layer to
layer; softmax, log-sum-exp and nll are float32 in any case (`attention.py`, `adaptive.py`). So no sum of many terms and no residual is
ever float16, and float16 enters as the type of operands and results of matrix products alone.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from txl_train.errors import ValidationError
from txl_train.model.transformer_xl import TransformerXL

LARGEST = float(torch.finfo(torch.float16).max)
"""65504; what is larger becomes infinite."""


def stays_float32(name: str) -> bool:
    """Return whether the weight of that name keeps float32 in a float16 model."""
    return "norm." in name


def in_half(model: TransformerXL) -> TransformerXL:
    """Return a copy of a model in evaluation mode with float16 weights; tied weights stay tied.

    Raises:
        ValidationError: a weight is larger than float16 can hold.
    """
    halved: dict[int, nn.Parameter] = {}  # what deepcopy is to take for each weight: so it never copies the float32 ones, which are large
    for name, parameter in model.named_parameters():
        weight = parameter.detach()
        if stays_float32(name):
            halved[id(parameter)] = nn.Parameter(weight.clone(), requires_grad=False)
            continue
        largest = max(abs(float(end)) for end in weight.aminmax()) if weight.numel() else 0.0
        if not largest <= LARGEST:
            raise ValidationError(
                f"The weight `{name}` has a value of magnitude {largest:.4g}, but float16 ends at {LARGEST:.0f}.",
                remedy="Use fp32 for this checkpoint: `--dtype fp32`.",
            )
        halved[id(parameter)] = nn.Parameter(weight.half(), requires_grad=False)
    return copy.deepcopy(model, memo=dict[int, object](halved))
