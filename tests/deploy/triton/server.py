"""A real Triton Inference Server on loopback: the one that the package nvidia-pytriton carries, with its Python backend.

It has an environment of its own, made by `make triton`, whose Python the backend runs; TXL_TRITONSERVER may name another one.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from tests.processes import free_port

READY_S = 120
"""How long a server may take until its models are loaded."""


def environment() -> Path:
    """Return the folder of the server's virtual environment, which may not be there."""
    named = os.environ.get("TXL_TRITONSERVER")
    return Path(named) if named else Path(sys.prefix) / "triton"


def _packages() -> Path:
    return Path(sysconfig.get_path("purelib", vars={"base": str(environment()), "platbase": str(environment())}))


def why_not() -> str | None:
    """Return why no server can be started here, None where it can."""
    if not _binary().is_file():
        return "Triton Inference Server is not installed (`make triton`)"
    if not _stub().is_file():
        return f"nvidia-pytriton has no Python backend for Python {sys.version_info[0]}.{sys.version_info[1]}"
    return None


def _binary() -> Path:
    return _packages() / "pytriton" / "tritonserver" / "bin" / "tritonserver"


def _stub() -> Path:
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    return _packages() / "pytriton" / "tritonserver" / "python_backend_stubs" / version / "triton_python_backend_stub"


class Server:
    """One process of the server, on ports of its own."""

    def __init__(self, repository: Path, work: Path) -> None:
        self.repository, self._work = repository, work
        backend = work / "backends" / "python"
        if not backend.exists():
            shutil.copytree(_packages() / "pytriton" / "tritonserver" / "backends" / "python", backend)
            shutil.copy(_stub(), backend)
        self._ports = [free_port() for _ in range(3)]
        self.http, self.grpc, self.metrics = (f"127.0.0.1:{port}" for port in self._ports)
        self.log = work / "server.log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until all models are loaded. RuntimeError with its log where that fails."""
        http, grpc, metrics = map(str, self._ports)
        libraries = [_packages() / "nvidia_pytriton.libs", sysconfig.get_config_var("LIBDIR")]
        variables = os.environ | {
            "LD_LIBRARY_PATH": ":".join(map(str, filter(None, [*libraries, os.environ.get("LD_LIBRARY_PATH")]))),
            "PATH": f"{environment() / 'bin'}:{os.environ['PATH']}",  # by which the backend finds its Python
            "OMP_NUM_THREADS": "1",
        }
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [
                    _binary(),
                    f"--model-repository={self.repository}",
                    f"--backend-directory={self._work / 'backends'}",
                    *("--http-address=127.0.0.1", "--grpc-address=127.0.0.1", "--metrics-address=127.0.0.1"),
                    *(f"--http-port={http}", f"--grpc-port={grpc}", f"--metrics-port={metrics}"),
                    "--exit-timeout-secs=5",
                ],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=variables,
                start_new_session=True,  # so that its helpers can be killed with it
            )
        until = time.monotonic() + READY_S
        while not self.is_ready():
            if self._process.poll() is not None or time.monotonic() > until:
                self.kill()
                raise RuntimeError(f"The server did not start:\n{self.log.read_text(errors='replace')[-30_000:]}")
            time.sleep(0.1)

    def is_ready(self) -> bool:
        """Return whether it says that it is ready for requests."""
        try:
            with urllib.request.urlopen(f"http://{self.http}/v2/health/ready", timeout=5) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return False

    def metrics_text(self) -> str:
        """Return its page of metrics."""
        with urllib.request.urlopen(f"http://{self.metrics}/metrics", timeout=5) as answer:
            return str(answer.read().decode())

    def kill(self) -> None:
        """Kill it at once, with all that it started."""
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def stop(self) -> int:
        """Ask it to end; return its exit status."""
        process = self._process
        assert process is not None
        process.send_signal(signal.SIGTERM)
        try:
            return process.wait(30)
        except subprocess.TimeoutExpired:
            return -1
        finally:
            self.kill()


@contextlib.contextmanager
def running(repository: Path, work: Path) -> Iterator[Server]:
    """Yield a started server, and end it."""
    server = Server(repository, work)
    server.start()
    try:
        yield server
    finally:
        server.kill()
