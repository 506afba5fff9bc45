"""Memory that runs out is told as that, with the setting to lower, and never taken for a damaged file or a bug."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch

from tests.support import small_config, write_checkpoint, write_corpus
from txl_train.checkpoint import load_checkpoint
from txl_train.data.corpus import load_corpus
from txl_train.data.datasets import get_dataset
from txl_train.errors import EnvironmentUnfitError
from txl_train.exhaustion import what_ran_out
from txl_train.run import train
from txl_train.settings import resolve
from txl_train.trainer import Trainer

HOST = RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes.")
DEVICE = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 15.77 GiB.\nIncluding")


def raises(error: BaseException) -> Any:
    def fail(*arguments: object, **options: object) -> NoReturn:
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "which"),
    [
        (MemoryError(), "Memory"),
        (HOST, "Memory"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "Memory"),
        (RuntimeError("std::bad_alloc"), "Memory"),
        (RuntimeError("can't start new thread"), "Memory"),
        (RuntimeError("could not create a primitive"), "Memory"),
        (RuntimeError("could not create a primitive descriptor for a matmul primitive"), None),
        (DEVICE, "The device's memory"),
        (RuntimeError("CUDA error: out of memory"), "The device's memory"),
        (RuntimeError("size mismatch"), None),
        (OSError(errno.ENOSPC, "No space left on device"), None),
        (ValueError("can't allocate memory"), None),
    ],
)
def test_it_is_told_from_other_errors(error: BaseException, which: str | None) -> None:
    assert what_ran_out(error) == which


@pytest.mark.parametrize(("error", "said"), [(HOST, "Memory ran out"), (DEVICE, "The device's memory ran out: .*2.00 GiB")])
def test_training_names_the_settings_to_change_and_keeps_what_was_saved(
    error: BaseException, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"n_layer": 1, "n_head": 2, "d_head": 4, "d_model": 8, "d_inner": 8, "mem_len": 4, "adaptive": False}
    data = {"dataset": "text", "data": str(write_corpus(tmp_path / "text", 20)), "work_dir": str(tmp_path / "W")}
    steps = {"batch_size": 2, "tgt_len": 5, "eval_interval": 2, "eval_batch_size": 2}
    train(resolve(environment={}, overrides=list({**sizes, **data, **steps, "max_step": 2, "max_step_scheduler": 4}.items())))
    before = (tmp_path / "W" / "checkpoint_best.pt").read_bytes()

    monkeypatch.setattr(Trainer, "step", raises(error))
    with pytest.raises(EnvironmentUnfitError, match=said) as told:
        train(
            resolve(environment={}, overrides=list({**sizes, **data, **steps, "max_step": 4, "max_step_scheduler": 4}.items())),
            continue_from=load_checkpoint(tmp_path / "W" / "checkpoint_last.pt"),
        )

    assert told.value.exit_code == 3
    assert "batch_chunk" in str(told.value)
    assert "--resume" in str(told.value)
    assert (tmp_path / "W" / "checkpoint_best.pt").read_bytes() == before
    load_checkpoint(tmp_path / "W" / "checkpoint_last.pt")


@pytest.mark.parametrize("error", [HOST, MemoryError()], ids=["PyTorch", "Python"])
def test_a_checkpoint_that_memory_is_too_small_for_is_not_called_damaged(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(tmp_path / "checkpoint.pt", small_config())
    monkeypatch.setattr(torch, "load", raises(error))
    with pytest.raises(EnvironmentUnfitError, match=r"ran out when .*checkpoint\.pt was read") as told:
        load_checkpoint(tmp_path / "checkpoint.pt")
    assert told.value.exit_code == 3


def test_a_cache_entry_that_memory_is_too_small_for_is_not_called_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = write_corpus(tmp_path / "text", 20)
    load_corpus(text, get_dataset("text"), cache_dir=tmp_path / "cache").ids("train")
    monkeypatch.setattr(np, "memmap", raises(OSError(errno.ENOMEM, "Cannot allocate memory")))
    with pytest.raises(EnvironmentUnfitError, match=r"Memory ran out when .*\.ids was opened"):
        load_corpus(text, get_dataset("text"), cache_dir=tmp_path / "cache").ids("train")
