"""Readers of what exports, builds and measurements leave behind: folders of engines and TorchScript, records, reports, merges."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.deploy.bench.test_training import row as training_row
from tests.deploy.test_manifest_chain import write_engine, write_graph
from tests.fuzz.harness import Target
from tests.support import small_config, write_checkpoint, write_corpus
from txl_deploy import claims, documents
from txl_deploy.bench.report import flat_facts, format_markdown, gather, read_training, scores
from txl_deploy.bench.report.findings import baseline_levels, corpus_splits, format_value, in_bits
from txl_deploy.bench.training import TrainingResult, scaling_tables
from txl_deploy.export.artifact import ExportRequest, export_artifact
from txl_deploy.manifest import FILE_NAME, PARENT_FILE, Parent, read_manifest, read_verified, unlisted, verify, write_manifest
from txl_deploy.receipt import examine
from txl_deploy.runtimes.registry import open_artifact
from txl_train.data import bpe
from txl_train.files import file_sha256

CONFIG = small_config(cutoffs=(5, 9, 16), div_val=1, n_layer=1)
BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def document_mended(data: bytes) -> bytes:
    """Return a manifest or a receipt with the checksum of its content."""
    document = json.loads(data)
    document.pop("sha256", None)
    document["sha256"] = documents.content_sha256(document)
    return json.dumps(document).encode()


@functools.cache
def _exported(form: Any) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = Path(scratch) / "checkpoint.pt"
        data = write_corpus(Path(scratch) / "data", CONFIG.vocab_size)
        write_checkpoint(checkpoint, CONFIG, data=data)
        export_artifact(ExportRequest(checkpoint=checkpoint, out=Path(scratch) / form, format=form))
        return {path.name: path.read_bytes() for path in (Path(scratch) / form).iterdir()}


def export(folder: Path, form: Any) -> None:
    """Write an export of a small model into `folder`."""
    for name, content in _exported(form).items():
        (folder / name).write_bytes(content)


def open_onnx(folder: Path) -> object:
    """Open a graph whose manifest somebody has made fit it."""
    manifest = read_manifest(folder)
    write_manifest(folder, manifest, list(manifest.files))
    return open_artifact(folder, threads=1).info


def read_weights(folder: Path) -> object:
    """Read a graph's weights as they are read before ONNX Runtime sees the graph."""
    claims.check_external_files(folder / "model.onnx", read_manifest(folder))
    return claims.stored_matrices(folder / "model.onnx")


def _engine(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        write_engine(Path(scratch) / "engine", write_graph(Path(scratch) / "graph"))
        for path in (Path(scratch) / "engine").iterdir():
            (folder / path.name).write_bytes(path.read_bytes())


def _verify(folder: Path) -> object:
    """What `txl verify` does."""
    manifest = read_manifest(folder)
    return verify(folder), unlisted(folder, manifest), examine(folder, manifest, file_sha256(folder / FILE_NAME))


def _verify_parent(folder: Path) -> object:
    """Look at an engine whose manifest somebody has made fit the graph's that lies beside it."""
    manifest = read_manifest(folder)
    parent = Parent(manifest_sha256=file_sha256(folder / PARENT_FILE), format="onnx")
    source = dataclasses.replace(manifest.source, parent=parent)
    write_manifest(folder, dataclasses.replace(manifest, source=source), ["model.plan", PARENT_FILE])
    return read_verified(folder)


def _training_result(folder: Path) -> None:
    TrainingResult(command="txl bench train", settings={}, environment={}, rows=[training_row()]).write(folder / "training_benchmark.json")


_METRICS = (
    {"kind": "start", "step": 0, "flops_per_token": 1e6},
    {"kind": "train", "step": 1, "loss_nats_per_token": 5.5, "train_seconds": 1.0},
    {"kind": "train", "step": 2, "loss_nats_per_token": 5.25, "train_seconds": 2.0},
    {"kind": "valid", "step": 2, "nll_nats_per_token": 5.0, "perplexity": 148.4},
    {"kind": "test", "step": 2, "nll_nats_per_token": 5.1, "bits_per_char": 7.3},
)


def _metrics(folder: Path) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in _METRICS))


