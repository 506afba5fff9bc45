"""What works on this machine, and the one command that mends each thing that does not.

A package is looked up in the installed packages' metadata first and then imported in a process of its own, so neither a missing, a broken
nor a crashing one stops the diagnosis. Which commands of `txl` need what is known here; what the machine is, in `bench.environment`.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from txl_deploy.bench.environment import describe_environment

Status = Literal["ok", "missing", "broken", "warning"]

MIN_FREE_GIB = 2.0
"""Free disk space below which a warning is given: an export of the base model and its checkpoints need about this much."""

PROBE_TIMEOUT_S = 120.0
"""A first import of PyTorch from a cold network disk takes up to a minute."""

MIN_DRIVER = {12: 525, 13: 580}
"""Oldest NVIDIA driver of each major version of CUDA (NVIDIA, CUDA toolkit release notes, table of minor version compatibility)."""

IDENTITY_ONNX = (
    "080812003a370a100a017812017922084964656e746974791201675a0f0a0178120a0a08080112040a020801620f0a0179120a0a08080112040a02080142040a001011"
)
"""The smallest graph there is, one Identity node: ONNX Runtime lists a provider that it cannot load, and only a session shows it."""

NVIDIA_INDEX = "--extra-index-url https://pypi.nvidia.com"


@dataclass(frozen=True)
class Package:
    """A package that some command needs."""

    module: str
    distributions: tuple[str, ...]
    """Names under which it can be installed; the first is the one to install."""
    purpose: str
    probe: str = ""
    """Statements that fill the dictionary `found` after `module` was imported."""
    pip_options: str = ""


PACKAGES = (
    Package(
        "torch",
        ("torch",),
        "training, evaluation, export",
        "found['cuda'] = module.version.cuda\n"
        "found['architectures'] = module.cuda.get_arch_list()\n"
        "devices = range(module.cuda.device_count() if module.cuda.is_available() else 0)\n"
        "found['gpus'] = [module.cuda.get_device_name(i) for i in devices]\n"
        "found['capabilities'] = ['sm_%d%d' % module.cuda.get_device_capability(i) for i in devices]",
    ),
    Package("numpy", ("numpy",), "all of it"),
    Package("yaml", ("PyYAML",), "configuration files"),
    Package("rich", ("rich",), "tables and progress bars"),
    Package("sacremoses", ("sacremoses",), "raw text split as the corpora were"),
    Package("tiktoken", ("tiktoken",), "GPT-2's subwords"),
    Package("onnx", ("onnx",), "export to ONNX", "found['newest_opset'] = module.defs.onnx_opset_version()"),
    Package("onnxscript", ("onnxscript",), "export to ONNX"),
    Package(
        "onnxruntime",
        ("onnxruntime", "onnxruntime-gpu"),
        "running ONNX",
        "found['providers'] = module.get_available_providers()\n"
        "if 'CUDAExecutionProvider' in found['providers']:\n"
        "    module.set_default_logger_severity(4)\n"
        "    getattr(module, 'preload_dlls', lambda: None)()\n"
        f"    session = module.InferenceSession(bytes.fromhex('{IDENTITY_ONNX}'), providers=['CUDAExecutionProvider'])\n"
        "    found['cuda_loads'] = 'CUDAExecutionProvider' in session.get_providers()",
    ),
    Package("jinja2", ("Jinja2",), "pages of reports"),
    Package("matplotlib", ("matplotlib",), "plots in reports"),
    Package("tensorboard", ("tensorboard",), "training metrics for TensorBoard"),
    Package("tensorrt", ("tensorrt-cu13", "tensorrt-cu12", "tensorrt"), "TensorRT engines", pip_options=NVIDIA_INDEX),
    Package("tensorrt_rtx", ("tensorrt-rtx",), "TensorRT-RTX engines"),
    Package("polygraphy", ("polygraphy",), "looking into TensorRT engines"),
)
REQUIRED = ("torch", "numpy", "yaml", "rich", "sacremoses", "tiktoken")


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    status: Status
    found: str
    """What is there, in a few words."""
    remedy: str | None = None
    """The command or step that mends it; None where nothing is to be mended."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What was read, for machines."""


