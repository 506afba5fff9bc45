"""Writes one artifact: the graph in the asked format, the vocabulary, the manifest; all of it or nothing.

Everything is made in a folder beside the target, which takes the target's name only after the artifact's own runtime has been
compared with the checkpoint, so that a failed export never leaves anything under the good name.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import txl_train
from txl_deploy import manifest as manifests
from txl_deploy.bench.environment import git_commit
from txl_deploy.corpora import ModelData
from txl_deploy.export.audit import AuditText, audit, audit_text
from txl_deploy.export.onnx import FILE_NAME as ONNX_FILE
from txl_deploy.export.onnx import example_arguments, export_onnx
from txl_deploy.export.precision import onnx_precisions, require, torchscript_precisions
from txl_deploy.export.quantize import quantize_file
from txl_deploy.export.torchscript import FILE_NAME as TORCHSCRIPT_FILE
from txl_deploy.export.torchscript import export_torchscript
from txl_deploy.manifest import Dtype, Format, Manifest
from txl_deploy.parity.rollout import BATCH_SIZE, ParityResult, compare, random_segments
from txl_deploy.runtimes.base import TORCH_TYPES
from txl_deploy.runtimes.eager import EagerRuntime
from txl_deploy.runtimes.registry import open_artifact
from txl_deploy.signature import TensorSpec, step_signature
from txl_train import unfinished
from txl_train.checkpoint import load_model
from txl_train.config import HeadKind, MemoryKind, SameLengthRule, to_dict
from txl_train.errors import EnvironmentUnfitError, ManifestError, PackageMissingError, UsageError, ValidationError
from txl_train.model.inference import STEPS, with_lengths
from txl_train.model.memory import best_memory_kind

VOCABULARY_FILE = "vocabulary.json"
_PACKAGES = {"onnx": ("torch", "onnx", "onnxscript"), "torchscript": ("torch",)}


@dataclass(frozen=True, kw_only=True)
class ExportRequest:
    """What to export, and for which lengths; None keeps the checkpoint's own."""

    checkpoint: Path
    out: Path
    format: Format
    memory: MemoryKind | None = None
    tgt_len: int | None = None
    mem_len: int | None = None
    ext_len: int | None = None
    clamp_len: int | None = None
    same_length: bool | None = None
    same_length_rule: SameLengthRule | None = None
    head: HeadKind = "nll"
    dtype: Dtype = "fp32"
    memory_dtype: Dtype | None = None
    """None takes `dtype`, and fp32 beside int8."""
    batch_size: int | None = None
    """The only number of streams a step takes; None means any."""
    dataset: str | None = None
    data: Path | None = None
    """Text for the audit of fp16 and the check of int8; None takes what the checkpoint was trained on, or random tokens where that is not
    here."""
    overwrite: bool = False
    command: str = "txl export"


@dataclass(frozen=True)
class Exported:
    """What was written, and how it compared with the checkpoint (`parity` is None where its runtime is not installed here)."""

    directory: Path
    manifest: Manifest
    parity: ParityResult | None
    checked_on: str = "random tokens"
    """What the two were compared on."""


