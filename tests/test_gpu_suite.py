"""The GPU suite in its CPU mode: every step runs or says why not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SUITE = Path(__file__).resolve().parents[1] / "benchmarks" / "gpu_suite.py"


@pytest.mark.slow
def test_the_suite_runs_on_a_cpu_and_records_every_step(tmp_path: Path) -> None:
    command = [sys.executable, str(SUITE), "--quick", "--device", "cpu", "--out", str(tmp_path)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert finished.returncode == 0, finished.stderr
    record = json.loads(next(tmp_path.glob("gpu_suite_cpu_quick_*.json")).read_text())
    status = {step["name"]: step["status"] for step in record["steps"]}
    assert status["train fp32, batch 8"] == status["parity onnx, kv memory on cpu"] == status["latency table"] == "done"
    assert all(step["reason"] for step in record["steps"] if step["status"] == "skipped")
    rows = next(step["result"]["rows"] for step in record["steps"] if step["name"] == "latency table")
    assert {(row["runtime"], row["memory"]) for row in rows} == {
        ("pytorch", "kv"),
        ("torchscript", "kv"),
        ("torchscript", "hidden"),
        ("onnx", "kv"),
    }
    assert all(row["verified"] for row in rows)
    assert "| latency table | done |" in next(tmp_path.glob("*.md")).read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_suite_measures_nothing_and_says_so(tmp_path: Path) -> None:
    finished = subprocess.run(
        [sys.executable, str(SUITE), "--out", str(tmp_path)], capture_output=True, text=True, timeout=120, check=False
    )
    assert finished.returncode == 3
    assert "no GPU" in finished.stderr
    assert list(tmp_path.iterdir()) == []
