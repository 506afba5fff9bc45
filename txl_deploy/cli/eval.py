"""`txl eval`: the perplexity of a checkpoint or an exported model on a corpus or on a piece of text.

Started by torchrun, several processes share the streams; the first one prints and writes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from txl_deploy.cli.eval_report import Report, by_split
from txl_deploy.cli.greedy import GreedyCommand
from txl_deploy.cli.lengths import length_options, memory_option
from txl_deploy.cli.options import (
    command_line,
    dataset_options,
    device_option,
    dtype_option,
    echo_json,
    json_option,
    threads_option,
    verbosity_options,
)
from txl_deploy.cli.progress import progress
from txl_deploy.cli.together import all_or_none, device_of, first_alone_reports
from txl_train.data.datasets import SPLITS
from txl_train.errors import UsageError, ValidationError

if TYPE_CHECKING:
    from txl_deploy.cli.eval_receipt import ReceiptJob
    from txl_deploy.manifest import Dtype
    from txl_deploy.opening import Lengths, Opened
    from txl_deploy.scoring import Plan, Request, Text
    from txl_train.config import MemoryKind
    from txl_train.distributed import World
    from txl_train.evaluate import EvalResult

ALL_SPLITS = ("valid", "test")
"""What `--split all` means: those that a model was not trained on."""
BEST_NAME = "checkpoint_best.pt"

log = logging.getLogger(__name__)


@click.command("eval", cls=GreedyCommand, greedy=("--manual", "--percentiles"))
@click.option(
    "--checkpoint",
    "--model",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="A checkpoint that `txl train` wrote; with --artifact, the one it was made from, which its receipt compares it with.  "
    "[default: checkpoint_best.pt in --work-dir, where that is given; of an artifact, the one beside its folder]",
)
@click.option(
    "--artifact",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="A folder that `txl export` wrote. A receipt is put into it, which `txl bench` asks for.",
)
@click.option(
    "--receipt",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Where the receipt goes.  [default: receipt.json in the artifact's folder, receipt-valid.json for another split]",
)
@click.option("--no-receipt", is_flag=True, help="Write no receipt, which spares scoring the checkpoint too.")
@click.option(
    "--runtime",
    "--type",
    type=click.Choice(["pytorch", "compiled", "torchscript", "onnx"]),
    help="What to run a checkpoint with; compiled takes PyTorch's compiler, torchscript and onnx are exported on the way.  "
    "[default: pytorch]",
)
@dtype_option("of a checkpoint; an exported model has its own.  [default: fp32]")
@click.option(
    "--protocol",
    type=click.Choice(["exact", "nvidia-2019", "nvidia-2023"]),
    default="exact",
    show_default=True,
    help="exact: every token that has a predecessor is scored once, from a cold start. The others: as NVIDIA's code of that year does, "
    "with its lengths where none are given (tgt-len 64, mem-len 640, no extension, no clamping, no same-length).",
)
@memory_option
@dataset_options
@click.option(
    "--split",
    type=click.Choice([*SPLITS, "all"]),
    default="test",
    show_default=True,
    help="Which of the three files to score; all means valid and test, each on its own.",
)
@click.option(
    "--manual", multiple=True, metavar="TEXT...", help="Score this raw text instead of a corpus; several texts are joined by blanks."
)
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=16,
    show_default=True,
    metavar="N",
    help="Streams read in parallel, by all processes.",
)
@length_options
@click.option(
    "--max-size",
    type=click.IntRange(min=1),
    metavar="N",
    help="Stop after N segments; NVIDIA's protocols count those of their warm-up.  [default: the whole split]",
)
@click.option(
    "--repeat",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    metavar="N",
    help="Read the split N times: each time from a cold start, in NVIDIA's protocols with the memory of the time before.",
)
@click.option("--target-perplexity", type=float, metavar="X", help="Exit 1 if the perplexity (of any split) is above X.")
@click.option(
    "--target-throughput", type=float, metavar="X", help="Exit 1 if the timed steps (of any split) score fewer than X tokens per second."
)
@click.option(
    "--save-data",
    is_flag=True,
    help="Time each step, show latency and throughput, and write all of them to eval_data_<batch size>_<dtype>_<runtime>.json in "
    "--work-dir, or here.",
)
@click.option(
    "--percentiles", multiple=True, metavar="P...", help="Percentiles of the latency to show with --save-data.  [default: 90 95 99]"
)
@click.option("--save-torchscript", type=click.Path(path_type=Path), metavar="DIR", help="With --runtime torchscript: keep the export.")
@click.option(
    "--load-torchscript",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="The same as --artifact DIR, of TorchScript; with a --checkpoint, it must be made from that.",
)
@click.option(
    "--work-dir",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Folder of the checkpoint, where eval_log.log is continued.  [default: no log is written]",
)
@click.option("--debug", is_flag=True, help="Neither continue a log nor write samples.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="Also write the JSON document to FILE.")
@click.option("--cuda", is_flag=True, help="The same as --device cuda.")
@click.option("--fp16", is_flag=True, help="The same as --dtype fp16.")
@device_option
@threads_option
@click.option("--log-all-ranks", is_flag=True, help="Let every process log, not only the first.")
@click.option("--local-rank", type=int, metavar="N", help="As older launchers pass it; LOCAL_RANK, which torchrun sets, says the same.")
@json_option
@verbosity_options
@click.pass_context
def command(
    context: click.Context,
    checkpoint: Path | None,
    artifact: Path | None,
    receipt: Path | None,
    no_receipt: bool,
    runtime: str | None,
    dtype: str | None,
    protocol: str,
    memory: str | None,
    dataset: str | None,
    data: Path | None,
    split: str,
    manual: tuple[str, ...],
    batch_size: int,
    tgt_len: int | None,
    mem_len: int | None,
    ext_len: int | None,
    clamp_len: int | None,
    same_length: bool | None,
    max_size: int | None,
    repeat: int,
    target_perplexity: float | None,
    target_throughput: float | None,
    save_data: bool,
    percentiles: tuple[str, ...],
    save_torchscript: Path | None,
    load_torchscript: Path | None,
    work_dir: Path | None,
    debug: bool,
    out: Path | None,
    cuda: bool,
    fp16: bool,
    device: str,
    threads: int | None,
    log_all_ranks: bool,
    local_rank: int | None,
    as_json: bool,
) -> None:
    """Score a corpus and print its perplexity.

    Every token that has a predecessor is scored exactly once, at every batch size, each stream from a cold start; --protocol takes
    NVIDIA's rules instead. Several processes: torchrun --nproc-per-node 2 --no-python txl eval ...
    """
    from txl_deploy.bench.stats import parse_percentiles
    from txl_deploy.opening import Lengths
    from txl_deploy.scoring import Request
    from txl_train.distributed import join, world_of
    from txl_train.protocols import NVIDIA, NvidiaLengths, ProtocolName

    world = world_of()
    with first_alone_reports(world, everyone=log_all_ranks):
        if fp16 and dtype not in (None, "fp16"):
            raise UsageError(f"`--fp16` and `--dtype {dtype}` contradict each other.", remedy="Give one of them.")
        if cuda and context.get_parameter_source("device") is click.core.ParameterSource.COMMANDLINE and device == "cpu":
            raise UsageError("`--cuda` and `--device cpu` contradict each other.")
        if local_rank is not None and local_rank != world.local_rank:
            raise UsageError(
                f"`--local-rank` is {local_rank}, but this is process {world.local_rank} of its machine.",
                remedy="Leave it out, and start the processes with `torchrun --nproc-per-node N --no-python txl eval ...`.",
            )
        source = _source(checkpoint, artifact, load_torchscript, work_dir, runtime, save_torchscript)
        lengths = Lengths(tgt_len=tgt_len, mem_len=mem_len, ext_len=ext_len, clamp_len=clamp_len, same_length=same_length)
        if protocol in NVIDIA:
            defaults = vars(NvidiaLengths()) if source.artifact is None else {}  # an artifact's lengths are what they are
            given = {name: value for name, value in lengths.as_dict().items() if value is not None}
            lengths = Lengths(**defaults | given, same_length_rule=NVIDIA[protocol].same_length_rule)
        request = Request(
            protocol=cast(ProtocolName, protocol),
            batch_size=1 if manual else batch_size,
            max_size=max_size,
            repeat=repeat,
            timed=save_data or target_throughput is not None,
        )
        splits = ("manual",) if manual else ALL_SPLITS if split == "all" else (split,)
        job = _Job(
            source=source,
            receipts=_receipts(source, request, splits, receipt, wanted=not (no_receipt or debug), threads=threads),
            lengths=lengths,
            memory=cast("MemoryKind | None", memory),
            dtype=cast("Dtype | None", "fp16" if fp16 else dtype),
            device=_device("cuda" if cuda else device, source, dtype, world),
            threads=threads,
            request=request,
            dataset=dataset,
            data=data,
            batch_is_free=context.get_parameter_source("batch_size") is not click.core.ParameterSource.COMMANDLINE,
            splits=splits,
            manual=manual,
            percentiles=parse_percentiles(" ".join(percentiles) or "90,95,99"),
            work_dir=None if debug else work_dir,
            out=out,
            data_folder=None if debug or not save_data else work_dir or Path(),
            shows_speed=save_data,
        )
        import torch

        report = Report(world, echo=not as_json, everyone=log_all_ranks)
        with join(world, torch.device(job.device)), contextlib.ExitStack() as stack:
            document = _run(job, world, report, stack)
            if world.is_main:
                job.write(document)
                if as_json:
                    echo_json(document)
                report.check_targets(document, perplexity=target_perplexity, throughput=target_throughput)
                report.check_receipts(document)


@dataclass(frozen=True)
class _Source:
    """The one thing that is evaluated: a checkpoint in a runtime, or an exported model."""

    checkpoint: Path | None
    runtime: str
    artifact: Path | None = None
    keep: Path | None = None
    """Where the export of the checkpoint is to stay."""


@dataclass(frozen=True, kw_only=True)
class _Job:
    """What was asked for."""

    source: _Source
    lengths: Lengths
    memory: MemoryKind | None
    dtype: Dtype | None
    device: str
    threads: int | None
    request: Request
    batch_is_free: bool
    """Nobody asked for the batch size, so an exported model of another one has its own."""
    dataset: str | None
    data: Path | None
    splits: tuple[str, ...]
    manual: tuple[str, ...]
    percentiles: tuple[float, ...]
    work_dir: Path | None
    out: Path | None
    data_folder: Path | None
    shows_speed: bool
    receipts: ReceiptJob | None
    """None where there is to be no receipt."""

    def check_writable(self, opened: Opened) -> None:
        """Refuse now what could not be written in the end."""
        from txl_train.files import check_replaceable

        for path in (self.out, self.data_file(opened.runtime.info.dtype, opened.runtime.info.name)):
            if path is not None:
                check_replaceable(path, b"{")
        if self.receipts is not None:
            self.receipts.check_writable(self.splits)

    def data_file(self, dtype: str, runtime: str) -> Path | None:
        """Where the samples go."""
        return None if self.data_folder is None else self.data_folder / f"eval_data_{self.request.batch_size}_{dtype}_{runtime}.json"

    def write(self, document: dict[str, Any]) -> None:
        """Write the files that were asked for, and take the samples out of the document."""
        from txl_train.files import write_json

        first = next(iter(by_split(document).values()))
        samples = self.data_file(first["dtype"], first["runtime"])
        if samples is not None:
            write_json(samples, {"command": command_line()} | document)
            log.info("The samples are in %s.", samples)
        for part in by_split(document).values():
            part.pop("samples", None)
        if self.out is not None:
            write_json(self.out, document)


def _source(
    checkpoint: Path | None,
    artifact: Path | None,
    load_torchscript: Path | None,
    work_dir: Path | None,
    runtime: str | None,
    keep: Path | None,
) -> _Source:
    """Decide what is to be evaluated. Raises UsageError where that is not one thing."""
    from txl_deploy.manifest import read_manifest

    if load_torchscript is not None:
        if artifact is not None or runtime not in (None, "torchscript") or keep is not None:
            raise UsageError(
                "`--load-torchscript` names what is to be run: give it with neither `--artifact`, `--runtime` nor another export."
            )
        if load_torchscript.is_file():
            raise UsageError(
                f"{load_torchscript} is a file: TorchScript alone does not say which vocabulary and which lengths it was made for.",
                remedy="Give the folder that `txl export --format torchscript --out DIR` wrote; `txl import` reads NVIDIA's checkpoints.",
            )
        found = read_manifest(load_torchscript).format
        if found != "torchscript":
            raise UsageError(f"{load_torchscript} holds a model in the format {found}.", remedy="Run it with `--artifact` instead.")
        return _Source(checkpoint, found, artifact=load_torchscript)
    if checkpoint is None and artifact is None and work_dir is not None:
        checkpoint = work_dir / BEST_NAME
    if checkpoint is None and artifact is None:
        raise UsageError(
            "Give either `--checkpoint FILE` or `--artifact DIR`.", remedy=f"`--work-dir DIR` alone stands for DIR/{BEST_NAME}."
        )
    if artifact is not None and runtime is not None:
        raise UsageError("`--runtime` goes with `--checkpoint`: an artifact knows what runs it.")
    if keep is not None and runtime != "torchscript":
        raise UsageError(
            "`--save-torchscript` keeps what `--runtime torchscript` runs: give both.",
            remedy="`txl export --format torchscript --out DIR` exports without evaluating.",
        )
    return _Source(checkpoint, runtime or "pytorch", artifact=artifact, keep=keep)


def _receipts(
    source: _Source, request: Request, splits: tuple[str, ...], file: Path | None, *, wanted: bool, threads: int | None
) -> ReceiptJob | None:
    """Return where receipts go, or None where there are none. Raises UsageError for a `--receipt` that cannot be."""
    from txl_deploy.cli.eval_receipt import ReceiptJob, why_no_receipt

    why = why_no_receipt(request, splits) if source.artifact is not None else "receipts are of exported models: give `--artifact DIR`"
    if file is not None and (why is not None or not wanted):
        raise UsageError(f"There is no receipt to be written to {file}: {why or 'another option says to write none'}.")
    if source.artifact is None or not wanted:
        return None
    if why is not None:
        log.info("No receipt is written: %s.", why)
        return None
    return ReceiptJob(artifact=source.artifact, checkpoint=source.checkpoint, file=file, threads=threads)


def _device(device: str, source: _Source, dtype: str | None, world: World) -> str:
    """Return where this process computes: of several on a machine with GPUs, each has its own."""
    from txl_deploy.manifest import read_manifest
    from txl_deploy.runtimes.registry import resolve_device

    if source.artifact is None:
        return device_of(world, resolve_device(device, [source.runtime], dtype))
    manifest = read_manifest(source.artifact)
    return device_of(world, resolve_device(device, [manifest.format], manifest.settings.dtype))


def _run(job: _Job, world: World, report: Report, stack: contextlib.ExitStack) -> dict[str, Any]:
    """Open, read and score; what is opened stays so until `stack` ends."""
    from txl_deploy.scoring import describe, plan

    opened = all_or_none(world, lambda: _open(job, world, stack))
    if job.batch_is_free:
        low, high = opened.runtime.info.min_batch, opened.runtime.info.max_batch
        fitting = max(low, min(job.request.batch_size, high or job.request.batch_size))
        job = dataclasses.replace(job, request=dataclasses.replace(job.request, batch_size=fitting))
    plans: dict[str, Plan] = {}
    for split in job.splits:
        text = _read_in_turn(job, opened, split, world)
        plans[split] = all_or_none(world, functools.partial(plan, opened, text, job.request, world))
    all_or_none(world, lambda: job.check_writable(opened) if world.is_main else None)
    all_or_none(world, lambda: stack.enter_context(report.written_to(job.work_dir)))
    report.start(opened.runtime.info, job.request)
    documents: dict[str, dict[str, Any]] = {}
    for split, planned in plans.items():
        report.warn(planned)
        with progress(f"evaluating {split}", planned.steps) if world.is_main else contextlib.nullcontext(_tell_nobody) as advance:
            result = planned.score(advance)
        document = describe(planned, result, job.percentiles)
        report.finish(document, job.percentiles if job.shows_speed else None)
        if job.receipts is not None:
            document["receipt"] = _make_receipt(job.receipts, planned, result, split, world, report)
        if job.request.timed:
            document["samples"] = {"latency_s": list(result.step_seconds), "tokens": list(result.step_tokens)}
        documents[split] = document
    return documents[job.splits[0]] if len(documents) == 1 else {"split": "all", "splits": documents}


def _make_receipt(job: ReceiptJob, plan: Plan, result: EvalResult, split: str, world: World, report: Report) -> dict[str, Any]:
    """Score the checkpoint on the same segments, write the receipt, and return what it says."""
    from txl_deploy.cli import eval_receipt

    reference = eval_receipt.open_reference(job, plan, world)
    expected = None if reference is None else eval_receipt.score_reference(reference, plan, world, _tell_nobody)
    receipt = eval_receipt.make_receipt(plan, result, reference, expected, world)
    path = job.path(split)
    if not world.is_main:
        return receipt.summary()
    if eval_receipt.keeps_proof(path, receipt):
        report.say(f"Receipt: {path} is kept: it compares with the checkpoint, which is not at hand now.")
        return receipt.summary()
    receipt.write(path)
    summary = receipt.summary(path)
    for line in eval_receipt.lines(summary, path):
        report.say(line)
    return summary


def _tell_nobody(done: int) -> None:
    """Show no progress."""


def _open(job: _Job, world: World, stack: contextlib.ExitStack) -> Opened:
    from txl_deploy.opening import open_checkpoint, open_exported

    source = job.source
    options: dict[str, Any] = {"memory": job.memory, "dtype": job.dtype, "device": job.device, "threads": job.threads}
    if source.artifact is not None:
        opened = open_exported(source.artifact, lengths=job.lengths, head="nll", **options)
        if source.checkpoint is not None:
            _check_made_from(source.checkpoint, opened)
        return opened
    assert source.checkpoint is not None
    keep = source.keep if world.is_main else None
    return stack.enter_context(open_checkpoint(source.checkpoint, runtime=source.runtime, lengths=job.lengths, keep=keep, **options))


def _check_made_from(checkpoint: Path, opened: Opened) -> None:
    from txl_train.checkpoint import load_checkpoint

    sha256 = load_checkpoint(checkpoint).sha256
    if sha256 != opened.runtime.info.checkpoint_sha256:
        raise ValidationError(f"{opened.origin} was not made from {checkpoint}.", remedy="Leave `--checkpoint` out, or export it again.")


def _read_in_turn(job: _Job, opened: Opened, split: str, world: World) -> Text:
    """Read the text first in one process of each machine, which fills the token cache, then in the others."""
    from txl_deploy.scoring import read_manual, read_split

    def read() -> Text:
        if job.manual:
            return read_manual(opened.model_data, job.manual, dataset=job.dataset, protocol=job.request.protocol)
        return read_split(opened.model_data, split, dataset=job.dataset, data=job.data)

    first = world.local_rank == 0
    text = all_or_none(world, lambda: read() if first else None)
    if world.size > 1:
        later = all_or_none(world, lambda: None if first else read())
        text = text or later
    assert text is not None
    return text
