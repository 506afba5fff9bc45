"""`txl bench train`: throughput of training at several batch sizes, on one device and on several, in FP32 and mixed precision."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import click

from txl_deploy.cli.options import command_line, echo_json, json_option, verbosity_options
from txl_train.errors import EnvironmentUnfitError, UsageError, ValidationError, nearest

if TYPE_CHECKING:
    from txl_deploy.bench.training import TrainingResult, TrainingRow
    from txl_deploy.bench.training_runs import Combination, TrainingSettings

DTYPES = ("fp32", "fp16", "bf16")
SUMMARY = ("Training time: ", "Training throughput: ")
"""What the specification's last two lines begin with."""

log = logging.getLogger(__name__)


@click.command("train", context_settings={"ignore_unknown_options": True})
@click.option("--config", metavar="NAME|FILE", help="A preset or a YAML file of settings, as for `txl train`.")
@click.option("--data", metavar="DIR", help="Folder of train.txt, valid.txt and test.txt.  [default: the config's]")
@click.option(
    "--batch-sizes", "--batch-size", default="16", show_default=True, metavar="SIZES", help="Streams of each process: a list, 1..32 or 1-8."
)
@click.option(
    "--processes", default="1", show_default=True, metavar="LIST", help="Processes that train together, each on a device of its own."
)
@click.option(
    "--dtypes", metavar="LIST", help=f"Precisions, of {', '.join(DTYPES)}.  [default: fp32 and fp16 on a GPU, fp32 and bf16 on a CPU]"
)
@click.option("--steps", type=click.IntRange(min=1), default=500, show_default=True, metavar="N", help="Optimizer steps of each training.")
@click.option(
    "--warmup",
    type=click.IntRange(min=0),
    default=20,
    show_default=True,
    metavar="N",
    help="Steps of these that the throughput leaves out.",
)
@click.option(
    "--batch-chunk",
    type=click.IntRange(min=1),
    metavar="N",
    help="Parts that a batch is split into to save memory.  [default: the config's]",
)
@click.option(
    "--out", "-o", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="Write the result with every step's time to FILE."
)
@json_option
@verbosity_options
@click.argument("training_options", nargs=-1, type=click.UNPROCESSED, metavar="[OPTIONS OF txl train]")
def command(
    config: str | None,
    data: str | None,
    batch_sizes: str,
    processes: str,
    dtypes: str | None,
    steps: int,
    warmup: int,
    batch_chunk: int | None,
    out: Path | None,
    as_json: bool,
    training_options: tuple[str, ...],
) -> None:
    """Measure how fast this machine trains, and print the specification's lines and its table of weak scaling.

    Each combination of batch size, processes and precision is a `txl train` of its own, from fresh weights, whose progress goes to standard
    error. All other options, such as `--set KEY=VALUE` or `--device cpu`, are handed on to it. What this machine cannot run (more GPUs than
    there are, more memory than there is) is skipped with the reason.

    Exit code 1 if a training diverged, ended early or was too short, 3 if none could be run.
    """
    from txl_deploy.bench.training_runs import MIXED, Combination, settings_of
    from txl_deploy.bench.workload import parse_batch_sizes
    from txl_train.device import resolve_device
    from txl_train.files import check_replaceable

    if out is not None:
        check_replaceable(out, b"{")
    precisions = None if dtypes is None else _dtypes(dtypes)
    sizes, counts = parse_batch_sizes(batch_sizes), _counts(processes)
    named = [word for option, value in (("--config", config), ("--data", data)) if value is not None for word in (option, value)]
    settings = settings_of([*named, *training_options], steps=steps, warmup_steps=warmup, batch_chunk=batch_chunk)
    device = resolve_device(settings.device).partition(":")[0]
    wanted = [
        Combination(processes=count, batch_size=size, dtype=dtype)
        for size in sizes
        for count in counts
        for dtype in precisions or ("fp32", MIXED[device])
    ]
    result = _measure(wanted, settings, device, quiet=as_json)
    if out is not None:
        result.write(out)
    if as_json:
        echo_json(result.to_dict())
    else:
        for line in _summary(result):
            click.echo(line)
    _judge(result.rows)


