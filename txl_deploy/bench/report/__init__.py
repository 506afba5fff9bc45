"""From result files to something people read: tables on the terminal, one HTML page with its charts, Markdown for a README.

`findings` reads files, `series` names and judges rows, `tables`, `page`, `charts` and `markdown` show them.
"""

from txl_deploy.bench.report.findings import Findings, Training, flat_facts, gather, read_training, scores
from txl_deploy.bench.report.markdown import format_markdown
from txl_deploy.bench.report.page import write_report
from txl_deploy.bench.report.series import (
    BUSY_SHARE,
    disturbances,
    format_ms,
    format_perplexity,
    group_series,
)
from txl_deploy.bench.report.tables import format_summary, format_table

__all__ = [
    "BUSY_SHARE",
    "Findings",
    "Training",
    "disturbances",
    "flat_facts",
    "format_markdown",
    "format_ms",
    "format_perplexity",
    "format_summary",
    "format_table",
    "gather",
    "group_series",
    "read_training",
    "scores",
    "write_report",
]
