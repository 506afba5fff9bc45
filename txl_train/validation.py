"""Scoring a text in the course of training: which lengths, streams and protocol hold there. How a text is scored stands in `evaluate`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
import torch

from txl_train.config import ModelConfig, TrainConfig
from txl_train.data.segments import SegmentIterator
from txl_train.distributed import World
from txl_train.evaluate import EvalResult, ModelStepper, Stepper, evaluate
from txl_train.model.inference import with_lengths
from txl_train.model.memory import best_memory_kind
from txl_train.model.transformer_xl import TransformerXL
from txl_train.protocols import NVIDIA, NvidiaSegments, UnevenStepper, own_streams


def evaluation_config(config: ModelConfig, train: TrainConfig) -> ModelConfig:
    """Return the model's configuration for evaluation during training: as in NVIDIA's code, the reach stays that of training.

    Memory and segment together are as long as in training: mem_len + tgt_len - eval_tgt_len positions of memory; without memory, none.
    """
    mem_len = max(0, config.mem_len + train.tgt_len - train.eval_tgt_len) if config.mem_len else 0
    return with_lengths(config, mem_len=mem_len)


@dataclass(frozen=True)
class Scorer:
    """Scores a text the way evaluation during training does, in fp32."""

    config: ModelConfig
    train: TrainConfig
    device: torch.device
    world: World

    def __call__(
        self,
        model: TransformerXL,
        ids: npt.NDArray[Any],
        *,
        max_segments: int | None = None,
        on_step: Callable[[int], None] | None = None,
    ) -> EvalResult:
        train, config, compat = self.train, self.config, self.train.compat
        batch_size, tgt_len = train.eval_batch_size, train.eval_tgt_len
        model.eval()
        stepper: Stepper = self._stepper(model, tgt_len, config)
        segments: SegmentIterator | NvidiaSegments
        if compat is None:
            streams = own_streams("exact", batch_size, self.world)
            segments = SegmentIterator(ids, batch_size=batch_size, tgt_len=tgt_len, ext_len=config.ext_len, streams=streams)
        else:
            warm_up = -(-config.mem_len // tgt_len) * tgt_len if NVIDIA[compat].warms_up else 0
            segments = NvidiaSegments(
                ids,
                batch_size=batch_size,
                tgt_len=tgt_len,
                ext_len=config.ext_len,
                warm_up_len=warm_up,
                columns=own_streams(compat, batch_size, self.world),
                max_segments=max_segments,
            )
            lengths = segments.lengths_to_continue() if config.attn_type in ("sinusoidal", "learned") else set()
            others = {length: self._stepper(model, length, with_lengths(config, ext_len=0)) for length in lengths}
            stepper = UnevenStepper(stepper, others, tgt_len=tgt_len, ext_len=config.ext_len)
        return evaluate(
            stepper,
            segments,
            batch_size=segments.batch_size,
            device=self.device,
            max_segments=max_segments,
            on_step=on_step,
            world=self.world,
        )

    def _stepper(self, model: TransformerXL, tgt_len: int, config: ModelConfig) -> ModelStepper:
        return ModelStepper(model, tgt_len=tgt_len, memory=best_memory_kind(config), config=config)
