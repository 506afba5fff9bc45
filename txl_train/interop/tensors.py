"""Tensors that lie in a file: described first, checked against their bounds, and read one by one when they are asked for."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from txl_train.errors import CheckpointError
from txl_train.interop.pickles import shown

LARGEST_RANK = 8


@dataclass(frozen=True, eq=False)
class Storage:
    """A run of numbers in a file."""

    key: str
    """Its name within the file: storages of one name are one storage."""
    dtype: torch.dtype
    n_values: int
    read: Callable[[], bytes]
    """Returns exactly `n_values` numbers, little-endian."""


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor whose numbers are still in the file."""

    storage: Storage
    offset: int
    """Of its first number within the storage, in numbers."""
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def __post_init__(self) -> None:
        """Raises `CheckpointError` where shape, stride and offset reach outside the storage, or repeat its numbers."""
        numbers = (self.offset, *self.shape, *self.stride)
        if len(self.shape) != len(self.stride) or len(self.shape) > LARGEST_RANK or any(type(n) is not int or n < 0 for n in numbers):
            raise CheckpointError(
                f"a tensor has the shape {shown(self.shape)}, the stride {shown(self.stride)} and the offset {shown(self.offset)}"
            )
        n_values = math.prod(self.shape)
        last = self.offset + sum((size - 1) * step for size, step in zip(self.shape, self.stride)) if n_values else self.offset - 1
        if last >= self.storage.n_values or n_values > self.storage.n_values or self.offset > self.storage.n_values:
            raise CheckpointError(
                f"a tensor of shape {list(self.shape)}, stride {list(self.stride)} and offset {self.offset} reaches outside its storage "
                f"of {self.storage.n_values} numbers"
            )

    @property
    def identity(self) -> tuple[Any, ...]:
        """Equal for tensors that are the same numbers in the same place."""
        return (self.storage.key, self.offset, self.shape, self.stride)

    def load(self) -> Tensor:
        """Read the numbers: a tensor of its own, contiguous, in the file's dtype."""
        data = bytearray(self.storage.read())
        flat = torch.frombuffer(data, dtype=self.storage.dtype) if data else torch.empty(0, dtype=self.storage.dtype)
        return torch.as_strided(flat, self.shape, self.stride, self.offset).clone(memory_format=torch.contiguous_format)


def contiguous(storage: Storage, shape: tuple[int, ...]) -> StoredTensor:
    """Return the tensor that fills a storage in rows."""
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * size)
    return StoredTensor(storage, 0, shape, tuple(reversed(strides[: len(shape)])))
