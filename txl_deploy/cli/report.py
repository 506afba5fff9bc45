"""`txl report`: one page of tables and charts from what a work folder holds."""

from __future__ import annotations

from pathlib import Path

import click

from txl_deploy.cli.options import echo_json, json_option, verbosity_options
from txl_train.errors import UsageError


@click.command("report")
@click.argument("files", nargs=-1, type=click.Path(path_type=Path), metavar="[FILES]...")
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
@click.option("--markdown", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="Write the tables as Markdown, too.")
@click.option(
    "--published",
    type=click.Choice(["v100", "t4", "all"]),
    help="Show the tables that NVIDIA published, in a section of their own: those of a GPU, or all.  [default: none]",
)
@json_option
@verbosity_options
def command(
    files: tuple[Path, ...],
    work_dir: Path | None,
    bench_files: tuple[Path, ...],
    metrics: Path | None,
    out: Path | None,
    markdown: Path | None,
    published: str | None,
    as_json: bool,
) -> None:
    """Write one self-contained HTML page, and its charts as PNG files beside it; the tables go to standard output too.

    FILES are results of any kind: benchmarks, training benchmarks, parity, receipts, evaluations, metrics.
    The page shows what was measured, on what, whether to believe it, and the command that measures it again.
    """
    from txl_deploy.bench.published import published_tables
    from txl_deploy.bench.report import format_markdown, format_summary, gather, write_report
    from txl_train.files import check_replaceable, whole_or_absent

    if work_dir is None and out is None and not files:
        if not bench_files and metrics is None:
            raise UsageError(
                "There is nothing to report on.",
                remedy="Name a work folder with `--work-dir DIR`, or a result with `--bench FILE --out FILE`.",
            )
        raise UsageError("It is not said where the page is to go.", remedy="Name it with `--out FILE`.")
    target = out if out is not None else (work_dir or files[0].parent) / "report.html"
    check_replaceable(target, b"<!doctype html>")
    found = gather(work_dir, bench_files, metrics, files=files)
    tables = published_tables(published) if published is not None else ()
    page, *charts = write_report(found, target, published=tables)
    if markdown is not None:
        with whole_or_absent(markdown) as file:
            file.write(format_markdown(found, tables).encode())
    if as_json:
        echo_json({"report": str(page), "charts": [str(path) for path in charts]})
    else:
        summary = format_summary(found)
        if summary:
            click.echo(f"{summary}\n")
        for path in (page, *charts):
            click.echo(path)
