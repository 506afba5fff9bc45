"""What every runtime promises, and what it says of itself. Evaluation, parity and benchmarks know nothing else of it."""

# Shape suffixes: B batch, T tgt_len, Q ext_len + tgt_len, V vocabulary

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from txl_train.config import HeadKind, MemoryKind, ModelConfig
from txl_train.errors import UsageError
from txl_train.evaluate import Stepper
from txl_train.model.memory import Memory, state_count, state_shape

TORCH_TYPES = {"fp32": torch.float32, "fp16": torch.float16}
"""PyTorch's type for what `--dtype` calls so."""


class ShapeRangeError(UsageError):
    """A runtime was given tensors of a shape, a type or a device that it was not made for."""


class HeadError(UsageError):
    """A runtime was asked for what its head does not compute."""


@dataclass(frozen=True, kw_only=True)
class RuntimeInfo:
    """What runs: what the runtime itself reports of it, the rest as the artifact's manifest says."""

    name: str
    """One of `registry.RUNTIME_NAMES`."""
    provider: str
    """What computes within it, such as `eager` or `CPUExecutionProvider`, as read back."""
    device: str
    """`cpu` or `cuda:0`."""
    dtype: str
    """Type of weights and matrix products as stored: fp32 or fp16, or int8 of linear layers beside fp32."""
    compute: str = ""
    """Type that products are really computed in, as far as the runtime tells: ONNX Runtime computes fp16 in fp32 on a CPU. `unknown` is
    what it does not tell."""
    memory: MemoryKind
    """What its memory holds."""
    memory_dtype: str = "fp32"
    """Type of the states: fp32 or fp16."""
    head: HeadKind = "nll"
    """What a step yields: `nll` for `step`, `logits` or `log_probs` for `next_token`."""
    served: bool = False
    """Whether the graph has the form for servers (`signature.step_signature`); it computes the same."""
    tgt_len: int
    """Tokens per stream and step."""
    max_batch: int | None = None
    """Streams at most; None means any number."""
    min_batch: int = 1
    """Streams at least."""
    config: ModelConfig
    """The model with the lengths in force."""
    origin: str = ""
    """The checkpoint or artifact it was opened from."""
    manifest_sha256: str | None = None
    """Checksum of the artifact's manifest; None for a checkpoint."""
    checkpoint_sha256: str | None = None
    """Checksum of the checkpoint that the weights come from."""
    waits: bool = False
    """Whether `step` itself waits for the device, so that `synchronize` has nothing left to wait for."""
    readback: Mapping[str, Any] = field(default_factory=dict)
    """What the runtime was found to do, as plain values: nodes per provider, layers per precision."""

    @property
    def returns_early(self) -> bool:
        """Whether `step` may return before the device has done it: then the time to enqueue it is another than that of the step."""
        return self.device.startswith("cuda") and not self.waits

    @property
    def mixes_streams(self) -> bool:
        """Whether streams of a batch take part in each other's rounding: int8 graphs have one scale for all inputs of a layer."""
        return self.dtype == "int8" and self.name == "onnx"

    @property
    def mem_len(self) -> int:
        """Past positions kept per layer, in tokens."""
        return self.config.mem_len


class ScoresOutput(NamedTuple):
    """What a step of generation yields: float32 scores [B, V] of every word as the next one, and the memory for the next step."""

    scores_BV: Tensor
    memory: Memory


class Runtime(Stepper, Protocol):
    """Runs one segment on its device.

    Any number of memories may take turns. What `step` returns stays valid until the step after the next one that continues it: clone
    what is kept for longer.
    """

    @property
    def info(self) -> RuntimeInfo:
        """What this is."""
        ...

    def next_token(self, input_ids_BQ: Tensor, memory: Memory) -> ScoresOutput:
        """Run one segment and score every word as the next one. Raises `HeadError` for a runtime whose head is `nll`, as `step` does
        for the other ones."""
        ...

    def synchronize(self) -> None:
        """Wait until all work that `step` has started is done."""
        ...


def torch_compute(dtype: str, device: str) -> str:
    """Return the type that PyTorch computes products of `dtype` in: `tf32` where it rounds the factors of fp32 on a GPU.

    As set now, for the whole process: `torch.set_float32_matmul_precision`, `allow_tf32` and `fp32_precision` are one setting.
    """
    if dtype != "fp32" or torch.device(device).type != "cuda":
        return dtype
    matmul = torch.backends.cuda.matmul
    # up to PyTorch 2.8 there is only the older name, and from 2.9 on that may not be read once the newer one was set
    rounds = matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32
    return "tf32" if rounds else dtype


