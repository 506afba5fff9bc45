"""What an exported model is: made from which checkpoint, for which shapes and settings, by which versions, with which checksums.

An artifact is a folder whose `manifest.json` is this. It holds no time: the same command on the same checkpoint by the same versions
gives the same bytes. Knows the JSON and the checksums; what the settings mean is known where they are used.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from txl_deploy import documents
from txl_train.config import HeadKind, MemoryKind, SameLengthRule
from txl_train.errors import ManifestError
from txl_train.files import file_sha256

FILE_NAME = "manifest.json"
SCHEMA_VERSION = 2
RECEIPT_NAMES = r"receipt(-\w+)?\.json"
PARENT_FILE = "parent.json"
"""The manifest of the graph that an engine or a graph for servers was made from, kept beside it."""

Format = Literal["onnx", "torchscript", "trt", "trt-rtx"]
MODEL_FILES: dict[str, str] = {"onnx": "model.onnx", "torchscript": "model.pt", "trt": "model.plan", "trt-rtx": "model.plan"}
"""The file that each format keeps the model in."""
BUILDER_FORMATS: dict[str, Format] = {"tensorrt": "trt", "tensorrt_rtx": "trt-rtx"}
"""The format of the engines that each package builds and runs."""
Dtype = Literal["fp32", "fp16", "int8"]
"""Of weights and products. int8 is for graphs of ONNX alone, and never the type of states."""


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """One file of the artifact."""

    sha256: str
    """Checksum of its bytes, 64 hexadecimal digits."""
    bytes: int
    """Its size."""


@dataclass(frozen=True, kw_only=True)
class Parent:
    """The artifact that another one was made from: the graph of an engine, or of a graph in the form for servers. Its manifest lies beside
    that as `parent.json`."""

    manifest_sha256: str
    """Checksum of its `manifest.json`."""
    format: Format
    """How it stores the model."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """The checkpoint an artifact was made from, and what lies between."""

    checkpoint_sha256: str
    """Checksum of the checkpoint file."""
    checkpoint_name: str
    """Its file name, without the folder."""
    parent: Parent | None = None
    """None where the artifact was made from the checkpoint itself."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What changes the numbers an artifact computes and is not in its weights."""

    tgt_len: int
    """Tokens per stream and step."""
    mem_len: int
    """Past positions kept per layer, in tokens."""
    clamp_len: int | None
    """Distances above it share one encoding, in tokens; none means no limit."""
    same_length: bool
    """Every token attends to the same number of keys."""
    same_length_rule: SameLengthRule
    """How many keys that is."""
    memory: MemoryKind
    """What the memory holds: hidden states, or projected keys and values."""
    dtype: Dtype
    """Type of the weights and of the matrix products; of int8 those of linear layers, and fp32 all else."""
    memory_dtype: Dtype = "fp32"
    """Type of the states."""
    head: HeadKind = "nll"
    """What a step yields: nll of given targets, or logits or log p of every word as the next one."""


@dataclass(frozen=True, kw_only=True)
class BatchRange:
    """Numbers of streams that a step accepts."""

    min: int = 1
    max: int | None = None
    """None means any."""
    opt: int | None = None
    """The one that an engine was tuned for; None where there is none."""


@dataclass(frozen=True, kw_only=True)
class ProfileRecord:
    """The shapes of one input that an engine takes."""

    name: str
    min: list[int]
    opt: list[int]
    max: list[int]


@dataclass(frozen=True, kw_only=True)
class EngineFacts:
    """What an engine is bound to: it is refused anywhere else, before any native code sees it."""

    builder: Literal["tensorrt", "tensorrt_rtx"]
    """The package that built it, which alone can run it."""
    builder_version: str
    """Its exact version, which alone can run it."""
    target: str
    """Name of the target in engines/targets that it was built for."""
    compute_capability: str | None
    """Such as 7.5; None for an engine that fits every GPU its builder supports (`hardware_compatibility` says which)."""
    hardware_compatibility: str = "none"
    """none, ampere_plus, same_compute_capability or portable."""
    gpu: str | None = None
    """Name of the GPU it was built on; None where it was built without one."""
    driver: str | None = None
    """NVIDIA driver it was built with."""
    profiles: list[ProfileRecord] = field(default_factory=list)
    """Shapes of its inputs, in the order of the call."""


