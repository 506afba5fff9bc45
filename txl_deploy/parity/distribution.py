"""Whether two runtimes hold the same words likely: the Kullback-Leibler divergence of what they predict, and the word they hold likeliest.

The nll of the words that come says nothing of all others. A runtime that scores the next token yields all words, and both figures are
exact. One that scores given targets is asked: from the same memory it scores the reference's likeliest words, and some drawn from what the
reference leaves to the others. The divergence is then a sum over the likeliest words and an estimate of the rest,

    sum_top p (r - 1 - ln r) + p(rest) mean_drawn (r - 1 - ln r),   r = q / p  (Schulman 2020),

of which no term is negative. It equals KL(p || q) where q sums to 1, and where it does not, exceeds it by what q sums to beyond 1. Which
segments are asked is `rollout`'s business, how large the figures may be `tolerances`'.
"""

# Shape suffixes: B batch, Q inputs (ext_len + tgt_len), T tgt_len, N = B * T positions, V vocabulary, W words asked

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from txl_deploy.runtimes.base import Runtime
from txl_deploy.runtimes.eager import EagerRuntime
from txl_train.data.segments import Segment
from txl_train.errors import UsageError
from txl_train.model.memory import Memory

LIKELIEST = 8
"""Words of each position that are asked because the reference holds them likeliest."""

DRAWN = 4
"""Words of each position that are asked because they were drawn from the others."""

ROWS_AT_ONCE = 64
"""Positions whose whole distribution is held at a time: 64 of 267,735 words take 69 MB."""

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Distribution:
    """How the predictions compared, over the segments that were asked."""

    compared: Literal["words asked", "all words"]
    n_segments: int
    n_positions: int
    kl_nats: float
    """Mean over the positions of KL(reference || candidate), nats."""
    kl_standard_error: float
    """Of the mean, by the spread over positions, nats."""
    top1_agreement: float | None
    """Share of the decided positions at which both hold the same word likeliest; None where none is decided."""
    top1_decided: int
    top1_undecided: int
    """Positions where the candidate leaves more to the words that were not asked than the likeliest of the others has."""
    largest_swap_nats: float
    """Where the candidate holds another of the words likelier: how much likelier the reference holds its own, nats; 0 where there is none.
    Of all positions. Rounding swaps words that are nearly as likely, and no others."""


@dataclass
class Asked:
    """What was found so far, position by position."""

    exact: bool
    n_segments: int = 0
    kl: list[Array] = field(default_factory=list)
    n_agree: int = 0
    n_decided: int = 0
    largest_swap: float = 0.0

    def add(self, kl_N: Array, own_N: Array, chosen_N: Array, other_nats_N: Array, undecided_N: npt.NDArray[np.bool_]) -> None:
        """Take the positions of one segment.

        Args:
            kl_N: nats.
            own_N: the word that the reference holds likeliest.
            chosen_N: the word that the candidate does, of those that were asked.
            other_nats_N: by how much the reference holds its own word likelier than `chosen_N`, nats.
            undecided_N: where another word may be the candidate's likeliest.
        """
        self.n_segments += 1
        self.kl.append(kl_N)
        differ_N = own_N != chosen_N
        self.n_decided += int((~undecided_N).sum())
        self.n_agree += int((~differ_N & ~undecided_N).sum())
        self.largest_swap = max(self.largest_swap, float(other_nats_N[differ_N].max(initial=0.0)))

    def result(self) -> Distribution | None:
        """Return the figures over all positions; None where there was none."""
        kl_N = np.concatenate(self.kl) if self.kl else np.zeros(0)
        n = len(kl_N)
        if n == 0:
            return None
        finite = bool(np.isfinite(kl_N).all())
        return Distribution(
            compared="all words" if self.exact else "words asked",
            n_segments=self.n_segments,
            n_positions=n,
            kl_nats=float(kl_N.mean()) if finite else math.inf,
            kl_standard_error=float(kl_N.std(ddof=1)) / math.sqrt(n) if finite and n > 1 else math.inf,
            top1_agreement=self.n_agree / self.n_decided if self.n_decided else None,
            top1_decided=self.n_decided,
            top1_undecided=n - self.n_decided,
            largest_swap_nats=self.largest_swap,
        )


def check_can_ask(reference: Runtime, candidate: Runtime) -> None:
    """Raise `UsageError` for a reference that cannot say what it leaves to the words that do not come."""
    if candidate.info.head == "nll" and not isinstance(reference, EagerRuntime):
        raise UsageError(
            f"Distributions are compared with a reference in PyTorch, and {reference.info.origin or 'this one'} runs in "
            f"{reference.info.name}.",
            remedy="Give the checkpoint as the reference.",
        )


def segments_to_ask(n_segments: int, wanted: int) -> set[int]:
    """Return the numbers of up to `wanted` of the segments, spread evenly, the first and the last among them."""
    if wanted < 1 or n_segments < 1:
        return set()
    return {round(place) for place in np.linspace(0, n_segments - 1, min(wanted, n_segments))}


