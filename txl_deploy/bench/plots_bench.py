"""Charts of latencies: over batch size, against throughput, their distributions, and against the roofline.

Knows how these are drawn; the figures come from `report`. What is INVALID is drawn hollow, with a cross.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from txl_deploy.bench import plots

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_PANELS = 6
"""Batch sizes whose distributions are shown; of more, those that spread best."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """One batch size of one runtime."""

    batch_size: int
    p50_ms: float
    p99_ms: float
    tokens_per_s: float
    p50_interval_ms: tuple[float, float] | None = None
    tokens_per_s_interval: tuple[float, float] | None = None
    samples_ms: Sequence[float] = ()
    is_valid: bool = True
    """False for INVALID figures; what nobody judged counts as valid here."""


@dataclass(frozen=True)
class Line:
    """One runtime over batch sizes, which rise."""

    label: str
    points: Sequence[Point]


@dataclass(frozen=True)
class RoofPoint:
    """One row against the roofline."""

    flops_per_byte: float
    flops_per_s: float
    note: str


def latency_over_batch(lines: Sequence[Line]) -> plots.Paint:
    """Median latency of a step over batch size, with a whisker up to the 99th percentile."""
    sizes = sorted({point.batch_size for line in lines for point in line.points})
    if len(sizes) == 1:
        return _latency_at_one_size(lines, sizes[0])

    def paint(figure: Figure, theme: plots.Theme) -> None:
        axes = plots.new_axes(figure, theme, xlabel="batch size", ylabel="latency of a step, ms")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        for i, line in enumerate(lines):
            colour, shift = theme.series[i % len(theme.series)], 2 ** ((i - (len(lines) - 1) / 2) * 0.07)
            x = [point.batch_size * shift for point in line.points]
            p50, p99 = [point.p50_ms for point in line.points], [point.p99_ms for point in line.points]
            axes.vlines(x, p50, p99, color=colour, linewidth=1.2, alpha=0.55)
            axes.plot(x, p99, linestyle="none", marker="_", markersize=7, markeredgewidth=1.4, color=colour, alpha=0.55)
            for at, point in zip(x, line.points):
                if point.p50_interval_ms is not None:
                    axes.vlines(at, *point.p50_interval_ms, color=colour, linewidth=4, alpha=0.45)
            _plot_points(axes, theme, i, line, x, p50)
        plots.size_ticks(axes, sizes)
        plots.plain_log_ticks(axes.yaxis, *axes.get_ylim())
        plots.add_legend(axes, theme)

    return paint


def throughput_against_latency(lines: Sequence[Line]) -> plots.Paint:
    """Tokens per second against median latency; each point is a batch size, written beside it; crosses are 95 % intervals."""

    def paint(figure: Figure, theme: plots.Theme) -> None:
        axes = plots.new_axes(figure, theme, xlabel="median latency of a step, ms", ylabel="target tokens per second")
        axes.set_xscale("log")
        axes.set_yscale("log")
        taken: list[tuple[float, float]] = []
        for i, line in enumerate(lines):
            colour = theme.series[i % len(theme.series)]
            for point in line.points:
                if point.p50_interval_ms is not None:
                    axes.hlines(point.tokens_per_s, *point.p50_interval_ms, color=colour, linewidth=1.4, alpha=0.6)
                if point.tokens_per_s_interval is not None:
                    axes.vlines(point.p50_ms, *point.tokens_per_s_interval, color=colour, linewidth=1.4, alpha=0.6)
            _plot_points(axes, theme, i, line, [p.p50_ms for p in line.points], [p.tokens_per_s for p in line.points])
        axes.margins(0.08, 0.12)
        for i, line in enumerate(lines):
            for point in line.points:
                _write_beside(axes, theme.series[i % len(theme.series)], str(point.batch_size), (point.p50_ms, point.tokens_per_s), taken)
        plots.plain_log_ticks(axes.xaxis, *axes.get_xlim())
        plots.plain_log_ticks(axes.yaxis, *axes.get_ylim())
        plots.add_legend(axes, theme)

    return paint


def distributions(lines: Sequence[Line]) -> plots.Paint:
    """The share of steps that took no longer, one panel for each batch size; the scale stretches the slow tail."""
    sizes = panel_sizes(lines)

    def paint(figure: Figure, theme: plots.Theme) -> None:
        columns = min(3 if figure.get_size_inches()[0] > 6 else 2, len(sizes))
        rows = -(-len(sizes) // columns)
        for number, size in enumerate(sizes):
            is_left, is_bottom = number % columns == 0, number + columns >= len(sizes)
            axes = plots.new_axes(
                figure, theme, xlabel="ms" if is_bottom else "", ylabel="percentile" if is_left else "", part=(rows, columns, number + 1)
            )
            axes.set_title(f"batch size {size}", loc="left", fontsize=10.5, color=theme.ink)
            axes.tick_params(labelsize=8.5)
            axes.set_yscale("log")
            axes.set_ylim(1.0, 0.004)
            axes.set_xscale("log")
            for i, line in enumerate(lines):
                for point in (p for p in line.points if p.batch_size == size and p.samples_ms):
                    ordered = sorted(point.samples_ms)
                    counts = sorted({round(len(ordered) ** (j / 149)) for j in range(150)}, reverse=True)  # even on this scale
                    ordered, beyond = [ordered[-m] for m in counts], [m / len(ordered) for m in counts]
                    style = "-" if point.is_valid else (0, (2, 2))
                    axes.step(ordered, beyond, where="post", color=theme.series[i % len(theme.series)], linewidth=1.6, linestyle=style)
            axes.set_yticks([0.5, 0.1, 0.05, 0.01], ["50", "90", "95", "99"])
            axes.yaxis.set_minor_locator(plots.ticker().NullLocator())
            slowest = max(p.p99_ms for line in lines for p in line.points if p.batch_size == size)
            axes.set_xlim(right=min(axes.get_xlim()[1], slowest * 2))
            plots.plain_log_ticks(axes.xaxis, *axes.get_xlim())
        if len(lines) > 1:
            handles = [_handle(theme, i, line.label) for i, line in enumerate(lines)]
            wide = figure.get_size_inches()[0] > 6
            figure.legend(
                handles=handles, loc="outside upper left", ncols=4 if wide else 2, frameon=False, labelcolor=theme.ink, fontsize=10
            )

    return paint


def panel_sizes(lines: Sequence[Line]) -> list[int]:
    """Return the batch sizes whose distributions are shown: all, or of many the first, the last and some between."""
    sizes = sorted({point.batch_size for line in lines for point in line.points if point.samples_ms})
    if len(sizes) <= MOST_PANELS:
        return sizes
    return sorted({sizes[round(k * (len(sizes) - 1) / (MOST_PANELS - 1))] for k in range(MOST_PANELS)})


def roofline(roofs: Sequence[tuple[float, float]], points: Mapping[str, Sequence[RoofPoint]]) -> plots.Paint:
    """What rows reach, in FLOP/s over FLOP per byte, below the roofs (FLOP/s, bytes/s) that the device was measured at."""
    intensities = [point.flops_per_byte for series in points.values() for point in series] + [flops / width for flops, width in roofs]
    left, right = min(intensities) / 2, max(intensities) * 2

    def paint(figure: Figure, theme: plots.Theme) -> None:
        axes = plots.new_axes(figure, theme, xlabel="operations per byte of memory traffic", ylabel="operations per second")
        axes.set_xscale("log")
        axes.set_yscale("log")
        for flops, width in roofs:
            axes.plot([left, flops / width, right], [left * width, flops, flops], color=theme.muted, linewidth=1.4)
        taken: list[tuple[float, float]] = []
        for i, (label, series) in enumerate(points.items()):
            look: dict[str, Any] = {"color": theme.series[i % len(theme.series)], "marker": plots.MARKERS[i % len(plots.MARKERS)]}
            x, y = [point.flops_per_byte for point in series], [point.flops_per_s for point in series]
            axes.plot(x, y, linestyle="none", markersize=5.5, label=label, **look)
        axes.set_xlim(left, right)
        axes.margins(y=0.1)
        for i, series in enumerate(points.values()):
            for point in series:
                place = (point.flops_per_byte, point.flops_per_s)
                _write_beside(axes, theme.series[i % len(theme.series)], point.note, place, taken)
        _power_ticks(axes)
        plots.add_legend(axes, theme)

    return paint


def _power_ticks(axes: Axes) -> None:
    tick = plots.ticker()
    plots.plain_log_ticks(axes.xaxis, *axes.get_xlim())
    axes.yaxis.set_major_locator(tick.LogLocator(base=10, subs=(1.0, 3.0), numticks=20))
    axes.yaxis.set_major_formatter(tick.EngFormatter(sep=" "))
    axes.yaxis.set_minor_locator(tick.NullLocator())


def _plot_points(axes: Axes, theme: plots.Theme, i: int, line: Line, x: Sequence[float], y: Sequence[float]) -> None:
    """Draw a line with its markers; those of INVALID points are hollow and crossed out."""
    colour, marker = theme.series[i % len(theme.series)], plots.MARKERS[i % len(plots.MARKERS)]
    axes.plot(x, y, color=colour, linewidth=1.8, marker=marker, markersize=5.5, label=line.label)
    for at, height, point in zip(x, y, line.points):
        if not point.is_valid:
            axes.plot(at, height, marker=marker, markersize=8, markerfacecolor=theme.background, markeredgecolor=colour, zorder=4)
            axes.plot(at, height, marker="x", markersize=5, markeredgewidth=1.8, color=theme.bad, zorder=5)


def _write_beside(axes: Axes, colour: str, text: str, place: tuple[float, float], taken: list[tuple[float, float]]) -> None:
    """Write at a point, at whichever side is freest of what was written before."""
    x, y = axes.transData.transform(place)
    sides = ((0, 7, "center", "bottom"), (0, -7, "center", "top"), (8, 0, "left", "center"), (-8, 0, "right", "center"))

    def crowd(side: tuple[int, int, str, str]) -> float:
        at = (x + 2.2 * side[0], y + 2.2 * side[1])
        return math.fsum(1 / (1 + (at[0] - a) ** 2 + (at[1] - b) ** 2) for a, b in taken)

    dx, dy, ha, va = min(sides, key=crowd)
    taken += [(x, y), (x + 2.2 * dx, y + 2.2 * dy)]
    look: dict[str, Any] = {"ha": ha, "va": va, "fontsize": 8.5, "color": colour}
    axes.annotate(text, place, xytext=(dx, dy), textcoords="offset points", **look)


def _handle(theme: plots.Theme, i: int, label: str) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], color=theme.series[i % len(theme.series)], linewidth=1.8, label=label)


def _latency_at_one_size(lines: Sequence[Line], size: int) -> plots.Paint:
    def paint(figure: Figure, theme: plots.Theme) -> None:
        axes = plots.new_axes(figure, theme, xlabel=f"latency of a step at batch size {size}, ms", ylabel="")
        axes.grid(False, axis="y")
        axes.grid(True, axis="x", color=theme.grid, linewidth=0.8)
        widest = max(line.points[0].p99_ms for line in lines)
        for i, line in enumerate(lines):
            point, colour = line.points[0], theme.series[i % len(theme.series)]
            look: dict[str, Any] = {"color": colour} if point.is_valid else {"facecolor": "none", "edgecolor": colour, "hatch": "//"}
            axes.barh(i, point.p50_ms, height=0.4, **look)
            axes.plot([point.p50_ms, point.p99_ms], [i, i], color=theme.ink, linewidth=1.4)
            axes.plot(point.p99_ms, i, marker="|", markersize=9, markeredgewidth=1.4, color=theme.ink)
            text = f"{point.p50_ms:.3g}, p99 {point.p99_ms:.3g}{'' if point.is_valid else ' INVALID'}"
            beside: dict[str, Any] = {"va": "center", "fontsize": 10, "color": theme.ink if point.is_valid else theme.bad}
            axes.annotate(text, (point.p99_ms, i), xytext=(7, 0), textcoords="offset points", **beside)
        axes.set_yticks(range(len(lines)), [line.label for line in lines])
        axes.tick_params(axis="y", colors=theme.ink)
        axes.set_ylim(len(lines) - 0.4, -0.6)
        axes.set_xlim(0, widest * 1.45)

    return paint
