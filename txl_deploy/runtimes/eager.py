"""Eager PyTorch: in FP32 the reference that every other runtime is compared with."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from txl_deploy.claims import count_matrices
from txl_deploy.runtimes.base import TORCH_TYPES, RuntimeInfo, check_shapes, torch_compute
from txl_deploy.runtimes.graph import ModuleRuntime
from txl_deploy.runtimes.window import Windows
from txl_train.config import HeadKind, MemoryKind, ModelConfig
from txl_train.errors import UsageError
from txl_train.evaluate import StepOutput
from txl_train.gpu_kernels import can_run_kernels
from txl_train.model.adaptive import cluster_rows
from txl_train.model.inference import STEPS, FixedStep
from txl_train.model.int8 import INT8, int8_weights, require_int8
from txl_train.model.memory import Memory
from txl_train.model.packed import PACKED, can_pack, in_packs, pack_step
from txl_train.model.transformer_xl import TransformerXL

if TYPE_CHECKING:
    from txl_deploy.runtimes.rings import Rings


class EagerRuntime(ModuleRuntime):
    """The model itself, in evaluation mode; in fp16 and int8 a copy of it."""

    NAME: ClassVar[str] = "pytorch"
    PROVIDER: ClassVar[str] = "eager"
    PACKS: ClassVar[bool] = True
    """Whether weights and memory can be laid out for speed."""

    def __init__(
        self,
        model: TransformerXL,
        *,
        tgt_len: int,
        memory: MemoryKind = "kv",
        config: ModelConfig | None = None,
        dtype: str = "fp32",
        memory_dtype: str | None = None,
        head: HeadKind = "nll",
        origin: str = "",
        checkpoint_sha256: str | None = None,
        packed: bool = True,
    ) -> None:
        """Make the step; the arguments are those of `model.inference.FixedStep`.

        `packed` lays weights and memory out for speed where that can be done: in float32 on a CPU matrices are packed (`model.packed`), and
        keys and values stay where they are (`window.Windows`). Without it, the step is made of the operations of an exported graph. In int8
        linear layers are those of `model.int8` in any case, and all else and the states are float32.

        Raises:
            UsageError: int8 was asked for on a GPU or of another runtime than eager PyTorch.
            EnvironmentUnfitError: this PyTorch has no products of int8.
            ValidationError: a weight is too large for fp16, or not finite.
        """
        model.eval()
        self.is_packed = packed = packed and self.PACKS
        is_int8, on_cpu = dtype == "int8", not model.embedding.weights[0].is_cuda
        if is_int8:
            if not (on_cpu and self.PACKS and memory_dtype in (None, "fp32")):
                raise UsageError(
                    "int8 is for eager PyTorch on a CPU, with states of fp32.", remedy="Use `--dtype fp16`, or `--device cpu`."
                )
            require_int8()
        packing = INT8 if is_int8 else PACKED if packed and dtype == "fp32" and on_cpu and can_pack() else None
        self._model = model = model if packing is None else in_packs(model, memory, packing)
        element = "fp32" if is_int8 else dtype  # of all that is no linear layer
        states = memory_dtype or element
        step = STEPS[head](model, tgt_len, memory, config, dtype=TORCH_TYPES[element], memory_dtype=TORCH_TYPES[states]).eval()
        if packing is not None:
            pack_step(step)
        self.step_module = step
        tensors = [*step.parameters(), *int8_weights(step)]
        weights = count_matrices((str(weight.dtype).removeprefix("torch."), weight.dim()) for weight in tensors)
        device = str(model.embedding.weights[0].device)
        info = RuntimeInfo(
            name=self.NAME,
            provider=self.PROVIDER,
            device=device,
            dtype=dtype,
            compute=torch_compute(dtype, device),
            memory=memory,
            memory_dtype=states,
            head=head,
            tgt_len=tgt_len,
            config=step.config,
            origin=origin,
            checkpoint_sha256=checkpoint_sha256,
            readback={"weights": weights},
        )
        super().__init__(info, step)
        has_windows = packed and memory == "kv" and step.mem_len > 0
        self._windows = Windows(step.mem_len, step.ext_len + tgt_len, tgt_len) if has_windows else None
        self._rings: Rings | None = None
        where = model.embedding.weights[0].device
        if packed and where.type == "cuda" and _has_kernels_for(step, where):
            from txl_deploy.runtimes.rings import Rings

            self._rings = Rings(step, where)
            self._info = dataclasses.replace(info, provider="cuda-graph")

    def step(self, input_ids_BQ: Tensor, target_ids_BT: Tensor, memory: Memory) -> StepOutput:
        """Score one segment."""
        if self._rings is None or self._info.head != "nll":
            return super().step(input_ids_BQ, target_ids_BT, memory)
        lane = self._rings.lane_of(memory)
        check_shapes(self._info, {"input_ids": input_ids_BQ, "target_ids": target_ids_BT}, memory, states_too=lane is None)
        return StepOutput(*self._rings.run(input_ids_BQ, target_ids_BT, memory, lane))

    def step_in_modules(self, input_ids_BQ: Tensor, target_ids_BT: Tensor, memory: Memory) -> StepOutput:
        """Score one segment by calling the modules of `step_module`, slowly on a GPU: for who looks at what each of them yields."""
        rows = cluster_rows(target_ids_BT.reshape(-1), self._cluster_ends)
        return StepOutput(*super().run(input_ids_BQ, target_ids_BT, rows, memory))

    @torch.inference_mode()
    def run(self, input_ids_BQ: Tensor, target_ids_BT: Tensor | None, rows: list[Tensor], memory: Memory) -> tuple[Tensor, Memory]:
        """Call the step; its keys and values are written behind those of the memory where there is room."""
        if self._rings is not None:
            return self._rings.run(input_ids_BQ, target_ids_BT, memory, self._rings.lane_of(memory))
        if self._windows is None:
            return super().run(input_ids_BQ, target_ids_BT, rows, memory)
        store, start, states = self._windows.with_room(memory)
        result, memory = super().run(input_ids_BQ, target_ids_BT, rows, Memory(states, memory.length_B))
        self._windows.keep(store, start, memory.states)
        return result, memory

    def of_length(self, tgt_len: int) -> EagerRuntime:
        """Return the same model for segments of `tgt_len` tokens without extension; the two can take turns on one memory."""
        info = self._info
        return type(self)(
            self._model,
            tgt_len=tgt_len,
            memory=info.memory,
            config=dataclasses.replace(info.config, ext_len=0),
            dtype=info.dtype,
            memory_dtype=info.memory_dtype,
            head=info.head,
            origin=info.origin,
            checkpoint_sha256=info.checkpoint_sha256,
            packed=self.is_packed,
        )


def _has_kernels_for(step: FixedStep, device: torch.device) -> bool:
    """Return whether a step on a GPU can run as `model.fused` has it.

    Its kernels need Triton, and products of small blocks on tensor cores, which Triton has from compute capability 8.0 on (Ampere).
    """
    if torch.cuda.get_device_capability(device) < (8, 0) or not can_run_kernels(device):
        return False
    from txl_train.model.fused import can_fuse

    return can_fuse(step)
