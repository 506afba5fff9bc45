"""Small ONNX graphs and their manifests, made by hand: an export takes seconds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from txl_deploy.manifest import BatchRange, Manifest, Settings, Source, TensorRecord, write_manifest

WIDTH = 16
_ELEMENTS = {"float16": TensorProto.FLOAT16, "float32": TensorProto.FLOAT}


def write_graph(path: Path, *, dtype: str = "float16", n_layer: int = 1, operator: str = "Softmax") -> Path:
    """Write `operator((x + mems.0) @ weights)`, `n_layer` times over, of two inputs [batch_size, WIDTH], and return the path."""
    element = _ELEMENTS[dtype]
    weights = np.linspace(-1, 1, WIDTH * WIDTH, dtype=dtype).reshape(WIDTH, WIDTH)
    nodes = [helper.make_node("Add", ["x", "mems.0"], ["h0"])]
    for i in range(n_layer):
        nodes.append(helper.make_node("MatMul", [f"h{i}", f"weights.{i}"], [f"products.{i}"]))
        nodes.append(helper.make_node(operator, [f"products.{i}"], [f"h{i + 1}"], name=f"node {i}"))
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(name, element, ["batch_size", WIDTH]) for name in ("x", "mems.0")],
        [helper.make_tensor_value_info(f"h{n_layer}", element, ["batch_size", WIDTH])],
        [numpy_helper.from_array(weights, f"weights.{i}") for i in range(n_layer)],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), str(path))
    return path


def write_artifact(folder: Path, *, dtype: str = "float16", batch: int | None = None, inputs: Sequence[str] = ("x", "mems.0")) -> Path:
    """Write the folder of an exported graph: `write_graph`, and a manifest that says so; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_graph(folder / "model.onnx", dtype=dtype)
    write_manifest(folder, manifest(dtype=dtype, batch=batch, inputs=inputs), ["model.onnx"])
    return folder


def manifest(*, dtype: str = "float16", batch: int | None = None, inputs: Sequence[str] = ("x", "mems.0"), **changes: Any) -> Manifest:
    """Return a manifest of `write_graph`."""
    axes: list[str | int] = ["batch_size" if batch is None else batch, WIDTH]
    short: Any = {"float16": "fp16", "float32": "fp32"}[dtype]
    given: dict[str, Any] = {
        "format": "onnx",
        "source": Source(checkpoint_sha256="0" * 64, checkpoint_name="checkpoint.pt"),
        "model": {},
        "settings": Settings(
            tgt_len=5,
            mem_len=7,
            clamp_len=None,
            same_length=False,
            same_length_rule="mem_len+1",
            memory="hidden",
            dtype=short,
            memory_dtype=short,
        ),
        "batch": BatchRange(),
        "inputs": [TensorRecord(name=name, dtype=dtype, axes=axes) for name in inputs],
        "outputs": [TensorRecord(name="h1", dtype=dtype, axes=axes)],
        "dataset": "text",
        "vocabulary_sha256": "1" * 64,
        "versions": {},
        "command": "txl export",
    }
    return Manifest(**{**given, **changes})
