"""The search for the layer in which a graph leaves its checkpoint names the layer that was changed."""

from __future__ import annotations

import builtins
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from tests.deploy.conftest import TGT_LEN, Exports
from tests.support import build_model, small_config
from txl_deploy.parity.layers import Bisection, bisect, check_can_bisect, segment_to_examine
from txl_deploy.parity.rollout import ParityResult, compare, random_segments
from txl_deploy.runtimes.base import Runtime
from txl_deploy.runtimes.eager import EagerRuntime
from txl_deploy.runtimes.onnxrt import OnnxRuntime
from txl_deploy.runtimes.registry import open_artifact
from txl_train.errors import ArtifactError, EnvironmentUnfitError, UsageError

CONFIG = small_config(cutoffs=(5, 9, 16), div_val=2)
SEGMENTS = random_segments(CONFIG, tgt_len=TGT_LEN, n_segments=8)

Mutation = Callable[[onnx.GraphProto], None]


def run(artifact: Path, folder: Path, mutate: Mutation | None = None) -> tuple[ParityResult, Bisection]:
    """Compare and search, with the graph changed on the way."""
    candidate = open_artifact(artifact, threads=1)
    path = artifact / "model.onnx"
    if mutate is not None:
        model = onnx.load(str(path))
        mutate(model.graph)
        path = folder / "model.onnx"
        onnx.save(model, str(path))
        candidate = OnnxRuntime(path, candidate.info, threads=1)
    info = candidate.info
    reference = EagerRuntime(build_model(CONFIG), tgt_len=TGT_LEN, memory=info.memory, head=info.head, packed=False)
    result = compare(reference, candidate, SEGMENTS)
    return result, bisect(reference, candidate, path, SEGMENTS, segment_to_examine(result))


def node_of(graph: onnx.GraphProto, module: str, operator: str) -> onnx.NodeProto:
    return next(node for node in graph.node if node.name.rpartition("/")[0] == module and node.op_type == operator)


def weight_of(graph: onnx.GraphProto, node: onnx.NodeProto) -> onnx.TensorProto:
    return next(tensor for tensor in graph.initializer if tensor.name in node.input)


def change(tensor: onnx.TensorProto, new: Callable[[np.ndarray], np.ndarray]) -> None:
    old = numpy_helper.to_array(tensor)
    tensor.CopyFrom(numpy_helper.from_array(new(old.copy()).astype(old.dtype), tensor.name))


def wrong_bias(layer: int, by: float = 0.3) -> Mutation:
    def mutate(graph: onnx.GraphProto) -> None:
        node = node_of(graph, f"decoder.layers.{layer}.feed_forward.outer", "Add")
        change(weight_of(graph, node), lambda bias: bias + by * np.eye(len(bias))[2])

    return mutate


def wrong_clamp(layer: int) -> Mutation:
    def mutate(graph: onnx.GraphProto) -> None:
        clamped = dataclasses.replace(CONFIG, clamp_len=3)
        term = build_model(CONFIG).position_terms(clamped, CONFIG.mem_len + TGT_LEN)[layer]
        tensor = next(tensor for tensor in graph.initializer if tensor.name == f"position_terms.{layer}")
        change(tensor, lambda _: term.detach().numpy())

    return mutate


def swapped_layers(graph: onnx.GraphProto) -> None:
    matrices = {tensor.name for tensor in graph.initializer if len(tensor.dims) == 2}
    products = [node for node in graph.node if node.op_type == "MatMul" and node.input[1] in matrices]
    of_layer = [[node for node in products if node.name.startswith(f"decoder.layers.{i}")] for i in range(2)]
    assert of_layer[0]
    for first, second in zip(*of_layer, strict=True):
        first.input[1], second.input[1] = second.input[1], first.input[1]


def clusters_in_reverse(graph: onnx.GraphProto) -> None:
    tensor = next(tensor for tensor in graph.initializer if tensor.name == "head.cluster_weight")
    change(tensor, lambda weight: weight[::-1])


def memory_one_back(layer: int) -> Mutation:
    def mutate(graph: onnx.GraphProto) -> None:
        node = next(node for node in graph.node if f"present.{layer}.key" in node.output)
        while node.op_type != "Slice":  # in fp16 a cast may follow
            node = next(before for before in graph.node if node.input[0] in before.output)
        graph.initializer.append(numpy_helper.from_array(np.array([0], dtype=np.int64), "from_the_beginning"))
        graph.initializer.append(numpy_helper.from_array(np.array([CONFIG.mem_len], dtype=np.int64), "to_the_seventh"))
        node.input[1], node.input[2] = "from_the_beginning", "to_the_seventh"

    return mutate


