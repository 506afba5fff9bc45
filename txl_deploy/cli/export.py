"""`txl export`: writes a checkpoint as ONNX or TorchScript, compared with the checkpoint before it gets its name."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, cast

import click

from txl_deploy.cli.lengths import length_options, memory_option
from txl_deploy.cli.options import command_line, echo_json, json_option, threads_option, verbosity_options


@click.command("export")
@click.option(
    "--checkpoint", "--model", type=click.Path(path_type=Path), required=True, metavar="FILE", help="A checkpoint that `txl train` wrote."
)
@click.option("--format", "format_name", type=click.Choice(["onnx", "torchscript"]), required=True, help="What to write.")
@click.option("--out", "-o", "--output", type=click.Path(path_type=Path), required=True, metavar="DIR", help="Folder to make.")
@memory_option
@length_options
@click.option("--overwrite", is_flag=True, help="Replace an exported model that is there already.")
@threads_option
@json_option
@verbosity_options
def command(
    checkpoint: Path,
    format_name: str,
    out: Path,
    memory: str | None,
    tgt_len: int | None,
    mem_len: int | None,
    ext_len: int | None,
    clamp_len: int | None,
    same_length: bool | None,
    overwrite: bool,
    threads: int | None,
    as_json: bool,
) -> None:
    """Write a checkpoint as a graph with explicit memory inputs and outputs, any batch size, fixed lengths.

    The folder gets the graph, the vocabulary and a manifest with the sha256 of everything. Before it gets its name, the graph is run
    on random tokens and compared with the checkpoint; if it differs, nothing is written and the exit code is 1.
    """
    from txl_deploy.export.artifact import ExportRequest, export_artifact
    from txl_deploy.runtimes.registry import use_threads
    from txl_train.config import MemoryKind

    use_threads(threads)
    exported = export_artifact(
        ExportRequest(
            checkpoint=checkpoint,
            out=out,
            format=cast(Literal["onnx", "torchscript"], format_name),
            memory=cast(MemoryKind | None, memory),
            tgt_len=tgt_len,
            mem_len=mem_len,
            ext_len=ext_len,
            clamp_len=clamp_len,
            same_length=same_length,
            overwrite=overwrite,
            command=command_line(),
        )
    )
    parity = exported.parity
    if as_json:
        echo_json(
            {
                "directory": str(exported.directory),
                "format": exported.manifest.format,
                "files": {name: {"sha256": record.sha256, "bytes": record.bytes} for name, record in exported.manifest.files.items()},
                "checkpoint_sha256": exported.manifest.source.checkpoint_sha256,
                "tgt_len": exported.manifest.settings.tgt_len,
                "mem_len": exported.manifest.settings.mem_len,
                "ext_len": exported.manifest.model["ext_len"],
                "memory": exported.manifest.settings.memory,
                "checked": None if parity is None else {"passed": parity.passed, "max_abs_delta_nll": parity.max_abs_delta_nll},
            }
        )
        return
    settings = exported.manifest.settings
    extension = f", ext_len {exported.manifest.model['ext_len']}" if exported.manifest.model["ext_len"] else ""
    lengths = f"tgt_len {settings.tgt_len}, mem_len {settings.mem_len}{extension}, any batch size"
    click.echo(f"{exported.directory}: {format_name}, fp32, {settings.memory} memory, {lengths}")
    for name, record in exported.manifest.files.items():
        click.echo(f"  {name}  {record.bytes / 1e6:.1f} MB  sha256 {record.sha256[:12]}…")
    if parity is None:
        click.echo("Not compared with the checkpoint: the package that runs it is not installed here (`txl doctor`).", err=True)
    else:
        click.echo(f"Compared with the checkpoint over {parity.n_segments} segments of random tokens: {parity.reason}.")
