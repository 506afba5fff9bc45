"""ONNX Runtime: `model.onnx` on the CPU, or on a GPU where its CUDA provider really runs. The only file that imports onnxruntime.

Inputs are bound where they lie and outputs are written into two sets of preallocated buffers by turns, so the memory is never
copied on its way from one step to the next.
"""

# Shape suffixes: B batch, T tgt_len

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from txl_deploy.runtimes.base import RuntimeInfo, check_shapes
from txl_deploy.signature import Signature, step_signature
from txl_train.errors import ArtifactError, EnvironmentUnfitError
from txl_train.evaluate import StepOutput
from txl_train.model.adaptive import cluster_rows
from txl_train.model.memory import Memory, empty_memory, state_count, state_shape

_INSTALL = "Install it with `pip install 'txl[onnx]'` (or `'txl[onnx-gpu]'` on a GPU)."


class OnnxRuntime:
    """One session and the buffers of the batch size it was last used with."""

    def __init__(self, path: Path, info: RuntimeInfo, *, threads: int | None = None) -> None:
        """Open `path`; `info.device` chooses the provider, and what really runs is read back into `info`."""
        try:
            import onnxruntime
        except ImportError as error:
            raise EnvironmentUnfitError("onnxruntime is not installed.", remedy=_INSTALL) from error
        self._ort = onnxruntime
        on_gpu = info.device.startswith("cuda")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads = threads
        if on_gpu:
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        wanted = "CUDAExecutionProvider" if on_gpu else "CPUExecutionProvider"
        if wanted not in onnxruntime.get_available_providers():
            raise EnvironmentUnfitError(
                f"This onnxruntime has no {wanted}.", remedy="Install the GPU build: `pip install 'txl[onnx-gpu]'`, or use `--device cpu`."
            )
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=[wanted])
        except Exception as error:  # onnxruntime's exceptions share no public base class
            reason = str(error).strip().splitlines()[0]
            if on_gpu:
                raise EnvironmentUnfitError(
                    f"ONNX Runtime cannot run {path} on {info.device}: {reason}", remedy="Run `txl doctor`, or use `--device cpu`."
                ) from error
            raise ArtifactError(
                f"ONNX Runtime cannot load {path}: {reason}", remedy="Export it again with `txl export --format onnx`."
            ) from error
        provider = self._session.get_providers()[0]
        if provider != wanted:
            raise EnvironmentUnfitError(
                f"ONNX Runtime fell back to {provider} instead of {wanted}.", remedy="Run `txl doctor` to see what is missing."
            )
        self._info = dataclasses.replace(info, provider=provider)
        self._signature: Signature = step_signature(info.config, tgt_len=info.tgt_len, memory=info.memory)
        self._check_graph(path)
        self._cluster_ends = list(info.config.cluster_ends)
        self._device = torch.device(info.device)
        self._binding = self._session.io_binding()
        self._outputs: list[tuple[Tensor, Memory]] = []
        self._somewhere = torch.zeros(1, device=self._device)

    def _check_graph(self, path: Path) -> None:
        for expected, found in (
            (self._signature.inputs, self._session.get_inputs()),
            (self._signature.outputs, self._session.get_outputs()),
        ):
            if [spec.name for spec in expected] != [argument.name for argument in found]:
                raise ArtifactError(
                    f"The graph in {path} has other inputs or outputs than its manifest says.", remedy="Export it again with `txl export`."
                )

    @property
    def info(self) -> RuntimeInfo:
        """What this is."""
        return self._info

    def initial_memory(self, batch_size: int) -> Memory:
        """Return the memory of `batch_size` streams at a cold start."""
        return empty_memory(self._info.config, self._info.memory, batch_size, device=self._device)

    def step(self, input_ids_BT: Tensor, target_ids_BT: Tensor, memory: Memory) -> StepOutput:
        """Score one segment."""
        check_shapes(self._info, input_ids_BT, target_ids_BT, memory)
        rows = cluster_rows(target_ids_BT.reshape(-1), self._cluster_ends)
        inputs = [tensor.contiguous() for tensor in (input_ids_BT, target_ids_BT, *rows, memory.length_B, *memory.states)]
        nll_BT, new = self._buffers_not_holding(memory, input_ids_BT.shape[0])
        for spec, tensor in zip(self._signature.inputs, inputs):
            self._bind(self._binding.bind_input, spec.name, tensor)
        for spec, tensor in zip(self._signature.outputs, [nll_BT, new.length_B, *new.states]):
            self._bind(self._binding.bind_output, spec.name, tensor)
        self.synchronize()
        self._session.run_with_iobinding(self._binding)
        self._binding.synchronize_outputs()
        return StepOutput(nll_BT, new)

    def _bind(self, bind: Any, name: str, tensor: Tensor) -> None:
        element = np.int64 if tensor.dtype == torch.int64 else np.float32
        address = tensor.data_ptr() or self._somewhere.data_ptr()  # an empty tensor lies nowhere, which onnxruntime refuses
        bind(name, self._device.type, self._device.index or 0, element, tuple(tensor.shape), address)

    def _buffers_not_holding(self, memory: Memory, batch_size: int) -> tuple[Tensor, Memory]:
        """Return the output buffers that `memory` does not lie in, making both sets anew for another batch size."""
        if not self._outputs or self._outputs[0][0].shape[0] != batch_size:
            self._outputs = [self._new_buffers(batch_size) for _ in range(2)]
        first_length = self._outputs[0][1].length_B
        return self._outputs[1 if memory.length_B.data_ptr() == first_length.data_ptr() else 0]

    def _new_buffers(self, batch_size: int) -> tuple[Tensor, Memory]:
        info = self._info
        shape = state_shape(info.config, info.memory, batch_size)
        states = [torch.empty(shape, device=self._device) for _ in range(state_count(info.config, info.memory))]
        length_B = torch.empty(batch_size, dtype=torch.int64, device=self._device)
        return torch.empty(batch_size, info.tgt_len, device=self._device), Memory(states, length_B)

    def synchronize(self) -> None:
        """Wait for the device."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
