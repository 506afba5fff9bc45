"""What `txl bench` concludes: which numbers have a proof, whether targets are met, and how two that took turns compare."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from txl_train.errors import UsageError, ValidationError

if TYPE_CHECKING:
    from txl_deploy.bench.compare import Ratio
    from txl_deploy.bench.harness import BenchSettings, Contender
    from txl_deploy.bench.result import BenchResult, Row


def proof_lines(result: BenchResult) -> list[str]:
    """Return for a reader why the rows' models may be believed to be their checkpoint's, or that they may not."""
    rows, lines = result.rows, []
    if result.unvalidated:
        lines.append("UNVALIDATED: measured without a receipt, so nothing says that these are the latencies of the model they name.")
        lines += [f"  {reason}" for reason in dict.fromkeys(row.proof.reason for row in rows if row.proof and row.proof.kind == "none")]
    for receipt in result.receipts:
        lines.append(
            f"Receipt {receipt['receipt_sha256'][:12]}…: {receipt['runtime']} {receipt['dtype']} scored {receipt['dataset']} "
            f"{receipt['split']} at perplexity {receipt['perplexity']:.6g}; {receipt['reason']}."
        )
    checked = [row for row in rows if row.verified is not None]
    if result.failed:
        lines.append(f"FAILED: {len(result.failed)} of {len(rows)} rows are of a model that computes something else than its checkpoint.")
    elif checked and len(checked) == len(rows) and not any(row.is_reference for row in rows):
        lines.append("Verified: the nll of every row's timed steps is that of its receipt, segment by segment.")
    elif checked and len(checked) == len(rows):
        largest = max(abs(row.perplexity_rel_diff or 0.0) for row in rows)
        bound = max(row.tolerance or 0.0 for row in rows)
        lines.append(f"Verified: the perplexity of every row's timed steps is the checkpoint's within {largest:.1e} (bound {bound:.0e}).")
    else:
        lines.append("Not all timed steps were compared with a checkpoint or a receipt: `--checkpoint FILE` does so at every batch size.")
    if result.invalid:
        lines.append(f"INVALID: {len(result.invalid)} of {len(rows)} rows are not to be believed.")
    return lines


@dataclass(frozen=True, kw_only=True)
class Verdicts:
    """What a result has to come up to."""

    accept_invalid: bool
    target_perplexity: float | None
    """Of every row, at most."""
    target_throughput: float | None
    """Of every row, at least, tokens per second."""
    max_regression: float | None
    """Share that the second of two may be slower; None: they are not compared."""

    def check_plan(self, groups: Sequence[Sequence[Contender]], settings: BenchSettings) -> None:
        """Refuse before measuring what could not be compared. UsageError."""
        from txl_deploy.bench.compare import LEAST_TURNS

        if self.max_regression is None:
            return
        if settings.min_samples < LEAST_TURNS:
            raise UsageError(f"`--ab` needs {LEAST_TURNS} turns, so `--min-samples` must be {LEAST_TURNS} or more.")
        others = [contender for contender in groups[0] if not contender.is_reference]
        if len(groups) != 1 or (len(groups[0]) != 2 and len(others) != 2):
            names = ", ".join(contender.runtime.info.origin or contender.runtime.info.name for group in groups for contender in group)
            raise UsageError(
                f"`--ab` compares two of equal lengths, but this measures {names}.",
                remedy="Give two artifacts, or one and its checkpoint; with two, the checkpoint is what both are checked against.",
            )

    def ratios(self, result: BenchResult) -> list[tuple[int, Ratio]]:
        """Return by batch size how much longer the second takes than the first."""
        from txl_deploy.bench.compare import compare_paired

        if self.max_regression is None:
            return []
        sizes = list(dict.fromkeys(row.batch_size for row in result.rows))
        pairs = [_two([row for row in result.rows if row.batch_size == size]) for size in sizes]
        return [(size, compare_paired(first, second, max_regression=self.max_regression)) for size, (first, second) in zip(sizes, pairs)]

    def compared(self, result: BenchResult) -> BenchResult:
        """Return the result with the comparison in it, for those who read the file."""
        found = tuple({"batch_size": size, **ratio.to_dict()} for size, ratio in self.ratios(result))
        return dataclasses.replace(result, comparisons=found)

    def comparison_lines(self, result: BenchResult) -> list[str]:
        """Return the comparison for a reader; nothing where none was asked for."""
        ratios = self.ratios(result)
        if not ratios:
            return []
        first, second = _two([row for row in result.rows if row.batch_size == result.rows[0].batch_size])
        lines = [f"Median latency of {_name(second)} over {_name(first)}, pairs of turns, 95 % intervals:"]
        for size, ratio in ratios:
            low, high = ratio.interval_95
            lines.append(f"  batch size {size:>4}: {ratio.ratio:.4f} ({low:.4f} to {high:.4f}), {ratio.verdict}")
        return lines

    def check(self, result: BenchResult) -> None:
        """Raise ValidationError for what is not as it has to be: first what was computed, then what was measured."""
        self._check_computed(result)
        regressions = [(size, ratio) for size, ratio in self.ratios(result) if ratio.regression]
        if regressions:
            size, ratio = regressions[0]
            first, second = _two([row for row in result.rows if row.batch_size == size])
            raise ValidationError(
                f"{_name(second)} is {ratio.ratio - 1:.1%} slower than {_name(first)} at batch size {size}, beyond "
                f"{ratio.max_regression:.1%} by its whole interval; {len(regressions)} batch sizes regressed.",
            )
        if result.invalid and not self.accept_invalid:
            worst = result.invalid[0]
            raise ValidationError(
                f"{len(result.invalid)} of {len(result.rows)} rows are INVALID, the first of {worst.runtime} at batch size "
                f"{worst.batch_size}: {worst.invalid_reasons[0]}.",
                remedy="Measure longer (`--max-duration`), fewer `--percentiles`, on an idle machine; or take them as they are with "
                "`--accept-invalid`.",
            )

    def _check_computed(self, result: BenchResult) -> None:
        if result.failed:
            worst = result.failed[0]
            difference = worst.perplexity_rel_diff
            of = f", as {worst.invalid_reasons[0]}" if worst.invalid_reasons else ""
            how = f"is not finite{of}" if worst.perplexity is None else "is not what its receipt says"
            how = how if difference is None else f"is {abs(difference):.1e} away from the checkpoint's"
            raise ValidationError(
                f"The perplexity of {worst.runtime} at batch size {worst.batch_size} {how}; {len(result.failed)} rows failed.",
                remedy="Find where they part with `txl parity`, and export the checkpoint again.",
            )
        missed = []
        for row in result.rows:
            where = f"of {row.runtime} at batch size {row.batch_size}"
            if self.target_perplexity is not None and not (row.perplexity is not None and row.perplexity <= self.target_perplexity):
                missed.append(f"The perplexity {where} is {row.perplexity}, above the target {self.target_perplexity:g}.")
            if self.target_throughput is not None and row.tokens_per_s < self.target_throughput:
                missed.append(f"The throughput {where} is {row.tokens_per_s:.1f} tok/s, below the target {self.target_throughput:g}.")
        if missed:
            raise ValidationError(" ".join(missed))


def _two(rows: Sequence[Row]) -> tuple[Row, Row]:
    """Return the two of one batch size that are compared: without the reference where there are two others."""
    others = [row for row in rows if not row.is_reference]
    first, second = others if len(others) == 2 else rows
    return first, second


def _name(row: Row) -> str:
    return f"{row.artifact.name} ({row.runtime})" if row.artifact else row.runtime
