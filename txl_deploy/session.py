"""A runtime with its memory: carries it from segment to segment, and starts single streams anew."""

# Shape suffixes: B batch, T tgt_len, Q ext_len + tgt_len, V vocabulary

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from txl_deploy.runtimes.base import Runtime
from txl_train.model.memory import Memory


class Session:
    """`batch_size` streams on one runtime, all at a cold start."""

    def __init__(self, runtime: Runtime, batch_size: int) -> None:
        self.runtime = runtime
        self.memory: Memory = runtime.initial_memory(batch_size)

    def step(self, input_ids_BT: Tensor, target_ids_BT: Tensor) -> Tensor:
        """Score the next segment of every stream: nll, nats, float32 [B, T], valid until the next step."""
        nll_BT, self.memory = self.runtime.step(input_ids_BT, target_ids_BT, self.memory)
        return nll_BT

    def next_token(self, input_ids_BQ: Tensor) -> Tensor:
        """Run the next segment of every stream: float32 scores [B, V] of every word as the next one, valid until the next step."""
        scores_BV, self.memory = self.runtime.next_token(input_ids_BQ, self.memory)
        return scores_BV

    def reset(self, streams: Sequence[int]) -> None:
        """Put some streams back to a cold start. Only their valid length changes: what lies beyond it is never read."""
        length_B = self.memory.length_B.clone()
        length_B[list(streams)] = 0
        self.memory = Memory(self.memory.states, length_B)
