"""The machine and the versions a measurement was made on.

Everything is best effort: what cannot be found out is None or absent, never an error. Host and user names are not recorded. Imports no
framework: versions come from the installed packages' metadata, GPUs from `nvidia-smi`. What changes while measuring is read before and
after, and what of it spoils a measurement is judged here.
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
from collections.abc import Collection, Mapping
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
_GPU_DETAILS = {
    "max_sm_clock_mhz": "clocks.max.sm",
    "memory_clock_mhz": "clocks.mem",
    "max_memory_clock_mhz": "clocks.max.mem",
    "power_w": "power.draw",
    "persistence_mode": "persistence_mode",
    "mig_mode": "mig.mode.current",
    "compute_mode": "compute_mode",
}
_GPU_STATE = {
    "sm_clock_mhz": "clocks.sm",
    "memory_clock_mhz": "clocks.mem",
    "power_w": "power.draw",
    "temperature_c": "temperature.gpu",
    "utilization_percent": "utilization.gpu",
    "performance_state": "pstate",
}
_THROTTLE_QUERIES = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")
"""The same by its name now, and before driver 530."""
_THROTTLE_BITS = {
    0x04: "sw_power_cap",
    0x08: "hw_slowdown",
    0x10: "sync_boost",
    0x20: "sw_thermal_slowdown",
    0x40: "hw_thermal_slowdown",
    0x80: "hw_power_brake_slowdown",
}
"""nvml.h, nvmlClocksEventReasons, without those that are wanted: idle, and clocks that somebody has set."""
_THROTTLE_COUNTERS = {
    "hw_slowdown": "clocks_event_reasons_counters.hw_slowdown",
    "hw_thermal_slowdown": "clocks_event_reasons_counters.hw_thermal_slowdown",
    "hw_power_brake_slowdown": "clocks_event_reasons_counters.hw_power_brake_slowdown",
    "sw_thermal_slowdown": "clocks_event_reasons_counters.sw_thermal_slowdown",
    "sw_power_cap": "clocks_event_reasons_counters.sw_power_cap",
}
"""Microseconds since the driver was loaded; newer drivers tell them."""
SPOILING = ("hw_slowdown", "hw_thermal_slowdown", "sw_thermal_slowdown", "hw_power_brake_slowdown")
"""Reasons for lower clocks that are an accident. The limit of the card's own power is none: it is how a T4 runs under load every day."""

BUSY_SHARE = 0.10
"""Of the time of the processors that this process may use: more of it used by others makes latencies longer and scatter more."""
THROTTLED_SHARE = 0.01
"""Of the time measured: a GPU slowed down for longer is another GPU."""
_LEAST_SECONDS = 1.0
"""The system counts its processors' time in hundredths of a second: over less than this a share would be a guess."""

_PROC = Path("/proc")
_SYS_CPU = Path("/sys/devices/system/cpu")
_EXTENSIONS = (
    "avx2",
    "fma",
    "f16c",
    "avx_vnni",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_int8",
    "amx_bf16",
    "asimddp",
    "i8mm",
    "bf16",
    "sve",
)
"""Names of the Linux kernel for what decides the speed of matrix products on x86 and on ARM."""
_SYS_THERMAL = Path("/sys/class/thermal")


