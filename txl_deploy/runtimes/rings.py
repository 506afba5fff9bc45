"""A step on a GPU as one CUDA graph: all of it is launched at once, as launching its parts takes longer than computing them.

The step (`model.fused`) reads and writes a ring of keys and values, whose address never changes, so it is captured once and replayed.
Each chain of memories lies in a ring of its own; a memory that came from elsewhere, or was continued before, is copied into one that
nobody looks at any more. What a step returns are views of its ring: they are valid until the step after the next one that continues
them, and a memory that was overwritten is refused (as a whole: slices of it are taken for what they hold).
"""

# Shape suffixes: B batch, T tgt_len, Q ext_len + tgt_len

from __future__ import annotations

import contextlib

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from txl_deploy.runtimes.window import holders
from txl_train.cuda_graphs import capture
from txl_train.errors import UsageError
from txl_train.model.fused import FusedStep, Ring
from txl_train.model.inference import FixedStep
from txl_train.model.memory import Memory

MOST_RINGS = 8
"""Rings that are kept for the next memory that comes from elsewhere; further ones live as long as their memories."""


class _Lane:
    """A ring, how far it is, and the graph that moves it on."""

    def __init__(self, step: FixedStep, batch_size: int, device: torch.device) -> None:
        self.ring = Ring.empty(step, batch_size, device)
        self.ids_BQ = torch.zeros(batch_size, step.ext_len + step.tgt_len, dtype=torch.int64, device=device)
        self.targets_BT = torch.zeros(batch_size, step.tgt_len, dtype=torch.int64, device=device)
        self.start = 0
        self.written = 0
        """Steps that have written here."""
        self.newest: tuple[int, ...] = ()
        """Addresses of the states that the last of them returned."""
        self.graph: torch.cuda.CUDAGraph | None = None
        self.result: Tensor | None = None
        """Where the graph leaves its result."""

    @property
    def is_free(self) -> bool:
        """Whether nobody else has a memory that lies here."""
        return holders(self.ring.states) == 1

    def holds(self, states: list[Tensor]) -> bool:
        """Return whether these are the states that the last step returned, and nothing else of the same shape."""
        strides = self.ring.states.stride()[1:]
        return tuple(state.data_ptr() for state in states) == self.newest and all(state.stride() == strides for state in states)


class Rings:
    """Runs a step on memories, each in its ring."""

    def __init__(self, step: FixedStep, device: torch.device) -> None:
        self._step, self._device = step, device
        self._fused = FusedStep(step)
        self._lanes: list[_Lane] = []
        self._known = WeakTensorKeyDictionary()
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def lane_of(self, memory: Memory) -> _Lane | None:
        """Return the ring that a memory lies in and can be continued in, if it is as the last step on it has returned it; else None.

        Raises:
            UsageError: it lies in a ring and was overwritten.
        """
        found: tuple[_Lane, int] | None = self._known.get(memory.states[0]) if memory.states else None  # type: ignore[no-untyped-call]
        if found is None:
            return None
        lane, written = found
        if lane.written > written + 1:
            raise UsageError(
                "This memory has been overwritten: it was valid until the step after the next one that continued it.",
                remedy="Clone the tensors of a memory that is kept for longer.",
            )
        return lane if lane.written == written and lane.holds(memory.states) else None

    @torch.inference_mode()
    def run(self, input_ids_BQ: Tensor, target_ids_BT: Tensor | None, memory: Memory, lane: _Lane | None = None) -> tuple[Tensor, Memory]:
        """Return what the head yields, and the memory for the next segment; `lane` is what `lane_of` says of this memory."""
        with torch.cuda.device(self._device) if self._device.type == "cuda" else contextlib.nullcontext():
            return self._run(input_ids_BQ, target_ids_BT, memory, lane or self._loaded(memory))

    def _run(self, input_ids_BQ: Tensor, target_ids_BT: Tensor | None, memory: Memory, lane: _Lane) -> tuple[Tensor, Memory]:
        step = self._step
        places, given = [lane.ids_BQ, lane.ring.length_B], [input_ids_BQ, memory.length_B]
        if target_ids_BT is not None:
            places, given = [*places, lane.targets_BT], [*given, target_ids_BT]
        torch._foreach_copy_(places, given)
        if lane.graph is None and lane.written > 0 and self._stream is not None:  # the first step compiles kernels, which no graph can hold
            self._capture(lane)
        if lane.graph is not None:
            lane.graph.replay()
            result = lane.result
        else:
            result = self._fused(lane.ids_BQ, lane.targets_BT, lane.ring)
        assert result is not None
        lane.written += 1
        lane.start = (lane.start + step.tgt_len) % lane.ring.n_slot
        states = lane.ring.views(lane.start, step.mem_len)
        lane.newest = tuple(state.data_ptr() for state in states)
        self._known[states[0]] = (lane, lane.written)
        return result.clone(), Memory(states, lane.ring.length_B.clone())  # the graph writes there again

    def _capture(self, lane: _Lane) -> None:
        """Make the graph of a ring, without running it."""
        lane.graph, lane.result = capture(
            lambda: self._fused(lane.ids_BQ, lane.targets_BT, lane.ring), pool=self._pool, stream=self._stream
        )

    def _loaded(self, memory: Memory) -> _Lane:
        """Return a ring that a memory has been copied into."""
        batch_size = memory.states[0].shape[0]
        try:
            lane = self._free_lane(batch_size)
        except torch.OutOfMemoryError:
            self._lanes = [lane for lane in self._lanes if not lane.is_free]
            torch.cuda.empty_cache()
            lane = self._free_lane(batch_size)
        lane.newest, lane.start = (), 0
        lane.ring.load(memory.states, memory.length_B)
        return lane

    def _free_lane(self, batch_size: int) -> _Lane:
        for lane in self._lanes:
            if lane.ids_BQ.shape[0] == batch_size and lane.is_free:
                self._lanes.remove(lane)
                self._lanes.append(lane)
                return lane
        lane = _Lane(self._step, batch_size, self._device)
        self._lanes = [*self._lanes[-(MOST_RINGS - 1) :], lane]
        return lane
