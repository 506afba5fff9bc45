"""Optimizers by name: each is the algorithm it is called by, with the settings that belong to it and no others."""

from __future__ import annotations

import math
from typing import Literal, get_args

import pytest
import torch
from torch import nn

from txl_train.config import OptimConfig
from txl_train.optim.build import build_optimizer
from txl_train.optim.lamb import Lamb

Name = Literal["lamb", "jitlamb", "adam", "adamw", "sgd", "adagrad"]
NAMES: tuple[Name, ...] = get_args(Name)


def trained(config: OptimConfig, steps: int, *, start: float = 1.0, gradient: float = 0.5) -> float:
    """Return where a single weight is after some steps along a gradient that does not change."""
    weight = nn.Parameter(torch.tensor([start], dtype=torch.float64))
    optimizer = build_optimizer(config, [weight])
    for _ in range(steps):
        weight.grad = torch.tensor([gradient], dtype=torch.float64)
        optimizer.step()
    return weight.item()


def test_sgd_moves_by_lr_times_the_gradient() -> None:
    assert trained(OptimConfig(optim="sgd", lr=0.1), 2) == pytest.approx(1 - 2 * 0.1 * 0.5)


def test_sgd_with_momentum_moves_on_along_past_gradients() -> None:
    # the velocities are g, (1 + m) g, (1 + m + m²) g
    assert trained(OptimConfig(optim="sgd", lr=0.1, mom=0.9), 3) == pytest.approx(1 - 0.1 * 0.5 * (1 + 1.9 + 2.71))


def test_adagrad_divides_by_the_root_of_all_past_squares() -> None:
    assert trained(OptimConfig(optim="adagrad", lr=0.1), 3) == pytest.approx(1 - 0.1 * (1 + 1 / math.sqrt(2) + 1 / math.sqrt(3)))


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_adam_first_moves_by_lr_whatever_the_gradient(name: Name) -> None:
    assert trained(OptimConfig(optim=name, lr=0.1), 1, gradient=1e-3) == pytest.approx(0.9, rel=1e-5)


def test_adam_adds_the_weight_decay_to_the_gradient_and_adamw_takes_it_off_the_weight() -> None:
    adam = OptimConfig(optim="adam", lr=0.1, weight_decay=0.5)
    adamw = OptimConfig(optim="adamw", lr=0.1, weight_decay=0.5)

    assert trained(adam, 1, gradient=-0.4) == pytest.approx(0.9, rel=1e-6)  # -0.4 + 0.5 * 1 is a positive gradient
    assert trained(adamw, 1, gradient=-0.4) == pytest.approx(1 - 0.1 * 0.5 + 0.1, rel=1e-6)


@pytest.mark.parametrize("name", ["sgd", "adagrad"])
def test_sgd_and_adagrad_have_no_weight_decay(name: Name) -> None:
    assert trained(OptimConfig(optim=name, weight_decay=0.5), 3) == trained(OptimConfig(optim=name), 3)


@pytest.mark.parametrize("name", ["lamb", "jitlamb"])
def test_jitlamb_is_lamb(name: Name) -> None:
    assert isinstance(build_optimizer(OptimConfig(optim=name), [nn.Parameter(torch.zeros(1))]), Lamb)
    assert trained(OptimConfig(optim=name, weight_decay=0.5), 3) == trained(OptimConfig(weight_decay=0.5), 3)
    assert trained(OptimConfig(optim=name, weight_decay=0.5), 3) != trained(OptimConfig(), 3)


@pytest.mark.parametrize("compat", [None, "nvidia-2023", "nvidia-2019"])
def test_only_the_lamb_of_2019_leaves_zeros_where_they_are(compat: Literal["nvidia-2019", "nvidia-2023"] | None) -> None:
    weight = nn.Parameter(torch.zeros(3))
    optimizer = build_optimizer(OptimConfig(), [weight], compat=compat)
    weight.grad = torch.ones(3)

    optimizer.step()

    assert (weight.abs().sum().item() == 0) == (compat == "nvidia-2019")


@pytest.mark.parametrize("name", NAMES)
def test_a_tensor_given_twice_moves_once(name: Name) -> None:
    tied, alone = (nn.Parameter(torch.tensor([3.0, 4.0])) for _ in range(2))
    tied.grad = alone.grad = torch.ones(2)

    build_optimizer(OptimConfig(optim=name), [tied, tied]).step()
    build_optimizer(OptimConfig(optim=name), [alone]).step()

    assert torch.equal(tied, alone)
    assert tied.tolist() != [3.0, 4.0]


@pytest.mark.parametrize("name", NAMES)
def test_the_settings_are_defaults_of_the_optimizer(name: Name) -> None:
    # the trainer reads them there when it continues with other settings than those the state was saved with
    config = OptimConfig(optim=name, lr=0.03, mom=0.7, weight_decay=0.2)

    defaults = build_optimizer(config, [nn.Parameter(torch.zeros(1))]).defaults

    assert defaults["lr"] == 0.03
    assert defaults.get("momentum", 0.7) == 0.7
    assert defaults["weight_decay"] == (0.0 if name in ("sgd", "adagrad") else 0.2)
