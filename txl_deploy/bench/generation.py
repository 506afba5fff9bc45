"""Times generation: how long a prompt takes until its first new token is there, and how fast tokens follow.

Generators take turns in blocks, as in `harness`, and each block begins with a generation that is not timed. All go on with the same prompts
by the same seed, so the tokens that were timed can be compared: a row of the same model, lengths and type as the first generator's whose
tokens are others is invalid. The clock runs in the caller: it is read before the prompt is handed over, and after each round of tokens, one
of every sample.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from txl_deploy.bench.environment import disturbances
from txl_deploy.bench.harness import Clock, block_sizes
from txl_deploy.bench.result import Stability
from txl_deploy.bench.stability import is_steady, judge, stability
from txl_deploy.bench.stats import LatencySummary
from txl_deploy.generate import Generator
from txl_deploy.sampling import Sampling
from txl_train.errors import UsageError
from txl_train.files import whole_or_absent

SCHEMA = "txl.generation_benchmark"
SCHEMA_VERSION = 1
MOST_WARMUPS = 3
FEWEST = 10
"""Generations that each generator is given where there is no time for more, if as many were asked for."""


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """What is generated, and how often."""

    new_tokens: int
    """Of each sample, 2 at least: the first comes with the prompt, the others one step each."""
    sampling: Sampling
    seed: int
    percentiles: tuple[float, ...]
    min_samples: int
    """Timed generations at least."""
    warmup: int
    """Generations before the clock counts, of each generator; up to MOST_WARMUPS times as many where they are not steady."""
    min_duration_s: float
    """From a row's first timed generation to its last, the turns of others included: a shorter row is invalid."""
    max_duration_s: float
    """Seconds that the slowest generator is timed at most, where `min_samples` would take longer."""

    def __post_init__(self) -> None:
        for name, least in (("new_tokens", 2), ("min_samples", 1), ("warmup", 1), ("min_duration_s", 0), ("max_duration_s", 0)):
            value = getattr(self, name)
            if not least <= value < math.inf:
                raise UsageError(f"`{name}` must be {least} or more, but is {value} instead.")


@dataclass(frozen=True, kw_only=True)
class GenerationRow:
    """One generator at one length of prompt and one number of samples."""

    runtime: str
    provider: str
    device: str
    dtype: str
    mem_len: int
    segment_lens: list[int]
    """Of the segments in which a prompt is read, longest first."""
    checkpoint_sha256: str | None
    manifest_sha256: str | None
    prompt_tokens: int
    samples: int
    """Continuations that are made side by side."""
    new_tokens: int
    """Of each sample."""
    n: int
    """Timed generations."""
    first_token: dict[str, Any]
    """From the prompt to the first token of every sample: percentiles, their intervals and the samples they come from."""
    step: dict[str, Any]
    """The same of each later round of tokens, one of every sample."""
    tokens_per_s: float
    """Samples over the median step: how fast tokens come once the first is there."""
    tokens_per_s_interval_95: list[float] | None
    tokens_per_s_with_prompt: float
    """All tokens over all time, prompts included."""
    stability: dict[str, Stability]
    """Of the first tokens, and of the steps."""
    token_ids: list[list[int]]
    """What every timed generation of this row has drawn, by sample."""
    same_tokens: bool | None
    """Whether these are the first generator's; None for the first itself, and where they need not be: another type, length or cut."""
    first_token_ms: list[float] = field(repr=False)
    step_ms: list[float] = field(repr=False)
    """`new_tokens` - 1 of each generation, one generation after the other."""
    valid: bool = False
    invalid_reasons: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """What sets it apart from other rows."""
        return f"{self.runtime} {self.dtype}, prompt of {self.prompt_tokens}, samples {self.samples}"


