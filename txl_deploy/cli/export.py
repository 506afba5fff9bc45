"""`txl export`: writes a checkpoint as ONNX, TorchScript or a TensorRT engine, compared with the checkpoint where that can run here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import click

from txl_deploy.cli.export_triton import TritonOptions, serve, triton_options
from txl_deploy.cli.lengths import length_options, memory_option
from txl_deploy.cli.options import command_line, dataset_options, echo_json, json_option, threads_option, verbosity_options
from txl_train.errors import EnvironmentUnfitError, UsageError

if TYPE_CHECKING:
    from txl_deploy.export.artifact import Exported, ExportRequest
    from txl_deploy.manifest import Manifest
    from txl_deploy.trt.artifact import EngineRequest

TRT_FORMATS = ("trt", "trt-rtx")


@click.command("export")
@click.option(
    "--checkpoint", "--model", type=click.Path(path_type=Path), metavar="FILE", help="A checkpoint that `txl train` or `txl import` wrote."
)
@click.option(
    "--artifact",
    "artifacts",
    type=click.Path(path_type=Path),
    multiple=True,
    metavar="DIR",
    help="An exported model instead. For an engine: the ONNX graph to build it from; with --for-triton: the graph to rewrite; for triton: "
    "the model to serve (engines for different GPUs: several times).",
)
@click.option(
    "--format",
    "format_name",
    type=click.Choice(["onnx", "torchscript", *TRT_FORMATS, "triton"]),
    required=True,
    help="What to write. trt: an engine of TensorRT, or of TensorRT-RTX where only that can build for the target here; "
    "trt-rtx: of TensorRT-RTX; triton: a model in a repository of Triton Inference Server.",
)
@click.option(
    "--out",
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder to make.  [default: beside the model, by its format, precision, head and target]",
)
@click.option(
    "--head",
    type=click.Choice(["nll", "logits", "log-probs"]),
    default="nll",
    show_default=True,
    help="nll of given targets, to score text; or logits or log p of every word as the next one, to generate and to serve.",
)
@click.option(
    "--dtype",
    type=click.Choice(["fp32", "fp16", "int8"]),
    help="Type of weights and matrix products. int8: of linear layers, in ONNX for CPUs; all else stays fp32.  "
    "[default: fp32; of an engine fp16]",
)
@click.option("--fp16", is_flag=True, help="The same as --dtype fp16.")
@click.option("--memory-dtype", type=click.Choice(["fp32", "fp16"]), help="Type of the states.  [default: that of --dtype]")
@memory_option
@length_options
@click.option("--batch-size", type=click.IntRange(min=1), metavar="N", help="Fix the number of streams.  [default: any]")
@click.option(
    "--batch-range",
    metavar="MIN,OPT,MAX",
    help="Of an engine: numbers of streams it takes, and the one it is tuned for.  [default: 1,8,32]",
)
@click.option(
    "--target",
    metavar="NAME",
    help="Of an engine: the GPU it is for, such as t4, v100 or h100; `txl doctor` lists them. portable: "
    "of TensorRT-RTX, for GPUs from compute capability 8.0 on.  [default: this machine's]",
)
@click.option(
    "--kit", is_flag=True, help="Of an engine: write all that is needed to build it on the target, even where it could be built here."
)
@click.option(
    "--timing-cache",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Of an engine: start from the timings of an earlier build.",
)
@click.option(
    "--hardware-compatibility",
    type=click.Choice(["none", "ampere-plus", "same-compute-capability"]),
    help="Of a TensorRT engine: other GPUs it may run on, at some cost in speed.  [default: none]",
)
@click.option(
    "--optimization-level",
    type=click.IntRange(0, 5),
    metavar="N",
    help="Of an engine: how long the builder searches, 0 to 5.  [default: the builder's own]",
)
@click.option(
    "--keep-onnx",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Of an engine from a checkpoint: keep the ONNX it is built from.",
)
@triton_options
@dataset_options
@click.option("--overwrite", is_flag=True, help="Replace an exported model that is there already.")
@threads_option
@json_option
@verbosity_options
@click.pass_context
def command(
    context: click.Context,
    checkpoint: Path | None,
    artifacts: tuple[Path, ...],
    format_name: str,
    out: Path | None,
    head: str,
    dtype: str | None,
    fp16: bool,
    memory_dtype: str | None,
    memory: str | None,
    tgt_len: int | None,
    mem_len: int | None,
    ext_len: int | None,
    clamp_len: int | None,
    same_length: bool | None,
    batch_size: int | None,
    batch_range: str | None,
    target: str | None,
    kit: bool,
    timing_cache: Path | None,
    hardware_compatibility: str | None,
    optimization_level: int | None,
    keep_onnx: Path | None,
    triton: TritonOptions,
    dataset: str | None,
    data: Path | None,
    overwrite: bool,
    threads: int | None,
    as_json: bool,
) -> None:
    """Write a checkpoint as a graph or an engine with explicit memory inputs and outputs, of fixed lengths.

    The folder gets the graph, the vocabulary and a manifest with the sha256 of everything. Before it gets its name, the graph is run
    on random tokens and compared with the checkpoint; if it differs, nothing is written and the exit code is 1. With fp16, the largest
    values that real text causes are compared with what fp16 holds, and recorded. int8 is compared on real text where that is here; its
    perplexity must stay within 0.5 %, which `txl eval --artifact DIR` proves of a whole split.

    An engine that cannot be built here is not: the folder gets a kit that builds it on its target, and the exit code is 3.

    `--format triton` writes an exported model into a repository of Triton Inference Server, with a memory for each sequence of requests.
    """
    if format_name == "triton" or triton.for_triton:
        _refuse_but_artifacts(context, format_name)
        serve(artifacts, format_name, out, triton, threads=threads, overwrite=overwrite, as_json=as_json)
        return
    triton.refuse(context, format_name)
    if len(artifacts) > 1:
        raise UsageError("One model is exported at a time.", remedy="Give one `--artifact`.")
    artifact = artifacts[0] if artifacts else None
    if fp16 and dtype in ("fp32", "int8"):
        raise UsageError(f"`--fp16` and `--dtype {dtype}` contradict each other.", remedy="Give one of them.")
    if dtype == "int8" and format_name in TRT_FORMATS:
        raise UsageError("int8 is for ONNX on a CPU, not for engines.", remedy="Use `--format onnx`, or `--dtype fp16` for the engine.")
    engine_only = {
        "--artifact": artifact,
        "--batch-range": batch_range,
        "--target": target,
        "--kit": kit or None,
        "--timing-cache": timing_cache,
        "--hardware-compatibility": hardware_compatibility,
        "--optimization-level": optimization_level,
        "--keep-onnx": keep_onnx,
    }
    given = [name for name, value in engine_only.items() if value is not None]
    if format_name not in TRT_FORMATS and given:
        raise UsageError(f"`{given[0]}` is for engines, not for `--format {format_name}`.", remedy="Leave it out, or use `--format trt`.")
    if batch_size is not None and batch_range is not None:
        raise UsageError("`--batch-size` and `--batch-range` contradict each other.", remedy="Give one of them.")
    if (checkpoint is None) == (artifact is None):
        raise UsageError(
            "There must be exactly one model to export.",
            remedy="Give `--checkpoint FILE`, or `--artifact DIR` to build an engine from ONNX.",
        )
    if checkpoint is not None and not checkpoint.is_file():
        found = "is a folder" if checkpoint.is_dir() else "does not exist"
        raise UsageError(f"The checkpoint {checkpoint} {found}.", remedy="Give a file that `txl train` or `txl import` wrote.")
    chosen_dtype = dtype or ("fp16" if fp16 or format_name in TRT_FORMATS else "fp32")
    if (data is not None or dataset is not None) and not {"fp16", "int8"} & {chosen_dtype, memory_dtype}:
        raise UsageError(
            "`--data` and `--dataset` are for the overflow audit of fp16 and the check of int8, and nothing here is in either.",
            remedy="Leave them out.",
        )
    from txl_deploy.export import audit
    from txl_deploy.export.artifact import ExportRequest, export_artifact
    from txl_deploy.runtimes.registry import use_threads

    use_threads(threads)
    changes: dict[str, Any] = {
        "memory": memory,
        "tgt_len": tgt_len,
        "mem_len": mem_len,
        "ext_len": ext_len,
        "clamp_len": clamp_len,
        "same_length": same_length,
        "memory_dtype": memory_dtype,
        "dataset": dataset,
        "data": data,
    }
    if artifact is not None:
        _refuse_int8(artifact)
        head_given = head if context.get_parameter_source("head") is click.core.ParameterSource.COMMANDLINE else None
        fixed = {**changes, "head": head_given, "dtype": dtype, "fp16": fp16 or None, "keep_onnx": keep_onnx}
        for name, value in fixed.items():
            if value is not None:
                raise UsageError(
                    f"`--{name.replace('_', '-')}` says how to export a checkpoint, and the graph in {artifact} is exported already.",
                    remedy="Leave it out, or give `--checkpoint FILE`.",
                )
    model = checkpoint or artifact
    assert model is not None
    details = [
        chosen_dtype if chosen_dtype != "fp32" and format_name not in TRT_FORMATS else "",
        "" if head == "nll" else head,
        target or "",
    ]
    out = out or model.parent / "-".join([format_name, *filter(None, details)])
    request: ExportRequest | None = None
    if checkpoint is not None:
        request = ExportRequest(
            checkpoint=checkpoint,
            out=out,
            format=cast(Literal["onnx", "torchscript"], format_name),
            head=cast(Any, head.replace("-", "_")),
            dtype=cast(Any, chosen_dtype),
            batch_size=batch_size,
            overwrite=overwrite,
            command=command_line(),
            **changes,
        )
    if format_name in TRT_FORMATS:
        from txl_deploy.trt.artifact import EngineRequest
        from txl_deploy.trt.profiles import parse_batch_range

        engine = EngineRequest(
            graph=artifact,
            checkpoint=request,
            out=out,
            rtx_only=format_name == "trt-rtx",
            batch=parse_batch_range(batch_range or batch_size),
            target=target,
            kit=kit,
            timing_cache=timing_cache,
            hardware_compatibility=(hardware_compatibility or "none").replace("-", "_"),
            optimization_level=optimization_level,
            keep_onnx=keep_onnx,
            overwrite=overwrite,
            command=command_line(),
        )
        _export_engine(engine, as_json)
        return
    assert request is not None
    exported = export_artifact(request)
    if as_json:
        echo_json(_describe(exported))
        return
    for line in _summary(exported.directory, exported.manifest):
        click.echo(line)
    if exported.manifest.audit is not None:
        click.echo(audit.line(exported.manifest.audit))
    if exported.parity is None:
        click.echo("Not compared with the checkpoint: the package that runs it is not installed here (`txl doctor`).", err=True)
    else:
        click.echo(
            f"Compared with the checkpoint over {exported.parity.n_segments} segments of {exported.checked_on}: {exported.parity.reason}."
        )


def _refuse_but_artifacts(context: click.Context, format_name: str) -> None:
    """Refuse what says how to export a checkpoint, where there is an exported model to serve."""
    what = "`--format triton`" if format_name == "triton" else "`--for-triton`"
    known = {"artifacts", "format_name", "out", "overwrite", "threads", "as_json", *TritonOptions.NAMES}
    for name in context.params:
        if name not in known and context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
            raise UsageError(
                f"`--{name.replace('_', '-')}` says how to export a checkpoint, and {what} takes an exported model.",
                remedy="Leave it out, and give `--artifact DIR`.",
            )


def _refuse_int8(artifact: Path) -> None:
    """Refuse to build an engine from a graph of int8, whose products are made for CPUs."""
    from txl_deploy.manifest import read_manifest

    if read_manifest(artifact).settings.dtype == "int8":
        raise UsageError(
            f"{artifact} is int8, which is for CPUs, and no engine is built from it.",
            remedy="Give `--checkpoint FILE`, or a graph of fp16 or fp32.",
        )


def _export_engine(request: EngineRequest, as_json: bool) -> None:
    from txl_deploy.trt.artifact import export_engine

    result = export_engine(request)
    if as_json:
        echo_json(result.describe())
    else:
        for line in result.lines():
            click.echo(line)
    if result.kit is not None and not request.kit:
        raise EnvironmentUnfitError(
            f"The engine was not built here: {result.why_not}. {result.directory} holds a kit that builds it on {result.target}.",
            remedy=f"Copy the folder there and run `{result.build_command}`."
            + ("" if result.hint is None else f" Or build here with another stack, after: {result.hint}."),
        )


def _describe(exported: Exported) -> dict[str, Any]:
    manifest, parity = exported.manifest, exported.parity
    return {
        "directory": str(exported.directory),
        "format": manifest.format,
        "files": {name: {"sha256": record.sha256, "bytes": record.bytes} for name, record in manifest.files.items()},
        "checkpoint_sha256": manifest.source.checkpoint_sha256,
        "head": manifest.settings.head,
        "dtype": manifest.settings.dtype,
        "memory_dtype": manifest.settings.memory_dtype,
        "tgt_len": manifest.settings.tgt_len,
        "mem_len": manifest.settings.mem_len,
        "ext_len": manifest.model["ext_len"],
        "memory": manifest.settings.memory,
        "precisions": manifest.precisions,
        "audit": manifest.audit,
        "checked": None
        if parity is None
        else {"passed": parity.passed, "max_abs_delta_nll": parity.max_abs_delta_nll, "on": exported.checked_on},
    }


def _summary(directory: Path, manifest: Manifest) -> list[str]:
    settings = manifest.settings
    extension = f", ext_len {manifest.model['ext_len']}" if manifest.model["ext_len"] else ""
    batch = "any batch size" if manifest.batch.max is None else f"batch size {manifest.batch.max}"
    lengths = f"tgt_len {settings.tgt_len}, mem_len {settings.mem_len}{extension}, {batch}"
    memory = f"{settings.memory} memory" + (f" of {settings.memory_dtype}" if settings.memory_dtype != settings.dtype else "")
    lines = [f"{directory}: {manifest.format}, {settings.dtype}, {settings.head.replace('_', '-')}, {memory}, {lengths}"]
    lines += [f"  {name}  {record.bytes / 1e6:.1f} MB  sha256 {record.sha256[:12]}…" for name, record in manifest.files.items()]
    return lines
