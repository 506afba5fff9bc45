"""The learning rate as a function of the step."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from txl_train.config import OptimConfig
from txl_train.errors import ConfigError
from txl_train.optim.schedules import learning_rate

BASE = OptimConfig(lr=0.01, lr_warmup_steps=1000, eta_min=0.001)


def test_warm_up_grows_linearly_from_the_first_step() -> None:
    assert learning_rate(BASE, 1, 40000) == pytest.approx(1e-5)
    assert learning_rate(BASE, 500, 40000) == pytest.approx(5e-3)
    assert learning_rate(BASE, 1000, 40000) == 0.01


def test_the_specification_shows_the_same_rates_during_warm_up() -> None:
    # "| epoch   1 step      499 | … | lr 4.990e-03 |" and "step 500 … lr 5.000e-03"
    assert f"{learning_rate(BASE, 499, 40000):.3e}" == "4.990e-03"
    assert f"{learning_rate(BASE, 500, 40000):.3e}" == "5.000e-03"


def test_cosine_falls_to_eta_min_at_the_last_step_and_stays() -> None:
    middle = (1000 + 40000) // 2

    assert learning_rate(BASE, middle, 40000) == pytest.approx((0.01 + 0.001) / 2)
    assert learning_rate(BASE, 40000, 40000) == pytest.approx(0.001)
    assert learning_rate(BASE, 50000, 40000) == pytest.approx(0.001)


def test_constant_stays_at_lr_after_the_warm_up() -> None:
    config = OptimConfig(lr=0.01, lr_warmup_steps=10, scheduler="constant")

    assert learning_rate(config, 5, 100) == pytest.approx(0.005)
    assert {learning_rate(config, step, 100) for step in (10, 11, 100, 1000)} == {0.01}


def test_without_warm_up_the_first_step_is_already_on_the_cosine() -> None:
    config = OptimConfig(lr=0.01, lr_warmup_steps=0, eta_min=0.0)

    assert learning_rate(config, 1, 4) == pytest.approx(0.01 * (1 + math.cos(math.pi / 4)) / 2)


@pytest.mark.parametrize("max_step", [5, 10, 11])
def test_a_warm_up_as_long_as_the_training_is_no_error(max_step: int) -> None:
    config = OptimConfig(lr=0.01, lr_warmup_steps=10, eta_min=0.001)

    assert learning_rate(config, max_step, max_step) == pytest.approx({5: 0.005, 10: 0.01, 11: 0.001}[max_step])


def test_an_eta_min_above_lr_is_an_error() -> None:
    with pytest.raises(ConfigError, match="the cosine would climb"):
        OptimConfig(lr=0.00025)


def test_rates_are_the_references_one_step_earlier(reference_cases: Path) -> None:
    # The reference sets a step's rate after it: its step 1 runs at the full lr, its step s + 1 at our rate of step s.
    recorded = json.loads((reference_cases / "trajectories" / "trajectories.json").read_text(encoding="utf-8"))["jitlamb"]
    config = OptimConfig(lr=recorded["args"]["lr"], lr_warmup_steps=recorded["args"]["warmup_step"], eta_min=recorded["args"]["eta_min"])

    for step in range(1, 40):
        assert learning_rate(config, step, 40) == pytest.approx(recorded["steps"][step]["lr"], rel=1e-12)
