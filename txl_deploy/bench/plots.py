"""What all charts of the report have in common: themes, sizes, axes, legends, stamps, and the forms they are drawn in.

Knows how to draw so that it reads well on paper, on a phone and on a dark screen; what is drawn is the business of `plots_bench`,
`plots_training` and `plots_parity`, where it stands in the report that of `report`. matplotlib (extra `report`) is imported when
something is drawn.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

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
    bad: str
    series: tuple[str, ...]


LIGHT = Theme(
    ink="#1c2128",
    muted="#5b6672",
    grid="#e4e8ed",
    background="#ffffff",
    bad="#c0262d",
    series=("#2563eb", "#d9480f", "#0b8a6f", "#8b3fd6", "#a16a08", "#c2255c"),
)
DARK = Theme(
    ink="#e6edf3",
    muted="#9aa6b2",
    grid="#2c343d",
    background="#161b22",
    bad="#ff8b88",
    series=("#74a9ff", "#ff9248", "#3fd1a8", "#c099ff", "#f0c04f", "#f783ac"),
)
MARKERS = ("o", "s", "^", "D", "v", "P")
Size: TypeAlias = tuple[float, float]
WIDE, NARROW = (6.6, 4.0), (4.3, 3.7)
"""Figure sizes in inches: for half a desktop page, and for a phone. Type keeps its size, so it stays readable on both."""

STAMP = "UNVALIDATED"
"""What is written across the charts of figures that have no proof."""

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


def draw(
    name: str, title: str, description: str, paint: Paint, *, stamp: str | None = None, wide: Size = WIDE, narrow: Size = NARROW
) -> Chart:
    """Paint a chart in all themes, `wide` and `narrow` (inches); `stamp` is written across it. EnvironmentUnfitError without matplotlib."""

    def stamped(figure: Figure, theme: Theme) -> None:
        paint(figure, theme)
        if stamp is not None:
            look: dict[str, Any] = {"ha": "center", "va": "center", "rotation": 24, "fontweight": "bold", "color": theme.bad, "alpha": 0.2}
            figure.text(0.53, 0.5, stamp, fontsize=6.2 * figure.get_size_inches()[0], zorder=10, **look)

    return Chart(
        name=name,
        title=title,
        description=description,
        png=_render(stamped, LIGHT, wide, "png"),
        svg_light=_render(stamped, LIGHT, wide, "svg"),
        svg_dark=_render(stamped, DARK, wide, "svg"),
        svg_narrow_light=_render(stamped, LIGHT, narrow, "svg"),
        svg_narrow_dark=_render(stamped, DARK, narrow, "svg"),
    )


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


def new_axes(figure: Figure, theme: Theme, *, xlabel: str, ylabel: str, part: Any = (1, 1, 1)) -> Axes:
    """Add axes in the look of all charts; `part` is their place within the figure, as for `add_subplot`."""
    axes = figure.add_subplot(*part, facecolor="none")
    axes.set_xlabel(xlabel, color=theme.muted)
    axes.set_ylabel(ylabel, color=theme.muted)
    axes.tick_params(which="both", colors=theme.muted, length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(theme.muted)
    axes.grid(True, axis="y", color=theme.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    return axes


def add_legend(axes: Axes, theme: Theme) -> None:
    """Name the lines above the axes."""
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


def plain_log_ticks(axis: Any, low: float, high: float) -> None:
    """Label a logarithmic axis with ordinary numbers, closer together where it spans little."""
    tick = ticker()
    decades = math.log10(high / low) if low > 0 and high > low else 1.0
    if decades > 2.2:
        steps: tuple[float, ...] = (1.0,) if decades > 4 else (1.0, 3.0)
    else:
        steps = (1.0, 2.0, 5.0) if decades > 0.9 else (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0)
    axis.set_major_locator(tick.LogLocator(base=10, subs=steps, numticks=20))
    axis.set_major_formatter(tick.FuncFormatter(lambda value, _: short(value)))
    axis.set_minor_locator(tick.NullLocator())


def size_ticks(axes: Axes, sizes: Sequence[int]) -> None:
    """Mark the measured batch sizes; where they crowd, keep those at least half an octave apart."""
    kept: list[int] = []
    for size in sizes:
        if not kept or math.log2(size / kept[-1]) > 0.4:
            kept.append(size)
    axes.set_xticks(kept, [str(size) for size in kept])
    axes.xaxis.set_minor_locator(ticker().NullLocator())


def short(value: float) -> str:
    """Write a number for an axis: 500, 20k, 1.5M."""
    for limit, letter in ((1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            return f"{value / (1e6 if letter == 'M' else 1e3):g}{letter}"
    return f"{value:,.10g}"


def ticker() -> Any:
    """Return matplotlib's module of ticks."""
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
