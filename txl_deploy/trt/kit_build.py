"""Builds the engine of this kit on the machine it is for: `sh build.sh`, or `python build.py` where requirements.txt is installed.

Needs Python's standard library and the one package in requirements.txt, not txl. Looks at Python, the GPU, its driver, the package's
version and the checksums of the graph before it loads anything native, and says what does not fit. Writes the folder `engine` beside
itself, which `txl verify`, `txl eval` and the others take as it is.

Exit codes: 0 built · 1 TensorRT does not take the graph · 2 wrong usage · 3 this machine is unfit · 4 the kit was changed.

(In txl this is `txl_deploy/trt/kit_build.py`; `txl_deploy.trt.kit` copies it into kits as `build.py`.)
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import importlib
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

KIT_FILE = "kit.json"
MANIFEST_FILE = "manifest.json"
PLAN_FILE = "model.plan"
CACHE_FILE = "timing.cache"
PARENT_FILE = "parent.json"
UNFINISHED = ".unfinished"

PRODUCTS = ("MATRIX_MULTIPLY", "EINSUM", "CONVOLUTION", "DECONVOLUTION")
ELEMENTS = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16"}
"""The names that a manifest has for what TensorRT calls so; others are the same in lower case."""


class Refusal(Exception):
    """Why nothing was built, and with which exit code to end."""

    def __init__(self, code: int, message: str, remedy: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.remedy = remedy


def main(arguments: Sequence[str] | None = None, folder: Path | None = None) -> int:
    """Run the command line; `folder` is the kit, by default where this file lies. Return the exit code."""
    parser = argparse.ArgumentParser(description="Build the engine of this kit.")
    parser.add_argument("--out", metavar="DIR", help="folder to make  [default: engine, beside this file]")
    parser.add_argument("--check", action="store_true", help="only look at Python, the GPU and its driver, and build nothing")
    options = parser.parse_args(arguments)
    kit_folder = folder or Path(__file__).resolve().parent
    out = kit_folder / "engine" if options.out is None else Path(options.out)
    stop = Stop()
    before = signal.signal(signal.SIGINT, stop)
    try:
        if out.exists() and not options.check:
            raise Refusal(2, f"{out} exists.", "Choose another folder with --out, or remove it.")
        kit = read_kit(kit_folder)
        check_python(kit)
        gpu = check_gpu(kit)
        if options.check:
            say("This machine can build it.")
            return 0
        check_package(kit)
        check_graph(kit, kit_folder)
        build(kit, kit_folder, gpu, out, stop)
    except OSError as error:
        sys.stderr.write(f"{out} cannot be written: {error.strerror or error}.\nChoose another folder with --out.\n")
        return 3
    except Refusal as refusal:
        if stop.asked:
            sys.stderr.write("Interrupted. Nothing was written.\n")
            return 130
        sys.stderr.write(f"{refusal.message}\n{refusal.remedy}\n")
        return refusal.code
    finally:
        signal.signal(signal.SIGINT, before)
    sys.stdout.write(f"{out}\n")
    return 0


def say(line: str) -> None:
    """Tell the progress."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def read_kit(folder: Path) -> SimpleNamespace:
    """Return what the kit is to build."""
    try:
        kit = json.loads((folder / KIT_FILE).read_text(encoding="utf-8"))
        recorded = kit.pop("sha256")
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise Refusal(4, f"{folder / KIT_FILE} cannot be read: {error}.", "Copy the kit again.") from None
    if recorded != checksum(kit):
        raise Refusal(4, f"{folder / KIT_FILE} was changed after it was written.", "Copy the kit again.")
    return SimpleNamespace(**kit)


def check_python(kit: SimpleNamespace) -> None:
    """Refuse a Python that the package does not exist for."""
    oldest, newest = kit.python
    if not numbers(oldest) <= sys.version_info[:2] <= numbers(newest):
        this = ".".join(map(str, sys.version_info[:2]))
        raise Refusal(
            3,
            f"{kit.builder_name} is for Python {oldest} to {newest}, and this is {this}.",
            f"Name another one: PYTHON=python{newest} sh build.sh",
        )


