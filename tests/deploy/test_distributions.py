"""The beta distribution and Student's t, against tables and binomial sums."""

from __future__ import annotations

import math

import pytest

from txl_deploy.distributions import beta_cdf, t_quantile


@pytest.mark.parametrize(("degrees", "expected"), [(1, 12.7062), (3, 3.18245), (10, 2.22814), (30, 2.04227), (math.inf, 1.95996)])
def test_the_975_percent_quantiles_of_t_are_the_tables(degrees, expected):
    assert t_quantile(0.975, degrees) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("n", "k", "q"), [(10, 3, 0.2), (40, 39, 0.9), (662, 655, 0.99), (662, 331, 0.5), (5000, 4930, 0.99)])
def test_the_beta_distribution_sums_the_binomial(n, k, q):
    at_least_k = math.fsum(
        math.exp(math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) + i * math.log(q) + (n - i) * math.log1p(-q))
        for i in range(k, n + 1)
    )
    assert beta_cdf(q, k, n - k + 1) == pytest.approx(at_least_k, rel=1e-8)


def test_the_ends_of_the_beta_distribution():
    assert (beta_cdf(0.0, 2, 3), beta_cdf(1.0, 2, 3), beta_cdf(0.5, 7, 7)) == (0.0, 1.0, pytest.approx(0.5))
    assert t_quantile(0.5, 5) == 0.0
