"""Whether what was timed is the model it is said to be: by the nll of the timed steps themselves.

Compares with the reference of the same run, and with what a receipt says of each segment. Knows rows and sums of nll; how steady the
times were is judged in `stability`, and where nll come from is the harness's business.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from txl_deploy.bench.result import Proof, Row
from txl_deploy.parity.tolerances import tolerance_for

if TYPE_CHECKING:
    from txl_deploy.bench.workload import Workload


@dataclass(frozen=True)
class Compared:
    """What came of comparing timed steps with a receipt."""

    agrees: bool | None
    """None where nothing could be compared."""
    told: str
    """One clause: what is wrong, how near it was, or why nothing was compared."""


@dataclass(frozen=True, kw_only=True)
class ExpectedNll:
    """What an artifact scored when its receipt was written, segment by segment from a cold start.

    For the very text and lengths of the workload that it is compared with: whoever gives it has made sure.
    """

    batch_size: int
    """Streams, of all processes."""
    tgt_len: int
    n_tokens: tuple[int, ...]
    """Counted tokens of each segment, from the first on."""
    nll_nats: tuple[float, ...]
    """Sum over them."""
    bound: float
    """How far the mean nll of a segment may be from what it was, nats per token."""

    def __post_init__(self) -> None:
        if len(self.n_tokens) != len(self.nll_nats):
            raise ValueError(f"{len(self.n_tokens)} segments have tokens, but {len(self.nll_nats)} a nll")

    def compare(self, workload: Workload, steps: Sequence[int], n_tokens: NDArray[np.float64], nll_nats: NDArray[np.float64]) -> Compared:
        """Compare timed steps, by their numbers from the cold start on, with the segments that they read."""
        if (workload.batch_size, workload.tgt_len) != (self.batch_size, self.tgt_len):
            return Compared(
                None, f"not compared step by step with the receipt, which is of batch size {self.batch_size}, segments of {self.tgt_len}"
            )
        segments = np.asarray(steps, dtype=np.int64) % workload.steps_per_pass
        known = segments < len(self.n_tokens)
        if not known.any():
            return Compared(None, "not compared step by step with the receipt, which ends before the first timed segment")
        segments, counts, sums = segments[known], n_tokens[known], nll_nats[known]
        if (counts != np.asarray(self.n_tokens)[segments]).any():
            return Compared(False, "the timed steps count other tokens than the segments of the receipt")
        off = np.abs(sums - np.asarray(self.nll_nats)[segments]) / np.maximum(counts, 1)
        worst = int(np.argmax(np.where(np.isfinite(off), off, np.inf)))
        if not off[worst] <= self.bound:
            by = f"{off[worst]:.1e} nats per token" if math.isfinite(off[worst]) else "no finite number"
            told = f"the nll of timed steps is not the receipt's: segment {segments[worst]} is off by {by} (bound {self.bound:.0e})"
            return Compared(False, told)
        return Compared(True, f"the nll of {len(segments)} timed steps is the receipt's within {off[worst]:.1e} nats per token")


def verify(rows: Sequence[Row]) -> list[Row]:
    """Return the rows with their perplexity compared to the reference's; without a reference they stay unverified (None).

    The relative difference of the perplexities may be as large as parity's bound on the mean nll. A row of other lengths than the
    reference computes something else, and one of a precision without a bound cannot be judged: they stay unverified too. A row whose
    nll is not a finite number has failed, reference or not; so has one that has failed already.
    """
    reference = next((row for row in rows if row.is_reference), None)
    return [_verified(row, reference) for row in rows]


def _verified(row: Row, reference: Row | None) -> Row:
    nll = (reference or row).nll_nats_per_token
    measured = tolerance_for(row.dtype, memory_dtype=row.memory_dtype)
    tolerance = None if measured is None else measured.mean_bound(nll or 0.0)
    if row.nll_nats_per_token is None or row.perplexity is None:
        return dataclasses.replace(row, verified=False, tolerance=tolerance)
    if reference is None or tolerance is None or row.lengths != reference.lengths:
        return row
    if reference.nll_nats_per_token is None:
        return dataclasses.replace(row, verified=False, tolerance=tolerance)
    difference = math.expm1(min(row.nll_nats_per_token - reference.nll_nats_per_token, 700.0))
    verified = row.verified is not False and abs(difference) <= tolerance
    return dataclasses.replace(row, perplexity_rel_diff=difference, verified=verified, tolerance=tolerance)


def wrong_model(row: Row) -> str | None:
    """Return a clause that says how a row's perplexity failed against the reference of its run; None if it did not."""
    if row.verified is not False:
        return None
    if row.nll_nats_per_token is None or row.perplexity is None:
        return "the perplexity is not a finite number"
    if row.perplexity_rel_diff is None or row.tolerance is None or abs(row.perplexity_rel_diff) <= row.tolerance:
        return None  # failed by its receipt, which has a clause of its own, or there was nothing to fail by
    return f"the perplexity is {abs(row.perplexity_rel_diff):.1e} away from the reference's (bound {row.tolerance:.0e})"


def proof_of(row: Row, given: Proof | None) -> Proof | None:
    """Return why a verified row's model may be believed: what was given, or what this run has shown; None where it has shown nothing."""
    if row.is_reference:
        return Proof(kind="reference")
    if given is None and row.verified:
        return Proof(kind="in run")
    return given
