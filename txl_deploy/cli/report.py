"""`txl report`: one page of tables and charts from what a work folder holds."""

from __future__ import annotations

from pathlib import Path

import click

from txl_deploy.cli.options import echo_json, json_option, verbosity_options
from txl_train.errors import UsageError


@click.command("report")
@click.option(
    "--work-dir",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder with benchmark*.json, metrics.jsonl, parity*.json and baselines.json; what is missing is left out.",
)
@click.option(
    "--bench",
    "bench_files",
    type=click.Path(path_type=Path),
    multiple=True,
    metavar="FILE",
    help="A result of `txl bench`; may be given several times.  [default: benchmark*.json in the folder]",
)
@click.option(
    "--metrics",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The metrics of a training run.  [default: metrics.jsonl in the folder]",
)
@click.option(
    "--out",
    "-o",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="The page to write.  [default: report.html in the folder]",
)
@json_option
@verbosity_options
def command(work_dir: Path | None, bench_files: tuple[Path, ...], metrics: Path | None, out: Path | None, as_json: bool) -> None:
    """Write one self-contained HTML page, and its charts as PNG files beside it; the tables go to standard output too.

    The page shows what was measured, on what, whether to believe it, and the command that measures it again.
    """
    from txl_deploy.bench.report import format_summary, gather, write_report
    from txl_train.files import check_replaceable

    if work_dir is None and out is None:
        if not bench_files and metrics is None:
            raise UsageError(
                "There is nothing to report on.",
                remedy="Name a work folder with `--work-dir DIR`, or a result with `--bench FILE --out FILE`.",
            )
        raise UsageError("It is not said where the page is to go.", remedy="Name it with `--out FILE`.")
    target = out if out is not None else (work_dir or Path()) / "report.html"
    check_replaceable(target, b"<!doctype html>")
    found = gather(work_dir, bench_files, metrics)
    page, *charts = write_report(found, target)
    if as_json:
        echo_json({"report": str(page), "charts": [str(path) for path in charts]})
    else:
        summary = format_summary(found)
        if summary:
            click.echo(f"{summary}\n")
        for path in (page, *charts):
            click.echo(path)
