"""A model in float16: which weights are, and which stay float32.

Matrices, embeddings and biases of products become float16. The normalisations keep float32 weights, and with them what runs from layer to
layer; softmax, log-sum-exp and nll are float32 in any case (`attention.py`, `adaptive.py`). So no sum of many terms and no residual is
ever float16, and float16 enters as the type of operands and results of matrix products alone.
"""

from __future__ import annotations

import copy

import torch

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
    twin = copy.deepcopy(model)
    for name, parameter in twin.named_parameters():
        parameter.requires_grad_(False)
        if stays_float32(name):
            continue
        largest = float(parameter.detach().abs().max()) if parameter.numel() else 0.0
        if not largest <= LARGEST:
            raise ValidationError(
                f"The weight `{name}` has a value of magnitude {largest:.4g}, but float16 ends at {LARGEST:.0f}.",
                remedy="Use fp32 for this checkpoint: `--dtype fp32`.",
            )
        parameter.data = parameter.data.half()
    return twin
