"""The learning rate over the steps: ours, and NVIDIA's of 2019 and 2023 as PyTorch's schedulers compute it when driven as there."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from txl_train.config import Compat, OptimConfig
from txl_train.errors import ConfigError
from txl_train.optim.schedules import Schedule

WT103_BASE = OptimConfig(lr=0.01, lr_warmup_steps=1000, eta_min=0.001)


def rates(schedule: Schedule, steps: int, evaluations: Mapping[int, float] | None = None) -> list[float]:
    """Return the rates of the first `steps` steps; `evaluations` are losses by the number of steps taken."""
    found = []
    for step in range(1, steps + 1):
        found.append(schedule.learning_rate(step))
        if evaluations and step in evaluations:
            schedule.observe(evaluations[step], step)
    return found


# The default


@pytest.mark.parametrize("scheduler", ["cosine", "dev_perf", "constant"])
def test_warm_up_grows_linearly_from_the_first_step(scheduler: Literal["cosine", "dev_perf", "constant"]) -> None:
    schedule = Schedule(OptimConfig(lr=0.01, lr_warmup_steps=1000, scheduler=scheduler), 40000)

    assert schedule.learning_rate(1) == pytest.approx(1e-5)
    assert schedule.learning_rate(500) == pytest.approx(5e-3)
    assert schedule.learning_rate(1000) == 0.01


def test_cosine_falls_to_eta_min_at_the_last_step_and_stays() -> None:
    schedule = Schedule(WT103_BASE, 40000)

    assert schedule.learning_rate((1000 + 40000) // 2) == pytest.approx((0.01 + 0.001) / 2)
    assert schedule.learning_rate(40000) == pytest.approx(0.001)
    assert schedule.learning_rate(50000) == pytest.approx(0.001)


def test_max_step_scheduler_ends_the_cosine_earlier_or_later_than_the_training() -> None:
    shorter, longer = (Schedule(OptimConfig(lr_warmup_steps=0, eta_min=0.0, max_step_scheduler=end), 100) for end in (50, 200))

    assert shorter.learning_rate(25) == longer.learning_rate(100) == pytest.approx(0.005)
    assert shorter.learning_rate(75) == pytest.approx(0.0)


def test_a_longer_training_follows_the_longer_cosine_when_it_is_continued() -> None:
    short = Schedule(WT103_BASE, 2000)
    short.learning_rate(2000)
    continued = Schedule(WT103_BASE, 4000)
    continued.load_state_dict(short.state_dict())

    assert continued.learning_rate(2001) == Schedule(WT103_BASE, 4000).learning_rate(2001)
    assert continued.learning_rate(2001) < continued.learning_rate(2000)  # NVIDIA's keeps the old length and climbs again


def test_inv_sqrt_climbs_to_the_root_of_the_warm_up_and_falls_with_that_of_the_step() -> None:
    schedule = Schedule(OptimConfig(lr=0.5, lr_warmup_steps=100, scheduler="inv_sqrt"), 1000)

    assert schedule.learning_rate(1) == pytest.approx(0.5 / 100**1.5)
    assert schedule.learning_rate(100) == pytest.approx(0.5 / 10)
    assert schedule.learning_rate(400) == pytest.approx(0.5 / 20)
    assert Schedule(OptimConfig(lr=0.5, lr_warmup_steps=0, scheduler="inv_sqrt"), 1000).learning_rate(1) == 0.5


def test_constant_stays_at_lr_after_the_warm_up() -> None:
    schedule = Schedule(OptimConfig(lr=0.01, lr_warmup_steps=10, scheduler="constant"), 100)

    assert {schedule.learning_rate(step) for step in (10, 11, 100, 1000)} == {0.01}


def test_dev_perf_lowers_the_rate_after_more_evaluations_without_improvement_than_patience() -> None:
    config = OptimConfig(lr=0.08, lr_warmup_steps=0, scheduler="dev_perf", decay_rate=0.5, patience=1, lr_min=0.015)
    losses = [5.0, 5.0, 4.9999, 4.0, 4.5, 4.5, math.nan, 4.5, 4.5, 4.5, 4.5, 4.5]  # 4.9999 is too little to count as lower

    assert rates(Schedule(config, 100), 13, dict(enumerate(losses, 1))) == pytest.approx([0.08] * 3 + [0.04] * 3 + [0.02] * 2 + [0.015] * 5)


def test_dev_perf_lowers_what_the_warm_up_climbs_to() -> None:
    config = OptimConfig(lr=0.1, lr_warmup_steps=4, scheduler="dev_perf", decay_rate=0.5)

    assert rates(Schedule(config, 100), 6, {1: 5.0, 2: 6.0}) == pytest.approx([0.025, 0.05, 0.0375, 0.05, 0.05, 0.05])


@pytest.mark.parametrize("scheduler", ["cosine", "inv_sqrt", "constant"])
def test_only_dev_perf_heeds_evaluations_and_has_a_state(scheduler: Literal["cosine", "inv_sqrt", "constant"]) -> None:
    config = OptimConfig(lr_warmup_steps=2, scheduler=scheduler)
    watched = Schedule(config, 10)

    assert rates(watched, 10, {step: float(step) for step in range(10)}) == rates(Schedule(config, 10), 10)
    assert watched.state_dict() == {}


def test_without_warm_up_the_first_step_is_already_on_the_cosine() -> None:
    schedule = Schedule(OptimConfig(lr=0.01, lr_warmup_steps=0, eta_min=0.0), 4)

    assert schedule.learning_rate(1) == pytest.approx(0.01 * (1 + math.cos(math.pi / 4)) / 2)


@pytest.mark.parametrize("max_step", [5, 10, 11])
def test_a_warm_up_as_long_as_the_training_is_no_error(max_step: int) -> None:
    schedule = Schedule(OptimConfig(lr=0.01, lr_warmup_steps=10, eta_min=0.001), max_step)

    assert schedule.learning_rate(max_step) == pytest.approx({5: 0.005, 10: 0.01, 11: 0.001}[max_step])


def test_an_eta_min_above_lr_is_an_error() -> None:
    with pytest.raises(ConfigError, match="the cosine would climb"):
        OptimConfig(lr=0.00025)


# What PyTorch's schedulers make of NVIDIA's calls


def nvidia_rates(
    config: OptimConfig, max_step: int, compat: Compat, steps: int, evaluations: Mapping[int, float] | None = None
) -> Iterator[float]:
    """Yield the rate each step of NVIDIA's code runs at: the rate is set after each step, first by the warm-up, then by PyTorch."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=config.lr)
    warmup, end = config.lr_warmup_steps, config.max_step_scheduler or max_step
    scheduler: Any = None
    if config.scheduler == "cosine":
        length = end if compat == "nvidia-2019" else end - warmup
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, length, eta_min=config.eta_min)
    elif config.scheduler == "inv_sqrt":

        def multiplier(step: int) -> float:
            if step == warmup == 0:
                return 1.0
            return step**-0.5 if step > warmup else step / warmup**1.5

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, multiplier)
    elif config.scheduler == "dev_perf":
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, factor=config.decay_rate, patience=config.patience, min_lr=config.lr_min
        )
    for done in range(1, steps + 1):
        yield optimizer.param_groups[0]["lr"]
        optimizer.step()
        if config.scheduler == "inv_sqrt":
            _set_step(scheduler, done)
        elif done < warmup:
            optimizer.param_groups[0]["lr"] = config.lr * done / warmup
        elif config.scheduler == "cosine":
            _set_step(scheduler, done if compat == "nvidia-2019" else done - warmup)
        if config.scheduler == "dev_perf" and evaluations and done in evaluations:
            scheduler.step(evaluations[done])


