"""Turns what a user names, a checkpoint or an artifact and a runtime, into a runtime and the facts about its data."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, cast

from txl_deploy import manifest as manifests
from txl_deploy.corpora import ModelData
from txl_deploy.export.artifact import VOCABULARY_FILE, ExportRequest, export_artifact
from txl_deploy.manifest import Dtype
from txl_deploy.runtimes.base import HeadError, Runtime
from txl_deploy.runtimes.registry import eager_from_checkpoint, open_artifact, resolve_device
from txl_train.config import HeadKind, MemoryKind, SameLengthRule
from txl_train.data.vocabulary import Vocabulary
from txl_train.errors import ManifestError, UsageError


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Lengths that a user asks for; None keeps those of the checkpoint or artifact."""

    tgt_len: int | None = None
    mem_len: int | None = None
    ext_len: int | None = None
    clamp_len: int | None = None
    same_length: bool | None = None
    same_length_rule: SameLengthRule | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return them by name, as arguments for whoever opens or exports a checkpoint."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


@dataclass(frozen=True)
class Opened:
    """A runtime, and where its text and vocabulary come from."""

    runtime: Runtime
    model_data: ModelData
    origin: str
    """What the user named: the checkpoint or the artifact."""
    of_length: Callable[[int], Runtime]
    """Opens the same model, in the same way, for segments of so many tokens without extension; a `UsageError` for an artifact."""


@contextlib.contextmanager
def open_checkpoint(
    path: Path,
    *,
    runtime: str,
    lengths: Lengths,
    memory: MemoryKind | None = None,
    dtype: Dtype | None = None,
    head: HeadKind = "nll",
    device: str = "cpu",
    threads: int | None = None,
    keep: Path | None = None,
) -> Iterator[Opened]:
    """Yield `path` in one of `registry.RUNTIME_NAMES`; torchscript and onnx are exported first, to `keep` or into a temporary folder.

    Args:
        dtype: of weights, products and states, which are fp32 beside int8; None means fp32.

    Raises:
        UsageError: there is no such checkpoint, something else is at `keep`, or int8 was asked for of another runtime or on a GPU.
        CheckpointError: it is damaged.
        ValidationError: what was exported computes something else than the checkpoint, or fp16 cannot hold it.
        EnvironmentUnfitError: the runtime or what it compiles with is not installed, or the device is absent.
    """
    chosen: Dtype = dtype or "fp32"
    if chosen == "int8":
        _check_int8(runtime, device)
        device = "cpu"
    if runtime in ("pytorch", "compiled"):
        eager, checkpoint = eager_from_checkpoint(
            path,
            memory=memory,
            dtype=chosen,
            head=head,
            device=device,
            threads=threads,
            compiled=runtime == "compiled",
            **lengths.as_dict(),
        )
        data = ModelData(checkpoint.dataset, checkpoint.vocabulary, checkpoint.data_folder)
        del checkpoint  # whose weights would stay beside those that were packed or rounded
        yield Opened(eager, data, str(path), eager.of_length)
        return
    resolve_device(device, [runtime], chosen)  # before the work of exporting
    with tempfile.TemporaryDirectory(prefix="txl-") as folder:

        def export(out: Path, wanted: Lengths) -> Opened:
            form = cast(Literal["onnx", "torchscript"], runtime)
            export_artifact(
                ExportRequest(checkpoint=path, out=out, format=form, memory=memory, dtype=chosen, head=head, **wanted.as_dict())
            )
            return open_exported(out, device=device, threads=threads)

        @functools.cache
        def of_length(tgt_len: int) -> Runtime:
            return export(Path(folder) / f"{runtime}-{tgt_len}", dataclasses.replace(lengths, tgt_len=tgt_len, ext_len=0)).runtime

        opened = export(keep or Path(folder) / runtime, lengths)
        yield dataclasses.replace(opened, origin=str(path), of_length=of_length)


