"""The ONNX graph: its interface, what is in the file, and what is not."""

from __future__ import annotations

import dataclasses
import hashlib
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper

from tests.deploy.conftest import TGT_LEN, Exports
from tests.support import build_model, small_config
from txl_deploy.export.onnx import OPSET, export_onnx
from txl_deploy.export.precision import onnx_precisions
from txl_deploy.manifest import read_manifest
from txl_deploy.signature import step_signature
from txl_train.config import HeadKind, MemoryKind
from txl_train.errors import ValidationError
from txl_train.model.inference import STEPS, FixedStep, InferenceStep


@pytest.fixture(scope="module")
def graph(exports: Exports) -> onnx.ModelProto:
    return onnx.load(str(exports.onnx / "model.onnx"))


def axes_of(value: onnx.ValueInfoProto) -> list[int | str]:
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]


def test_inputs_and_outputs_have_the_field_s_names_and_a_free_batch(graph: onnx.ModelProto) -> None:
    inputs = {value.name: axes_of(value) for value in graph.graph.input}
    assert inputs == {
        "input_ids": ["batch_size", TGT_LEN],
        "target_ids": ["batch_size", TGT_LEN],
        "target_rows.1": ["target_rows_1"],
        "target_rows.2": ["target_rows_2"],
        "target_rows.3": ["target_rows_3"],
        "memory_length": ["batch_size"],
        **{f"past_key_values.{i}.{part}": ["batch_size", 2, 7, 3] for i in range(2) for part in ("key", "value")},
    }
    outputs = {value.name: axes_of(value) for value in graph.graph.output}
    assert outputs == {
        "nll": ["batch_size", TGT_LEN],
        "new_memory_length": ["batch_size"],
        **{f"present.{i}.{part}": ["batch_size", 2, 7, 3] for i in range(2) for part in ("key", "value")},
    }


def test_the_manifest_lists_the_same_interface(exports: Exports, graph: onnx.ModelProto) -> None:
    manifest = read_manifest(exports.onnx)
    for records, values in ((manifest.inputs, graph.graph.input), (manifest.outputs, graph.graph.output)):
        assert [(record.name, list(record.axes)) for record in records] == [(value.name, axes_of(value)) for value in values]


def test_the_graph_is_valid_opset_18_with_txl_metadata(exports: Exports, graph: onnx.ModelProto) -> None:
    onnx.checker.check_model(graph, full_check=True)
    assert [(entry.domain, entry.version) for entry in graph.opset_import] == [("", OPSET)]
    metadata = {entry.key: entry.value for entry in graph.metadata_props}
    assert metadata["txl.checkpoint_sha256"] == read_manifest(exports.onnx).source.checkpoint_sha256
    assert (metadata["txl.tgt_len"], metadata["txl.mem_len"], metadata["txl.memory"]) == (str(TGT_LEN), "7", "kv")


def test_no_operator_has_a_shape_that_depends_on_data(graph: onnx.ModelProto) -> None:
    assert not {node.op_type for node in graph.graph.node} & {"NonZero", "If", "Loop", "Scan", "Unique", "Compress"}


def test_the_operator_whose_sums_are_inexact_in_onnx_runtime_is_not_used(graph: onnx.ModelProto) -> None:
    assert "ReduceLogSumExp" not in {node.op_type for node in graph.graph.node}


def test_the_same_export_gives_the_same_bytes_and_names_no_folder_of_this_machine(tmp_path: Path) -> None:
    step = InferenceStep(build_model(small_config()), TGT_LEN)
    contents = []
    for name in ("once", "again"):
        (tmp_path / name).mkdir()
        export_onnx(step, tmp_path / name, {"key": "value"})
        contents.append((tmp_path / name / "model.onnx").read_bytes())
    assert contents[0] == contents[1]
    assert b".py" not in contents[0]


def test_tied_weights_are_stored_once(graph: onnx.ModelProto) -> None:
    config = small_config(cutoffs=(5, 9, 16), div_val=2)
    rows = [tuple(tensor.dims) for tensor in graph.graph.initializer]
    for low, high, width in zip(config.cluster_ends, config.cluster_ends[1:], config.cluster_widths):
        tables = [dims for dims in rows if dims in ((high - low, width), (width, high - low))]
        assert len(tables) == 1, (low, high, tables)


def test_a_hidden_memory_has_transformer_xl_s_own_names(tmp_path: Path) -> None:
    config = small_config()
    export_onnx(InferenceStep(build_model(config), TGT_LEN, "hidden"), tmp_path, {})
    names = [value.name for value in onnx.load(str(tmp_path / "model.onnx")).graph.input]
    assert names == ["input_ids", "target_ids", "memory_length", "mems.0", "mems.1"]
    assert names == [spec.name for spec in step_signature(config, tgt_len=TGT_LEN, memory="hidden").inputs]


