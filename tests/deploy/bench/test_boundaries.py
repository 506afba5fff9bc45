"""What lies within the clock: which copies a boundary makes, and that they are copies."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.deploy.conftest import TGT_LEN, Exports
from tests.fakes import FakeRuntime
from txl_deploy.bench import boundaries
from txl_deploy.bench.boundaries import BOUNDARIES, open_boundary
from txl_deploy.bench.workload import Workload
from txl_deploy.runtimes.registry import eager_from_checkpoint
from txl_train.errors import UsageError

TEXT = Workload(ids_N=np.arange(41) % 13, batch_size=2, tgt_len=4)


class Watched(FakeRuntime):
    """Keeps what it was given and what it returned."""

    def step(self, input_ids_BT, target_ids_BT, memory):
        self.given = [input_ids_BT, target_ids_BT, memory.length_B, *memory.states]
        output = super().step(input_ids_BT, target_ids_BT, memory)
        self.returned = [output.nll_BT, output.memory.length_B, *output.memory.states]
        return output


def one_step(name: str) -> tuple[list[bool], list[bool]]:
    """Return whether the runtime was given copies of ids, length and states, and whether the caller got copies of what it returned."""
    runtime = Watched()
    boundary = open_boundary(name, runtime)
    memory = boundary.cold(2)
    tokens = boundary.tokens(TEXT, TEXT.segment(0))
    outside = [*tokens, memory.length_B, *memory.states]
    output = boundary.step(*tokens, memory)
    back = [output.nll_BT, output.memory.length_B, *output.memory.states]
    assert all(torch.equal(mine, its) for mine, its in zip(back, runtime.returned))
    return [is_copy(*pair) for pair in zip(outside, runtime.given)], [is_copy(*pair) for pair in zip(back, runtime.returned)]


def is_copy(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.data_ptr() != other.data_ptr()


@pytest.mark.parametrize(
    ("name", "given", "returned"),
    [
        ("step_device_resident", [False, False, False, False], [False, False, False]),
        ("step_with_token_h2d", [True, True, False, False], [False, False, False]),
        ("step_with_state_roundtrip", [True, True, True, True], [True, True, True]),
    ],
)
def test_a_boundary_copies_what_its_name_says_even_on_a_cpu(name, given, returned):
    assert one_step(name) == (given, returned)


def test_the_ids_that_a_runtime_is_given_are_those_of_the_segment():
    for name in BOUNDARIES:
        runtime = Watched()
        boundary = open_boundary(name, runtime)
        segment = TEXT.segment(3)
        boundary.step(*boundary.tokens(TEXT, segment), boundary.cold(2))
        assert np.array_equal(runtime.given[0].numpy(), segment.input_ids_BT)
        assert np.array_equal(runtime.given[1].numpy(), segment.target_ids_BT)


@pytest.mark.parametrize("name", BOUNDARIES)
def test_a_memory_filled_in_long_segments_is_that_of_single_steps(exports: Exports, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(boundaries, "FILL_LEN", 3)
    runtime, _ = eager_from_checkpoint(exports.checkpoint, tgt_len=1)
    text = Workload(ids_N=np.arange(301) * 7 % runtime.info.config.vocab_size, batch_size=2, tgt_len=1)
    mem_len = runtime.info.mem_len
    filled, steps = open_boundary(name, runtime).fill(text, 2 * mem_len)
    assert steps == mem_len - mem_len % 3 > 3, "what is left is for single steps"
    memory = runtime.initial_memory(2)
    for step in range(steps):
        memory = runtime.step(*text.tensors(text.segment(step), "cpu"), memory).memory
    assert filled is not None
    assert filled.length_B.tolist() == memory.length_B.tolist()
    for state, expected in zip(filled.states, memory.states):
        torch.testing.assert_close(state, expected, rtol=1e-4, atol=1e-5)


def test_a_memory_is_filled_step_by_step_where_it_has_to_be() -> None:
    text = Workload(ids_N=np.arange(301) % 13, batch_size=2, tgt_len=1)

    class AnyLength(FakeRuntime):
        def of_length(self, tgt_len: int) -> FakeRuntime:
            return FakeRuntime(tgt_len=tgt_len)

    runtime = AnyLength(tgt_len=1, mem_len=130)
    assert open_boundary("step_device_resident", runtime).fill(text, 130)[1] == 128
    assert open_boundary("step_device_resident", FakeRuntime(tgt_len=1, mem_len=130)).fill(text, 130) == (None, 0), "of one length only"
    assert open_boundary("step_device_resident", runtime).fill(text, 63) == (None, 0), "less than a long segment"
    assert open_boundary("step_device_resident", runtime).fill(text, 151) == (None, 0), "the text begins anew before"
    extended = Workload(ids_N=np.arange(301) % 13, batch_size=2, tgt_len=1, ext_len=1)
    assert open_boundary("step_device_resident", runtime).fill(extended, 130) == (None, 0), "inputs overlap"


def test_a_memory_on_the_host_is_carried_on_and_begins_cold_again():
    runtime = Watched()
    boundary = open_boundary("step_with_state_roundtrip", runtime)
    memory: Any = boundary.cold(2)
    for step in range(3):
        memory = boundary.step(*boundary.tokens(TEXT, TEXT.segment(step)), memory).memory
    memory = boundary.cold(2)
    boundary.step(*boundary.tokens(TEXT, TEXT.segment(0)), memory)
    assert runtime.lengths == [[0, 0], [4, 4], [8, 8], [0, 0]]


def test_every_boundary_is_described_and_an_unknown_one_refused():
    assert set(BOUNDARIES) == {"step_device_resident", "step_with_token_h2d", "step_with_state_roundtrip"}
    assert len(set(BOUNDARIES.values())) == 3
    with pytest.raises(UsageError, match="Did you mean `step_with_token_h2d`"):
        open_boundary("step_with_tokens", FakeRuntime())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("name", BOUNDARIES)
def test_on_a_gpu_the_host_keeps_its_side_in_pinned_memory_and_the_nll_is_the_same(exports: Exports, name: str) -> None:
    text = Workload(ids_N=np.arange(12 * TGT_LEN + 1) % 13, batch_size=2, tgt_len=TGT_LEN)
    nll = {}
    for boundary_name in ("step_device_resident", name):
        runtime, _ = eager_from_checkpoint(exports.checkpoint, device="cuda", tgt_len=TGT_LEN)
        boundary = open_boundary(boundary_name, runtime)
        memory: Any = boundary.cold(2)
        sums = []
        for step in range(text.steps_per_pass):
            tokens = boundary.tokens(text, text.segment(step))
            nll_BT, memory = boundary.step(*tokens, memory)
            runtime.synchronize()
            sums.append(float(nll_BT.sum()))
            assert all(token.is_cuda == (boundary_name == "step_device_resident") for token in tokens)
            assert all(token.is_cuda or token.is_pinned() for token in tokens)
            assert all(state.is_cuda != (boundary_name == "step_with_state_roundtrip") for state in memory.states)
            assert all(state.is_cuda or state.is_pinned() for state in memory.states)
        nll[boundary_name] = sums
    assert nll[name] == nll["step_device_resident"]
