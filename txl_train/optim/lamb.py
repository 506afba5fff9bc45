"""LAMB, layer-wise adaptive moments for large batches (You et al. 2019, arXiv:1904.00962, algorithm 2).

Each parameter tensor w moves by lr * trust * u, where u is Adam's step plus decoupled weight decay and trust = |w| / |u|:
how far a tensor moves depends on its own size. A tied tensor is one tensor. As in NVIDIA's Transformer-XL, the moments are not
corrected for their bias by default, |w| counts up to 10, and trust is 1 where |w| or |u| is 0 (so biases, which start at 0, do move).
NVIDIA's code of 2019 had a trust of 0 there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor

from txl_train.errors import ConfigError
from txl_train.gpu_kernels import can_run_kernels

_PIECE = 1 << 18
"""Numbers of a tensor that are computed at a time on a CPU: few enough for the caches, and many for the calls they take."""


class Lamb(torch.optim.Optimizer):
    """LAMB over all tensors at once.

    Args:
        params: tensors or parameter groups, as for any PyTorch optimizer.
        lr: learning rate.
        betas: decay of the running means of the gradient and of its square.
        eps: added to the root of the second moment, and to |u|.
        weight_decay: decoupled; applies to every tensor.
        max_weight_norm: |w| counts at most this much.
        bias_correction: divide the moments by 1 - beta**step as Adam does.
        trust_at_zero: trust where |w| or |u| is 0: 1 lets a tensor of zeros move, 0 never does.
        foreach: compute all tensors together (few, large kernels: True), or one after the other as it is written in the paper (False); None
            does what is fast: on a GPU all together, in three kernels (`lamb_kernels`) where there is Triton; on a CPU in pieces that stay
            in its caches, where nothing of a tensor's size is allocated. The result is the same but for rounding.

    Raises:
        ConfigError: a hyper-parameter is out of range.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        max_weight_norm: float = 10.0,
        bias_correction: bool = False,
        trust_at_zero: float = 1.0,
        foreach: bool | None = None,
    ) -> None:
        for name, value in (
            ("lr", lr),
            ("eps", eps),
            ("weight_decay", weight_decay),
            ("max_weight_norm", max_weight_norm),
            ("trust_at_zero", trust_at_zero),
        ):
            if not 0.0 <= value < float("inf"):
                raise ConfigError(f"`{name}` must be 0 or more, but is {value} instead.")
        if not all(0.0 <= beta < 1.0 for beta in betas):
            raise ConfigError(f"`betas` must be within 0..1, 1 excluded, but are {betas} instead.")
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "max_weight_norm": max_weight_norm,
            "bias_correction": bias_correction,
            "step": 0,
        }
        self._trust_at_zero = trust_at_zero  # no entry of the groups, which a checkpoint of before it lacks
        self._foreach = foreach
        super().__init__(params, defaults)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Move every tensor that has a gradient. Nothing is read back from the device.

        Raises:
            TypeError: a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            if any(weight.grad.is_sparse for weight in weights):
                raise TypeError("LAMB needs dense gradients.")
            group["step"] += 1
            for weight in weights:
                state = self.state[weight]
                if not state:
                    state["exp_avg"] = torch.zeros_like(weight)
                    state["exp_avg_sq"] = torch.zeros_like(weight)
            for same in _by_device_and_dtype(weights):
                if self._foreach or (self._foreach is None and same[0].device.type != "cpu"):
                    if self._foreach or not self._step_in_kernels(group, same):
                        self._step_together(group, same)
                    continue
                for weight in same:
                    if self._foreach is None and weight.is_contiguous():
                        self._step_in_pieces(group, weight)
                    else:
                        self._step_one(group, weight)
        return loss

    def _step_one(self, group: dict[str, Any], weight: Tensor) -> None:
        """Algorithm 2 of the paper, for one tensor."""
        beta1, beta2 = group["betas"]
        correction1, correction2 = _corrections(group)
        mean, square = self.state[weight]["exp_avg"], self.state[weight]["exp_avg_sq"]
        gradient = weight.grad
        assert gradient is not None
        mean.mul_(beta1).add_(gradient, alpha=1 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        update = (mean / correction1) / ((square / correction2).sqrt() + group["eps"]) + group["weight_decay"] * weight
        weight_norm = weight.norm().clamp(max=group["max_weight_norm"])
        update_norm = update.norm()
        weight.sub_(update * self._trust(group, weight_norm, update_norm) * group["lr"])

    def _trust(self, group: dict[str, Any], weight_norm: Tensor, update_norm: Tensor) -> Tensor:
        """Return |w| / |u|, of one tensor or several; |w| is clamped already."""
        moves = (weight_norm > 0) & (update_norm > 0)
        return torch.where(moves, weight_norm / (update_norm + group["eps"]), torch.full_like(weight_norm, self._trust_at_zero))

    def _step_in_kernels(self, group: dict[str, Any], weights: list[Tensor]) -> bool:
        """Do as `_step_one` for many tensors of one GPU, and return True; or False if this cannot be done here."""
        weights = [weight for weight in weights if weight.numel() > 0]
        if weights and weights[0].is_cuda and not can_run_kernels(weights[0].device):
            return False
        from txl_train.optim import lamb_kernels

        if not lamb_kernels.can_step(weights):
            return False
        if weights:
            means, squares = ([self.state[weight][name] for weight in weights] for name in ("exp_avg", "exp_avg_sq"))

            def factors(weight_norms: Tensor, update_norms: Tensor) -> Tensor:
                trust = self._trust(group, weight_norms.clamp(max=group["max_weight_norm"]), update_norms)
                return trust * float(group["lr"])

            with torch.cuda.device(weights[0].device) if weights[0].is_cuda else contextlib.nullcontext():
                lamb_kernels.step(weights, means, squares, group, _corrections(group), factors)
        return True

    def _step_in_pieces(self, group: dict[str, Any], weight: Tensor) -> None:
        """The same as `_step_one` for a contiguous tensor, piece by piece: every operation but the first finds its operands in the caches.

        The update is computed twice, once for its norm, which takes less time than to keep it. A tensor of one piece keeps it.
        """
        beta1, beta2 = group["betas"]
        assert weight.grad is not None
        state = self.state[weight]
        tensors = [tensor.reshape(-1).split(_PIECE) for tensor in (weight.detach(), weight.grad, state["exp_avg"], state["exp_avg_sq"])]
        update = weight.new_empty(min(weight.numel(), _PIECE))
        weight_norms, update_norms = [], []
        for piece, gradient, mean, square in zip(*tensors, strict=True):
            mean.mul_(beta1).add_(gradient, alpha=1 - beta1)
            square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            part = _update(group, piece, mean, square, update[: len(piece)])
            weight_norms.append(torch.linalg.vector_norm(piece))
            update_norms.append(torch.linalg.vector_norm(part))
        weight_norm = torch.linalg.vector_norm(torch.stack(weight_norms)).clamp(max=group["max_weight_norm"])
        factor = self._trust(group, weight_norm, torch.linalg.vector_norm(torch.stack(update_norms))) * group["lr"]
        for piece, _, mean, square in zip(*tensors, strict=True):
            part = update if len(weight_norms) == 1 else _update(group, piece, mean, square, update[: len(piece)])
            piece.sub_(part.mul_(factor))

    def _step_together(self, group: dict[str, Any], weights: list[Tensor]) -> None:
        """The same as `_step_one` for many tensors of one device and dtype."""
        beta1, beta2 = group["betas"]
        correction1, correction2 = _corrections(group)
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        means = [self.state[weight]["exp_avg"] for weight in weights]
        squares = [self.state[weight]["exp_avg_sq"] for weight in weights]
        torch._foreach_mul_(means, beta1)
        torch._foreach_add_(means, gradients, alpha=1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - beta2)
        roots = list(torch._foreach_sqrt(squares if correction2 == 1.0 else torch._foreach_div(squares, correction2)))
        torch._foreach_add_(roots, group["eps"])
        updates = list(torch._foreach_div(means if correction1 == 1.0 else torch._foreach_div(means, correction1), roots))
        del roots
        if group["weight_decay"]:
            torch._foreach_add_(updates, weights, alpha=group["weight_decay"])
        weight_norms = torch.stack(list(torch._foreach_norm(weights))).clamp(max=group["max_weight_norm"])
        update_norms = torch.stack(list(torch._foreach_norm(updates)))
        torch._foreach_mul_(updates, list((self._trust(group, weight_norms, update_norms) * group["lr"]).unbind()))
        torch._foreach_sub_(weights, updates)


def _update(group: dict[str, Any], weight: Tensor, mean: Tensor, square: Tensor, out: Tensor) -> Tensor:
    """Return `out`, filled with how far a piece would move at a learning rate and a trust of 1."""
    correction1, correction2 = _corrections(group)
    torch.sqrt(square if correction2 == 1.0 else torch.div(square, correction2, out=out), out=out)
    torch.div(mean, out.add_(group["eps"]), out=out)
    if correction1 != 1.0:
        out.div_(correction1)
    return out.add_(weight, alpha=group["weight_decay"]) if group["weight_decay"] else out


def _corrections(group: dict[str, Any]) -> tuple[float, float]:
    if not group["bias_correction"]:
        return 1.0, 1.0
    beta1, beta2 = group["betas"]
    return 1 - beta1 ** group["step"], 1 - beta2 ** group["step"]


def _by_device_and_dtype(weights: list[Tensor]) -> list[list[Tensor]]:
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for weight in weights:
        groups.setdefault((weight.device, weight.dtype), []).append(weight)
    return list(groups.values())
