"""The result of a training benchmark: what a row holds, how it is judged, written, read back, and shown as the specification shows it.

Knows the schema of `txl bench train --out`. Every step's time is kept, so a reader recomputes the throughput and refuses a file whose
figures do not follow from its steps. Training itself is started in `training_runs`.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from txl_deploy.bootstrap import mean_interval
from txl_deploy.documents import from_plain, parse
from txl_train.errors import ArtifactError
from txl_train.files import whole_or_absent

SCHEMA = "txl.training_benchmark"
SCHEMA_VERSION = 1
FEWEST_STEPS = 20
"""Timed steps below which the interval of the throughput means nothing: of fewer, whole blocks of neighbours cannot be drawn."""
BASE_DTYPE = "fp32"
NOT_MEASURED = "N/A"

_REMEDY = "Measure again with `txl bench train --out FILE`, or leave this file out."
_FIGURES = ("tokens_per_s", "tokens_per_s_interval_95", "training_minutes", "peak_memory_bytes", "mfu", "loss_first", "loss_last")


@dataclass(frozen=True, kw_only=True)
class TrainingRow:
    """One training: so many processes, streams and steps in one precision."""

    processes: int
    """Processes that train together, each on a device of its own."""
    batch_size_per_process: int
    """Streams of each."""
    dtype: str
    """Arithmetic: fp32, fp16 or bf16."""
    device: str
    """`cpu` or `cuda`."""
    threads: int | None = None
    """CPU threads of each process; None where nothing was trained."""
    steps: int
    """Optimizer steps asked for."""
    warmup_steps: int
    """The first of them, which do not count for the throughput."""
    ms_per_step: list[float] = field(default_factory=list)
    """Every step's time, milliseconds, the warm-up included."""
    tokens_per_step: list[int] = field(default_factory=list)
    """Target tokens of each step, of all processes."""
    tokens_per_s: float | None = None
    """Target tokens per second of all processes together, after the warm-up."""
    tokens_per_s_interval_95: list[float] | None = None
    """Its 95 % interval, by block bootstrap over the steps."""
    training_minutes: float | None = None
    """Time of all steps."""
    peak_memory_bytes: int | None = None
    """Most memory that the first process held: of its GPU, or its own."""
    mfu: float | None = None
    """Share of the devices' measured peak that the model's arithmetic makes use of; None where the peak was not measured."""
    loss_first: float | None = None
    """Nats per token of the first step."""
    loss_last: float | None = None
    """Nats per token of the last step."""
    valid: bool
    invalid_reasons: list[str] = field(default_factory=list)
    """One clause each; empty for a valid row."""
    skipped: str | None = None
    """Why this machine cannot train so; None if it did."""

    @property
    def name(self) -> str:
        """What sets it apart from other rows."""
        processes = "1 process" if self.processes == 1 else f"{self.processes} processes"
        return f"{self.dtype}, {processes}, batch size {self.batch_size_per_process} each"

    @property
    def figures_apply(self) -> bool:
        """True if it was measured and its throughput is to be believed."""
        return self.valid and self.tokens_per_s is not None

    def check(self) -> None:
        """Raise ValueError if the figures contradict each other."""
        if self.skipped is not None and (self.ms_per_step or any(getattr(self, name) is not None for name in _FIGURES)):
            raise ValueError(f"the row of {self.name} was skipped, but has figures")
        if self.valid != (self.skipped is None and not self.invalid_reasons):
            raise ValueError(f"`valid` of {self.name} is {self.valid}, with {len(self.invalid_reasons)} reasons against it")
        if len(self.ms_per_step) != len(self.tokens_per_step):
            raise ValueError(f"{self.name} has {len(self.ms_per_step)} times, but {len(self.tokens_per_step)} numbers of tokens")
        if self.valid and len(self.ms_per_step) != self.steps:
            raise ValueError(f"{self.name} has {len(self.ms_per_step)} steps instead of {self.steps}")
        rate = _rate(self.ms_per_step[self.warmup_steps :], self.tokens_per_step[self.warmup_steps :])
        if (rate is None) != (self.tokens_per_s is None) or not math.isclose(rate or 0.0, self.tokens_per_s or 0.0, rel_tol=1e-9):
            raise ValueError(f"`tokens_per_s` of {self.name} is {self.tokens_per_s}, but its steps say {rate}")


def skipped_row(reason: str, *, processes: int, batch_size: int, dtype: str, device: str, steps: int, warmup_steps: int) -> TrainingRow:
    """Return the row of what this machine cannot train."""
    return TrainingRow(
        processes=processes,
        batch_size_per_process=batch_size,
        dtype=dtype,
        device=device,
        steps=steps,
        warmup_steps=warmup_steps,
        valid=False,
        skipped=reason,
    )


