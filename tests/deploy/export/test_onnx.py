"""The ONNX graph: its interface, what is in the file, and what is not."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import onnx
import pytest

from tests.deploy.conftest import TGT_LEN, Exports
from tests.support import build_model, small_config
from txl_deploy.export.onnx import OPSET, export_onnx
from txl_deploy.manifest import read_manifest
from txl_deploy.signature import step_signature
from txl_train.errors import ValidationError
from txl_train.model.inference import InferenceStep


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
