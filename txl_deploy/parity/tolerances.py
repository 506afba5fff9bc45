"""How far two runtimes may differ, and why so far."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tolerance:
    """Bounds on the difference between a runtime and the FP32 reference."""

    token_nll: float
    """Largest |difference| of any token's nll, nats."""
    mean_nll: float
    """Largest |difference| of the mean nll over all tokens, nats; nearly the relative difference of the perplexities."""
    memory: float
    """Largest difference of any state, relative to the largest magnitude in that state."""


TOLERANCES = {
    # Sums of some thousand products in another order: a few 1e-6 on logits of magnitude 10, without a trend over 10 segments
    # (measured); ten times that per token, while the mean, where rounding cancels, has to stay below 1e-5.
    "fp32": Tolerance(token_nll=1e-4, mean_nll=1e-5, memory=1e-4),
    "fp16": Tolerance(token_nll=5e-2, mean_nll=5e-3, memory=2e-2),
}
