"""How often the 95 % intervals of `txl bench` hold the true value: simulated latencies, independent and autocorrelated.

    python benchmarks/interval_coverage.py --out benchmarks/results/interval_coverage_202611

Draws series whose true percentiles and mean are known in closed form, summarises each as `txl bench` does, and counts. Where the samples
are too alike for an interval none is printed (and `txl bench` calls the row INVALID), so the share that is printed is counted, too.
Writes <out>.json and <out>.md; the same seed gives the same files. Exit 1 if an interval that is printed in most runs leaves the band.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import NormalDist

import numpy as np
import running  # noqa: F401  # makes the packages below importable
from numpy.typing import NDArray

from txl_deploy.bench.stats import STANDARD_PERCENTILES, Interval, LatencySummary, order_statistic_interval
from txl_train.files import whole_or_absent

NOMINAL, BAND = 0.95, (0.93, 0.97)
SAMPLES = (662, 2000)
SCATTER = 0.25
"""Standard deviation of the logarithm of a lognormal latency."""
SLOW, SLOW_SHARE, SLOW_STEPS, REGIME_SCATTER = 1.3, 0.2, 10.0, 0.1
"""A machine of two moods: the slow one takes so many times as long, so large a share of the steps, and so many steps on end on average."""
BATCH = 50
"""Series drawn and summarised by one job."""


@dataclass(frozen=True)
class Series:
    """A kind of latencies."""

    name: str
    description: str
    correlation: float | None
    """Of the logarithms of neighbours; None for the machine of two moods."""


SERIES = (
    Series("independent", "lognormal, independent", 0.0),
    Series("AR(1) 0.3", "lognormal, neighbours correlated 0.3", 0.3),
    Series("AR(1) 0.5", "lognormal, neighbours correlated 0.5", 0.5),
    Series("AR(1) 0.8", "lognormal, neighbours correlated 0.8", 0.8),
    Series("two moods", f"{SLOW_SHARE:.0%} of the steps {SLOW} times as long, {SLOW_STEPS:.0f} on end on average", None),
)


@dataclass(frozen=True)
class Coverage:
    """What one kind of interval did."""

    series: str
    n: int
    quantity: str
    truth: float
    runs: int
    printed: int
    """Runs whose samples were enough for an interval."""
    covered: int
    """Of these, runs whose interval held the truth."""
    covered_if_called_independent: int | None
    """Of all runs, had the samples been taken for independent ones; None for the mean."""

    @property
    def share(self) -> float | None:
        """Share of the printed intervals that held the truth; None if none was printed."""
        return self.covered / self.printed if self.printed else None

    @property
    def in_band(self) -> bool | None:
        """Whether that share is within BAND; None where most runs were refused, which is what `txl bench` then says of the row."""
        return None if self.share is None or self.printed < self.runs / 2 else BAND[0] <= self.share <= BAND[1]


def draw(series: Series, generator: np.random.Generator, runs: int, n: int) -> NDArray[np.float64]:
    """Return latencies, [runs, n]."""
    normal = generator.standard_normal((runs, n))
    if series.correlation is None:
        leave = 1 / SLOW_STEPS
        enter = leave * SLOW_SHARE / (1 - SLOW_SHARE)
        chance = generator.random((runs, n))
        slow = np.empty((runs, n), dtype=bool)
        slow[:, 0] = chance[:, 0] < SLOW_SHARE
        for t in range(1, n):
            slow[:, t] = np.where(slow[:, t - 1], chance[:, t] >= leave, chance[:, t] < enter)
        return np.asarray(np.exp(REGIME_SCATTER * normal) * np.where(slow, SLOW, 1.0))
    rho = series.correlation
    for t in range(1, n):
        normal[:, t] = rho * normal[:, t - 1] + math.sqrt(1 - rho**2) * normal[:, t]
    return np.exp(SCATTER * normal)


def truth_of(series: Series, p: float | None) -> float:
    """Return the true p-th percentile, or the mean for None."""
    levels = [(1.0, 1.0, SCATTER)]
    if series.correlation is None:
        levels = [(1 - SLOW_SHARE, 1.0, REGIME_SCATTER), (SLOW_SHARE, SLOW, REGIME_SCATTER)]
    if p is None:
        return sum(weight * level * math.exp(scatter**2 / 2) for weight, level, scatter in levels)
    normal, low, high = NormalDist(), 0.01, 100.0
    for _ in range(100):
        middle = math.sqrt(low * high)
        below = sum(weight * normal.cdf(math.log(middle / level) / scatter) for weight, level, scatter in levels)
        low, high = (middle, high) if below < p / 100 else (low, middle)
    return math.sqrt(low * high)


def batch(job: tuple[Series, int, int, int]) -> dict[str, list[int]]:
    """Return how many intervals of each quantity were printed, held the truth, and would have if the samples were called independent."""
    series, n, runs, seed = job
    counts = {quantity_name(p): [0, 0, 0] for p in (*STANDARD_PERCENTILES, None)}
    truths = {p: truth_of(series, p) for p in (*STANDARD_PERCENTILES, None)}
    for samples in draw(series, np.random.default_rng(seed), runs, n):
        summary = LatencySummary.of(samples)
        intervals: dict[float | None, Interval | None] = {e.p: e.interval_ms for e in summary.percentiles}
        intervals[None] = summary.mean_interval_ms
        for p, interval in intervals.items():
            count = counts[quantity_name(p)]
            if interval is not None:
                count[0] += 1
                count[1] += interval[0] <= truths[p] <= interval[1]
            if p is not None and (naive := order_statistic_interval(np.sort(samples), p)) is not None:
                count[2] += naive[0] <= truths[p] <= naive[1]
    return counts


def quantity_name(p: float | None) -> str:
    """Return what a percentile, or the mean (None), is called."""
    return "mean" if p is None else f"p{p:g}"


def simulate(series: Series, n: int, runs: int, *, seed: int, pool: ProcessPoolExecutor | None = None) -> list[Coverage]:
    """Return the coverage of every quantity of one kind of latencies at n samples."""
    number = SERIES.index(series) * 1000 + n
    sizes = [BATCH] * (runs // BATCH) + ([runs % BATCH] if runs % BATCH else [])
    jobs = [(series, n, size, (seed * 100_003 + number) * 1009 + i) for i, size in enumerate(sizes)]
    batches = list(map(batch, jobs) if pool is None else pool.map(batch, jobs))
    found = []
    for p in (*STANDARD_PERCENTILES, None):
        name = quantity_name(p)
        printed, covered, naive = (sum(counts[name][i] for counts in batches) for i in range(3))
        found.append(Coverage(series.name, n, name, truth_of(series, p), runs, printed, covered, None if p is None else naive))
    return found


def markdown(found: Sequence[Coverage], command: str, source: str) -> str:
    """Return the result as a page."""
    runs = found[0].runs
    error = math.sqrt(NOMINAL * (1 - NOMINAL) / runs)
    kept = [row for row in found if row.in_band is not None]
    lines = [
        "# Do 95 % intervals hold the true value in 95 of 100 runs?",
        "",
        f"{runs:,} simulated runs of each kind of latencies, summarised as `txl bench` does. {sum(row.in_band is True for row in kept)} "
        f"of the {len(kept)} intervals that are printed in most runs hold the truth in {BAND[0]:.0%} to {BAND[1]:.0%} of them "
        f"(standard error of a share: {error:.1%}). The other {len(found) - len(kept)} are refused: there the samples resemble each "
        "other so much that they tell too little of that percentile, and `txl bench` prints no interval and calls the row INVALID.",
        "",
        "| latencies | n | quantity | truth | printed in | hold the truth | if taken for independent | |",
        "|---|---:|---|---:|---:|---:|---:|---|",
    ]
    for row in found:
        share = "" if row.share is None else f"{row.share:.1%}"
        naive = "" if row.covered_if_called_independent is None else f"{row.covered_if_called_independent / row.runs:.1%}"
        verdict = "refused" if row.in_band is None else "within the band" if row.in_band else "OUTSIDE the band"
        cells = [row.series, f"{row.n:,}", row.quantity, f"{row.truth:.4f}", f"{row.printed / row.runs:.1%}", share, naive, verdict]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", *(f"- **{series.name}**: {series.description}." for series in SERIES)]
    lines += [
        "",
        "Where most runs are refused, the share is of the few that are not: those in which, by chance, the samples looked less alike than "
        "they are.",
        "",
        f"Made by `{command}`; the counts are in [{source}]({source}).",
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Simulate, write both files and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="PATH", help="write PATH.json and PATH.md")
    parser.add_argument("--runs", type=int, default=2000, metavar="N", help="series of each kind and length (default: 2000)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes (default: 1)")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="of the drawn series (default: 1)")
    options = parser.parse_args()
    found = []
    with ProcessPoolExecutor(options.jobs) as pool:
        for series in SERIES:
            for n in SAMPLES:
                found += simulate(series, n, options.runs, seed=options.seed, pool=pool)
                print(f"{series.name}, {n}: " + ", ".join(_told(row) for row in found[-5:]), file=sys.stderr, flush=True)
    command = f"python benchmarks/interval_coverage.py --runs {options.runs} --seed {options.seed} --out {options.out}"
    document = {
        "schema": "txl.interval_coverage",
        "schema_version": 1,
        "command": command,
        "nominal": NOMINAL,
        "band": BAND,
        "series": [asdict(series) for series in SERIES],
        "rows": [asdict(row) | {"share": row.share, "in_band": row.in_band} for row in found],
    }
    source = options.out.with_name(f"{options.out.name}.json")
    for path, text in (
        (source, json.dumps(document, indent=1)),
        (options.out.with_name(f"{options.out.name}.md"), markdown(found, command, source.name)),
    ):
        with whole_or_absent(path) as file:
            file.write(text.rstrip("\n").encode() + b"\n")
    return int(any(row.in_band is False for row in found))


def _told(row: Coverage) -> str:
    return f"{row.quantity} {'refused' if row.share is None else f'{row.share:.1%}'} ({row.printed / row.runs:.0%})"


if __name__ == "__main__":
    sys.exit(main())
