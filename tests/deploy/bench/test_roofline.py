"""The roofline: its formulas against what PyTorch counts and what the parameters really weigh, and what is made of them."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.deploy.bench.samples import rows_of
from tests.support import MODEL_CONFIGS, build_model, random_ids, small_config
from txl_deploy.bench import roofline
from txl_deploy.bench.roofline import (
    ClusterUsage,
    Peak,
    attach,
    body_bytes,
    cluster_bytes,
    cluster_usage,
    inference_bytes,
    inference_flops,
    measure_peak,
    peak_for,
    roofline_of,
)
from txl_deploy.bench.workload import Workload
from txl_deploy.runtimes.base import RuntimeInfo
from txl_train import flops
from txl_train.config import MemoryKind, ModelConfig
from txl_train.errors import UsageError
from txl_train.model.adaptive import cluster_rows, has_projections
from txl_train.model.inference import InferenceStep
from txl_train.model.memory import best_memory_kind

B, T = 3, 5
SIZES = {"fp32": torch.float32, "fp16": torch.float16}


def memory_kinds(config: ModelConfig) -> tuple[MemoryKind, ...]:
    return ("hidden",) if best_memory_kind(config) == "hidden" else ("hidden", "kv")


CASES = [
    pytest.param(name, memory, id=f"{name}, {memory}")
    for name, changes in MODEL_CONFIGS.items()
    for memory in memory_kinds(small_config(**changes))
]


def one_step(config: ModelConfig, memory: MemoryKind) -> tuple[float, list[int]]:
    """Run a step on random tokens; return the operations that PyTorch counts, and the number of targets in each tail cluster."""
    step = InferenceStep(build_model(config), T, memory)
    ids = torch.from_numpy(random_ids(config, B, config.ext_len + T + 1))
    targets = ids[:, config.ext_len + 1 :].contiguous()
    rows = cluster_rows(targets.reshape(-1), list(config.cluster_ends))
    start = step.initial_memory(B)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        step(ids[:, :-1], targets, rows, start.length_B, start.states)
    return counter.get_total_flops(), [len(row) for row in rows]


@pytest.mark.parametrize(("name", "memory"), CASES)
def test_operations_are_those_that_pytorch_counts(name: str, memory: MemoryKind) -> None:
    config = small_config(**MODEL_CONFIGS[name])
    counted, in_clusters = one_step(config, memory)
    projected_twice = 0  # the eager head projects for the shortlist, and again for the clusters: once would do
    if config.n_cluster and has_projections(config):
        projected_twice = 2 * B * T * config.d_model * config.embed_size
    assert inference_flops(config, T, B, memory, in_clusters) == counted - projected_twice


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("name", MODEL_CONFIGS)
def test_weights_are_as_heavy_as_the_parameters_of_a_step(name: str, dtype: str) -> None:
    config = small_config(**MODEL_CONFIGS[name])
    step = InferenceStep(build_model(config), T, memory_kinds(config)[-1], dtype=SIZES[dtype])
    parameters = dict(step.named_parameters())
    folded = ("attention.position.weight", "distance_keys", "distance_bias", "position_embedding")  # their position terms are read instead
    gathered = () if config.tie_weights else ("embedding.weights.",)  # only the rows of the inputs are
    read = {key: value for key, value in parameters.items() if not key.endswith(folded) and not key.startswith(gathered or "-")}
    weight = sum(value.numel() * value.element_size() for value in read.values())
    heads = sum(cluster_bytes(config, cluster, dtype) for cluster in range(config.n_cluster + 1))
    assert body_bytes(config, T, dtype) + heads == weight


@pytest.mark.parametrize(("name", "memory"), CASES)
def test_states_are_as_heavy_as_the_memory_of_a_step_read_and_written(name: str, memory: MemoryKind) -> None:
    config = small_config(**MODEL_CONFIGS[name])
    step = InferenceStep(build_model(config), T, memory, dtype=torch.float32, memory_dtype=torch.float16)
    start = step.initial_memory(B)
    states = sum(state.numel() * state.element_size() for state in start.states)
    unused = ClusterUsage((0.0,) * config.n_cluster, (0.0,) * config.n_cluster)
    rest = body_bytes(config, T, "fp32") + cluster_bytes(config, 0, "fp32")
    n_inputs = B * (T + config.ext_len)
    tokens = n_inputs * 8 + B * T * 8 + B * T * 4 + 2 * start.length_B.numel() * 8
    embedded = n_inputs * config.embed_size * 4
    assert inference_bytes(config, T, B, memory, "fp32", "fp16", unused) == rest + 2 * states + tokens + embedded


def test_a_clusters_weights_count_in_the_steps_that_read_them() -> None:
    config = small_config(cutoffs=(5, 9))
    seldom, always = (inference_bytes(config, T, B, "kv", "fp32", "fp32", ClusterUsage((0.5, 0.0), (share, 0.0))) for share in (0.25, 1.0))
    assert always - seldom == pytest.approx(0.75 * cluster_bytes(config, 1, "fp32"))


def test_the_base_models_weights_are_most_of_what_a_step_reads() -> None:
    base = ModelConfig(vocab_size=267735, adaptive=True, cutoffs=(19997, 39997, 199997), div_val=1, mem_len=640)
    n_bytes = inference_bytes(base, 64, 1, "kv", "fp16", "fp16", ClusterUsage((0, 0, 0), (0, 0, 0)))
    weights = 2 * (16 * (4 * 512 * 512 + 2 * 512 * 2048) + 20000 * 512)
    states = 2 * 2 * 16 * 2 * 640 * 512
    assert n_bytes == pytest.approx(weights + states, rel=0.15)


def test_targets_are_counted_from_the_text_that_is_read() -> None:
    config = small_config(cutoffs=(5, 9))
    ids = np.array([0, 1, 6, 2, 3, 10, 4, 6, 7, 1, 2, 3, 4, 0, 1, 2, 0])  # four streams of four: three steps of one token and a fourth
    workload = Workload(ids_N=ids, batch_size=1, tgt_len=4)
    usage = cluster_usage(config, workload)
    # targets 1 6 2 3 | 10 4 6 7 | 1 2 3 4 | 0 1 2 0
    assert usage.counts == (3 / 4, 1 / 4)
    assert usage.used == (2 / 4, 1 / 4)
    assert cluster_usage(small_config(), workload) == ClusterUsage((), ())


def test_of_several_processes_one_devices_share_of_the_streams_counts() -> None:
    config = small_config(cutoffs=(5, 9))
    workload = Workload(ids_N=np.arange(2001) % 20, batch_size=4, tgt_len=5)
    assert sum(cluster_usage(config, workload, 2).counts) == pytest.approx(sum(cluster_usage(config, workload).counts) / 2, rel=0.05)


def test_long_texts_are_sampled_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "MOST_SEGMENTS", 3)
    read = []
    workload = Workload(ids_N=np.arange(2001) % 20, batch_size=1, tgt_len=4)
    segment = Workload.segment
    monkeypatch.setattr(Workload, "segment", lambda self, step: read.append(step) or segment(self, step))
    cluster_usage(small_config(cutoffs=(5, 9)), workload)
    assert read == [0, 250, 499]


PEAK = Peak(flops=1e12, bytes_per_s=1e11)


@pytest.mark.parametrize(
    ("flops", "n_bytes", "enqueue_ms", "share", "bound"),
    [
        (5e9, 1e8, None, 0.5, "compute"),
        (1e9, 4e8, None, 0.4, "memory"),
        (5e9, 1e8, 8.9, 0.5, "compute"),
        (5e9, 1e8, 9.0, 0.5, "enqueue"),
    ],
)
def test_the_longer_of_the_two_times_bounds_a_step_unless_the_host_does(
    flops: float, n_bytes: float, enqueue_ms: float | None, share: float, bound: str
) -> None:
    found = roofline_of(flops, n_bytes, PEAK, 10.0, enqueue_ms)
    assert found.share_of_peak == pytest.approx(share)
    assert found.bound == bound
    assert (found.flops_per_step, found.bytes_per_step) == (flops, n_bytes)


def info_of(config: ModelConfig, **changes: Any) -> RuntimeInfo:
    values = {"name": "pytorch", "provider": "eager", "device": "cpu", "dtype": "fp32", "memory": "kv", "tgt_len": 4, "config": config}
    return RuntimeInfo(**(values | changes))


def test_a_row_gets_the_roofline_of_its_own_batch_size_and_median() -> None:
    config = small_config(cutoffs=(5, 9))
    (row,) = rows_of([2], with_reference=False)
    workload = Workload(ids_N=np.arange(2001) % 20, batch_size=2, tgt_len=4)
    usage = cluster_usage(config, workload)
    found = attach(row, info_of(config), workload, PEAK).roofline
    assert found is not None
    assert found.flops_per_step == inference_flops(config, 4, 2, "kv", usage.counts)
    assert found.bytes_per_step == inference_bytes(config, 4, 2, "kv", "fp32", "fp32", usage)
    assert found.share_of_peak == pytest.approx(
        max(found.flops_per_step / 1e12, found.bytes_per_step / 1e11) / (np.median(row.samples_ms) / 1e3)
    )
    half = attach(dataclasses.replace(row, processes=2), info_of(config), workload, PEAK).roofline
    assert half is not None
    assert half.flops_per_step == inference_flops(config, 4, 1, "kv", cluster_usage(config, workload, 1).counts)


def test_the_peak_is_measured_in_the_type_really_computed_in(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str, int | None]] = []
    monkeypatch.setattr(roofline, "measure_peak", lambda *arguments: asked.append(arguments) or PEAK)
    config = small_config()
    peak_for(info_of(config, dtype="fp16", compute="fp32"), 2)
    peak_for(info_of(config, dtype="fp32", compute="tf32", device="cuda:0"))
    peak_for(info_of(config, dtype="fp16", compute="unknown"))
    assert asked == [("cpu", "fp32", 2), ("cuda:0", "tf32", None), ("cpu", "fp16", None)]


def test_the_peak_is_plausible_measured_once_and_leaves_no_setting_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flops, "_REPEATS", 1)
    roofline._measured.cache_clear()
    torch.set_float32_matmul_precision("high")
    try:
        peak = measure_peak("cpu", "fp32", 1)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert 1e9 < peak.flops < 1e14
    assert 1e8 < peak.bytes_per_s < 1e13
    assert measure_peak("cpu", "fp32", 1) is peak
    roofline._measured.cache_clear()


def test_the_peak_of_int8_is_no_less_than_that_of_fp32() -> None:
    assert measure_peak("cpu", "int8", 1).flops > 0.8 * measure_peak("cpu", "fp32", 1).flops


def test_int8_has_a_peak_of_its_own() -> None:
    assert 1e8 < measure_peak("cpu", "int8", 1).flops < 1e15
    roofline._measured.cache_clear()


def test_of_int8_the_matrices_are_a_quarter_and_the_positions_are_not() -> None:
    config = small_config(n_layer=3)
    full, small = body_bytes(config, 4, "fp32"), body_bytes(config, 4, "int8")
    width = config.n_head * config.d_head
    matrices = config.n_layer * (4 * config.d_model * width + 2 * config.d_model * config.d_inner)
    scales = config.n_layer * (3 * width + config.d_model + config.d_inner + config.d_model)
    assert small == full - 3 * matrices + 4 * scales


def test_a_type_that_is_none_is_refused() -> None:
    with pytest.raises(UsageError, match="int4"):
        measure_peak("cpu", "int4")
    with pytest.raises(UsageError, match="int4"):
        body_bytes(small_config(), 4, "int4")