def test_weights_beyond_the_limit_go_into_a_file_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("txl_deploy.export.onnx.EXTERNAL_DATA_BYTES", 1000)
    config = small_config(d_inner=300)
    files = export_onnx(InferenceStep(build_model(config), TGT_LEN), tmp_path, {})
    assert files == ["model.onnx", "model.onnx_data"]
    assert (tmp_path / "model.onnx_data").stat().st_size > 9000


def test_an_exporter_that_fixes_a_free_axis_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = step_signature

    def with_a_free_length(*args: object, **kwargs: object) -> object:
        signature = real(*args, **kwargs)  # type: ignore[arg-type]
        first = dataclasses.replace(signature.inputs[0], axes=("batch_size", "sequence_length"))
        return dataclasses.replace(signature, inputs=(first, *signature.inputs[1:]))

    monkeypatch.setattr("txl_deploy.export.onnx.step_signature", with_a_free_length)
    with pytest.raises(ValidationError, match=r"input_ids.*instead of.*sequence_length"):
        export_onnx(InferenceStep(build_model(small_config()), TGT_LEN), tmp_path, {})
    assert not list(tmp_path.iterdir())


# Float16, and heads for the next token

HALF_CONFIG = small_config(cutoffs=(5, 9, 16), div_val=2, clamp_len=4)


class Half(NamedTuple):
    """A float16 graph, and what it was made of."""

    step: FixedStep
    batch_size: int | None
    path: Path
    graph: onnx.GraphProto
    types: dict[str, int]
    """Element type of each tensor, inferred by onnx."""


CASES: list[tuple[MemoryKind, torch.dtype, HeadKind, int | None]] = [
    ("kv", torch.float16, "nll", None),
    ("hidden", torch.float32, "nll", 2),
    ("hidden", torch.float16, "logits", None),
    ("kv", torch.float32, "log_probs", 2),
]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-of-{str(case[1])[6:]}-{case[2]}-batch-{case[3] or 'any'}")
def half(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Half:
    memory, memory_dtype, head, batch_size = request.param
    folder = tmp_path_factory.mktemp("half")
    step = STEPS[head](build_model(HALF_CONFIG), TGT_LEN, memory, dtype=torch.float16, memory_dtype=memory_dtype).eval()
    export_onnx(step, folder, {}, batch_size=batch_size)
    model = onnx.load(str(folder / "model.onnx"))
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*inferred.input, *inferred.value_info, *inferred.output)}
    types |= {tensor.name: tensor.data_type for tensor in inferred.initializer}
    return Half(step, batch_size, folder / "model.onnx", model.graph, types)


def inputs_of(half: Half, *operators: str) -> list[int]:
    nodes = [node for node in half.graph.node if node.op_type in operators]
    return [half.types[name] for node in nodes for name in node.input if name and half.types[name] != TensorProto.INT64]


def test_products_are_float16_and_what_is_sensitive_is_float32(half: Half) -> None:
    assert set(inputs_of(half, "MatMul", "Gemm")) == {TensorProto.FLOAT16}
    sensitive = inputs_of(half, "LayerNormalization", "Softmax", "Exp", "Log", "ReduceSum", "ReduceMax")
    assert set(sensitive) == {TensorProto.FLOAT}
    kinds = {node.op_type for node in half.graph.node}
    assert {"LayerNormalization", "Softmax", "Exp", "Log", "ReduceSum"} <= kinds
    assert not {TensorProto.DOUBLE, TensorProto.BFLOAT16} & set(half.types.values())
    assert onnx_precisions(half.path).problems == []


def test_no_matrix_is_stored_in_float32(half: Half) -> None:
    matrices = [tensor.name for tensor in half.graph.initializer if tensor.data_type == TensorProto.FLOAT and len(tensor.dims) > 1]
    assert matrices == []
    norms = [tensor for tensor in half.graph.initializer if tensor.data_type == TensorProto.FLOAT and len(tensor.dims) == 1]
    assert len(norms) == 2 * 2 * HALF_CONFIG.n_layer


def test_what_runs_from_layer_to_layer_is_float32(half: Half) -> None:
    """Each normalisation takes a sum of what came before and what was added, both float32."""
    made_by = {name: node for node in half.graph.node for name in node.output}
    for node in half.graph.node:
        if node.op_type == "LayerNormalization":
            addition = made_by[node.input[0]]
            assert addition.op_type == "Add"
            assert [half.types[name] for name in addition.input] == [TensorProto.FLOAT] * 2


