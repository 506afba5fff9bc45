"""TorchScript: a scripted `InferenceStep` loaded from `model.pt`, without the toolkit's Python code."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import Tensor

from txl_deploy.runtimes.base import RuntimeInfo, check_shapes
from txl_train.errors import ArtifactError
from txl_train.evaluate import StepOutput
from txl_train.model.adaptive import cluster_rows
from txl_train.model.memory import Memory, empty_memory


class TorchScriptRuntime:
    """A TorchScript module on one device."""

    def __init__(self, path: Path, info: RuntimeInfo) -> None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # torch.jit is deprecated since 2.13 and works up to Python 3.13
                self._module: torch.jit.ScriptModule = torch.jit.load(str(path), map_location=info.device)  # type: ignore[no-untyped-call]
        except (RuntimeError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ArtifactError(
                f"PyTorch cannot load {path}: {reason}", remedy="Export it again with `txl export --format torchscript`."
            ) from error
        self._info = info
        self._cluster_ends = list(info.config.cluster_ends)

    @property
    def info(self) -> RuntimeInfo:
        """What this is."""
        return self._info

    def initial_memory(self, batch_size: int) -> Memory:
        """Return the memory of `batch_size` streams at a cold start."""
        return empty_memory(self._info.config, self._info.memory, batch_size, device=self._info.device)

    @torch.inference_mode()
    def step(self, input_ids_BT: Tensor, target_ids_BT: Tensor, memory: Memory) -> StepOutput:
        """Score one segment."""
        check_shapes(self._info, input_ids_BT, target_ids_BT, memory)
        rows = cluster_rows(target_ids_BT.reshape(-1), self._cluster_ends)
        nll_BT, length_B, states = self._module(input_ids_BT, target_ids_BT, rows, memory.length_B, memory.states)
        return StepOutput(nll_BT, Memory(states, length_B))

    def synchronize(self) -> None:
        """Wait for the device."""
        if self._info.device.startswith("cuda"):
            torch.cuda.synchronize(self._info.device)
