"""The report's charts: training curve, latency over batch size, throughput against latency.

Knows how to draw numbers so that they read well on paper, on a phone and on a dark screen; what the numbers mean and where they stand in
the report is `report`'s business. matplotlib (extra `report`) is imported when something is drawn.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from txl_train.errors import EnvironmentUnfitError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Theme:
    """Colours of a chart. The background is the page's, except in PNG files."""

    ink: str
    muted: str
    grid: str
    background: str
    series: tuple[str, ...]


LIGHT = Theme(
    ink="#1c2128",
    muted="#5b6672",
    grid="#e4e8ed",
    background="#ffffff",
    series=("#2563eb", "#d9480f", "#0b8a6f", "#8b3fd6", "#a16a08", "#c2255c"),
)
DARK = Theme(
    ink="#e6edf3",
    muted="#9aa6b2",
    grid="#2c343d",
    background="#161b22",
    series=("#74a9ff", "#ff9248", "#3fd1a8", "#c099ff", "#f0c04f", "#f783ac"),
)
MARKERS = ("o", "s", "^", "D", "v", "P")
WIDE, NARROW = (6.6, 4.0), (4.3, 3.7)
"""Figure sizes in inches: for half a desktop page, and for a phone. Type keeps its size, so it stays readable on both."""

Paint = Callable[["Figure", Theme], None]


@dataclass(frozen=True)
class Chart:
    """A finished picture in all the forms it is needed in."""

    name: str
    """File name without its ending."""
    title: str
    description: str
    """What it shows, in words: the alternative text and the caption."""
    png: bytes
    """Light, for documents."""
    svg_light: bytes
    svg_dark: bytes
    svg_narrow_light: bytes
    svg_narrow_dark: bytes

    def data_uri(self, form: str) -> str:
        """Return `svg_light`, `svg_dark`, ... as an address that holds the picture itself."""
        content: bytes = getattr(self, form)
        return f"data:image/svg+xml;base64,{base64.b64encode(content).decode()}"


@dataclass(frozen=True)
class LatencyLine:
    """One runtime over batch sizes, which rise."""

    label: str
    batch_sizes: Sequence[int]
    p50_ms: Sequence[float]
    p99_ms: Sequence[float]
    tokens_per_s: Sequence[float]


def draw(name: str, title: str, description: str, paint: Paint) -> Chart:
    """Paint a chart in all sizes and themes. EnvironmentUnfitError without matplotlib."""
    return Chart(
        name=name,
        title=title,
        description=description,
        png=_render(paint, LIGHT, WIDE, "png"),
        svg_light=_render(paint, LIGHT, WIDE, "svg"),
        svg_dark=_render(paint, DARK, WIDE, "svg"),
        svg_narrow_light=_render(paint, LIGHT, NARROW, "svg"),
        svg_narrow_dark=_render(paint, DARK, NARROW, "svg"),
    )


def training_curve(
    train: Sequence[tuple[float, float]], valid: Sequence[tuple[float, float]], levels: Mapping[str, float], *, in_bits: bool = False
) -> Paint:
    """Perplexity over optimizer steps, with the loss in nats on the right: one axis, read in two units.

    `train` and `valid` are (step, nats per token); `levels` are horizontal lines, perplexity by label. With `in_bits` the left unit is
    bits per character.
    """

    def of_nats(nats: float) -> float:
        return nats / math.log(2) if in_bits else math.exp(min(nats, 700.0))

    def paint(figure: Figure, theme: Theme) -> None:
        axes = _axes(figure, theme, xlabel="optimizer step", ylabel="bits per character" if in_bits else "perplexity")
        if train:
            x, y = zip(*train)
            axes.plot(x, [of_nats(v) for v in y], color=theme.series[0], linewidth=1.2, alpha=0.85, label="training")
        if valid:
            x, y = zip(*valid)
            axes.plot(x, [of_nats(v) for v in y], color=theme.series[1], linewidth=1.8, marker="o", markersize=4.5, label="validation")
        for label, value in levels.items():
            level = of_nats(math.log(value))
            axes.axhline(level, color=theme.muted, linewidth=1, linestyle=(0, (5, 4)), zorder=1)
            axes.annotate(
                f"{label} {level:,.2f}" if in_bits else f"{label} {level:,.0f}",
                (1, level),
                xycoords=("axes fraction", "data"),
                xytext=(-4, 3),
                textcoords="offset points",
                ha="right",
                fontsize=9,
                color=theme.muted,
            )
        if not in_bits:
            axes.set_yscale("log")
            _plain_log_ticks(axes.yaxis, *axes.get_ylim())
            nats = axes.secondary_yaxis("right", functions=(_log, _exp))
            nats.set_ylabel("nats per token", color=theme.muted)
            nats.tick_params(colors=theme.muted, length=0)
            nats.yaxis.set_major_locator(_ticker().MaxNLocator(7, steps=[1, 2, 5, 10]))
            nats.yaxis.set_major_formatter(_ticker().FormatStrFormatter("%.1f"))
            nats.yaxis.set_minor_locator(_ticker().NullLocator())
            nats.spines["right"].set_visible(False)
        axes.xaxis.set_major_locator(_ticker().MaxNLocator(6, integer=True, steps=[1, 2, 2.5, 5, 10]))
        _legend(axes, theme)

    return paint