def check_shapes(info: RuntimeInfo, tokens: Mapping[str, Tensor], memory: Memory, *, states_too: bool = True) -> None:
    """Refuse tensors of a shape, a type or a device that the runtime was not made for, before they reach native code.

    Args:
        tokens: `input_ids` [B, ext_len + T] and, where the head scores them, `target_ids` [B, T].
        states_too: look at the memory's states; not needed if the runtime knows them for its own.

    Raises:
        ShapeRangeError: naming the tensor, what it is and what it must be, and for lengths the command that makes a runtime for it.
    """
    input_ids_BQ = tokens["input_ids"]
    B = input_ids_BQ.shape[0] if input_ids_BQ.dim() else 0
    ext_len = info.config.ext_len
    for name, tensor in tokens.items():
        before = ext_len if name == "input_ids" else 0
        expected_len = info.tgt_len + before
        if tuple(tensor.shape) != (B, expected_len) or B < 1:
            length = tensor.shape[-1] - before if tensor.dim() else 1
            context = f" after the {ext_len} before them" if before else ""
            raise ShapeRangeError(
                f"`{name}` of this {info.name} runtime must have shape [batch_size, {expected_len}], but has {list(tensor.shape)} instead.",
                remedy=f"Give segments of {info.tgt_len} tokens{context}, or export again with `--tgt-len {max(length, 1)}`.",
            )
    if info.min_batch > B or (info.max_batch is not None and info.max_batch < B):
        allowed = str(info.min_batch) if info.min_batch == info.max_batch else f"within {info.min_batch}..{info.max_batch}"
        raise ShapeRangeError(
            f"`batch_size` must be {allowed} for this {info.name} runtime, but is {B} instead.",
            remedy="Choose another `--batch-size`, or export again with one that fits (of an engine, `--batch-range`).",
        )
    if memory.length_B.dim() != 1 or memory.length_B.shape[0] != B:
        streams = memory.length_B.shape[0] if memory.length_B.dim() else 0
        raise ShapeRangeError(f"The memory is of {streams} streams, but the tokens are of {B}.")
    device = _device(info.device)
    for name, tensor in (*tokens.items(), ("length", memory.length_B)):
        if tensor.dtype is not torch.int64 or (tensor.device != device and _is_elsewhere(tensor, device)):
            raise ShapeRangeError(
                f"`{name}` of this {info.name} runtime must be int64 on {device}, but is {_kind(tensor)} instead.",
                remedy=f'Convert it with `.to("{device}", torch.int64)`.',
            )
    if not states_too and memory.states[0].shape[0] == B:
        return
    expected, count = torch.Size(state_shape(info.config, info.memory, B)), state_count(info.config, info.memory)
    wanted = TORCH_TYPES[info.memory_dtype]
    shapes = [state.shape for state in memory.states]
    if shapes != [expected] * count:
        found = next((list(shape) for shape in shapes if shape != expected), list(expected))
        raise ShapeRangeError(
            f"The memory of this {info.name} runtime must be {count} tensors of shape {list(expected)}, "
            f"but is {len(shapes)} of shape {found} instead.",
            remedy="Begin with the runtime's own `initial_memory`.",
        )
    kinds = {(state.dtype, state.device) for state in memory.states}
    if kinds == {(wanted, device)}:
        return
    for state in memory.states:
        if state.dtype is not wanted or (state.device != device and _is_elsewhere(state, device)):
            raise ShapeRangeError(
                f"The memory of this {info.name} runtime must be of {wanted} on {device}, "
                f"but is of {state.dtype} on {state.device} instead.",
                remedy="Begin with the runtime's own `initial_memory`.",
            )


@functools.lru_cache
def _device(name: str) -> torch.device:
    """Return the device of that name as tensors have it: a CPU without a number, a GPU with one."""
    device = torch.device(name)
    return torch.device(device.type) if device.type == "cpu" else torch.device(device.type, device.index or 0)


def _is_elsewhere(tensor: Tensor, device: torch.device) -> bool:
    """Return whether a tensor of what is not named like `device` is on another one: a CPU may have a number, which means nothing."""
    return tensor.device.type != device.type or device.type != "cpu"


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"
