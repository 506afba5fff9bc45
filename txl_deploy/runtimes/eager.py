"""Eager PyTorch: in FP32 the reference that every other runtime is compared with."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from txl_deploy.claims import count_matrices
from txl_deploy.runtimes.base import TORCH_TYPES, RuntimeInfo, torch_compute
from txl_deploy.runtimes.graph import ModuleRuntime
from txl_train.config import HeadKind, MemoryKind, ModelConfig
from txl_train.model.inference import STEPS
from txl_train.model.transformer_xl import TransformerXL


class EagerRuntime(ModuleRuntime):
    """The model itself, in evaluation mode; in fp16 a copy of it."""

    NAME: ClassVar[str] = "pytorch"
    PROVIDER: ClassVar[str] = "eager"

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
    ) -> None:
        self._model = model.eval()
        step = STEPS[head](model, tgt_len, memory, config, dtype=TORCH_TYPES[dtype], memory_dtype=TORCH_TYPES[memory_dtype or dtype]).eval()
        self.step_module = step
        weights = count_matrices((str(weight.dtype).removeprefix("torch."), weight.dim()) for weight in step.parameters())
        device = str(model.embedding.weights[0].device)
        info = RuntimeInfo(
            name=self.NAME,
            provider=self.PROVIDER,
            device=device,
            dtype=dtype,
            compute=torch_compute(dtype, device),
            memory=memory,
            memory_dtype=memory_dtype or dtype,
            head=head,
            tgt_len=tgt_len,
            config=step.config,
            origin=origin,
            checkpoint_sha256=checkpoint_sha256,
            readback={"weights": weights},
        )
        super().__init__(info, step)

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
        )