@dataclass(frozen=True)
class Ability:
    """Something that one comes to this toolkit for, and whether it works here."""

    name: str
    works: bool
    why_not: str | None = None
    remedy: str | None = None


@dataclass(frozen=True)
class Diagnosis:
    """All that the doctor found."""

    environment: dict[str, Any]
    checks: list[Check]
    abilities: list[Ability]

    @property
    def is_fit(self) -> bool:
        """True if what every command needs is there and can be imported."""
        return all(check.status in ("ok", "warning") for check in self.checks if check.name in (*REQUIRED, "python"))


def examine(folder: Path | None = None) -> Diagnosis:
    """Look at this machine; `folder` is where results are to be written (the current one). Takes a few seconds, raises nothing."""
    environment = describe_environment()
    packages = {package.module: examine_package(package) for package in PACKAGES}
    packages["torch"] = _judge_torch(packages["torch"], environment["gpus"])
    packages["onnxruntime"] = _judge_onnxruntime(packages["onnxruntime"], environment["gpus"])
    checks = [_examine_python(), *packages.values(), _examine_disk(folder or Path.cwd())]
    return Diagnosis(environment, checks, _abilities(packages, bool(environment["gpus"])))


def examine_package(package: Package) -> Check:
    """Say whether a package is installed and can be imported, with the command that mends it."""
    installed = installed_distributions(package)
    name = package.distributions[0] if not installed else next(iter(installed))
    version = "" if not installed else f"{name} {installed[name]}"
    answer = _probe(package)
    remedy = install_command(package.module)
    if answer.get("error") == "absent":
        return Check(package.module, "missing", f"not installed (for {package.purpose})", remedy)
    if "error" in answer:
        broken = None if remedy is None else remedy.replace("pip install", "pip install --force-reinstall", 1)
        return Check(package.module, "broken", f"{version or 'installed'}, but importing it fails: {answer['error']}", broken)
    facts = {"version": installed.get(name, answer.get("version")), **{key: value for key, value in answer.items() if key != "version"}}
    return Check(package.module, "ok", version or f"{package.module} {answer.get('version') or 'of unknown version'}", facts=facts)


def installed_distributions(package: Package) -> dict[str, str]:
    """Return the version of each of a package's distributions that is installed, by name."""
    found = {}
    for name in package.distributions:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        found[name] = str(version)
    return found


def install_command(module: str) -> str | None:
    """Return the command that installs the package with this import name in a version that txl was made for; None for a foreign package."""
    package = next((package for package in PACKAGES if package.module == module), None)
    if package is None:
        return None
    options = f"{package.pip_options} " if package.pip_options else ""
    return f"pip install {options}'{requirement(package.distributions[0])}'"


