"""Memories in rings: each goes on where it was, whichever way they take turns; what was overwritten is refused. No CUDA graphs here."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import Tensor

from tests.support import build_model, small_config
from txl_deploy.runtimes.eager import EagerRuntime
from txl_train.errors import UsageError
from txl_train.model.adaptive import cluster_rows
from txl_train.model.inference import InferenceStep
from txl_train.model.memory import Memory

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton"),
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning"),
]

CONFIG = small_config(cutoffs=(5, 9, 16))
T = 5


class Twins:
    """The same step, plain and in rings, on memories that must stay alike."""

    def __init__(self) -> None:
        from txl_deploy.runtimes.rings import Rings

        self.plain = InferenceStep(build_model(CONFIG).eval(), T).eval()
        self.rings = Rings(self.plain, torch.device("cpu"))
        self.generator = torch.Generator().manual_seed(1)

    def cold(self, streams: int = 2) -> tuple[Memory, Memory]:
        return self.plain.initial_memory(streams), self.plain.initial_memory(streams)

    def step(self, pair: tuple[Memory, Memory]) -> tuple[Memory, Memory]:
        """Run one segment on both, compare the nll, and return both new memories."""
        memory, own = pair
        B = len(memory.length_B)
        inputs, targets = (torch.randint(0, CONFIG.vocab_size, (B, T), generator=self.generator) for _ in range(2))
        rows = cluster_rows(targets.reshape(-1), list(CONFIG.cluster_ends))
        with torch.inference_mode():
            expected, length_B, states = self.plain(inputs, targets, rows, memory.length_B, memory.states)
        found, own = self.rings.run(inputs, targets, own, self.rings.lane_of(own))
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)
        return Memory(states, length_B), own


def lanes(twins: Twins) -> list[int]:
    """Steps that each ring has seen."""
    return sorted(lane.written for lane in twins.rings._lanes)


def test_one_chain_of_memories_stays_in_one_ring() -> None:
    twins = Twins()
    pair = twins.cold()
    for _ in range(8):
        pair = twins.step(pair)
    assert lanes(twins) == [8]


def test_memories_that_take_turns_have_rings_of_their_own() -> None:
    twins = Twins()
    pairs = [twins.cold(), twins.cold(), twins.cold(3)]
    for n in (0, 1, 0, 0, 2, 1, 2, 0, 1, 1):
        pairs[n] = twins.step(pairs[n])
    assert lanes(twins) == [2, 4, 4]


def test_a_memory_can_be_continued_once_more() -> None:
    twins = Twins()
    first = twins.step(twins.cold())
    ahead = twins.step(first)
    again = twins.step(first)  # still valid: one step has continued it
    ahead, again = twins.step(ahead), twins.step(again)
    assert lanes(twins) == [2, 3]


def test_a_memory_that_was_overwritten_is_refused() -> None:
    twins = Twins()
    first = twins.step(twins.cold())
    twins.step(twins.step(first))
    with pytest.raises(UsageError, match="has been overwritten"):
        twins.step(first)


def test_copies_and_rows_of_a_memory_go_on_and_forgotten_rings_serve_again() -> None:
    twins = Twins()
    pair = twins.step(twins.step(twins.cold()))

    def taken(states: list[Tensor]) -> list[Tensor]:
        return [state[[1, 0]] for state in states]

    for _ in range(4):
        pair = (
            Memory(taken(pair[0].states), pair[0].length_B[[1, 0]]),
            Memory(taken(pair[1].states), pair[1].length_B[[1, 0]]),
        )
        pair = twins.step(pair)
    assert len(twins.rings._lanes) <= 2


def test_a_stream_can_be_begun_anew_by_its_length_alone() -> None:
    twins = Twins()
    plain, own = twins.step(twins.step(twins.cold()))
    length_B = torch.tensor([0, int(plain.length_B[1])])
    twins.step((plain._replace(length_B=length_B), own._replace(length_B=length_B)))
    assert lanes(twins) == [3]


def test_a_state_in_the_place_of_another_is_seen() -> None:
    twins = Twins()
    plain, own = twins.step(twins.step(twins.cold()))
    plain, own = (memory._replace(states=[memory.states[0], *reversed(memory.states[1:])]) for memory in (plain, own))
    assert twins.rings.lane_of(own) is None
    twins.step((plain, own))


def test_without_a_gpu_the_runtime_does_without() -> None:
    runtime = EagerRuntime(build_model(CONFIG).eval(), tgt_len=T)
    assert runtime.info.provider == "eager"
