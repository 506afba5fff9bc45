"""From result files to something people read: the table on the terminal, and one HTML page with its charts.

Knows how results are grouped, named and judged for a reader. The page's looks stand in `templates/report.html.jinja`, the charts' in
`plots`; numbers are computed where they were measured, and only formatted here. Everything that comes from a file is escaped.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from txl_deploy.bench import plots
from txl_deploy.bench.harness import BOUNDARIES
from txl_deploy.bench.result import BenchResult, Row
from txl_deploy.bench.stats import PERCENTILE_RULE, STANDARD_PERCENTILES, minimum_samples
from txl_train.errors import ArtifactError, EnvironmentUnfitError, UsageError
from txl_train.files import whole_or_absent
from txl_train.metrics import bits_per_char, perplexity

RUNTIME_TITLES = {
    "pytorch": "PyTorch",
    "compiled": "torch.compile",
    "torchscript": "TorchScript",
    "onnx": "ONNX Runtime",
    "trt": "TensorRT",
    "trt-rtx": "TensorRT-RTX",
}
DTYPE_TITLES = {"fp32": "FP32", "fp16": "FP16", "bf16": "BF16"}
REFERENCE_MARK = " (reference)"
MEMORY_TITLES = {"kv": "key/value memory", "hidden": "hidden-state memory"}

BUSY_SHARE = 0.1
"""Share of the processors' time used by others above which a measurement is called disturbed."""

# --- rows, named and grouped -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Series:
    """The rows of one runtime in one configuration, by rising batch size."""

    label: str
    """Short name, unique within its result."""
    title: str
    """All that distinguishes it."""
    rows: tuple[Row, ...]

    @property
    def is_reference(self) -> bool:
        """True for the FP32 eager model that the others are checked against."""
        return self.rows[0].is_reference

    @property
    def has_failed(self) -> bool:
        """True if a row computes something else than its checkpoint."""
        return any(row.verified is False for row in self.rows)

    def at(self, batch_size: int) -> Row | None:
        """Return the row of a batch size, None if it was not measured."""
        return next((row for row in self.rows if row.batch_size == batch_size), None)


def group_series(rows: Sequence[Row]) -> list[Series]:
    """Group rows into series in the order they come; a label names only what is needed to tell them apart."""
    groups: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.series, row.lengths, row.boundary, row.is_reference), []).append(row)
    firsts = [group[0] for group in groups.values()]
    of_one_dtype = len({row.dtype for row in firsts}) == 1
    labels = [
        RUNTIME_TITLES.get(row.runtime, row.runtime)
        + ("" if of_one_dtype and row.compute in ("", row.dtype) else f" {precision(row)}")
        + (REFERENCE_MARK if row.is_reference else "")
        for row in firsts
    ]
    details: tuple[Callable[[Row], str], ...] = (
        lambda row: row.memory,
        lambda row: "" if row.memory_dtype == row.dtype else f"{DTYPE_TITLES.get(row.memory_dtype, row.memory_dtype)} states",
        lambda row: row.provider,
        lambda row: f"tgt {row.tgt_len} mem {row.mem_len}",
        lambda row: row.artifact.name if row.artifact else "",
        lambda row: row.artifact.manifest_sha256[:8] if row.artifact else "",
    )
    for detail in details:
        for label in {label for label in labels if labels.count(label) > 1}:
            same = [i for i, other in enumerate(labels) if other == label]
            if len({detail(firsts[i]) for i in same}) > 1:
                for i in same:
                    labels[i] = f"{label} {detail(firsts[i])}".strip()
    series = []
    for label, group in zip(labels, groups.values()):
        row = group[0]
        named: tuple[tuple[dict[str, str], str], ...] = (
            (RUNTIME_TITLES, row.runtime),
            ({}, row.provider),
            ({}, precision(row)),
            (MEMORY_TITLES, row.memory),
            ({}, "" if row.memory_dtype == row.dtype else f"of {DTYPE_TITLES.get(row.memory_dtype, row.memory_dtype)}"),
        )
        title = " · ".join(titles.get(name, name) for titles, name in named if name)
        series.append(Series(label, title, tuple(sorted(group, key=lambda row: row.batch_size))))
    return series


