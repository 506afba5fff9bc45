"""Every file that is read back, and what reading it yields: damage is to be refused, mended, or to make no difference."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from tests.faults.corrupt import DAMAGES
from tests.faults.scenarios import SPLITS, Sources
from txl_deploy import manifest as manifests
from txl_deploy.manifest import read_manifest, read_parent, verify, write_manifest
from txl_deploy.receipt import Receipt
from txl_deploy.runtimes.registry import open_artifact
from txl_deploy.runtimes.tensorrt import KernelCache
from txl_train.checkpoint import load_checkpoint
from txl_train.data.corpus import load_corpus
from txl_train.data.datasets import get_dataset
from txl_train.data.prepare import prepare
from txl_train.data.vocabulary import Vocabulary
from txl_train.errors import TxlError


@dataclass(frozen=True)
class Reader:
    """Files in a folder, and how they are read."""

    write: Callable[[Sources, Path], None]
    """Writes them into an existing folder."""
    read: Callable[[Sources, Path], Any]
    """Returns what is to be the same as before or refused by a `TxlError`."""


def _copy(name: str) -> Callable[[Sources, Path], None]:
    def write(sources: Sources, folder: Path) -> None:
        shutil.copytree(sources.earlier[name], folder, dirs_exist_ok=True)

    return write


def _copy_file(which: Callable[[Sources], Path]) -> Callable[[Sources, Path], None]:
    def write(sources: Sources, folder: Path) -> None:
        shutil.copy(which(sources), folder)

    return write


def _open(sources: Sources, folder: Path) -> Any:
    runtime = open_artifact(folder)
    return runtime.info.checkpoint_sha256, runtime.info.readback, Vocabulary.load(folder / "vocabulary.json").sha256


def _write_external(sources: Sources, folder: Path) -> None:
    """As the export of a model of more than 1.5 GB: weights beside the graph."""
    _copy("onnx")(sources, folder)
    model = onnx.load(folder / "model.onnx")
    onnx.save_model(model, folder / "model.onnx", save_as_external_data=True, location="model.onnx.data", size_threshold=256)
    manifest = read_manifest(folder)
    write_manifest(folder, manifest, [*manifest.files, "model.onnx.data"])


def _verify(sources: Sources, folder: Path) -> Any:
    """As `txl verify`: an engine is not opened without its GPU."""
    found = verify(folder)
    if found:
        raise manifests.ManifestError(f"{found[0].file} {found[0].problem}")
    return read_manifest(folder), read_parent(folder)


def _write_cache(sources: Sources, folder: Path) -> None:
    corpus = load_corpus(sources.text, get_dataset("text"), cache_dir=folder)
    for split in SPLITS:
        corpus.ids(split)


def _read_cache(sources: Sources, folder: Path) -> Any:
    corpus = load_corpus(sources.text, get_dataset("text"), cache_dir=folder)
    return corpus.vocabulary.sha256, [corpus.ids(split).tobytes() for split in SPLITS]


def _write_prepared(sources: Sources, folder: Path) -> None:
    small = folder.parent / "small.zip"
    with zipfile.ZipFile(small, "w") as archive:
        for split in SPLITS:
            archive.writestr(f"wiki.{split}.tokens", f" the {split} <unk> \n" * 100)
    prepare("wt103", folder, small)


def _prepare_again(sources: Sources, folder: Path) -> Any:
    prepare("wt103", folder, folder.parent / "small.zip")
    return [(folder / f"{split}.txt").read_bytes() for split in SPLITS]


def _kernels(folder: Path) -> KernelCache:
    return KernelCache(folder / "engine.kernels")


READERS: dict[str, Reader] = {
    "checkpoint": Reader(
        _copy_file(lambda sources: sources.checkpoint),
        lambda sources, folder: load_checkpoint(folder / sources.checkpoint.name).sha256,
    ),
    "onnx": Reader(_copy("onnx"), _open),
    "onnx with external data": Reader(_write_external, _open),
    "torchscript": Reader(_copy("torchscript"), _open),
    "engine": Reader(_copy("engine"), _verify),
    "receipt": Reader(
        _copy_file(lambda sources: sources.receipt),
        lambda sources, folder: Receipt.read(folder / sources.receipt.name),
    ),
    "token cache": Reader(_write_cache, _read_cache),
    "prepared folder": Reader(_write_prepared, _prepare_again),
    "kernel cache": Reader(
        lambda sources, folder: _kernels(folder).save(b"kernels" * 1000), lambda sources, folder: _kernels(folder).load()
    ),
}


def damaged(reader: Reader, sources: Sources, base: Path) -> Iterator[tuple[str, str]]:
    """Damage each file in each way, and yield where, and what came of it: an error's name, `the same`, or `read` where it went unseen."""
    shutil.rmtree(base, ignore_errors=True)
    whole, folder = base / "whole", base / "damaged"
    whole.mkdir(parents=True)
    reader.write(sources, whole)
    shutil.copytree(whole, folder)
    expected = reader.read(sources, folder)
    for path in sorted(path.relative_to(whole) for path in whole.rglob("*") if path.is_file()):
        data = (whole / path).read_bytes()
        for name, damage in DAMAGES.items():
            shutil.rmtree(folder)
            shutil.copytree(whole, folder)
            changed = damage(data)
            if changed == data:
                continue
            (folder / path).write_bytes(changed)
            try:
                found = reader.read(sources, folder)
            except TxlError as error:
                yield f"{path}, {name}", type(error).__name__
                continue
            yield f"{path}, {name}", "the same" if found == expected else "absent" if found is None else "read"
