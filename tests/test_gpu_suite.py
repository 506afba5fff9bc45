"""The GPU suite in its CPU mode: every step runs or says why not."""

from __future__ import annotations

import dataclasses
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
    assert status["train fp32, batch 8"] == status["parity onnx, kv memory, fp32 on cpu"] == status["latency table, fp32"] == "done"
    assert all(step["reason"] for step in steps.values() if step["status"] == "skipped")

    for name in ("fp32", "bf16", "fp32, two devices", "reference in fp32"):
        result = steps[f"train {name}, batch 8"]["result"]
        figures = result["measured"]
        assert result["processes"] == (2 if "two" in name else 1)
        assert figures["tokens_per_s"] > 0
        assert figures["peak_memory_bytes"] > 2**20
        assert [step for step, _ in figures["curve"]] == list(range(5, 61, 5))
        assert figures["loss_last_fifth"] == pytest.approx(np.mean([loss for _, loss in figures["curve"][-2:]]))
    assert steps["train bf16, batch 8"]["result"]["measured"]["curve"] != steps["train fp32, batch 8"]["result"]["measured"]["curve"]
    for name in ("bf16", "fp32, two devices", "reference in fp32"):
        compared = steps[f"{name} follows fp32"]["result"]
        assert abs(compared["difference"]) <= compared["tolerance"] < compared["learned"]

    for dtype, expected in (
        ("fp32", {("pytorch", "fp32", "kv"), ("torchscript", "fp32", "hidden"), ("onnx", "fp32", "kv")}),
        ("fp16", {("pytorch", "fp32", "kv"), ("pytorch", "fp16", "kv"), ("torchscript", "fp16", "kv")}),
    ):
        rows = steps[f"latency table, {dtype}"]["result"]["rows"]
        assert {(row["runtime"], row["dtype"], row["memory"]) for row in rows} == expected
        assert all(row["verified"] for row in rows)
    for name, own in (("", {"pytorch"}), (", exports too", {"pytorch", "onnx", "torchscript"})):
        assert {row["runtime"] for row in steps[f"against the reference, fp32, batch 1{name}"]["result"]["rows"]} == {"reference", *own}
    for size in (1, 2):
        rows = steps[f"against the reference, fp32, batch {size}, exports too"]["result"]["rows"]
        assert {row["batch_size"] for row in rows} == {size}
        assert all(row["verified"] for row in rows)
    profiled = steps["profile of the steps"]["result"]["rows"]
    assert [(row["what"], row["name"]) for row in profiled if row["batch_size"] == 2] == [
        *(("inference", name) for name in ("ours", "ours, plain", "reference")),
        *(("training", name) for name in ("ours", "reference")),
    ]
    assert all(row["kernels"]["longest"] for row in profiled)
    assert max(row["largest_difference_to_plain_nats"] for row in profiled if row["name"] == "ours" and row["what"] == "inference") < 1e-4
    goals = json.loads(text)["goals"]
    assert len(goals) == 5
    assert all(goal["outcome"].startswith("not measured: ") for goal in goals)
    assert {bool(goal["measured"]) for goal in goals} == {True}
    for skipped in ("export trt-rtx, kv memory, fp32", "latency table of the compiled step, fp16", "engines of tensorrt"):
        assert status[skipped] == "skipped"
    table = next(tmp_path.glob("*.md")).read_text()
    assert "| latency table, fp32 | done |" in table
    assert "| bf16 follows fp32 | " in table
    assert "**inference, reference, fp32, batch 2**" in table
    assert all(folder not in text + table for folder in (str(BENCHMARKS.parent), "/txl-gpu-suite-"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_suite_measures_nothing_and_says_so(tmp_path: Path) -> None:
    finished = subprocess.run(
        [sys.executable, str(SUITE), "--out", str(tmp_path)], capture_output=True, text=True, timeout=120, check=False
    )
    assert finished.returncode == 3
    assert "no GPU" in finished.stderr
    assert finished.stderr.count("| not measured: there is no GPU |") == 4 + 6  # of inference and of training
    assert "| met |" not in finished.stderr
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
    suite.compare_trainings([two])
    assert [(step.status, step.reason) for step in suite.steps] == [
        ("skipped", "this machine has 1 GPU"),
        ("skipped", "one of the two was not trained"),
    ]


def test_the_plan_for_a_gpu_runs_the_base_model_in_both_types_and_every_runtime(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_suite

    kinds = {(export.format, export.dtype) for export in gpu_suite.BASE.exports}
    assert kinds == {(name, dtype) for name in ("torchscript", "onnx", "trt-rtx") for dtype in ("fp32", "fp16")}
    suite = gpu_suite.Suite(gpu_suite.BASE, tmp_path, n_devices=1)
    commands: list[list[str]] = []

    def note(name: str, command: list[str], **_: Any) -> Any:
        commands.append(command)
        return gpu_suite.Step(name, "done")

    monkeypatch.setattr(suite, "run", note)
    suite.run_inference()
    engines = [command for command in commands if command[0] == "export" and "trt-rtx" in command]
    assert all(command[command.index("--target") + 1] == "portable" for command in engines)
    assert [Path(command[command.index("--artifact") + 1]).name for command in engines] == ["onnx-kv-fp32", "onnx-kv-fp16"]
    compiled = [command for command in commands if "compiled" in command]
    suite.run_against([])
    assert [command[command.index("--dtype") + 1] for command in compiled] == ["fp32", "fp16"]
    opponents = "pytorch,reference"
    tables = [command for command in commands if command[0] == "bench" and not {"compiled", opponents} & set(command)]
    assert [command.count("--artifact") for command in tables] == [4, 3]
    opposed = [command for command in commands if opponents in command]
    assert [command[command.index("--batch-sizes") + 1] for command in opposed] == ["1", "32"] * 2
    assert [command.count("--artifact") for command in opposed] == [3, 3, 0, 0]
    assert {command[command.index("--dtype") + 1] for command in opposed} == {"fp16"}


def row(
    runtime: str, p50: float, *, p99: float | None = None, verified: bool = True, dtype: str = "fp16", valid: bool = True
) -> dict[str, Any]:
    """Return a row of 640 tokens a step, whose arithmetic takes 1 ms at the peak."""
    return {
        "runtime": runtime,
        "provider": "cuda",
        "dtype": dtype,
        "latency_ms_p50": p50,
        "latency_ms_p99": 1.01 * p50 if p99 is None else p99,
        "tokens_per_s": 640_000 / p50,
        "n": 700,
        "is_reference": False,
        "verified": verified,
        "valid": valid,
        "invalid_reasons": [] if valid else ["drift"],
        "roofline": {"flops_per_step": 1e9, "peak_flops": 1e12},
    }


def outcomes(monkeypatch: pytest.MonkeyPatch, steps: list[Any], device: str = "cuda") -> dict[tuple[str, str], tuple[str, str]]:
    """Return what was measured and the outcome, by the beginning of what the goal is of and the goal."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_plan
    import gpu_tables

    plan = dataclasses.replace(gpu_plan.BASE, device=device)
    return {(goal.what, goal.goal): (goal.measured, goal.outcome) for goal in gpu_tables.goals(plan, steps, "a GPU")}


def bench_step(size: int, *rows: dict[str, Any]) -> Any:
    import gpu_tables

    return gpu_tables.Step(f"against the reference, fp16, batch {size}", "done", result={"rows": list(rows)})


ONE = "FP16, batch 1, best runtime", "FP16, batch 1, best runtime against the reference's TorchScript"
MANY = "FP16, batch 32, best runtime", "FP16, batch 32, best runtime against the reference's TorchScript"


@pytest.mark.parametrize(
    ("own", "latency", "tail"),
    [
        ([row("compiled", 1.0)], "met", "met"),
        ([row("compiled", 1.1)], "MISSED", "met"),
        ([row("compiled", 1.0, p99=1.06)], "met", "MISSED"),
        ([row("compiled", 2.0), row("trt-rtx", 0.9, p99=1.0)], "met", "MISSED"),  # the tail of the one that is fast, not of the other
        ([row("compiled", 2.0), row("trt-rtx", 0.5, verified=False)], "MISSED", "met"),
        ([row("compiled", 2.0), row("pytorch", 0.5, dtype="fp32")], "MISSED", "met"),
        ([row("compiled", 1.0, valid=False)], "met", "not measured: the row is INVALID: drift"),
        ([], "not measured: no runtime of ours has the right perplexity", "not measured: no runtime of ours has the right perplexity"),
    ],
)
def test_the_goals_of_one_stream_are_judged_by_the_fastest_runtime_that_is_right(
    monkeypatch: pytest.MonkeyPatch, own: list[dict[str, Any]], latency: str, tail: str
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    found = outcomes(monkeypatch, [bench_step(1, row("reference", 10.0), *own)])
    assert found[ONE[1], "latency p50 at most 1/10"][1] == latency
    assert found[ONE[0], "p99 at most 1.05 x p50"][1] == tail
    assert found[MANY[1], "throughput at least 4 x"] == ("", "not measured: its step was not asked for")


@pytest.mark.parametrize(
    ("ms", "throughput", "share"), [(2.0, "met", "met"), (2.6, "MISSED", "met"), (2.5, "met", "met"), (3.0, "MISSED", "MISSED")]
)
def test_the_goals_of_many_streams_are_throughput_and_the_share_of_the_peak(
    monkeypatch: pytest.MonkeyPatch, ms: float, throughput: str, share: str
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    found = outcomes(monkeypatch, [bench_step(32, row("reference", 10.0), row("onnx", ms))])
    assert found[MANY[1], "throughput at least 4 x"][1] == throughput
    assert found[MANY[0], "at least 35 % of the measured matmul peak"][1] == share
    assert found[MANY[0], "at least 35 % of the measured matmul peak"][0].startswith(f"{1 / ms:.1%}")
    away = outcomes(monkeypatch, [bench_step(32, row("reference", 10.0), row("onnx", ms))], device="cpu")
    assert all(outcome.startswith("not measured: ") for _, outcome in away.values())


@pytest.mark.parametrize(
    ("own_rate", "status", "outcome"), [(2000.0, "done", "met"), (1999.0, "done", "MISSED"), (3000.0, "failed", "MISSED")]
)
def test_the_goal_of_training_is_twice_the_throughput_at_equal_loss(
    monkeypatch: pytest.MonkeyPatch, own_rate: float, status: str, outcome: str
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_tables

    def trained(name: str, rate: float) -> Any:
        return gpu_tables.Step(name, "done", result={"measured": {"tokens_per_s": rate, "model_flops_utilisation": 0.25}})

    steps = [
        trained("train fp16, compiled, batch 32", own_rate),
        trained("train reference in fp16, batch 32", 1000.0),
        gpu_tables.Step("reference in fp16 follows fp16, compiled", status, "the losses differ"),
        gpu_tables.Step("train bf16, compiled, batch 256", "skipped", "out of memory"),
    ]
    found = outcomes(monkeypatch, steps)
    measured, judged = found["training in fp16, batch 32, against the reference's step", "tokens/s at least 2 x at equal loss"]
    assert judged == outcome
    assert "MFU 25.0%" in measured
    assert ("losses not alike: the losses differ" in measured) == (status == "failed")
    large = found["training in bf16, batch 256, against the reference's step", "tokens/s at least 2 x"]
    assert large == ("", "not measured: out of memory")


def test_what_this_machine_cannot_run_is_skipped_with_its_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_suite

    suite = gpu_suite.Suite(gpu_suite.BASE, tmp_path, n_devices=1)
    script = "import sys; print('Error: there is no GPU', file=sys.stderr); sys.exit(int(sys.argv[1]))"
    monkeypatch.setattr(gpu_suite, "txl_command", lambda arguments, processes: [sys.executable, "-c", script, *arguments])
    steps = (suite.run("unfit", ["3"], may_be_unfit=True), suite.run("engine", ["3"]), suite.run("broken", ["1"], may_be_unfit=True))
    assert [(step.status, step.reason) for step in steps] == [
        ("skipped", "exit code 3: Error: there is no GPU"),
        ("failed", "exit code 3: Error: there is no GPU"),
        ("failed", "exit code 1: Error: there is no GPU"),
    ]


def test_when_the_time_is_over_no_step_is_begun_and_each_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_suite

    suite = gpu_suite.Suite(gpu_suite.QUICK, tmp_path, n_devices=1, minutes=0.1)
    suite.run_trainings(gpu_suite.QUICK.trainings[:1])
    assert [(step.status, step.reason) for step in suite.steps] == [("skipped", "the time that `--minutes` gives was over")]
