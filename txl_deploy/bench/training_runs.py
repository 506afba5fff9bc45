"""Trains for a benchmark: each combination of processes, batch size and precision is a `txl train` of its own, as a user would start it.

Knows the command lines, which of their settings belong to the benchmark, and what an exit code means. The work folder is a temporary one:
its metrics.jsonl holds every step unrounded, which `--debug` would not keep. What the figures mean is known to `training`.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from txl_deploy.bench.training import TrainingRow, measured_row, skipped_row
from txl_train.errors import ArtifactError, EnvironmentUnfitError, TxlError, UsageError, ValidationError
from txl_train.records import METRICS_NAME

MIXED = {"cuda": "fp16", "cpu": "bf16"}
"""Mixed precision that each kind of device is measured in unless another is asked for."""

_SET_HERE = {
    "train.batch_size": "Give the streams of each process with `--batch-sizes`.",
    "train.dtype": "Give the precisions with `--dtypes`.",
    "train.max_step": "Give the number of steps with `--steps`.",
    "train.work_dir": "A benchmark keeps no checkpoint: leave it out.",
    "train.varlen": "Segments of random length have no time in common: leave it out.",
}
"""Settings that a user may not give, and what to do instead."""

_ENDINGS: dict[int, type[TxlError]] = {1: ValidationError, 2: UsageError, 3: EnvironmentUnfitError, 4: ArtifactError}
_UNFIT = (UsageError.exit_code, EnvironmentUnfitError.exit_code)
"""Exit codes of a training that cannot be here: more memory, devices or text than there are."""
_KILLED = (-9, 137)
_OF_RANK = re.compile(r"exitcode\s*:\s*(-?\d+)")
"""What torchrun, which itself ends with 1, says of the process that failed first."""
_STOP_S = 30.0
_KEPT_LINES = 400


@dataclass(frozen=True, kw_only=True)
class Combination:
    """One training of the benchmark."""

    processes: int
    batch_size: int
    """Streams of each process."""
    dtype: str


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """What all trainings of the benchmark have in common."""

    options: tuple[str, ...]
    """Options of `txl train`, as given."""
    resolved: Mapping[str, Mapping[str, Any]]
    """All its settings, by section, as these options have them."""
    steps: int
    warmup_steps: int
    batch_chunk: int | None = None

    @property
    def device(self) -> str:
        """`cpu`, `cuda` or `auto`."""
        return str(self.resolved["train"]["device"])

    def recorded(self) -> dict[str, Any]:
        """Return the settings for the result, without what differs between the rows and where things lie."""
        sections: dict[str, Any] = {section: dict(values) for section, values in self.resolved.items()}
        for name in ("batch_size", "dtype", "work_dir", "append_dataset", "append_time", "debug", "max_minutes", "eval_batch_size"):
            sections["train"].pop(name)
        if sections["data"]["data"] is not None:
            sections["data"]["data"] = Path(sections["data"]["data"]).name
        sections["train"] |= {"max_step": self.steps, "log_interval": 1}
        if self.batch_chunk is not None:
            sections["train"]["batch_chunk"] = self.batch_chunk
        return sections


def settings_of(options: Sequence[str], *, steps: int, warmup_steps: int, batch_chunk: int | None = None) -> TrainingSettings:
    """Let `txl train` read its options, before anything long begins.

    Raises:
        UsageError: it refuses them, they are set by the benchmark itself, or no step is left after the warm-up.
        TxlError: a file they name cannot be used.
    """
    if not 0 <= warmup_steps < steps:
        raise UsageError(f"A warm-up of {warmup_steps} steps leaves none of {steps} to measure.", remedy="Give more `--steps`.")
    for word in options:
        if word.partition("=")[0].replace("_", "-") in ("--restart", "--resume", "--auto-resume", "--dry-run"):
            raise UsageError(f"A benchmark begins anew, so `{word}` means nothing.", remedy="Leave it out.")
    command = [*_txl(), "train", *options, "--dry-run", "--json"]
    finished = subprocess.run(command, capture_output=True, text=True, env=_environment(), check=False)
    if finished.returncode:
        raise _ENDINGS.get(finished.returncode, EnvironmentUnfitError)(_error_of(finished.stderr.splitlines(), finished.returncode))
    document = json.loads(finished.stdout)
    for name, remedy in _SET_HERE.items():
        if document["origin"][name] == "command line" and (name != "train.varlen" or document["settings"]["train"]["varlen"]):
            raise UsageError(f"`--{name.partition('.')[2].replace('_', '-')}` of the trainings is set by the benchmark.", remedy=remedy)
    return TrainingSettings(
        options=tuple(options), resolved=document["settings"], steps=steps, warmup_steps=warmup_steps, batch_chunk=batch_chunk
    )


def run(
    combination: Combination,
    settings: TrainingSettings,
    folder: Path,
    *,
    device: str,
    n_devices: int | None,
    on_line: Callable[[str], None],
) -> TrainingRow:
    """Train one combination and return its row.

    Args:
        folder: a temporary one, for the text as tokens, which all trainings share, and for the checkpoints, which are deleted.
        device: `cpu` or `cuda`.
        n_devices: how many of these there are; None allows any number of processes.
        on_line: is given each line that the training says.
    """
    facts = {"processes": combination.processes, "batch_size": combination.batch_size, "dtype": combination.dtype}
    common: dict[str, Any] = {**facts, "device": device, "steps": settings.steps, "warmup_steps": settings.warmup_steps}
    if n_devices is not None and combination.processes > n_devices:
        return skipped_row(f"this machine has {n_devices} GPU{'s' if n_devices != 1 else ''}", **common)
    with tempfile.TemporaryDirectory(dir=folder) as own:
        work_dir = Path(own) / "run"
        cache = {"TXL_CACHE_DIR": os.environ.get("TXL_CACHE_DIR") or str(folder / "cache")}
        code, lines = _train(train_command(combination, settings, work_dir), _environment() | cache, on_line)
        metrics = _metrics(work_dir / METRICS_NAME)
    if code == 0:
        return measured_row(metrics, **common)
    reason = _error_of(lines, code)
    if code in _UNFIT or code in _KILLED:
        return skipped_row(reason, **common)
    return measured_row(metrics, **common, failure=reason)


def train_command(combination: Combination, settings: TrainingSettings, work_dir: Path) -> list[str]:
    """Return the command that trains a combination and leaves its metrics in `work_dir`."""
    n, train = combination.processes, settings.resolved["train"]
    fixed: dict[str, object] = {
        "batch_size": n * combination.batch_size,
        "dtype": combination.dtype,
        "max_step": settings.steps,
        "log_interval": 1,
        "work_dir": work_dir,
        "eval_interval": settings.steps,
        "eval_max_steps": 1,
        "eval_batch_size": -(-int(train["eval_batch_size"]) // n) * n,
        "max_minutes": "none",
        "keep_last": "none",
        **dict.fromkeys(("debug", "append_dataset", "append_time", "save_all", "tensorboard", "log_all_ranks"), "false"),
    }
    if settings.batch_chunk is not None:
        fixed["batch_chunk"] = settings.batch_chunk
    assignments = [word for name, value in fixed.items() for word in ("--set", f"train.{name}={value}")]
    arguments = ["train", *settings.options, *assignments]
    if n == 1:
        return [*_txl(), *arguments]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", f"{n}"]
    return [*launcher, *_txl()[1:], *arguments]


def _txl() -> list[str]:
    return [sys.executable, "-m", "txl_deploy.cli.main"]


def _environment() -> dict[str, str]:
    """Return the environment of a training: it finds this txl, and draws no progress bar."""
    here = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(part for part in (here, os.environ.get("PYTHONPATH")) if part)
    return {**os.environ, "PYTHONPATH": path, "CI": "true"}


def _train(command: Sequence[str], environment: Mapping[str, str], on_line: Callable[[str], None]) -> tuple[int, list[str]]:
    """Run a training to its end; return its exit code and the last lines of what it said."""
    lines: collections.deque[str] = collections.deque(maxlen=_KEPT_LINES)
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="backslashreplace", env=environment
    )
    with _ended(process):
        assert process.stderr is not None
        for line in process.stderr:
            lines.append(line.rstrip("\n"))
            on_line(lines[-1])
        code = process.wait()
    said = [int(match[1]) for line in lines if (match := _OF_RANK.search(line))]
    return (said[0] if code and said else code), list(lines)


@contextlib.contextmanager
def _ended(process: subprocess.Popen[str]) -> Iterator[None]:
    """See to it that the training has ended when the block has, also where Ctrl-C ended that."""
    try:
        yield
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if process.stderr is not None:
            process.stderr.close()


def _metrics(path: Path) -> list[dict[str, Any]]:
    """Return the records that a training has left; a last line cut off by its end is none."""
    records = []
    with contextlib.suppress(FileNotFoundError):
        for line in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):
                records.append(json.loads(line))
    return records


def _error_of(lines: Sequence[str], code: int) -> str:
    """Return in one clause why a training ended."""
    if code in _KILLED:
        return "it was killed, as happens where memory runs out"
    errors = [line.partition("Error: ")[2].strip() for line in lines if line.startswith("Error: ")]
    own = [error for error in errors if "has lost the others" not in error] or errors
    return own[0].rstrip(".") if own else f"`txl train` ended with exit code {code}"
