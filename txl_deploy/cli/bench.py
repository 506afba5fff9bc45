"""`txl bench`: latency, throughput and perplexity of exported models side by side; exit 1 where a number has no proof.

Its subcommands compare results, and measure generation and training. Started by torchrun, several processes share the streams, each on a
device of its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import click

from txl_deploy.cli.bench_verdicts import Verdicts, proof_lines
from txl_deploy.cli.lazy import LazyGroup
from txl_deploy.cli.lengths import length_options, memory_option
from txl_deploy.cli.options import (
    command_line,
    data_options,
    device_option,
    dtype_option,
    json_option,
    threads_option,
    verbosity_options,
)
from txl_deploy.cli.progress import progress
from txl_deploy.cli.together import all_or_none, device_of, first_alone_reports
from txl_train.errors import EnvironmentUnfitError, UsageError

if TYPE_CHECKING:
    from txl_deploy.bench.harness import BenchSettings, Contender
    from txl_deploy.bench.result import BenchResult, Row
    from txl_deploy.bench.workload import Workload
    from txl_deploy.manifest import Dtype
    from txl_deploy.opening import Lengths
    from txl_deploy.runtimes.base import RuntimeInfo
    from txl_train.config import MemoryKind
    from txl_train.distributed import World

PERCENT = 100
RUNTIMES = ("pytorch", "compiled", "torchscript", "onnx")
BOUNDARY_NAMES = ("step_device_resident", "step_with_token_h2d", "step_with_state_roundtrip")
SAVE_DATA_NAME = "benchmark.json"
COMMANDS = {
    "compare": ("txl_deploy.cli.bench_compare:command", "Compare two results: ratios with intervals, and exit 1 on a regression."),
    "generate": ("txl_deploy.cli.bench_generate:command", "Generation: time to the first token, tokens per second."),
    "train": ("txl_deploy.cli.bench_train:command", "Throughput of training by batch size, precision and number of processes."),
}

log = logging.getLogger(__name__)


@click.group("bench", cls=LazyGroup, table=COMMANDS, invoke_without_command=True, subcommand_metavar="[compare|generate|train ...]")
@click.option(
    "--artifact",
    "artifacts",
    type=click.Path(path_type=Path),
    multiple=True,
    metavar="DIR",
    help="A folder that `txl export` wrote, with a receipt of `txl eval` in it; may be given several times.",
)
@click.option(
    "--receipt",
    "receipts",
    type=click.Path(path_type=Path, dir_okay=False),
    multiple=True,
    metavar="FILE",
    help="A receipt that does not lie in its artifact's folder; may be given several times.",
)
@click.option("--unvalidated", is_flag=True, help="Measure an artifact without a receipt too: every row, file and chart is marked.")
@click.option(
    "--checkpoint",
    "--model",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Measure this checkpoint in eager PyTorch, FP32, too, and check every row's perplexity against it.",
)
@click.option(
    "--runtimes",
    metavar="LIST",
    help=f"What to run the checkpoint with, of {', '.join(RUNTIMES)}; the last two are exported on the way.  [default: pytorch]",
)
@click.option("--fp16", is_flag=True, help="The same as --dtype fp16.")
@dtype_option("of the checkpoint in --runtimes; what the rows are checked against is fp32 in any case.  [default: fp32]")
@memory_option
@data_options
@click.option(
    "--batch-sizes",
    "--batch-size",
    default="1..32",
    show_default=True,
    metavar="SIZES",
    help="Streams read in parallel: 1..32 doubles (1,2,4,8,16,32), 1-8 is each, 1,3,5 a list.",
)
@click.option(
    "--percentiles", default="50,90,95,99", show_default=True, metavar="LIST", help="Percentiles of the latency to show, in percent."
)
@click.option(
    "--duration",
    type=float,
    default=10.0,
    show_default=True,
    metavar="S",
    help="Seconds that the slowest runtime is timed at each batch size.",
)
@click.option(
    "--min-samples",
    type=int,
    metavar="N",
    help="Timed steps at least.  [default: what the largest percentile needs to be sound, 662 for p99, 130 for p95]",
)
@click.option("--max-samples", type=int, default=20000, show_default=True, metavar="N", help="Timed steps at most.")
@click.option(
    "--max-duration",
    type=float,
    default=60.0,
    show_default=True,
    metavar="S",
    help="Timed seconds at most of the slowest runtime at each batch size, even if that leaves fewer samples.",
)
@click.option(
    "--warmup",
    type=int,
    default=10,
    show_default=True,
    metavar="N",
    help="Steps before the clock counts, at least; more until the memory is full and the timing steady.",
)
@click.option(
    "--boundary",
    type=click.Choice(list(BOUNDARY_NAMES)),
    default=BOUNDARY_NAMES[0],
    show_default=True,
    help="What lies between the two readings of the clock: a step on data that is on the device, with tokens copied to it, or with tokens "
    "and memory copied to it and memory and nll back.",
)
@click.option("--accept-invalid", is_flag=True, help="End with 0 although rows are INVALID (noise, too few samples); they stay marked.")
@click.option("--target-perplexity", type=float, metavar="X", help="Exit 1 if the perplexity of any row's timed steps is above X.")
@click.option("--target-throughput", type=float, metavar="X", help="Exit 1 if any row scores fewer than X tokens per second.")
@click.option("--ab", is_flag=True, help="Compare the two that are measured, pair by pair of their turns; exit 1 if the second is slower.")
@click.option(
    "--max-regression",
    default="2%",
    show_default=True,
    metavar="SHARE",
    help="With --ab: how much slower the second may be, by its interval's lower end.",
)
@click.option("--save-data", is_flag=True, help=f"The same as --out {SAVE_DATA_NAME}.")
@length_options
@click.option(
    "--out",
    "-o",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Write the result with all samples to FILE, for `txl report`.",
)
@device_option
@threads_option
@json_option
@verbosity_options
@click.pass_context
def command(
    context: click.Context,
    artifacts: tuple[Path, ...],
    receipts: tuple[Path, ...],
    unvalidated: bool,
    checkpoint: Path | None,
    runtimes: str | None,
    fp16: bool,
    dtype: str | None,
    memory: str | None,
    dataset: str | None,
    data: Path | None,
    split: str,
    batch_sizes: str,
    percentiles: str,
    duration: float,
    min_samples: int | None,
    max_samples: int,
    max_duration: float,
    warmup: int,
    boundary: str,
    accept_invalid: bool,
    target_perplexity: float | None,
    target_throughput: float | None,
    ab: bool,
    max_regression: str,
    save_data: bool,
    tgt_len: int | None,
    mem_len: int | None,
    ext_len: int | None,
    clamp_len: int | None,
    same_length: bool | None,
    out: Path | None,
    device: str,
    threads: int | None,
    as_json: bool,
) -> None:
    """Measure exported models, or a checkpoint in several runtimes, side by side on real text.

    An artifact needs a receipt for the same text and lengths (`txl eval --artifact DIR`). All take turns on the same tokens, by one clock,
    from one cold start. The perplexity of the timed steps is compared with the checkpoint's and the receipt's; a difference ends with 1, as
    does a row whose figures are not to be believed. Several devices: torchrun --nproc-per-node 2 --no-python txl bench ...
    """
    if context.invoked_subcommand is not None:
        given = [name for name in context.params if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE]
        if given:
            option = given[0].replace("_", "-")
            raise UsageError(f"`--{option}` stands before `{context.invoked_subcommand}`, which has options of its own: put it behind.")
        return
    from txl_deploy.bench.compare import parse_threshold
    from txl_deploy.bench.harness import BenchSettings
    from txl_deploy.bench.stats import minimum_samples, parse_percentiles
    from txl_deploy.bench.workload import parse_batch_sizes
    from txl_deploy.cli.bench_contenders import runtime_names
    from txl_deploy.opening import Lengths
    from txl_train.distributed import join, world_of

    world = world_of()
    with first_alone_reports(world):
        if fp16 and dtype not in (None, "fp16"):
            raise UsageError(f"`--fp16` and `--dtype {dtype}` contradict each other.", remedy="Give one of them.")
        dtype = "fp16" if fp16 else dtype
        if not artifacts and checkpoint is None:
            raise UsageError(
                "There is nothing to measure.",
                remedy="Name an exported model with `--artifact DIR`, or a checkpoint with `--checkpoint FILE`.",
            )
        if checkpoint is None and (runtimes is not None or dtype is not None):
            option = "--dtype" if runtimes is None else "--runtimes"
            raise UsageError(
                f"`{option}` is for a checkpoint: an exported model knows what runs it.", remedy="Add `--checkpoint FILE`, or leave it out."
            )
        if save_data and out is not None:
            raise UsageError("`--save-data` and `--out` name two files for one result.", remedy="Give one of them.")
        wanted = parse_percentiles(percentiles)
        job = _Job(
            artifacts=artifacts,
            receipts=receipts,
            unvalidated=unvalidated,
            checkpoint=checkpoint,
            runtimes=runtime_names(runtimes),
            dtype=cast("Dtype", dtype or "fp32"),
            memory=cast("MemoryKind | None", memory),
            dataset=dataset,
            data=data,
            split=split,
            sizes=parse_batch_sizes(batch_sizes),
            sizes_are_free=context.get_parameter_source("batch_sizes") is not click.core.ParameterSource.COMMANDLINE,
            settings=BenchSettings(
                percentiles=wanted,
                duration_s=duration,
                min_samples=max(map(minimum_samples, wanted)) if min_samples is None else min_samples,
                max_samples=max_samples,
                max_duration_s=max_duration,
                warmup_steps=warmup,
                boundary=boundary,
            ),
            lengths=Lengths(tgt_len=tgt_len, mem_len=mem_len, ext_len=ext_len, clamp_len=clamp_len, same_length=same_length),
            device=device,
            threads=threads,
        )
        verdicts = Verdicts(
            accept_invalid=accept_invalid,
            target_perplexity=target_perplexity,
            target_throughput=target_throughput,
            max_regression=parse_threshold(max_regression) if ab else None,
        )
        target = Path(SAVE_DATA_NAME) if save_data else out
        if target is not None and world.is_main:
            _check_writable(target)
        import torch

        chosen = _device(job, world)
        with join(world, torch.device(chosen)), contextlib.ExitStack() as stack:
            result = _run(job, chosen, world, verdicts, stack)
        if not world.is_main:
            return
        result = verdicts.compared(result)
        if target is not None:
            result.write(target)
        if as_json:
            click.echo(result.to_json())
        else:
            _print(result, job.settings, verdicts)
            if target is None:
                click.echo("The samples were not kept; `--out FILE` writes them.", err=True)
        verdicts.check(result)


@dataclass(frozen=True, kw_only=True)
class _Job:
    """What was asked for."""

    artifacts: tuple[Path, ...]
    receipts: tuple[Path, ...]
    unvalidated: bool
    checkpoint: Path | None
    runtimes: list[str]
    dtype: Dtype
    memory: MemoryKind | None
    dataset: str | None
    data: Path | None
    split: str
    sizes: tuple[int, ...]
    sizes_are_free: bool
    """Nobody asked for them, so an exported model of other batch sizes has its own."""
    settings: BenchSettings
    lengths: Lengths
    device: str
    threads: int | None


def _device(job: _Job, world: World) -> str:
    """Return where this process computes: one kind of device for all, so that no table mixes them."""
    from txl_deploy.manifest import read_manifest
    from txl_deploy.runtimes.registry import resolve_device

    formats = [read_manifest(path).format for path in job.artifacts]
    return device_of(world, resolve_device(job.device, [*formats, *(job.runtimes if job.checkpoint is not None else [])], job.dtype))


def _run(job: _Job, device: str, world: World, verdicts: Verdicts, stack: contextlib.ExitStack) -> BenchResult:
    """Open, prove and measure; what is opened stays so until `stack` ends."""
    from txl_deploy.bench.environment import describe_environment, describe_state
    from txl_deploy.bench.result import BenchResult
    from txl_deploy.bench.stats import STANDARD_PERCENTILES
    from txl_deploy.bench.workload import Workload
    from txl_deploy.cli.bench_contenders import open_contenders, open_in, prove
    from txl_deploy.corpora import open_corpus

    settings = job.settings
    groups, model_data = all_or_none(
        world,
        lambda: open_contenders(job.artifacts, job.checkpoint, job.lengths, job.memory, device=device, threads=job.threads),
    )
    corpus = all_or_none(world, lambda: open_corpus(model_data, dataset=job.dataset, data=job.data))
    groups, proofs = all_or_none(world, lambda: prove(groups, corpus, job.split, job.receipts, unvalidated=job.unvalidated))
    if job.checkpoint is not None:
        for group in groups:
            leader = group[0].runtime.info
            wanted = [name for name in job.runtimes if (name, job.dtype) != ("pytorch", "fp32")]  # which leads the group already
            group[1:1] = [open_in(job.checkpoint, name, job.dtype, leader, job.threads, stack) for name in wanted]
    verdicts.check_plan(groups, settings)
    infos = [contender.runtime.info for group in groups for contender in group]
    sizes = job.sizes
    if job.sizes_are_free:
        low = max(info.min_batch for info in infos) * world.size
        high = min((info.max_batch * world.size for info in infos if info.max_batch is not None), default=max(sizes))
        sizes = tuple(size for size in sizes if low <= size <= high and size % world.size == 0) or (low,)
    _check_sizes(sizes, infos, world)
    ids, dataset = corpus.ids(job.split), corpus.spec.name
    plan = [
        (group, Workload(ids_N=ids, batch_size=size, tgt_len=info.tgt_len, ext_len=info.config.ext_len, dataset=dataset, split=job.split))
        for size in sizes
        for group in groups
        for info in [group[0].runtime.info]
    ]
    environment = describe_environment(threads=_threads_used(job.threads), device=infos[0].device)
    rows = _measure(plan, settings, world, job.threads)
    return BenchResult(
        rows=tuple(_with_parent(row, proofs.parents) for row in rows),
        command=command_line(),
        percentiles=tuple(sorted({*STANDARD_PERCENTILES, *settings.percentiles})),
        settings={**vars(settings), "percentiles": list(settings.percentiles), "batch_sizes": list(sizes)},
        workload={
            "dataset": dataset,
            "split": job.split,
            "n_tokens": len(ids),
            "corpus_sha256": corpus.sha256(job.split),
            "vocabulary_sha256": model_data.vocabulary.sha256,
        },
        environment=environment,
        environment_after=describe_state(),
        receipts=tuple(proofs.summaries),
        unvalidated=proofs.is_any_missing,
    )


def _check_sizes(sizes: Sequence[int], infos: Sequence[RuntimeInfo], world: World) -> None:
    """Refuse now what would be refused after minutes of measuring: a batch size that a runtime does not take. UsageError."""
    for size in sizes:
        world.share(size)
        for info in infos:
            if not info.min_batch <= size // world.size <= (info.max_batch or size):
                allowed = f"{info.min_batch * world.size} to {(info.max_batch or size) * world.size}"
                raise UsageError(
                    f"{info.origin or info.name} takes batch sizes of {allowed}, but {size} was asked for.",
                    remedy="Leave out `--batch-sizes`, which then are those that all take, or export again.",
                )


def _with_parent(row: Row, parents: Mapping[str, str]) -> Row:
    """Return the row with the graph that its engine was built from, where it is one."""
    if row.artifact is None or row.artifact.manifest_sha256 not in parents:
        return row
    return dataclasses.replace(
        row, artifact=dataclasses.replace(row.artifact, parent_manifest_sha256=parents[row.artifact.manifest_sha256])
    )


def _measure(
    plan: Sequence[tuple[list[Contender], Workload]], settings: BenchSettings, world: World, threads: int | None
) -> tuple[Row, ...]:
    from txl_deploy.bench.energy import meter_for
    from txl_deploy.bench.environment import describe_state
    from txl_deploy.bench.harness import measure
    from txl_deploy.bench.roofline import attach, peak_for

    rows: list[Row] = []
    shown = progress("measuring", len(plan) * PERCENT) if world.is_main else contextlib.nullcontext(lambda done: None)
    with shown as advance:
        for i, (group, workload) in enumerate(plan):

            def tell(done: int, total: int, before: int = i * PERCENT) -> None:
                advance(before + PERCENT * done // total)

            measured = measure(group, workload, settings, progress=tell, world=world, environment=describe_state, meter_for=meter_for)
            log.info("batch size %d: %d timed steps of each", workload.batch_size, measured[0].latency.n)
            for row, contender in zip(measured, group):
                info = contender.runtime.info
                rows.append(attach(row, info, workload, peak_for(info, threads)))
    return tuple(rows)


def _threads_used(threads: int | None) -> int:
    import torch

    return threads or torch.get_num_threads()


def _print(result: BenchResult, settings: BenchSettings, verdicts: Verdicts) -> None:
    from txl_deploy.bench.report import disturbances, format_table

    click.echo(format_table(result.rows, settings.percentiles))
    for sentence in disturbances(result.environment):
        click.echo(sentence)
    click.echo("")
    for line in [*proof_lines(result), *verdicts.comparison_lines(result)]:
        click.echo(line)


def _check_writable(out: Path) -> None:
    """Refuse now a file that could not be written after minutes of measuring."""
    from txl_train.files import check_replaceable

    check_replaceable(out, b"{")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out.parent):
            pass
    except OSError as error:
        raise EnvironmentUnfitError(
            f"{out} cannot be written: {error.strerror or error}.", remedy="Name a file in a folder that can be written with `--out`."
        ) from error
