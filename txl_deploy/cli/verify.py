"""`txl verify`: is an exported model what its manifest says, byte for byte?"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click

from txl_deploy.cli.options import echo_json, json_option, verbosity_options
from txl_deploy.manifest import read_manifest, unlisted, verify
from txl_train.errors import ArtifactError


@click.command("verify")
@click.argument("directory", type=click.Path(path_type=Path), metavar="DIR")
@click.option(
    "--checkpoint",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Check also that the model was made from this checkpoint.  [default: the checkpoint is not looked at]",
)
@json_option
@verbosity_options
@click.pass_context
def command(context: click.Context, directory: Path, checkpoint: Path | None, as_json: bool) -> None:
    """Recompute the checksums of the exported model in DIR.

    Ends with 4 if a file is missing or was changed, or if the model comes from another checkpoint.
    """
    manifest = read_manifest(directory)
    findings = verify(directory, checkpoint=checkpoint)
    others = unlisted(directory, manifest)
    if as_json:
        document = {
            "directory": str(directory),
            "passed": not findings,
            "findings": [dataclasses.asdict(finding) for finding in findings],
            "files": sorted(manifest.files),
            "not_listed": others,
            "checkpoint_sha256": manifest.source.checkpoint_sha256,
            "checkpoint_checked": checkpoint is not None,
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
        origin = f"{manifest.source.checkpoint_name}, sha256 {manifest.source.checkpoint_sha256}"
        click.echo(
            f"{'ok       ' if checkpoint and not findings else '         '}made from {origin}{'' if checkpoint else ' (not looked at)'}"
        )
    if findings:
        if all(finding.problem == "other checkpoint" for finding in findings):
            told = f"{directory} is intact, but was not made from {checkpoint}.\nGive the checkpoint it was made from, or export this one."
        else:
            told = f"{directory} is not what its manifest says.\nExport the checkpoint again with `txl export`."
        click.echo(f"Error: {told}", err=True)
        context.exit(ArtifactError.exit_code)
