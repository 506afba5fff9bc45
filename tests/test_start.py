"""The benchmark of starting: everything is measured, and its opponent in preparing text finds the ids that we find."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.mark.slow
def test_a_quick_run_says_of_every_goal_whether_it_is_met(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "start.py"), "--quick", "--out", str(tmp_path / "start")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "start.json").read_text())
    assert record["preparing"]["same_ids"]
    assert record["preparing"]["n_tokens"] == 12_000 + 200 + 40  # words, lines, and the empty lines after every fifth
    assert set(record["opening"]) == {"checkpoint", "ONNX artifact"}
    rows = (tmp_path / "start.md").read_text().splitlines()[4:8]
    assert all(row.rstrip(" |").endswith(("met", "MISSED")) for row in rows)