def precision(row: Row) -> str:
    """Return the type of a row's weights, and that of its products where it is another one: FP16 (computed in FP32)."""
    stored = DTYPE_TITLES.get(row.dtype, row.dtype)
    return stored if row.compute in ("", row.dtype) else f"{stored} (computed in {DTYPE_TITLES.get(row.compute, row.compute)})"


def verdict_of(row: Row) -> str:
    """Return in a few characters whether the row computes what its checkpoint does."""
    if row.verified is None:
        return "not checked"
    if row.is_reference and row.verified:
        return "reference"
    if row.perplexity_rel_diff == 0:
        return "yes, equal"
    difference = "" if row.perplexity_rel_diff is None else f" {abs(row.perplexity_rel_diff):.0e}"
    return f"{'yes' if row.verified else 'NO'}{difference}"


# --- numbers as people read them -------------------------------------------------------------------------------------------------


def format_ms(value: float) -> str:
    """Format milliseconds with three digits or more: 0.412, 12.76, 1,234.5."""
    return f"{value:,.1f}" if value >= 1000 else f"{value:.2f}" if value >= 1 else f"{value:.3f}"


def format_perplexity(value: float | None) -> str:
    """Format a perplexity like the specification, 23.304, with fewer decimals when it is large; "not finite" for None."""
    return "not finite" if value is None else f"{value:.3f}" if value < 1000 else f"{value:,.1f}" if value < 1e7 else f"{value:.3g}"


def format_tokens_per_s(value: float) -> str:
    """Format a throughput like the specification: 3,346.3."""
    return f"{value:,.1f}"


def format_table(rows: Sequence[Row], percentiles: Sequence[float] = STANDARD_PERCENTILES) -> str:
    """Return the specification's table for a terminal: all series one below the other, then notes on what to doubt.

    A percentile from too few samples carries an asterisk.
    """
    head = [
        ["", "Batch", "Seq.", "Memory", "Throughput", "Latency", *("" for _ in percentiles), "", "", ""],
        ["Runtime", "size", "length", "length", "tok/s", "avg ms", *(f"{p:g}%" for p in percentiles), "n", "Perplexity", "Verified"],
    ]
    body: list[list[str]] = []
    for series in group_series(rows):
        for row in series.rows:
            cells = [series.label.removesuffix(REFERENCE_MARK), str(row.batch_size), str(row.tgt_len), str(row.mem_len)]
            cells += [format_tokens_per_s(row.tokens_per_s), format_ms(row.latency.mean_ms)]
            for p in percentiles:
                doubtful = row.latency.n < minimum_samples(p)
                cells.append(format_ms(row.latency.percentile_ms(p)) + ("*" if doubtful else " "))
            cells += [str(row.latency.n), format_perplexity(row.perplexity), verdict_of(row)]
            body.append(cells)
    widths = [max(len(line[i]) for line in head + body) for i in range(len(head[0]))]
    left_aligned = (0, len(widths) - 1)

    def line_of(cells: Sequence[str], *, is_head: bool = False) -> str:
        padded = [
            cell.ljust(width) if i in left_aligned else (cell + " " if is_head and 6 <= i < 6 + len(percentiles) else cell).rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths))
        ]
        return "  ".join(padded).rstrip()

    lines = [line_of(cells, is_head=True) for cells in head]
    lines.append("-" * max(len(line) for line in lines + [line_of(cells) for cells in body]))
    lines += [line_of(cells) for cells in body]
    footnotes = [f"* {doubt}" for doubt in doubts(rows, percentiles)] + remarks(rows)
    return "\n".join(lines + (["", *footnotes] if footnotes else []))


def format_summary(found: Findings) -> str:
    """Return for a terminal what the page shows first: the tables of latency, perplexities of whole splits, verdicts of parity."""
    parts = [format_table(result.rows, result.percentiles) for _, result in found.benches]
    listed = scores(found)
    if listed:
        head = f"{'Perplexity of a whole split':<28}{'split':>7}{'perplexity':>12}{'tokens':>12}"
        lines = [
            f"{score.model:<28}{score.split:>7}{format_perplexity(score.perplexity):>12}{score.n_tokens or 0:>12,}" for score in listed
        ]
        parts.append("\n".join([head, "-" * len(head), *lines]))
    verdicts = [
        f"Parity {'passed' if document.get('passed') is True else 'FAILED'}: {document.get('runtime', name)}: {document.get('reason', '')}"
        for name, document in found.parities
    ]
    if verdicts:
        parts.append("\n".join(verdicts))
    return "\n\n".join(parts)


