"""What an artifact claims to be against what is found to run: format, device, precisions, lengths. A claim that is not so is exit 1.

Runtimes read back what they can, as plain values in `RuntimeInfo.readback`, and this module judges it:

* `weights`: matrices (tensors of two or more axes) of each type; vectors, such as those of the normalisations, do not count;
* `products`: matrix products of each type that they are computed in; those of int8 weights are of int8, whatever type the result has;
* `nodes`: nodes of a graph on each provider, and `elsewhere` those that compute on matrices outside the provider asked for, by operator;
* `integer_kernels`: of the products of int8 weights, how many each kernel computes;
* `layers`: layers of an engine of each type;
* `package`: what opened an engine;
* `settings`: what a script or a graph says of itself.

What is not there could not be read back and is not judged, except of an engine: a part of its layers is fused into what tells no type, so
where no product can be read the layers are judged, and where nothing can be read the engine does not pass.

Knows the names of types, formats and providers; opens no runtime.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from txl_deploy.manifest import BUILDER_FORMATS, MODEL_FILES, Manifest
from txl_train.errors import ArtifactError, ManifestError, ValidationError

if TYPE_CHECKING:
    from txl_deploy.runtimes.base import RuntimeInfo
    from txl_train.config import ModelConfig

FLOATS = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "float64": "fp64"}
"""What `--dtype` calls each type of floating-point numbers."""

STORED = {**FLOATS, "int8": "int8"}
"""What `--dtype` calls each type that weights are stored in."""

BUILDERS = {form: builder for builder, form in BUILDER_FORMATS.items()}
"""The package that builds and runs engines of each format."""

UNKNOWN = "unknown"
"""The type of what could not be read back."""

_REMEDY = "Export the checkpoint again with `txl export`."


def check_format(manifest: Manifest, directory: Path) -> None:
    """Compare the format that a manifest names with the files and the engine that it lists.

    Raises:
        ValidationError: they are of another format.
    """
    wanted = MODEL_FILES[manifest.format]
    listed = sorted(name for name in set(MODEL_FILES.values()) if name in manifest.files)
    builder = BUILDERS.get(manifest.format)
    reason = ""
    if listed != [wanted]:
        reason = f"holds {', '.join(listed) or 'no model'} instead of {wanted}"
    elif manifest.engine is not None and manifest.engine.builder != builder:
        reason = f"holds an engine of {manifest.engine.builder} instead of {builder}"
    if reason:
        raise ValidationError(f"{directory} claims to be of format {manifest.format}, but {reason}.", remedy=_REMEDY)


def audit(info: RuntimeInfo, manifest: Manifest | None = None) -> None:
    """Compare what a runtime says of itself, and the manifest it was opened by, with what was read back.

    Raises:
        ValidationError: naming every claim that is not so.
    """
    wrong = [*_placement(info), *_weights(info), *_products(info), *_layers(info), *_settings(info, manifest)]
    if manifest is not None:
        wrong += [*_records(info, manifest.precisions), *_engine_records(info, manifest.precisions)]
    if wrong:
        raise ValidationError(f"{info.origin or 'This model'} is not what it claims to be: {'; '.join(wrong)}.", remedy=_REMEDY)


def compute_type(products: Mapping[str, int], default: str = UNKNOWN) -> str:
    """Return what `--dtype` calls the type of these products; of several types all of them, and `default` of none.

    float32 beside int8 is no second type: products of attention, which have no weights, belong to what `--dtype` calls int8.
    """
    found = {FLOATS.get(name, name) for name, count in products.items() if count}
    return "+".join(sorted(found - {"fp32"} if "int8" in found else found)) or default


def count_matrices(tensors: Iterable[tuple[str, int]]) -> dict[str, int]:
    """Return the number of matrices of each type of `STORED` among tensors, given as type and number of axes."""
    counts: dict[str, int] = {}
    for dtype, axes in tensors:
        if dtype in STORED and axes >= 2:
            counts[dtype] = counts.get(dtype, 0) + 1
    return dict(sorted(counts.items()))


def summary(info: RuntimeInfo) -> dict[str, Any]:
    """Return what was read back as plain values for JSON; settings, which are claims already, are left out."""
    return {name: value for name, value in info.readback.items() if name != "settings"}


def _placement(info: RuntimeInfo) -> Iterator[str]:
    found = info.readback
    if info.name == "onnx":
        wanted = "CUDAExecutionProvider" if info.device.startswith("cuda") else "CPUExecutionProvider"
        if info.provider != wanted:
            yield f"it runs on {info.provider} instead of {wanted}"
        elif "nodes" in found and not found["nodes"].get(wanted):
            yield f"no node runs on {wanted}"
    if found.get("elsewhere"):
        nodes = ", ".join(f"{count} {name}" for name, count in found["elsewhere"].items())
        yield f"nodes that compute on matrices run outside {info.provider}: {nodes}"


def _weights(info: RuntimeInfo) -> Iterator[str]:
    weights = info.readback.get("weights")
    if weights is None:
        return
    wanted = next(name for name, short in STORED.items() if short == info.dtype)
    others = {name: count for name, count in weights.items() if name != wanted}
    # positions that are added to the inputs stay float32 as these do (`FixedStep`); beside int8 so do embeddings and positions
    allowed = {"float32": float(_added_positions(info.config)) if info.dtype == "fp16" else math.inf if info.dtype == "int8" else 0.0}
    if not weights.get(wanted):
        yield f"its weights are of {_listed(weights) or 'no floating-point type'} instead of {wanted}"
    elif any(count > allowed.get(name, 0.0) for name, count in others.items()):
        yield f"its weights are {_listed(weights)} instead of {wanted} alone"


def _products(info: RuntimeInfo) -> Iterator[str]:
    if info.dtype == "fp32" and info.compute == "tf32":
        yield "its products are computed in tf32 instead of fp32"
        return
    products = info.readback.get("products")
    if not products:
        return
    computed = compute_type(products, info.compute)
    if computed != info.compute:
        yield f"its products are computed in {computed}, but it says {info.compute}"
    if info.dtype == "int8" and computed != "int8":
        yield f"its products are computed in {computed} instead of int8 ({_listed(products)})"
    if info.dtype == "fp32" and computed != "fp32":
        yield f"its products are computed in {computed} instead of fp32"
    if info.dtype == "fp16" and computed != "fp16" and not info.device.startswith("cpu"):
        yield f"its products are computed in {computed} instead of fp16 ({_listed(products)})"


def _layers(info: RuntimeInfo) -> Iterator[str]:
    """Judge an engine none of whose products could be read by what its layers yield."""
    found = info.readback
    if info.name not in BUILDERS or "package" not in found or found.get("products"):
        return
    layers = {name: count for name, count in found.get("layers", {}).items() if name in FLOATS and count}
    narrow = {name for name in ("float16", "bfloat16") if name in layers}
    if not layers:
        yield f"nothing of it could be read back, neither products nor layers ({_listed(found.get('layers', {})) or 'no layer'})"
    elif info.dtype == "fp16" and "float16" not in layers:
        yield f"none of its layers is of float16 ({_listed(layers)})"
    elif info.dtype == "fp32" and narrow - ({"float16"} if info.memory_dtype == "fp16" else set()):
        yield f"its layers are of {_listed(layers)} instead of float32"


def _settings(info: RuntimeInfo, manifest: Manifest | None) -> Iterator[str]:
    """Compare with what the runtime says and, where there is one, with what the manifest says: the two may differ as well."""
    for name, value in info.readback.get("settings", {}).items():
        places = [info, info.config] if manifest is None else [info, info.config, manifest.settings, manifest]
        for claimed in [getattr(place, name) for place in places if hasattr(place, name)]:
            if value != claimed and (name, claimed) != ("checkpoint_sha256", None):  # opened without a manifest
                yield f"its `{name}` is {value} instead of {claimed}"
                break


def _records(info: RuntimeInfo, recorded: Mapping[str, Mapping[str, int]]) -> Iterator[str]:
    """Compare with what a manifest records of the same: whether there is any float16, as a CPU computes products of fp16 in fp32."""
    weights, products = info.readback.get("weights"), info.readback.get("products")
    for part, found in (("weights", weights), ("products", products if info.compute == info.dtype else None)):
        if part in recorded and found and ("float16" in recorded[part]) != ("float16" in found):
            yield f"its manifest records {part} of {_listed(recorded[part])}, but there are {_listed(found)}"
    if products:  # each integer product of the graph is one that runs: what fuses them joins none and leaves none out
        expected, found_int8 = recorded.get("products", {}).get("int8", 0), products.get("int8", 0)
        if "products" in recorded and expected != found_int8:
            yield f"its manifest records {expected} products of int8, but {found_int8} run"


def _engine_records(info: RuntimeInfo, recorded: Mapping[str, Mapping[str, int]]) -> Iterator[str]:
    """Compare an engine with what was read of it when it was built, and what it was built of with its claim where nothing was read."""
    if info.name not in BUILDERS:
        return
    types = {part: {name for name, count in counts.items() if name in FLOATS and count} for part, counts in recorded.items()}
    wanted = next(name for name, short in FLOATS.items() if short == info.dtype)
    products, layers = info.readback.get("products", {}), info.readback.get("layers", {})
    engine = types.get("engine_products")
    if engine and products and engine != set(products):
        yield f"its manifest records products of {_listed(recorded['engine_products'])}, but there are {_listed(products)}"
    network = types.get("network_products")
    if not engine and network and network != {wanted}:
        yield f"it was built of a network with products of {_listed(recorded['network_products'])} instead of {wanted}"
    known = types.get("engine_layers")
    if known and FLOATS.keys() & layers.keys() and ("float16" in known) != ("float16" in layers):
        yield f"its manifest records layers of {_listed(recorded['engine_layers'])}, but there are {_listed(layers)}"


def _added_positions(config: ModelConfig) -> int:
    return config.n_layer if config.attn_type in ("sinusoidal", "learned") else 0


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items())


# What an ONNX file stores, read without loading it: fields of protobuf messages, by the numbers that onnx.proto gives them.

_DIMS, _DATA_TYPE, _EXTERNAL_DATA = 1, 2, 13
_INITIALIZER = ("model", 7, 5)
"""Where a graph's weights stand; tensors elsewhere are constants of nodes."""
_WITHIN: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "function": {7: "node", 11: "attribute"},
    "training": {1: "graph", 2: "graph"},
}
"""The messages in which tensors can stand, and what each of their fields holds."""
_DEEPEST = 100
"""Messages within each other; graphs hold nodes that hold graphs."""
_ONNX_TYPES = {1: "float32", 3: "int8", 10: "float16", 11: "float64", 16: "bfloat16"}


