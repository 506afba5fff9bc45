"""How steady timed steps were, when a warm-up may end, and whether a row's figures can be believed.

Knows latencies in the order measured, in milliseconds, and the thresholds of the verdict, each with its reason. Percentiles and their
intervals are those of `stats`. Imports numpy and the standard library.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from txl_deploy.bench.result import Stability
from txl_deploy.bench.stats import (
    LEAST_EFFECTIVE_SAMPLES,
    Interval,
    LatencySummary,
    Samples,
    effective_samples,
    lag1_autocorrelation,
    minimum_samples,
    percentile,
    ratio_interval,
    samples_for_interval,
)

MOST_DRIFT = 0.05
"""Of the median between the halves. By less two runs of one program differ anyhow; with more, one latency is not what there is."""

DURATION_SHARE = 0.9
"""Of the duration asked for that must be reached: the number of steps is planned from the warm-up, which is not quite what follows."""

OUTLIER_DEVIATIONS, OUTLIER_RATIO = 10.0, 1.5
"""A sample is an outlier above the median by more than so many median absolute deviations, and above so many times the median."""

STEADY_WINDOWS, STEADY_WINDOW = 3, 3
"""Windows of the last half of a warm-up whose medians are compared, and steps that each holds at least."""

STEADY_CHANGE = 0.05
"""A smaller change of the median from the first of these windows to the last is steady: as much as drift may be afterwards."""

STEADY_SWING = 0.5
"""Medians that rise and fall are steady too, if the largest is above the smallest by no more than this share: noise, not another mode."""

STEADY_NOISE = 3.0
"""So is one of fewer standard errors than this: then the medians differ by what single steps scatter."""


def stability(samples_ms: Samples, warmup_ms: Sequence[float]) -> Stability:
    """Return how steady the timed steps were, which `warmup_ms` went before. ValueError without samples."""
    x = np.asarray(samples_ms, dtype=np.float64)
    drift, interval = drift_of(x)
    return Stability(
        lag1_autocorrelation=lag1_autocorrelation(x),
        drift=drift,
        drift_interval=interval,
        outliers=outliers(x),
        effective_n=effective_samples(x),
        warmup_steps=len(warmup_ms),
        warmup_steady=is_steady(warmup_ms),
    )


def drift_of(samples_ms: Samples) -> tuple[float, Interval | None]:
    """Return the median of the second half over that of the first, minus 1, with its 95 % interval; None from too few samples."""
    x = np.asarray(samples_ms, dtype=np.float64)
    first, second = x[: len(x) // 2], x[len(x) // 2 :]
    if not len(first) or percentile(first, 50) <= 0:
        return 0.0, None
    interval = ratio_interval(second, first, 50)
    return percentile(second, 50) / percentile(first, 50) - 1, None if interval is None else (interval[0] - 1, interval[1] - 1)


def outliers(samples_ms: Samples) -> int:
    """Return how many samples lie far above the median, by the rule of OUTLIER_DEVIATIONS and OUTLIER_RATIO."""
    x = np.asarray(samples_ms, dtype=np.float64)
    median = float(np.median(x))
    deviation = float(np.median(np.abs(x - median)))
    return int(np.count_nonzero(x > max(median + OUTLIER_DEVIATIONS * deviation, OUTLIER_RATIO * median)))


def is_steady(warmup_ms: Sequence[float]) -> bool:
    """Return whether the steps of a warm-up, in the order run, no longer become faster or slower.

    The last half of them is cut into windows. They are steady if their medians rise and fall a little (STEADY_SWING), or all but stay:
    the last is within STEADY_CHANGE of the first, or within what single steps scatter. Fewer than nine steps are never steady.
    """
    window = max(STEADY_WINDOW, len(warmup_ms) // (2 * STEADY_WINDOWS))
    if len(warmup_ms) < STEADY_WINDOWS * window:
        return False
    last = np.asarray(warmup_ms, dtype=np.float64)[-STEADY_WINDOWS * window :].reshape(STEADY_WINDOWS, window)
    medians = np.median(last, axis=1)
    change = float(medians[-1] - medians[0])
    steps = np.diff(medians)
    swings = steps.min() < 0 < steps.max() and float(np.ptp(medians)) <= STEADY_SWING * float(medians.min())
    if swings or (abs(change) <= STEADY_CHANGE * float(medians[0]) and not steps.min() < 0 < steps.max()):
        return True
    deviation = 1.4826 * float(np.median(np.abs(last - medians[:, None])))  # of a normal distribution, by the median absolute deviation
    error_of_median = deviation * math.sqrt(math.pi / 2 / window)
    return abs(change) <= STEADY_NOISE * math.sqrt(2) * error_of_median


def judge(
    latency: LatencySummary, stability: Stability, *, percentiles: Sequence[float], duration_s: float, min_duration_s: float
) -> tuple[str, ...]:
    """Return why the figures of a row are not to be believed, one clause each; nothing if they are.

    `percentiles` are those asked for: each must have enough samples. `duration_s` is the time from the first timed step to the end of the
    last, in seconds, with what others did in between: a row has seen what the machine went through in all of it.
    """
    reasons = []
    for p in sorted(set(percentiles)):
        needed, effective = minimum_samples(p), latency.effective_n(p)
        if latency.n < needed:
            reasons.append(f"too few samples for p{p:g}: {latency.n} of {needed}")
        elif latency.interval_ms(p) is None:
            reasons.append(
                f"autocorrelated samples: {latency.n} tell as much of p{p:g} as {effective:.0f} independent ones,"
                f" fewer than {max(samples_for_interval(p), LEAST_EFFECTIVE_SAMPLES)}"
            )
    if stability.effective_n < LEAST_EFFECTIVE_SAMPLES <= latency.n:
        reasons.append(
            f"autocorrelated samples: {latency.n} tell as much of the mean as {stability.effective_n:.0f} independent ones,"
            f" fewer than {LEAST_EFFECTIVE_SAMPLES}"
        )
    if duration_s < DURATION_SHARE * min_duration_s:
        reasons.append(f"measured for {duration_s:.1f} s, shorter than {min_duration_s:g} s")
    interval = stability.drift_interval
    if interval is not None and abs(stability.drift) > MOST_DRIFT and not interval[0] <= 0 <= interval[1]:
        reasons.append(
            f"drift: the second half is {abs(stability.drift):.1%} {'slower' if stability.drift > 0 else 'faster'} than the first"
        )
    if not stability.warmup_steady:
        reasons.append(f"the warm-up of {stability.warmup_steps} steps did not become steady")
    return tuple(reasons)
