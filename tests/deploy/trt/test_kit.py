"""Build kits: what is in one, what its script refuses before anything native is loaded, and that what it builds is a valid artifact."""

from __future__ import annotations

import ast
import ctypes
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from tests.deploy.trt.fake_tensorrt import PLAN, RELEASES, Fake
from txl_deploy import manifest as manifests
from txl_deploy.compat import Stack, target
from txl_deploy.manifest import BatchRange, Manifest, Settings, Source, TensorRecord
from txl_deploy.trt import kit_build
from txl_deploy.trt.kit import BUILD_COMMAND, is_kit, write_kit
from txl_deploy.trt.profiles import Profile
from txl_train.config import ModelConfig, to_dict
from txl_train.errors import ManifestError

V100 = {"name": "Tesla V100-SXM2-16GB", "compute_capability": "7.0", "driver": "550.54.15"}
T4 = {"name": "Tesla T4", "compute_capability": "7.5", "driver": "550.54.15"}

ON_ITS_PYTHONS = pytest.mark.skipif(sys.version_info[:2] > (3, 12), reason="TensorRT 10.4, whose kit this is, is for Python 3.10 to 3.12")

STAND_IN = '''
"""As much of TensorRT 10.4 as a kit's script calls. `journal` lists what it was asked for."""
import os
import signal
from enum import Enum
from pathlib import Path

__version__ = "10.4.0"
journal = []
plan, errors, starts, interrupted = b"a plan", [], True, False

class Kind(Enum):
    CONSTANT = 0
    MATRIX_MULTIPLY = 1
class DataType(Enum):
    HALF = 0
    FLOAT = 1
class NetworkDefinitionCreationFlag:
    STRONGLY_TYPED = 1
class BuilderFlag:
    TF32 = "TF32"
class ProfilingVerbosity:
    DETAILED = "DETAILED"

class Severity(Enum):
    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2
class ILogger:
    Severity = Severity
class IProgressMonitor:
    pass

class Tensor:
    def __init__(self, dtype, shape): self.dtype, self.shape = dtype, shape
class Layer:
    def __init__(self, kind, *outputs): self.type, self.outputs, self.num_outputs = kind, outputs, len(outputs)
    def get_output(self, i): return self.outputs[i]
class Network:
    layers = [Layer(Kind.CONSTANT, Tensor(DataType.HALF, (2, 3))), Layer(Kind.MATRIX_MULTIPLY, Tensor(DataType.FLOAT, (-1, 3)))]
    num_layers = 2
    def get_layer(self, i): return self.layers[i]

class Error:
    def __init__(self, text): self.text = text
    def desc(self): return self.text
class OnnxParser:
    def __init__(self, network, logger): pass
    num_errors = property(lambda self: len(errors))
    def get_error(self, i): return Error(errors[i])
    def parse_from_file(self, path):
        journal.append(("parse", Path(path).name))
        return not errors

class Cache:
    def serialize(self): return b"timings"
class Config:
    def clear_flag(self, flag): journal.append(("clear", flag))
    def add_optimization_profile(self, profile): return 0
    def create_timing_cache(self, data): return Cache()
    def set_timing_cache(self, cache, ignore_mismatch): return True
class Shapes:
    def set_shape(self, name, low, middle, high): journal.append(("shape", name, low, middle, high))
class Builder:
    def __init__(self, logger):
        if not starts:
            raise TypeError("pybind11::init(): factory function returned nullptr")
        self.logger = logger
    def create_network(self, flags):
        journal.append(("network", flags))
        return Network()
    def create_builder_config(self): return Config()
    def create_optimization_profile(self): return Shapes()
    def build_serialized_network(self, network, config):
        if interrupted:
            os.kill(os.getpid(), signal.SIGINT)
            return plan if config.progress_monitor.step_complete("phase", 1) else None
        if plan is None:
            self.logger.log(Severity.WARNING, "a warning")
            self.logger.log(Severity.ERROR, "out of memory")
        return plan
'''


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an ONNX artifact of one matrix product in fp16, with everything else that an export has."""
    onnx = pytest.importorskip("onnx")
    helper, types = onnx.helper, onnx.TensorProto
    folder = tmp_path_factory.mktemp("artifact") / "onnx"
    folder.mkdir()
    weight = helper.make_tensor("weight", types.FLOAT16, [4, 3], [0.5] * 12)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["mems.0", "weight"], ["new_mems.0"])],
        "step",
        [helper.make_tensor_value_info("mems.0", types.FLOAT16, ["batch_size", 4])],
        [helper.make_tensor_value_info("new_mems.0", types.FLOAT16, ["batch_size", 3])],
        [weight],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), folder / "model.onnx")
    (folder / "vocabulary.json").write_text("{}")
    digest = "0" * 64
    manifests.write_manifest(
        folder,
        Manifest(
            format="onnx",
            source=Source(checkpoint_sha256=digest, checkpoint_name="checkpoint_best.pt"),
            model=to_dict(ModelConfig(vocab_size=9)),
            settings=Settings(
                tgt_len=1, mem_len=1, clamp_len=None, same_length=False, same_length_rule="mem_len", memory="hidden", dtype="fp16"
            ),
            inputs=[TensorRecord(name="mems.0", dtype="float16", axes=["batch_size", 4])],
            outputs=[TensorRecord(name="new_mems.0", dtype="float16", axes=["batch_size", 3])],
            dataset="none",
            vocabulary_sha256=digest,
            versions={"txl": "0"},
            command="txl export --format onnx",
            precisions={"weights": {"float16": 12}},
            audit={"largest": 1.5},
        ),
        ["model.onnx", "vocabulary.json"],
    )
    return folder


PROFILES = [Profile(name="mems.0", min=(1, 4), opt=(8, 4), max=(32, 4))]


def stack_of(name: str, stack: str) -> Stack:
    return next(found for found in target(name).stacks if found.name == stack)


@pytest.fixture
def kit_for(tmp_path: Path, artifact: Path) -> Callable[[str, str], Path]:
    """Return `make(target, stack)`, the folder of a new kit."""

    def make(name: str, stack: str) -> Path:
        folder = tmp_path / f"kit-{name}"
        folder.mkdir()
        write_kit(
            folder,
            artifact,
            target=target(name),
            stack=stack_of(name, stack),
            batch=BatchRange(min=1, opt=8, max=32),
            profiles=PROFILES,
            why_not="there is no such GPU",
            command="txl export --format trt",
        )
        return folder

    return make


@pytest.fixture
def kit(kit_for: Callable[[str, str], Path]) -> Path:
    """Return a kit for a V100."""
    return kit_for("v100", "tensorrt-10.4-volta")


def script_of(kit: Path) -> Any:
    """Import a kit's own copy of the script."""
    specification = importlib.util.spec_from_file_location("kit_script", kit / "build.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture
def tensorrt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Return `install(version)`, which makes the stand-in importable as tensorrt-cu12 of that version; it is absent until then."""
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)

    def install(version: str) -> Path:
        site = tmp_path / f"site-{version}"
        (site / "tensorrt").mkdir(parents=True)
        (site / "tensorrt" / "__init__.py").write_text(STAND_IN)
        information = site / f"tensorrt_cu12-{version}.dist-info"
        information.mkdir()
        (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: tensorrt-cu12\nVersion: {version}\n")
        monkeypatch.syspath_prepend(site)
        return site

    yield install  # type: ignore[misc]
    sys.modules.pop("tensorrt", None)


def loaded() -> ModuleType | None:
    return sys.modules.get("tensorrt")


def is_untouched(kit: Path) -> bool:
    """True if the script has left neither an engine nor anything half done, and has not imported TensorRT."""
    return loaded() is None and not [path for path in kit.iterdir() if path.name.startswith((".engine", "engine"))]


def test_a_kit_has_all_that_its_target_needs(kit: Path, artifact: Path) -> None:
    for path in artifact.iterdir():
        assert (kit / "onnx" / path.name).read_bytes() == path.read_bytes()
    assert (kit / "requirements.txt").read_text() == "--extra-index-url https://pypi.nvidia.com\ntensorrt-cu12==10.4.0\n"
    readme = (kit / "README.txt").read_text()
    for words in ("v100", "there is no such GPU", BUILD_COMMAND, "torch==2.10.0", "onnxruntime-gpu==1.23.2", "driver 535 to 580", "3.12"):
        assert words in readme
    assert (kit / "build.py").read_bytes() == Path(kit_build.__file__).read_bytes()
    assert os.access(kit / "build.sh", os.X_OK)
    assert is_kit(kit)
    assert not is_kit(artifact)


def test_the_script_needs_the_standard_library_alone() -> None:
    tree = ast.parse(Path(kit_build.__file__).read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in imported} <= set(sys.stdlib_module_names)


def test_a_graph_that_is_none_gets_no_kit(artifact: Path, tmp_path: Path) -> None:
    other = tmp_path / "torchscript"
    other.mkdir()
    (other / "model.pt").touch()
    manifests.write_manifest(other, dataclasses.replace(manifests.read_manifest(artifact), format="torchscript"), ["model.pt"])
    v100 = target("v100")
    with pytest.raises(ManifestError, match="holds torchscript"):
        write_kit(
            tmp_path, other, target=v100, stack=v100.stacks[0], batch=BatchRange(), profiles=PROFILES, why_not="", command="txl export"
        )


@ON_ITS_PYTHONS
@pytest.mark.parametrize(
    ("gpus", "version", "code", "words"),
    [
        ([], "10.4.0", 3, ["There is no NVIDIA GPU", "TensorRT 10.4.0", "target v100, compute capability 7.0"]),
        ([T4], "10.4.0", 3, ["compute capability 7.0, and the Tesla T4 has 7.5"]),
        ([T4, V100], "10.4.0", 3, ["the Tesla T4 has 7.5", "CUDA_VISIBLE_DEVICES=1"]),
        (
            [V100 | {"driver": "590.44.01"}],
            "10.4.0",
            3,
            ["needs NVIDIA driver 535 to 580, and this is 590.44.01", "Install NVIDIA driver 580"],
        ),
        ([V100 | {"driver": "470.57"}], "10.4.0", 3, ["driver 535 to 580, and this is 470.57"]),
        ([V100], "11.4.0.106", 3, ["for tensorrt-cu12==10.4.0, and that package is 11.4.0.106 here", "pip install -r requirements.txt"]),
        ([V100], None, 3, ["that package is absent here"]),
    ],
)
def test_an_unfit_machine_is_refused_before_tensorrt_is_loaded(
    kit: Path,
    tensorrt: Callable[[str], Path],
    capsys: pytest.CaptureFixture[str],
    gpus: list[dict[str, str]],
    version: str | None,
    code: int,
    words: list[str],
) -> None:
    if version is not None:
        tensorrt(version)
    script = script_of(kit)
    script.gpus = lambda: gpus
    assert script.main([]) == code
    said = capsys.readouterr()
    assert said.out == ""
    for text in words:
        assert text in said.err
    assert is_untouched(kit)


def test_a_python_without_the_package_is_refused(kit: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 13, 1))
    script = script_of(kit)
    script.gpus = lambda: [V100]
    assert script.main(["--check"]) == 3
    said = capsys.readouterr().err
    assert "Python 3.10 to 3.12, and this is 3.13" in said
    assert "PYTHON=python3.12 sh build.sh" in said


@ON_ITS_PYTHONS
@pytest.mark.parametrize("file", ["kit.json", "onnx/model.onnx", "onnx/vocabulary.json", "onnx/manifest.json"])
def test_a_changed_byte_is_refused_before_tensorrt_is_loaded(
    kit: Path, tensorrt: Callable[[str], Path], capsys: pytest.CaptureFixture[str], file: str
) -> None:
    tensorrt("10.4.0")
    path = kit / file
    content = path.read_bytes()
    path.write_bytes(content.replace(b"0", b"1", 1) if b"0" in content else content + b" ")
    script = script_of(kit)
    script.gpus = lambda: [V100]
    assert script.main([]) == 4
    assert f"{path} was changed" in capsys.readouterr().err
    assert is_untouched(kit)
    path.unlink()
    assert script.main([]) == 4


@ON_ITS_PYTHONS
def test_the_kit_builds_a_valid_artifact_on_its_target(
    kit: Path, artifact: Path, tensorrt: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    tensorrt("10.4.0.post1")
    script = script_of(kit)
    script.gpus = lambda: [V100, T4]
    assert script.main([]) == 0
    engine = kit / "engine"
    assert capsys.readouterr().out == f"{engine}\n"
    manifest, parent = manifests.read_verified(engine), manifests.read_manifest(artifact)
    assert sorted(manifest.files) == ["model.plan", "parent.json", "timing.cache", "vocabulary.json"]
    assert manifests.unlisted(engine, manifest) == []
    assert (engine / "model.plan").read_bytes() == b"a plan"
    assert (engine / "parent.json").read_bytes() == (artifact / "manifest.json").read_bytes()
    assert manifest.source.parent == manifests.Parent(manifest_sha256=kit_build.sha256(artifact / "manifest.json"), format="onnx")
    assert manifest.engine == manifests.EngineFacts(
        builder="tensorrt",
        builder_version="10.4.0",
        target="v100",
        compute_capability="7.0",
        gpu="Tesla V100-SXM2-16GB",
        driver="550.54.15",
        profiles=[PROFILES[0].record()],
    )
    assert (manifest.format, manifest.batch) == ("trt", BatchRange(min=1, opt=8, max=32))
    assert (manifest.settings, manifest.audit, manifest.inputs) == (parent.settings, parent.audit, parent.inputs)
    assert manifest.versions == {"txl": "0", "tensorrt-cu12": "10.4.0"}
    assert manifest.precisions == {
        "network_weights": {"float16": 6},
        "network_products": {"float32": 1},
        "network_layers": {"float32": 1},
    }
    module: Any = loaded()
    assert module.journal == [
        ("network", 2),  # strongly typed
        ("parse", "model.onnx"),
        ("clear", "TF32"),
        ("shape", "mems.0", (1, 4), (8, 4), (32, 4)),
    ]
    assert script.main([]) == 2
    assert f"{engine} exists" in capsys.readouterr().err


@ON_ITS_PYTHONS
@pytest.mark.parametrize(
    ("attributes", "code", "words"),
    [
        ({"errors": ["no importer for Frobnicate"]}, 1, "does not take the graph: no importer for Frobnicate"),
        ({"plan": None}, 1, "could not build the engine: out of memory."),
        ({"starts": False}, 3, "does not start on this machine"),
        ({"interrupted": True}, 130, "Interrupted. Nothing was written."),
        ({"__version__": "10.3.0"}, 3, "Python loads 10.3.0"),
    ],
)
def test_a_build_that_fails_leaves_nothing(
    kit: Path, tensorrt: Callable[[str], Path], capsys: pytest.CaptureFixture[str], attributes: dict[str, Any], code: int, words: str
) -> None:
    site = tensorrt("10.4.0")
    with (site / "tensorrt" / "__init__.py").open("a") as file:
        file.write("".join(f"{name} = {value!r}\n" for name, value in attributes.items()))
    script = script_of(kit)
    script.gpus = lambda: [V100]
    assert script.main([]) == code
    assert words in capsys.readouterr().err
    assert not [path.name for path in kit.iterdir() if "engine" in path.name]


@ON_ITS_PYTHONS
def test_what_a_killed_build_has_left_goes_with_the_next(kit: Path, tensorrt: Callable[[str], Path]) -> None:
    tensorrt("10.4.0")
    left = kit / f".engine.abcdefgh{kit_build.UNFINISHED}"
    left.mkdir()
    (left / "model.plan").write_bytes(b"half")
    script = script_of(kit)
    script.gpus = lambda: [V100]
    assert script.main([]) == 0
    assert not left.exists()
    assert manifests.read_verified(kit / "engine").format == "trt"


def test_tensorrt_rtx_builds_a_kit_for_a_t4_without_a_gpu(kit_for: Callable[[str, str], Path], artifact: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    kit = kit_for("t4", "tensorrt-rtx")
    done = subprocess.run(
        [sys.executable, "-I", str(kit / "build.py"), "--out", str(kit / "deep" / "t4")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    manifest = manifests.read_verified(kit / "deep" / "t4")
    assert manifest.format == "trt-rtx"
    assert manifest.engine is not None
    assert (manifest.engine.compute_capability, manifest.engine.gpu, manifest.engine.target) == ("7.5", None, "t4")
    assert set(manifest.files) == {"model.plan", "parent.json", "vocabulary.json"}

    from txl_deploy.trt import api  # the adapter and the script are two, and count the same

    built = api.find("tensorrt_rtx").build(api.BuildSpec(onnx=artifact / "model.onnx", profiles=PROFILES, compute_capability="7.5"))
    assert manifest.precisions == built.precisions.record()
    assert manifest.files["model.plan"].bytes == len(built.plan)


@ON_ITS_PYTHONS
def test_the_one_command_looks_at_the_machine_before_it_installs_anything(kit: Path) -> None:
    if kit_build.gpus():
        pytest.skip("needs a machine without a GPU")
    environment = os.environ | {"PYTHON": sys.executable}
    done = subprocess.run(["sh", str(kit / "build.sh")], cwd="/", env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stderr
    assert "There is no NVIDIA GPU" in done.stderr
    done = subprocess.run(
        ["sh", "build.sh"], cwd=kit, env=os.environ | {"PYTHON": "python-absent"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 3, done.stderr
    assert "PYTHON=python3.12 sh build.sh" in done.stderr
    assert not (kit / ".venv").exists()


@pytest.mark.parametrize("release", RELEASES)
def test_every_name_that_the_script_uses_exists_in(release: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake(release)
    monkeypatch.setitem(sys.modules, fake.package, fake.module)
    kit = SimpleNamespace(
        builder=fake.package,
        builder_name=release,
        builder_pin=release,
        builder_version=fake.module.__version__,
        compute_capability="7.5",
        optimization_level=4,
        manifest={
            "engine": {
                "profiles": [dataclasses.asdict(profile.record()) for profile in PROFILES],
                "hardware_compatibility": "none" if fake.package == "tensorrt_rtx" else "ampere_plus",
            }
        },
    )
    plan, cache, precisions = kit_build.build_plan(kit, Path("model.onnx"), kit_build.Stop())
    assert plan == PLAN
    assert (cache is None) == (fake.package == "tensorrt_rtx")
    assert precisions
    assert {flag.name for (flag,) in fake.called("IBuilderConfig.clear_flag")} == {"TF32"}
    assert fake.called("IOptimizationProfile.set_shape") == [("mems.0", (1, 4), (8, 4), (32, 4))]


class FakeDriver:
    """Answers as libcuda.so.1 and libnvidia-ml.so.1 do, for one GPU."""

    def __init__(self, name: str) -> None:
        assert name in ("libcuda.so.1", "libnvidia-ml.so.1")

    def __getattr__(self, name: str) -> Callable[..., int]:
        return lambda *arguments: 0

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = 1
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: Any) -> int:
        value._obj.value = {75: 7, 76: 0}[attribute]
        return 0

    def cuDeviceGetName(self, text: Any, size: int, device: Any) -> int:
        text.value = b"Tesla V100-SXM2-16GB"
        return 0

    def nvmlSystemGetDriverVersion(self, text: Any, size: int) -> int:
        text.value = b"550.54.15"
        return 0


def test_the_driver_is_asked_what_gpus_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", FakeDriver)
    assert kit_build.gpus() == [V100]


def test_a_manifest_in_a_kit_is_the_one_that_the_engine_gets(kit: Path) -> None:
    document = json.loads((kit / "kit.json").read_text())["manifest"]
    assert document["files"] == {}
    assert document["engine"]["gpu"] is None
    assert document["command"] == f"txl export --format trt && {BUILD_COMMAND}"
