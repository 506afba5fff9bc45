"""How much arithmetic training takes, and how much of it a device can do: the two sides of model-FLOPs utilisation.

Counted are the multiplications and additions of matrix products (2 for each pair), as is usual (Chowdhery et al. 2022, appendix B),
backward taken as twice forward. Keys and values of the memory are counted as projected once a segment, for in training the weights
that project them have changed since. The peak is measured, not quoted: what this device reaches on a large matrix product.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from txl_train.config import ModelConfig


def forward_flops_per_token(config: ModelConfig, tgt_len: int, batch_size: int, cluster_shares: Sequence[float]) -> float:
    """Return the floating-point operations of the forward pass per target token, with the memory full.

    Args:
        config: with the vocabulary's size and the cutoffs filled in.
        tgt_len: targets per stream and segment.
        batch_size: streams that share the projection of the distances.
        cluster_shares: for each tail cluster, the share of the targets that lie in it.
    """
    width, d = config.n_head * config.d_head, config.d_model
    queries = (tgt_len + config.ext_len) / tgt_len  # per target; context read again is computed again
    keys = config.mem_len + config.ext_len + tgt_len
    projections = queries * (3 * d * width + width * d) + config.mem_len / tgt_len * 2 * d * width
    position = 0.0
    if config.attn_type in ("relative", "shaw"):
        position = queries * keys * width
    if config.attn_type == "relative":
        position += keys * d * width / (tgt_len * batch_size)
    attention = projections + 2 * queries * keys * width + position
    layer = attention + queries * 2 * d * config.d_inner
    widths, ends = config.cluster_widths, config.cluster_ends
    projected = config.div_val > 1 or config.embed_size != d
    head: float = (ends[1] + config.n_cluster) * widths[0] + (d * widths[0] if projected else 0)
    for share, w, low, high in zip(cluster_shares, widths[1:], ends[1:], ends[2:]):
        head += share * ((high - low) * w + (d * w if projected else 0))
    embedding = (d * sum(widths if config.div_val > 1 else widths[:1])) if projected else 0
    return 2 * (config.n_layer * layer + head + queries * embedding)


def training_flops_per_token(forward: float) -> float:
    """Return the operations of forward and backward pass together."""
    return 3 * forward


def measured_peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Return the operations per second that `device` reaches on a square matrix product of `dtype`: the best of a few, some 0.2 s."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.ones(n, n, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(6):
        _wait(device)
        start = time.perf_counter()
        torch.mm(a, b)
        _wait(device)
        best = min(best, time.perf_counter() - start)
    if device.type == "cuda":  # what this took is no part of training
        del a, b
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return 2.0 * n**3 / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
