"""Whether a difference grows from segment to segment: rounding does not, a fault in what is fed back does.

A straight line is laid through the differences of those segments in which memories are full, as before that they differ in what they
hold. Its slope is judged with an interval for neighbours that resemble each other, and what it comes to over the rollout with a share of
the bound: a slope may be certain and still be nothing. Knows numbers only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

CONFIDENCE = 0.99
"""Of the interval of a slope."""

FEWEST_SEGMENTS = 12
"""Segments with a full memory below which no trend is judged: the interval of a slope through fewer is too wide to say anything."""

GROWTH = 0.25
"""Share of its bound that a difference may grow by over the rollout: what is within half of its bound, as faithful runtimes are, and grows
by less is as good at the end as at the beginning. Of 638 faithful rollouts of tiny models over 40 and 100 segments none was said to grow
(so fewer than 1 in 200 with 95 % confidence): an interval lay above 0 in 2 of them for the nll and in 4 for the memory, and the growth
came to 0.67 of its limit at most."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """How one difference moves over the segments."""

    slope_per_segment: float
    interval: tuple[float, float]
    """Of the slope, 99 %."""
    growth: float
    """The slope times the segments it was laid through."""
    limit: float
    """What it may grow by."""
    grows: bool
    """True if the interval lies above 0 and the growth above its limit, or what should be laid through is not finite."""


@dataclass(frozen=True, kw_only=True)
class Trend:
    """The verdict on both differences; the figures at this level are those of the rms difference of the nll, nats."""

    judged: bool
    grows: bool
    reason: str
    """One clause."""
    n_segments: int
    """Segments in which memories are full."""
    slope_per_segment: float | None = None
    interval: tuple[float, float] | None = None
    growth: float | None = None
    limit: float | None = None
    memory: Line | None = None
    """Of the largest relative difference of a state; None where memories are not compared, or nothing is judged."""


def trend(rms_nats: Sequence[float], memory_errors: Sequence[float] | None, *, rms_bound: float, memory_bound: float) -> Trend:
    """Judge the differences of those segments in which memories are full, in order.

    Args:
        rms_nats: root mean square of the differences of the nll, nats, per segment.
        memory_errors: largest relative difference of a state per segment; None where memories cannot be compared.
        rms_bound: on the first, nats.
        memory_bound: on the second.
    """
    n = len(rms_nats)
    if n < FEWEST_SEGMENTS:
        return Trend(
            judged=False, grows=False, reason=f"not judged: {n} segments with a full memory, and it takes {FEWEST_SEGMENTS}", n_segments=n
        )
    nll = line(rms_nats, GROWTH * rms_bound)
    memory = None if memory_errors is None else line(memory_errors, GROWTH * memory_bound)
    found = []
    if nll.grows:
        found.append(f"the rms difference of the nll grows by {nll.growth:.2g} nats over {n} segments (limit {nll.limit:.1e})")
    if memory is not None and memory.grows:
        found.append(f"the difference of the memories grows by {memory.growth:.2g} of magnitude over {n} segments ({memory.limit:.1e})")
    return Trend(
        judged=True,
        grows=bool(found),
        reason=" and ".join(found) or f"no growth over {n} segments with a full memory",
        n_segments=n,
        slope_per_segment=nll.slope_per_segment,
        interval=nll.interval,
        growth=nll.growth,
        limit=nll.limit,
        memory=memory,
    )


def line(values: Sequence[float], limit: float) -> Line:
    """Lay a line through at least 4 values and judge its slope: least squares, with the standard error widened for a first-order
    autocorrelation of what is left, by which n values count as n(1 - r)/(1 + r), in the quantile of Student's t too."""
    y = np.asarray(values, dtype=np.float64)
    if not np.isfinite(y).all():
        return Line(slope_per_segment=math.inf, interval=(-math.inf, math.inf), growth=math.inf, limit=limit, grows=True)
    n = len(y)
    x = np.arange(n) - (n - 1) / 2
    slope = float((x * y).sum() / (x * x).sum())
    residual = y - y.mean() - slope * x
    squares = float((residual**2).sum())
    r = float((residual[1:] * residual[:-1]).sum()) / squares if squares > 0 else 0.0
    r = min(max(r + (1 + 4 * max(r, 0.0)) / n, 0.0), 0.9)  # what is left of a fitted line is less correlated than what it was fitted to
    error = math.sqrt(squares / (n - 2) / float((x * x).sum()) * (1 + r) / (1 - r))
    reach = student_t((1 + CONFIDENCE) / 2, max(n * (1 - r) / (1 + r) - 2, 4.0)) * error
    low, growth = slope - reach, slope * (n - 1)
    return Line(slope_per_segment=slope, interval=(low, slope + reach), growth=growth, limit=limit, grows=low > 0 and growth > limit)


def student_t(p: float, freedom: float) -> float:
    """Return the quantile of Student's t (Fisher & Cornish 1960, up to the fourth power of 1/freedom; within 0.01 % from 8 on)."""
    z = NormalDist().inv_cdf(p)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return float(z + sum(term / freedom**i for i, term in enumerate(terms, 1)))