def latency_over_batch(lines: Sequence[LatencyLine]) -> Paint:
    """Median latency of a step over batch size, with a whisker up to the 99th percentile."""
    sizes = sorted({size for line in lines for size in line.batch_sizes})
    if len(sizes) == 1:
        return _latency_at_one_size(lines, sizes[0])

    def paint(figure: Figure, theme: Theme) -> None:
        axes = _axes(figure, theme, xlabel="batch size", ylabel="latency of a step, ms")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        for i, line in enumerate(lines):
            colour, shift = theme.series[i % len(theme.series)], 2 ** ((i - (len(lines) - 1) / 2) * 0.07)
            x = [size * shift for size in line.batch_sizes]
            axes.vlines(x, line.p50_ms, line.p99_ms, color=colour, linewidth=1.4, alpha=0.75)
            axes.plot(x, line.p99_ms, linestyle="none", marker="_", markersize=7, markeredgewidth=1.4, color=colour, alpha=0.75)
            axes.plot(x, line.p50_ms, color=colour, linewidth=1.8, marker=MARKERS[i % len(MARKERS)], markersize=5.5, label=line.label)
        _size_ticks(axes, sizes)
        _plain_log_ticks(axes.yaxis, *axes.get_ylim())
        _legend(axes, theme)

    return paint


def throughput_against_latency(lines: Sequence[LatencyLine]) -> Paint:
    """Tokens per second against median latency; each point is a batch size, written beside it."""

    def paint(figure: Figure, theme: Theme) -> None:
        axes = _axes(figure, theme, xlabel="median latency of a step, ms", ylabel="target tokens per second")
        axes.set_xscale("log")
        axes.set_yscale("log")
        for i, line in enumerate(lines):
            colour = theme.series[i % len(theme.series)]
            look: dict[str, Any] = {"color": colour, "linewidth": 1.8, "marker": MARKERS[i % len(MARKERS)], "markersize": 5.5}
            axes.plot(line.p50_ms, line.tokens_per_s, label=line.label, **look)
            for size, x, y in zip(line.batch_sizes, line.p50_ms, line.tokens_per_s):
                axes.annotate(str(size), (x, y), xytext=(0, 6), textcoords="offset points", ha="center", fontsize=8.5, color=colour)
        axes.margins(0.08, 0.12)
        _plain_log_ticks(axes.xaxis, *axes.get_xlim())
        _plain_log_ticks(axes.yaxis, *axes.get_ylim())
        _legend(axes, theme)

    return paint


