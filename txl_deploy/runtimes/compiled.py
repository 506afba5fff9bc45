"""PyTorch's compiler: the eager step through torch.compile, for one number of streams at a time; on a GPU as a CUDA graph.

Targets fall into the tail clusters in other numbers at every step. These lengths alone are dynamic, and the rows are padded, as the step
allows: to two at least, since lengths of 0 and 1 are compiled for themselves; on a GPU to the next power of two, as each combination of
lengths is captured as a CUDA graph of its own. So the first step of each number of streams compiles, which takes many seconds, and the
others do not; a graph captured later costs milliseconds.
"""

# Shape suffixes: B batch, T tgt_len, Q ext_len + tgt_len, R tokens of one tail cluster

from __future__ import annotations

import types
import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from txl_deploy.runtimes.eager import EagerRuntime
from txl_train.errors import EnvironmentUnfitError
from txl_train.model.memory import Memory
from txl_train.model.transformer_xl import TransformerXL

FEWEST_ROWS = 2
"""Lengths of 0 and 1 are compiled for themselves."""

_INSTALL = "Install one (`apt-get install g++`), name it in the environment variable CXX, or use `--runtime pytorch`."


class CompiledRuntime(EagerRuntime):
    """The step of `EagerRuntime`, compiled when it is first called with each number of streams."""

    NAME: ClassVar[str] = "compiled"
    PROVIDER: ClassVar[str] = "inductor"
    PACKS: ClassVar[bool] = False

    def __init__(self, model: TransformerXL, **options: Any) -> None:
        """Take the arguments of `EagerRuntime`. Raises EnvironmentUnfitError if nothing can be compiled here."""
        on_gpu = model.embedding.weights[0].is_cuda
        _require_compiler(on_gpu)
        super().__init__(model, **options)
        self._on_gpu = on_gpu
        self._compiled: dict[int, Callable[..., Any]] = {}

    @torch.no_grad()  # not inference_mode: its tensors are of another kind than those that come from outside, and would compile anew
    def run(self, input_ids_BQ: Tensor, target_ids_BT: Tensor | None, rows: list[Tensor], memory: Memory) -> tuple[Tensor, Memory]:
        """Call the compiled step; what it returns is the caller's own."""
        B = input_ids_BQ.shape[0]
        is_first = B not in self._compiled
        arguments: list[Any] = [input_ids_BQ.contiguous(), memory.length_B, [state.contiguous() for state in memory.states]]
        if target_ids_BT is not None:
            padded = [self._padded(rows_R, target_ids_BT.numel()) for rows_R in rows]
            arguments[1:1] = [target_ids_BT.contiguous(), padded]
        if self._on_gpu:
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        if is_first:
            self._compiled[B] = torch.compile(
                self._own_step(), fullgraph=True, dynamic=False, mode="reduce-overhead" if self._on_gpu else "default"
            )
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # of PyTorch about parts of its own
                result, length_B, states = self._compiled[B](*arguments)
        else:
            result, length_B, states = self._compiled[B](*arguments)
        if self._on_gpu:  # what a CUDA graph returns lies where its next replay writes
            result, length_B, states = result.clone(), length_B.clone(), [state.clone() for state in states]
        return result, Memory(states, length_B)

    def _own_step(self) -> Callable[..., Any]:
        """Return `_packed` with code of its own: PyTorch keeps what it compiled by the code object, looks through all of it at each call,
        and has a limit to it, meant for steps that compile by mistake."""
        code = CompiledRuntime._packed.__code__.replace()
        return types.MethodType(types.FunctionType(code, globals()), self)

    def _packed(self, *arguments: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Run the step and pack the new states, which are parts of larger tensors, so that the next step finds the strides of this one."""
        result, length_B, states = self._module(*arguments)
        packed = [state.clone(memory_format=torch.contiguous_format) for state in states]  # contiguous() leaves the stride of one stream
        return result, length_B, packed

    def _padded(self, rows_R: Tensor, n_token: int) -> Tensor:
        """Return the rows with `n_token`, which means none, after them."""
        length = max(rows_R.shape[0], FEWEST_ROWS)
        if self._on_gpu:
            length = 1 << (length - 1).bit_length()
        padded_R = torch.nn.functional.pad(rows_R, [0, length - rows_R.shape[0]], value=n_token)
        torch._dynamo.mark_dynamic(padded_R, 0)
        return padded_R


def _require_compiler(on_gpu: bool) -> None:
    """Raise EnvironmentUnfitError where torch.compile would fail in the middle of a step."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise EnvironmentUnfitError("torch.compile needs a C++ compiler, and there is none that works.", remedy=_INSTALL) from error
    if on_gpu and not torch.utils._triton.has_triton():
        raise EnvironmentUnfitError(
            "torch.compile needs Triton for this GPU, which is not installed or does not support it.",
            remedy="Install it with `pip install triton`, or use `--runtime pytorch`.",
        )
