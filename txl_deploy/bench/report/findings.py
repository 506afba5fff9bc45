"""What there is to report: results, receipts, verdicts of parity, training runs, read from the files named or from a work folder.

Knows the files by their content, not by their names; what is shown of them is the page's business.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeGuard

from txl_deploy.bench.compare import SCHEMA as COMPARISON_SCHEMA
from txl_deploy.bench.report.series import RUNTIME_TITLES
from txl_deploy.bench.result import BenchResult
from txl_deploy.bench.training import TrainingResult
from txl_deploy.receipt import Receipt
from txl_train.errors import ArtifactError, UsageError
from txl_train.files import file_sha256
from txl_train.metrics import bits_per_char


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

    training_benchmarks: list[tuple[str, TrainingResult]] = field(default_factory=list)
    """Results of `txl bench train`, by file name."""
    receipts: list[tuple[str, Mapping[str, Any]]] = field(default_factory=list)
    """`Receipt.summary()` of receipts given as files that prove what is reported, by file name."""
    other_receipts: list[tuple[str, str]] = field(default_factory=list)
    """Receipts that were found and prove none of it: folder and file name, and why not."""
    comparisons: list[tuple[str, Mapping[str, Any]]] = field(default_factory=list)
    """Outcomes of `txl bench compare`, by file name."""
    bench_sha256: list[str] = field(default_factory=list)
    """Checksums of the files of `benches`, in their order; empty where they were not read from files."""

    @property
    def is_empty(self) -> bool:
        """True if there is nothing to report."""
        return not any(getattr(self, f.name) for f in fields(self))


def gather(
    work_dir: Path | None, bench_files: Sequence[Path] = (), metrics_file: Path | None = None, *, files: Sequence[Path] = ()
) -> Findings:
    """Read what there is: the known files of the folder and those named. `files` may be of any kind; it is told by their content.

    Benchmarks and metrics that are named replace the folder's. ArtifactError for a file that is damaged, or named and missing; UsageError
    if there is nothing at all.
    """
    if work_dir is not None and not work_dir.is_dir():
        raise UsageError(f"There is no folder {work_dir}.", remedy="Name the folder that `txl train` or `txl bench` has written to.")

    def in_folder(*patterns: str) -> list[Path]:
        return [] if work_dir is None else sorted(path for pattern in patterns for path in work_dir.glob(pattern))

    kinds: dict[str, list[Path]] = {kind: [] for kind in (*_PATTERNS, "benchmark", "metrics")}
    for path in files:
        kinds[_kind(path)].append(path)
    benches = [*bench_files, *kinds["benchmark"]]
    trainings = kinds["training"]
    for path in [] if benches else in_folder("benchmark*.json"):
        (trainings if _kind(path) == "training" else benches).append(path)
    named_metrics = [path for path in (metrics_file, *kinds["metrics"]) if path is not None]
    metrics = next(iter(named_metrics or in_folder("metrics.jsonl")), None)
    found_in = {kind: [*kinds[kind], *(p for p in in_folder(*patterns) if p not in kinds[kind])] for kind, patterns in _PATTERNS.items()}
    baselines = next(iter(in_folder("baselines.json")), None)
    results = [(path.name, BenchResult.read(path)) for path in benches]
    receipts, other_receipts = _receipts(found_in["receipt"], [result for _, result in results])
    found = Findings(
        benches=results,
        bench_sha256=[file_sha256(path) for path in benches],
        training=None if metrics is None else read_training(metrics),
        training_benchmarks=[(path.name, TrainingResult.read(path)) for path in dict.fromkeys(found_in["training"])],
        parities=[(path.name, _read_object(path)) for path in found_in["parity"]],
        evaluations=[(path.name, _read_object(path)) for path in found_in["evaluation"]],
        receipts=receipts,
        other_receipts=other_receipts,
        comparisons=[
            (path.name, document) for path in found_in["comparison"] if (document := _read_object(path)).get("schema") == COMPARISON_SCHEMA
        ],
        baselines=None if baselines is None else _read_object(baselines),
    )
    if found.is_empty:
        raise UsageError(
            f"There is nothing to report{'' if work_dir is None else f' in {work_dir}'}.",
            remedy="Measure something first, with `txl bench --out FILE`, or name a file with `--bench FILE`.",
        )
    return found


def _receipts(paths: Sequence[Path], results: Sequence[BenchResult]) -> tuple[list[tuple[str, Mapping[str, Any]]], list[tuple[str, str]]]:
    """Part receipts into those that prove something reported and the others: (name, summary), and (name, why not).

    Proved are artifacts that were measured; where nothing was, the one that lies beside the receipt, unchanged.
    """
    measured = {row.artifact.manifest_sha256 for result in results for row in result.rows if row.artifact is not None}
    proving: list[tuple[str, Mapping[str, Any]]] = []
    others: list[tuple[str, str]] = []
    for path in paths:
        summary = Receipt.read(path).summary(path)
        manifest = path.parent / "manifest.json"
        beside = file_sha256(manifest) if manifest.is_file() else None
        name = f"{path.resolve().parent.name}/{path.name}"
        if summary["manifest_sha256"] in measured or (not results and summary["manifest_sha256"] == beside):
            proving.append((path.name, summary))
        elif beside is not None and summary["manifest_sha256"] != beside:
            others.append((name, "stale: the artifact beside it is another one by now"))
        elif results:
            others.append((name, "unrelated: its artifact was not measured here"))
        else:
            others.append((name, "unrelated: its artifact is not beside it"))
    return proving, others


_PATTERNS = {
    "training": ("training_benchmark*.json",),
    "parity": ("parity*.json",),
    "evaluation": ("eval*.json",),
    "receipt": ("*/receipt*.json",),
    "comparison": ("compar*.json",),
}


def _kind(path: Path) -> str:
    """Tell by its content what a file is; a benchmark where that is not known, whose reader says what is wrong with it."""
    if path.suffix == ".jsonl":
        return "metrics"
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return "benchmark"
    document = document if isinstance(document, dict) else {}
    by_schema = {"txl.training_benchmark": "training", "txl.receipt": "receipt", COMPARISON_SCHEMA: "comparison"}
    if (schema := document.get("schema")) is not None:
        return by_schema.get(str(schema), "benchmark")
    if "segments" in document and "tolerance" in document:
        return "parity"
    return "evaluation" if "perplexity" in document else "benchmark"


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
        except (ValueError, AttributeError, RecursionError) as error:
            if number == len(lines):
                break
            raise ArtifactError(f"Line {number} of {path} is no JSON object.", remedy="Name another file with `--metrics FILE`.") from error
        if not isinstance(step, int) or not _is_number(loss):
            continue
        if record.get("kind") == "train":
            train = {s: v for s, v in train.items() if s < step} | {step: float(loss)}
            seconds = record["train_seconds"] if _is_number(record.get("train_seconds")) else seconds
        elif record.get("kind") == "valid":
            valid = {s: v for s, v in valid.items() if s < step} | {step: float(loss)}
        elif record.get("kind") == "test":
            test = (step, float(loss))
    if not train and not valid:
        return None
    return Training(list(train.items()), list(valid.items()), test, in_bits, seconds)


def _is_number(value: object) -> TypeGuard[float]:
    """True for a number that is finite as a float."""
    return isinstance(value, (int, float)) and -_LARGEST < value < _LARGEST


_LARGEST = sys.float_info.max


def _read_object(path: Path) -> Mapping[str, Any]:
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}.", remedy="Remove it, or make it again.") from error
    if not isinstance(document, dict):
        raise ArtifactError(f"{path} holds no JSON object.", remedy="Remove it, or make it again.")
    if _is_deeper(document, _DEEPEST):
        raise ArtifactError(f"{path} holds values more than {_DEEPEST} deep within each other.", remedy="Remove it, or make it again.")
    return document


_DEEPEST = 50


def _is_deeper(value: object, levels: int) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return bool(inner) and (levels == 0 or any(_is_deeper(item, levels - 1) for item in inner))


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
        if not _is_number(value) or isinstance(value, bool) or value < 1:
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


def corpus_splits(baselines: Mapping[str, Any] | None) -> list[tuple[str, Mapping[str, Any]]]:
    """Return what is known of each split of the corpus."""
    splits = (baselines or {}).get("splits")
    return [(name, counts) for name, counts in splits.items() if isinstance(counts, Mapping)] if isinstance(splits, Mapping) else []


def in_bits(found: Findings) -> bool:
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
        elif isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
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
