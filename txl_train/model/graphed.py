"""The layers of training on a GPU as two CUDA graphs, one for the forward and one for the backward pass.

A compiled step of the base model at 32 streams launches 1,450 kernels, and on an H200 that took more than twice as long as they ran. The
layers are most of them; in graphs, they are launched at once. What has a size that depends on data, the tail clusters, stays outside.

A graph that is wrong would be wrong silently, so a capture is compared with the plain passes before it is used, and is not if it differs.
"""

# Shape suffixes: B batch, Q inputs (ext_len + tgt_len), K keys, D d_model

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from txl_train.cuda_graphs import capture
from txl_train.errors import EnvironmentUnfitError
from txl_train.model.transformer_xl import Decoder

log = logging.getLogger(__name__)

_WARM_UP = 3
"""Passes before the graphs are made: the first ones compile kernels, and choose among them, which no graph can hold."""
_TOLERANCE = 0.05
"""How far a tensor of the first replay may be from what it is without, as a share of its norm: some sums have no fixed order."""


class GraphedDecoder(Decoder):
    """A decoder for training, captured with the first segment and replayed for all of the same shape; others run as they are.

    The gradients are those of the decoder itself. The weights are read where they are, so an optimizer that moves them in place is seen.

    Args:
        plain: what is captured, with a memory of hidden states. Nothing in it may wait for the GPU.
    """

    def __init__(self, plain: Decoder) -> None:
        super().__init__(plain.layers)
        self._plain: list[Callable[..., tuple[Tensor, list[Tensor]]]] = [plain]  # in a list, as its modules are these
        self._captured: CapturedPasses | None = None
        self._refused = False

    @property
    def replays(self) -> int:
        """Forward passes that were replayed."""
        return 0 if self._captured is None else self._captured.number

    def forward(
        self, x_BQD: Tensor, states: list[Tensor], position_terms: list[Tensor], visible_B1QK: Tensor, kv_memory: bool, ext_len: int
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the last layer's output for the segment, [B, T, D], and the new states; see `Decoder.forward`."""
        n, inputs = len(states), [x_BQD, *position_terms, visible_B1QK, *states]

        def run(tensors: list[Tensor]) -> list[Tensor]:
            x, *rest = tensors
            with _same_autocast(x.device):
                hidden_BTD, new_states = self._plain[0](x, rest[n + 1 :], rest[:n], rest[n], kv_memory, ext_len)
            return [hidden_BTD, *new_states]

        trains = torch.is_grad_enabled() and x_BQD.requires_grad and not kv_memory and all(layer.training for layer in self.layers)
        if trains and self._captured is None and not self._refused:
            self._capture(run, inputs, [weight for weight in self.parameters() if weight.requires_grad])
        if not trains or self._captured is None or not self._captured.fits(inputs):
            hidden_BTD, *new_states = run(inputs)
            return hidden_BTD, new_states
        replay: Callable[..., tuple[Tensor, ...]] = _Replay.apply
        hidden_BTD, *new_states = replay(self._captured, len(inputs), *inputs, *self._captured.weights)
        return hidden_BTD, new_states

    def _capture(self, run: Callable[[list[Tensor]], list[Tensor]], inputs: list[Tensor], weights: list[nn.Parameter]) -> None:
        """Capture the passes, unless they cannot be, or do not yield in a replay what they yield as they are."""
        try:
            captured = CapturedPasses(run, inputs, weights)
            errors = captured.errors()
        except torch.OutOfMemoryError as error:  # without graphs, there may be enough
            self._refuse(str(error).splitlines()[0])
            return
        except RuntimeError as error:
            told = str(error).splitlines()[0]
            if not _outlives_a_failed_capture():
                raise EnvironmentUnfitError(
                    f"The compiled layers cannot be captured as CUDA graphs: {told}",
                    remedy="Leave `--compile` out, or install PyTorch 2.13.",
                ) from error
            self._refuse(told)
            return
        if max(errors) <= _TOLERANCE:
            self._captured = captured
        else:
            self._refuse(f"the first replay is off by {errors[0]:.1%} of the hidden states and {errors[1]:.1%} of the gradients")

    def _refuse(self, why: str) -> None:
        log.warning("The layers cannot be replayed as CUDA graphs, so training is slower: %s", why)
        self._refused = True


class CapturedPasses:
    """The forward and backward pass of a function of tensors, captured, and the tensors that they read and write.

    Args:
        run: returns a tensor that is differentiated, and others that are not.
        inputs: what it is captured with; those that require a gradient get one.
        weights: that it reads besides, and that get gradients too.
    """

    def __init__(self, run: Callable[[list[Tensor]], list[Tensor]], inputs: list[Tensor], weights: list[nn.Parameter]) -> None:
        self.weights = weights
        self._kind = _kind_of(inputs)
        self._device = inputs[0].device
        self.inputs = [tensor.detach().clone().requires_grad_(tensor.requires_grad) for tensor in inputs]
        self.number = 0
        """Forward passes so far."""
        self._random_state = _random_state(self._device)
        with _alone_on(self._device) as captured:
            for _ in range(_WARM_UP):
                _set_random_state(self._device, self._random_state)
                outputs = run(self.inputs)
                self.gradient = torch.arange(outputs[0].numel(), device=self._device).sin().mul(0.01).to(outputs[0]).view_as(outputs[0])
                gradients = self._differentiate(outputs[0], self.gradient)
            self._expected = [tensor.detach() for tensor in outputs], gradients
            del outputs, gradients  # of the activations, there is room for one set
            self.forward, outputs = captured(lambda: run(self.inputs))
            self.backward, gradients = captured(lambda: self._differentiate(outputs[0], self.gradient))
        self.outputs = [tensor.detach() for tensor in outputs]
        found = iter(gradients)
        self.gradients = [next(found) if tensor.requires_grad else None for tensor in [*self.inputs, *weights]]

    def _differentiate(self, output: Tensor, gradient: Tensor) -> list[Tensor | None]:
        differentiated = [tensor for tensor in self.inputs if tensor.requires_grad] + self.weights
        return list(torch.autograd.grad(output, differentiated, gradient, allow_unused=True))

    def errors(self) -> tuple[float, float]:
        """Return how far outputs and gradients of a replay are from those of the last pass before the capture: see `_largest_error`.

        With the same random numbers, which stay as they are. To be called once, first of all.
        """
        before = _random_state(self._device)
        try:
            _set_random_state(self._device, self._random_state)
            self.forward()
            self.backward()
        finally:
            _set_random_state(self._device, before)
        outputs, gradients = self._expected
        del self._expected
        errors = _largest_error(self.outputs, outputs)
        found = [gradient for gradient in self.gradients if gradient is not None]
        return errors, _largest_error(found, [gradient for gradient in gradients if gradient is not None])

    def fits(self, inputs: list[Tensor]) -> bool:
        """Return whether these inputs have the shapes, types and places of those of the capture, and are computed in the same precision."""
        return _kind_of(inputs) == self._kind


class _Replay(torch.autograd.Function):
    """Runs captured passes on new inputs."""

    @staticmethod
    def forward(ctx: Any, captured: CapturedPasses, n_inputs: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return copies of the outputs: the next pass writes there again."""
        torch._foreach_copy_(captured.inputs, list(tensors[:n_inputs]))
        captured.forward()
        captured.number += 1
        ctx.captured, ctx.number = captured, captured.number
        outputs = [tensor.clone() for tensor in captured.outputs]
        ctx.mark_non_differentiable(*outputs[1:])
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """Return copies of the gradients."""
        captured = ctx.captured
        if ctx.number != captured.number:
            raise RuntimeError("What this backward pass needs is overwritten: take it once, and before the next forward pass.")
        captured.gradient.copy_(gradient)
        captured.backward()
        ctx.number = -1
        found = iter(torch._foreach_mul([tensor for tensor in captured.gradients if tensor is not None], 1.0))
        return (None, None, *(None if tensor is None else next(found) for tensor in captured.gradients))


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _set_random_state(device: torch.device, state: Tensor) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)


def _largest_error(found: list[Tensor], expected: list[Tensor]) -> float:
    """Return the largest norm of a tensor's difference as a share of its own norm, or of a thousandth of the norm of all.

    Infinite if anything is not finite.
    """
    differences = torch.stack([(own.detach() - other.detach()).float().norm() for own, other in zip(found, expected, strict=True)])
    norms = torch.stack([other.detach().float().norm() for other in expected])
    share = float((differences / norms.clamp(min=1e-3 * float(norms.norm()))).max()) if bool(norms.any()) else float(differences.max())
    return share if math.isfinite(share) else math.inf


def _outlives_a_failed_capture() -> bool:
    """Return whether PyTorch's allocator and random numbers are in order after a capture that failed: before 2.13 they may not be."""
    return tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 13)


def _kind_of(inputs: list[Tensor]) -> tuple[Any, ...]:
    device_type = inputs[0].device.type
    precision = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
    return precision, [(tensor.shape, tensor.dtype, tensor.device, tensor.requires_grad) for tensor in inputs]


def _same_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Go on in the same precision, without keeping what was cast: a graph must cast weights anew each time."""
    enabled, dtype = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)
    return torch.autocast(device.type, dtype=dtype, enabled=enabled, cache_enabled=False)


@contextlib.contextmanager
def _alone_on(device: torch.device) -> Iterator[Callable[[Callable[[], Any]], tuple[Callable[[], None], Any]]]:
    """Yield a function that captures another and returns what replays it, and its result.

    On a stream of its own, and leaving the random numbers as they are for who comes after.
    """
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    pool = torch.cuda.graph_pool_handle()

    def captured(function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        graph, result = capture(function, pool=pool, stream=stream)
        return graph.replay, result

    with torch.cuda.device(device), torch.random.fork_rng([device]):
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            yield captured
        torch.cuda.current_stream(device).wait_stream(stream)
    torch.cuda.empty_cache()  # what the passes before the graphs took
