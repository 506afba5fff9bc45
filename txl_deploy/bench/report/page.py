"""The HTML page: one document that loads nothing and answers what was measured, on what, whether to believe it, and how to repeat it.

Knows what the page's parts are made of. Their looks stand in `bench/templates`, the charts in `charts`; all that comes from a file is
escaped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from txl_deploy.bench import plots
from txl_deploy.bench.compare import LEAST_TURNS, compare_paired
from txl_deploy.bench.harness import BOUNDARIES
from txl_deploy.bench.published import PublishedTable
from txl_deploy.bench.report import charts as drawn
from txl_deploy.bench.report.comparisons import HEADER, Comparison, comparisons_of
from txl_deploy.bench.report.findings import (
    Findings,
    Training,
    baseline_levels,
    corpus_splits,
    flat_facts,
    format_value,
    in_bits,
    scores,
)
from txl_deploy.bench.report.series import (
    RUNTIME_TITLES,
    Series,
    disturbances,
    doubts,
    format_ms,
    format_perplexity,
    format_tokens_per_s,
    group_series,
    headline,
    is_unproved,
    lacks_proof,
    remarks,
    shown_percentiles,
    specification_heading,
    unsound,
    validity_of,
    verdict_of,
)
from txl_deploy.bench.result import BenchResult, Row
from txl_deploy.bench.stats import PERCENTILE_RULE, minimum_samples
from txl_deploy.bench.training import TrainingResult, scaling_tables
from txl_train.errors import EnvironmentUnfitError
from txl_train.files import whole_or_absent
from txl_train.metrics import bits_per_char, perplexity


@dataclass(frozen=True)
class Speedup:
    """How many times faster one median is than another."""

    times: float
    is_clear: bool
    """True if the 95 % interval of the ratio leaves out 1."""
    interval_95: tuple[float, float] | None = None
    """Of rows that took turns; None where the medians are compared by their own intervals."""


@dataclass(frozen=True)
class Link:
    """One link of the chain of checksums."""

    what: str
    name: str
    sha256: str | None
    """None where it is missing."""


@dataclass(frozen=True)
class BenchView:
    """One result as the page shows it."""

    name: str
    sha256: str | None
    result: BenchResult
    series: list[Series]
    charts: list[plots.Chart]

    @property
    def batch_sizes(self) -> list[int]:
        """Those measured, rising."""
        return sorted({row.batch_size for row in self.result.rows})

    @property
    def percentiles(self) -> list[float]:
        """Those shown in tables."""
        return shown_percentiles(self.result)

    @property
    def doubts(self) -> list[str]:
        """Percentiles from too few samples."""
        return doubts(self.result.rows, self.percentiles)

    @property
    def notes(self) -> list[str]:
        """What else to know of its rows."""
        return disturbances(self.result.environment) + remarks(self.result.rows)

    @property
    def headline(self) -> str:
        """What was measured where and when."""
        return headline(self.result)

    @property
    def baseline(self) -> Series:
        """The series that speeds are compared with: the reference, or else the first."""
        return next((series for series in self.series if series.is_reference), self.series[0])

    def speedup(self, series: Series, batch_size: int) -> Speedup | None:
        """Return how a series' median step compares with the baseline's at a batch size.

        Rows that took turns are compared turn by turn: what the machine did hit both, so that the ratio holds where the latencies
        themselves are INVALID. None for the baseline itself, for what lacks, and where one of the two failed, or is INVALID and took no
        turns.
        """
        row, base = series.at(batch_size), self.baseline.at(batch_size)
        if row is None or base is None or series is self.baseline or row.verified is False or base.verified is False:
            return None
        if len(row.block_sizes) >= LEAST_TURNS and row.block_sizes == base.block_sizes:
            ratio = compare_paired(row, base)
            return Speedup(ratio.ratio, ratio.verdict != "no difference", ratio.interval_95)
        if unsound(row) or unsound(base):
            return None
        mine, other = (r.latency.interval_ms(50) for r in (row, base))
        apart = mine is not None and other is not None and (mine[1] < other[0] or other[1] < mine[0])
        return Speedup(base.latency.percentile_ms(50) / row.latency.percentile_ms(50), apart)

    def flaw(self, series: Series, batch_size: int) -> str:
        """Return why there is no speed to tell at a batch size: FAILED, INVALID, or the baseline's; empty where nothing is wrong."""
        row, base = series.at(batch_size), self.baseline.at(batch_size)
        if row is None or unsound(row):
            return "" if row is None else unsound(row)
        return f"baseline {unsound(base)}" if base is not None and unsound(base) else ""

    @property
    def lacks_proof(self) -> bool:
        """True where it is to be stamped UNVALIDATED."""
        return lacks_proof(self.result)

    def chain(self, series: Series) -> list[Link]:
        """Return the checksums from the checkpoint to this result."""
        row = series.rows[0]
        links = [Link("checkpoint", "weights as trained", row.checkpoint_sha256)]
        if row.artifact is not None:
            parent = getattr(row.artifact, "parent_manifest_sha256", None)
            if parent is not None:
                links.append(Link("graph", "manifest", parent))
            links.append(Link("engine" if parent else "artifact", row.artifact.name, row.artifact.manifest_sha256))
            receipt = row.proof.receipt_sha256 if row.proof else None
            links.append(Link("receipt", "proof of its perplexity" if receipt else _no_receipt(row), receipt))
        return [*links, Link("result", self.name, self.sha256)]

    @property
    def changes(self) -> list[tuple[str, Any, Any]]:
        """What of the machine was other after measuring than before: (what, before, after)."""
        before, after = (dict(flat_facts(e)) for e in (self.result.environment, self.result.environment_after))
        return [(name, before.get(name, ""), value) for name, value in after.items() if before.get(name) != value]