def measured_row(
    metrics: Iterable[Mapping[str, Any]],
    *,
    processes: int,
    batch_size: int,
    dtype: str,
    device: str,
    steps: int,
    warmup_steps: int,
    failure: str | None = None,
) -> TrainingRow:
    """Return the row of a training from the records of its metrics.jsonl, written at every step, and judge it.

    `failure` is why the training did not end well; None if it did.
    """
    records = list(metrics)
    start: Mapping[str, Any] = next((record for record in records if record["kind"] == "start"), {})
    trained = [record for record in records if record["kind"] == "train"]
    ms = [float(record["ms_per_step"]) for record in trained]
    seen = [0, *(int(record["tokens"]) for record in trained)]
    tokens = [after - before for before, after in zip(seen, seen[1:])]
    losses = [record["loss_nats_per_token"] for record in trained]
    timed_ms, timed_tokens = ms[warmup_steps:], tokens[warmup_steps:]
    rate = _rate(timed_ms, timed_tokens)
    interval = None
    if len(timed_ms) >= FEWEST_STEPS:
        low, high = mean_interval(timed_tokens, timed_ms)
        interval = [1e3 * low, 1e3 * high]
    work = (start.get("flops_per_token"), start.get("peak_flops"))
    peaks = [int(record["peak_memory_bytes"]) for record in trained if record.get("peak_memory_bytes") is not None]

    reasons = [] if failure is None else [failure]
    unsound = next((record["step"] for record, loss in zip(trained, losses) if loss is None), None)
    if unsound is not None:
        reasons.append(f"the loss of step {unsound} is no finite number")
    if len(trained) < steps:
        reasons.append(f"{len(trained)} of {steps} steps were trained")
    elif len(timed_ms) < FEWEST_STEPS:
        reasons.append(f"{len(timed_ms)} steps after the warm-up are too few to tell the throughput; it takes {FEWEST_STEPS}")
    return TrainingRow(
        processes=processes,
        batch_size_per_process=batch_size,
        dtype=dtype,
        device=device,
        threads=start.get("threads"),
        steps=steps,
        warmup_steps=warmup_steps,
        ms_per_step=ms,
        tokens_per_step=tokens,
        tokens_per_s=rate,
        tokens_per_s_interval_95=interval,
        training_minutes=float(trained[-1]["train_seconds"]) / 60 if trained else None,
        peak_memory_bytes=max(peaks, default=None),
        mfu=rate * work[0] / work[1] if rate is not None and work[0] and work[1] else None,
        loss_first=losses[0] if losses else None,
        loss_last=losses[-1] if losses else None,
        valid=not reasons,
        invalid_reasons=reasons,
    )


def _rate(ms: Sequence[float], tokens: Sequence[int]) -> float | None:
    """Return tokens per second; None of no steps."""
    return 1e3 * sum(tokens) / math.fsum(ms) if ms else None


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """All that one run of `txl bench train` found out."""

    command: str
    """The command line that measures the same again."""
    settings: dict[str, Any]
    """Of the trainings, by section, but for what differs between the rows."""
    environment: dict[str, Any]
    """The machine and its state when measuring began."""
    rows: list[TrainingRow]

    def to_dict(self) -> dict[str, Any]:
        """Return the document as plain values for JSON."""
        return {"schema": SCHEMA, "schema_version": SCHEMA_VERSION, **dataclasses.asdict(self)}

    def to_json(self) -> str:
        """Return the document as text, one row a line, so that a file of many steps can still be looked at."""
        document = self.to_dict()
        rows = ",\n  ".join(json.dumps(row, allow_nan=False, ensure_ascii=False) for row in document.pop("rows"))
        head = json.dumps(document, allow_nan=False, ensure_ascii=False, indent=1)
        return f'{head.removesuffix("}").rstrip()},\n "rows": [\n  {rows}\n ]\n}}'

    def write(self, path: Path) -> None:
        """Write the document, whole or not at all. EnvironmentUnfitError if it cannot be written."""
        with whole_or_absent(path) as file:
            file.write(self.to_json().encode() + b"\n")

    @classmethod
    def read(cls, path: Path) -> TrainingResult:
        """Read a document back, checking every row against its steps. ArtifactError if anything is missing or does not add up."""
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise ArtifactError(f"There is no result file {path}.", remedy="Make one with `txl bench train --out FILE`.") from None
        except (OSError, UnicodeDecodeError) as error:
            raise ArtifactError(f"The result file {path} cannot be read: {error}.", remedy=_REMEDY) from error
        document = parse(text, path, ArtifactError, _REMEDY)
        if document.pop("schema", None) != SCHEMA:
            raise ArtifactError(f"{path} is no result of `txl bench train`.", remedy=_REMEDY)
        if (version := document.pop("schema_version", None)) != SCHEMA_VERSION:
            raise ArtifactError(
                f"The result file {path} has schema version {version}, but this txl reads {SCHEMA_VERSION}.",
                remedy="Read it with the txl that wrote it, or measure again with `txl bench train --out FILE`.",
            )
        try:
            result: TrainingResult = from_plain(cls, document)
            for row in result.rows:
                row.check()
        except (ArtifactError, ValueError, OverflowError, ZeroDivisionError) as error:
            reason = error.message if isinstance(error, ArtifactError) else str(error)
            raise ArtifactError(f"The result file {path} is damaged: {reason.rstrip('.')}.", remedy=_REMEDY) from error
        return result


