"""The command `txl` from a process that has imported everything already, for scripts that run it a dozen times.

Each run is a process of its own with the caller's folder, environment and standard streams, forked from one that has only imported; that
saves the seconds in which Python reads PyTorch. That `txl` starts by itself is shown elsewhere, by the README's quick start among others.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LENGTH_BYTES = 8
IMPORTED = ("onnx", "onnxruntime", "torch._dynamo", "txl_deploy.export.artifact", "txl_deploy.runtimes.registry", "txl_train.run")


@contextlib.contextmanager
def warm_txl(folder: Path) -> Iterator[list[str]]:
    """Yield the beginning of a command that does what `txl` does; the socket lies in `folder`."""
    path = folder / "txl.socket"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen([sys.executable, "-m", "tests.warm", str(path)], env=environment, stdout=subprocess.PIPE)
    try:
        assert server.stdout is not None
        assert server.stdout.readline() == b"listening\n"
        yield [sys.executable, "-S", "-E", __file__, "--ask", str(path)]  # without site, it starts in some milliseconds
    finally:
        server.terminate()
        server.communicate()


def ask(path: str, arguments: list[str]) -> int:
    """Have the server run `txl` with the arguments; return its exit code."""
    message = json.dumps({"arguments": arguments, "folder": os.getcwd(), "environment": dict(os.environ)}).encode()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        socket.send_fds(connection, [len(message).to_bytes(LENGTH_BYTES, "big")], [0, 1, 2])
        connection.sendall(message)
        return int(connection.recv(16) or b"70")  # nothing, where the server has ended


def serve(path: str) -> None:
    """Import what the commands import, then fork for each that asks. Returns in the process that is to run `main`."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        sys.stdout.write("listening\n")
        sys.stdout.flush()
        for name in IMPORTED:
            importlib.import_module(name)
        while True:
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                break
            connection.close()
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG) != (0, 0):
                    pass
    with connection:
        start, streams, _, _ = socket.recv_fds(connection, LENGTH_BYTES, 3)
        message = b""
        while len(message) < int.from_bytes(start, "big"):
            message += connection.recv(1 << 16)
        if child := os.fork():
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            connection.sendall(str(code if code >= 0 else 128 - code).encode())
            os._exit(0)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    asked = json.loads(message)
    os.chdir(asked["folder"])
    os.environ.clear()
    os.environ.update(asked["environment"])
    sys.argv = ["txl", *asked["arguments"]]


if __name__ == "__main__":
    if sys.argv[1] == "--ask":
        sys.exit(ask(sys.argv[2], sys.argv[3:]))
    serve(sys.argv[1])
    from txl_deploy.cli.main import main

    sys.exit(main())
