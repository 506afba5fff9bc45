"""Writes an engine as an artifact, or the kit that builds it on its target: all of it or nothing.

What can be refused is refused first, before a checkpoint is exported or anything is built: an unknown target, a GPU, driver or package
that does not fit, a precision that the builder does not have there, ranges of batches that contradict each other. Where only the target's
GPU is missing, the target can still build it, and gets a kit. Which versions go together is known by `compat`, what a build takes by
`builder`, what a kit holds by `kit`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import txl_train
from txl_deploy import compat
from txl_deploy import manifest as manifests
from txl_deploy.bench.environment import git_commit
from txl_deploy.compat import Machine, Plan, Stack, Target
from txl_deploy.export.artifact import VOCABULARY_FILE, ExportRequest, check_target, export_artifact, folder_beside
from txl_deploy.manifest import BatchRange, Manifest
from txl_deploy.parity.rollout import BATCH_SIZE, ParityResult, compare, random_segments
from txl_deploy.runtimes.base import Runtime
from txl_deploy.runtimes.registry import eager_from_checkpoint, open_artifact, resolve_device
from txl_deploy.trt.builder import BuiltEngine, EngineSpec, build_engine, check_build, signature_of
from txl_deploy.trt.kit import is_kit, write_kit
from txl_deploy.trt.profiles import check_profiles, profiles_for
from txl_deploy.trt.refusals import PLAN_FILE, check_fits
from txl_train import unfinished
from txl_train.errors import EnvironmentUnfitError, UsageError, ValidationError
from txl_train.files import file_sha256

TIMING_CACHE_FILE = "timing.cache"
PORTABLE = "portable"
"""The name of no GPU in particular: TensorRT-RTX builds an engine that runs on every one from compute capability 8.0 on."""


@dataclass(frozen=True, kw_only=True)
class EngineRequest:
    """Which engine to write, of what."""

    graph: Path | None
    """An ONNX artifact; None: the checkpoint is exported first."""
    checkpoint: ExportRequest | None
    """How to export the checkpoint, with its `out` and `format` ignored; None where there is a `graph`."""
    out: Path
    batch: BatchRange
    """Numbers of streams the engine takes, and the one it is tuned for."""
    rtx_only: bool = False
    """TensorRT-RTX and no other."""
    target: str | None = None
    """A name of engines/targets, or `portable`; None means the GPU of this machine."""
    kit: bool = False
    """Write a kit even where the engine could be built here."""
    timing_cache: Path | None = None
    """Timings of an earlier build to begin with."""
    hardware_compatibility: str = "none"
    """Of TensorRT: none, ampere_plus or same_compute_capability: other GPUs on which the engine may run."""
    optimization_level: int | None = None
    """0 to 5, a longer search the higher; None keeps the builder's own."""
    keep_onnx: Path | None = None
    """Where the ONNX artifact of a checkpoint is to stay."""
    overwrite: bool = False
    command: str = "txl export"


