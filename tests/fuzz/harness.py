"""Gives one input to one reader, and says what came of it: success, an error of ours, or a fault.

A fault is any other exception, a hang, memory beyond a bound, a program started, a connection opened, or a file changed outside the folder
of the input.
"""

from __future__ import annotations

import contextlib
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from txl_train.errors import TxlError

LONGEST_SECONDS = 20
"""Processor time that one input may take; what waits for something may take ten times as long."""
LARGEST_BYTES = 3 << 30
"""Address space that a reader may take on top of what the process has."""


@dataclass(frozen=True)
class Target:
    """A reader, and valid inputs to begin from."""

    name: str
    file: str
    """Where the input lies within its folder."""
    prepare: Callable[[Path], None]
    """Writes a valid folder."""
    read: Callable[[Path], object]
    """Reads the folder."""
    seeds: tuple[bytes, ...] = ()
    """Further contents of `file`."""
    mend: Callable[[bytes], bytes] | None = None
    """Makes the checksum of an input right again, as somebody who means to deceive would."""
    tokens: tuple[bytes, ...] = ()
    """Pieces that the format is made of."""
    kind: str = "bytes"
    """How inputs are changed: bytes, json or zip."""
    opens: bool = True
    """False where this machine refuses the valid file too, for want of a GPU."""
    cost: int = 1
    """How many times less is tried in a short run."""
    refuses: bool = True
    """False where anything is taken, or made anew."""


class Fault(Exception):
    """A reader did what no file may make it do."""


# --- what a reader must not do


_STARTS = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty", "subprocess.Popen", "pty.spawn", "os.startfile")
_CONNECTS = ("socket.connect", "socket.bind", "urllib.Request", "ftplib.connect", "smtplib.connect")
_CHANGES = (
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.mkdir",
    "os.symlink",
    "os.link",
    "os.chmod",
    "os.chown",
    "os.truncate",
    "shutil.rmtree",
)
_guarded: Path | None = None
_seen: list[str] = []


def _within(path: object, folder: object) -> bool:
    if isinstance(path, int) or path is None:
        return True
    try:
        name = os.fsdecode(path)  # type: ignore[arg-type]
        resolved = os.path.realpath(f"/proc/self/fd/{folder}/{name}" if isinstance(folder, int) and folder >= 0 else name)
    except (TypeError, ValueError):
        return True
    return resolved == os.devnull or (_guarded is not None and (resolved + os.sep).startswith(str(_guarded) + os.sep))


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _guarded is None or threading.current_thread() is not threading.main_thread():
        return
    if event in _STARTS or event in _CONNECTS:
        _seen.append(f"{event} {arguments!r:.200}")
        raise Fault(_seen[-1])
    writes = event == "open" and bool(arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC))
    opened = arguments[-1] if event in _CHANGES else None  # the folder that a name is relative to, where it is given
    if (writes or event in _CHANGES) and not _within(arguments[0], opened):
        _seen.append(f"{event} outside its folder: {arguments!r:.200}")
        raise Fault(_seen[-1])


_hooked = False


@contextlib.contextmanager
def guarded(folder: Path) -> Iterator[None]:
    """Make everything a fault that no reader of files has to do; what was tried is told even where the reader caught it."""
    global _guarded, _hooked
    if not _hooked:
        sys.addaudithook(_hook)
        _hooked = True
    _seen.clear()
    _guarded = folder.resolve()
    try:
        yield
    finally:
        _guarded = None
        if _seen:
            raise Fault(_seen[0])


@contextlib.contextmanager
def limited_time(seconds: int) -> Iterator[None]:
    """Raise `Fault` in what takes longer."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise Fault(f"a hang: more than {seconds} s")

    clocks = ((signal.SIGPROF, signal.ITIMER_PROF, seconds), (signal.SIGALRM, signal.ITIMER_REAL, 10 * seconds))
    before = [signal.signal(number, ring) for number, _, _ in clocks]
    for _, clock, limit in clocks:
        signal.setitimer(clock, limit)
    try:
        yield
    finally:
        for (number, clock, _), handler in zip(clocks, before):
            signal.setitimer(clock, 0)
            signal.signal(number, handler)


@contextlib.contextmanager
def limited_memory(extra: int) -> Iterator[None]:
    """Refuse more address space than `extra` bytes on top of what there is."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm", encoding="ascii") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + extra, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def run(target: Target, folder: Path, data: bytes) -> str:
    """Read `data` in the folder that `target.prepare` has written, and return "read" or the name of our error. Raises `Fault`."""
    (folder / target.file).write_bytes(data)
    scratch = folder / "scratch"  # temporary files are no fault
    scratch.mkdir(exist_ok=True)
    before, tempfile.tempdir = tempfile.tempdir, str(scratch)
    try:
        with warnings.catch_warnings(), guarded(folder), limited_time(LONGEST_SECONDS):
            warnings.simplefilter("ignore")
            target.read(folder)
    except TxlError as error:
        if not error.message.strip():
            raise Fault("an error without a message") from error
        return type(error).__name__
    except Fault:
        raise
    except RecursionError as error:
        raise Fault("RecursionError") from error
    except MemoryError as error:
        raise Fault("MemoryError: more memory than a file of this size may ask for") from error
    except Exception as error:
        raise Fault(f"{type(error).__name__}: {error}"[:300]) from error
    finally:
        tempfile.tempdir = before
    return "read"


def fresh(target: Target, folder: Path) -> tuple[bytes, ...]:
    """Write the valid folder anew and return the inputs to begin from."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    target.prepare(folder)
    return ((folder / target.file).read_bytes(), *target.seeds)


def tidy(folder: Path, kept: set[Path]) -> None:
    """Remove the files that reading has left in a folder: some readers look through all of them."""
    for path in [path for path in folder.rglob("*") if path.is_file() or path.is_symlink()]:
        if path not in kept:
            path.unlink()


def inputs(target: Target, seeds: tuple[bytes, ...], count: int, seed: int) -> Iterator[bytes]:
    """Yield changed inputs, the same ones for the same `seed`."""
    from tests.fuzz.mutate import change

    chance = random.Random(f"{target.name} {seed}")
    for _ in range(count):
        data = change(target, chance.choice(seeds), seeds, chance)
        if target.mend is not None and chance.random() < 0.75:
            with contextlib.suppress(Exception):  # what is too damaged to be mended stays as it is
                data = target.mend(data)
        yield data
