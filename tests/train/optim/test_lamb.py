"""LAMB: the algorithm on numbers that can be checked by hand, and both ways of computing it against each other."""

from __future__ import annotations

import copy
import importlib.util
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from txl_train.errors import ConfigError
from txl_train.optim import lamb
from txl_train.optim.lamb import Lamb


def weight_with_gradient(values: list[Any], gradient: list[Any]) -> nn.Parameter:
    weight = nn.Parameter(torch.tensor(values))
    weight.grad = torch.tensor(gradient)
    return weight


def test_the_first_step_moves_by_lr_times_the_weights_norm() -> None:
    # m = 0.1 g and v = 0.001 g², so every u is 0.1/sqrt(0.001) = 3.162 in size, whatever g is; |u| divides it out again
    weight = weight_with_gradient([3.0, 4.0], [1.0, -100.0])

    Lamb([weight], lr=0.01).step()

    moved = 0.01 * 5.0 / math.sqrt(2)
    torch.testing.assert_close(weight.detach(), torch.tensor([3.0 - moved, 4.0 + moved]), rtol=1e-4, atol=0)


@pytest.mark.parametrize("foreach", [True, False, None])
def test_a_weight_of_zeros_moves_with_trust_one(foreach: bool | None) -> None:
    weight = weight_with_gradient([0.0, 0.0], [1.0, 1.0])

    Lamb([weight], lr=0.01, foreach=foreach).step()

    torch.testing.assert_close(weight.detach(), torch.full((2,), -0.01 * 0.1 / math.sqrt(0.001)), rtol=1e-4, atol=0)


@pytest.mark.parametrize("foreach", [True, False, None])
def test_a_weight_of_zeros_never_moves_with_a_trust_of_zero_there(foreach: bool | None) -> None:
    zeros, others = weight_with_gradient([0.0, 0.0], [1.0, 1.0]), weight_with_gradient([3.0, 4.0], [1.0, -100.0])

    optimizer = Lamb([zeros, others], lr=0.01, trust_at_zero=0.0, foreach=foreach)
    for _ in range(3):
        optimizer.step()

    assert zeros.tolist() == [0.0, 0.0]
    assert others.tolist() != [3.0, 4.0]


@pytest.mark.parametrize("foreach", [True, False, None])
def test_a_gradient_of_zeros_moves_nothing(foreach: bool | None) -> None:
    weight = weight_with_gradient([3.0, 4.0], [0.0, 0.0])

    Lamb([weight], lr=0.01, foreach=foreach).step()

    assert weight.tolist() == [3.0, 4.0]


def test_a_weights_norm_counts_up_to_ten() -> None:
    large, larger = weight_with_gradient([10.0], [1.0]), weight_with_gradient([1000.0], [1.0])

    Lamb([large, larger], lr=0.01).step()

    assert 10.0 - large.item() == pytest.approx(0.1, rel=1e-3)
    assert 1000.0 - larger.item() == pytest.approx(0.1, rel=1e-2)


def test_weight_decay_is_decoupled_from_the_moments() -> None:
    weight = weight_with_gradient([3.0, 4.0], [0.0, 0.0])

    optimizer = Lamb([weight], lr=0.01, weight_decay=0.1)
    optimizer.step()

    torch.testing.assert_close(weight.detach(), torch.tensor([3.0, 4.0]) * (1 - 0.01), rtol=1e-4, atol=0)  # u = 0.1 w, trust = 10
    assert optimizer.state[weight]["exp_avg"].tolist() == [0.0, 0.0]


def test_bias_correction_makes_the_first_update_the_gradients_sign() -> None:
    weight = weight_with_gradient([0.0, 0.0], [0.5, -7.0])  # trust 1

    Lamb([weight], lr=0.01, bias_correction=True).step()

    torch.testing.assert_close(weight.detach(), torch.tensor([-0.01, 0.01]), rtol=1e-4, atol=0)


def train(foreach: bool | None, **settings: float | bool) -> list[Tensor]:
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(shape)) for shape in [(3, 4), (5,), (1,), (2, 3, 4)]]
    weights.append(nn.Parameter(torch.zeros(4)))
    weights.append(nn.Parameter(torch.randn(3, dtype=torch.float64)))
    frozen = nn.Parameter(torch.ones(2))
    optimizer = Lamb([*weights, frozen], lr=0.01, foreach=foreach, **settings)  # type: ignore[arg-type]
    for _ in range(20):
        for weight in weights:
            weight.grad = torch.randn_like(weight)
        optimizer.step()
    assert frozen.tolist() == [1.0, 1.0]
    return [weight.detach() for weight in weights]


