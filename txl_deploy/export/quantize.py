"""Rewrites a float32 graph so that its linear layers multiply integers: weights int8 per output channel, inputs uint8 per call.

A linear layer is a product with a constant matrix: queries, keys and values, attention's output, the feed-forward layers, projections
and the softmax's tables. Its weights are rounded symmetrically to -127..127 with one scale for each output, its input to 0..255 with one
scale and one zero point for the whole tensor, which the graph computes in each step (`DynamicQuantizeLinear`); sums are int32.
The standard operators that a layer becomes are the pattern that ONNX Runtime fuses into one kernel. All else stays float32: products of
attention and of positions, which have no weights, normalisations, softmax, log-sum-exp, embeddings that are looked up, states. As a scale
is that of a whole tensor, streams of one batch take part in each other's rounding: beside other streams, one gets other last digits.

`onnxruntime.quantization.quantize_dynamic` makes the same weights (a test holds both together), but needs onnxruntime to export, rounds
positions too, and gives nodes names that no longer tell their module.

Knows ONNX graphs. Which types a file has is read back by `export.precision`, and what it costs in perplexity is told by a receipt.
"""

# Shape suffixes: K inputs of a layer, N outputs

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from txl_deploy.export.onnx import DATA_FILE_NAME, EXTERNAL_DATA_BYTES, FILE_NAME
from txl_train.errors import ValidationError
from txl_train.model.int8 import rounded_weight

if TYPE_CHECKING:
    import onnx

MIN_OUTPUTS = 8
"""Layers of fewer outputs stay float32: nothing is gained in them (the columns of the tail clusters, of which there are three)."""

_POSITIONS = "position_term"
"""What constants that positions became are called: products with them belong to attention, whatever their shape."""


def quantize_file(directory: Path) -> list[str]:
    """Rewrite `model.onnx` in `directory`, as `export_onnx` left it, and return the names of the files.

    Raises:
        ValidationError: as `quantize_linear_layers`, or the result is not valid ONNX.
    """
    import onnx

    path = directory / FILE_NAME
    model = onnx.load(str(path))
    quantize_linear_layers(model)
    (directory / DATA_FILE_NAME).unlink(missing_ok=True)  # values are appended to a file that is there
    external = sum(tensor.ByteSize() for tensor in model.graph.initializer) > EXTERNAL_DATA_BYTES
    onnx.save_model(model, str(path), save_as_external_data=external, location=DATA_FILE_NAME, size_threshold=1024)
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ValidationError(f"The graph is not valid ONNX after its layers became int8: {error}") from error
    return [FILE_NAME, DATA_FILE_NAME] if external else [FILE_NAME]


def quantize_linear_layers(model: onnx.ModelProto) -> int:
    """Rewrite the linear layers of `model`, in place, and return their number. The same graph gives the same bytes.

    A weight that something else reads as well, such as an embedding that is tied to the softmax, stays for that as it is.

    Raises:
        ValidationError: there is no linear layer, one has weights that are not finite, or is written in a way that is not known.
    """
    from onnx import TensorProto, helper, numpy_helper

    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    layers = {node.output[0]: node for node in linear_layers(model)}
    if not layers:
        raise ValidationError("The graph has no linear layer that could be int8.", remedy="Use `--dtype fp32`.")
    nodes: list[onnx.NodeProto] = []
    rounded: set[str] = set()
    tables: dict[tuple[str, bool], tuple[str, str]] = {}
    for node in graph.node:
        if node.output[0] not in layers:
            nodes.append(node)
            continue
        taken, weight, *bias = node.input
        key = (weight, transposed(node))
        if key not in tables:
            values_KN = numpy_helper.to_array(constants[weight]).T if key[1] else numpy_helper.to_array(constants[weight])
            try:
                whole_KN, scale_N = rounded_weights(values_KN)
            except ValueError as error:
                raise ValidationError(f"The weight `{weight}` cannot be int8: {error}.", remedy="Use `--dtype fp32`.") from error
            tables[key] = f"{weight}_int8", f"{weight}_scale"
            graph.initializer.append(numpy_helper.from_array(whole_KN, tables[key][0]))
            graph.initializer.append(numpy_helper.from_array(scale_N, tables[key][1]))
        whole, scale = tables[key]
        if taken not in rounded:  # products of one input share its rounding
            rounded.add(taken)
            parts = [f"{taken}_{part}" for part in ("uint8", "scale", "zero_point")]
            nodes.append(helper.make_node("DynamicQuantizeLinear", [taken], parts, name=f"{node.name}_round"))
        result = node.output[0]
        product, real, scales = f"{result}_int32", f"{result}_float", f"{result}_scales"
        scaled = f"{result}_scaled" if bias else result
        nodes += [
            helper.make_node("MatMulInteger", [f"{taken}_uint8", whole, f"{taken}_zero_point"], [product], name=node.name),
            helper.make_node("Cast", [product], [real], name=f"{node.name}_float", to=TensorProto.FLOAT),
            helper.make_node("Mul", [f"{taken}_scale", scale], [scales], name=f"{node.name}_scales"),
            helper.make_node("Mul", [real, scales], [scaled], name=f"{node.name}_scaled"),
        ]
        if bias:
            nodes.append(helper.make_node("Add", [scaled, bias[0]], [result], name=f"{node.name}_bias"))
    del graph.node[:]
    graph.node.extend(nodes)
    read = {name for node in nodes for name in node.input} | {value.name for value in graph.output}
    for i in reversed(range(len(graph.initializer))):
        if graph.initializer[i].name not in read:
            del graph.initializer[i]
    return len(layers)


def rounded_weights(values_KN: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Return int8 [K, N] and float32 scales [N]: `int8.rounded_weight` of a graph's constants. ValueError if they are not finite."""
    whole_NK, scale_N = rounded_weight(torch.from_numpy(np.array(values_KN.T, order="C")))
    return np.ascontiguousarray(whole_NK.numpy().T), scale_N.numpy()


def linear_layers(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """Yield the products that int8 is for and that are not integer products.

    Raises:
        ValidationError: of a `Gemm` that is no linear layer as PyTorch has it: factors before its terms, or a transposed input.
    """
    shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type not in ("MatMul", "Gemm"):
            continue
        shape = shapes.get(node.input[1], ())
        if len(shape) != 2 or _POSITIONS in node.input[1] or shape[0 if transposed(node) else 1] < MIN_OUTPUTS:
            continue
        given = {attribute.name: attribute.f if attribute.name in ("alpha", "beta") else attribute.i for attribute in node.attribute}
        if given.get("alpha", 1.0) != 1.0 or given.get("beta", 1.0) != 1.0 or given.get("transA", 0):
            raise ValidationError(
                f"The product `{node.name}` has factors, or a transposed input, and cannot be int8.",
                remedy="This version of PyTorch exports this model differently; constraints.txt names versions that work.",
            )
        yield node


def integer_layers(model: onnx.ModelProto) -> Counter[str]:
    """Return the number of linear layers by how they multiply: int8 for integer products of int8 weights, float32 for those of others."""
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    int8 = 3  # TensorProto.INT8
    counts = Counter("float32" for _ in linear_layers(model))
    for node in model.graph.node:
        if node.op_type == "MatMulInteger":
            counts["int8" if types.get(node.input[1]) == int8 else "unknown"] += 1
    return counts


def transposed(node: onnx.NodeProto) -> bool:
    """Return whether a product takes its weights as [N, K]."""
    return any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
