"""Times several runtimes side by side at one batch size, on the same tokens and by one clock, and checks what was timed.

The runtimes take turns in blocks of steps, so that whatever drifts on the machine (heat, clock rates, other processes) hits all of them
alike. The order rotates from block to block, and each block begins with a few steps that are not timed: they pay for the caches and
thread pools that the runtime before left behind. From the same cold start all runtimes run the same number of steps over the same tokens,
so the perplexities of their timed steps can be compared. They warm up in turns too, until their memories are full and none becomes faster
or slower any more.

Several processes, each with a device of its own, share the streams: they begin each step together, and it lasts until the last of them is
done. They exchange what they measured between the steps, never while the clock runs.

Knows runtimes by their protocol only and never asks which one it holds. What lies within the clock is up to the boundary. Imports the
standard library and numpy.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from txl_deploy.bench.boundaries import BOUNDARIES, check_boundary, open_boundary
from txl_deploy.bench.environment import disturbances
from txl_deploy.bench.result import ArtifactName, Energy, Proof, Row
from txl_deploy.bench.stability import is_steady, judge, stability
from txl_deploy.bench.stats import STANDARD_PERCENTILES, LatencySummary
from txl_deploy.bench.verdict import ExpectedNll, proof_of, verify, wrong_model
from txl_train.errors import UsageError
from txl_train.metrics import perplexity

if TYPE_CHECKING:
    from txl_deploy.bench.energy import EnergyMeter
    from txl_deploy.bench.workload import Workload
    from txl_deploy.runtimes.base import Runtime

__all__ = [
    "BOUNDARIES",
    "BenchSettings",
    "Clock",
    "Contender",
    "ExpectedNll",
    "Processes",
    "Progress",
    "block_sizes",
    "measure",
    "samples_for",
    "verify",
]

Clock = Callable[[], int]
"""Returns nanoseconds from some fixed point."""

Progress = Callable[[int, int], None]
"""Is told how many steps of how many are done."""


class Processes(Protocol):
    """The processes that measure together, as this one sees them: `txl_train.distributed.World`."""

    @property
    def rank(self) -> int:
        """This process, from 0."""
        ...

    @property
    def size(self) -> int:
        """Number of processes."""
        ...

    def share(self, n: int) -> slice:
        """Return the part of `n` streams that this process reads. Raises UsageError if they cannot be divided equally."""
        ...

    def sum(self, values: Sequence[float]) -> list[float]:
        """Return the sums over all processes of each value. All must call it with as many values; it returns when all have."""
        ...


@dataclass(frozen=True)
class _Alone:
    rank: int = 0
    size: int = 1

    def share(self, n: int) -> slice:
        return slice(0, n)

    def sum(self, values: Sequence[float]) -> list[float]:
        return list(values)


@dataclass(frozen=True, kw_only=True)
class BenchSettings:
    """How long and how often to measure."""

    percentiles: tuple[float, ...] = STANDARD_PERCENTILES
    duration_s: float = 10.0
    """Timed seconds that the slowest runtime gets at each batch size, as estimated in its warm-up."""
    min_duration_s: float = 3.0
    """From a row's first timed step to its last, seconds, the turns of others included: a shorter row is invalid."""
    min_samples: int = 662
    """Timed steps at least; 662 is what a p99 needs (`stats.minimum_samples`)."""
    max_samples: int = 20000
    """Timed steps at most."""
    max_duration_s: float = 60.0
    """Timed seconds of the slowest runtime at most, where `min_samples` would take longer; `duration_s` where that is more."""
    warmup_steps: int = 10
    """Steps before the clock counts, at least; more where the memory needs more to fill, and until the timing is steady."""
    max_warmup_steps: int = 1000
    """Steps of a warm-up that does not become steady, at most; more only where the memory needs more to fill, or `warmup_steps` is more."""
    max_warmup_s: float = 20.0
    """Seconds after which such a warm-up ends, of the slowest runtime."""
    settle_steps: int = 2
    """Untimed steps at the beginning of each block."""
    energy_s: float = 2.0
    """Seconds of each runtime's steps after the timed ones over which its energy is counted, where there is a meter; 0 leaves it out."""
    boundary: str = "step_device_resident"

    def __post_init__(self) -> None:
        for name, least in (
            ("min_samples", 1),
            ("max_samples", 1),
            ("warmup_steps", 1),
            ("max_warmup_steps", 1),
            ("settle_steps", 0),
            ("duration_s", 0),
            ("min_duration_s", 0),
            ("max_duration_s", 0),
            ("max_warmup_s", 0),
            ("energy_s", 0),
        ):
            value = getattr(self, name)
            if not least <= value < math.inf:
                raise UsageError(f"`{name}` must be {least} or more, but is {value} instead.")
        if self.max_samples < self.min_samples:
            raise UsageError(
                f"`max_samples` {self.max_samples} is below `min_samples` {self.min_samples}.",
                remedy="Lower `--min-samples` or raise `--max-samples`.",
            )
        check_boundary(self.boundary)


