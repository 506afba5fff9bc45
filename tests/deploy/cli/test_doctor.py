"""`txl doctor`: finds what is here, mends what is not with one command, and survives whatever packages do when they are imported."""

from __future__ import annotations

import builtins
import json
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from txl_deploy import compat, doctor
from txl_deploy.cli.doctor import describe
from txl_deploy.cli.main import main
from txl_deploy.compat import Machine, target, targets
from txl_deploy.doctor import PACKAGES, Check, Diagnosis, Package, TargetCheck, examine, examine_package, examine_packages, install_command
from txl_deploy.trt.cuda import Gpu
from txl_train.errors import ConfigError

GPU = {"name": "Tesla T4", "driver": "470.57"}
T4 = Gpu(index=0, name="Tesla T4", compute_capability="7.5", memory_bytes=16 << 30, cuda="13.0", driver="580.65.06")
V100 = Gpu(index=0, name="Tesla V100-SXM2-16GB", compute_capability="7.0", memory_bytes=16 << 30, cuda="12.8", driver="570.1")


@pytest.fixture
def package_doing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return `make(source)`: a package whose module has this source, not installed as a distribution."""

    def make(source: str, probe: str = "") -> Package:
        (tmp_path / "txl_trial.py").write_text(source)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        return Package("txl_trial", ("txl-trial",), "trials", probe)

    return make


@pytest.mark.slow
def test_the_whole_diagnosis_of_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    checks = {check["name"]: check for check in document["checks"]}
    assert checks["python"]["found"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}")
    assert checks["torch"]["status"] in ("ok", "warning")
    assert checks["torch"]["facts"]["version"]
    assert {"train and evaluate on the CPU": True, "export to TorchScript": True}.items() <= {
        ability["name"]: ability["works"] for ability in document["abilities"]
    }.items()
    assert document["is_fit"] is True
    assert [found["name"] for found in document["targets"]] == list(targets())


def test_with_nothing_installed_it_says_what_to_install_and_ends_with_3(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "_probe", lambda package: {"error": "absent"})
    monkeypatch.setattr(doctor, "installed_distributions", lambda package: {})
    assert main(["doctor"]) == 3
    shown = capsys.readouterr().out
    assert "missing  torch" in shown
    assert "→ pip install 'torch" in shown
    assert "no       export to ONNX (torch: not installed" in shown
    assert not [line for line in shown.splitlines() if line.startswith("  yes")]
    assert "  kit      t4" in shown


def test_every_missing_package_has_its_command() -> None:
    for package in PACKAGES:
        assert str(install_command(package.module)).startswith("pip install ")
    assert "https://pypi.nvidia.com" in str(install_command("tensorrt"))
    assert install_command("json") is None


def test_a_package_that_works_tells_its_facts(package_doing: Any) -> None:
    check = examine_package(package_doing("__version__ = '1.2'\nprint('chatter')", "found['answer'] = 42"))
    assert check == Check("txl_trial", "ok", "txl_trial 1.2", facts={"version": "1.2", "answer": 42})


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("raise OSError('libcudart.so.13: cannot open shared object file')", "libcudart.so.13"),
        ("import a_package_that_is_not_there", "a_package_that_is_not_there"),
        ("import os; os.abort()", "the process ended with -6"),
        ("import sys; sys.exit(5)", "the process ended with 5"),
        ("def f(:", "SyntaxError"),
        ("raise RuntimeError", "RuntimeError"),
    ],
)
def test_a_package_that_breaks_on_import_is_reported(package_doing: Any, source: str, why: str) -> None:
    check = examine_package(package_doing(source))
    assert check.status == "broken"
    assert why in check.found


def test_a_probe_that_fails_counts_as_broken(package_doing: Any) -> None:
    check = examine_package(package_doing("", "found['x'] = module.absent()"))
    assert check.status == "broken"
    assert "AttributeError" in check.found


def test_a_package_that_hangs_is_given_up(package_doing: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PROBE_TIMEOUT_S", 0.5)
    assert "more than" in examine_package(package_doing("import time; time.sleep(60)")).found


def test_a_folder_in_the_current_directory_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "txl_trial").mkdir()
    monkeypatch.chdir(tmp_path)
    assert examine_package(Package("txl_trial", ("txl-trial",), "trials")).status == "missing"


def test_both_builds_of_onnxruntime_are_one_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "installed_distributions", lambda package: {"onnxruntime": "1.32.0", "onnxruntime-gpu": "1.31.1"})
    check = doctor._judge_onnxruntime(Check("onnxruntime", "ok", "", facts={"providers": ["CPUExecutionProvider"]}), [])
    assert check.status == "warning"
    assert str(check.remedy).startswith("pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'onnxruntime")


@pytest.mark.parametrize(
    ("facts", "status", "words"),
    [
        ({"cuda": None}, "warning", "though there is a GPU"),
        ({"cuda": "13.0", "gpus": []}, "warning", "cannot use the GPU"),
        (
            {"cuda": "13.0", "gpus": ["V100"], "capabilities": ["sm_70"], "architectures": ["sm_75", "sm_90"]},
            "warning",
            "no code for the V100",
        ),
        ({"cuda": "13.0", "gpus": ["T4"], "capabilities": ["sm_75"], "architectures": ["sm_75", "sm_90"]}, "ok", "CUDA 13.0, T4"),
        ({"cuda": "13.0", "gpus": ["A10"], "capabilities": ["sm_86"], "architectures": ["sm_75"]}, "warning", "no code for the A10"),
        ({"cuda": "13.0", "gpus": ["L4"], "capabilities": ["sm_89"], "architectures": ["sm_80", "sm_90"]}, "ok", "L4"),
        ({"cuda": "13.0", "gpus": ["B200"], "capabilities": ["sm_100"], "architectures": ["sm_90", "compute_90"]}, "ok", "B200"),
    ],
)
def test_pytorch_is_held_against_the_gpu(facts: dict[str, Any], status: str, words: str) -> None:
    check = doctor._judge_torch(Check("torch", "ok", "torch 2.13.0", facts=facts), [GPU])
    assert check.status == status
    assert words in check.found
    assert (check.remedy is None) == (status == "ok")


def test_an_old_driver_is_named_with_the_one_that_is_needed() -> None:
    check = doctor._judge_torch(Check("torch", "ok", "torch 2.13.0", facts={"cuda": "13.0", "gpus": []}), [GPU])
    assert check.remedy == "Install NVIDIA driver 580 or newer (this one is 470.57)."


@pytest.mark.parametrize(
    ("facts", "works"),
    [
        ({"providers": ["CPUExecutionProvider"]}, False),
        ({"providers": ["CUDAExecutionProvider", "CPUExecutionProvider"], "cuda_loads": False}, False),
        ({"providers": ["CUDAExecutionProvider", "CPUExecutionProvider"], "cuda_loads": True}, True),
    ],
)
def test_onnx_on_a_gpu_works_only_if_cuda_can_be_loaded(facts: dict[str, Any], works: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "installed_distributions", lambda package: {"onnxruntime-gpu": "1.31.1"})
    packages = {package.module: Check(package.module, "ok", "") for package in PACKAGES}
    packages["onnxruntime"] = doctor._judge_onnxruntime(Check("onnxruntime", "ok", "onnxruntime-gpu 1.31.1", facts=facts), [GPU])
    abilities = {ability.name: ability for ability in doctor._abilities(packages, has_gpu=True)}
    assert abilities["run ONNX on a GPU"].works is works
    assert abilities["run ONNX on the CPU"].works
    assert works or abilities["run ONNX on a GPU"].remedy


def test_the_smallest_graph_is_valid() -> None:
    onnx = pytest.importorskip("onnx")
    model = onnx.load_from_string(bytes.fromhex(doctor.IDENTITY_ONNX))
    onnx.checker.check_model(model)
    assert [node.op_type for node in model.graph.node] == ["Identity"]


def test_little_disk_space_is_a_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "MIN_FREE_GIB", 1e9)
    assert doctor._examine_disk(tmp_path).status == "warning"
    assert doctor._examine_disk(tmp_path / "absent").status == "warning"


def test_a_command_to_copy_stands_on_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_probe", lambda package: {"error": "absent"})
    diagnosis = examine()
    assert isinstance(diagnosis, Diagnosis)
    lines = describe(diagnosis)
    for check in diagnosis.checks:
        assert check.remedy is None or any(line.endswith(f"→ {check.remedy}") for line in lines)


def examined(name: str, machine: Machine, **status: str) -> TargetCheck:
    """Return what the doctor says of a target on `machine`, whose packages work but those whose status is given."""
    packages = {
        module: Check(module, status.get(module, "ok"), f"{module} is {status.get(module, 'ok')}", f"mend {module}")  # type: ignore[arg-type]
        for module in ("tensorrt", "tensorrt_rtx")
    }
    return doctor._examine_target(target(name), machine, packages)


def machine(*gpus: Gpu, **packages: str) -> Machine:
    return Machine(python=(3, 12), gpus=gpus, packages={name.replace("_", "-"): version for name, version in packages.items()})


def test_a_target_that_can_be_built_for_is_named_with_what() -> None:
    found = examined("t4", machine(tensorrt_rtx="1.7.1.116"))
    assert (found.builds, found.builder, found.is_here, found.why_not, found.remedy) == (True, "TensorRT-RTX 1.7.1.116", False, None, None)
    here = examined("t4", machine(T4, tensorrt_cu13="11.4.0.106"))
    assert (here.builds, here.builder, here.is_here) == (True, "TensorRT 11.4.0.106", True)
    assert here.stacks[0].build_problems == here.stacks[0].run_problems == []


def test_a_target_that_needs_one_command_names_it() -> None:
    assert examined("t4", machine()).remedy == "pip install tensorrt-rtx==1.7.1.116"
    alone = examined("v100", machine(V100))
    assert alone.remedy == "pip install --extra-index-url https://pypi.nvidia.com tensorrt-cu12==10.4.0"
    assert (alone.is_here, alone.builds) == (True, False)


def test_a_target_that_no_command_mends_has_a_reason_and_no_command() -> None:
    found = examined("h100", machine(T4, tensorrt_cu13="11.4.0.106"))
    assert found.why_not == "TensorRT 11.4.0.106: it needs a GPU of compute capability 9.0, and the Tesla T4 has 7.5"
    assert found.remedy == "Run it on a machine with such a GPU (target h100)."
    assert examined("h100", machine()).remedy is None  # neither a GPU nor the package


def test_a_broken_package_builds_nothing() -> None:
    found = examined("t4", machine(tensorrt_rtx="1.7.1.116"), tensorrt_rtx="broken")
    assert not found.builds
    assert found.remedy == "mend tensorrt_rtx"


@pytest.mark.parametrize(
    ("found", "works"),
    [
        (machine(T4, tensorrt_rtx="1.7.1.116"), True),
        (machine(V100, tensorrt_cu12="10.4.0"), True),
        (machine(V100, tensorrt_cu12="11.4.0.106"), False),
        (machine(V100, tensorrt_rtx="1.7.1.116"), False),  # which builds for others here, and runs nothing
    ],
)
def test_engines_run_where_a_stack_fits_the_gpu_that_is_here(found: Machine, works: bool) -> None:
    packages = {package.module: Check(package.module, "ok", "") for package in PACKAGES}
    checks = [doctor._examine_target(described, found, packages) for described in targets().values()]
    abilities = {ability.name: ability for ability in doctor._abilities(packages, True, checks)}
    assert abilities["run TensorRT engines"].works is works
    assert works or "tensorrt-cu12==10.4.0" in str(abilities["run TensorRT engines"].why_not)


def test_one_target_can_be_asked_about(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor, "_probe", lambda package: {"version": "1.7.1.116"})
    monkeypatch.setattr(compat, "this_machine", lambda: machine(tensorrt_rtx="1.7.1.116"))
    assert main(["doctor", "--target", "t4"]) == 0
    shown = capsys.readouterr().out
    for words in (
        "  yes      with TensorRT-RTX 1.7.1.116",
        "pip install --extra-index-url https://pypi.nvidia.com tensorrt-cu12==11.4.0.106 torch==2.10.0 onnxruntime-gpu==1.26.0",
        "driver 535 or newer",
        "not built here: it needs a GPU of compute capability 7.5",
        "not run here: it needs a GPU of compute capability 7.5",
        "https://developer.nvidia.com/cuda-gpus",
    ):
        assert words in shown
    assert main(["doctor", "--target", "v100", "--json"]) == 3
    document = json.loads(capsys.readouterr().out)["target"]
    assert document["stacks"][0]["versions"]["driver"] == "535 to 580"
    assert document["builds"] is False
    assert main(["doctor", "--target", "v1000"]) == 2
    assert "Did you mean `v100`?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("gpus", "listed", "status", "words", "remedy"),
    [
        ([], [], "missing", "no NVIDIA GPU", None),
        ([], [GPU], "broken", "nvidia-smi lists Tesla T4, but CUDA finds no GPU", "CUDA_VISIBLE_DEVICES"),
        ([T4], [], "ok", "Tesla T4, compute capability 7.5 (target t4), driver 580.65.06, CUDA 13.0", None),
        ([V100, T4], [], "ok", "(target v100), driver 570.1, CUDA 12.8, and 1 more", None),
        ([replace(T4, driver="550.1")], [], "ok", "driver 550.1", None),  # with the stack of CUDA 12
        (
            [replace(T4, driver="470.57")],
            [],
            "warning",
            "needs NVIDIA driver 580 or newer, and this is 470.57",
            "Install NVIDIA driver 580.",
        ),
        ([replace(V100, driver="590.1")], [], "warning", "needs NVIDIA driver 535 to 580", "Install NVIDIA driver 580."),
        ([replace(T4, name="Tesla P100", compute_capability="6.0")], [], "ok", "no known target", None),
    ],
)
def test_the_gpu_is_named_with_its_target_and_its_driver(
    gpus: list[Gpu], listed: list[dict[str, str]], status: str, words: str, remedy: str | None
) -> None:
    check = doctor._examine_gpu(gpus, listed, *doctor._target_here(gpus))
    assert check.status == status
    assert words in check.found
    assert (check.remedy is None) if remedy is None else (remedy in str(check.remedy))


@pytest.mark.parametrize(
    ("check", "status", "remedy"),
    [
        (Check("tensorrt", "missing", "not installed", "pip install 'tensorrt-cu13'"), "missing", "tensorrt-cu12==10.4.0"),
        (Check("tensorrt", "ok", "tensorrt-cu13 11.4", facts={"version": "11.4.0.106"}), "warning", "tensorrt-cu12==10.4.0"),
        (Check("tensorrt", "ok", "tensorrt-cu12 10.4.0", facts={"version": "10.4.0"}), "ok", None),
        (Check("tensorrt", "broken", "it breaks", "mend it"), "broken", "mend it"),
    ],
)
def test_tensorrt_is_held_against_the_gpu(check: Check, status: str, remedy: str | None) -> None:
    judged = doctor._judge_tensorrt(check, *doctor._target_here([V100]))
    assert judged.status == status
    assert (judged.remedy is None) if remedy is None else (remedy in str(judged.remedy))


def test_a_gpu_gets_the_pytorch_and_the_onnxruntime_of_its_target() -> None:
    facts = {"cuda": "13.0", "gpus": ["V100"], "capabilities": ["sm_70"], "architectures": ["sm_75"]}
    assert doctor._judge_torch(Check("torch", "ok", "torch", facts=facts), [GPU]).remedy == "pip install 'torch==2.10.0'"
    _, stack = doctor._target_here([V100])
    check = doctor._judge_onnxruntime(Check("onnxruntime", "missing", "not installed"), [GPU], stack)
    assert check.remedy == "pip install 'onnxruntime-gpu==1.23.2'"


@pytest.mark.parametrize(
    "error", [ImportError("No module named 'yaml'"), ConfigError("t4.yaml: `note` is unknown.", remedy="Install txl again.")]
)
def test_without_the_table_of_targets_the_rest_is_examined(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    if isinstance(error, ImportError):
        original = builtins.__import__

        def without_compat(name: str, *arguments: Any, **options: Any) -> Any:
            if name == "txl_deploy" and "compat" in (arguments[2] or ()):
                raise error
            return original(name, *arguments, **options)

        monkeypatch.setattr(builtins, "__import__", without_compat)
    else:

        def unreadable() -> Any:
            raise error

        monkeypatch.setattr(compat, "targets", unreadable)
    monkeypatch.setattr(doctor, "_probe", lambda package: {"version": "1"})
    monkeypatch.setattr(doctor, "devices", lambda: [T4])
    diagnosis = examine()
    check = diagnosis.checks[-1]
    assert (check.name, check.status) == ("targets", "broken")
    assert str(error).splitlines()[0] in check.found
    assert diagnosis.targets == []
    assert diagnosis.is_fit
    assert describe(diagnosis)


def test_packages_are_examined_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    together = threading.Barrier(3, timeout=30)

    def examine_with_others(package: Package) -> Check:
        together.wait()
        return Check(package.module, "ok", "")

    monkeypatch.setattr(doctor, "examine_package", examine_with_others)
    packages = [Package(name, (name,), "trials") for name in ("c", "a", "b")]
    assert list(examine_packages(packages)) == ["c", "a", "b"]
