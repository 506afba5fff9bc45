"""How the scripts of this folder start `txl`, and what their records have in common.

Importing it makes the packages of this checkout importable, so that the scripts need no installation.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

TXL = [sys.executable, "-c", "import sys; from txl_deploy.cli.main import main; sys.argv[0] = 'txl'; sys.exit(main())"]
"""The command `txl` of this checkout."""


def txl_command(arguments: list[str], processes: int = 1) -> list[str]:
    """Return the command that runs `txl` with these arguments, in several processes through torchrun."""
    if processes == 1:
        return [*TXL, *arguments]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "--no-python"]
    return [*launcher, *TXL, *arguments]


def child_environment(**changes: str) -> dict[str, str]:
    """Return the environment that a `txl` of this checkout is started in; it draws no progress bar."""
    path = os.pathsep.join(part for part in (str(ROOT), os.environ.get("PYTHONPATH")) if part)
    return {**os.environ, "PYTHONPATH": path, "CI": "true", **changes}


def device_slug(gpu_name: str | None, cores: int | None, extensions: Sequence[str] = ("avx512f",)) -> str:
    """Return what a record's file name calls the device: the GPU's name; or cpu and its cores, and avx2 if it has no more than that."""
    if gpu_name:
        return re.sub("[^a-z0-9]+", "-", gpu_name.lower()).strip("-")
    return f"cpu{cores or ''}{'-avx2' if 'avx2' in extensions and 'avx512f' not in extensions else ''}"


def without_folders(value: Any) -> Any:
    """Return plain values in which every absolute path is cut down to its last part: where things lie is no one's business."""
    if isinstance(value, str):
        return re.sub(r"(?<![\w.…:/])/(?:[^\s/='\"]+/)+([^\s/='\"]+)", r"…/\1", value)
    if isinstance(value, dict):
        return {key: without_folders(item) for key, item in value.items()}
    return [without_folders(item) for item in value] if isinstance(value, (list, tuple)) else value
