"""The simulation that shows how often intervals hold the truth, kept true on a small scale; and its record."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def simulation():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import interval_coverage
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
    return interval_coverage


def test_the_drawn_latencies_have_the_percentiles_and_the_mean_that_they_are_judged_by(simulation):
    for series in simulation.SERIES:
        drawn = simulation.draw(series, np.random.default_rng(0), 200, 2000)
        assert drawn.mean() == pytest.approx(simulation.truth_of(series, None), rel=0.005)
        assert np.percentile(drawn, 95) == pytest.approx(simulation.truth_of(series, 95), rel=0.01)


def test_a_quantity_that_most_runs_refuse_is_no_claim(simulation):
    row = simulation.Coverage("AR(1) 0.8", 662, "p99", 1.8, 100, 1, 0, 76)
    assert row.in_band is None
    assert simulation.Coverage("independent", 662, "p50", 1.0, 100, 100, 95, 95).in_band is True
    assert simulation.Coverage("independent", 662, "p50", 1.0, 100, 100, 90, 90).in_band is False


@pytest.mark.slow
def test_printed_intervals_cover_and_those_for_independent_samples_would_not(simulation):
    rows = [row for series in (simulation.SERIES[0], simulation.SERIES[2]) for row in simulation.simulate(series, 662, 300, seed=5)]
    for row in rows:
        if row.in_band is not None:
            assert 0.905 <= row.share <= 0.99, row  # the band, and 2.5 % more for 300 runs (two standard errors)
    naive = [row.covered_if_called_independent / row.runs for row in rows if row.series == "AR(1) 0.5" and row.quantity in ("p50", "p90")]
    assert statistics.mean(naive) < 0.9


def test_the_record_is_of_2000_runs_and_its_table_says_what_it_says(simulation):
    document = json.loads((ROOT / "benchmarks/results/interval_coverage_202611.json").read_text())
    rows = [simulation.Coverage(**{k: v for k, v in row.items() if k not in ("share", "in_band")}) for row in document["rows"]]
    assert {row.runs for row in rows} == {2000}
    assert [row.in_band for row in rows] == [row["in_band"] for row in document["rows"]]
    page = (ROOT / "benchmarks/results/interval_coverage_202611.md").read_text()
    assert page.strip() == simulation.markdown(rows, document["command"], "interval_coverage_202611.json").strip()
