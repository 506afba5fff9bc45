"""A step of fixed lengths as a TorchScript module in `model.pt`, which runs without the toolkit's Python code."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

from txl_train.model.inference import FixedStep

FILE_NAME = "model.pt"


def export_torchscript(step: FixedStep, directory: Path) -> list[str]:
    """Script `step`, which must be in evaluation mode, write it into `directory` and return the names of the files.

    PyTorch makes the file in memory: where its own writer finds a full disk, it ends the process (in a destructor, of PyTorch 2.13).
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch.jit is deprecated in 2.13 and works; torch.export is the ONNX path
        script_step = torch.jit.script(step)
        with open(directory / FILE_NAME, "wb") as file:
            torch.jit.save(script_step, file)
    return [FILE_NAME]