def stored_matrices(path: Path) -> dict[str, int]:
    """Return the number of weights with two or more axes of each type of `STORED` in an ONNX file, whose values are skipped.

    Raises:
        ArtifactError: it is no ONNX file.
    """
    return count_matrices([(tensor.dtype, tensor.axes) for tensor in _tensors(path) if tensor.place == _INITIALIZER])


def check_external_files(path: Path, manifest: Manifest) -> None:
    """Make sure that an ONNX file takes tensors from no other files than those the manifest lists, and so has checksums of: neither
    weights, nor constants of nodes, nor what stands in the graphs within nodes.

    Raises:
        ManifestError: it names another one.
        ArtifactError: it is no ONNX file.
    """
    strangers = sorted({location for tensor in _tensors(path) for location in tensor.locations if location not in manifest.files})
    if strangers:
        raise ManifestError(f"{path} takes weights from {strangers[0]}, which its manifest does not list.", remedy=_REMEDY)


@dataclass(frozen=True)
class _Tensor:
    place: tuple[str | int, ...]
    """The file's message, and the numbers of the fields that lead to it."""
    dtype: str
    axes: int
    locations: tuple[str, ...]
    """Files that its values lie in; a reader takes the last one, and it has no more than one."""


def _tensors(path: Path) -> list[_Tensor]:
    """Return every tensor of an ONNX file; their values are skipped."""
    try:
        with path.open("rb") as file:
            return list(_tensors_within(file, path.stat().st_size, "model", ("model",)))
    except (EOFError, ValueError, OSError) as error:
        raise ArtifactError(f"{path} cannot be read as ONNX: {error}.", remedy=_REMEDY) from error


