"""Which element types an exported file really has, read back from what was written: of its weights, its products and its states.

Knows ONNX graphs and TorchScript modules. What was asked for is compared with what is there; an engine's own layers are read by
`trt.inspect`. Whether the numbers are right is parity's question, and whether values fit into float16 is that of `export.audit`.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from txl_deploy.export.quantize import integer_layers
from txl_deploy.signature import ELEMENTS
from txl_train.errors import ValidationError

if TYPE_CHECKING:
    import onnx

PRODUCTS = ("MatMul", "Gemm", "MatMulInteger")
"""Operators of ONNX that multiply matrices: the only ones in our graphs. The last one is that of int8."""

SENSITIVE = ("LayerNormalization", "Softmax", "LogSoftmax", "Exp", "Log", "Softplus", "ReduceSum", "ReduceMax", "ReduceMean")
"""Operators that stay float32: sums of many terms, and what is exponential."""

_FLOATS = ("float16", "bfloat16", "float32", "float64")
_LARGE = 4096
"""Weights of more elements are left out when types are inferred: no shape depends on them, and copies of them are large."""


@dataclass(frozen=True)
class Precisions:
    """What was found."""

    weights: dict[str, int]
    """Elements of weights (constants with one axis or more) by type."""
    weight_tensors: dict[str, int]
    """The weights themselves by type."""
    products: dict[str, int]
    """Matrix products by the type of their operands; `mixed` where these differ, and int8 for weights of int8 and inputs of uint8."""
    states: dict[str, int]
    """States that are returned, by type."""
    linear: dict[str, int] = field(default_factory=dict)
    """Of those products the linear layers that int8 is for, by how they multiply (`quantize.integer_layers`); empty of TorchScript."""
    problems: list[str] = field(default_factory=list)
    """What no graph of ours may have, whatever was asked for: one clause each."""

    def counts(self) -> dict[str, dict[str, int]]:
        """Return the figures as a manifest holds them (`Manifest.precisions`)."""
        return {"weights": self.weights, "weight_tensors": self.weight_tensors, "products": self.products, "states": self.states}


def require(found: Precisions, *, dtype: str, memory_dtype: str, path: Path) -> None:
    """Compare what a file has with what was asked for (`fp32`, `fp16` or `int8`).

    Raises:
        ValidationError: naming the first thing that differs.
    """
    product, state = ELEMENTS["fp32" if dtype == "int8" else dtype], ELEMENTS[memory_dtype]
    products, weights = dict(found.products), dict(found.weights)
    problems = list(found.problems)
    if dtype == "int8":
        n_products, n_weights = products.pop("int8", 0), weights.pop("int8", 0)
        problems += [f"{n} of its linear layers are in {name}" for name, n in found.linear.items() if name != "int8"]
        if n_products == 0 or n_weights == 0:
            problems.append("it has no integer product with weights of int8")
    problems += [f"{n} of its matrix products are in {name}" for name, n in products.items() if name != product]
    problems += [f"{n} of its states are {name}, not {state}" for name, n in found.states.items() if name != state]
    if not found.products:
        problems.append("it has no matrix product")
    if product == "float32" and set(weights) - {"float32"}:
        problems.append(f"it has weights of {', '.join(sorted(set(weights) - {'float32'}))}")
    if product == "float16" and found.weights.get("float16", 0) == 0:
        problems.append("none of its weights is float16")
    if problems:
        raise ValidationError(
            f"{path.name} was to be {dtype}, but is not: {problems[0]}.",
            remedy="This version of PyTorch exports this model differently; constraints.txt names versions that work.",
        )


def onnx_precisions(path: Path) -> Precisions:
    """Read an ONNX graph (weights in a file of their own are not opened) and infer the type of every tensor in it anew."""
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    graph = model.graph
    weights: Counter[str] = Counter()
    tensors: Counter[str] = Counter()
    constants = {}
    for tensor in graph.initializer:
        name = _element(tensor.data_type)
        constants[tensor.name] = name
        if tensor.dims and name in (*_FLOATS, "int8"):
            weights[name] += _product(tensor.dims)
            tensors[name] += 1
    types = _inferred_types(model) | constants
    problems = _problems(graph, types, set(constants))
    products = Counter(_multiplied(node, types) for node in graph.node if node.op_type in PRODUCTS)
    states = Counter(types.get(value.name, "unknown") for value in graph.output if value.name.startswith(("present.", "new_mems.")))
    linear = _sorted(integer_layers(model))
    return Precisions(_sorted(weights), _sorted(tensors), _sorted(products), _sorted(states), linear, problems)


def torchscript_precisions(path: Path, arguments: Iterable[Any]) -> Precisions:
    """Load a TorchScript module, run it once on `arguments` (those of the step, on the CPU) and watch what it multiplies."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch.jit is deprecated in 2.13 and works
        module: Any = torch.jit.load(str(path), map_location="cpu")  # type: ignore[no-untyped-call]
    unique = {parameter.data_ptr(): parameter for parameter in module.parameters() if parameter.numel()}.values()
    weights: Counter[str] = Counter()
    tensors: Counter[str] = Counter()
    for parameter in unique:
        name = _name(parameter.dtype)
        weights[name] += parameter.numel()
        tensors[name] += 1
    watch = _Watch()
    with torch.inference_mode(), watch:
        states = module(*arguments)[-1]
    returned = Counter(_name(state.dtype) for state in states)
    return Precisions(_sorted(weights), _sorted(tensors), _sorted(watch.products), _sorted(returned), {}, sorted(watch.problems))


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch does not annotate it
    """Counts matrix products by the types of their operands, and notes what should be float32 and is not, while it is entered."""

    _PRODUCTS = ("linear", "matmul", "mm", "bmm", "addmm", "baddbmm")
    _SENSITIVE = ("layer_norm", "softmax", "exp", "log", "sum", "amax", "logaddexp")

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.products: Counter[str] = Counter()
        self.problems: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        operands = [_name(value.dtype) for value in args if isinstance(value, Tensor)]
        operator = func.name().removeprefix("aten::").partition(".")[0]
        if operator in self._PRODUCTS:
            self.products[_common(operands)] += 1
        if operator in self._SENSITIVE and set(operands) & (set(_FLOATS) - {"float32"}):
            self.problems.add(f"{operator} is computed in {_common(operands)}")
        return func(*args, **(kwargs or {}))


