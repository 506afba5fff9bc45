"""Which GPU, driver, TensorRT, PyTorch and ONNX Runtime go together, and what a machine lacks: answered before any work begins.

The facts are data, `engines/targets/*.yaml`, each with its source; this module knows their schema and the questions. It needs neither
PyTorch nor TensorRT and loads nothing native but, for the question what GPUs there are, the driver's own library (`trt.cuda`).
"""

from __future__ import annotations

import functools
import importlib.metadata
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import yaml

from txl_deploy.trt.cuda import Gpu, devices, visible_name
from txl_train.errors import ConfigError, EnvironmentUnfitError, UsageError, nearest

Builder = Literal["tensorrt", "tensorrt_rtx"]
Purpose = Literal["build", "run"]
Kind = Literal["dtype", "python", "gpu", "driver", "package"]

BUILDER_NAMES = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}
STACKS_FILE = "stacks.yaml"

PACKAGES = ("tensorrt-cu13", "tensorrt-cu12", "tensorrt-rtx", "torch", "onnxruntime-gpu", "onnxruntime")
"""Distributions whose versions decide what a machine can do."""

_SAME_FOLDER = ("tensorrt-cu13", "tensorrt-cu12")
"""Both write the Python package `tensorrt`."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A fact and where it was read."""

    fact: str
    source: str
    """An address, or "measured" with what and when."""


@dataclass(frozen=True, kw_only=True)
class Stack:
    """Versions that go together for one target."""

    name: str
    target: str
    """Name of the target it serves here; several targets share a stack."""
    compute_capability: str
    """That of the target, such as 7.5."""
    builder: Builder
    """The Python package that builds and runs engines."""
    package: str
    """The distribution that installs it."""
    builder_version: str
    """Its exact version: an engine runs with no other."""
    index: str | None
    """Package index to ask besides the usual one; None where that has all of it."""
    python: tuple[str, str]
    """Oldest and newest Python that the builder and PyTorch have packages for."""
    torch: str
    onnxruntime: str
    """Version of onnxruntime-gpu."""
    onnxruntime_python: str
    """Oldest Python that this version of it is packaged for."""
    cuda: int
    """Major version of CUDA that all of them are built with."""
    driver: tuple[int, int | None]
    """Oldest and newest series of NVIDIA's driver; None means that no end is known."""
    without_gpu: tuple[str, ...]
    """Compute capabilities that the builder builds for on any machine; for others it needs the GPU itself."""
    fp16_only: tuple[str, ...]
    """Compute capabilities for which the builder refuses products of fp32."""
    sources: tuple[Source, ...]

    @property
    def builds_without_gpu(self) -> bool:
        """True if the target's engine can be built on any machine."""
        return self.compute_capability in self.without_gpu

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Types of graphs that it builds for the target."""
        return ("fp16",) if self.compute_capability in self.fp16_only else ("fp16", "fp32")

    @property
    def builder_name(self) -> str:
        """The builder with its version, as its maker writes it."""
        return f"{BUILDER_NAMES[self.builder]} {self.builder_version}"

    @property
    def builder_pin(self) -> str:
        """The builder as a requirement."""
        return f"{self.package}=={self.builder_version}"

    @property
    def pins(self) -> tuple[str, ...]:
        """All of the stack as requirements."""
        return (self.builder_pin, f"torch=={self.torch}", f"onnxruntime-gpu=={self.onnxruntime}")

    @property
    def pip_options(self) -> tuple[str, ...]:
        """What pip needs to be told besides the pins."""
        return () if self.index is None else ("--extra-index-url", self.index)

    @property
    def pip_install(self) -> str:
        """The command that installs the builder."""
        return " ".join(("pip install", *self.pip_options, self.builder_pin))


@dataclass(frozen=True, kw_only=True)
class Target:
    """A GPU to build engines for."""

    name: str
    gpus: tuple[str, ...]
    """Parts of the names by which the driver calls the GPUs that are meant."""
    compute_capability: str
    stacks: tuple[Stack, ...]
    """What serves it, best first."""
    notes: tuple[str, ...]
    sources: tuple[Source, ...]


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What is known of a machine without loading anything."""

    python: tuple[int, int]
    gpus: tuple[Gpu, ...] = ()
    packages: Mapping[str, str]
    """Version of each installed distribution of `PACKAGES`."""


@dataclass(frozen=True)
class Problem:
    """Something that keeps a machine from building or running engines with a stack."""

    kind: Kind
    cause: str
    """Part of a sentence, without a full stop."""
    remedy: str
    """A command, or a sentence."""

    def __str__(self) -> str:
        return f"{self.cause}: {self.remedy}"


