"""An artifact is written whole, after it was compared with its checkpoint, or not at all."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path
from typing import NoReturn

import pytest
import torch

from tests.deploy.conftest import Exports
from txl_deploy.bench.environment import git_commit
from txl_deploy.export import artifact as artifacts
from txl_deploy.export.artifact import ExportRequest, export_artifact
from txl_deploy.manifest import read_manifest, verify
from txl_train.checkpoint import load_model, save_checkpoint
from txl_train.data.vocabulary import Vocabulary
from txl_train.errors import CheckpointError, EnvironmentUnfitError, PackageMissingError, UsageError, ValidationError
from txl_train.files import file_sha256
from txl_train.model.inference import InferenceStep


def request(exports: Exports, out: Path, **changes: object) -> ExportRequest:
    return ExportRequest(**{"checkpoint": exports.checkpoint, "out": out, "format": "torchscript", **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["onnx", "torchscript"])
def test_the_manifest_chains_the_artifact_to_its_checkpoint(exports: Exports, name: str) -> None:
    folder = getattr(exports, name)
    manifest = read_manifest(folder)
    assert verify(folder, checkpoint=exports.checkpoint) == []
    assert manifest.source.checkpoint_sha256 == file_sha256(exports.checkpoint)
    assert manifest.vocabulary_sha256 == Vocabulary.load(folder / "vocabulary.json").sha256
    assert manifest.data == str(exports.data)


def test_lengths_asked_for_are_those_of_the_artifact(exports: Exports, tmp_path: Path) -> None:
    export_artifact(request(exports, tmp_path / "a", tgt_len=3, mem_len=4, clamp_len=2, same_length=True, memory="hidden"))
    settings = read_manifest(tmp_path / "a").settings
    assert (settings.tgt_len, settings.mem_len, settings.clamp_len, settings.same_length, settings.memory) == (3, 4, 2, True, "hidden")


def test_an_existing_artifact_is_replaced_only_with_overwrite(exports: Exports, tmp_path: Path) -> None:
    export_artifact(request(exports, tmp_path / "a"))
    with pytest.raises(UsageError, match="--overwrite"):
        export_artifact(request(exports, tmp_path / "a", tgt_len=3))
    assert read_manifest(tmp_path / "a").settings.tgt_len == 5
    export_artifact(request(exports, tmp_path / "a", tgt_len=3, overwrite=True))
    assert read_manifest(tmp_path / "a").settings.tgt_len == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


def test_a_folder_that_is_no_artifact_is_never_replaced(exports: Exports, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="no exported model"):
        export_artifact(request(exports, tmp_path / "mine", overwrite=True))
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_a_folder_with_a_manifest_of_something_else_is_never_replaced(exports: Exports, tmp_path: Path) -> None:
    (tmp_path / "webapp").mkdir()
    (tmp_path / "webapp" / "manifest.json").write_text('{"name": "my site"}')
    with pytest.raises(UsageError, match="no exported model"):
        export_artifact(request(exports, tmp_path / "webapp", overwrite=True))


def test_a_file_of_the_user_s_own_in_an_artifact_is_never_lost(exports: Exports, tmp_path: Path) -> None:
    export_artifact(request(exports, tmp_path / "a"))
    (tmp_path / "a" / "notes.txt").write_text("measured on Tuesday")
    with pytest.raises(UsageError, match=r"notes\.txt"):
        export_artifact(request(exports, tmp_path / "a", overwrite=True))
    assert (tmp_path / "a" / "notes.txt").exists()


def test_an_export_that_computes_something_else_leaves_nothing_behind(
    exports: Exports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def with_a_wrong_bias(step: InferenceStep, folder: Path) -> list[str]:
        with torch.no_grad():
            step.head.cluster_bias[0] += 0.5
        files = real(step, folder)
        with torch.no_grad():
            step.head.cluster_bias[0] -= 0.5
        return files

    real = artifacts.export_torchscript
    monkeypatch.setattr(artifacts, "export_torchscript", with_a_wrong_bias)
    with pytest.raises(ValidationError, match="a token's nll differs") as caught:
        export_artifact(request(exports, tmp_path / "a"))
    assert caught.value.exit_code == 1
    assert list(tmp_path.iterdir()) == []


def overflowing(exports: Exports, folder: Path) -> Path:
    """Return a checkpoint whose feed-forward reaches beyond 65504 in the first layer."""
    model, checkpoint = load_model(exports.checkpoint)
    with torch.no_grad():
        model.decoder_layers()[0].feed_forward.outer.bias.fill_(6e4)
        model.decoder_layers()[0].feed_forward.outer.weight.mul_(1e5)
    path = folder / "large.pt"
    save_checkpoint(path, dataclasses.replace(checkpoint, model=model.parameters_by_name(), sha256=None))
    return path


@pytest.mark.parametrize("name", ["onnx", "torchscript"])
def test_what_float16_cannot_hold_is_found_before_anything_is_written(exports: Exports, tmp_path: Path, name: str) -> None:
    large = overflowing(exports, tmp_path)
    with pytest.raises(ValidationError, match=r"feed-forward outer of layer 0 .* text valid") as caught:
        export_artifact(request(exports, tmp_path / "a", checkpoint=large, format=name, dtype="fp16"))
    assert caught.value.exit_code == 1
    assert [path.name for path in tmp_path.iterdir()] == ["large.pt"]


def test_what_a_module_holds_and_what_real_text_reached_stand_in_the_manifest(exports: Exports, tmp_path: Path) -> None:
    export_artifact(request(exports, tmp_path / "a", dtype="fp16", memory_dtype="fp32"))
    manifest = read_manifest(tmp_path / "a")
    assert set(manifest.precisions["products"]) == {"float16"}
    assert manifest.precisions["states"] == {"float32": 4}
    assert manifest.audit is not None
    assert (manifest.audit["text"]["kind"], manifest.audit["text"]["split"]) == ("text", "valid")
    assert {point["point"] for point in manifest.audit["points"]} >= {"scores", "memory", "residual sum", "logits of cluster 3"}
    assert manifest.git_commit == git_commit()


def test_in_fp32_there_is_nothing_to_audit(exports: Exports) -> None:
    manifest = read_manifest(exports.onnx)
    assert manifest.audit is None
    assert set(manifest.precisions["products"]) == set(manifest.precisions["weights"]) == {"float32"}


def test_a_file_of_another_type_than_asked_for_is_never_kept(exports: Exports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def of_float32(step: InferenceStep, folder: Path) -> list[str]:
        return real(InferenceStep(load_model(exports.checkpoint)[0].eval(), step.tgt_len, step.memory), folder)

    real = artifacts.export_torchscript
    monkeypatch.setattr(artifacts, "export_torchscript", of_float32)
    with pytest.raises(ValidationError, match="was to be fp16"):
        export_artifact(request(exports, tmp_path / "a", dtype="fp16", memory_dtype="fp32"))
    assert list(tmp_path.iterdir()) == []


def test_states_alone_can_be_float16(exports: Exports, tmp_path: Path) -> None:
    exported = export_artifact(request(exports, tmp_path / "a", memory_dtype="fp16", memory="hidden"))
    assert exported.manifest.precisions["products"] == {"float32": 30}
    assert exported.manifest.precisions["states"] == {"float16": 2}
    assert exported.manifest.audit is not None
    assert exported.manifest.audit["worst"]["point"] == "memory"


def test_a_damaged_checkpoint_leaves_nothing_behind(exports: Exports, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.pt"
    shutil.copy(exports.checkpoint, damaged)
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(CheckpointError, match="was changed"):
        export_artifact(request(exports, tmp_path / "a", checkpoint=damaged))
    assert [path.name for path in tmp_path.iterdir()] == ["damaged.pt"]


def test_an_artifact_that_another_export_has_made_meanwhile_is_not_replaced_unasked(exports: Exports, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def meanwhile() -> None:
        with artifacts.folder_beside(out, overwrite=False):
            shutil.copytree(exports.onnx, out)

    with pytest.raises(UsageError, match="holds an exported model already"):
        meanwhile()
    assert verify(out) == []
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_whole_artifact_is_there_at_any_time_while_it_is_replaced(
    exports: Exports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    shutil.copytree(exports.onnx, out)
    remove, rename = shutil.rmtree, os.rename

    def look(*arguments: object) -> None:
        assert verify(out) == []

    monkeypatch.setattr(artifacts.unfinished.shutil, "rmtree", lambda path, **options: (look(), remove(path, **options)))
    monkeypatch.setattr(artifacts.unfinished.os, "rename", lambda one, other: (look(), rename(one, other), look()))
    request = ExportRequest(checkpoint=exports.checkpoint, out=out, format="torchscript", overwrite=True)
    assert export_artifact(request).manifest.format == read_manifest(out).format == "torchscript"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_place_that_cannot_be_written_is_an_unfit_environment(exports: Exports, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(EnvironmentUnfitError, match="cannot be written") as error:
        export_artifact(ExportRequest(checkpoint=exports.checkpoint, out=tmp_path / "file" / "out", format="torchscript"))
    assert error.value.exit_code == 3


@pytest.mark.parametrize(
    ("error", "skips"), [(PackageMissingError("onnxruntime is not installed."), True), (EnvironmentUnfitError("Memory ran out."), False)]
)
def test_only_a_missing_package_lets_an_export_go_uncompared(
    error: EnvironmentUnfitError, skips: bool, exports: Exports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*arguments: object) -> NoReturn:
        raise error

    monkeypatch.setattr(artifacts, "open_artifact", fails)
    if skips:
        assert export_artifact(request(exports, tmp_path / "a")).parity is None
    else:
        with pytest.raises(EnvironmentUnfitError, match="Memory ran out"):
            export_artifact(request(exports, tmp_path / "a"))
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("name", "loader"), [("torchscript", "torch.jit.load"), ("onnx", "onnxruntime.InferenceSession")])
def test_an_artifact_that_memory_is_too_small_for_is_not_called_damaged(
    name: str, loader: str, exports: Exports, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise RuntimeError("std::bad_alloc")

    monkeypatch.setattr(loader, fail)
    with pytest.raises(EnvironmentUnfitError, match="Memory ran out when"):
        artifacts.open_artifact(getattr(exports, name))
