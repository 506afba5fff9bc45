"""The options that change which context a token sees, spelled the same in `eval`, `export` and `bench`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])


def length_options(command: F) -> F:
    """Add `--tgt-len`, `--mem-len`, `--ext-len`, `--clamp-len` and `--same-length/--no-same-length`; None keeps the model's own."""
    for option in (
        click.option(
            "--same-length/--no-same-length", default=None, help="Every token attends to the same number of keys.  [default: as trained]"
        ),
        click.option(
            "--clamp-len",
            type=int,
            metavar="N",
            help="Distances above it share one encoding, in tokens; -1 for no limit.  [default: as trained]",
        ),
        click.option(
            "--ext-len",
            type=click.IntRange(min=0),
            metavar="N",
            help="Tokens before each segment that are read once more as context and not scored.  [default: as trained]",
        ),
        click.option(
            "--mem-len", type=click.IntRange(min=0), metavar="N", help="Past positions kept per layer, in tokens.  [default: as trained]"
        ),
        click.option(
            "--tgt-len", type=click.IntRange(min=1), metavar="N", help="Tokens per stream and step.  [default: as evaluated in training]"
        ),
    ):
        command = option(command)
    return command


def memory_option(command: F) -> F:
    """Add `--memory` as the argument `memory: str | None`, one of kv, hidden; None means the best there is, or what an artifact has."""
    return click.option(
        "--memory",
        type=click.Choice(["kv", "hidden"]),
        help="What is kept from step to step: projected keys and values (fast), or hidden states (half the size).  [default: kv]",
    )(command)