@dataclass(frozen=True)
class Contender:
    """A runtime that takes part."""

    runtime: Runtime
    is_reference: bool = False
    """True for the FP32 eager model from the checkpoint, against which the others' perplexities are checked."""
    proof: Proof | None = None
    """Why it may be believed to be its checkpoint's model, as far as it is known before measuring."""
    expected: ExpectedNll | None = None
    """What its receipt says of each segment; None where there is none for this text and these lengths."""


def measure(
    contenders: Sequence[Contender],
    workload: Workload,
    settings: BenchSettings,
    *,
    clock: Clock = time.perf_counter_ns,
    progress: Progress | None = None,
    world: Processes | None = None,
    environment: Callable[[], Mapping[str, Any]] | None = None,
    meter_for: Callable[[str], EnergyMeter | None] | None = None,
) -> list[Row]:
    """Measure all contenders at the workload's batch size and return their rows, judged, in the order given.

    Args:
        world: processes that each call this, with the same arguments but runtimes on devices of their own; the workload's batch size is
            that of all of them. Each gets the rows of all; those of rank 0 also know what was wrong with the machine.
        environment: tells the state of the machine (`environment.describe_state`), before and after; None leaves it out of the verdict.
        meter_for: finds the energy meter of a device (`energy.meter_for`); None means that energy is not measured.

    Raises:
        UsageError: a runtime is built for another segment length than the workload's, there is more than one reference, or the streams
            cannot be divided among the processes.
    """
    for contender in contenders:
        if contender.runtime.info.tgt_len != workload.tgt_len:
            raise UsageError(f"A runtime of `tgt_len` {contender.runtime.info.tgt_len} cannot read segments of {workload.tgt_len} tokens.")
    if sum(contender.is_reference for contender in contenders) > 1:
        raise UsageError("A benchmark has one reference at most.")
    world = world or _Alone()
    own = workload if world.size == 1 else dataclasses.replace(workload, streams=world.share(workload.batch_size))
    lanes = [_Lane(contender, own, settings, clock, world) for contender in contenders]

    before = None if environment is None else environment()
    fill_steps = max(math.ceil(lane.runtime.info.mem_len / workload.tgt_len) for lane in lanes)
    slowest_ms = _warm_up(lanes, settings, fill_steps)
    blocks = block_sizes(samples_for(slowest_ms, settings))
    _take_turns(lanes, blocks, settings.settle_steps, progress)
    after = None if environment is None else environment()

    reasons: list[str] = []
    if before is not None and after is not None:
        own_cpu_s = sum(_of_all([after["process_cpu_s"] - before["process_cpu_s"]], world)[:, 0])
        devices = {lane.runtime.info.device for lane in lanes}
        beside = _of_all([float(lanes[0].runtime.info.device.partition(":")[2] or 0)], world)[:, 0]
        sharing = int((beside == beside[world.rank]).sum())
        disturbed = disturbances(before, after, own_cpu_s=own_cpu_s, devices=devices, processes_per_gpu=sharing)
        elsewhere = bool(_of_all([float(len(disturbed))], world)[:, 0].any()) and not disturbed
        reasons += [*disturbed, *(["the device or the machine of another process was disturbed"] if elsewhere else [])]
    if fill_steps > workload.steps_per_pass:
        period = f"{workload.steps_per_pass} steps" if workload.steps_per_pass > 1 else "step"
        reasons.append(f"the text starts anew every {period}, before a memory of {fill_steps} segments is full")
    if workload.is_padded:
        reasons.append("the text does not fill one segment of all streams: part of each step is padding, which tokens_per_s leaves out")
    rows = verify([lane.row(blocks) for lane in lanes])
    energies = [None if meter_for is None else lane.energy(meter_for(lane.runtime.info.device)) for lane in lanes]
    return [lane.judged(dataclasses.replace(row, energy=energy), settings, reasons) for lane, row, energy in zip(lanes, rows, energies)]


