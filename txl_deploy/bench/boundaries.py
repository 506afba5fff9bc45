"""Timing boundaries: where a step's tokens and memory are when the clock starts, and where its results are when it stops.

Each boundary is a small strategy that the harness asks, before the clock, to put everything in its place and then, within the clock, to
run one step. Knows tensors and runtimes by their protocol; reading the clock and waiting for the device are the harness's business.

Host memory is pinned where there is a GPU, as fast transfers need it. On a CPU the copies are made all the same, from memory to memory.
"""

# Shape suffixes: B batch, T tgt_len, Q ext_len + tgt_len

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from txl_train.errors import UsageError, nearest

if TYPE_CHECKING:
    from torch import Tensor

    from txl_deploy.bench.workload import Workload
    from txl_deploy.runtimes.base import Runtime
    from txl_train.data.segments import Segment
    from txl_train.evaluate import StepOutput
    from txl_train.model.memory import Memory


FILL_LEN = 64
"""Tokens of the segments that fill a memory before anything is timed: one token a step would take a thousand steps to fill a long one."""


class Boundary:
    """Tokens, targets and memory lie on the device when the clock starts, the results when it stops. Others move more within the clock.

    Made for one runtime's way through a text: it may keep buffers from step to step.
    """

    name: ClassVar[str] = "step_device_resident"
    description: ClassVar[str] = "one step with tokens, targets and memory already on the device, until the device has finished"

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.device = runtime.info.device

    def tokens(self, workload: Workload, segment: Segment) -> tuple[Tensor, Tensor]:
        """Return input ids [B, Q] and target ids [B, T] where they are to be when the clock starts."""
        return workload.tensors(segment, self.device)

    def cold(self, batch_size: int) -> Memory:
        """Return the memory of a cold start where it is to be when the clock starts."""
        return self.place(self.runtime.initial_memory(batch_size))

    def place(self, memory: Memory) -> Memory:
        """Return a runtime's memory where it is to be when the clock starts."""
        return memory

    def fill(self, workload: Workload, count: int) -> tuple[Memory | None, int]:
        """Read up to `count` steps of the text from a cold start, in segments of `FILL_LEN` tokens; never timed.

        Returns the memory and the number of steps that were read: none where the runtime cannot be had for longer segments
        (`of_length`), where segments are long already, or where the text would begin anew; and no more than a memory holds, since the
        tokens of a long segment that meet a full memory would see more of the past than single steps do.
        """
        longer = getattr(self.runtime, "of_length", None)
        steps_at_once = FILL_LEN // workload.tgt_len
        if longer is None or steps_at_once < 2 or workload.ext_len or not steps_at_once <= count <= workload.steps_per_pass:
            return None, 0
        segments = min(count, self.runtime.info.mem_len // workload.tgt_len) // steps_at_once
        runtime: Runtime = longer(steps_at_once * workload.tgt_len)
        memory = runtime.initial_memory(workload.n_streams)
        for i in range(segments):
            steps = range(i * steps_at_once, (i + 1) * steps_at_once)
            memory = runtime.step(*workload.joined([workload.segment(step) for step in steps], self.device), memory).memory
        return self.place(memory), segments * steps_at_once

    def step(self, input_ids_BQ: Tensor, target_ids_BT: Tensor, memory: Memory) -> StepOutput:
        """Do what is timed; the device may still be at work on it when this returns. What was returned before may be overwritten."""
        return self.runtime.step(input_ids_BQ, target_ids_BT, memory)


class WithTokens(Boundary):
    """The tokens come from the host."""

    name = "step_with_token_h2d"
    description = "one step with tokens and targets in host memory, their copy to the device included; the memory stays on the device"

    def tokens(self, workload: Workload, segment: Segment) -> tuple[Tensor, Tensor]:
        """Return the ids in host memory."""
        input_ids_BQ, target_ids_BT = workload.tensors(segment, "cpu")
        if _is_gpu(self.device):
            return input_ids_BQ.pin_memory(), target_ids_BT.pin_memory()
        return input_ids_BQ, target_ids_BT

    def step(self, input_ids_BQ: Tensor, target_ids_BT: Tensor, memory: Memory) -> StepOutput:
        """Copy the ids to the device, and run the step."""
        return self.runtime.step(self._to_device(input_ids_BQ), self._to_device(target_ids_BT), memory)

    def _to_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True, copy=True)


class WithState(WithTokens):
    """Nothing stays on the device: the caller keeps the memory, as a server of many users does."""

    name = "step_with_state_roundtrip"
    description = "one step with tokens, targets and memory in host memory, until the new memory and the nll are there again"

    def __init__(self, runtime: Runtime) -> None:
        super().__init__(runtime)
        self._kept: Memory | None = None
        self._nll_BT: Tensor | None = None

    def place(self, memory: Memory) -> Memory:
        """Return the memory in host memory."""
        self._kept = memory._replace(states=[self._on_host(state) for state in memory.states], length_B=self._on_host(memory.length_B))
        return self._kept

    def step(self, input_ids_BQ: Tensor, target_ids_BT: Tensor, memory: Memory) -> StepOutput:
        """Copy everything to the device, run the step, and copy its results back; they lie where those of the step before did."""
        on_device = memory._replace(states=[self._to_device(state) for state in memory.states], length_B=self._to_device(memory.length_B))
        output = self.runtime.step(self._to_device(input_ids_BQ), self._to_device(target_ids_BT), on_device)
        kept = self._kept
        assert kept is not None, "a lane begins cold"
        for place, state in zip(kept.states, output.memory.states):
            place.copy_(state, non_blocking=True)
        kept.length_B.copy_(output.memory.length_B, non_blocking=True)
        if self._nll_BT is None or self._nll_BT.shape != output.nll_BT.shape:
            self._nll_BT = self._on_host(output.nll_BT)
        else:
            self._nll_BT.copy_(output.nll_BT, non_blocking=True)
        return output._replace(nll_BT=self._nll_BT, memory=kept)

    def _on_host(self, tensor: Tensor) -> Tensor:
        """Return a copy in host memory of its own."""
        copy = tensor.detach().to("cpu", copy=True)
        return copy.pin_memory() if _is_gpu(self.device) else copy


_ALL: tuple[type[Boundary], ...] = (Boundary, WithTokens, WithState)

BOUNDARIES: dict[str, str] = {boundary.name: boundary.description for boundary in _ALL}
"""Name of each timing boundary, and what lies between its two readings of the clock. Rows of different boundaries are not compared."""


def check_boundary(name: str) -> None:
    """Raise UsageError if there is no timing boundary of that name."""
    if name not in BOUNDARIES:
        raise UsageError(f"`{name}` is no timing boundary.{nearest(name, BOUNDARIES)}", remedy=f"There is {', '.join(BOUNDARIES)}.")


def open_boundary(name: str, runtime: Runtime) -> Boundary:
    """Return the boundary of that name around a runtime. Raises UsageError if there is none."""
    check_boundary(name)
    return next(boundary for boundary in _ALL if boundary.name == name)(runtime)


def _is_gpu(device: str) -> bool:
    return device.startswith("cuda")
