"""Where to compute: from the words in the settings to devices that are there. Imports PyTorch only when it is asked."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from txl_train.config import TrainConfig
from txl_train.errors import EnvironmentUnfitError, UsageError

if TYPE_CHECKING:
    import torch

    from txl_train.distributed import World

log = logging.getLogger(__name__)


def resolve_device(device: str) -> str:
    """Return `cpu` or `cuda:0` for auto, cpu or cuda; auto is a GPU if there is one.

    Raises:
        EnvironmentUnfitError: a GPU is asked for and PyTorch finds none.
    """
    import torch

    if device == "auto":
        return "cuda:0" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise EnvironmentUnfitError(
            "A GPU was asked for, but PyTorch finds none on this machine.",
            remedy="Use `--device cpu`, or run `txl doctor` to see what is missing.",
        )
    return "cuda:0" if device == "cuda" else device


def devices_of(train: TrainConfig, world: World) -> list[torch.device]:
    """Return the devices that this process trains on; several only with `multi_gpu` dp.

    Raises:
        UsageError: `multi_gpu` and the processes contradict each other.
        EnvironmentUnfitError: there is no such device.
    """
    import torch

    device = torch.device(resolve_device(train.device))
    if train.gpu0_bsz is not None and train.multi_gpu != "dp":
        raise UsageError("`--gpu0-bsz` is the share of the first GPU in `--multi-gpu dp`.", remedy="Add `--multi-gpu dp`, or leave it out.")
    if train.multi_gpu == "dp" and world.size > 1:
        raise UsageError(
            f"`--multi-gpu dp` is one process for all GPUs, but there are {world.size} processes.", remedy="Use `--multi-gpu ddp`."
        )
    if device.type != "cuda":
        return [device]
    if train.multi_gpu == "dp":
        return [torch.device("cuda", number) for number in range(torch.cuda.device_count())]
    if train.multi_gpu == "ddp" and world.size == 1 and torch.cuda.device_count() > 1:
        log.warning(
            "`--multi-gpu ddp` takes a process for each GPU, but this is alone: use `torchrun --nproc-per-node %d --no-python txl`.",
            torch.cuda.device_count(),
        )
    if world.size > 1:
        if world.local_rank >= torch.cuda.device_count():
            raise EnvironmentUnfitError(
                f"Process {world.local_rank} of this machine has no GPU: there are {torch.cuda.device_count()}.",
                remedy="Start no more processes than there are GPUs: `torchrun --nproc-per-node`.",
            )
        device = torch.device("cuda", world.local_rank)
        torch.cuda.set_device(device)
    return [device]
