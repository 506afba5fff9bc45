"""Gives an ONNX graph the form for servers: every tensor begins with the axis of streams and has another one behind it.

Servers that keep each stream's memory themselves (Triton's implicit state) put streams side by side along the first axis, and know no
tensor without a second one. So the graph finds the rows of the tail clusters itself, and takes the valid lengths as [B, 1]. Nodes are added
at the edges of the graph, and nothing between is touched; it is compared with the graph it was made from all the same.

Knows ONNX graphs; which tensors there are is known by `signature`.
"""

# Shape suffixes: B batch, T tgt_len, N = B * T targets, R of them in one cluster

from __future__ import annotations

import dataclasses
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import txl_train
from txl_deploy import manifest as manifests
from txl_deploy.bench.environment import git_commit
from txl_deploy.export.artifact import VOCABULARY_FILE, check_target, folder_beside
from txl_deploy.export.onnx import DATA_FILE_NAME, EXTERNAL_DATA_BYTES, FILE_NAME, check_signature
from txl_deploy.manifest import Manifest
from txl_deploy.parity.rollout import BATCH_SIZE, ParityResult, compare, random_segments
from txl_deploy.runtimes.registry import artifact_config, open_artifact
from txl_deploy.signature import step_signature
from txl_train.errors import EnvironmentUnfitError, PackageMissingError, UsageError, ValidationError
from txl_train.files import file_sha256

if TYPE_CHECKING:
    import onnx


@dataclass(frozen=True)
class Served:
    """A graph in the form for servers, and how it compared with the one it was made from (None where its runtime is not installed)."""

    directory: Path
    manifest: Manifest
    parity: ParityResult | None


def export_served(artifact: Path, out: Path, *, overwrite: bool = False, command: str = "txl export") -> Served:
    """Write the ONNX graph of `artifact` in the form for servers into the folder `out`, an artifact like any other.

    Raises:
        UsageError: `out` exists; the artifact is no ONNX graph, has this form already, or reads tokens before each segment once more.
        ManifestError: the artifact is damaged.
        EnvironmentUnfitError: onnx is not installed.
        ValidationError: what was written computes something else.
    """
    check_target(out, overwrite=overwrite)
    parent = manifests.read_verified(artifact)
    check_can_be_served(artifact, parent)
    try:
        import onnx
    except ImportError as error:
        raise EnvironmentUnfitError("onnx is not installed.", remedy="Install it with `pip install 'txl[onnx]'`.") from error
    config, settings = artifact_config(parent), parent.settings
    fixed = parent.batch.max if parent.batch.max == parent.batch.min else None
    signature = step_signature(
        config,
        tgt_len=settings.tgt_len,
        memory=settings.memory,
        head=settings.head,
        memory_dtype=settings.memory_dtype,
        batch=fixed,
        served=True,
    )
    with folder_beside(out, overwrite=overwrite) as directory:
        model = onnx.load(str(manifests.artifact_file(artifact, FILE_NAME)))
        serve_graph(model, list(config.cluster_ends) if settings.head == "nll" else [])
        check_signature(model, signature)
        path = directory / FILE_NAME
        external = sum(tensor.ByteSize() for tensor in model.graph.initializer) > EXTERNAL_DATA_BYTES
        onnx.save_model(model, str(path), save_as_external_data=external, location=DATA_FILE_NAME, size_threshold=1024)
        onnx.checker.check_model(str(path), full_check=True)
        shutil.copyfile(artifact / manifests.FILE_NAME, directory / manifests.PARENT_FILE)
        shutil.copyfile(manifests.artifact_file(artifact, VOCABULARY_FILE), directory / VOCABULARY_FILE)
        files = [FILE_NAME, *([DATA_FILE_NAME] if external else []), manifests.PARENT_FILE, VOCABULARY_FILE]
        inputs, outputs = (
            [manifests.TensorRecord(name=spec.name, dtype=spec.dtype, axes=list(spec.axes)) for spec in specs]
            for specs in (signature.inputs, signature.outputs)
        )
        source = dataclasses.replace(
            parent.source,
            parent=manifests.Parent(manifest_sha256=file_sha256(directory / manifests.PARENT_FILE), format=parent.format),
        )
        manifest = manifests.write_manifest(
            directory,
            dataclasses.replace(
                parent,
                files={},
                source=source,
                inputs=inputs,
                outputs=outputs,
                versions=parent.versions | {"txl": txl_train.__version__, "onnx": onnx.__version__},
                command=command,
                git_commit=git_commit(),
            ),
            files,
        )
        try:
            before, after = open_artifact(artifact), open_artifact(directory)
        except PackageMissingError:
            return Served(out, manifest, None)
        parity = compare(before, after, random_segments(config, tgt_len=settings.tgt_len, batch_size=fixed or BATCH_SIZE))
        if not parity.passed:
            raise ValidationError(f"The graph for servers computes something else than {artifact}: {parity.reason}. Nothing was written.")
    return Served(out, manifest, parity)


