"""The outcome of a self-test for readers: as lines for a terminal and as the Markdown of docs/mutations.md."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from txl_deploy.parity.mutations import CHECKS, Check
from txl_deploy.parity.self_test import MARGIN, Finding, Row, SelfTest, size

COLUMNS = ("mutation", "made in", "caught by", "measured", "bound", "times its bound", "switched off")

COMMAND = "txl parity --self-test --out docs/mutations.md"

_COMMANDS: dict[Check, str] = {
    "parity": "txl parity",
    "receipt": "receipt",
    "claims": "claim audit",
    "verify": "txl verify",
    "export": "txl export",
}


def lines(test: SelfTest) -> Iterator[str]:
    """Yield the table as lines of columns, and what is wrong, if anything is."""
    rows = [COLUMNS, *(cells(row) for row in test.rows)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()
    for told in test.examples:
        yield f"made of: {told}"
    yield from faults(test)


def faults(test: SelfTest) -> Iterator[str]:
    """Yield a clause for each mutation that was not found, and for each check that found something where none was made."""
    for row in test.rows:
        if row.passed:
            continue
        name, expected = row.mutation.name, row.mutation.expected
        if not row.caught:
            weakest = row.weakest(expected)
            yield f"{name} was not found by {_COMMANDS[expected]}{_at(weakest)}: {weakest.reason}"
        for findings in row.control.values():
            for finding in findings:
                if finding.failed:
                    yield f"{name}, switched off, was flagged by {_COMMANDS[finding.check]}{_at(finding)}: {finding.reason}"


def _at(finding: Finding) -> str:
    return "" if finding.ratio is None else f" at {times(finding.ratio)} its bound"


def cells(row: Row) -> tuple[str, ...]:
    """Return the row's cells, in the order of `COLUMNS`: of the check that has to find it, in the text where it finds least."""
    mutation = row.mutation
    if row.skipped is not None:
        return (mutation.name, mutation.where, f"not applicable: {row.skipped}", "", "", "", "")
    found, control = row.weakest(mutation.expected), row.strongest_control()
    caught_by = ", ".join(_COMMANDS[check] for check in row.caught_by) or "NOTHING"
    if found.measured is None or found.bound is None:
        return (mutation.name, mutation.where, caught_by, found.quantity, "exact", "exact", _off(row, control))
    measured = f"{found.measured:.2g} ({found.quantity})"
    return (mutation.name, mutation.where, caught_by, measured, f"{found.bound:.1e}", times(found.ratio), _off(row, control))


def _off(row: Row, control: Finding) -> str:
    """What the same check measures with the switch off; a check without tolerance finds nothing or something."""
    if not row.control_passed:
        return "FLAGGED"
    return "not flagged" if control.ratio is None else f"not flagged: {times(control.ratio)}"


def times(ratio: float | None) -> str:
    """Return a ratio to two digits."""
    if ratio is None or not math.isfinite(ratio):
        return "∞"
    if ratio < 10:
        return f"{ratio:.2g}"
    digits = 10 ** (math.floor(math.log10(ratio)) - 1)
    return f"{round(ratio / digits) * digits:,.0f}"


def markdown(test: SelfTest, *, command: str = COMMAND) -> str:
    """Return the document."""
    parts = [
        "# Mutations: the mistakes the checks must find",
        f"Written by `{command}`; do not edit. The tests compare it with the code.",
        "Each row is a mistake that exports of Transformer-XL, or of models like it, were shipped with or may easily have, made again on "
        "purpose in a faithful export. The checks are those that users run. A mistake counts as found if its check fails in every text by "
        "at least "
        f"{MARGIN:.0f} times its bound; the figures are those of the text where least was found. *Switched off* is the same way through "
        "without the mistake, which no check may flag: the figure is how near the check then comes to its bound (1).",
        "Made of: " + "; ".join(test.examples) + ".",
        _table(COLUMNS, [cells(row) for row in test.rows]),
        "## What each check found",
        "Times its bound, the least of all texts; *found* by a check without tolerance; – not found; empty: not run, as an export that is "
        "refused on opening is not scored. Graphs have a manifest with the right checksums, as if the exporter had made the mistake. Only "
        "`txl verify` looks at them with the manifest they had before, as if somebody had changed them by hand.",
        _table(("mutation", *(_COMMANDS[check] for check in CHECKS)), [_by_check(row) for row in test.rows]),
        "\n".join(f"- **{_COMMANDS[check]}**: {what}" for check, what in CHECKS.items()),
        "## What each is, and where it happened",
        "\n".join(
            f"- **{mutation.name}** ({mutation.where}, {mutation.dtype}): {mutation.what}. *Where it happened:* {mutation.history}."
            for mutation in (row.mutation for row in test.rows)
        ),
    ]
    return "\n\n".join(parts) + "\n"


def _by_check(row: Row) -> tuple[str, ...]:
    found = [min(findings, key=size) if (findings := row.found.get(check)) else None for check in CHECKS]
    return (row.mutation.name, *("" if finding is None else _told(finding) for finding in found))


def _told(finding: Finding) -> str:
    if finding.ratio is None:
        return "found" if finding.failed else "–"
    return times(finding.ratio) if finding.failed else f"– ({times(finding.ratio)})"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    all_rows = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in all_rows)
