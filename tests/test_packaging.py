"""What gets installed: the wheel's content, the versions, the extras, and the files that set all of it up."""

from __future__ import annotations

import configparser
import importlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import txl_train
from txl_deploy.doctor import PACKAGES

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def settings() -> configparser.ConfigParser:
    """The content of setup.cfg."""
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def requirements(text: str) -> dict[str, Requirement]:
    lines = [line.partition("#")[0].strip() for line in text.splitlines()]
    return {canonicalize_name(requirement.name): requirement for requirement in map(Requirement, filter(None, lines))}


def all_requirements(settings: configparser.ConfigParser) -> dict[str, Requirement]:
    found = requirements(settings["options"]["install_requires"])
    for extra in settings["options.extras_require"].values():
        found |= requirements(extra)
    del found["txl"]  # an extra that includes others
    return found


def constraints() -> list[Requirement]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]


@pytest.mark.slow
def test_the_wheel_holds_both_packages_with_their_data_and_nothing_else(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for name in ("txl_train", "txl_deploy", "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(source)]
    subprocess.run(command, check=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == f"txl-{txl_train.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(f"txl-{txl_train.__version__}.dist-info/METADATA").decode()
    expected = {
        path.relative_to(ROOT).as_posix()
        for package in ("txl_train", "txl_deploy")
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    expected |= {f"txl_deploy/targets/{path.name}" for path in (ROOT / "engines" / "targets").glob("*.yaml")}  # through a link
    expected |= {f"txl_deploy/published/{path.name}" for path in (ROOT / "benchmarks" / "published").glob("*.json")}
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert "txl_train/presets/tiny.yaml" in names
    assert "txl_train/py.typed" in names
    assert "txl_deploy/py.typed" in names
    assert f"txl-{txl_train.__version__}.dist-info/licenses/LICENSE" in names
    assert "License-Expression: Apache-2.0" in metadata
    assert "Requires-Python: <3.14,>=3.10" in metadata


def test_the_version_stands_in_one_place(settings: configparser.ConfigParser) -> None:
    assert settings["metadata"]["version"] == "attr: txl_train.__version__"
    assert re.fullmatch(r"\d+\.\d+\.\d+", txl_train.__version__)


def test_the_command_exists(settings: configparser.ConfigParser) -> None:
    name, target = settings["options.entry_points"]["console_scripts"].strip().split(" = ")
    module, _, attribute = target.partition(":")
    assert name == "txl"
    assert callable(getattr(importlib.import_module(module), attribute))


def test_every_dependency_is_bounded_on_both_sides(settings: configparser.ConfigParser) -> None:
    for name, requirement in all_requirements(settings).items():
        operators = {specifier.operator for specifier in requirement.specifier}
        assert {">=", "<"} <= operators, f"{name} has an open range"


def test_the_tested_versions_are_within_the_ranges(settings: configparser.ConfigParser) -> None:
    ranges = all_requirements(settings)
    for pin in constraints():
        name = canonicalize_name(pin.name)
        (specifier,) = pin.specifier
        assert specifier.operator == "=="
        assert name not in ranges or ranges[name].specifier.contains(specifier.version), f"{pin} is outside of {ranges[name]}"


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_every_dependency_has_one_tested_version_for_each_python(python: str, settings: configparser.ConfigParser) -> None:
    environment = {"python_version": python, "python_full_version": f"{python}.0"}
    pinned = [canonicalize_name(pin.name) for pin in constraints() if pin.marker is None or pin.marker.evaluate(environment)]
    assert len(pinned) == len(set(pinned))
    optional = {"onnxruntime-gpu", "tensorrt-cu13", "tensorrt-rtx", "polygraphy"}  # for machines that the tests do not run on
    of_pytorch = {"triton"}  # which brings the version that it wants on a machine with a GPU
    assert set(all_requirements(settings)) - optional - of_pytorch <= set(pinned)


def test_the_two_builds_of_onnxruntime_exclude_each_other(settings: configparser.ConfigParser) -> None:
    extras = settings["options.extras_require"]
    assert set(requirements(extras["onnx"])) ^ set(requirements(extras["onnx-gpu"])) == {"onnxruntime", "onnxruntime-gpu"}
    assert "onnx-gpu" not in extras["dev"]


def test_the_doctor_knows_every_package_that_a_user_may_install(settings: configparser.ConfigParser) -> None:
    extras = settings["options.extras_require"]
    users = requirements(settings["options"]["install_requires"])
    for name in ("onnx", "onnx-gpu", "trt", "trt-rtx", "report"):
        users |= requirements(extras[name])
    known = {canonicalize_name(distribution) for package in PACKAGES for distribution in package.distributions}
    assert set(users) - known == {"click"}  # without it, the doctor cannot be called


def test_the_licence_is_the_one_that_is_named(settings: configparser.ConfigParser) -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert settings["metadata"]["license_expression"] == "Apache-2.0"
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_the_makefile_explains_each_of_its_targets() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (phony,) = re.findall(r"^\.PHONY: (.+)$", makefile, flags=re.MULTILINE)
    explained = re.findall(r"^([a-z-]+):.*## \S+", makefile, flags=re.MULTILINE)
    assert sorted(explained) == sorted(phony.split())
    assert {"help", "demo", "test", "lint", "type", "bench", "clean"} <= set(explained)


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_a_python_that_is_too_old_is_refused_with_what_to_do(tmp_path: Path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("setup.cfg", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).touch()
    old = tmp_path / "python2"
    old.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "import sys; sys.version_info = (2, 7); exec(sys.argv[1])" "$2"\n')
    old.chmod(0o755)
    for python, words in ((str(old), "needs Python 3.10 to 3.13"), ("python-absent", "There is no python-absent")):
        done = subprocess.run(["make", "install", f"PYTHON={python}"], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode != 0
        assert words in done.stderr
        assert "make PYTHON=python3.12" in done.stderr
        assert not (tmp_path / ".venv").exists()


def test_continuous_integration_runs_what_a_developer_runs() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert script.read_text(encoding="utf-8").rstrip().endswith("exec make test")