def _no_receipt(row: Row) -> str:
    if row.proof is not None and row.proof.kind == "in run":
        return "none: compared within the run"
    return f"none{': ' + row.proof.reason if row.proof and row.proof.reason else ''}"


@dataclass(frozen=True)
class Belief:
    """One answer to whether the figures are to be believed."""

    state: str
    """good, bad or unknown."""
    text: str


def write_report(found: Findings, out: Path, *, published: Sequence[PublishedTable] = ()) -> list[Path]:
    """Write the page to `out` and each chart as PNG beside it; return the paths, the page first.

    EnvironmentUnfitError without matplotlib and Jinja, or where `out` cannot be written.
    """
    several = len(found.benches) > 1
    benches = []
    for number, (name, result) in enumerate(found.benches, start=1):
        series = group_series(result.rows)
        sha256 = found.bench_sha256[number - 1] if found.bench_sha256 else None
        benches.append(BenchView(name, sha256, result, series, drawn.bench_charts(result, series, f"-{number}" if several else "")))
    training = [] if found.training is None else [drawn.training_chart(found.training, baseline_levels(found))]
    scaling = [
        chart
        for number, (_, result) in enumerate(found.training_benchmarks, start=1)
        if (chart := drawn.scaling_chart(result.rows, f"-{number}" if len(found.training_benchmarks) > 1 else "")) is not None
    ]
    parity = [drawn.parity_chart(document, f"drift-{Path(name).stem}") for name, document in found.parities]
    page = render_page(found, benches, training, scaling, parity, published)
    charts = [*training, *(chart for bench in benches for chart in bench.charts), *scaling, *(chart for chart in parity if chart)]
    paths = [out] + [out.parent / f"{chart.name}.png" for chart in charts]
    for path, content in zip(paths, [page.encode()] + [chart.png for chart in charts]):
        with whole_or_absent(path) as file:
            file.write(content)
    return paths