def describe_environment(*, threads: int | None = None, device: str = "cpu") -> dict[str, Any]:
    """Return what influences a latency on this machine, as plain values.

    `threads` is the number asked for (None: the frameworks' own choice), `device` where the runtimes compute. Takes about half a
    second, in which it also looks how busy others keep the processors, so it is called before measuring.
    """
    return {
        "time_utc": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": cpu_model(),
        "cpu_extensions": cpu_extensions(),
        "cores": os.cpu_count(),
        "cores_usable": _usable_cores(),
        "cpu_governor": _read(_SYS_CPU / "cpu0" / "cpufreq" / "scaling_governor"),
        "cpu_governors": _governors(),
        "cpu_boost": _boost(),
        "cpu_mhz": _cpu_mhz(),
        "cpu_temperature_c": _cpu_temperature(),
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


def describe_state() -> dict[str, Any]:
    """Return what of the machine changes from minute to minute, as plain values: load, clocks, temperatures, power, throttling.

    Read before and after a measurement, for `disturbances` and for the record. Takes some milliseconds; where there is a GPU, some tenths
    of a second.
    """
    ticks, per_second = _cpu_ticks(), _ticks_per_second()
    return {
        "time_utc": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "clock_s": round(time.monotonic(), 3),
        "load_average_1min": _load_average(),
        "cpu_busy_s": None if ticks is None else round(ticks[0] / per_second, 2),
        "cpu_all_s": None if ticks is None else round(ticks[1] / per_second, 2),
        "process_cpu_s": round(time.process_time(), 3),
        "cpu_mhz": _cpu_mhz(),
        "cpu_temperature_c": _cpu_temperature(),
        "cpu_throttle_count": _cpu_throttle_count(),
        "gpus": _gpu_states(),
    }


def others_share(before: Mapping[str, Any], after: Mapping[str, Any], own_cpu_s: float | None = None) -> float | None:
    """Return the share, 0..1, of its processors' time between two states that this process did not use itself, but others did.

    `own_cpu_s` is what was used by all processes that measure together (None: only this one). None where the system does not tell, or the
    two are less than a second apart.
    """
    if any(state.get(key) is None for state in (before, after) for key in ("cpu_busy_s", "cpu_all_s", "process_cpu_s")):
        return None
    busy, everything = (after[key] - before[key] for key in ("cpu_busy_s", "cpu_all_s"))
    own = after["process_cpu_s"] - before["process_cpu_s"] if own_cpu_s is None else own_cpu_s
    if everything < _LEAST_SECONDS:
        return None
    return float(min(max((busy - own) / everything, 0.0), 1.0))


def disturbances(
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    *,
    own_cpu_s: float | None = None,
    devices: Collection[str] = (),
    processes_per_gpu: int = 1,
) -> tuple[str, ...]:
    """Return what spoiled a measurement between two states of the machine, a clause each; empty if nothing is known to have.

    Args:
        own_cpu_s: see `others_share`.
        devices: those measured, such as `cuda:0`; other GPUs do not matter.
        processes_per_gpu: how many of those that measure use one GPU.
    """
    found = []
    share = others_share(before, after, own_cpu_s)
    if share is not None and share > BUSY_SHARE:
        found.append(f"other processes used {share:.0%} of the processors' time")
    if (after.get("cpu_throttle_count") or 0) > (before.get("cpu_throttle_count") or 0):
        found.append("a processor became too hot and was slowed down")
    seconds = (after.get("clock_s") or 0.0) - (before.get("clock_s") or 0.0)
    earlier = {gpu.get("visible_as"): gpu for gpu in before.get("gpus") or []}
    for gpu in after.get("gpus") or []:
        name = gpu.get("visible_as")
        if name not in devices:
            continue
        slowed = {reason for reason in gpu.get("throttle_reasons") or [] if reason in SPOILING}
        slowed |= _slowed_between(earlier.get(name, {}), gpu, seconds)
        if slowed:
            found.append(f"{name} was slowed down ({', '.join(sorted(slowed))})")
        if (gpu.get("compute_processes") or 0) > processes_per_gpu:
            found.append(f"other processes computed on {name}")
    return tuple(found)


def _slowed_between(before: Mapping[str, Any], after: Mapping[str, Any], seconds: float) -> set[str]:
    """Return the spoiling reasons whose counters grew by more than a share of the time."""
    first, last = before.get("throttled_us") or {}, after.get("throttled_us") or {}
    return {key for key in SPOILING if key in first and key in last and last[key] - first[key] > THROTTLED_SHARE * seconds * 1e6}


def cpu_model() -> str | None:
    """Return the processor's name as its maker writes it, or the best this system knows."""
    for line in (_read(_PROC / "cpuinfo") or "").splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "Model", "Hardware") and value.strip():
            return re.sub(r"\s+", " ", value.strip())
    if platform.system() == "Darwin":
        return _output(["sysctl", "-n", "machdep.cpu.brand_string"])
    return platform.processor() or platform.machine() or None


def cpu_extensions() -> list[str]:
    """Return the vector instructions that decide how fast products are, and of int8 what comes out; empty where the system does not tell.

    One name of a processor may stand for machines with and without them, as clouds name them by maker alone.
    """
    for line in (_read(_PROC / "cpuinfo") or "").splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return [name for name in _EXTENSIONS if name in value.split()]
    return []


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
    """Return (busy, all) ticks since the start of the system: of the processors this process may use, or of all if only they are told."""
    lines = [line.split() for line in (_read(_PROC / "stat") or "").splitlines() if line.startswith("cpu")]
    told = {fields[0]: fields for fields in lines if len(fields) >= 6 and all(field.isdigit() for field in fields[1:])}
    usable = [f"cpu{i}" for i in _usable_cpus()]
    chosen = usable if usable and all(name in told for name in usable) else ["cpu"]
    if not all(name in told for name in chosen):
        return None
    busy = everything = 0
    for name in chosen:
        ticks = [int(field) for field in told[name][1:9]]  # user nice system idle iowait irq softirq steal; guests are within user
        busy += sum(ticks) - ticks[3] - ticks[4]
        everything += sum(ticks)
    return busy, everything


def _ticks_per_second() -> int:
    with contextlib.suppress(AttributeError, ValueError, OSError):
        return os.sysconf("SC_CLK_TCK")
    return 100


def _usable_cpus() -> list[int]:
    with contextlib.suppress(AttributeError, OSError):
        return sorted(os.sched_getaffinity(0))
    return []


def _governors() -> dict[str, str]:
    """Return which processors each frequency governor has, such as {"performance": "0-3,8"}."""
    found: dict[str, list[int]] = {}
    for folder in _SYS_CPU.glob("cpu[0-9]*"):
        if (governor := _read(folder / "cpufreq" / "scaling_governor")) is not None:
            found.setdefault(governor, []).append(int(folder.name.removeprefix("cpu")))
    return {governor: _ranges(numbers) for governor, numbers in sorted(found.items())}


