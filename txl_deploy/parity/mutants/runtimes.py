"""Runtimes made wrong: what wraps a faithful one and hands it another memory, keeps its states in the wrong place, or has another label.

Each has a switch, with which it passes everything on as it is: so what is judged with it off is the same way through.
"""

# Shape suffixes: B batch, T tgt_len, Q ext_len + tgt_len

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from txl_deploy.runtimes.base import Runtime, RuntimeInfo, ScoresOutput
from txl_train.evaluate import StepOutput
from txl_train.model.memory import Memory


class Wrapped:
    """A runtime within another, which looks like it. A subclass changes the memory on its way in or out."""

    def __init__(self, inner: Runtime, *, on: bool = True) -> None:
        self.inner = inner
        self.on = on

    @property
    def info(self) -> RuntimeInfo:
        """What the runtime within says of itself."""
        return self.inner.info

    def initial_memory(self, batch_size: int) -> Memory:
        """Return the memory of `batch_size` streams at a cold start."""
        return self.inner.initial_memory(batch_size)

    def step(self, input_ids_BQ: Tensor, target_ids_BT: Tensor, memory: Memory) -> StepOutput:
        """Score one segment."""
        nll_BT, after = self.inner.step(input_ids_BQ, target_ids_BT, self.given(memory) if self.on else memory)
        return StepOutput(nll_BT, self.returned(after, memory) if self.on else after)

    def next_token(self, input_ids_BQ: Tensor, memory: Memory) -> ScoresOutput:
        """Score every word as the next one."""
        scores_BV, after = self.inner.next_token(input_ids_BQ, self.given(memory) if self.on else memory)
        return ScoresOutput(scores_BV, self.returned(after, memory) if self.on else after)

    def synchronize(self) -> None:
        """Wait for the device."""
        self.inner.synchronize()

    def given(self, memory: Memory) -> Memory:
        """Return what the runtime within is given for `memory`."""
        return memory

    def returned(self, after: Memory, before: Memory) -> Memory:
        """Return what is handed out for `after`, the memory that the runtime within made of `before`."""
        return after


class ZerosSeen(Wrapped):
    """Starts with a memory of zeros that is attended to, instead of one that holds nothing."""

    def given(self, memory: Memory) -> Memory:
        """Fill what lies beyond the valid length with zeros, and call all of it valid."""
        config = self.info.config
        length_B = (memory.length_B - config.ext_len).clamp(min=0)
        empty_BM = torch.arange(config.mem_len, device=length_B.device)[None, :] < config.mem_len - length_B[:, None]
        axes = (lambda state: (slice(None), None, slice(None), None)) if self.info.memory == "kv" else (lambda state: (..., None))
        states = [state.masked_fill(empty_BM[axes(state)], 0.0) for state in memory.states]
        return Memory(states, torch.full_like(memory.length_B, config.mem_len + config.ext_len))

    def returned(self, after: Memory, before: Memory) -> Memory:
        """Count on from the true length, as whoever keeps no length at all would be believed to."""
        config = self.info.config
        length_B = (before.length_B + self.info.tgt_len).clamp(max=config.mem_len + config.ext_len)
        return Memory(after.states, length_B)


class OneSegmentLate(Wrapped):
    """Feeds back the states that the segment before the last one left behind."""

    def __init__(self, inner: Runtime, *, on: bool = True) -> None:
        super().__init__(inner, on=on)
        self._before = WeakTensorKeyDictionary()

    def given(self, memory: Memory) -> Memory:
        """Return the states that `memory` was made from."""
        states: list[Tensor] | None = self._before.get(memory.states[0])  # type: ignore[no-untyped-call]
        return memory if states is None else Memory(states, memory.length_B)

    def returned(self, after: Memory, before: Memory) -> Memory:
        """Remember where `after` comes from."""
        states = [state.clone() for state in after.states]
        self._before[states[0]] = [state.clone() for state in before.states]
        return Memory(states, after.length_B)


class OneBufferForAll(Wrapped):
    """Writes the states of every step to the same place, whoever still needs what lies there."""

    def __init__(self, inner: Runtime, *, on: bool = True) -> None:
        super().__init__(inner, on=on)
        self._buffers: list[Tensor] = []

    def returned(self, after: Memory, before: Memory) -> Memory:
        """Copy `after` over what was handed out before."""
        if not self._buffers or self._buffers[0].shape != after.states[0].shape:
            self._buffers = [torch.empty_like(state) for state in after.states]
        for buffer, state in zip(self._buffers, after.states):
            buffer.copy_(state)
        return Memory(list(self._buffers), after.length_B)


class Labelled(Wrapped):
    """Says something else of itself than it is."""

    def __init__(self, inner: Runtime, *, on: bool = True, **claims: str) -> None:
        super().__init__(inner, on=on)
        self._info = dataclasses.replace(inner.info, **claims) if on else inner.info  # type: ignore[arg-type]

    @property
    def info(self) -> RuntimeInfo:
        """What it says."""
        return self._info
