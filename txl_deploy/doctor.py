"""What works on this machine, for which GPUs it can build engines, and the one command that mends each thing that does not.

A package is looked up in the installed packages' metadata first and then imported in a process of its own, so neither a missing, a broken
nor a crashing one stops the diagnosis. Which commands of `txl` need what is known here; what the machine is, in `bench.environment`;
which versions go together, in `compat`, without which the rest of the diagnosis still works.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from txl_deploy.bench.environment import describe_environment
from txl_deploy.trt.cuda import Gpu, devices
from txl_train.errors import TxlError

if TYPE_CHECKING:
    from txl_deploy.compat import Machine, Stack, Target

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
class StackCheck:
    """Versions that go together for a target, and what keeps this machine from building or running its engines with them."""

    name: str
    builder: str
    """TensorRT or TensorRT-RTX with its version."""
    versions: dict[str, str]
    """What goes with it: torch, onnxruntime-gpu, python, driver, CUDA."""
    install: str
    """The command that installs all of it."""
    build_problems: list[str]
    """Each a cause and a remedy; empty if engines can be built here."""
    run_problems: list[str]
    """The same for running them."""


@dataclass(frozen=True)
class TargetCheck:
    """Whether this machine can build an engine for a GPU."""

    name: str
    compute_capability: str
    gpus: list[str]
    is_here: bool
    """This machine's GPU is such a one."""
    builds: bool
    """An engine can be built here; a kit can be written always."""
    stack: str
    """The stack to build with, here or with a kit."""
    builder: str
    """Its TensorRT or TensorRT-RTX, with the version."""
    why_not: str | None = None
    """Why not here."""
    remedy: str | None = None
    """The command after which it can; None where no command helps."""
    stacks: list[StackCheck] = field(default_factory=list)
    """Best first."""
    notes: list[str] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    """Each a fact and where it was read."""


@dataclass(frozen=True)
class Diagnosis:
    """All that the doctor found."""

    environment: dict[str, Any]
    checks: list[Check]
    abilities: list[Ability]
    targets: list[TargetCheck] = field(default_factory=list)
    """Empty where the table of targets cannot be read."""

    @property
    def is_fit(self) -> bool:
        """True if what every command needs is there and can be imported."""
        return all(check.status in ("ok", "warning") for check in self.checks if check.name in (*REQUIRED, "python"))


def examine(folder: Path | None = None) -> Diagnosis:
    """Look at this machine; `folder` is where results are to be written (the current one). Takes a few seconds, raises nothing."""
    environment = describe_environment()
    gpus = devices()
    packages = examine_packages(PACKAGES)
    target, stack = _target_here(gpus)
    listed = environment["gpus"] or [{"name": gpu.name, "driver": gpu.driver or "unknown"} for gpu in gpus]
    packages["torch"] = _judge_torch(packages["torch"], listed)
    packages["onnxruntime"] = _judge_onnxruntime(packages["onnxruntime"], listed, stack)
    packages["tensorrt"] = _judge_tensorrt(packages["tensorrt"], target, stack)
    targets, unreadable = _examine_targets(packages, gpus)
    gpu = _examine_gpu(gpus, environment["gpus"], target, stack)
    checks = [_examine_python(), gpu, *packages.values(), _examine_disk(folder or Path.cwd())]
    if unreadable is not None:
        checks.append(unreadable)
    return Diagnosis(environment, checks, _abilities(packages, bool(listed), targets), targets)


def examine_target(name: str) -> TargetCheck:
    """Look at what building for the target `name` needs, and nothing else. Takes a second or two.

    Raises `UsageError` for an unknown name.
    """
    from txl_deploy import compat

    wanted = compat.target(name)
    builders = {stack.builder for stack in wanted.stacks}
    packages = examine_packages(package for package in PACKAGES if package.module in builders)
    return _examine_target(wanted, compat.this_machine(), packages)


def examine_packages(packages: Iterable[Package]) -> dict[str, Check]:
    """Examine packages side by side and return what was found by their import names, in the same order."""
    chosen = list(packages)
    with ThreadPoolExecutor(max_workers=4) as pool:
        return {package.module: check for package, check in zip(chosen, pool.map(examine_package, chosen))}


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
                _torch_for(capability),
                check.facts,
            )
    return Check(check.name, "ok", f"{found}, {', '.join(seen)}", facts=check.facts)