def _warm_up(lanes: Sequence[_Lane], settings: BenchSettings, fill_steps: int) -> float:
    """Run steps until all memories are full and all timings steady, as many of each runtime; return the slowest's median, ms."""
    if fill_steps > settings.warmup_steps:
        for lane in lanes:
            lane.fill(fill_steps)
    count = settings.warmup_steps
    most = max(count, settings.max_warmup_steps)
    while True:
        for lane in lanes:
            lane.warm_up(count)
        done = len(lanes[0].warmup_ms)
        seconds = max(math.fsum(lane.warmup_ms) for lane in lanes) / 1e3
        if done >= most or seconds >= settings.max_warmup_s or all(is_steady(lane.warmup_ms) for lane in lanes):
            break
        count = min(settings.warmup_steps, most - done)
    return max(statistics.median(lane.warmup_ms[done // 2 :]) for lane in lanes)


def _take_turns(lanes: Sequence[_Lane], blocks: Sequence[int], settle_steps: int, progress: Progress | None) -> None:
    """Time blocks of steps of each runtime in turn, the first of a turn being another one each time."""
    steps_done, steps_in_all = 0, len(lanes) * (sum(blocks) + settle_steps * len(blocks))
    for turn, block in enumerate(blocks):
        first = turn % len(lanes)
        for lane in [*lanes[first:], *lanes[:first]]:
            for _ in range(settle_steps):
                lane.step()
            for _ in range(block):
                lane.timed_step()
            steps_done += settle_steps + block
            if progress is not None:
                progress(steps_done, steps_in_all)


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


def _of_all(values: Sequence[float], world: Processes) -> NDArray[np.float64]:
    """Return the values of every process, [processes, values]. All must call it with as many."""
    slots = np.zeros((world.size, len(values)))
    slots[world.rank] = values
    return np.asarray(world.sum(slots.reshape(-1).tolist()), dtype=np.float64).reshape(slots.shape)


@dataclass(frozen=True)
class _Step:
    """What one step took and computed, in this process."""

    ms: float
    enqueue_ms: float
    """Until the call returned."""
    nll_BT: Any
    counted_BT: NDArray[np.bool_]


class _Lane:
    """One contender on its way through the text: its own memory, its own place, its times and its sums of nll."""

    def __init__(self, contender: Contender, workload: Workload, settings: BenchSettings, clock: Clock, world: Processes) -> None:
        self.contender = contender
        self.runtime = contender.runtime
        self.workload = workload
        self.settings = settings
        self.clock = clock
        self.world = world
        self.boundary = open_boundary(settings.boundary, contender.runtime)
        self.memory: Any = None
        self.steps = 0
        self.warmup_ms: list[float] = []
        """Of the slowest process."""
        self._timed: list[tuple[float, float, int, float]] = []
        """Milliseconds, those until the call returned, counted tokens and sum of their nll, of each timed step in this process."""
        self._numbers: list[int] = []
        """Of the timed steps, from the cold start on."""
        self._first_ns = self._last_ns = 0
        self._reasons: list[str] = []
        self._not_finite: str | None = None
        """The first loss that was not finite, of this process."""

    def fill(self, count: int) -> None:
        """Read the text of so many steps, from the cold start on, in fewer and longer ones where the runtime can."""
        self.memory, self.steps = self.boundary.fill(self.workload, count)
        while self.steps < count:
            self._step()

    def warm_up(self, count: int) -> None:
        """Run steps whose times only tell when to begin."""
        times = [self._step().ms for _ in range(count)]
        self.warmup_ms += _of_all(times, self.world).max(axis=0).tolist()

    def step(self) -> None:
        """Run one step and forget it."""
        self._step()

    def timed_step(self) -> None:
        """Run one step and keep its time and the nll of its counted tokens."""
        number = self.steps
        before_ns = self.clock()
        done = self._step()
        # Taken before the next step, which may overwrite it; and after the clock was read.
        nll = np.asarray(done.nll_BT.detach().cpu(), dtype=np.float64)
        if not self._timed:
            self._first_ns = before_ns
        self._last_ns = self.clock()
        self._numbers.append(number)
        self._timed.append((done.ms, done.enqueue_ms, int(done.counted_BT.sum()), float(nll[done.counted_BT].sum())))
        if self._not_finite is None and not math.isfinite(self._timed[-1][3]):
            stream = int(np.flatnonzero((~np.isfinite(nll) & done.counted_BT).any(axis=1))[0])
            self._not_finite = f"the loss of stream {stream} in segment {number} is not finite"

    def _step(self) -> _Step:
        if self.workload.starts_cold(self.steps):
            self.memory = self.boundary.cold(self.workload.n_streams)
        segment = self.workload.segment(self.steps)
        input_ids_BQ, target_ids_BT = self.boundary.tokens(self.workload, segment)
        self.steps += 1

        self.runtime.synchronize()
        if self.world.size > 1:
            self.world.sum([0.0])  # meet the others
        began = self.clock()
        output = self.boundary.step(input_ids_BQ, target_ids_BT, self.memory)
        returned = self.clock()
        self.runtime.synchronize()
        ended = self.clock()

        self.memory = output.memory
        return _Step((ended - began) / 1e6, (returned - began) / 1e6, output.nll_BT, segment.counted_BT)

    def row(self, blocks: Sequence[int]) -> Row:
        """Return what was measured by all processes together, compared with the receipt but not judged."""
        info = self.runtime.info
        columns = _of_all([value for step in self._timed for value in step], self.world).reshape(self.world.size, -1, 4)
        ms, enqueue_ms = columns[:, :, 0].max(axis=0), columns[:, :, 1].max(axis=0)
        counts, sums = columns[:, :, 2].sum(axis=0), columns[:, :, 3].sum(axis=0)
        samples = tuple(ms.tolist())
        seconds, n_tokens = math.fsum(samples) / 1e3, int(counts.sum())
        mean_nll = math.fsum(sums) / n_tokens if n_tokens and np.isfinite(sums).all() else math.nan
        ppl = perplexity(mean_nll)
        expected = self.contender.expected
        compared = None if expected is None else expected.compare(self.workload, self._numbers, counts, sums)
        self._reasons = [compared.told] if compared is not None and compared.agrees is False else []
        self._reasons = [*([] if self._not_finite is None else [self._not_finite]), *self._reasons]
        latency = LatencySummary.of(samples, (*STANDARD_PERCENTILES, *self.settings.percentiles))
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
            ext_len=info.config.ext_len,
            same_length_rule=info.config.same_length_rule,
            boundary=self.settings.boundary,
            latency=latency,
            samples_ms=samples,
            tokens_per_s=n_tokens / seconds if seconds else 0.0,
            n_tokens=n_tokens,
            nll_nats_per_token=mean_nll if math.isfinite(mean_nll) else None,
            perplexity=ppl if math.isfinite(ppl) else None,
            is_reference=self.contender.is_reference,
            verified=None if compared is None else compared.agrees,
            artifact=ArtifactName(Path(info.origin).name, info.manifest_sha256) if info.manifest_sha256 else None,
            checkpoint_sha256=info.checkpoint_sha256,
            notes=() if compared is None or compared.agrees is False else (compared.told,),
            processes=self.world.size,
            block_sizes=tuple(blocks),
            stability=stability(samples, self.warmup_ms),
            enqueue_ms_p50=statistics.median(enqueue_ms.tolist()) if info.returns_early else None,
        )

    def energy(self, meter: EnergyMeter | None) -> Energy | None:
        """Run steps for `energy_s` more seconds and return what they used, of all processes; None where one of them has no meter.

        Steps of their own, since counters are updated too seldom for blocks of other runtimes' steps in between.
        """
        if self.settings.energy_s <= 0 or not _of_all([meter is not None], self.world).all():
            return None
        assert meter is not None
        median_ms = _of_all([statistics.median(step[0] for step in self._timed)], self.world).max()
        count = min(max(1, math.ceil(self.settings.energy_s * 1e3 / median_ms)) if median_ms else 1, self.settings.max_samples)
        for _ in range(max(self.settings.settle_steps, count // 10)):  # the counter is behind by a tenth of a second
            self._step()
        n_tokens, began, first = 0, self.clock(), _joules(meter)
        for _ in range(count):
            n_tokens += int(self._step().counted_BT.sum())
        used = _of_all([_joules(meter) - first, n_tokens, (self.clock() - began) / 1e9], self.world)
        joules = float(used[:, 0].max() if meter.is_shared else used[:, 0].sum())
        tokens, seconds = used[:, 1].sum(), used[:, 2].max()
        if not (joules > 0 and tokens and seconds > 0):
            return None
        return Energy(joules_per_token=float(joules / tokens), mean_watts=float(joules / seconds), source=meter.source)

    def judged(self, row: Row, settings: BenchSettings, reasons: Sequence[str]) -> Row:
        """Return the row with its proof and the verdict on its figures; `reasons` concern all rows of the run."""
        assert row.stability is not None
        span_s = _of_all([(self._last_ns - self._first_ns) / 1e9], self.world).max()
        found = judge(
            row.latency,
            row.stability,
            percentiles=settings.percentiles,
            duration_s=float(span_s),
            min_duration_s=settings.min_duration_s,
        )
        wrong = wrong_model(row)
        if row.verified is None and self.contender.proof is not None and self.contender.proof.kind == "receipt":
            wrong = "the timed steps were compared with nothing: give the checkpoint, or a receipt of this batch size"
        every = (*self._reasons, *([wrong] if wrong else ()), *found, *reasons)
        return dataclasses.replace(row, valid=not every, invalid_reasons=every, proof=proof_of(row, self.contender.proof))


def _joules(meter: EnergyMeter) -> float:
    """Return what the meter reads, nan where it no longer can be read: all processes go on together all the same."""
    try:
        return meter.read_joules()
    except OSError:
        return math.nan
