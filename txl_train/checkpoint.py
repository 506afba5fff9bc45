"""One file that holds a model and all that is needed to use it or to go on training it.

The file is what `torch.save` writes (a zip of raw tensors and plain values), followed by a zip comment with the sha256 of everything
before it, so that any changed or missing byte is found before anything is read. It is written beside its place and moved there when
it is complete; what was there before stays intact until then. Loading runs no code from the file. Tied weights are stored once.

Two kinds: `checkpoint_last.pt` holds also the training state (optimizer, random generators, memory, position in the data), from which
training continues exactly; `checkpoint_best.pt` is for use and holds none, which makes it a third of the size.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

import txl_train
from txl_train.config import ModelConfig, model_config_from_dict, to_dict
from txl_train.data.vocabulary import Vocabulary
from txl_train.errors import CheckpointError, EnvironmentUnfitError, TxlError, UsageError
from txl_train.exhaustion import LOADING, told_when_memory_runs_out
from txl_train.files import blocks
from txl_train.model.inference import with_lengths
from txl_train.model.transformer_xl import TransformerXL
from txl_train.unfinished import file_beside

FORMAT = "txl-checkpoint"
VERSION = 1
_COMMENT_PREFIX = b"txl-sha256:"
_COMMENT_BYTES = len(_COMMENT_PREFIX) + 64
_WRITE_AGAIN = "Use another checkpoint of the run, or train again."
_IMPORT = "A checkpoint of NVIDIA, of the authors or of Hugging Face becomes one of txl with `txl import`."


@dataclass(frozen=True)
class Checkpoint:
    """A model, its vocabulary, and how both came to be."""

    model_config: ModelConfig
    """With the vocabulary's size and the cutoffs filled in."""
    model: dict[str, Tensor]
    """Every weight once, on the CPU, under its first name."""
    vocabulary: Vocabulary
    dataset: str
    """Name of the data set the model was trained on."""
    run: dict[str, Any]
    """{"settings": {section: {key: value}}, "origin": {…}, "data_folder": path} as resolved; empty if not trained here."""
    progress: dict[str, Any]
    """step, epoch, tokens, best_valid_nll (nats per token) …: plain numbers and texts."""
    training: dict[str, Any] | None = None
    """What continuing needs: optimizer, scaler, rng, memory, position; None in a checkpoint that is only for use."""
    sha256: str | None = None
    """Of the file it was loaded from, exactly the bytes that were read; None before it is saved."""

    @property
    def settings(self) -> dict[str, dict[str, Any]]:
        """The settings of the run, {section: {key: value}}; empty if not trained here."""
        settings = self.run.get("settings")
        return settings if isinstance(settings, dict) else {}

    @property
    def data_folder(self) -> str | None:
        """Absolute path of the folder the text was in, also of a built-in one; None if that is not known."""
        folder = self.run.get("data_folder")
        return folder if isinstance(folder, str) else None

    @property
    def eval_tgt_len(self) -> int:
        """Tokens per segment of the evaluations in training; 64, as in the specification, where that is not recorded."""
        value = self.settings.get("train", {}).get("eval_tgt_len")
        return value if isinstance(value, int) else 64


def save_checkpoint(path: str | Path, checkpoint: Checkpoint) -> None:
    """Write `checkpoint` to `path`, whole or not at all.

    Raises:
        EnvironmentUnfitError: the disk is full or the folder cannot be written; a file that was at `path` is as it was.
    """
    path = Path(path)
    payload = {
        "format": FORMAT,
        "version": VERSION,
        "txl_version": txl_train.__version__,
        "model_config": to_dict(checkpoint.model_config),
        "model": _compact(checkpoint.model),
        "vocabulary": checkpoint.vocabulary.to_json(),
        "dataset": checkpoint.dataset,
        "run": checkpoint.run,
        "progress": checkpoint.progress,
        "training": _compact(checkpoint.training),
    }
    try:
        with file_beside(path) as file:
            _write(file, payload)
    except OSError as error:
        raise EnvironmentUnfitError(
            f"The checkpoint {path} cannot be written: {error.strerror or error}.",
            remedy=f"{_remedy_of(error)} A checkpoint that was there before is intact.",
        ) from error


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint; its tensors are on the CPU. No code in the file is run.

    Raises:
        UsageError: there is no such file.
        CheckpointError: it is no checkpoint of this toolkit, is damaged, or is of a newer version.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:  # the bytes that are checked are those that are read, even if the file is replaced meanwhile
            sha256 = _check_digest(file, path)
            file.seek(0)
            payload = _unpickle(file, path)
    except FileNotFoundError:
        raise UsageError(
            f"There is no checkpoint {path}.", remedy="`txl train` writes checkpoint_best.pt and checkpoint_last.pt into its work folder."
        ) from None
    except IsADirectoryError:
        raise UsageError(
            f"{path} is a folder, not a checkpoint.", remedy=f"Give a file, for example {path / 'checkpoint_best.pt'}."
        ) from None
    except OSError as error:
        raise EnvironmentUnfitError(f"{path} cannot be read: {error.strerror}.") from error
    return dataclasses.replace(_checkpoint_from(payload, path), sha256=sha256)