def compare_all_words(asked: Asked, nll_BV: Array, other_nll_BV: Array) -> None:
    """Take the predictions of rows whose every word both have scored, reference first, nats."""
    own_B, chosen_B = nll_BV.argmin(axis=1), other_nll_BV.argmin(axis=1)
    kl_B = divergence(nll_BV, nll_BV - other_nll_BV).sum(axis=1)
    rows = np.arange(len(nll_BV))
    asked.add(kl_B, own_B, chosen_B, nll_BV[rows, chosen_B] - nll_BV[rows, own_B], np.zeros(len(nll_BV), dtype=bool))


def ask(asked: Asked, reference: Runtime, candidate: Runtime, segment: Segment, before: tuple[Memory, Memory], *, seed: int) -> None:
    """Ask the candidate for the nll of words of the reference's choice, and take the positions that count.

    Args:
        before: the memory of each side before this segment, which both have continued already; it is continued again and left as it is.
        seed: of the draws.
    """
    assert isinstance(reference, EagerRuntime)
    counted_N = segment.counted_BT.reshape(-1)
    likely = _likely_words(reference, segment, before[0], torch.Generator().manual_seed(seed))
    shape = segment.target_ids_BT.shape
    input_ids_BQ = torch.from_numpy(segment.input_ids_BT).to(candidate.info.device)
    other_nll_NW = np.stack(
        [
            candidate.step(input_ids_BQ, words_N.view(shape).to(candidate.info.device), before[1])
            .nll_BT.to("cpu", torch.float64, copy=True)
            .numpy()
            .reshape(-1)
            for words_N in likely.words_NW.contiguous().unbind(1)
        ],
        axis=1,
    )
    nll_NW, other_nll_NW = likely.nll_NW[counted_N], other_nll_NW[counted_N]
    rest_N, words_NW = likely.rest_N[counted_N], likely.words_NW.numpy()[counted_N]
    top = likely.n_likeliest
    log_ratio_NW = nll_NW - other_nll_NW
    kl_N = divergence(nll_NW[:, :top], log_ratio_NW[:, :top]).sum(axis=1)
    if top < nll_NW.shape[1]:
        kl_N += rest_N * divergence(np.zeros_like(nll_NW[:, top:]), log_ratio_NW[:, top:]).mean(axis=1)
    rows = np.arange(len(nll_NW))
    best_N = _finite(other_nll_NW[:, :top]).argmin(axis=1)
    with np.errstate(over="ignore", invalid="ignore"):
        others_NW = np.exp(-other_nll_NW[:, :top])
        left_N = np.maximum(1 - others_NW.sum(axis=1), 0.0) if top < reference.info.config.vocab_size else np.zeros(len(rows))
        undecided_N = left_N > others_NW[rows, best_N]
    asked.add(kl_N, words_NW[:, 0], words_NW[rows, best_N], nll_NW[rows, best_N] - nll_NW[:, 0], undecided_N)


def divergence(nll: Array, log_ratio: Array) -> Array:
    """Return p (r - 1 - ln r), nats, for words of that nll and that ln r; infinite where it is no number."""
    with np.errstate(over="ignore", invalid="ignore"):
        terms = np.exp(-nll) * (np.expm1(log_ratio) - log_ratio)
    return _finite(terms)


def _finite(values: Array) -> Array:
    return np.where(np.isfinite(values), values, np.inf)


@dataclass(frozen=True)
class _Likely:
    words_NW: Tensor
    """The likeliest words in order, then those drawn from the others: int64 [N, W]."""
    nll_NW: Array
    rest_N: Array
    """What the reference leaves to all but the likeliest."""
    n_likeliest: int


@torch.no_grad()  # not inference_mode: the words go to the candidate, and a compiled one would be compiled anew
def _likely_words(reference: EagerRuntime, segment: Segment, memory: Memory, generator: torch.Generator) -> _Likely:
    step: torch.nn.Module = reference.step_module
    input_ids_BQ = torch.from_numpy(segment.input_ids_BT).to(reference.info.device)
    hidden_BTD, _, _ = step.run_layers(input_ids_BQ, memory.length_B, memory.states)  # type: ignore[operator]  # a module's method
    hidden_ND = hidden_BTD.flatten(0, 1)
    V = reference.info.config.vocab_size
    top = min(LIKELIEST, V)
    words, nll, rest = [], [], []
    for part_ND in hidden_ND.split(ROWS_AT_ONCE):
        log_p_NV = step.head.log_probs(part_ND).float().cpu()  # type: ignore[operator, union-attr]
        best_NW = log_p_NV.topk(top, dim=1).indices
        chosen = [best_NW]
        others_NV = log_p_NV.exp().scatter_(1, best_NW, 0.0)
        rest_N = others_NV.sum(dim=1, dtype=torch.float64)
        if top < V:
            others_NV[rest_N <= 0] = 1.0  # nothing is left to them: any words will do
            chosen.append(torch.multinomial(others_NV, DRAWN, replacement=True, generator=generator))
        words.append(torch.cat(chosen, dim=1))
        nll.append(-log_p_NV.gather(1, words[-1]).double())
        rest.append(rest_N)
    return _Likely(torch.cat(words), torch.cat(nll).numpy(), torch.cat(rest).numpy(), top)
