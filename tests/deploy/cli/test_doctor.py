"""`txl doctor`: finds what is here, mends what is not with one command, and survives whatever packages do when they are imported."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from txl_deploy import doctor
from txl_deploy.cli.doctor import describe
from txl_deploy.cli.main import main
from txl_deploy.doctor import PACKAGES, Check, Diagnosis, Package, examine, examine_package, install_command

GPU = {"name": "Tesla T4", "driver": "470.57"}


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
