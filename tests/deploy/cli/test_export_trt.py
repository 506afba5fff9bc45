"""`txl export --format trt` end to end: a real engine for a T4 without any GPU, its verification, and why it does not run here."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.deploy.conftest import Exports
from txl_deploy.cli.main import main
from txl_deploy.manifest import read_manifest
from txl_deploy.trt import artifact as artifacts
from txl_deploy.trt import cuda
from txl_train.files import file_sha256

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this be a machine without a GPU."""
    monkeypatch.setattr(cuda, "devices", list)
    monkeypatch.setattr("txl_deploy.compat.devices", list)


@pytest.mark.slow
def test_from_a_checkpoint_to_an_engine_for_a_t4(exports: Exports, tmp_path: Path, capsys: Capture) -> None:
    pytest.importorskip("tensorrt_rtx")
    out, graph = tmp_path / "t4", tmp_path / "onnx"
    arguments = ["export", "--checkpoint", str(exports.checkpoint), "--format", "trt", "--target", "t4", "--keep-onnx", str(graph)]
    assert main([*arguments, "--data", str(exports.data), "--head", "logits", "--memory-dtype", "fp32", "--out", str(out)]) == 0
    told = capsys.readouterr().out
    assert "for t4: compute capability 7.5; built by TensorRT-RTX" in told
    settings = read_manifest(out).settings
    assert (settings.dtype, settings.memory_dtype, settings.head) == ("fp16", "fp32", "logits")
    assert main(["verify", str(out), "--checkpoint", str(exports.checkpoint), "--parent", str(graph)]) == 0