def _baselines(folder: Path) -> None:
    document = {
        "vocabulary": {"unit": "word", "size": 9},
        "splits": {"train": {"n_tokens": 900, "lines": 30}},
        "bigram": {"perplexity": 30.5, "split": "valid", "n_tokens": 100, "batch_size": 4},
    }
    for name in ("baselines.json", "evaluation.json", "parity.json"):
        (folder / name).write_text(json.dumps({**document, "perplexity": 20.5, "runtime": "onnx"}))


def _report(folder: Path) -> object:
    """What `txl report` reads and shows, the page left out."""
    content = (folder / "baselines.json").read_bytes()
    for name in ("evaluation.json", "parity.json", "comparison.json"):
        (folder / name).write_bytes(content)
    found = gather(folder)
    facts = [(name, format_value(value)) for name, value in flat_facts(found.baselines or {})]
    return format_markdown(found), scores(found), baseline_levels(found), corpus_splits(found.baselines), in_bits(found), facts


def _read_training(folder: Path) -> object:
    result = TrainingResult.read(folder / "training_benchmark.json")
    return scaling_tables(result.rows), result.to_json()


def _merges(folder: Path) -> None:
    (folder / "vocab.bpe").write_bytes((Path(bpe.__file__).parent / "gpt2" / "vocab.bpe").read_bytes())


def _read_merges(folder: Path) -> object:
    """The merges as the package reads them; only those that came with it are accepted."""
    return bpe.read_merges(folder / "vocab.bpe")


def _encode(folder: Path) -> None:
    text = (folder / "text.txt").read_bytes().decode("utf-8", "replace")
    assert bpe.decode(bpe.encoder()(text)) == text


def _text(folder: Path) -> None:
    (folder / "text.txt").write_text("Some words, 12 numbers; it's\n\n   blanks \t and é, 漢字, 👩\u200d🚀.\n" * 3)


def _workload(folder: Path) -> None:
    (folder / "w.yaml").write_bytes((BENCHMARKS / "workloads" / "base-cpu-fp32.yaml").read_bytes())


def _read_workload(folder: Path) -> object:
    if str(BENCHMARKS) not in sys.path:
        sys.path.append(str(BENCHMARKS))
    return importlib.import_module("speed").read_workload(folder / "w.yaml")


ONNX = (b"location", b"../../etc/passwd", b"/etc/passwd", b"external", b"\xff\xff\xff\x7f", b"\xff" * 10, b"j\x08location")
_SCRIPT = (b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06", b"__torch__", b"def forward", b"torch.system")
_TEXT = (b"<|endoftext|>", b" " * 500, b"\xed\xa0\x80", b"\xf0\x9f", b"'s", b"\x00")
_YAML = (b"&a", b"*a", b"<<: *a", b"- ", b": ", b"{", b"[", b".nan", b"2001-99-99", b"!!python/name:os.system", b"9" * 5000)
_LINES = (b"\n", b"{", b"}", b"NaN", b"1e999", b"9" * 5000, b"9" * 400, b'"step":', b'"kind": "train"', b"null", b"[" * 3000)

ARTIFACTS = (
    Target("onnx-weights", "model.onnx", lambda f: export(f, "onnx"), read_weights, tokens=ONNX),
    Target("engine-manifest", "manifest.json", _engine, _verify, mend=document_mended, kind="json"),
    Target("engine-parent", "parent.json", _engine, _verify_parent, mend=document_mended, kind="json"),
    Target("engine-plan", "model.plan", _engine, open_artifact, opens=False),
    Target("torchscript", "model.pt", lambda f: export(f, "torchscript"), lambda f: open_artifact(f, threads=1), tokens=_SCRIPT),
    Target(
        "onnx-manifest",
        "manifest.json",
        lambda f: export(f, "onnx"),
        lambda f: open_artifact(f, threads=1),
        mend=document_mended,
        kind="json",
        cost=20,
    ),
    Target("bench-training", "training_benchmark.json", _training_result, _read_training, kind="json"),
    Target("metrics", "metrics.jsonl", _metrics, lambda f: read_training(f / "metrics.jsonl"), tokens=_LINES),
    Target("report", "baselines.json", _baselines, _report, kind="json"),
    Target("bpe-merges", "vocab.bpe", _merges, _read_merges),
    Target("bpe-text", "text.txt", _text, _encode, tokens=_TEXT, refuses=False),
    Target("workload", "w.yaml", _workload, _read_workload, tokens=_YAML),
)
