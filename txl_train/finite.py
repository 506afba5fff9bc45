"""Where numbers stopped being finite: which module's output, which parameter's gradient, which state of which stream.

Looks only after something was found, except at states in fp16, whose overflow may hide for segments: a key of -inf gets no attention.
"""

# Shape suffixes: B batch, T tgt_len, S states

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from txl_train.errors import ValidationError
from txl_train.model.memory import Memory

_SHOWN = 3
"""Names that a message has at most."""
_FP32 = "Use fp32; if it persists, the weights themselves are damaged: use an earlier checkpoint."
_FP32_MEMORY = "Keep the memory in fp32: export with `--memory-dtype fp32`, or use `--dtype fp32`."


class Spoiled(NamedTuple):
    """A stream whose loss, or whose memory in fp16, is not finite."""

    stream: int
    state: int | None = None
    """Of the memory; None means the loss."""
    is_kv: bool = False

    def error(self, segment: int, *, where: str = "", place: str | None = None) -> ValidationError:
        """Return the error to raise; `where` follows the segment's number, `place` is what `watched` has found."""
        if self.state is None:
            of = "" if place is None else f" First not finite: {place}."
            return ValidationError(
                f"The loss of stream {self.stream} in segment {segment}{where} is not finite, so there is no perplexity.{of}", remedy=_FP32
            )
        return ValidationError(
            f"The fp16 memory overflowed in segment {segment}{where}: {state_name(self.state, self.is_kv)} of stream {self.stream} "
            "are too large.",
            remedy=_FP32_MEMORY,
        )


def state_name(state: int, is_kv: bool) -> str:
    """Return what a memory's state of this number holds."""
    return f"{('values' if state % 2 else 'keys')} of layer {state // 2}" if is_kv else f"inputs of layer {state}"


def spoiled_loss(nll_BT: Tensor) -> Spoiled | None:
    """Return the first stream of which any loss is not finite."""
    bad_B = (~nll_BT.isfinite()).flatten(1).any(dim=1)
    return Spoiled(int(bad_B.nonzero()[0, 0])) if bool(bad_B.any()) else None


def spoiled_memory(memory: Memory, n_newest: int) -> Spoiled | None:
    """Return the first state in fp16, and its stream, of whose last `n_newest` positions any overflowed. Waits for a device.

    Not those that are no numbers: they come from elsewhere, and the loss shows them.
    """
    if n_newest < 1 or not any(state.dtype is torch.float16 for state in memory.states):
        return None
    bad_SB = torch.stack([state[..., -n_newest:, :].isinf().flatten(1).any(dim=1) for state in memory.states])
    if not bool(bad_SB.any()):
        return None
    state, stream = bad_SB.nonzero()[0].tolist()
    return Spoiled(stream, state, memory.states[0].dim() == 4)


def check_step(nll_BT: Tensor, memory: Memory, segment: int, *, n_newest: int) -> None:
    """Raise ValidationError, with segment and stream, if a loss or the newest of a memory in fp16 is not finite."""
    spoiled = spoiled_memory(memory, n_newest) or spoiled_loss(nll_BT)  # the first may be the reason for the second
    if spoiled is not None:
        raise spoiled.error(segment)


def check_scores(scores_BV: Tensor, memory: Memory, step: int, *, n_newest: int) -> None:
    """Raise ValidationError if scores of next words are no distribution, or the newest of a memory in fp16 is not finite.

    A score of -inf is a word that cannot come; nothing else may be infinite, and not all words.
    """
    bad_B = ~scores_BV.amax(dim=1).isfinite()  # a NaN is the largest of its row
    if bool(bad_B.any()):
        raise ValidationError(
            f"The scores of the next token of stream {int(bad_B.nonzero()[0, 0])} at step {step} are not finite, so there is none.",
            remedy=_FP32,
        )
    check_memory(memory, step, n_newest=n_newest)


def check_memory(memory: Memory, step: int, *, n_newest: int) -> None:
    """Raise ValidationError, with step and stream, if the newest of a memory in fp16 is not finite."""
    spoiled = spoiled_memory(memory, n_newest)
    if spoiled is not None:
        raise spoiled.error(step)


@contextlib.contextmanager
def watched(module: nn.Module) -> Iterator[list[str]]:
    """Within, the names of submodules whose output is not finite are added to the list as they end: the first is where it began."""
    found: list[str] = []

    def hook_of(name: str) -> Callable[[nn.Module, object, object], None]:
        def note(part: nn.Module, inputs: object, output: object) -> None:
            if any(tensor.is_floating_point() and not bool(tensor.isfinite().all()) for tensor in _tensors(output)):
                weights = [f"its {own}" for own, weight in part.named_parameters(recurse=False) if not bool(weight.isfinite().all())]
                found.append(f"the output of {name or 'the model'}{f', as is {weights[0]}' if weights else ''}")

        return note

    handles = [part.register_forward_hook(hook_of(name)) for name, part in module.named_modules()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


def spoiled_gradients(parameters: Iterable[tuple[str, Tensor]]) -> str:
    """Return which gradients are not finite, in words."""
    names = [name for name, weight in parameters if weight.grad is not None and not bool(weight.grad.isfinite().all())]
    if not names:
        return "no gradient, only the norm of all of them"
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"the gradient of {', '.join(names[:_SHOWN])}{more}"