def _set_step(scheduler: Any, step: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # to name the step is deprecated, but what NVIDIA's code does
        scheduler.step(step)


COMPATS: list[Compat] = ["nvidia-2019", "nvidia-2023"]
STEPS = 40


@st.composite
def settings(draw: st.DrawFn, scheduler: st.SearchStrategy[Any]) -> tuple[OptimConfig, int]:
    """Draw a config and a max_step, the warm-up shorter or longer than all of it."""
    lr = draw(st.floats(1e-5, 1.0))
    config = OptimConfig(
        lr=lr,
        scheduler=draw(scheduler),
        lr_warmup_steps=draw(st.integers(0, 20)),
        eta_min=draw(st.floats(0.0, 1.0)) * lr,
        max_step_scheduler=draw(st.none() | st.integers(1, STEPS)),
    )
    return config, draw(st.integers(1, STEPS))


@st.composite
def plateaus(draw: st.DrawFn) -> tuple[OptimConfig, dict[int, float]]:
    """Draw a config of dev_perf and losses by step that seldom improve, some by next to nothing, some within the warm-up."""
    lr = draw(st.sampled_from([1.0, 1e-3, 3e-8]))
    config = OptimConfig(
        lr=lr,
        scheduler="dev_perf",
        lr_warmup_steps=draw(st.integers(0, 5)),
        decay_rate=draw(st.sampled_from([0.1, 0.5, 0.9])),
        patience=draw(st.integers(0, 2)),
        lr_min=draw(st.sampled_from([0.0, lr / 4, 2 * lr])),
    )
    losses = draw(st.lists(st.sampled_from([None, 5.0, 4.9997, 4.999, 4.0, math.nan, math.inf]), max_size=10))
    return config, {step: loss for step, loss in enumerate(losses, 1) if loss is not None}


@given(settings(st.sampled_from(["cosine", "inv_sqrt", "constant"])), st.sampled_from(COMPATS))
def test_compat_rates_are_those_of_pytorchs_schedulers_driven_as_nvidias_code_does(
    config_and_max_step: tuple[OptimConfig, int], compat: Compat
) -> None:
    config, max_step = config_and_max_step
    if config.scheduler == "cosine" and compat == "nvidia-2023":
        assume((config.max_step_scheduler or max_step) != config.lr_warmup_steps)  # there it divides by zero

    ours = rates(Schedule(config, max_step, compat), max_step)

    assert ours == pytest.approx(list(nvidia_rates(config, max_step, compat, max_step)), rel=1e-12, abs=1e-15)


@given(plateaus(), st.sampled_from(COMPATS))
def test_compat_rates_fall_where_pytorchs_plateau_rule_lowers_them(
    config_and_evaluations: tuple[OptimConfig, dict[int, float]], compat: Compat
) -> None:
    config, evaluations = config_and_evaluations

    ours = rates(Schedule(config, 12, compat), 12, evaluations)

    assert ours == pytest.approx(list(nvidia_rates(config, 12, compat, 12, evaluations)), rel=1e-12, abs=0)


@given(plateaus())
def test_after_a_warm_up_of_one_step_our_plateau_rule_is_pytorchs(config_and_evaluations: tuple[OptimConfig, dict[int, float]]) -> None:
    config, evaluations = config_and_evaluations
    config = dataclasses.replace(config, lr_warmup_steps=1)

    assert rates(Schedule(config, 12), 12, evaluations) == rates(Schedule(config, 12, "nvidia-2023"), 12, evaluations)


@given(plateaus(), st.none() | st.sampled_from(COMPATS), st.integers(1, 11))
def test_continuing_anywhere_gives_the_same_rates(
    config_and_evaluations: tuple[OptimConfig, dict[int, float]], compat: Compat | None, stop: int
) -> None:
    config, evaluations = config_and_evaluations
    at_once = rates(Schedule(config, 12, compat), 12, evaluations)
    stopped, continued = Schedule(config, 12, compat), Schedule(config, 12, compat)
    rates(stopped, stop, evaluations)
    continued.load_state_dict(json.loads(json.dumps(stopped.state_dict())))  # plain numbers

    for step in range(stop + 1, 13):
        assert continued.learning_rate(step) == at_once[step - 1]
        if step in evaluations:
            continued.observe(evaluations[step], step)


@given(settings(st.sampled_from(["cosine", "inv_sqrt"])))
def test_ours_are_nvidias_rates_of_2023_one_step_earlier(config_and_max_step: tuple[OptimConfig, int]) -> None:
    config, max_step = config_and_max_step
    end = config.max_step_scheduler or max_step
    assume(end > config.lr_warmup_steps)
    steps = end if config.scheduler == "cosine" else STEPS  # theirs climbs beyond the end

    ours = rates(Schedule(config, max_step), steps)

    assert ours == pytest.approx(list(nvidia_rates(config, max_step, "nvidia-2023", steps + 1))[1:], rel=1e-12, abs=1e-15)


@given(settings(st.sampled_from(["cosine", "inv_sqrt", "constant", "dev_perf"])))
def test_our_rates_climb_over_the_warm_up_and_never_after(config_and_max_step: tuple[OptimConfig, int]) -> None:
    config, max_step = config_and_max_step
    warmup, found = config.lr_warmup_steps, rates(Schedule(config, max_step), STEPS)

    assert all(0 < a < b <= config.lr for a, b in itertools.pairwise(found[:warmup]))
    assert all(a >= b >= 0 or b == pytest.approx(a) for a, b in itertools.pairwise(found[max(0, warmup - 1) :]))


@pytest.mark.parametrize("compat", COMPATS)
def test_a_warm_up_as_long_as_the_cosine_does_not_divide_by_zero(compat: Compat) -> None:
    schedule = Schedule(OptimConfig(lr=0.01, lr_warmup_steps=10, eta_min=0.001, max_step_scheduler=10), 20, compat)

    assert rates(schedule, 11)[9:] == pytest.approx([0.009, 0.001])


# Published and recorded


def test_the_specifications_log_lines_show_the_rates_of_the_warm_up() -> None:
    # "| epoch   1 step      499 | … | lr 4.990e-03 |" and "step 500 … lr 5.000e-03"; NVIDIA's code logs what the next step will run at.
    ours, theirs = Schedule(WT103_BASE, 40000), Schedule(WT103_BASE, 40000, "nvidia-2019")

    assert [f"{ours.learning_rate(step):.3e}" for step in (499, 500)] == ["4.990e-03", "5.000e-03"]
    assert [f"{theirs.learning_rate(step + 1):.3e}" for step in (499, 500)] == ["4.990e-03", "5.000e-03"]


def test_the_specifications_rate_at_step_36000_is_that_of_2019() -> None:
    assert f"{Schedule(WT103_BASE, 40000, 'nvidia-2019').learning_rate(36001):.3e}" == "1.220e-03"
    assert f"{Schedule(WT103_BASE, 40000, 'nvidia-2023').learning_rate(36001):.3e}" != "1.220e-03"


@pytest.mark.parametrize("case", ["jitlamb", "adam", "chunk2", "samelen", "divval2"])
def test_recorded_rates_are_reproduced(reference_cases: Path, case: str) -> None:
    recorded = json.loads((reference_cases / "trajectories" / "trajectories.json").read_text(encoding="utf-8"))[case]
    arguments, steps = recorded["args"], [step["lr"] for step in recorded["steps"]]
    config = OptimConfig(lr=arguments["lr"], lr_warmup_steps=arguments["warmup_step"], eta_min=arguments["eta_min"])

    assert rates(Schedule(config, arguments["max_step"], "nvidia-2023"), 40) == pytest.approx(steps, rel=1e-12)
    assert rates(Schedule(config, arguments["max_step"]), 39) == pytest.approx(steps[1:], rel=1e-12)
