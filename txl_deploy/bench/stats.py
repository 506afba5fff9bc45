"""What a set of latencies says: percentiles with their rule, their interval, and how many samples they need.

Knows numbers only, in milliseconds where a unit is named; where they come from is the harness's business. Imports numpy and the
standard library.

Percentile rule: nearest rank. The p-th percentile of n sorted samples is the one at rank ceil(p/100 * n), counted from 1; it is always a
sample that occurred, never an average of two (numpy calls the rule "inverted_cdf").
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from txl_train.errors import UsageError

Samples: TypeAlias = Sequence[float] | NDArray[np.float64]

PERCENTILE_RULE = "nearest rank"
STANDARD_PERCENTILES: tuple[float, ...] = (50, 90, 95, 99)
"""Those that every result row holds; others are added on request."""


def percentile(samples: Samples, p: float) -> float:
    """Return the p-th percentile by nearest rank, in the samples' unit. `p` lies strictly within 0..100."""
    ordered = _sorted(samples)
    return float(ordered[_rank(len(ordered), p) - 1])


def percentile_interval(samples: Samples, p: float, *, confidence: float = 0.95) -> tuple[float, float] | None:
    """Return an interval that covers the true p-th percentile with at least `confidence`, or None if there are too few samples.

    The ends are order statistics: X(l) and X(u), where at most (1 - confidence) / 2 of the probability lies beyond each (the count of
    samples below the true percentile is binomial; David & Nagaraja, Order Statistics, section 7.1). No distribution is assumed, but
    independence is: latencies that drift or come in runs make the interval too narrow.
    """
    ordered = _sorted(samples)
    ranks = _interval_ranks(len(ordered), p, confidence)
    return None if ranks is None else (float(ordered[ranks[0] - 1]), float(ordered[ranks[1] - 1]))


@functools.cache
def minimum_samples(p: float, *, exceeding: int = 1, confidence: float = 0.99) -> int:
    """Return how many samples a p-th percentile needs to mean something: MLPerf loadgen's early-stopping rule.

    It is the smallest n at which, were the true percentile higher than a limit, at most `exceeding` of n samples beyond that limit would
    be seen with a probability of 1 - confidence or less. At 99 %: 44 or 64 samples for p90 (none or one exceeding), 90 or 130 for p95,
    459 or 662 for p99. A percentile below 50 needs as many as its mirror image above.
    """
    tail = 1 - _quantile(max(p, 100 - p))
    q, keep, allowed = float(tail), float(1 - tail), 1 - confidence

    def too_few(n: int) -> bool:
        return sum(math.comb(n, k) * q**k * keep ** (n - k) for k in range(exceeding + 1)) > allowed

    high = exceeding + 1
    while too_few(high):
        high *= 2
    low = high // 2
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if too_few(middle) else (low, middle)
    return low


@dataclass(frozen=True)
class PercentileEstimate:
    """One percentile of a set of latencies, with what is known of its accuracy."""

    p: float
    """Which percentile, in percent."""
    value_ms: float
    """The percentile itself."""
    interval_ms: tuple[float, float] | None
    """95 % interval by order statistics; None where the samples are too few for one."""
    samples_needed: int
    """`minimum_samples`: with fewer the percentile is a guess."""


@dataclass(frozen=True)
class LatencySummary:
    """What n latencies of one step come to, in milliseconds."""

    n: int
    mean_ms: float
    min_ms: float
    max_ms: float
    percentiles: tuple[PercentileEstimate, ...]
    notes: tuple[str, ...]
    """Sentences about percentiles that rest on too few samples; empty when all are well founded."""

    @classmethod
    def of(cls, samples_ms: Samples, percentiles: Sequence[float] = STANDARD_PERCENTILES) -> LatencySummary:
        """Summarise latencies in milliseconds; `percentiles` are reported in rising order, each once."""
        ordered = _sorted(samples_ms)
        n = len(ordered)
        wanted = sorted(set(percentiles))
        return cls(
            n=n,
            mean_ms=math.fsum(ordered) / n,
            min_ms=float(ordered[0]),
            max_ms=float(ordered[-1]),
            percentiles=tuple(
                PercentileEstimate(p, percentile(ordered, p), percentile_interval(ordered, p), minimum_samples(p)) for p in wanted
            ),
            notes=tuple(note for p in wanted if (note := too_few_note(p, n))),
        )

    def percentile_ms(self, p: float) -> float:
        """Return the p-th percentile; KeyError if it is not among those computed."""
        return self._estimate(p).value_ms

    def interval_ms(self, p: float) -> tuple[float, float] | None:
        """Return the 95 % interval of the p-th percentile, None if the samples are too few; KeyError if it is not among those computed."""
        return self._estimate(p).interval_ms

    def _estimate(self, p: float) -> PercentileEstimate:
        for estimate in self.percentiles:
            if estimate.p == p:
                return estimate
        raise KeyError(p)

    def to_row(self) -> dict[str, Any]:
        """Return the flat fields of a result row: latency_ms_p50, ..., latency_ms_mean, latency_ms_min, latency_ms_max, n."""
        row: dict[str, Any] = {latency_key(e.p): e.value_ms for e in self.percentiles}
        row |= {"latency_ms_mean": self.mean_ms, "latency_ms_min": self.min_ms, "latency_ms_max": self.max_ms, "n": self.n}
        row["latency_ms_intervals_95"] = {f"p{e.p:g}": None if e.interval_ms is None else list(e.interval_ms) for e in self.percentiles}
        return row


