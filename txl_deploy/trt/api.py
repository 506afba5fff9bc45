"""The one place that imports `tensorrt` and `tensorrt_rtx`: building an engine, opening one, running it.

Knows what differs between TensorRT 10.4 (the last for a V100), 10.16, 11.4 and TensorRT-RTX 1.7, and that they share the rest:
networks are strongly typed, so the precision is what the graph says and no builder flag; shapes come as one optimization profile; the
scratch memory of a step is the caller's. Asks for a GPU before it calls what would end the process without one. What goes into an
engine and where it may run is decided by others; who allocates its tensors, too.
"""

from __future__ import annotations

import importlib
import json
import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from txl_deploy.trt import cuda
from txl_deploy.trt.inspect import Precisions
from txl_deploy.trt.listening import Heard, interruptibly, listener_of, monitor_of
from txl_deploy.trt.profiles import Profile
from txl_train.errors import ArtifactError, EnvironmentUnfitError, TxlError, UsageError, ValidationError

Package = Literal["tensorrt", "tensorrt_rtx"]

INSTALL: dict[Package, str] = {
    "tensorrt": "pip install --extra-index-url https://pypi.nvidia.com tensorrt-cu13==11.4.0.106",
    "tensorrt_rtx": "pip install tensorrt-rtx==1.7.1.116",
}
"""The command that installs each package for current GPUs; for a V100 it is tensorrt-cu12==10.4.0."""

NAMES: dict[Package, str] = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}
OLDEST: dict[Package, tuple[int, int]] = {"tensorrt": (10, 4), "tensorrt_rtx": (1, 2)}
"""Older versions lack some of what is called here (TensorRT 10.0 has no `device_memory_size_v2`) or were not looked at."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class BuildSpec:
    """What to build."""

    onnx: Path
    """The graph; its external data is looked for beside it."""
    profiles: Sequence[Profile]
    """Of every input, `profiles.check_profiles` passed."""
    compute_capability: str | None = None
    """Such as 7.5. TensorRT-RTX builds for it without a GPU; TensorRT builds only for the GPU that is here, which must have it. None: for
    the GPU that is here, or with TensorRT-RTX for every GPU from 8.0 on."""
    hardware_compatibility: str = "none"
    """none, ampere_plus or same_compute_capability: other GPUs on which a TensorRT engine may run."""
    optimization_level: int | None = None
    """0 to 5, a longer search the higher; None keeps the package's own."""
    timing_cache: bytes | None = None
    """Timings of an earlier build by the same TensorRT on the same GPU."""
    workspace_bytes: int | None = None
    """Most scratch memory a layer may take; None means all of the GPU's."""
    tf32: bool = False
    """Let products of fp32 round their factors to 10 bits on GPUs that can. Off, since fp32 is what a graph in fp32 claims."""
    detailed: bool = True
    """Keep in the plan what `EngineHandle.inspect` needs to tell precisions; does not change speed."""


@dataclass(frozen=True, kw_only=True)
class Built:
    """A built engine, not opened."""

    plan: bytes
    timing_cache: bytes | None
    """For the next build; None with TensorRT-RTX, which measures nothing while it builds."""
    log: list[str]
    """What the package warned of."""
    seconds: float
    """Wall time from parsing to the plan."""
    precisions: Precisions
    """As the strongly typed network says."""


@dataclass(frozen=True, kw_only=True)
class EngineTensor:
    """One input or output of an engine."""

    name: str
    mode: Literal["input", "output"]
    dtype: str
    """Element type by its numpy name."""
    shape: tuple[int, ...]
    """-1 where the length is free."""


def find(package: Package) -> Api:
    """Return the adapter over an installed package.

    Raises `EnvironmentUnfitError`, with the command that installs it, where it is absent, incomplete or too old.
    """
    name, remedy = NAMES[package], f"Install it with `{INSTALL[package]}`."
    try:
        module = importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name == package:
            raise EnvironmentUnfitError(f"{name} is not installed: there is no Python package {package}.", remedy=remedy) from error
        raise EnvironmentUnfitError(f"{name} is installed incompletely: {error}.", remedy=remedy) from error
    except (ImportError, OSError) as error:
        raise EnvironmentUnfitError(f"{name} is installed, but does not load: {error}.", remedy=remedy) from error
    api = RtxApi(module) if package == "tensorrt_rtx" else Api(module)
    if api.version_tuple[:2] < OLDEST[package]:
        oldest = ".".join(map(str, OLDEST[package]))
        raise EnvironmentUnfitError(f"{name} {api.version} is too old: {oldest} is the first that can be used.", remedy=remedy)
    return api