@functools.cache
def requirement(distribution: str) -> str:
    """Return a package with the range of versions that txl's own metadata asks for; the bare name where txl is not installed."""
    try:
        lines = importlib.metadata.requires("txl") or []
    except importlib.metadata.PackageNotFoundError:
        lines = []
    for line in lines:
        specifier = line.partition(";")[0].strip()
        if _normal(re.split(r"[\s<>=!~\[(]", specifier, maxsplit=1)[0]) == _normal(distribution):
            return specifier
    return distribution


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _probe(package: Package) -> dict[str, Any]:
    """Import a package in a process of its own and return what its `probe` found, or `{"error": "absent" or why}`."""
    body = "".join(f"    {line}\n" for line in package.probe.splitlines())
    program = (
        "import importlib, importlib.util, json, sys\n"
        "sys.path[:] = [entry for entry in sys.path if entry]\n"  # a folder in the current directory is no installed package
        f"name = {package.module!r}\n"
        "found = {}\n"
        "try:\n"
        "    if importlib.util.find_spec(name) is None:\n"
        "        raise ModuleNotFoundError(name=name)\n"
        "    module = importlib.import_module(name)\n"
        "    found['version'] = getattr(module, '__version__', None)\n"
        f"{body}"
        "except ModuleNotFoundError as error:\n"
        "    found = {'error': 'absent' if error.name == name else str(error)}\n"
        "except Exception as error:\n"
        "    found = {'error': f'{type(error).__name__}: {error}'}\n"
        "print('\\n' + json.dumps(found, default=str))\n"
    )
    try:
        done = subprocess.run(
            [sys.executable, "-c", program],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=PROBE_TIMEOUT_S,
            check=False,
        )
        answer = json.loads(done.stdout.strip().rpartition("\n")[2])
    except subprocess.TimeoutExpired:
        return {"error": f"it took more than {PROBE_TIMEOUT_S:.0f} s"}
    except OSError as error:
        return {"error": f"Python could not be started: {error}"}
    except ValueError:
        return {"error": f"the process ended with {done.returncode}{': ' if done.stderr else ''}{done.stderr.strip()[-200:]}"}
    if not isinstance(answer, dict):
        return {"error": "it printed something odd"}
    if "error" in answer:
        answer["error"] = str(answer["error"]).strip().splitlines()[0][:300] if str(answer["error"]).strip() else "no reason given"
    return answer


def _judge_torch(check: Check, gpus: list[dict[str, str]]) -> Check:
    """Add to what PyTorch said of itself whether it fits the GPUs that the driver reports."""
    if check.status != "ok":
        return check
    cuda, seen = check.facts.get("cuda"), check.facts.get("gpus") or []
    found = f"{check.found}, {f'CUDA {cuda}' if cuda else 'without CUDA'}"
    if not gpus and not seen:
        return Check(check.name, "ok", found, facts=check.facts)
    if not cuda:
        remedy = "pip install --force-reinstall --index-url https://download.pytorch.org/whl/cu130 torch"
        return Check(check.name, "warning", f"{found}, though there is a GPU", remedy, check.facts)
    if not seen:
        needed = MIN_DRIVER.get(int(str(cuda).partition(".")[0]))
        driver = gpus[0].get("driver", "unknown")
        remedy = f"Install NVIDIA driver {needed or MIN_DRIVER[13]} or newer (this one is {driver})."
        return Check(check.name, "warning", f"{found}, which cannot use the GPU", remedy, check.facts)
    known = check.facts.get("architectures") or []
    for name, capability in zip(seen, check.facts.get("capabilities") or []):
        if known and not _runs_on(capability, known):
            found = f"{found}, which has no code for the {name} ({capability})"
            return Check(
                check.name,
                "warning",
                found,
                "pip install 'torch==2.10.0'" if capability == "sm_70" else f"pip install --upgrade '{requirement('torch')}'",
                check.facts,
            )
    return Check(check.name, "ok", f"{found}, {', '.join(seen)}", facts=check.facts)


