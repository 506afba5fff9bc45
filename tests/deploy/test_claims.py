"""What runs is compared with what is claimed: every way in which a label can lie is caught, and an honest one is not."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from tests.deploy.conftest import Exports
from tests.support import small_config, write_checkpoint
from txl_deploy import claims
from txl_deploy import manifest as manifests
from txl_deploy.cli.main import main
from txl_deploy.export.artifact import ExportRequest, export_artifact
from txl_deploy.manifest import BatchRange, EngineFacts, Manifest, Parent
from txl_deploy.runtimes.base import RuntimeInfo
from txl_deploy.runtimes.registry import open_artifact
from txl_train.errors import ArtifactError, ManifestError, ValidationError


def info_of(**changes: Any) -> RuntimeInfo:
    """What an honest ONNX artifact in fp32 says of itself on a CPU, with changes."""
    known: dict[str, Any] = {
        "name": "onnx",
        "provider": "CPUExecutionProvider",
        "device": "cpu",
        "dtype": "fp32",
        "compute": "fp32",
        "memory": "kv",
        "tgt_len": 5,
        "config": small_config(),
        "readback": {"weights": {"float32": 20}, "products": {"float32": 17}, "nodes": {"CPUExecutionProvider": 90}},
    }
    return RuntimeInfo(**known | changes)


CUDA = {"provider": "CUDAExecutionProvider", "device": "cuda:0"}
HALF = {"dtype": "fp16", "memory_dtype": "fp16"}
HALF_ON_GPU = CUDA | HALF | {"compute": "fp16"}

ENGINE_16 = {"name": "trt", "provider": "trt", "device": "cuda:0", **HALF, "compute": "fp16"}
ENGINE_32 = {"name": "trt-rtx", "provider": "trt-rtx", "device": "cuda:0", "compute": "unknown"}


def read(**found: Any) -> dict[str, Any]:
    return {"readback": {"package": "tensorrt", **found}}


HONEST = {
    "fp32 on a CPU": {},
    "fp16 that a CPU computes in fp32": HALF | {"readback": {"weights": {"float16": 20}, "products": {"float32": 17}}},
    "fp16 on a GPU": HALF_ON_GPU | {"readback": {"weights": {"float16": 20}, "products": {"float16": 17}}},
    "shapes computed on the CPU": CUDA | {"readback": {"nodes": {"CUDAExecutionProvider": 80, "CPUExecutionProvider": 10}}},
    "an engine": {
        "name": "trt",
        "provider": "trt",
        **HALF,
        "compute": "fp16",
        "device": "cuda:0",
        "readback": {"products": {"float16": 9}},
    },
    "positions that stay fp32": HALF
    | {"config": small_config(attn_type="sinusoidal"), "readback": {"weights": {"float16": 20, "float32": 2}, "products": {"float32": 9}}},
    "nothing read back": {"readback": {}},
    "an engine whose products are fused": ENGINE_16 | {"compute": "unknown"} | read(products={}, layers={"float16": 3, "unknown": 5}),
    "an engine of fp32 that is fused": ENGINE_32 | read(products={}, layers={"float32": 8, "int64": 2}),
    "an engine of fp32 with a memory of fp16": ENGINE_32 | {"memory_dtype": "fp16"} | read(layers={"float32": 8, "float16": 2}),
    "a graph of other makers": {"readback": {"settings": {}}},
    "a graph that says what it is": {"readback": {"settings": {"clamp_len": None, "same_length": False, "checkpoint_sha256": "a"}}},
}

LIES = {
    "another provider": ({"device": "cuda:0"}, "runs on CPUExecutionProvider instead of CUDAExecutionProvider"),
    "no node on the provider": (CUDA | {"readback": {"nodes": {"CPUExecutionProvider": 90}}}, "no node runs on CUDAExecutionProvider"),
    "products on the CPU": (
        CUDA | {"readback": {"elsewhere": {"MatMul": 3, "Softmax": 2}}},
        "outside CUDAExecutionProvider: 3 MatMul, 2 Soft",
    ),
    "fp16 over fp32 weights": (HALF | {"readback": {"weights": {"float32": 20}}}, "weights are of 20 float32 instead of float16"),
    "fp16 with one fp32 matrix": (HALF | {"readback": {"weights": {"float16": 19, "float32": 1}}}, "19 float16, 1 float32"),
    "fp32 over fp16 weights": ({"readback": {"weights": {"float16": 20}}}, "weights are of 20 float16 instead of float32"),
    "no matrix at all": ({"readback": {"weights": {}}}, "no floating-point type"),
    "TF32": (CUDA | {"compute": "tf32", "readback": {"products": {"float32": 17}}}, "computed in tf32 instead of fp32"),
    "TF32 in PyTorch": (
        {"name": "pytorch", "provider": "eager", "device": "cuda:0", "compute": "tf32", "readback": {"weights": {"float32": 20}}},
        "computed in tf32 instead of fp32",
    ),
    "an engine of which nothing was read": (ENGINE_16 | read(products={}, layers={"unknown": 7}), "nothing of it could be read back"),
    "an engine without layers": (ENGINE_32 | read(), "nothing of it could be read back, neither products nor layers (no layer)"),
    "a fused engine that is not in fp16": (ENGINE_16 | read(products={}, layers={"float32": 7}), "none of its layers is of float16 (7 f"),
    "a fused engine that is not in fp32": (
        ENGINE_32 | read(layers={"float32": 7, "float16": 1}),
        "layers are of 7 float32, 1 float16 inst",
    ),
    "a fused engine in bfloat16": (
        ENGINE_32 | {"memory_dtype": "fp16"} | read(layers={"float32": 7, "bfloat16": 1}),
        "layers are of 7 float32, 1 bfloat16 instead of float32",
    ),
    "another clamping": ({"readback": {"settings": {"clamp_len": 1}}}, "its `clamp_len` is 1 instead of None"),
    "another window": ({"readback": {"settings": {"same_length": True}}}, "its `same_length` is True instead of False"),
    "a text that is no length": ({"readback": {"settings": {"tgt_len": "5x"}}}, "its `tgt_len` is 5x instead of 5"),
    "fp16 that a GPU computes in fp32": (
        HALF_ON_GPU | {"compute": "fp32", "readback": {"products": {"float32": 17}}},
        "computed in fp32 instead of fp16 (17 float32)",
    ),
    "an engine that is half in fp32": (
        {"name": "trt", **HALF_ON_GPU, "compute": "fp16+fp32", "readback": {"products": {"float16": 9, "float32": 1}}},
        "computed in fp16+fp32 instead of fp16",
    ),
    "fp32 computed in fp16": ({"compute": "fp16", "readback": {"products": {"float16": 17}}}, "computed in fp16 instead of fp32"),
    "a speed that is not there": (HALF | {"compute": "fp16", "readback": {"products": {"float32": 17}}}, "in fp32, but it says fp16"),
    "another length": ({"readback": {"settings": {"tgt_len": 6}}}, "its `tgt_len` is 6 instead of 5"),
    "another extension": ({"readback": {"settings": {"ext_len": 3}}}, "its `ext_len` is 3 instead of 0"),
    "another head": ({"readback": {"settings": {"head": "logits"}}}, "its `head` is logits instead of nll"),
}


@pytest.mark.parametrize("changes", HONEST.values(), ids=HONEST)
def test_an_honest_claim_passes(changes: dict[str, Any]) -> None:
    claims.audit(info_of(**changes))


@pytest.mark.parametrize(("changes", "reason"), LIES.values(), ids=LIES)
def test_a_claim_that_is_not_so_is_named_and_ends_with_1(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError) as caught:
        claims.audit(info_of(origin="DIR", **changes))
    assert reason in caught.value.message
    assert caught.value.message.startswith("DIR is not what it claims to be")
    assert caught.value.exit_code == 1


def rewritten(folder: Path, change: Callable[[Manifest], Manifest]) -> Path:
    """Change the manifest of an artifact so that it is whole, and says something else."""
    manifest = change(manifests.read_manifest(folder))
    (folder / manifests.FILE_NAME).unlink()
    manifests.write_manifest(folder, manifest, manifest.files)
    return folder


ENGINE = EngineFacts(builder="tensorrt", builder_version="11.4.0.106", target="t4", compute_capability="7.5")


def settings(**changes: Any) -> Callable[[Manifest], Manifest]:
    return lambda manifest: dataclasses.replace(manifest, settings=dataclasses.replace(manifest.settings, **changes))


ARTIFACT_LIES: dict[str, tuple[str, Callable[[Manifest], Manifest], str]] = {
    "fp16 over an fp32 graph": ("onnx", settings(dtype="fp16"), "instead of float16"),
    "fp16 over an fp32 script": ("torchscript", settings(dtype="fp16"), "instead of float16"),
    "another length of a script": ("torchscript", settings(tgt_len=6), "its `tgt_len` is 5 instead of 6"),
    "another head of a script": ("torchscript", settings(head="logits"), "its `head` is nll instead of logits"),
    "another clamping of a graph": ("onnx", settings(clamp_len=3), "its `clamp_len` is None instead of 3"),
    "another rule of a graph": ("onnx", settings(same_length_rule="mem_len"), "its `same_length_rule` is mem_len+1 instead of mem_len"),
    "another vocabulary of a graph": (
        "onnx",
        lambda manifest: dataclasses.replace(manifest, vocabulary_sha256="0" * 64),
        "instead of 0000",
    ),
    "another checkpoint of a graph": (
        "onnx",
        lambda manifest: dataclasses.replace(manifest, source=dataclasses.replace(manifest.source, checkpoint_sha256="0" * 64)),
        "instead of 0000",
    ),
    "precisions that are not recorded so": (
        "torchscript",
        lambda manifest: dataclasses.replace(manifest, precisions={"weights": {"float16": 3}}),
        "its manifest records weights of 3 float16, but there are 24 float32",
    ),
}


@pytest.mark.parametrize(("name", "change", "reason"), ARTIFACT_LIES.values(), ids=ARTIFACT_LIES)
def test_an_artifact_that_lies_is_not_opened(
    exports: Exports, tmp_path: Path, name: str, change: Callable[[Manifest], Manifest], reason: str
) -> None:
    shutil.copytree(getattr(exports, name), tmp_path / "copy")
    with pytest.raises(ValidationError) as caught:
        open_artifact(rewritten(tmp_path / "copy", change))
    assert reason in caught.value.message


def test_a_graph_that_was_exchanged_for_one_of_other_settings_is_found(
    exports: Exports, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It has the same weights, inputs and outputs, and every checksum is right."""
    request = ExportRequest(checkpoint=exports.checkpoint, out=tmp_path / "other", format="onnx", clamp_len=1, same_length=True)
    export_artifact(request)
    shutil.copytree(exports.onnx, tmp_path / "copy")
    for path in (tmp_path / "other").glob("model.onnx*"):
        shutil.copy(path, tmp_path / "copy")
    rewritten(tmp_path / "copy", lambda manifest: manifest)
    assert main(["eval", "--artifact", str(tmp_path / "copy"), "--data", str(exports.data)]) == 1
    said = capsys.readouterr().err
    assert "its `clamp_len` is 1 instead of None; its `same_length` is True instead of False" in said


