"""Exported ONNX graphs made wrong: each function changes a loaded graph in place, as an exporter with that error would have written it.

Nodes and weights are found by what `export.onnx` names them. A graph in which they are not found is refused, never left as it is.
"""

# Shape suffixes: Q ext_len + tgt_len, K keys

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from txl_deploy.signature import state_names
from txl_train.config import MemoryKind, ModelConfig
from txl_train.errors import ArtifactError
from txl_train.model.attention import visible_keys
from txl_train.model.transformer_xl import TransformerXL

if TYPE_CHECKING:
    import onnx


def sum_in_the_tail(graph: onnx.GraphProto) -> None:
    """Let a tail word's probability be its cluster's plus its own within the cluster, where it is their product."""
    from onnx import helper

    for scatter in _nodes(graph, "ScatterElements"):
        product = _producer(graph, scatter.input[2], "Add")  # nll of the cluster + nll within it
        name = f"{product.output[0]}.sum"
        parts = [_chain(graph, f"{name}.{i}", value, "Neg", "Exp") for i, value in enumerate(product.input)]
        total = helper.make_node("Add", parts, [name], name=name)
        graph.node.append(total)
        scatter.input[2] = _chain(graph, name, name, "Log", "Neg")
    _sort(graph)


def clusters_in_reverse(graph: onnx.GraphProto) -> None:
    """Let tail cluster i take the score of the last but i."""
    for name in ("head.cluster_weight", "head.cluster_bias"):
        found = [tensor for tensor in graph.initializer if tensor.name == name]
        if found:  # a bias of zeros is left out by the exporter
            _write(found[0], _read(found[0])[::-1])
        elif name == "head.cluster_weight":
            raise _unlike("`head.cluster_weight`")


def memory_one_position_late(graph: onnx.GraphProto, config: ModelConfig, memory: MemoryKind) -> None:
    """Keep the positions that end one before the newest, so that every key seems one token nearer than it is."""
    from onnx import numpy_helper

    constants = {tensor.name: tensor for tensor in graph.initializer}
    for output in state_names(config, memory)[1]:
        node = _producer(graph, output)
        while node.op_type == "Cast":
            node = _producer(graph, node.input[0])
        if node.op_type != "Slice":
            raise _unlike(f"slice that ends in `{output}`")
        start = int(_read(constants[node.input[1]]).reshape(-1)[0]) - 1
        for place, value in ((1, start), (2, start + config.mem_len)):
            name = f"{output}.late.{place}"
            graph.initializer.append(numpy_helper.from_array(np.array([value], dtype=np.int64), name))
            node.input[place] = name


def other_positions(graph: onnx.GraphProto, terms: Sequence[Tensor]) -> None:
    """Replace each layer's position term, which the exporter folds into a constant."""
    by_name = {tensor.name: tensor for tensor in graph.initializer}
    for i, term in enumerate(terms):
        tensor = by_name.get(f"position_terms.{i}")
        if tensor is None:
            raise _unlike(f"`position_terms.{i}`")
        _write(tensor, term.detach().numpy())


def other_reach(graph: onnx.GraphProto, config: ModelConfig, tgt_len: int, max_distance: int) -> None:
    """Let queries see keys up to `max_distance` tokens back, a limit that the exporter folds into a constant mask."""
    filled = torch.tensor([config.mem_len + config.ext_len])
    own, wanted = (
        visible_keys(tgt_len, config.mem_len, limit, filled, config.ext_len)[:, 0].numpy() for limit in (config.max_distance, max_distance)
    )
    found = [tensor for tensor in graph.initializer if list(tensor.dims) == list(own.shape) and np.array_equal(_read(tensor), own)]
    if not found:
        raise _unlike("mask of distances")
    for tensor in found:
        _write(tensor, wanted)


def layers_exchanged(graph: onnx.GraphProto, first: int, second: int) -> None:
    """Exchange the weights of two layers, position terms included."""
    constants = {tensor.name: len(tensor.dims) for tensor in graph.initializer if tensor.data_type in _float_types()}
    uses = [
        [
            (node, i)
            for node in graph.node
            if node.name.startswith(f"decoder.layers.{layer}.")
            for i, name in enumerate(node.input)
            if constants.get(name, 0) > 0
        ]
        for layer in (first, second)
    ]
    if not uses[0] or [(node.op_type, i) for node, i in uses[0]] != [(node.op_type, i) for node, i in uses[1]]:
        raise _unlike(f"layers {first} and {second} of the same nodes")
    for (a, i), (b, j) in zip(*uses):
        a.input[i], b.input[j] = b.input[j], a.input[i]


