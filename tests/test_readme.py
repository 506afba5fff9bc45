"""The README's commands, run as they stand, in order, in an empty folder."""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
GROUPS = ("data",)
"""Commands that have commands of their own."""
TXL = [sys.executable, "-c", "import sys; from txl_deploy.cli.main import main; sys.argv[0] = 'txl'; sys.exit(main())"]


def commands(marker: str) -> list[list[str]]:
    """Return the `txl` commands of the code blocks opened with ```marker."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)  # in pairs, so that no end is taken for a beginning
    blocks = [block for found, block in fenced if found == marker]
    return [shlex.split(line, comments=True) for block in blocks for line in block.splitlines() if line.startswith("txl ")]


def run(command: list[str], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    settings = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "TXL_CACHE_DIR": str(folder / "cache"),
        "CI": "true",
        **environment,
    }
    return subprocess.run([*TXL, *command[1:]], cwd=folder, env=settings, capture_output=True, text=True, timeout=600, check=False)


@pytest.mark.slow
def test_the_quick_start_runs_as_it_stands(tmp_path: Path) -> None:
    listed = commands("sh")
    assert [command[1] for command in listed][:3] == ["train", "eval", "export"]
    for command in listed:
        shorter = ["--duration", "1", "--max-duration", "1", "--min-samples", "5", "--accept-invalid"] if command[1] == "bench" else []
        finished = run([*command, *shorter], tmp_path, TXL_MAX_STEP="6", TXL_EVAL_INTERVAL="3")
        assert finished.returncode == 0, f"{shlex.join(command)}\n{finished.stderr}"
        assert "Traceback" not in finished.stderr
        if "--json" in command:
            json.loads(finished.stdout)
    assert (tmp_path / "W" / "report.html").stat().st_size > 10_000


def test_every_other_command_of_the_readme_is_understood(tmp_path: Path) -> None:
    others = commands("")
    assert len(others) > 10
    shown: dict[str, str] = {}
    for command in others:
        name = " ".join(itertools.takewhile(lambda part: re.fullmatch("[a-z]+", part), command[1 : 3 if command[1] in GROUPS else 2]))
        if name not in shown:
            shown[name] = run(["txl", *name.split(), "--help"], tmp_path).stdout
        for option in (part for part in command if part.startswith("--")):
            assert re.search(rf"{re.escape(option)}\b", shown[name]), f"{option} is no option of `txl {name}`"


def test_every_file_the_readme_names_exists() -> None:
    named = {
        *re.findall(r"\]\(([A-Za-z0-9_./-]+)\)", README),
        *re.findall(r"`((?:txl_|tests/|benchmarks/|engines/)[A-Za-z0-9_./-]+)`", README),
    }
    assert named
    assert [name for name in named if not (ROOT / name).exists()] == []