def _runs_on(capability: str, architectures: list[str]) -> bool:
    """True if code for one of `architectures` runs on `capability`: the same major version and no newer minor, or PTX of an older one."""
    number = int(capability.rpartition("_")[2])
    for architecture in architectures:
        kind, _, digits = architecture.partition("_")
        code = int(re.sub(r"\D", "", digits) or 0)
        if code <= number and (kind == "compute" or code // 10 == number // 10):
            return True
    return False


def _judge_onnxruntime(check: Check, gpus: list[dict[str, str]]) -> Check:
    """Add what only shows from outside: two distributions in one folder, or a GPU without the provider for it."""
    package = next(package for package in PACKAGES if package.module == "onnxruntime")
    wanted = requirement("onnxruntime-gpu" if gpus else "onnxruntime")
    if len(installed_distributions(package)) > 1:
        remedy = f"pip uninstall -y onnxruntime onnxruntime-gpu && pip install '{wanted}'"
        return Check(
            check.name, "warning", "onnxruntime and onnxruntime-gpu are both installed and overwrite each other", remedy, check.facts
        )
    if check.status == "missing" and gpus:
        return Check(check.name, "missing", check.found, f"pip install '{wanted}'")
    if check.status != "ok":
        return check
    providers = [name.removesuffix("ExecutionProvider") for name in check.facts.get("providers") or []]
    found = f"{check.found} with {', '.join(providers) or 'no provider'}"
    if gpus and "CUDA" not in providers:
        remedy = f"pip uninstall -y onnxruntime && pip install '{wanted}'"
        return Check(check.name, "warning", f"{found}, though there is a GPU", remedy, check.facts)
    if gpus and not check.facts.get("cuda_loads"):
        remedy = "pip install 'onnxruntime-gpu[cuda,cudnn]'"
        return Check(check.name, "warning", f"{found}, but CUDA or cuDNN cannot be loaded", remedy, check.facts)
    return Check(check.name, "ok", found, facts=check.facts)


def _examine_python() -> Check:
    found = f"{sys.version_info.major}.{sys.version_info.minor}.{sys.version_info.micro} ({sys.executable})"
    if (3, 10) <= sys.version_info[:2] <= (3, 13):
        return Check("python", "ok", found)
    return Check(
        "python", "warning", f"{found}: txl is tested with 3.10 to 3.13", "Make a virtual environment with `python3.12 -m venv .venv`."
    )


def _examine_disk(folder: Path) -> Check:
    try:
        free = shutil.disk_usage(folder).free / 2**30
    except OSError as error:
        return Check("disk", "warning", f"{folder} cannot be looked at: {error.strerror}")
    facts = {"free_gib": round(free, 1)}
    if free < MIN_FREE_GIB:
        return Check("disk", "warning", f"{free:.1f} GiB free in {folder}", "Free some space, or work in a folder on another disk.", facts)
    return Check("disk", "ok", f"{free:.1f} GiB free", facts=facts)


def _abilities(packages: Mapping[str, Check], has_gpu: bool) -> list[Ability]:
    """Say for each use what it lacks: the first thing missing, with the command that mends it."""
    gpu = Check("GPU", "ok" if has_gpu else "missing", "no NVIDIA GPU with a working driver" if not has_gpu else "")
    torch_cuda = packages["torch"] if packages["torch"].status != "ok" else gpu
    ort_cuda = packages["onnxruntime"] if packages["onnxruntime"].status != "ok" else gpu
    onnxruntime = packages["onnxruntime"]
    can_run_onnx = onnxruntime if not onnxruntime.facts.get("providers") else Check("onnxruntime", "ok", "")
    torch_cpu = packages["torch"] if packages["torch"].status not in ("ok", "warning") else Check("torch", "ok", "")
    tensorrt = min(packages["tensorrt"], packages["tensorrt_rtx"], key=lambda check: check.status != "ok")
    needs = {
        "train and evaluate on the CPU": (torch_cpu,),
        "train and evaluate on a GPU": (gpu, torch_cuda),
        "export to TorchScript": (torch_cpu,),
        "export to ONNX": (torch_cpu, packages["onnx"], packages["onnxscript"]),
        "run ONNX on the CPU": (can_run_onnx,),
        "run ONNX on a GPU": (gpu, ort_cuda),
        "evaluate raw text": (packages["sacremoses"],),
        "pages and plots of reports": (packages["jinja2"], packages["matplotlib"]),
        "build TensorRT engines from the ONNX, by hand": (tensorrt,),
    }
    return [_ability(name, checks) for name, checks in needs.items()]


def _ability(name: str, needs: tuple[Check, ...]) -> Ability:
    for check in needs:
        if check.status != "ok":
            return Ability(name, False, f"{check.name}: {check.found}", check.remedy)
    return Ability(name, True)
