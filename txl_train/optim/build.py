"""From an optimizer's name to the optimizer. Knows which names there are and which settings each takes, not how they compute."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from txl_train.config import Compat, OptimConfig
from txl_train.optim.lamb import Lamb

_OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, str]]] = {
    "lamb": (Lamb, {"lr": "lr", "weight_decay": "weight_decay"}),
    "jitlamb": (Lamb, {"lr": "lr", "weight_decay": "weight_decay"}),
    "adam": (torch.optim.Adam, {"lr": "lr", "weight_decay": "weight_decay"}),
    "adamw": (torch.optim.AdamW, {"lr": "lr", "weight_decay": "weight_decay"}),
    "sgd": (torch.optim.SGD, {"lr": "lr", "momentum": "mom"}),
    "adagrad": (torch.optim.Adagrad, {"lr": "lr"}),
}
"""By name: the class, and which of its arguments are which settings."""


def build_optimizer(config: OptimConfig, parameters: Iterable[Tensor], *, compat: Compat | None = None) -> torch.optim.Optimizer:
    """Return the optimizer `config` names, over `parameters`; a tensor that appears several times is taken once.

    adam adds the weight decay to the gradient, as NVIDIA's code does; that of lamb and adamw is decoupled; sgd and adagrad have none. What
    no setting says is as PyTorch has it (on a GPU, all tensors are computed together). The `lr` is to be set before each step from
    `schedules.Schedule`.

    Args:
        config: `optim`, `lr`, `mom` and `weight_decay`.
        parameters: what is trained.
        compat: with "nvidia-2019", lamb's trust is 0 where a tensor is all zeros, so that biases never move.
    """
    cls, names = _OPTIMIZERS[config.optim]
    settings: dict[str, Any] = {name: getattr(config, setting) for name, setting in names.items()}
    if cls is Lamb:
        settings["trust_at_zero"] = 0.0 if compat == "nvidia-2019" else 1.0
    return cls(list({id(weight): weight for weight in parameters}.values()), **settings)
