"""A runtime with its memory: carries it from segment to segment, and starts single streams anew.

What a step yields is finite, or an error says in which segment and stream it is not; `checked=False` leaves that to the caller.
"""

# Shape suffixes: B batch, T tgt_len, Q ext_len + tgt_len, V vocabulary

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from txl_deploy.runtimes.base import Runtime
from txl_train.finite import check_scores, check_step
from txl_train.model.memory import Memory


class Session:
    """`batch_size` streams on one runtime, all at a cold start."""

    def __init__(self, runtime: Runtime, batch_size: int, *, checked: bool = True) -> None:
        self.runtime = runtime
        self._checked = checked
        self._steps = 0
        self.memory: Memory = runtime.initial_memory(batch_size)

    def step(self, input_ids_BT: Tensor, target_ids_BT: Tensor) -> Tensor:
        """Score the next segment of every stream: nll, nats, float32 [B, T], valid until the next step.

        Raises:
            ValidationError: a loss, or what the step adds to a memory in fp16, is not finite. It names segment and stream.
        """
        nll_BT, self.memory = self.runtime.step(input_ids_BT, target_ids_BT, self.memory)
        if self._checked:
            check_step(nll_BT, self.memory, self._steps, n_newest=target_ids_BT.shape[1])
        self._steps += 1
        return nll_BT

    def next_token(self, input_ids_BQ: Tensor) -> Tensor:
        """Run the next segment of every stream: float32 scores [B, V] of every word as the next one, valid until the next step.

        Raises:
            ValidationError: as `step`; of scores, -inf is a word that cannot come.
        """
        scores_BV, self.memory = self.runtime.next_token(input_ids_BQ, self.memory)
        if self._checked:
            check_scores(scores_BV, self.memory, self._steps, n_newest=self.runtime.info.tgt_len)
        self._steps += 1
        return scores_BV

    def reset(self, streams: Sequence[int]) -> None:
        """Put some streams back to a cold start. Only their valid length changes: what lies beyond it is never read."""
        length_B = self.memory.length_B.clone()
        length_B[list(streams)] = 0
        self.memory = Memory(self.memory.states, length_B)
