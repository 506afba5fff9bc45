"""What the differences of a rollout mean: which bound is exceeded first, or by how much all were kept.

Two runtimes agree if single tokens, all of them together, the memories and the predictions of all words keep their bounds, if the mean
difference is shown to be within its own, and if nothing grows. The mean is a test of equivalence: not that no difference was found, but
that any larger one is ruled out with 95 % confidence (Schuirmann 1987). Knows figures and bounds; how they come about is not known here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from txl_deploy.parity.distribution import Distribution
from txl_deploy.parity.tolerances import Bounds
from txl_deploy.parity.trend import Trend

Unit = Literal["token", "word"]


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What is judged. Nats, except for shares."""

    worst: float
    """Largest difference of one token, or of one word as the next token."""
    worst_at: dict[str, int]
    """Where that is: segment, stream and position, or word."""
    unit: Unit
    rms: float
    mean: float
    """Candidate minus reference."""
    upper_bound_mean: float
    """What |mean| stays below with 95 % confidence."""
    memory: float
    """Largest difference of a state, as a share of its magnitude."""
    distribution: Distribution | None
    trend: Trend


def judge(figures: Figures, bounds: Bounds) -> tuple[bool, str]:
    """Return whether all bounds are kept, and one clause that says why."""
    unit, worst, trend = figures.unit, figures.worst, figures.trend
    where = ", ".join(f"{name} {number}" for name, number in figures.worst_at.items())
    whose = "a token's nll" if unit == "token" else "a word's nll as the next token"
    if not worst <= bounds.token_nll:
        return False, f"{whose} differs by {worst:.3g} nats ({where}), more than {bounds.token_nll:.1e}"
    if not figures.rms <= bounds.rms_nll:
        return False, f"the {unit}s' nll differ by {figures.rms:.3g} nats (root mean square), more than {bounds.rms_nll:.1e}"
    if not abs(figures.mean) <= bounds.mean_nll:
        return False, f"the mean nll differs by {figures.mean:.3g} nats, more than {bounds.mean_nll:.1e}"
    if not figures.upper_bound_mean <= bounds.mean_nll:
        return False, (
            f"the mean nll, which differs by {figures.mean:.3g} nats here, may differ by {figures.upper_bound_mean:.3g} (95 % confidence), "
            f"more than {bounds.mean_nll:.1e}"
        )
    if not figures.memory <= bounds.memory:
        return False, f"the memories differ by {figures.memory:.3g} of their magnitude, more than {bounds.memory:.1e}"
    found = figures.distribution
    if found is not None and not found.kl_nats <= bounds.kl:
        return False, f"the distributions differ by {found.kl_nats:.3g} nats (KL), more than {bounds.kl:.1e}"
    if found is not None and not found.largest_swap_nats <= bounds.swap:
        return False, (
            f"another word is held likeliest where the reference holds its own likelier by {found.largest_swap_nats:.3g} nats, more than "
            f"{bounds.swap:.1e}"
        )
    if trend.grows:
        return False, trend.reason
    worst_text = f"the worst {unit} differs by {worst:.2g} nats (bound {bounds.token_nll:.1e})"
    rms_text = f"all of them by {figures.rms:.2g} (root mean square; bound {bounds.rms_nll:.1e})"
    mean_text = f"the mean by less than {figures.upper_bound_mean:.2g} (95 % confidence; bound {bounds.mean_nll:.1e})"
    trend_text = "and nothing grows" if trend.judged else f"trend {trend.reason}"
    return True, f"{worst_text}, {rms_text}, {mean_text}, {trend_text}"