class Api:
    """TensorRT 10 and 11."""

    package: Package = "tensorrt"

    def __init__(self, module: Any) -> None:
        """Wrap the imported module."""
        self._trt = module
        self.version: str = module.__version__
        self.version_tuple = tuple(int(part) for part in self.version.split(".") if part.isdecimal())
        self._listener = listener_of(module)

    @property
    def name(self) -> str:
        """What the package calls itself, such as TensorRT 10.4.0."""
        return f"{NAMES[self.package]} {self.version}"

    def compute_capabilities(self) -> list[str]:
        """Return what can be built without a GPU, such as 7.5; an empty list where a GPU is needed."""
        return []

    def check_target(self, spec: BuildSpec) -> None:
        """Make sure that this package can build `spec` on this machine; calls nothing native.

        Raises `EnvironmentUnfitError` where there is no GPU, or one of another compute capability.
        """
        gpus = cuda.devices()
        if not gpus:
            raise EnvironmentUnfitError(
                f"{self.name} builds engines only on the GPU they are for, and this machine has none.",
                remedy="Build on that machine: `txl export --kit` writes all that is needed.",
            )
        wanted, here = spec.compute_capability, gpus[0].compute_capability
        if wanted is not None and wanted != here:
            raise EnvironmentUnfitError(
                f"{self.name} builds only for the GPU that is here, {gpus[0].name} of compute capability {here}, not for {wanted}.",
                remedy="Build on that GPU, or put it first with `CUDA_VISIBLE_DEVICES`.",
            )
        if spec.hardware_compatibility.upper() not in self._trt.HardwareCompatibilityLevel.__members__:
            raise EnvironmentUnfitError(
                f"{self.name} has no hardware compatibility `{spec.hardware_compatibility}`.",
                remedy="Choose another one, or a TensorRT from 10.13 on.",
            )

    def build(self, spec: BuildSpec) -> Built:
        """Parse `spec.onnx` and build the engine, on the first GPU where one is needed. Ctrl-C ends the build at its next step.

        Raises:
            EnvironmentUnfitError: this machine cannot build it (`check_target`), or its GPU is not supported by this version.
            ArtifactError: `spec.timing_cache` is of another version or GPU.
            ValidationError: the parser refuses the graph, or no engine comes of it; with what the package said.
        """
        self.check_target(spec)
        with self._listener.listen() as heard:
            return interruptibly(lambda stop: self._build(spec, heard, stop))

    def _build(self, spec: BuildSpec, heard: Heard, stop: threading.Event) -> Built:
        trt = self._trt
        start = time.perf_counter()
        try:
            builder = trt.Builder(self._listener.logger)
        except TypeError as error:  # "factory function returned nullptr"
            raise self._failure(f"{self.name} does not start", heard) from error
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, self._listener.logger)
        if not parser.parse_from_file(str(spec.onnx)):
            raise ValidationError(
                f"{self.name} does not take {spec.onnx}: {_parse_errors(parser)}.",
                remedy="Export it again; `txl inspect` shows what the graph is made of.",
            )
        inputs = {network.get_input(i).name for i in range(network.num_inputs)}
        if inputs != {profile.name for profile in spec.profiles}:
            raise ValidationError(
                f"{spec.onnx} has the inputs {', '.join(sorted(inputs))}, which are others than its manifest says.",
                remedy="Export it again with `txl export --format onnx`.",
            )
        precisions = self._precisions(network)
        config = builder.create_builder_config()
        self._configure(config, spec)
        profile = builder.create_optimization_profile()
        for shapes in spec.profiles:
            profile.set_shape(shapes.name, shapes.min, shapes.opt, shapes.max)
        if config.add_optimization_profile(profile) < 0:
            raise self._failure(f"{self.name} refuses the ranges of shapes", heard)
        cache = self._use_timing_cache(config, spec)
        monitor = monitor_of(trt, stop)
        config.progress_monitor = monitor
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise self._failure(f"{self.name} could not build an engine of {spec.onnx}", heard)
        return Built(
            plan=bytes(plan),
            timing_cache=None if cache is None else bytes(cache.serialize()),
            log=heard.warnings,
            seconds=time.perf_counter() - start,
            precisions=precisions,
        )

    def open_engine(self, plan: bytes, runtime_cache: bytes | None = None) -> EngineHandle:
        """Load a plan onto CUDA's current GPU. Whether it belongs there must have been checked: a foreign plan can end the process.

        Raises:
            EnvironmentUnfitError: this machine has no GPU; nothing native was called then.
            ArtifactError: the package refuses the plan.
        """
        if not cuda.devices():
            raise EnvironmentUnfitError(
                f"{self.name} runs engines on an NVIDIA GPU, and this machine has none.", remedy="Run `txl doctor` to see what is missing."
            )
        with self._listener.listen() as heard:
            runtime = self._trt.Runtime(self._listener.logger)
            engine = None if runtime is None else runtime.deserialize_cuda_engine(plan)
            if engine is None:
                raise ArtifactError(
                    f"{self.name} does not open the engine: {'; '.join(heard.errors) or 'it gives no reason'}.",
                    remedy="Build it again for this GPU and version: `txl export --format trt`.",
                )
            return EngineHandle(self, runtime, engine, *self._runtime_config(engine, runtime_cache))

    def is_capturable(self, context: Any, stream: int) -> bool:
        """Return whether a step of the context's shapes can be captured on `stream`. TensorRT has no such question: True."""
        return True

    def _configure(self, config: Any, spec: BuildSpec) -> None:
        trt = self._trt
        if not spec.tf32:
            config.clear_flag(trt.BuilderFlag.TF32)
        if spec.detailed:
            config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        if spec.optimization_level is not None:
            config.builder_optimization_level = spec.optimization_level
        if spec.workspace_bytes is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, spec.workspace_bytes)
        if spec.hardware_compatibility != "none":
            config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.__members__[spec.hardware_compatibility.upper()]

    def _use_timing_cache(self, config: Any, spec: BuildSpec) -> Any:
        """Let the build read and fill a cache, and return it."""
        cache = config.create_timing_cache(spec.timing_cache or b"")
        if cache is None or not config.set_timing_cache(cache, False):  # False: refuse one of another GPU or version
            raise ArtifactError(
                f"The timing cache is not of {self.name} on this GPU.", remedy="Leave `--timing-cache` out: the build makes a new one."
            )
        return cache

    def _runtime_config(self, engine: Any, runtime_cache: bytes | None) -> tuple[Any, Any]:
        """Return how contexts of `engine` are to be made, without scratch memory, and the cache they fill; None where there is none."""
        return self._trt.ExecutionContextAllocationStrategy.USER_MANAGED, None

    def _precisions(self, network: Any) -> Precisions:
        """Count the layers, matrix products and constants of the parsed network by the type of what they yield."""
        found = Precisions("network")
        for i in range(network.num_layers):
            layer = network.get_layer(i)
            for k in range(layer.num_outputs):
                output = layer.get_output(k)
                found.count(layer.type.name, element_name(output.dtype), tuple(output.shape))
        return found

    def _failure(self, what: str, heard: Heard) -> TxlError:
        reasons = "; ".join(heard.errors) or "it gives no reason"
        if "is not supported by this TensorRT release" in reasons:
            return EnvironmentUnfitError(f"{what}: {reasons}.", remedy="Run `txl doctor` to see which version supports this GPU.")
        return ValidationError(f"{what}: {reasons}.", remedy="`-v` shows all it says; `txl doctor` says which versions go together.")