@dataclass(frozen=True, kw_only=True)
class TensorRecord:
    """One input or output of the graph, in the order of the call."""

    name: str
    dtype: str
    """Element type by its numpy name, such as int64 or float32."""
    axes: list[str | int]
    """Each axis: its fixed length, or its name where the length is free."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content of `manifest.json`."""

    schema_version: int = SCHEMA_VERSION
    format: Format
    """How the model is stored."""
    files: dict[str, FileRecord] = field(default_factory=dict)
    """Every file of the artifact but the manifest, by its path within the folder."""
    source: Source
    model: dict[str, Any]
    """The model's settings as `txl_train.config.to_dict` gives them, those of `settings` included."""
    settings: Settings
    batch: BatchRange = BatchRange()
    inputs: list[TensorRecord]
    """In the order of the call. TorchScript takes `target_rows.*` and the states as two lists, so laid out here."""
    outputs: list[TensorRecord]
    dataset: str
    """Name of the data set that the model was trained on."""
    data: str | None = None
    """Folder of that data set as the training was given it."""
    vocabulary_sha256: str
    """Checksum of the vocabulary."""
    versions: dict[str, str]
    """Version of each package that took part, by name."""
    command: str
    """The command that made it."""
    git_commit: str | None = None
    """Commit of txl's own source tree, with `+changes` where it differs from that; None for an installed package."""
    engine: EngineFacts | None = None
    """What an engine is bound to; None for graphs."""
    precisions: dict[str, dict[str, int]] = field(default_factory=dict)
    """Real precisions as read back from what was written: how many weights, products (and layers of an engine) of each type."""
    audit: dict[str, Any] | None = None
    """Of fp16: the largest magnitude at each point against what fp16 holds (`export.audit`); None for fp32."""

    def __post_init__(self) -> None:
        if (self.engine is not None) != (self.format in ("trt", "trt-rtx")):
            raise ManifestError(f"`engine` must be there for engines and for nothing else, but `format` is {self.format}.")
        if (self.engine is not None or self.served) != (self.source.parent is not None):
            raise ManifestError(
                f"`source.parent` must be there for engines and graphs for servers and for nothing else, but `format` is {self.format}."
            )
        if self.engine is not None and (self.batch.max is None or self.source.parent is None or self.source.parent.format != "onnx"):
            raise ManifestError("An engine must have a largest batch, and an ONNX graph that it was built from.")
        if self.settings.dtype == "int8" and (self.format != "onnx" or self.settings.memory_dtype != "fp32"):
            raise ManifestError("`settings.dtype` int8 is for ONNX graphs with states of fp32.")
        if self.settings.memory_dtype == "int8":
            raise ManifestError("`settings.memory_dtype` must be fp32 or fp16, but is int8 instead.")
        for name in self.files:
            _check_file_name(name)
        for where, value in (
            ("source.checkpoint_sha256", self.source.checkpoint_sha256),
            ("vocabulary_sha256", self.vocabulary_sha256),
            *([] if self.source.parent is None else [("source.parent.manifest_sha256", self.source.parent.manifest_sha256)]),
            *((f"files.{name}.sha256", record.sha256) for name, record in self.files.items()),
        ):
            if not re.fullmatch("[0-9a-f]{64}", value):
                raise ManifestError(f"`{where}` must be 64 hexadecimal digits, but is {value!r} instead.")
        for where, number, low in (
            ("settings.tgt_len", self.settings.tgt_len, 1),
            ("settings.mem_len", self.settings.mem_len, 0),
            ("settings.clamp_len", self.settings.clamp_len, 1),
            ("batch.min", self.batch.min, 1),
            ("batch.max", self.batch.max, self.batch.min),
            *((f"files.{name}.bytes", record.bytes, 0) for name, record in self.files.items()),
        ):
            if number is not None and number < low:
                raise ManifestError(f"`{where}` must be {low} or more, but is {number} instead.")

    @property
    def served(self) -> bool:
        """Whether the graph has the form for servers (`signature.step_signature`), which its valid lengths tell."""
        return any(record.name == "memory_length" and len(record.axes) == 2 for record in self.inputs)


@dataclass(frozen=True)
class Finding:
    """Something about an artifact that is not as its manifest says."""

    file: str
    """Path within the folder."""
    problem: Literal["missing", "changed", "unreadable", "outside", "other checkpoint", "other parent"]
    message: str


