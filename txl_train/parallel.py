"""How the streams of one process are computed: in parts, one after the other or on several devices, with the gradients added up.

A part is a run of streams that one copy of the model takes at once. `batch_chunk` makes parts to save memory; data parallelism within
one process (`dp`) makes one for each device. Between processes, DistributedDataParallel averages the gradients while the last part's
are computed, and only then.
"""

# Shape suffixes: B streams of this process, P streams of a part, E ext_len, T tokens of a segment, Q = E + T

from __future__ import annotations

import contextlib
import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from txl_train.config import TrainConfig
from txl_train.distributed import World
from txl_train.errors import ConfigError
from txl_train.finite import watched
from txl_train.model.adaptive import cluster_rows
from txl_train.model.compiled import compiled_twin
from txl_train.model.memory import Memory
from txl_train.model.sampled import SampledSoftmax
from txl_train.model.transformer_xl import TransformerXL
from txl_train.precision import Precision


class LossModule(nn.Module):
    """A model and its loss as one module, as DistributedDataParallel wants it.

    Args:
        model: whose loss it is.
        sampled: the loss of training, if not the model's own.
        compiled: compile what takes the time, once for all layers (`model.compiled`).
        dynamic: compile it for segments of any length.
        graphed: run what is compiled of the layers as CUDA graphs.
    """

    def __init__(
        self,
        model: TransformerXL,
        sampled: SampledSoftmax | None = None,
        *,
        compiled: bool = False,
        dynamic: bool = False,
        graphed: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.sampled = sampled
        twin = [compiled_twin(model, dynamic=dynamic, graphed=graphed)] if compiled else []
        self._compiled = twin  # in a list, as its modules are those of the model

    def forward(
        self, input_ids_PQ: Tensor, target_ids_PT: Tensor, counted_PT: Tensor, rows: list[Tensor], memory: Memory
    ) -> tuple[Tensor, Memory]:
        """Return the sum of the counted targets' losses, nats, and the memory for the next segment.

        `rows` is what `cluster_rows` returns for the targets.
        """
        model = self._compiled[0] if self._compiled else self.model
        hidden_PTD, memory = model(input_ids_PQ, memory)
        return (self._loss(model, hidden_PTD, target_ids_PT, rows) * counted_PT).sum(), memory

    def loss(self, hidden_PTD: Tensor, target_ids_PT: Tensor, rows: list[Tensor] | None = None) -> Tensor:
        """Return the loss of each target, nats, [P, T]."""
        return self._loss(self.model, hidden_PTD, target_ids_PT, rows)

    def _loss(self, model: TransformerXL, hidden_PTD: Tensor, target_ids_PT: Tensor, rows: list[Tensor] | None) -> Tensor:
        if self.sampled is None:
            return model.nll(hidden_PTD, target_ids_PT, rows)
        return self.sampled(hidden_PTD, target_ids_PT, model.head)


@dataclass(frozen=True)
class _Part:
    streams: slice
    copy: int


class Engine:
    """Runs forward and backward passes over the streams of this process.

    Args:
        model: on the first of `devices`; its gradients are where the result is.
        train: `batch_size` (over all processes), `batch_chunk`, `gpu0_bsz`, `compile`, `varlen`.
        devices: several for data parallelism within the process.
        world: the processes that share the batch.
        sampled: the loss of training, if not the model's own.

    Raises:
        ConfigError: the batch cannot be divided so.
        UsageError: the streams cannot be divided equally among the processes.
    """

    def __init__(
        self,
        model: TransformerXL,
        train: TrainConfig,
        *,
        devices: Sequence[torch.device],
        world: World,
        sampled: SampledSoftmax | None = None,
    ) -> None:
        streams = world.share(train.batch_size)
        self.n_streams = streams.stop - streams.start
        if self.n_streams % train.batch_chunk:
            raise ConfigError(
                f"The {self.n_streams} streams of each of {world.size} processes must be a multiple of `batch_chunk` {train.batch_chunk}."
            )
        chunk = self.n_streams // train.batch_chunk
        gpu0 = None if train.gpu0_bsz is None else train.gpu0_bsz // train.batch_chunk
        sizes = device_shares(chunk, len(devices), gpu0)
        self._parts: list[_Part] = []
        start = 0
        for _ in range(train.batch_chunk):
            for number, size in enumerate(sizes):
                if size:
                    self._parts.append(_Part(slice(start, start + size), number))
                    start += size
        self.devices = list(devices)
        self._world = world
        for parameter in model.parameters():
            if parameter.numel() == 0:  # what a plain softmax has of clusters: nothing to train, and nothing to wait for
                parameter.requires_grad_(False)
        self._cluster_ends = model.head.cluster_ends
        models = [model, *(copy.deepcopy(model).to(device) for device in self.devices[1:])]
        # among several GPUs, the exchange of gradients would have to be captured too
        graphed = world.size == 1 and len(self.devices) == 1 and self.devices[0].type == "cuda" and not train.varlen
        self._copies = [LossModule(each, sampled, compiled=train.compile, dynamic=train.varlen, graphed=graphed) for each in models]
        first = self._copies[0]
        self._exchange: DistributedDataParallel | None = None
        if world.size > 1:
            self._exchange = DistributedDataParallel(first, device_ids=[devices[0]] if devices[0].type == "cuda" else None)
        self._run: list[nn.Module] = [self._exchange or first, *self._copies[1:]]

    def split(self, memory: Memory) -> list[Memory]:
        """Return the parts of a memory of all streams of this process, each on its device."""
        return [
            Memory(
                [state[part.streams].to(self.devices[part.copy]) for state in memory.states],
                memory.length_B[part.streams].to(self.devices[part.copy]),
            )
            for part in self._parts
        ]

    def run(
        self, batch: tuple[Tensor, Tensor, Tensor], memories: list[Memory], n_tokens: int, precision: Precision
    ) -> tuple[Tensor, list[Memory]]:
        """Add the gradients of the mean loss over `n_tokens` targets of all processes; return this process' part of it, and the memories.

        `batch` is input ids [B, Q], target ids [B, T] and which of these count [B, T], on the host, where the rows of the tail clusters are
        looked up too: nothing here waits for a device. The gradients that the model had must be None.
        """
        for duplicate in self._copies[1:]:
            _copy_weights(self._copies[0], duplicate)
        loss = torch.zeros((), device=self.devices[0])
        new_memories: list[Memory] = []
        for number, (part, memory) in enumerate(zip(self._parts, memories, strict=True)):
            device, last = self.devices[part.copy], number == len(self._parts) - 1
            with self._quiet(last=last):
                tensors = [tensor[part.streams] for tensor in batch]
                rows = cluster_rows(tensors[1].reshape(-1), self._cluster_ends)
                inputs, rows = _moved(tensors, device), _moved(rows, device)
                with precision.autocast():
                    total, new_memory = self._run[part.copy](*inputs, rows, memory)
                part_of_loss = total / n_tokens
                precision.backward(part_of_loss * self._world.size)  # which averaging over the processes undoes
            loss += part_of_loss.detach().to(loss.device)
            new_memories.append(new_memory)
        for duplicate in self._copies[1:]:
            _add_gradients(self._copies[0], duplicate)
        return loss, new_memories

    def first_not_finite(self, batch: tuple[Tensor, Tensor, Tensor], memories: list[Memory], precision: Precision) -> str | None:
        """Compute the loss once more, without gradients, and return in words what of it is not finite first; None if all is.

        Values are dropped out anew, from random numbers that nothing else gets.
        """
        for part, memory in zip(self._parts, memories, strict=True):
            copy_of, device = self._copies[part.copy], self.devices[part.copy]
            for layer, state in enumerate(memory.states):
                if not bool(state.isfinite().all()):
                    return f"the memory of layer {layer}"
            inputs, targets, counted = _moved([tensor[part.streams] for tensor in batch], device)
            gpus = [device] if device.type == "cuda" else []
            with torch.random.fork_rng(gpus), torch.no_grad(), watched(copy_of.model) as found, precision.autocast():
                hidden, _ = copy_of.model(inputs, memory)
                loss_PT = copy_of.loss(hidden, targets)
            if found:
                return found[0]
            if not bool((loss_PT * counted).isfinite().all()):
                return "the loss of the softmax"
        return None

    def _quiet(self, *, last: bool) -> contextlib.AbstractContextManager[None]:
        """Gradients are exchanged once a batch, with its last part."""
        return contextlib.nullcontext() if last or self._exchange is None else self._exchange.no_sync()


def device_shares(n_streams: int, n_devices: int, on_first: int | None = None) -> list[int]:
    """Return how many of `n_streams` each device takes: equal shares, the first ones one more, or `on_first` on the first device.

    Raises:
        ConfigError: `on_first` is more than there are.
    """
    if on_first is None or n_devices == 1:
        share, more = divmod(n_streams, n_devices)
        return [share + (number < more) for number in range(n_devices)]
    if on_first > n_streams:
        raise ConfigError(f"`gpu0_bsz` must be at most the batch's {n_streams} streams, but is {on_first} instead.")
    return [on_first, *device_shares(n_streams - on_first, n_devices - 1)]


def _moved(tensors: list[Tensor], device: torch.device) -> list[Tensor]:
    """Return tensors of the host on the device. From pinned memory the copies queue up behind the work under way; nobody waits for it."""
    if device.type == "cuda":
        tensors = [tensor.contiguous().pin_memory() for tensor in tensors]
    return [tensor.to(device, non_blocking=True) for tensor in tensors]


@torch.no_grad()
def _copy_weights(source: nn.Module, target: nn.Module) -> None:
    for weight, duplicate in zip(source.parameters(), target.parameters(), strict=True):
        duplicate.copy_(weight)
        duplicate.grad = None


@torch.no_grad()
def _add_gradients(target: nn.Module, source: nn.Module) -> None:
    for weight, duplicate in zip(target.parameters(), source.parameters(), strict=True):
        if duplicate.grad is None:
            continue
        gradient = duplicate.grad.to(weight.device)
        weight.grad = gradient if weight.grad is None else weight.grad.add_(gradient)