def _unpickle(file: BinaryIO, path: Path) -> object:
    _check_sizes(file, path)
    try:
        with told_when_memory_runs_out(LOADING, doing=f"when {path} was read"):
            return torch.load(file, map_location="cpu", weights_only=True)
    except EnvironmentUnfitError:
        raise
    except Exception as error:  # what it raises for damaged files is documented nowhere: AssertionError and IndexError are among it
        raise CheckpointError(
            f"{path} holds something else than tensors and plain values; it was not read and none of its code was run.", remedy=_WRITE_AGAIN
        ) from error


def _check_sizes(file: BinaryIO, path: Path) -> None:
    """Refuse a file whose parts are compressed or claim more bytes than it has, before PyTorch unpacks them."""
    size = file.seek(0, os.SEEK_END)
    try:
        parts = zipfile.ZipFile(file).infolist()
    except (zipfile.BadZipFile, NotImplementedError, EOFError, ValueError, OSError, struct.error) as error:
        raise CheckpointError(f"{path} is damaged: it is no zip file of PyTorch ({error}).", remedy=_WRITE_AGAIN) from error
    if any(part.compress_type != zipfile.ZIP_STORED for part in parts) or sum(part.file_size for part in parts) > size:
        raise CheckpointError(f"{path} is refused: its parts are compressed, as no checkpoint's are.", remedy=_WRITE_AGAIN)
    file.seek(0)


def load_model(
    path: str | Path, *, mem_len: int | None = None, clamp_len: int | None = None, same_length: bool | None = None
) -> tuple[TransformerXL, Checkpoint]:
    """Build the model of a checkpoint, in evaluation mode on the CPU, with other lengths where given (see `with_lengths`).

    The model's weights are the checkpoint's own tensors.

    Raises:
        UsageError, CheckpointError: as `load_checkpoint`; also if the weights do not fit the configuration.
        ConfigError: the lengths are impossible.
    """
    checkpoint = load_checkpoint(path)
    config = with_lengths(checkpoint.model_config, mem_len=mem_len, clamp_len=clamp_len, same_length=same_length)
    try:
        model = TransformerXL.from_parameters(config, checkpoint.model)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error.message}", remedy=_WRITE_AGAIN) from error
    return model.eval(), checkpoint


