"""Memory that ran out: how it is recognised, of the host and of a device, and said together with what to lower.

Knows what Python, PyTorch, ONNX Runtime and the system raise for it; imports none of them.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator

from txl_train.errors import EnvironmentUnfitError

TRAINING = (
    "Raise `batch_chunk` (a batch in parts: the same result with less memory), or lower `batch_size`, `tgt_len`, `mem_len` or the model's "
    "size. What was saved can be continued with `--resume`."
)
LOADING = "Free some memory, or use a machine with more; the file itself may be in order."

_HOST = ("can't allocate memory", "std::bad_alloc", "Cannot allocate memory", "bad allocation", "can't start new thread")
_ONEDNN = "could not create a primitive"
"""The whole message of oneDNN when the code that it generates gets no memory: what it cannot compute fails before, at the "primitive
descriptor"."""
_DEVICE = ("CUDA out of memory", "CUDA error: out of memory", "CUDNN_STATUS_ALLOC_FAILED", "CUBLAS_STATUS_ALLOC_FAILED")
_EITHER = ("Failed to allocate memory for requested buffer",)  # ONNX Runtime's arena, of whichever it is


def what_ran_out(error: BaseException) -> str | None:
    """Return "Memory" or "The device's memory", whichever an error says ran out; None for another error."""
    text = str(error)
    if type(error).__name__ == "OutOfMemoryError" or any(phrase in text for phrase in _DEVICE):
        return "The device's memory"
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return "Memory"
    if not isinstance(error, (RuntimeError, ImportError)):
        return None
    return "Memory" if text.strip() == _ONEDNN or any(phrase in text for phrase in (*_HOST, *_EITHER)) else None


def as_unfit(error: BaseException, remedy: str, *, doing: str = "") -> EnvironmentUnfitError | None:
    """Return what to tell where memory ran out, `doing` such and such; None where it did not."""
    which = what_ran_out(error)
    if which is None:
        return None
    asked = next((line.strip().rstrip(".") for line in str(error).splitlines() if "llocate" in line or line.strip() == _ONEDNN), "")
    return EnvironmentUnfitError(f"{which} ran out{doing and f' {doing}'}{asked and f': {asked}'}.", remedy=remedy)


@contextlib.contextmanager
def told_when_memory_runs_out(remedy: str, *, doing: str = "") -> Iterator[None]:
    """Raise an `EnvironmentUnfitError` with this remedy in place of an error that says that memory ran out."""
    try:
        yield
    except Exception as error:
        told = as_unfit(error, remedy, doing=doing)
        if told is None or isinstance(error, EnvironmentUnfitError):
            raise
        raise told from error
