"""Options that take every value that follows them, as argparse's `nargs="+"` does: `--manual The game began`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import click

_NUMBER = re.compile(r"-\d+|-\d*\.\d+")


class GreedyCommand(click.Command):
    """A command without positional arguments; its options named in `greedy` are `multiple` and may be followed by several values."""

    def __init__(self, *arguments: Any, greedy: Sequence[str] = (), **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.greedy = tuple(greedy)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Give each value the name of its option, which is how Click reads them."""
        return super().parse_args(ctx, self._named(ctx, args))

    def _named(self, ctx: click.Context, args: Sequence[str]) -> list[str]:
        named: list[str] = []
        option: str | None = None
        for i, argument in enumerate(args):
            if argument in self.greedy:
                option = argument
                if i + 1 == len(args) or _is_option(args[i + 1]):
                    raise click.BadOptionUsage(option, f"Option '{option}' requires at least one value.", ctx)
            elif _is_option(argument):
                option = None
                named.append(argument)
            elif option is None:
                named.append(argument)
            else:
                named.append(f"{option}={argument}")
        return named


def _is_option(argument: str) -> bool:
    """As argparse sees it: neither a lone hyphen, nor a number, nor a text with blanks."""
    return argument.startswith("-") and argument != "-" and " " not in argument and not _NUMBER.fullmatch(argument)