def latency_key(p: float) -> str:
    """Return the name of a percentile in a result row: 99 is "latency_ms_p99", 99.9 "latency_ms_p99.9"."""
    return f"latency_ms_p{p:g}"


def too_few_note(p: float, n: int) -> str | None:
    """Return a sentence if n samples are too few for the p-th percentile, else None."""
    bare, needed = minimum_samples(p, exceeding=0), minimum_samples(p)
    if n >= needed:
        return None
    return f"p{p:g} from {n} sample{'' if n == 1 else 's'}: fewer than {bare if n < bare else needed}"


def parse_percentiles(text: str) -> tuple[float, ...]:
    """Read "50,90,95,99" (commas or spaces) as rising percentiles; UsageError where one is not strictly within 0..100."""
    remedy = "Write them like `--percentiles 50,90,95,99`, each above 0 and below 100."
    words = text.replace(",", " ").split()
    if not words:
        raise UsageError("No percentile is given.", remedy=remedy)
    found = set()
    for word in words:
        try:
            p = float(word.removeprefix("p"))
        except ValueError:
            raise UsageError(f"`{word}` is no percentile.", remedy=remedy) from None
        if not 0 < p < 100:
            raise UsageError(f"A percentile must lie between 0 and 100, but one is {word} instead.", remedy=remedy)
        found.add(int(p) if p == int(p) else p)
    return tuple(sorted(found))


def _sorted(samples: Samples) -> NDArray[np.float64]:
    values = np.sort(np.asarray(samples, dtype=np.float64))
    if values.ndim != 1 or values.size == 0:
        raise ValueError("percentiles need a flat list of at least one sample")
    if not np.isfinite(values).all():
        raise ValueError("every sample must be a finite number")
    return values


def _quantile(p: float) -> Fraction:
    """Return p as an exact fraction of 1: 99.9 means 999/1000, not the nearest binary number."""
    if not 0 < p < 100:
        raise ValueError(f"a percentile lies strictly within 0..100, but this is {p}")
    return Fraction(repr(p)) / 100


def _rank(n: int, p: float) -> int:
    return math.ceil(_quantile(p) * n)


def _interval_ranks(n: int, p: float, confidence: float) -> tuple[int, int] | None:
    """Ranks l < u (from 1) with P(true percentile < X(l)) and P(true percentile > X(u)) at most (1 - confidence) / 2 each."""
    q, beyond = float(_quantile(p)), (1 - confidence) / 2
    log_factorials = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])
    k = np.arange(n + 1)
    log_pmf = log_factorials[n] - log_factorials[k] - log_factorials[n - k] + k * math.log(q) + (n - k) * math.log1p(-q)
    pmf = np.exp(log_pmf)
    at_most = np.cumsum(pmf)  # at_most[k] = P(Bin(n, q) <= k)
    at_least = np.cumsum(pmf[::-1])[::-1]  # at_least[k] = P(Bin(n, q) >= k)
    low = int(np.searchsorted(at_most, beyond, side="right"))  # largest l with P(Bin <= l - 1) <= beyond
    high = n + 1 - int(np.searchsorted(at_least[::-1], beyond, side="right"))  # smallest u with P(Bin >= u) <= beyond
    return (low, high) if low >= 1 and high <= n else None
