"""What came out of named workloads: each runtime of ours beside the baseline, its goals met or MISSED, and where its time goes, as tables.

Knows results and goals; what is run, and how, is `speed.py`'s business.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from txl_deploy.bench.compare import Ratio, compare_paired
from txl_deploy.bench.result import BenchResult, Roofline, Row
from txl_deploy.bench.stats import percentile
from txl_train.errors import ValidationError

if TYPE_CHECKING:
    from speed import Run, Workload


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One batch size: the result with all samples, and the peak of products before and after, in FLOP/s."""

    result: BenchResult
    peak_before: float
    peak_after: float
    profiles: list[dict[str, Any]] = field(default_factory=list)
    """Of `speed_profile.py`: runtime, milliseconds per step in all, and by kind of operator."""

    @property
    def peak(self) -> float:
        """The larger one: what the machine has shown it can do."""
        return max(self.peak_before, self.peak_after)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        peaks = {"peak_flops_before": self.peak_before, "peak_flops_after": self.peak_after}
        return {**self.result.to_dict(), **peaks, "profiles": self.profiles}


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One row of the table: a runtime of ours against the baseline, with what it was to reach."""

    workload: str
    batch_size: int
    runtime: str
    baseline_ms: float
    own_ms: float
    speedup: Ratio
    """Latency of the baseline over ours."""
    peak_share: float
    """Operations per second of the median step, over those of a large product in FP32."""
    is_best: bool
    run: Run
    roofline: Roofline | None = None
    valid: bool | None = None
    """Of its own figures and the baseline's; None where nothing was judged. The ratio holds beyond that: turns are compared in pairs."""
    invalid_reasons: tuple[str, ...] = ()

    def goals(self) -> list[str]:
        """Return each goal with whether it is met; only the best runtime has goals."""
        if not self.is_best:
            return []
        found = []
        if self.run.ratio is not None:
            found.append((f"{self.run.ratio:g}×", self.speedup.ratio >= self.run.ratio))
        if self.run.peak_share is not None:
            found.append((f"{self.run.peak_share:.0%} of peak", self.peak_share >= self.run.peak_share))
        return [f"{goal} {'met' if met else 'MISSED'}" for goal, met in found]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {**dataclasses.asdict(self), "speedup": self.speedup.to_dict(), "goals": self.goals()}


def judge(workload: Workload, measured: list[Measured]) -> list[Verdict]:
    """Compare the rows of ours with the baseline's, by pairs of turns.

    Raises:
        ValidationError: a row's perplexity is not the checkpoint's, so it is another model that was timed.
    """
    verdicts = []
    for run, one in zip(workload.runs, measured, strict=True):
        rows = one.result.rows
        (baseline,) = (row for row in rows if row.runtime == "reference")
        for row in rows:
            if row.verified is False:
                raise ValidationError(f"{_name(row)} of {workload.name} computes something else than the checkpoint.")
        wanted = [row for row in rows if row is not baseline and (row.runtime in workload.runtimes or row.artifact is not None)]
        best = min(wanted, key=lambda row: percentile(row.samples_ms, 50))
        for row in wanted:
            flops = row.roofline.flops_per_step if row.roofline else 0.0
            own_ms = percentile(row.samples_ms, 50)
            both = {"": row, "baseline: ": baseline}
            verdicts.append(
                Verdict(
                    workload=workload.name,
                    batch_size=run.batch_size,
                    runtime=_name(row),
                    baseline_ms=percentile(baseline.samples_ms, 50),
                    own_ms=own_ms,
                    speedup=compare_paired(row, baseline),
                    peak_share=flops / (own_ms / 1e3) / one.peak,
                    is_best=row is best,
                    run=run,
                    roofline=row.roofline,
                    valid=None if row.valid is None or baseline.valid is None else row.valid and baseline.valid,
                    invalid_reasons=tuple(f"{whose}{reason}" for whose, judged in both.items() for reason in judged.invalid_reasons),
                )
            )
    return verdicts


def _name(row: Row) -> str:
    return f"{row.runtime} {row.dtype}"


def table(verdicts: list[Verdict], workload: Workload) -> str:
    """Return the table in Markdown, with the reasons of rows whose milliseconds are not to be believed below it."""
    lines = [f"# {workload.name}", "", workload.what, ""]
    lines += ["| batch | runtime | baseline, ms | ours, ms | times as fast (95 %) | share of GEMM peak | roofline | goals | milliseconds |"]
    lines += ["|---:|---|---:|---:|---|---:|---|---|---|"]
    reasons = []
    for v in verdicts:
        low, high = v.speedup.interval_95
        cells = [str(v.batch_size), v.runtime, f"{v.baseline_ms:.1f}", f"{v.own_ms:.1f}"]
        cells += [f"{v.speedup.ratio:.2f} ({low:.2f} to {high:.2f})", f"{v.peak_share:.0%}"]
        cells += [f"{v.roofline.share_of_peak:.0%}, {v.roofline.bound}" if v.roofline else "-", ", ".join(v.goals())]
        cells += [{True: "VALID", False: "INVALID", None: "not judged"}[v.valid]]
        lines.append("| " + " | ".join(cells) + " |")
        if v.valid is False:
            reasons.append(f"- Batch {v.batch_size}, {v.runtime}: {'; '.join(v.invalid_reasons)}.")
    if reasons:
        lines += ["", "INVALID milliseconds (ratios compare turns in pairs, so what hits both leaves them alone):", *reasons]
    return "\n".join([*lines, ""])


def profile_table(workload: Workload, measured: list[Measured]) -> str:
    """Return where the time goes in Markdown, milliseconds per step by kind of operator, largest first; nothing without profiles."""
    rows = []
    for run, one in zip(workload.runs, measured, strict=True):
        for profile in one.profiles:
            kinds = sorted(profile["ms_by_kind"].items(), key=lambda item: -item[1])
            parts = ", ".join(f"{kind} {ms:.1f} ({ms / profile['step_ms']:.0%})" for kind, ms in kinds)
            rows.append(f"| {run.batch_size} | {profile['runtime']} | {profile['step_ms']:.1f} | {parts} |")
    if not rows:
        return ""
    told = "By the runtime's own profile, in untimed steps with a full memory; profiling costs time itself."
    head = ["", "## Where the time goes", "", told, "", "| batch | runtime | step, ms | of these |", "|---:|---|---:|---|"]
    return "\n".join([*head, *rows, ""])


def provenance(record: Mapping[str, Any]) -> str:
    """Return what was measured on what and when, as the record says it."""
    machine, peaks = record["environment"], [one[f"peak_flops_{when}"] for one in record["results"] for when in ("before", "after")]
    versions = ", ".join(f"{name} {machine['packages'][name]}" for name in ("torch", "onnxruntime") if machine["packages"].get(name))
    return (
        f"\nPeak of large products in FP32: {min(peaks) / 1e9:.0f} to {max(peaks) / 1e9:.0f} GFLOP/s in the course of this. "
        f"{machine['cpu']}, {machine['threads']} threads, {versions}, commit {(machine['git_commit'] or 'unknown')[:12]}.\n"
        f"Made by `python {record['command']}`, {record['date']}.\n"
    )
