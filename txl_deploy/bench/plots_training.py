"""Charts of training: the course of a run, and how throughput grows with the number of processes.

Knows how these are drawn; the figures come from `report`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from txl_deploy.bench import plots

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def training_curve(
    train: Sequence[tuple[float, float]], valid: Sequence[tuple[float, float]], levels: Mapping[str, float], *, in_bits: bool = False
) -> plots.Paint:
    """Perplexity over optimizer steps, with the loss in nats on the right: one axis, read in two units.

    `train` and `valid` are (step, nats per token); `levels` are horizontal lines, perplexity by label. With `in_bits` the left unit is
    bits per character.
    """

    def of_nats(nats: float) -> float:
        return nats / math.log(2) if in_bits else math.exp(min(nats, 700.0))

    def paint(figure: Figure, theme: plots.Theme) -> None:
        axes = plots.new_axes(figure, theme, xlabel="optimizer step", ylabel="bits per character" if in_bits else "perplexity")
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
            plots.plain_log_ticks(axes.yaxis, *axes.get_ylim())
            nats = axes.secondary_yaxis("right", functions=(_log, _exp))
            nats.set_ylabel("nats per token", color=theme.muted)
            nats.tick_params(colors=theme.muted, length=0)
            nats.yaxis.set_major_locator(plots.ticker().MaxNLocator(7, steps=[1, 2, 5, 10]))
            nats.yaxis.set_major_formatter(plots.ticker().FormatStrFormatter("%.1f"))
            nats.yaxis.set_minor_locator(plots.ticker().NullLocator())
            nats.spines["right"].set_visible(False)
        axes.xaxis.set_major_locator(plots.ticker().MaxNLocator(6, integer=True, steps=[1, 2, 2.5, 5, 10]))
        plots.add_legend(axes, theme)

    return paint


def weak_scaling(lines: Mapping[str, Sequence[tuple[int, float]]]) -> plots.Paint:
    """Throughput over that of one process, by the number of processes; `lines` hold (processes, ratio) by label."""
    counts = sorted({count for points in lines.values() for count, _ in points})

    def paint(figure: Figure, theme: plots.Theme) -> None:
        axes = plots.new_axes(figure, theme, xlabel="processes", ylabel="throughput over that of one")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.plot(counts, counts, color=theme.muted, linewidth=1, linestyle=(0, (5, 4)), label="perfect")
        for i, (label, points) in enumerate(lines.items()):
            x, y = zip(*points)
            look: dict[str, Any] = {"color": theme.series[i % len(theme.series)], "marker": plots.MARKERS[i % len(plots.MARKERS)]}
            axes.plot(x, y, linewidth=1.8, markersize=5.5, label=label, **look)
        plots.size_ticks(axes, counts)
        axes.set_yticks(counts, [str(count) for count in counts])
        axes.yaxis.set_minor_locator(plots.ticker().NullLocator())
        plots.add_legend(axes, theme)

    return paint


def _log(values: Any) -> Any:
    import numpy as np

    return np.log(np.maximum(values, 1e-300))


def _exp(values: Any) -> Any:
    import numpy as np

    return np.exp(np.minimum(values, 700.0))
