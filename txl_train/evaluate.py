"""Scoring a corpus: the only place where token losses become a perplexity, whichever runtime computes them.

The memory is carried here, from segment to segment, from a cold start. Only counted tokens enter the sums, which are float64: within a
segment pairwise, over segments without rounding, so that a text of any length has the relative error of a few roundings. Several
processes each score streams of their own, and all get the sums over all. How a text is cut, and which tokens count, is decided by whoever
makes the segments (`data.segments`, `protocols`).
"""

# Shape suffixes: B batch, T tgt_len, Q inputs (ext_len + tgt_len)

from __future__ import annotations

import array
import contextlib
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from txl_train import metrics
from txl_train.config import MemoryKind, ModelConfig
from txl_train.data.segments import Segment
from txl_train.distributed import World
from txl_train.finite import Spoiled, spoiled_loss, spoiled_memory, watched
from txl_train.model.adaptive import cluster_rows
from txl_train.model.inference import InferenceStep
from txl_train.model.memory import Memory, empty_memory
from txl_train.model.transformer_xl import TransformerXL


class StepOutput(NamedTuple):
    """What one segment yields: −log p(target), nats, float32 [B, T] in token order, and the memory for the next segment."""

    nll_BT: Tensor
    memory: Memory


class Stepper(Protocol):
    """Runs one segment. Whoever needs continuity carries the memory."""

    def initial_memory(self, batch_size: int) -> Memory:
        """Return the memory of `batch_size` streams at a cold start."""
        ...

    def step(self, input_ids_BQ: Tensor, target_ids_BT: Tensor, memory: Memory) -> StepOutput:
        """Score one segment. Outputs stay valid until the next `step` that continues them; clone what you keep."""
        ...


class ModelStepper:
    """A `TransformerXL` as a `Stepper`. The model must be in evaluation mode."""

    def __init__(self, model: TransformerXL, *, tgt_len: int, memory: MemoryKind = "kv", config: ModelConfig | None = None) -> None:
        self.step_module = InferenceStep(model, tgt_len, memory, config)
        self._weight = model.embedding.weights[0]

    def initial_memory(self, batch_size: int) -> Memory:
        """Return the memory of `batch_size` streams at a cold start, on the model's device."""
        module, weight = self.step_module, self._weight
        return empty_memory(module.config, module.memory, batch_size, device=weight.device, dtype=weight.dtype)

    @torch.inference_mode()
    def step(self, input_ids_BQ: Tensor, target_ids_BT: Tensor, memory: Memory) -> StepOutput:
        """Score one segment of `tgt_len` tokens; the inputs begin with the `ext_len` tokens before them."""
        rows = cluster_rows(target_ids_BT.reshape(-1), self.step_module.head.cluster_ends)
        nll_BT, length_B, states = self.step_module(input_ids_BQ, target_ids_BT, rows, memory.length_B, memory.states)
        return StepOutput(nll_BT, Memory(states, length_B))


class ProcessScore(NamedTuple):
    """What one of several processes has scored."""

    nll_nats_sum: float
    n_tokens: int


@dataclass(frozen=True, kw_only=True)
class EvalResult:
    """The outcome of scoring: one sum, one count, and what follows from them; of several processes, over all of them."""

    nll_nats_sum: float
    """Sum of −log p over the counted tokens, nats."""
    n_tokens: int
    """Number of counted tokens."""
    n_segments: int
    """Number of steps taken, each by all processes."""
    seconds: float
    """Wall time from the first segment to the last, reading the text and adding up included; of several processes, the longest."""
    by_process: tuple[ProcessScore, ...] = ()
    """The parts of several processes, in order of their ranks; empty for one."""
    step_seconds: tuple[float, ...] = ()
    """Wall time of each step until the device was done, of several processes the longest; empty unless steps were timed."""
    step_tokens: tuple[int, ...] = ()
    """Targets of each step over all processes, without padding; empty unless steps were timed."""
    segment_nll_nats: tuple[float, ...] = ()
    """Sum of −log p over the counted tokens of each segment, over all processes, nats."""
    segment_tokens: tuple[int, ...] = ()
    """Counted tokens of each segment, over all processes."""

    @property
    def nll_nats_per_token(self) -> float:
        """Mean −log p of a token, nats."""
        return self.nll_nats_sum / self.n_tokens

    @property
    def perplexity(self) -> float:
        """exp of the mean nll."""
        return metrics.perplexity(self.nll_nats_per_token)

    @property
    def bits_per_char(self) -> float:
        """The mean nll in bits per token; per character where a token is one."""
        return metrics.bits_per_char(self.nll_nats_per_token)

    @property
    def ms_per_segment(self) -> float:
        """Mean wall time of a segment, ms."""
        return 1000.0 * self.seconds / self.n_segments

    @property
    def tokens_per_s(self) -> float:
        """Counted tokens per second."""
        return self.n_tokens / self.seconds


def counted_sum(nll_BT: Tensor, counted_BT: np.ndarray) -> float:
    """Return the float64 sum of the nll of counted tokens; numpy adds them up pairwise."""
    return float(nll_BT.to("cpu", torch.float64).numpy()[counted_BT].sum())


