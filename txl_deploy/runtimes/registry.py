"""Opens runtimes by name. Each is imported only when it is asked for; a new one is one file and one line here."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from txl_deploy import claims
from txl_deploy import manifest as manifests
from txl_deploy.manifest import Manifest
from txl_deploy.runtimes.base import Runtime, RuntimeInfo
from txl_train.config import HeadKind, MemoryKind, ModelConfig, SameLengthRule, model_config_from_dict
from txl_train.device import resolve_device as device_named
from txl_train.errors import ManifestError
from txl_train.files import file_sha256

if TYPE_CHECKING:
    from txl_deploy.runtimes.eager import EagerRuntime
    from txl_train.checkpoint import Checkpoint

RUNTIME_NAMES = ("pytorch", "compiled", "torchscript", "onnx")
"""What a checkpoint can be run with; the last two are exported first."""


def _torchscript(directory: Path, info: RuntimeInfo, threads: int | None, manifest: Manifest) -> Runtime:
    from txl_deploy.runtimes.torchscript import TorchScriptRuntime

    return TorchScriptRuntime(manifests.artifact_file(directory, "model.pt"), info)


def _onnx(directory: Path, info: RuntimeInfo, threads: int | None, manifest: Manifest) -> Runtime:
    from txl_deploy.runtimes.onnxrt import OnnxRuntime

    path = manifests.artifact_file(directory, "model.onnx")
    claims.check_external_files(path, manifest)
    return OnnxRuntime(path, info, threads=threads)


def _tensorrt(directory: Path, info: RuntimeInfo, threads: int | None, manifest: Manifest) -> Runtime:
    from txl_deploy.runtimes.tensorrt import open_engine

    return open_engine(directory, info, manifest)


_OPENERS: dict[str, Callable[[Path, RuntimeInfo, int | None, Manifest], Runtime]] = {
    "torchscript": _torchscript,
    "onnx": _onnx,
    "trt": _tensorrt,
    "trt-rtx": _tensorrt,
}


def resolve_device(device: str, runtimes: Iterable[str] = (), dtype: str | None = None) -> str:
    """Return `cpu` or `cuda:0` for auto, cpu or cuda; auto is a GPU if PyTorch and all of `runtimes` can use one, and not for int8.

    Raises `EnvironmentUnfitError` if a GPU is asked for and PyTorch finds none.
    """
    if device == "auto" and dtype == "int8":
        device = "cpu"
    elif device == "auto" and "onnx" in runtimes:
        from txl_deploy.runtimes.onnxrt import has_cuda

        device = "auto" if has_cuda() else "cpu"
    return device_named(device)


def use_threads(threads: int | None) -> None:
    """Limit the CPU threads of PyTorch; None keeps its own choice."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def open_artifact(directory: Path, *, device: str = "cpu", threads: int | None = None) -> Runtime:
    """Open an exported model, after checking every byte of it against its manifest, and what really runs against what it claims.

    Raises:
        ManifestError: the folder is no artifact, or is not what its manifest says.
        EnvironmentUnfitError: its runtime is not installed, or the device is absent.
        ValidationError: it claims another format, precision or device than it has.
    """
    manifest = manifests.read_verified(directory)
    claims.check_format(manifest, directory)
    use_threads(threads)
    info = RuntimeInfo(
        name=manifest.format,
        provider=manifest.format,
        device=resolve_device(device, [manifest.format], manifest.settings.dtype),
        dtype=manifest.settings.dtype,
        memory=manifest.settings.memory,
        memory_dtype=manifest.settings.memory_dtype,
        head=manifest.settings.head,
        served=manifest.served,
        min_batch=manifest.batch.min,
        max_batch=manifest.batch.max,
        tgt_len=manifest.settings.tgt_len,
        config=artifact_config(manifest),
        origin=str(directory),
        manifest_sha256=file_sha256(directory / manifests.FILE_NAME),
        checkpoint_sha256=manifest.source.checkpoint_sha256,
    )
    runtime = _OPENERS[manifest.format](directory, info, threads, manifest)
    claims.audit(runtime.info, manifest)
    return runtime


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
    memory: MemoryKind | None = None,
    mem_len: int | None = None,
    ext_len: int | None = None,
    clamp_len: int | None = None,
    same_length: bool | None = None,
    same_length_rule: SameLengthRule | None = None,
    dtype: str = "fp32",
    head: HeadKind = "nll",
    device: str = "cpu",
    threads: int | None = None,
    compiled: bool = False,
    packed: bool = True,
) -> tuple[EagerRuntime, Checkpoint]:
    """Open a checkpoint in PyTorch with other lengths where they are given: eager in FP32 the reference of every comparison.

    `packed` is that of `EagerRuntime`.

    Raises:
        CheckpointError: it is damaged.
        ValidationError: a weight is too large for `dtype`.
        EnvironmentUnfitError: the device is absent, or it cannot be compiled for it, or has no products of int8.
        UsageError: int8 was asked for where it is not for.
    """
    from txl_train.checkpoint import load_model
    from txl_train.model.inference import with_lengths
    from txl_train.model.memory import best_memory_kind

    use_threads(threads)
    where = resolve_device(device, dtype=dtype)
    model, checkpoint = load_model(path)
    model.to(where)
    config = with_lengths(
        model.config,
        mem_len=mem_len,
        ext_len=ext_len,
        clamp_len=clamp_len,
        same_length=same_length,
        same_length_rule=same_length_rule,
    )
    runtime = _pytorch_runtime(compiled)(
        model,
        tgt_len=checkpoint.eval_tgt_len if tgt_len is None else tgt_len,
        memory=memory or best_memory_kind(config),
        config=config,
        dtype=dtype,
        head=head,
        origin=str(path),
        checkpoint_sha256=checkpoint.sha256,
        packed=packed,
    )
    claims.audit(runtime.info)
    return runtime, checkpoint


def _pytorch_runtime(compiled: bool) -> type[EagerRuntime]:
    if compiled:
        from txl_deploy.runtimes.compiled import CompiledRuntime

        return CompiledRuntime
    from txl_deploy.runtimes.eager import EagerRuntime

    return EagerRuntime
