"""From an exported ONNX graph to an engine: what is refused before a build, the build, and what the engine is bound to.

All that can be known without a build is checked first and in milliseconds. Writing the engine's folder is for `trt.artifact`, which
package and GPU to choose for `compat`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from txl_deploy.manifest import MODEL_FILES, BatchRange, EngineFacts, Manifest, artifact_file, read_verified
from txl_deploy.signature import Signature, TensorSpec
from txl_deploy.trt import cuda
from txl_deploy.trt.api import NAMES, Api, BuildSpec, Built, Package, find
from txl_deploy.trt.profiles import Profile, check_profiles, profiles_for
from txl_train.errors import EnvironmentUnfitError, UsageError

GRAPH_FILE = MODEL_FILES["onnx"]


@dataclass(frozen=True, kw_only=True)
class EngineSpec:
    """What engine to build of a graph."""

    package: Package
    """What builds it, which alone can run it."""
    batch: BatchRange
    """Numbers of streams it takes, and the one it is tuned for."""
    compute_capability: str | None = None
    """Such as 7.5; None for the GPU that is here, or with TensorRT-RTX for every GPU from 8.0 on."""
    hardware_compatibility: str = "none"
    """none, ampere_plus or same_compute_capability: other GPUs on which a TensorRT engine may run."""
    profiles: Sequence[Profile] | None = None
    """Shapes of every input; None makes them from `batch`."""
    optimization_level: int | None = None
    """0 to 5; None keeps the package's own."""
    workspace_bytes: int | None = None
    """Most scratch memory a layer may take; None means all of the GPU's."""
    timing_cache: bytes | None = None
    """Timings of an earlier build by the same TensorRT on the same GPU."""


@dataclass(frozen=True, kw_only=True)
class BuiltEngine:
    """An engine, and where it may run."""

    api: Api
    """What built it."""
    built: Built
    """The plan and what belongs to it."""
    profiles: list[Profile]
    """Shapes it takes, in the order of the call."""
    compute_capability: str | None
    """What it is bound to; None where it runs on several (`hardware_compatibility`)."""
    hardware_compatibility: str
    """none, ampere_plus, same_compute_capability or portable."""
    gpu: cuda.Gpu | None
    """The GPU it was built on; None with TensorRT-RTX, which uses none."""

    def facts(self, target: str) -> EngineFacts:
        """Return it as a manifest keeps it, for a target of that name."""
        return EngineFacts(
            builder=self.api.package,
            builder_version=self.api.version,
            target=target,
            compute_capability=self.compute_capability,
            hardware_compatibility=self.hardware_compatibility,
            gpu=None if self.gpu is None else self.gpu.name,
            driver=None if self.gpu is None else self.gpu.driver,
            profiles=[profile.record() for profile in self.profiles],
        )


def build_engine(graph_dir: Path, spec: EngineSpec) -> BuiltEngine:
    """Build an engine of the ONNX artifact in `graph_dir`. Ctrl-C ends the build.

    Raises:
        ManifestError: the artifact is not what its manifest says.
        UsageError, EnvironmentUnfitError: as `check_build` says; nothing native was called then.
        ValidationError: the package does not take the graph, or builds nothing of it.
    """
    manifest = read_verified(graph_dir)
    api, profiles = check_build(manifest, spec)
    build = _build_spec(artifact_file(graph_dir, GRAPH_FILE), spec, profiles)
    built = api.build(build)
    gpus = cuda.devices() if api.package == "tensorrt" else []
    gpu = gpus[0] if gpus else None
    portable = api.package == "tensorrt_rtx" and spec.compute_capability is None
    return BuiltEngine(
        api=api,
        built=built,
        profiles=profiles,
        compute_capability=gpu.compute_capability if gpu is not None else spec.compute_capability,
        hardware_compatibility="portable" if portable else spec.hardware_compatibility,
        gpu=gpu,
    )


def check_build(manifest: Manifest, spec: EngineSpec) -> tuple[Api, list[Profile]]:
    """Make sure that this machine can build `spec` of a graph with that manifest; return what will build it, and for which shapes.

    Loads the package at most; calls nothing native.

    Raises:
        UsageError: the artifact is no ONNX graph, or the ranges of shapes do not fit it or each other.
        EnvironmentUnfitError: the package is absent; there is no GPU where one is needed, or another one; or the package has no
            matrix product of the graph's precision there.
    """
    if manifest.format != "onnx":
        raise UsageError(f"An engine is built of an ONNX graph, not of {manifest.format}.", remedy="Export with `--format onnx` first.")
    signature = signature_of(manifest)
    profiles = profiles_for(signature, spec.batch, manifest.settings.tgt_len) if spec.profiles is None else list(spec.profiles)
    check_profiles(signature, profiles)
    if spec.package == "tensorrt_rtx" and spec.compute_capability == "7.5" and manifest.settings.dtype == "fp32":
        raise EnvironmentUnfitError(
            f"{NAMES[spec.package]} has no matrix products of fp32 for compute capability 7.5, and this graph is in fp32.",
            remedy="Export it with `--dtype fp16`, or build with TensorRT on a GPU of compute capability 7.5.",
        )
    if spec.package == "tensorrt_rtx" and manifest.served and manifest.settings.head == "nll":
        raise EnvironmentUnfitError(
            f"{NAMES[spec.package]} has no NonZero, by which a graph for servers finds the targets of each cluster.",
            remedy="Build it with TensorRT on its target, by a kit: `--kit`; servers run engines of TensorRT alone.",
        )
    api = find(spec.package)
    api.check_target(_build_spec(Path(GRAPH_FILE), spec, profiles))
    return api, profiles


def signature_of(manifest: Manifest) -> Signature:
    """Return the inputs and outputs of an artifact as its manifest has them."""
    inputs, outputs = (
        tuple(TensorSpec(record.name, record.dtype, tuple(record.axes)) for record in records)
        for records in (manifest.inputs, manifest.outputs)
    )
    return Signature(inputs=inputs, outputs=outputs)


def _build_spec(graph: Path, spec: EngineSpec, profiles: list[Profile]) -> BuildSpec:
    return BuildSpec(
        onnx=graph,
        profiles=profiles,
        compute_capability=spec.compute_capability,
        hardware_compatibility=spec.hardware_compatibility,
        optimization_level=spec.optimization_level,
        timing_cache=spec.timing_cache,
        workspace_bytes=spec.workspace_bytes,
    )
