"""The GPU suite in its CPU mode: every step runs or says why not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
SUITE = BENCHMARKS / "gpu_suite.py"


@pytest.mark.slow
def test_the_suite_runs_on_a_cpu_and_records_every_step(tmp_path: Path) -> None:
    command = [sys.executable, str(SUITE), "--quick", "--device", "cpu", "--out", str(tmp_path)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert finished.returncode == 0, finished.stderr
    text = next(tmp_path.glob("gpu_suite_cpu_quick_*.json")).read_text()
    steps = {step["name"]: step for step in json.loads(text)["steps"]}
    status = {name: step["status"] for name, step in steps.items()}
    assert status["train fp32, batch 8"] == status["parity onnx, kv memory on cpu"] == status["latency table"] == "done"
    assert all(step["reason"] for step in steps.values() if step["status"] == "skipped")

    for name in ("fp32", "bf16", "fp32, two devices"):
        result = steps[f"train {name}, batch 8"]["result"]
        figures = result["measured"]
        assert result["processes"] == (2 if "two" in name else 1)
        assert figures["tokens_per_s"] > 0
        assert figures["peak_memory_bytes"] > 2**20
        assert [step for step, _ in figures["curve"]] == list(range(5, 61, 5))
        assert figures["loss_last_fifth"] == pytest.approx(np.mean([loss for _, loss in figures["curve"][-2:]]))
    assert steps["train bf16, batch 8"]["result"]["measured"]["curve"] != steps["train fp32, batch 8"]["result"]["measured"]["curve"]
    for name in ("bf16", "fp32, two devices"):
        compared = steps[f"{name} follows fp32"]["result"]
        assert abs(compared["difference"]) <= compared["tolerance"] < compared["learned"]

    rows = steps["latency table"]["result"]["rows"]
    assert {(row["runtime"], row["memory"]) for row in rows} == {("pytorch", "kv"), ("torchscript", "hidden"), ("onnx", "kv")}
    assert all(row["verified"] for row in rows)
    table = next(tmp_path.glob("*.md")).read_text()
    assert "| latency table | done |" in table
    assert "| bf16 follows fp32 | " in table
    assert all(folder not in text + table for folder in (str(BENCHMARKS.parent), "/txl-gpu-suite-"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_suite_measures_nothing_and_says_so(tmp_path: Path) -> None:
    finished = subprocess.run(
        [sys.executable, str(SUITE), "--out", str(tmp_path)], capture_output=True, text=True, timeout=120, check=False
    )
    assert finished.returncode == 3
    assert "no GPU" in finished.stderr
    assert list(tmp_path.iterdir()) == []


def figures(first: float, last: float) -> dict[str, Any]:
    """What `measured` returns for a loss that falls in a straight line."""
    losses = np.linspace(first, last, 20).tolist()
    return {"loss_first": first, "loss_last_fifth": sum(losses[-4:]) / 4, "curve": list(enumerate(losses))}


@pytest.mark.parametrize(
    ("first", "own_end", "base_end", "status", "reason"),
    [
        (8.0, 5.01, 5.0, "done", ""),
        (8.0, 5.2, 5.0, "failed", "differ"),
        (8.0, 4.8, 5.0, "failed", "differ"),
        (5.1, 5.0, 5.0, "failed", "being alike means nothing"),
    ],
)
def test_a_training_that_leaves_the_curve_it_follows_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, first: float, own_end: float, base_end: float, status: str, reason: str
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_suite

    suite = gpu_suite.Suite(gpu_suite.BASE, tmp_path, n_devices=1)
    training = gpu_suite.Training("fp16", (), 32, 100, follows="fp32")
    step = suite.compare(training, {"fp16": figures(first, own_end), "fp32": figures(first, base_end)})

    assert step.status == status
    assert reason in step.reason
    assert step.result["agrees"] == (abs(step.result["difference"]) <= 0.05)
    assert suite.compare(training, {"fp32": figures(8.0, 5.0)}).status == "skipped"


def test_what_needs_more_devices_than_there_are_is_skipped_with_the_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_suite

    suite = gpu_suite.Suite(gpu_suite.BASE, tmp_path, n_devices=1)
    two = next(training for training in gpu_suite.BASE.trainings if training.processes == 2)
    suite.run_trainings([two])
    assert [(step.status, step.reason) for step in suite.steps] == [
        ("skipped", "this machine has 1 GPU"),
        ("skipped", "one of the two was not trained"),
    ]
