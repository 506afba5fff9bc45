"""Several processes that train or score together: what they share, and that the result is that of one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.processes import in_processes
from txl_train.checkpoint import load_checkpoint
from txl_train.data.segments import SegmentIterator
from txl_train.distributed import World, join, world_of
from txl_train.errors import EnvironmentUnfitError, UsageError, ValidationError
from txl_train.evaluate import StepOutput, evaluate
from txl_train.model.memory import Memory
from txl_train.run import train
from txl_train.settings import Resolved, resolve

WORDS = [f"w{i}" for i in range(60)]


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    generator = np.random.default_rng(0)
    folder = tmp_path / "text"
    folder.mkdir()
    for split, length in (("train", 905), ("valid", 120), ("test", 120)):  # 906 tokens: streams of unequal length
        (folder / f"{split}.txt").write_text(" ".join(generator.choice(WORDS, length)) + "\n", encoding="utf-8")
    return {
        "n_layer": 2,
        "n_head": 2,
        "d_head": 4,
        "d_model": 8,
        "d_inner": 8,
        "mem_len": 6,
        "dropout": 0.0,
        "adaptive": True,
        "cutoffs": (20, 40),
        "div_val": 2,
        "dataset": "text",
        "data": str(folder),
        "lr": 0.02,
        "lr_warmup_steps": 2,
        "clip": 0.1,
        "max_step": 12,
        "batch_size": 8,
        "tgt_len": 30,
        "log_interval": 3,
        "eval_interval": 6,
        "eval_batch_size": 4,
        "eval_tgt_len": 5,
    }


def resolved_from(settings: dict[str, Any], **changes: Any) -> Resolved:
    return resolve(environment={}, overrides=list((settings | changes).items()))


def train_here(settings: dict[str, Any]) -> dict[str, Any]:
    """What each process of a group runs."""
    torch.set_num_threads(1)
    restart = settings.pop("restart", None)
    continued = None if restart is None else load_checkpoint(restart)
    return train(resolved_from(settings), continue_from=continued, in_place=True, world=world_of()).to_dict()


def weights_in(folder: Path, name: str = "checkpoint_last.pt") -> dict[str, np.ndarray]:
    return {key: value.numpy() for key, value in load_checkpoint(folder / name).model.items()}


def assert_same_weights(one: Path, other: Path, tolerance: float) -> None:
    expected = weights_in(other)
    for name, weight in weights_in(one).items():
        np.testing.assert_allclose(weight, expected[name], rtol=0, atol=tolerance, err_msg=name)


def training_losses(folder: Path) -> list[float]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [record["loss_nats_per_token"] for record in records if record["kind"] == "train"]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"batch_chunk": 2},
        {"roll": True, "optim": "sgd", "mom": 0.9},
        {"varlen": True, "ext_len": 3},
        {"compat": "nvidia-2023", "roll": False},
    ],
    ids=["plain", "in chunks", "rolled", "of random length, with context", "as NVIDIA"],
)
def test_two_processes_train_to_the_weights_of_one(settings: dict[str, Any], tmp_path: Path, changes: dict[str, Any]) -> None:
    alone = train(resolved_from(settings, work_dir=str(tmp_path / "one"), **changes)).to_dict()
    together = in_processes(2, train_here, settings | {"work_dir": str(tmp_path / "two")} | changes)

    assert_same_weights(tmp_path / "two", tmp_path / "one", 1e-6)
    assert training_losses(tmp_path / "two") == pytest.approx(training_losses(tmp_path / "one"), rel=1e-6)
    for result in together:  # every process knows the result
        assert result["valid"]["n_tokens"] == alone["valid"]["n_tokens"]
        assert result["test"]["nll_nats_per_token"] == pytest.approx(alone["test"]["nll_nats_per_token"], rel=1e-6)


def test_a_run_goes_on_with_other_numbers_of_processes(settings: dict[str, Any], tmp_path: Path) -> None:
    train(resolved_from(settings, work_dir=str(tmp_path / "at once")))
    folder = tmp_path / "in turns"
    common = settings | {"work_dir": str(folder), "max_step_scheduler": 12}
    train(resolved_from(common, max_step=4))
    in_processes(2, train_here, common | {"max_step": 9, "restart": str(folder / "checkpoint_last.pt")})
    last = load_checkpoint(folder / "checkpoint_last.pt")
    train(resolved_from(common, max_step=12), continue_from=last)

    assert last.progress["step"] == 9
    assert_same_weights(folder, tmp_path / "at once", 1e-6)


def test_two_processes_with_dropout_continue_to_the_last_bit(settings: dict[str, Any], tmp_path: Path) -> None:
    dropping = settings | {"dropout": 0.2, "max_step_scheduler": 12}
    in_processes(2, train_here, dropping | {"work_dir": str(tmp_path / "at once")})
    folder = tmp_path / "in turns"
    in_processes(2, train_here, dropping | {"work_dir": str(folder), "max_step": 7})
    in_processes(2, train_here, dropping | {"work_dir": str(folder), "restart": str(folder / "checkpoint_last.pt")})

    assert_same_weights(folder, tmp_path / "at once", 0.0)


def test_only_the_first_process_writes_unless_all_are_to_log(settings: dict[str, Any], tmp_path: Path) -> None:
    in_processes(2, train_here, settings | {"work_dir": str(tmp_path / "quiet"), "max_step": 3})
    in_processes(2, train_here, settings | {"work_dir": str(tmp_path / "loud"), "max_step": 3, "log_all_ranks": True})

    assert not list((tmp_path / "quiet").glob("*rank1*"))
    of_second = (tmp_path / "loud" / "train_log.rank1.log").read_text(encoding="utf-8")
    assert "[process 1] | epoch   1 step        3" in of_second
    assert training_losses(tmp_path / "loud") == training_losses(tmp_path / "quiet")


def sum_and_gather() -> tuple[list[float], list[list[int]], int]:
    world = world_of()
    with join(world, torch.device("cpu")):
        gathered = [part.tolist() for part in world.gather(torch.tensor([world.rank, 7]))]
        return world.sum([1.0, 10.0**world.rank]), gathered, world.largest(world.rank * 5)


def test_processes_exchange_sums_tensors_and_the_largest_number() -> None:
    for sums, gathered, largest in in_processes(2, sum_and_gather):
        assert sums == [2.0, 11.0]
        assert gathered == [[0, 7], [1, 7]]
        assert largest == 5


def end_or_wait() -> str:
    world = world_of()
    try:
        with join(world, torch.device("cpu")):
            if world.is_main:
                raise UsageError("something is wrong here only")
            world.wait()
    except (UsageError, EnvironmentUnfitError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing happened"


def test_a_process_whose_partner_ends_says_so() -> None:
    first, second = in_processes(2, end_or_wait)
    assert first == "UsageError: something is wrong here only"
    assert second.startswith("EnvironmentUnfitError: Process 1 of 2 has lost the others")
    assert "--resume" in second


def test_one_process_alone_needs_no_exchange() -> None:
    world = world_of({})
    assert (world.sum([3.0]), world.largest(4), world.share(6)) == ([3.0], 4, slice(0, 6))
    assert [part.tolist() for part in world.gather(torch.tensor([1]))] == [[1]]


def test_streams_that_cannot_be_shared_equally_name_a_batch_size_that_can() -> None:
    with pytest.raises(UsageError, match=r"9 streams cannot be divided equally among 2") as error:
        World(0, 2).share(9)
    assert "10" in str(error.value.remedy)


@pytest.mark.parametrize("environment", [{"RANK": "2", "WORLD_SIZE": "2"}, {"RANK": "x", "WORLD_SIZE": "2"}])
def test_places_that_contradict_each_other_are_refused(environment: dict[str, str]) -> None:
    with pytest.raises(UsageError, match=r"RANK"):
        world_of(environment)


@pytest.mark.slow
def test_processes_of_torchrun_finish_the_step_and_save_when_it_is_told_to_stop(settings: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "W"
    given = settings | {"max_step": 100_000, "log_interval": 1, "eval_interval": 100_000, "work_dir": str(folder), "cutoffs": "20,40"}
    options = [word for name, value in given.items() for word in ("--set", f"{name}={value}")]
    txl = [sys.executable, "-c", "import sys; from txl_deploy.cli.main import main; sys.argv[0] = 'txl'; sys.exit(main())"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    command = [*launcher, "--rdzv-endpoint", "127.0.0.1:0", "--no-python", *txl, "train", *options]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    ) as process:
        record = folder / "metrics.jsonl"
        deadline = time.monotonic() + 120
        while not (record.exists() and '"step": 3' in record.read_text(encoding="utf-8")):
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
            assert time.monotonic() < deadline, "nothing was trained in two minutes"
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=60)

    assert "(sigterm)" in out
    saved = load_checkpoint(folder / "checkpoint_last.pt")
    steps = [json.loads(line)["step"] for line in record.read_text(encoding="utf-8").splitlines()]
    assert saved.progress["step"] == steps[-1] >= 3
    assert saved.training is not None
    assert len(saved.training["rng"]) == 2


class Spoilt:
    """A stepper whose scores are not finite in one process, from its second segment on."""

    def __init__(self, in_process: int) -> None:
        self.calls, self.in_process = 0, in_process

    def initial_memory(self, batch_size: int) -> Memory:
        return Memory([], torch.zeros(batch_size, dtype=torch.int64))

    def step(self, input_ids_BT: torch.Tensor, target_ids_BT: torch.Tensor, memory: Memory) -> StepOutput:
        self.calls += 1
        bad = self.calls > 1 and world_of().rank == self.in_process
        return StepOutput(torch.full(target_ids_BT.shape, float("nan") if bad else 1.0), memory)


def score_with_a_spoilt_process() -> str:
    world = world_of()
    segments = SegmentIterator(np.arange(100), batch_size=4, tgt_len=5, streams=world.share(4))
    with join(world, torch.device("cpu")):
        try:
            evaluate(Spoilt(1), segments, batch_size=2, world=world, on_step=lambda n: world.wait())
        except ValidationError as error:
            return str(error)
    return "a score"


def test_a_score_that_is_not_finite_in_one_process_is_told_by_all() -> None:
    for message in in_processes(2, score_with_a_spoilt_process):
        assert message.startswith("The loss of stream 0 in segment 1 of process 1 is not finite")