def check_can_be_served(artifact: Path, manifest: Manifest) -> None:
    """Raise `UsageError` for what has no form for servers."""
    if manifest.format != "onnx":
        raise UsageError(
            f"A graph for servers is made of ONNX, and {artifact} holds {manifest.format}.",
            remedy="Export with `--format onnx` first; an engine is built of the graph for servers.",
        )
    if manifest.served:
        raise UsageError(f"{artifact} has the form for servers already.", remedy="Use it as it is.")
    if manifest.model.get("ext_len"):
        raise UsageError(
            f"{artifact} reads {manifest.model['ext_len']} tokens before each segment once more, which a server does not keep.",
            remedy="Export it again with `--ext-len 0`.",
        )
    if manifest.settings.mem_len == 0:
        raise UsageError(f"{artifact} has no memory, so there is nothing for a server to keep.", remedy="Use `--mem-len 1` or more.")


def serve_graph(model: onnx.ModelProto, cluster_ends: list[int]) -> None:
    """Rewrite a graph in place: rows of the tail clusters within, valid lengths [B, 1].

    Of each cluster's rows, one more than there are targets in it points behind the last target, which the head takes for padding: so there
    is always one, as TensorRT needs.

    Args:
        cluster_ends: `ModelConfig.cluster_ends` for the head `nll`, empty for the others.
    """
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    graph = model.graph
    constants: dict[str, np.ndarray] = {"served.axis_1": np.array([1]), "served.flat": np.array([-1])}
    first, last = [], []
    old = {value.name: value for value in graph.input}
    length = old["memory_length"]
    batch = length.type.tensor_type.shape.dim[0]
    _rename_uses(graph, "memory_length", "served.memory_length_B")
    first.append(helper.make_node("Squeeze", ["memory_length", "served.axis_1"], ["served.memory_length_B"], name="served/length"))
    length.type.tensor_type.shape.dim.add().dim_value = 1
    for node in graph.node:
        for i, name in enumerate(node.output):
            if name == "new_memory_length":
                node.output[i] = "served.new_memory_length_B"
        for i, name in enumerate(node.input):
            if name == "new_memory_length":
                node.input[i] = "served.new_memory_length_B"
    last.append(
        helper.make_node("Unsqueeze", ["served.new_memory_length_B", "served.axis_1"], ["new_memory_length"], name="served/new_length")
    )
    new_length = next(value for value in graph.output if value.name == "new_memory_length")
    del new_length.type.tensor_type.shape.dim[1:]
    new_length.type.tensor_type.shape.dim.add().dim_value = 1
    if "target_rows.1" in old:
        first.append(helper.make_node("Reshape", ["target_ids", "served.flat"], ["served.targets_N"], name="served/targets"))
        first.append(helper.make_node("Size", ["target_ids"], ["served.size"], name="served/size"))
        first.append(helper.make_node("Unsqueeze", ["served.size", "served.axis_0"], ["served.padding"], name="served/padding"))
        constants["served.axis_0"] = np.array([0])
    for i, (low, high) in enumerate(zip(cluster_ends[1:], cluster_ends[2:]), 1):
        name = f"served.cluster_{i}"
        constants |= {f"{name}.low": np.array(low), f"{name}.high": np.array(high)}
        first += [
            helper.make_node("GreaterOrEqual", ["served.targets_N", f"{name}.low"], [f"{name}.above"], name=f"served/cluster_{i}/above"),
            helper.make_node("Less", ["served.targets_N", f"{name}.high"], [f"{name}.below"], name=f"served/cluster_{i}/below"),
            helper.make_node("And", [f"{name}.above", f"{name}.below"], [f"{name}.within"], name=f"served/cluster_{i}/within"),
            helper.make_node("NonZero", [f"{name}.within"], [f"{name}.found_1R"], name=f"served/cluster_{i}/found"),
            helper.make_node("Reshape", [f"{name}.found_1R", "served.flat"], [f"{name}.found_R"], name=f"served/cluster_{i}/rows"),
            helper.make_node(
                "Concat", [f"{name}.found_R", "served.padding"], [f"target_rows.{i}"], name=f"served/cluster_{i}/padded", axis=0
            ),
        ]
    kept = [value for value in graph.input if not value.name.startswith("target_rows.")]
    del graph.input[:]
    graph.input.extend(kept)
    nodes = [*first, *graph.node, *last]
    del graph.node[:]
    graph.node.extend(nodes)
    graph.initializer.extend(numpy_helper.from_array(value.astype(np.int64), name) for name, value in constants.items())
    shown = helper.make_tensor_value_info("served.memory_length_B", TensorProto.INT64, [batch.dim_param or batch.dim_value])
    graph.value_info.append(shown)


def _rename_uses(graph: onnx.GraphProto, name: str, new: str) -> None:
    for node in graph.node:
        for i, used in enumerate(node.input):
            if used == name:
                node.input[i] = new