def export_artifact(request: ExportRequest) -> Exported:
    """Export a checkpoint.

    Raises:
        UsageError: the target exists, or int8 was asked for of what cannot be int8.
        ValidationError: float16 cannot hold what the checkpoint computes; the exported graph is invalid or not of the types that were
            asked for; or it computes something else than the checkpoint.
    """
    check_int8(request)
    check_target(request.out, overwrite=request.overwrite)
    model, checkpoint = load_model(request.checkpoint)
    model.eval()
    config = with_lengths(
        model.config,
        mem_len=request.mem_len,
        ext_len=request.ext_len,
        clamp_len=request.clamp_len,
        same_length=request.same_length,
        same_length_rule=request.same_length_rule,
    )
    tgt_len = checkpoint.eval_tgt_len if request.tgt_len is None else request.tgt_len
    memory = request.memory or best_memory_kind(config)
    element: Dtype = "fp32" if request.dtype == "int8" else request.dtype  # of what is exported, before its layers become int8
    memory_dtype = request.memory_dtype or element
    findings, text = None, None
    if "fp16" in (request.dtype, memory_dtype) or request.dtype == "int8":
        known = ModelData(checkpoint.dataset, checkpoint.vocabulary, checkpoint.data_folder)
        text = audit_text(known, config, tgt_len=tgt_len, dataset=request.dataset, data=request.data)
    if text is not None and request.dtype != "int8":
        findings = audit(model, config, text, tgt_len=tgt_len, memory=memory, dtype=request.dtype, memory_dtype=memory_dtype)
    step = STEPS[request.head](model, tgt_len, memory, config, dtype=TORCH_TYPES[element], memory_dtype=TORCH_TYPES[memory_dtype])
    assert checkpoint.sha256 is not None  # it was loaded from a file
    source_sha256 = checkpoint.sha256
    signature = step_signature(
        config, tgt_len=tgt_len, memory=memory, head=request.head, memory_dtype=memory_dtype, batch=request.batch_size
    )
    with folder_beside(request.out, overwrite=request.overwrite) as directory:
        if request.format == "onnx":
            metadata = {
                "checkpoint_sha256": source_sha256,
                "vocabulary_sha256": checkpoint.vocabulary.sha256,
                "tgt_len": str(tgt_len),
                "mem_len": str(config.mem_len),
                "ext_len": str(config.ext_len),
                "clamp_len": str(config.clamp_len),
                "same_length": str(config.same_length).lower(),
                "same_length_rule": config.same_length_rule,
                "memory": memory,
                "dtype": request.dtype,
                "memory_dtype": memory_dtype,
                "head": request.head,
            }
            files = export_onnx(step, directory, metadata, batch_size=request.batch_size)
            if request.dtype == "int8":
                files = quantize_file(directory)
            precisions = onnx_precisions(directory / ONNX_FILE)
            require(precisions, dtype=request.dtype, memory_dtype=memory_dtype, path=directory / ONNX_FILE)
        else:
            files = export_torchscript(step, directory)
            precisions = torchscript_precisions(directory / TORCHSCRIPT_FILE, example_arguments(step, request.batch_size or 1))
            require(precisions, dtype=request.dtype, memory_dtype=memory_dtype, path=directory / TORCHSCRIPT_FILE)
        checkpoint.vocabulary.save(directory / VOCABULARY_FILE)
        manifest = manifests.write_manifest(
            directory,
            Manifest(
                format=request.format,
                source=manifests.Source(checkpoint_sha256=source_sha256, checkpoint_name=request.checkpoint.name),
                model=to_dict(config),
                settings=manifests.Settings(
                    tgt_len=tgt_len,
                    mem_len=config.mem_len,
                    clamp_len=config.clamp_len,
                    same_length=config.same_length,
                    same_length_rule=config.same_length_rule,
                    memory=memory,
                    dtype=request.dtype,
                    memory_dtype=memory_dtype,
                    head=request.head,
                ),
                batch=manifests.BatchRange(min=request.batch_size or 1, max=request.batch_size),
                inputs=[_record(spec) for spec in signature.inputs],
                outputs=[_record(spec) for spec in signature.outputs],
                dataset=checkpoint.dataset,
                data=checkpoint.data_folder,
                vocabulary_sha256=checkpoint.vocabulary.sha256,
                versions={"txl": txl_train.__version__} | {name: importlib.metadata.version(name) for name in _PACKAGES[request.format]},
                command=request.command,
                git_commit=git_commit(),
                precisions=precisions.counts(),
                audit=findings,
            ),
            [*files, VOCABULARY_FILE],
        )
        try:
            runtime = open_artifact(directory)
        except PackageMissingError:
            return Exported(request.out, manifest, None)
        reference = EagerRuntime(model, tgt_len=tgt_len, memory=memory, config=config, head=request.head, origin=str(request.checkpoint))
        checked_on, segments = "random tokens", random_segments(config, tgt_len=tgt_len, batch_size=request.batch_size or BATCH_SIZE)
        if request.dtype == "int8" and text is not None and _takes(request, text):
            facts, segments = text.description, text.segments
            checked_on = f"{facts['dataset']} {facts['split']}" if facts["kind"] == "text" else facts["kind"]
        parity = compare(reference, runtime, segments)
        if not parity.passed:
            remedy = "constraints.txt names versions of torch, onnx and onnxruntime that work."
            if "fp16" in (request.dtype, memory_dtype):
                remedy = f"Try `--dtype fp32 --memory-dtype fp32`; if that fails too, {remedy}"
            if request.dtype == "int8":
                remedy = f"Use `--dtype fp32` for this checkpoint; if that fails too, {remedy}"
            raise ValidationError(
                f"The exported model computes something else than {request.checkpoint}: {parity.reason}. Nothing was written.",
                remedy=remedy,
            )
    return Exported(request.out, manifest, parity, checked_on)


