"""What a set of latencies says: percentiles with their rule, their interval, and how many samples they need.

Knows numbers only, in milliseconds where a unit is named; where they come from is the harness's business. Imports numpy and the
standard library.

Intervals are for samples in the order measured: neighbours that resemble each other tell less than independent ones, so the intervals are
wider, and None where too little is left. How often they hold the true value is measured by `benchmarks/interval_coverage.py`.

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

from txl_deploy.bootstrap import design_effect, is_autocorrelated, mean_interval
from txl_deploy.distributions import beta_cdf, t_quantile
from txl_train.errors import UsageError

Samples: TypeAlias = Sequence[float] | NDArray[np.float64]
Interval: TypeAlias = tuple[float, float]

PERCENTILE_RULE = "nearest rank"
STANDARD_PERCENTILES: tuple[float, ...] = (50, 90, 95, 99)
"""Those that every result row holds; others are added on request."""

LEAST_EFFECTIVE_SAMPLES = 30
"""Independent samples that autocorrelated ones must be worth for any interval: with fewer their own correlation is known too badly."""

SAMPLES_PER_DEGREE, EXCURSIONS_PER_DEGREE = 7.5, 1.25
"""Effective samples, and effective samples beyond the percentile, for one degree of freedom of Student's t, where neighbours resemble each
other. Numbers that cover, by `benchmarks/interval_coverage.py`."""

WIDER_TAIL = 4
"""The few samples beyond a high percentile cannot tell how they cluster, so as many more beyond a lower one are asked, too."""


def percentile(samples: Samples, p: float) -> float:
    """Return the p-th percentile by nearest rank, in the samples' unit. `p` lies strictly within 0..100."""
    ordered = np.sort(_flat(samples))
    return float(ordered[_rank(len(ordered), p) - 1])


def percentile_interval(samples: Samples, p: float, *, confidence: float = 0.95) -> Interval | None:
    """Return an interval that holds the true p-th percentile with `confidence`, or None if the samples are too few; in the samples' unit.

    `samples` stand in the order measured. The ends are order statistics at fractional ranks (Hutson 1999): at most
    (1 - confidence) / 2 of the binomial distribution of how many samples lie below the true percentile is beyond each. No distribution
    of latencies is assumed. Where neighbours resemble each other, the number of samples is divided by the design effect of "is below the
    percentile", a series of zeros and ones (Woodruff 1952; Korn & Graubard 1998).
    """
    x = _flat(samples)
    return _interval(np.sort(x), p, _independent_worth(x, p, confidence), confidence)


def order_statistic_interval(
    ordered: NDArray[np.float64], p: float, *, worth: float | None = None, confidence: float = 0.95
) -> Interval | None:
    """Return the interval of sorted samples that are `worth` so many independent ones (None: all of them); None if these are too few."""
    n = len(ordered)
    worth = float(n) if worth is None else worth
    if worth < samples_for_interval(p, confidence=confidence):
        return None
    low, high = (float(np.interp(share * (n + 1), np.arange(1, n + 1), ordered)) for share in _shares(worth, p, confidence))
    return low, high


def effective_samples(samples: Samples, p: float | None = None) -> float:
    """Return how many independent samples tell as much of the mean, or of the p-th percentile, as these do in the order measured."""
    x = _flat(samples)
    if p is not None:
        return _independent_worth(x, p, 0.95)[1]
    return len(x) / design_effect(x) if is_autocorrelated(x) else float(len(x))


def samples_for_interval(p: float, *, confidence: float = 0.95) -> int:
    """Return how many independent samples an interval of the p-th percentile needs: 36 for p90, 72 for p95, 368 for p99 at 95 %."""
    q = float(_quantile(p))
    return math.ceil(math.log((1 - confidence) / 2) / math.log(max(q, 1 - q)))


def lag1_autocorrelation(samples: Samples) -> float:
    """Return how neighbours correlate, -1..1: 0 for independent samples, and for constant ones."""
    x = _flat(samples)
    x = x - x.mean()
    square = float(x @ x)
    return float(x[1:] @ x[:-1]) / square if square > 0 else 0.0