def doubts(rows: Sequence[Row], percentiles: Sequence[float]) -> list[str]:
    """Return one sentence for each percentile that some row has too few samples for."""
    sentences = []
    for p in percentiles:
        counts = [row.latency.n for row in rows if row.latency.n < minimum_samples(p)]
        if counts:
            span = f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
            bare, needed = minimum_samples(p, exceeding=0), minimum_samples(p)
            least = f"{bare} are the least, " if min(counts) < bare else ""
            sentences.append(f"p{p:g} from {span} samples: {least}{needed} make it sound.")
    return sentences


def disturbances(environment: Mapping[str, Any]) -> list[str]:
    """Return what about the machine spoils a measurement: processors that others kept busy."""
    busy = environment.get("cpu_busy_before")
    if not isinstance(busy, (int, float)) or busy <= BUSY_SHARE:
        return []
    return [f"Other processes kept {busy:.0%} of the processors' time busy when measuring began: latencies are longer and scatter more."]


def remarks(rows: Sequence[Row]) -> list[str]:
    """Return the rows' own notes, each once, with the batch sizes it is about."""
    sizes: dict[str, dict[int, None]] = {}
    for row in rows:
        for note in row.notes:
            sizes.setdefault(note, {})[row.batch_size] = None
    return [f"{note} (batch size {', '.join(map(str, about))})" for note, about in sizes.items()]


# --- what a work folder holds ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Training:
    """The course of a training run."""

    train: list[tuple[int, float]]
    """(step, nats per token), averaged over the steps since the point before."""
    valid: list[tuple[int, float]]
    """(step, nats per token) on valid.txt."""
    test: tuple[int, float] | None
    """(step, nats per token) on test.txt after the end."""
    in_bits: bool
    """True where tokens are characters: figures are bits per character, not perplexities."""
    seconds: float | None
    """Time spent in training steps."""

    @property
    def best(self) -> tuple[int, float] | None:
        """The evaluation with the lowest loss."""
        return min(self.valid, key=lambda point: point[1], default=None)


@dataclass(frozen=True)
class Findings:
    """Everything a report is made of; what a folder lacks is empty."""

    benches: list[tuple[str, BenchResult]] = field(default_factory=list)
    """Results of `txl bench`, by file name."""
    training: Training | None = None
    parities: list[tuple[str, Mapping[str, Any]]] = field(default_factory=list)
    """Verdicts of `txl parity`, by file name."""
    evaluations: list[tuple[str, Mapping[str, Any]]] = field(default_factory=list)
    """Outcomes of `txl eval`, by file name."""
    baselines: Mapping[str, Any] | None = None
    """What `txl data stats` says of the corpus, perplexities of simple models included."""

    @property
    def is_empty(self) -> bool:
        """True if there is nothing to report."""
        return not (self.benches or self.training or self.parities or self.evaluations or self.baselines)


def gather(work_dir: Path | None, bench_files: Sequence[Path] = (), metrics_file: Path | None = None) -> Findings:
    """Read what there is: benchmark*, parity*, eval*.json, baselines.json and metrics.jsonl of the folder, and the files named.

    Files that are named replace the folder's of that kind. ArtifactError for a file that is damaged, or named and missing; UsageError
    if there is nothing at all.
    """
    if work_dir is not None and not work_dir.is_dir():
        raise UsageError(f"There is no folder {work_dir}.", remedy="Name the folder that `txl train` or `txl bench` has written to.")

    def in_folder(pattern: str) -> list[Path]:
        return [] if work_dir is None else sorted(work_dir.glob(pattern))

    benches = list(bench_files) or in_folder("benchmark*.json")
    metrics = metrics_file or next(iter(in_folder("metrics.jsonl")), None)
    baselines = next(iter(in_folder("baselines.json")), None)
    found = Findings(
        benches=[(path.name, BenchResult.read(path)) for path in benches],
        training=None if metrics is None else read_training(metrics),
        parities=[(path.name, _read_object(path)) for path in in_folder("parity*.json")],
        evaluations=[(path.name, _read_object(path)) for path in in_folder("eval*.json")],
        baselines=None if baselines is None else _read_object(baselines),
    )
    if found.is_empty:
        raise UsageError(
            f"There is nothing to report{'' if work_dir is None else f' in {work_dir}'}.",
            remedy="Measure something first, with `txl bench --out FILE`, or name a file with `--bench FILE`.",
        )
    return found


