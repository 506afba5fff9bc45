"""Where to compute: from the word in the settings to a device that is there. Imports PyTorch only when it is asked."""

from __future__ import annotations

from txl_train.errors import EnvironmentUnfitError


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