def check_int8(request: ExportRequest) -> None:
    """Raise `UsageError` for int8 of a format or with states that it is not for."""
    if request.dtype == "int8" and request.format != "onnx":
        raise UsageError(
            f"int8 is for ONNX on a CPU, not for {request.format}.", remedy="Use `--format onnx`, or `--dtype fp32` or `fp16`."
        )
    if request.dtype == "int8" and request.memory_dtype not in (None, "fp32"):
        raise UsageError(
            f"Beside int8 the states stay fp32, and `--memory-dtype {request.memory_dtype}` was asked for.",
            remedy="Leave out `--memory-dtype`.",
        )
    if request.memory_dtype == "int8":
        raise UsageError("States are fp32 or fp16, never int8.", remedy="Leave out `--memory-dtype`.")


def _takes(request: ExportRequest, text: AuditText) -> bool:
    """Return whether the export takes as many streams as the text was cut into."""
    return request.batch_size in (None, len(text.segments[0].input_ids_BT))


def check_target(out: Path, *, overwrite: bool, is_ours: Callable[[Path], bool] = lambda folder: False) -> None:
    """Refuse to write over anything, except with `overwrite` over an artifact and nothing else, or what `is_ours`. Raises `UsageError`."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    elsewhere = "Choose another folder with `--out`."
    try:
        strangers = manifests.unlisted(out, manifests.read_manifest(out))
    except (ManifestError, OSError):
        if not is_ours(out):
            raise UsageError(f"{out} exists and is no exported model.", remedy=elsewhere) from None
        strangers = []
    if not overwrite:
        raise UsageError(f"{out} holds an exported model already.", remedy=f"{elsewhere} `--overwrite` replaces it.")
    if strangers:
        raise UsageError(f"{out} holds files that are not of the exported model: {', '.join(strangers[:5])}.", remedy=elsewhere)


def _record(spec: TensorSpec) -> manifests.TensorRecord:
    return manifests.TensorRecord(name=spec.name, dtype=spec.dtype, axes=list(spec.axes))


@contextlib.contextmanager
def folder_beside(out: Path, *, overwrite: bool, is_ours: Callable[[Path], bool] = lambda folder: False) -> Iterator[Path]:
    """Yield a new folder that becomes `out` if the body ends without an error, and vanishes otherwise.

    An `OSError` in between (no permission, full disk) becomes an `EnvironmentUnfitError`.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with unfinished.folder_beside(out) as folder:
            yield folder
            folder.chmod(0o755)
            _take_name(folder, out, overwrite=overwrite, is_ours=is_ours)
    except OSError as error:
        raise EnvironmentUnfitError(
            f"{out} cannot be written: {error.strerror or error}.",
            remedy="Free some disk space, allow writing there, or name another folder with `--out`. Nothing was changed there.",
        ) from error


def _take_name(folder: Path, out: Path, *, overwrite: bool, is_ours: Callable[[Path], bool]) -> None:
    """Give a finished folder its name; what had it, if that may go, gets the folder's."""
    try:
        os.rename(folder, out)  # succeeds where there is nothing, or an empty folder
    except OSError:
        if not out.exists():
            raise
        check_target(out, overwrite=overwrite, is_ours=is_ours)
        unfinished.exchange(folder, out)