def render_page(
    found: Findings,
    benches: Sequence[BenchView],
    training_charts: Sequence[plots.Chart],
    scaling_charts: Sequence[plots.Chart],
    parity_charts: Sequence[plots.Chart | None],
    published: Sequence[PublishedTable],
) -> str:
    """Return the HTML page: one document that loads nothing."""
    try:
        import jinja2
    except ImportError as error:
        raise EnvironmentUnfitError(
            "The report needs Jinja2, which is not installed.", remedy="Install it with `pip install 'txl[report]'`."
        ) from error
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("txl_deploy.bench", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "ms": format_ms,
        "tokens_per_s": format_tokens_per_s,
        "perplexity": format_perplexity,
        "value": format_value,
        "label": lambda key: str(key).replace("_", " "),
    }
    rows = [row for bench in benches for row in bench.result.rows]
    comparisons = comparisons_of(found)
    beliefs = _beliefs(found, rows, comparisons)
    return environment.get_template("report.html.jinja").render(
        benches=benches,
        unvalidated=any(bench.lacks_proof for bench in benches),
        beliefs=beliefs,
        state="bad" if any(b.state == "bad" for b in beliefs) else "unknown" if any(b.state == "unknown" for b in beliefs) else "good",
        failed=[(series.label, row) for bench in benches for series in bench.series for row in series.rows if row.verified is False],
        commands=_commands(found),
        receipts=_receipts(found),
        other_receipts=found.other_receipts,
        training=found.training,
        training_charts=training_charts,
        training_facts=_training_facts(found.training),
        training_benchmarks=[(name, result, scaling_tables(result.rows)) for name, result in found.training_benchmarks],
        scaling_charts=scaling_charts,
        scores=scores(found),
        corpus_splits=corpus_splits(found.baselines),
        in_bits=in_bits(found),
        parities=[(name, document, chart) for (name, document), chart in zip(found.parities, parity_charts)],
        comparisons=comparisons,
        comparison_header=HEADER,
        published=published,
        tiles=_tiles(found, benches),
        rows=rows,
        boundaries=BOUNDARIES,
        percentile_rule=PERCENTILE_RULE,
        minimum_samples=minimum_samples,
        verdict_of=verdict_of,
        validity_of=validity_of,
        is_unproved=is_unproved,
        heading_of=specification_heading,
        facts=flat_facts,
        parity_facts=lambda parity: flat_facts({key: parity[key] for key in parity if key not in ("passed", "reason", "segments")}),
    )


def _beliefs(found: Findings, rows: Sequence[Row], comparisons: Sequence[Comparison]) -> list[Belief]:
    """Answer whether to believe the figures: were the right models timed, are the latencies sound, was the machine quiet."""
    beliefs: list[Belief] = []
    if rows:
        failed, unchecked = [r for r in rows if r.verified is False], [r for r in rows if r.verified is None]
        if failed:
            text = f"Do not use: {len(failed)} of {len(rows)} measurements are of a model that computes something else than its checkpoint."
            beliefs.append(Belief("bad", text))
        elif unchecked:
            text = f"{len(unchecked)} of {len(rows)} measurements were not checked against the checkpoint in the run itself."
            beliefs.append(Belief("unknown", text))
        else:
            largest = max(abs(r.perplexity_rel_diff or 0.0) for r in rows)
            bound = max(r.tolerance or 0.0 for r in rows)
            text = (
                f"All {len(rows)} measurements are of the model that was trained: the perplexity of exactly the timed steps is the "
                f"checkpoint's in FP32 eager PyTorch within {largest:.1e} (bound {bound:.0e})."
            )
            beliefs.append(Belief("good", text))
    for name, result in found.benches:
        if lacks_proof(result):
            beliefs.append(Belief("bad", f"UNVALIDATED: {name} was measured without receipts, so nothing proves what its rows compute."))
    beliefs += [Belief("bad", f"{stamp}.") for comparison in comparisons for stamp in comparison.stamps]
    beliefs += _compared(comparisons)
    passed = [r for r in _receipts(found) if r.get("passed") is True]
    if _receipts(found):
        state = "good" if len(passed) == len(_receipts(found)) else "bad"
        text = f"{len(passed)} of {len(_receipts(found))} receipts prove, over a whole split, that artifact and checkpoint are equivalent."
        beliefs.append(Belief(state, text))
    judged, invalid = [r for r in rows if r.valid is not None], [r for r in rows if r.valid is False]
    if rows and len(judged) < len(rows):
        beliefs.append(
            Belief("unknown", f"Of {len(rows) - len(judged)} rows nobody judged whether their latencies are sound: an older result.")
        )
    if judged:
        text = f"{len(judged) - len(invalid)} of {len(judged)} rows are VALID: enough samples, steady, undisturbed."
        beliefs.append(Belief("bad" if invalid else "good", text))
    if found.parities:
        agree = sum(document.get("passed") is True for _, document in found.parities)
        text = f"{agree} of {len(found.parities)} comparisons over a recurrent rollout passed."
        beliefs.append(Belief("good" if agree == len(found.parities) else "bad", text))
    noisy = [sentence for _, result in found.benches for sentence in disturbances(result.environment)]
    return beliefs + [Belief("unknown", sentence) for sentence in noisy]