def open_exported(
    directory: Path,
    *,
    lengths: Lengths | None = None,
    memory: MemoryKind | None = None,
    dtype: Dtype | None = None,
    head: HeadKind | None = None,
    device: str = "cpu",
    threads: int | None = None,
) -> Opened:
    """Open an artifact; lengths, a kind of memory, a type and a head other than those it was exported for are refused.

    Raises:
        UsageError: naming what it has and the command that exports others.
        HeadError: it has another head.
        ManifestError: it is damaged.
        ValidationError: it is not what it claims to be.
        EnvironmentUnfitError: what runs it is not here.
    """
    manifest = manifests.read_manifest(directory)
    _check_head(manifest, head, directory)
    _check_dtype(manifest, dtype, directory)
    runtime = open_artifact(directory, device=device, threads=threads)
    if lengths is not None:
        _check_lengths(runtime, lengths, memory, directory)
    vocabulary = Vocabulary.load(manifests.artifact_file(directory, VOCABULARY_FILE))
    if vocabulary.sha256 != manifest.vocabulary_sha256:
        raise ManifestError(
            f"{directory} holds another vocabulary than its manifest says.", remedy="Export the checkpoint again with `txl export`."
        )
    data = ModelData(manifest.dataset, vocabulary, manifest.data)
    return Opened(runtime, data, str(directory), functools.partial(_refuse_other_length, directory, runtime.info.tgt_len))


_YIELDS: dict[HeadKind, str] = {
    "nll": "the nll of given targets",
    "logits": "logits of the next token",
    "log_probs": "log p of the next token",
}


def _check_head(manifest: manifests.Manifest, head: HeadKind | None, directory: Path) -> None:
    """Refuse a head that does not compute what is needed, before anything is loaded."""
    has = manifest.settings.head
    if head is not None and has != head:
        raise HeadError(
            f"{directory} yields {_YIELDS[has]}, but this takes {_YIELDS[head]}.",
            remedy=f"Export the checkpoint again with `--head {head.replace('_', '-')}`.",
        )


def _check_int8(runtime: str, device: str) -> None:
    if runtime not in ("pytorch", "onnx"):
        raise UsageError(
            f"int8 is for the runtimes pytorch and onnx, not for {runtime}.", remedy="Use one of these, or `--dtype fp32` or `fp16`."
        )
    if device.startswith("cuda"):
        raise UsageError("int8 is for CPUs, not for GPUs.", remedy="Use `--dtype fp16`, or `--device cpu`.")


def _check_dtype(manifest: manifests.Manifest, dtype: Dtype | None, directory: Path) -> None:
    has = manifest.settings.dtype
    if dtype is not None and has != dtype:
        raise UsageError(
            f"{directory} was exported for `--dtype` {has}, but {dtype} was asked for: that is fixed in an exported model.",
            remedy=f"Leave the option out, or export the checkpoint again with `--dtype {dtype}`.",
        )


def _check_lengths(runtime: Runtime, lengths: Lengths, memory: MemoryKind | None, directory: Path) -> None:
    info = runtime.info
    config = info.config
    clamp_len = lengths.clamp_len if lengths.clamp_len is None or lengths.clamp_len > 0 else 0
    for name, asked, has in (
        ("tgt-len", lengths.tgt_len, info.tgt_len),
        ("mem-len", lengths.mem_len, config.mem_len),
        ("ext-len", lengths.ext_len, config.ext_len),
        ("clamp-len", clamp_len, config.clamp_len or 0),
        ("same-length", lengths.same_length, config.same_length),
        ("memory", memory, info.memory),
    ):
        if asked is not None and asked != has:
            raise UsageError(
                f"{directory} was exported for `--{name}` {has}, but {asked} was asked for: that is fixed in an exported model.",
                remedy="Leave the option out, or export the checkpoint again with it.",
            )
    if config.same_length and lengths.same_length_rule not in (None, config.same_length_rule):
        raise UsageError(
            f"{directory} was exported for `--same-length` over {config.same_length_rule} keys, but {lengths.same_length_rule} were "
            "asked for: that is fixed in an exported model.",
            remedy="Evaluate the checkpoint instead, with `--checkpoint FILE`.",
        )


def _refuse_other_length(directory: Path, tgt_len: int, asked: int) -> NoReturn:
    raise UsageError(
        f"{directory} takes segments of {tgt_len} tokens only, and this evaluation has some of {asked} that cannot be filled up, as what "
        "follows depends on them.",
        remedy="Evaluate the checkpoint instead, with `--checkpoint FILE --runtime torchscript` or `onnx`, or leave out `--repeat`.",
    )
