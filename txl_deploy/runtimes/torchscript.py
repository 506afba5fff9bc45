"""TorchScript: a scripted step loaded from `model.pt`, without the toolkit's Python code."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path

import torch

from txl_deploy.runtimes.base import RuntimeInfo
from txl_deploy.runtimes.graph import ModuleRuntime
from txl_train.errors import ArtifactError


class TorchScriptRuntime(ModuleRuntime):
    """A TorchScript module on one device."""

    def __init__(self, path: Path, info: RuntimeInfo) -> None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # torch.jit is deprecated since 2.13 and works up to Python 3.13
                module: torch.jit.ScriptModule = torch.jit.load(str(path), map_location=info.device)  # type: ignore[no-untyped-call]
        except (RuntimeError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ArtifactError(
                f"PyTorch cannot load {path}: {reason}", remedy="Export it again with `txl export --format torchscript`."
            ) from error
        super().__init__(dataclasses.replace(info, compute=info.dtype), module)
