"""The script that takes the base model through the export, on a small model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


def export_base(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "benchmarks/export_base.py", *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_the_record_holds_files_nodes_times_memory_parity_and_engine(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    done = export_base("--quick", "--only", "kv-fp16", "--out", str(tmp_path / "record"), "--work-dir", str(tmp_path / "W"))
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "record.json").read_text(encoding="utf-8"))
    (row,) = record["rows"]
    assert (row["memory"], row["dtype"]) == ("kv", "fp16")
    assert row["files"]["model.onnx"] > 10_000
    assert row["nodes"] == sum(row["operators"].values()) > 100
    assert row["parity"]["passed"]
    assert set(row["precisions"]["products"]) == {"float16"}
    assert row["engine"]["bytes"] > 1000
    assert row["engine"]["compute_capability"] == "7.5"
    assert all(row[f"{step}_peak_bytes"] > 1e8 for step in ("export", "compare", "build"))
    assert {"git_commit", "cpu", "packages"} <= record["environment"].keys()
    assert str(tmp_path) not in json.dumps(record), "where things lie is nobody's business"
    assert "| kv | fp16 |" in (tmp_path / "record.md").read_text(encoding="utf-8")
    assert list((tmp_path / "W").iterdir()) == []


def test_a_part_is_not_written_where_the_record_of_the_whole_belongs() -> None:
    done = export_base("--quick")
    assert done.returncode == 2
    assert "--out" in done.stderr