def _tensors_within(file: BinaryIO, end: int, message: str, place: tuple[str | int, ...]) -> Iterator[_Tensor]:
    if len(place) > _DEEPEST:
        raise ValueError(f"its messages lie more than {_DEEPEST} deep within each other")
    for field, stop in _fields(file, end):
        inner = _WITHIN[message].get(field)
        if inner == "tensor":
            yield _tensor(file, stop, (*place, field))
        elif inner is not None:
            yield from _tensors_within(file, stop, inner, (*place, field))


def _tensor(file: BinaryIO, end: int, place: tuple[str | int, ...]) -> _Tensor:
    axes, dtype, locations = 0, 0, []
    for field, value_end in _fields(file, end):
        if field == _DATA_TYPE:
            dtype = _varint(file)
        elif field == _DIMS:
            while file.tell() < value_end:  # packed or not
                _varint(file)
                axes += 1
        elif field == _EXTERNAL_DATA:
            entry = {key: file.read(stop - file.tell()).decode() for key, stop in _fields(file, value_end)}
            if entry.get(1) == "location":
                locations.append(entry.get(2, ""))
    return _Tensor(place, _ONNX_TYPES.get(dtype, ""), axes, tuple(locations))


def _fields(file: BinaryIO, end: int) -> Iterator[tuple[int, int]]:
    """Yield number and end of each field of a message that ends at `end`; whatever of a field is not read is skipped."""
    while file.tell() < end:
        key = _varint(file)
        wire_type = key & 7
        if wire_type == 0:
            start = file.tell()
            _varint(file)
            stop = file.tell()
            file.seek(start)
        elif wire_type == 2:
            size = _varint(file)
            stop = file.tell() + size
        elif wire_type in (1, 5):
            stop = file.tell() + (8 if wire_type == 1 else 4)
        else:
            raise ValueError(f"a field of type {wire_type}")
        if stop > end:
            raise EOFError("it ends within a field")
        yield key >> 3, stop
        file.seek(stop)


def _varint(file: BinaryIO) -> int:
    value = shift = 0
    while True:
        byte = file.read(1)
        if not byte:
            raise EOFError("it ends within a number")
        value |= (byte[0] & 0x7F) << shift
        shift += 7
        if byte[0] < 0x80:
            return value
        if shift > 63:
            raise ValueError("a number of more than 64 bits")
