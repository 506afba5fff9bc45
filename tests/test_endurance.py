"""The endurance benchmark finds a drift, watches memory, and its short run passes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.support import build_model, small_config
from txl_deploy.runtimes.eager import EagerRuntime
from txl_train.model.memory import Memory

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def cases(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import endurance_cases

    return endurance_cases


class Drifting(EagerRuntime):
    """Adds a little to every memory."""

    def run(self, input_ids_BQ: torch.Tensor, target_ids_BT: Any, rows: Any, memory: Memory) -> tuple[torch.Tensor, Memory]:
        result, memory = super().run(input_ids_BQ, target_ids_BT, rows, memory)
        self.shift = getattr(self, "shift", 0.0) + 1e-3
        return result, Memory([state + self.shift for state in memory.states], memory.length_B)


def test_a_memory_that_drifts_is_found(cases: ModuleType) -> None:
    model = build_model(small_config())
    found = []
    for kind in (EagerRuntime, Drifting):
        rollout = cases.Rollout(kind(model, tgt_len=4, packed=False), 30)
        rollout.run(30)
        found.append(rollout.difference())
        assert rollout.difference(1) > cases.MOST_DRIFT  # the memory matters at all
    assert found[0] <= cases.MOST_DRIFT < found[1]


def test_sums_are_compared_with_the_exact_ones(cases: ModuleType) -> None:
    found = cases.summed(2000, 50)
    assert found["n_tokens"] == 100_000
    assert found["evaluate"] <= cases.MOST_SUM_ERROR < found["running float32"]


@pytest.mark.slow
def test_a_text_is_prepared_trained_on_and_scored_in_bounded_memory(tmp_path: Path) -> None:
    """64 MB of text, 11 million words; a process that held them as Python's words, or as a list of ids, would need 600 MB and more."""
    code = (
        "import json, sys; from pathlib import Path; import dataclasses, endurance_cases as cases\n"
        "sizes = dataclasses.replace(cases.QUICK, corpus_bytes=64 * 10**6)\n"
        "print(json.dumps(cases.corpus(Path(sys.argv[1]), sizes)))\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(BENCHMARKS)}
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["met"], [call["errors"] for call in found["raw"]["calls"]]
    assert all(0 < call["own_bytes"] < 400 * 2**20 for call in found["raw"]["calls"])
