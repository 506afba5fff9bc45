"""Eager PyTorch: the reference that every other runtime is compared with."""

from __future__ import annotations

import dataclasses

import torch

from txl_deploy.runtimes.base import RuntimeInfo, check_shapes
from txl_train.config import MemoryKind, ModelConfig
from txl_train.evaluate import ModelStepper, StepOutput
from txl_train.model.memory import Memory
from txl_train.model.transformer_xl import TransformerXL


class EagerRuntime:
    """The model itself, in evaluation mode."""

    def __init__(
        self,
        model: TransformerXL,
        *,
        tgt_len: int,
        memory: MemoryKind = "kv",
        config: ModelConfig | None = None,
        origin: str = "",
        checkpoint_sha256: str | None = None,
    ) -> None:
        self._model = model.eval()
        self._stepper = ModelStepper(model, tgt_len=tgt_len, memory=memory, config=config)
        self._device = model.embedding.weights[0].device
        self._info = RuntimeInfo(
            name="pytorch",
            provider="eager",
            device=str(self._device),
            dtype="fp32",
            memory=memory,
            tgt_len=tgt_len,
            config=self._stepper.module.config,
            origin=origin,
            checkpoint_sha256=checkpoint_sha256,
        )

    @property
    def info(self) -> RuntimeInfo:
        """What this is."""
        return self._info

    def of_length(self, tgt_len: int) -> EagerRuntime:
        """Return the same model for segments of `tgt_len` tokens without extension; the two can take turns on one memory."""
        info = self._info
        return EagerRuntime(
            self._model,
            tgt_len=tgt_len,
            memory=info.memory,
            config=dataclasses.replace(info.config, ext_len=0),
            origin=info.origin,
            checkpoint_sha256=info.checkpoint_sha256,
        )

    def initial_memory(self, batch_size: int) -> Memory:
        """Return the memory of `batch_size` streams at a cold start."""
        return self._stepper.initial_memory(batch_size)

    def step(self, input_ids_BQ: torch.Tensor, target_ids_BT: torch.Tensor, memory: Memory) -> StepOutput:
        """Score one segment."""
        check_shapes(self._info, input_ids_BQ, target_ids_BT, memory)
        return self._stepper.step(input_ids_BQ, target_ids_BT, memory)

    def synchronize(self) -> None:
        """Wait for the device."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
