"""Result tables as Markdown, for a README or a results file: the specification's columns, each with where its numbers come from.

Knows Markdown; what is shown is what the page shows.
"""

from __future__ import annotations

from collections.abc import Sequence

from txl_deploy.bench.published import PublishedTable
from txl_deploy.bench.report.comparisons import HEADER, Comparison, comparisons_of
from txl_deploy.bench.report.findings import Findings
from txl_deploy.bench.report.series import (
    UNVALIDATED,
    doubts,
    format_ms,
    format_perplexity,
    format_tokens_per_s,
    group_series,
    headline,
    invalid_rows,
    is_unproved,
    lacks_proof,
    shown_percentiles,
    specification_heading,
    validity_of,
    verdict_of,
)
from txl_deploy.bench.stats import minimum_samples
from txl_deploy.bench.training import scaling_tables


def format_markdown(found: Findings, published: Sequence[PublishedTable] = ()) -> str:
    """Return the tables of all results, then those published by others, each under its own heading."""
    blocks: list[str] = []
    for name, result in found.benches:
        percentiles = shown_percentiles(result)
        blocks.append(f"{headline(result)}. Source: `{name}`.")
        if lacks_proof(result):
            blocks.append(f"**{UNVALIDATED}**")
        for series in group_series(result.rows):
            header = ["Batch size", "Sequence length", "Memory length", "Throughput Avg (tok/s)", "Latency Avg (ms)"]
            header += [f"Latency {p:g}% (ms)" for p in percentiles] + ["Samples", "Perplexity", "Verified", "Valid"]
            rows = []
            for row in series.rows:
                cells = [str(row.batch_size), str(row.tgt_len), str(row.mem_len)]
                cells += [format_tokens_per_s(row.tokens_per_s), format_ms(row.latency.mean_ms)]
                cells += [format_ms(row.latency.percentile_ms(p)) + _star(row.latency.n < minimum_samples(p)) for p in percentiles]
                cells += [f"{row.latency.n:,}", format_perplexity(row.perplexity), verdict_of(row)]
                rows.append([*cells, validity_of(row) + (", UNVALIDATED" if is_unproved(row) else "")])
            mark = " (reference)" if series.is_reference else ""
            blocks += [f"**{_escape(specification_heading(series.rows[0]))}**{mark} · {_escape(series.title)}", table(header, rows)]
        blocks += [f"\\* {_escape(doubt)}" for doubt in doubts(result.rows, percentiles)]
        blocks += [_escape(sentence) for sentence in invalid_rows(result.rows)]
        blocks.append(f"Measured by `{result.command}`.")
    for comparison in comparisons_of(found):
        blocks += _comparison(comparison)
    for name, training in found.training_benchmarks:
        blocks += [f"Training throughput. Source: `{name}`.", *("\n".join(t.lines()) for t in scaling_tables(training.rows))]
        blocks.append(f"Measured by `{training.command}`.")
    for published_table in published:
        blocks.append(f"**Published by {published_table.publisher}, not measured here: {published_table.section}**")
        blocks.append(
            f"{published_table.heading + '. ' if published_table.heading else ''}{published_table.device}; {published_table.conditions}. "
            f"Source: {published_table.source}."
        )
        blocks.append(table(published_table.columns, published_table.rows))
    return "\n\n".join(blocks) + "\n"


def _comparison(comparison: Comparison) -> list[str]:
    stamps = [f"**{_escape(stamp)}**" for stamp in comparison.stamps]
    title = f"{_escape(comparison.title)}. Source: `{comparison.name}`."
    return [title, *stamps, table(HEADER, [line.cells for line in comparison.lines])]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return an aligned Markdown table, figures to the right."""
    lines = [[_escape(cell) for cell in row] for row in (header, *rows)]
    widths = [max(3, *(len(row[i]) for row in lines)) for i in range(len(header))]
    rule = ["-" * (width - 1) + ":" for width in widths]
    return "\n".join(f"| {' | '.join(c.rjust(w) for c, w in zip(row, widths))} |" for row in (lines[0], rule, *lines[1:]))


def _star(doubtful: bool) -> str:
    return "\\*" if doubtful else ""


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")