def read_training(path: Path) -> Training | None:
    """Read the losses of metrics.jsonl; None if it holds none. A last line cut short by a killed run is passed over.

    Where a run was resumed at an earlier step, the later record of a step counts.
    """
    train: dict[int, float] = {}
    valid: dict[int, float] = {}
    test: tuple[int, float] | None = None
    in_bits, seconds = False, None
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}.", remedy="Name another file with `--metrics FILE`.") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            step = record.get("step")
            in_bits = in_bits or "bits_per_char" in record
            loss = record.get("loss_nats_per_token") if record.get("kind") == "train" else record.get("nll_nats_per_token")
        except (ValueError, AttributeError) as error:
            if number == len(lines):
                break
            raise ArtifactError(f"Line {number} of {path} is no JSON object.", remedy="Name another file with `--metrics FILE`.") from error
        if not isinstance(step, int) or not isinstance(loss, (int, float)) or not math.isfinite(loss):
            continue
        if record["kind"] == "train":
            train = {s: v for s, v in train.items() if s < step} | {step: float(loss)}
            seconds = record["train_seconds"] if isinstance(record.get("train_seconds"), (int, float)) else seconds
        elif record["kind"] == "valid":
            valid = {s: v for s, v in valid.items() if s < step} | {step: float(loss)}
        elif record["kind"] == "test":
            test = (step, float(loss))
    if not train and not valid:
        return None
    return Training(list(train.items()), list(valid.items()), test, in_bits, seconds)


def _read_object(path: Path) -> Mapping[str, Any]:
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}.", remedy="Remove it, or make it again.") from error
    if not isinstance(document, dict):
        raise ArtifactError(f"{path} holds no JSON object.", remedy="Remove it, or make it again.")
    return document


# --- the page --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Speedup:
    """How many times faster one median is than another."""

    times: float
    is_clear: bool
    """True if the 95 % intervals of the two medians do not overlap."""


@dataclass(frozen=True)
class BenchView:
    """One result as the page shows it."""

    name: str
    result: BenchResult
    series: list[Series]
    batch_sizes: list[int]
    percentiles: Sequence[float]
    charts: list[plots.Chart]
    doubts: list[str]
    notes: list[str]

    @property
    def headline(self) -> str:
        """What was measured where and when, in one line, as far as the result says."""
        workload, environment = self.result.workload, self.result.environment
        gpus = environment.get("gpus")
        parts = [
            ", ".join(f"{workload[key]}{unit}" for key, unit in (("dataset", ""), ("split", " split")) if workload.get(key)),
            *(str(gpu["name"]) for gpu in (gpus if isinstance(gpus, list) else []) if isinstance(gpu, Mapping) and "name" in gpu),
            str(environment.get("cpu") or "unknown processor"),
            *(_counted(environment.get(key), word) for key, word in (("cores_usable", "core"), ("threads", "thread"))),
            str(environment.get("time_utc") or "")[:10],
        ]
        return " · ".join(part for part in parts if part)

    @property
    def baseline(self) -> Series:
        """The series that speeds are compared with: the reference, or else the first."""
        return next((series for series in self.series if series.is_reference), self.series[0])

    def speedup(self, series: Series, batch_size: int) -> Speedup | None:
        """Return how a series' median step compares with the baseline's at a batch size; None for the baseline itself or what lacks."""
        row, base = series.at(batch_size), self.baseline.at(batch_size)
        if row is None or base is None or series is self.baseline:
            return None
        mine, other = (r.latency.interval_ms(50) for r in (row, base))
        apart = mine is not None and other is not None and (mine[1] < other[0] or other[1] < mine[0])
        return Speedup(base.latency.percentile_ms(50) / row.latency.percentile_ms(50), apart)