def _latency_at_one_size(lines: Sequence[LatencyLine], size: int) -> Paint:
    def paint(figure: Figure, theme: Theme) -> None:
        axes = _axes(figure, theme, xlabel=f"latency of a step at batch size {size}, ms", ylabel="")
        axes.grid(False, axis="y")
        axes.grid(True, axis="x", color=theme.grid, linewidth=0.8)
        widest = max(line.p99_ms[0] for line in lines)
        for i, line in enumerate(lines):
            colour = theme.series[i % len(theme.series)]
            p50, p99 = line.p50_ms[0], line.p99_ms[0]
            axes.barh(i, p50, height=0.4, color=colour)
            axes.plot([p50, p99], [i, i], color=theme.ink, linewidth=1.4)
            axes.plot(p99, i, marker="|", markersize=9, markeredgewidth=1.4, color=theme.ink)
            axes.annotate(
                f"{p50:.3g}, p99 {p99:.3g}", (p99, i), xytext=(7, 0), textcoords="offset points", va="center", fontsize=10, color=theme.ink
            )
        axes.set_yticks(range(len(lines)), [line.label for line in lines])
        axes.tick_params(axis="y", colors=theme.ink)
        axes.set_ylim(len(lines) - 0.4, -0.6)
        axes.set_xlim(0, widest * 1.35)

    return paint


def _render(paint: Paint, theme: Theme, size: tuple[float, float], form: str) -> bytes:
    matplotlib = _matplotlib()
    from matplotlib.figure import Figure

    settings: dict[str, Any] = {
        "font.family": "DejaVu Sans",
        "font.size": 10.5,
        "axes.unicode_minus": False,
        "svg.hashsalt": "txl",  # the same picture gives the same bytes
        "svg.fonttype": "path",
        "text.color": theme.ink,
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=size, layout="constrained", facecolor=theme.background if form == "png" else "none")
        paint(figure, theme)
        buffer = io.BytesIO()
        figure.savefig(buffer, format=form, dpi=200, metadata={"Date": None} if form == "svg" else {"Software": None})
    return buffer.getvalue()


def _axes(figure: Figure, theme: Theme, *, xlabel: str, ylabel: str) -> Axes:
    axes = figure.add_subplot(facecolor="none")
    axes.set_xlabel(xlabel, color=theme.muted)
    axes.set_ylabel(ylabel, color=theme.muted)
    axes.tick_params(which="both", colors=theme.muted, length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(theme.muted)
    axes.grid(True, axis="y", color=theme.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    return axes


def _legend(axes: Axes, theme: Theme) -> None:
    width_in = axes.get_figure(root=True).get_size_inches()[0]  # type: ignore[union-attr]  # axes in use have a figure
    columns = 3 if width_in > 5 else 2
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(-0.02, 1.0),
        ncols=columns,
        frameon=False,
        labelcolor=theme.ink,
        handlelength=1.6,
        columnspacing=1.4,
        borderaxespad=0.2,
    )


def _plain_log_ticks(axis: Any, low: float, high: float) -> None:
    """Label a logarithmic axis with ordinary numbers, closer together where it spans little."""
    ticker = _ticker()
    decades = math.log10(high / low) if low > 0 and high > low else 1.0
    if decades > 2.2:
        steps: tuple[float, ...] = (1.0,) if decades > 4 else (1.0, 3.0)
    else:
        steps = (1.0, 2.0, 5.0) if decades > 0.9 else (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0)
    axis.set_major_locator(ticker.LogLocator(base=10, subs=steps, numticks=20))
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: _short(value)))
    axis.set_minor_locator(ticker.NullLocator())


def _size_ticks(axes: Axes, sizes: Sequence[int]) -> None:
    """Mark the measured batch sizes; where they crowd, keep those at least half an octave apart."""
    kept: list[int] = []
    for size in sizes:
        if not kept or math.log2(size / kept[-1]) > 0.4:
            kept.append(size)
    axes.set_xticks(kept, [str(size) for size in kept])
    axes.xaxis.set_minor_locator(_ticker().NullLocator())


def _short(value: float) -> str:
    for limit, letter in ((1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            return f"{value / (1e6 if letter == 'M' else 1e3):g}{letter}"
    return f"{value:,.10g}"


def _log(values: Any) -> Any:
    import numpy as np

    return np.log(np.maximum(values, 1e-300))


def _exp(values: Any) -> Any:
    import numpy as np

    return np.exp(np.minimum(values, 700.0))


def _ticker() -> Any:
    from matplotlib import ticker

    return ticker


def _matplotlib() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise EnvironmentUnfitError(
            "The report's charts need matplotlib, which is not installed.", remedy="Install it with `pip install 'txl[report]'`."
        ) from error
    return matplotlib
