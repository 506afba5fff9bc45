"""`txl bench compare`: two result files side by side; exit 1 if the new one is slower by more than is let pass."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from txl_deploy.cli.options import command_line, echo_json, json_option, verbosity_options
from txl_train.errors import ValidationError

if TYPE_CHECKING:
    from txl_deploy.bench.compare import Pair

SCHEMA, SCHEMA_VERSION = "txl.benchmark_comparison", 1


@click.command("compare")
@click.argument("old", type=click.Path(path_type=Path), metavar="A.json")
@click.argument("new", type=click.Path(path_type=Path), metavar="B.json")
@click.option(
    "--max-regression",
    default="2%",
    show_default=True,
    metavar="SHARE",
    help="Slower by how much is let pass: exit 1 if the whole 95 % interval of B over A lies above.",
)
@click.option("--percentile", default="50", show_default=True, metavar="P", help="Which percentile of the latency to compare, or `mean`.")
@click.option("--across-machines", is_flag=True, help="Compare files of different machines or thread counts, too.")
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE", help="Write the comparison as JSON, for `txl report`.")
@json_option
@verbosity_options
def command(old: Path, new: Path, max_regression: str, percentile: str, across_machines: bool, out: Path | None, as_json: bool) -> None:
    """Compare two files of `txl bench`: B over A, row by row, with a 95 % interval."""
    from txl_deploy.bench.compare import compare_results, parse_threshold
    from txl_deploy.bench.result import BenchResult
    from txl_deploy.bench.stats import parse_percentiles
    from txl_train.files import whole_or_absent

    threshold = parse_threshold(max_regression)
    p = None if percentile == "mean" else parse_percentiles(percentile)[0]
    pairs = compare_results(BenchResult.read(old), BenchResult.read(new), p=p, max_regression=threshold, across_machines=across_machines)
    document = document_of(pairs, threshold=threshold, files=(old.name, new.name), quantity="mean" if p is None else f"p{p:g}")
    if out is not None:
        with whole_or_absent(out) as file:
            file.write(json.dumps(document, indent=1, allow_nan=False).encode() + b"\n")
    if as_json:
        echo_json(document)
    else:
        click.echo(table(pairs, threshold=threshold, quantity=document["quantity"]))
    conclude(pairs, threshold)


def document_of(pairs: Sequence[Pair], *, threshold: float, files: tuple[str, str], quantity: str) -> dict[str, Any]:
    """Return a comparison as plain values for JSON."""
    return {
        "schema": SCHEMA,
        "schema_version": SCHEMA_VERSION,
        "command": command_line(),
        "files": list(files),
        "quantity": quantity,
        "max_regression": threshold,
        "rows": [
            {
                **{name: getattr(pair.new, name) for name in ("runtime", "provider", "dtype", "memory", "memory_dtype", "batch_size")},
                "processes": pair.new.processes,
                "boundary": pair.new.boundary,
                "comparison": None if pair.ratio is None else pair.ratio.to_dict(),
                "regression": pair.ratio is not None and pair.ratio.regression,
                "reason": pair.reason,
            }
            for pair in pairs
        ],
    }


def table(pairs: Sequence[Pair], *, threshold: float, quantity: str) -> str:
    """Return a comparison as text, one line a pair of rows."""
    lines = [f"Latency {quantity} of the second over the first, with its 95 % interval (below 1 is faster)"]
    for pair in pairs:
        name = f"{pair.old.runtime} {pair.old.dtype}"
        if pair.new.runtime != pair.old.runtime or pair.new.dtype != pair.old.dtype:
            name += f" -> {pair.new.runtime} {pair.new.dtype}"
        if pair.ratio is None:
            lines.append(f"{name:24} batch {pair.old.batch_size:>4}  not compared: {pair.reason}")
            continue
        low, high = pair.ratio.interval_95
        mark = f"  REGRESSION beyond {threshold:.1%}" if pair.ratio.regression else ""
        how = "paired" if pair.ratio.paired else "unpaired"
        lines.append(
            f"{name:24} batch {pair.old.batch_size:>4}  {pair.ratio.ratio:.4f}  [{low:.4f}, {high:.4f}]  {pair.ratio.verdict}, {how}, "
            f"n {pair.ratio.n_a} and {pair.ratio.n_b}{mark}"
        )
    return "\n".join(lines)


def conclude(pairs: Sequence[Pair], threshold: float) -> None:
    """Raise ValidationError if a pair is a regression, or nothing could be compared."""
    worse = [pair for pair in pairs if pair.ratio is not None and pair.ratio.regression]
    if worse:
        raise ValidationError(
            f"{len(worse)} of {len(pairs)} rows are slower by more than {threshold:.1%}.",
            remedy="Find what changed between the two, or let more pass with `--max-regression`.",
        )
    if all(pair.ratio is None for pair in pairs):
        raise ValidationError(
            f"None of {len(pairs)} rows could be compared: {pairs[0].reason}.", remedy="Measure again on an idle machine, for longer."
        )
