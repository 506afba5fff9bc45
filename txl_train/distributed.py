"""Several processes working on one model: who this one is, and sums and copies over all of them.

`torchrun` starts the processes and tells each its place in environment variables; without them there is one process, and everything
here does nothing. Gradients are averaged by PyTorch's DistributedDataParallel, not here.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from txl_train.errors import EnvironmentUnfitError, UsageError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
_TIMEOUT = datetime.timedelta(hours=3)
"""How long a process waits for the others: one may have a large text to prepare. One that ends is noticed at once."""

_MEETING = datetime.timedelta(minutes=10)
"""How long it waits for them at the beginning, where nobody notices that one has ended; they start together, and read a checkpoint."""

_LAST_THREADS_S = 0.2
"""gloo's threads outlive the group and take the interpreter's lock to drop the last tensors, which must not be while it ends."""


@dataclass(frozen=True)
class World:
    """The processes that work together, as this one sees them."""

    rank: int = 0
    """This process, from 0."""
    size: int = 1
    """Number of processes."""
    local_rank: int = 0
    """This process among those of its machine: the number of its GPU."""

    @property
    def is_main(self) -> bool:
        """True in the one process that writes files and prints."""
        return self.rank == 0

    def share(self, n: int) -> slice:
        """Return the part of a batch of `n` streams that this process reads: contiguous, in order of the ranks.

        Raises:
            UsageError: `n` cannot be divided equally.
        """
        if n % self.size:
            raise UsageError(
                f"{n} streams cannot be divided equally among {self.size} processes.",
                remedy=f"Give a `--batch-size` that is a multiple of {self.size}, such as {-(-n // self.size) * self.size}.",
            )
        part = n // self.size
        return slice(self.rank * part, (self.rank + 1) * part)

    def sum(self, values: Sequence[float]) -> list[float]:
        """Return the sums over all processes of each value, in float64. All must call it with as many values."""
        if self.size == 1:
            return [float(value) for value in values]
        totals = torch.tensor(list(values), dtype=torch.float64)
        parts = [torch.empty_like(totals) for _ in range(self.size)]
        torch.distributed.all_gather(parts, totals)
        return [float(value) for value in torch.stack(parts).sum(dim=0)]

    def largest(self, value: int) -> int:
        """Return the largest `value` of all processes."""
        if self.size == 1:
            return value
        return max(int(part) for part in self.gather(torch.tensor(value)))

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """Return the `tensor` of every process, in order of the ranks, on the CPU; shapes and types must agree."""
        if self.size == 1:
            return [tensor.cpu()]
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        torch.distributed.all_gather(parts, tensor.contiguous())
        return [part.cpu() for part in parts]

    def agree(self, what: str, value: str, remedy: str) -> None:
        """See to it that `value` is the same in every process; all must call it, and all fail together.

        Raises:
            UsageError: `what` differs in one of them.
        """
        if self.size == 1:
            return
        digests = self.gather(torch.tensor(list(hashlib.sha256(value.encode()).digest()), dtype=torch.uint8))
        other = [rank for rank, digest in enumerate(digests) if not torch.equal(digest, digests[0])]
        if other:
            raise UsageError(f"{what} in process {other[0]} is not that of process 0.", remedy=remedy)

    def wait(self) -> None:
        """Return when every process has come here."""
        if self.size > 1:
            torch.distributed.barrier()


def world_of(environment: Mapping[str, str] | None = None) -> World:
    """Return the place of this process, from what torchrun puts into the environment; alone where it says nothing.

    Raises:
        UsageError: the variables contradict each other.
    """
    values = os.environ if environment is None else environment
    if "WORLD_SIZE" not in values or "RANK" not in values:
        return World()
    try:
        rank, size = int(values["RANK"]), int(values["WORLD_SIZE"])
        local_rank = int(values.get("LOCAL_RANK", "0"))
    except ValueError:
        raise UsageError(
            f"The variables {', '.join(_VARIABLES)} must be numbers.", remedy="Start with `torchrun`, which sets them."
        ) from None
    if not 0 <= rank < size:
        raise UsageError(f"RANK {rank} is not within WORLD_SIZE {size}.", remedy="Start with `torchrun`, which sets both.")
    return World(rank, size, local_rank)


@contextlib.contextmanager
def join(world: World, device: torch.device) -> Iterator[None]:
    """Meet the other processes: NCCL between GPUs, gloo between CPUs. Leaves the group at the end, also after an error.

    Raises:
        EnvironmentUnfitError: they cannot be met, or one of them ends while this one waits for it.
    """
    if world.size == 1 or torch.distributed.is_initialized():
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"  # by where a tensor is
    try:
        store = _meet(world)
        torch.distributed.init_process_group(backend, store=store, rank=world.rank, world_size=world.size, timeout=_TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise EnvironmentUnfitError(
            f"Process {world.rank} of {world.size} cannot meet the others: {str(error).splitlines()[0]}",
            remedy="Start all of them with `torchrun`; between machines, MASTER_ADDR and MASTER_PORT must be reachable.",
        ) from error
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, torch.distributed.DistError) or "gloo" in str(error)):
            raise
        raise EnvironmentUnfitError(
            f"Process {world.rank} of {world.size} has lost the others: {str(error).splitlines()[0]}",
            remedy="One of them has ended, and says why, or does not answer. What was saved before can be continued with `--resume`.",
        ) from error
    finally:
        torch.distributed.destroy_process_group()
        time.sleep(_LAST_THREADS_S)


def _meet(world: World) -> Store:
    """Return what the processes exchange addresses through, once all of them are there.

    Raises:
        EnvironmentUnfitError: some did not come in time.
    """
    store: Store
    store, _, _ = next(rendezvous("env://", world.rank, world.size, timeout=_MEETING))
    keys = [f"txl/here/{rank}" for rank in range(world.size)]
    store.set(keys[world.rank], "yes")
    try:
        store.wait(keys, _MEETING)
    except torch.distributed.DistStoreError as error:
        missing = [str(rank) for rank, key in enumerate(keys) if not store.check([key])]
        raise EnvironmentUnfitError(
            f"Process {world.rank} of {world.size} has waited {_MEETING} for {', '.join(missing) or 'the others'}, in vain.",
            remedy="It has ended before, and says why where it was started, or was not started. Start all of them anew.",
        ) from error
    return store
