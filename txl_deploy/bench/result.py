"""The result file of a benchmark: what a row holds, how it is written, and how it is believed when read back.

Knows the schema of `benchmark.json`. It keeps every raw sample, so a reader recomputes the summary and refuses a file whose figures do
not follow from its samples. Measuring is the harness's business, showing the report's.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast, get_args

from txl_deploy.bench.stats import PERCENTILE_RULE, LatencySummary
from txl_deploy.documents import finite
from txl_train.errors import ArtifactError
from txl_train.files import whole_or_absent

SCHEMA = "txl.benchmark"
SCHEMA_VERSION = 2
READABLE_VERSIONS = (1, 2)
"""Version 1 judged no row, and knew no proofs, boundaries but one, rooflines and processes: what it lacks is None in what is read."""

ProofKind = Literal["reference", "receipt", "in run", "none"]

_TEXTS = ("runtime", "provider", "device", "dtype", "memory", "boundary")
_COUNTS = ("batch_size", "tgt_len", "mem_len", "n_tokens")
_PARTS = ("proof", "stability", "energy", "roofline")
_ROOFLINE_NUMBERS = ("flops_per_step", "bytes_per_step", "peak_flops", "peak_bytes_per_s", "share_of_peak")
_MAYBE_NUMBERS = ("nll_nats_per_token", "perplexity", "perplexity_rel_diff", "tolerance")


@dataclass(frozen=True)
class ArtifactName:
    """Which exported artifact a row is about: its folder's name and the sha256 of its manifest."""

    name: str
    manifest_sha256: str
    parent_manifest_sha256: str | None = None
    """Of the graph that an engine was built from; None for what was exported from the checkpoint itself."""


@dataclass(frozen=True, kw_only=True)
class Proof:
    """Why a row's model may be believed to be its checkpoint's."""

    kind: ProofKind
    """`reference`: it is the FP32 eager model itself. `receipt`: of the artifact, for the whole split. `in run`: what was timed was
    compared with the reference of the same run. `none`: measured with `--unvalidated`."""
    receipt_sha256: str | None = None
    """Checksum of the receipt file."""
    reason: str = ""
    """Why there is no proof."""


@dataclass(frozen=True, kw_only=True)
class Stability:
    """How steady the timed steps were: what percentiles and intervals rest on."""

    lag1_autocorrelation: float
    """Of the samples in the order measured; 0 for independent ones."""
    drift: float
    """Median of the second half over that of the first, minus 1."""
    drift_interval: tuple[float, float] | None
    """95 % interval of `drift`, from the intervals of the two medians; None from too few samples."""
    outliers: int
    """Samples further above the median than 10 times the median absolute deviation (and above 1.5 times the median)."""
    effective_n: float
    """How many independent samples tell as much of the mean as these."""
    warmup_steps: int
    """Steps run before the clock counted."""
    warmup_steady: bool
    """Whether the last of them no longer became faster or slower."""


@dataclass(frozen=True, kw_only=True)
class Energy:
    """What the device says it used over further steps of the same kind, after the timed ones: counters move too slowly for short turns."""

    joules_per_token: float
    mean_watts: float
    source: str
    """What told it: `nvml`, `rapl`."""