class _Lane:
    """One generator and what was measured of it."""

    def __init__(self, generator: Generator, prompt: Sequence[int], samples: int, settings: GenerationSettings, clock: Clock) -> None:
        self.generator, self.prompt, self.samples, self.settings, self.clock = generator, prompt, samples, settings, clock
        self.first_ms: list[float] = []
        self.step_ms: list[float] = []
        self.warmup: list[tuple[float, list[float]]] = []
        self.token_ids: list[list[int]] | None = None
        self.repeatable = True
        self.first_ns = self.last_ns = 0

    def generate(self) -> tuple[float, list[float]]:
        """Generate once: milliseconds to the first token of every sample, and of each round after that."""
        ids: list[list[int]] = [[] for _ in range(self.samples)]
        began = self.clock()
        rounds: list[int] = []
        tokens = self.generator.go_on(
            self.prompt,
            max_tokens=self.settings.new_tokens,
            sampling=self.settings.sampling,
            seed=self.settings.seed,
            samples=self.samples,
        )
        for token in tokens:
            ids[token.sample].append(token.id)
            if token.sample == self.samples - 1:
                rounds.append(self.clock())
        if self.token_ids is None:
            self.token_ids = ids
        self.repeatable = self.repeatable and ids == self.token_ids
        return (rounds[0] - began) / 1e6, [(after - before) / 1e6 for before, after in zip(rounds, rounds[1:])]

    def warm_up(self) -> None:
        self.warmup += [self.generate() for _ in range(self.settings.warmup)]

    @property
    def is_steady(self) -> bool:
        return is_steady([first for first, _ in self.warmup]) and is_steady([ms for _, steps in self.warmup for ms in steps])

    def block(self, count: int) -> None:
        self.generate()  # pays for what the generator before has left in the caches
        for _ in range(count):
            began = self.clock()
            first, steps = self.generate()
            if not self.first_ms:
                self.first_ns = began
            self.last_ns = self.clock()
            self.first_ms.append(first)
            self.step_ms += steps

    def row(self, reference: _Lane | None, disturbed: Sequence[str]) -> GenerationRow:
        settings, info = self.settings, self.generator.step.info
        series = {
            "first_token": (self.first_ms, [first for first, _ in self.warmup]),
            "step": (self.step_ms, [ms for _, steps in self.warmup for ms in steps]),
        }
        summaries = {name: LatencySummary.of(ms, (50, *settings.percentiles)) for name, (ms, _) in series.items()}
        steady = {name: stability(ms, warmup) for name, (ms, warmup) in series.items()}
        assert self.token_ids is not None
        same = None if reference is None or not self._must_agree(reference) else self.token_ids == reference.token_ids
        reasons = [] if self.repeatable else ["generations of one seed have drawn different tokens"]
        if reference is not None and same is False:
            reasons.append(f"its tokens are not those of {reference.generator.step.info.name}, {self._parted(reference)}")
        for name, summary in summaries.items():
            duration_s = (self.last_ns - self.first_ns) / 1e9
            found = judge(
                summary, steady[name], percentiles=settings.percentiles, duration_s=duration_s, min_duration_s=settings.min_duration_s
            )
            reasons += [f"{name.replace('_', ' ')}: {reason}" for reason in found]
        median, interval = summaries["step"].percentile_ms(50), summaries["step"].interval_ms(50)
        seconds = math.fsum([*self.first_ms, *self.step_ms]) / 1e3
        return GenerationRow(
            runtime=info.name,
            provider=info.provider,
            device=info.device,
            dtype=info.dtype,
            mem_len=info.mem_len,
            segment_lens=[*(reader.info.tgt_len for reader in self.generator.readers), 1],
            checkpoint_sha256=info.checkpoint_sha256,
            manifest_sha256=info.manifest_sha256,
            prompt_tokens=len(self.prompt),
            samples=self.samples,
            new_tokens=settings.new_tokens,
            n=len(self.first_ms),
            first_token=summaries["first_token"].to_row(),
            step=summaries["step"].to_row(),
            tokens_per_s=_rate(self.samples, median),
            tokens_per_s_interval_95=None if interval is None else [_rate(self.samples, interval[1]), _rate(self.samples, interval[0])],
            tokens_per_s_with_prompt=_rate(self.samples * settings.new_tokens * len(self.first_ms), seconds * 1e3),
            stability=steady,
            token_ids=self.token_ids,
            same_tokens=same,
            first_token_ms=self.first_ms,
            step_ms=self.step_ms,
            valid=not reasons and not disturbed,
            invalid_reasons=[*reasons, *disturbed],
        )

    def _must_agree(self, other: _Lane) -> bool:
        mine, its = self.generator.step.info, other.generator.step.info
        same_model = (mine.checkpoint_sha256, mine.config) == (its.checkpoint_sha256, its.config) and mine.dtype == its.dtype == "fp32"
        cuts = [[reader.info.tgt_len for reader in lane.generator.readers] for lane in (self, other)]
        cut_matters = len(self.prompt) > mine.mem_len and not mine.config.same_length
        return same_model and (cuts[0] == cuts[1] or not cut_matters)

    def _parted(self, reference: _Lane) -> str:
        pairs = zip(self.token_ids or [], reference.token_ids or [])
        number, (mine, theirs) = next((number, pair) for number, pair in enumerate(pairs) if pair[0] != pair[1])
        at = next(at for at, (one, other) in enumerate(zip(mine, theirs)) if one != other)
        return f"from token {at + 1} of sample {number + 1} on"


