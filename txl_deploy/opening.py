"""Turns what a user names, a checkpoint or an artifact and a runtime, into a runtime and the facts about its data."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from txl_deploy import manifest as manifests
from txl_deploy.corpora import ModelData
from txl_deploy.export.artifact import VOCABULARY_FILE, ExportRequest, export_artifact
from txl_deploy.runtimes.base import Runtime
from txl_deploy.runtimes.registry import eager_from_checkpoint, open_artifact, resolve_device
from txl_train.config import MemoryKind
from txl_train.data.vocabulary import Vocabulary
from txl_train.errors import ManifestError, UsageError


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Lengths that a user asks for; None keeps those of the checkpoint or artifact."""

    tgt_len: int | None = None
    mem_len: int | None = None
    clamp_len: int | None = None
    same_length: bool | None = None


@dataclass(frozen=True)
class Opened:
    """A runtime, and where its text and vocabulary come from."""

    runtime: Runtime
    model_data: ModelData
    origin: str
    """What the user named: the checkpoint or the artifact."""


@contextlib.contextmanager
def open_checkpoint(
    path: Path, *, runtime: str, lengths: Lengths, memory: MemoryKind | None = None, device: str = "cpu", threads: int | None = None
) -> Iterator[Opened]:
    """Yield `path` in the runtime asked for; other runtimes than `pytorch` are exported into a temporary folder first."""
    kind: MemoryKind = memory or "kv"
    if runtime == "pytorch":
        eager, checkpoint = eager_from_checkpoint(
            path,
            tgt_len=lengths.tgt_len,
            memory=kind,
            mem_len=lengths.mem_len,
            clamp_len=lengths.clamp_len,
            same_length=lengths.same_length,
            device=device,
            threads=threads,
        )
        yield Opened(eager, ModelData(checkpoint.dataset, checkpoint.vocabulary, checkpoint.data_folder), str(path))
        return
    resolve_device(device, [runtime])  # before the work of exporting
    with tempfile.TemporaryDirectory(prefix="txl-") as folder:
        out = Path(folder) / runtime
        export_artifact(
            ExportRequest(
                checkpoint=path,
                out=out,
                format=cast(Literal["onnx", "torchscript"], runtime),
                memory=kind,
                tgt_len=lengths.tgt_len,
                mem_len=lengths.mem_len,
                clamp_len=lengths.clamp_len,
                same_length=lengths.same_length,
            )
        )
        opened = open_exported(out, device=device, threads=threads)
        yield dataclasses.replace(opened, origin=str(path))


def open_exported(
    directory: Path,
    *,
    lengths: Lengths | None = None,
    memory: MemoryKind | None = None,
    device: str = "cpu",
    threads: int | None = None,
) -> Opened:
    """Open an artifact; lengths and a kind of memory other than those it was exported for are refused.

    Raises:
        UsageError: naming the lengths it has and the command that exports others.
        ManifestError: it is damaged.
    """
    runtime = open_artifact(directory, device=device, threads=threads)
    manifest = manifests.read_manifest(directory)
    if lengths is not None:
        _check_lengths(manifest, lengths, memory, directory)
    vocabulary = Vocabulary.load(manifests.artifact_file(directory, VOCABULARY_FILE))
    if vocabulary.sha256 != manifest.vocabulary_sha256:
        raise ManifestError(
            f"{directory} holds another vocabulary than its manifest says.", remedy="Export the checkpoint again with `txl export`."
        )
    return Opened(runtime, ModelData(manifest.dataset, vocabulary, manifest.data), str(directory))


def _check_lengths(manifest: manifests.Manifest, lengths: Lengths, memory: MemoryKind | None, directory: Path) -> None:
    settings = manifest.settings
    clamp_len = lengths.clamp_len if lengths.clamp_len is None or lengths.clamp_len > 0 else 0
    for name, asked, has in (
        ("tgt-len", lengths.tgt_len, settings.tgt_len),
        ("mem-len", lengths.mem_len, settings.mem_len),
        ("clamp-len", clamp_len, settings.clamp_len or 0),
        ("same-length", lengths.same_length, settings.same_length),
        ("memory", memory, settings.memory),
    ):
        if asked is not None and asked != has:
            raise UsageError(
                f"{directory} was exported for `--{name}` {has}, but {asked} was asked for: that is fixed in an exported model.",
                remedy="Leave the option out, or export the checkpoint again with it.",
            )
