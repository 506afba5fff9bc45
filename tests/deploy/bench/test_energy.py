"""Energy counters: those of packages as Linux shows them in files, those of a GPU as a driver made up here answers."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest

from txl_deploy.bench import energy
from txl_deploy.bench.energy import NvmlMeter, RaplMeter, meter_for


def zone(folder: Path, name: str, kind: str, microjoules: int, most: int = 1000_000_000) -> Path:
    path = folder / name
    path.mkdir()
    (path / "name").write_text(f"{kind}\n")
    (path / "max_energy_range_uj").write_text(f"{most}\n")
    (path / "energy_uj").write_text(f"{microjoules}\n")
    return path


def test_packages_are_added_and_their_parts_and_the_whole_system_left_out(tmp_path):
    packages = [zone(tmp_path, "intel-rapl:0", "package-0", 5), zone(tmp_path, "intel-rapl:1", "package-1", 7)]
    others = [zone(tmp_path, "intel-rapl:0:0", "core", 1), zone(tmp_path, "intel-rapl:2", "psys", 2)]
    meter = RaplMeter(tmp_path)
    first = meter.read_joules()
    for path in (*packages, *others):
        (path / "energy_uj").write_text("3000007\n")
    assert meter.read_joules() - first == pytest.approx(6.000002)
    assert meter.is_shared


def test_a_counter_that_started_anew_is_made_up_for(tmp_path):
    path = zone(tmp_path, "intel-rapl:0", "package-0", 900, most=1000)
    meter = RaplMeter(tmp_path)
    for value in (50, 950, 10):
        (path / "energy_uj").write_text(str(value))
        joules = meter.read_joules()
    assert joules == pytest.approx(1.11e-3)  # 900 to 1000, to 950, to 1000, to 10


def test_without_packages_or_without_the_right_to_read_them_there_is_no_meter(monkeypatch, tmp_path):
    monkeypatch.setattr(energy, "_POWERCAP", tmp_path)
    assert meter_for("cpu") is None
    path = zone(tmp_path, "intel-rapl:0", "package-0", 5)
    assert meter_for("cpu") is not None
    (path / "energy_uj").unlink()
    (path / "energy_uj").mkdir()  # cannot be read, whoever asks
    assert meter_for("cpu") is None


class Drivers:
    """Answers as libcuda.so.1 and libnvidia-ml.so.1 do, for a process whose `cuda:1` is the card at 0000:41:00.0."""

    def __init__(self, *, divided: int = 0, fails: str = "") -> None:
        self.divided, self.fails = divided, fails
        self.millijoules = 1_234_500

    def __call__(self, name: str) -> Any:
        if name == self.fails:
            raise OSError(f"{name}: cannot open shared object file")
        return self

    def __getattr__(self, name: str) -> Any:
        def answer(*arguments: Any) -> int:
            if name == self.fails:
                return 3
            if name == "cuDeviceGet":
                arguments[0]._obj.value = arguments[1]
            elif name == "cuDeviceGetPCIBusId":
                arguments[0].value = b"0000:41:00.0" if arguments[2].value == 1 else b"0000:01:00.0"
            elif name == "nvmlDeviceGetHandleByPciBusId_v2":
                assert arguments[0].value == b"0000:41:00.0"
                arguments[1]._obj.value = 77
            elif name == "nvmlDeviceGetMigMode":
                arguments[1]._obj.value = self.divided
            elif name == "nvmlDeviceGetTotalEnergyConsumption":
                assert arguments[0].value == 77
                arguments[1]._obj.value = self.millijoules
            return 0

        return answer


def test_the_counter_of_the_gpu_that_this_process_calls_so_is_read(monkeypatch):
    drivers = Drivers()
    monkeypatch.setattr(ctypes, "CDLL", drivers)
    meter = meter_for("cuda:1")
    assert isinstance(meter, NvmlMeter)
    assert meter.read_joules() == 1234.5
    drivers.millijoules += 500
    assert meter.read_joules() == 1235.0
    drivers.fails = "nvmlDeviceGetTotalEnergyConsumption"
    with pytest.raises(OSError, match="error 3"):
        meter.read_joules()


@pytest.mark.parametrize(
    "drivers",
    [
        Drivers(divided=1),
        Drivers(fails="libcuda.so.1"),
        Drivers(fails="libnvidia-ml.so.1"),
        Drivers(fails="cuDeviceGet"),
        Drivers(fails="nvmlInit_v2"),
        Drivers(fails="nvmlDeviceGetTotalEnergyConsumption"),  # Pascal and older
    ],
)
def test_a_gpu_without_a_counter_of_its_own_has_no_meter(monkeypatch, drivers):
    monkeypatch.setattr(ctypes, "CDLL", drivers)
    assert meter_for("cuda:1") is None
