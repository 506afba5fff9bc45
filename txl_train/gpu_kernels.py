"""Whether kernels written in Triton can be compiled and run on a GPU here."""

from __future__ import annotations

import functools
import logging

import torch

_LOG = logging.getLogger(__name__)


@functools.cache
def can_run_kernels(device: torch.device) -> bool:
    """Return whether Triton works on a GPU, by trying it once: it needs a C compiler, and there may be none.

    A warning says why it does not where it is installed; what asks has plain operations to do without.
    """
    from torch.utils._triton import has_triton

    if not has_triton():
        return False
    try:
        from txl_train.trial_kernel import one

        with torch.cuda.device(device):
            return one(device) == 1
    except Exception as error:  # of compilers, drivers and Triton itself, which have no base class in common
        _LOG.warning("Triton's kernels cannot be used on %s, so plain operations are: %s", device, str(error).strip()[:300])
        return False