def evaluate(
    stepper: Stepper,
    segments: Iterable[Segment],
    *,
    batch_size: int,
    device: torch.device | str = "cpu",
    max_segments: int | None = None,
    on_step: Callable[[int], None] | None = None,
    world: World | None = None,
    synchronize: Callable[[], None] | None = None,
) -> EvalResult:
    """Score `segments` in order, from a cold start.

    Args:
        stepper: any runtime.
        segments: of `batch_size` streams, as `SegmentIterator` yields them.
        device: where the stepper expects its tensors.
        max_segments: stop after so many.
        on_step: called with the number of segments done, for progress.
        world: processes that each call this with streams of their own, in equally many segments; None means that there is only this one.
        synchronize: waits for the device; given, each step is timed between two calls of it, tokens already on the device.

    Raises:
        ValidationError: a token's nll, or what a step adds to a memory in fp16, is not finite, in any process.
    """
    world = world or World()
    memory = stepper.initial_memory(batch_size)
    n_segments = 0
    not_finite: tuple[int, Spoiled, str | None] | None = None
    steps: list[tuple[int, int, int]] = []
    sums, counts = array.array("d"), array.array("d")  # of each segment; a list of a billion would be fifty times as large
    start = time.perf_counter()
    for segment in segments:
        if max_segments is not None and n_segments >= max_segments:
            break
        input_ids_BQ = torch.from_numpy(segment.input_ids_BT).to(device)
        target_ids_BT = torch.from_numpy(segment.target_ids_BT).to(device)
        if synchronize is not None:
            synchronize()
            step_start = time.perf_counter_ns()
        before = memory
        nll_BT, memory = stepper.step(input_ids_BQ, target_ids_BT, before)
        n_counted = int(segment.counted_BT.sum())
        if synchronize is not None:
            synchronize()
            steps.append((time.perf_counter_ns() - step_start, n_counted, segment.target_ids_BT.size))
        part = counted_sum(nll_BT, segment.counted_BT)
        n_segments += 1
        if not_finite is None:
            counted_BT = torch.from_numpy(segment.counted_BT)
            spoiled = spoiled_memory(memory, target_ids_BT.shape[1])
            if spoiled is None and not math.isfinite(part):
                spoiled = spoiled_loss(nll_BT.cpu().masked_fill(~counted_BT, 0))
            if spoiled is not None:
                not_finite = segment.index, spoiled, _place(stepper, input_ids_BQ, target_ids_BT, before)
        if not_finite is not None and world.size == 1:
            break  # several processes go on together to the end, where all are told
        sums.append(part)
        counts.append(n_counted)
        if on_step is not None:
            on_step(n_segments)
    seconds = time.perf_counter() - start
    total = math.nan if not_finite is not None else math.fsum(sums)
    figures = world.gather(torch.tensor([total, sum(counts), seconds, *_encoded(not_finite)], dtype=torch.float64))
    for rank, (*_, index, stream, state, is_kv) in enumerate(figures):
        if index >= 0:
            where = "" if world.size == 1 else f" of process {rank}"
            place = not_finite[2] if not_finite is not None and rank == world.rank else None
            raise Spoiled(int(stream), None if state < 0 else int(state), bool(is_kv)).error(int(index), where=where, place=place)
    by_process = tuple(ProcessScore(float(part[0]), int(part[1])) for part in figures)
    by_step = torch.stack(world.gather(torch.tensor(steps))) if steps else torch.zeros(1, 0, 3)  # [processes, steps, 3]
    by_segment = torch.stack(world.gather(torch.tensor([sums, counts], dtype=torch.float64).T)).sum(dim=0)  # [segments, 2]
    tokens_of_steps: list[list[int]] = by_step[:, :, 1:].sum(dim=0).tolist()
    return EvalResult(
        nll_nats_sum=math.fsum(part.nll_nats_sum for part in by_process),
        n_tokens=sum(part.n_tokens for part in by_process),
        n_segments=n_segments,
        seconds=max(float(part[2]) for part in figures),
        by_process=by_process if world.size > 1 else (),
        step_seconds=tuple(ns / 1e9 for ns in by_step[:, :, 0].amax(dim=0).tolist()),
        step_tokens=tuple(
            n_counted or n_all for n_counted, n_all in tokens_of_steps
        ),  # where nothing counts, it is a warm-up and no padding
        segment_nll_nats=tuple(by_segment[:, 0].tolist()),
        segment_tokens=tuple(int(count) for count in by_segment[:, 1].tolist()),
    )


def _encoded(not_finite: tuple[int, Spoiled, str | None] | None) -> tuple[int, int, int, int]:
    """Return segment, stream, state and kind of memory as numbers to exchange; the first is negative where there is nothing."""
    if not_finite is None:
        return -1, -1, -1, 0
    index, spoiled, _ = not_finite
    return index, spoiled.stream, -1 if spoiled.state is None else spoiled.state, spoiled.is_kv


def _place(stepper: Stepper, input_ids_BQ: Tensor, target_ids_BT: Tensor, memory: Memory) -> str | None:
    """Return where a step of modules first is not finite, by taking it again; None for what does not show its modules."""
    module = getattr(stepper, "step_module", None)
    if not isinstance(module, torch.nn.Module):
        return None
    again = getattr(stepper, "step_in_modules", stepper.step)
    with contextlib.suppress(RuntimeError), watched(module) as found:
        again(input_ids_BQ, target_ids_BT, memory)
    return found[0] if found else None
