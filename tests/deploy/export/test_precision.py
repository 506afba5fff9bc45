"""The types in an exported file are read back from the file, and one that is not of the asked type is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from tests.deploy.conftest import TGT_LEN
from tests.support import build_model, small_config
from txl_deploy.export.onnx import example_arguments
from txl_deploy.export.precision import Precisions, onnx_precisions, require, torchscript_precisions
from txl_deploy.export.torchscript import export_torchscript
from txl_train.errors import ValidationError
from txl_train.model.inference import InferenceStep

HALF = TensorProto.FLOAT16
FULL = TensorProto.FLOAT


def written(folder: Path, nodes: list[onnx.NodeProto], weights: dict[str, np.ndarray], state: int = HALF) -> Path:
    """Write a graph of those nodes from `x` (float16) and `past` to `y` and `present.0.key`."""
    inputs = [helper.make_tensor_value_info("x", HALF, ["batch_size", 4]), helper.make_tensor_value_info("past", state, [2, 3])]
    outputs = [helper.make_tensor_value_info("y", HALF, None), helper.make_tensor_value_info("present.0.key", state, [2, 3])]
    constants = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    nodes = [*nodes, helper.make_node("Identity", ["past"], ["present.0.key"])]
    model = helper.make_model(helper.make_graph(nodes, "g", inputs, outputs, constants), opset_imports=[helper.make_opsetid("", 18)])
    path = folder / "model.onnx"
    onnx.save(model, str(path))
    return path


def test_weights_products_and_states_are_counted_by_type(tmp_path: Path) -> None:
    weights = {"w": np.ones((4, 5), np.float16), "scale": np.float16(2), "norm": np.ones(5, np.float32), "rows": np.arange(3)}
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Mul", ["h", "scale"], ["y"]),
        helper.make_node("Cast", ["h"], ["g"], to=FULL),
        helper.make_node("Add", ["g", "norm"], ["unused"]),
    ]
    found = onnx_precisions(written(tmp_path, nodes, weights))
    assert found == Precisions(
        weights={"float16": 20, "float32": 5},
        weight_tensors={"float16": 1, "float32": 1},
        products={"float16": 1},
        states={"float16": 1},
    )
    require(found, dtype="fp16", memory_dtype="fp16", path=tmp_path / "model.onnx")


def test_what_the_file_notes_of_its_types_is_not_believed(tmp_path: Path) -> None:
    nodes = [helper.make_node("Cast", ["x"], ["z"], to=FULL), helper.make_node("MatMul", ["z", "w"], ["y"])]
    path = written(tmp_path, nodes, {"w": np.ones((4, 5), np.float32)})
    model = onnx.load(str(path))
    model.graph.value_info.append(helper.make_tensor_value_info("z", HALF, ["batch_size", 4]))
    onnx.save(model, str(path))
    assert onnx_precisions(path).products == {"float32": 1}


@pytest.mark.parametrize(
    ("nodes", "weights", "complaint"),
    [
        ([("Cast", ["x"], ["z"], {"to": FULL}), ("MatMul", ["z", "w"], ["y"], {})], {"w": np.ones((4, 4), np.float32)}, "in float32"),
        ([("Cast", ["w"], ["v"], {"to": HALF}), ("MatMul", ["x", "v"], ["y"], {})], {"w": np.ones((4, 4), np.float32)}, "at run time"),
        ([("MatMul", ["x", "w"], ["z"], {}), ("Softmax", ["z"], ["y"], {})], {"w": np.ones((4, 4), np.float16)}, "Softmax .* in float16"),
        ([("Cast", ["x"], ["z"], {"to": TensorProto.DOUBLE}), ("MatMul", ["x", "w"], ["y"], {})], {"w": np.ones((4, 4), np.float16)}, "64"),
        ([("Relu", ["x"], ["y"], {})], {"w": np.ones((4, 4), np.float16)}, "no matrix product"),
    ],
    ids=["a product in float32", "a weight converted at run time", "a softmax in float16", "a double", "no product"],
)
def test_a_graph_that_is_not_float16_where_it_should_be_is_refused(
    tmp_path: Path, nodes: list[Any], weights: dict[str, np.ndarray], complaint: str
) -> None:
    path = written(tmp_path, [helper.make_node(kind, ins, outs, **given) for kind, ins, outs, given in nodes], weights)
    with pytest.raises(ValidationError, match=complaint) as caught:
        require(onnx_precisions(path), dtype="fp16", memory_dtype="fp16", path=path)
    assert "to be fp16" in caught.value.message


def test_states_of_another_type_than_asked_for_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path, [helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": np.ones((4, 5), np.float16)}, state=FULL)
    with pytest.raises(ValidationError, match="1 of its states are float32, not float16"):
        require(onnx_precisions(path), dtype="fp16", memory_dtype="fp16", path=path)


@pytest.mark.parametrize(("dtype", "element"), [(torch.float32, "float32"), (torch.float16, "float16")])
def test_what_a_saved_torchscript_module_multiplies_is_watched(tmp_path: Path, dtype: torch.dtype, element: str) -> None:
    config = small_config(cutoffs=(5, 9))
    step = InferenceStep(build_model(config), TGT_LEN, "kv", dtype=dtype, memory_dtype=torch.float32).eval()
    export_torchscript(step, tmp_path)
    found = torchscript_precisions(tmp_path / "model.pt", example_arguments(step, 2))
    # per layer qkv, two of scores, mix, output, two of the feed-forward; shortlist, the clusters and two tails
    assert found.products == {element: 2 * 7 + 4}
    assert found.states == {"float32": 4}
    assert found.problems == []
    norms = 2 * 2 * 2 * config.d_model
    assert found.weights.get("float32", 0) == (sum(found.weights.values()) if element == "float32" else norms)
    require(found, dtype="fp16" if element == "float16" else "fp32", memory_dtype="fp32", path=tmp_path / "model.pt")


def test_a_torchscript_module_of_another_type_is_refused(tmp_path: Path) -> None:
    step = InferenceStep(build_model(small_config()), TGT_LEN, "kv").eval()
    export_torchscript(step, tmp_path)
    with pytest.raises(ValidationError, match=r"model\.pt was to be fp16"):
        require(
            torchscript_precisions(tmp_path / "model.pt", example_arguments(step, 2)),
            dtype="fp16",
            memory_dtype="fp32",
            path=tmp_path / "model.pt",
        )
