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
from tests.support import small_config
from txl_deploy import claims
from txl_deploy import manifest as manifests
from txl_deploy.cli.main import main
from txl_deploy.export.artifact import ExportRequest, export_artifact
from txl_deploy.manifest import EngineFacts, Manifest
from txl_deploy.runtimes.base import RuntimeInfo
from txl_deploy.runtimes.registry import open_artifact
from txl_train.errors import ArtifactError, ValidationError


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
    "TF32": (CUDA | {"compute": "tf32", "readback": {"products": {"float32": 17}}}, "computed in fp32, but it says tf32"),
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
    "another format": ("onnx", lambda manifest: dataclasses.replace(manifest, format="torchscript"), "model.onnx instead of model.pt"),
    "an engine that is a graph": (
        "onnx",
        lambda manifest: dataclasses.replace(manifest, format="trt", engine=ENGINE),
        "model.onnx instead of model.plan",
    ),
    "another length of a script": ("torchscript", settings(tgt_len=6), "its `tgt_len` is 5 instead of 6"),
    "another head of a script": ("torchscript", settings(head="logits"), "its `head` is nll instead of logits"),
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
    ("format_name", "engine", "reason"),
    [
        ("trt", ENGINE, ""),
        ("trt-rtx", ENGINE, "holds an engine of tensorrt instead of tensorrt_rtx"),
    ],
)
def test_an_engine_of_another_builder_is_found_by_its_manifest(
    exports: Exports, format_name: Any, engine: EngineFacts, reason: str
) -> None:
    manifest = manifests.read_manifest(exports.onnx)
    files = {"model.plan": manifest.files["model.onnx"]}
    manifest = dataclasses.replace(manifest, format=format_name, engine=engine, files=files)
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
