"""The GPUs that the driver tells of, from a driver library made here with the C compiler."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from txl_deploy.trt import cuda

DRIVER = r"""
#include <string.h>
#include <stddef.h>
int cuInit(unsigned flags) { return flags == 0 ? INIT : 1; }
int cuDeviceGetCount(int *count) { *count = COUNT; return 0; }
int cuDriverGetVersion(int *version) { *version = 13020; return VERSION_FAILS; }
int cuDeviceGet(int *device, int index) { *device = 40 + index; return index == BROKEN; }
int cuDeviceGetName(char *name, int length, int device) { strncpy(name, device == 40 ? "Tesla T4" : "NVIDIA H100", length); return 0; }
int cuDeviceTotalMem_v2(size_t *bytes, int device) { *bytes = (size_t)16 << 30; return device < 40; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    *value = attribute == 75 ? (device == 40 ? 7 : 9) : attribute == 76 ? (device == 40 ? 5 : 0) : -1;
    return 0;
}
int nvmlInit_v2(void) { return 0; }
int nvmlShutdown(void) { return 0; }
int nvmlSystemGetDriverVersion(char *version, unsigned length) { strncpy(version, "580.65.06", length); return NVML; }
"""

Install = Callable[..., None]


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Compile a driver that finds so many GPUs, and put it in place of the real one."""
    if shutil.which("cc") is None:
        pytest.skip("needs a C compiler, cc")

    def install(*, count: int = 1, init: int = 0, broken: int = -1, nvml: int = 0, version_fails: int = 0) -> None:
        source, library = tmp_path / "driver.c", tmp_path / "driver.so"
        source.write_text(DRIVER, encoding="utf-8")
        values = {"COUNT": count, "INIT": init, "BROKEN": broken, "NVML": nvml, "VERSION_FAILS": version_fails}
        subprocess.run(
            ["cc", "-shared", "-fPIC", *(f"-D{name}={value}" for name, value in values.items()), "-o", str(library), str(source)],
            check=True,
        )
        monkeypatch.setattr(cuda, "DRIVER_LIBRARY", str(library))
        monkeypatch.setattr(cuda, "MANAGEMENT_LIBRARY", str(library))
        monkeypatch.setattr(cuda, "KERNEL_MODULE", tmp_path / "version")

    return install


def test_each_gpu_says_what_it_is(driver: Install) -> None:
    driver(count=2)
    first, second = cuda.devices()
    assert first == cuda.Gpu(index=0, name="Tesla T4", compute_capability="7.5", memory_bytes=16 << 30, cuda="13.2", driver="580.65.06")
    assert (second.index, second.name, second.compute_capability) == (1, "NVIDIA H100", "9.0")


def test_a_gpu_that_does_not_answer_is_left_out(driver: Install) -> None:
    driver(count=2, broken=0)
    assert [gpu.index for gpu in cuda.devices()] == [1]


@pytest.mark.parametrize("changes", [{"init": 100}, {"init": 3}, {"count": 0}], ids=["no device", "not initialised", "none visible"])
def test_a_driver_without_gpus_gives_an_empty_list(driver: Install, changes: dict[str, int]) -> None:
    driver(**changes)
    assert cuda.devices() == []


def test_no_driver_gives_an_empty_list(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cuda, "DRIVER_LIBRARY", str(tmp_path / "libcuda.so.1"))
    assert cuda.devices() == []


def test_a_library_that_is_no_driver_gives_an_empty_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "DRIVER_LIBRARY", ctypes.CDLL(None)._name)  # the process itself: loads, and has no cuInit
    assert cuda.devices() == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.06  Wed Jun 26\nGCC version: gcc 12.2.0\n",
            "535.183.06",
        ),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (dvs-builder)\n", "580.65.06"),
        ("something else\n", None),
    ],
)
def test_without_its_management_library_the_driver_is_read_from_the_kernel(
    driver: Install, tmp_path: Path, text: str, expected: str | None
) -> None:
    driver(nvml=1, version_fails=1)
    (tmp_path / "version").write_text(text, encoding="utf-8")
    assert cuda.driver_version() == expected
    assert [(gpu.driver, gpu.cuda) for gpu in cuda.devices()] == [(expected, None)]


def test_a_driver_that_says_nothing_has_no_version(driver: Install) -> None:
    driver(nvml=1)
    assert cuda.driver_version() is None


@pytest.mark.parametrize(("given", "expected"), [(None, "1"), ("2,3", "3"), ("GPU-a,GPU-b", "GPU-b"), ("5", "1")])
def test_the_gpu_to_choose_is_named_as_the_variable_names_it(monkeypatch: pytest.MonkeyPatch, given: str | None, expected: str) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if given is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    assert cuda.visible_name(1) == expected
