"""Engines that do not belong on this machine are refused before anything of TensorRT is loaded, which they could crash."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.conftest import Exports
from txl_deploy.cli.main import main
from txl_deploy.manifest import PARENT_FILE, EngineFacts, Manifest, read_manifest, write_manifest
from txl_deploy.runtimes import tensorrt as runtime
from txl_deploy.trt import cuda, refusals
from txl_deploy.trt.cuda import Gpu
from txl_deploy.trt.refusals import check_fits, same_version
from txl_train.errors import EnvironmentUnfitError, UsageError

Capture = pytest.CaptureFixture[str]


def gpu(name: str = "Tesla T4", compute_capability: str = "7.5", index: int = 0) -> Gpu:
    return Gpu(index=index, name=name, compute_capability=compute_capability, memory_bytes=1 << 34, cuda="13.0", driver="580.65.06")


@pytest.fixture
def engine(t4_engine: Path, tmp_path: Path) -> Path:
    """A copy of the engine for a T4."""
    return Path(shutil.copytree(t4_engine, tmp_path / "engine"))


@pytest.fixture(autouse=True)
def _nothing_native(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail a test in which the package is asked for."""
    monkeypatch.setattr(runtime, "find", lambda package: pytest.fail(f"{package} was loaded"))


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let this machine have other GPUs."""
    return lambda *gpus: monkeypatch.setattr(cuda, "devices", lambda: list(gpus))


def change_facts(engine: Path, **changes: Any) -> Path:
    manifest = read_manifest(engine)
    assert manifest.engine is not None
    facts = dataclasses.replace(manifest.engine, **changes)
    name = {"tensorrt": "trt", "tensorrt_rtx": "trt-rtx"}[facts.builder]
    write_manifest(engine, dataclasses.replace(manifest, engine=facts, format=name), manifest.files)  # type: ignore[arg-type]
    return engine


def evaluate(engine: Path, capture: Capture) -> tuple[int, str]:
    code = main(["eval", "--artifact", str(engine)])
    return code, capture.readouterr().err


def test_without_a_gpu_it_says_where_the_engine_runs(engine: Path, on: Any, capsys: Capture) -> None:
    on()
    code, told = evaluate(engine, capsys)
    assert code == 3
    assert "is an engine for compute capability 7.5 (t4), and this machine has no NVIDIA GPU" in told
    assert "the ONNX model it was built from runs anywhere" in told


def test_on_another_gpu_it_names_both_and_the_command_for_this_one(engine: Path, on: Any, capsys: Capture) -> None:
    on(gpu("NVIDIA H100 80GB HBM3", "9.0"))
    code, told = evaluate(engine, capsys)
    assert code == 3
    assert "for compute capability 7.5 (t4), but the GPU here is NVIDIA H100 80GB HBM3 of compute capability 9.0" in told
    assert "`txl export --format trt-rtx --artifact ONNX_DIR --target h100`" in told


def test_where_the_second_gpu_fits_it_says_how_to_choose_it(engine: Path, on: Any, capsys: Capture) -> None:
    on(gpu("NVIDIA H100 80GB HBM3", "9.0"), gpu(index=1))
    code, told = evaluate(engine, capsys)
    assert code == 3
    assert "Use the Tesla T4: `export CUDA_VISIBLE_DEVICES=1`" in told


def test_another_version_of_the_package_names_the_one_to_install(engine: Path, on: Any, capsys: Capture) -> None:
    on(gpu())
    here = refusals.installed_version("tensorrt_rtx")
    code, told = evaluate(change_facts(engine, builder_version="1.6.0.10"), capsys)
    assert code == 3
    assert f"was built by TensorRT-RTX 1.6.0.10 and runs with no other version, but {here} is installed" in told
    assert "`pip install tensorrt-rtx==1.6.0.10`" in told


@pytest.mark.parametrize(
    ("facts", "there", "command"),
    [
        ({"builder": "tensorrt", "builder_version": "11.4.0.106"}, gpu(), "https://pypi.nvidia.com tensorrt-cu13==11.4.0.106"),
        (
            {"builder": "tensorrt", "builder_version": "10.4.0", "target": "v100", "compute_capability": "7.0"},
            gpu("Tesla V100-SXM2-16GB", "7.0"),
            "https://pypi.nvidia.com tensorrt-cu12==10.4.0",
        ),
        ({"builder": "tensorrt", "builder_version": "10.16.1.11"}, gpu(), "https://pypi.nvidia.com tensorrt-cu12==10.16.1.11"),
        ({}, gpu(), "`pip install tensorrt-rtx==1.7.1.116`"),
    ],
    ids=["TensorRT 11", "a V100", "a version of no target", "TensorRT-RTX"],
)
def test_an_absent_package_names_the_command_that_installs_it(
    engine: Path, on: Any, capsys: Capture, monkeypatch: pytest.MonkeyPatch, facts: dict[str, Any], there: Gpu, command: str
) -> None:
    on(there)
    monkeypatch.setattr(refusals, "DISTRIBUTIONS", {"tensorrt": ("no-such-thing",), "tensorrt_rtx": ("no-such-thing",)})
    code, told = evaluate(change_facts(engine, **facts), capsys)
    assert code == 3
    assert "which is not installed" in told
    assert command in told


def test_a_pytorch_without_cuda_is_named_where_the_gpu_fits(
    engine: Path, on: Any, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    on(gpu())
    code, told = evaluate(engine, capsys)
    assert code == 3
    assert "needs a PyTorch with CUDA" in told


def test_the_cpu_is_no_place_for_an_engine(t4_engine: Path, on: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    on(gpu())
    with pytest.raises(UsageError, match=r"(?s)a GPU alone.*--device cpu"):
        check_fits(read_manifest(t4_engine), device="cpu", origin="engine")


def test_what_fits_is_let_through(t4_engine: Path, on: Any) -> None:
    on(gpu("NVIDIA H100", "9.0"), gpu(index=1))
    assert check_fits(read_manifest(t4_engine), device="cuda:1", origin="engine").name == "Tesla T4"


@pytest.mark.parametrize("position", [0, 0.5, 1])
def test_a_changed_byte_of_the_engine_is_found_first(engine: Path, on: Any, capsys: Capture, position: float) -> None:
    on(gpu())
    content = bytearray((engine / "model.plan").read_bytes())
    content[round(position * (len(content) - 1))] ^= 1
    (engine / "model.plan").write_bytes(content)
    code, told = evaluate(engine, capsys)
    assert code == 4
    assert "model.plan was changed" in told
    assert main(["verify", str(engine)]) == 4


def test_an_engine_without_a_manifest_is_not_ours(engine: Path, on: Any, capsys: Capture) -> None:
    on(gpu())
    (engine / "manifest.json").unlink()
    code, told = evaluate(engine, capsys)
    assert code == 4
    assert "has no manifest.json" in told


def test_a_file_is_no_artifact(engine: Path, on: Any, capsys: Capture) -> None:
    on(gpu())
    code, told = evaluate(engine / "model.plan", capsys)
    assert code == 4
    assert "model.plan" in told


def test_the_manifest_of_another_graph_is_found(engine: Path, exports: Exports, on: Any, capsys: Capture) -> None:
    on(gpu())
    shutil.copyfile(exports.onnx / "manifest.json", engine / "parent.json")
    manifest = read_manifest(engine)
    write_manifest(engine, manifest, manifest.files)
    code, told = evaluate(engine, capsys)
    assert code == 4
    assert "parent.json is not the manifest of the graph that the engine was built from" in told


def test_an_engine_that_names_another_checkpoint_than_its_graph_is_found(engine: Path, on: Any, capsys: Capture) -> None:
    on(gpu())
    manifest = read_manifest(engine)
    source = dataclasses.replace(manifest.source, checkpoint_sha256="0" * 64)
    write_manifest(engine, dataclasses.replace(manifest, source=source), manifest.files)
    code, told = evaluate(engine, capsys)
    assert code == 4
    assert "names another checkpoint" in told


def test_a_graph_that_calls_itself_an_engine_is_refused(fp16_onnx: Path, t4_engine: Path, tmp_path: Path, on: Any, capsys: Capture) -> None:
    on(gpu())
    copy = Path(shutil.copytree(fp16_onnx, tmp_path / "graph"))
    manifest = read_manifest(copy)
    engine = read_manifest(t4_engine)
    shutil.copy(t4_engine / PARENT_FILE, copy / PARENT_FILE)
    forged = dataclasses.replace(manifest, format="trt-rtx", engine=engine.engine, source=engine.source, batch=engine.batch)
    write_manifest(copy, forged, [*manifest.files, PARENT_FILE])
    code, told = evaluate(copy, capsys)
    assert code == 4
    assert "lists no model.plan, so there is no model" in told


@pytest.mark.slow
def test_neither_package_is_in_a_process_that_refused(t4_engine: Path) -> None:
    script = (
        "import json, sys\n"
        "from txl_deploy.trt import cuda\n"
        "cuda.devices = lambda: []\n"
        "from txl_deploy.cli.main import main\n"
        f"codes = [main(['verify', {str(t4_engine)!r}]), main(['eval', '--artifact', {str(t4_engine)!r}])]\n"
        "print(json.dumps([codes, [name for name in ('tensorrt', 'tensorrt_rtx') if name in sys.modules]]))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == [[0, 3], []]


@pytest.mark.parametrize(
    ("hardware_compatibility", "compute_capability", "fits"),
    [
        ("portable", "7.5", False),
        ("portable", "8.0", True),
        ("portable", "10.0", True),
        ("ampere_plus", "7.0", False),
        ("ampere_plus", "9.0", True),
        ("same_compute_capability", "8.6", True),
        ("same_compute_capability", "8.9", False),
        ("none", "8.6", True),
        ("none", "8.0", False),
    ],
)
def test_where_an_engine_for_several_gpus_runs(
    t4_engine: Path, on: Any, hardware_compatibility: str, compute_capability: str, fits: bool
) -> None:
    manifest = read_manifest(t4_engine)
    own = None if hardware_compatibility == "portable" else "8.6"
    changed = _with_facts(manifest, compute_capability=own, hardware_compatibility=hardware_compatibility)
    on(gpu("some GPU", compute_capability))
    if fits:
        assert check_fits(changed, device="cuda:0", origin="engine").compute_capability == compute_capability
    else:
        with pytest.raises(EnvironmentUnfitError, match=f"the GPU here is some GPU of compute capability {compute_capability}"):
            check_fits(changed, device="cuda:0", origin="engine")


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("10.4.0", "10.4.0", True),
        ("10.4.0", "10.4.0.26", True),
        ("10.4.0.post1", "10.4.0", True),
        ("11.4.0.106", "11.4.0.107", False),
        ("10.4.0", "10.4.1", False),
        ("10.4.0", "10.40.0", False),
        ("10.4", "10.4.0", False),
        ("1.7.1.116", "1.7.1.116", True),
    ],
)
def test_versions_that_are_the_same_release(one: str, other: str, same: bool) -> None:
    assert same_version(one, other) is same


def _with_facts(manifest: Manifest, **changes: Any) -> Manifest:
    assert isinstance(manifest.engine, EngineFacts)
    return dataclasses.replace(manifest, engine=dataclasses.replace(manifest.engine, **changes))
