"""`txl export` and `txl parity` from the command line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from onnx import numpy_helper

from tests.deploy.conftest import Exports
from tests.support import small_config, write_checkpoint
from txl_deploy.cli.main import main
from txl_deploy.manifest import read_manifest, write_manifest

Capture = pytest.CaptureFixture[str]


def test_export_prints_what_it_wrote_and_how_it_compared(exports: Exports, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "made" / "deep"
    assert main(["export", "--checkpoint", str(exports.checkpoint), "--format", "torchscript", "-o", str(out)]) == 0
    text = capsys.readouterr().out
    assert str(out) in text
    assert "model.pt" in text
    assert "Compared with the checkpoint over 6 segments" in text


def test_export_json_is_one_document_with_the_checksums(exports: Exports, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "a"
    assert main(["export", "--checkpoint", str(exports.checkpoint), "--format", "torchscript", "--out", str(out), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["files"]["model.pt"]["sha256"] == read_manifest(out).files["model.pt"].sha256
    assert document["checked"]["passed"] is True


def test_a_clamp_of_minus_one_turns_clamping_off(tmp_path: Path, capsys: Capture) -> None:
    write_checkpoint(tmp_path / "c.pt", small_config(clamp_len=4))
    assert (
        main(
            ["export", "--checkpoint", str(tmp_path / "c.pt"), "--format", "torchscript", "--out", str(tmp_path / "a"), "--clamp-len", "-1"]
        )
        == 0
    )
    assert read_manifest(tmp_path / "a").settings.clamp_len is None


@pytest.mark.parametrize("name", ["onnx", "torchscript"])
def test_parity_of_a_faithful_export_passes(exports: Exports, capsys: Capture, name: str) -> None:
    assert main(["parity", "--checkpoint", str(exports.checkpoint), "--artifact", str(getattr(exports, name)), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["passed"] is True
    assert document["n_segments"] == len(document["segments"]) >= 2 * document["receptive_field_segments"]
    assert all(part["max_abs_delta_nll"] <= document["tolerance"]["token_nll"] for part in document["segments"])


def test_parity_for_people_shows_every_segment_and_the_verdict(exports: Exports, capsys: Capture) -> None:
    assert main(["parity", "--checkpoint", str(exports.checkpoint), "--artifact", str(exports.torchscript), "--segments", "7"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("PASSED: the worst token differs by")
    assert sum(line.split()[:1] == [str(i)] for line in lines for i in range(7)) == 7


def test_parity_shows_equivalence_trend_and_distributions_and_draws_them(exports: Exports, tmp_path: Path, capsys: Capture) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra `report`")
    plot, out = tmp_path / "deep" / "drift.png", tmp_path / "parity.json"
    arguments = ["parity", "--checkpoint", str(exports.checkpoint), "--artifact", str(exports.torchscript)]
    assert main([*arguments, "--batch-size", "2", "--plot", str(plot), "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert plot.read_bytes().startswith(b"\x89PNG")
    for line in ("trend                  no growth", "distributions          KL", "mean Δnll", "memory error by layer"):
        assert line in text
    document = json.loads(out.read_text())
    assert document["upper_bound_mean_nll"] <= document["tolerance"]["mean_nll"]
    assert document["trend"]["judged"] is True
    assert document["distribution"]["n_segments"] == 16
    assert len(document["memory_error_by_layer"]) == 2


def test_parity_without_its_two_sides_or_a_self_test_is_refused(exports: Exports, capsys: Capture) -> None:
    assert main(["parity", "--checkpoint", str(exports.checkpoint)]) == 2
    assert "`--artifact` is missing" in capsys.readouterr().err
    assert main(["parity", "--self-test", "--artifact", str(exports.onnx)]) == 2


def test_an_artifact_of_another_checkpoint_fails_with_1(exports: Exports, tmp_path: Path, capsys: Capture) -> None:
    write_checkpoint(tmp_path / "other.pt", small_config(cutoffs=(5, 9, 16), div_val=2), data=exports.data, seed=9)
    assert main(["parity", "--checkpoint", str(tmp_path / "other.pt"), "--artifact", str(exports.onnx)]) == 1
    assert "was not made from" in capsys.readouterr().err


def test_a_runtime_that_computes_something_else_fails_with_1_and_says_where(
    exports: Exports, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from txl_deploy.runtimes.torchscript import TorchScriptRuntime

    real = TorchScriptRuntime.initial_memory
    monkeypatch.setattr(TorchScriptRuntime, "initial_memory", lambda self, batch_size: _full(real(self, batch_size)))
    assert main(["parity", "--checkpoint", str(exports.checkpoint), "--artifact", str(exports.torchscript)]) == 1
    captured = capsys.readouterr()
    assert "FAILED: a token's nll differs" in captured.out
    assert "does not compute what" in captured.err


def test_numbers_that_are_not_finite_fail_with_1_and_leave_valid_json(
    exports: Exports, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from txl_deploy.runtimes.torchscript import TorchScriptRuntime

    real = TorchScriptRuntime.step
    monkeypatch.setattr(TorchScriptRuntime, "step", lambda self, *tensors: _not_a_number(real(self, *tensors)))
    arguments = ["parity", "--checkpoint", str(exports.checkpoint), "--artifact", str(exports.torchscript)]
    assert main([*arguments, "--json", "--out", str(tmp_path / "parity.json")]) == 1
    document = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert document["passed"] is False
    assert document["max_abs_delta_nll"] is None
    assert json.loads((tmp_path / "parity.json").read_text()) == document


def replaced_graph(artifact: Path, folder: Path, change: Callable[[onnx.ModelProto], None]) -> Path:
    """Return a copy of an artifact with another graph, which its manifest vouches for."""
    copy = folder / "changed"
    shutil.copytree(artifact, copy)
    model = onnx.load(str(copy / "model.onnx"))
    change(model)
    onnx.save(model, str(copy / "model.onnx"))
    manifest = read_manifest(copy)
    (copy / "manifest.json").unlink()
    write_manifest(copy, manifest, list(manifest.files))
    return copy


def with_a_wrong_bias_in_layer_1(model: onnx.ModelProto) -> None:
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == "decoder.layers.1.feed_forward.outer.bias")
    bias = numpy_helper.to_array(tensor).copy()
    bias[2] += 0.3  # one of them: the normalisation takes away what all have in common
    tensor.CopyFrom(numpy_helper.from_array(bias, tensor.name))


@pytest.mark.parametrize("fixture", ["exports", "fp16_onnx", "logits_onnx"])
def test_bisect_names_the_layer_of_a_graph_that_fails(
    request: pytest.FixtureRequest, exports: Exports, tmp_path: Path, capsys: Capture, fixture: str
) -> None:
    made = request.getfixturevalue(fixture)
    artifact = replaced_graph(made.onnx if isinstance(made, Exports) else made, tmp_path, with_a_wrong_bias_in_layer_1)
    arguments = ["parity", "--checkpoint", str(exports.checkpoint), "--artifact", str(artifact)]
    assert main([*arguments, "--bisect"]) == 1
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert lines[-1].startswith("FAILED: ")
    assert any(line.startswith("Layer 1 is the first to leave the bound: decoder.layers.1.feed_forward.outer/linear_") for line in lines)
    assert [line.split()[0:2] for line in lines if line.startswith("layer ") and "up to" not in line] == [["layer", "0"], ["layer", "1"]]
    assert "layer 1 is the first" in captured.err
    assert main([*arguments, "--bisect", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)["bisection"]
    assert (found["place"], found["tensor"].partition("/")[0]) == ("layer 1", "decoder.layers.1.feed_forward.outer")
    assert len(found["tensors"]) > 40


def test_a_failure_without_bisect_says_that_there_is_one(exports: Exports, tmp_path: Path, capsys: Capture) -> None:
    artifact = replaced_graph(exports.onnx, tmp_path, with_a_wrong_bias_in_layer_1)
    assert main(["parity", "--checkpoint", str(exports.checkpoint), "--artifact", str(artifact)]) == 1
    assert "txl parity --bisect" in capsys.readouterr().err


def test_bisect_of_a_faithful_graph_shows_how_the_error_grows(exports: Exports, fp16_onnx: Path, capsys: Capture) -> None:
    assert main(["parity", "--checkpoint", str(exports.checkpoint), "--artifact", str(fp16_onnx), "--bisect"]) == 0
    out = capsys.readouterr().out
    assert "No tensor leaves the bound" in out
    assert sum(line.startswith(("embedding ", "layer ", "head ")) for line in out.splitlines()) == 4
    assert "fp16 computed in fp32, kv memory in fp16" in out
    assert "reference  pytorch (eager, fp32, kv memory in fp32)" in out


def test_bisect_of_what_is_no_onnx_graph_is_refused(exports: Exports, capsys: Capture) -> None:
    assert main(["parity", "--checkpoint", str(exports.checkpoint), "--artifact", str(exports.torchscript), "--bisect"]) == 2
    assert "--format onnx" in capsys.readouterr().err


def test_parity_of_a_graph_that_scores_the_next_token_speaks_of_words(exports: Exports, logits_onnx: Path, capsys: Capture) -> None:
    assert main(["parity", "--checkpoint", str(exports.checkpoint), "--artifact", str(logits_onnx)]) == 0
    out = capsys.readouterr().out
    assert "words' scores as the next one" in out
    assert "PASSED: the worst word differs by" in out
    assert "hidden memory in fp32" in out


@pytest.mark.parametrize("options", [["--head", "log-probs"], ["--fp16"], ["--memory-dtype", "fp16"], ["--batch-size", "2", "--fp16"]])
def test_parity_knows_every_head_type_and_batch_size(exports: Exports, tmp_path: Path, capsys: Capture, options: list[str]) -> None:
    out = tmp_path / "a"
    common = ["--checkpoint", str(exports.checkpoint)]
    assert main(["export", *common, "--format", "torchscript", "--out", str(out), *options]) == 0
    capsys.readouterr()
    assert main(["parity", *common, "--artifact", str(out), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["head"] == ("log_probs" if "log-probs" in options else "nll")
    assert document["dtype"] == document["compute"] == ("fp16" if "--fp16" in options else "fp32")
    assert document["memory_dtype"] == ("fp16" if {"--fp16", "--memory-dtype"} & set(options) else "fp32")
    assert document["batch_size"] == (2 if "--batch-size" in options else 3)
    assert document["bisection"] is None


@pytest.mark.parametrize(
    "command",
    [
        ["eval", "--checkpoint", "{c}"],
        ["parity", "--checkpoint", "{c}", "--artifact", "{a}"],
        ["bench", "--artifact", "{a}", "--batch-sizes", "1"],
        ["report", "--work-dir", "{w}"],
        ["data", "stats", "--checkpoint", "{c}"],
    ],
    ids=lambda command: command[0],
)
def test_a_result_is_never_written_over_a_file_of_another_kind(
    exports: Exports, tmp_path: Path, capsys: Capture, command: list[str]
) -> None:
    precious = tmp_path / "train.txt"
    precious.write_text("words of a corpus\n")
    filled = [part.format(c=exports.checkpoint, a=exports.torchscript, w=tmp_path) for part in command]
    assert main([*filled, "--out", str(precious)]) == 2
    assert "is not written over" in capsys.readouterr().err
    assert precious.read_text() == "words of a corpus\n"


def _not_a_number(output):  # type: ignore[no-untyped-def]
    return output._replace(nll_BT=output.nll_BT * float("nan"))


def _full(memory):  # type: ignore[no-untyped-def]
    return memory._replace(length_B=torch.full_like(memory.length_B, 7))
