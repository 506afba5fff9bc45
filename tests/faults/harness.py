"""Runs `txl` in a process that is killed, or whose disk fails, at a moment of our choice, and tells what became of it.

A moment is a time, or the number of an operation on the file system below the folder: opening for writing, making, renaming, removing. The
operations are counted by an audit hook of Python, so `every` one of them can be the one that fails. The process has a session of its own,
so that what it leaves running is found.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.processes import start

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.link", "os.symlink", "os.chmod"}
KILLED = -signal.SIGKILL
LEFT_ALONE_S = 30.0
"""A process whose parent was killed must have ended by then."""


@dataclass(frozen=True)
class Disturbance:
    """What happens at the operation number `at`, from 1: SIGKILL, or an `OSError` with this number, once or from then on."""

    at: int
    errno: int | None = None
    lasting: bool = False


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    """Its exit code; -9 where it was killed."""
    operations: int | None
    """Operations on the file system that it began; None where it was killed."""
    said: str
    """What it wrote, standard output and error together."""


def run_txl(arguments: list[str], folder: str, output: str, disturbance: Disturbance | None, limits: dict[int, int]) -> tuple[int, int]:
    """What the process runs: `txl` with these arguments."""
    import resource

    os.setsid()
    with open(output, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    from txl_deploy.cli.main import main

    for kind, limit in limits.items():
        total = limit + (_address_space() if kind == resource.RLIMIT_AS else 0)
        resource.setrlimit(kind, (total, total))
    seen = _Operations(folder, disturbance)
    sys.addaudithook(seen)
    code = main(arguments)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    seen.over = True
    return code, seen.count


def _address_space() -> int:
    """Return the bytes that this process has mapped."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")


class _Operations:
    """Counts what changes the file system below a folder, and disturbs one of them."""

    def __init__(self, folder: str, disturbance: Disturbance | None) -> None:
        self.count = 0
        self.over = False
        self._folder = folder
        self._disturbance = disturbance

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.over or (event != "open" and event not in _CHANGES):
            return
        if event == "open":
            path, mode, flags = arguments
            writes = any(letter in mode for letter in "wxa+") if isinstance(mode, str) else bool((flags or 0) & _WRITING)
            if not writes:
                return
        else:
            path = arguments[0]
        if not isinstance(path, (str, bytes, os.PathLike)) or not os.fsdecode(path).startswith(self._folder):
            return
        self.count += 1
        wanted = self._disturbance
        if wanted is None or self.count < wanted.at or (self.count > wanted.at and not wanted.lasting):
            return
        if wanted.errno is None:
            os.kill(os.getpid(), signal.SIGKILL)
        else:
            raise OSError(wanted.errno, os.strerror(wanted.errno), os.fsdecode(path))


def run(
    arguments: list[str],
    folder: Path,
    *,
    disturbance: Disturbance | None = None,
    kill: Callable[[], None] | None = None,
    limits: dict[int, int] | None = None,
    output: Path | None = None,
    may_crash: bool = False,
    timeout_s: float = 300,
) -> Ended:
    """Run `txl`, whose work lies in `folder`, and return how it ended.

    Args:
        kill: returns when the process is to be killed; it may end before.
        limits: of `resource.setrlimit`; of address space beyond what the process has when it begins.
        output: where it writes what it says; beside `folder` if None.
        may_crash: native code may end the process, as where it gets no memory; the exit code is then the signal's, negative.
    """
    environment = {"TXL_CACHE_DIR": str(folder / "cache"), "CI": "true", "OMP_NUM_THREADS": "1", "TXL_DEBUG": "0"}
    output = output or folder.with_suffix(".out")
    process, answer = start(run_txl, arguments, str(folder), str(output), disturbance, limits or {}, **environment)
    assert process.pid is not None
    if kill is not None:
        kill()
        process.kill()
    process.join(timeout_s)
    if process.is_alive():
        process.kill()
        process.join()
        raise AssertionError(f"{' '.join(arguments)} hangs")
    said = output.read_text(errors="replace") if output.exists() else ""
    try:
        succeeded, result = answer.recv() if answer.poll(0) else (None, None)
    except EOFError:
        succeeded, result = None, None
    if succeeded is None:
        assert process.exitcode == KILLED or may_crash, f"{' '.join(arguments)} ended with {process.exitcode}: {said[-2000:]}"
        _wait_for_the_rest(process.pid)
        return Ended(process.exitcode or 0, None, said)
    assert succeeded, result
    return Ended(*result, said)


def _wait_for_the_rest(session: int) -> None:
    deadline = time.monotonic() + LEFT_ALONE_S
    while alive := _living(session):
        assert time.monotonic() < deadline, f"processes {alive} live on after the one that started them was killed"
        time.sleep(0.02)


def _living(session: int) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] not in "ZX":
            found.append(int(entry.parent.name))
    return found


def at_random(chance: random.Random, folder: Path, seconds: float) -> Callable[[], None]:
    """Return a wait for a moment of a command that takes `seconds`: any, or one soon after something unfinished lies in `folder`."""
    if chance.random() < 0.5:
        delay = chance.uniform(0, seconds)
        return lambda: time.sleep(delay)
    delay = chance.choice([0.0, chance.uniform(0, 0.03), chance.uniform(0, 0.5 * seconds)])

    def wait() -> None:
        deadline = time.monotonic() + 1.5 * seconds
        before = set(unfinished(folder))
        while time.monotonic() < deadline and not set(unfinished(folder)) - before:
            time.sleep(0.001)
        time.sleep(delay)

    return wait


def unfinished(folder: Path) -> list[Path]:
    """Return what lies below `folder` under a name for what is not finished."""
    found = []
    for root, folders, files in os.walk(folder):
        found += [Path(root) / name for name in (*folders, *files) if name.startswith(".") and name.endswith((".tmp", ".lock"))]
    return [path for path in found if path.name != ".lock"]  # that of a work folder stays
