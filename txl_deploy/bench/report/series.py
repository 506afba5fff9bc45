"""Rows as a reader meets them: grouped into series, named, judged in a few words, their numbers formatted.

Knows result rows and how people read figures; nothing of tables, pages and files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from txl_deploy.bench.result import BenchResult, Row
from txl_deploy.bench.stats import STANDARD_PERCENTILES, minimum_samples

RUNTIME_TITLES = {
    "pytorch": "PyTorch",
    "compiled": "torch.compile",
    "torchscript": "TorchScript",
    "onnx": "ONNX Runtime",
    "trt": "TensorRT",
    "trt-rtx": "TensorRT-RTX",
}
UNVALIDATED = "UNVALIDATED: nothing proves that these are figures of the model they name."
DTYPE_TITLES = {"fp32": "FP32", "fp16": "FP16", "bf16": "BF16"}
REFERENCE_MARK = " (reference)"
MEMORY_TITLES = {"kv": "key/value memory", "hidden": "hidden-state memory"}

BUSY_SHARE = 0.1
"""Share of the processors' time used by others above which a measurement is called disturbed."""


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


def format_ms(value: float) -> str:
    """Format milliseconds with three digits or more: 0.412, 12.76, 1,234.5."""
    return f"{value:,.1f}" if value >= 1000 else f"{value:.2f}" if value >= 1 else f"{value:.3f}"


def format_perplexity(value: float | None) -> str:
    """Format a perplexity like the specification, 23.304, with fewer decimals when it is large; "not finite" for None."""
    return "not finite" if value is None else f"{value:.3f}" if value < 1000 else f"{value:,.1f}" if value < 1e7 else f"{value:.3g}"


def format_tokens_per_s(value: float) -> str:
    """Format a throughput like the specification: 3,346.3."""
    return f"{value:,.1f}"


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


def is_unproved(row: Row) -> bool:
    """True for a row that was measured with `--unvalidated`, without a proof; of older rows nobody asked for one."""
    return row.proof is not None and row.proof.kind == "none"


def lacks_proof(result: BenchResult) -> bool:
    """True for a result that is to be stamped UNVALIDATED: it says so, or one of its rows does."""
    return result.unvalidated or any(map(is_unproved, result.rows))


def unsound(row: Row) -> str:
    """Return in one word why a row's figures are not to be used; empty where nothing speaks against them."""
    return "FAILED" if row.verified is False else "INVALID" if row.valid is False else ""


def validity_of(row: Row) -> str:
    """Return the verdict on a row's figures; older results hold none."""
    return "not judged" if row.valid is None else "VALID" if row.valid else "INVALID"


def invalid_rows(rows: Sequence[Row]) -> list[str]:
    """Return one sentence for each row whose figures are not to be believed."""
    return [
        f"INVALID: {specification_heading(row)}, batch size {row.batch_size}: {'; '.join(row.invalid_reasons)}."
        for row in rows
        if row.valid is False
    ]


def specification_heading(row: Row) -> str:
    """Return what the specification writes above a table: **FP16, TorchScript**."""
    return f"{precision(row)}, {RUNTIME_TITLES.get(row.runtime, row.runtime)}"


def remarks(rows: Sequence[Row]) -> list[str]:
    """Return the rows' own notes, each once, with the batch sizes it is about."""
    sizes: dict[str, dict[int, None]] = {}
    for row in rows:
        for note in row.notes:
            sizes.setdefault(note, {})[row.batch_size] = None
    return [f"{note} (batch size {', '.join(map(str, about))})" for note, about in sizes.items()]


def shown_percentiles(result: BenchResult) -> list[float]:
    """Return the percentiles that were asked for, or else the standard ones."""
    asked = result.settings.get("percentiles")
    return [p for p in result.percentiles if isinstance(asked, list) and p in asked] or list(STANDARD_PERCENTILES)


def headline(result: BenchResult) -> str:
    """Return what was measured where and when, in one line, as far as the result says."""
    workload, environment = result.workload, result.environment
    gpus = environment.get("gpus")
    parts = [
        ", ".join(f"{workload[key]}{unit}" for key, unit in (("dataset", ""), ("split", " split")) if workload.get(key)),
        *(str(gpu["name"]) for gpu in (gpus if isinstance(gpus, list) else []) if isinstance(gpu, Mapping) and "name" in gpu),
        str(environment.get("cpu") or "unknown processor"),
        *(_counted(environment.get(key), word) for key, word in (("cores_usable", "core"), ("threads", "thread"))),
        str(environment.get("time_utc") or "")[:10],
    ]
    return " · ".join(part for part in parts if part)


def _counted(count: object, word: str) -> str:
    return f"{count} {word}{'' if count == 1 else 's'}" if isinstance(count, int) else ""
