"""How much energy a device says it has used: the driver's counter of an NVIDIA GPU, or the counters of the processors' packages (RAPL).

Both count without end and the whole device, whoever uses it, so what is reported is the difference of two readings. Neither needs a
package: NVIDIA's management library comes with its driver, and Linux shows the other in files, which often only root may read. Where
neither is to be had there is no meter. Knows nothing of what is measured.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any, ClassVar, Protocol

_CUDA_LIBRARY = "libcuda.so.1"
_NVML_LIBRARY = "libnvidia-ml.so.1"
_POWERCAP = Path("/sys/class/powercap")
_PCI_BUS_ID_LENGTH = 32


class EnergyMeter(Protocol):
    """A counter of the energy that something has used."""

    source: ClassVar[str]
    """Who counts: `nvml` or `rapl`."""
    is_shared: ClassVar[bool]
    """True if it counts what several processes use together, so that their readings are one and the same."""

    def read_joules(self) -> float:
        """Return joules since some fixed point. Raises OSError if the counter can no longer be read."""
        ...


def meter_for(device: str) -> EnergyMeter | None:
    """Return the meter of a device such as `cpu` or `cuda:0`, None where it has none that may be read. Never raises."""
    try:
        if device.startswith("cuda"):
            return NvmlMeter(int(device.partition(":")[2] or 0))
        return RaplMeter()
    except (OSError, ValueError, AttributeError):
        return None


class NvmlMeter:
    """The energy counter of one GPU, since its driver was loaded: all of the card, updated about every tenth of a second (NVML's
    `nvmlDeviceGetTotalEnergyConsumption`; Volta and newer)."""

    source: ClassVar[str] = "nvml"
    is_shared: ClassVar[bool] = False

    def __init__(self, index: int) -> None:
        """Find the GPU that CUDA calls `index` in this process, by its place on the bus. OSError if it has no counter of its own.

        Two libraries number GPUs differently: only CUDA's heeds CUDA_VISIBLE_DEVICES. Of a GPU that is divided (MIG) the counter tells
        nothing about one part.
        """
        cuda, self._nvml = ctypes.CDLL(_CUDA_LIBRARY), ctypes.CDLL(_NVML_LIBRARY)
        place = ctypes.create_string_buffer(_PCI_BUS_ID_LENGTH)
        device = ctypes.c_int()
        _check(cuda.cuInit(0))
        _check(cuda.cuDeviceGet(ctypes.byref(device), index))
        _check(cuda.cuDeviceGetPCIBusId(place, _PCI_BUS_ID_LENGTH, device))
        _check(self._nvml.nvmlInit_v2())
        self._handle = ctypes.c_void_p()
        _check(self._nvml.nvmlDeviceGetHandleByPciBusId_v2(place, ctypes.byref(self._handle)))
        divided, pending = ctypes.c_uint(), ctypes.c_uint()
        if self._nvml.nvmlDeviceGetMigMode(self._handle, ctypes.byref(divided), ctypes.byref(pending)) == 0 and divided.value:
            raise OSError("the GPU is divided, and its counter is of the whole")
        self.read_joules()

    def read_joules(self) -> float:
        """Return joules since the driver was loaded."""
        millijoules = ctypes.c_ulonglong()
        _check(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle, ctypes.byref(millijoules)))
        return millijoules.value / 1e3


class RaplMeter:
    """The energy counters of all processor packages together (Linux' powercap; Intel and AMD)."""

    source: ClassVar[str] = "rapl"
    is_shared: ClassVar[bool] = True

    def __init__(self, folder: Path | None = None) -> None:
        """Find the packages. OSError if there is none, or one may not be read.

        Parts of a package (`intel-rapl:0:1`) are within it, and the whole system (`psys`) is more than the processors: both are left out.
        """
        zones = sorted((folder or _POWERCAP).glob("intel-rapl:*"))
        self._packages = [zone for zone in zones if zone.name.count(":") == 1 and _text(zone / "name").startswith("package")]
        if not self._packages:
            raise OSError("no package tells its energy")
        self._ranges = [int(_text(zone / "max_energy_range_uj")) for zone in self._packages]
        self._last = [int(_text(zone / "energy_uj")) for zone in self._packages]
        self._total_uj = 0

    def read_joules(self) -> float:
        """Return joules since this meter was made; the counters start anew from 0 after some minutes to hours, which is made up for."""
        for i, zone in enumerate(self._packages):
            now = int(_text(zone / "energy_uj"))
            self._total_uj += now - self._last[i] + (self._ranges[i] if now < self._last[i] else 0)
            self._last[i] = now
        return self._total_uj / 1e6


def _check(status: Any) -> None:
    if status != 0:
        raise OSError(f"the driver answers with error {status}")


def _text(path: Path) -> str:
    return path.read_text(encoding="ascii").strip()
