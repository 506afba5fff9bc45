"""`txl inspect`: says what a file or folder is, from what stands in it. Checks no checksums of artifacts: that is `txl verify`."""

from __future__ import annotations

import dataclasses
import json
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from txl_deploy.cli.options import echo_json, json_option, verbosity_options
from txl_deploy.manifest import FILE_NAME, read_manifest, unlisted, verify
from txl_train.errors import ArtifactError, UsageError

if TYPE_CHECKING:
    import onnx

KINDS = "an exported model (a folder with manifest.json), a checkpoint (.pt), a graph (.onnx) or a vocabulary (.json)"


@click.command("inspect")
@click.argument("path", type=click.Path(path_type=Path), metavar="X")
@click.option("--layers", is_flag=True, help="Of an engine, on its GPU: list each layer with the types it reads and yields.")
@json_option
@verbosity_options
def command(path: Path, layers: bool, as_json: bool) -> None:
    """Say what X is: an exported model's folder, a checkpoint, an ONNX graph or a vocabulary."""
    document = describe(path)
    if layers:
        if document.get("format") not in ("trt", "trt-rtx"):
            raise UsageError(f"{path} is no engine, and `--layers` lists an engine's.", remedy="Leave it out, or give an engine's folder.")
        from txl_deploy.runtimes.tensorrt import layers_of

        document["layers"] = layers_of(Path(document["path"]))
    if as_json:
        echo_json(document)
    else:
        for line in _lines(document):
            click.echo(line)
    if document.get("findings"):
        raise ArtifactError(f"{path} is not what its manifest says: `txl verify {path}` lists what was changed.")


def describe(path: Path) -> dict[str, Any]:
    """Return what is known of `path` as plain values; `kind` is artifact, checkpoint, onnx or vocabulary.

    Raises `UsageError` for anything else, and an `ArtifactError` or `DataError` for one of these that is damaged.
    """
    if not path.exists():
        raise UsageError(f"There is no {path}.", remedy=f"Give {KINDS}.")
    if path.is_dir():
        return _describe_folder(path)
    if path.name == FILE_NAME:
        return _describe_artifact(path.parent)
    with path.open("rb") as file:
        start = file.read(2)
    if path.suffix in (".pt", ".pth") or start == b"PK":
        return _describe_checkpoint(path)
    if path.suffix == ".onnx":
        return _describe_onnx(path)
    if start[:1] == b"{":
        return _describe_vocabulary(path)
    raise UsageError(f"{path} is nothing that txl knows.", remedy=f"Give {KINDS}.")


def _describe_folder(path: Path) -> dict[str, Any]:
    if (path / FILE_NAME).exists():
        return _describe_artifact(path)
    inside = sorted(entry for entry in path.iterdir() if entry.suffix in (".pt", ".onnx"))
    inside += sorted(entry.parent for entry in path.glob(f"*/{FILE_NAME}"))
    if inside:
        raise UsageError(
            f"{path} is no exported model: it has no {FILE_NAME}.", remedy=f"Did you mean {' or '.join(map(str, inside[:4]))}?"
        )
    raise UsageError(f"{path} is a folder without {FILE_NAME}, so it is no exported model.", remedy=f"Give {KINDS}.")


def _describe_artifact(directory: Path) -> dict[str, Any]:
    manifest = read_manifest(directory)
    findings = [f"{finding.file} {finding.message}" for finding in verify(directory)]
    document = {"kind": "artifact", "path": str(directory), **dataclasses.asdict(manifest), "not_listed": unlisted(directory, manifest)}
    return {**document, "findings": findings}


def _describe_checkpoint(path: Path) -> dict[str, Any]:
    if _is_torchscript(path):
        raise UsageError(
            f"{path} is a TorchScript program, which is part of an exported model.",
            remedy=f"Inspect its folder: `txl inspect {path.parent}`.",
        )
    from txl_train.checkpoint import load_checkpoint
    from txl_train.config import to_dict
    from txl_train.files import file_sha256

    checkpoint = load_checkpoint(path)
    return {
        "kind": "checkpoint",
        "path": str(path),
        "sha256": file_sha256(path),
        "bytes": path.stat().st_size,
        "parameters": sum(tensor.numel() for tensor in checkpoint.model.values()),
        "dtypes": sorted({str(tensor.dtype).removeprefix("torch.") for tensor in checkpoint.model.values()}),
        "dataset": checkpoint.dataset,
        "vocabulary": {"tokens": len(checkpoint.vocabulary), "unit": checkpoint.vocabulary.unit, "sha256": checkpoint.vocabulary.sha256},
        "progress": checkpoint.progress,
        "can_resume": checkpoint.training is not None,
        "model": to_dict(checkpoint.model_config),
        "run": checkpoint.run,
    }


