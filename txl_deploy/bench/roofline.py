"""How close a step comes to what the device can do: the roofline (Williams, Waterman & Patterson 2009).

A step has to multiply, and has to fetch weights and states from main memory. The longer of the two times, at rates that were measured on
this device, is the least it can take; the share of it in the median latency is what the row reports. Operations are counted by
`txl_train.flops`, bytes here: weights once, states read and written once, tokens and results. What lies between, such as the scores of
attention, may stay on the chip and is not counted, so the share is that of an ideal implementation. It may exceed 1 on a processor
whose caches keep the weights of a small model from step to step.

Knows configurations and numbers; which runtimes there are, and the clock, are others' business.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from txl_deploy.bench.result import Roofline, Row
from txl_train.config import MemoryKind, ModelConfig
from txl_train.errors import UsageError
from txl_train.flops import fastest_s, inference_flops, measured_peak_flops
from txl_train.model.adaptive import has_projections
from txl_train.model.memory import state_count, state_shape

if TYPE_CHECKING:
    from txl_deploy.bench.workload import Workload
    from txl_deploy.runtimes.base import RuntimeInfo

__all__ = [
    "ClusterUsage",
    "Peak",
    "attach",
    "cluster_usage",
    "inference_bytes",
    "inference_flops",
    "measure_peak",
    "peak_for",
    "roofline_of",
]

ENQUEUE_SHARE = 0.9
"""Share of the median latency from which on enqueueing, which the device does not wait for, is what limits a step."""

MOST_SEGMENTS = 256
"""Segments looked at, evenly spread over the text, for how many targets lie in each cluster."""

_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1}
_TORCH_TYPES = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "int8": torch.int8}


@dataclass(frozen=True)
class Peak:
    """What one device was found to do, per second."""

    flops: float
    """Multiplications and additions, on a large product of square matrices."""
    bytes_per_s: float
    """Bytes read and written, in copying a large block of its main memory."""


@dataclass(frozen=True)
class ClusterUsage:
    """How the targets of a step fall into the tail clusters, on average over a text; one number for each cluster."""

    counts: tuple[float, ...]
    """Targets per step."""
    used: tuple[float, ...]
    """Share of the steps that have any, 0..1: only these read the cluster's weights."""


def attach(row: Row, info: RuntimeInfo, workload: Workload, peak: Peak) -> Row:
    """Return the row with its roofline: of one device, where several processes share the streams.

    Args:
        row: with its latency and, where there is one, the time of enqueueing.
        info: of the runtime that was measured.
        workload: what it read, at the row's batch size.
        peak: of the device, in the type that the runtime computes in (`peak_for`).
    """
    config, n_streams = info.config, row.batch_size // row.processes
    usage = cluster_usage(config, workload, n_streams)
    flops = inference_flops(config, info.tgt_len, n_streams, info.memory, usage.counts)
    n_bytes = inference_bytes(config, info.tgt_len, n_streams, info.memory, info.dtype, info.memory_dtype, usage)
    return dataclasses.replace(row, roofline=roofline_of(flops, n_bytes, peak, statistics.median(row.samples_ms), row.enqueue_ms_p50))


def roofline_of(flops: float, n_bytes: float, peak: Peak, median_ms: float, enqueue_ms: float | None = None) -> Roofline:
    """Return the roofline of a step of `flops` operations and `n_bytes` bytes that takes `median_ms`.

    `enqueue_ms` is the time until the call returned; None where there is no device that works on.
    """
    compute_s, memory_s = flops / peak.flops, n_bytes / peak.bytes_per_s
    enqueue_bound = enqueue_ms is not None and enqueue_ms >= ENQUEUE_SHARE * median_ms
    return Roofline(
        flops_per_step=flops,
        bytes_per_step=n_bytes,
        peak_flops=peak.flops,
        peak_bytes_per_s=peak.bytes_per_s,
        share_of_peak=1e3 * max(compute_s, memory_s) / median_ms if median_ms > 0 else 0.0,
        bound="enqueue" if enqueue_bound else "compute" if compute_s >= memory_s else "memory",
    )


def cluster_usage(config: ModelConfig, workload: Workload, n_streams: int | None = None) -> ClusterUsage:
    """Return how the workload's counted targets fall into the tail clusters; `n_streams` of its streams are a step (None: all)."""
    n_steps = workload.steps_per_pass
    steps = np.unique(np.linspace(0, n_steps - 1, min(n_steps, MOST_SEGMENTS)).round().astype(int))
    counts_SC = np.zeros((len(steps), config.n_cluster))
    for row, step in enumerate(steps):
        segment = workload.segment(int(step))
        of_streams = slice(n_streams)
        targets = segment.target_ids_BT[of_streams][segment.counted_BT[of_streams]]
        counts_SC[row] = np.histogram(targets, bins=[*config.cluster_ends])[0][1:]
    return ClusterUsage(tuple(counts_SC.mean(axis=0).tolist()), tuple((counts_SC > 0).mean(axis=0).tolist()))


