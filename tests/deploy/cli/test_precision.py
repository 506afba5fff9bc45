"""`txl eval` and `txl bench` in fp16 and in every runtime of a checkpoint: what runs is said, checked, and refused where it cannot be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.conftest import Exports
from tests.support import trace_only
from txl_deploy.cli.main import main
from txl_deploy.export.artifact import ExportRequest, export_artifact
from txl_deploy.parity.tolerances import TOLERANCES

Capture = pytest.CaptureFixture[str]

FEW = ["--batch-sizes", "2", "--duration", "0", "--min-samples", "3", "--max-samples", "3", "--accept-invalid"]


def run_json(capsys: Capture, *arguments: object) -> dict[str, Any]:
    assert main([*map(str, arguments), "--json"]) == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    return document


@pytest.fixture
def reference(exports: Exports, capsys: Capture) -> dict[str, Any]:
    """What eager PyTorch says of the test split in fp32."""
    return run_json(capsys, "eval", "--checkpoint", exports.checkpoint)


@pytest.mark.parametrize(
    ("runtime", "compute"),
    [("pytorch", "fp16"), ("compiled", "fp16"), ("torchscript", "fp16"), pytest.param("onnx", "fp32", marks=pytest.mark.slow)],
)
def test_a_checkpoint_is_evaluated_in_fp16_by_every_runtime(
    exports: Exports, capsys: Capture, monkeypatch: pytest.MonkeyPatch, reference: dict[str, Any], runtime: str, compute: str
) -> None:
    trace_only(monkeypatch)
    document = run_json(capsys, "eval", "--checkpoint", exports.checkpoint, "--runtime", runtime, "--dtype", "fp16")
    assert (document["runtime"], document["dtype"], document["compute"], document["memory_dtype"]) == (runtime, "fp16", compute, "fp16")
    assert document["head"] == "nll"
    assert set(document["readback"]["weights"]) == {"float16"}
    expected = reference["nll_nats_per_token"]
    assert document["nll_nats_per_token"] == pytest.approx(expected, rel=TOLERANCES["fp16"].mean)
    assert document["nll_nats_per_token"] != expected, "fp16 rounds"


def test_fp32_is_the_default_and_says_what_it_computes_in(reference: dict[str, Any]) -> None:
    assert (reference["dtype"], reference["compute"], reference["memory_dtype"]) == ("fp32", "fp32", "fp32")
    assert set(reference["readback"]["weights"]) == {"float32"}


def test_fp16_is_short_for_the_type_and_names_the_file_of_samples(exports: Exports, capsys: Capture, tmp_path: Path) -> None:
    document = run_json(capsys, "eval", "--checkpoint", exports.checkpoint, "--fp16", "--save-data", "--work-dir", tmp_path)
    assert document["dtype"] == "fp16"
    assert (tmp_path / "eval_data_16_fp16_pytorch.json").exists()


def test_an_onnx_graph_says_what_its_nodes_run_on(exports: Exports, capsys: Capture) -> None:
    readback = run_json(capsys, "eval", "--artifact", exports.onnx)["readback"]
    assert list(readback["nodes"]) == ["CPUExecutionProvider"]
    assert list(readback["products"]) == ["float32"]


def test_the_type_of_an_exported_model_is_fixed(exports: Exports, capsys: Capture) -> None:
    assert main(["eval", "--artifact", str(exports.onnx), "--dtype", "fp32"]) == 0
    capsys.readouterr()
    assert main(["eval", "--artifact", str(exports.onnx), "--fp16"]) == 2
    assert "was exported for `--dtype` fp32, but fp16 was asked for" in capsys.readouterr().err


@pytest.fixture(scope="module")
def logits(exports: Exports, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an artifact that scores no text."""
    out = tmp_path_factory.mktemp("logits") / "logits"
    export_artifact(ExportRequest(checkpoint=exports.checkpoint, out=out, format="torchscript", head="logits"))
    return out