MUTATIONS: dict[str, tuple[Mutation, str, str]] = {
    "a wrong bias in layer 0": (wrong_bias(0), "layer 0", "decoder.layers.0.feed_forward.outer/linear_"),
    "a wrong bias in layer 1": (wrong_bias(1), "layer 1", "decoder.layers.1.feed_forward.outer/linear_"),
    "a wrong clamp in layer 0": (wrong_clamp(0), "layer 0", "decoder.layers.0.attention/matmul"),
    "a wrong clamp in layer 1": (wrong_clamp(1), "layer 1", "decoder.layers.1.attention/matmul_"),
    "layers swapped": (swapped_layers, "layer 0", "decoder.layers.0.attention.qkv/linear_"),
    "cluster order reversed": (clusters_in_reverse, "head", "head/linear_"),
    "a memory of the wrong positions": (memory_one_back(1), "layer 1", "present.1.key"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_change_in_the_graph_is_found_in_its_layer_at_its_tensor(exports: Exports, tmp_path: Path, name: str) -> None:
    mutate, place, tensor = MUTATIONS[name]
    result, found = run(exports.onnx, tmp_path, mutate)
    assert not result.passed
    assert found.place == place
    assert str(found.tensor).startswith(tensor)
    assert place in found.reason
    assert str(found.tensor) in found.reason


def test_a_wrong_bias_is_found_beside_the_rounding_of_fp16(fp16_onnx: Path, tmp_path: Path) -> None:
    result, found = run(fp16_onnx, tmp_path, wrong_bias(1))
    assert not result.passed
    assert found.place == "layer 1"
    assert str(found.tensor).startswith("decoder.layers.1.feed_forward.outer/linear_")


def test_a_graph_that_scores_the_next_token_from_hidden_memory_is_searched_too(logits_onnx: Path, tmp_path: Path) -> None:
    faithful, _ = run(logits_onnx, tmp_path)
    result, found = run(logits_onnx, tmp_path, wrong_bias(1))
    assert faithful.passed
    assert not result.passed
    assert found.place == "layer 1"


@pytest.mark.parametrize("artifact", ["exports", "fp16_onnx", "logits_onnx"])
def test_a_faithful_graph_has_nothing_beyond_its_bound_and_every_layer_was_looked_at(
    request: pytest.FixtureRequest, tmp_path: Path, artifact: str
) -> None:
    folder = request.getfixturevalue(artifact)
    result, found = run(folder.onnx if isinstance(folder, Exports) else folder, tmp_path)
    assert result.passed
    assert found.place is None
    assert found.tensor is None
    assert "no tensor leaves the bound" in found.reason
    assert [part.place for part in found.places] == ["embedding", "layer 0", "layer 1", "head"]
    operations = {tensor.name.rpartition("/")[2].rpartition("_")[0] for tensor in found.tensors if tensor.place == "layer 1"}
    assert operations >= {"linear", "matmul", "add", "softmax", "cat", "layer_norm", "relu"}
    assert all(np.isfinite(tensor.error) for tensor in found.tensors)
    json.dumps(found.to_dict(), allow_nan=False)


def test_a_fault_too_small_for_a_single_tensor_s_bound_shows_where_the_error_jumps(fp16_onnx: Path, tmp_path: Path) -> None:
    _, found = run(fp16_onnx, tmp_path, wrong_bias(1, 0.015))
    assert found.place is None
    assert "the error grows most at decoder.layers.1.feed_forward.outer/linear_" in found.reason


def test_numbers_that_are_not_finite_are_beyond_every_bound(exports: Exports, tmp_path: Path) -> None:
    _, found = run(exports.onnx, tmp_path, wrong_bias(1, float("nan")))
    assert found.place == "layer 1"
    assert next(tensor for tensor in found.tensors if tensor.name == found.tensor).error == float("inf")
    json.dumps(found.to_dict(), allow_nan=False)


def test_a_runtime_that_departs_from_its_own_graph_is_named_instead_of_a_layer(exports: Exports) -> None:
    class Departing(OnnxRuntime):
        def step(self, *tensors: Any) -> Any:
            output = super().step(*tensors)
            return output._replace(nll_BT=output.nll_BT + 0.01)

    path = exports.onnx / "model.onnx"
    candidate = Departing(path, open_artifact(exports.onnx).info, threads=1)
    reference = EagerRuntime(build_model(CONFIG), tgt_len=TGT_LEN, packed=False)
    found = bisect(reference, candidate, path, SEGMENTS, 3)
    assert found.place is None
    assert "the runtime's own result does" in found.reason


def test_the_segment_looked_into_is_the_first_beyond_a_bound(exports: Exports) -> None:
    class Late:
        """Wrong from the fourth segment on."""

        def __init__(self, inner: Runtime) -> None:
            self.inner, self.info, self.initial_memory, self.count = inner, inner.info, inner.initial_memory, 0

        def step(self, *tensors: Any) -> Any:
            self.count += 1
            output = self.inner.step(*tensors)
            return output._replace(nll_BT=output.nll_BT + (0.01 * self.count if self.count > 3 else 0.0))

    reference = EagerRuntime(build_model(CONFIG), tgt_len=TGT_LEN, packed=False)
    result = compare(reference, Late(reference), SEGMENTS)  # type: ignore[arg-type]
    assert segment_to_examine(result) == 3
    faithful = compare(reference, open_artifact(exports.onnx), SEGMENTS)
    assert segment_to_examine(faithful) == faithful.worst_token["segment"]


def test_other_artifacts_than_onnx_are_refused_with_the_way_to_one(exports: Exports) -> None:
    with pytest.raises(UsageError, match="ONNX graph") as caught:
        check_can_bisect(open_artifact(exports.torchscript))
    assert "txl export --format onnx" in str(caught.value.remedy)


def test_without_polygraphy_the_command_that_installs_it_is_named(exports: Exports, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.partition(".")[0] == "polygraphy":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(EnvironmentUnfitError, match="polygraphy is not installed") as caught:
        check_can_bisect(open_artifact(exports.onnx))
    assert "pip install polygraphy" in str(caught.value.remedy)


def test_a_graph_whose_nodes_do_not_name_their_modules_is_not_guessed_at(exports: Exports, tmp_path: Path) -> None:
    def anonymous(graph: onnx.GraphProto) -> None:
        for i, node in enumerate(graph.node):
            node.name = f"node_{i}"

    with pytest.raises(ArtifactError, match="do not name their modules") as caught:
        run(exports.onnx, tmp_path, anonymous)
    assert "txl export" in str(caught.value.remedy)