RECORDS: dict[str, tuple[dict[str, Any], dict[str, dict[str, int]], str]] = {
    "the engine that was read": (
        read(products={"float16": 9}),
        {"engine_products": {"float16": 9}, "network_products": {"float16": 12}},
        "",
    ),
    "other products": (
        read(products={"float16": 9}),
        {"engine_products": {"float32": 9}},
        "its manifest records products of 9 float32, but there are 9 float16",
    ),
    "one product more": (
        read(products={"float16": 9}),
        {"engine_products": {"float16": 9, "float32": 1}},
        "9 float16, 1 float32, but there",
    ),
    "another network": (
        read(products={"float16": 9}),
        {"network_products": {"float32": 12}},
        "it was built of a network with products of 12 float32 instead of float16",
    ),
    "a network that is half in fp32": (
        read(layers={"float16": 9}),
        {"network_products": {"float16": 1, "float32": 1}},
        "instead of float16",
    ),
    "other layers": (
        read(layers={"float16": 9}),
        {"engine_layers": {"float32": 9}},
        "its manifest records layers of 9 float32, but there are 9 float16",
    ),
    "the layers that were read": (read(layers={"float16": 9}), {"engine_layers": {"float16": 8, "unknown": 1}}, ""),
}


@pytest.mark.parametrize(("found", "recorded", "reason"), RECORDS.values(), ids=RECORDS)
def test_an_engine_is_compared_with_what_its_manifest_records(
    exports: Exports, found: dict[str, Any], recorded: dict[str, dict[str, int]], reason: str
) -> None:
    manifest = dataclasses.replace(manifests.read_manifest(exports.onnx), precisions=recorded)
    info = info_of(**ENGINE_16 | found)
    if not reason:
        claims.audit(info, manifest)
        return
    with pytest.raises(ValidationError) as caught:
        claims.audit(info, manifest)
    assert reason in caught.value.message