def write_manifest(directory: Path, manifest: Manifest, files: Iterable[str]) -> Manifest:
    """Add the checksums of `files` (paths within `directory`) to `manifest`, write `manifest.json` there, return what was written.

    Written last and in one step, so a folder without one is an unfinished export. Raises `ManifestError` for a name that leaves the folder.
    """
    records = {}
    for name in sorted(files):
        path = artifact_file(directory, name)
        records[name] = FileRecord(sha256=file_sha256(path), bytes=path.stat().st_size)
    complete = dataclasses.replace(manifest, files=records)
    target = directory / FILE_NAME
    partial = target.with_suffix(".partial")
    with partial.open("w", encoding="utf-8", newline="\n") as file:
        file.write(documents.to_text(complete))
        file.flush()
        os.fsync(file.fileno())
    partial.replace(target)
    return complete


def read_manifest(directory: Path) -> Manifest:
    """Return the manifest of an artifact folder, without looking at the files it lists.

    Raises `ManifestError` if there is none, if a byte of its content was changed, or if it says what this version does not know.
    """
    return _read(directory, directory / FILE_NAME)


def read_parent(directory: Path) -> Manifest:
    """Return the manifest of the graph that the engine in `directory` was built from. Raises what `read_manifest` raises."""
    return _read(directory, artifact_file(directory, PARENT_FILE))


def _read(directory: Path, path: Path) -> Manifest:
    remedy = "Export the checkpoint again with `txl export`."
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError) as error:
        if directory.is_file():
            raise ManifestError(f"{directory} is a file.", remedy=f"Give the exported model's folder: {directory.parent}.") from error
        if (directory / "kit.json").exists():
            raise ManifestError(
                f"{directory} is a kit that builds an engine on its target, and no exported model yet.",
                remedy=f"Run `sh build.sh` in it there, and give {directory / 'engine'}.",
            ) from error
        if not directory.exists():
            raise ManifestError(
                f"There is no folder {directory}.", remedy="Give the folder that `txl export --out` has written."
            ) from error
        raise ManifestError(
            f"{directory} has no {path.name}, so it is no exported model.", remedy="Give the folder that `txl export --out` has written."
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ManifestError(f"{path} cannot be read: {error}.", remedy=remedy) from error
    document = documents.parse(text, path, ManifestError, remedy)
    version = document.get("schema_version")
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise ManifestError(
            f"{path} has schema_version {version}, but this version of txl knows only up to {SCHEMA_VERSION}.",
            remedy="Upgrade txl, or export the checkpoint again with this version.",
        )
    documents.check_content(document, path, ManifestError, remedy)
    if version == 1:
        document = _from_version_1(document)
    try:
        manifest = documents.from_plain(Manifest, document, error=ManifestError)
    except ManifestError as error:
        raise ManifestError(f"{path}: {error.message}", remedy=error.remedy or remedy) from error
    assert isinstance(manifest, Manifest)
    if manifest.schema_version != SCHEMA_VERSION:
        raise ManifestError(f"{path} has schema_version {manifest.schema_version}; the first one is 1.", remedy=remedy)
    return manifest


def artifact_file(directory: Path, name: str) -> Path:
    """Return the path of a file of an artifact. Raises `ManifestError` for a name or a symbolic link that leaves the folder."""
    _check_file_name(name)
    path = directory / name
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(directory)):
        raise ManifestError(
            f"`{name}` in {directory} is a link to a file outside the folder.", remedy="Copy the file itself into the folder."
        )
    return path


def verify(directory: Path, *, checkpoint: Path | None = None, parent: Path | None = None) -> list[Finding]:
    """Recompute the chain from an artifact to its checkpoint; an empty list means that all of it holds.

    Args:
        checkpoint: the file it should come from; None: only what is in the folder is looked at.
        parent: the folder of the graph that an engine should come from, which is verified too.

    Raises:
        ManifestError: a manifest itself cannot be trusted.
        OSError: `checkpoint` cannot be read.
    """
    manifest = read_manifest(directory)
    findings = _findings(directory, manifest, checkpoint)
    if parent is not None:
        expected = None if manifest.source.parent is None else manifest.source.parent.manifest_sha256
        findings += [dataclasses.replace(finding, file=f"{parent}/{finding.file}") for finding in verify(parent, checkpoint=checkpoint)]
        if expected is None:
            findings.append(Finding(FILE_NAME, "other parent", "was made from the checkpoint itself and not from another artifact"))
        elif file_sha256(parent / FILE_NAME) != expected:
            findings.append(Finding(FILE_NAME, "other parent", f"was built from another graph than the one in {parent}"))
    return findings


def read_verified(directory: Path, *, checkpoint: Path | None = None) -> Manifest:
    """Return the manifest of an artifact in which `verify` finds nothing. Raises `ManifestError` with what it found otherwise."""
    manifest = read_manifest(directory)
    findings = _findings(directory, manifest, checkpoint)
    if findings:
        raise ManifestError(
            f"{directory} is not what its manifest says: " + "; ".join(f"{finding.file} {finding.message}" for finding in findings) + ".",
            remedy="Export the checkpoint again with `txl export`.",
        )
    return manifest


