"""`txl inspect`: says what each kind of file is, and what to do about anything else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.test_manifest import MANIFEST
from txl_deploy.cli.main import main
from txl_deploy.manifest import write_manifest
from txl_train.data.vocabulary import Vocabulary


def inspect(path: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """Run `txl inspect PATH --json` and return its document; the same without `--json` must work too."""
    assert main(["inspect", str(path)]) == 0
    assert capsys.readouterr().out
    assert main(["inspect", str(path), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert isinstance(document, dict)
    return document


def test_an_artifact(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model.onnx").write_bytes(b"graph")
    (tmp_path / "notes.txt").write_bytes(b"mine")
    write_manifest(tmp_path, MANIFEST, ["model.onnx"])
    for path in (tmp_path, tmp_path / "manifest.json"):
        document = inspect(path, capsys)
        assert document["kind"] == "artifact"
        assert document["settings"]["mem_len"] == 16
        assert document["files"]["model.onnx"]["bytes"] == 5
        assert document["not_listed"] == ["notes.txt"]


def test_an_artifact_as_text_shows_its_tensors_and_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model.onnx").write_bytes(b"graph")
    write_manifest(tmp_path, MANIFEST, ["model.onnx"])
    assert main(["inspect", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "  input_ids  int64  [batch_size, 8]" in shown
    assert "mem_len           16" in shown
    assert "same_length       no" in shown
    assert "clamp_len         -" in shown


def test_a_changed_artifact_is_shown_as_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model.onnx").write_bytes(b"graph")
    write_manifest(tmp_path, MANIFEST, ["model.onnx"])
    (tmp_path / "model.onnx").write_bytes(b"grape")
    assert main(["inspect", str(tmp_path), "--json"]) == 4
    captured = capsys.readouterr()
    assert "was changed" in json.loads(captured.out)["findings"][0]
    assert "txl verify" in captured.err


def test_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from txl_train.checkpoint import Checkpoint, save_checkpoint
    from txl_train.config import ModelConfig
    from txl_train.files import file_sha256
    from txl_train.model.transformer_xl import TransformerXL

    config = ModelConfig(vocab_size=7, n_layer=1, n_head=2, d_head=4, d_model=8, d_inner=16, mem_len=4)
    model = TransformerXL(config)
    path = tmp_path / "checkpoint_best.pt"
    vocabulary = Vocabulary([f"w{i}" for i in range(7)], unit="word")
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    save_checkpoint(path, Checkpoint(config, weights, vocabulary, "pydoc", run={}, progress={"step": 12, "best_valid_nll": 1.5}))
    document = inspect(path, capsys)
    assert document["kind"] == "checkpoint"
    assert document["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert document["sha256"] == file_sha256(path)
    assert document["vocabulary"] == {"tokens": 7, "unit": "word", "sha256": vocabulary.sha256}
    assert document["progress"]["step"] == 12
    assert document["model"]["n_head"] == 2
    assert document["can_resume"] is False

    content = path.read_bytes()
    for damaged in (content[: len(content) // 2], b"x" + content[1:]):
        path.write_bytes(damaged)
        assert main(["inspect", str(path)]) == 4
        assert "checkpoint" in capsys.readouterr().err


def test_an_onnx_graph(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnx = pytest.importorskip("onnx")
    helper, kinds = onnx.helper, onnx.TensorProto
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "w"], ["s"]), helper.make_node("Relu", ["s"], ["y"]), helper.make_node("Relu", ["y"], ["z"])],
        "graph",
        [helper.make_tensor_value_info("x", kinds.FLOAT, ["batch_size", 2])],
        [helper.make_tensor_value_info("z", kinds.FLOAT, ["batch_size", 2])],
        initializer=[helper.make_tensor("w", kinds.FLOAT, [2], [1.0, 2.0])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], producer_name="test")
    helper.set_model_props(model, {"txl.tgt_len": "8"})
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    document = inspect(path, capsys)
    assert document["kind"] == "onnx"
    assert document["opset"] == {"ai.onnx": 18}
    assert document["inputs"] == [{"name": "x", "dtype": "float32", "axes": ["batch_size", 2]}]
    assert [tensor["name"] for tensor in document["outputs"]] == ["z"]
    assert document["nodes"] == 3
    assert document["operators"] == {"Relu": 2, "Add": 1}
    assert document["metadata"] == {"txl.tgt_len": "8"}

    for damaged in (path.read_bytes()[:-7], b"", b"no graph at all"):
        path.write_bytes(damaged)
        assert main(["inspect", str(path)]) == 4
        assert "txl export --format onnx" in capsys.readouterr().err


def test_a_vocabulary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vocabulary = Vocabulary(["<eos>", "the", "<unk>", "état"], unit="word")
    path = tmp_path / "vocabulary.json"
    vocabulary.save(path)
    document = inspect(path, capsys)
    assert document["kind"] == "vocabulary"
    assert document["tokens"] == 4
    assert document["unk_id"] == 2
    assert document["first"] == ["<eos>", "the", "<unk>", "état"]
    path.write_bytes(path.read_bytes()[:-5])
    assert main(["inspect", str(path)]) == 2
    assert "damaged" in capsys.readouterr().err


def test_a_torchscript_program_points_at_its_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import zipfile

    with zipfile.ZipFile(tmp_path / "model.pt", "w") as archive:
        archive.writestr("model/constants.pkl", b"")
    assert main(["inspect", str(tmp_path / "model.pt")]) == 2
    assert f"txl inspect {tmp_path}" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"PK", b"plain text", b'{"format": "other"}', b"{", b"\xff\xfe"])
def test_anything_else_is_refused_with_what_would_do(content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "thing"
    path.write_bytes(content)
    assert main(["inspect", str(path)]) == (4 if content == b"PK" else 2)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("Error: ")
    assert "Traceback" not in captured.err


def test_a_folder_that_is_no_artifact_names_what_is_in_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path)]) == 2
    assert "a folder without manifest.json" in capsys.readouterr().err
    (tmp_path / "checkpoint_best.pt").touch()
    (tmp_path / "onnx").mkdir()
    write_manifest(tmp_path / "onnx", MANIFEST, [])
    assert main(["inspect", str(tmp_path)]) == 2
    assert f"Did you mean {tmp_path / 'checkpoint_best.pt'} or {tmp_path / 'onnx'}?" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / "absent")]) == 2
