"""A `tensorrt` made from the record of a real one: it has the recorded names and no others, and takes the recorded parameters.

What is called that the record lacks raises AttributeError; a wrong number or type of arguments raises TypeError, as pybind11 does.
Everything that is called is written down in `Fake.calls`. What the pretended TensorRT finds in a graph, says in its log and answers
is set in `Fake`.
"""

from __future__ import annotations

import contextlib
import enum
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from tests.deploy.trt.record_api import read
from txl_deploy.trt import api, cuda

T4 = cuda.Gpu(index=0, name="Tesla T4", compute_capability="7.5", memory_bytes=15 << 30, cuda="13.0", driver="580.65.06")
V100 = cuda.Gpu(index=0, name="Tesla V100", compute_capability="7.0", memory_bytes=16 << 30, cuda="12.8", driver="570.86.15")

RELEASES = ("10.4", "10.16", "11.4", "rtx-1.7")
PLAN = b"a plan"


@dataclass
class Tensor:
    """One tensor of the pretended network or engine."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    is_input: bool = True


@dataclass
class Fake:
    """A pretended TensorRT: its module, what has been called, and what it answers."""

    release: str
    inputs: list[Tensor] = field(default_factory=lambda: [Tensor("x", "HALF", (-1, 4))])
    outputs: list[Tensor] = field(default_factory=lambda: [Tensor("y", "HALF", (-1, 4), is_input=False)])
    layers: list[tuple[str, str, tuple[int, ...]]] = field(
        default_factory=lambda: [("CONSTANT", "HALF", (4, 4)), ("MATRIX_MULTIPLY", "HALF", (-1, 4)), ("SOFTMAX", "FLOAT", (-1, 4))]
    )
    """The network's layers: type, type of the output, shape of the output."""
    parse_errors: list[tuple[str, str, str]] = field(default_factory=list)
    """What the parser finds: description, name of the node, operator."""
    says: list[tuple[str, str]] = field(default_factory=list)
    """What is logged during parsing: severity, message."""
    builds: bool = True
    build_errors: list[str] = field(default_factory=list)
    steps: int = 3
    """Steps of a build, after each of which it asks whether to go on."""
    steps_gone_on: int = 0
    """After how many it was told to."""
    takes_timing_cache: bool = True
    opens: bool = True
    takes_shapes: bool = True
    runs: bool = True
    takes_runtime_cache: bool = True
    scratch_bytes: int = 1 << 20
    """Memory that the engine takes to run; 0 where it needs none."""
    requires_user_allocation: bool | None = None
    """Whether the engine was built so; None: as the adapter builds them, with TensorRT-RTX."""
    information: Any = field(default_factory=lambda: {"Layers": [], "Bindings": []})
    during_build: Callable[[], None] = lambda: None
    calls: list[tuple[str, tuple[Any, ...]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Make the module."""
        self.record = read(self.release)
        if self.requires_user_allocation is None:
            self.requires_user_allocation = self.package == "tensorrt_rtx"
        self.module = _make_module(self)

    @property
    def package(self) -> api.Package:
        """What it pretends to be."""
        return "tensorrt_rtx" if self.release.startswith("rtx") else "tensorrt"

    def called(self, name: str) -> list[tuple[Any, ...]]:
        """Return the arguments of every call of `Class.method`, or of every setting of `Class.property`."""
        return [arguments for called, arguments in self.calls if called == name]

    def answer(self, name: str, this: Any, arguments: tuple[Any, ...]) -> Any:
        """Return what the pretended machine answers to a call; `NotImplemented` for what the recorded type of the result says."""
        behaviour = _BEHAVIOURS.get(name)
        return NotImplemented if behaviour is None else behaviour(self, this, *arguments)


@contextlib.contextmanager
def installed(fake: Fake, monkeypatch: Any, *gpus: cuda.Gpu) -> Iterator[api.Api]:
    """Put the pretended package where `import` finds it, on a machine with these GPUs, and return the adapter over it."""
    monkeypatch.setitem(sys.modules, fake.package, fake.module)
    monkeypatch.setattr(cuda, "devices", lambda: list(gpus))
    yield api.find(fake.package)


def _make_module(fake: Fake) -> ModuleType:
    module = ModuleType(fake.package)
    module.__version__ = fake.record["version"]  # type: ignore[attr-defined]
    classes = fake.record["classes"]
    for name, content in classes.items():
        outer, _, inner = name.partition(".")
        kind = _make_enum(inner or outer, content["members"]) if "members" in content else _make_class(fake, module, name, content)
        if inner:
            setattr(getattr(module, outer), inner, kind)
        else:
            setattr(module, name, kind)
    return module


def _make_enum(name: str, members: dict[str, int]) -> type:
    class Member(enum.Enum):
        def __int__(self) -> int:
            return int(self.value)

    return Member(name, members)  # type: ignore[return-value]


def _make_class(fake: Fake, module: ModuleType, name: str, content: dict[str, Any]) -> type:
    def initialise(self: Any, *arguments: Any) -> None:
        signatures = content["methods"]["__init__"]
        if not signatures:
            raise TypeError(f"{name}: No constructor defined!")
        _check(module, f"{name}.__init__", signatures, arguments)
        object.__setattr__(self, "_values", {})
        fake.calls.append((name, arguments))
        self._values["arguments"] = arguments

    def set_attribute(self: Any, attribute: str, value: Any) -> None:
        if type(self).__module__ == "made from a record":  # a class derived from it may have attributes of its own
            if not content["properties"].get(attribute, False):
                raise AttributeError(f"{name} has no attribute {attribute} that can be set")
            fake.calls.append((f"{name}.{attribute}", (value,)))
            self._values[attribute] = value
        else:
            object.__setattr__(self, attribute, value)

    space: dict[str, Any] = {"__init__": initialise, "__setattr__": set_attribute, "__module__": "made from a record"}
    for method, signatures in content["methods"].items():
        if method != "__init__":
            space[method] = _make_method(fake, module, f"{name}.{method}", signatures)
    for attribute in content["properties"]:
        space[attribute] = property(_getter(fake, f"{name}.{attribute}", attribute))
    if name == "IHostMemory":
        space["__bytes__"] = lambda self: self._values["bytes"]
    return type(name, (), space)


def _getter(fake: Fake, name: str, attribute: str) -> Callable[[Any], Any]:
    def get(self: Any) -> Any:
        if attribute in self._values:
            return self._values[attribute]
        value = fake.answer(name, self, ())
        if value is NotImplemented:
            raise AssertionError(f"the pretended TensorRT does not know the value of {name}")
        return value

    return get


def _make_method(fake: Fake, module: ModuleType, name: str, signatures: list[str]) -> Callable[..., Any]:
    def method(self: Any, *arguments: Any) -> Any:
        if "_values" not in vars(self):
            raise TypeError(f"{name.partition('.')[0]}.__init__() must be called when overriding __init__")
        result = _check(module, name, signatures, arguments)
        fake.calls.append((name, arguments))
        value = fake.answer(name, self, arguments)
        if value is not NotImplemented:
            return value
        if result in vars(module):
            return made(module, result)
        return {"None": None, "bool": True, "int": 0, "str": ""}[result]

    return method


def made(module: ModuleType, kind: str, /, **values: Any) -> Any:
    """Return an object of a class that has no constructor."""
    thing = object.__new__(getattr(module, kind))
    object.__setattr__(thing, "_values", values)
    return thing


def _check(module: ModuleType, name: str, signatures: Sequence[str], arguments: tuple[Any, ...]) -> str:
    """Return the type of the result of the first signature that takes `arguments`; TypeError as pybind11 where none does."""
    for signature in signatures:
        parameters, _, result = signature[1:].rpartition(") -> ")
        expected = _split(parameters)
        n_required = sum(" = " not in parameter for parameter in expected)
        if n_required <= len(arguments) <= len(expected) and all(
            _fits(module, parameter, argument) for parameter, argument in zip(expected, arguments)
        ):
            return result
    raise TypeError(f"{name}(): incompatible function arguments {arguments}. The following are supported: {'; '.join(signatures)}")


def _split(parameters: str) -> list[str]:
    parts, depth = [""], 0
    for character in parameters:
        depth += (character in "[<(") - (character in "]>)")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


def _fits(module: ModuleType, parameter: str, argument: Any) -> bool:
    annotation, _, default = parameter.partition(": ")[2].partition(" = ")
    if argument is None:
        return default == "None"
    outer, _, inner = annotation.partition(".")
    if outer in vars(module) and outer != "Dims":
        kind = getattr(module, outer)
        return isinstance(argument, getattr(kind, inner) if inner else kind)
    if annotation in ("Dims", "tuple", "list"):
        return isinstance(argument, (tuple, list)) and all(isinstance(axis, int) for axis in argument)
    kinds: dict[str, Any] = {"int": int, "SupportsInt": int, "str": str, "bool": bool, "buffer": bytes, "Buffer": bytes}
    return isinstance(argument, kinds[annotation])


def _parse(fake: Fake, parser: Any, path: str) -> bool:
    network, logger = parser._values["arguments"]
    network._values["parsed"] = True
    for severity, message in fake.says:
        logger.log(getattr(fake.module.ILogger.Severity, severity), message)
    return not fake.parse_errors


def _build(fake: Fake, builder: Any, network: Any, config: Any) -> Any:
    assert network._values["parsed"], "a network that was parsed"
    assert config._values["profiles"] == 1, "one profile"
    logger = builder._values["arguments"][0]
    monitor = config._values.get("progress_monitor")
    fake.during_build()
    if monitor is not None:
        monitor.phase_start("Building engine", None, fake.steps)
        for step in range(fake.steps):
            if not monitor.step_complete("Building engine", step):
                logger.log(fake.module.ILogger.Severity.ERROR, "Build canceled by user")
                return None
            fake.steps_gone_on += 1
        monitor.phase_finish("Building engine")
    for message in fake.build_errors:
        logger.log(fake.module.ILogger.Severity.ERROR, message)
    return made(fake.module, "IHostMemory", bytes=PLAN) if fake.builds else None


def _add_profile(fake: Fake, config: Any, profile: Any) -> int:
    config._values["profiles"] = config._values.get("profiles", 0) + 1
    return 0


def _create_timing_cache(fake: Fake, config: Any, content: bytes) -> Any:
    return made(fake.module, "ITimingCache", content=content)


def _set_timing_cache(fake: Fake, config: Any, cache: Any, ignore_mismatch: bool) -> bool:
    return fake.takes_timing_cache


def _tensor(fake: Fake, name: str) -> Tensor:
    return next(tensor for tensor in (*fake.inputs, *fake.outputs) if tensor.name == name)


def _type(fake: Fake, name: str) -> Any:
    return fake.module.DataType[name]


def _layer(fake: Fake, network: Any, index: int) -> Any:
    kind, dtype, shape = fake.layers[index]
    output = made(fake.module, "ITensor", dtype=_type(fake, dtype), shape=shape, name=f"output of {index}")
    return made(fake.module, "ILayer", type=fake.module.LayerType[kind], num_outputs=1, name=f"layer {index}", output=output)


def _error(fake: Fake, parser: Any, index: int) -> Any:
    description, node, operator = fake.parse_errors[index]
    return made(fake.module, "ParserError", desc=description, node_name=node, node_operator=operator)


def _memory(fake: Fake, content: bytes) -> Any:
    return made(fake.module, "IHostMemory", bytes=content)


def _open(fake: Fake, runtime: Any, plan: bytes) -> Any:
    return made(fake.module, "ICudaEngine", logger=runtime._values["arguments"][0]) if fake.opens else None


def _create_context(fake: Fake, engine: Any, choice: Any = None) -> Any:
    """Make a context as its strategy, or that of its runtime configuration, says; the message is that of the real one."""
    strategy = choice._values.get("strategy") if hasattr(choice, "_values") else choice
    user_managed = strategy is fake.module.ExecutionContextAllocationStrategy.USER_MANAGED
    if fake.requires_user_allocation and not user_managed:
        message = (
            "Engine was built with BuilderFlag::kREQUIRE_USER_ALLOCATION. Execution context creation requires "
            "ExecutionContextAllocationStrategy::kUSER_MANAGED allocation strategy."
        )
        engine._values["logger"].log(fake.module.ILogger.Severity.ERROR, message)
        return None
    scratch = 0 if user_managed else fake.scratch_bytes
    return made(fake.module, "IExecutionContext", logger=engine._values["logger"], scratch=scratch)


def _set_strategy(fake: Fake, config: Any, strategy: Any) -> Any:
    config._values["strategy"] = strategy
    return NotImplemented


def _set_device_memory(fake: Fake, context: Any, address: int, size: int) -> Any:
    if address and address % 256 == 0 and size >= fake.scratch_bytes:
        context._values["scratch"] = size
    else:
        context._values["logger"].log(fake.module.ILogger.Severity.ERROR, f"no {fake.scratch_bytes} aligned bytes at {address}")
    return NotImplemented


def _run(fake: Fake, context: Any, stream: int) -> bool:
    return fake.runs and context._values["scratch"] >= fake.scratch_bytes


_BEHAVIOURS: dict[str, Callable[..., Any]] = {
    "OnnxParser.parse_from_file": _parse,
    "OnnxParser.num_errors": lambda fake, this: len(fake.parse_errors),
    "OnnxParser.get_error": _error,
    "ParserError.desc": lambda fake, this: this._values["desc"],
    "ParserError.node_name": lambda fake, this: this._values["node_name"],
    "ParserError.node_operator": lambda fake, this: this._values["node_operator"],
    "INetworkDefinition.num_inputs": lambda fake, this: len(fake.inputs),
    "INetworkDefinition.get_input": lambda fake, this, i: made(fake.module, "ITensor", name=fake.inputs[i].name),
    "INetworkDefinition.num_layers": lambda fake, this: len(fake.layers),
    "INetworkDefinition.get_layer": _layer,
    "ILayer.get_output": lambda fake, this, i: this._values["output"],
    "Builder.build_serialized_network": _build,
    "IBuilderConfig.add_optimization_profile": _add_profile,
    "IBuilderConfig.create_timing_cache": _create_timing_cache,
    "IBuilderConfig.set_timing_cache": _set_timing_cache,
    "ITimingCache.serialize": lambda fake, this: _memory(fake, b"timings of " + fake.release.encode()),
    "Runtime.deserialize_cuda_engine": _open,
    "ICudaEngine.create_execution_context": _create_context,
    "ICudaEngine.num_io_tensors": lambda fake, this: len(fake.inputs) + len(fake.outputs),
    "ICudaEngine.get_tensor_name": lambda fake, this, i: [*fake.inputs, *fake.outputs][i].name,
    "ICudaEngine.get_tensor_mode": lambda fake, this, name: fake.module.TensorIOMode["INPUT" if _tensor(fake, name).is_input else "OUTPUT"],
    "ICudaEngine.get_tensor_dtype": lambda fake, this, name: _type(fake, _tensor(fake, name).dtype),
    "ICudaEngine.get_tensor_shape": lambda fake, this, name: _tensor(fake, name).shape,
    "ICudaEngine.get_tensor_profile_shape": lambda fake, this, name, i: [
        tuple(batch if axis == -1 else axis for axis in _tensor(fake, name).shape) for batch in (1, 8, 32)
    ],
    "ICudaEngine.device_memory_size_v2": lambda fake, this: fake.scratch_bytes,
    "EngineInspector.get_engine_information": lambda fake, this, format: json.dumps(fake.information),
    "IRuntimeCache.deserialize": lambda fake, this, content: fake.takes_runtime_cache,
    "IRuntimeCache.serialize": lambda fake, this: _memory(fake, b"kernels"),
    "IRuntimeConfig.create_runtime_cache": lambda fake, this: made(fake.module, "IRuntimeCache"),
    "IRuntimeConfig.set_execution_context_allocation_strategy": _set_strategy,
    "IExecutionContext.set_input_shape": lambda fake, this, name, shape: fake.takes_shapes,
    "IExecutionContext.infer_shapes": lambda fake, this: [],
    "IExecutionContext.get_tensor_shape": lambda fake, this, name: _tensor(fake, name).shape,
    "IExecutionContext.set_device_memory": _set_device_memory,
    "IExecutionContext.execute_async_v3": _run,
}
