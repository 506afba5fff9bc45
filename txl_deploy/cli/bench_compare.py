"""`txl bench compare`: two result files side by side; exit 1 if the new one is slower by more than is let pass."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from txl_deploy.cli.options import command_line, echo_json, json_option, verbosity_options
from txl_train.errors import UsageError, ValidationError

if TYPE_CHECKING:
    from txl_deploy.bench.compare import Pair

_NAMES = ("runtime", "provider", "dtype", "memory", "memory_dtype", "batch_size", "processes", "boundary")


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
@click.option(
    "--accept-invalid",
    is_flag=True,
    help="End with 0 although rows could not be compared (INVALID, too few samples, another perplexity); they stay listed.",
)
@click.option(
    "--out", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="Write the comparison as JSON, for `txl report`."
)
@json_option
@verbosity_options
def command(
    old: Path,
    new: Path,
    max_regression: str,
    percentile: str,
    across_machines: bool,
    accept_invalid: bool,
    out: Path | None,
    as_json: bool,
) -> None:
    """Compare two files of `txl bench`: B over A, row by row, with a 95 % interval.

    Ends with 1 on a regression, and where rows of both files could not be compared. Rows that only one file has are listed.
    """
    from txl_deploy.bench.compare import compare_results, parse_threshold
    from txl_deploy.bench.report.series import lacks_proof
    from txl_deploy.bench.result import BenchResult
    from txl_deploy.bench.stats import parse_percentiles
    from txl_train.files import check_replaceable, whole_or_absent

    if out is not None:
        if any(_is_same_file(out, path) for path in (old, new)):
            raise UsageError(f"`--out {out}` is one of the files to compare, so it is not written over.", remedy="Name another file.")
        check_replaceable(out, b"{")
    threshold = parse_threshold(max_regression)
    p = None if percentile == "mean" else parse_percentiles(percentile)[0]
    results = BenchResult.read(old), BenchResult.read(new)
    pairs = compare_results(*results, p=p, max_regression=threshold, across_machines=across_machines)
    document = document_of(
        pairs,
        threshold=threshold,
        files=(old.name, new.name),
        unvalidated=(lacks_proof(results[0]), lacks_proof(results[1])),
        quantity="mean" if p is None else f"p{p:g}",
    )
    if out is not None:
        with whole_or_absent(out) as file:
            file.write(json.dumps(document, indent=1, allow_nan=False).encode() + b"\n")
    if as_json:
        echo_json(document)
    else:
        for file, is_so in zip(document["files"], document["unvalidated"]):
            if is_so:
                click.echo(f"UNVALIDATED: {file} was measured without proof, so nothing says what its rows compute.")
        click.echo(table(pairs, threshold=threshold, quantity=document["quantity"]))
    conclude(pairs, threshold, accept_invalid=accept_invalid)


def document_of(
    pairs: Sequence[Pair], *, threshold: float, files: tuple[str, str], unvalidated: tuple[bool, bool], quantity: str
) -> dict[str, Any]:
    """Return a comparison as plain values for JSON; `unvalidated` says of each file whether it was measured without proof."""
    from txl_deploy.bench.compare import SCHEMA, SCHEMA_VERSION
    from txl_deploy.bench.report.series import is_unproved

    return {
        "schema": SCHEMA,
        "schema_version": SCHEMA_VERSION,
        "command": command_line(),
        "files": list(files),
        "unvalidated": list(unvalidated),
        "quantity": quantity,
        "max_regression": threshold,
        "rows": [
            {
                **{name: getattr(pair.rows[-1], name) for name in _NAMES},
                "in_files": [pair.old is not None, pair.new is not None],
                "unvalidated": any(map(is_unproved, pair.rows)),
                "comparison": None if pair.ratio is None else pair.ratio.to_dict(),
                "regression": pair.ratio is not None and pair.ratio.regression,
                "reason": pair.reason,
            }
            for pair in pairs
        ],
    }


def table(pairs: Sequence[Pair], *, threshold: float, quantity: str) -> str:
    """Return a comparison as text, one line a pair of rows."""
    from txl_deploy.bench.report.series import is_unproved

    lines = [f"Latency {quantity} of the second over the first, with its 95 % interval (below 1 is faster)"]
    for pair in pairs:
        row = pair.rows[0]
        start = f"{f'{row.runtime} {row.dtype}':24} batch {row.batch_size:>4}"
        unproved = ", UNVALIDATED" if any(map(is_unproved, pair.rows)) else ""
        if pair.ratio is None:
            lines.append(f"{start}  not compared: {pair.reason}{unproved}")
            continue
        low, high = pair.ratio.interval_95
        mark = f"  REGRESSION beyond {threshold:.1%}" if pair.ratio.regression else ""
        how = "paired" if pair.ratio.paired else "unpaired"
        lines.append(
            f"{start}  {pair.ratio.ratio:.4f}  [{low:.4f}, {high:.4f}]  {pair.ratio.verdict}, {how}, "
            f"n {pair.ratio.n_a} and {pair.ratio.n_b}{unproved}{mark}"
        )
    alone = sum(pair.is_alone for pair in pairs)
    if alone:
        lines.append(f"{alone} of {len(pairs)} rows stand in one file only; that alone is no failure.")
    return "\n".join(lines)


def conclude(pairs: Sequence[Pair], threshold: float, *, accept_invalid: bool = False) -> None:
    """Raise ValidationError if a pair is a regression, or could not be compared (unless `accept_invalid`), or none could be.

    A row whose perplexity is not its checkpoint's fails in any case.

    Rows that only one file has do not count.
    """
    pairs = [pair for pair in pairs if not pair.is_alone]
    worse = [pair for pair in pairs if pair.ratio is not None and pair.ratio.regression]
    if worse:
        raise ValidationError(
            f"{len(worse)} of {len(pairs)} rows are slower by more than {threshold:.1%}.",
            remedy="Find what changed between the two, or let more pass with `--max-regression`.",
        )
    without = [pair for pair in pairs if pair.ratio is None]
    if without and len(without) == len(pairs):
        raise ValidationError(
            f"None of {len(pairs)} rows could be compared: {without[0].reason}.", remedy="Measure again on an idle machine, for longer."
        )
    failed = [pair for pair in without if any(row.verified is False for row in pair.rows)]
    if without and (failed or not accept_invalid):
        without_first = (failed or without)[0]
        row = without_first.rows[0]
        raise ValidationError(
            f"{len(without)} of {len(pairs)} rows could not be compared, the first of {row.runtime} {row.dtype} at batch size "
            f"{row.batch_size}: {without_first.reason}.",
            remedy="Measure again on an idle machine, for longer; or leave such rows out with `--accept-invalid`.",
        )


def _is_same_file(out: Path, other: Path) -> bool:
    with contextlib.suppress(OSError):
        return out.samefile(other)
    return False
