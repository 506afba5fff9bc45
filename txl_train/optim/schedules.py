"""The learning rate of each step: warm-up, then half a cosine, 1/sqrt(step), steps down when validation stops improving, or constant.

All but `dev_perf` are functions of the step alone: continuing a run needs no state, and a longer run simply follows the longer cosine.
NVIDIA's code sets a step's rate after the step before it has moved the weights, so its first step runs at the full rate and each later one
at what is the rate of the step before it here; `compat` reproduces that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from txl_train.config import Compat, OptimConfig

_THRESHOLD = 1e-4
"""A validation loss is better if it is lower by this fraction (dev_perf)."""

_SMALLEST_CHANGE = 1e-8
"""A learning rate that would fall by less stays (dev_perf)."""


class Schedule:
    """The learning rate over the steps of one run.

    Args:
        config: `lr`, `scheduler` and what belongs to them.
        max_step: step at which the cosine ends, where `max_step_scheduler` gives no other.
        compat: None, or the lineage of NVIDIA's code whose rates are wanted. In both, step 1 runs at `lr` (inv_sqrt: at 0), step k + 1 at
            lr * k / warm-up; `constant` and `dev_perf` stay at lr * (warm-up - 1) / warm-up; a cosine climbs again beyond its end.
            "nvidia-2023" spreads the half cosine over the steps after the warm-up, "nvidia-2019" over all of them, so that the warm-up
            hides its beginning.
    """

    def __init__(self, config: OptimConfig, max_step: int, compat: Compat | None = None) -> None:
        self._config = config
        self._compat = compat
        self._end = config.max_step_scheduler or max_step
        self._best = math.inf
        self._bad = 0
        self._factor = 1.0
        self._lowered_at = -1

    def learning_rate(self, step: int) -> float:
        """Return the rate that `step`, counted from 1, runs at."""
        return self._rate(step) * (self._factor if self._is_lowered(step) else 1.0)

    def observe(self, valid_nll: float, step: int) -> None:
        """Take note of a validation loss, in nats; only dev_perf acts on it.

        After more than `patience` evaluations in a row without a loss lower than the lowest by 0.01 %, the rate is multiplied with
        `decay_rate`, but not below `lr_min`. The rules are those of torch.optim.lr_scheduler.ReduceLROnPlateau.

        Args:
            valid_nll: mean loss; not a number counts as no improvement.
            step: how many steps had been taken.
        """
        if self._config.scheduler != "dev_perf":
            return
        if valid_nll < self._best * (1 - _THRESHOLD):
            self._best, self._bad = valid_nll, 0
        else:
            self._bad += 1
        if self._bad > self._config.patience:
            self._bad = 0
            before = self.learning_rate(step + 1)
            lowered = max(before * self._config.decay_rate, self._config.lr_min)
            if before - lowered > _SMALLEST_CHANGE:
                self._factor, self._lowered_at = lowered / self._rate(step + 1), step

    def state_dict(self) -> dict[str, float]:
        """Return what `learning_rate` depends on besides the settings: plain numbers, nothing for all but dev_perf."""
        if self._config.scheduler != "dev_perf":
            return {}
        return {"best": self._best, "bad": self._bad, "factor": self._factor, "lowered_at": self._lowered_at}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Continue from what `state_dict` returned. A state of dev_perf is of no use to other schedulers, and they leave none for it.

        Raises:
            KeyError: it lacks a number.
        """
        if self._config.scheduler == "dev_perf" and state:
            best, bad, factor, lowered_at = (state[name] for name in ("best", "bad", "factor", "lowered_at"))
            self._best, self._bad, self._factor, self._lowered_at = float(best), int(bad), float(factor), int(lowered_at)

    def _is_lowered(self, step: int) -> bool:
        """True if what dev_perf has lowered holds for `step`: always, except that NVIDIA's warm-up sets the rate anew after each step."""
        if self._compat is None:
            return True
        warmup, done = self._config.lr_warmup_steps, step - 1
        return self._lowered_at == done or (done >= warmup and self._lowered_at >= warmup - 1)

    def _rate(self, step: int) -> float:
        """The rate of `step` while dev_perf has lowered nothing."""
        return self._own_rate(step) if self._compat is None else self._nvidia_rate(step - 1)

    def _own_rate(self, step: int) -> float:
        config, warmup = self._config, self._config.lr_warmup_steps
        if config.scheduler == "inv_sqrt":
            return config.lr * _inverse_root(step, warmup)
        if step <= warmup:
            return config.lr * (step / warmup)
        if config.scheduler == "cosine":
            return self._cosine(min(1.0, (step - warmup) / max(1, self._end - warmup)))
        return config.lr

    def _nvidia_rate(self, done: int) -> float:
        """The rate of NVIDIA's code after `done` steps."""
        config, warmup = self._config, self._config.lr_warmup_steps
        if config.scheduler == "inv_sqrt":
            return config.lr if done == warmup == 0 else config.lr * _inverse_root(done, warmup)
        if done == 0 and warmup > 0:
            return config.lr
        if done < warmup:
            return config.lr * done / warmup
        if config.scheduler == "cosine":
            passed, length = (done, self._end) if self._compat == "nvidia-2019" else (done - warmup, self._end - warmup)
            return self._cosine(passed / length) if length else config.eta_min  # where the original divides by zero
        return config.lr * (warmup - 1) / warmup if warmup > 1 else config.lr

    def _cosine(self, done: float) -> float:
        """Half a cosine from `lr` at 0 to `eta_min` at 1."""
        config = self._config
        return config.eta_min + (config.lr - config.eta_min) * (1 + math.cos(math.pi * done)) / 2


def _inverse_root(step: int, warmup: int) -> float:
    """1/sqrt(step) after a linear climb to 1/sqrt(warmup), as for the Transformer (Vaswani et al. 2017, equation 3)."""
    return float(step**-0.5 if step > warmup else step / warmup**1.5)
