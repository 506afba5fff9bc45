"""Intervals for means of series whose neighbours resemble each other: the circular block bootstrap.

Used wherever a mean is judged: perplexities of receipts, differences of parity, latencies. Segments of one text and steps of one machine
are not independent, so whole blocks of neighbours are drawn, not single values (Politis & Romano 1992). Blocks alone make intervals of
strongly autocorrelated series too narrow, because every cut between two blocks loses some of the correlation; so the spread of the drawn
means is widened to what an autoregressive model of the series says, and the normal quantile to Student's t. How often the intervals then
hold the true mean is measured by `benchmarks/interval_coverage.py`. Knows numbers only. Imports numpy and the standard library.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from txl_deploy.distributions import t_quantile

Values: TypeAlias = Sequence[float] | NDArray[np.float64]
Interval: TypeAlias = tuple[float, float]

RESAMPLES = 2000
SEED = 20190109
"""Of the draws, so that the same values give the same interval."""

MOST_BLOCKS = 500
"""Blocks drawn for one mean at most: longer ones lose nothing where there are so many, and a long series stays cheap."""

SAMPLES_PER_DEGREE = 4.0
"""Effective samples for one degree of freedom of Student's t, where the series is autocorrelated: its long-run variance is estimated from
few excursions. A number that covers, by `benchmarks/interval_coverage.py`."""

BIAS = 3.0
"""Share by which autoregressive models fall short of a large design effect d is about BIAS * d / n: they see the series' own mean."""


def block_length(values: Values) -> int:
    """Return how many neighbours make a block: chosen from the autocorrelation of `values` (Politis & White 2004; Patton et al. 2009)."""
    x = np.asarray(values, dtype=np.float64)
    n = len(x)
    x = x - x.mean()
    if n < 4 or not x.any():
        return 1
    spectrum = np.fft.rfft(x, 2 * n)
    covariance = np.fft.irfft(spectrum * spectrum.conj(), 2 * n)[:n] / n
    correlation = covariance / covariance[0]
    runs = max(5, math.ceil(math.sqrt(math.log10(n))))
    limit = 2 * math.sqrt(math.log10(n) / n)
    most = min(math.ceil(math.sqrt(n)) + runs, n - 1)
    small = np.abs(correlation[1 : most + 1]) < limit
    last = next((i for i in range(max(len(small) - runs + 1, 0)) if small[i : i + runs].all()), None)
    reach = most if last is None else last  # lags after which the correlation is no longer told from 0
    reach = min(2 * max(reach, 1), most)
    lags = np.arange(-reach, reach + 1)
    shares = np.abs(lags) / reach
    taper = np.where(shares <= 0.5, 1.0, 2 * (1 - shares))
    weighted = taper * covariance[np.abs(lags)]
    long_run, slope = float(weighted.sum()), float((np.abs(lags) * weighted).sum())
    if long_run <= 0:
        return 1
    best = (2 * slope**2 / (4 / 3 * long_run**2)) ** (1 / 3) * n ** (1 / 3)
    return int(min(max(1, math.ceil(best)), max(1, math.ceil(min(3 * math.sqrt(n), n / 3)))))


def design_effect(values: Values) -> float:
    """Return how many autocorrelated samples tell as much of the mean as one independent one: long-run variance over variance, 1..n.

    The long-run variance is the spectrum at frequency 0 of an autoregressive model (Yule & Walker), by the larger of two orders: that of
    Akaike's criterion corrected for short series (Hurvich & Tsai 1989), and 1.5 times the cube root of n, which sees weak correlation
    that lasts.
    Less than 1, where neighbours avoid each other, counts as 1.
    """
    x = np.asarray(values, dtype=np.float64)
    n = len(x)
    models = _autoregressions(x)
    if len(models) == 1:
        return 1.0
    by_criterion = min(enumerate(models), key=lambda m: n * math.log(m[1][1]) + 2 * (m[0] + 1) * n / max(n - m[0] - 2, 1))[1]
    by_length = models[min(round(1.5 * n ** (1 / 3)), len(models) - 1)]
    effect = max(1.0, by_criterion[0], by_length[0])
    return float(min(1 + (effect - 1) * (1 + BIAS * effect / n), n))


def is_autocorrelated(values: Values) -> bool:
    """Return whether the order of `values` matters, by an autoregressive model of their ranks (Schwarz's criterion prefers one to none)."""
    x = np.asarray(values, dtype=np.float64)
    n = len(x)
    models = _autoregressions(np.argsort(np.argsort(x, kind="stable"), kind="stable").astype(np.float64)) if np.ptp(x) else []
    return any(n * math.log(variance / models[0][1]) + math.log(n) * order < 0 for order, (_, variance) in enumerate(models) if order)


