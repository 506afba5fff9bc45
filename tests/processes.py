"""Runs functions in processes of their own, with PyTorch already imported: several that train together, or one that is to be killed.

The processes come from a server that has imported the toolkit and computed nothing, so each starts in some milliseconds. What they are
to run must be found by importing: functions at the top of a module, and arguments that can be pickled.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch._dynamo", "txl_train.run", "tests.processes"])  # the first comes with every optimizer


def preload(*modules: str) -> None:
    """Let the server import these too, before the first process is started: each then has them at once."""
    _CONTEXT.set_forkserver_preload(["torch._dynamo", "txl_train.run", "tests.processes", *modules])


def _call(function: Callable[..., Any], arguments: tuple[Any, ...], environment: dict[str, str], answer: Connection) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ.update(environment)
    try:
        answer.send((True, function(*arguments)))
    except BaseException as error:
        answer.send((False, f"{type(error).__name__}: {error}\n{traceback.format_exc()}"))


def start(function: Callable[..., Any], *arguments: Any, **environment: str) -> tuple[ForkServerProcess, Connection]:
    """Begin `function(*arguments)` in a process of its own; the connection will hold (True, result) or (False, error)."""
    answer, sender = _CONTEXT.Pipe(duplex=False)
    process = _CONTEXT.Process(target=_call, args=(function, arguments, environment, sender))
    process.start()
    sender.close()
    return process, answer


def in_processes(count: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Run `function(*arguments)` in `count` processes that can meet each other, as torchrun would; return their results by rank."""
    common = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    started = [start(function, *arguments, RANK=str(rank), LOCAL_RANK=str(rank), **common) for rank in range(count)]
    results = []
    with _reaped([process for process, _ in started]):
        for rank, (_, answer) in enumerate(started):
            assert answer.poll(120), f"process {rank} said nothing for two minutes"
            succeeded, result = answer.recv()
            assert succeeded, f"process {rank}: {result}"
            results.append(result)
    return results


@contextlib.contextmanager
def _reaped(processes: list[ForkServerProcess]) -> Iterator[None]:
    try:
        yield
    finally:
        for process in processes:
            process.join(10)
            process.kill()
            process.join()


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
