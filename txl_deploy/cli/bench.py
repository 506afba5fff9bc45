"""`txl bench`: latency, throughput and perplexity of exported models side by side; exit 1 if one is not its checkpoint."""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import click

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
from txl_train.errors import EnvironmentUnfitError, UsageError, ValidationError, nearest

if TYPE_CHECKING:
    from txl_deploy.bench.harness import BenchSettings, Contender
    from txl_deploy.bench.result import BenchResult, Row
    from txl_deploy.bench.workload import Workload
    from txl_deploy.corpora import ModelData
    from txl_deploy.manifest import Dtype
    from txl_deploy.opening import Lengths
    from txl_deploy.runtimes.base import RuntimeInfo
    from txl_train.config import MemoryKind

PERCENT = 100
RUNTIMES = ("pytorch", "compiled", "torchscript", "onnx")

log = logging.getLogger(__name__)


@click.command("bench")
@click.option(
    "--artifact",
    "artifacts",
    type=click.Path(path_type=Path),
    multiple=True,
    metavar="DIR",
    help="A folder that `txl export` wrote; may be given several times.",
)
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
@click.option("--min-samples", type=int, default=662, show_default=True, metavar="N", help="Timed steps at least; a sound p99 needs 662.")
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
    help="Steps before the clock counts, at least; more where the memory is longer.",
)
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
def command(
    artifacts: tuple[Path, ...],
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
    min_samples: int,
    max_samples: int,
    max_duration: float,
    warmup: int,
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

    All take turns on the same tokens, by one clock, from one cold start. Timed is a step with tokens and memory already on the device,
    until the device has finished. The perplexity of the timed steps is compared with the checkpoint's; a difference ends with 1.
    """
    from txl_deploy.bench.environment import describe_environment
    from txl_deploy.bench.harness import BenchSettings
    from txl_deploy.bench.report import disturbances, format_table
    from txl_deploy.bench.result import BenchResult
    from txl_deploy.bench.stats import STANDARD_PERCENTILES, parse_percentiles
    from txl_deploy.bench.workload import Workload, parse_batch_sizes
    from txl_deploy.corpora import open_corpus
    from txl_deploy.manifest import Dtype
    from txl_deploy.opening import Lengths
    from txl_train.config import MemoryKind

    if fp16 and dtype == "fp32":
        raise UsageError("`--fp16` and `--dtype fp32` contradict each other.", remedy="Give one of them.")
    dtype = "fp16" if fp16 else dtype
    sizes = parse_batch_sizes(batch_sizes)
    settings = BenchSettings(
        percentiles=parse_percentiles(percentiles),
        duration_s=duration,
        min_samples=min_samples,
        max_samples=max_samples,
        max_duration_s=max_duration,
        warmup_steps=warmup,
    )
    if not artifacts and checkpoint is None:
        raise UsageError(
            "There is nothing to measure.", remedy="Name an exported model with `--artifact DIR`, or a checkpoint with `--checkpoint FILE`."
        )
    if checkpoint is None and (runtimes is not None or dtype is not None):
        option = "--dtype" if runtimes is None else "--runtimes"
        raise UsageError(
            f"`{option}` is for a checkpoint: an exported model knows what runs it.", remedy="Add `--checkpoint FILE`, or leave it out."
        )
    names = _runtimes(runtimes)
    if out is not None:
        _check_writable(out)
    lengths = Lengths(tgt_len=tgt_len, mem_len=mem_len, ext_len=ext_len, clamp_len=clamp_len, same_length=same_length)
    groups, model_data = open_contenders(artifacts, checkpoint, lengths, cast(MemoryKind | None, memory), device=device, threads=threads)
    stack = click.get_current_context().with_resource(contextlib.ExitStack())
    if checkpoint is not None:
        chosen = cast(Dtype, dtype or "fp32")
        for group in groups:
            leader = group[0].runtime.info
            # eager in fp32 leads the group already
            others = [_open(checkpoint, name, chosen, leader, threads, stack) for name in names if (name, chosen) != ("pytorch", "fp32")]
            group[1:1] = others
    if click.get_current_context().get_parameter_source("batch_sizes") is not click.core.ParameterSource.COMMANDLINE:
        infos = [contender.runtime.info for group in groups for contender in group]
        low = max(info.min_batch for info in infos)
        high = min((info.max_batch for info in infos if info.max_batch is not None), default=max(sizes))
        sizes = tuple(size for size in sizes if low <= size <= high) or (low,)
    corpus = open_corpus(model_data, dataset=dataset, data=data)
    ids, spec_name = corpus.ids(split), corpus.spec.name
    plan = [
        (group, Workload(ids_N=ids, batch_size=size, tgt_len=info.tgt_len, ext_len=info.config.ext_len, dataset=spec_name, split=split))
        for size in sizes
        for group in groups
        for info in [group[0].runtime.info]
    ]
    environment = describe_environment(threads=_threads_used(threads), device=groups[0][0].runtime.info.device)
    result = BenchResult(
        rows=_measure(plan, settings),
        command=command_line(),
        percentiles=tuple(sorted({*STANDARD_PERCENTILES, *settings.percentiles})),
        settings={**vars(settings), "percentiles": list(settings.percentiles), "batch_sizes": list(sizes)},
        workload={"dataset": spec_name, "split": split, "n_tokens": len(ids), "corpus_sha256": corpus.sha256(split)},
        environment=environment,
    )
    if out is not None:
        result.write(out)
    if as_json:
        click.echo(result.to_json())
    else:
        click.echo(format_table(result.rows, settings.percentiles))
        for sentence in disturbances(environment):
            click.echo(sentence)
        click.echo(f"\n{_conclusion(result)}")
        if out is None:
            click.echo("The samples were not kept; `--out FILE` writes them.", err=True)
    _fail_if_unverified(result.failed)


def _runtimes(names: str | None) -> list[str]:
    """Return the names in a list such as `pytorch,compiled`, each once. Raises UsageError for one that there is not."""
    found = list(dict.fromkeys(name.strip() for name in (names or "pytorch").split(",")))
    for name in found:
        if name not in RUNTIMES:
            raise UsageError(f"`{name}` is no runtime of a checkpoint.{nearest(name, RUNTIMES)}", remedy=f"There is {', '.join(RUNTIMES)}.")
    return found


def _open(checkpoint: Path, runtime: str, dtype: Dtype, leader: RuntimeInfo, threads: int | None, stack: contextlib.ExitStack) -> Contender:
    """Open the checkpoint in another runtime or type, for the lengths of the reference that leads its group."""
    from txl_deploy.bench.harness import Contender
    from txl_deploy.opening import Lengths, open_checkpoint

    config = leader.config
    lengths = Lengths(
        tgt_len=leader.tgt_len,
        mem_len=config.mem_len,
        ext_len=config.ext_len,
        clamp_len=config.clamp_len or -1,
        same_length=config.same_length,
        same_length_rule=config.same_length_rule,
    )
    opened = open_checkpoint(
        checkpoint, runtime=runtime, lengths=lengths, memory=leader.memory, dtype=dtype, device=leader.device, threads=threads
    )
    return Contender(stack.enter_context(opened).runtime)


def open_contenders(
    artifacts: Sequence[Path], checkpoint: Path | None, lengths: Lengths, memory: MemoryKind | None, *, device: str, threads: int | None
) -> tuple[list[list[Contender]], ModelData]:
    """Open what is to be measured, in groups of equal lengths, each led by the reference if there is a checkpoint.

    Raises UsageError for artifacts of different vocabularies or another head, ArtifactError for one that was not made from the checkpoint.
    """
    from txl_deploy.bench.harness import Contender
    from txl_deploy.corpora import ModelData
    from txl_deploy.manifest import read_manifest
    from txl_deploy.opening import open_exported
    from txl_deploy.runtimes.registry import eager_from_checkpoint, resolve_device
    from txl_train.errors import ArtifactError

    device = resolve_device(device, [read_manifest(path).format for path in artifacts])  # one for all, so that no table mixes devices
    opened = [open_exported(path, lengths=lengths, head="nll", device=device, threads=threads) for path in artifacts]
    for path, other in zip(artifacts, opened):
        if other.model_data.vocabulary.sha256 != opened[0].model_data.vocabulary.sha256:
            raise UsageError(
                f"{path} has another vocabulary than {artifacts[0]}, so they cannot read the same tokens.",
                remedy="Measure them one by one.",
            )
    groups: dict[tuple[object, ...], list[Contender]] = {}
    for item in opened:
        config = item.runtime.info.config
        key = (item.runtime.info.tgt_len, config.mem_len, config.ext_len, config.clamp_len, config.max_distance)
        groups.setdefault(key, []).append(Contender(item.runtime))
    if checkpoint is None:
        return list(groups.values()), opened[0].model_data
    model_data = opened[0].model_data if opened else None
    led: list[list[Contender]] = []
    for group in list(groups.values()) or [[]]:
        info = group[0].runtime.info if group else None
        reference, loaded = eager_from_checkpoint(
            checkpoint,
            tgt_len=info.tgt_len if info else lengths.tgt_len,
            memory=memory,
            mem_len=info.mem_len if info else lengths.mem_len,
            ext_len=info.config.ext_len if info else lengths.ext_len,
            clamp_len=(info.config.clamp_len or -1) if info else lengths.clamp_len,
            same_length=info.config.same_length if info else lengths.same_length,
            same_length_rule=info.config.same_length_rule if info else lengths.same_length_rule,
            device=device,
            threads=threads,
        )
        for contender in group:
            if contender.runtime.info.checkpoint_sha256 != reference.info.checkpoint_sha256:
                raise ArtifactError(
                    f"{contender.runtime.info.origin} was not made from {checkpoint}, so it cannot be checked against it.",
                    remedy="Give the checkpoint it was made from, or export this one again with `txl export`.",
                )
        led.append([Contender(reference, is_reference=True), *group])
        model_data = model_data or ModelData(loaded.dataset, loaded.vocabulary, loaded.data_folder)
    assert model_data is not None
    return led, model_data


def _measure(plan: Sequence[tuple[list[Contender], Workload]], settings: BenchSettings) -> tuple[Row, ...]:
    from txl_deploy.bench.harness import measure

    rows: list[Row] = []
    with progress("measuring", len(plan) * PERCENT) as advance:
        for i, (group, workload) in enumerate(plan):

            def tell(done: int, total: int, before: int = i * PERCENT) -> None:
                advance(before + PERCENT * done // total)

            measured = measure(group, workload, settings, progress=tell)
            log.info("batch size %d: %d timed steps of each", workload.batch_size, measured[0].latency.n)
            rows += measured
    return tuple(rows)


def _threads_used(threads: int | None) -> int:
    import torch

    return threads or torch.get_num_threads()


def _conclusion(result: BenchResult) -> str:
    rows = result.rows
    if result.verified is None:
        return "Not checked against a checkpoint: `--checkpoint FILE` compares the perplexity of what was timed."
    if result.failed:
        return f"FAILED: {len(result.failed)} of {len(rows)} rows are of a model that computes something else than its checkpoint."
    largest = max(abs(row.perplexity_rel_diff or 0.0) for row in rows)
    bound = max(row.tolerance or 0.0 for row in rows)
    return f"Verified: the perplexity of every row's timed steps is the checkpoint's within {largest:.1e} (bound {bound:.0e})."


def _fail_if_unverified(failed: Sequence[Row]) -> None:
    if failed:
        worst = failed[0]
        how = (
            "is not finite" if worst.perplexity_rel_diff is None else f"is {abs(worst.perplexity_rel_diff):.1e} away from the checkpoint's"
        )
        raise ValidationError(
            f"The perplexity of {worst.runtime} at batch size {worst.batch_size} {how}; {len(failed)} rows failed.",
            remedy="Find where they part with `txl parity`, and export the checkpoint again.",
        )


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
