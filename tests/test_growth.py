"""The growth benchmark measures all it names, and its leak detector finds a leak."""

from __future__ import annotations

import gc
import json
import mmap
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.processes import in_processes

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def growth(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import growth

    return growth


def _two_runs() -> tuple[dict[str, Any], dict[str, Any]]:
    """A run that keeps a mebibyte of every segment while a mapped file leaves the memory, and one that keeps nothing."""
    import growth

    gc.freeze()  # the libraries: looking through them at each sample would take most of the time
    kept: list[mmap.mmap] = []
    with tempfile.TemporaryFile() as file:
        file.truncate(64 * 2**20)
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        for page in range(0, len(mapped), mmap.PAGESIZE):
            assert mapped[page] == 0

        def leak(count: int) -> None:
            for _ in range(count):
                block = mmap.mmap(-1, 2**20)  # of the system, not of a heap that has room of its own
                block.write(b"x" * 2**20)
                kept.append(block)
            if len(kept) > 60:
                mapped.madvise(mmap.MADV_DONTNEED, (len(kept) - 60) * 2**20, 2**20 * count)  # as the system does when it needs room

        return growth.long_run(leak, 100, samples=50), growth.long_run(lambda count: bytearray(2**20), 100_000, samples=50)


def test_a_leak_is_found_and_a_flat_size_is_none(growth: ModuleType) -> None:
    ((leaking, flat),) = in_processes(1, _two_runs)  # where nothing else of this process takes or gives back memory meanwhile
    assert leaking["grows"]
    assert leaking["bytes_per_10000"] == pytest.approx(10_000 * 2**20, rel=0.05)
    assert not flat["grows"]


def test_a_line_is_told_from_a_square(growth: ModuleType) -> None:
    sizes = (1, 2, 4, 8, 16, 32)
    assert growth.fit_line({n: 3.0 + 2.0 * n for n in sizes}) == pytest.approx({"slope": 2.0, "intercept": 3.0, "farthest": 0.0}, abs=1e-9)
    assert growth.fit_line({n: 1.0 * n**2 for n in sizes})["farthest"] > 0.3


@pytest.mark.slow
def test_a_quick_run_writes_table_picture_and_record(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "growth.py"), "--quick", "--out", str(tmp_path / "growth")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode in (0, 1), done.stderr  # so few segments say nothing of growth
    record = json.loads((tmp_path / "growth.json").read_text())
    for name in ("pytorch", "onnx"):
        assert set(record["time"][name]["ms_by_batch"]) == {"1", "2"}
        assert len(record["memory"][name]["long_run"]["segments"]) == 100
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")
    assert "time per step by batch size: farthest from a line" in (tmp_path / "growth.md").read_text()
    assert str(tmp_path) not in (tmp_path / "growth.json").read_text()
