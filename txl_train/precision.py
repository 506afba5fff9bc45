"""Arithmetic of training: fp32, or autocast to bf16 or to fp16 with a dynamic loss scale. The weights themselves stay float32.

On a CPU, bf16 and fp16 give the same numbers as on a GPU, slowly.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from txl_train.errors import EnvironmentUnfitError


class Precision:
    """How one training step computes, from the forward pass to the optimizer.

    Args:
        dtype: "fp32", "bf16" or "fp16", of matrix products; what needs range or precision stays float32.
        device: where the model is.

    Raises:
        EnvironmentUnfitError: the device cannot compute so.
    """

    def __init__(self, dtype: str, device: torch.device) -> None:
        if dtype == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
            raise EnvironmentUnfitError(
                f"{torch.cuda.get_device_name(device)} has no bf16 arithmetic.", remedy="Use `--dtype fp16` or `--dtype fp32`."
            )
        self.dtype = dtype
        self._device_type = device.type
        self._scaler = torch.amp.GradScaler(device.type, enabled=dtype == "fp16")

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        """The context the forward pass runs in."""
        if self.dtype == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self._device_type, dtype=torch.bfloat16 if self.dtype == "bf16" else torch.float16)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss`, scaled where the precision needs it."""
        self._scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    def norm(self, optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor]) -> Tensor:
        """Undo the scale of the gradients, and return the norm of those of `parameters` together."""
        self._scaler.unscale_(optimizer)
        return torch.nn.utils.get_total_norm([weight.grad for weight in parameters if weight.grad is not None])

    def clip(self, parameters: Iterable[Tensor], max_norm: float, norm: Tensor) -> None:
        """Scale the gradients down to `max_norm` together (0: leave them), given what `norm` has returned."""
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm if max_norm > 0 else float("inf"), norm)

    def step(self, optimizer: torch.optim.Optimizer) -> bool:
        """Let the optimizer move the weights, and return True; after an fp16 overflow they stay and the loss scale is halved instead."""
        moved: list[bool] = []
        handle = optimizer.register_step_pre_hook(lambda *_: moved.append(True))  # the scaler does not tell whether it took the step
        try:
            self._scaler.step(optimizer)
        finally:
            handle.remove()
        self._scaler.update()
        return bool(moved)

    @property
    def loss_scale(self) -> float | None:
        """Factor on the loss in fp16 (reading it waits for the GPU); None elsewhere."""
        return float(self._scaler.get_scale()) if self._scaler.is_enabled() else None

    def state_dict(self) -> dict[str, Any]:
        """What must be kept to continue; empty unless fp16."""
        return self._scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`. A state of another precision is ignored: the scale then starts anew."""
        if state and self._scaler.is_enabled():
            self._scaler.load_state_dict(state)
