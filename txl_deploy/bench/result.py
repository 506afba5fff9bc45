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
from typing import Any

from txl_deploy.bench.stats import PERCENTILE_RULE, LatencySummary
from txl_train.errors import ArtifactError
from txl_train.files import whole_or_absent

SCHEMA = "txl.benchmark"
SCHEMA_VERSION = 1

_TEXTS = ("runtime", "provider", "device", "dtype", "memory", "boundary")
_COUNTS = ("batch_size", "tgt_len", "mem_len", "n_tokens")
_MAYBE_NUMBERS = ("nll_nats_per_token", "perplexity", "perplexity_rel_diff", "tolerance")


@dataclass(frozen=True)
class ArtifactName:
    """Which exported artifact a row is about: its folder's name and the sha256 of its manifest."""

    name: str
    manifest_sha256: str


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

    @property
    def lengths(self) -> tuple[int, int, int | None, bool]:
        """All lengths that change what is computed; only rows with the same ones have comparable perplexities."""
        return (self.tgt_len, self.mem_len, self.clamp_len, self.same_length)

    @property
    def series(self) -> tuple[str, str, str, str, str]:
        """What rows of one table and one line of a plot have in common: all but the batch size."""
        artifact = f"{self.artifact.name} {self.artifact.manifest_sha256}" if self.artifact else ""
        return (artifact, self.runtime, self.provider, self.dtype, f"{self.memory} {self.memory_dtype}")

    def to_dict(self) -> dict[str, Any]:
        """Return the row as flat plain values for JSON."""
        row: dict[str, Any] = {name: getattr(self, name) for name in (*_TEXTS, *_COUNTS, "clamp_len", "same_length")}
        row |= self.latency.to_row()
        row |= {name: getattr(self, name) for name in ("tokens_per_s", *_MAYBE_NUMBERS, "is_reference", "verified", "checkpoint_sha256")}
        row |= {"memory_dtype": self.memory_dtype, "compute": self.compute}
        row["artifact"] = None if self.artifact is None else vars(self.artifact)
        row["notes"] = [*self.latency.notes, *self.notes]
        row["samples_ms"] = list(self.samples_ms)
        return row

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], percentiles: Sequence[float]) -> Row:
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
            clamp_len=None if values["clamp_len"] is None else _count(values["clamp_len"]),
            same_length=_truth(values["same_length"]),
            latency=latency,
            samples_ms=samples,
            tokens_per_s=_number(values["tokens_per_s"]),
            is_reference=_truth(values["is_reference"]),
            verified=None if values["verified"] is None else _truth(values["verified"]),
            artifact=None if artifact is None else ArtifactName(_text(artifact["name"]), _text(artifact["manifest_sha256"])),
            checkpoint_sha256=None if values["checkpoint_sha256"] is None else _text(values["checkpoint_sha256"]),
            notes=own_notes,
        )
        seconds = math.fsum(samples) / 1e3
        if not math.isclose(row.tokens_per_s * seconds, row.n_tokens, rel_tol=1e-6):
            raise ValueError(f"`tokens_per_s` is {row.tokens_per_s}, but {row.n_tokens} tokens took {seconds} s")
        mean_nll = math.nan if row.nll_nats_per_token is None else row.nll_nats_per_token
        if row.perplexity is not None and not math.isclose(math.log(row.perplexity), mean_nll, rel_tol=1e-9, abs_tol=1e-9):
            raise ValueError(f"`perplexity` is {row.perplexity}, but `nll_nats_per_token` {row.nll_nats_per_token}")
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
            "percentiles": list(self.percentiles),
            "percentile_rule": PERCENTILE_RULE,
            "settings": dict(self.settings),
            "workload": dict(self.workload),
            "environment": dict(self.environment),
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
            document = json.loads(path.read_bytes())
        except FileNotFoundError:
            raise ArtifactError(f"There is no result file {path}.", remedy="Make one with `txl bench --out FILE`.") from None
        except (OSError, ValueError) as error:
            raise ArtifactError(f"The result file {path} cannot be read: {error}.", remedy=remedy) from error
        if not isinstance(document, dict) or document.get("schema") != SCHEMA:
            raise ArtifactError(f"{path} is no result of `txl bench`.", remedy=remedy)
        if document.get("schema_version") != SCHEMA_VERSION:
            raise ArtifactError(
                f"The result file {path} has schema version {document.get('schema_version')}, but this txl reads {SCHEMA_VERSION}.",
                remedy="Read it with the txl that wrote it, or measure again with `txl bench --out FILE`.",
            )
        try:
            percentiles = tuple(_number(p) for p in document["percentiles"])
            return cls(
                rows=tuple(Row.from_dict(row, percentiles) for row in document["rows"]),
                command=_text(document["command"]),
                percentiles=percentiles,
                **{name: dict(document[name]) for name in ("settings", "workload", "environment")},
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise ArtifactError(f"The result file {path} is damaged: {reason}.", remedy=remedy) from error


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
