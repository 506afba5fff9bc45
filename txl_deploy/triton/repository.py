"""Writes a model into a repository of Triton Inference Server: all of it or nothing.

    REPO/NAME/config.pbtxt
    REPO/NAME/1/model.py, artifact/              Python backend: any exported model, run by txl within the server
    REPO/NAME/1/model.onnx, manifest.json …      ONNX Runtime backend: a graph in the form for servers, memory as implicit state
    REPO/NAME/1/model-7.5.plan, 7.5/ …           TensorRT backend: a plan for each compute capability, the engines' manifests beside them

What the configuration says is known by `config`.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from txl_deploy import manifest as manifests
from txl_deploy.export.artifact import check_target, folder_beside
from txl_deploy.export.served import export_served
from txl_deploy.manifest import Manifest
from txl_deploy.score import COUNTED_FROM_END
from txl_deploy.triton.config import MINIMUM_SERVER, Backend, ServeOptions, graph_config, python_config, to_text
from txl_deploy.triton.model import ARTIFACT_FOLDER
from txl_train.errors import UsageError

CONFIG_FILE = "config.pbtxt"
VERSION = "1"
_MARK = "# Written by `txl export --format triton`."
_MODEL_PY = '''\
"""Runs the exported model in `artifact`; needs `pip install 'txl[onnx]'` in the Python that the server runs."""

from txl_deploy.triton.model import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''


@dataclass(frozen=True, kw_only=True)
class Written:
    """A model in a repository."""

    repository: Path
    name: str
    backend: Backend
    options: ServeOptions
    tgt_len: int
    """Tokens of a segment."""
    plans: dict[str, str]
    """The plan for each compute capability; empty but for TensorRT."""

    @property
    def minimum_server(self) -> str:
        """The oldest release of the server that this is for."""
        return MINIMUM_SERVER[self.backend]


def write_repository(
    artifacts: Sequence[Path],
    out: Path,
    options: ServeOptions,
    *,
    backend: Backend | None = None,
    overwrite: bool = False,
    command: str = "txl export",
) -> Written:
    """Write the model of an artifact, or of several engines for different GPUs, into the repository `out`.

    Args:
        backend: None takes TensorRT for engines in the form for servers, ONNX Runtime for such graphs, and Python for all else.

    Raises:
        UsageError: the folder of the model exists; the artifacts cannot be served so, or are not of one model.
        ManifestError: an artifact is damaged.
    """
    if not artifacts:
        raise UsageError("There is no model to serve.", remedy="Give `--artifact DIR`.")
    found = [manifests.read_verified(artifact) for artifact in artifacts]
    chosen = backend or _backend_of(found[0])
    if len(artifacts) > 1 and chosen != "tensorrt":
        raise UsageError("Several artifacts are served as one model only if they are engines for different GPUs.", remedy="Give one.")
    _check_head(artifacts[0], found[0])
    _check_positions(artifacts[0], found[0])
    target = out / options.name
    check_target(target, overwrite=overwrite, is_ours=_is_ours)
    out.mkdir(parents=True, exist_ok=True)
    plans: dict[str, str] = {}
    with folder_beside(target, overwrite=overwrite, is_ours=_is_ours) as folder:
        version = folder / VERSION
        version.mkdir()
        if chosen == "python":
            _check_batch(artifacts[0], found[0], options)
            shutil.copytree(artifacts[0], version / ARTIFACT_FOLDER)
            (version / "model.py").write_text(_MODEL_PY, encoding="utf-8")
            config = python_config(options)
        elif chosen == "onnxruntime":
            manifest = _copy_graph(artifacts[0], found[0], version, command)
            config = graph_config(manifest, options, chosen, default=manifests.MODEL_FILES["onnx"])
        else:
            plans = _copy_engines(artifacts, found, options, version)
            config = graph_config(found[0], options, chosen, files=plans, default=next(iter(plans.values())))
        (folder / CONFIG_FILE).write_text(f"{_MARK}\n{to_text(config)}", encoding="utf-8")
    return Written(repository=out, name=options.name, backend=chosen, options=options, tgt_len=found[0].settings.tgt_len, plans=plans)


def _backend_of(manifest: Manifest) -> Backend:
    if not manifest.served:
        return "python"
    return "onnxruntime" if manifest.format == "onnx" else "tensorrt"


def _check_head(artifact: Path, manifest: Manifest) -> None:
    if manifest.settings.head != "nll":
        raise UsageError(
            f"{artifact} yields {manifest.settings.head} of the next token, and what is served scores text.",
            remedy="Export the checkpoint with `--head nll`.",
        )


def _check_positions(artifact: Path, manifest: Manifest) -> None:
    """Refuse models whose segments cannot be filled up, or begin with tokens that were read before."""
    if manifest.model.get("attn_type") in COUNTED_FROM_END:
        raise UsageError(
            f"{artifact} counts positions from a segment's end (`attn_type` {manifest.model['attn_type']}), so a segment cannot be scored "
            "before all of its tokens are there.",
            remedy="Score whole texts with `txl eval`.",
        )
    if manifest.model.get("ext_len"):
        raise UsageError(
            f"{artifact} reads {manifest.model['ext_len']} tokens before each segment once more.", remedy="Export it with `--ext-len 0`."
        )


def _check_batch(artifact: Path, manifest: Manifest, options: ServeOptions) -> None:
    most, least = manifest.batch.max, manifest.batch.min
    if most is not None and options.max_batch_size > most:
        raise UsageError(
            f"{artifact} takes {most} streams at most, and `--max-batch-size` is {options.max_batch_size}.",
            remedy=f"Use `--max-batch-size {most}`, or export again with more.",
        )
    if least > options.max_batch_size:
        raise UsageError(f"{artifact} takes {least} streams at least.", remedy=f"Use `--max-batch-size {least}`, or export again.")


def _copy_graph(artifact: Path, manifest: Manifest, version: Path, command: str) -> Manifest:
    """Copy an artifact's graph in the form for servers, made first where it has another."""
    if manifest.format != "onnx":
        raise UsageError(f"The ONNX Runtime backend runs ONNX, and {artifact} holds {manifest.format}.", remedy="Use `--backend python`.")
    _check_fixed(artifact, manifest)
    with tempfile.TemporaryDirectory(prefix="txl-") as folder:
        graph = artifact
        if not manifest.served:
            graph = Path(folder) / "onnx"
            manifest = export_served(artifact, graph, command=command).manifest
        shutil.copytree(graph, version, dirs_exist_ok=True)
    return manifest


