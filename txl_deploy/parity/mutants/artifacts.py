"""Artifact folders made wrong: a graph that is written anew, and a format that is not what lies there."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from txl_deploy.manifest import FILE_NAME, Format, Manifest, read_manifest, write_manifest

if TYPE_CHECKING:
    import onnx

MODEL = "model.onnx"
_EXTERNAL = "model.onnx_data"


def copy_of(directory: Path, folder: Path) -> Path:
    """Copy an artifact to `folder`, which is made anew, and return that."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(directory, folder)
    return folder


def edit_graph(directory: Path, edit: Callable[[onnx.GraphProto], None]) -> None:
    """Change the graph of an ONNX artifact, and nothing else of it: its manifest is the old one."""
    import onnx

    path = directory / MODEL
    external = (directory / _EXTERNAL).exists()
    model = onnx.load(str(path))
    edit(model.graph)
    (directory / _EXTERNAL).unlink(missing_ok=True)
    onnx.save_model(model, str(path), save_as_external_data=external, location=_EXTERNAL, size_threshold=1024)


def seal(directory: Path, **changes: object) -> Manifest:
    """Write the manifest anew, with the checksums of what lies there, as an exporter that made it so would have."""
    manifest = read_manifest(directory)
    return write_manifest(directory, dataclasses.replace(manifest, **changes), list(manifest.files))  # type: ignore[arg-type]


def relabel(directory: Path, form: Format) -> None:
    """Change the format that a manifest names by hand, and nothing else of it."""
    path = directory / FILE_NAME
    document = json.loads(path.read_text(encoding="utf-8"))
    document["format"] = form
    path.write_text(json.dumps(document, indent=2), encoding="utf-8")
