"""A step of fixed lengths as an ONNX graph of opset 18, through torch.export, with named inputs and outputs and a free batch axis.

The graph is checked against its signature here, before anything is written. Whether it computes the right numbers is parity's question.
"""

from __future__ import annotations

import ast
import contextlib
import gc
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from txl_deploy.signature import BATCH, Signature, TensorSpec, step_signature
from txl_train.errors import EnvironmentUnfitError, ValidationError
from txl_train.model.adaptive import cluster_rows
from txl_train.model.inference import FixedStep, InferenceStep

if TYPE_CHECKING:
    import onnx

OPSET = 18
FILE_NAME = "model.onnx"
DATA_FILE_NAME = "model.onnx_data"
EXTERNAL_DATA_BYTES = 1_500_000_000
"""Weights above this go into a file of their own: a protobuf message ends at 2 GiB."""

_EXAMPLE_BATCH = 3
"""Sizes of 0 and 1 are specialised by the exporter, and equal sizes are taken for the same axis."""


def export_onnx(step: FixedStep, directory: Path, metadata: dict[str, str], *, batch_size: int | None = None) -> list[str]:
    """Write `model.onnx` (and `model.onnx_data` for large weights) into `directory`; return the names of the files.

    The same step and metadata give the same bytes.

    Args:
        step: in evaluation mode.
        metadata: strings stored in the file under `txl.{key}`.
        batch_size: a fixed number of streams; None leaves that axis free.

    Raises:
        EnvironmentUnfitError: onnx or onnxscript is not installed.
        ValidationError: the exporter's graph is invalid or has other inputs, outputs or axes than asked for.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401  # torch.onnx needs it
    except ImportError as error:
        raise EnvironmentUnfitError(f"{error.name} is not installed.", remedy="Install it with `pip install 'txl[onnx]'`.") from error
    signature = step_signature(
        step.config, tgt_len=step.tgt_len, memory=step.memory, head=step.head_kind, memory_dtype=step.memory_dtype_name, batch=batch_size
    )
    model = _to_graph(step, signature)
    _name_nodes(model)
    _strip(model)
    for key, value in sorted(metadata.items()):
        entry = model.metadata_props.add()
        entry.key, entry.value = f"txl.{key}", value
    _name_axes(model, signature)
    check_signature(model, signature)
    path = directory / FILE_NAME
    external = sum(tensor.ByteSize() for tensor in model.graph.initializer) > EXTERNAL_DATA_BYTES
    onnx.save_model(model, str(path), save_as_external_data=external, location=DATA_FILE_NAME, size_threshold=1024)
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ValidationError(f"The exported graph is not valid ONNX: {error}") from error
    return [FILE_NAME, DATA_FILE_NAME] if external else [FILE_NAME]


def _to_graph(step: FixedStep, signature: Signature) -> onnx.ModelProto:
    streams = signature.inputs[0].axes[0]
    batch: dict[int, Any] = {} if isinstance(streams, int) else {0: torch.export.Dim(BATCH)}
    arguments = example_arguments(step, streams if isinstance(streams, int) else _EXAMPLE_BATCH)
    shapes: list[Any] = [batch]
    if isinstance(step, InferenceStep):
        shapes += [batch, [{0: torch.export.Dim(f"target_rows_{i}")} for i in range(1, step.head.n_cluster + 1)]]
    shapes += [batch, [batch for _ in arguments[-1]]]
    with warnings.catch_warnings(), _quiet_exporter(), _no_garbage_collection(), torch.no_grad():
        warnings.simplefilter("ignore")  # of the exporter about itself: deprecated internals, names shared by equal axes
        program: Any = torch.onnx.export(
            step,
            tuple(arguments),
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=tuple(shapes),
            input_names=[spec.name for spec in signature.inputs],
            output_names=[spec.name for spec in signature.outputs],
            external_data=False,
            optimize=True,
            verbose=False,
        )
    model: onnx.ModelProto = program.model_proto
    return model


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Keep from the user what the exporter logs about packages that are not needed (torchvision)."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Let the exporter keep its hundred thousands of small objects unexamined: it is a fifth faster so."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def example_arguments(step: FixedStep, B: int) -> list[Any]:
    """Return arguments of `step.forward` for B streams at a cold start, with targets in every cluster where there is room."""
    memory = step.initial_memory(B)
    ids_BT = _example_ids(step, B)
    arguments: list[Any] = [torch.cat([ids_BT.new_zeros(B, step.ext_len), ids_BT], dim=1)]
    if isinstance(step, InferenceStep):
        arguments += [ids_BT, cluster_rows(ids_BT.reshape(-1), step.head.cluster_ends)]
    return [*arguments, memory.length_B, memory.states]


def _example_ids(step: FixedStep, B: int) -> torch.Tensor:
    """Return ids [B, T] with targets in every cluster, in different numbers of 2 or more where there is room."""
    ends = step.head.cluster_ends
    n_token = B * step.tgt_len
    ids = torch.zeros(n_token, dtype=torch.int64)
    place = 0
    for i, low in enumerate(ends[1:-1]):
        count = min(i + 2, max(n_token - place, 0))
        ids[place : place + count] = low
        place += count
    return ids.view(B, step.tgt_len)


def _name_nodes(model: onnx.ModelProto) -> None:
    """Put the module that a node belongs to before its name, `decoder.layers.3.attention/softmax_3`, which tells it to whoever looks into
    the graph or an engine, and to `parity/layers.py`; the exporter notes it in metadata that does not stay."""
    for node in model.graph.node:
        scopes = next((entry.value for entry in node.metadata_props if entry.key == "pkg.torch.onnx.name_scopes"), "[]")
        modules = ast.literal_eval(scopes)[:-1]  # from the outermost to the innermost, and the operation itself
        if modules:
            node.name = f"{modules[-1]}/{node.name.removeprefix('node_')}".lstrip("/")


def _strip(model: onnx.ModelProto) -> None:
    """Remove what the exporter notes for its own debugging: stack traces with paths, which differ from machine to machine."""
    model.graph.doc_string = model.doc_string = ""
    del model.metadata_props[:]
    del model.graph.metadata_props[:]
    for part in (*model.graph.node, *model.graph.value_info, *model.graph.input, *model.graph.output, *model.graph.initializer):
        part.doc_string = ""
        del part.metadata_props[:]


def _name_axes(model: onnx.ModelProto, signature: Signature) -> None:
    """Give free axes the names of the signature: the exporter drops them now and then for symbols of its own."""
    names: dict[str, str] = {}
    for specs, values in ((signature.inputs, model.graph.input), (signature.outputs, model.graph.output)):
        for spec, value in zip(specs, values):
            for axis, dim in zip(spec.axes, value.type.tensor_type.shape.dim):
                if isinstance(axis, str) and dim.HasField("dim_param"):
                    names[dim.dim_param] = axis
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in names:
                dim.dim_param = names[dim.dim_param]


def check_signature(model: onnx.ModelProto, signature: Signature) -> None:
    """Raise `ValidationError` where a graph has other inputs or outputs than its signature says."""
    names = {1: "float32", 7: "int64", 10: "float16"}  # TensorProto.DataType
    for expected, values in ((signature.inputs, model.graph.input), (signature.outputs, model.graph.output)):
        found = []
        for value in values:
            tensor = value.type.tensor_type
            axes = tuple(dim.dim_param if dim.HasField("dim_param") else dim.dim_value for dim in tensor.shape.dim)
            found.append(TensorSpec(value.name, names.get(tensor.elem_type, str(tensor.elem_type)), axes))
        if tuple(found) != expected:
            differing = [f"{have} instead of {want}" for have, want in zip(found, expected) if have != want]
            raise ValidationError(
                f"The exporter changed the graph's interface: {'; '.join(differing) or 'another number of tensors'}.",
                remedy="This version of PyTorch exports this model differently; constraints.txt names versions that work.",
            )