def _copy_engines(artifacts: Sequence[Path], found: Sequence[Manifest], options: ServeOptions, version: Path) -> dict[str, str]:
    """Copy engines for different GPUs; return the plan of each compute capability."""
    plans: dict[str, str] = {}
    first = found[0]
    for artifact, manifest in zip(artifacts, found):
        engine = manifest.engine
        if engine is None or manifest.format != "trt":
            raise UsageError(
                f"The TensorRT backend runs engines of TensorRT, and {artifact} holds {manifest.format}.",
                remedy="Build one with `txl export --format trt` of a graph for servers; `--backend python` runs engines of TensorRT-RTX.",
            )
        if not manifest.served:
            raise UsageError(
                f"{artifact} was built from a graph that no server can batch.",
                remedy="Export the graph with `--format onnx --for-triton`, and build the engine from that; or use `--backend python`.",
            )
        _check_batch(artifact, manifest, options)
        _check_fixed(artifact, manifest)
        for what, theirs, ours in (
            ("checkpoint", manifest.source.checkpoint_sha256, first.source.checkpoint_sha256),
            ("settings", manifest.settings, first.settings),
        ):
            if theirs != ours:
                raise UsageError(f"{artifact} has another {what} than {artifacts[0]}.", remedy="Build all engines from one graph.")
        capability = engine.compute_capability
        if capability is None:
            raise UsageError(f"{artifact} is for no GPU in particular, and the server chooses by GPU.", remedy="Build it for a target.")
        if capability in plans:
            raise UsageError(f"There are two engines for compute capability {capability}.", remedy="Give one of them.")
        plans[capability] = f"model-{capability}.plan"
        shutil.copyfile(artifact / manifests.MODEL_FILES["trt"], version / plans[capability])
        beside = version / capability
        beside.mkdir()
        for name in (manifests.FILE_NAME, manifests.PARENT_FILE):
            shutil.copyfile(artifact / name, beside / name)
    return plans


def _check_fixed(artifact: Path, manifest: Manifest) -> None:
    if manifest.format == "onnx" and manifest.batch.max is not None:
        raise UsageError(
            f"{artifact} takes {manifest.batch.max} streams and no other number, but a server batches as many as there are.",
            remedy="Export again without `--batch-size`.",
        )
    if manifest.batch.min > 1:
        raise UsageError(
            f"{artifact} takes {manifest.batch.min} streams at least, but a server may have one.", remedy="Build it again from 1 on."
        )


def _is_ours(folder: Path) -> bool:
    try:
        return (folder / CONFIG_FILE).read_text(encoding="utf-8").startswith(_MARK)
    except (OSError, UnicodeDecodeError):
        return False
