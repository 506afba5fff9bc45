"""The commands that write something, each with what must hold whatever happened to it, and what it must yield in the end."""

from __future__ import annotations

import hashlib
import json
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.support import small_config, write_checkpoint, write_corpus
from txl_deploy.bench.result import BenchResult
from txl_deploy.cli.main import main
from txl_deploy.export.artifact import ExportRequest, export_artifact
from txl_deploy.manifest import read_manifest, verify
from txl_deploy.receipt import Receipt
from txl_train.checkpoint import load_checkpoint
from txl_train.files import file_sha256

SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class Sources:
    """What the commands read: made once, never changed."""

    archive: Path
    """WikiText-like, zipped."""
    text: Path
    checkpoint: Path
    other: Path
    """Another checkpoint, with other weights."""
    earlier: dict[str, Path]
    """By format: an artifact of `other`."""
    graph: Path | None
    """Of `checkpoint` in fp16, to build engines from."""

    @property
    def receipt(self) -> Path:
        """The receipt of the earlier ONNX artifact."""
        return self.text.parent / "receipt.json"


@dataclass(frozen=True)
class Scenario:
    """A command and its promises."""

    arguments: Callable[[Sources, Path], list[str]]
    """The command; what it is to be after some of it is done."""
    prepare: Callable[[Sources, Path], None]
    """Lays out in a new folder what the command finds there."""
    check: Callable[[Sources, Path], None]
    """Raises where something in the folder is neither the old nor the new whole."""
    outcome: Callable[[Path], Any]
    """What is to be the same as without a disturbance."""