def test_what_no_product_was_read_of_is_unknown() -> None:
    assert claims.compute_type({}) == "unknown"
    assert claims.compute_type({"float16": 2, "float32": 1}) == "fp16+fp32"


@pytest.mark.parametrize("command", ["eval", "parity", "bench"])
def test_every_command_that_runs_an_artifact_audits_it(
    exports: Exports, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    shutil.copytree(exports.torchscript, tmp_path / "copy")
    rewritten(tmp_path / "copy", settings(dtype="fp16"))
    checkpoint = ["--checkpoint", str(exports.checkpoint)] if command == "parity" else []
    assert main([command, "--artifact", str(tmp_path / "copy"), *checkpoint]) == 1
    assert "is not what it claims to be: its weights are of 24 float32 instead of float16" in capsys.readouterr().err


def test_a_script_of_fp16_with_a_manifest_of_fp32_is_not_opened(exports: Exports, tmp_path: Path) -> None:
    out = tmp_path / "half"
    export_artifact(ExportRequest(checkpoint=exports.checkpoint, out=out, format="torchscript", dtype="fp16"))
    runtime = open_artifact(out)
    assert (runtime.info.dtype, runtime.info.compute, runtime.info.readback["weights"]) == ("fp16", "fp16", {"float16": 24})
    with pytest.raises(ValidationError, match="24 float16 instead of float32"):
        open_artifact(rewritten(out, settings(dtype="fp32")))
    with pytest.raises(ValidationError, match="`memory_dtype` is fp16 instead of fp32"):
        open_artifact(rewritten(out, settings(dtype="fp16", memory_dtype="fp32")))


@pytest.mark.parametrize(
    ("format_name", "engine", "file", "reason"),
    [
        ("trt", ENGINE, "model.plan", ""),
        ("trt-rtx", ENGINE, "model.plan", "holds an engine of tensorrt instead of tensorrt_rtx"),
        ("trt", ENGINE, "model.onnx", "holds model.onnx instead of model.plan"),
        ("onnx", None, "model.onnx", ""),
        ("torchscript", None, "model.onnx", "holds model.onnx instead of model.pt"),
    ],
)
def test_a_format_that_is_another_one_is_found_by_the_files_and_the_builder(
    exports: Exports, format_name: Any, engine: EngineFacts | None, file: str, reason: str
) -> None:
    manifest = manifests.read_manifest(exports.onnx)
    source, batch = manifest.source, manifest.batch
    if engine is not None:
        source = dataclasses.replace(source, parent=Parent(manifest_sha256="0" * 64, format="onnx"))
        batch = BatchRange(max=8)
    files = {file: manifest.files["model.onnx"]}
    manifest = dataclasses.replace(manifest, format=format_name, engine=engine, files=files, source=source, batch=batch)
    if not reason:
        claims.check_format(manifest, Path("DIR"))
        return
    with pytest.raises(ValidationError, match=reason):
        claims.check_format(manifest, Path("DIR"))


def test_an_onnx_file_is_read_like_onnx_reads_it(exports: Exports) -> None:
    path = exports.onnx / "model.onnx"
    model = onnx.load(str(path))
    matrices = [tensor for tensor in model.graph.initializer if len(tensor.dims) >= 2 and tensor.data_type == onnx.TensorProto.FLOAT]
    assert claims.stored_matrices(path) == {"float32": len(matrices)}
    assert len(matrices) > 10


def test_weights_in_a_file_of_their_own_are_counted_too(exports: Exports, tmp_path: Path) -> None:
    model = onnx.load(str(exports.onnx / "model.onnx"))
    onnx.save_model(model, str(tmp_path / "model.onnx"), save_as_external_data=True, location="data", size_threshold=0)
    assert claims.stored_matrices(tmp_path / "model.onnx") == claims.stored_matrices(exports.onnx / "model.onnx")


@pytest.mark.parametrize("content", [b"\x0f", b"PK\x03\x04 no graph", b"\x3a\xff\x01\x2a", b"\xff" * 12])
def test_what_is_no_onnx_file_is_one_clear_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(ArtifactError, match="cannot be read as ONNX"):
        claims.stored_matrices(tmp_path / "model.onnx")


def test_weights_in_a_file_that_has_no_checksum_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("txl_deploy.export.onnx.EXTERNAL_DATA_BYTES", 1000)
    out = tmp_path / "external"
    write_checkpoint(tmp_path / "c.pt", small_config(n_layer=1, d_inner=300))
    export_artifact(ExportRequest(checkpoint=tmp_path / "c.pt", out=out, format="onnx", batch_size=3))
    manifest = manifests.read_manifest(out)
    assert "model.onnx_data" in manifest.files
    manifests.write_manifest(out, dataclasses.replace(manifest, files={}), [name for name in manifest.files if name != "model.onnx_data"])
    with pytest.raises(ManifestError, match=r"takes weights from model\.onnx_data, which its manifest does not list"):
        open_artifact(out)
