"""The chart of a comparison by `txl parity`: how far two runtimes differ, segment by segment, beside what they may differ by.

Knows the JSON document that `txl parity` writes and how to draw it; `txl parity --plot` and the report use it. matplotlib (extra `report`)
is imported when something is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from txl_deploy.bench.plots import Chart, Paint, Theme, draw

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FLOOR = 1e-12
"""What a difference of nothing is drawn at, on axes that have no 0."""

Curve = tuple[str, Sequence[float | None], float | None, float]
"""Label, one value per segment, bound or None, width of the line."""


def drift_chart(document: Mapping[str, Any], name: str = "parity_drift") -> Chart:
    """Draw the document of one comparison. EnvironmentUnfitError without matplotlib."""
    verdict = "agree" if document["passed"] else "do not agree"
    what = f"{document.get('runtime', 'The artifact')} in {document.get('dtype', 'its precision')} against eager PyTorch in FP32"
    shown = f"Differences of {what} over {len(document['segments'])} segments, each side on its own memory; dashed lines are bounds."
    return draw(name, f"Drift over segments: the two {verdict}", shown, drift(document, heading=f"{what}: {verdict}"))


def drift(document: Mapping[str, Any], *, heading: str = "") -> Paint:
    """Return what draws the differences of the nll above those of the memory, over segments, on logarithmic axes.

    The shaded part is where memories are full; small ticks are starts of streams. A value that is not finite is drawn at the top.
    """
    parts, bounds = document["segments"], document["tolerance"]
    x = [part["index"] for part in parts]
    nll: list[Curve] = [
        ("largest", [part["max_abs_delta_nll"] for part in parts], bounds["token_nll"], 1.2),
        ("root mean square", [part["rms_delta_nll"] for part in parts], bounds["rms_nll"], 1.8),
        ("|mean|", [_magnitude(part["mean_delta_nll"]) for part in parts], None, 1.0),
    ]
    memory: list[Curve] = [("memory", [part["memory_error"] for part in parts], bounds["memory"], 1.8)]
    starts = [part["index"] for part in parts if part["reset_streams"]]

    def paint(figure: Figure, theme: Theme) -> None:
        if heading:
            figure.suptitle(heading, fontsize=10.5 if figure.get_figwidth() > 5 else 8.5, color=theme.ink, x=0.02, ha="left")
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
        _panel(upper, theme, x, nll, "Δnll, nats", first_colour=0)
        _panel(lower, theme, x, memory, "memory,\nrelative", first_colour=3)
        for axes in (upper, lower):
            full_from = document["receptive_field_segments"]
            if x and full_from <= x[-1]:
                axes.axvspan(max(full_from, x[0]) - 0.5, x[-1] + 0.5, color=theme.grid, alpha=0.45, linewidth=0, zorder=0)
            axes.plot(starts, [0.0] * len(starts), transform=axes.get_xaxis_transform(), **_tick(theme))
            axes.margins(x=0.02)
        lower.set_xlabel("segment (shaded: memory full; ticks: a stream starts anew)", color=theme.muted)
        _integers(lower)

    return paint


def _panel(axes: Axes, theme: Theme, x: Sequence[int], curves: Sequence[Curve], ylabel: str, *, first_colour: int) -> None:
    axes.set_facecolor("none")
    axes.set_yscale("log")
    axes.set_ylabel(ylabel, color=theme.muted)
    axes.tick_params(which="both", colors=theme.muted, length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(theme.muted)
    axes.grid(True, axis="y", color=theme.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    top = max((bound for _, _, bound, _ in curves if bound is not None), default=1.0)
    for i, (label, values, bound, width) in enumerate(curves):
        colour = theme.series[(first_colour + i) % len(theme.series)]
        highest = 10 * max([top, *(value for value in values if value is not None and math.isfinite(value))])
        drawn = [highest if value is None or not math.isfinite(value) else max(value, FLOOR) for value in values]
        axes.plot(x, drawn, color=colour, linewidth=width, marker="o" if len(x) < 40 else None, markersize=3, label=label)
        if bound is not None:
            axes.axhline(bound, color=colour, linewidth=1.1, linestyle=(0, (5, 4)), zorder=1)
            axes.annotate(
                "bound",
                (1, bound),
                xycoords=("axes fraction", "data"),
                xytext=(-2, 2),
                textcoords="offset points",
                ha="right",
                fontsize=8.5,
                color=colour,
            )
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(-0.02, 1.0),
        ncols=3,
        frameon=False,
        labelcolor=theme.ink,
        handlelength=1.4,
        columnspacing=1.2,
        borderaxespad=0.2,
    )


def _tick(theme: Theme) -> dict[str, Any]:
    return {"linestyle": "none", "marker": "|", "markersize": 8, "markeredgewidth": 1.4, "color": theme.ink, "clip_on": False, "zorder": 3}


def _integers(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))


def _magnitude(value: float | None) -> float:
    return math.inf if value is None else abs(value)