def check_gpu(kit: SimpleNamespace) -> dict[str, str] | None:
    """Return the GPU to build on; None where the builder needs none. Refuse a wrong one, and a wrong driver."""
    if not kit.needs_gpu:
        return None
    wanted = kit.compute_capability
    found = gpus()
    if not found:
        raise Refusal(
            3,
            f"There is no NVIDIA GPU with a working driver, and {kit.builder_name} builds only on the GPU an engine is for.",
            f"Run it on a machine with such a GPU (target {kit.target}, compute capability {wanted}); start a container with --gpus all.",
        )
    first = found[0]
    if first["compute_capability"] != wanted:
        fitting = [i for i, gpu in enumerate(found) if gpu["compute_capability"] == wanted]
        given = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
        names = [given[index] if index < len(given) else str(index) for index in fitting]
        raise Refusal(
            3,
            f"The engine is for compute capability {wanted}, and the {first['name']} has {first['compute_capability']}.",
            f"Run it with CUDA_VISIBLE_DEVICES={names[0]}." if names else f"Run it on a machine with such a GPU (target {kit.target}).",
        )
    oldest, newest = kit.driver
    series = numbers(first["driver"])[0] if first["driver"] else None
    if series is not None and (series < oldest or (newest is not None and series > newest)):
        allowed = f"{oldest} or newer" if newest is None else f"{oldest} to {newest}"
        raise Refusal(
            3,
            f"{kit.builder_name} needs NVIDIA driver {allowed}, and this is {first['driver']}.",
            f"Install NVIDIA driver {newest or oldest}.",
        )
    return first


def check_package(kit: SimpleNamespace) -> None:
    """Refuse another version than the engine is to be run with. Reads the installed package's metadata, and imports nothing."""
    try:
        version = str(metadata.version(kit.package))
    except metadata.PackageNotFoundError:
        version = "absent"
    if release(version) != kit.builder_version:
        raise Refusal(
            3,
            f"The engine is for {kit.builder_pin}, and that package is {version} here.",
            f"Install it: {sys.executable} -m pip install -r requirements.txt",
        )


def check_graph(kit: SimpleNamespace, folder: Path) -> None:
    """Refuse a graph of which a byte was changed."""
    parent = folder / "onnx" / MANIFEST_FILE
    try:
        if sha256(parent) != kit.manifest["source"]["parent"]["manifest_sha256"]:
            raise Refusal(4, f"{parent} was changed after the kit was written.", "Copy the kit again.")
        for name, record in json.loads(parent.read_text(encoding="utf-8"))["files"].items():
            if sha256(parent.parent / name) != record["sha256"]:
                raise Refusal(4, f"{parent.parent / name} was changed after the kit was written.", "Copy the kit again.")
    except OSError as error:
        raise Refusal(4, f"The kit is not complete: {error}.", "Copy the kit again.") from None


