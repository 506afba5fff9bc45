"""Intervals for means of series whose neighbours resemble each other: the circular block bootstrap.

Used wherever a mean is judged: perplexities of receipts, differences of parity, latencies. Segments of one text and steps of one machine
are not independent, so whole blocks of neighbours are drawn, not single values (Politis & Romano 1992). Knows numbers only. Imports
numpy and the standard library.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Values: TypeAlias = Sequence[float] | NDArray[np.float64]
Interval: TypeAlias = tuple[float, float]

RESAMPLES = 2000
SEED = 20190109
"""Of the draws, so that the same values give the same interval."""


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


def resampled_means(
    numerators: Values, denominators: Values | None = None, *, block: int | None = None, resamples: int = RESAMPLES, seed: int = SEED
) -> NDArray[np.float64]:
    """Return means of as many values drawn in circular blocks: sum of `numerators` over sum of `denominators` (1 each where None), [R].

    `block` None is `block_length` of each value's deviation from the mean.
    """
    a = np.asarray(numerators, dtype=np.float64)
    b = np.ones_like(a) if denominators is None else np.asarray(denominators, dtype=np.float64)
    if a.ndim != 1 or a.shape != b.shape or a.size == 0:
        raise ValueError("a mean needs flat series of at least one value, of equal length")
    n = len(a)
    if block is None:
        block = block_length(a - b * (a.sum() / b.sum()))
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
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def abs_mean_bound(numerators: Values, denominators: Values | None = None, *, confidence: float = 0.95) -> float:
    """Return the value that |mean| stays below with `confidence`: the bound of a test of equivalence (Schuirmann 1987).

    By two one-sided tests: it is the further end of the interval of 2 * confidence - 1.
    """
    low, high = mean_interval(numerators, denominators, confidence=2 * confidence - 1)
    return max(abs(low), abs(high))