def _counted(count: object, word: str) -> str:
    return f"{count} {word}{'' if count == 1 else 's'}" if isinstance(count, int) else ""


def write_report(found: Findings, out: Path) -> list[Path]:
    """Write the page to `out` and each chart as PNG beside it; return the paths, the page first.

    EnvironmentUnfitError without matplotlib and Jinja, or where `out` cannot be written.
    """
    benches = [
        _bench_view(name, result, suffix=f"-{number}" if len(found.benches) > 1 else "")
        for number, (name, result) in enumerate(found.benches, start=1)
    ]
    training = [] if found.training is None else [_training_chart(found.training, baseline_levels(found))]
    charts = training + [chart for bench in benches for chart in bench.charts]
    page = render_page(found, benches, training)
    paths = [out] + [out.parent / f"{chart.name}.png" for chart in charts]
    for path, content in zip(paths, [page.encode()] + [chart.png for chart in charts]):
        with whole_or_absent(path) as file:
            file.write(content)
    return paths


def render_page(found: Findings, benches: Sequence[BenchView], training_charts: Sequence[plots.Chart]) -> str:
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
    return environment.get_template("report.html.jinja").render(
        benches=benches,
        training=found.training,
        training_charts=training_charts,
        training_facts=_training_facts(found.training),
        scores=scores(found),
        corpus_splits=_corpus_splits(found.baselines),
        in_bits=_in_bits(found),
        parities=found.parities,
        tiles=_tiles(found, benches),
        rows=rows,
        failed=[(series.label, row) for bench in benches for series in bench.series for row in series.rows if row.verified is False],
        unchecked=[row for row in rows if row.verified is None],
        disturbances=[sentence for bench in benches for sentence in disturbances(bench.result.environment)],
        boundaries=BOUNDARIES,
        percentile_rule=PERCENTILE_RULE,
        minimum_samples=minimum_samples,
        verdict_of=verdict_of,
        facts=flat_facts,
        parity_facts=lambda parity: flat_facts({key: parity[key] for key in parity if key not in ("passed", "reason", "segments")}),
    )


@dataclass(frozen=True)
class Score:
    """A perplexity of a whole split, by whatever model."""

    model: str
    split: str
    perplexity: float
    bits_per_char: float
    n_tokens: int | None
    details: str


def scores(found: Findings) -> list[Score]:
    """Return the evaluations of whole splits, then the simple models on the same text; what holds no perplexity is passed over."""
    named = [(RUNTIME_TITLES.get(str(document.get("runtime")), name), document) for name, document in found.evaluations]
    named += [(name, entry) for name, entry in (found.baselines or {}).items() if isinstance(entry, Mapping)]
    listed = []
    for name, document in named:
        value, n_tokens = document.get("perplexity"), document.get("n_tokens")
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 1 <= value < math.inf:
            continue
        lengths = [f"{label} {document[key]}" for key, label in _EVALUATION_DETAILS if document.get(key) is not None]
        split = document.get("split")
        listed.append(
            Score(
                model=name,
                split=str(split) if split is not None else "",
                perplexity=float(value),
                bits_per_char=bits_per_char(math.log(value)),
                n_tokens=n_tokens if isinstance(n_tokens, int) else None,
                details=", ".join(lengths),
            )
        )
    return listed


_EVALUATION_DETAILS = (("batch_size", "batch"), ("tgt_len", "tgt"), ("mem_len", "mem"))


def baseline_levels(found: Findings) -> dict[str, float]:
    """Return the perplexities of the simple models by name and split, to be drawn beside the training curve."""
    simple = scores(Findings(baselines=found.baselines))
    return {f"{score.model}, {score.split}" if score.split else score.model: score.perplexity for score in simple}


def _corpus_splits(baselines: Mapping[str, Any] | None) -> list[tuple[str, Mapping[str, Any]]]:
    splits = (baselines or {}).get("splits")
    return [(name, counts) for name, counts in splits.items() if isinstance(counts, Mapping)] if isinstance(splits, Mapping) else []


def _in_bits(found: Findings) -> bool:
    """True where tokens are characters or bytes, whose scores are told in bits."""
    vocabulary = (found.baselines or {}).get("vocabulary")
    unit = vocabulary.get("unit") if isinstance(vocabulary, Mapping) else None
    return unit in ("char", "byte") or (found.training is not None and found.training.in_bits)