def test_from_a_graph_to_an_engine_that_verifies_and_says_why_it_does_not_run(
    exports: Exports, fp16_onnx: Path, tmp_path: Path, capsys: Capture
) -> None:
    pytest.importorskip("tensorrt_rtx")
    out = tmp_path / "t4"
    arguments = ["export", "--artifact", str(fp16_onnx), "--format", "trt", "--target", "t4", "--batch-range", "1,8,32"]
    assert main([*arguments, "--out", str(out), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["built"] is True
    assert document["files"]["model.plan"]["sha256"] == file_sha256(out / "model.plan")
    assert document["batch"] == {"min": 1, "opt": 8, "max": 32}
    assert main(["verify", str(out), "--checkpoint", str(exports.checkpoint), "--parent", str(fp16_onnx)]) == 0
    capsys.readouterr()
    assert main(["inspect", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["engine"]["compute_capability"] == "7.5"
    for command in ("eval", "bench", "parity"):
        extra = {"eval": [], "bench": ["--batch-sizes", "1"], "parity": ["--checkpoint", str(exports.checkpoint)]}[command]
        assert main([command, "--artifact", str(out), *extra]) == 3, command
        captured = capsys.readouterr()
        assert "is an engine for compute capability 7.5 (t4), and this machine has no NVIDIA GPU" in captured.err
        assert "Traceback" not in captured.err


def test_an_engine_that_cannot_be_built_here_is_a_kit_and_ends_with_3(fp16_onnx: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "kit"
    assert main(["export", "--artifact", str(fp16_onnx), "--format", "trt", "--target", "v100", "--out", str(out), "--json"]) == 3
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert (document["built"], document["kit"]) == (False, str(out))
    assert "it needs a GPU of compute capability 7.0, and there is none here" in captured.err
    assert f"`{document['build_command']}`" in captured.err
    assert (out / "onnx" / "model.onnx").exists()


def test_a_kit_that_was_asked_for_ends_with_0(fp16_onnx: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "kit"
    assert main(["export", "--artifact", str(fp16_onnx), "--format", "trt", "--target", "v100", "--kit", "--out", str(out)]) == 0
    assert "a kit for v100 (compute capability 7.0)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "code", "told"),
    [
        (["--format", "trt", "--target", "t44"], 2, "Did you mean `t4`?"),
        (["--format", "trt"], 2, "Name it with `--target NAME`: "),
        (["--format", "trt", "--target", "t4", "--batch-range", "8,4,16"], 2, "must rise from 1 or more"),
        (["--format", "trt", "--target", "t4", "--batch-range", "some"], 2, "`some` is no range of batch sizes"),
        (["--format", "trt", "--target", "t4", "--timing-cache", "absent.cache"], 2, "absent.cache cannot be read"),
        (["--format", "trt-rtx", "--target", "v100"], 3, "TensorRT-RTX builds no engine for v100"),
        (["--format", "trt", "--target", "t4", "--mem-len", "4"], 2, "`--mem-len` says how to export a checkpoint"),
        (["--format", "trt", "--target", "t4", "--head", "nll"], 2, "`--head` says how to export a checkpoint"),
        (["--format", "trt", "--target", "t4", "--hardware-compatibility", "ampere-plus"], 2, "TensorRT-RTX 1.7.1.116 has no `--hardware-"),
        (["--format", "trt", "--target", "t4", "--kit", "--hardware-compatibility", "ampere-plus"], 2, "t4 has 7.5"),
        (["--format", "trt", "--target", "v100", "--hardware-compatibility", "same-compute-capability"], 2, "begins with TensorRT 10.13"),
        (["--format", "onnx", "--hardware-compatibility", "none"], 2, "is for engines, not for `--format onnx`"),
        (["--format", "trt", "--batch-size", "4", "--batch-range", "1,2,4"], 2, "contradict each other"),
        (["--format", "trt", "--target", "v100", "--timing-cache", __file__], 2, "Only a build takes a timing cache"),
    ],
    ids=[
        "unknown target",
        "no target",
        "falling range",
        "no range",
        "no timings",
        "no such engine",
        "a length",
        "a head",
        "no compatibility of that builder",
        "no compatibility of that GPU",
        "no compatibility of that version",
        "no engine",
        "two ranges",
        "timings of a kit",
    ],
)
def test_what_cannot_be_is_told_before_any_work(
    fp16_onnx: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, options: list[str], code: int, told: str
) -> None:
    for name in ("export_artifact", "build_engine", "write_kit"):
        monkeypatch.setattr(artifacts, name, lambda *_, name=name, **__: pytest.fail(f"{name} was called"))
    assert main(["export", "--artifact", str(fp16_onnx), *options, "--out", str(tmp_path / "e")]) == code
    captured = capsys.readouterr()
    assert told in captured.err
    assert captured.out == ""
    assert list(tmp_path.iterdir()) == []


def test_without_a_folder_it_is_named_for_what_is_in_it(fp16_onnx: Path, tmp_path: Path, capsys: Capture) -> None:
    graph = tmp_path / "graph"
    shutil.copytree(fp16_onnx, graph)
    options = ["--target", "a100", "--kit", "--hardware-compatibility", "ampere-plus", "--optimization-level", "3"]
    assert main(["export", "--artifact", str(graph), "--format", "trt", *options]) == 0
    capsys.readouterr()
    kit = json.loads((tmp_path / "trt-a100" / "kit.json").read_text())
    assert kit["manifest"]["engine"]["hardware_compatibility"] == "ampere_plus"
    assert kit["optimization_level"] == 3


def test_a_kit_is_replaced_on_request_but_not_with_what_was_built_in_it(fp16_onnx: Path, tmp_path: Path, capsys: Capture) -> None:
    command = ["export", "--artifact", str(fp16_onnx), "--format", "trt", "--target", "v100", "--kit", "--out", str(tmp_path / "kit")]
    assert main(command) == 0
    assert main(command) == 2
    assert main([*command, "--overwrite"]) == 0
    (tmp_path / "kit" / "engine").mkdir()
    assert main([*command, "--overwrite"]) == 2
    assert "is no exported model" in capsys.readouterr().err
    assert (tmp_path / "kit" / "engine").exists()


def test_a_graph_of_fp32_is_refused_for_turing_with_the_option_that_mends_it(exports: Exports, tmp_path: Path, capsys: Capture) -> None:
    arguments = ["export", "--artifact", str(exports.onnx), "--format", "trt-rtx", "--target", "t4", "--out", str(tmp_path / "e")]
    assert main(arguments) == 3
    told = capsys.readouterr().err
    assert "TensorRT-RTX refuses matrix products of fp32 for compute capability 7.5" in told
    assert "--dtype fp16" in told
    assert list(tmp_path.iterdir()) == []
