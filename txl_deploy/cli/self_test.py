"""`txl parity --self-test`: makes the field's mistakes on purpose, and tells which check finds each; exit 1 if one is not found."""

from __future__ import annotations

from pathlib import Path

import click

from txl_deploy.cli.options import echo_json
from txl_deploy.cli.progress import progress
from txl_train.errors import ValidationError


def run_self_test(checkpoint: Path | None, as_json: bool, out: Path | None) -> None:
    """Run the self-test on the built-in models or on a checkpoint, and print the table.

    Args:
        checkpoint: a user's model; None takes the built-in ones.
        as_json: print one JSON document instead of the table.
        out: also write the outcome there: Markdown if its name ends in .md, otherwise JSON.

    Raises:
        ValidationError: a mistake was not found, or something was found where none was made.
        UsageError: the checkpoint is missing, or `out` holds something else.
    """
    from txl_deploy.parity import self_test, self_test_table
    from txl_deploy.parity.mutations import MUTATIONS
    from txl_train.files import check_replaceable, whole_or_absent, write_json

    as_markdown = out is not None and out.suffix == ".md"
    if out is not None:
        check_replaceable(out, b"# Mutations" if as_markdown else b"{")
    with progress("making mistakes", len(MUTATIONS)) as advance:
        outcome = self_test.run(checkpoint, on_step=advance)
    if out is not None and as_markdown:
        with whole_or_absent(out) as file:
            file.write(self_test_table.markdown(outcome).encode())
    elif out is not None:
        write_json(out, outcome.to_dict())
    if as_json:
        echo_json(outcome.to_dict())
    else:
        for line in self_test_table.lines(outcome):
            click.echo(line)
    applicable = [row for row in outcome.rows if row.skipped is None]
    if not outcome.passed:
        failed = [row.mutation.name for row in applicable if not row.passed]
        raise ValidationError(
            f"{len(failed)} of {len(applicable)} mutations were not found, or were flagged while switched off: {', '.join(failed)}.",
            remedy="What the checks of this installation say of an export is not to be relied on until this is mended.",
        )
    if not as_json:
        click.echo(f"PASSED: all {len(applicable)} mutations were found, and none where it was switched off")