@pytest.mark.parametrize("settings", [{}, {"weight_decay": 0.1}, {"bias_correction": True}])
def test_all_tensors_together_in_pieces_and_one_by_one_are_the_same(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, float | bool]
) -> None:
    monkeypatch.setattr(lamb, "_PIECE", 8)  # the largest tensor is three of them, the second one and a half
    for together, in_pieces, one_by_one in zip(train(True, **settings), train(None, **settings), train(False, **settings), strict=True):
        torch.testing.assert_close(together, one_by_one, rtol=1e-6, atol=1e-7)  # the order of float32 operations differs
        torch.testing.assert_close(in_pieces, one_by_one, rtol=1e-6, atol=1e-7)


def test_a_tensor_that_lies_across_memory_moves_as_one_that_does_not() -> None:
    straight = weight_with_gradient([[1.0, 2.0], [3.0, 4.0]], [[1.0, -1.0], [2.0, 0.5]])
    across = nn.Parameter(straight.detach().t().contiguous().t())
    across.grad = straight.grad
    assert not across.is_contiguous()

    Lamb([straight, across], lr=0.01).step()

    torch.testing.assert_close(across, straight, rtol=1e-6, atol=0)
    assert straight.tolist() != [[1.0, 2.0], [3.0, 4.0]]


def test_a_step_on_a_cpu_needs_no_memory_of_a_tensors_size() -> None:
    weight = nn.Parameter(torch.ones(8 * lamb._PIECE))
    weight.grad = torch.ones_like(weight)
    optimizer = Lamb([weight], lr=0.01)
    optimizer.step()  # makes the moments
    with torch.profiler.profile(profile_memory=True) as profile:
        optimizer.step()
    allocated = [event.self_cpu_memory_usage for event in profile.events()]
    assert 0 < max(allocated) <= 2 * 4 * lamb._PIECE


def test_a_state_that_was_saved_continues_to_the_last_bit() -> None:
    def make() -> tuple[nn.Parameter, Lamb]:
        torch.manual_seed(0)
        weight = nn.Parameter(torch.randn(4, 4))
        return weight, Lamb([weight], lr=0.01, bias_correction=True)

    def step(weight: nn.Parameter, optimizer: Lamb) -> None:
        weight.grad = torch.sin(weight.detach() * 10)
        optimizer.step()

    at_once, optimizer = make()
    for _ in range(6):
        step(at_once, optimizer)
    first, optimizer = make()
    for _ in range(3):
        step(first, optimizer)
    state = copy.deepcopy(optimizer.state_dict())
    second, optimizer = make()
    second.data.copy_(first.data)
    optimizer.load_state_dict(state)
    for _ in range(3):
        step(second, optimizer)

    assert torch.equal(at_once, second)


@pytest.mark.parametrize(
    "settings", [{"lr": -1.0}, {"eps": -1.0}, {"weight_decay": math.inf}, {"trust_at_zero": -1.0}, {"betas": (0.9, 1.0)}]
)
def test_hyper_parameters_out_of_range_are_errors(settings: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        Lamb([nn.Parameter(torch.zeros(1))], **settings)  # type: ignore[arg-type]


def test_sparse_gradients_are_refused() -> None:
    weight = nn.Parameter(torch.zeros(2, 2))
    weight.grad = torch.eye(2).to_sparse()

    with pytest.raises(TypeError, match="dense"):
        Lamb([weight]).step()


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION is unset:UserWarning")
@pytest.mark.parametrize("settings", [{}, {"weight_decay": 0.1, "bias_correction": True}, {"trust_at_zero": 0.0}], ids=str)
def test_the_kernels_of_a_gpu_move_weights_as_the_paper_has_it(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from txl_train.optim import lamb_kernels

    monkeypatch.setattr(lamb_kernels, "CHUNK", 3000)  # so that tensors are cut
    generator = torch.Generator().manual_seed(0)
    shapes = [(5,), (30, 401), (3000,), (3, 3), (1,), (0, 4)]
    plain = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    plain[3].data.zero_()
    own = copy.deepcopy(plain)
    expected, found = Lamb(plain, lr=0.1, foreach=False, **settings), Lamb(own, lr=0.1, foreach=True, **settings)
    monkeypatch.setattr(found, "_step_together", found._step_in_kernels)
    for _ in range(4):
        for weight, twin in zip(plain, own, strict=True):
            weight.grad = torch.randn(weight.shape, generator=generator)
            twin.grad = weight.grad.clone()
        expected.step()
        found.step()
    for weight, twin in zip(plain, own, strict=True):
        torch.testing.assert_close(twin, weight, rtol=1e-5, atol=1e-6)
