"""TorchScript: a scripted step loaded from `model.pt`, without the toolkit's Python code.

The script holds no device: weights come to the one that is asked for, and everything else is made where the inputs lie.
"""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path

import torch

from txl_deploy.claims import count_matrices
from txl_deploy.runtimes.base import RuntimeInfo, torch_compute
from txl_deploy.runtimes.graph import ModuleRuntime
from txl_train.errors import ArtifactError
from txl_train.exhaustion import LOADING, as_unfit

_SETTINGS = {
    "tgt_len": "tgt_len",
    "mem_len": "mem_len",
    "ext_len": "ext_len",
    "memory": "memory",
    "head": "head_kind",
    "memory_dtype": "memory_dtype_name",
}
"""What a script says of itself, and the attribute of `FixedStep` that says it; those of older versions have fewer."""


class TorchScriptRuntime(ModuleRuntime):
    """A TorchScript module on one device."""

    def __init__(self, path: Path, info: RuntimeInfo) -> None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # torch.jit is deprecated since 2.13 and works up to Python 3.13
                module: torch.jit.ScriptModule = torch.jit.load(str(path), map_location=info.device)  # type: ignore[no-untyped-call]
        except (RuntimeError, ValueError) as error:
            if told := as_unfit(error, LOADING, doing=f"when {path} was loaded"):
                raise told from error
            reason = str(error).strip().splitlines()[0]
            raise ArtifactError(
                f"PyTorch cannot load {path}: {reason}", remedy="Export it again with `txl export --format torchscript`."
            ) from error
        weights = count_matrices((str(weight.dtype).removeprefix("torch."), weight.dim()) for weight in module.parameters())
        settings = {name: getattr(module, attribute) for name, attribute in _SETTINGS.items() if hasattr(module, attribute)}
        compute = torch_compute(info.dtype, info.device)
        super().__init__(dataclasses.replace(info, compute=compute, readback={"weights": weights, "settings": settings}), module)
