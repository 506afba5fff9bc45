"""Times several runtimes side by side at one batch size, on the same tokens and by one clock, and checks what was timed.

The runtimes take turns in blocks of steps, so that whatever drifts on the machine (heat, clock rates, other processes) hits all of them
alike. The order rotates from block to block, and each block begins with a few steps that are not timed: they pay for the caches and
thread pools that the runtime before left behind. From the same cold start all runtimes run the same number of steps over the same tokens,
so the perplexities of their timed steps can be compared.

Knows runtimes by their protocol only and never asks which one it holds. Imports the standard library and numpy.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from txl_deploy.bench.result import ArtifactName, Row
from txl_deploy.bench.stats import STANDARD_PERCENTILES, LatencySummary
from txl_deploy.parity.tolerances import tolerance_for
from txl_train.errors import UsageError
from txl_train.metrics import perplexity

if TYPE_CHECKING:
    from txl_deploy.bench.workload import Workload
    from txl_deploy.runtimes.base import Runtime

Clock = Callable[[], int]
"""Returns nanoseconds from some fixed point."""

Progress = Callable[[int, int], None]
"""Is told how many steps of how many are done."""

BOUNDARIES = {"step_device_resident": "one step with tokens, targets and memory already on the device, until the device has finished"}
"""Name of each timing boundary, and what lies between its two readings of the clock. Rows of different boundaries are not compared."""


@dataclass(frozen=True, kw_only=True)
class BenchSettings:
    """How long and how often to measure."""

    percentiles: tuple[float, ...] = STANDARD_PERCENTILES
    duration_s: float = 10.0
    """Timed seconds that the slowest runtime gets at each batch size, as estimated in its warm-up."""
    min_samples: int = 662
    """Timed steps at least; 662 is what a p99 needs (`stats.minimum_samples`)."""
    max_samples: int = 20000
    """Timed steps at most."""
    max_duration_s: float = 60.0
    """Timed seconds of the slowest runtime at most, where `min_samples` would take longer; `duration_s` where that is more."""
    warmup_steps: int = 10
    """Steps before the clock counts, at least; more where the memory needs more to fill."""
    settle_steps: int = 2
    """Untimed steps at the beginning of each block."""
    boundary: str = "step_device_resident"

    def __post_init__(self) -> None:
        for name, least in (
            ("min_samples", 1),
            ("max_samples", 1),
            ("warmup_steps", 1),
            ("settle_steps", 0),
            ("duration_s", 0),
            ("max_duration_s", 0),
        ):
            value = getattr(self, name)
            if not least <= value < math.inf:
                raise UsageError(f"`{name}` must be {least} or more, but is {value} instead.")
        if self.max_samples < self.min_samples:
            raise UsageError(
                f"`max_samples` {self.max_samples} is below `min_samples` {self.min_samples}.",
                remedy="Lower `--min-samples` or raise `--max-samples`.",
            )
        if self.boundary not in BOUNDARIES:
            raise UsageError(f"`{self.boundary}` is no timing boundary; there is {', '.join(BOUNDARIES)}.")


@dataclass(frozen=True)
class Contender:
    """A runtime that takes part."""

    runtime: Runtime
    is_reference: bool = False
    """True for the FP32 eager model from the checkpoint, against which the others' perplexities are checked."""