def _is_torchscript(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return False  # damaged: loading it says how


def _describe_onnx(path: Path) -> dict[str, Any]:
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(str(path), load_external_data=False)
    except (DecodeError, ValueError) as error:
        raise ArtifactError(
            f"{path} is no ONNX graph, or is damaged: {error}.", remedy="Export it again with `txl export --format onnx`."
        ) from error
    if not model.graph.node:
        raise ArtifactError(f"{path} holds no graph.", remedy="Export it again with `txl export --format onnx`.")
    operators = Counter(node.op_type for node in model.graph.node)
    external = {
        entry.value for tensor in model.graph.initializer for entry in tensor.external_data if entry.key == "location"
    }  # files beside it that hold weights
    return {
        "kind": "onnx",
        "path": str(path),
        "bytes": path.stat().st_size,
        "ir_version": model.ir_version,
        "opset": {entry.domain or "ai.onnx": entry.version for entry in model.opset_import},
        "producer": f"{model.producer_name} {model.producer_version}".strip(),
        "metadata": {entry.key: entry.value for entry in model.metadata_props},
        "inputs": [_describe_tensor(value) for value in model.graph.input],
        "outputs": [_describe_tensor(value) for value in model.graph.output],
        "nodes": len(model.graph.node),
        "operators": dict(sorted(operators.items(), key=lambda item: (-item[1], item[0]))),
        "weights": len(model.graph.initializer),
        "external_files": sorted(external),
    }


def _describe_tensor(value: onnx.ValueInfoProto) -> dict[str, Any]:
    import onnx

    tensor = value.type.tensor_type
    axes = [axis.dim_param if axis.HasField("dim_param") else axis.dim_value for axis in tensor.shape.dim]
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name if tensor.elem_type else "no tensor"
    return {"name": value.name, "dtype": dtype, "axes": axes}


def _describe_vocabulary(path: Path) -> dict[str, Any]:
    from txl_train.data.vocabulary import FORMAT, Vocabulary

    try:
        is_vocabulary = json.loads(path.read_bytes().decode("utf-8", "surrogatepass")).get("format") == FORMAT
    except (ValueError, RecursionError):
        is_vocabulary = path.name.endswith(".vocab.json") or path.name == "vocabulary.json"  # damaged: loading it says how
    if not is_vocabulary:
        raise UsageError(f"{path} is JSON, but no vocabulary of txl.", remedy=f"Give {KINDS}.")
    vocabulary = Vocabulary.load(path)
    return {
        "kind": "vocabulary",
        "path": str(path),
        "tokens": len(vocabulary),
        "unit": vocabulary.unit,
        "eos_id": vocabulary.eos_id,
        "unk_id": vocabulary.unk_id,
        "sha256": vocabulary.sha256,
        "first": list(vocabulary.symbols[:10]),
    }


def _lines(document: dict[str, Any], indent: str = "") -> Iterator[str]:
    """Yield a document as indented text: one line for each plain value, tensor, or list of plain values."""
    width = max((len(key) for key, value in document.items() if not isinstance(value, dict)), default=0)
    for key, value in document.items():
        if isinstance(value, dict) and value:
            yield f"{indent}{key}:"
            yield from _lines(value, indent + "  ")
        elif key == "layers" and isinstance(value, list):
            yield f"{indent}{key}:"
            yield from (f"{indent}  {line}" for line in value)
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            yield f"{indent}{key}:"
            for item in value:
                yield f"{indent}  {_row(item)}"
        else:
            yield f"{indent}{key:<{width}}  {_plain(value)}"


def _row(item: dict[str, Any]) -> str:
    """Return a tensor, or anything else with a few values by name, as one line."""
    if {"name", "dtype", "axes"} <= item.keys():
        return f"{item['name']}  {item['dtype']}  [{', '.join(map(str, item['axes']))}]"
    values = [f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in item.items() if key != "name"]
    return "  ".join([str(item.get("name", "")), *values]).strip()


def _plain(value: object) -> str:
    if value is None or value in ([], {}, ""):
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) else str(value)
