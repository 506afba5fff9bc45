"""`txl verify`: an intact artifact passes, anything else ends with 4 and says which file."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from tests.deploy.test_manifest import MANIFEST
from txl_deploy.cli.main import main
from txl_deploy.manifest import FILE_NAME, Source, write_manifest
from txl_train.files import file_sha256


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    """A folder with one file and its manifest."""
    folder = tmp_path / "artifact"
    folder.mkdir()
    (folder / "model.onnx").write_bytes(b"graph")
    write_manifest(folder, MANIFEST, ["model.onnx"])
    return folder


def test_an_intact_artifact_passes(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(artifact)]) == 0
    captured = capsys.readouterr()
    assert f"ok       model.onnx  {file_sha256(artifact / 'model.onnx')}  5 bytes" in captured.out
    assert "made from checkpoint_best.pt" in captured.out
    assert captured.err == ""


def test_a_changed_byte_ends_with_4_and_names_the_file(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (artifact / "model.onnx").write_bytes(b"graqh")
    assert main(["verify", str(artifact)]) == 4
    captured = capsys.readouterr()
    assert "FAILED   model.onnx was changed" in captured.out
    assert "ok       model.onnx" not in captured.out
    assert "txl export" in captured.err


def test_json_is_one_document_also_on_failure(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(artifact), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["passed"] is True
    (artifact / "model.onnx").unlink()
    (artifact / "notes.txt").write_text("mine")
    assert main(["verify", str(artifact), "--json"]) == 4
    document = json.loads(capsys.readouterr().out)
    assert document["passed"] is False
    assert document["findings"] == [{"file": "model.onnx", "problem": "missing", "message": "is missing"}]
    assert document["not_listed"] == ["notes.txt"]


def test_the_checkpoint_it_came_from_is_recognised(artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = tmp_path / "checkpoint_best.pt"
    checkpoint.write_bytes(b"weights")
    assert main(["verify", str(artifact), "--checkpoint", str(checkpoint)]) == 4
    assert "was made from checkpoint_best.pt with sha256 aaaaaaaaaaaa" in capsys.readouterr().out
    source = Source(checkpoint_sha256=file_sha256(checkpoint), checkpoint_name=checkpoint.name)
    write_manifest(artifact, dataclasses.replace(MANIFEST, source=source), ["model.onnx"])
    assert main(["verify", str(artifact), "--checkpoint", str(checkpoint)]) == 0
    assert main(["verify", str(artifact), "--checkpoint", str(tmp_path / "absent.pt")]) == 2


def test_what_is_no_artifact_ends_with_4(artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(tmp_path)]) == 4
    assert "has no manifest.json" in capsys.readouterr().err
    (artifact / FILE_NAME).write_text("{}")
    assert main(["verify", str(artifact), "--json"]) == 4
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "was changed after it was written" in captured.err