class Stop:
    """Notes Ctrl-C. As an exception it would be lost in TensorRT, which calls Python from within."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self, *_: object) -> None:
        if not self.asked:
            say("Stopping at the next step.")
        self.asked = True


def build(kit: SimpleNamespace, folder: Path, gpu: dict[str, str] | None, out: Path, stop: Stop) -> None:
    """Build the engine and write its folder, all of it or nothing."""
    say(f"Building with {kit.builder_name}; this takes a few minutes.")
    start = time.monotonic()
    plan, cache, precisions = build_plan(kit, folder / "onnx" / kit.graph, stop)
    if stop.asked:
        raise Refusal(130, "Interrupted.", "")
    out.parent.mkdir(parents=True, exist_ok=True)
    for left in out.parent.iterdir():
        if left.name.startswith(f".{out.name}.") and left.name.endswith(UNFINISHED):
            shutil.rmtree(str(left), ignore_errors=True)  # what a killed build has left: one kit is built once at a time
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=UNFINISHED, dir=str(out.parent)))
    try:
        (partial / PLAN_FILE).write_bytes(plan)
        if cache is not None:
            (partial / CACHE_FILE).write_bytes(cache)
        shutil.copyfile(str(folder / "onnx" / MANIFEST_FILE), str(partial / PARENT_FILE))
        for name in kit.copied:
            shutil.copyfile(str(folder / "onnx" / name), str(partial / name))
        manifest = kit.manifest
        manifest["precisions"].update(precisions)
        if gpu is not None:
            manifest["engine"].update(gpu=gpu["name"], driver=gpu["driver"])
        names = sorted(path.name for path in partial.iterdir())
        manifest["files"] = {name: {"sha256": sha256(partial / name), "bytes": (partial / name).stat().st_size} for name in names}
        manifest["sha256"] = checksum(manifest)
        with (partial / MANIFEST_FILE).open("w", encoding="utf-8", newline="\n") as file:
            file.write(json.dumps(manifest, indent=2, allow_nan=False) + "\n")
        partial.chmod(0o755)
        os.replace(str(partial), str(out))
    finally:
        shutil.rmtree(str(partial), ignore_errors=True)
    say("Built in %.0f s." % (time.monotonic() - start))


def build_plan(kit: SimpleNamespace, graph: Path, stop: Stop) -> tuple[bytes, bytes | None, dict[str, dict[str, int]]]:
    """Return the serialized engine, its timings where the package keeps some, and the precisions of the network."""
    trt = load(kit)
    errors: list[str] = []
    logger = logger_of(trt, errors)
    try:
        builder = trt.Builder(logger)
    except TypeError:  # a null pointer, which the bindings cannot return
        message = f"{kit.builder_name} does not start on this machine: {told(errors)}."
        raise Refusal(3, message, "Run nvidia-smi to see whether the GPU works.") from None
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(graph)):
        reasons = [parser.get_error(i).desc() for i in range(parser.num_errors)]
        raise Refusal(1, f"{kit.builder_name} does not take the graph: {'; '.join(reasons)}.", "Please report this.")
    config = builder.create_builder_config()
    monitor = monitor_of(trt, stop)
    config.progress_monitor = monitor
    config.clear_flag(trt.BuilderFlag.TF32)  # fp32 is what a graph in fp32 claims
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # so that `txl` can read the precisions back
    if kit.optimization_level is not None:
        config.builder_optimization_level = kit.optimization_level
    rtx = kit.builder == "tensorrt_rtx"
    compatibility = kit.manifest["engine"]["hardware_compatibility"]
    if compatibility != "none":
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.__members__[compatibility.upper()]
    if rtx:
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)  # or a step cannot be captured as a CUDA graph
        config.num_compute_capabilities = 1
        member = trt.ComputeCapability.__members__["SM" + kit.compute_capability.replace(".", "")]
        if not config.set_compute_capability(member, 0):
            raise Refusal(3, f"{kit.builder_name} refuses to build for {kit.compute_capability}.", "Please report this.")
    profile = builder.create_optimization_profile()
    for shapes in kit.manifest["engine"]["profiles"]:
        profile.set_shape(shapes["name"], tuple(shapes["min"]), tuple(shapes["opt"]), tuple(shapes["max"]))
    if config.add_optimization_profile(profile) < 0:
        raise Refusal(1, f"{kit.builder_name} refuses the ranges of shapes: {told(errors)}.", "Please report this.")
    cache = None if rtx else config.create_timing_cache(b"")
    if cache is not None:
        config.set_timing_cache(cache, False)
    precisions = precisions_of(network)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise Refusal(1, f"{kit.builder_name} could not build the engine: {told(errors)}.", "Please report this.")
    return bytes(plan), None if cache is None else bytes(cache.serialize()), precisions


def monitor_of(trt: Any, stop: Stop) -> Any:
    """Return a progress monitor that ends the build at its next step once `stop` was asked for."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # the package has no types
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            pass

        def step_complete(self, phase_name: str, step: int) -> bool:
            return not stop.asked

        def phase_finish(self, phase_name: str) -> None:
            pass

    return Monitor()


