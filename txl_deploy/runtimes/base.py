"""What every runtime promises, and what it says of itself. Evaluation, parity and benchmarks know nothing else of it."""

# Shape suffixes: B batch, T tgt_len, Q ext_len + tgt_len

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from txl_train.config import MemoryKind, ModelConfig
from txl_train.errors import UsageError
from txl_train.evaluate import Stepper
from txl_train.model.memory import Memory, state_count, state_shape


class ShapeRangeError(UsageError):
    """A runtime was given tensors of a shape that it was not made for."""


@dataclass(frozen=True, kw_only=True)
class RuntimeInfo:
    """What runs: the provider as the runtime itself reports it, the rest as the artifact's manifest says."""

    name: str
    """pytorch, torchscript or onnx."""
    provider: str
    """What computes within it, such as `eager` or `CPUExecutionProvider`."""
    device: str
    """`cpu` or `cuda:0`."""
    dtype: str
    """Type of weights and matrix products: fp32."""
    memory: MemoryKind
    """What its memory holds."""
    tgt_len: int
    """Tokens per stream and step."""
    config: ModelConfig
    """The model with the lengths in force."""
    origin: str = ""
    """The checkpoint or artifact it was opened from."""
    manifest_sha256: str | None = None
    """Checksum of the artifact's manifest; None for a checkpoint."""
    checkpoint_sha256: str | None = None
    """Checksum of the checkpoint that the weights come from."""

    @property
    def mem_len(self) -> int:
        """Past positions kept per layer, in tokens."""
        return self.config.mem_len


class Runtime(Stepper, Protocol):
    """Runs one segment on its device.

    Any number of memories may take turns. What `step` returns stays valid until the step after the next one that continues it: clone
    what is kept for longer.
    """

    @property
    def info(self) -> RuntimeInfo:
        """What this is."""
        ...

    def synchronize(self) -> None:
        """Wait until all work that `step` has started is done."""
        ...


def check_shapes(info: RuntimeInfo, input_ids_BQ: Tensor, target_ids_BT: Tensor, memory: Memory) -> None:
    """Refuse tensors that the runtime was not made for, before they reach native code.

    Raises:
        ShapeRangeError: naming the tensor, both shapes and the command that makes a runtime for it.
    """
    B = input_ids_BQ.shape[0] if input_ids_BQ.dim() else 0
    ext_len = info.config.ext_len
    for name, tensor, before in (("input_ids", input_ids_BQ, ext_len), ("target_ids", target_ids_BT, 0)):
        expected = info.tgt_len + before
        if tuple(tensor.shape) != (B, expected) or B < 1:
            length = tensor.shape[-1] - before if tensor.dim() else 1
            context = f" after the {ext_len} before them" if before else ""
            raise ShapeRangeError(
                f"`{name}` of this {info.name} runtime must have shape [batch_size, {expected}], but has {list(tensor.shape)} instead.",
                remedy=f"Give segments of {info.tgt_len} tokens{context}, or export again with `--tgt-len {max(length, 1)}`.",
            )
    if memory.length_B.shape[0] != B:
        raise ShapeRangeError(f"The memory is of {memory.length_B.shape[0]} streams, but the tokens are of {B}.")
    expected_state, expected_count = state_shape(info.config, info.memory, B), state_count(info.config, info.memory)
    if len(memory.states) != expected_count or any(state.shape != expected_state for state in memory.states):
        found = list(memory.states[0].shape) if memory.states else []
        raise ShapeRangeError(
            f"The memory of this {info.name} runtime must be {expected_count} tensors of shape {list(expected_state)}, "
            f"but is {len(memory.states)} of shape {found} instead.",
            remedy="Begin with the runtime's own `initial_memory`.",
        )