def flat_facts(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Return the plain values of a nested object as (name, value); lists of objects are numbered, empty entries left out."""
    facts: list[tuple[str, Any]] = []
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            facts += flat_facts(value, f"{name}: ")
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            for i, item in enumerate(value, start=1):
                facts += flat_facts(item, f"{name} {i}: ")
        elif value is not None and value != []:
            facts.append((name, value))
    return facts


def format_value(value: object) -> str:
    """Format a value of a fact sheet for a reader."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.6g}" if value == 0 or 1e-3 <= abs(value) < 1e9 else f"{value:.2e}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, (list, tuple)):
        return ", ".join(format_value(item) for item in value)
    return str(value)


def _bench_view(name: str, result: BenchResult, *, suffix: str) -> BenchView:
    series = group_series(result.rows)
    asked = result.settings.get("percentiles")
    percentiles = [p for p in result.percentiles if isinstance(asked, list) and p in asked] or list(STANDARD_PERCENTILES)
    batch_sizes = sorted({row.batch_size for row in result.rows})
    lines = [
        plots.LatencyLine(
            label=s.label + (" – FAILED" if s.has_failed else ""),
            batch_sizes=[row.batch_size for row in s.rows],
            p50_ms=[row.latency.percentile_ms(50) for row in s.rows],
            p99_ms=[row.latency.percentile_ms(99) for row in s.rows],
            tokens_per_s=[row.tokens_per_s for row in s.rows],
        )
        for s in series
    ]
    charts = []
    if lines:
        description = "Time of one step by batch size; lower is better. The whisker reaches from the median to the 99th percentile."
        charts.append(plots.draw(f"latency{suffix}", "Latency", description, plots.latency_over_batch(lines)))
    if len(batch_sizes) > 1:
        description = "Target tokens per second against the time of a step; the batch size stands at each point; up and left is better."
        charts.append(plots.draw(f"throughput{suffix}", "Throughput against latency", description, plots.throughput_against_latency(lines)))
    return BenchView(
        name,
        result,
        series,
        batch_sizes,
        percentiles,
        charts,
        doubts(result.rows, percentiles),
        disturbances(result.environment) + remarks(result.rows),
    )


def _training_chart(training: Training, levels: Mapping[str, float]) -> plots.Chart:
    unit = "bits per character" if training.in_bits else "perplexity"
    described = f"Training loss and loss on the validation split by optimizer step, as {unit}; lower is better."
    return plots.draw(
        "training", "Training", described, plots.training_curve(training.train, training.valid, levels, in_bits=training.in_bits)
    )


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
    training = found.training
    best = None if training is None else training.best
    if training is not None and best is not None:
        figure = f"{bits_per_char(best[1]):.3f}" if training.in_bits else format_perplexity(perplexity(best[1]))
        tiles.append((f"{'bits per character' if training.in_bits else 'perplexity'}, validation", figure, f"best, at step {best[0]:,}"))
    if len(benches) == 1:
        bench = benches[0]
        sound = [(s, row) for s in bench.series for row in s.rows if row.verified is not False]
        smallest = bench.batch_sizes[0] if bench.batch_sizes else 0
        at_smallest = [pair for pair in sound if pair[1].batch_size == smallest]
        quick = min(at_smallest, key=lambda pair: pair[1].latency.percentile_ms(50), default=None)
        if quick is not None:
            series, row = quick
            tiles.append((f"ms a step, batch size {smallest}", format_ms(row.latency.percentile_ms(50)), f"median, {series.label}"))
            gain = bench.speedup(series, smallest)
            if gain is not None and gain.is_clear:
                rival = RUNTIME_TITLES.get(bench.baseline.rows[0].runtime, bench.baseline.label)
                tiles.append((f"speed against {rival}", f"{gain.times:.2f}×", f"{series.label}, batch size {smallest}"))
        most = max(sound, key=lambda pair: pair[1].tokens_per_s, default=None)
        if most is not None:
            tiles.append(("tokens per second, most", f"{most[1].tokens_per_s:,.0f}", f"{most[0].label}, batch size {most[1].batch_size}"))
    return tiles