def test_nothing_is_converted_twice_and_no_weight_at_run_time(half: Half) -> None:
    casts = [node for node in half.graph.node if node.op_type == "Cast"]
    converted = Counter((node.input[0], node.attribute[0].i) for node in casts)
    assert [name for name, n in converted.items() if n > 1] == []
    made_by = {name: node for node in casts for name in node.output}
    there_and_back = [node.input[0] for node in casts if node.input[0] in made_by]
    assert there_and_back == []
    assert not {node.input[0] for node in casts} & {tensor.name for tensor in half.graph.initializer}


def test_positions_are_encoded_in_float32_and_rounded_once(half: Half) -> None:
    assert not {"Sin", "Cos", "Range"} & {node.op_type for node in half.graph.node}
    exact = [term.half() for term in build_model(HALF_CONFIG).position_terms(half.step.config, 7 + TGT_LEN)]
    stored = [numpy_helper.to_array(tensor) for tensor in half.graph.initializer if tensor.name.startswith("position_terms.")]
    assert len(stored) == HALF_CONFIG.n_layer
    for found, term in zip(stored, exact):
        np.testing.assert_array_equal(found, term.detach().numpy())


def test_nothing_is_computed_of_constants_alone(half: Half) -> None:
    """Of large weights the exporter leaves views (a part, turned) to the runtimes, which is one copy less; never arithmetic."""
    fixed = {tensor.name for tensor in half.graph.initializer}
    for node in half.graph.node:
        if all(name in fixed for name in node.input if name):
            assert node.op_type in ("Slice", "Transpose"), node.name
            fixed.update(node.output)


def copies_of(half: Half, weight: torch.Tensor) -> int:
    """Number of times that a weight is stored, as it is or turned."""
    wanted = weight.detach().half().numpy()
    stored = [numpy_helper.to_array(tensor) for tensor in half.graph.initializer]
    return sum(np.array_equal(value, wanted) or np.array_equal(value.T, wanted) for value in stored)


def test_positions_are_projected_before_and_the_projection_is_not_stored(half: Half) -> None:
    model = build_model(HALF_CONFIG)
    for name, weight in model.named_parameters():
        if name.endswith("attention.position.weight"):
            assert copies_of(half, weight) == 0
        elif name.endswith("feed_forward.inner.weight"):
            assert copies_of(half, weight) == 1


def test_tied_weights_are_stored_once_in_float16_too(half: Half) -> None:
    assert HALF_CONFIG.tie_weights
    assert [copies_of(half, table) for table in build_model(HALF_CONFIG).embedding.weights] == [1, 1, 1, 1]


def test_the_states_have_the_memory_s_type_and_scores_are_float32(half: Half) -> None:
    batch = half.batch_size or "batch_size"
    expected = TensorProto.FLOAT16 if half.step.memory_dtype == torch.float16 else TensorProto.FLOAT
    states = [value for value in (*half.graph.input, *half.graph.output) if value.name.startswith(("past", "present", "mems", "new_mems"))]
    assert {value.type.tensor_type.elem_type for value in states} == {expected}
    assert {axes_of(value)[0] for value in states} == {batch}
    score = half.graph.output[0]
    assert (score.name, score.type.tensor_type.elem_type) == (half.step.head_kind, TensorProto.FLOAT)
    assert axes_of(score) == [batch, TGT_LEN if half.step.head_kind == "nll" else HALF_CONFIG.vocab_size]
    names = {value.name for value in half.graph.input}
    assert ("target_ids" in names) == ("target_rows.1" in names) == (half.step.head_kind == "nll")


SCRIPT = """
import sys, torch
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from tests.support import build_model, small_config
from txl_deploy.export.onnx import export_onnx
from txl_train.model.inference import InferenceStep
torch.set_num_threads(1)
model = build_model(small_config(cutoffs=(5, 9), div_val=2))
export_onnx(InferenceStep(model, 5, dtype=torch.float16), Path(sys.argv[1]), {"a": "1", "b": "2"})
"""


@pytest.mark.slow
def test_another_process_writes_the_same_bytes(tmp_path: Path) -> None:
    """Python orders sets of strings by a seed that differs from process to process."""
    digests = []
    for seed in ("1", "2"):
        folder = tmp_path / seed
        folder.mkdir()
        environment = {"PYTHONHASHSEED": seed, "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)}
        command = [sys.executable, "-W", "ignore", "-c", SCRIPT, str(folder), str(Path(__file__).resolve().parents[3])]
        subprocess.run(command, check=True, env=environment)
        digests.append(hashlib.sha256((folder / "model.onnx").read_bytes()).hexdigest())
    assert digests[0] == digests[1]
