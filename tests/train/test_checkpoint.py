"""Checkpoints: what is saved comes back, damage of any kind is found, nothing in a file is run, a failed write loses nothing."""

from __future__ import annotations

import errno
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from txl_train import checkpoint as checkpoints
from txl_train import unfinished
from txl_train.checkpoint import Checkpoint, load_checkpoint, load_model, save_checkpoint
from txl_train.config import ModelConfig
from txl_train.data.vocabulary import Vocabulary
from txl_train.errors import CheckpointError, EnvironmentUnfitError, UsageError
from txl_train.model.transformer_xl import TransformerXL

CONFIG = ModelConfig(
    vocab_size=50, n_layer=2, n_head=2, d_head=4, d_model=8, d_inner=16, mem_len=6, adaptive=True, cutoffs=(10, 30), div_val=2, dropout=0.1
)


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    torch.manual_seed(0)
    model = TransformerXL(CONFIG)
    return Checkpoint(
        model_config=CONFIG,
        model=model.parameters_by_name(),
        vocabulary=Vocabulary([f"w{i}" for i in range(50)], unit="word"),
        dataset="text",
        run={"settings": {"train": {"eval_tgt_len": 12}}, "origin": {"train.eval_tgt_len": "default"}, "data_folder": "/some/folder"},
        progress={"step": 3, "best_valid_nll": 4.5},
        training={"rng": {"cpu": torch.get_rng_state()}, "memory": [torch.zeros(2, 3)], "nothing": None, "pair": (1, 2.5)},
    )


@pytest.fixture
def saved(checkpoint: Checkpoint, tmp_path: Path) -> Path:
    path = tmp_path / "checkpoint_last.pt"
    save_checkpoint(path, checkpoint)
    return path


def test_what_is_saved_comes_back(checkpoint: Checkpoint, saved: Path) -> None:
    loaded = load_checkpoint(saved)

    assert loaded.model.keys() == checkpoint.model.keys()
    assert all(torch.equal(loaded.model[name], checkpoint.model[name]) for name in checkpoint.model)
    assert loaded.model_config == checkpoint.model_config
    assert loaded.vocabulary == checkpoint.vocabulary
    assert (loaded.dataset, loaded.run, loaded.progress) == (checkpoint.dataset, checkpoint.run, checkpoint.progress)
    assert loaded.training is not None
    assert checkpoint.training is not None
    assert torch.equal(loaded.training["rng"]["cpu"], checkpoint.training["rng"]["cpu"])
    assert loaded.training["pair"] == (1, 2.5)
    assert (loaded.eval_tgt_len, loaded.data_folder) == (12, "/some/folder")


def test_a_checkpoint_of_foreign_origin_has_the_specifications_lengths(checkpoint: Checkpoint) -> None:
    foreign = Checkpoint(CONFIG, checkpoint.model, checkpoint.vocabulary, "text", run={}, progress={})

    assert (foreign.eval_tgt_len, foreign.data_folder, foreign.settings) == (64, None, {})


def test_the_model_of_a_checkpoint_computes_what_the_saved_one_did(checkpoint: Checkpoint, saved: Path) -> None:
    original = TransformerXL(CONFIG).eval()
    original.load_parameters(checkpoint.model)
    generator_before = torch.get_rng_state()

    model, _ = load_model(saved)

    ids = torch.arange(20).view(2, 10)
    assert torch.equal(model(ids, model.initial_memory(2))[0], original(ids, original.initial_memory(2))[0])
    assert not model.training
    assert torch.equal(torch.get_rng_state(), generator_before)


def test_the_model_of_a_checkpoint_takes_other_lengths(saved: Path) -> None:
    model, loaded = load_model(saved, mem_len=20, clamp_len=5, same_length=True)

    assert (model.config.mem_len, model.config.clamp_len, model.config.same_length) == (20, 5, True)
    assert loaded.model_config == CONFIG


def test_tied_weights_and_views_are_stored_once(checkpoint: Checkpoint, tmp_path: Path) -> None:
    large = torch.zeros(1000, 1000)
    view = Checkpoint(CONFIG, checkpoint.model, checkpoint.vocabulary, "text", run={}, progress={}, training={"view": large[:1, :10]})

    save_checkpoint(tmp_path / "view.pt", view)

    n_weights = sum(parameter.numel() for parameter in TransformerXL(CONFIG).parameters())
    n_stored = sum(tensor.numel() for tensor in load_checkpoint(tmp_path / "view.pt").model.values())
    assert n_stored == n_weights
    assert (tmp_path / "view.pt").stat().st_size < 4 * n_weights + 30_000


def test_the_file_is_a_plain_torch_file_too(checkpoint: Checkpoint, saved: Path) -> None:
    payload = torch.load(saved, weights_only=True)

    assert torch.equal(payload["model"]["content_bias"], checkpoint.model["content_bias"])
    assert zipfile.ZipFile(saved).testzip() is None


def test_a_missing_file_is_an_error_of_usage(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="There is no checkpoint") as error:
        load_checkpoint(tmp_path / "missing.pt")

    assert error.value.exit_code == 2


def test_a_folder_is_an_error_of_usage_that_names_a_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a folder, not a checkpoint") as error:
        load_checkpoint(tmp_path)

    assert "checkpoint_best.pt" in str(error.value)


