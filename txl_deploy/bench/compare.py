"""Whether one measurement is faster than another: the ratio of their latencies with its interval, for rows that may be compared at all.

Rows of one interleaved run are compared turn by turn, since what the machine did in a turn hit both; rows of two files by the intervals
of each. Knows which rows mean the same thing; who asks, and what is printed, is the command's business.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from txl_deploy.bench.result import BenchResult, Row
from txl_deploy.bench.stats import Interval, percentile, ratio_interval
from txl_deploy.bootstrap import RESAMPLES, SEED
from txl_deploy.distributions import t_quantile
from txl_train.errors import UsageError, ValidationError

Verdict = Literal["faster", "slower", "no difference"]

SCHEMA, SCHEMA_VERSION = "txl.benchmark_comparison", 1
"""Of the document that `txl bench compare --out` writes."""

LEAST_TURNS = 8
"""Turns that a paired comparison needs: the spread between fewer is known too badly."""

MAX_REGRESSION = 0.02
"""Slower by how much is let pass, unless another share is named: what two runs of one program differ by on an idle machine."""

MACHINE = ("cpu", "cores", "cores_usable", "threads", "device")
"""What of the environment two files must have in common."""

TEXT = ("dataset", "split", "corpus_sha256", "n_tokens")
"""What of the workload they must have in common."""


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """Latency of a new row (b) over that of an old one (a): below 1, the new one is faster."""

    quantity: str
    """`p50`, `p99`, …, or `mean`."""
    ratio: float
    interval_95: Interval
    n_a: int
    n_b: int
    paired: bool
    """Whether the two took turns in one run, and turns were compared with each other."""
    max_regression: float = MAX_REGRESSION
    """How much slower the new one may be, as a share."""

    @property
    def verdict(self) -> Verdict:
        """What the interval says: one that holds 1 is no difference that was seen."""
        low, high = self.interval_95
        return "faster" if high < 1 else "slower" if low > 1 else "no difference"

    @property
    def regression(self) -> bool:
        """Whether the whole interval lies above 1 + `max_regression`: slower by more than is let pass, beyond chance."""
        return self.interval_95[0] > 1 + self.max_regression

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {**asdict(self), "interval_95": list(self.interval_95), "verdict": self.verdict, "regression": self.regression}


@dataclass(frozen=True)
class Pair:
    """Two rows of the same thing, an old and a new one, and how they compare; one of them is None where only one file has it."""

    old: Row | None
    new: Row | None
    ratio: Ratio | None
    reason: str = ""
    """Why there is no ratio."""

    @property
    def rows(self) -> tuple[Row, ...]:
        """The rows there are, at least one, the old one first."""
        return tuple(row for row in (self.old, self.new) if row is not None)

    @property
    def is_alone(self) -> bool:
        """True for a row that only one file has."""
        return self.old is None or self.new is None


def compare_paired(a: Row, b: Row, *, p: float | None = 50, max_regression: float = MAX_REGRESSION) -> Ratio:
    """Compare two rows of one interleaved run: `b` over `a`, for the p-th percentile, or the mean where `p` is None.

    Whole turns are drawn, the same ones of both (a paired block bootstrap), and the drawn logarithms of the ratio are widened by Student's
    t for as many turns, as few as there are.

    Raises:
        ValidationError: the rows have no turns in common, or fewer than LEAST_TURNS.
    """
    if not a.block_sizes or a.block_sizes != b.block_sizes:
        raise ValidationError(
            f"{_name(a)} and {_name(b)} did not take turns, so they cannot be paired.",
            remedy="Measure both in one run: `txl bench --artifact A --artifact B --ab`.",
        )
    turns = len(a.block_sizes)
    if turns < LEAST_TURNS:
        raise ValidationError(
            f"{_name(a)} and {_name(b)} took {turns} turns, but a paired comparison needs {LEAST_TURNS}.",
            remedy="Measure longer with `--duration` or `--min-samples`.",
        )
    cuts = np.cumsum(a.block_sizes)[:-1]
    blocks_a, blocks_b = (np.split(np.asarray(row.samples_ms, dtype=np.float64), cuts) for row in (a, b))
    point = _level(np.asarray(b.samples_ms), p) / _level(np.asarray(a.samples_ms), p)
    drawn = np.random.default_rng(SEED).integers(0, turns, (RESAMPLES, turns))
    logs = np.log([_level(_joined(blocks_b, choice), p) / _level(_joined(blocks_a, choice), p) for choice in drawn])
    low, high = np.quantile(logs, [0.025, 0.975])
    stretch = t_quantile(0.975, turns - 1) / t_quantile(0.975, math.inf) * math.sqrt(turns / (turns - 1))
    center = math.log(point)
    interval = (math.exp(center + stretch * min(low - center, 0.0)), math.exp(center + stretch * max(high - center, 0.0)))
    n_a, n_b = len(a.samples_ms), len(b.samples_ms)
    return Ratio(quantity=_quantity(p), ratio=point, interval_95=interval, n_a=n_a, n_b=n_b, paired=True, max_regression=max_regression)


def compare_rows(a: Row, b: Row, *, p: float | None = 50, max_regression: float = MAX_REGRESSION) -> Ratio:
    """Compare rows of two runs: `b` over `a`, for the p-th percentile, or the mean where `p` is None, each by its own interval.

    Raises:
        ValidationError: one has too few samples, or they resemble each other too much, for an interval.
    """
    if p is None:
        interval = _ratio_of_means(a, b)
        point = b.latency.mean_ms / a.latency.mean_ms
    else:
        interval = ratio_interval(b.samples_ms, a.samples_ms, p)
        point = percentile(b.samples_ms, p) / percentile(a.samples_ms, p)
    if interval is None:
        raise ValidationError(
            f"{_name(a)} or {_name(b)} has no interval of {_quantity(p)}: too few samples, or too much alike.",
            remedy="Measure longer with `--duration` or `--min-samples`.",
        )
    n_a, n_b = len(a.samples_ms), len(b.samples_ms)
    return Ratio(quantity=_quantity(p), ratio=point, interval_95=interval, n_a=n_a, n_b=n_b, paired=False, max_regression=max_regression)


def match(old: BenchResult, new: BenchResult, *, across_machines: bool = False) -> list[tuple[Row, Row]]:
    """Return the rows of two files that are of the same thing: runtime, type, memory, batch size and processes.

    Raises:
        ValidationError: they are of other machines (unless `across_machines`), texts, lengths or timing boundaries, or share no row.
    """
    if not across_machines:
        _same("machine", old.environment, new.environment, MACHINE, "Measure on the same machine, or allow it with `--across-machines`.")
        gpus = [[gpu.get("name") for gpu in result.environment.get("gpus") or ()] for result in (old, new)]
        if gpus[0] != gpus[1]:
            raise ValidationError(
                f"The files are of different machines: GPUs {gpus[0]} and {gpus[1]}.", remedy="`--across-machines` allows it."
            )
    _same("text", old.workload, new.workload, TEXT, "Measure both on the same text.")
    found = [(a, b) for a in old.rows for b in new.rows if _identity(a) == _identity(b)]
    twice = next((a for i, (a, b) in enumerate(found) if any(a is c or b is d for c, d in found[:i])), None)
    if twice is not None:
        raise ValidationError(f"{_name(twice)} stands in a file more than once, so it is not clear which rows belong together.")
    for a, b in found:
        if a.boundary != b.boundary:
            raise ValidationError(f"{_name(a)} was timed by different boundaries: {a.boundary} and {b.boundary}.")
        if a.lengths != b.lengths:
            raise ValidationError(f"{_name(a)} was measured at different lengths: {_lengths(a)} and {_lengths(b)}.")
    if not found:
        raise ValidationError(
            f"The files have no row in common: {', '.join(map(_name, old.rows))} against {', '.join(map(_name, new.rows))}.",
            remedy="Compare files of the same runtimes, types and batch sizes.",
        )
    return found


def compare_results(
    old: BenchResult, new: BenchResult, *, p: float | None = 50, max_regression: float = MAX_REGRESSION, across_machines: bool = False
) -> list[Pair]:
    """Compare all that two files have in common, then list what only one of them has.

    Errors as `match`; rows that are not to be believed, or that have no partner, get a reason instead of a ratio.
    """
    found = match(old, new, across_machines=across_machines)
    pairs = [_compared(a, b, p, max_regression) for a, b in found]
    matched = {id(row) for pair in found for row in pair}
    pairs += [Pair(row, None, None, "only the old file has it") for row in old.rows if id(row) not in matched]
    return pairs + [Pair(None, row, None, "only the new file has it") for row in new.rows if id(row) not in matched]


def _compared(a: Row, b: Row, p: float | None, max_regression: float) -> Pair:
    for which, row in (("old", a), ("new", b)):
        if row.valid is False:
            return Pair(a, b, None, f"the {which} row is INVALID: {'; '.join(row.invalid_reasons)}")
        if row.verified is False:
            return Pair(a, b, None, f"the perplexity of the {which} row is not its checkpoint's")
    try:
        return Pair(a, b, compare_rows(a, b, p=p, max_regression=max_regression))
    except ValidationError as error:
        return Pair(a, b, None, error.message.rstrip("."))


def parse_threshold(text: str) -> float:
    """Read "2%" or "0.02" as 0.02. UsageError where it is neither, or negative."""
    number = text.strip().removesuffix("%")
    try:
        value = float(number) / (100 if number != text.strip() else 1)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise UsageError(f"`{text}` is no share.", remedy="Write it like `--max-regression 2%`.")
    return value


def _level(samples: NDArray[np.float64], p: float | None) -> float:
    return float(samples.mean()) if p is None else percentile(samples, p)


def _joined(blocks: Sequence[NDArray[np.float64]], choice: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.concatenate([blocks[i] for i in choice])


def _ratio_of_means(a: Row, b: Row) -> Interval | None:
    of_a, of_b = a.latency.mean_interval_ms, b.latency.mean_interval_ms
    if of_a is None or of_b is None or min(of_a[0], of_b[0]) <= 0:
        return None
    mean_a, mean_b = a.latency.mean_ms, b.latency.mean_ms
    down = math.hypot(math.log(mean_b / of_b[0]), math.log(of_a[1] / mean_a))
    up = math.hypot(math.log(of_b[1] / mean_b), math.log(mean_a / of_a[0]))
    return mean_b / mean_a * math.exp(-down), mean_b / mean_a * math.exp(up)


def _quantity(p: float | None) -> str:
    return "mean" if p is None else f"p{p:g}"


def _identity(row: Row) -> tuple[object, ...]:
    return (row.runtime, row.provider, row.dtype, row.memory, row.memory_dtype, row.batch_size, row.processes, row.is_reference)


def _lengths(row: Row) -> str:
    return f"tgt {row.tgt_len}, mem {row.mem_len}, clamp {row.clamp_len}{', same_length' if row.same_length else ''}"


def _name(row: Row) -> str:
    return f"{row.runtime} {row.dtype} at batch size {row.batch_size}"


def _same(what: str, old: Any, new: Any, names: Sequence[str], remedy: str) -> None:
    for name in names:
        if old.get(name) != new.get(name):
            raise ValidationError(
                f"The files are of different {what}s: `{name}` is {old.get(name)} in one and {new.get(name)} in the other.", remedy=remedy
            )
