"""Results of made-up measurements, for the tests of what is done with results."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tests.fakes import FakeClock, FakeRuntime
from txl_deploy.bench.harness import BenchSettings, Contender, measure
from txl_deploy.bench.result import BenchResult, Row
from txl_deploy.bench.workload import Workload

SHA = "ab" * 32


def rows_of(batch_sizes: Sequence[int] = (1, 2, 4), *, n: int = 40, nll_offset: float = 0.0, with_reference: bool = True) -> list[Row]:
    """Measure a fake ONNX artifact, and a fake reference three times as slow, at each batch size."""
    rows: list[Row] = []
    for batch_size in batch_sizes:
        clock = FakeClock()
        reference = FakeRuntime("pytorch", clock=clock, latency_ms=lambda step, b=batch_size: 3.0 * b + step % 7 / 10)
        artifact = FakeRuntime(
            "onnx",
            clock=clock,
            latency_ms=lambda step, b=batch_size: 1.0 * b + step % 5 / 10,
            nll_offset=nll_offset,
            origin="some/where/model-onnx",
            manifest_sha256=SHA,
            checkpoint_sha256="cd" * 32,
        )
        contenders = [Contender(reference, is_reference=True)] if with_reference else []
        workload = Workload(ids_N=np.arange(2001) % 97, batch_size=batch_size, tgt_len=4, dataset="pydoc", split="test")
        rows += measure(
            [*contenders, Contender(artifact)], workload, BenchSettings(duration_s=0, min_samples=n, max_samples=n), clock=clock
        )
    return rows


def result_of(rows: Sequence[Row], *, command: str = "txl bench --artifact W/onnx --out W/benchmark.json") -> BenchResult:
    """Put rows into a result as `txl bench` does."""
    return BenchResult(
        rows=tuple(rows),
        command=command,
        percentiles=(50, 90, 95, 99),
        settings={"percentiles": [50, 90, 95, 99], "duration_s": 0.0, "boundary": "step_device_resident"},
        workload={"dataset": "pydoc", "split": "test", "n_tokens": 2001},
        environment={"cpu": "A processor", "cores_usable": 2, "threads": 1, "gpus": [], "time_utc": "2026-01-01T00:00:00+00:00"},
    )