class RtxApi(Api):
    """TensorRT-RTX: builds without a GPU, compiles kernels when an engine runs first, and keeps those in a cache."""

    package: Package = "tensorrt_rtx"

    def compute_capabilities(self) -> list[str]:
        """Return what can be built without a GPU."""
        names = [name[2:] for name in self._trt.ComputeCapability.__members__ if name.startswith("SM")]
        return [f"{name[:-1]}.{name[-1]}" for name in names]

    def check_target(self, spec: BuildSpec) -> None:
        """Make sure that this version has `spec.compute_capability`. Raises `EnvironmentUnfitError` otherwise; calls nothing native."""
        wanted = spec.compute_capability
        if wanted is not None and wanted not in self.compute_capabilities():
            raise EnvironmentUnfitError(
                f"{self.name} builds for compute capability {', '.join(self.compute_capabilities())}, but not for {wanted}.",
                remedy=f"Use TensorRT on that GPU: `{INSTALL['tensorrt']}` (for a V100 tensorrt-cu12==10.4.0).",
            )
        if spec.hardware_compatibility not in ("none", "portable"):
            raise UsageError(
                f"{self.name} has no hardware compatibility `{spec.hardware_compatibility}`.",
                remedy="Name a compute capability, or none for an engine that runs on every GPU from 8.0 on.",
            )

    def _configure(self, config: Any, spec: BuildSpec) -> None:
        super()._configure(config, BuildSpec(**{**vars(spec), "hardware_compatibility": "none"}))
        trt = self._trt
        # Or a step cannot be captured as a CUDA graph. Such an engine runs only in contexts that are given their scratch memory.
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
        if spec.compute_capability is not None:
            config.num_compute_capabilities = 1
            member = trt.ComputeCapability.__members__["SM" + spec.compute_capability.replace(".", "")]
            if not config.set_compute_capability(member, 0):
                raise EnvironmentUnfitError(f"{self.name} refuses to build for compute capability {spec.compute_capability}.")

    def _use_timing_cache(self, config: Any, spec: BuildSpec) -> Any:
        if spec.timing_cache is not None:
            _log.warning("%s measures nothing while it builds: the timing cache is not used.", self.name)
        return None

    def _runtime_config(self, engine: Any, runtime_cache: bytes | None) -> tuple[Any, Any]:
        trt = self._trt
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        # The best kernels from the first run of a shape on: the default swaps them in some time later, so that steps are not alike.
        config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        cache = config.create_runtime_cache()
        if runtime_cache is not None and not cache.deserialize(runtime_cache):
            _log.info("The cache of compiled kernels is of another GPU, driver or version, and is made anew.")
        config.set_runtime_cache(cache)
        return config, cache

    def is_capturable(self, context: Any, stream: int) -> bool:
        """Return whether a step of the context's shapes can be captured on `stream`."""
        return bool(context.is_stream_capturable(stream))