def ratio_interval(numerators: Samples, denominators: Samples, p: float) -> Interval | None:
    """Return a 95 % interval of the p-th percentile of the one set of samples over that of the other, measured independently.

    From the intervals of the two, by adding the squares of their logarithmic arms (MOVER, Zou & Donner 2008). None if one has none.
    """
    a, b = percentile(numerators, p), percentile(denominators, p)
    of_a, of_b = percentile_interval(numerators, p), percentile_interval(denominators, p)
    if of_a is None or of_b is None or min(of_a[0], of_b[0]) <= 0:
        return None
    down = math.hypot(math.log(a / of_a[0]), math.log(of_b[1] / b))
    up = math.hypot(math.log(of_a[1] / a), math.log(b / of_b[0]))
    return a / b * math.exp(-down), a / b * math.exp(up)


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
    interval_ms: Interval | None
    """95 % interval by order statistics; None where the samples are too few, or too alike, for one."""
    samples_needed: int
    """`minimum_samples`: with fewer the percentile is a guess."""
    effective_n: float
    """How many independent samples tell as much of this percentile; n where they are independent."""


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
    mean_interval_ms: Interval | None = None
    """95 % interval of the mean by block bootstrap; None from fewer than LEAST_EFFECTIVE_SAMPLES effective samples."""

    @classmethod
    def of(cls, samples_ms: Samples, percentiles: Sequence[float] = STANDARD_PERCENTILES) -> LatencySummary:
        """Summarise latencies in milliseconds, in the order measured; `percentiles` are reported in rising order, each once."""
        x = _flat(samples_ms)
        ordered = np.sort(x)
        n = len(x)
        wanted = sorted(set(percentiles))
        estimates = []
        for p in wanted:
            worth = _independent_worth(x, p, 0.95)
            value, interval = float(ordered[_rank(n, p) - 1]), _interval(ordered, p, worth, 0.95)
            estimates.append(PercentileEstimate(p, value, interval, minimum_samples(p), worth[1]))
        return cls(
            n=n,
            mean_ms=math.fsum(ordered) / n,
            min_ms=float(ordered[0]),
            max_ms=float(ordered[-1]),
            percentiles=tuple(estimates),
            notes=tuple(note for p in wanted if (note := too_few_note(p, n))),
            mean_interval_ms=mean_interval(x) if effective_samples(x) >= LEAST_EFFECTIVE_SAMPLES else None,
        )

    def percentile_ms(self, p: float) -> float:
        """Return the p-th percentile; KeyError if it is not among those computed."""
        return self._estimate(p).value_ms

    def interval_ms(self, p: float) -> tuple[float, float] | None:
        """Return the 95 % interval of the p-th percentile, None if the samples are too few; KeyError if it is not among those computed."""
        return self._estimate(p).interval_ms

    def effective_n(self, p: float) -> float:
        """Return how many independent samples tell as much of the p-th percentile; KeyError if it is not among those computed."""
        return self._estimate(p).effective_n

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
        row["latency_ms_mean_interval_95"] = None if self.mean_interval_ms is None else list(self.mean_interval_ms)
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


def _flat(samples: Samples) -> NDArray[np.float64]:
    values = np.asarray(samples, dtype=np.float64)
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


def _independent_worth(x: NDArray[np.float64], p: float, confidence: float) -> tuple[float, float]:
    """Return how many independent samples these are worth for the width of an interval of the p-th percentile, and for its existence.

    Both are n where the order does not matter. Else the first is n over the design effect, less what the uncertainty of that effect costs:
    the squared ratio of the normal quantile to that of Student's t. The second is the first, or n over the design effect of a percentile
    with WIDER_TAIL times as many samples beyond it, if that is less.
    """
    n, q = len(x), float(_quantile(p))
    if not is_autocorrelated(x):
        return float(n), float(n)
    tail = min(q, 1 - q)
    wider = min(WIDER_TAIL * tail, 0.5)
    effect, of_wider = (
        design_effect((x <= np.sort(x)[math.ceil(round(share * n, 6)) - 1]).astype(np.float64))
        for share in (q, 1 - wider if q > 0.5 else wider)
    )
    # The design effect is known as well as excursions of the whole series, and of those beyond the percentile, are many.
    degrees = 1 / (SAMPLES_PER_DEGREE * effect / n + EXCURSIONS_PER_DEGREE * (effect - 1) / (n * tail))
    beyond = (1 + confidence) / 2
    worth = n / effect * (t_quantile(beyond, math.inf) / t_quantile(beyond, max(round(degrees, 1), 3.0))) ** 2
    worth = float(f"{worth:.3g}")  # three digits, so that the ranks of near ones are looked up
    return worth, min(worth, n / of_wider)


def _interval(ordered: NDArray[np.float64], p: float, worth: tuple[float, float], confidence: float) -> Interval | None:
    independent = worth[1] == len(ordered)
    if not independent and worth[1] < LEAST_EFFECTIVE_SAMPLES:
        return None
    if worth[1] < samples_for_interval(p, confidence=confidence):
        return None
    return order_statistic_interval(ordered, p, worth=worth[0], confidence=confidence)


@functools.lru_cache(maxsize=8192)
def _shares(n: float, p: float, confidence: float) -> Interval:
    """Return the ranks of an interval's ends as shares of n + 1: P(true percentile < low end) = P(> high end) = (1 - confidence) / 2.

    The number of samples of n below the true percentile is binomial, whose distribution function is the beta function, also between
    whole ranks and for an effective number of samples.
    """
    q = float(_quantile(p))

    def share(beyond: float) -> float:
        low, high = 0.0, 1.0
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if beta_cdf(q, (n + 1) * middle, (n + 1) * (1 - middle)) > beyond else (low, middle)
        return (low + high) / 2

    return share((1 + confidence) / 2), share((1 - confidence) / 2)
