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

from txl_train.errors import ConfigError, ValidationError

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
WORKLOADS = sorted((BENCHMARKS / "workloads").glob("*.yaml"))


@pytest.fixture
def speed(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import speed

    return speed


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import speed_tables

    return speed_tables


@pytest.fixture
def profiles(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import speed_profile

    return speed_profile


@pytest.fixture
def best(speed: ModuleType, tables: ModuleType) -> Any:
    return tables.Verdict(
        workload="w",
        batch_size=4,
        runtime="onnx fp32",
        baseline_ms=310.0,
        own_ms=100.0,
        speedup=tables.Ratio(quantity="p50", ratio=3.1, interval_95=(3.0, 3.2), n_a=8, n_b=8, paired=True),
        peak_share=0.7,
        is_best=True,
        run=speed.Run(batch_size=4, samples=8, ratio=3.0, peak_share=0.75),
    )


@pytest.mark.parametrize("path", WORKLOADS, ids=lambda path: path.stem)
def test_each_workload_says_what_runs_against_what_and_how_fast_it_is_to_be(speed: ModuleType, path: Path) -> None:
    workload = speed.read_workload(path)
    assert workload.name == path.stem
    assert workload.runtimes or workload.exports
    for run in workload.runs:
        assert run.samples >= speed.LEAST_TURNS
        if workload.model == speed.GIVEN:
            continue
        steps = workload.n_tokens // (run.batch_size * workload.lengths["tgt_len"])
        assert steps > workload.lengths["mem_len"] // workload.lengths["tgt_len"], "the text starts anew before the memory is full"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("thread: 2", "unknown key `thread`.*Did you mean `threads`"),
        ("lengths: {tgt_length: 4}", "unknown key `tgt_length`.*Did you mean `tgt_len`"),
        ("baseline: referense", "no `baseline` referense.*Did you mean `reference`"),
        ("runtimes: [pytorhc]", "no `runtimes` pytorhc.*Did you mean `pytorch`"),
        ("exports: [int4]", "no `exports` int4.*Did you mean `int8`"),
        ("", "lacks baseline"),
    ],
)
def test_a_workload_with_a_wrong_or_missing_key_or_name_is_refused_by_name(
    speed: ModuleType, tmp_path: Path, change: str, message: str
) -> None:
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
    command = [sys.executable, str(BENCHMARKS / "speed.py"), "base-cpu-fp32", "--quick", "--require-goals", "--profile"]
    command += ["--work-dir", str(tmp_path / "work"), "--out", str(tmp_path / "records")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode in (0, 1), done.stderr
    (written,) = (tmp_path / "records").glob("base-cpu-fp32_*.json")
    record: dict[str, Any] = json.loads(written.read_text())
    (result,) = record["results"]
    assert len(result["receipts"]) == 1
    assert {row["runtime"] for row in result["rows"]} == {"reference", "pytorch", "onnx"}
    assert all(row["verified"] is not False for row in result["rows"])
    goals = [goal for verdict in record["verdicts"] for goal in verdict["goals"]]
    assert goals
    assert all(goal.endswith(("met", "MISSED")) for goal in goals)
    assert (done.returncode == 1) == any("MISSED" in goal for goal in goals)
    assert all(goal in written.with_suffix(".md").read_text() for goal in goals)
    assert str(tmp_path) not in written.read_text()
    assert min(result["peak_flops_before"], result["peak_flops_after"]) > 0
    assert {profile["runtime"] for profile in result["profiles"]} == {"pytorch fp32", "onnx fp32"}
    for profile in result["profiles"]:
        assert profile["ms_by_kind"]["products"] > 0
        assert sum(profile["ms_by_kind"].values()) == pytest.approx(profile["step_ms"], rel=0.2)  # operators may overlap a little


@pytest.mark.slow
def test_an_export_without_a_receipt_is_not_measured(speed: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    txl = speed.Bench.txl
    monkeypatch.setattr(speed.Bench, "txl", lambda self, a, done_if: None if a[0] == "eval" else txl(self, a, done_if))
    workload = speed.smaller(speed.read_workload(BENCHMARKS / "workloads" / "base-cpu-int8.yaml"))
    with pytest.raises(ValidationError, match="ended with 1"):
        speed.Bench(tmp_path).measure(workload)
    assert not list(tmp_path.glob("quick/base-cpu-int8-*.json"))


def test_an_export_made_by_other_code_or_of_another_checkpoint_is_not_used_again(
    speed: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed.Bench, "txl", lambda self, arguments, done_if: None)
    workload = speed.smaller(speed.read_workload(BENCHMARKS / "workloads" / "base-cpu-fp32.yaml"))
    bench = speed.Bench(tmp_path)
    first = bench.export(workload, "fp32")
    assert bench.export(workload, "fp32") == first
    with monkeypatch.context() as changed:
        changed.setattr(speed, "code_sha256", lambda: "other")
        assert bench.export(workload, "fp32") != first
    checkpoint = bench.checkpoint("quick")
    checkpoint.write_bytes(checkpoint.read_bytes() + b"x")
    assert bench.export(workload, "fp32") != first


def test_a_workload_of_a_given_model_asks_for_it(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "speed.py"), "wikitext2-cpu", "--work-dir", str(tmp_path), "--out", str(tmp_path / "x")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 2
    assert "--checkpoint FILE --data DIR" in done.stderr


def test_operators_of_both_runtimes_fall_into_their_kinds(profiles: ModuleType) -> None:
    assert {
        name: profiles.kind_of(name) for name in ("FusedMatMul", "MatMulIntegerToFloat", "aten::addmm", "mkldnn::_linear_pointwise")
    } == dict.fromkeys(("FusedMatMul", "MatMulIntegerToFloat", "aten::addmm", "mkldnn::_linear_pointwise"), "products")
    assert profiles.kind_of("DynamicQuantizeLinear") == "rounding to int8"
    assert profiles.kind_of("aten::expand") == profiles.kind_of("Concat") == "moving and shaping"
    assert profiles.kind_of("aten::_log_softmax") == profiles.kind_of("Exp") == "softmax and log-sum-exp"
    assert profiles.kind_of("SkipLayerNormalization") == "normalisation"
    assert profiles.kind_of("aten::add_") == "element by element"
    assert profiles.kind_of("Shape") == "other operators"


def test_only_the_last_steps_of_a_profile_count_and_the_rest_of_a_step_is_between_operators(profiles: ModuleType) -> None:
    def node(ts: int, dur: int, name: str) -> dict[str, Any]:
        return {"cat": "Node", "name": f"{name}_kernel_time", "ts": ts, "dur": dur, "args": {"op_name": name}}

    runs = [{"cat": "Session", "name": "model_run", "ts": ts, "dur": dur} for ts, dur in ((0, 9000), (10_000, 3000), (20_000, 5000))]
    nodes = [node(1, 8000, "MatMul"), node(10_001, 2000, "MatMul"), node(20_001, 4000, "MatMul"), node(25_000, 500, "Exp")]
    operators, step_ms = profiles.last_steps([*nodes, *reversed(runs)], 2)
    assert (operators, step_ms) == ({"MatMul": 3.0, "Exp": 0.25}, 4.0)
    kinds = profiles.by_kind(operators, step_ms)["ms_by_kind"]
    assert kinds == {"products": 3.0, "softmax and log-sum-exp": 0.25, "between operators": 0.75}


def test_only_the_best_of_ours_is_held_to_the_goals(tables: ModuleType, best: Any) -> None:
    assert best.goals() == ["3× met", "75% of peak MISSED"]
    assert dataclasses.replace(best, is_best=False).goals() == []


def test_a_missed_goal_and_milliseconds_that_are_not_to_be_believed_are_shown_as_such(
    speed: ModuleType, tables: ModuleType, best: Any
) -> None:
    workload = dataclasses.replace(speed.read_workload(BENCHMARKS / "workloads" / "base-cpu-fp32.yaml"), name="w")
    shown = tables.table([dataclasses.replace(best, valid=False, invalid_reasons=("drift of 20 %",))], workload)
    assert "| 3× met, 75% of peak MISSED | INVALID |" in shown
    assert "- Batch 4, onnx fp32: drift of 20 %." in shown
    assert "INVALID" not in tables.table([dataclasses.replace(best, valid=True)], workload)


def test_a_workload_that_promises_nothing_has_no_goals(speed: ModuleType, best: Any) -> None:
    assert dataclasses.replace(best, run=speed.Run(batch_size=4, samples=8)).goals() == []


def test_the_ideas_that_were_not_built_are_measured_with_results_alike(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "ideas.py"), "--quick", "--out", str(tmp_path)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert finished.returncode == 0, finished.stderr
    rows = json.loads(next(tmp_path.glob("*.json")).read_text())["rows"]
    assert len(rows) == 26
    assert all(row.get("difference", 0.0) < 1e-3 for row in rows)
    assert next(tmp_path.glob("*.md")).read_text().count("\n| ") == 1 + len(rows)


@pytest.mark.parametrize("text", ["{" * 3000, "[" * 3000, "- " * 3000, "a: &a 1\nb: *a"], ids=["maps", "lists", "items", "alias"])
def test_a_workload_that_nests_or_repeats_without_end_is_refused(speed: ModuleType, tmp_path: Path, text: str) -> None:
    (tmp_path / "w.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"deep within|by an alias"):
        speed.read_workload(tmp_path / "w.yaml")
