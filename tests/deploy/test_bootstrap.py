"""Intervals of means of series whose neighbours resemble each other."""

from __future__ import annotations

import numpy as np
import pytest

from txl_deploy.bootstrap import MOST_BLOCKS, abs_mean_bound, block_length, design_effect, is_autocorrelated, mean_interval, resampled_means


def ar1(rho: float, n: int, seed: int = 0) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal(n)
    for t in range(1, n):
        x[t] = rho * x[t - 1] + (1 - rho**2) ** 0.5 * x[t]
    return x


@pytest.mark.parametrize("rho", [0.3, 0.5, 0.8])
def test_the_design_effect_of_an_autoregression_is_the_textbooks(rho):
    # (1 + rho) / (1 - rho); a model of order 27 (the cube root of n) has a standard error of about 7 %, and the larger of two is taken
    assert design_effect(ar1(rho, 20_000)) == pytest.approx((1 + rho) / (1 - rho), rel=0.2)


def test_independent_samples_are_told_from_autocorrelated_ones():
    assert sum(is_autocorrelated(ar1(0.0, 500, seed)) for seed in range(40)) <= 4  # Schwarz's criterion errs in 1 to 2 of 100
    assert all(is_autocorrelated(ar1(0.3, 500, seed)) for seed in range(40))


@pytest.mark.parametrize("series", [[], [1.0], [1.0, 1.0], np.ones(100), np.arange(300.0), np.arange(300) % 5])
def test_series_without_chance_have_a_finite_design_effect(series):
    if len(series):
        assert 1 <= design_effect(series) <= max(len(series), 1)
        assert not is_autocorrelated(np.ones(max(len(series), 1)))


def test_blocks_grow_with_the_autocorrelation():
    assert block_length(ar1(0.0, 2000)) < block_length(ar1(0.8, 2000)) < block_length(ar1(0.97, 2000))


def test_the_same_values_give_the_same_interval():
    assert mean_interval(ar1(0.5, 300)) == mean_interval(ar1(0.5, 300))


def test_an_autocorrelated_series_gets_the_wider_interval():
    x = ar1(0.8, 1000)
    shuffled = np.random.default_rng(1).permutation(x)
    (low, high), (shuffled_low, shuffled_high) = mean_interval(x), mean_interval(shuffled)
    assert high - low > 2 * (shuffled_high - shuffled_low)  # 3 in theory: the square root of the design effect of 9


def test_a_ratio_of_sums_is_weighted_by_its_denominators():
    low, high = mean_interval([2.0, 40.0, 2.2, 39.0] * 20, [1.0, 20.0, 1.0, 20.0] * 20)
    assert low < (2.0 + 40.0 + 2.2 + 39.0) / 42 < high
    assert high - low < 0.1


def test_a_long_series_is_drawn_in_blocks_few_enough_to_be_cheap():
    means = resampled_means(ar1(0.0, 100 * MOST_BLOCKS), resamples=200)
    assert means.std() == pytest.approx(1 / (100 * MOST_BLOCKS) ** 0.5, rel=0.3)


def test_the_bound_of_a_mean_is_the_further_end_of_the_90_percent_interval():
    x = ar1(0.0, 400) - 3
    low, high = mean_interval(x, confidence=0.9)
    assert abs_mean_bound(x) == max(abs(low), abs(high)) > abs(float(x.mean()))


def test_a_constant_series_is_known_exactly():
    assert mean_interval([2.5] * 50) == (2.5, 2.5)


@pytest.mark.parametrize("values", [[], [[1.0], [2.0]]])
def test_what_is_no_flat_series_is_refused(values):
    with pytest.raises(ValueError, match="flat series"):
        mean_interval(values)
