"""The folder a run works in: what it is called, and that no run in it is lost by mistake."""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import secrets
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from txl_train.callbacks import BEST_NAME, LAST_NAME
from txl_train.config import RunConfig
from txl_train.distributed import World
from txl_train.errors import EnvironmentUnfitError, UsageError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger(__name__)

LOCK_NAME = ".lock"
"""The file that a run holds locked as long as it works in a folder; it says who that is."""

_SEEN_WITHIN_S = 10.0
"""How long a new file may take to be seen on another machine."""


@contextlib.contextmanager
def work_folder(config: RunConfig, world: World, *, may_hold_a_run: bool) -> Iterator[Path]:
    """Yield the work folder, made by the first process; in debug mode one that vanishes at the end."""
    if config.train.debug:
        with tempfile.TemporaryDirectory(prefix="txl-debug-") as temporary:
            yield Path(temporary)
        return
    folder = named_work_dir(config, world.largest(int(time.time())))
    with contextlib.ExitStack() as held:
        if world.is_main:
            _make_folder(folder)
            held.enter_context(_alone_in(folder))
            if not may_hold_a_run:
                _check_free(folder)
        world.wait()
        _check_seen_by_all(folder, world)
        yield folder


def _check_seen_by_all(folder: Path, world: World) -> None:
    """See to it that all processes have the folder, not only one of its name on another machine.

    Raises:
        UsageError: one of them does not see what the first has written.
    """
    if world.size == 1:
        return
    token = world.largest(secrets.randbits(62) if world.is_main else 0)
    sign = folder / f".run-{token:x}"  # a name that no file system has cached
    if world.is_main:
        sign.write_text("Do all processes see this folder?\n", encoding="utf-8")
    world.wait()
    deadline = time.monotonic() + _SEEN_WITHIN_S
    while not (seen := sign.exists()) and time.monotonic() < deadline:
        time.sleep(0.1)
    blind = [rank for rank, sees in enumerate(world.gather(torch.tensor(seen))) if not sees]
    if world.is_main:
        sign.unlink(missing_ok=True)
    if blind:
        raise UsageError(
            f"Process {blind[0]} does not see what process 0 has written into {folder}.",
            remedy="Between machines, `--work-dir` must be in a file system that all of them share.",
        )


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Hold the folder against other runs until the end; the system lets go of it where this process is killed.

    Raises:
        UsageError: another run holds it.
    """
    path = folder / LOCK_NAME
    try:
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115  # held until the end
    except OSError as error:
        raise EnvironmentUnfitError(
            f"{path} cannot be written: {error.strerror}.", remedy="Choose another folder with `--work-dir`."
        ) from error
    with file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise UsageError(
                    f"{folder} is in use by another run: {file.read().strip() or 'which has just begun'}.",
                    remedy="Wait for it, stop it, or choose another `--work-dir`.",
                ) from None
            except OSError:  # a file system without locks
                log.debug("%s cannot be locked", path)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}\n")
        file.flush()
        yield


def named_work_dir(config: RunConfig, started: float) -> Path:
    """Return the path of the work folder with what `append_dataset` and `append_time` add to it; `started` in seconds since 1970."""
    folder = Path(config.train.work_dir)
    if config.train.append_dataset:
        folder = folder.with_name(f"{folder.name}-{config.data.dataset}")
    if config.train.append_time:
        folder = folder / time.strftime("%Y%m%d-%H%M%S", time.localtime(started))
    return folder


def _make_folder(folder: Path) -> None:
    """Make the work folder, unless it is there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise UsageError(f"The work folder {folder} is a file.", remedy="Choose another with `--work-dir`.") from None
    except OSError as error:
        raise EnvironmentUnfitError(
            f"The work folder {folder} cannot be made: {error.strerror}.", remedy="Choose another with `--work-dir`."
        ) from error


def _check_free(folder: Path) -> None:
    """See to it that no run in the folder is lost by mistake."""
    if any((folder / name).exists() for name in (LAST_NAME, BEST_NAME)):
        raise UsageError(
            f"{folder} holds a trained model already.",
            remedy="Continue it with `--resume`, train in another `--work-dir`, or begin anew with `--overwrite`, which deletes it.",
        )
