"""What runtimes of a fixed step have in common: checks, the head they have, and the inputs in the order of the graph."""

# Shape suffixes: B batch, T tgt_len, Q ext_len + tgt_len, V vocabulary

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from txl_deploy.runtimes.base import TORCH_TYPES, HeadError, RuntimeInfo, ScoresOutput, check_shapes
from txl_train.evaluate import StepOutput
from txl_train.model.adaptive import cluster_rows
from txl_train.model.memory import Memory, empty_memory


class GraphRuntime:
    """A runtime by what it computes: a subclass says how, in `run`."""

    def __init__(self, info: RuntimeInfo) -> None:
        self._info = info
        self._cluster_ends = list(info.config.cluster_ends)

    def run(self, input_ids_BQ: Tensor, target_ids_BT: Tensor | None, rows: list[Tensor], memory: Memory) -> tuple[Tensor, Memory]:
        """Return what the head yields, and the memory for the next segment. All shapes have been checked.

        `target_ids_BT` and `rows` are there if the head is `nll`; `rows` may be empty tensors.
        """
        raise NotImplementedError

    @property
    def info(self) -> RuntimeInfo:
        """What this is."""
        return self._info

    def initial_memory(self, batch_size: int) -> Memory:
        """Return the memory of `batch_size` streams at a cold start."""
        info = self._info
        return empty_memory(info.config, info.memory, batch_size, device=info.device, dtype=TORCH_TYPES[info.memory_dtype])

    def step(self, input_ids_BQ: Tensor, target_ids_BT: Tensor, memory: Memory) -> StepOutput:
        """Score one segment."""
        info = self._info
        if info.head != "nll":
            raise HeadError(
                f"{info.origin or 'This runtime'} yields {info.head} of the next token, and no nll of given targets.",
                remedy="Export the checkpoint with `--head nll` to score a text.",
            )
        check_shapes(info, {"input_ids": input_ids_BQ, "target_ids": target_ids_BT}, memory)
        rows = cluster_rows(target_ids_BT.reshape(-1), self._cluster_ends)
        return StepOutput(*self.run(input_ids_BQ, target_ids_BT, rows, memory))

    def next_token(self, input_ids_BQ: Tensor, memory: Memory) -> ScoresOutput:
        """Run one segment and score every word as the next one."""
        info = self._info
        if info.head == "nll":
            raise HeadError(
                f"{info.origin or 'This runtime'} yields the nll of given targets, and no scores of the next token.",
                remedy="Export the checkpoint with `--head logits` to generate text.",
            )
        check_shapes(info, {"input_ids": input_ids_BQ}, memory)
        return ScoresOutput(*self.run(input_ids_BQ, None, [], memory))

    def synchronize(self) -> None:
        """Wait for the device."""
        if self._info.device.startswith("cuda"):
            torch.cuda.synchronize(self._info.device)


class ModuleRuntime(GraphRuntime):
    """A runtime whose step is a callable of tensors: a module, scripted or compiled or neither."""

    def __init__(self, info: RuntimeInfo, module: Callable[..., Any]) -> None:
        super().__init__(info)
        self._module = module

    @torch.inference_mode()
    def run(self, input_ids_BQ: Tensor, target_ids_BT: Tensor | None, rows: list[Tensor], memory: Memory) -> tuple[Tensor, Memory]:
        """Call the module."""
        if target_ids_BT is None:
            result, length_B, states = self._module(input_ids_BQ, memory.length_B, memory.states)
        else:
            result, length_B, states = self._module(input_ids_BQ, target_ids_BT, rows, memory.length_B, memory.states)
        return result, Memory(states, length_B)