def layer_norm_in_half(graph: onnx.GraphProto) -> None:
    """Compute the normalisations in float16, deviations squared and averaged as they are.

    ONNX Runtime computes float16 in float32 on a CPU, where nothing overflows, so the end of float16 is written into the graph as well.
    """
    from onnx import TensorProto, helper, numpy_helper

    half = helper.np_dtype_to_tensor_dtype(np.dtype(np.float16))
    norms = list(_nodes(graph, "LayerNormalization"))
    if not norms:
        raise _unlike("LayerNormalization")
    for name, value in (("axes", np.array([-1], dtype=np.int64)), ("largest", np.float16(65504)), ("infinity", np.float16(np.inf))):
        graph.initializer.append(numpy_helper.from_array(np.asarray(value), f"half_norm.{name}"))
    for number, norm in enumerate(norms):
        epsilon = next((attribute.f for attribute in norm.attribute if attribute.name == "epsilon"), 1e-5)
        p = f"half_norm.{number}"
        graph.initializer.append(numpy_helper.from_array(np.array(epsilon, dtype=np.float16), f"{p}.epsilon"))
        steps: list[tuple[str, list[str], str]] = [
            ("ReduceMean", [f"{p}.x", "half_norm.axes"], f"{p}.mean"),
            ("Sub", [f"{p}.x", f"{p}.mean"], f"{p}.deviation"),
            ("Mul", [f"{p}.deviation", f"{p}.deviation"], f"{p}.square"),
            ("Greater", [f"{p}.square", "half_norm.largest"], f"{p}.overflows"),
            ("Where", [f"{p}.overflows", "half_norm.infinity", f"{p}.square"], f"{p}.held"),
            ("ReduceMean", [f"{p}.held", "half_norm.axes"], f"{p}.variance"),
            ("Add", [f"{p}.variance", f"{p}.epsilon"], f"{p}.above_zero"),
            ("Sqrt", [f"{p}.above_zero"], f"{p}.spread"),
            ("Div", [f"{p}.deviation", f"{p}.spread"], f"{p}.normal"),
        ]
        graph.node.append(helper.make_node("Cast", [norm.input[0]], [f"{p}.x"], name=f"{p}.x", to=half))
        graph.node.extend(helper.make_node(kind, inputs, [output], name=output) for kind, inputs, output in steps)
        graph.node.append(helper.make_node("Cast", [f"{p}.normal"], [f"{p}.single"], name=f"{p}.single", to=TensorProto.FLOAT))
        graph.node.append(helper.make_node("Mul", [f"{p}.single", norm.input[1]], [f"{p}.scaled"], name=f"{p}.scaled"))
        graph.node.append(helper.make_node("Add", [f"{p}.scaled", norm.input[2]], [norm.output[0]], name=norm.output[0]))
        graph.node.remove(norm)
    _sort(graph)


def position_terms(model: TransformerXL, config: ModelConfig, tgt_len: int, dtype: str, *, half: bool = False) -> list[Tensor]:
    """Return the constants that an export of `config` folds positions into; with `half`, of distances and encodings in float16."""
    key_len = config.mem_len + config.ext_len + tgt_len
    with torch.no_grad():
        terms = _half_terms(model, config, key_len) if half else model.position_terms(config, key_len)
    layers = model.decoder_layers()
    return [term.contiguous() if dtype == "fp32" or layer.adds_positions else term.half() for term, layer in zip(terms, layers)]


def _half_terms(model: TransformerXL, config: ModelConfig, key_len: int) -> list[Tensor]:
    """As `TransformerXL.position_terms`, with what `model.to(float16)` makes of frequencies, distances and their product."""
    nearest = -1 if config.attn_type == "relative" else 0
    distances = torch.arange(key_len - 1, nearest - 1, -1).clamp(min=0, max=config.clamp_len)
    frequencies = (10000 ** -(torch.arange(0, config.d_model, 2, dtype=torch.float32) / config.d_model)).half()
    angles = distances.half()[:, None] * frequencies[None, :]
    positions = torch.cat([angles.sin(), angles.cos()], dim=1).float()
    return [layer.attention.position_term(positions) for layer in model.decoder_layers()]


# The graph


def _nodes(graph: onnx.GraphProto, kind: str) -> Iterator[onnx.NodeProto]:
    return iter([node for node in graph.node if node.op_type == kind])


def _producer(graph: onnx.GraphProto, value: str, kind: str | None = None) -> onnx.NodeProto:
    for node in graph.node:
        if value in node.output and kind in (None, node.op_type):
            found: onnx.NodeProto = node
            return found
    raise _unlike(f"{kind or 'node'} that makes `{value}`")


def _chain(graph: onnx.GraphProto, name: str, value: str, *kinds: str) -> str:
    """Append nodes of one input, one after the other, and return the name of what the last one makes."""
    from onnx import helper

    for kind in kinds:
        output = f"{name}.{kind.lower()}"
        graph.node.append(helper.make_node(kind, [value], [output], name=output))
        value = output
    return value


def _sort(graph: onnx.GraphProto) -> None:
    """Put nodes after those that they read from, as ONNX wants them."""
    made_here = {output for node in graph.node for output in node.output}
    known: set[str] = set()
    waiting, ordered = list(graph.node), []
    while waiting:
        ready = [node for node in waiting if all(name in known or name not in made_here for name in node.input)]
        assert ready, "the graph has a cycle"
        for node in ready:
            known.update(node.output)
        ordered += ready
        waiting = [node for node in waiting if node.output[0] not in known]
    copies = [_copy(node) for node in ordered]
    del graph.node[:]
    graph.node.extend(copies)


def _copy(node: onnx.NodeProto) -> onnx.NodeProto:
    copy = type(node)()
    copy.CopyFrom(node)
    return copy


def _read(tensor: onnx.TensorProto) -> npt.NDArray[Any]:
    from onnx import numpy_helper

    return numpy_helper.to_array(tensor)


def _write(tensor: onnx.TensorProto, values: npt.NDArray[Any]) -> None:
    from onnx import numpy_helper

    before = _read(tensor)
    if before.shape != values.shape or before.dtype != values.dtype:
        raise _unlike(f"`{tensor.name}` of shape {list(values.shape)} and type {values.dtype}")
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values), tensor.name))


def _float_types() -> tuple[int, ...]:
    from onnx import TensorProto

    return (TensorProto.FLOAT, TensorProto.FLOAT16)


def _unlike(what: str) -> ArtifactError:
    return ArtifactError(
        f"The exported graph has no {what}, so it cannot be made wrong on purpose.",
        remedy="constraints.txt names versions of torch and onnxscript whose graphs are known.",
    )
