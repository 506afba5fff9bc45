"""How a command behaves in several processes at once: all succeed or all end, and one of them says why."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeVar, cast

import click

from txl_train.errors import EnvironmentUnfitError, TxlError

if TYPE_CHECKING:
    from txl_train.distributed import World

T = TypeVar("T")


def all_or_none(world: World, action: Callable[[], T]) -> T:
    """Return what `action` does, once it is done in all processes; all must call this.

    Where it fails, all end with its exit code, and the first of those in which it failed reports the error (`first_alone_reports`).
    """
    if world.size == 1:
        return action()
    import torch

    result: T | None = None
    error: TxlError | None = None
    try:
        result = action()
    except TxlError as caught:
        error = caught
    codes = [int(code) for code in world.gather(torch.tensor(0 if error is None else error.exit_code))]
    failed = [rank for rank, code in enumerate(codes) if code]
    if failed:
        if error is not None and failed[0] == world.rank:
            raise _OwnError(error)
        raise click.exceptions.Exit(codes[failed[0]])
    return cast(T, result)


@contextlib.contextmanager
def first_alone_reports(world: World, *, everyone: bool = False) -> Iterator[None]:
    """Keep the other processes from repeating an error that all have: they end with its code, unless `everyone` is to be heard."""
    try:
        yield
    except _OwnError as own:
        raise own.error from own
    except TxlError as error:
        if world.is_main or everyone:
            raise
        raise click.exceptions.Exit(error.exit_code) from error


class _OwnError(Exception):
    """An error that this process is to report, whichever it is."""

    def __init__(self, error: TxlError) -> None:
        super().__init__(str(error))
        self.error = error


def device_of(world: World, resolved: str) -> str:
    """Return the device of this process for `resolved`, cpu or cuda:0: of several processes on a machine with GPUs, each has its own.

    Raises EnvironmentUnfitError if there are fewer GPUs than processes.
    """
    if world.size == 1 or not resolved.startswith("cuda"):
        return resolved
    import torch

    if world.local_rank >= torch.cuda.device_count():
        raise EnvironmentUnfitError(
            f"This is process {world.local_rank} of its machine (from 0), which has {torch.cuda.device_count()} GPUs.",
            remedy="Start as many processes as there are GPUs with `torchrun --nproc-per-node N`, or use `--device cpu`.",
        )
    torch.cuda.set_device(world.local_rank)
    return f"cuda:{world.local_rank}"
