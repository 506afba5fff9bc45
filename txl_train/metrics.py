"""From a sum of negative log-likelihoods to the figures people quote. Standard library only."""

from __future__ import annotations

import math


def perplexity(nll_nats_per_token: float) -> float:
    """Return exp(mean NLL); infinity where that overflows a double (mean NLL above 709 nats)."""
    try:
        return math.exp(nll_nats_per_token)
    except OverflowError:
        return math.inf


def bits_per_char(nll_nats_per_token: float) -> float:
    """Return the mean NLL in bits; "per char" where a token is a character."""
    return nll_nats_per_token / math.log(2)
