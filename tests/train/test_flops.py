"""Counting the arithmetic of training, against what PyTorch counts when it runs the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.support import build_model, random_ids, small_config
from txl_train import flops
from txl_train.flops import forward_flops_per_token, measured_peak_flops, training_flops_per_token


@pytest.mark.parametrize(
    "changes",
    [{}, {"cutoffs": (5, 9, 16), "div_val": 2}, {"cutoffs": (5, 9), "d_embed": 6}, {"d_embed": 6}, {"ext_len": 2}, {"pre_lnorm": True}],
    ids=str,
)
def test_the_count_is_what_pytorch_counts(changes: dict[str, Any]) -> None:
    config = small_config(**changes)
    model = build_model(config).train()
    B, T = 4, 12
    ids = torch.from_numpy(random_ids(config, B, config.ext_len + T + 1))
    targets = ids[:, config.ext_len + 1 :]
    with FlopCounterMode(display=False) as counter:
        hidden, _ = model(ids[:, :-1], model.initial_memory(B))
        model.nll(hidden, targets)
    clusters = np.searchsorted(config.cutoffs, targets.numpy(), side="right")
    shares = [(clusters == i + 1).mean() for i in range(config.n_cluster)]
    counted = counter.get_total_flops() / (B * T)
    assert forward_flops_per_token(config, T, B, shares) == pytest.approx(
        counted, rel=0.05
    )  # one distance more is encoded, for the shift; the head projects once more, for the clusters


def test_training_takes_three_times_the_forward_pass() -> None:
    assert training_flops_per_token(10.0) == 30.0


def test_the_base_model_takes_about_six_operations_per_weight_it_uses_and_token() -> None:
    config = dataclasses.replace(small_config(), n_layer=16, n_head=8, d_head=64, d_model=512, d_inner=2048, mem_len=192, vocab_size=267735)
    config = dataclasses.replace(config, adaptive=True, cutoffs=(19997, 39997, 199997))
    flops = training_flops_per_token(forward_flops_per_token(config, 192, 256, [0.05, 0.05, 0.01]))
    weights_used = 16 * (4 * 512 * 512 + 2 * 512 * 2048) + 20_000 * 512
    assert 6 * weights_used < flops < 12 * weights_used


def test_the_peak_is_a_plausible_number() -> None:
    assert 1e9 < measured_peak_flops(torch.device("cpu"), torch.float32) < 1e14


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8], ids=str)
def test_measuring_the_peak_changes_no_random_number_that_training_draws(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(flops, "fastest_s", lambda device, work: 1.0)
    before = torch.random.get_rng_state()
    measured_peak_flops(torch.device("cpu"), dtype)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_a_device_that_is_slow_in_a_type_is_not_kept_busy_for_minutes(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    measured: list[float] = []

    def slow(device: torch.device, work: Callable[[], object]) -> float:
        assert work() is not None
        measured.append(1.0)
        return 1.0

    monkeypatch.setattr(flops, "fastest_s", slow)
    assert measured_peak_flops(torch.device("cpu"), dtype) == 2 * 256**3
    assert len(measured) == 1