@dataclass(frozen=True, kw_only=True)
class EngineExported:
    """What was written: an engine, or a kit."""

    directory: Path
    target: str
    """Name of the target."""
    stack: Stack
    """What builds the engine and runs it."""
    manifest: Manifest | None = None
    """The engine's; None for a kit."""
    built: BuiltEngine | None = None
    """None for a kit."""
    parity: ParityResult | None = None
    """How the engine compared with what it was built from; None where it could not run here."""
    not_compared: str | None = None
    """Why it could not."""
    kit: Path | None = None
    """The folder of the kit; None for an engine."""
    why_not: str | None = None
    """Why the engine was not built here, as part of a sentence; None if it was."""
    build_command: str | None = None
    """What builds the engine in the kit's folder on the target."""
    hint: str | None = None
    """A command after which an engine could be built here; None where there is none."""

    def describe(self) -> dict[str, Any]:
        """Return it as plain values for JSON."""
        document: dict[str, Any] = {
            "directory": str(self.directory),
            "target": self.target,
            "builder": self.stack.builder,
            "builder_version": self.stack.builder_version,
            "compute_capability": self.stack.compute_capability,
            "built": self.manifest is not None,
        }
        if self.manifest is None:
            return document | {
                "kit": str(self.kit),
                "why_not": self.why_not,
                "build_command": self.build_command,
                "install": self.stack.pip_install,
                "hint": self.hint,
            }
        manifest, parity = self.manifest, self.parity
        assert manifest.engine is not None
        assert self.built is not None
        return document | {
            "format": manifest.format,
            "engine": dataclasses.asdict(manifest.engine),
            "compute_capability": manifest.engine.compute_capability,
            "builder_version": manifest.engine.builder_version,
            "files": {name: dataclasses.asdict(record) for name, record in manifest.files.items()},
            "parent_sha256": None if manifest.source.parent is None else manifest.source.parent.manifest_sha256,
            "checkpoint_sha256": manifest.source.checkpoint_sha256,
            "settings": dataclasses.asdict(manifest.settings),
            "batch": dataclasses.asdict(manifest.batch),
            "precisions": manifest.precisions,
            "build_seconds": round(self.built.built.seconds, 3),
            "builder_warnings": self.built.built.log,
            "checked": None if parity is None else {"passed": parity.passed, "max_abs_delta_nll": parity.max_abs_delta_nll},
            "not_compared": self.not_compared,
        }

    def lines(self) -> list[str]:
        """Return it for people."""
        if self.manifest is None:
            lines = [
                f"{self.directory}: a kit for {self.target} (compute capability {self.stack.compute_capability}), which builds the engine "
                f"with {self.stack.builder_name}",
                f"  there: {self.build_command}",
            ]
            return lines if self.hint is None else [*lines, f"  another stack would build it here after: {self.hint}"]
        manifest, engine, built = self.manifest, self.manifest.engine, self.built
        assert engine is not None
        assert built is not None
        where = (
            f"compute capability {engine.compute_capability}" if engine.compute_capability else "every GPU from compute capability 8.0 on"
        )
        settings, batch = manifest.settings, manifest.batch
        lines = [
            f"{self.directory}: {manifest.format}, {settings.dtype}, {settings.head.replace('_', '-')}, {settings.memory} memory, "
            f"tgt_len {settings.tgt_len}, mem_len {settings.mem_len}, {batch.min} to {batch.max} streams (tuned for {batch.opt})",
            f"  for {engine.target}: {where}; built by {built.api.name} in {built.built.seconds:.1f} s"
            + (f" on {engine.gpu}, driver {engine.driver}" if engine.gpu else " without a GPU"),
        ]
        lines += [f"  {name}  {record.bytes / 1e6:.1f} MB  sha256 {record.sha256[:12]}…" for name, record in manifest.files.items()]
        lines += [f"  {line}" for line in _precision_lines(manifest)]
        if self.parity is None:
            lines.append(f"Not compared with what it was built from: {self.not_compared}")
        else:
            lines.append(
                f"Compared with what it was built from over {self.parity.n_segments} segments of random tokens: {self.parity.reason}."
            )
        return lines


@dataclass(frozen=True)
class _Choice:
    """What to build for, decided before any work."""

    target: str
    plan: Plan
    compute_capability: str | None
    described: Target | None
    """None for a portable engine."""