@dataclass(frozen=True, kw_only=True)
class Roofline:
    """How close a step comes to what the device can do (Williams, Waterman & Patterson 2009)."""

    flops_per_step: float
    """Multiplications and additions of matrix products, by formula."""
    bytes_per_step: float
    """Least traffic with the device's main memory: weights read once, states read and written once, by formula."""
    peak_flops: float
    """Measured on a large matrix product of the type computed in, per second."""
    peak_bytes_per_s: float
    """Measured on a large copy."""
    share_of_peak: float
    """Time the step needs at least by the roofline, over its median latency; of one device, where several processes share the streams.
    Above 1 where the peak is not one: a small model's weights stay in a CPU's caches."""
    bound: Literal["compute", "memory", "enqueue"]
    """What limits it: the larger of the two times, or the host, where enqueueing alone takes nearly as long as the step."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One runtime at one batch size."""

    runtime: str
    provider: str
    device: str
    dtype: str
    memory: str
    batch_size: int
    tgt_len: int
    """Tokens per stream and step."""
    mem_len: int
    """Past positions the memory holds, in tokens."""
    clamp_len: int | None
    same_length: bool
    boundary: str
    """Name of the timing boundary: what lies between the two readings of the clock."""
    latency: LatencySummary
    samples_ms: tuple[float, ...]
    """Every timed step, in the order measured, milliseconds."""
    tokens_per_s: float
    """Counted target tokens per second of timed steps."""
    n_tokens: int
    """Counted target tokens of the timed steps."""
    nll_nats_per_token: float | None
    """Mean over `n_tokens`; None if it is not a finite number."""
    perplexity: float | None
    """Of exactly the steps that were timed."""
    is_reference: bool = False
    """True for the FP32 eager model straight from the checkpoint, which the others are checked against."""
    perplexity_rel_diff: float | None = None
    """Perplexity over the reference's, minus 1; None if there was no reference to compare with."""
    verified: bool | None = None
    """Whether that difference is within `tolerance`; None if it was not checked."""
    tolerance: float | None = None
    artifact: ArtifactName | None = None
    """None for a runtime that needs no export."""
    checkpoint_sha256: str | None = None
    """Of the checkpoint that the weights come from."""
    compute: str = ""
    """Type that products were really computed in, as the runtime was found to do; empty where it is not known."""
    memory_dtype: str = "fp32"
    """Type of the states; older results, which do not say it, were all of fp32."""
    notes: tuple[str, ...] = ()
    ext_len: int = 0
    """Tokens before each segment that are read once more."""
    same_length_rule: str = ""
    """How many keys `same_length` means; empty in older results."""
    processes: int = 1
    """Processes that share the streams, each with a device of its own; a step then lasts until the last of them is done."""
    block_sizes: tuple[int, ...] = ()
    """Timed steps of each turn, in order: what was measured in the same turn of several runtimes is paired. Empty in older results."""
    valid: bool | None = None
    """Verdict on the figures of this row; None in an older result, where nobody judged."""
    invalid_reasons: tuple[str, ...] = ()
    """One clause each; empty for a valid row."""
    proof: Proof | None = None
    stability: Stability | None = None
    enqueue_ms_p50: float | None = None
    """Median time until the call returned, before waiting for the device; None where the two are the same (a CPU)."""
    energy: Energy | None = None
    roofline: Roofline | None = None

    @property
    def lengths(self) -> tuple[int | bool | str | None, ...]:
        """All lengths that change what is computed; only rows with the same ones have comparable perplexities."""
        return (self.tgt_len, self.mem_len, self.ext_len, self.clamp_len, self.same_length, self.same_length_rule)

    @property
    def series(self) -> tuple[str, ...]:
        """What rows of one table and one line of a plot have in common: all but the batch size."""
        artifact = f"{self.artifact.name} {self.artifact.manifest_sha256}" if self.artifact else ""
        return (artifact, self.runtime, self.provider, self.dtype, f"{self.memory} {self.memory_dtype}", f"{self.processes}")

    def to_dict(self) -> dict[str, Any]:
        """Return the row as flat plain values for JSON."""
        row: dict[str, Any] = {name: getattr(self, name) for name in (*_TEXTS, *_COUNTS, "clamp_len", "same_length")}
        row |= self.latency.to_row()
        row |= {name: getattr(self, name) for name in ("tokens_per_s", *_MAYBE_NUMBERS, "is_reference", "verified", "checkpoint_sha256")}
        row |= {name: getattr(self, name) for name in ("memory_dtype", "compute", "ext_len", "same_length_rule")}
        row["artifact"] = None if self.artifact is None else vars(self.artifact)
        row |= {"processes": self.processes, "valid": self.valid, "invalid_reasons": list(self.invalid_reasons)}
        row |= {name: None if (part := getattr(self, name)) is None else dict(vars(part)) for name in _PARTS}
        row |= {"enqueue_ms_p50": self.enqueue_ms_p50, "block_sizes": list(self.block_sizes)}
        row["notes"] = [*self.latency.notes, *self.notes]
        row["samples_ms"] = list(self.samples_ms)
        return row

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], percentiles: Sequence[float], version: int = SCHEMA_VERSION) -> Row:
        """Read a row back. KeyError, TypeError or ValueError if it is not one, or its summary does not follow from its samples."""
        samples = tuple(_number(s) for s in values["samples_ms"])
        latency = LatencySummary.of(samples, percentiles)
        for name, recomputed in latency.to_row().items():
            if isinstance(recomputed, (int, float)) and not math.isclose(recomputed, _number(values[name]), rel_tol=1e-9, abs_tol=1e-9):
                raise ValueError(f"`{name}` is {values[name]}, but the samples say {recomputed}")
        artifact = values["artifact"]
        own_notes = tuple(_text(note) for note in values["notes"] if note not in latency.notes)
        plain: dict[str, Any] = {name: _text(values[name]) for name in _TEXTS}
        plain |= {name: _count(values[name]) for name in _COUNTS}
        plain |= {name: None if values[name] is None else _number(values[name]) for name in _MAYBE_NUMBERS}
        row = cls(
            **plain,
            compute=_text(values.get("compute", "")),
            memory_dtype=_text(values.get("memory_dtype", "fp32")),
            ext_len=_count(values.get("ext_len", 0)),
            same_length_rule=_text(values.get("same_length_rule", "")),
            clamp_len=None if values["clamp_len"] is None else _count(values["clamp_len"]),
            same_length=_truth(values["same_length"]),
            latency=latency,
            samples_ms=samples,
            tokens_per_s=_number(values["tokens_per_s"]),
            is_reference=_truth(values["is_reference"]),
            verified=None if values["verified"] is None else _truth(values["verified"]),
            artifact=None if artifact is None else _artifact(artifact),
            checkpoint_sha256=None if values["checkpoint_sha256"] is None else _text(values["checkpoint_sha256"]),
            notes=own_notes,
            **({} if version < 2 else _of_version_2(values, len(samples))),
        )
        seconds = math.fsum(samples) / 1e3
        if not math.isclose(row.tokens_per_s * seconds, row.n_tokens, rel_tol=1e-6):
            raise ValueError(f"`tokens_per_s` is {row.tokens_per_s}, but {row.n_tokens} tokens took {seconds} s")
        mean_nll = math.nan if row.nll_nats_per_token is None else row.nll_nats_per_token
        if row.perplexity is not None and not math.isclose(math.log(row.perplexity), mean_nll, rel_tol=1e-9, abs_tol=1e-9):
            raise ValueError(f"`perplexity` is {row.perplexity}, but `nll_nats_per_token` {row.nll_nats_per_token}")
        if row.verified and row.perplexity_rel_diff is not None and not abs(row.perplexity_rel_diff) <= (row.tolerance or 0.0):
            raise ValueError(f"`verified` is true, but the perplexity is {row.perplexity_rel_diff} away (tolerance {row.tolerance})")
        return row


