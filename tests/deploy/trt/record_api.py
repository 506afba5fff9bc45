"""Record what the Python packages of TensorRT offer: classes, methods with their parameters, properties, enum members.

    python -m tests.deploy.trt.record_api            # all of them, into tests/deploy/trt/api_names/
    python -m tests.deploy.trt.record_api 11.4       # one of them

The wheels with the Python modules come from the package index; the libraries they need do not, so a stand-in is compiled from
stand_in.c with `cc`. It is enough to import the modules, and nothing of them is called. TensorRT-RTX is recorded as it is installed.
Run this after raising a version in `RELEASES`, and read the difference.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

FOLDER = Path(__file__).resolve().parent
RECORDS = FOLDER / "api_names"

RELEASES = {
    "10.4": ("tensorrt_bindings", "tensorrt-cu12-bindings==10.4.0"),
    "10.16": ("tensorrt_bindings", "tensorrt-cu12-bindings==10.16.1.11"),
    "11.4": ("tensorrt_bindings", "tensorrt-cu13-bindings==11.4.0.106"),
    "rtx-1.7": ("tensorrt_rtx", None),
}
"""By the name of the record: the Python module, and the requirement that brings it; None where it must be installed."""

LIBRARIES = ("libnvinfer", "libnvinfer_plugin", "libnvonnxparser")
_UNUSED = re.compile(
    "Plugin|Refitter|[a-zA-Z]{2}Layer$|Boundary|^Weights|^Permutation|^IExprBuilder|^DimsExprs|^IDimensionExpr|^Dims[0-9H]"
)
"""Classes that nobody building or running an engine needs: plugins, single layers, refitting."""

_PATHS = re.compile(r"\b(?:tensorrt\w*\.|typing\w*\.|collections\.abc\.|types\.|nvinfer1::|nvonnxparser::)+")
"""Where a type is defined; for the same type it differs between versions of Python."""


class CannotRecord(Exception):
    """Why a release cannot be recorded here."""


def path_of(release: str) -> Path:
    """Return where the record of a release lies."""
    return RECORDS / f"{release}.json"


def read(release: str) -> dict[str, Any]:
    """Return the committed record."""
    record: dict[str, Any] = json.loads(path_of(release).read_text(encoding="utf-8"))
    return record


def record(release: str) -> dict[str, Any]:
    """Return a new record of a release, made in a process of its own. Raises `CannotRecord` where something for it is missing."""
    module, requirement = RELEASES[release]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        environment = dict(os.environ)
        if requirement is not None:
            _unpack(requirement, folder)
            _build_libraries(folder / module)
            environment |= {"PYTHONPATH": str(folder), "LD_LIBRARY_PATH": str(folder / module)}
        command = [sys.executable, str(Path(__file__).resolve()), "--dump", module]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
        if done.returncode != 0:
            raise CannotRecord(f"{module} cannot be imported: {done.stderr.strip().splitlines()[-1:]}")
        found: dict[str, Any] = json.loads(done.stdout)
        return found


def _unpack(requirement: str, folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", "--disable-pip-version-check"]
    try:
        done = subprocess.run([*command, "--dest", str(folder), requirement], capture_output=True, text=True, check=False, timeout=120)
    except subprocess.TimeoutExpired as error:
        raise CannotRecord("the package index does not answer") from error
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        version = ".".join(map(str, sys.version_info[:2]))
        raise CannotRecord(f"the package index gives no {requirement} for Python {version}: {done.stderr.strip()[-300:]}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        wheel.extractall(folder)


def _build_libraries(package: Path) -> None:
    needed = {name for path in package.glob("*.so") for name in re.findall(rb"(libnv\w+\.so\.\d+)\0", path.read_bytes())}
    for name in sorted(name.decode() for name in needed):
        if name.partition(".")[0] in LIBRARIES:
            compiler = os.environ.get("CC", sysconfig.get_config_var("CC") or "cc").split()[0]
            for candidate in (compiler, "cc"):
                try:
                    subprocess.run([candidate, "-shared", "-fPIC", "-o", str(package / name), str(FOLDER / "stand_in.c")], check=True)
                    break
                except (OSError, subprocess.CalledProcessError) as error:
                    problem = error
            else:
                raise CannotRecord(f"no C compiler: {problem}")


def describe(module: ModuleType) -> dict[str, Any]:
    """Return what there is in a module, as plain data."""
    classes: dict[str, Any] = {}
    for name, value in sorted(vars(module).items()):
        if isinstance(value, type) and not name.startswith("_") and not _UNUSED.search(name) and "tensorrt" in value.__module__:
            classes[name] = _describe_class(value)
            for inner_name, inner in sorted(vars(value).items()):
                if isinstance(inner, type) and not inner_name.startswith("_"):
                    classes[f"{name}.{inner_name}"] = _describe_class(inner)
    return {"version": module.__version__, "classes": classes}


def _describe_class(kind: type) -> dict[str, Any]:
    members = getattr(kind, "__members__", None)
    if members is not None:
        return {"members": {name: int(value) for name, value in sorted(members.items(), key=lambda item: int(item[1]))}}
    methods, properties = {}, {}
    for name in sorted(set(dir(kind)) - set(dir(object)) | {"__init__"}):
        value = inspect.getattr_static(kind, name)
        if isinstance(value, property):
            properties[name] = value.fset is not None
        elif callable(getattr(kind, name)) and (not name.startswith("_") or name == "__init__") and not isinstance(value, type):
            methods[name] = list(_signatures(name, getattr(kind, name).__doc__ or ""))
    return {"methods": methods, "properties": properties}


def _signatures(name: str, doc: str) -> Iterable[str]:
    """Take the signatures from what pybind11 writes into a docstring, without `self` and without the paths of modules."""
    for found in re.finditer(rf"^(?:\d+\. )?{re.escape(name)}\((.*)\) -> (.+)$", doc, re.MULTILINE):
        parameters, result = (_PATHS.sub("", part) for part in found.groups())
        if parameters == "*args, **kwargs" and "Overloaded" in doc:
            continue
        without_self = re.sub(r"^self: [^,]+(?:, )?", "", parameters)
        yield f"({without_self}) -> {result}"


def write(release: str, found: dict[str, Any]) -> None:
    """Write a record: one class a line, so that a difference can be read."""
    lines = [f"{json.dumps(name)}: {json.dumps(value, separators=(',', ':'))}" for name, value in found["classes"].items()]
    text = f'{{"version": {json.dumps(found["version"])},\n"classes": {{\n' + ",\n".join(lines) + "\n}}\n"
    RECORDS.mkdir(exist_ok=True)
    path_of(release).write_text(text, encoding="utf-8")


def main(arguments: list[str]) -> None:
    """Record the named releases, or all; or, in a process of its own, print what a module offers."""
    if arguments[:1] == ["--dump"]:
        module = __import__(arguments[1])
        sys.stdout.write(json.dumps(describe(module)))
        return
    for release in arguments or RELEASES:
        found = record(release)
        write(release, found)
        sys.stdout.write(f"{path_of(release)}: {found['version']}, {len(found['classes'])} classes\n")


if __name__ == "__main__":
    main(sys.argv[1:])