def measure(
    contenders: Sequence[Contender],
    workload: Workload,
    settings: BenchSettings,
    *,
    clock: Clock = time.perf_counter_ns,
    progress: Progress | None = None,
) -> list[Row]:
    """Measure all contenders at the workload's batch size and return their rows, in the order given.

    Raises UsageError if a runtime is built for another segment length than the workload's, or there is more than one reference.
    """
    for contender in contenders:
        if contender.runtime.info.tgt_len != workload.tgt_len:
            raise UsageError(f"A runtime of `tgt_len` {contender.runtime.info.tgt_len} cannot read segments of {workload.tgt_len} tokens.")
    if sum(contender.is_reference for contender in contenders) > 1:
        raise UsageError("A benchmark has one reference at most.")
    lanes = [_Lane(contender, workload, clock) for contender in contenders]

    fill_steps = max(math.ceil(lane.runtime.info.mem_len / workload.tgt_len) for lane in lanes)
    warmup_steps = max(settings.warmup_steps, fill_steps)
    slowest_ms = 0.0
    for lane in lanes:
        warmup_ms = [lane.step() for _ in range(warmup_steps)]
        slowest_ms = max(slowest_ms, statistics.median(warmup_ms[len(warmup_ms) // 2 :]))
    n = samples_for(slowest_ms, settings)

    blocks = block_sizes(n)
    steps_done, steps_in_all = 0, len(lanes) * (n + settings.settle_steps * len(blocks))
    for turn, block in enumerate(blocks):
        first = turn % len(lanes)
        for lane in lanes[first:] + lanes[:first]:
            for _ in range(settings.settle_steps):
                lane.step()
            for _ in range(block):
                lane.timed_step()
            steps_done += settings.settle_steps + block
            if progress is not None:
                progress(steps_done, steps_in_all)

    notes = []
    if fill_steps > workload.steps_per_pass:
        period = f"{workload.steps_per_pass} steps" if workload.steps_per_pass > 1 else "step"
        notes.append(f"the text starts anew every {period}, before a memory of {fill_steps} segments is full")
    if workload.is_padded:
        notes.append("the text does not fill one segment of all streams: part of each step is padding, which tokens_per_s leaves out")
    return verify([lane.row(settings, notes) for lane in lanes])


def samples_for(slowest_ms: float, settings: BenchSettings) -> int:
    """Return the number of timed steps, the same for all: enough for `min_samples` and for the slowest to run `duration_s`.

    A model too slow for that within `max_duration_s` gets fewer, but no fewer than 10 (or `min_samples`): its percentiles then carry notes.
    """
    if slowest_ms <= 0:
        return settings.max_samples
    wanted = max(settings.min_samples, math.ceil(settings.duration_s * 1e3 / slowest_ms))
    affordable = max(min(10, settings.min_samples), math.floor(max(settings.duration_s, settings.max_duration_s) * 1e3 / slowest_ms))
    return min(wanted, affordable, settings.max_samples)


def block_sizes(n: int) -> list[int]:
    """Cut n timed steps into blocks: about ten, of 50 steps at most, whose sizes differ by one at most."""
    count = max(min(10, n), math.ceil(n / 50))
    return [n // count + (i < n % count) for i in range(count)]


def verify(rows: Sequence[Row]) -> list[Row]:
    """Return the rows with their perplexity compared to the reference's; without a reference they stay unverified (None).

    The relative difference of the perplexities may be as large as parity's bound on the mean nll. A row of other lengths than the
    reference computes something else, and one of a precision without a bound cannot be judged: they stay unverified too. A row whose
    nll is not a finite number has failed, reference or not.
    """
    reference = next((row for row in rows if row.is_reference), None)
    return [_verified(row, reference) for row in rows]


def _verified(row: Row, reference: Row | None) -> Row:
    nll = (reference or row).nll_nats_per_token
    measured = tolerance_for(row.dtype, memory_dtype=row.memory_dtype)
    tolerance = None if measured is None else measured.mean_bound(nll or 0.0)
    if row.nll_nats_per_token is None or row.perplexity is None:
        return dataclasses.replace(row, verified=False, tolerance=tolerance)
    if reference is None or tolerance is None or row.lengths != reference.lengths:
        return row
    if reference.nll_nats_per_token is None:
        return dataclasses.replace(row, verified=False, tolerance=tolerance)
    difference = math.expm1(min(row.nll_nats_per_token - reference.nll_nats_per_token, 700.0))
    return dataclasses.replace(row, perplexity_rel_diff=difference, verified=abs(difference) <= tolerance, tolerance=tolerance)


class _Lane:
    """One contender on its way through the text: its own memory, its own place, its samples and its sum of nll."""

    def __init__(self, contender: Contender, workload: Workload, clock: Clock) -> None:
        self.contender = contender
        self.runtime = contender.runtime
        self.workload = workload
        self.clock = clock
        self.memory: Any = None
        self.steps = 0
        self.samples_ms: list[float] = []
        self.nll_nats_sum = 0.0
        self.n_tokens = 0

    def step(self) -> float:
        """Run one step, forget what it computed, and return its milliseconds."""
        return self._step()[0]

    def timed_step(self) -> None:
        """Run one step and keep its time and the nll of its counted tokens."""
        elapsed_ms, nll_BT, counted_BT = self._step()
        # Taken before the next step, which may overwrite it; and after the clock was read.
        nll = np.asarray(nll_BT.detach().cpu(), dtype=np.float64)
        self.nll_nats_sum += float(nll[counted_BT].sum())
        self.n_tokens += int(counted_BT.sum())
        self.samples_ms.append(elapsed_ms)

    def _step(self) -> tuple[float, Any, Any]:
        if self.workload.starts_cold(self.steps):
            self.memory = self.runtime.initial_memory(self.workload.batch_size)
        segment = self.workload.segment(self.steps)
        input_ids_BT, target_ids_BT = self.workload.tensors(segment, self.runtime.info.device)
        self.steps += 1

        self.runtime.synchronize()
        began = self.clock()
        output = self.runtime.step(input_ids_BT, target_ids_BT, self.memory)
        self.runtime.synchronize()
        elapsed_ms = (self.clock() - began) / 1e6

        self.memory = output.memory
        return elapsed_ms, output.nll_BT, segment.counted_BT

    def row(self, settings: BenchSettings, notes: Sequence[str]) -> Row:
        info = self.runtime.info
        seconds = math.fsum(self.samples_ms) / 1e3
        mean_nll = self.nll_nats_sum / self.n_tokens if self.n_tokens else math.nan
        ppl = perplexity(mean_nll)
        return Row(
            runtime=info.name,
            provider=info.provider,
            device=info.device,
            dtype=info.dtype,
            memory=info.memory,
            memory_dtype=info.memory_dtype,
            compute=info.compute,
            batch_size=self.workload.batch_size,
            tgt_len=info.tgt_len,
            mem_len=info.mem_len,
            clamp_len=info.config.clamp_len,
            same_length=info.config.same_length,
            boundary=settings.boundary,
            latency=LatencySummary.of(self.samples_ms, (*STANDARD_PERCENTILES, *settings.percentiles)),
            samples_ms=tuple(self.samples_ms),
            tokens_per_s=self.n_tokens / seconds if seconds else 0.0,
            n_tokens=self.n_tokens,
            nll_nats_per_token=mean_nll if math.isfinite(mean_nll) else None,
            perplexity=ppl if math.isfinite(ppl) else None,
            is_reference=self.contender.is_reference,
            artifact=ArtifactName(Path(info.origin).name, info.manifest_sha256) if info.manifest_sha256 else None,
            checkpoint_sha256=info.checkpoint_sha256,
            notes=tuple(notes),
        )