@dataclass(frozen=True)
class Plan:
    """With which stack the engine of a target is built, and where."""

    stack: Stack
    here: bool
    """True if this machine can and is to; otherwise a kit for the target is written."""
    problems: tuple[Problem, ...] = ()
    """Why not here."""
    hint: str | None = None
    """What to do so that another stack would do it here, as part of a sentence; None where there is nothing."""

    @property
    def why_not(self) -> str | None:
        """Why not here, as part of a sentence without a full stop; None if it could."""
        if self.here or not self.problems:
            return None
        return f"{self.stack.builder_name}: {', and '.join(problem.cause for problem in self.problems)}"


class NamedGpu(Protocol):
    """What `target_of` needs to know of a GPU."""

    @property
    def name(self) -> str: ...
    @property
    def compute_capability(self) -> str: ...


def targets() -> dict[str, Target]:
    """Return every target by its name, sorted. Raises `ConfigError` where a file says what the schema does not know."""
    return dict(_targets(_folder()))


def target(name: str) -> Target:
    """Return the target with this name, whatever its case. Raises `UsageError` with the nearest name."""
    known = targets()
    wanted = name.strip().lower().replace("_", "-")
    if wanted not in known:
        raise UsageError(f"`{name}` is no target.{nearest(wanted, known)}", remedy=f"There are {', '.join(known)}.")
    return known[wanted]


def target_of(gpu: NamedGpu) -> Target | None:
    """Return the target that a GPU is: the one that names it best, else the first of its compute capability; None for an unknown one."""
    fitting = [known for known in targets().values() if known.compute_capability == gpu.compute_capability]
    return max(fitting, key=lambda known: _resemblance(known, gpu.name), default=None)


def _resemblance(target: Target, name: str) -> int:
    """Return the length of the longest of the target's names that stands in a GPU's: RTX A2000 has both A2 and RTX A, which is longer."""
    return max((len(part) for part in target.gpus if part.lower() in name.lower()), default=0)


