"""LAMB on a GPU in three launches, whatever the number of tensors: each number is read and written as seldom as the algorithm allows.

`Lamb` says what is computed, and `Lamb._step_one` is the plain twin. Imports triton.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 1 << 15
"""Numbers of a tensor that one program computes."""
_BLOCK = 2048


@triton.jit
def _update_of(weight, mean, square, eps, weight_decay, correction1, correction2):  # type: ignore[no-untyped-def]
    return (mean / correction1) / (tl.sqrt(square / correction2) + eps) + weight_decay * weight


@triton.jit  # type: ignore[untyped-decorator]
def _moments(  # type: ignore[no-untyped-def]
    pointers,
    chunks,
    weight_squares,
    update_squares,
    beta1,
    beta2,
    eps,
    weight_decay,
    correction1,
    correction2,
    BLOCK: tl.constexpr,
):
    chunk = tl.program_id(0)
    tensor, first, count = tl.load(chunks + 3 * chunk), tl.load(chunks + 3 * chunk + 1), tl.load(chunks + 3 * chunk + 2)
    weights = tl.load(pointers + 4 * tensor).to(tl.pointer_type(tl.float32)) + first
    gradients = tl.load(pointers + 4 * tensor + 1).to(tl.pointer_type(tl.float32)) + first
    means = tl.load(pointers + 4 * tensor + 2).to(tl.pointer_type(tl.float32)) + first
    squares = tl.load(pointers + 4 * tensor + 3).to(tl.pointer_type(tl.float32)) + first
    of_weight, of_update = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for k in range(0, count, BLOCK):
        n = k + tl.arange(0, BLOCK)
        inside = n < count
        weight, gradient = tl.load(weights + n, mask=inside, other=0.0), tl.load(gradients + n, mask=inside, other=0.0)
        mean = tl.load(means + n, mask=inside, other=0.0) * beta1 + gradient * (1 - beta1)
        square = tl.load(squares + n, mask=inside, other=0.0) * beta2 + gradient * gradient * (1 - beta2)
        tl.store(means + n, mean, mask=inside)
        tl.store(squares + n, square, mask=inside)
        update = tl.where(inside, _update_of(weight, mean, square, eps, weight_decay, correction1, correction2), 0.0)
        of_weight += weight * weight
        of_update += update * update
    tl.store(weight_squares + chunk, tl.sum(of_weight, axis=0))
    tl.store(update_squares + chunk, tl.sum(of_update, axis=0))


@triton.jit  # type: ignore[untyped-decorator]
def _norms(first_chunks, weight_squares, update_squares, weight_norms, update_norms, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    tensor = tl.program_id(0)
    first, last = tl.load(first_chunks + tensor), tl.load(first_chunks + tensor + 1)
    of_weight, of_update = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for k in range(first, last, BLOCK):
        n = k + tl.arange(0, BLOCK)
        of_weight += tl.load(weight_squares + n, mask=n < last, other=0.0)
        of_update += tl.load(update_squares + n, mask=n < last, other=0.0)
    tl.store(weight_norms + tensor, tl.sqrt(tl.sum(of_weight, axis=0)))
    tl.store(update_norms + tensor, tl.sqrt(tl.sum(of_update, axis=0)))


@triton.jit  # type: ignore[untyped-decorator]
def _move(pointers, chunks, factors, eps, weight_decay, correction1, correction2, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    chunk = tl.program_id(0)
    tensor, first, count = tl.load(chunks + 3 * chunk), tl.load(chunks + 3 * chunk + 1), tl.load(chunks + 3 * chunk + 2)
    weights = tl.load(pointers + 4 * tensor).to(tl.pointer_type(tl.float32)) + first
    means = tl.load(pointers + 4 * tensor + 2).to(tl.pointer_type(tl.float32)) + first
    squares = tl.load(pointers + 4 * tensor + 3).to(tl.pointer_type(tl.float32)) + first
    factor = tl.load(factors + tensor)
    for k in range(0, count, BLOCK):
        n = k + tl.arange(0, BLOCK)
        inside = n < count
        weight = tl.load(weights + n, mask=inside, other=0.0)
        mean, square = tl.load(means + n, mask=inside, other=0.0), tl.load(squares + n, mask=inside, other=1.0)
        update = _update_of(weight, mean, square, eps, weight_decay, correction1, correction2)
        tl.store(weights + n, weight - factor * update, mask=inside)


def can_step(weights: list[Tensor]) -> bool:
    """Return whether all tensors and their gradients are contiguous and float32."""
    return all(
        tensor is not None and tensor.dtype == torch.float32 and tensor.is_contiguous()
        for weight in weights
        for tensor in (weight, weight.grad)
    )


def step(
    weights: list[Tensor],
    means: list[Tensor],
    squares: list[Tensor],
    group: dict[str, Any],
    corrections: tuple[float, float],
    factors_of: Callable[[Tensor, Tensor], Tensor],
) -> None:
    """Move all weights and their moments, in place.

    Args:
        weights: with gradients; `can_step` holds.
        group: `betas`, `eps`, `weight_decay`.
        corrections: what the moments are divided by.
        factors_of: from the norms of weights and updates, [tensors] each, how far along its update each tensor moves.
    """
    device = weights[0].device
    chunks, first_chunks = _cut(tuple(weight.numel() for weight in weights), device)
    addresses = [
        [weight.data_ptr(), weight.grad.data_ptr(), mean.data_ptr(), square.data_ptr()]  # type: ignore[union-attr]
        for weight, mean, square in zip(weights, means, squares, strict=True)
    ]
    table = torch.tensor(addresses, dtype=torch.int64)
    pointers = table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table
    sums = torch.empty(2, len(chunks), dtype=torch.float32, device=device)
    norms = torch.empty(2, len(weights), dtype=torch.float32, device=device)
    beta1, beta2 = group["betas"]
    settings = (group["eps"], group["weight_decay"], *corrections)
    _moments[(len(chunks),)](pointers, chunks, sums[0], sums[1], beta1, beta2, *settings, BLOCK=_BLOCK, num_warps=8)
    _norms[(len(weights),)](first_chunks, sums[0], sums[1], norms[0], norms[1], BLOCK=1024)
    factors = factors_of(norms[0], norms[1]).contiguous()
    _move[(len(chunks),)](pointers, chunks, factors, *settings, BLOCK=_BLOCK, num_warps=8)


@functools.lru_cache(maxsize=16)
def _cut(sizes: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return tensor, first number and count of each chunk, int64 [chunks, 3], and the first chunk of each tensor, one more at the end."""
    chunks = [(tensor, first, min(CHUNK, size - first)) for tensor, size in enumerate(sizes) for first in range(0, size, CHUNK)]
    counts = torch.tensor([0, *(-(-size // CHUNK) for size in sizes)])
    return torch.tensor(chunks, dtype=torch.int64, device=device), counts.cumsum(0).to(torch.int32).to(device)
