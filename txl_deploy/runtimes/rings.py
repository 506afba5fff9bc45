"""A step on a GPU as one CUDA graph: all of it is launched at once, as launching its parts takes longer than computing them.

The step (`model.fused`) reads and writes a ring of keys and values, whose address never changes, so it is captured once and replayed.
Each chain of memories lies in a ring of its own; a memory that came from elsewhere, or was continued before, is copied into one that
nobody looks at any more. What a step returns are views of its ring: they are valid until the step after the next one that continues
them, and a memory that was overwritten is refused.
"""

# Shape suffixes: B batch, T tgt_len, Q ext_len + tgt_len

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from txl_deploy.runtimes.window import holders
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

    def knows(self, memory: Memory) -> bool:
        """Return whether a memory is as the last step on it has returned it, so that its shapes need no check."""
        found: tuple[_Lane, int] | None = self._known.get(memory.states[0]) if memory.states else None  # type: ignore[no-untyped-call]
        return found is not None and found[0].written == found[1] and found[0].holds(memory.states)

    @torch.inference_mode()
    def run(self, input_ids_BQ: Tensor, target_ids_BT: Tensor | None, memory: Memory) -> tuple[Tensor, Memory]:
        """Return what the head yields, and the memory for the next segment."""
        lane, step = self._lane(memory), self._step
        places, given = [lane.ids_BQ, lane.ring.length_B], [input_ids_BQ, memory.length_B]
        if target_ids_BT is not None:
            places, given = [*places, lane.targets_BT], [*given, target_ids_BT]
        torch._foreach_copy_(places, given)
        if lane.graph is not None:
            lane.graph.replay()
            result = lane.result
        elif lane.written == 0 or self._pool is None:  # the first step compiles kernels, which no graph can hold
            result = self._fused(lane.ids_BQ, lane.targets_BT, lane.ring)
        else:
            result = self._capture(lane)
        assert result is not None
        lane.written += 1
        lane.start = (lane.start + step.tgt_len) % lane.ring.n_slot
        states = lane.ring.views(lane.start, step.mem_len)
        lane.newest = tuple(state.data_ptr() for state in states)
        self._known[states[0]] = (lane, lane.written)
        return result.clone(), Memory(states, lane.ring.length_B.clone())  # the graph writes there again

    def _capture(self, lane: _Lane) -> Tensor:
        lane.graph = graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            lane.result = self._fused(lane.ids_BQ, lane.targets_BT, lane.ring)
        graph.replay()
        return lane.result

    def _lane(self, memory: Memory) -> _Lane:
        """Return the ring that the memory lies in and can be continued in; or one that it has been copied into."""
        found: tuple[_Lane, int] | None = self._known.get(memory.states[0])  # type: ignore[no-untyped-call]
        if found is not None:
            lane, written = found
            if lane.written == written and lane.holds(memory.states):
                return lane
            if lane.written > written + 1:
                raise UsageError(
                    "This memory has been overwritten: it was valid until the step after the next one that continued it.",
                    remedy="Clone the tensors of a memory that is kept for longer.",
                )
        lane = self._free_lane(memory.states[0].shape[0])
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
