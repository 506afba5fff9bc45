"""Named workloads: files that can be read, and a record in which a goal that was missed is called so."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from txl_train.errors import ConfigError

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
WORKLOADS = sorted((BENCHMARKS / "workloads").glob("*.yaml"))


@pytest.fixture
def speed(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import speed

    return speed


@pytest.mark.parametrize("path", WORKLOADS, ids=lambda path: path.stem)
def test_each_workload_says_what_runs_against_what_and_how_fast_it_is_to_be(speed: ModuleType, path: Path) -> None:
    workload = speed.read_workload(path)
    assert workload.name == path.stem
    assert workload.model in speed.SIZES
    assert workload.baseline in ("reference", "reference-eager")
    assert set(workload.runtimes) <= {"pytorch", "compiled", "torchscript"}
    assert set(workload.exports) <= {"fp32", "int8"}
    assert workload.runtimes or workload.exports
    for run in workload.runs:
        steps = workload.n_tokens // (run.batch_size * workload.lengths["tgt_len"])
        assert steps > workload.lengths["mem_len"] // workload.lengths["tgt_len"], "the text starts anew before the memory is full"
        assert run.samples >= speed.LEAST_TURNS


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("batch_sise: 1", "unknown key `batch_sise`"),
        ("", "lacks baseline"),
    ],
)
def test_a_workload_with_a_wrong_or_missing_key_is_refused_by_name(speed: ModuleType, tmp_path: Path, change: str, message: str) -> None:
    text = "\n".join(line for line in WORKLOADS[0].read_text().splitlines() if not line.startswith("baseline") or change)
    path = tmp_path / "w.yaml"
    path.write_text(f"{text}\n{change}\n")
    with pytest.raises(ConfigError, match=message):
        speed.read_workload(path)


def test_a_workload_that_is_not_there_is_refused_with_the_nearest(speed: ModuleType) -> None:
    with pytest.raises(ConfigError, match=r"base-cpu-fp33.*base-cpu-fp32"):
        speed.read_workload(BENCHMARKS / "workloads" / "base-cpu-fp33.yaml")


def test_targets_fall_into_the_clusters_as_they_are_to(speed: ModuleType) -> None:
    ends = (0, 19_997, 39_997, 199_997, 267_735)
    ids = speed.draw_ids(ends, 50_000)
    shares = np.histogram(ids, bins=ends)[0] / len(ids)
    assert ids.min() >= 2
    assert ids.max() < ends[-1]
    np.testing.assert_allclose(shares, speed.SHARES, atol=0.005)


@pytest.mark.slow
def test_a_small_run_proves_its_export_and_says_of_each_goal_whether_it_is_met(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "speed.py"), "base-cpu-fp32", "--quick", "--require-goals"]
    command += ["--work-dir", str(tmp_path / "work"), "--out", str(tmp_path / "speed")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode in (0, 1), done.stderr
    record: dict[str, Any] = json.loads((tmp_path / "speed.json").read_text())
    (result,) = record["results"]["base-cpu-fp32"]
    assert len(result["receipts"]) == 1
    assert {row["runtime"] for row in result["rows"]} == {"reference", "pytorch", "onnx"}
    assert all(row["verified"] is not False for row in result["rows"])
    goals = [goal for verdict in record["verdicts"] for goal in verdict["goals"]]
    assert goals
    assert all(goal.endswith(("met", "MISSED")) for goal in goals)
    assert (done.returncode == 1) == any("MISSED" in goal for goal in goals)
    assert all(goal in (tmp_path / "speed.md").read_text() for goal in goals)
    assert str(tmp_path) not in (tmp_path / "speed.json").read_text()


def test_only_the_best_of_ours_is_held_to_the_goals(speed: ModuleType) -> None:
    run = speed.Run(batch_size=4, samples=8, ratio=3.0, peak_share=0.75)
    ratio = speed.Ratio(quantity="p50", ratio=3.1, interval_95=(3.0, 3.2), n_a=8, n_b=8, paired=True)
    best = speed.Verdict("w", 4, "onnx fp32", 310.0, 100.0, ratio, 0.7, True, run, ())
    assert best.goals() == ["3× met", "75% of peak MISSED"]
    assert dataclasses.replace(best, is_best=False).goals() == []