def _measure(wanted: list[Combination], settings: TrainingSettings, device: str, *, quiet: bool) -> TrainingResult:
    """Train one combination after the other; the specification's last lines of each go to standard output unless it is to be `quiet`."""
    import tempfile

    import torch

    from txl_deploy.bench.environment import describe_environment
    from txl_deploy.bench.training import TrainingResult
    from txl_deploy.bench.training_runs import run

    def hand_on(line: str) -> None:
        if line.startswith(SUMMARY) and not quiet:
            click.echo(line)
        else:
            log.info("%s", line)

    rows: list[TrainingRow] = []
    n_devices = torch.cuda.device_count() if device == "cuda" else None
    environment = describe_environment(threads=settings.resolved["train"]["threads"], device=device)
    with tempfile.TemporaryDirectory(prefix="txl-bench-train-", ignore_cleanup_errors=True) as folder:
        for number, combination in enumerate(wanted, 1):
            log.info("Training %d of %d: %s", number, len(wanted), combination)
            rows.append(run(combination, settings, Path(folder), device=device, n_devices=n_devices, on_line=hand_on))
            if not quiet:
                click.echo(_line(rows[-1]))
    return TrainingResult(command=command_line(), settings=settings.recorded(), environment=environment, rows=rows)


def _line(row: TrainingRow) -> str:
    """Return what a training came to, in one line."""
    if row.skipped is not None:
        return f"{row.name}: skipped: {row.skipped}"
    parts = []
    if row.tokens_per_s is not None:
        parts.append(f"{row.tokens_per_s:,.1f} tok/s")
        if row.tokens_per_s_interval_95 is not None:
            low, high = row.tokens_per_s_interval_95
            parts[-1] += f" (95 %: {low:,.1f} to {high:,.1f}) over {len(row.ms_per_step) - row.warmup_steps} steps"
    if row.mfu is not None:
        parts.append(f"{row.mfu:.1%} of the measured peak")
    if row.peak_memory_bytes is not None:
        parts.append(f"{row.peak_memory_bytes / 2**30:.2f} GiB")
    if row.loss_first is not None and row.loss_last is not None:
        parts.append(f"loss {row.loss_first:.2f} to {row.loss_last:.2f}")
    verdict = "VALID" if row.valid else f"INVALID: {'; '.join(row.invalid_reasons)}"
    return f"{row.name}: {', '.join([*parts, verdict])}"


def _summary(result: TrainingResult) -> list[str]:
    """Return the specification's table, once for each mixed precision."""
    from txl_deploy.bench.training import scaling_tables

    lines: list[str] = []
    for table in scaling_tables(result.rows):
        lines += ["", *table.lines()]
    return lines


def _judge(rows: list[TrainingRow]) -> None:
    """Raise the error that the command ends with, if it does not end well."""
    ran = [row for row in rows if row.skipped is None]
    if not ran:
        raise EnvironmentUnfitError(
            f"None of the trainings could be run here; the first, {rows[0].name}: {rows[0].skipped}.",
            remedy="Ask for smaller batch sizes or fewer processes, or choose another `--device`.",
        )
    invalid = [row for row in ran if not row.valid]
    if invalid:
        raise ValidationError(
            f"{len(invalid)} of {len(ran)} trainings are INVALID; the first, {invalid[0].name}: {'; '.join(invalid[0].invalid_reasons)}."
        )


def _dtypes(text: str) -> tuple[str, ...]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in DTYPES:
            raise UsageError(f"`{name}` is no precision of training; there is {', '.join(DTYPES)}.{nearest(name, DTYPES)}")
    return tuple(dict.fromkeys(names))


def _counts(text: str) -> tuple[int, ...]:
    words = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdigit() and int(word) for word in words):
        raise UsageError(f"`{text}` is no list of numbers of processes.", remedy="Write it as `--processes 1,2,4,8`.")
    return tuple(dict.fromkeys(map(int, words)))
