"""Precisions, from a network before its build and from what the inspectors of TensorRT 10 and 11 print."""

from __future__ import annotations

from typing import Any

from txl_deploy.trt.inspect import Precisions, describe_engine, engine_precisions

ENGINE_10: dict[str, Any] = {
    "Layers": [
        {
            "Name": "/layers.0/qkv/MatMul_myl0_3",
            "LayerType": "gemm",
            "Inputs": [
                {"Name": "h", "Location": "Device", "Dimensions": [8, 64, 512], "Format/Datatype": "Half"},
                {"Name": "weights", "Dimensions": [1536, 512], "Format/Datatype": "Half"},
            ],
            "Outputs": [{"Name": "qkv", "Location": "Device", "Dimensions": [8, 64, 1536], "Format/Datatype": "Half"}],
            "TacticName": "sm75_xmma_gemm_f16f16_f16f32_f32_tn_n_tilesize128x128x32",
            "StreamId": 0,
            "Metadata": "[ONNX Layer: node_linear]",
        },
        {
            "Name": "__myl_MeanSubMulMeanAddSqrt_myl0_4",
            "LayerType": "kgen",
            "Inputs": [{"Name": "h", "Dimensions": [8, 64, 512], "Format/Datatype": "Half"}],
            "Outputs": [{"Name": "normed", "Dimensions": [8, 64, 512], "Format/Datatype": "Float"}],
            "TacticName": "__myl_MeanSubMulMeanAddSqrt_0x1",
            "StreamId": 0,
            "Metadata": "",
        },
        {
            "Name": "Reformatting CopyNode for Output Tensor 0",
            "LayerType": "Reformat",
            "Inputs": [{"Name": "a", "Dimensions": [8], "Format/Datatype": "Row major linear FP32 format"}],
            "Outputs": [{"Name": "b", "Dimensions": [8], "Format/Datatype": "Row major linear FP16 format"}],
            "ParameterType": "Reformat",
            "TacticValue": "0x0",
        },
    ],
    "Bindings": ["input_ids", "nll"],
}
"""Fields as TensorRT 10 prints them of an engine with details."""

ENGINE_11: dict[str, Any] = {
    "Layers": [
        {
            "Name": "node_of_linear",
            "LayerType": "gemm",
            "Inputs": [{"Name": "h", "Dimensions": [8, 512], "Format": "Row major linear FP16 format (kLINEAR)", "DataType": "Half"}],
            "Outputs": [{"Name": "y", "Dimensions": [8, 1536], "Format": "Row major linear FP16 format (kLINEAR)", "DataType": "Half"}],
            "TacticName": "sm90_xmma_gemm_f16f16_f16f32",
        }
    ],
    "I/O Tensors": [
        {"Name": "input_ids", "IOMode": "Input", "DataType": "Int64", "Dimensions": [-1, 64], "Location": "Device"},
        {"Name": "nll", "IOMode": "Output", "DataType": "Float", "Dimensions": [-1, 64], "Location": "Device"},
    ],
}
"""Type and format are two fields from TensorRT 11 on."""


def test_an_engine_of_tensorrt_10_is_counted_by_what_its_layers_yield() -> None:
    found = engine_precisions(ENGINE_10)
    assert found.source == "engine"
    assert found.layers == {"float16": 2, "float32": 1}
    assert found.products == {"float16": 1}
    assert found.record() == {"engine_products": {"float16": 1}, "engine_layers": {"float16": 2, "float32": 1}}


def test_a_product_is_of_the_type_it_multiplies_in_whatever_is_fused_with_it() -> None:
    half, wide = {"Name": "a", "Format/Datatype": "Half"}, {"Name": "b", "Format/Datatype": "Float"}
    fused = {"LayerType": "gemm", "Inputs": [wide, half, half], "Outputs": [wide]}
    plain = {"LayerType": "gemm", "Inputs": [wide, wide], "Outputs": [wide]}
    assert engine_precisions({"Layers": [fused]}).products == {"float16": 1}
    assert engine_precisions({"Layers": [fused, plain]}).products == {"float16": 1, "float32": 1}


def test_the_name_of_a_kernel_says_what_the_factors_are_of_where_the_inputs_differ() -> None:
    half, wide = {"Name": "a", "Format/Datatype": "Half"}, {"Name": "b", "Format/Datatype": "Float"}
    layer = {"LayerType": "gemm", "Inputs": [wide, wide, half], "Outputs": [wide], "TacticName": "sm80_xmma_gemm_f32f32_f32f32_f32_nn_n"}
    assert engine_precisions({"Layers": [layer]}).products == {"float32": 1}
    assert engine_precisions({"Layers": [layer | {"TacticName": "sm75_xmma_gemm_f16f16_f16f32_f32_tn_n"}]}).products == {"float16": 1}
    assert engine_precisions({"Layers": [layer | {"TacticName": "cutlass_gemm"}]}).products == {"float16": 1}
    assert engine_precisions({"Layers": [layer | {"Inputs": [wide, wide], "TacticName": "gemm_f16f16_f16"}]}).products == {"float32": 1}


def test_an_engine_of_tensorrt_11_has_the_type_in_a_field_of_its_own() -> None:
    assert engine_precisions(ENGINE_11).record() == {"engine_products": {"float16": 1}, "engine_layers": {"float16": 1}}


def test_an_engine_without_details_has_layers_of_unknown_type() -> None:
    found = engine_precisions({"Layers": ["node_linear + node_add", "softmax"], "Bindings": ["x"]})
    assert found.record() == {"engine_layers": {"unknown": 2}}


def test_layers_of_forms_never_seen_are_unknown_and_no_error() -> None:
    odd = {"Layers": [{}, {"Name": "a", "Outputs": [{"Name": "b"}]}, {"Outputs": ["b"]}, 3, None]}
    assert engine_precisions(odd).layers == {"unknown": 5}
    assert engine_precisions({}).record() == {}


def test_an_engine_is_described_a_line_a_layer() -> None:
    lines = describe_engine(ENGINE_10)
    assert len(lines) == 3
    assert lines[0].split() == ["gemm", "float16", "->", "float16", "/layers.0/qkv/MatMul_myl0_3"]
    assert "float16 -> float32" in lines[1]
    assert describe_engine({"Layers": ["softmax"]})[0].split() == ["softmax"]


def test_constants_of_a_network_count_as_weights_by_their_size() -> None:
    found = Precisions("network")
    found.count("CONSTANT", "float16", (4, 5))
    found.count("CONSTANT", "float32", ())
    found.count("MATRIX_MULTIPLY", "float16", (-1, 5))
    found.count("NORMALIZATION", "float32", (-1, 5))
    assert found.record() == {
        "network_weights": {"float16": 20, "float32": 1},
        "network_products": {"float16": 1},
        "network_layers": {"float16": 1, "float32": 1},
    }