class _Recorder:
    """A file for `torch.save`: hashes what goes through, and keeps an error for later, since it would cross C++ on its way."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest = hashlib.sha256()
        self.error: OSError | None = None
        self.end = b""

    def write(self, data: bytes) -> int:
        if self.error is None:
            try:
                self._file.write(data)
            except OSError as error:
                self.error = error
        self.digest.update(data)
        self.end = bytes(data[-2:])
        return len(data)

    def flush(self) -> None:
        """Nothing to do before the end."""


def _write(file: BinaryIO, payload: dict[str, Any]) -> None:
    recorder = _Recorder(file)
    torch.save(payload, recorder)  # type: ignore[arg-type]  # it needs write and flush only
    if recorder.error is not None:
        raise recorder.error
    assert recorder.end == b"\0\0", "a zip file without comment ends with the comment's length, 0"
    file.seek(-2, os.SEEK_END)
    file.write(_COMMENT_BYTES.to_bytes(2, "little") + _COMMENT_PREFIX + recorder.digest.hexdigest().encode())


def _check_digest(file: BinaryIO, path: Path) -> str:
    """Compare the file with the sha256 in its zip comment, which stands for the file as it was before it had a comment.

    Returns the sha256 of the file as it is.
    """
    size = os.fstat(file.fileno()).st_size
    start = file.read(2)
    file.seek(max(0, size - _COMMENT_BYTES - 2))
    length, comment = file.read(2), file.read()
    if start != b"PK":
        raise CheckpointError(
            f"{path} is no checkpoint of txl, or its beginning is damaged.",
            remedy=f"Give a file that `txl train` wrote: checkpoint_best.pt, say. {_IMPORT}",
        )
    if not comment.startswith(_COMMENT_PREFIX) or length != _COMMENT_BYTES.to_bytes(2, "little"):
        raise CheckpointError(f"{path} is no checkpoint of txl, or its end is missing or damaged.", remedy=f"{_WRITE_AGAIN} {_IMPORT}")
    file.seek(0)
    digest = _digest(file, size - _COMMENT_BYTES - 2)
    whole = digest.copy()
    whole.update(length + comment)
    digest.update(b"\0\0")
    if digest.hexdigest().encode() != comment[len(_COMMENT_PREFIX) :]:
        raise CheckpointError(f"{path} was changed after it was written: its contents do not match its checksum.", remedy=_WRITE_AGAIN)
    return whole.hexdigest()


def _digest(file: BinaryIO, n_bytes: int) -> hashlib._Hash:
    digest = hashlib.sha256()
    for block in blocks(file, n_bytes):
        digest.update(block)
    return digest


def _checkpoint_from(payload: object, path: Path) -> Checkpoint:
    if not isinstance(payload, dict) or payload.get("format") != FORMAT:
        raise CheckpointError(f"{path} is no checkpoint of txl.", remedy="Give a file that `txl train` wrote.")
    if payload.get("version") != VERSION:
        raise CheckpointError(
            f"{path} has format version {payload.get('version')}, written by txl {payload.get('txl_version')}; "
            f"txl {txl_train.__version__} reads version {VERSION}.",
            remedy="Use the version of txl that wrote it.",
        )
    kinds: dict[str, type | tuple[type, ...]] = {
        "model_config": dict,
        "model": dict,
        "vocabulary": (str, dict),
        "dataset": str,
        "run": dict,
        "progress": dict,
        "training": (dict, type(None)),
    }
    for key, kind in kinds.items():
        if key not in payload or not isinstance(payload[key], kind):
            raise CheckpointError(f"{path}: `{key}` is missing or of the wrong type.", remedy=_WRITE_AGAIN)
    if not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in payload["model"].items()):
        raise CheckpointError(f"{path}: `model` holds something else than named tensors.", remedy=_WRITE_AGAIN)
    try:
        model_config = model_config_from_dict(payload["model_config"])
        written = payload[
            "vocabulary"
        ]  # as JSON: 268,000 strings of a pickle take a second to read; older files have the values themselves
        vocabulary = Vocabulary.from_dict(json.loads(written) if isinstance(written, str) else written)
    except (TxlError, TypeError, ValueError, KeyError, RecursionError) as error:
        message = error.message if isinstance(error, TxlError) else f"its vocabulary is not understood ({error})."
        raise CheckpointError(f"{path}: {message}", remedy=_WRITE_AGAIN) from error
    return Checkpoint(
        model_config=model_config,
        model=payload["model"],
        vocabulary=vocabulary,
        dataset=payload["dataset"],
        run=payload["run"],
        progress=payload["progress"],
        training=payload["training"],
    )


def _compact(value: Any) -> Any:
    """Detach tensors, move them to the CPU, and copy views: saving a view would save all it is a view of."""
    if isinstance(value, Tensor):
        tensor = value.detach().cpu()
        return tensor if tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size() else tensor.clone()
    if isinstance(value, Mapping):
        return {key: _compact(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_compact(item) for item in value) if type(value) in (list, tuple) else [_compact(item) for item in value]
    return value


def _remedy_of(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "Free some space, or choose a folder that has some."
    return "Choose another folder, or allow writing into this one."