@dataclass(frozen=True)
class ScalingTable:
    """The specification's table of training throughput, for one mixed precision."""

    mixed: str | None
    """fp16 or bf16; None where only FP32 was trained."""
    header: tuple[str, ...]
    cells: tuple[tuple[str, ...], ...]
    """Rows of text, sorted by batch size, then processes."""

    def lines(self) -> list[str]:
        """Return the table as Markdown whose columns are aligned."""
        widths = [max(len(row[i]) for row in (self.header, *self.cells)) for i in range(len(self.header))]
        rule = ["-" * (width - 1) + ":" for width in widths]
        return [f"| {' | '.join(cell.rjust(width) for cell, width in zip(row, widths))} |" for row in (self.header, rule, *self.cells)]


def scaling_tables(rows: Iterable[TrainingRow]) -> list[ScalingTable]:
    """Return a table for each mixed precision there is, or one without.

    The speedup of a batch size that FP32 was not trained at, as it cannot hold it, is over the largest smaller one that it was, as in
    NVIDIA's tables; weak scaling is over one process of the same batch size. What was skipped, is invalid or was not asked for is N/A.
    """
    rows = list(rows)
    mixed: list[str | None] = [dtype for dtype in dict.fromkeys(row.dtype for row in rows) if dtype != BASE_DTYPE]
    return [_scaling_table(rows, dtype) for dtype in mixed or [None]]


def _scaling_table(rows: Sequence[TrainingRow], mixed: str | None) -> ScalingTable:
    shown = [row for row in rows if row.dtype in (BASE_DTYPE, mixed)]
    rates = {(row.dtype, row.batch_size_per_process, row.processes): row.tokens_per_s for row in shown if row.figures_apply}
    failed = {(row.batch_size_per_process, row.processes) for row in shown if row.dtype == BASE_DTYPE and row.skipped is None}

    def base(batch_size: int, processes: int) -> float | None:
        held = [size for dtype, size, n in rates if dtype == BASE_DTYPE and n == processes and size <= batch_size]
        if not held or (max(held) < batch_size and (batch_size, processes) in failed):
            return None
        return rates[BASE_DTYPE, max(held), processes]

    cells = []
    for batch_size, processes in sorted({(row.batch_size_per_process, row.processes) for row in shown}):
        own = {dtype: rates.get((dtype, batch_size, processes)) for dtype in (BASE_DTYPE, mixed or "")}
        alone = {dtype: rates.get((dtype, batch_size, 1)) for dtype in own}
        cells.append(
            (
                f"{processes}",
                f"{batch_size}",
                *(NOT_MEASURED if rate is None else f"{rate:,.1f}" for rate in own.values()),
                _ratio(own[mixed or ""], base(batch_size, processes)),
                *(_ratio(own[dtype], alone[dtype]) for dtype in own),
            )
        )
    on_gpu = any(row.device.startswith("cuda") for row in shown)
    unit = "GPU" if on_gpu else "Process"
    plural = "GPUs" if on_gpu else "Processes"
    name = "Mixed precision" if mixed in (None, "fp16") else f"Mixed precision, {mixed}"
    header = (
        plural,
        f"Batch Size / {unit}",
        "Throughput - FP32 (tok/s)",
        f"Throughput - {name} (tok/s)",
        f"Throughput speedup (FP32 to {name})",
        "Weak Scaling - FP32",
        f"Weak Scaling - {name}",
    )
    return ScalingTable(mixed, header, tuple(cells))


def _ratio(value: float | None, base: float | None) -> str:
    return NOT_MEASURED if value is None or not base else f"{value / base:.3f}"
