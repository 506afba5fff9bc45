"""Which token comes next: the distribution that a user asked for, and a draw from it that can be repeated.

Works in float64 on the CPU, so that the same scores and the same seed give the same token on every machine.
"""

# Shape suffixes: V vocabulary

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from txl_train.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the model's distribution is changed before a token is drawn, in this order."""

    forbidden: tuple[int, ...] = ()
    """Ids that are never drawn; the others share their probability."""
    temperature: float = 1.0
    """Log p is divided by it: below 1 sharper, above 1 flatter; 0 takes the most probable token always."""
    top_k: int | None = None
    """Only so many of the most probable tokens, of equal ones those of lower id."""
    top_p: float | None = None
    """Only the fewest most probable tokens that together reach this probability (nucleus sampling, Holtzman et al. 2020)."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UsageError(f"`--temperature` must be 0 or more, but is {self.temperature} instead.")
        if self.top_k is not None and self.top_k < 1:
            raise UsageError(f"`--top-k` must be 1 or more, but is {self.top_k} instead.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UsageError(f"`--top-p` must be above 0 and at most 1, but is {self.top_p} instead.")

    @property
    def is_greedy(self) -> bool:
        """Whether nothing is left to chance."""
        return self.temperature == 0 or self.top_k == 1


def log_probs(scores_V: Tensor) -> Tensor:
    """Return log p [V] (nats, float64) of a model's logits or log p."""
    return torch.log_softmax(scores_V.detach().to("cpu", torch.float64), dim=-1)


def distribution(log_p_V: Tensor, sampling: Sampling) -> Tensor:
    """Return the probabilities [V] (float64, sum 1) that `sampling` makes of the model's log p [V]."""
    log_p_V = log_p_V.clone()
    if sampling.forbidden:
        log_p_V[list(sampling.forbidden)] = float("-inf")
    if not bool(torch.isfinite(log_p_V).any()):
        raise UsageError("No token is left to be drawn.", remedy="Forbid fewer tokens.")
    if sampling.is_greedy:
        p_V = torch.zeros_like(log_p_V)
        p_V[int((log_p_V == log_p_V.max()).nonzero()[0])] = 1.0  # the lowest id of equal ones, which argmax does not promise
        return p_V
    p_V = torch.softmax(log_p_V / sampling.temperature, dim=-1)
    if sampling.top_k is None and sampling.top_p is None:
        return p_V
    sorted_V, order_V = torch.sort(p_V, descending=True, stable=True)
    kept = len(p_V) if sampling.top_k is None else min(sampling.top_k, len(p_V))
    if sampling.top_p is not None:
        reached_K = torch.cumsum(sorted_V[:kept] / sorted_V[:kept].sum(), dim=0)
        kept = min(kept, int((reached_K < sampling.top_p).sum()) + 1)
    chosen = order_V[:kept]
    result_V = torch.zeros_like(p_V)
    result_V[chosen] = p_V[chosen] / p_V[chosen].sum()
    return result_V


class Chance:
    """The random numbers of one sample, which depend on the seed and the sample's number alone."""

    def __init__(self, seed: int, sample: int) -> None:
        digest = hashlib.sha256(f"{seed}:{sample}".encode()).digest()
        self._generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)

    def draw(self, p_V: Tensor) -> int:
        """Draw an id by p [V] (float64): the one at which the summed probability, in the order of ids, passes a uniform number."""
        reached_V = torch.cumsum(p_V, dim=0)
        uniform = torch.rand((), generator=self._generator, dtype=torch.float64) * reached_V[-1]
        drawn = int(torch.searchsorted(reached_V, uniform, right=True))
        return min(drawn, int(p_V.nonzero()[-1]))
