"""`txl doctor`: what works on this machine, and the command that mends each thing that does not."""

from __future__ import annotations

import dataclasses

import click

import txl_train
from txl_deploy.cli.options import echo_json, json_option, verbosity_options
from txl_deploy.doctor import Diagnosis, examine
from txl_train.errors import EnvironmentUnfitError


@click.command("doctor")
@json_option
@verbosity_options
@click.pass_context
def command(context: click.Context, as_json: bool) -> None:
    """Say what works on this machine, and give the one command that mends each thing that does not.

    Ends with 3 if something that every command needs is missing or broken, with 0 otherwise: GPUs and optional packages may be absent.
    """
    diagnosis = examine()
    if as_json:
        echo_json({"txl": txl_train.__version__, "is_fit": diagnosis.is_fit, **dataclasses.asdict(diagnosis)})
    else:
        for line in describe(diagnosis):
            click.echo(line)
    if not diagnosis.is_fit:
        context.exit(EnvironmentUnfitError.exit_code)


def describe(diagnosis: Diagnosis) -> list[str]:
    """Return the diagnosis as lines of text; a command to copy is never wrapped."""
    machine = diagnosis.environment
    parts = [machine["os"], machine["cpu"], f"{machine['cores_usable']} of {machine['cores']} cores", f"{machine['memory_gib']} GiB memory"]
    gpus = [f"{gpu['name']} (driver {gpu['driver']})" for gpu in machine["gpus"]] or ["no NVIDIA GPU"]
    lines = [f"txl {txl_train.__version__} on {', '.join(str(part) for part in (*parts, *gpus))}", "", "What is here"]
    for check in diagnosis.checks:
        lines.append(f"  {check.status:<8} {check.name:<13} {check.found}")
        if check.remedy is not None:
            lines.append(f"  {'':<8} {'':<13} → {check.remedy}")
    lines += ["", "What works here"]
    for ability in diagnosis.abilities:
        lines.append(f"  {'yes' if ability.works else 'no':<8} {ability.name}{'' if ability.why_not is None else f' ({ability.why_not})'}")
    return lines
