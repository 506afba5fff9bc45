"""The manifest: what is written is read back, and whatever was changed is found."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest

from txl_deploy.documents import content_sha256 as checksum
from txl_deploy.manifest import (
    FILE_NAME,
    SCHEMA_VERSION,
    BatchRange,
    Manifest,
    Settings,
    Source,
    TensorRecord,
    artifact_file,
    read_manifest,
    read_verified,
    unlisted,
    verify,
    write_manifest,
)
from txl_train.errors import ManifestError
from txl_train.files import file_sha256

MANIFEST = Manifest(
    format="onnx",
    source=Source(checkpoint_sha256="a" * 64, checkpoint_name="checkpoint_best.pt"),
    model={"n_layer": 2, "cutoffs": [10, 20], "dropout": 0.1, "clamp_len": None},
    settings=Settings(tgt_len=8, mem_len=16, clamp_len=None, same_length=False, same_length_rule="mem_len+1", memory="kv", dtype="fp32"),
    batch=BatchRange(min=1, max=None),
    inputs=[TensorRecord(name="input_ids", dtype="int64", axes=["batch_size", 8])],
    outputs=[TensorRecord(name="nll", dtype="float32", axes=["batch_size", 8])],
    dataset="pydoc",
    data=None,
    vocabulary_sha256="b" * 64,
    versions={"txl": "0.1.0", "torch": "2.13.0"},
    command="txl export --format onnx",
)


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    """A folder with two files and their manifest."""
    folder = tmp_path / "artifact"
    (folder / "weights").mkdir(parents=True)
    (folder / "model.onnx").write_bytes(b"graph")
    (folder / "weights" / "model.onnx_data").write_bytes(bytes(range(256)))
    write_manifest(folder, MANIFEST, ["model.onnx", "weights/model.onnx_data"])
    return folder


def edit(folder: Path, *keys: str | int, value: Any) -> None:
    """Set one value of a manifest and make its own checksum fit again, as somebody who means to deceive would."""
    document = json.loads((folder / FILE_NAME).read_text())
    del document["sha256"]
    place = document
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    document["sha256"] = checksum(document)
    (folder / FILE_NAME).write_text(json.dumps(document))


def test_what_is_written_is_read_back(artifact: Path) -> None:
    manifest = read_manifest(artifact)
    assert dataclasses.replace(manifest, files={}) == MANIFEST
    assert manifest.files["model.onnx"].bytes == 5
    assert manifest.files["model.onnx"].sha256 == file_sha256(artifact / "model.onnx")
    assert verify(artifact) == []
    assert read_verified(artifact) == manifest


def test_the_same_export_gives_the_same_bytes(artifact: Path) -> None:
    first = (artifact / FILE_NAME).read_bytes()
    write_manifest(artifact, MANIFEST, ["weights/model.onnx_data", "model.onnx"])
    assert (artifact / FILE_NAME).read_bytes() == first
    assert sorted(p.name for p in artifact.iterdir()) == [FILE_NAME, "model.onnx", "weights"]


def test_names_that_are_not_ascii_survive(artifact: Path) -> None:
    manifest = dataclasses.replace(MANIFEST, data="/données/\udcff")  # a path whose bytes are not UTF-8, as Python holds it
    write_manifest(artifact, manifest, ["model.onnx"])
    assert read_manifest(artifact).data == "/données/\udcff"


def test_every_changed_byte_of_a_file_is_found(artifact: Path) -> None:
    path = artifact / "weights" / "model.onnx_data"
    original = path.read_bytes()
    for i in range(0, len(original), 51):
        path.write_bytes(original[:i] + bytes([original[i] ^ 1]) + original[i + 1 :])
        assert [(f.file, f.problem) for f in verify(artifact)] == [("weights/model.onnx_data", "changed")]


def test_every_changed_byte_of_the_manifest_is_found(artifact: Path) -> None:
    path = artifact / FILE_NAME
    original = path.read_bytes()
    content = [i for i, byte in enumerate(original) if not chr(byte).isspace()]
    for i in content:
        path.write_bytes(original[:i] + bytes([original[i] ^ 1]) + original[i + 1 :])
        with pytest.raises(ManifestError):
            read_manifest(artifact)


def test_a_truncated_a_missing_and_a_grown_file_are_told_apart(artifact: Path) -> None:
    (artifact / "model.onnx").write_bytes(b"gra")
    (artifact / "weights" / "model.onnx_data").unlink()
    messages = {f.file: (f.problem, f.message) for f in verify(artifact)}
    assert messages["model.onnx"] == ("changed", "has 3 bytes instead of 5")
    assert messages["weights/model.onnx_data"][0] == "missing"
    with pytest.raises(ManifestError, match=r"model\.onnx has 3 bytes.*model\.onnx_data is missing") as caught:
        read_verified(artifact)
    assert caught.value.exit_code == 4
    assert "txl export" in str(caught.value.remedy)


def test_it_belongs_to_one_checkpoint(artifact: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint_best.pt"
    checkpoint.write_bytes(b"weights")
    assert [f.problem for f in verify(artifact, checkpoint=checkpoint)] == ["other checkpoint"]
    source = Source(checkpoint_sha256=file_sha256(checkpoint), checkpoint_name=checkpoint.name)
    write_manifest(artifact, dataclasses.replace(MANIFEST, source=source), ["model.onnx"])
    assert verify(artifact, checkpoint=checkpoint) == []


def test_files_beside_it_are_named_but_are_no_fault(artifact: Path) -> None:
    for name in ("notes.txt", "receipt.json", "receipt-valid.json"):
        (artifact / name).write_text("{}")
    assert unlisted(artifact, read_manifest(artifact)) == ["notes.txt"]  # receipts belong to it, and are looked at by whoever needs one
    assert verify(artifact) == []


def test_a_folder_without_one_is_no_artifact(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"has no manifest\.json") as caught:
        read_manifest(tmp_path)
    assert "txl export --out" in str(caught.value.remedy)
    with pytest.raises(ManifestError, match="There is no folder"):
        read_manifest(tmp_path / "absent")


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": 1, "a": 2}', '{"a": NaN}', "[" * 100_000, "\x00"])
def test_what_is_no_manifest_is_refused(artifact: Path, text: str) -> None:
    (artifact / FILE_NAME).write_text(text)
    with pytest.raises(ManifestError):
        read_manifest(artifact)


def test_a_key_that_stands_twice_is_refused_though_the_checksum_fits(artifact: Path) -> None:
    path = artifact / FILE_NAME
    path.write_text(path.read_text().replace('"format": "onnx"', '"format": "torchscript", "format": "onnx"'))
    with pytest.raises(ManifestError, match="a key stands in it twice"):
        read_manifest(artifact)


def test_a_number_that_is_none_is_refused_though_the_checksum_fits(artifact: Path) -> None:
    edit(artifact, "model", value={"dropout": float("nan")})
    with pytest.raises(ManifestError, match="NaN is no JSON number"):
        read_manifest(artifact)


def test_a_number_that_no_float_can_hold_is_refused_though_the_checksum_fits(artifact: Path) -> None:
    edit(artifact, "model", value={"dropout": float("inf")})
    path = artifact / FILE_NAME
    path.write_text(path.read_text().replace("Infinity", "0.6e9144215530903"))
    with pytest.raises(ManifestError, match=r"0\.6e9144215530903 is too large for a number"):
        read_manifest(artifact)


def test_bytes_that_are_not_utf8_are_refused(artifact: Path) -> None:
    (artifact / FILE_NAME).write_bytes(b"\xff\xfe{}")
    with pytest.raises(ManifestError, match="cannot be read"):
        read_manifest(artifact)


def test_a_newer_schema_names_the_upgrade(artifact: Path) -> None:
    edit(artifact, "schema_version", value=SCHEMA_VERSION + 1)
    with pytest.raises(ManifestError, match=f"schema_version {SCHEMA_VERSION + 1}") as caught:
        read_manifest(artifact)
    assert "Upgrade txl" in str(caught.value.remedy)


def test_an_older_schema_than_the_first_is_refused(artifact: Path) -> None:
    edit(artifact, "schema_version", value=0)
    with pytest.raises(ManifestError, match="the first one is 1"):
        read_manifest(artifact)


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (("formatt",), "onnx", "`formatt` is unknown to this version of txl. Did you mean `format`?"),
        (("settings", "memory_kind"), "kv", "`settings.memory_kind` is unknown"),
        (("format",), "onxx", "`format` must be one of onnx, torchscript, trt, trt-rtx, but is 'onxx' instead. Did you mean `onnx`?"),
        (("settings", "tgt_len"), "8", "`settings.tgt_len` must be of type int, but is '8' instead."),
        (("settings", "tgt_len"), True, "`settings.tgt_len` must be of type int, but is True instead."),
        (("settings", "tgt_len"), 0, "`settings.tgt_len` must be 1 or more, but is 0 instead."),
        (("settings", "clamp_len"), 1.5, "`settings.clamp_len` must be of type int | None"),
        (("settings",), None, "`settings` must hold several values"),
        (("batch", "max"), 0, "`batch.max` must be 1 or more"),
        (("files",), [], "`files` must be of type"),
        (("files", "model.onnx", "bytes"), -1, "`files.model.onnx.bytes` must be 0 or more"),
        (("files", "model.onnx", "sha256"), "abc", "must be 64 hexadecimal digits"),
        (("inputs", 0, "axes", 0), None, "`inputs[0].axes[0]` must be of type str | int"),
        (("versions", "torch"), 2, "`versions.torch` must be of type str"),
        (("model",), [], "`model` must be of type"),
    ],
)
def test_a_value_that_cannot_be_meant_is_named(artifact: Path, keys: tuple[str | int, ...], value: Any, message: str) -> None:
    edit(artifact, *keys, value=value)
    with pytest.raises(ManifestError) as caught:
        read_manifest(artifact)
    assert message in caught.value.message
    assert str(artifact / FILE_NAME) in caught.value.message


def test_a_missing_value_is_named(artifact: Path) -> None:
    document = json.loads((artifact / FILE_NAME).read_text())
    del document["sha256"], document["settings"]["mem_len"]
    document["sha256"] = checksum(document)
    (artifact / FILE_NAME).write_text(json.dumps(document))
    with pytest.raises(ManifestError, match=r"`settings\.mem_len` is missing"):
        read_manifest(artifact)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../b", "C:\\x", "a\\b", "", ".", "a//b", "./a", FILE_NAME])
def test_a_file_name_that_leaves_the_folder_is_refused(artifact: Path, name: str) -> None:
    with pytest.raises(ManifestError, match="no file name within"):
        artifact_file(artifact, name)
    edit(artifact, "files", name, value={"sha256": "a" * 64, "bytes": 1})
    with pytest.raises(ManifestError, match="no file name within"):
        verify(artifact)


@pytest.mark.skipif(not hasattr(os, "symlink"), reason="no symbolic links here")
def test_a_link_out_of_the_folder_is_refused_even_if_its_content_fits(artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_bytes(b"graph")
    (artifact / "model.onnx").unlink()
    (artifact / "model.onnx").symlink_to(tmp_path / "elsewhere")
    assert [(f.file, f.problem) for f in verify(artifact)] == [("model.onnx", "outside")]
    with pytest.raises(ManifestError, match="outside the folder"):
        write_manifest(artifact, MANIFEST, ["model.onnx"])


def test_a_link_that_goes_in_circles_is_a_finding(artifact: Path) -> None:
    (artifact / "model.onnx").unlink()
    (artifact / "model.onnx").symlink_to("model.onnx")
    assert [f.file for f in verify(artifact)] == ["model.onnx"]


def test_a_manifest_without_files_is_no_model(artifact: Path) -> None:
    write_manifest(artifact, MANIFEST, [])
    assert [f.problem for f in verify(artifact)] == ["missing"]


@pytest.mark.parametrize("opening", ["[", '{"a": '], ids=["lists", "objects"])
def test_values_without_end_within_each_other_are_refused(tmp_path: Path, opening: str) -> None:
    closing = "]" if opening == "[" else "}"
    (tmp_path / "manifest.json").write_text('{"schema_version": 1, "files": ' + opening * 300 + "1" + closing * 300 + "}")
    with pytest.raises(ManifestError, match="more than 50 deep"):
        read_manifest(tmp_path)