def _problems(graph: onnx.GraphProto, types: Mapping[str, str], constants: set[str]) -> list[str]:
    problems = [f"`{name}` is {found}" for name, found in types.items() if found in ("float64", "bfloat16")]
    fixed = set(constants)  # what depends on no input
    for node in graph.node:
        if node.op_type in SENSITIVE and (found := types.get(node.input[0], "unknown")) not in ("float32", "int64"):
            problems.append(f"{node.op_type} `{node.name}` is computed in {found}")
        if node.op_type == "Cast" and node.input[0] in fixed:
            problems.append(f"the weight `{node.input[0]}` is converted at run time")
        if all(name in fixed for name in node.input if name):
            fixed.update(node.output)
    embedded = {node.input[0]: types[node.input[0]] for node in graph.node if node.op_type == "Gather" and node.input[0] in constants}
    multiplied = {_multiplied(node, types) for node in graph.node if node.op_type in PRODUCTS}
    for name, found in embedded.items():
        if found in _FLOATS and multiplied == {"float16"} and found != "float16":
            problems.append(f"the embedding `{name}` is {found}")
    return problems


def _inferred_types(model: onnx.ModelProto) -> dict[str, str]:
    """Return the element type of each tensor by name; what the exporter notes of them is not believed."""
    import onnx

    bare = onnx.ModelProto(ir_version=model.ir_version)
    bare.opset_import.extend(model.opset_import)
    bare.graph.name = model.graph.name
    bare.graph.node.extend(model.graph.node)
    bare.graph.input.extend(model.graph.input)
    for output in model.graph.output:
        bare.graph.output.add().name = output.name
    for tensor in model.graph.initializer:
        if _product(tensor.dims) > _LARGE or tensor.data_location == onnx.TensorProto.EXTERNAL:
            bare.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
        else:
            bare.graph.initializer.append(tensor)
    inferred = onnx.shape_inference.infer_shapes(bare, data_prop=True).graph
    return {value.name: _element(value.type.tensor_type.elem_type) for value in (*inferred.input, *inferred.value_info, *inferred.output)}


def _element(number: int) -> str:
    """Return the name that numpy has for one of ONNX's element types."""
    import onnx

    name: str = onnx.TensorProto.DataType.Name(number).lower()
    return {"float": "float32", "double": "float64"}.get(name, name)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _multiplied(node: onnx.NodeProto, types: Mapping[str, str]) -> str:
    """Return the type that a product's operands have, as `Precisions.products` calls it; zero points are no operands."""
    if node.op_type != "MatMulInteger":
        return _common(types.get(operand) for operand in node.input if operand)
    operands = tuple(types.get(operand, "unknown") for operand in node.input[:2])
    return "int8" if operands == ("uint8", "int8") else _common(operands)


def _common(names: Iterable[str | None]) -> str:
    """Return the one type that all have, or `mixed`."""
    different = {name or "unknown" for name in names}
    return different.pop() if len(different) == 1 else "mixed"


def _sorted(counts: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted(counts.items()))


def _product(numbers: Iterable[int]) -> int:
    result = 1
    for number in numbers:
        result *= number
    return result
