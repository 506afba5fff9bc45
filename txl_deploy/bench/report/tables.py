"""The tables that a terminal shows: the specification's columns, verdicts, perplexities of whole splits.

Knows how to lay out text; what rows are called and how their numbers are written is said in `series`.
"""

from __future__ import annotations

from collections.abc import Sequence

from txl_deploy.bench.report.findings import Findings, scores
from txl_deploy.bench.report.series import (
    REFERENCE_MARK,
    UNVALIDATED,
    doubts,
    format_ms,
    format_perplexity,
    format_tokens_per_s,
    group_series,
    invalid_rows,
    is_unproved,
    lacks_proof,
    remarks,
    validity_of,
    verdict_of,
)
from txl_deploy.bench.result import Row
from txl_deploy.bench.stats import STANDARD_PERCENTILES, minimum_samples


def format_table(rows: Sequence[Row], percentiles: Sequence[float] = STANDARD_PERCENTILES) -> str:
    """Return the specification's table for a terminal: all series one below the other, then notes on what to doubt.

    A percentile from too few samples carries an asterisk, a row without proof the word UNVALIDATED.
    """
    head = [
        ["", "Batch", "Seq.", "Memory", "Throughput", "Latency", *("" for _ in percentiles), "", "", "", ""],
        [
            "Runtime",
            "size",
            "length",
            "length",
            "tok/s",
            "avg ms",
            *(f"{p:g}%" for p in percentiles),
            "n",
            "Perplexity",
            "Verified",
            "Valid",
        ],
    ]
    body: list[list[str]] = []
    for series in group_series(rows):
        for row in series.rows:
            cells = [series.label.removesuffix(REFERENCE_MARK), str(row.batch_size), str(row.tgt_len), str(row.mem_len)]
            cells += [format_tokens_per_s(row.tokens_per_s), format_ms(row.latency.mean_ms)]
            for p in percentiles:
                doubtful = row.latency.n < minimum_samples(p)
                cells.append(format_ms(row.latency.percentile_ms(p)) + ("*" if doubtful else " "))
            cells += [str(row.latency.n), format_perplexity(row.perplexity), verdict_of(row)]
            cells.append(validity_of(row) + (", UNVALIDATED" if is_unproved(row) else ""))
            body.append(cells)
    widths = [max(len(line[i]) for line in head + body) for i in range(len(head[0]))]
    left_aligned = (0, len(widths) - 2, len(widths) - 1)

    def line_of(cells: Sequence[str], *, is_head: bool = False) -> str:
        padded = [
            cell.ljust(width) if i in left_aligned else (cell + " " if is_head and 6 <= i < 6 + len(percentiles) else cell).rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths))
        ]
        return "  ".join(padded).rstrip()

    lines = [line_of(cells, is_head=True) for cells in head]
    lines.append("-" * max(len(line) for line in lines + [line_of(cells) for cells in body]))
    lines += [line_of(cells) for cells in body]
    footnotes = [f"* {doubt}" for doubt in doubts(rows, percentiles)] + invalid_rows(rows) + remarks(rows)
    return "\n".join(lines + (["", *footnotes] if footnotes else []))


def format_summary(found: Findings) -> str:
    """Return for a terminal what the page shows first: the tables of latency, perplexities of whole splits, verdicts of parity."""
    parts = [
        (f"{UNVALIDATED}\n" if lacks_proof(result) else "") + format_table(result.rows, result.percentiles) for _, result in found.benches
    ]
    listed = scores(found)
    if listed:
        head = f"{'Perplexity of a whole split':<28}{'split':>7}{'perplexity':>12}{'tokens':>12}"
        lines = [
            f"{score.model:<28}{score.split:>7}{format_perplexity(score.perplexity):>12}{score.n_tokens or 0:>12,}" for score in listed
        ]
        parts.append("\n".join([head, "-" * len(head), *lines]))
    verdicts = [
        f"Parity {'passed' if document.get('passed') is True else 'FAILED'}: {document.get('runtime', name)}: {document.get('reason', '')}"
        for name, document in found.parities
    ]
    if verdicts:
        parts.append("\n".join(verdicts))
    return "\n\n".join(parts)
