"""`txl export` and `txl parity` from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.deploy.conftest import Exports
from tests.support import small_config, write_checkpoint
from txl_deploy.cli.main import main
from txl_deploy.manifest import read_manifest

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
