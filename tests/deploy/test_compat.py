"""The table of targets: its facts have sources, its schema is strict, and what a machine lacks is named with what mends it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from txl_deploy import compat
from txl_deploy.compat import Machine, Stack, plan, problems, target, target_of, targets
from txl_deploy.trt.cuda import Gpu
from txl_train.errors import ConfigError, EnvironmentUnfitError, UsageError

ROOT = Path(__file__).resolve().parents[2]


def gpu(name: str, capability: str, driver: str | None = "580.65.06", index: int = 0) -> Gpu:
    return Gpu(index=index, name=name, compute_capability=capability, memory_bytes=16 << 30, cuda="13.0", driver=driver)


T4, V100 = gpu("Tesla T4", "7.5"), gpu("Tesla V100-SXM2-16GB", "7.0")


def machine(*gpus: Gpu, python: tuple[int, int] = (3, 12), **packages: str) -> Machine:
    return Machine(python=python, gpus=gpus, packages={name.replace("_", "-"): version for name, version in packages.items()})


def stack_of(name: str, stack: str) -> Stack:
    return next(found for found in target(name).stacks if found.name == stack)


def test_every_gpu_that_is_advertised_is_a_target() -> None:
    assert {"v100", "t4", "a100", "h100", "h200", "l4", "a10", "rtx-30", "rtx-40", "rtx-50"} <= set(targets())


@pytest.mark.parametrize("found", targets().values(), ids=lambda found: found.name)
def test_a_target_is_consistent(found: compat.Target) -> None:
    assert len({stack.name for stack in found.stacks}) == len(found.stacks)
    for stack in found.stacks:
        assert (stack.target, stack.compute_capability) == (found.name, found.compute_capability)
        assert "fp16" in stack.dtypes
        assert stack.builds_without_gpu == (stack.builder == "tensorrt_rtx"), "a stack that cannot build for the target has no place there"
        assert stack.driver[0] >= {12: 525, 13: 580}[stack.cuda]
        assert str(stack.cuda) in stack.package or stack.builder == "tensorrt_rtx"
        assert all("==" in pin for pin in stack.pins)


def test_the_stack_of_a_v100_is_frozen() -> None:
    (stack,) = target("v100").stacks
    assert stack.pins == ("tensorrt-cu12==10.4.0", "torch==2.10.0", "onnxruntime-gpu==1.23.2")
    assert (stack.python, stack.driver) == (("3.10", "3.12"), (535, 580))
    assert stack.pip_install == "pip install --extra-index-url https://pypi.nvidia.com tensorrt-cu12==10.4.0"


def test_tensorrt_rtx_is_listed_for_no_gpu_that_it_cannot_build_for() -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    members = {name[2:-1] + "." + name[-1] for name in trt.ComputeCapability.__members__ if name.startswith("SM")}
    assert set(stack_of("t4", "tensorrt-rtx").without_gpu) == members
    assert stack_of("t4", "tensorrt-rtx").builder_version == trt.__version__


def test_the_tested_versions_are_those_of_the_stacks() -> None:
    constraints = (ROOT / "constraints.txt").read_text().splitlines()
    assert f"torch=={stack_of('t4', 'tensorrt-cu13').torch}" in constraints
    assert stack_of("t4", "tensorrt-rtx").builder_pin in constraints


@pytest.mark.parametrize(
    ("name", "capability", "expected"),
    [
        ("Tesla T4", "7.5", "t4"),
        ("NVIDIA GeForce RTX 2080 Ti", "7.5", "t4"),
        ("NVIDIA TITAN RTX", "7.5", "t4"),
        ("Tesla V100-PCIE-32GB", "7.0", "v100"),
        ("NVIDIA A100-SXM4-80GB", "8.0", "a100"),
        ("NVIDIA A10G", "8.6", "a10"),
        ("NVIDIA RTX A2000", "8.6", "rtx-30"),
        ("NVIDIA GeForce RTX 3090", "8.6", "rtx-30"),
        ("NVIDIA L40S", "8.9", "l4"),
        ("NVIDIA RTX 6000 Ada Generation", "8.9", "rtx-40"),
        ("NVIDIA H100 80GB HBM3", "9.0", "h100"),
        ("NVIDIA H200", "9.0", "h200"),
        ("NVIDIA GH200 480GB", "9.0", "h200"),
        ("NVIDIA B200", "10.0", "b200"),
        ("NVIDIA GeForce RTX 5090", "12.0", "rtx-50"),
        ("Tesla P100", "6.0", None),
    ],
)
def test_a_gpu_is_known_by_its_name_and_compute_capability(name: str, capability: str, expected: str | None) -> None:
    found = target_of(gpu(name, capability))
    assert (None if found is None else found.name) == expected


def test_a_misspelt_target_gets_the_nearest() -> None:
    assert target("RTX_40").name == "rtx-40"
    with pytest.raises(UsageError, match="Did you mean `v100`") as caught:
        target("v1000")
    assert "a100, b200" in str(caught.value.remedy)


@pytest.mark.parametrize(
    ("name", "stack", "here", "kinds", "words"),
    [
        ("t4", "tensorrt-cu13", machine(T4, tensorrt_cu13="11.4.0.106"), [], ""),
        ("t4", "tensorrt-cu13", machine(T4, tensorrt_cu13="11.4.0.106.post1"), [], ""),
        ("t4", "tensorrt-rtx", machine(tensorrt_rtx="1.7.1.116"), [], ""),
        (
            "t4",
            "tensorrt-rtx",
            machine(tensorrt_rtx="1.6.1.120"),
            ["package"],
            "it needs tensorrt-rtx==1.7.1.116, and 1.6.1.120 is installed",
        ),
        ("t4", "tensorrt-cu13", machine(tensorrt_cu13="11.4.0.106"), ["gpu"], "compute capability 7.5, and there is none here"),
        ("t4", "tensorrt-cu13", machine(V100, tensorrt_cu13="11.4.0.106"), ["gpu"], "the Tesla V100-SXM2-16GB has 7.0"),
        (
            "t4",
            "tensorrt-cu13",
            machine(V100, gpu("Tesla T4", "7.5", index=1), tensorrt_cu13="11.4.0.106"),
            ["gpu"],
            "export CUDA_VISIBLE_DEVICES=1",
        ),
        (
            "t4",
            "tensorrt-cu13",
            machine(gpu("Tesla T4", "7.5", "570.1"), tensorrt_cu13="11.4.0.106"),
            ["driver"],
            "driver 580 or newer, and this is 570.1",
        ),
        ("t4", "tensorrt-cu12", machine(gpu("Tesla T4", "7.5", "570.1"), tensorrt_cu12="11.4.0.106"), [], ""),
        ("t4", "tensorrt-cu13", machine(gpu("Tesla T4", "7.5", None), tensorrt_cu13="11.4.0.106"), [], ""),
        (
            "v100",
            "tensorrt-10.4-volta",
            machine(gpu("V100", "7.0", "595.2"), tensorrt_cu12="10.4.0"),
            ["driver"],
            "Install NVIDIA driver 580.",
        ),
        (
            "v100",
            "tensorrt-10.4-volta",
            machine(V100, python=(3, 13), tensorrt_cu12="10.4.0"),
            ["python"],
            "Python 3.10 to 3.12, and this is 3.13",
        ),
        (
            "v100",
            "tensorrt-10.4-volta",
            machine(V100, tensorrt_cu12="11.4.0.106"),
            ["package"],
            "pip install --extra-index-url https://pypi.nvidia.com tensorrt-cu12==10.4.0",
        ),
        (
            "v100",
            "tensorrt-10.4-volta",
            machine(V100, tensorrt_cu13="11.4.0.106"),
            ["package"],
            "pip uninstall -y tensorrt-cu13 tensorrt-cu13-bindings tensorrt-cu13-libs && pip install --extra-index-url",
        ),
        (
            "v100",
            "tensorrt-10.4-volta",
            machine(V100, tensorrt_cu13="11.4.0.106", tensorrt_cu12="10.4.0"),
            ["package"],
            "overwrite each other",
        ),
        ("v100", "tensorrt-10.4-volta", machine(python=(3, 13)), ["python", "gpu", "package"], "tensorrt-cu12==10.4.0 is not installed"),
    ],
)
def test_what_a_machine_lacks_to_build_is_named_with_its_remedy(name: str, stack: str, here: Machine, kinds: list[str], words: str) -> None:
    found = problems(stack_of(name, stack), here)
    assert [problem.kind for problem in found] == kinds
    assert all(problem.cause and problem.remedy for problem in found)
    assert words in " ".join(map(str, found))


def test_running_needs_the_gpu_even_where_building_does_not() -> None:
    stack = stack_of("t4", "tensorrt-rtx")
    assert [problem.kind for problem in problems(stack, machine(tensorrt_rtx="1.7.1.116"), "run")] == ["gpu"]
    assert problems(stack, machine(T4, tensorrt_rtx="1.7.1.116"), "run") == []
    old = machine(T4, python=(3, 10), tensorrt_rtx="1.7.1.116")
    assert [problem.kind for problem in problems(stack, old, "run")] == ["python"]  # for want of onnxruntime-gpu
    assert problems(stack, old) == []


def test_fp32_for_a_t4_is_refused_by_tensorrt_rtx_alone() -> None:
    (problem,) = problems(stack_of("t4", "tensorrt-rtx"), machine(tensorrt_rtx="1.7.1.116"), dtype="fp32")
    assert str(problem) == "TensorRT-RTX refuses matrix products of fp32 for compute capability 7.5: Export with `--dtype fp16`."
    assert problems(stack_of("t4", "tensorrt-cu13"), machine(T4, tensorrt_cu13="11.4.0.106"), dtype="fp32") == []
    assert problems(stack_of("l4", "tensorrt-rtx"), machine(tensorrt_rtx="1.7.1.116"), dtype="fp32") == []


@pytest.mark.parametrize(
    ("name", "here", "dtype", "stack", "builds"),
    [
        ("t4", machine(T4, tensorrt_cu13="11.4.0.106", tensorrt_rtx="1.7.1.116"), "fp16", "tensorrt-cu13", True),
        ("t4", machine(tensorrt_cu13="11.4.0.106", tensorrt_rtx="1.7.1.116"), "fp16", "tensorrt-rtx", True),
        ("t4", machine(tensorrt_rtx="1.7.1.116"), "fp32", "tensorrt-cu13", False),
        ("t4", machine(), "fp16", "tensorrt-cu13", False),
        ("t4", machine(gpu("Tesla T4", "7.5", "550.1")), "fp16", "tensorrt-cu12", False),
        ("v100", machine(tensorrt_rtx="1.7.1.116"), "fp16", "tensorrt-10.4-volta", False),
        ("h100", machine(gpu("NVIDIA H100", "9.0"), tensorrt_cu13="11.4.0.106"), None, "tensorrt-cu13", True),
    ],
)
def test_the_first_stack_that_can_build_here_is_chosen(name: str, here: Machine, dtype: str | None, stack: str, builds: bool) -> None:
    chosen = plan(target(name), here, dtype=dtype)
    assert (chosen.stack.name, chosen.here) == (stack, builds)
    assert (chosen.why_not is None) == builds


def test_a_package_that_would_do_it_here_is_named() -> None:
    chosen = plan(target("t4"), machine())
    assert chosen.hint == "pip install tensorrt-rtx==1.7.1.116"
    assert str(chosen.why_not).startswith("TensorRT 11.4.0.106: it needs a GPU of compute capability 7.5")
    assert plan(target("v100"), machine()).hint is None


def test_a_kit_that_is_asked_for_is_of_the_best_stack() -> None:
    chosen = plan(target("t4"), machine(tensorrt_rtx="1.7.1.116"), kit=True)
    assert (chosen.stack.name, chosen.here) == ("tensorrt-cu13", False)
    able = plan(target("t4"), machine(T4, tensorrt_cu13="11.4.0.106"), kit=True)
    assert (able.stack.name, able.here, able.why_not) == ("tensorrt-cu13", False, None)


def test_what_no_stack_can_do_is_refused() -> None:
    for name in ("v100", "h100"):
        with pytest.raises(EnvironmentUnfitError, match=f"TensorRT-RTX builds no engine for {name}") as caught:
            plan(target(name), machine(tensorrt_rtx="1.7.1.116"), rtx_only=True)
        assert caught.value.exit_code == 3
    with pytest.raises(EnvironmentUnfitError, match="no engine of fp32 for t4"):
        plan(target("t4"), machine(tensorrt_rtx="1.7.1.116"), rtx_only=True, dtype="fp32")


@pytest.mark.parametrize(
    ("file", "old", "new", "words"),
    [
        ("t4.yaml", "notes:", "note:", "t4.yaml: `note` is unknown. Did you mean `notes`?"),
        ("t4.yaml", "tensorrt-cu13,", "tensorrt-cu14,", "`tensorrt-cu14` is no stack of stacks.yaml. Did you mean `tensorrt-cu1"),
        ("t4.yaml", '"7.5"', "7.5", "`compute_capability` must be text, so in quotes where it looks like a number"),
        ("t4.yaml", "gpus: [T4, RTX 20, Quadro RTX]", "", "`gpus` is missing"),
        ("t4.yaml", "https://developer", "somebody said http://developer", "must look like https://"),
        ("stacks.yaml", "driver: [580, null]", "driver: 580", "`driver` must be the first and the last of a range"),
        ("stacks.yaml", "builder: tensorrt\n", "builder: tensorflow\n", "must be one of tensorrt, tensorrt_rtx"),
        ("stacks.yaml", "torch: 2.13.0", "torch: '>=2.13'", "`torch` must look like 1.2.3"),
        ("stacks.yaml", "  sources:\n", "  sources: []\n  old:\n", "unknown"),
        ("t4.yaml", "gpus: [", "gpus: [[", "cannot be read"),
    ],
)
def test_a_file_with_a_mistake_is_refused_by_its_name(tmp_path: Path, file: str, old: str, new: str, words: str) -> None:
    folder = tmp_path / "targets"
    shutil.copytree(ROOT / "engines" / "targets", folder)
    text = (folder / file).read_text()
    assert old in text
    (folder / file).write_text(text.replace(old, new, 1))
    with pytest.raises(ConfigError) as caught:
        compat._targets(folder)
    assert words in str(caught.value)


def test_no_files_are_an_incomplete_installation(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no targets"):
        compat._targets(tmp_path)


def test_the_targets_are_found_in_the_package_and_where_links_were_lost_in_the_checkout(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert compat._folder().resolve() == ROOT / "engines" / "targets"
    monkeypatch.setattr(compat, "__file__", str(tmp_path / "txl_deploy" / "compat.py"))
    assert compat._folder() == tmp_path / "engines" / "targets"


def test_the_answer_is_there_at_once_and_without_pytorch() -> None:
    program = (
        "import sys, time; start = time.perf_counter()\n"
        "from txl_deploy import compat\n"
        "machine = compat.this_machine()\n"
        "for target in compat.targets().values(): compat.plan(target, machine)\n"
        "assert not {'torch', 'tensorrt', 'tensorrt_rtx', 'onnxruntime', 'numpy'} & set(sys.modules)\n"
        "print(time.perf_counter() - start)"
    )
    done: Any = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 2, "it takes 0.15 s on a quiet machine"