def _autoregressions(x: NDArray[np.float64]) -> list[tuple[float, float]]:
    """Return design effect and variance of the innovations (relative to the series') of autoregressive models, by rising order from 0."""
    n = len(x)
    most = int(min(10 * math.log10(max(n, 1)), n / 4))
    x = x - x.mean()
    models = [(1.0, 1.0)]
    if most < 1 or not np.ptp(x):
        return models
    spectrum = np.fft.rfft(x, 1 << (2 * n - 1).bit_length())
    covariance = np.fft.irfft(spectrum * spectrum.conj())[: most + 1]
    r = covariance / covariance[0]
    weights = np.zeros(0)
    left = 1.0
    for order in range(1, most + 1):  # Levinson's recursion
        reflection = float(r[order] - weights @ r[order - 1 : 0 : -1]) / left
        weights = np.concatenate([weights - reflection * weights[::-1], [reflection]])
        left *= 1 - reflection**2
        if left <= 1e-9:  # predicted by its past: periodic, or a line
            break
        models.append((left / (1 - float(weights.sum())) ** 2, left))
    return models


def resampled_means(
    numerators: Values, denominators: Values | None = None, *, block: int | None = None, resamples: int = RESAMPLES, seed: int = SEED
) -> NDArray[np.float64]:
    """Return means of as many values drawn in circular blocks: sum of `numerators` over sum of `denominators` (1 each where None), [R].

    `block` None is `block_length` of each value's deviation from the mean, but long enough that MOST_BLOCKS cover the series.
    """
    a = np.asarray(numerators, dtype=np.float64)
    b = np.ones_like(a) if denominators is None else np.asarray(denominators, dtype=np.float64)
    if a.ndim != 1 or a.shape != b.shape or a.size == 0:
        raise ValueError("a mean needs flat series of at least one value, of equal length")
    n = len(a)
    if block is None:
        block = max(block_length(a - b * (a.sum() / b.sum())), math.ceil(n / MOST_BLOCKS))
    count = math.ceil(n / block)
    starts = np.random.default_rng(seed).integers(0, n, (resamples, count))
    last = n - (count - 1) * block  # the last block is cut, so that each mean is of n values

    def sums(x: NDArray[np.float64]) -> NDArray[np.float64]:
        wrapped = np.concatenate([[0.0], np.cumsum(np.concatenate([x, x[:block]]))])
        whole = wrapped[starts[:, :-1] + block] - wrapped[starts[:, :-1]]
        return np.asarray(whole.sum(axis=1) + wrapped[starts[:, -1] + last] - wrapped[starts[:, -1]])

    return sums(a) / sums(b)


def mean_interval(
    numerators: Values,
    denominators: Values | None = None,
    *,
    confidence: float = 0.95,
    block: int | None = None,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> Interval:
    """Return an interval for the mean (of sums over sums, where there are denominators), in the values' unit."""
    means = resampled_means(numerators, denominators, block=block, resamples=resamples, seed=seed)
    ends = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    a = np.asarray(numerators, dtype=np.float64)
    b = np.ones_like(a) if denominators is None else np.asarray(denominators, dtype=np.float64)
    mean = float(a.sum() / b.sum())
    n, spread = len(a), float(means.std())
    if n < 2 or spread == 0:
        return float(ends[0]), float(ends[1])
    deviations = a - b * mean
    effect = design_effect(deviations) if is_autocorrelated(deviations) else 1.0
    error = math.sqrt(effect * float(deviations.var(ddof=1)) / n) / float(b.mean())
    degrees = n - 1 if effect == 1 else max(n / effect / SAMPLES_PER_DEGREE, 1.0)
    normal = t_quantile((1 + confidence) / 2, math.inf)
    stretch = max(error / spread, 1.0) * t_quantile((1 + confidence) / 2, degrees) / normal if normal else 1.0
    low, high = mean + stretch * (ends - mean)
    return float(low), float(high)


def abs_mean_bound(numerators: Values, denominators: Values | None = None, *, confidence: float = 0.95) -> float:
    """Return the value that |mean| stays below with `confidence`: the bound of a test of equivalence (Schuirmann 1987).

    By two one-sided tests: it is the further end of the interval of 2 * confidence - 1. One value alone says nothing of how they
    scatter: infinite.
    """
    if len(numerators) < 2:
        return math.inf
    low, high = mean_interval(numerators, denominators, confidence=2 * confidence - 1)
    return max(abs(low), abs(high))
