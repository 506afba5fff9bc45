"""Opens runtimes by name. Each is imported only when it is asked for; a new one is one file and one line here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from txl_deploy import manifest as manifests
from txl_deploy.manifest import Manifest
from txl_deploy.runtimes.base import Runtime, RuntimeInfo
from txl_train.config import ModelConfig, model_config_from_dict
from txl_train.errors import EnvironmentUnfitError, ManifestError
from txl_train.files import file_sha256
from txl_train.model.memory import MemoryKind

if TYPE_CHECKING:
    from txl_train.checkpoint import Checkpoint

RUNTIME_NAMES = ("pytorch", "torchscript", "onnx")


def _torchscript(directory: Path, info: RuntimeInfo, threads: int | None) -> Runtime:
    from txl_deploy.runtimes.torchscript import TorchScriptRuntime

    return TorchScriptRuntime(manifests.artifact_file(directory, "model.pt"), info)


def _onnx(directory: Path, info: RuntimeInfo, threads: int | None) -> Runtime:
    from txl_deploy.runtimes.onnxrt import OnnxRuntime

    return OnnxRuntime(manifests.artifact_file(directory, "model.onnx"), info, threads=threads)


_OPENERS: dict[str, Callable[[Path, RuntimeInfo, int | None], Runtime]] = {"torchscript": _torchscript, "onnx": _onnx}


def resolve_device(device: str) -> str:
    """Return `cpu` or `cuda:0` for auto, cpu or cuda. Raises `EnvironmentUnfitError` if a GPU is asked for and there is none."""
    import torch

    if device == "auto":
        return "cuda:0" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise EnvironmentUnfitError(
            "A GPU was asked for, but PyTorch finds none on this machine.",
            remedy="Use `--device cpu`, or run `txl doctor` to see what is missing.",
        )
    return "cuda:0" if device == "cuda" else device


def use_threads(threads: int | None) -> None:
    """Limit the CPU threads of PyTorch; None keeps its own choice."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def open_artifact(directory: Path, *, device: str = "cpu", threads: int | None = None) -> Runtime:
    """Open an exported model, after checking every byte of it against its manifest.

    Raises:
        ManifestError: the folder is no artifact, or is not what its manifest says.
        EnvironmentUnfitError: its runtime is not installed, or the device is absent.
    """
    manifest = manifests.read_verified(directory)
    use_threads(threads)
    info = RuntimeInfo(
        name=manifest.format,
        provider=manifest.format,
        device=resolve_device(device),
        dtype=manifest.settings.dtype,
        memory=manifest.settings.memory,
        tgt_len=manifest.settings.tgt_len,
        config=artifact_config(manifest),
        origin=str(directory),
        manifest_sha256=file_sha256(directory / manifests.FILE_NAME),
        checkpoint_sha256=manifest.source.checkpoint_sha256,
    )
    return _OPENERS[manifest.format](directory, info, threads)


def artifact_config(manifest: Manifest) -> ModelConfig:
    """Return the model's configuration with the lengths the artifact was exported for."""
    try:
        config = model_config_from_dict(manifest.model)
    except Exception as error:
        raise ManifestError(
            f"The manifest holds no valid model configuration: {error}", remedy="Export it again with `txl export`."
        ) from error
    return config


def eager_from_checkpoint(
    path: Path,
    *,
    tgt_len: int | None = None,
    memory: MemoryKind = "kv",
    mem_len: int | None = None,
    clamp_len: int | None = None,
    same_length: bool | None = None,
    device: str = "cpu",
    threads: int | None = None,
) -> tuple[Runtime, Checkpoint]:
    """Open a checkpoint in eager PyTorch, FP32, with other lengths where they are given: the reference of every comparison."""
    from txl_deploy.runtimes.eager import EagerRuntime
    from txl_train.checkpoint import load_model
    from txl_train.model.inference import with_lengths

    use_threads(threads)
    where = resolve_device(device)
    model, checkpoint = load_model(path)
    model.to(where)
    runtime = EagerRuntime(
        model,
        tgt_len=checkpoint.eval_tgt_len if tgt_len is None else tgt_len,
        memory=memory,
        config=with_lengths(model.config, mem_len=mem_len, clamp_len=clamp_len, same_length=same_length),
        origin=str(path),
        checkpoint_sha256=file_sha256(path),
    )
    return runtime, checkpoint
