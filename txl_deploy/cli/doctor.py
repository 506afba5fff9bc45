"""`txl doctor`: what works on this machine, for which GPUs it can build engines, and the command that mends each thing that does not."""

from __future__ import annotations

import dataclasses

import click

import txl_train
from txl_deploy.cli.options import echo_json, json_option, verbosity_options
from txl_deploy.doctor import Diagnosis, TargetCheck, examine, examine_target
from txl_train.errors import EnvironmentUnfitError


@click.command("doctor")
@click.option(
    "--target",
    metavar="NAME",
    help="Only say what building engines for this GPU needs and whether it can be done here, such as t4 or v100; ends with 3 if not.",
)
@json_option
@verbosity_options
@click.pass_context
def command(context: click.Context, target: str | None, as_json: bool) -> None:
    """Say what works on this machine, and give the one command that mends each thing that does not.

    Lists the GPUs for which engines can be built here, with what; for the others `txl export --kit` writes what builds one there.

    Ends with 3 if something that every command needs is missing or broken, with 0 otherwise: GPUs and optional packages may be absent.
    """
    if target is not None:
        found = examine_target(target)
        if as_json:
            echo_json({"txl": txl_train.__version__, "target": dataclasses.asdict(found)})
        else:
            for line in describe_target(found):
                click.echo(line)
        if not found.builds:
            context.exit(EnvironmentUnfitError.exit_code)
        return
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
    if diagnosis.targets:
        lines += ["", "Engines that can be built here, or on the target with a kit from here (`txl doctor --target NAME` says more)"]
    for target in diagnosis.targets:
        lines.append(f"  {'yes' if target.builds else 'kit':<8} {target.name:<13} {_how(target)}{', this GPU' if target.is_here else ''}")
        if target.remedy is not None:
            lines.append(f"  {'':<8} {'':<13} → {target.remedy}")
    return lines


def describe_target(target: TargetCheck) -> list[str]:
    """Return what is known of one target as lines of text; a command to copy is never wrapped."""
    lines = [f"{target.name}: compute capability {target.compute_capability} ({', '.join(target.gpus)})"]
    lines.append(f"  {'yes' if target.builds else 'kit':<8} {_how(target)}{', this GPU' if target.is_here else ''}")
    if target.remedy is not None:
        lines.append(f"  {'':<8} → {target.remedy}")
    lines += ["", "Versions that go together, best first"]
    for stack in target.stacks:
        versions = ", ".join(f"{name} {version}" for name, version in stack.versions.items())
        lines += [f"  {stack.builder}, {versions}", f"    {stack.install}"]
        lines += [f"    not built here: {problem}" for problem in stack.build_problems]
        lines += [f"    not run here: {problem}" for problem in stack.run_problems if problem not in stack.build_problems]
    if target.notes:
        lines += ["", "Notes", *(f"  {note}" for note in target.notes)]
    return [*lines, "", "Sources", *(f"  {source}" for source in target.sources)]


def _how(target: TargetCheck) -> str:
    return f"with {target.builder}" if target.builds else str(target.why_not)
