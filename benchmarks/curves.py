"""Training curves side by side: one picture and one table of several runs, and of other programs' curves if there are any.

    python benchmarks/curves.py LM-TFM --out LM-TFM/curves
    python benchmarks/curves.py ours=LM-TFM --other theirs=theirs.csv --out benchmarks/results/wikitext2_cpu2_202611_curves

A run is a work folder of `txl train` or its metrics.jsonl. Another program's curve is a CSV file with the columns step, train_loss and
valid_nll (nats per token; cells may be empty), or a JSON file that holds a list of such rows. Writes <out>.png and <out>.md.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import running  # noqa: F401  # makes the packages below importable

from txl_deploy.bench.plots import LIGHT, MARKERS, Theme
from txl_deploy.bench.report import read_training
from txl_train.errors import DataError, EnvironmentUnfitError, TxlError, UsageError
from txl_train.files import check_replaceable, whole_or_absent
from txl_train.metrics import bits_per_char, perplexity

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = ("step", "train_loss", "valid_nll")
DASHES: tuple[Any, ...] = ("solid", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
MOST_ROWS = 40

Points = list[tuple[int, float]]


@dataclass(frozen=True)
class Curve:
    """One training. Points are (step, nats per token), by rising step."""

    label: str
    train: Points
    """The loss averaged over the steps since the point before."""
    valid: Points
    in_bits: bool | None
    """Tokens are characters; None where that is not known."""


def labelled(text: str) -> tuple[str, Path]:
    """Split LABEL=PATH; without a label, it is the name of the folder or file."""
    label, mark, path = text.partition("=")
    if not mark or Path(text).exists():
        path = text
        label = Path(text).resolve().parent.name if Path(text).name == "metrics.jsonl" else Path(text).resolve().stem
    return label, Path(path)


def read_run(label: str, path: Path) -> Curve:
    """Read a work folder of `txl train`, or its metrics.jsonl. DataError if nothing is in it, ArtifactError if it is damaged."""
    file = path / "metrics.jsonl" if path.is_dir() else path
    course = read_training(file)
    if course is None:
        raise DataError(f"{file} holds no losses yet.", remedy="Train for some steps first.")
    return Curve(
        label, [(int(step), nats) for step, nats in course.train], [(int(step), nats) for step, nats in course.valid], course.in_bits
    )


def read_other(label: str, path: Path) -> Curve:
    """Read another program's curve from CSV or JSON.

    Raises:
        DataError: it cannot be read, or is not of that form.
    """
    try:
        text = path.read_text(encoding="utf-8")
        rows = json.loads(text) if path.suffix == ".json" else list(csv.DictReader(text.splitlines()))
        by_step: dict[int, dict[str, Any]] = {int(row["step"]): row for row in rows}
        unknown = sorted({str(name) for row in rows for name in row} - set(COLUMNS))
        if unknown:
            raise DataError(f"{path} has the column {unknown[0]}.", remedy=f"The columns are {', '.join(COLUMNS)}, in nats per token.")
        train, valid = (
            [(step, float(row[name])) for step, row in sorted(by_step.items()) if row.get(name) not in (None, "")] for name in COLUMNS[1:]
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{path} is no curve: {error}.", remedy=f"It needs rows of {', '.join(COLUMNS)}.") from error
    if not train and not valid:
        raise DataError(f"{path} holds no losses.", remedy=f"Its columns are {', '.join(COLUMNS)}.")
    return Curve(label, train, valid, None)


def smoothed(points: Points, half_life: float) -> Points:
    """Return averages over both sides, in which a value `half_life` steps away weighs half: noise goes, and the curve is not delayed."""

    def one_sided(ordered: Points) -> list[tuple[float, float]]:
        sums, total, weight = [], 0.0, 0.0
        before = ordered[0][0] if ordered else 0
        for step, value in ordered:
            decay = 0.5 ** (abs(step - before) / half_life)
            total, weight, before = total * decay + value, weight * decay + 1.0, step
            sums.append((total, weight))
        return sums

    past, future = one_sided(points), one_sided(points[::-1])[::-1]
    return [
        (step, (total + later_total - value) / (weight + later_weight - 1.0))
        for (step, value), (total, weight), (later_total, later_weight) in zip(points, past, future)
    ]


def common_steps(curves: Sequence[Curve]) -> list[int]:
    """Return the steps at which all were evaluated, or else at which all have a training loss: at most `MOST_ROWS`, the last among them."""
    for points_of in ([curve.valid for curve in curves], [curve.train for curve in curves]):
        steps = sorted(set.intersection(*({step for step, _ in points} for points in points_of)))
        if len(steps) > MOST_ROWS:
            return [steps[-1 - round(i * (len(steps) - 1) / (MOST_ROWS - 1))] for i in reversed(range(MOST_ROWS))]
        if steps:
            return steps
    return []


def mean_between(points: Points, after: int, upto: int) -> float | None:
    """Return the mean of the values at steps above `after` up to `upto`; None where there are none."""
    values = [value for step, value in points if after < step <= upto]
    return sum(values) / len(values) if values else None


def table(curves: Sequence[Curve], title: str, picture: str, half_life: float) -> str:
    """Return the curves as Markdown, side by side at their common steps."""
    in_bits = any(curve.in_bits for curve in curves)
    figure = "bits per character" if in_bits else "perplexity"
    pair = len(curves) == 2
    head = ["step", *(f"{curve.label}: training loss" for curve in curves), *(["difference"] if pair else [])]
    head += [*(f"{curve.label}: validation {figure}" for curve in curves), *(["difference"] if pair else [])]
    lines = [
        f"# {title}",
        "",
        f"![Training loss and validation {figure} by step: {', '.join(curve.label for curve in curves)}]({picture})",
        "",
        f"| {' | '.join(head)} |",
        f"|{'---:|' * len(head)}",
    ]
    steps = common_steps(curves)
    if not steps:
        return "\n".join([*lines[:-2], "There is no step at which all of them can be compared."]) + "\n"
    before = 0
    for step in steps:
        losses = [mean_between(curve.train, before, step) for curve in curves]
        nats = [dict(curve.valid).get(step) for curve in curves]
        scores = [None if nll is None else bits_per_char(nll) if in_bits else perplexity(nll) for nll in nats]
        cells = [f"{step:,}", *(_text(loss, 4) for loss in losses)]
        if pair:
            cells.append("" if losses[0] is None or losses[1] is None else f"{losses[1] - losses[0]:+.4f}")
        cells += [_text(score, 5 if in_bits else 2) for score in scores]
        if pair:
            cells.append("" if nats[0] is None or nats[1] is None else _difference(scores[0] or 0.0, scores[1] or 0.0, in_bits=in_bits))
        lines.append(f"| {' | '.join(cells)} |")
        before = step
    difference = f" Differences are {curves[1].label} less {curves[0].label}." if pair else ""
    lines += ["", f"Training loss: nats per token, mean over the steps since the row above.{difference}"]
    lines += [f"In the picture it is smoothed (a value {half_life:g} steps away weighs half), the thin lines are as logged."]
    return "\n".join(lines) + "\n"


def _text(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def _difference(first: float, second: float, *, in_bits: bool) -> str:
    return f"{second - first:+.5f}" if in_bits else f"{second / first - 1:+.2%}"


def draw(curves: Sequence[Curve], half_life: float) -> bytes:
    """Return the picture as PNG: training loss above, validation below, one axis of steps. EnvironmentUnfitError without matplotlib."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise EnvironmentUnfitError(
            "The picture needs matplotlib, which is not installed.", remedy="`pip install 'txl[report]'`."
        ) from error
    import io

    with matplotlib.rc_context({"font.family": "DejaVu Sans", "font.size": 10.5, "axes.unicode_minus": False, "text.color": LIGHT.ink}):
        figure = Figure(figsize=(6.6, 6.6), layout="constrained", facecolor=LIGHT.background)
        _paint(figure, LIGHT, curves, half_life)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=200, metadata={"Software": None})
    return buffer.getvalue()


