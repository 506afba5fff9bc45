"""The learning rate as a function of the step alone, so that continuing a run needs no state and gives the same rates.

The rates are those of NVIDIA's code of 2023 one step earlier: there, the first step runs at the full `lr`, and step s + 1 at what is
here the rate of step s. The specification's log lines show this same rate at step s.
"""

from __future__ import annotations

import math

from txl_train.config import OptimConfig


def learning_rate(config: OptimConfig, step: int, max_step: int) -> float:
    """Return the learning rate of a step.

    It grows linearly from lr / lr_warmup_steps at step 1 to `lr` at step `lr_warmup_steps`; then it follows half a cosine down to
    `eta_min` at `max_step`, or stays (`scheduler` constant).

    Args:
        config: `lr`, `scheduler`, `lr_warmup_steps` and `eta_min`.
        step: from 1.
        max_step: where the cosine ends; the rate stays at `eta_min` beyond.
    """
    warmup = config.lr_warmup_steps
    if step <= warmup:
        return config.lr * step / warmup
    if config.scheduler == "constant":
        return config.lr
    done = min(1.0, (step - warmup) / max(1, max_step - warmup))
    return config.eta_min + (config.lr - config.eta_min) * (1 + math.cos(math.pi * done)) / 2
