"""Training that is killed, or whose disk is full, loses nothing that was saved: it goes on, to the same result."""

from __future__ import annotations

import os
import random
import resource
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.processes import start
from txl_train.checkpoint import load_checkpoint
from txl_train.run import train
from txl_train.settings import Resolved, resolve

KILLS = 50


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    words = np.random.default_rng(0).choice([f"w{i}" for i in range(300)], size=3000)
    folder = tmp_path / "text"
    folder.mkdir()
    for split, part in (("train", words[:2500]), ("valid", words[2500:2600]), ("test", words[2600:])):
        (folder / f"{split}.txt").write_text(" ".join(part) + "\n", encoding="utf-8")
    return {
        "n_layer": 2,
        "n_head": 2,
        "d_head": 16,
        "d_model": 64,
        "d_inner": 128,
        "mem_len": 40,
        "dropout": 0.1,
        "dataset": "text",
        "data": str(folder),
        "lr": 0.01,
        "lr_warmup_steps": 2,
        "scheduler": "constant",
        "roll": True,
        "batch_size": 4,
        "tgt_len": 20,
        "log_interval": 1,
        "eval_interval": 2,
        "eval_batch_size": 4,
        "eval_tgt_len": 20,
    }


def resolved_from(settings: dict[str, Any], **changes: Any) -> Resolved:
    return resolve(environment={}, overrides=list((settings | changes).items()))


def train_on(settings: dict[str, Any]) -> int:
    """Begin, or go on with what the work folder holds; return the number of steps done."""
    torch.set_num_threads(1)
    last = Path(settings["work_dir"]) / "checkpoint_last.pt"
    continued = load_checkpoint(last) if last.exists() else None
    overwrite = continued is None
    return train(resolved_from(settings), continue_from=continued, overwrite=overwrite).progress.step


def killed_at_a_random_moment(settings: dict[str, Any], delay_s: float) -> None:
    """Let a process train until some time after it has written its first line, then kill it."""
    record = Path(settings["work_dir"]) / "metrics.jsonl"
    before = record.stat().st_size if record.exists() else 0
    process, answer = start(train_on, settings)
    deadline = time.monotonic() + 60
    while not (record.exists() and record.stat().st_size > before) and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(delay_s)
    assert process.is_alive(), result_of(answer)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()


def result_of(answer: Connection) -> Any:
    return answer.recv() if answer.poll(0) else "it said nothing"


@pytest.mark.slow
def test_training_killed_fifty_times_goes_on_each_time_to_the_weights_of_a_run_at_once(settings: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    endless = settings | {"work_dir": str(folder), "max_step": 100_000}
    moments = random.Random(0)
    steps, saving = [0], 0
    for _ in range(KILLS):
        killed_at_a_random_moment(endless, moments.uniform(0.0, 0.12))
        saving += bool(list(folder.glob("*.tmp")))
        last = folder / "checkpoint_last.pt"
        steps.append(load_checkpoint(last).progress["step"] if last.exists() else 0)
        if (folder / "checkpoint_best.pt").exists():
            load_checkpoint(folder / "checkpoint_best.pt")
    assert steps == sorted(steps), "a kill must not take back what was saved"
    assert saving > 0, "some of the kills should have come while a checkpoint was written"

    to_the_end = steps[-1] + 3
    train_on(endless | {"max_step": to_the_end})
    train_on(settings | {"work_dir": str(tmp_path / "at once"), "max_step": to_the_end})
    killed, at_once = (load_checkpoint(path / "checkpoint_last.pt") for path in (folder, tmp_path / "at once"))
    assert killed.progress["step"] == at_once.progress["step"] == to_the_end
    for name, weight in at_once.model.items():
        assert torch.equal(killed.model[name], weight), name


def train_with_little_room(settings: dict[str, Any], n_bytes: int) -> tuple[str, int]:
    """Train where no file may grow beyond `n_bytes`, as on a full disk; return the error and its exit code."""
    from txl_train.errors import TxlError

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, n_bytes))
    try:
        train_on(settings)
    except TxlError as error:
        return str(error), error.exit_code
    return "no error", 0


def test_a_full_disk_is_an_error_and_keeps_the_last_good_checkpoint(settings: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "W"
    train_on(settings | {"work_dir": str(folder), "max_step": 4})
    good = (folder / "checkpoint_last.pt").read_bytes()

    process, answer = start(train_with_little_room, settings | {"work_dir": str(folder), "max_step": 8}, len(good) // 2)
    assert answer.poll(60)
    succeeded, result = answer.recv()
    process.join()

    assert succeeded, result
    message, exit_code = result
    assert exit_code == 3
    assert "checkpoint_last.pt cannot be written" in message
    assert (folder / "checkpoint_last.pt").read_bytes() == good
    assert not list(folder.glob("*.tmp"))
    assert train_on(settings | {"work_dir": str(folder), "max_step": 8}) == 8