def _paint(figure: Figure, theme: Theme, curves: Sequence[Curve], half_life: float) -> None:
    from matplotlib import ticker

    in_bits = any(curve.in_bits for curve in curves)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[1.15, 1])
    for i, curve in enumerate(curves):
        colour, dashes, width = theme.series[i % len(theme.series)], DASHES[i % len(DASHES)], 2.2 if i == 0 else 1.7
        if curve.train:
            above.plot(*zip(*curve.train), color=colour, linewidth=0.8, alpha=0.22)
            above.plot(*zip(*smoothed(curve.train, half_life)), color=colour, linewidth=width, linestyle=dashes, label=curve.label)
        if curve.valid:
            values = [(step, bits_per_char(nats) if in_bits else perplexity(nats)) for step, nats in curve.valid]
            mark: dict[str, Any] = {
                "marker": MARKERS[i % len(MARKERS)],
                "markersize": 5.5,
                "markerfacecolor": theme.background if i else colour,
            }
            below.plot(*zip(*values), color=colour, linewidth=width, linestyle=dashes, **mark, label=curve.label)
    _dress(above, theme, "training loss, nats per token")
    _dress(below, theme, "validation bits per character" if in_bits else "validation perplexity")
    if not in_bits and below.lines:
        below.set_yscale("log")
        low, high = below.get_ylim()
        few = high / low > 10
        below.yaxis.set_major_locator(ticker.LogLocator(base=10, subs=(1, 2, 5) if few else (1, 1.5, 2, 3, 4, 5, 6, 8), numticks=20))
        below.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,.10g}"))
        below.yaxis.set_minor_locator(ticker.NullLocator())
    below.set_xlabel("optimizer step", color=theme.muted)
    below.xaxis.set_major_locator(ticker.MaxNLocator(6, integer=True, steps=[1, 2, 2.5, 5, 10]))
    below.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,.0f}"))
    figure.align_ylabels()
    legend = above if above.get_legend_handles_labels()[0] else below
    legend.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=3, frameon=False, labelcolor=theme.ink, handlelength=2.6)


