"""From an optimizer's name to the optimizer. Knows which names there are, not how they compute."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from txl_train.config import OptimConfig
from txl_train.errors import ConfigError, nearest
from txl_train.optim.lamb import Lamb

_CONSTRUCTORS: dict[str, Callable[[list[Tensor], OptimConfig], torch.optim.Optimizer]] = {
    "lamb": lambda weights, config: Lamb(weights, lr=config.lr, weight_decay=config.weight_decay),
    "adam": lambda weights, config: torch.optim.AdamW(weights, lr=config.lr, weight_decay=config.weight_decay),
}


def build_optimizer(config: OptimConfig, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    """Return the optimizer `config` names, over `parameters`; a tensor that appears several times is taken once.

    Its `lr` is to be set before each step from `schedules.learning_rate`.

    Raises:
        ConfigError: there is no optimizer of that name.
    """
    if config.optim not in _CONSTRUCTORS:
        raise ConfigError(
            f"`optim` must be one of {', '.join(_CONSTRUCTORS)}, but is {config.optim!r} instead.{nearest(config.optim, _CONSTRUCTORS)}"
        )
    return _CONSTRUCTORS[config.optim](list({id(weight): weight for weight in parameters}.values()), config)
