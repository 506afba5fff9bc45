"""The two probability distributions that intervals are read from: beta and Student's t.

Knows formulas only; which interval needs which is the business of `bootstrap` and `bench.stats`. Imports the standard library.
"""

from __future__ import annotations

import functools
import math
from statistics import NormalDist

_TINY = 1e-300
_PRECISION = 1e-13
_MOST_TERMS = 20_000


def beta_cdf(x: float, a: float, b: float) -> float:
    """Return the regularised incomplete beta function I_x(a, b), for positive a and b.

    By its continued fraction (DLMF 8.17.22) on the side of the mean where it converges fast. For whole numbers it is
    P(Bin(a + b - 1, x) >= a).
    """
    if x <= 0 or x >= 1:
        return float(x >= 1)
    mirrored = x > (a + 1) / (a + b + 2)
    if mirrored:
        x, a, b = 1 - x, b, a
    below, above, value = 1.0, math.inf, 1.0
    for i in range(2, _MOST_TERMS):  # Lentz's method
        m = i // 2
        if i % 2:
            term = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        else:
            term = -(a + m - 1) * (a + b + m - 1) * x / ((a + 2 * m - 2) * (a + 2 * m - 1))
        below = 1 / _not_zero(1 + term * below)
        above = _not_zero(1 + term / above)
        value *= below * above
        if abs(below * above - 1) < _PRECISION:
            break
    log_front = a * math.log(x) + b * math.log1p(-x) + math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    result = math.exp(log_front) / a * value
    return 1 - result if mirrored else result


def _not_zero(x: float) -> float:
    return x if abs(x) > _TINY else _TINY


@functools.lru_cache(maxsize=4096)
def t_quantile(probability: float, degrees: float) -> float:
    """Return the value that Student's t with that many degrees of freedom (a positive number) stays below with `probability`, 0.5..1.

    By the relation of t to the beta distribution (Abramowitz & Stegun 26.7.1), solved by bisection; normal from 10,000 degrees on.
    """
    if probability <= 0.5:
        return 0.0
    if degrees > 10_000:
        return NormalDist().inv_cdf(probability)
    beyond = 2 * (1 - probability)
    low, high = 0.0, 1.0  # of degrees / (degrees + t²), whose distribution function at that point is the probability beyond ±t
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if beta_cdf(middle, degrees / 2, 0.5) < beyond else (low, middle)
    share = (low + high) / 2
    return math.sqrt(degrees * (1 - share) / share)