def _dress(axes: Axes, theme: Theme, ylabel: str) -> None:
    axes.set_ylabel(ylabel, color=theme.muted)
    axes.tick_params(which="both", colors=theme.muted, length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(theme.muted)
    axes.grid(True, axis="y", color=theme.grid, linewidth=0.8)
    axes.set_axisbelow(True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write picture and table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="[LABEL=]RUN", help="a work folder of `txl train`, or its metrics.jsonl")
    parser.add_argument("--other", action="append", default=[], metavar="[LABEL=]FILE", help="a curve of another program; may be repeated")
    parser.add_argument("--title", default="Training curves", help="heading of the table")
    parser.add_argument("--half-life", type=float, metavar="STEPS", help="of the smoothing  [default: a hundredth of the longest curve]")
    parser.add_argument("--out", type=Path, required=True, metavar="PATH", help="picture and table, without .png")
    own = parser.parse_args(arguments)
    try:
        picture, text = (Path(re.sub(r"\.(png|md)$", "", str(own.out)) + ending) for ending in (".png", ".md"))
        check_replaceable(picture, b"\x89PNG")
        check_replaceable(text, b"# ")
        if own.half_life is not None and not 0 < own.half_life < math.inf:
            raise UsageError(f"`--half-life` must be above 0, but is {own.half_life} instead.")
        curves = [read_run(*labelled(run)) for run in own.runs] + [read_other(*labelled(other)) for other in own.other]
        if len({curve.in_bits for curve in curves if curve.in_bits is not None}) > 1:
            raise UsageError("Some runs count in characters, others in words: their losses cannot be compared.")
        longest = max(step for curve in curves for points in (curve.train, curve.valid) for step, _ in points)
        half_life = own.half_life or max(1.0, longest / 100)
        image = draw(curves, half_life)
        with whole_or_absent(picture) as file:
            file.write(image)
        with whole_or_absent(text) as file:
            file.write(table(curves, own.title, picture.name, half_life).encode())
    except TxlError as error:
        print(f"Error: {error}", file=sys.stderr)
        return error.exit_code
    print(picture)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