def _torch_for(capability: str) -> str:
    """Return the command that installs a PyTorch with code for a GPU such as sm_70: the one its target names, else the newest."""
    number = int(capability.rpartition("_")[2])
    for target in _all_targets():
        if target.compute_capability == f"{number // 10}.{number % 10}":
            return f"pip install 'torch=={target.stacks[0].torch}'"
    return f"pip install --upgrade '{requirement('torch')}'"


def _runs_on(capability: str, architectures: list[str]) -> bool:
    """True if code for one of `architectures` runs on `capability`: the same major version and no newer minor, or PTX of an older one."""
    number = int(capability.rpartition("_")[2])
    for architecture in architectures:
        kind, _, digits = architecture.partition("_")
        code = int(re.sub(r"\D", "", digits) or 0)
        if code <= number and (kind == "compute" or code // 10 == number // 10):
            return True
    return False


def _judge_onnxruntime(check: Check, gpus: list[dict[str, str]], stack: Stack | None = None) -> Check:
    """Add what only shows from outside: two distributions in one folder, or a GPU without the provider for it."""
    package = next(package for package in PACKAGES if package.module == "onnxruntime")
    wanted = requirement("onnxruntime-gpu" if gpus else "onnxruntime")
    if gpus and stack is not None:
        wanted = f"onnxruntime-gpu=={stack.onnxruntime}"
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


def _judge_tensorrt(check: Check, target: Target | None, stack: Stack | None) -> Check:
    """Add whether the installed TensorRT is one that goes with this machine's GPU."""
    if target is None or stack is None or check.status == "broken":
        return check
    if check.status == "missing":
        return replace(check, remedy=stack.pip_install)
    if str(check.facts.get("version")) in {other.builder_version for other in target.stacks if other.builder == "tensorrt"}:
        return check
    found = f"{check.found}, which is not the one for this GPU: {stack.builder_name}"
    return replace(check, status="warning", found=found, remedy=stack.pip_install)


def _examine_gpu(gpus: list[Gpu], listed: list[dict[str, str]], target: Target | None, stack: Stack | None) -> Check:
    """Say which GPU this is, for engines too, and whether its driver is one that goes with the rest."""
    if not gpus:
        if listed:
            found = f"nvidia-smi lists {listed[0]['name']}, but CUDA finds no GPU"
            remedy = "Unset CUDA_VISIBLE_DEVICES; in a container, start that with --gpus all -e NVIDIA_DRIVER_CAPABILITIES=compute,utility."
            return Check("gpu", "broken", found, remedy)
        return Check("gpu", "missing", "no NVIDIA GPU with a working driver")
    first = gpus[0]
    facts = {"gpus": [vars(gpu) for gpu in gpus], "target": None if target is None else target.name}
    kind = "no known target" if target is None else f"target {target.name}"
    found = f"{first.name}, compute capability {first.compute_capability} ({kind}), driver {first.driver}, CUDA {first.cuda}"
    if len(gpus) > 1:
        found += f", and {len(gpus) - 1} more"
    if stack is None:
        return Check("gpu", "ok", found, facts=facts)
    from txl_deploy import compat

    alone = compat.Machine(python=sys.version_info[:2], gpus=tuple(gpus), packages={})
    wrong = next((problem for problem in compat.problems(stack, alone, "run") if problem.kind == "driver"), None)
    if wrong is None:
        return Check("gpu", "ok", found, facts=facts)
    return Check("gpu", "warning", f"{found}; for {stack.builder_name}, {wrong.cause}", wrong.remedy, facts)


def _target_here(gpus: list[Gpu]) -> tuple[Target | None, Stack | None]:
    """Return the target that the first GPU is, and the stack of full TensorRT that goes with its driver."""
    if not gpus or not _all_targets():
        return None, None
    from txl_deploy import compat

    target = compat.target_of(gpus[0])
    if target is None:
        return None, None
    alone = compat.Machine(python=sys.version_info[:2], gpus=tuple(gpus), packages={})
    full = [stack for stack in target.stacks if stack.builder == "tensorrt"]
    fitting = (stack for stack in full if all(problem.kind != "driver" for problem in compat.problems(stack, alone, "run")))
    return target, next(fitting, full[0] if full else None)


def _all_targets() -> list[Target]:
    """Return every target; none where their table cannot be read, which `_examine_targets` reports."""
    try:
        from txl_deploy import compat

        return list(compat.targets().values())
    except (ImportError, TxlError):
        return []


def _examine_targets(packages: Mapping[str, Check], gpus: list[Gpu]) -> tuple[list[TargetCheck], Check | None]:
    """Examine every target; where their table cannot be read, say why instead."""
    try:
        from txl_deploy import compat

        machine = replace(compat.this_machine(), gpus=tuple(gpus))
        return [_examine_target(target, machine, packages) for target in compat.targets().values()], None
    except ImportError as error:
        return [], Check("targets", "broken", f"the table of targets cannot be read: {error}", install_command("yaml"))
    except TxlError as error:
        return [], Check("targets", "broken", error.message, error.remedy)


def _examine_target(target: Target, machine: Machine, packages: Mapping[str, Check]) -> TargetCheck:
    from txl_deploy import compat

    unusable = [name for name in ("tensorrt", "tensorrt_rtx") if name in packages and packages[name].status in ("missing", "broken")]
    without = {stack.package for stack in target.stacks if stack.builder in unusable}
    usable = replace(machine, packages={name: version for name, version in machine.packages.items() if name not in without})
    plan = compat.plan(target, usable)
    remedy = None
    if not plan.here:
        remedy = plan.hint or (plan.problems[0].remedy if len(plan.problems) == 1 else None)
        broken = packages.get("tensorrt_rtx") if plan.hint is not None else packages.get(plan.stack.builder)
        if remedy is not None and broken is not None and broken.status == "broken":
            remedy = broken.remedy
    stacks = [
        StackCheck(
            name=stack.name,
            builder=stack.builder_name,
            versions={
                "torch": stack.torch,
                "onnxruntime-gpu": f"{stack.onnxruntime} (Python {stack.onnxruntime_python} or newer)",
                "python": " to ".join(stack.python),
                "driver": f"{stack.driver[0]} or newer" if stack.driver[1] is None else f"{stack.driver[0]} to {stack.driver[1]}",
                "cuda": f"{stack.cuda}.x",
            },
            install=" ".join(("pip install", *stack.pip_options, *stack.pins)),
            build_problems=[str(problem) for problem in compat.problems(stack, usable)],
            run_problems=[str(problem) for problem in compat.problems(stack, usable, "run")],
        )
        for stack in target.stacks
    ]
    here = compat.target_of(machine.gpus[0]) if machine.gpus else None
    facts = [*target.sources, *(source for stack in target.stacks for source in stack.sources)]
    return TargetCheck(
        name=target.name,
        compute_capability=target.compute_capability,
        gpus=list(target.gpus),
        is_here=here is not None and here.name == target.name,
        builds=plan.here,
        stack=plan.stack.name,
        builder=plan.stack.builder_name,
        why_not=plan.why_not,
        remedy=remedy,
        stacks=stacks,
        notes=list(target.notes),
        sources=list(dict.fromkeys(f"{source.fact}: {source.source}" for source in facts)),
    )


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


def _abilities(packages: Mapping[str, Check], has_gpu: bool, targets: Iterable[TargetCheck] = ()) -> list[Ability]:
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
    }
    engines = list(targets)
    return [*(_ability(name, checks) for name, checks in needs.items()), _running(engines, gpu, tensorrt), _building(engines, tensorrt)]


def _running(targets: list[TargetCheck], gpu: Check, tensorrt: Check) -> Ability:
    name = "run TensorRT engines"
    here = next((target for target in targets if target.is_here), None)
    if here is None:
        return _ability(name, (gpu, tensorrt))
    if any(not stack.run_problems for stack in here.stacks):
        return Ability(name, True)
    return Ability(name, False, f"{here.stacks[0].builder}: {here.stacks[0].run_problems[0]}")


def _building(targets: list[TargetCheck], tensorrt: Check) -> Ability:
    name = "build TensorRT engines"
    able = [target.name for target in targets if target.builds]
    if able:
        return Ability(f"{name} for {', '.join(able)}", True)
    if tensorrt.status != "ok":
        return Ability(name, False, f"{tensorrt.name}: {tensorrt.found}", tensorrt.remedy)
    return Ability(name, False, "for no target; kits can be written (`txl export --kit`)")


def _ability(name: str, needs: tuple[Check, ...]) -> Ability:
    for check in needs:
        if check.status != "ok":
            return Ability(name, False, f"{check.name}: {check.found}", check.remedy)
    return Ability(name, True)