def unlisted(directory: Path, manifest: Manifest) -> list[str]:
    """Return the files in the folder that the manifest does not list, sorted; nothing of an artifact is read from them. Receipts are made
    after the manifest, so they are not among its files and not told here."""
    found = (path.relative_to(directory).as_posix() for path in directory.rglob("*") if not path.is_dir())
    return sorted(name for name in found if name != FILE_NAME and name not in manifest.files and not re.fullmatch(RECEIPT_NAMES, name))


def _findings(directory: Path, manifest: Manifest, checkpoint: Path | None) -> list[Finding]:
    findings = []
    model = MODEL_FILES[manifest.format]
    if model not in manifest.files:
        findings.append(Finding(FILE_NAME, "missing", f"lists no {model}, so there is no model"))
    for name, record in manifest.files.items():
        finding = _examine(directory, name, record)
        if finding is not None:
            findings.append(finding)
    if checkpoint is not None:
        actual = file_sha256(checkpoint)
        expected = manifest.source.checkpoint_sha256
        if actual != expected:
            message = f"was made from {manifest.source.checkpoint_name} with sha256 {expected[:12]}…, but {checkpoint} has {actual[:12]}…"
            findings.append(Finding(FILE_NAME, "other checkpoint", message))
    if manifest.source.parent is not None and not any(finding.file == PARENT_FILE for finding in findings):
        findings += _examine_parent(directory, manifest, manifest.source.parent)
    return findings


def _examine_parent(directory: Path, manifest: Manifest, expected: Parent) -> list[Finding]:
    """Compare an engine with the manifest of its graph that lies beside it."""
    if PARENT_FILE not in manifest.files:
        return [Finding(PARENT_FILE, "missing", "is not among the files, though the engine was built from a graph")]
    if manifest.files[PARENT_FILE].sha256 != expected.manifest_sha256:
        return [Finding(PARENT_FILE, "other parent", "is not the manifest of the graph that the engine was built from")]
    parent = read_parent(directory)
    differing = [
        name
        for name, ours, theirs in (
            ("checkpoint", manifest.source.checkpoint_sha256, parent.source.checkpoint_sha256),
            ("vocabulary", manifest.vocabulary_sha256, parent.vocabulary_sha256),
            ("model", manifest.model, parent.model),
            ("settings", manifest.settings, parent.settings),
        )
        if ours != theirs
    ]
    return [Finding(PARENT_FILE, "other parent", f"names another {name} than the engine's manifest") for name in differing]


def _from_version_1(document: dict[str, Any]) -> dict[str, Any]:
    """Return a manifest of the first schema as one of this: it knew fp32 graphs with the head `nll` alone."""
    new = copy.deepcopy(document)
    new["schema_version"] = SCHEMA_VERSION
    for name, value in (("source", {"parent": None}), ("settings", {"memory_dtype": "fp32", "head": "nll"}), ("batch", {"opt": None})):
        if isinstance(new.get(name), dict):
            new[name] = value | new[name]
    return {"git_commit": None, "engine": None, "precisions": {}, "audit": None} | new


def _examine(directory: Path, name: str, record: FileRecord) -> Finding | None:
    try:
        path = artifact_file(directory, name)
        size = path.stat().st_size
        if size != record.bytes:
            return Finding(name, "changed", f"has {size} bytes instead of {record.bytes}")
        actual = file_sha256(path)
    except ManifestError:
        return Finding(name, "outside", "is a link to a file outside the folder")
    except FileNotFoundError:
        return Finding(name, "missing", "is missing")
    except OSError as error:
        return Finding(name, "unreadable", f"cannot be read: {error.strerror}")
    if actual != record.sha256:
        return Finding(name, "changed", f"was changed: its sha256 is {actual[:12]}… instead of {record.sha256[:12]}…")
    return None


def _check_file_name(name: str) -> None:
    path = PurePosixPath(name)
    if (
        path.is_absolute()
        or ".." in path.parts
        or "\\" in name
        or ":" in name
        or "\0" in name
        or "*" in name  # ONNX Runtime takes a file named */_ORT_MEM_ADDR_/* for an address in memory
        or name != str(path)
        or name in (".", FILE_NAME)
    ):
        raise ManifestError(
            f"`{name}` is no file name within an artifact's folder.", remedy="Export the checkpoint again with `txl export`."
        )
