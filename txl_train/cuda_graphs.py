"""Captures of work on a GPU, which are replayed by one launch."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")


def capture(function: Callable[[], Result], *, pool: Any, stream: torch.cuda.Stream | None) -> tuple[torch.cuda.CUDAGraph, Result]:
    """Return the graph of all that `function` does, which is not done yet, and what it returns: tensors that each replay writes.

    Garbage is not collected meanwhile, as that may free what must not be freed within a capture.

    Args:
        pool: of memory, which graphs that are replayed in the order of their captures can share (`torch.cuda.graph_pool_handle`).
        stream: one of the caller's own: what cuBLAS works in belongs to a stream, and others would give it back.

    Raises:
        RuntimeError: something in it cannot be captured: it waits for the GPU, for example.
    """
    graph = torch.cuda.CUDAGraph()
    collects = gc.isenabled()
    gc.disable()
    try:
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            result = function()
    finally:
        if collects:
            gc.enable()
    return graph, result
