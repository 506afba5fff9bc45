"""Whether an engine may be opened on this machine: answered from its manifest before anything of TensorRT is loaded.

An engine of another GPU or version does not fail in TensorRT, it can end the process. So the GPU is asked for through the driver, the
version is read from the installed packages' metadata, and only what fits is imported at all. Bytes are verified by whoever reads the
manifest.
"""

from __future__ import annotations

import importlib.metadata
import re

from txl_deploy import compat
from txl_deploy.manifest import MODEL_FILES, EngineFacts, Manifest
from txl_deploy.trt import cuda
from txl_deploy.trt.cuda import Gpu
from txl_train.errors import EnvironmentUnfitError, ManifestError, UsageError

PLAN_FILE = MODEL_FILES["trt"]
"""The engine within its artifact."""

DISTRIBUTIONS = {
    "tensorrt": ("tensorrt-cu13", "tensorrt-cu12", "tensorrt", "tensorrt-cu13-bindings", "tensorrt-cu12-bindings"),
    "tensorrt_rtx": ("tensorrt-rtx", "tensorrt-rtx-cu13", "tensorrt-rtx-cu12", "tensorrt-rtx-cu13-bindings", "tensorrt-rtx-cu12-bindings"),
}
"""Names under which each package can be installed."""

_COMPATIBLE_FROM = {"ampere_plus": (8, 0), "portable": (8, 0)}
"""The oldest compute capability of engines that run on several (NVIDIA's documentation of hardware compatibility; TensorRT-RTX leaves
Turing out of an engine for no GPU in particular)."""


def check_fits(manifest: Manifest, *, device: str, origin: str) -> Gpu:
    """Return the GPU that the engine is to run on.

    Args:
        device: `cpu` or `cuda:0`, as `resolve_device` has it.
        origin: the artifact, for messages.

    Raises:
        ManifestError: it holds no engine.
        EnvironmentUnfitError: there is no GPU, or another than the engine's; the package is absent or of another version; PyTorch has no
            CUDA.
        UsageError: the CPU was asked for.
    """
    facts = manifest.engine
    if facts is None:
        raise ManifestError(f"{origin} says nothing of its engine.", remedy="Export it again with `txl export`.")
    gpus = cuda.devices()
    built_for = _built_for(facts)
    if not gpus:
        raise EnvironmentUnfitError(
            f"{origin} is an engine for {built_for}, and this machine has no NVIDIA GPU, or no driver for it.",
            remedy="Run it there; the ONNX model it was built from runs anywhere. `txl doctor` shows what this machine has.",
        )
    index = int(device.partition(":")[2] or 0)
    gpu = gpus[index] if index < len(gpus) else gpus[0]
    if not _runs_on(facts, gpu):
        other = next((other for other in gpus if _runs_on(facts, other)), None)
        if other is not None:
            remedy = f"Use the {other.name}: `export CUDA_VISIBLE_DEVICES={cuda.visible_name(other.index)}`."
        else:
            target = compat.target_of(gpu)
            name = "NAME" if target is None else target.name
            remedy = f"Build one for this GPU: `txl export --format {manifest.format} --artifact ONNX_DIR --target {name}`."
        raise EnvironmentUnfitError(
            f"{origin} is an engine for {built_for}, but the GPU here is {gpu.name} of compute capability {gpu.compute_capability}.",
            remedy=remedy,
        )
    installed = installed_version(facts.builder)
    if installed is None:
        raise EnvironmentUnfitError(
            f"{origin} runs with {_builder_name(facts)}, which is not installed.", remedy=f"Install it with `{install_command(facts)}`."
        )
    check_version(facts, installed, origin=origin)
    if device == "cpu":
        _refuse_cpu(origin)
    return gpu


def check_version(facts: EngineFacts, version: str, *, origin: str) -> None:
    """Refuse any version of the package but the one that built the engine. Raises `EnvironmentUnfitError` with the one to install."""
    if not same_version(version, facts.builder_version):
        raise EnvironmentUnfitError(
            f"{origin} was built by {_builder_name(facts)} and runs with no other version, but {version} is installed.",
            remedy=f"Install it with `{install_command(facts)}`, or build the engine again with the version that is here.",
        )


def installed_version(builder: str) -> str | None:
    """Return the installed version of `tensorrt` or `tensorrt_rtx` from its metadata, without importing it; None if it is absent."""
    for name in DISTRIBUTIONS[builder]:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def same_version(one: str, other: str) -> bool:
    """Return whether two versions are the same release; a package may leave out the last number of 10.4.0.26, or add `.post1`."""
    numbers = [[int(part) for part in re.sub(r"\.(post|dev).*$", "", version).split(".") if part.isdecimal()] for version in (one, other)]
    shorter = min(map(len, numbers))
    return shorter >= 3 and numbers[0][:shorter] == numbers[1][:shorter]


def install_command(facts: EngineFacts) -> str:
    """Return the command that installs what runs an engine, in the version that built it."""
    for target in compat.targets().values():
        for stack in target.stacks:
            fits = facts.target in ("", target.name) or target.compute_capability == facts.compute_capability
            if fits and stack.builder == facts.builder and same_version(stack.builder_version, facts.builder_version):
                return stack.pip_install
    if facts.builder == "tensorrt_rtx":
        return f"pip install tensorrt-rtx=={facts.builder_version}"
    cuda_of = "cu12" if facts.builder_version.startswith("10.") else "cu13"
    return f"pip install --extra-index-url https://pypi.nvidia.com tensorrt-{cuda_of}=={facts.builder_version}"


def _built_for(facts: EngineFacts) -> str:
    if facts.compute_capability is not None and facts.hardware_compatibility in ("none", "same_compute_capability"):
        return f"compute capability {facts.compute_capability} ({facts.target})"
    return f"compute capability {'.'.join(map(str, _COMPATIBLE_FROM.get(facts.hardware_compatibility, (8, 0))))} or newer"


def _runs_on(facts: EngineFacts, gpu: Gpu) -> bool:
    if facts.hardware_compatibility in _COMPATIBLE_FROM:
        return tuple(int(part) for part in gpu.compute_capability.split(".")) >= _COMPATIBLE_FROM[facts.hardware_compatibility]
    return facts.compute_capability == gpu.compute_capability


def _builder_name(facts: EngineFacts) -> str:
    return f"{compat.BUILDER_NAMES[facts.builder]} {facts.builder_version}"


def _refuse_cpu(origin: str) -> None:
    """Say why `--device` came to `cpu` where there is a GPU: it was asked for, or PyTorch cannot use the GPU."""
    import torch

    if torch.cuda.is_available():
        raise UsageError(f"{origin} is an engine, which runs on a GPU alone.", remedy="Leave `--device cpu` out.")
    raise EnvironmentUnfitError(
        f"{origin} needs a PyTorch with CUDA, which holds its tensors, and the one here finds no GPU.",
        remedy="`txl doctor` shows which PyTorch goes with this GPU and how to install it.",
    )
