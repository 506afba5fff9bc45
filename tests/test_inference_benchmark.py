"""The script that measures one checkpoint in every runtime: from checkpoint to report, as it stands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import small_config, write_checkpoint, write_corpus
from txl_deploy.bench.result import BenchResult

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "benchmarks" / "inference_benchmark.sh"


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Return an environment in which `txl` is that of this checkout."""
    folder = tmp_path / "bin"
    folder.mkdir()
    shim = folder / "txl"
    code = "import sys; from txl_deploy.cli.main import main; sys.argv[0] = 'txl'; sys.exit(main())"
    shim.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "{code}" "$@"\n')
    shim.chmod(0o755)
    return {
        **os.environ,
        "PATH": os.pathsep.join([str(folder), os.environ["PATH"]]),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "CI": "true",
        "TXL_CACHE_DIR": str(tmp_path / "cache"),
    }


@pytest.mark.slow
def test_one_call_gives_receipts_parity_latencies_and_the_report(tmp_path: Path, environment: dict[str, str]) -> None:
    config = small_config(cutoffs=(5, 9, 16), div_val=2)
    write_checkpoint(tmp_path / "checkpoint_best.pt", config, data=write_corpus(tmp_path / "data", config.vocab_size), tgt_len=5)
    settings = {"BATCH_SIZES": "1,2", "RUNTIMES": "pytorch", "BENCH": "--duration 0 --min-samples 20 --max-samples 20"}
    done = subprocess.run(
        ["bash", str(SCRIPT), "checkpoint_best.pt", "results"],
        cwd=tmp_path,
        env=environment | settings,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 1, done.stderr  # too few samples: every row is INVALID, and the report is there all the same
    assert "rows are INVALID" in done.stderr
    result = BenchResult.read(tmp_path / "results" / "benchmark.json")
    assert {row.runtime for row in result.rows} == {"pytorch", "torchscript", "onnx"}
    assert result.verified is True
    assert len(result.receipts) == 3
    for name in ("torchscript", "onnx", "onnx-fp16"):
        assert json.loads((tmp_path / "results" / f"parity-{name}.json").read_text())["passed"] is True
    assert "INVALID" in (tmp_path / "results" / "report.html").read_text()
    assert "| Batch size |" in (tmp_path / "results" / "report.md").read_text()


def test_without_arguments_it_says_what_it_takes() -> None:
    done = subprocess.run(["bash", str(SCRIPT)], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "CHECKPOINT RESULTS" in done.stderr