def _rate(tokens: int, ms: float) -> float:
    return tokens * 1e3 / ms if ms > 0 else 0.0


def measure(
    generators: Sequence[Generator],
    prompt: Sequence[int],
    samples: int,
    settings: GenerationSettings,
    *,
    clock: Clock = time.perf_counter_ns,
    environment: Callable[[], Mapping[str, Any]] | None = None,
) -> list[GenerationRow]:
    """Go on with one prompt by all generators in turns, and return their rows, judged, in the order given.

    Args:
        environment: tells the state of the machine (`environment.describe_state`), before and after; None leaves it out of the verdict.

    Raises:
        UsageError: a generator cannot make so many samples side by side.
    """
    for generator in generators:
        info = generator.step.info
        if info.max_batch is not None and samples > info.max_batch:
            raise UsageError(
                f"{info.origin or 'The runtime'} makes {info.max_batch} samples side by side at most, not {samples}.",
                remedy="Ask for fewer `--samples`, or export the checkpoint again for a larger batch.",
            )
    lanes = [_Lane(generator, prompt, samples, settings, clock) for generator in generators]
    for _ in range(MOST_WARMUPS):
        for lane in lanes:
            lane.warm_up()
        if all(lane.is_steady for lane in lanes):
            break
    before = None if environment is None else environment()
    slowest_ms = max(min(first + math.fsum(steps) for first, steps in lane.warmup) for lane in lanes)
    affordable = settings.min_samples if slowest_ms <= 0 else math.floor(settings.max_duration_s * 1e3 / slowest_ms)
    for turn, count in enumerate(block_sizes(min(settings.min_samples, max(affordable, FEWEST)))):
        first = turn % len(lanes)
        for lane in [*lanes[first:], *lanes[:first]]:
            lane.block(count)
    after = None if environment is None else environment()
    disturbed: tuple[str, ...] = ()
    if before is not None and after is not None:
        disturbed = disturbances(before, after, devices={generator.step.info.device for generator in generators})
    return [lane.row(lanes[0] if lane is not lanes[0] else None, disturbed) for lane in lanes]


@dataclass(frozen=True, kw_only=True)
class GenerationResult:
    """All that one run of `txl bench generate` found out."""

    command: str
    settings: dict[str, Any]
    environment: dict[str, Any]
    """The machine and its state when measuring began."""
    rows: list[GenerationRow]

    def to_dict(self) -> dict[str, Any]:
        """Return the document as plain values for JSON."""
        return {"schema": SCHEMA, "schema_version": SCHEMA_VERSION, **dataclasses.asdict(self)}

    def write(self, path: Path) -> None:
        """Write the document, whole or not at all. EnvironmentUnfitError if it cannot be written."""
        with whole_or_absent(path) as file:
            file.write(json.dumps(self.to_dict(), allow_nan=False, ensure_ascii=False).encode() + b"\n")

    def lines(self) -> list[str]:
        """Return the rows as a table of Markdown, with 95 % intervals, and the verdict of each."""
        wanted = [50.0, *(p for p in self.settings["percentiles"] if p != 50)]
        header = ["runtime", "dtype", "prompt", "samples", *(f"first token p{p:g} ms" for p in wanted)]
        header += [*(f"step p{p:g} ms" for p in wanted), "tokens/s", "n", "verdict"]
        lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
        for row in self.rows:
            cells = [row.runtime, row.dtype, f"{row.prompt_tokens}", f"{row.samples}"]
            cells += [_shown(series, p) for series in (row.first_token, row.step) for p in wanted]
            cells += [_with_interval(row.tokens_per_s, row.tokens_per_s_interval_95, ",.0f"), f"{row.n}"]
            lines.append(f"| {' | '.join([*cells, 'VALID' if row.valid else 'INVALID'])} |")
        return [*lines, *(f"{row.name}: INVALID: {'; '.join(row.invalid_reasons)}" for row in self.rows if not row.valid)]


def _shown(series: Mapping[str, Any], p: float) -> str:
    return _with_interval(series[f"latency_ms_p{p:g}"], series["latency_ms_intervals_95"][f"p{p:g}"], ".2f")


def _with_interval(value: float, interval: Sequence[float] | None, form: str) -> str:
    return format(value, form) if interval is None else f"{value:{form}} ({interval[0]:{form}} to {interval[1]:{form}})"
