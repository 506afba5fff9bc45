"""Percentiles, their intervals and the samples they need, on numbers known beforehand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from txl_deploy.bench.stats import (
    LatencySummary,
    effective_samples,
    lag1_autocorrelation,
    minimum_samples,
    order_statistic_interval,
    parse_percentiles,
    percentile,
    percentile_interval,
    ratio_interval,
    samples_for_interval,
)
from txl_train.errors import UsageError


@pytest.mark.parametrize(("p", "expected"), [(50, 5.0), (90, 9.0), (91, 10.0), (95, 10.0), (99, 10.0), (10, 1.0), (10.1, 2.0)])
def test_a_percentile_is_the_sample_at_the_nearest_rank(p, expected):
    assert percentile([10, 3, 7, 1, 9, 2, 8, 4, 6, 5], p) == expected


def test_a_percentile_of_one_sample_is_that_sample():
    assert percentile([7.5], 99) == 7.5


def test_a_fractional_percentile_is_not_moved_by_binary_rounding():
    # 0.999 * 1000 is above 999 in binary arithmetic, which would give the 1000th sample
    assert percentile(range(1, 1001), 99.9) == 999


@given(st.lists(st.floats(0.01, 1e4), min_size=1, max_size=60), st.integers(1, 99))
def test_the_rule_is_numpys_inverted_cdf(samples, p):
    assert percentile(samples, p) == np.percentile(samples, p, method="inverted_cdf")


@pytest.mark.parametrize(("p", "none_over", "one_over"), [(90, 44, 64), (95, 90, 130), (99, 459, 662)])
def test_loadgens_rule_gives_its_published_sample_counts(p, none_over, one_over):
    assert minimum_samples(p, exceeding=0) == none_over
    assert minimum_samples(p) == one_over


def test_a_low_percentile_needs_as_many_samples_as_its_mirror_image():
    assert minimum_samples(1) == minimum_samples(99)


@pytest.mark.parametrize(("p", "n"), [(90, 36), (95, 72), (99, 368)])
def test_an_interval_exists_from_the_sample_count_on_that_order_statistics_allow(p, n):
    samples = np.random.default_rng(0).permutation(n)  # in a random order: neighbours are independent
    assert samples_for_interval(p) == n
    assert percentile_interval(samples[1:], p) is None
    assert percentile_interval(samples, p) is not None


def test_the_medians_interval_has_the_ranks_of_the_textbook():
    # n = 100: the 40th and the 61st sample hold it in at least 95 % (Conover, Practical Nonparametric Statistics, table of the binomial),
    # the 41st and the 60th in less, and fractional ranks between them in 95 %
    low, high = percentile_interval(np.random.default_rng(0).permutation(100) + 1, 50)
    assert 40 < low < 41
    assert 60 < high < 61


@pytest.mark.parametrize("p", [50, 90])
def test_the_interval_covers_the_true_percentile_as_often_as_it_says(p):
    generator = np.random.default_rng(3)
    truth = -np.log(1 - p / 100)  # of the standard exponential distribution
    hits = 0
    for samples in generator.exponential(size=(400, 120)):
        # a few in 100 short series look autocorrelated by chance, and may then be too short for an interval
        interval = percentile_interval(samples, p) or order_statistic_interval(np.sort(samples), p)
        hits += interval[0] <= truth <= interval[1]
    # nominal 95 %; 3 standard errors of 400 trials are 3.3 %
    assert 0.917 <= hits / 400 <= 0.983


def slow_moods(n, seed=0):
    """Return latencies of a machine that is slow for some 50 steps on end, every other time."""
    generator = np.random.default_rng(seed)
    return generator.lognormal(0, 0.1, n) * np.where(np.arange(n) // 50 % 2, 1.5, 1.0)


def test_samples_that_resemble_their_neighbours_get_wider_intervals_than_the_same_ones_shuffled():
    samples = slow_moods(4000)
    shuffled = np.random.default_rng(1).permutation(samples)
    (low, high), (shuffled_low, shuffled_high) = percentile_interval(samples, 90), percentile_interval(shuffled, 90)
    assert low < shuffled_low < shuffled_high < high
    assert effective_samples(samples) < 4000 / 10
    assert effective_samples(shuffled) > 4000 / 2


def test_where_too_little_is_left_there_is_no_interval():
    summary = LatencySummary.of(slow_moods(700))
    assert summary.interval_ms(99) is None
    assert summary.effective_n(99) < samples_for_interval(99)
    assert summary.mean_interval_ms is None


def test_the_order_of_samples_does_not_move_the_percentile_itself():
    assert LatencySummary.of(slow_moods(700)).percentile_ms(99) == percentile(sorted(slow_moods(700)), 99)


def test_the_mean_has_an_interval_in_the_row():
    low, high = LatencySummary.of(np.random.default_rng(0).lognormal(0, 0.1, 400)).to_row()["latency_ms_mean_interval_95"]
    assert low < np.exp(0.005) < high < low + 0.03


def test_neighbours_that_alternate_and_those_that_stay():
    assert lag1_autocorrelation([1, 2] * 50) < -0.9
    assert lag1_autocorrelation([1] * 50 + [2] * 50) > 0.9
    assert lag1_autocorrelation([3.0] * 10) == 0.0


def test_the_interval_of_a_ratio_holds_it_and_turns_with_it():
    generator = np.random.default_rng(6)
    a, b = generator.lognormal(0, 0.2, 700), 1.1 * generator.lognormal(0, 0.2, 700)
    low, high = ratio_interval(b, a, 50)
    assert low < 1.1 < high < low + 0.08
    assert ratio_interval(a, b, 50) == pytest.approx((1 / high, 1 / low))
    assert ratio_interval(a[:5], b, 50) is None


@pytest.mark.slow
@pytest.mark.parametrize("rho", [0.0, 0.5])
def test_intervals_hold_the_truth_for_independent_and_for_autocorrelated_samples(rho):
    generator = np.random.default_rng(11)
    x = generator.standard_normal((200, 662))
    for t in range(1, 662):
        x[:, t] = rho * x[:, t - 1] + (1 - rho**2) ** 0.5 * x[:, t]
    summaries = [LatencySummary.of(samples) for samples in np.exp(0.25 * x)]
    for p, truth in ((50, 1.0), (90, np.exp(0.25 * 1.28155)), (None, np.exp(0.25**2 / 2))):
        intervals = [s.mean_interval_ms if p is None else s.interval_ms(p) for s in summaries]
        # nominal 95 %; 3 standard errors of 200 trials are 4.6 %. benchmarks/interval_coverage.py measures it with 2,000 for all series
        assert 0.904 <= np.mean([low <= truth <= high for low, high in intervals]) <= 0.996


def test_a_summary_holds_what_a_row_needs():
    row = LatencySummary.of([1.0, 2.0, 3.0, 6.0]).to_row()
    expected = {"latency_ms_p50": 2.0, "latency_ms_p90": 6.0, "latency_ms_p95": 6.0, "latency_ms_p99": 6.0}
    expected |= {"latency_ms_mean": 3.0, "latency_ms_min": 1.0, "latency_ms_max": 6.0, "n": 4}
    assert {name: row[name] for name in expected} == expected


def test_a_summary_takes_any_percentiles():
    summary = LatencySummary.of(range(1, 1001), (99.9, 25, 99.9))
    assert [estimate.p for estimate in summary.percentiles] == [25, 99.9]
    assert summary.to_row()["latency_ms_p99.9"] == 999


@pytest.mark.parametrize(
    ("n", "expected"),
    [
        (120, ("p95 from 120 samples: fewer than 130", "p99 from 120 samples: fewer than 459")),
        (500, ("p99 from 500 samples: fewer than 662",)),
        (662, ()),
    ],
)
def test_percentiles_from_too_few_samples_carry_a_note(n, expected):
    assert LatencySummary.of(np.ones(n)).notes == expected


@pytest.mark.parametrize("samples", [[], [1.0, float("nan")], [float("inf")], [[1.0], [2.0]]])
def test_what_is_no_flat_list_of_finite_numbers_is_refused(samples):
    with pytest.raises(ValueError, match=r"percentiles need|finite"):
        percentile(samples, 50)


@pytest.mark.parametrize(
    ("text", "expected"), [("50,90,95,99", (50, 90, 95, 99)), ("99 50", (50, 99)), ("p99.9, 50,50", (50, 99.9)), ("90", (90,))]
)
def test_percentiles_are_read_in_rising_order_each_once(text, expected):
    assert parse_percentiles(text) == expected


@pytest.mark.parametrize("text", ["", " , ", "0", "100", "-5", "ninety", "50;90", "nan", "1e400"])
def test_wrong_percentiles_are_an_error_with_a_remedy(text):
    with pytest.raises(UsageError) as caught:
        parse_percentiles(text)
    assert "--percentiles" in caught.value.remedy