@pytest.mark.parametrize("command", ["eval", "bench"])
def test_a_model_that_yields_logits_is_refused_before_it_is_loaded(
    exports: Exports, capsys: Capture, monkeypatch: pytest.MonkeyPatch, logits: Path, command: str
) -> None:
    import torch

    def loaded(*arguments: Any, **keywords: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(torch.jit, "load", loaded)
    assert main([command, "--artifact", str(logits)]) == 2
    error = capsys.readouterr().err
    assert "yields logits of the next token, but this takes the nll of given targets" in error
    assert "Export the checkpoint again with `--head nll`." in error


# Benchmarks


def test_a_checkpoint_is_measured_in_several_runtimes_of_fp16_against_fp32(
    exports: Exports, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace_only(monkeypatch)
    options = ["--runtimes", "pytorch,compiled,torchscript", "--dtype", "fp16"]
    document = run_json(capsys, "bench", "--checkpoint", exports.checkpoint, *options, *FEW)
    rows = [(row["runtime"], row["dtype"], row["is_reference"], row["verified"]) for row in document["rows"]]
    assert rows == [
        ("pytorch", "fp32", True, True),
        ("pytorch", "fp16", False, True),
        ("compiled", "fp16", False, True),
        ("torchscript", "fp16", False, True),
    ]
    nll = document["rows"][0]["nll_nats_per_token"]
    bounds = [row["tolerance"] for row in document["rows"]]
    assert bounds[1:] == [pytest.approx(TOLERANCES["fp16"].mean * nll)] * 3
    assert bounds[0] == pytest.approx(TOLERANCES["fp32"].mean * nll)


def test_the_reference_is_not_measured_twice(exports: Exports, capsys: Capture) -> None:
    document = run_json(capsys, "bench", "--checkpoint", exports.checkpoint, "--runtimes", "pytorch,pytorch", *FEW)
    assert [row["runtime"] for row in document["rows"]] == ["pytorch"]


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (["--checkpoint", "{checkpoint}", "--runtimes", "pytorch,onxx"], "Did you mean `onnx`?"),
        (["--artifact", "{onnx}", "--runtimes", "compiled"], "Add `--checkpoint FILE`"),
        (["--artifact", "{onnx}", "--dtype", "fp16"], "Add `--checkpoint FILE`"),
        (["--checkpoint", "{checkpoint}", "--dtype", "bf16"], "bf16 is for training only"),
    ],
)
def test_what_cannot_be_measured_is_refused(exports: Exports, capsys: Capture, arguments: list[str], fragment: str) -> None:
    filled = [part.format(checkpoint=exports.checkpoint, onnx=exports.onnx) for part in arguments]
    assert main(["bench", *filled, *FEW]) == 2
    assert fragment in capsys.readouterr().err


def test_an_export_of_one_batch_size_is_scored_and_measured_with_that(exports: Exports, capsys: Capture, tmp_path: Path) -> None:
    fixed = tmp_path / "fixed"
    command = ["export", "--checkpoint", exports.checkpoint, "--format", "torchscript", "--fp16", "--batch-size", 3, "--out", fixed]
    run_json(capsys, *command)
    assert run_json(capsys, "eval", "--artifact", fixed, "--checkpoint", exports.checkpoint)["batch_size"] == 3
    quick = ["--duration", "0", "--min-samples", "3", "--max-samples", "3", "--accept-invalid"]
    rows = run_json(capsys, "bench", "--artifact", fixed, *quick)["rows"]
    assert [(row["batch_size"], row["compute"]) for row in rows] == [(3, "fp16")]
    assert main(["eval", "--artifact", str(fixed), "--batch-size", "4"]) == 2
    assert "`batch_size` must be 3" in capsys.readouterr().err


def test_a_table_says_where_fp16_is_computed_in_fp32(fp16_onnx: Path, capsys: Capture) -> None:
    assert main(["bench", "--artifact", str(fp16_onnx), "--unvalidated", *FEW]) == 0
    assert "ONNX Runtime FP16 (computed in FP32)" in capsys.readouterr().out
    assert main(["eval", "--artifact", str(fp16_onnx)]) == 0
    assert "computed in fp32" in capsys.readouterr().out