@dataclass(frozen=True, kw_only=True)
class BenchResult:
    """All that one run of `txl bench` found out."""

    rows: tuple[Row, ...]
    command: str
    """The command line that measures the same again."""
    percentiles: tuple[float, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    """How it was measured: duration, samples, warm-up, blocks, boundary, threads."""
    workload: Mapping[str, Any] = field(default_factory=dict)
    """What was read: data set, split, number of tokens, sha256."""
    environment: Mapping[str, Any] = field(default_factory=dict)
    """The machine and its state when measuring began."""
    environment_after: Mapping[str, Any] = field(default_factory=dict)
    """What of it may have changed, when measuring ended; empty in older results."""
    receipts: tuple[Mapping[str, Any], ...] = ()
    """`Receipt.summary()` of each receipt that rows rest on."""
    comparisons: tuple[Mapping[str, Any], ...] = ()
    """Of `--ab`, the second of two over the first, by pairs of their turns: each `batch_size` with its `compare.Ratio.to_dict()`."""
    unvalidated: bool = False
    """True if rows were measured without proof, by `--unvalidated`: to be stamped on whatever shows them."""

    @property
    def invalid(self) -> tuple[Row, ...]:
        """The rows that were judged and whose figures are not to be believed."""
        return tuple(row for row in self.rows if row.valid is False)

    @property
    def failed(self) -> tuple[Row, ...]:
        """The rows whose perplexity is not the reference's."""
        return tuple(row for row in self.rows if row.verified is False)

    @property
    def verified(self) -> bool | None:
        """True if every row was checked and passed, False if one failed, None if some were not checked."""
        if self.failed:
            return False
        return True if self.rows and all(row.verified for row in self.rows) else None

    def to_dict(self) -> dict[str, Any]:
        """Return the document as plain values for JSON."""
        return {
            "schema": SCHEMA,
            "schema_version": SCHEMA_VERSION,
            "command": self.command,
            "verified": self.verified,
            "unvalidated": self.unvalidated,
            "percentiles": list(self.percentiles),
            "percentile_rule": PERCENTILE_RULE,
            "settings": dict(self.settings),
            "workload": dict(self.workload),
            "environment": dict(self.environment),
            "environment_after": dict(self.environment_after),
            "receipts": [dict(receipt) for receipt in self.receipts],
            "comparisons": [dict(comparison) for comparison in self.comparisons],
            "rows": [row.to_dict() for row in self.rows],
        }

    def to_json(self) -> str:
        """Return the document as text, one row a line, so that a file of many samples can still be looked at."""
        document = self.to_dict()
        rows = ",\n  ".join(json.dumps(row, allow_nan=False, ensure_ascii=False) for row in document.pop("rows"))
        head = json.dumps(document, allow_nan=False, ensure_ascii=False, indent=1)
        return f'{head.removesuffix("}").rstrip()},\n "rows": [\n  {rows}\n ]\n}}'

    def write(self, path: Path) -> None:
        """Write the document atomically: a reader sees the old file or the whole new one. EnvironmentUnfitError if it cannot be written."""
        with whole_or_absent(path) as file:
            file.write(self.to_json().encode() + b"\n")

    @classmethod
    def read(cls, path: Path) -> BenchResult:
        """Read a document back, checking every row against its samples. ArtifactError if anything is missing or does not add up."""
        remedy = "Measure again with `txl bench --out FILE`, or leave this file out."
        try:
            document = json.loads(path.read_bytes(), parse_float=finite)
        except FileNotFoundError:
            raise ArtifactError(f"There is no result file {path}.", remedy="Make one with `txl bench --out FILE`.") from None
        except (OSError, ValueError, RecursionError) as error:
            raise ArtifactError(f"The result file {path} cannot be read: {error}.", remedy=remedy) from error
        if not isinstance(document, dict) or document.get("schema") != SCHEMA:
            raise ArtifactError(f"{path} is no result of `txl bench`.", remedy=remedy)
        if document.get("schema_version") not in READABLE_VERSIONS:
            raise ArtifactError(
                f"The result file {path} has schema version {document.get('schema_version')}, but this txl reads {READABLE_VERSIONS}.",
                remedy="Read it with the txl that wrote it, or measure again with `txl bench --out FILE`.",
            )
        try:
            percentiles = tuple(_number(p) for p in document["percentiles"])
            version = document["schema_version"]
            rows = tuple(Row.from_dict(row, percentiles, version) for row in document["rows"])
            unvalidated = _truth(document["unvalidated"]) if version > 1 else False
            if not unvalidated and any(row.proof is not None and row.proof.kind == "none" for row in rows):
                raise ValueError("`unvalidated` is false, but there are rows without proof")
            return cls(
                rows=rows,
                command=_text(document["command"]),
                percentiles=percentiles,
                **{name: dict(document[name]) for name in ("settings", "workload", "environment")},
                environment_after=dict(document.get("environment_after", {})),
                receipts=tuple(dict(receipt) for receipt in document.get("receipts", ())),
                comparisons=tuple(dict(comparison) for comparison in document.get("comparisons", ())),
                unvalidated=unvalidated,
            )
        except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise ArtifactError(f"The result file {path} is damaged: {reason}.", remedy=remedy) from error


def _artifact(values: Mapping[str, Any]) -> ArtifactName:
    parent = values.get("parent_manifest_sha256")
    return ArtifactName(_text(values["name"]), _text(values["manifest_sha256"]), None if parent is None else _text(parent))


def _of_version_2(values: Mapping[str, Any], n: int) -> dict[str, Any]:
    """Return the fields that rows have since version 2."""
    blocks = tuple(_count(size) for size in values["block_sizes"])
    if blocks and sum(blocks) != n:
        raise ValueError(f"`block_sizes` add up to {sum(blocks)}, but there are {n} samples")
    valid, reasons = values["valid"], tuple(_text(reason) for reason in values["invalid_reasons"])
    if valid is not None and _truth(valid) == bool(reasons):
        raise ValueError(f"`valid` is {valid}, but there are {len(reasons)} reasons against it")
    fields: dict[str, Any] = {
        "processes": _count(values["processes"]),
        "block_sizes": blocks,
        "valid": valid,
        "invalid_reasons": reasons,
        "enqueue_ms_p50": None if values["enqueue_ms_p50"] is None else _number(values["enqueue_ms_p50"]),
    }
    if (proof := values["proof"]) is not None:
        if proof["kind"] not in get_args(ProofKind):
            raise ValueError(f"`proof` is of the kind {proof['kind']!r}")
        sha256 = proof["receipt_sha256"]
        fields["proof"] = Proof(
            kind=cast(ProofKind, proof["kind"]), receipt_sha256=None if sha256 is None else _text(sha256), reason=_text(proof["reason"])
        )
    if (stability := values["stability"]) is not None:
        interval = stability["drift_interval"]
        fields["stability"] = Stability(
            lag1_autocorrelation=_number(stability["lag1_autocorrelation"]),
            drift=_number(stability["drift"]),
            drift_interval=None if interval is None else (_number(interval[0]), _number(interval[1])),
            outliers=_count(stability["outliers"]),
            effective_n=_number(stability["effective_n"]),
            warmup_steps=_count(stability["warmup_steps"]),
            warmup_steady=_truth(stability["warmup_steady"]),
        )
    if (energy := values["energy"]) is not None:
        fields["energy"] = Energy(
            joules_per_token=_number(energy["joules_per_token"]), mean_watts=_number(energy["mean_watts"]), source=_text(energy["source"])
        )
    if (roofline := values["roofline"]) is not None:
        if roofline["bound"] not in ("compute", "memory", "enqueue"):
            raise ValueError(f"`roofline` is bound by {roofline['bound']!r}")
        numbers = {name: _number(roofline[name]) for name in _ROOFLINE_NUMBERS}
        fields["roofline"] = Roofline(bound=roofline["bound"], **numbers)
    return fields


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise TypeError(f"{value!r} is no number")
    return value


def _count(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise TypeError(f"{value!r} is no count")
    return value


def _truth(value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{value!r} is neither true nor false")
    return value