def _receipts(found: Findings) -> list[Mapping[str, Any]]:
    """Return one receipt of each artifact and text, those within results first; of several, one that proves nothing if there is such."""
    listed = [receipt for _, result in found.benches for receipt in result.receipts] + [receipt for _, receipt in found.receipts]
    kept: dict[tuple[object, ...], Mapping[str, Any]] = {}
    for index, receipt in enumerate(listed):
        about = tuple(receipt.get(name) for name in ("manifest_sha256", "split", "corpus_sha256"))
        key = (index,) if about[0] is None else about
        if key not in kept or receipt.get("passed") is not True:
            kept[key] = receipt
    return list(kept.values())


def _compared(comparisons: Sequence[Comparison]) -> list[Belief]:
    """Say of each comparison whether something became slower."""
    beliefs = []
    for comparison in comparisons:
        total = len(comparison.lines)
        if comparison.regressions:
            text = f"REGRESSION: {comparison.regressions} of {total} rows are slower by more than is let pass ({comparison.title})."
            beliefs.append(Belief("bad", text))
        if comparison.uncompared:
            beliefs.append(Belief("unknown", f"{comparison.uncompared} of {total} rows have no sound comparison ({comparison.title})."))
        if not comparison.regressions and not comparison.uncompared and total:
            beliefs.append(Belief("good", f"None of {total} compared rows is a regression ({comparison.title})."))
    return beliefs


def _commands(found: Findings) -> list[str]:
    documents: list[BenchResult | TrainingResult] = [result for _, result in found.benches]
    documents += [result for _, result in found.training_benchmarks]
    return list(dict.fromkeys(document.command for document in documents))


def _training_facts(training: Training | None) -> list[tuple[str, str]]:
    if training is None:
        return []
    facts = []

    def figure(nats: float) -> str:
        return f"{bits_per_char(nats):.4f} bits per character" if training.in_bits else f"perplexity {format_perplexity(perplexity(nats))}"

    if training.train:
        facts.append(("Steps", f"{training.train[-1][0]:,}"))
        facts.append(("Training loss at the end", f"{training.train[-1][1]:.4f} nats per token, {figure(training.train[-1][1])}"))
    if training.best is not None:
        facts.append(("Best on the validation split", f"{figure(training.best[1])}, at step {training.best[0]:,}"))
    if training.test is not None:
        facts.append(("On the test split", figure(training.test[1])))
    if training.seconds is not None:
        facts.append(("Time in training steps", f"{training.seconds / 60:.1f} minutes"))
    return facts


def _tiles(found: Findings, benches: Sequence[BenchView]) -> list[tuple[str, str, str]]:
    """The few figures that stand on top: (what, figure, remark)."""
    tiles = []
    best = None if found.training is None else found.training.best
    if found.training is not None and best is not None:
        figure = f"{bits_per_char(best[1]):.3f}" if found.training.in_bits else format_perplexity(perplexity(best[1]))
        unit = "bits per character" if found.training.in_bits else "perplexity"
        tiles.append((f"{unit}, validation", figure, f"best, at step {best[0]:,}"))
    if len(benches) == 1:
        tiles += _speed_tiles(benches[0])
    return tiles


def _speed_tiles(bench: BenchView) -> list[tuple[str, str, str]]:
    tiles = []
    sound = [(s, row) for s in bench.series for row in s.rows if row.verified is not False and row.valid is not False]
    smallest = bench.batch_sizes[0] if bench.batch_sizes else 0
    at_smallest = [pair for pair in sound if pair[1].batch_size == smallest]
    quick = min(at_smallest, key=lambda pair: pair[1].latency.percentile_ms(50), default=None)
    if quick is not None:
        series, row = quick
        tiles.append((f"ms a step, batch size {smallest}", format_ms(row.latency.percentile_ms(50)), f"median, {series.label}"))
        gain = bench.speedup(series, smallest)
        if gain is not None and gain.is_clear and math.isfinite(gain.times):
            rival = RUNTIME_TITLES.get(bench.baseline.rows[0].runtime, bench.baseline.label)
            tiles.append((f"speed against {rival}", f"{gain.times:.2f}×", f"{series.label}, batch size {smallest}"))
    most = max(sound, key=lambda pair: pair[1].tokens_per_s, default=None)
    if most is not None:
        tiles.append(("tokens per second, most", f"{most[1].tokens_per_s:,.0f}", f"{most[0].label}, batch size {most[1].batch_size}"))
    return tiles