def inference_bytes(
    config: ModelConfig, tgt_len: int, batch_size: int, memory: MemoryKind, dtype: str, memory_dtype: str, usage: ClusterUsage
) -> float:
    """Return the least bytes that one step as deployed reads from main memory and writes to it.

    Args:
        config: with the vocabulary's size, the cutoffs and the lengths in force filled in.
        tgt_len: targets per stream and step.
        batch_size: streams.
        memory: what the memory holds.
        dtype: of weights and products: fp32, fp16 or int8. Normalisations, and positions that are added to the inputs, are fp32 in any
            case; with int8 so are embeddings, positions and biases, and each output of a layer has a scale.
        memory_dtype: of the states.
        usage: of the tail clusters: a cluster's weights are read only in the steps that have a target in it.
    """
    ids = batch_size * 8.0 * (config.ext_len + tgt_len + tgt_len)
    results = batch_size * 4.0 * tgt_len
    lengths = 2 * 8.0 * batch_size
    states = 2.0 * state_count(config, memory) * math.prod(state_shape(config, memory, batch_size)) * _bytes_of(memory_dtype)
    n_inputs = batch_size * (config.ext_len + tgt_len)
    gathered = float(n_inputs * config.embed_size * _bytes_of(_beside(dtype)))
    shortlist, *tails = (cluster_bytes(config, cluster, dtype) for cluster in range(config.n_cluster + 1))
    read = shortlist + sum(share * tail for share, tail in zip(usage.used, tails))
    return ids + results + lengths + states + gathered + read + body_bytes(config, tgt_len, dtype)


def cluster_bytes(config: ModelConfig, cluster: int, dtype: str) -> float:
    """Return the size of what the head reads for one cluster: output weights, biases, and a projection that is not the embedding's.

    To the shortlist belong the columns of the tail clusters.
    """
    width, (low, high) = config.cluster_widths[cluster], config.cluster_ends[cluster : cluster + 2]
    size, beside = _bytes_of(dtype), _bytes_of(_beside(dtype))
    scales = 1 if dtype == "int8" else 0
    n_bytes = (high - low) * (width * size + (1 + scales) * beside)
    if cluster == 0:
        n_bytes += config.n_cluster * (width + 1) * beside
    if has_projections(config) and not config.projection_is_tied(cluster):
        n_bytes += config.d_model * width * size + scales * width * beside
    return float(n_bytes)


def body_bytes(config: ModelConfig, tgt_len: int, dtype: str) -> float:
    """Return the size of all else that a step reads whole: layers, position terms, projections of the embedding."""
    size, beside, d, width = _bytes_of(dtype), _bytes_of(_beside(dtype)), config.d_model, config.n_head * config.d_head
    n_keys = config.mem_len + config.ext_len + tgt_len
    matrices = config.n_layer * (4 * d * width + 2 * d * config.d_inner)
    others = config.n_layer * (config.d_inner + d)  # biases, and positions
    if dtype == "int8":
        others += config.n_layer * (3 * width + d + config.d_inner + d)  # scales
    norms = config.n_layer * 4 * d
    added = 0  # positions that are added to the inputs
    match config.attn_type:
        case "relative":
            others += config.n_layer * width * (n_keys + 1) + 2 * width * (config.n_layer if config.untie_biases else 1)
        case "shaw":
            others += config.n_layer * (config.n_head * (config.d_head + 1) * (n_keys + 1) + width)
        case "sinusoidal":
            added = n_keys * d
        case "learned":
            added = config.n_layer * n_keys * d
    if has_projections(config):
        matrices += d * sum(config.cluster_widths if config.div_val > 1 else config.cluster_widths[:1])
    return float(size * matrices + beside * others + 4 * (norms + added))


def _beside(dtype: str) -> str:
    """Return the type of what is no matrix of a linear layer."""
    return "fp32" if dtype == "int8" else dtype


def peak_for(info: RuntimeInfo, threads: int | None = None) -> Peak:
    """Return what the runtime's device can do in the type that it really computes in; where that is not known, in its own.

    `threads` is the number that the runtime was given on a CPU; None means PyTorch's present number.
    """
    return measure_peak(info.device, info.compute if info.compute in _TORCH_TYPES else info.dtype, threads)


def measure_peak(device: str, compute: str, threads: int | None = None) -> Peak:
    """Return what a device does at most, measured once per process in about a second.

    Args:
        device: `cpu`, `cuda:0`, …
        compute: type of the products: fp32, tf32, fp16, bf16 or int8. A step of int8 multiplies in fp32 too, in attention, so its share
            of a peak of int8 is what it would be if all of it were int8: less than what is possible. Its peak is that of fp32 if that is
            larger, as on a CPU without instructions for int8; there a runtime may still do better with its own.
        threads: CPU threads; None means PyTorch's present number.

    Raises:
        UsageError: `compute` is no such type.
    """
    if compute not in _TORCH_TYPES:
        raise UsageError(f"The peak can be measured in {', '.join(_TORCH_TYPES)}, but not in {compute!r}.")
    return _measured(device, compute, torch.get_num_threads() if threads is None else threads)


@functools.lru_cache
def _measured(device: str, compute: str, threads: int) -> Peak:
    where = torch.device(device)
    with _threads(threads), _rounding(compute), torch.inference_mode():
        flops = measured_peak_flops(where, _TORCH_TYPES[compute])
        if compute == "int8":  # where PyTorch has no instructions for it, fp32 is faster, and as good as int8 can be had
            flops = max(flops, measured_peak_flops(where, torch.float32))
        peak = Peak(flops, _copy_rate(where))
    if where.type == "cuda":
        torch.cuda.empty_cache()
    return peak


def _copy_rate(device: torch.device) -> float:
    """Return the bytes per second of reading and writing, in copying a block far larger than any cache."""
    n_bytes = 2**30 if device.type == "cuda" else 2**28
    source = torch.ones(n_bytes // 4, device=device)
    target = torch.empty_like(source)
    return 2.0 * n_bytes / fastest_s(device, lambda: target.copy_(source))


def _bytes_of(dtype: str) -> int:
    if dtype not in _BYTES:
        raise UsageError(f"It is not known how many bytes a number of {dtype!r} has; known are {', '.join(_BYTES)}.")
    return _BYTES[dtype]


@contextlib.contextmanager
def _threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _rounding(compute: str) -> Iterator[None]:
    """Let products of fp32 on a GPU round their factors to TF32, or not, and put back what was set."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if compute == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