def export_engine(request: EngineRequest) -> EngineExported:
    """Write the engine of a graph or a checkpoint, or a kit where the target's GPU is missing here.

    Raises:
        UsageError: the request contradicts itself: an unknown target, ranges that do not rise or do not fit the graph, a graph that is no
            ONNX, a file of timings that cannot be read, something else in `out`; or there is neither a target nor a GPU here.
        EnvironmentUnfitError: this machine has the GPU but not the package, its version, the driver or the Python that go with it; or
            there is no such engine at all. The remedy names the command.
        ArtifactError: the graph's artifact is damaged, or the timings are of another TensorRT or GPU.
        ValidationError: the builder refuses the graph, or what it built computes something else.
    """
    if (request.graph is None) == (request.checkpoint is None):
        raise UsageError("An engine is built of either a checkpoint or an ONNX artifact.")
    _check_batch(request.batch)
    check_target(request.out, overwrite=request.overwrite, is_ours=is_kit)
    if request.keep_onnx is not None:
        if request.keep_onnx.resolve() == request.out.resolve():
            raise UsageError("`--out` and `--keep-onnx` name the same folder.", remedy="Give two folders.")
        check_target(request.keep_onnx, overwrite=request.overwrite)
    timings = _read_timings(request.timing_cache)
    manifest = None if request.graph is None else _graph_manifest(request.graph)
    dtype = _dtype_of(request, manifest)
    choice = _choose(request, dtype, compat.this_machine())
    _check_compatibility(request, choice)
    spec = EngineSpec(
        package=choice.plan.stack.builder,
        batch=request.batch,
        compute_capability=choice.compute_capability,
        hardware_compatibility=request.hardware_compatibility,
        optimization_level=request.optimization_level,
        timing_cache=timings,
    )
    builds_here = choice.plan.here and not request.kit
    if timings is not None and not builds_here:
        raise UsageError(
            "Only a build takes a timing cache, and this one is a kit: it makes its own.", remedy="Leave `--timing-cache` out."
        )
    asked = request.checkpoint.mem_len if manifest is None and request.checkpoint is not None else None
    if asked == 0:
        _refuse_no_memory()
    if manifest is not None:
        _check(manifest, spec, builds_here)
    with _graph(request) as graph:
        if manifest is None:
            manifest = manifests.read_manifest(graph)
            _check(manifest, spec, builds_here)
        if builds_here:
            return _build(request, graph, spec, choice)
        return _write_kit(request, graph, manifest, choice)


def _check_batch(batch: BatchRange) -> None:
    middle = batch.max if batch.opt is None else batch.opt
    if batch.max is None or middle is None or not 1 <= batch.min <= middle <= batch.max:
        raise UsageError(
            f"A range of batch sizes must rise from 1 or more and have an end, but is {batch.min}, {batch.opt}, {batch.max} instead.",
            remedy="Write three numbers, such as `--batch-range 1,8,32`, or one for a fixed number of streams.",
        )


def _read_timings(path: Path | None) -> bytes | None:
    if path is None:
        return None
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(
            f"The timing cache {path} cannot be read: {error.strerror}.", remedy="Leave `--timing-cache` out: the build makes a new one."
        ) from error


def _graph_manifest(graph: Path) -> Manifest:
    manifest = manifests.read_manifest(graph)
    if manifest.format != "onnx":
        raise UsageError(
            f"An engine is built of an ONNX graph, and {graph} holds {manifest.format}.", remedy="Export with `--format onnx` first."
        )
    return manifest


def _dtype_of(request: EngineRequest, manifest: Manifest | None) -> str:
    if manifest is not None:
        return manifest.settings.dtype
    assert request.checkpoint is not None
    return request.checkpoint.dtype


def _choose(request: EngineRequest, dtype: str, machine: Machine) -> _Choice:
    """Decide what to build for, with what, and whether here."""
    if request.target is not None and request.target.strip().lower() == PORTABLE:
        return _choose_portable(request, machine)
    if request.target is not None:
        target = compat.target(request.target)
    elif not machine.gpus:
        raise UsageError(
            "An engine is built for one kind of GPU, and this machine has none to go by.",
            remedy=f"Name it with `--target NAME`: {', '.join(compat.targets())}.",
        )
    else:
        found = compat.target_of(machine.gpus[0])
        if found is None:
            gpu = machine.gpus[0]
            raise UsageError(
                f"{gpu.name} of compute capability {gpu.compute_capability} is no target of engines/targets.",
                remedy=f"Name one with `--target NAME`: {', '.join(compat.targets())}, or add a file for it.",
            )
        target = found
    plan = compat.plan(target, machine, rtx_only=request.rtx_only, dtype=dtype, kit=request.kit)
    if not plan.here and not request.kit and all(problem.kind != "gpu" for problem in plan.problems):
        raise EnvironmentUnfitError(
            f"The engine for {target.name} could be built here, but {plan.why_not}.",
            remedy="\n".join(problem.remedy for problem in plan.problems),
        )
    return _Choice(target.name, plan, target.compute_capability, target)