class EngineHandle:
    """An engine on the GPU. Keeps alive what it needs."""

    def __init__(self, api: Api, runtime: Any, engine: Any, config: Any, cache: Any) -> None:
        """Take over what `Api.open_engine` made."""
        self._api = api
        self._runtime = runtime
        self._engine = engine
        self._config = config
        self._cache = cache

    @property
    def device_memory_bytes(self) -> int:
        """Scratch memory that a step takes, for the largest shapes."""
        return int(self._engine.device_memory_size_v2)

    def tensors(self) -> list[EngineTensor]:
        """Return the inputs and outputs, in the engine's order."""
        engine, trt = self._engine, self._api._trt
        found = []
        for i in range(engine.num_io_tensors):
            name = engine.get_tensor_name(i)
            is_input = engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
            found.append(
                EngineTensor(
                    name=name,
                    mode="input" if is_input else "output",
                    dtype=element_name(engine.get_tensor_dtype(name)),
                    shape=tuple(engine.get_tensor_shape(name)),
                )
            )
        return found

    def profile_shapes(self, name: str) -> Profile:
        """Return the shapes that the input takes."""
        low, middle, high = (tuple(shape) for shape in self._engine.get_tensor_profile_shape(name, 0))
        return Profile(name=name, min=low, opt=middle, max=high)

    def inspect(self) -> dict[str, Any]:
        """Return what the package's engine inspector says of each layer; `inspect.engine_precisions` reads it."""
        trt = self._api._trt
        text = self._engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
        found = json.loads(text)
        return found if isinstance(found, dict) else {"Layers": found}

    def context(self, scratch: int, scratch_bytes: int) -> ContextHandle:
        """Return a new place to run in.

        Args:
            scratch: address of GPU memory, a multiple of 256, which stays allocated as long as the context. Contexts may share it if
                their steps run one after the other. Not looked at where `device_memory_bytes` is 0.
            scratch_bytes: its size, at least `device_memory_bytes`.

        Raises `EnvironmentUnfitError` where there is none, mostly because the GPU's memory is too small, or where it refuses `scratch`.
        """
        with self._api._listener.listen() as heard:
            context = self._engine.create_execution_context(self._config)
            if context is not None and self.device_memory_bytes > 0:
                context.set_device_memory(scratch, scratch_bytes)  # returns nothing: what it refuses is in the log
            if context is None or heard.errors:
                raise EnvironmentUnfitError(
                    f"{self._api.name} cannot run the engine, which takes {self.device_memory_bytes / 1e6:.0f} MB of the GPU: "
                    f"{'; '.join(heard.errors) or 'it gives no reason'}.",
                    remedy="Free memory on the GPU, or build for smaller batches.",
                )
        return ContextHandle(self, context)

    def runtime_cache(self) -> bytes | None:
        """Return the kernels compiled so far, for `Api.open_engine`; None with TensorRT, which has them in the plan."""
        return None if self._cache is None else bytes(self._cache.serialize())


