"""The smallest kernel there is, to see whether Triton works: `gpu_kernels` runs it. Imports triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _put_one(place):  # type: ignore[no-untyped-def]
    tl.store(place, 1)


def one(device: torch.device) -> int:
    """Return the 1 that a kernel has written on a device; raises whatever keeps it from being compiled or run."""
    place = torch.zeros(1, dtype=torch.int32, device=device)
    _put_one[(1,)](place)
    return int(place)
