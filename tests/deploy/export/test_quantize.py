"""int8: linear layers multiply integers, everything else is float32, and what that costs is found by the checks that are there."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from tests.deploy.conftest import Exports
from tests.support import needs_exact_int8
from txl_deploy.cli.main import main
from txl_deploy.export import quantize
from txl_deploy.export.artifact import ExportRequest, export_artifact
from txl_deploy.export.precision import onnx_precisions, require
from txl_deploy.export.quantize import MIN_OUTPUTS, quantize_file, quantize_linear_layers, rounded_weights
from txl_deploy.manifest import read_manifest, write_manifest
from txl_deploy.parity.tolerances import tolerance_for
from txl_deploy.receipt import Receipt
from txl_deploy.runtimes.onnxrt import may_saturate
from txl_deploy.runtimes.registry import open_artifact
from txl_train.errors import ValidationError

onnxruntime = pytest.importorskip("onnxruntime")

pytestmark = needs_exact_int8()

Capture = pytest.CaptureFixture[str]

LAYERS = 2 * 4
"""Of two decoder layers, qkv, output and two of the feed-forward each."""


@pytest.fixture(scope="module")
def int8_onnx(exports: Exports, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("int8") / "onnx"
    export_artifact(ExportRequest(checkpoint=exports.checkpoint, out=out, format="onnx", dtype="int8", data=exports.data))
    return out


def product(kind: str, weight: np.ndarray, **given: Any) -> onnx.ModelProto:
    """Return a graph with one product of `x` and a weight."""
    rows, columns = weight.shape[::-1] if given.get("transB") else weight.shape
    node = helper.make_node(kind, ["x", "w"], ["y"], name="layer", **given)
    inputs = [helper.make_tensor_value_info("x", 1, ["batch_size", rows])]
    outputs = [helper.make_tensor_value_info("y", 1, ["batch_size", columns])]
    graph = helper.make_graph([node], "g", inputs, outputs, [numpy_helper.from_array(weight, "w")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def run(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    runtime = pytest.importorskip("onnxruntime")
    options = runtime.SessionOptions()
    if may_saturate():  # as `OnnxRuntime` has it
        options.add_session_config_entry("session.x64quantprecision", "1")
    session = runtime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    result: np.ndarray = session.run(None, {"x": x})[0]
    return result


def test_weights_are_rounded_to_the_nearest_step_of_their_channel() -> None:
    values_KN = np.random.default_rng(0).normal(size=(40, 9)).astype(np.float32) * 10.0 ** np.arange(-4, 5, dtype=np.float32)
    whole_KN, scale_N = rounded_weights(values_KN)
    assert whole_KN.dtype == np.int8
    assert abs(whole_KN.astype(int)).max(axis=0).tolist() == [127] * 9
    assert (abs(whole_KN * scale_N - values_KN) <= 0.5001 * scale_N).all()


def test_a_channel_of_zeros_stays_zero() -> None:
    whole_KN, scale_N = rounded_weights(np.zeros((4, 3), np.float32))
    assert (whole_KN == 0).all()
    assert (scale_N > 0).all()


@pytest.mark.parametrize(("kind", "given"), [("MatMul", {}), ("Gemm", {}), ("Gemm", {"transB": 1})])
def test_a_rewritten_product_is_the_product_to_within_its_rounding(kind: str, given: dict[str, Any]) -> None:
    rng = np.random.default_rng(1)
    weight, x = rng.normal(size=(64, 32)).astype(np.float32), rng.normal(size=(5, 64)).astype(np.float32)
    model = product(kind, np.ascontiguousarray(weight.T) if given else weight, **given)
    assert quantize_linear_layers(model) == 1
    assert {node.op_type for node in model.graph.node} == {"DynamicQuantizeLinear", "MatMulInteger", "Cast", "Mul"}
    assert abs(run(model, x) - x @ weight).max() < 0.03 * abs(x @ weight).max()


def test_the_largest_products_are_exact_in_the_session_that_is_made_for_this_cpu() -> None:
    weight = np.ones((2048, 32), np.float32)
    model = product("MatMul", weight)
    assert quantize_linear_layers(model) == 1
    np.testing.assert_allclose(run(model, np.full((3, 2048), 2.0, np.float32)), 4096.0, rtol=1e-6)


@pytest.mark.parametrize(("capability", "exact", "asked"), [("AVX512", True, ""), ("AVX512", False, "1"), ("AVX2", True, "1")])
def test_exact_products_are_asked_for_where_the_fast_ones_may_saturate(
    int8_onnx: Path, monkeypatch: pytest.MonkeyPatch, capability: str, exact: bool, asked: str
) -> None:
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: capability)
    monkeypatch.setattr("txl_deploy.runtimes.onnxrt.sums_exactly", lambda: exact)
    found = []

    def session(path: str, options: Any, **rest: Any) -> Any:
        found.append("")
        with contextlib.suppress(RuntimeError):  # which says that there is no such entry
            found[-1] = options.get_session_config_entry(key)
        return made(path, options, **rest)

    key, made = "session.x64quantprecision", onnxruntime.InferenceSession
    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    open_artifact(int8_onnx)
    assert set(found) == {asked}


def test_the_weights_are_those_that_the_library_of_onnxruntime_makes(tmp_path: Path) -> None:
    library = pytest.importorskip("onnxruntime.quantization")
    weight = np.random.default_rng(2).normal(size=(64, 32)).astype(np.float32)
    library.quantize_dynamic(
        product("MatMul", weight),
        str(tmp_path / "m.onnx"),
        per_channel=True,
        weight_type=library.QuantType.QInt8,
        op_types_to_quantize=["MatMul"],
    )
    theirs = [numpy_helper.to_array(tensor) for tensor in onnx.load(str(tmp_path / "m.onnx")).graph.initializer]
    whole_KN, scale_N = rounded_weights(weight)
    assert any(values.shape == (64, 32) and abs(values.astype(int) - whole_KN).max() <= 1 for values in theirs)
    assert any(values.shape == (32,) and values.dtype == np.float32 and np.allclose(values, scale_N, rtol=1e-5) for values in theirs)


def test_a_product_of_few_outputs_stays_float32() -> None:
    with pytest.raises(ValidationError, match="no linear layer"):
        quantize_linear_layers(product("MatMul", np.ones((64, MIN_OUTPUTS - 1), np.float32)))


def test_a_product_with_a_factor_is_refused() -> None:
    with pytest.raises(ValidationError, match="has factors"):
        quantize_linear_layers(product("Gemm", np.ones((64, 32), np.float32), alpha=2.0))


def test_a_weight_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ValidationError, match="`w` cannot be int8: it holds numbers that are not finite"):
        quantize_linear_layers(product("MatMul", np.full((64, 32), np.inf, np.float32)))


def test_an_export_says_what_of_it_is_int8_and_runs_so(int8_onnx: Path) -> None:
    manifest = read_manifest(int8_onnx)
    assert (manifest.settings.dtype, manifest.settings.memory_dtype) == ("int8", "fp32")
    assert manifest.precisions["products"]["int8"] >= LAYERS
    assert manifest.precisions["products"]["float32"] >= 2 * 3  # attention's own
    assert {record.dtype for record in (*manifest.inputs, *manifest.outputs)} == {"int64", "float32"}
    info = open_artifact(int8_onnx).info
    assert (info.dtype, info.compute) == ("int8", "int8")
    assert info.readback["products"]["int8"] == manifest.precisions["products"]["int8"]
    assert set(info.readback["integer_kernels"]) <= {"DynamicQuantizeMatMul", "MatMulIntegerToFloat"}


def test_two_exports_are_the_same_to_the_byte(int8_onnx: Path, exports: Exports, tmp_path: Path) -> None:
    export_artifact(ExportRequest(checkpoint=exports.checkpoint, out=tmp_path / "a", format="onnx", dtype="int8", data=exports.data))
    assert (tmp_path / "a" / "model.onnx").read_bytes() == (int8_onnx / "model.onnx").read_bytes()


def test_an_export_is_checked_on_real_text_where_that_is_here(exports: Exports, tmp_path: Path, capsys: Capture) -> None:
    arguments = ["export", "--checkpoint", str(exports.checkpoint), "--format", "onnx", "--dtype", "int8", "--out", str(tmp_path / "a")]
    assert main([*arguments, "--data", str(exports.data), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["checked"]["on"] == "text valid"
    assert document["dtype"] == "int8"


def test_its_receipt_is_judged_by_the_perplexity_that_was_promised(int8_onnx: Path, exports: Exports, capsys: Capture) -> None:
    code = main(["eval", "--artifact", str(int8_onnx), "--checkpoint", str(exports.checkpoint), "--batch-size", "2", "-qq"])
    receipt = Receipt.read(int8_onnx / "receipt.json")
    verdict = receipt.verdict()
    assert (receipt.dtype, receipt.compute) == ("int8", "int8")
    assert verdict.bound == pytest.approx(np.log(1.005))
    assert verdict.upper_bound is not None
    assert verdict.passed == (verdict.upper_bound <= np.log(1.005))
    assert code == (0 if verdict.passed else 1)


def test_the_promise_is_half_a_percent_of_the_perplexity_of_any_model() -> None:
    tolerance = tolerance_for("int8")
    assert tolerance is not None
    assert {tolerance.mean_bound(nll) for nll in (0.5, 3.0, 12.0)} == {np.log(1.005)}


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--format", "torchscript"], "int8 is for ONNX on a CPU, not for torchscript"),
        (["--format", "trt"], "int8 is for ONNX on a CPU, not for engines"),
        (["--format", "onnx", "--memory-dtype", "fp16"], "the states stay fp32"),
        (["--format", "onnx", "--fp16"], "contradict each other"),
    ],
)
def test_what_int8_is_not_for_is_refused(exports: Exports, tmp_path: Path, capsys: Capture, options: list[str], reason: str) -> None:
    code = main(["export", "--checkpoint", str(exports.checkpoint), "--dtype", "int8", "--out", str(tmp_path / "a"), *options])
    assert code == 2
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


def test_no_engine_is_built_from_it(int8_onnx: Path, tmp_path: Path, capsys: Capture) -> None:
    assert main(["export", "--artifact", str(int8_onnx), "--format", "trt", "--out", str(tmp_path / "a")]) == 2
    assert "no engine is built from it" in capsys.readouterr().err


def with_a_float_layer(path: Path) -> None:
    """Replace the first integer product of a graph, and what scales it, by the product of float32 that it stands for."""
    model = onnx.load(str(path))
    nodes = list(model.graph.node)
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    integer = next(node for node in nodes if node.op_type == "MatMulInteger")
    scale = next(node for node in nodes if node.op_type == "Mul" and node.name == f"{integer.name}_scales").input[1]
    taken = next(node for node in nodes if integer.input[0] in node.output).input[0]
    weight = numpy_helper.to_array(constants[integer.input[1]]) * numpy_helper.to_array(constants[scale])
    model.graph.initializer.append(numpy_helper.from_array(weight.astype(np.float32), "float_weight"))
    scaled = next(node for node in nodes if node.name == f"{integer.name}_scaled")
    gone = [integer.name, f"{integer.name}_float", f"{integer.name}_scales"]
    for i, node in enumerate(nodes):
        if node is scaled:
            nodes[i] = helper.make_node("MatMul", [taken, "float_weight"], list(scaled.output), name=integer.name)
    kept = [node for node in nodes if node.name not in gone or node.op_type == "MatMul"]
    del model.graph.node[:]
    model.graph.node.extend(kept)
    onnx.save(model, str(path))


def test_a_layer_that_is_not_int8_is_found_in_the_file(int8_onnx: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes((int8_onnx / "model.onnx").read_bytes())
    require(onnx_precisions(path), dtype="int8", memory_dtype="fp32", path=path)
    with_a_float_layer(path)
    with pytest.raises(ValidationError, match="to be int8, but is not: 1 of its linear layers are in float32"):
        require(onnx_precisions(path), dtype="int8", memory_dtype="fp32", path=path)


def test_a_layer_that_is_not_int8_is_found_when_an_artifact_is_opened(int8_onnx: Path, tmp_path: Path) -> None:
    manifest = read_manifest(int8_onnx)
    for name in manifest.files:
        (tmp_path / name).write_bytes((int8_onnx / name).read_bytes())
    with_a_float_layer(tmp_path / "model.onnx")
    write_manifest(tmp_path, manifest, manifest.files)
    n = manifest.precisions["products"]["int8"]
    with pytest.raises(ValidationError, match=f"records {n} products of int8, but {n - 1} run"):
        open_artifact(tmp_path)


def test_a_graph_of_float32_that_claims_int8_is_refused(exports: Exports) -> None:
    path = exports.onnx / "model.onnx"
    with pytest.raises(ValidationError, match="to be int8, but is not"):
        require(onnx_precisions(path), dtype="int8", memory_dtype="fp32", path=path)


def test_integer_products_in_a_graph_of_float32_are_refused(int8_onnx: Path) -> None:
    path = int8_onnx / "model.onnx"
    with pytest.raises(ValidationError, match=r"to be fp32, but is not: [0-9]+ of its matrix products are in int8"):
        require(onnx_precisions(path), dtype="fp32", memory_dtype="fp32", path=path)


@pytest.mark.parametrize("factor", [1.2, -1.0])
def test_a_wrong_scale_is_found_by_the_check_of_the_export(
    exports: Exports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    def wrong(values_KN: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        whole_KN, scale_N = rounded_weights(values_KN)
        scale_N[0] *= factor
        return whole_KN, scale_N * np.float32(abs(factor))

    monkeypatch.setattr(quantize, "rounded_weights", wrong)
    with pytest.raises(ValidationError, match="computes something else") as caught:
        export_artifact(ExportRequest(checkpoint=exports.checkpoint, out=tmp_path / "a", format="onnx", dtype="int8", data=exports.data))
    assert "--dtype fp32" in (caught.value.remedy or "")
    assert not (tmp_path / "a").exists()


def test_a_file_that_had_its_weights_beside_it_is_rewritten_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = product("MatMul", np.random.default_rng(3).normal(size=(64, 64)).astype(np.float32))
    onnx.save_model(model, str(tmp_path / "model.onnx"), save_as_external_data=True, location="model.onnx_data", size_threshold=0)
    monkeypatch.setattr(quantize, "EXTERNAL_DATA_BYTES", 100)
    assert quantize_file(tmp_path) == ["model.onnx", "model.onnx_data"]
    assert (tmp_path / "model.onnx_data").stat().st_size < 64 * 64 * 2