def make_sources(
    folder: Path, *, n_words: int = 20_000, formats: tuple[str, ...] = ("onnx", "torchscript"), engine: bool = False
) -> Sources:
    """Write the sources; exports of `formats` only, and engines where asked for, as these take seconds."""
    folder.mkdir(parents=True, exist_ok=True)
    chance = np.random.default_rng(1)
    with zipfile.ZipFile(folder / "wikitext.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for split, count in zip(SPLITS, (n_words, n_words // 10, n_words // 10)):
            rows = chance.choice([*(f"w{i}" for i in range(997)), "<unk>"], (count // 10, 10))
            archive.writestr(f"wikitext/wiki.{split}.tokens", "".join(f" {' '.join(row)} \n" for row in rows))
    config = small_config(n_layer=1)
    text = write_corpus(folder / "text", config.vocab_size, n_lines=200)
    for name, seed in (("checkpoint.pt", 0), ("other.pt", 1)):
        write_checkpoint(folder / name, config, data=text, seed=seed)
    earlier = {}
    for form in formats:
        earlier[form] = folder / f"earlier-{form}"
        export_artifact(ExportRequest(checkpoint=folder / "other.pt", out=earlier[form], format=form))  # type: ignore[arg-type]
    graph = None
    if engine:
        graph = folder / "graph"
        export_artifact(ExportRequest(checkpoint=folder / "checkpoint.pt", out=graph, format="onnx", dtype="fp16", data=text))
        before = folder / "graph-before"
        export_artifact(ExportRequest(checkpoint=folder / "other.pt", out=before, format="onnx", dtype="fp16", data=text))
        earlier["engine"] = folder / "earlier-engine"
        assert main(["export", "--artifact", str(before), "--format", "trt", "--target", "t4", "--out", str(earlier["engine"]), "-qq"]) == 0
    if "onnx" in earlier:
        receipt = ["--checkpoint", str(folder / "other.pt"), "--batch-size", "2", "--receipt", str(folder / "receipt.json")]
        assert main(["eval", "--artifact", str(earlier["onnx"]), *receipt, "-qq"]) == 0
    return Sources(folder / "wikitext.zip", text, folder / "checkpoint.pt", folder / "other.pt", earlier, graph)


def _nothing(sources: Sources, folder: Path) -> None:
    """Begin with an empty folder."""


# --- prepare


def _prepare(sources: Sources, folder: Path) -> list[str]:
    return ["data", "prepare", "wt103", "--source", str(sources.archive), "--out", str(folder / "data")]


def _check_prepared(sources: Sources, folder: Path) -> None:
    with zipfile.ZipFile(sources.archive) as archive:
        for split in SPLITS:
            path = folder / "data" / f"{split}.txt"
            assert not path.exists() or path.read_bytes() == archive.read(f"wikitext/wiki.{split}.tokens"), f"{path.name} is half"
    info = folder / "data" / "corpus.json"
    assert not info.exists() or json.loads(info.read_bytes())["format"]


def hashes(folder: Path) -> dict[str, str]:
    """Return the sha256 of every file below a folder."""
    return {str(path.relative_to(folder)): file_sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}


# --- the cache of token ids


def _tokens(sources: Sources, folder: Path) -> list[str]:
    return ["data", "stats", "--dataset", "text", "--data", str(sources.text), "--no-baselines", "--out", str(folder / "stats.json")]


def _check_tokens(sources: Sources, folder: Path) -> None:
    path = folder / "stats.json"
    assert not path.exists() or json.loads(path.read_bytes())


# --- train


def _train(sources: Sources, folder: Path) -> list[str]:
    work = folder / "W"
    if (work / "checkpoint_last.pt").exists():
        return ["train", "--work-dir", str(work), "--resume"]
    sizes = "--n-layer 2 --n-head 2 --d-head 4 --d-model 8 --d-inner 8 --mem-len 6 --batch-size 4 --tgt-len 5 --no-adaptive --dropout 0.1"
    steps = "--max-step 12 --eval-interval 3 --log-interval 1 --eval-batch-size 4 --lr 0.01 --keep-last 2 --roll --overwrite"
    return ["train", "--dataset", "text", "--data", str(sources.text), "--work-dir", str(work), *sizes.split(), *steps.split()]


def _check_trained(sources: Sources, folder: Path) -> None:
    work = folder / "W"
    for path in work.glob("checkpoint*.pt"):
        load_checkpoint(path)
    settings = work / "config.yaml"
    assert not settings.exists() or settings.read_text().endswith("\n")


def _trained(folder: Path) -> Any:
    checkpoint = load_checkpoint(folder / "W" / "checkpoint_last.pt")
    weights = hashlib.sha256()
    for name, weight in sorted(checkpoint.model.items()):
        weights.update(name.encode() + weight.numpy().tobytes())
    lines = [json.loads(line) for line in (folder / "W" / "metrics.jsonl").read_text().splitlines()]  # every line is whole
    kept = sorted(path.name for path in (folder / "W").glob("checkpoint*"))
    return checkpoint.progress["step"], weights.hexdigest(), kept, lines[-1]["kind"]


# --- export


def _export(form: str) -> Callable[[Sources, Path], list[str]]:
    def arguments(sources: Sources, folder: Path) -> list[str]:
        return ["export", "--checkpoint", str(sources.checkpoint), "--format", form, "--out", str(folder / "out"), "--overwrite"]

    return arguments


def _engine(sources: Sources, folder: Path) -> list[str]:
    return ["export", "--artifact", str(sources.graph), "--format", "trt", "--target", "t4", "--out", str(folder / "out"), "--overwrite"]


def _earlier(form: str) -> Callable[[Sources, Path], None]:
    def lay_out(sources: Sources, folder: Path) -> None:
        shutil.copytree(sources.earlier[form], folder / "out")

    return lay_out


def _check_artifact(sources: Sources, folder: Path) -> None:
    """There is always one, and a whole one."""
    found = verify(folder / "out")
    assert not found, found
    known = {file_sha256(sources.checkpoint), file_sha256(sources.other)}
    assert read_manifest(folder / "out").source.checkpoint_sha256 in known


def _exported(folder: Path) -> Any:
    manifest = read_manifest(folder / "out")
    return manifest.source, manifest.files


def _built(folder: Path) -> Any:
    manifest = read_manifest(folder / "out")
    return manifest.source, sorted(manifest.files), manifest.engine  # which kernels are fastest differs from build to build


# --- evaluate and measure


def _unproved(sources: Sources, folder: Path) -> None:
    shutil.copytree(sources.earlier["onnx"], folder / "out")
    shutil.copy(sources.other, folder / "checkpoint.pt")


def _proved(sources: Sources, folder: Path) -> None:
    _unproved(sources, folder)
    shutil.copy(sources.receipt, folder / "out")


def _eval(sources: Sources, folder: Path) -> list[str]:
    return ["eval", "--artifact", str(folder / "out"), "--checkpoint", str(folder / "checkpoint.pt"), "--batch-size", "2"]


def _check_receipt(sources: Sources, folder: Path) -> None:
    path = folder / "out" / "receipt.json"
    assert not path.exists() or Receipt.read(path).verdict().passed


def _receipt(folder: Path) -> Any:
    receipt = Receipt.read(folder / "out" / "receipt.json")
    return receipt.manifest_sha256, receipt.segments


def _bench(sources: Sources, folder: Path) -> list[str]:
    samples = ["--duration", "0.05", "--max-samples", "40", "--min-samples", "20", "--warmup", "2", "--accept-invalid"]
    shown = ["--batch-sizes", "2", "--percentiles", "50,90", "--out", str(folder / "benchmark.json")]
    return ["bench", "--artifact", str(folder / "out"), *samples, *shown]


def _check_result(sources: Sources, folder: Path) -> None:
    path = folder / "benchmark.json"
    assert not path.exists() or BenchResult.read(path).rows


def _measured(folder: Path) -> Any:
    return [(row.batch_size, row.proof) for row in BenchResult.read(folder / "benchmark.json").rows]


SCENARIOS: dict[str, Scenario] = {
    "prepare": Scenario(_prepare, _nothing, _check_prepared, lambda folder: hashes(folder / "data")),
    "tokens": Scenario(_tokens, _nothing, _check_tokens, lambda folder: hashes(folder / "cache")),
    "train": Scenario(_train, _nothing, _check_trained, _trained),
    "export onnx": Scenario(_export("onnx"), _earlier("onnx"), _check_artifact, _exported),
    "export torchscript": Scenario(_export("torchscript"), _earlier("torchscript"), _check_artifact, _exported),
    "build": Scenario(_engine, _earlier("engine"), _check_artifact, _built),
    "eval": Scenario(_eval, _unproved, _check_receipt, _receipt),
    "bench": Scenario(_bench, _proved, _check_result, _measured),
}