def this_machine() -> Machine:
    """Describe this machine. Takes some milliseconds and raises nothing."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = str(importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            continue
    return Machine(python=sys.version_info[:2], gpus=tuple(devices()), packages=found)


def problems(stack: Stack, machine: Machine, purpose: Purpose = "build", dtype: str | None = None) -> list[Problem]:
    """Say what keeps `machine` from building the target's engine with `stack`, or from running it; an empty list means nothing does.

    Args:
        dtype: that of the graph, fp16 or fp32; None leaves it out.
    """
    found = [] if dtype is None or dtype in stack.dtypes else [_wrong_dtype(stack, dtype)]
    python = ".".join(map(str, machine.python))
    oldest = stack.python[0] if purpose == "build" else max(stack.python[0], stack.onnxruntime_python, key=_number)
    if not _number(oldest) <= machine.python <= _number(stack.python[1]):
        cause = f"it needs Python {oldest} to {stack.python[1]}, and this is {python}"
        found.append(Problem("python", cause, f"python{stack.python[1]} -m venv .venv && . .venv/bin/activate"))
    if purpose == "run" or not stack.builds_without_gpu:
        found += _gpu_problems(stack, machine)
    return found + _package_problems(stack, machine)


def plan(target: Target, machine: Machine, *, rtx_only: bool = False, dtype: str | None = None, kit: bool = False) -> Plan:
    """Choose the stack for a target's engine: the first that `machine` can build with, else the one to write a kit for.

    A kit is for the first stack, unless this machine has the target's GPU with a driver that only a later one goes with.

    Args:
        rtx_only: leave out full TensorRT.
        dtype: that of the graph, fp16 or fp32; None leaves it out.
        kit: choose for a kit, whether or not this machine could build.

    Raises `EnvironmentUnfitError` where no stack builds such an engine anywhere.
    """
    stacks = [stack for stack in target.stacks if stack.builder == "tensorrt_rtx" or not rtx_only]
    what = f"{target.name} (compute capability {target.compute_capability})"
    if not stacks:
        raise EnvironmentUnfitError(f"TensorRT-RTX builds no engine for {what}.", remedy="Use `--format trt`.")
    able = [stack for stack in stacks if dtype is None or dtype in stack.dtypes]
    if not able:
        problem = _wrong_dtype(stacks[0], str(dtype))
        raise EnvironmentUnfitError(f"There is no engine of {dtype} for {what}: {problem.cause}.", remedy=problem.remedy)
    found = [(stack, problems(stack, machine, dtype=dtype)) for stack in able]
    for stack, reasons in found:
        if not reasons and not kit:
            return Plan(stack, True)
    stack, reasons = next((pair for pair in found if all(problem.kind != "driver" for problem in pair[1])), found[0])
    only_package = [other for other in found if other[0] is not stack and [problem.kind for problem in other[1]] == ["package"]]
    hint = only_package[0][1][0].remedy if only_package else None
    by_dtype = [other for other in stacks if other not in able and not problems(other, machine)]
    if hint is None and by_dtype and not kit:
        hint = f"an export with `--dtype fp16`, since {by_dtype[0].builder_name} takes no {dtype} for it"
    return Plan(stack, False, tuple(reasons), hint)


def _wrong_dtype(stack: Stack, dtype: str) -> Problem:
    cause = f"{BUILDER_NAMES[stack.builder]} refuses matrix products of {dtype} for compute capability {stack.compute_capability}"
    return Problem("dtype", cause, f"Export with `--dtype {stack.dtypes[0]}`.")


def _gpu_problems(stack: Stack, machine: Machine) -> list[Problem]:
    wanted = f"compute capability {stack.compute_capability}"
    if not machine.gpus:
        return [
            Problem(
                "gpu",
                f"it needs a GPU of {wanted}, and there is none here",
                f"Run it on a machine with such a GPU (target {stack.target}).",
            )
        ]
    gpu = machine.gpus[0]
    if gpu.compute_capability != stack.compute_capability:
        cause = f"it needs a GPU of {wanted}, and the {gpu.name} has {gpu.compute_capability}"
        fitting = next((other for other in machine.gpus if other.compute_capability == stack.compute_capability), None)
        if fitting is not None:
            return [Problem("gpu", f"{cause}; the {fitting.name} fits", f"export CUDA_VISIBLE_DEVICES={visible_name(fitting.index)}")]
        return [Problem("gpu", cause, f"Run it on a machine with such a GPU (target {stack.target}).")]
    oldest, newest = stack.driver
    series = None if gpu.driver is None else _number(gpu.driver)[0]
    if series is not None and (series < oldest or (newest is not None and series > newest)):
        allowed = f"{oldest} or newer" if newest is None else f"{oldest} to {newest}"
        cause = f"it needs NVIDIA driver {allowed}, and this is {gpu.driver}"
        return [Problem("driver", cause, f"Install NVIDIA driver {newest or oldest}.")]
    return []


def _package_problems(stack: Stack, machine: Machine) -> list[Problem]:
    others = [name for name in _SAME_FOLDER if name in machine.packages and stack.package in _SAME_FOLDER and name != stack.package]
    remove = [f"pip uninstall -y {' '.join(f'{name} {name}-bindings {name}-libs' for name in others)}"] if others else []
    install = " && ".join([*remove, stack.pip_install])
    version = machine.packages.get(stack.package)
    if version is None:
        there = f", but {others[0]} {machine.packages[others[0]]}" if others else ""
        return [Problem("package", f"{stack.builder_pin} is not installed{there}", install)]
    if re.sub(r"\.post\d+$", "", version) != stack.builder_version:
        return [Problem("package", f"it needs {stack.builder_pin}, and {version} is installed", install)]
    if others:
        cause = f"{others[0]} and {stack.package} are both installed and overwrite each other"
        return [Problem("package", cause, install.replace("pip install", "pip install --force-reinstall", 1))]
    return []


def _number(version: str) -> tuple[int, ...]:
    """Return a dotted version as numbers that compare; what is no number ends it."""
    return tuple(int(part) for part in re.match(r"\d+(\.\d+)*|", version).group().split(".") if part) or (0,)  # type: ignore[union-attr]


# ---- the files -------------------------------------------------------------------------------------------------------------------


def _folder() -> Path:
    """Return where the targets lie: within the installed package, or in `engines` beside it in a checkout."""
    installed = Path(__file__).with_name("targets")
    return installed if installed.is_dir() else Path(__file__).resolve().parents[1] / "engines" / "targets"


@functools.cache
def _targets(folder: Path) -> dict[str, Target]:
    files = sorted(folder.glob("*.yaml"))
    by_name = {path.stem: _read(path) for path in files if path.name != STACKS_FILE}
    if not by_name or not (folder / STACKS_FILE).exists():
        raise ConfigError(f"{folder} holds no targets.", remedy="Install txl again: its data files are missing.")
    stacks = _read(folder / STACKS_FILE)
    return {name: _target(name, document, stacks) for name, document in by_name.items()}


def _read(path: Path) -> Mapping[str, Any]:
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read: {error}.") from error
    if not isinstance(document, dict):
        raise ConfigError(f"{path} must hold values by name.")
    return document


def _target(name: str, document: Mapping[str, Any], stacks: Mapping[str, Any]) -> Target:
    where = f"{name}.yaml"
    values = _checked(document, _TARGET_SCHEMA, where)
    chosen = []
    for stack in values.pop("stacks"):
        if stack not in stacks:
            raise ConfigError(f"{where}: `{stack}` is no stack of {STACKS_FILE}.{nearest(stack, stacks)}")
        described = _checked(stacks[stack], _STACK_SCHEMA, f"{STACKS_FILE}, {stack}")
        chosen.append(Stack(name=stack, target=name, compute_capability=values["compute_capability"], **described))
    return Target(name=name, stacks=tuple(chosen), **values)


def _checked(document: Any, schema: Mapping[str, Callable[[Any], Any]], where: str) -> dict[str, Any]:
    """Return the values of `document` as the schema has them; unknown and missing keys and wrong types are errors."""
    if not isinstance(document, dict):
        raise ConfigError(f"{where} must hold values by name.")
    for key in document:
        if key not in schema:
            raise ConfigError(f"{where}: `{key}` is unknown.{nearest(str(key), schema)}")
    found = {}
    for key, parse in schema.items():
        if key not in document:
            raise ConfigError(f"{where}: `{key}` is missing.")
        try:
            found[key] = parse(document[key])
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{where}: `{key}` {error}.") from None
    return found


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise TypeError(f"must be text, so in quotes where it looks like a number, but is {value!r} instead")
    return value


def _matching(pattern: str, example: str) -> Callable[[Any], str]:
    def parse(value: Any) -> str:
        if not re.fullmatch(pattern, _text(value)):
            raise ValueError(f"must look like {example}, but is {value!r} instead")
        return cast(str, value)

    return parse


def _whole(value: Any) -> int:
    if type(value) is not int or value < 1:
        raise TypeError(f"must be a whole number, but is {value!r} instead")
    return value


def _list(parse: Callable[[Any], Any]) -> Callable[[Any], tuple[Any, ...]]:
    def parse_all(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list):
            raise TypeError(f"must be a list, but is {value!r} instead")
        return tuple(parse(item) for item in value)

    return parse_all


def _range(parse: Callable[[Any], Any], open_end: bool = False) -> Callable[[Any], tuple[Any, Any]]:
    def parse_both(value: Any) -> tuple[Any, Any]:
        if not isinstance(value, list) or len(value) != 2:
            raise TypeError(f"must be the first and the last of a range, but is {value!r} instead")
        return parse(value[0]), None if open_end and value[1] is None else parse(value[1])

    return parse_both


def _index(value: Any) -> str | None:
    return None if value is None else _matching(r"https://\S+", "https://…")(value)


def _builder(value: Any) -> str:
    if value not in BUILDER_NAMES:
        raise ValueError(f"must be one of {', '.join(BUILDER_NAMES)}, but is {value!r} instead")
    return cast(str, value)


def _source(value: Any) -> Source:
    if not isinstance(value, dict) or set(value) != {"fact", "source"}:
        raise TypeError("must list facts, each with `fact` and `source`")
    return Source(fact=_text(value["fact"]), source=_matching(r"https://\S+|measured .+", "https://… or measured …")(value["source"]))


def _some(parse: Callable[[Any], Sequence[Any]]) -> Callable[[Any], tuple[Any, ...]]:
    def parse_some(value: Any) -> tuple[Any, ...]:
        found: Iterable[Any] = parse(value)
        if not found:
            raise ValueError("must not be empty")
        return tuple(found)

    return parse_some


_CAPABILITY = _matching(r"\d+\.\d", '"7.5"')
_VERSION = _matching(r"\d+(\.\d+)+", "1.2.3")
_MINOR = _matching(r"3\.\d+", '"3.12"')

_TARGET_SCHEMA: dict[str, Callable[[Any], Any]] = {
    "gpus": _some(_list(_text)),
    "compute_capability": _CAPABILITY,
    "stacks": _some(_list(_text)),
    "notes": _list(_text),
    "sources": _some(_list(_source)),
}
_STACK_SCHEMA: dict[str, Callable[[Any], Any]] = {
    "builder": _builder,
    "package": _text,
    "builder_version": _VERSION,
    "index": _index,
    "python": _range(_MINOR),
    "torch": _VERSION,
    "onnxruntime": _VERSION,
    "onnxruntime_python": _MINOR,
    "cuda": _whole,
    "driver": _range(_whole, open_end=True),
    "without_gpu": _list(_CAPABILITY),
    "fp16_only": _list(_CAPABILITY),
    "sources": _some(_list(_source)),
}
