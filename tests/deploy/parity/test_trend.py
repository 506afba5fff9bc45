"""A trend is found where there is one, and not where neighbours only resemble each other."""

from __future__ import annotations

import math

import numpy as np
import pytest

from txl_deploy.parity.trend import FEWEST_SEGMENTS, GROWTH, line, student_t, trend


def noise(n: int, seed: int, rho: float = 0.0) -> np.ndarray:
    """Return n values of standard deviation 1 whose neighbours are correlated by `rho`."""
    drawn = np.random.default_rng(seed).standard_normal(n + 200)
    values = [0.0]
    for x in drawn:
        values.append(rho * values[-1] + math.sqrt(1 - rho**2) * x)
    return np.array(values[-n:])


def test_growth_is_found_and_its_slope_is_right() -> None:
    found = line(1.0 + 0.05 * np.arange(30) + 0.1 * noise(30, 1), limit=0.5)
    assert found.grows
    assert found.slope_per_segment == pytest.approx(0.05, abs=0.01)
    assert found.interval[0] < 0.05 < found.interval[1]
    assert found.growth == pytest.approx(29 * found.slope_per_segment)


def test_a_fall_is_no_growth() -> None:
    assert not line(3.0 - 0.05 * np.arange(30) + 0.1 * noise(30, 1), limit=0.5).grows


def test_a_certain_growth_that_comes_to_little_is_none() -> None:
    found = line(1.0 + 0.001 * np.arange(30), limit=0.5)
    assert found.interval[0] > 0
    assert not found.grows


def test_what_is_not_finite_grows() -> None:
    assert line([1.0, 1.0, math.inf, 1.0], limit=0.5).grows
    assert line([1.0, 1.0, math.nan, 1.0], limit=0.5).grows


def test_too_few_segments_are_not_judged() -> None:
    short = trend([1.0 * i for i in range(FEWEST_SEGMENTS - 1)], None, rms_bound=1.0, memory_bound=1.0)
    assert (short.judged, short.grows, short.slope_per_segment) == (False, False, None)
    assert short.reason.startswith(f"not judged: {FEWEST_SEGMENTS - 1} segments")


def test_a_memory_that_strays_is_found_beside_an_nll_that_does_not() -> None:
    n = 20
    found = trend([1e-4] * n, [1e-3 * i / n for i in range(n)], rms_bound=1e-3, memory_bound=1e-3)
    assert found.grows
    assert found.memory is not None
    assert found.memory.limit == GROWTH * 1e-3
    assert found.reason.startswith("the difference of the memories grows")


@pytest.mark.parametrize(("rho", "most"), [(0.0, 0.015), (0.5, 0.045), (0.8, 0.085)])
def test_intervals_of_slopes_rarely_leave_out_none_where_there_is_none(rho: float, most: float) -> None:
    """99 % is kept for independent values only. For correlated ones, of which 24 hold little, the interval is too narrow: 3.3 % and 6.6 %
    of 1,500 series leave 0 out where 1 % should, both sides counted. That the growth must matter too keeps false alarms rare."""
    outside = 0
    for seed in range(1000):
        low, high = line(noise(24, seed, rho), limit=0.0).interval
        outside += not low <= 0 <= high
    assert outside / 1000 <= most


@pytest.mark.parametrize(("freedom", "expected"), [(10, 3.1693), (14, 2.9768), (30, 2.7500), (1000, 2.5808)])
def test_quantiles_of_student_s_t_are_those_of_the_tables(freedom: int, expected: float) -> None:
    assert student_t(0.995, freedom) == pytest.approx(expected, rel=1e-4)
