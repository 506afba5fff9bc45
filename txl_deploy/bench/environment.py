"""The machine and the versions a measurement was made on.

Everything is best effort: what cannot be found out is None or absent, never an error. Host and user names are not recorded. Imports no
framework: versions come from the installed packages' metadata, GPUs from `nvidia-smi`.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
import time
from pathlib import Path
from typing import Any

PACKAGES = ("txl", "torch", "onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx", "numpy")
_GPU_FIELDS = {
    "name": "name",
    "driver": "driver_version",
    "memory_mib": "memory.total",
    "sm_clock_mhz": "clocks.sm",
    "power_limit_w": "power.limit",
    "temperature_c": "temperature.gpu",
}
_PROC = Path("/proc")
_SYS_CPU = Path("/sys/devices/system/cpu")


def describe_environment(*, threads: int | None = None, device: str = "cpu") -> dict[str, Any]:
    """Return what influences a latency on this machine, as plain values.

    `threads` is the number asked for (None: the frameworks' own choice), `device` where the runtimes compute. Takes about half a
    second, in which it also looks how busy others keep the processors, so it is called before measuring.
    """
    return {
        "time_utc": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "cores_usable": _usable_cores(),
        "cpu_governor": _read(_SYS_CPU / "cpu0" / "cpufreq" / "scaling_governor"),
        "load_average_1min": _load_average(),
        "cpu_busy_before": _cpu_busy(),
        "memory_gib": _memory_gib(),
        "threads": threads,
        "thread_settings": {k: os.environ[k] for k in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS") if k in os.environ},
        "device": device,
        "gpus": _gpus(),
        "os": _operating_system(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "git_commit": git_commit(),
    }


def cpu_model() -> str | None:
    """Return the processor's name as its maker writes it, or the best this system knows."""
    for line in (_read(_PROC / "cpuinfo") or "").splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "Model", "Hardware") and value.strip():
            return re.sub(r"\s+", " ", value.strip())
    if platform.system() == "Darwin":
        return _output(["sysctl", "-n", "machdep.cpu.brand_string"])
    return platform.processor() or platform.machine() or None


def git_commit(package: Path | None = None) -> str | None:
    """Return the commit of the checkout this package runs from, with "+changes" if files differ from it; None for an installed package.

    A package installed below somebody else's checkout (a virtual environment, say) is not part of it, so the file must be tracked.
    """
    folder = (package or Path(__file__)).resolve().parent
    name = (package or Path(__file__)).name
    if _output(["git", "-C", str(folder), "ls-files", "--error-unmatch", name]) is None:
        return None
    commit = _output(["git", "-C", str(folder), "rev-parse", "HEAD"])
    changed = _output(["git", "-C", str(folder), "status", "--porcelain", "--untracked-files=no"])
    return commit if commit is None or not changed else f"{commit}+changes"


def _operating_system() -> str:
    """Name and version number, without what a builder or owner has added to it."""
    version = re.match(r"[0-9.]*[0-9]", platform.release())
    return f"{platform.system()} {version.group() if version else ''}".strip()


def _usable_cores() -> int | None:
    with contextlib.suppress(AttributeError, OSError):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def _load_average() -> float | None:
    with contextlib.suppress(AttributeError, OSError):
        return round(os.getloadavg()[0], 2)
    return None


def _cpu_busy(seconds: float = 0.3) -> float | None:
    """Return the share of all processors' time that others use while this process sleeps, 0..1.

    The load average would not do: it remembers for minutes what this process' predecessors have computed.
    """
    before = _cpu_ticks()
    time.sleep(seconds)
    after = _cpu_ticks()
    if before is None or after is None or after[1] <= before[1]:
        return None
    return round((after[0] - before[0]) / (after[1] - before[1]), 3)


def _cpu_ticks() -> tuple[int, int] | None:
    """Return (busy, all) ticks of all processors since the start of the system."""
    fields = (_read(_PROC / "stat") or "").partition("\n")[0].split()
    if len(fields) < 6 or fields[0] != "cpu" or not all(field.isdigit() for field in fields[1:]):
        return None
    ticks = [int(field) for field in fields[1:9]]  # user nice system idle iowait irq softirq steal; guests are within user
    return sum(ticks) - ticks[3] - ticks[4], sum(ticks)


def _memory_gib() -> float | None:
    with contextlib.suppress(AttributeError, ValueError, OSError):
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    return None


def _gpus() -> list[dict[str, str]]:
    table = _output(["nvidia-smi", f"--query-gpu={','.join(_GPU_FIELDS.values())}", "--format=csv,noheader,nounits"])
    rows = [[cell.strip() for cell in line.split(",")] for line in (table or "").splitlines()]
    return [dict(zip(_GPU_FIELDS, row)) for row in rows if len(row) == len(_GPU_FIELDS)]


def _version(package: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


def _read(path: Path) -> str | None:
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return path.read_text(encoding="utf-8").strip() or None
    return None


def _output(command: list[str]) -> str | None:
    """Return what a command prints, or None if it is missing, fails or takes over 5 seconds."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