class ContextHandle:
    """One run at a time of an engine. Shapes and addresses stay until they are set again."""

    def __init__(self, engine: EngineHandle, context: Any) -> None:
        """Take over what `EngineHandle.context` made."""
        self._engine = engine
        self._context = context
        self._listener = engine._api._listener

    def set_shape(self, name: str, shape: Sequence[int]) -> None:
        """Set an input's shape. Raises `UsageError` where the engine does not take it."""
        with self._listener.listen() as heard:
            if not self._context.set_input_shape(name, tuple(shape)):
                bounds = self._engine.profile_shapes(name)
                raise UsageError(
                    f"The engine takes `{name}` of {bounds.min} to {bounds.max}, not {tuple(shape)}.",
                    remedy=heard.errors[0] if heard.errors else "Build it for these shapes: `txl export --format trt --batch-range`.",
                )

    def set_address(self, name: str, address: int) -> None:
        """Set where an input is read or an output is written: the address of GPU memory that is large enough for its shape."""
        with self._listener.listen() as heard:
            if not self._context.set_tensor_address(name, address):
                raise UsageError(f"The engine does not take the address of `{name}`: {'; '.join(heard.errors) or 'it gives no reason'}.")

    def infer_missing(self) -> list[str]:
        """Return the inputs that have no shape yet; the shapes of outputs are known when there is none."""
        return list(self._context.infer_shapes())

    def is_capturable(self, stream: int) -> bool:
        """Return whether a step of these shapes can be captured as a CUDA graph on `stream`, as far as the package tells."""
        return self._engine._api.is_capturable(self._context, stream)

    def enqueue(self, stream: int) -> None:
        """Start a step on a CUDA stream (its handle as a number); returns before it is done.

        Raises `EnvironmentUnfitError` where it does not start.
        """
        with self._listener.listen() as heard:
            if not self._context.execute_async_v3(stream):
                raise EnvironmentUnfitError(
                    f"{self._engine._api.name} could not run a step: {'; '.join(heard.errors) or 'it gives no reason'}.",
                    remedy="Run `txl doctor`; with `-v` it says more.",
                )


def element_name(dtype: Any) -> str:
    """Return the numpy name of a `tensorrt.DataType`: float32 of FLOAT, float16 of HALF; others in lower case."""
    name: str = dtype.name
    known = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16"}
    return known.get(name, name.lower())


def _parse_errors(parser: Any) -> str:
    """Return what the parser found, each with the node it was found at."""
    found = []
    for i in range(parser.num_errors):
        error = parser.get_error(i)
        node = f" (at {error.node_operator()} `{error.node_name()}`)" if error.node_name() else ""
        found.append(error.desc().strip().rstrip(".") + node)
    return "; ".join(found) or "it gives no reason"
