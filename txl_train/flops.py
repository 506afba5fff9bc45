"""How much arithmetic training and inference take, and how much of it a device can do.

Counted are the multiplications and additions of matrix products (2 for each pair), as is usual (Chowdhery et al. 2022, appendix B),
backward taken as twice forward. Keys that the mask hides are counted as computed, since they are. The peak is measured, not quoted: what
this device reaches on a large matrix product.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from txl_train.config import MemoryKind, ModelConfig

_REPEATS = 6


def inference_flops(config: ModelConfig, tgt_len: int, batch_size: int, memory: MemoryKind, cluster_counts: Sequence[float]) -> float:
    """Return the floating-point operations of one step as deployed (`model.inference.InferenceStep`).

    The terms of the positions depend on weights and lengths alone and are not computed in a step. A memory of keys and values is used as
    it is; one of hidden states is projected again. Where the head projects for both the shortlist and the clusters, once is counted.

    Args:
        config: with the vocabulary's size, the cutoffs and the lengths in force filled in.
        tgt_len: targets per stream and step.
        batch_size: streams.
        memory: what the memory holds.
        cluster_counts: for each tail cluster, the number of targets in it.
    """
    width, d = config.n_head * config.d_head, config.d_model
    n_queries = tgt_len + config.ext_len  # context read again is computed again
    n_keys = config.mem_len + n_queries
    projections = n_queries * (3 * d * width + width * d)
    if memory == "hidden":
        projections += config.mem_len * 2 * d * width
    scores = n_queries * n_keys * width
    if config.attn_type in ("relative", "shaw"):
        scores += n_queries * (n_keys + 1) * width  # one distance more, for the shift
    layer = projections + scores + n_queries * n_keys * width + n_queries * 2 * d * config.d_inner
    widths, ends = config.cluster_widths, config.cluster_ends
    projected = config.div_val > 1 or config.embed_size != d
    head: float = batch_size * tgt_len * ((ends[1] + config.n_cluster) * widths[0] + (d * widths[0] if projected else 0))
    for count, w, low, high in zip(cluster_counts, widths[1:], ends[1:], ends[2:]):
        head += count * ((high - low) * w + (d * w if projected else 0))
    embedding = (d * sum(widths if config.div_val > 1 else widths[:1])) if projected else 0
    return 2 * (batch_size * (config.n_layer * layer + n_queries * embedding) + head)


def forward_flops_per_token(config: ModelConfig, tgt_len: int, batch_size: int, cluster_shares: Sequence[float]) -> float:
    """Return the floating-point operations of training's forward pass per target token, with the memory full.

    In training the weights have changed since the last step: distances are projected anew, once for all streams, and so are the keys and
    values of the memory.

    Args:
        config: with the vocabulary's size and the cutoffs filled in.
        tgt_len: targets per stream and segment.
        batch_size: streams that share the projection of the distances.
        cluster_shares: for each tail cluster, the share of the targets that lie in it.
    """
    n_targets = batch_size * tgt_len
    flops = inference_flops(config, tgt_len, batch_size, "hidden", [share * n_targets for share in cluster_shares])
    if config.attn_type == "relative":
        n_distances = config.mem_len + config.ext_len + tgt_len + 1
        flops += 2 * config.n_layer * n_distances * config.d_model * config.n_head * config.d_head
    return flops / n_targets


def training_flops_per_token(forward: float) -> float:
    """Return the operations of forward and backward pass together."""
    return 3 * forward


def measured_peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Return the operations per second that `device` reaches on square matrix products of `dtype`, enlarged until they take long.

    Products of int8 are summed in int32; a CPU without instructions for them is a hundred times slower at it than at fp32.
    """
    multiply = torch._int_mm if dtype == torch.int8 else torch.mm
    n, largest, longest_s, best = (256, 8192, 0.5, 0.0) if device.type == "cuda" else (256, 2048, 0.05, 0.0)
    while True:
        a, b = (_random(n, device, dtype) for _ in range(2))
        seconds = fastest_s(device, lambda a=a, b=b: multiply(a, b))  # type: ignore[misc]
        best = max(best, 2.0 * n**3 / seconds)
        if n >= largest or 8 * seconds > longest_s:
            break
        n *= 2
    if device.type == "cuda":  # what this took is no part of what is measured next
        del a, b
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return best


def _random(n: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return a square matrix of random numbers: on equal ones a GPU is faster, as fewer of its wires change.

    They are of a generator of their own: a training run measures the peak, and must draw the same masks whether it does or not.
    """
    generator = torch.Generator(device).manual_seed(n)
    if dtype == torch.int8:
        return torch.randint(-128, 128, (n, n), generator=generator, device=device, dtype=dtype)
    return torch.randn(n, n, generator=generator, device=device).to(dtype)


def fastest_s(device: torch.device, work: Callable[[], object]) -> float:
    """Return the seconds of the fastest of a few calls, the device's work included; the first is not timed."""
    best = math.inf
    for repeat in range(_REPEATS + 1):
        _wait(device)
        start = time.perf_counter()
        work()
        _wait(device)
        if repeat:
            best = min(best, time.perf_counter() - start)
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
