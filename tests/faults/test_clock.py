"""Who reads the system's clock, which may jump: only what writes down when something was done."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
READ = {("time", "time"), ("time", "time_ns"), ("datetime", "now"), ("datetime", "utcnow"), ("datetime", "today"), ("date", "today")}
NOTED_ONLY = {
    "txl_train/work_folder.py",  # the name of a work folder
    "txl_deploy/cli/eval_receipt.py",  # when a receipt was made
    "txl_deploy/bench/environment.py",  # when something was measured
}


def test_nothing_is_decided_by_a_clock_that_may_jump() -> None:
    readers = set()
    for path in sorted((*ROOT.glob("txl_train/**/*.py"), *ROOT.glob("txl_deploy/**/*.py"))):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute):
                owner = node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", "")
                if (owner, node.attr) in READ:
                    readers.add(str(path.relative_to(ROOT)))
    assert readers == NOTED_ONLY
