"""The record of long runs: what is counted, and how runs of one reader add up."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def row(read: int, refused: int, **others: Any) -> dict[str, Any]:
    outcomes = {"read": read, "ManifestError": refused}
    return {
        "inputs": read + refused,
        "seconds": 10.0,
        "outcomes": outcomes,
        "faults": {},
        "coverage": [10, 20],
        "guide": "coverage",
        **others,
    }


def test_runs_of_one_reader_add_up_and_each_has_a_seed_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import fuzz

    options = argparse.Namespace(inputs=1000, seed=1)
    first = row(100, 200, note="what was found")
    missing = fuzz.going_on(options, first)
    assert (missing.inputs, missing.seed) == (700, 2)
    second = fuzz.together(first, row(1, 399, faults={"a hang": "a hang: more than 20 s"}, coverage=[15, 30], guide="blind"))
    assert (second["inputs"], second["seconds"], second["runs"], second["coverage"]) == (700, 20.0, 2, [10, 30])
    assert second["outcomes"] == {"read": 101, "ManifestError": 599}
    assert second["note"] == "what was found"
    assert second["faults"]
    assert second["guide"] == fuzz.together(second, row(1, 1))["guide"] == "coverage and blind"
    assert (fuzz.going_on(options, second).inputs, fuzz.going_on(options, second).seed) == (300, 3)
    assert fuzz.going_on(options, None) is options


def test_inputs_of_a_run_that_was_stopped_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import fuzz

    stopped = {"inputs": 74_399, "seconds": None, "outcomes": {}, "faults": {}, "coverage": None, "guide": "coverage"}
    assert fuzz.counted(stopped) == 0
    both = fuzz.together(stopped, row(1, 2))
    assert (both["inputs"], both["seconds"], both["coverage"]) == (3, 10.0, [10, 20])


def test_after_a_crash_another_process_goes_on_by_another_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import fuzz

    crashed = {
        "inputs": 501,
        "seconds": 5.0,
        "outcomes": {"read": 500, "fault": 1},
        "faults": {"crash": "exit status -8"},
        "coverage": None,
    }
    runs = [crashed, {**crashed, "outcomes": {"read": 99, "fault": 1}}, {**row(400, 0), "coverage": None}]
    asked: list[tuple[int, int]] = []

    def run_once(name: str, options: argparse.Namespace, guided: bool) -> dict[str, Any]:
        asked.append((options.inputs, options.seed))
        return {**runs[len(asked) - 1], "faults": dict(runs[len(asked) - 1]["faults"])}

    monkeypatch.setattr(fuzz, "run_once", run_once)
    found = fuzz.run_target("onnx", argparse.Namespace(inputs=1001, seconds=60, seed=3), False)
    assert asked == [(1001, 3), (500, 1003), (400, 2003)]
    assert found["outcomes"] == {"read": 999, "fault": 2}
    assert list(found["faults"]) == ["crash 1", "crash 2"]