def _ranges(numbers: list[int]) -> str:
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and parts[-1][1] == number - 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(f"{low}" if low == high else f"{low}-{high}" for low, high in parts)


def _boost() -> bool | None:
    """Return whether processors may run above their base clock; None where the system does not say."""
    told = {"boost": "1", "intel_pstate": "0"}
    files = {"boost": _SYS_CPU / "cpufreq" / "boost", "intel_pstate": _SYS_CPU / "intel_pstate" / "no_turbo"}
    return next((text == told[name] for name, file in files.items() if (text := _read(file)) is not None), None)


def _cpu_mhz() -> float | None:
    """Return the mean clock of the processors just now."""
    clocks = [float(text) / 1e3 for folder in _SYS_CPU.glob("cpu[0-9]*") if (text := _digits(folder / "cpufreq" / "scaling_cur_freq"))]
    if not clocks:
        clocks = [float(mhz) for mhz in re.findall(r"^cpu MHz\s*:\s*([0-9.]+)$", _read(_PROC / "cpuinfo") or "", re.M)]
    return round(sum(clocks) / len(clocks), 1) if clocks else None


def _cpu_temperature() -> float | None:
    """Return the temperature of the hottest processor package, degrees Celsius."""
    zones = [zone for zone in _SYS_THERMAL.glob("thermal_zone*") if (_read(zone / "type") or "") in ("x86_pkg_temp", "cpu-thermal")]
    degrees = [int(text) / 1e3 for zone in zones if (text := _digits(zone / "temp"))]
    return max(degrees, default=None)


def _cpu_throttle_count() -> int | None:
    """Return how often the processors have been slowed down because of heat since the system started."""
    counts = [int(text) for file in _SYS_CPU.glob("cpu[0-9]*/thermal_throttle/*_throttle_count") if (text := _digits(file))]
    return sum(counts) if counts else None


def _digits(path: Path) -> str | None:
    text = _read(path)
    return text if text is not None and text.isdigit() else None


def _memory_gib() -> float | None:
    with contextlib.suppress(AttributeError, ValueError, OSError):
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    return None


def _gpus() -> list[dict[str, str]]:
    """Return every GPU of the machine as its driver describes it; details only where the driver knows all of them."""
    gpus, details = _gpu_query(_GPU_FIELDS), _gpu_query(_GPU_DETAILS)
    return [gpu | more for gpu, more in zip(gpus, details)] if len(gpus) == len(details) else gpus


def _gpu_states() -> list[dict[str, Any]]:
    """Return the state of every GPU of the machine, with the name by which this process may use it."""
    gpus: list[dict[str, Any]] = [dict(gpu) for gpu in _gpu_query(_GPU_STATE)]
    if not gpus:
        return []
    active: list[dict[str, str]] = next((found for query in _THROTTLE_QUERIES if (found := _gpu_query({"bits": query}))), [])
    counters = _gpu_query(_THROTTLE_COUNTERS)
    identities = _gpu_query({"index": "index", "uuid": "uuid"})
    users = [
        line.strip() for line in (_output(["nvidia-smi", "--query-compute-apps=gpu_uuid", "--format=csv,noheader"]) or "").splitlines()
    ]
    for i, gpu in enumerate(gpus):
        if len(active) == len(gpus):
            gpu["throttle_reasons"] = _throttle_reasons(active[i]["bits"])
        if len(counters) == len(gpus):
            gpu["throttled_us"] = {key: int(value) for key, value in counters[i].items() if value.isdigit()}
        if len(identities) == len(gpus):  # the uuid is not kept: it names this very card
            gpu["visible_as"] = _visible_as(identities[i]["index"], identities[i]["uuid"])
            gpu["compute_processes"] = users.count(identities[i]["uuid"])
    return gpus


def _visible_as(index: str, uuid: str) -> str | None:
    """Return a GPU's name in this process, such as `cuda:0`; None if CUDA_VISIBLE_DEVICES hides it."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is None:
        return f"cuda:{index}"
    names = [name.strip() for name in given.split(",")]
    return next((f"cuda:{i}" for i, name in enumerate(names) if name == index or (name.startswith("GPU-") and uuid.startswith(name))), None)


def _throttle_reasons(bits: str) -> list[str] | None:
    try:
        mask = int(bits, 16)
    except ValueError:
        return None
    return [name for bit, name in _THROTTLE_BITS.items() if mask & bit]


def _gpu_query(fields: Mapping[str, str]) -> list[dict[str, str]]:
    """Ask the driver about every GPU; an empty list where it does not know one of the fields."""
    table = _output(["nvidia-smi", f"--query-gpu={','.join(fields.values())}", "--format=csv,noheader,nounits"])
    rows = [[cell.strip() for cell in line.split(",")] for line in (table or "").splitlines()]
    return [dict(zip(fields, row)) for row in rows if len(row) == len(fields)]


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
