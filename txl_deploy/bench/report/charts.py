"""Which charts a report has, and what they are made of.

Knows how findings become lines and points; how these are painted stands in `plots_bench`, `plots_training` and `plots_parity`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from txl_deploy.bench import plots, plots_bench, plots_parity, plots_training
from txl_deploy.bench.report.findings import Training
from txl_deploy.bench.report.series import Series, lacks_proof
from txl_deploy.bench.result import BenchResult, Row
from txl_deploy.bench.training import TrainingRow

BROAD, TALL = (10.4, 5.0), (4.3, 6.4)
"""Sizes of a chart of several panels, inches."""


def bench_charts(result: BenchResult, series: Sequence[Series], suffix: str = "") -> list[plots.Chart]:
    """Return the charts of one result: latency, throughput, distributions, roofline, as far as there is something to draw."""
    if not series:
        return []
    stamp = plots.STAMP if lacks_proof(result) else None
    lines = [plots_bench.Line(_label(s), [_point(row) for row in s.rows]) for s in series]
    hollow = " Hollow, crossed-out points are INVALID." if result.invalid else ""
    described = (
        "Median time of one step by batch size, with its 95 % interval; lower is better. The whisker reaches to the 99th percentile."
    )
    charts = [plots.draw(f"latency{suffix}", "Latency", described + hollow, plots_bench.latency_over_batch(lines), stamp=stamp)]
    if len({row.batch_size for row in result.rows}) > 1:
        described = (
            "Target tokens per second against the time of a step, with 95 % intervals; the batch size stands at each point; up and left is "
            "better."
        )
        paint = plots_bench.throughput_against_latency(lines)
        charts.append(plots.draw(f"throughput{suffix}", "Throughput against latency", described + hollow, paint, stamp=stamp))
    described = (
        "Read across at 99 to find the 99th percentile. A steep line is a steady latency; a long tail to the right is a few slow steps. "
        "Every timed step counts."
    )
    paint = plots_bench.distributions(lines)
    sizes = {"wide": BROAD, "narrow": TALL}
    charts.append(plots.draw(f"distributions{suffix}", "How latencies are distributed", described, paint, stamp=stamp, **sizes))
    roofline = _roofline_chart(series, suffix, stamp)
    return charts if roofline is None else [*charts, roofline]


def training_chart(training: Training, levels: Mapping[str, float]) -> plots.Chart:
    """Return the course of a training run; `levels` are perplexities of simple models."""
    unit = "bits per character" if training.in_bits else "perplexity"
    described = f"Training loss and loss on the validation split by optimizer step, as {unit}; lower is better."
    paint = plots_training.training_curve(training.train, training.valid, levels, in_bits=training.in_bits)
    return plots.draw("training", "Training", described, paint)


def scaling_chart(rows: Sequence[TrainingRow], suffix: str = "") -> plots.Chart | None:
    """Return how throughput grows with processes; None where only one number of them was measured."""
    rates = {(row.dtype, row.batch_size_per_process, row.processes): row.tokens_per_s for row in rows if row.figures_apply}
    lines: dict[str, list[tuple[int, float]]] = {}
    for (dtype, batch_size, processes), rate in sorted(rates.items()):
        alone = rates.get((dtype, batch_size, 1))
        if rate is not None and alone:
            lines.setdefault(f"{dtype.upper()}, batch {batch_size}", []).append((processes, rate / alone))
    lines = {label: points for label, points in lines.items() if len(points) > 1}
    if not lines:
        return None
    described = "Throughput of several processes over that of one, at the same batch size each; the dashed line is perfect scaling."
    return plots.draw(f"weak_scaling{suffix}", "Weak scaling of training", described, plots_training.weak_scaling(lines))


def parity_chart(document: Mapping[str, Any], name: str) -> plots.Chart | None:
    """Return the drift over segments; None where the document holds too little for it."""
    try:
        return plots_parity.drift_chart(document, name)
    except (KeyError, TypeError, ValueError):
        return None


def _label(series: Series) -> str:
    return series.label + (" – FAILED" if series.has_failed else "")


def _point(row: Row) -> plots_bench.Point:
    mean = getattr(row.latency, "mean_interval_ms", None)
    per_step = row.tokens_per_s * row.latency.mean_ms
    return plots_bench.Point(
        batch_size=row.batch_size,
        p50_ms=row.latency.percentile_ms(50),
        p99_ms=row.latency.percentile_ms(99),
        tokens_per_s=row.tokens_per_s,
        p50_interval_ms=row.latency.interval_ms(50),
        tokens_per_s_interval=None if mean is None else (per_step / mean[1], per_step / mean[0]),
        samples_ms=row.samples_ms,
        is_valid=row.valid is not False,
    )


def _roofline_chart(series: Sequence[Series], suffix: str, stamp: str | None) -> plots.Chart | None:
    points: dict[str, list[plots_bench.RoofPoint]] = {}
    roofs: dict[tuple[float, float], None] = {}
    for one in series:
        for row in one.rows:
            if row.roofline is None or min(row.roofline.flops_per_step, row.roofline.bytes_per_step) <= 0:
                continue
            roofs[row.roofline.peak_flops, row.roofline.peak_bytes_per_s] = None
            seconds = row.latency.percentile_ms(50) / 1e3
            intensity = row.roofline.flops_per_step / row.roofline.bytes_per_step
            point = plots_bench.RoofPoint(intensity, row.roofline.flops_per_step / seconds, str(row.batch_size))
            points.setdefault(_label(one), []).append(point)
    if not points or not all(math.isfinite(value) and value > 0 for roof in roofs for value in roof):
        return None
    described = (
        "What each step reaches, below what the device was measured to do: the slope is its memory's bandwidth, the flat part its "
        "arithmetic. The batch size stands at each point."
    )
    return plots.draw(f"roofline{suffix}", "Roofline", described, plots_bench.roofline(list(roofs), points), stamp=stamp, wide=(10.4, 4.2))
