"""`txl verify`: is an exported model what its manifest says, byte for byte?"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click

from txl_deploy.cli.options import echo_json, json_option, verbosity_options
from txl_deploy.manifest import FILE_NAME, read_manifest, unlisted, verify
from txl_train.errors import ArtifactError, ValidationError
from txl_train.files import file_sha256


@click.command("verify")
@click.argument("directory", type=click.Path(path_type=Path), metavar="DIR")
@click.option(
    "--checkpoint",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Check also that the model was made from this checkpoint.  [default: the checkpoint is not looked at]",
)
@click.option(
    "--parent",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Of an engine: check also that it was built from the graph in this folder.  [default: only the copy of its manifest is looked at]",
)
@json_option
@verbosity_options
@click.pass_context
def command(context: click.Context, directory: Path, checkpoint: Path | None, parent: Path | None, as_json: bool) -> None:
    """Recompute the checksums of the exported model in DIR, and of the chain that leads to it.

    An engine's chain is: checkpoint, graph, engine, receipt. Ends with 4 if a file is missing or was changed, or if the model comes from
    another checkpoint or another graph; with 1 if a receipt in the folder is no proof of it.
    """
    from txl_deploy.receipt import examine

    manifest = read_manifest(directory)
    findings = verify(directory, checkpoint=checkpoint, parent=parent)
    others = unlisted(directory, manifest)
    receipts = examine(directory, manifest, file_sha256(directory / FILE_NAME))
    if as_json:
        document = {
            "directory": str(directory),
            "passed": not findings and all(proves is not False for _, proves, _ in receipts),
            "findings": [dataclasses.asdict(finding) for finding in findings],
            "files": sorted(manifest.files),
            "not_listed": others,
            "receipts": [{"file": name, "passed": proves, "message": told} for name, proves, told in receipts],
            "checkpoint_sha256": manifest.source.checkpoint_sha256,
            "checkpoint_checked": checkpoint is not None,
            "parent_manifest_sha256": None if manifest.source.parent is None else manifest.source.parent.manifest_sha256,
            "parent_checked": parent is not None,
        }
        echo_json(document)
    else:
        bad = {finding.file for finding in findings}
        for name, record in manifest.files.items():
            if name not in bad:
                click.echo(f"ok       {name}  {record.sha256}  {record.bytes} bytes")
        for finding in findings:
            click.echo(f"FAILED   {finding.file} {finding.message}")
        for name in others:
            click.echo(f"ignored  {name} is not part of the model")
        if manifest.source.parent is not None:
            whole = f"{manifest.source.parent.format} graph, manifest sha256 {manifest.source.parent.manifest_sha256}"
            click.echo(f"{'ok       ' if parent and not findings else '         '}built from {whole}{'' if parent else ' (not looked at)'}")
        origin = f"{manifest.source.checkpoint_name}, sha256 {manifest.source.checkpoint_sha256}"
        click.echo(
            f"{'ok       ' if checkpoint and not findings else '         '}made from {origin}{'' if checkpoint else ' (not looked at)'}"
        )
        for name, proves, told in receipts:
            click.echo(f"{'ok       ' if proves else 'FAILED   ' if proves is False else '         '}{name} {told}")
    if findings:
        if all(finding.problem == "other checkpoint" for finding in findings):
            told = f"{directory} is intact, but was not made from {checkpoint}.\nGive the checkpoint it was made from, or export this one."
        elif all(finding.problem == "other parent" and finding.file == FILE_NAME for finding in findings):
            told = f"{directory} is intact, but was not built from {parent}.\nGive the graph it was built from, or build from this one."
        else:
            told = f"{directory} is not what its manifest says.\nExport the checkpoint again with `txl export`."
        click.echo(f"Error: {told}", err=True)
        context.exit(ArtifactError.exit_code)
    doubtful = [name for name, proves, _ in receipts if proves is False]
    if doubtful:
        raise ValidationError(
            f"{directory} is intact, but {', '.join(doubtful)} in it proves nothing of it.",
            remedy="Make it again with `txl eval --artifact DIR --checkpoint FILE`, or remove it.",
        )