def logger_of(trt: Any, errors: list[str]) -> Any:
    """Return a logger for the package, which adds errors to `errors` and shows warnings."""
    severity = trt.ILogger.Severity

    class Logger(trt.ILogger):  # type: ignore[misc]  # the package has no types
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, level: Any, text: str) -> None:
            if level in (severity.INTERNAL_ERROR, severity.ERROR):
                errors.append(text.strip())
            elif level == severity.WARNING and "Int64 binding" not in text:  # said of each input of int64, which is as it should be
                say(text.strip())

    return Logger()


def told(errors: Sequence[str]) -> str:
    """Return what the package said was wrong."""
    return "; ".join(errors) or "it gives no reason"


def load(kit: SimpleNamespace) -> Any:
    """Import the package and make sure that it is the version its metadata says."""
    try:
        module = importlib.import_module(kit.builder)
    except (ImportError, OSError) as error:
        remedy = f"{sys.executable} -m pip install --force-reinstall -r requirements.txt"
        raise Refusal(3, f"{kit.builder_pin} does not load: {error}.", f"Install it again: {remedy}") from None
    if release(module.__version__) != kit.builder_version:
        raise Refusal(
            3,
            f"The engine is for {kit.builder_pin}, and Python loads {module.__version__} from {module.__file__}.",
            "Run it in a virtual environment of its own: sh build.sh",
        )
    return module


def precisions_of(network: Any) -> dict[str, dict[str, int]]:
    """Count what the network's layers yield by type: constants by their numbers, others by outputs, and matrix products again."""
    found: dict[str, dict[str, int]] = {"network_weights": {}, "network_products": {}, "network_layers": {}}
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        kind = layer.type.name
        for k in range(layer.num_outputs):
            output = layer.get_output(k)
            element = ELEMENTS.get(output.dtype.name, output.dtype.name.lower())
            size = 1
            for length in output.shape:
                size *= length
            counts = [("network_weights", size)] if kind == "CONSTANT" else [("network_layers", 1)]
            if kind in PRODUCTS:
                counts.append(("network_products", 1))
            for name, count in counts:
                found[name][element] = found[name].get(element, 0) + count
    return {name: dict(sorted(types.items())) for name, types in found.items() if types}


def gpus() -> list[dict[str, str]]:
    """Return name, compute capability and driver of each GPU that this process may use, asked of the driver's library."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return []
    count = ctypes.c_int()
    if library.cuInit(0) or library.cuDeviceGetCount(ctypes.byref(count)):
        return []
    driver = driver_version()
    found = []
    for i in range(count.value):
        device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        name = ctypes.create_string_buffer(256)
        failed = (
            library.cuDeviceGet(ctypes.byref(device), i)
            or library.cuDeviceGetAttribute(ctypes.byref(major), 75, device)  # cuda.h: compute capability, major
            or library.cuDeviceGetAttribute(ctypes.byref(minor), 76, device)  # and minor
            or library.cuDeviceGetName(name, len(name), device)
        )
        if not failed:
            capability = f"{major.value}.{minor.value}"
            found.append({"name": name.value.decode(errors="replace"), "compute_capability": capability, "driver": driver})
    return found


def driver_version() -> str:
    """Return the version of NVIDIA's driver, such as 580.65.06; an empty text where it does not say."""
    text = ctypes.create_string_buffer(96)
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
        if library.nvmlInit_v2() == 0:
            library.nvmlSystemGetDriverVersion(text, len(text))
            library.nvmlShutdown()
    except (OSError, AttributeError):
        pass
    if text.value:
        return text.value.decode(errors="replace")
    try:
        module = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    found = re.search(r"^NVRM version:.*?\s(\d+\.\d+[\d.]*)\s", module, re.M)
    return found.group(1) if found else ""


def numbers(version: str) -> tuple[int, ...]:
    """Return a dotted version as numbers that compare."""
    return tuple(int(part) for part in version.split(".") if part.isdigit())


def release(version: str) -> str:
    """Return a version without the mark of a repaired package."""
    return re.sub(r"\.post\d+$", "", version)


def sha256(path: Path) -> str:
    """Return the checksum of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def checksum(document: dict[str, Any]) -> str:
    """Return the checksum of a document's content, as txl's manifests have it."""
    canonical = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
