"""Which precisions an engine has: counted in the network before the build, or read from what the package's inspector says afterwards.

A strongly typed network says what each layer yields, and the builder may not change that; but it fuses layers and chooses kernels.
What really runs is known from the engine alone, which takes a GPU to open. So every count says where it was read. Knows the JSON of
the inspectors of TensorRT 10, 11 and TensorRT-RTX; imports none of them.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

PRODUCTS = frozenset({"MATRIX_MULTIPLY", "EINSUM", "CONVOLUTION", "DECONVOLUTION"})
"""Types of a network's layers that are matrix products."""

UNKNOWN = "unknown"
"""What the inspector says nothing of: the engine was built without details."""

_TACTIC = re.compile(r"gemm_(f16f16|bf16bf16|f32f32)_", re.IGNORECASE)
_TACTIC_TYPES = {"f16f16": "float16", "bf16bf16": "bfloat16", "f32f32": "float32"}
"""How names of kernels begin that say what their two factors are of, such as `sm75_xmma_gemm_f16f16_f16f32_f32_tn_n_…`."""
_PRODUCT_WORDS = re.compile(r"gemm|matmul|matrixmultiply|matrix_multiply|convolution|fprop|einsum|_mha|_fmha", re.IGNORECASE)
_TYPES = (
    (re.compile(r"\b(half|fp16|float16)\b", re.I), "float16"),
    (re.compile(r"\b(bf16|bfloat16)\b", re.I), "bfloat16"),
    (re.compile(r"\b(fp8|float8\w*)\b", re.I), "fp8"),
    (re.compile(r"\b(float|fp32|float32)\b", re.I), "float32"),
    (re.compile(r"\bint64\b", re.I), "int64"),
    (re.compile(r"\bint32\b", re.I), "int32"),
    (re.compile(r"\bint8\b", re.I), "int8"),
    (re.compile(r"\bbool\b", re.I), "bool"),
)
"""How the inspectors call types: `Half`, `Row major linear FP16 format`, `Float`, …"""


@dataclass
class Precisions:
    """How much of an engine there is of each type, by the types' numpy names."""

    source: Literal["network", "engine"]
    """Where it was read: in the network that was parsed, or in the engine that was built of it."""
    weights: Counter[str] = field(default_factory=Counter)
    """Numbers in the constants; empty where read from an engine, which does not tell."""
    products: Counter[str] = field(default_factory=Counter)
    """Matrix products, by what they yield; an engine's by what they read."""
    layers: Counter[str] = field(default_factory=Counter)
    """Layers, by what they yield; an engine's are fused ones."""

    def count(self, kind: str, dtype: str, shape: tuple[int, ...]) -> None:
        """Count an output of a network's layer of that `tensorrt.LayerType`."""
        if kind == "CONSTANT":
            self.weights[dtype] += math.prod(shape)
        else:
            self.layers[dtype] += 1
            if kind in PRODUCTS:
                self.products[dtype] += 1

    def record(self) -> dict[str, dict[str, int]]:
        """Return it as a manifest keeps it: `network_layers` or `engine_layers`, and so on, each by type; empty ones left out."""
        counts = {"weights": self.weights, "products": self.products, "layers": self.layers}
        return {f"{self.source}_{name}": dict(sorted(types.items())) for name, types in counts.items() if types}


def engine_precisions(information: Mapping[str, Any]) -> Precisions:
    """Return what the inspector's JSON says: `EngineHandle.inspect` of an engine built with details.

    Without details the JSON holds names alone, and every layer counts as `unknown`.
    """
    found = Precisions("engine")
    for layer in information.get("Layers", ()):
        types = _layer_types(layer)
        found.layers.update(types)
        if _is_product(layer):
            found.products.update(_operand_type(layer) or types)
    return found


def describe_engine(information: Mapping[str, Any]) -> list[str]:
    """Return one line a layer, for people: its type of kernel, what it reads and yields, its name."""
    lines = []
    for layer in information.get("Layers", ()):
        if not isinstance(layer, Mapping):
            lines.append(f"{'':24} {layer}")
            continue
        reads = ",".join(sorted({_type_of(tensor) for tensor in layer.get("Inputs", ())}))
        lines.append(f"{layer.get('LayerType', ''):24} {reads} -> {','.join(_layer_types(layer))}  {layer.get('Name', '')}")
    return lines


def _layer_types(layer: Any) -> Iterable[str]:
    if not isinstance(layer, Mapping):
        return [UNKNOWN]
    return sorted({_type_of(tensor) for tensor in layer.get("Outputs", ())}) or [UNKNOWN]


def _operand_type(layer: Mapping[str, Any]) -> Sequence[str]:
    """Return the type that a product multiplies in.

    Its inputs are listed without their roles, those of what is fused with it among them. So unless they are all of one type, the name of
    its kernel decides; where that says nothing it is the narrowest, as what is fused with a product may read and yield a wider one.
    """
    types = {_type_of(tensor) for tensor in layer.get("Inputs", ())}
    floats = [name for name in ("float16", "bfloat16", "float32") if name in types]
    tactic = _TACTIC.search(str(layer.get("TacticName", "")))
    return [_TACTIC_TYPES[tactic.group(1).lower()]] if tactic and len(floats) != 1 else floats[:1]


def _type_of(tensor: Any) -> str:
    if not isinstance(tensor, Mapping):
        return UNKNOWN
    by_key = {str(key).lower(): value for key, value in tensor.items()}
    # One field up to TensorRT 10, two from 11 on.
    text = str(by_key.get("format/datatype") or by_key.get("datatype") or by_key.get("format") or "")
    return next((name for pattern, name in _TYPES if pattern.search(text)), UNKNOWN)


def _is_product(layer: Any) -> bool:
    if not isinstance(layer, Mapping):
        return False
    return any(_PRODUCT_WORDS.search(str(layer.get(key, ""))) for key in ("LayerType", "ParameterType", "TacticName"))
