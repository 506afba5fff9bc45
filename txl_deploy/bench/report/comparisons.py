"""Comparisons as a reader meets them: of `txl bench --ab` within one result, and of files that `txl bench compare --out` wrote.

Knows both documents, and puts their ratios into lines of one table. What a ratio is, and when it is a regression, is `bench.compare`'s
business; how tables look is that of the page and of the Markdown.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from txl_deploy.bench.report.findings import Findings
from txl_deploy.bench.report.series import group_series, unsound
from txl_deploy.bench.result import BenchResult

HEADER = ("Rows", "Batch size", "Quantity", "Ratio", "95 % interval", "Verdict")


@dataclass(frozen=True)
class ComparisonLine:
    """How two rows compare; below 1, the second is faster."""

    what: str
    batch_size: str
    quantity: str
    ratio: str
    interval: str
    verdict: str
    state: str
    """good, bad or unknown."""

    @property
    def cells(self) -> tuple[str, ...]:
        """All of it for a row of a table, below HEADER."""
        return (self.what, self.batch_size, self.quantity, self.ratio, self.interval, self.verdict)


@dataclass(frozen=True)
class Comparison:
    """One comparison, of some pairs of rows."""

    name: str
    """Of the file that holds it."""
    title: str
    lines: tuple[ComparisonLine, ...]
    stamps: tuple[str, ...] = ()
    """One sentence for each file that was measured without proof."""

    @property
    def regressions(self) -> int:
        """Lines that are slower by more than is let pass."""
        return sum(line.state == "bad" for line in self.lines)

    @property
    def uncompared(self) -> int:
        """Lines without a ratio, or of rows that are not to be believed."""
        return sum(line.state == "unknown" for line in self.lines)


def comparisons_of(found: Findings) -> list[Comparison]:
    """Return all comparisons, those within results first."""
    within = [_of_result(name, result) for name, result in found.benches if result.comparisons]
    return within + [_of_document(name, document) for name, document in found.comparisons]


def _of_result(name: str, result: BenchResult) -> Comparison:
    labels = {id(row): series.label for series in group_series(result.rows) for row in series.rows}
    first, second = (labels[id(row)] for row in result.rows[:2]) if len(result.rows) > 1 else ("the first", "the second")
    lines = []
    for entry in result.comparisons:
        size = entry.get("batch_size")
        spoiled = dict.fromkeys(unsound(row) for row in result.rows if row.batch_size == size and unsound(row))
        lines.append(_line(f"{second} / {first}", size, entry, f"not to be believed: {', '.join(spoiled)}" if spoiled else ""))
    return Comparison(name, f"Latency of {second} over {first}, by pairs of turns", tuple(lines))


def _of_document(name: str, document: Mapping[str, Any]) -> Comparison:
    files = [str(file) for file in document.get("files") or ()]
    first, second = files if len(files) == 2 else ("the first file", "the second file")
    entries = [entry for entry in document.get("rows") or () if isinstance(entry, Mapping)]
    lines = [
        _line(f"{entry.get('runtime', '?')} {entry.get('dtype', '')}", entry.get("batch_size"), entry.get("comparison"), _reason(entry))
        for entry in entries
    ]
    stamps = [f"UNVALIDATED: {file} was measured without proof" for file, is_so in zip(files, document.get("unvalidated") or ()) if is_so]
    return Comparison(name, f"Latency of {second} over {first}", tuple(lines), tuple(stamps))


def _reason(entry: Mapping[str, Any]) -> str:
    return f"not compared: {entry.get('reason') or 'no reason given'}" if not entry.get("comparison") else ""


def _line(what: str, batch_size: object, ratio: object, doubt: str) -> ComparisonLine:
    """Return one line; figures that a damaged file lacks are dashes."""
    values = ratio if isinstance(ratio, Mapping) else {}
    interval = values.get("interval_95")
    ends = [_figure(end) for end in interval] if isinstance(interval, (list, tuple)) and len(interval) == 2 else []
    is_worse = values.get("regression") is True
    verdict = str(values.get("verdict", "")) + (", REGRESSION" if is_worse else "")
    return ComparisonLine(
        what=what.strip(),
        batch_size=str(batch_size),
        quantity=str(values.get("quantity", "–")),
        ratio=_figure(values.get("ratio")),
        interval=" to ".join(ends) or "–",
        verdict="; ".join(part for part in (verdict, doubt) if part) or "–",
        state="bad" if is_worse else "unknown" if doubt or not values else "good",
    )


def _figure(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, (int, float)) and not isinstance(value, bool) else "–"
