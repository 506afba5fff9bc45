"""Which NVIDIA GPUs this machine has, asked of the driver itself: no PyTorch, no CUDA toolkit, no process started.

Everything native in `trt` asks here first, since TensorRT's own code ends the process where there is no GPU. Knows nothing of what
the answers mean.
"""

from __future__ import annotations

import ctypes
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DRIVER_LIBRARY = "libcuda.so.1"
MANAGEMENT_LIBRARY = "libnvidia-ml.so.1"
KERNEL_MODULE = Path("/proc/driver/nvidia/version")

# cuda.h: CUdevice_attribute
_CAPABILITY_MAJOR = 75
_CAPABILITY_MINOR = 76


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU."""

    index: int
    """Its number in this process: `CUDA_VISIBLE_DEVICES` has been applied."""
    name: str
    """Such as Tesla T4."""
    compute_capability: str
    """Such as 7.5."""
    memory_bytes: int
    """All of its memory."""
    cuda: str | None
    """Newest CUDA that the driver runs, such as 13.0; None if it does not say."""
    driver: str | None
    """Version of the driver, such as 580.65.06; None if it does not say."""


def devices() -> list[Gpu]:
    """Return the GPUs that this process may use, in CUDA's order; an empty list where there is no driver or no GPU. Never raises."""
    try:
        library = ctypes.CDLL(DRIVER_LIBRARY)
        return _devices(library)
    except (OSError, AttributeError, ValueError):  # no library, or one that lacks a function
        return []


def driver_version() -> str | None:
    """Return the version of the installed driver, such as 580.65.06, or None where there is none to be found. Never raises."""
    text = ctypes.create_string_buffer(96)
    try:
        library = ctypes.CDLL(MANAGEMENT_LIBRARY)
        if library.nvmlInit_v2() == 0:
            failed = library.nvmlSystemGetDriverVersion(text, len(text))
            library.nvmlShutdown()
            if not failed and text.value:
                return text.value.decode(errors="replace")
    except (OSError, AttributeError):
        pass
    try:
        found = re.search(r"^NVRM version:.*?\s(\d+\.\d+[\d.]*)\s", KERNEL_MODULE.read_text(encoding="utf-8", errors="replace"), re.M)
    except OSError:
        return None
    return found.group(1) if found else None


def _devices(library: Any) -> list[Gpu]:
    count = ctypes.c_int()
    if library.cuInit(0) or library.cuDeviceGetCount(ctypes.byref(count)) or count.value < 1:
        return []
    version = ctypes.c_int()
    cuda = None
    if library.cuDriverGetVersion(ctypes.byref(version)) == 0 and version.value:
        cuda = f"{version.value // 1000}.{version.value % 1000 // 10}"
    driver = driver_version()
    found = []
    for index in range(count.value):
        device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        name, memory = ctypes.create_string_buffer(256), ctypes.c_size_t()
        failed = (
            library.cuDeviceGet(ctypes.byref(device), index)
            or library.cuDeviceGetAttribute(ctypes.byref(major), _CAPABILITY_MAJOR, device)
            or library.cuDeviceGetAttribute(ctypes.byref(minor), _CAPABILITY_MINOR, device)
            or library.cuDeviceGetName(name, len(name), device)
            or library.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
        )
        if failed:
            continue
        found.append(
            Gpu(
                index=index,
                name=name.value.decode(errors="replace"),
                compute_capability=f"{major.value}.{minor.value}",
                memory_bytes=memory.value,
                cuda=cuda,
                driver=driver,
            )
        )
    return found


def visible_name(index: int) -> str:
    """Return what `CUDA_VISIBLE_DEVICES` has to be for a program to see only the GPU that is `index` here, where it may be set already."""
    given = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return given[index] if index < len(given) else str(index)