def test_any_changed_byte_is_found(saved: Path) -> None:
    content = saved.read_bytes()

    for place in [0, 1, *range(2, len(content), len(content) // 60), *range(len(content) - 100, len(content))]:
        changed = bytearray(content)
        changed[place] ^= 0x10
        saved.write_bytes(bytes(changed))
        with pytest.raises(CheckpointError) as error:
            load_checkpoint(saved)
        assert error.value.exit_code == 4
        assert str(saved) in str(error.value)


@pytest.mark.parametrize("keep", [0, 2, 50, 0.5, 0.999])
def test_a_truncated_file_is_found(saved: Path, keep: float) -> None:
    content = saved.read_bytes()
    saved.write_bytes(content[: int(keep if keep > 1 or keep == 0 else keep * len(content))])

    with pytest.raises(CheckpointError, match="no checkpoint of txl"):
        load_checkpoint(saved)


def test_bytes_appended_or_inserted_are_found(saved: Path) -> None:
    content = saved.read_bytes()

    for changed in (content + b"x", content[:500] + b"x" + content[500:], b"PK" + content):
        saved.write_bytes(changed)
        with pytest.raises(CheckpointError):
            load_checkpoint(saved)


def test_a_random_zip_is_no_checkpoint(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "random.zip", "w") as archive:
        archive.writestr("hello.txt", "hello")

    with pytest.raises(CheckpointError, match="no checkpoint of txl"):
        load_checkpoint(tmp_path / "random.zip")


class Malicious:
    """Would make a folder when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path) -> None:
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Malicious(tmp_path / "trace")))

    with pytest.raises(CheckpointError, match="no checkpoint of txl"):
        load_checkpoint(tmp_path / "evil.pt")

    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("key", ["training", "model", "format"])
def test_code_within_a_well_formed_file_is_refused_and_not_run(tmp_path: Path, key: str) -> None:
    with open(tmp_path / "evil.pt", "wb") as file:
        checkpoints._write(file, {"format": checkpoints.FORMAT, "version": checkpoints.VERSION, key: Malicious(tmp_path / "trace")})

    with pytest.raises(CheckpointError, match="none of its code was run"):
        load_checkpoint(tmp_path / "evil.pt")

    assert not (tmp_path / "trace").exists()


def rewrite(path: Path, **changes: Any) -> None:
    """Change entries of a checkpoint, giving the file a valid checksum again."""
    payload = torch.load(path, weights_only=True)
    payload.update(changes)
    with open(path, "wb") as file:
        checkpoints._write(file, {key: value for key, value in payload.items() if value != "removed"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "another"}, "no checkpoint of txl"),
        ({"version": 2, "txl_version": "9.9"}, "format version 2, written by txl 9.9"),
        ({"progress": "removed"}, "`progress` is missing"),
        ({"training": 3}, "`training` is missing or of the wrong type"),
        ({"model": {"content_bias": 3}}, "something else than named tensors"),
        ({"model_config": {"n_laier": 3}}, "Did you mean `n_layer`"),
        ({"model_config": {"n_layer": "3"}}, "wrong type"),
        ({"vocabulary": {"symbols": ["a"]}}, "vocabulary"),
    ],
)
def test_a_file_that_holds_something_else_is_told_so(saved: Path, changes: dict[str, Any], message: str) -> None:
    rewrite(saved, **changes)

    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(saved)


@pytest.mark.parametrize("weights", [{}, {"content_bias": torch.zeros(3)}])
def test_weights_that_do_not_fit_are_an_error(checkpoint: Checkpoint, saved: Path, weights: dict[str, torch.Tensor]) -> None:
    rewrite(saved, model={**checkpoint.model, **weights} if weights else {})

    with pytest.raises(CheckpointError, match=str(saved)):
        load_model(saved)


class FullDisk:
    """A file on a disk that is full after so many bytes."""

    def __init__(self, file: Any, room: int) -> None:
        self._file = file
        self._room = room

    def write(self, data: bytes) -> int:
        self._room -= len(data)
        if self._room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return int(self._file.write(data))

    def __enter__(self) -> FullDisk:
        self._file.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.__exit__(*exception)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@pytest.mark.parametrize("room", [0, 1_000, 10_000])
def test_a_full_disk_is_an_error_and_loses_nothing(checkpoint: Checkpoint, saved: Path, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    before = saved.read_bytes()
    monkeypatch.setattr(unfinished, "open", lambda *arguments: FullDisk(open(*arguments), room), raising=False)  # noqa: SIM115

    with pytest.raises(EnvironmentUnfitError, match="No space left") as error:
        save_checkpoint(saved, checkpoint)

    monkeypatch.undo()
    assert error.value.exit_code == 3
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_a_disk_that_fails_at_the_very_end_loses_nothing(checkpoint: Checkpoint, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    before = saved.read_bytes()
    monkeypatch.setattr(os, "fsync", fail)

    with pytest.raises(EnvironmentUnfitError):
        save_checkpoint(saved, checkpoint)

    assert saved.read_bytes() == before


def test_a_folder_that_does_not_exist_is_an_error(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(EnvironmentUnfitError, match="No such file"):
        save_checkpoint(tmp_path / "no" / "checkpoint.pt", checkpoint)


def test_saving_leaves_no_other_file(saved: Path) -> None:
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]
