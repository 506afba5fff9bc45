"""Engines as artifacts: what is refused before any work, what is written, and that nothing is left of what failed."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.conftest import Exports
from txl_deploy import compat
from txl_deploy.compat import Machine
from txl_deploy.export.artifact import ExportRequest
from txl_deploy.manifest import BatchRange, read_manifest, verify
from txl_deploy.parity.rollout import ParityResult
from txl_deploy.runtimes import registry
from txl_deploy.runtimes.base import Runtime
from txl_deploy.trt import artifact as artifacts
from txl_deploy.trt.artifact import EngineRequest, export_engine
from txl_deploy.trt.cuda import Gpu
from txl_deploy.trt.kit import is_kit
from txl_deploy.trt.profiles import parse_batch_range
from txl_train.errors import ArtifactError, EnvironmentUnfitError, ManifestError, TxlError, UsageError, ValidationError
from txl_train.files import file_sha256

RTX = "1.7.1.116"
FULL = "11.4.0.106"


def gpu(name: str = "Tesla T4", compute_capability: str = "7.5", driver: str = "580.65.06") -> Gpu:
    return Gpu(index=0, name=name, compute_capability=compute_capability, memory_bytes=1 << 34, cuda="13.0", driver=driver)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let this machine have other GPUs and packages."""

    def become(*gpus: Gpu, **packages: str) -> None:
        named = {name.replace("_", "-"): version for name, version in packages.items()}
        monkeypatch.setattr(compat, "this_machine", lambda: Machine(python=(3, 12), gpus=gpus, packages=named))

    return become


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail a test in which anything is exported, built or written."""
    for name in ("export_artifact", "build_engine", "write_kit"):
        monkeypatch.setattr(artifacts, name, lambda *_, name=name, **__: pytest.fail(f"{name} was called"))


def request_of(graph: Path | None, out: Path, **changes: Any) -> EngineRequest:
    given: dict[str, Any] = {"graph": graph, "checkpoint": None, "out": out, "batch": parse_batch_range("1,2,4"), "target": "t4"}
    return EngineRequest(**given | changes)


def refusal(request: EngineRequest) -> TxlError:
    """Return why a request was refused, with nothing left of it."""
    before = sorted(request.out.parent.iterdir())
    with pytest.raises(TxlError) as caught:
        export_engine(request)
    assert sorted(request.out.parent.iterdir()) == before
    return caught.value


# ---- what is written -------------------------------------------------------------------------------------------------------------


def test_the_manifest_chains_the_engine_to_its_graph_and_checkpoint(t4_engine: Path, fp16_onnx: Path, exports: Exports) -> None:
    manifest, graph = read_manifest(t4_engine), read_manifest(fp16_onnx)
    assert verify(t4_engine, checkpoint=exports.checkpoint, parent=fp16_onnx) == []
    assert (t4_engine / "parent.json").read_bytes() == (fp16_onnx / "manifest.json").read_bytes()
    assert (t4_engine / "vocabulary.json").read_bytes() == (fp16_onnx / "vocabulary.json").read_bytes()
    assert manifest.source.parent is not None
    assert manifest.source.parent.manifest_sha256 == file_sha256(fp16_onnx / "manifest.json")
    assert manifest.source.checkpoint_sha256 == file_sha256(exports.checkpoint)
    assert (manifest.settings, manifest.inputs, manifest.outputs, manifest.audit) == (
        graph.settings,
        graph.inputs,
        graph.outputs,
        graph.audit,
    )


def test_the_manifest_says_what_the_engine_is_bound_to(t4_engine: Path) -> None:
    manifest = read_manifest(t4_engine)
    engine = manifest.engine
    assert manifest.format == "trt-rtx"
    assert engine is not None
    assert (engine.builder, engine.builder_version, engine.target, engine.compute_capability) == ("tensorrt_rtx", RTX, "t4", "7.5")
    assert (engine.gpu, engine.driver, engine.hardware_compatibility) == (None, None, "none")
    assert manifest.batch == BatchRange(min=1, opt=8, max=32)
    assert [profile.name for profile in engine.profiles] == [record.name for record in manifest.inputs]
    assert engine.profiles[0].max == [32, 5]
    assert manifest.versions["tensorrt-rtx"] == RTX
    assert manifest.precisions["network_products"].keys() == {"float16"}
    assert sorted(manifest.files) == ["model.plan", "parent.json", "vocabulary.json"]


def test_what_was_built_is_told_to_people_and_programs(fp16_onnx: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    result = export_engine(request_of(fp16_onnx, tmp_path / "e"))
    text = "\n".join(result.lines())
    assert f"for t4: compute capability 7.5; built by TensorRT-RTX {RTX} in" in text
    assert "without a GPU" in text
    assert "1 to 4 streams (tuned for 2)" in text
    assert "products in the network that was built: " in text
    assert f"Not compared with what it was built from: {tmp_path / 'e'} is an engine for compute capability 7.5 (t4)" in text
    document = json.loads(json.dumps(result.describe()))
    assert document["built"] is True
    assert document["files"]["model.plan"]["bytes"] == (tmp_path / "e" / "model.plan").stat().st_size
    assert document["checked"] is None
    assert document["engine"]["builder_version"] == RTX
    assert [path.name for path in tmp_path.iterdir()] == ["e"]


def test_an_engine_is_replaced_only_with_overwrite(fp16_onnx: Path, t4_engine: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(t4_engine, tmp_path / "e"))
    assert "--overwrite" in str(refusal(request_of(fp16_onnx, out)))
    export_engine(request_of(fp16_onnx, out, overwrite=True))
    assert read_manifest(out).batch.max == 4
    assert [path.name for path in tmp_path.iterdir()] == ["e"]


def test_an_engine_for_no_gpu_in_particular(exports: Exports, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    result = export_engine(request_of(exports.onnx, tmp_path / "e", target="portable", rtx_only=True))
    assert result.manifest is not None
    assert result.manifest.engine is not None
    assert (result.manifest.engine.compute_capability, result.manifest.engine.hardware_compatibility) == (None, "portable")
    assert "every GPU from compute capability 8.0 on" in result.lines()[1]
    assert "--format trt-rtx" in str(refusal(request_of(exports.onnx, tmp_path / "f", target="portable")))


def test_an_engine_that_runs_here_is_compared_and_read_back(fp16_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_that_it_runs(monkeypatch, fp16_onnx)
    result = export_engine(request_of(fp16_onnx, tmp_path / "e"))
    assert result.parity is not None
    assert result.parity.passed
    assert result.parity.n_segments == 6
    assert "Compared with what it was built from over 6 segments" in result.lines()[-1]
    assert result.describe()["checked"]["passed"] is True
    assert read_manifest(tmp_path / "e").precisions["engine_products"] == {"float16": 9}
    assert verify(tmp_path / "e") == []


def test_an_engine_that_computes_something_else_leaves_nothing_behind(
    fp16_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_that_it_runs(monkeypatch, fp16_onnx)
    real = artifacts.compare

    def differing(*arguments: Any, **named: Any) -> ParityResult:
        return dataclasses.replace(real(*arguments, **named), passed=False, reason="a token's nll differs by 3 nats")

    monkeypatch.setattr(artifacts, "compare", differing)
    error = refusal(request_of(fp16_onnx, tmp_path / "e"))
    assert isinstance(error, ValidationError)
    assert error.exit_code == 1
    assert "a token's nll differs by 3 nats. Nothing was written" in error.message


def pretend_that_it_runs(monkeypatch: pytest.MonkeyPatch, graph: Path) -> None:
    """Open ONNX Runtime where the engine is to be opened."""
    pytest.importorskip("tensorrt_rtx")

    def open_instead(directory: Path, *, device: str = "cpu", threads: int | None = None) -> Runtime:
        runtime: Any = registry.open_artifact(graph)
        runtime._info = dataclasses.replace(runtime.info, readback={"products": {"float16": 9}, "layers": {"float16": 20}})
        return runtime  # type: ignore[no-any-return]

    monkeypatch.setattr(artifacts, "check_fits", lambda *_, **__: gpu())
    monkeypatch.setattr(artifacts, "resolve_device", lambda _: "cuda:0")
    monkeypatch.setattr(artifacts, "open_artifact", open_instead)


def test_an_engine_that_fails_where_it_should_run_is_not_written(fp16_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_that_it_runs(monkeypatch, fp16_onnx)

    def fail(*_: object, **__: object) -> None:
        raise EnvironmentUnfitError("TensorRT-RTX could not run a step: illegal memory access.")

    monkeypatch.setattr(artifacts, "compare", fail)
    with pytest.raises(EnvironmentUnfitError, match="could not run a step"):
        export_engine(request_of(fp16_onnx, tmp_path / "e"))
    assert list(tmp_path.iterdir()) == []


# ---- kits ------------------------------------------------------------------------------------------------------------------------


def test_where_the_gpu_is_missing_a_kit_is_written(fp16_onnx: Path, tmp_path: Path) -> None:
    result = export_engine(request_of(fp16_onnx, tmp_path / "kit", target="v100"))
    assert result.kit == result.directory == tmp_path / "kit"
    assert result.manifest is None
    assert result.why_not is not None
    assert "needs a GPU of compute capability 7.0" in result.why_not
    assert is_kit(tmp_path / "kit")
    assert (tmp_path / "kit" / "onnx" / "manifest.json").read_bytes() == (fp16_onnx / "manifest.json").read_bytes()
    document = json.loads(json.dumps(result.describe()))
    assert (document["built"], document["build_command"], document["builder_version"]) == (False, result.build_command, "10.4.0")
    assert "TensorRT 10.4.0" in result.lines()[0]


def test_a_gpu_of_another_kind_gives_a_kit_that_says_so(fp16_onnx: Path, tmp_path: Path, machine: Callable[..., None]) -> None:
    machine(gpu("NVIDIA H100", "9.0"), tensorrt_cu13=FULL)
    result = export_engine(request_of(fp16_onnx, tmp_path / "kit", target="v100"))
    assert result.why_not is not None
    assert "it needs a GPU of compute capability 7.0, and the NVIDIA H100 has 9.0" in result.why_not


def test_a_kit_is_written_where_it_is_asked_for_although_the_engine_could_be_built(fp16_onnx: Path, tmp_path: Path) -> None:
    result = export_engine(request_of(fp16_onnx, tmp_path / "kit", kit=True))
    assert result.kit is not None
    assert is_kit(tmp_path / "kit")


def test_a_kit_that_fails_leaves_nothing_behind(fp16_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(directory: Path, *_: Any, **__: Any) -> None:
        (directory / "part").write_text("half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(artifacts, "write_kit", full)
    with pytest.raises(EnvironmentUnfitError, match="cannot be written: No space left"):
        export_engine(request_of(fp16_onnx, tmp_path / "kit", target="v100"))
    assert list(tmp_path.iterdir()) == []


# ---- what is refused before any work ---------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_work")
class TestRefused:
    def test_an_unknown_target_with_the_nearest_name(self, fp16_onnx: Path, tmp_path: Path) -> None:
        error = refusal(request_of(fp16_onnx, tmp_path / "e", target="v10"))
        assert (error.exit_code, "Did you mean `v100`?" in error.message) == (2, True)

    def test_neither_a_target_nor_a_gpu(self, fp16_onnx: Path, tmp_path: Path, machine: Callable[..., None]) -> None:
        machine(tensorrt_rtx=RTX)
        error = refusal(request_of(fp16_onnx, tmp_path / "e", target=None))
        assert error.exit_code == 2
        assert "this machine has none" in error.message
        assert "`--target NAME`: " in str(error.remedy)
        assert "t4, v100" in str(error.remedy)

    def test_a_gpu_that_is_no_target(self, fp16_onnx: Path, tmp_path: Path, machine: Callable[..., None]) -> None:
        machine(gpu("GeForce GTX 1080", "6.1"))
        error = refusal(request_of(fp16_onnx, tmp_path / "e", target=None))
        assert (error.exit_code, "GeForce GTX 1080 of compute capability 6.1" in error.message) == (2, True)

    @pytest.mark.parametrize(
        ("there", "packages", "command"),
        [
            (gpu(), {}, "tensorrt-cu13==11.4.0.106"),
            (gpu(), {"tensorrt_cu13": "11.2.0.1"}, "tensorrt-cu13==11.4.0.106"),
            (gpu("Tesla V100-SXM2-16GB", "7.0"), {}, "tensorrt-cu12==10.4.0"),
            (gpu("Tesla V100-SXM2-16GB", "7.0"), {"tensorrt_cu13": FULL}, "tensorrt-cu12==10.4.0"),
        ],
        ids=["none", "another version", "none for a V100", "one too new for a V100"],
    )
    def test_on_the_gpu_itself_a_package_that_is_missing_or_of_another_version(
        self, fp16_onnx: Path, tmp_path: Path, machine: Callable[..., None], there: Gpu, packages: dict[str, str], command: str
    ) -> None:
        machine(there, **packages)
        error = refusal(request_of(fp16_onnx, tmp_path / "e", target=None))
        assert isinstance(error, EnvironmentUnfitError)
        assert "pip install --extra-index-url https://pypi.nvidia.com" in str(error.remedy)
        assert command in str(error.remedy)

    def test_a_driver_that_is_too_old(self, fp16_onnx: Path, tmp_path: Path, machine: Callable[..., None]) -> None:
        machine(gpu("Tesla V100-SXM2-16GB", "7.0", driver="470.57.02"), tensorrt_cu12="10.4.0")
        error = refusal(request_of(fp16_onnx, tmp_path / "e", target="v100"))
        assert error.exit_code == 3
        assert "it needs NVIDIA driver 535 to 580, and this is 470.57.02" in error.message

    def test_tensorrt_rtx_where_it_alone_is_asked_for_and_missing(
        self, fp16_onnx: Path, tmp_path: Path, machine: Callable[..., None]
    ) -> None:
        machine()
        error = refusal(request_of(fp16_onnx, tmp_path / "e", rtx_only=True))
        assert (error.exit_code, error.remedy) == (3, f"pip install tensorrt-rtx=={RTX}")

    @pytest.mark.parametrize("target", ["v100", "h100"])
    def test_tensorrt_rtx_for_a_gpu_that_it_does_not_know(self, fp16_onnx: Path, tmp_path: Path, target: str) -> None:
        error = refusal(request_of(fp16_onnx, tmp_path / "e", rtx_only=True, target=target))
        assert (error.exit_code, f"TensorRT-RTX builds no engine for {target}" in error.message) == (3, True)

    def test_a_graph_of_fp32_for_turing(self, exports: Exports, tmp_path: Path) -> None:
        error = refusal(request_of(exports.onnx, tmp_path / "e", rtx_only=True))
        assert error.exit_code == 3
        assert "refuses matrix products of fp32 for compute capability 7.5" in error.message
        assert "--dtype fp16" in str(error.remedy)

    def test_a_checkpoint_in_fp32_for_turing_before_it_is_exported(self, exports: Exports, tmp_path: Path) -> None:
        checkpoint = ExportRequest(checkpoint=exports.checkpoint, out=tmp_path / "e", format="trt", dtype="fp32")
        error = refusal(request_of(None, tmp_path / "e", checkpoint=checkpoint, rtx_only=True))
        assert (error.exit_code, "--dtype fp16" in str(error.remedy)) == (3, True)

    @pytest.mark.parametrize(
        "batch", [BatchRange(min=4, opt=2, max=8), BatchRange(min=1, opt=9, max=8), BatchRange(min=1), BatchRange(min=9, max=8)]
    )
    @pytest.mark.parametrize("target", ["t4", "v100"])
    def test_ranges_that_do_not_rise(self, fp16_onnx: Path, tmp_path: Path, batch: BatchRange, target: str) -> None:
        error = refusal(request_of(fp16_onnx, tmp_path / "e", batch=batch, target=target))
        assert (error.exit_code, "--batch-range 1,8,32" in str(error.remedy)) == (2, True)

    @pytest.mark.parametrize("target", ["t4", "v100"])
    def test_a_range_for_a_graph_of_a_fixed_number_of_streams(
        self, fp16_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str
    ) -> None:
        manifest = read_manifest(fp16_onnx)
        inputs = [
            dataclasses.replace(record, axes=[3 if axis == "batch_size" else axis for axis in record.axes]) for record in manifest.inputs
        ]
        monkeypatch.setattr(artifacts.manifests, "read_manifest", lambda _: dataclasses.replace(manifest, inputs=inputs))
        error = refusal(request_of(fp16_onnx, tmp_path / "e", target=target))
        assert (error.exit_code, "The graph takes 3 streams" in error.message) == (2, True)

    def test_what_is_no_onnx_graph(self, exports: Exports, tmp_path: Path) -> None:
        error = refusal(request_of(exports.torchscript, tmp_path / "e"))
        assert (error.exit_code, "holds torchscript" in error.message) == (2, True)
        assert refusal(request_of(exports.data, tmp_path / "e")).exit_code == 4

    def test_timings_that_cannot_be_read(self, fp16_onnx: Path, tmp_path: Path) -> None:
        error = refusal(request_of(fp16_onnx, tmp_path / "e", timing_cache=tmp_path / "absent"))
        assert isinstance(error, UsageError)
        assert "absent cannot be read: No such file" in error.message

    def test_a_folder_of_the_user_s_own(self, fp16_onnx: Path, tmp_path: Path) -> None:
        for option in ("out", "keep_onnx"):
            (tmp_path / option).mkdir()
            (tmp_path / option / "thesis.txt").write_text("years of work")
        assert refusal(request_of(fp16_onnx, tmp_path / "out", overwrite=True)).exit_code == 2
        assert refusal(request_of(fp16_onnx, tmp_path / "e", keep_onnx=tmp_path / "keep_onnx", overwrite=True)).exit_code == 2


# ---- failures on the way ---------------------------------------------------------------------------------------------------------


def test_a_damaged_graph_is_not_built(fp16_onnx: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    copy = Path(shutil.copytree(fp16_onnx, tmp_path / "graph"))
    content = bytearray((copy / "model.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (copy / "model.onnx").write_bytes(content)
    error = refusal(request_of(copy, tmp_path / "e"))
    assert isinstance(error, ManifestError)
    assert "model.onnx was changed" in error.message
    assert isinstance(refusal(request_of(copy, tmp_path / "e", target="v100")), ArtifactError)


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), ValidationError("the parser refuses it"), MemoryError()], ids=repr)
def test_a_build_that_is_interrupted_or_fails_leaves_nothing_behind(
    exports: Exports, fp16_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    pytest.importorskip("tensorrt_rtx")

    def export_by_copying(request: ExportRequest) -> None:
        shutil.copytree(fp16_onnx, request.out)

    def fail(*_: Any) -> None:
        raise failure

    monkeypatch.setattr(artifacts, "export_artifact", export_by_copying)
    monkeypatch.setattr(artifacts, "build_engine", fail)
    checkpoint = ExportRequest(checkpoint=exports.checkpoint, out=tmp_path / "e", format="trt", dtype="fp16")
    with pytest.raises(type(failure)):
        export_engine(request_of(None, tmp_path / "e", checkpoint=checkpoint))
    assert list(tmp_path.iterdir()) == []
