"""Notices training that has become unstable though every number is finite: its loss rises far above its lowest and stays there.

Such a run goes on to its end and looks like any other until somebody reads the log. A learning rate that is too large does it, above all
in half precision, and so would a fault of what computes.
"""

from __future__ import annotations

RISE_NATS = 1.0
"""How far above its lowest mean a loss must lie: e times the perplexity. Means of a log interval lie some tenths apart."""
IN_A_ROW = 2
"""How many means must lie there, so that one hard passage of a text is none."""


class RisingLoss:
    """Follows the mean training losses of log intervals, nats per token."""

    def __init__(self) -> None:
        self._lowest: tuple[float, int] | None = None
        self._risen = 0

    def add(self, step: int, loss_nats: float) -> str | None:
        """Take the mean loss up to a step; return a warning when it has risen, once for each time that it does."""
        if self._lowest is None or loss_nats < self._lowest[0]:
            self._lowest, self._risen = (loss_nats, step), 0
            return None
        lowest, at = self._lowest
        if not loss_nats > lowest + RISE_NATS:
            self._risen = 0
            return None
        self._risen += 1
        if self._risen != IN_A_ROW:
            return None
        return (
            f"The training loss has risen from {lowest:.2f} nats at step {at} to {loss_nats:.2f} at step {step}: training is unstable. "
            "If it does not fall again, begin anew, or from a checkpoint of before, with a smaller `--lr` or a longer `--warmup-step`; "
            "with `--compile` or half precision, try without."
        )