def _choose_portable(request: EngineRequest, machine: Machine) -> _Choice:
    """As `_choose`, for TensorRT-RTX's engine for no GPU in particular."""
    if not request.rtx_only or request.kit:
        raise UsageError(f"`--target {PORTABLE}` is what TensorRT-RTX builds, anywhere.", remedy="Use `--format trt-rtx` without `--kit`.")
    stack = next(stack for target in compat.targets().values() for stack in target.stacks if stack.builder == "tensorrt_rtx")
    version = machine.packages.get(stack.package)
    if version != stack.builder_version:
        found = "it is not installed" if version is None else f"{version} is installed"
        raise EnvironmentUnfitError(f"A portable engine takes {stack.builder_name}, but {found}.", remedy=stack.pip_install)
    return _Choice(PORTABLE, Plan(stack, True), None, None)


def _refuse_no_memory() -> None:
    raise UsageError(
        "An engine needs a memory: TensorRT takes no input without elements, and `mem_len` is 0.",
        remedy="Use `--mem-len 1` or more, or run the ONNX graph, which needs none.",
    )


def _check_compatibility(request: EngineRequest, choice: _Choice) -> None:
    """Refuse a hardware compatibility that the builder or the target does not have."""
    wanted, stack = request.hardware_compatibility, choice.plan.stack
    if wanted == "none":
        return
    option = f"`--hardware-compatibility {wanted.replace('_', '-')}`"
    if stack.builder != "tensorrt":
        raise UsageError(
            f"{stack.builder_name} has no {option}.",
            remedy="Leave it out; `--target portable` is for several GPUs, and `--kit` for TensorRT.",
        )
    if wanted == "ampere_plus" and tuple(map(int, stack.compute_capability.split("."))) < (8, 0):
        raise UsageError(
            f"{option} is for compute capability 8.0 and newer, and {choice.target} has {stack.compute_capability}.", remedy="Leave it out."
        )
    if wanted == "same_compute_capability" and tuple(map(int, stack.builder_version.split(".")[:2])) < (10, 13):
        raise UsageError(f"{option} begins with TensorRT 10.13, and {choice.target} has {stack.builder_version}.", remedy="Leave it out.")


def _check(manifest: Manifest, spec: EngineSpec, builds_here: bool) -> None:
    """Refuse what cannot be built of this graph, for milliseconds."""
    if manifest.settings.mem_len == 0:
        _refuse_no_memory()
    if builds_here:
        check_build(manifest, spec)
        return
    signature = signature_of(manifest)
    check_profiles(signature, profiles_for(signature, spec.batch, manifest.settings.tgt_len))


@contextlib.contextmanager
def _graph(request: EngineRequest) -> Iterator[Path]:
    """Yield the folder of the ONNX artifact, exported first if need be."""
    if request.graph is not None:
        yield request.graph
        return
    assert request.checkpoint is not None
    request.out.parent.mkdir(parents=True, exist_ok=True)
    with unfinished.folder_beside(request.out) as folder:
        out = request.keep_onnx or folder / "onnx"
        export_artifact(dataclasses.replace(request.checkpoint, format="onnx", out=out))
        yield out


def _write_kit(request: EngineRequest, graph: Path, manifest: Manifest, choice: _Choice) -> EngineExported:
    plan = choice.plan
    assert choice.described is not None  # a portable engine has no kit
    why_not = plan.why_not or "a kit was asked for"
    with folder_beside(request.out, overwrite=request.overwrite, is_ours=is_kit) as directory:
        kit = write_kit(
            directory,
            graph,
            target=choice.described,
            stack=plan.stack,
            batch=request.batch,
            profiles=profiles_for(signature_of(manifest), request.batch, manifest.settings.tgt_len),
            why_not=why_not,
            command=request.command,
            hardware_compatibility=request.hardware_compatibility,
            optimization_level=request.optimization_level,
        )
    return EngineExported(
        directory=request.out,
        target=choice.target,
        stack=plan.stack,
        kit=request.out,
        why_not=why_not,
        build_command=kit.build_command,
        hint=plan.hint,
    )


