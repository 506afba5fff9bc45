"""Reads the safetensors format: eight bytes of length, a header in JSON, then the numbers of every tensor one after the other.

Written out rather than left to the package of that name: it is thirty lines, every bound of which is checked here.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import torch

from txl_train.errors import CheckpointError
from txl_train.interop.pickles import COPY_AGAIN, printable
from txl_train.interop.tensors import Storage, StoredTensor, contiguous

LARGEST_HEADER_BYTES = 100_000_000
"""As the format's own library has it."""

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def read_safetensors(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a file by name; their numbers are read when they are asked for.

    Raises `CheckpointError` where the header is damaged or tensors overlap, leave gaps or reach outside the file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, LARGEST_HEADER_BYTES):
            raise _damaged(path, f"its header of {length} bytes does not fit into its {size} bytes")
        header = file.read(length)
    try:
        entries = json.loads(header, object_pairs_hook=_without_repetition)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its header is no JSON ({error})") from error
    if not isinstance(entries, dict):
        raise _damaged(path, "its header is no table of tensors")
    entries.pop("__metadata__", None)
    tensors = {}
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: _begin(path, item)):
        dtype, shape, begin, finish = _described(path, name, entry)
        if begin != end or finish - begin != math.prod(shape) * dtype.itemsize:
            raise _damaged(
                path, f"tensor `{printable(name)}` does not lie where the one before it ends, or is not as long as its shape says"
            )
        end = finish
        storage = Storage(name, dtype, math.prod(shape), _Span(path, 8 + length + begin, finish - begin).read)
        tensors[name] = contiguous(storage, shape)
    if 8 + length + end != size:
        raise _damaged(path, f"its tensors end at byte {8 + length + end}, but it has {size}")
    return tensors


class _Span:
    """Some bytes of a file."""

    def __init__(self, path: Path, start: int, n_bytes: int) -> None:
        self.path, self.start, self.n_bytes = path, start, n_bytes

    def read(self) -> bytes:
        with self.path.open("rb") as file:
            file.seek(self.start, os.SEEK_SET)
            data = file.read(self.n_bytes)
        if len(data) != self.n_bytes:
            raise _damaged(self.path, "it became shorter while it was read")
        return data


def _begin(path: Path, item: tuple[str, Any]) -> tuple[int, int]:
    _, _, begin, finish = _described(path, *item)
    return begin, finish


def _described(path: Path, name: str, entry: Any) -> tuple[torch.dtype, tuple[int, ...], int, int]:
    try:
        dtype, shape, (begin, finish) = _DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path, f"the entry of tensor `{printable(name)}` is not understood ({error!r})") from error
    if any(type(number) is not int or number < 0 for number in (*shape, begin, finish)) or finish < begin:
        raise _damaged(path, f"the entry of tensor `{printable(name)}` has impossible numbers")
    return dtype, shape, begin, finish


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("a name stands there twice")
    return entries


def _damaged(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{path} is no safetensors file, or is damaged: {reason}.", remedy=COPY_AGAIN)
