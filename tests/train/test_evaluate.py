"""The sums behind a perplexity: what counts, what is timed, and that several processes add up to one."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.processes import in_processes
from txl_train import evaluate as module
from txl_train.data.segments import SegmentIterator
from txl_train.distributed import World, join, world_of
from txl_train.errors import ValidationError
from txl_train.evaluate import EvalResult, StepOutput, evaluate
from txl_train.model.memory import Memory

IDS = np.concatenate([np.random.default_rng(11).integers(0, 50, 102), [50]])
TGT_LEN = 4


class Known:
    """A stepper whose nll is a known function of a token's target and of its stream's memory; not finite for one target, if asked."""

    def __init__(self, bad_target: int | None = None) -> None:
        self.bad_target = bad_target

    def initial_memory(self, batch_size: int) -> Memory:
        return Memory([torch.zeros(batch_size, 1)], torch.zeros(batch_size, dtype=torch.int64))

    def step(self, input_ids_BQ: Tensor, target_ids_BT: Tensor, memory: Memory) -> StepOutput:
        nll_BT = 1 / (target_ids_BT + 1) + memory.states[0] / 3
        if self.bad_target is not None:
            nll_BT = nll_BT.masked_fill(target_ids_BT == self.bad_target, float("nan"))
        return StepOutput(nll_BT, Memory([memory.states[0] + 1], memory.length_B))


def score(batch_size: int, bad_target: int | None = None) -> EvalResult | str:
    """What each process of a group runs: its share of the streams."""
    world = world_of()
    with join(world, torch.device("cpu")):
        streams = slice(batch_size * world.rank // world.size, batch_size * (world.rank + 1) // world.size)
        segments = SegmentIterator(IDS, batch_size=batch_size, tgt_len=TGT_LEN, streams=streams)
        try:
            return evaluate(Known(bad_target), segments, batch_size=segments.batch_size, world=world, synchronize=lambda: None)
        except ValidationError as error:
            return error.message


def result_of(batch_size: int) -> EvalResult:
    result = score(batch_size)
    assert isinstance(result, EvalResult)
    return result


@pytest.mark.parametrize(("processes", "batch_size"), [(2, 4), (2, 5), (3, 4)])
def test_processes_that_share_the_streams_get_the_sums_of_one(processes: int, batch_size: int) -> None:
    alone = result_of(batch_size)
    assert (alone.n_tokens, alone.n_segments) == (102, math.ceil(math.ceil(102 / batch_size) / TGT_LEN))
    for result in in_processes(processes, score, batch_size):
        assert result.nll_nats_sum == pytest.approx(alone.nll_nats_sum, rel=1e-14)
        assert (result.n_tokens, result.n_segments) == (alone.n_tokens, alone.n_segments)
        assert result.step_tokens == alone.step_tokens
        assert len(result.by_process) == processes
        assert sum(part.n_tokens for part in result.by_process) == 102


def test_a_loss_that_is_not_finite_in_one_process_ends_all() -> None:
    only_the_last = 50
    messages = in_processes(2, score, 2, only_the_last)
    assert messages[0] == messages[1]
    assert " of process 1 is not finite" in messages[0]


def test_one_process_names_the_segment_that_is_not_finite() -> None:
    message = score(1, int(IDS[9]))
    assert message == "The loss of stream 0 in segment 2 is not finite, so there is no perplexity."


class Clock:
    """Stands still until somebody moves it."""

    def __init__(self) -> None:
        self.ns = 0

    def perf_counter_ns(self) -> int:
        return self.ns

    def perf_counter(self) -> float:
        return self.ns / 1e9


def test_a_step_is_timed_until_the_device_is_done_and_nothing_else_is(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    owed = [0]

    class Slow(Known):
        def step(self, input_ids_BQ: Tensor, target_ids_BT: Tensor, memory: Memory) -> StepOutput:
            clock.ns += 5_000_000
            owed[0] = 2_000_000
            return super().step(input_ids_BQ, target_ids_BT, memory)

    def synchronize() -> None:
        clock.ns += owed[0]
        owed[0] = 0

    def between(done: int) -> None:
        clock.ns += 900_000_000

    segments = SegmentIterator(IDS[:12], batch_size=2, tgt_len=4)
    result = evaluate(Slow(), segments, batch_size=2, on_step=between, synchronize=synchronize)
    assert result.step_seconds == (0.007, 0.007)
    assert result.step_tokens == (8, 3)  # padding at the streams' ends is no work done
    assert result.seconds == pytest.approx(1.814)


def test_nothing_is_timed_unless_asked() -> None:
    result = evaluate(Known(), SegmentIterator(IDS, batch_size=2, tgt_len=4), batch_size=2, max_segments=3)
    assert (result.step_seconds, result.step_tokens, result.n_segments, result.n_tokens) == ((), (), 3, 24)
    assert result.by_process == ()


def test_alone_is_the_default() -> None:
    assert World() == world_of({})
