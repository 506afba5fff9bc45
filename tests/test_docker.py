"""The Dockerfiles: linted, pinned as the table of targets says, and not run as root. Nobody has built them here."""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

from txl_deploy.compat import Stack, target

ROOT = Path(__file__).resolve().parents[1]
STACKS = {"modern": target("t4").stacks[0], "v100": target("v100").stacks[0]}
"""The stack that each image installs."""


def text_of(name: str) -> str:
    return (ROOT / "docker" / f"{name}.Dockerfile").read_text(encoding="utf-8")


def instructions(name: str) -> list[tuple[str, str]]:
    """Return the instructions of a Dockerfile, continued lines joined: ("FROM", "image"), …"""
    text = "\n".join(line for line in text_of(name).splitlines() if not line.startswith("#"))
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in lines if line.strip())]


def test_there_is_an_image_for_each_stack_and_no_other() -> None:
    assert {path.name for path in (ROOT / "docker").glob("*.*")} == {f"{name}.Dockerfile" for name in STACKS}


@pytest.mark.parametrize("name", STACKS)
def test_the_linter_finds_nothing(name: str) -> None:
    linter = shutil.which("hadolint", path=sysconfig.get_path("scripts")) or shutil.which("hadolint")
    if linter is None:
        pytest.skip("needs hadolint")
    done = subprocess.run([linter, "--no-color", str(ROOT / "docker" / f"{name}.Dockerfile")], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize(("name", "stack"), STACKS.items())
def test_an_image_installs_its_stack_in_those_versions_alone(name: str, stack: Stack) -> None:
    installs = [rest for word, rest in instructions(name) if word == "RUN" and "pip install" in rest]
    assert set(re.findall(r"[\w.-]+==[\w.]+", installs[0])) == set(stack.pins)
    assert f"--extra-index-url {stack.index}" in installs[0]
    assert f"stack {stack.name} in" in text_of(name)
    for pin in re.findall(r"torch==\d[\d.]*", text_of(name)):
        assert pin == f"torch=={stack.torch}"
    constraints = (ROOT / "constraints.txt").read_text()
    assert set(re.findall(r"polygraphy==[\d.]+", installs[-1])) <= set(constraints.splitlines())
    assert "constraints.txt" in installs[-1]
    assert "[onnx-gpu," in installs[-1]  # [onnx] would install the other onnxruntime over this one


@pytest.mark.parametrize(("name", "stack"), STACKS.items())
def test_an_image_rests_on_the_cuda_and_the_python_of_its_stack(name: str, stack: Stack) -> None:
    ((_, base),) = [pair for pair in instructions(name) if pair[0] == "FROM"]
    version = re.fullmatch(r"nvidia/cuda:(\d+)\.\d+\.\d+-base-ubuntu24\.04", base)
    assert version is not None, "the newest of something is no version"
    assert int(version.group(1)) == stack.cuda
    pythons = {(3, int(minor)) for minor in re.findall(r"python3\.(\d+)", text_of(name))}
    (python,) = pythons
    oldest, newest = (tuple(map(int, end.split("."))) for end in stack.python)
    assert oldest <= python <= newest
    driver = str(stack.driver[0]) if stack.driver[1] is None else f"{stack.driver[0]} to {stack.driver[1]}"
    assert driver in text_of(name).partition("FROM")[0]


@pytest.mark.parametrize("name", STACKS)
def test_an_image_does_not_run_as_root_and_says_that_nobody_built_it(name: str) -> None:
    users = [rest for word, rest in instructions(name) if word == "USER"]
    assert users
    assert users[-1] not in ("root", "0")
    assert "Not built by us" in text_of(name)
    assert f"make build{'' if name == 'modern' else f' GPU={name}'}\n" in text_of(name)


def test_the_context_leaves_out_what_is_large_or_private() -> None:
    left_out = (ROOT / ".dockerignore").read_text().splitlines()
    assert {".git", ".venv", "**/*.pt", "**/*.onnx", "**/*.plan", "engines/*", "!engines/targets"} <= set(left_out)


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("name", STACKS)
def test_make_builds_and_opens_the_image(name: str) -> None:
    command = ["make", "--dry-run", "--no-print-directory", "build", "interactive", f"GPU={name}"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.replace("\\\n", "")
    assert f"docker build --file docker/{name}.Dockerfile --tag txl:{name} ." in said
    assert "docker run --gpus all" in said
    assert f"txl:{name} bash" in said
    assert '--user "$(id -u):$(id -g)"' in said