def _build(request: EngineRequest, graph: Path, spec: EngineSpec, choice: _Choice) -> EngineExported:
    with folder_beside(request.out, overwrite=request.overwrite, is_ours=is_kit) as directory:
        built = build_engine(graph, spec)
        (directory / PLAN_FILE).write_bytes(built.built.plan)
        shutil.copyfile(graph / manifests.FILE_NAME, directory / manifests.PARENT_FILE)
        shutil.copyfile(manifests.artifact_file(graph, VOCABULARY_FILE), directory / VOCABULARY_FILE)
        files = [PLAN_FILE, manifests.PARENT_FILE, VOCABULARY_FILE]
        if built.built.timing_cache is not None:
            (directory / TIMING_CACHE_FILE).write_bytes(built.built.timing_cache)
            files.append(TIMING_CACHE_FILE)
        parent = manifests.read_manifest(graph)
        manifest = manifests.write_manifest(directory, _engine_manifest(request, parent, directory, built, choice), files)
        parity, not_compared = None, _why_not_here(manifest, request.out)
        if not_compared is None:  # what fails from here on is a failure of the engine
            runtime = open_artifact(directory, device="cuda:0")
            read = {f"engine_{part}": dict(runtime.info.readback[part]) for part in ("products", "layers")}
            found = manifest.precisions | {part: counts for part, counts in read.items() if counts}
            manifest = manifests.write_manifest(directory, dataclasses.replace(manifest, precisions=found), files)
            parity = _compare(request, graph, runtime, manifest)
        if parity is not None and not parity.passed:
            raise ValidationError(
                f"The engine computes something else than what it was built from: {parity.reason}. Nothing was written.",
                remedy="`txl parity --bisect` on the ONNX model shows where they part; `--dtype fp32` is more exact.",
            )
    return EngineExported(
        directory=request.out,
        target=choice.target,
        stack=choice.plan.stack,
        manifest=manifest,
        built=built,
        parity=parity,
        not_compared=not_compared,
    )


def _why_not_here(manifest: Manifest, out: Path) -> str | None:
    """Return why an engine cannot run on this machine, None where it can; nothing of it is loaded."""
    try:
        check_fits(manifest, device="cuda:0", origin=str(out))
        resolve_device("cuda")
    except EnvironmentUnfitError as error:
        return error.message
    return None


def _engine_manifest(request: EngineRequest, parent: Manifest, directory: Path, built: BuiltEngine, choice: _Choice) -> Manifest:
    facts = built.facts(choice.target)
    return dataclasses.replace(
        parent,
        format=manifests.BUILDER_FORMATS[built.api.package],
        files={},
        source=dataclasses.replace(
            parent.source,
            parent=manifests.Parent(manifest_sha256=file_sha256(directory / manifests.PARENT_FILE), format=parent.format),
        ),
        batch=dataclasses.replace(request.batch, opt=request.batch.opt or request.batch.max),
        versions=parent.versions | {"txl": txl_train.__version__, choice.plan.stack.package: built.api.version},
        command=request.command,
        git_commit=git_commit(),
        engine=facts,
        precisions=built.built.precisions.record(),
    )


def _compare(request: EngineRequest, graph: Path, runtime: Runtime, manifest: Manifest) -> ParityResult:
    """Run the engine beside the checkpoint in FP32, or beside its graph where only that is given."""
    info, batch = runtime.info, manifest.batch
    reference: Runtime
    if request.checkpoint is None:
        reference = open_artifact(graph)
    else:
        config = info.config
        reference, _ = eager_from_checkpoint(
            request.checkpoint.checkpoint,
            tgt_len=info.tgt_len,
            memory=info.memory,
            mem_len=config.mem_len,
            ext_len=config.ext_len,
            clamp_len=config.clamp_len or -1,
            same_length=config.same_length,
            same_length_rule=config.same_length_rule,
            head=info.head,
        )
    streams = max(batch.min, min(BATCH_SIZE, batch.max or BATCH_SIZE))
    return compare(reference, runtime, random_segments(info.config, tgt_len=info.tgt_len, batch_size=streams))


def _precision_lines(manifest: Manifest) -> list[str]:
    """Say how much of each type there is, and where that was read."""
    places = {"network": "in the network that was built", "engine": "in the engine"}
    lines = []
    for key, counts in manifest.precisions.items():
        source, _, part = key.partition("_")
        if source in places and counts:
            lines.append(f"{part} {places[source]}: " + ", ".join(f"{count:,} {name}" for name, count in counts.items()))
    return lines
