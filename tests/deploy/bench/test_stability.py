"""When a warm-up may end, how steady samples were, and the verdict on a row."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from txl_deploy.bench.result import Stability
from txl_deploy.bench.stability import drift_of, is_steady, judge, outliers, stability
from txl_deploy.bench.stats import LatencySummary

NOISE = np.random.default_rng(0).lognormal(0, 0.02, 2000)
STEADY = Stability(
    lag1_autocorrelation=0.0, drift=0.0, drift_interval=(-0.01, 0.01), outliers=0, effective_n=2000.0, warmup_steps=10, warmup_steady=True
)


def verdict(samples=NOISE, *, percentiles=(50, 99), duration_s=10.0, **changes):
    latency = LatencySummary.of(samples)
    return judge(latency, dataclasses.replace(STEADY, **changes), percentiles=percentiles, duration_s=duration_s, min_duration_s=10.0)


@pytest.mark.parametrize("n", [0, 1, 8])
def test_a_warm_up_of_few_steps_is_never_steady(n):
    assert not is_steady([1.0] * n)


def test_constant_steps_are_steady():
    assert is_steady([1.0] * 9)


def test_steps_that_become_faster_are_not_steady_until_they_stay():
    warming = [10.0 * 0.9**i for i in range(30)]
    assert not is_steady(warming)
    assert is_steady(warming + [warming[-1]] * 30)


def test_a_slow_first_step_is_forgiven():
    assert is_steady([500.0] + [1.0] * 9)


def test_noise_without_a_trend_is_steady_nearly_always():
    generator = np.random.default_rng(1)
    steady = [is_steady(generator.lognormal(0, 0.2, 30)) for _ in range(200)]
    assert np.mean(steady) > 0.9


def test_a_row_that_meets_every_rule_is_valid():
    assert verdict() == ()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"samples": NOISE[:661]}, "too few samples for p99: 661 of 662"),
        ({"duration_s": 8.9}, "measured for 8.9 s, shorter than 10 s"),
        ({"drift": 0.06, "drift_interval": (0.04, 0.08)}, "drift: the second half is 6.0% slower than the first"),
        ({"drift": -0.06, "drift_interval": (-0.08, -0.04)}, "drift: the second half is 6.0% faster than the first"),
        ({"effective_n": 29.0}, "autocorrelated samples: 2000 tell as much of the mean as 29 independent ones, fewer than 30"),
        ({"warmup_steady": False}, "the warm-up of 10 steps did not become steady"),
    ],
)
def test_each_rule_that_is_broken_is_told(changes, reason):
    assert verdict(**changes) == (reason,)


@pytest.mark.parametrize("changes", [{"drift": 0.04, "drift_interval": (0.03, 0.05)}, {"drift": 0.06, "drift_interval": (-0.01, 0.13)}])
def test_a_small_drift_and_one_that_may_be_chance_are_let_pass(changes):
    assert verdict(**changes) == ()


def test_fewer_samples_are_enough_for_a_lower_percentile():
    assert verdict(NOISE[:70], percentiles=(50, 90)) == ()


def test_samples_too_much_alike_for_a_p99_are_told():
    (reason,) = verdict(np.sort(NOISE[:700]), percentiles=(99,))
    assert "autocorrelated samples: 700 tell as much of p99 as" in reason
    assert "fewer than 368" in reason


def test_the_drift_between_the_halves_has_an_interval_that_holds_it():
    drift, (low, high) = drift_of(NOISE * np.where(np.arange(2000) < 1000, 1.0, 1.2))
    assert low < 0.2 < high
    assert drift == pytest.approx(0.2, abs=0.01)
    assert drift_of([1.0]) == (0.0, None)


def test_outliers_are_far_above_the_median_by_both_rules():
    assert outliers([*NOISE, 1.4, 1.6, 50.0]) == 2


def test_stability_tells_what_was_measured():
    told = stability(NOISE, [1.0] * 12)
    assert (told.warmup_steps, told.warmup_steady, told.outliers, told.effective_n) == (12, True, 0, 2000.0)
    assert abs(told.lag1_autocorrelation) < 0.1
