"""What SECURITY.md says is refused by name, where no other test shows it; and what fuzzing found (tests/fuzz), which stays mended."""

from __future__ import annotations

import io
import json
import re
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.deploy.test_manifest import MANIFEST
from tests.fuzz.targets import checkpoint_mended
from tests.support import small_config, write_checkpoint
from txl_deploy import claims, documents
from txl_deploy.bench.report import gather, read_training, scores
from txl_deploy.bench.report.findings import Findings
from txl_deploy.manifest import write_manifest
from txl_train.checkpoint import load_model
from txl_train.data import bpe
from txl_train.data.archives import members
from txl_train.data.prepared import read_info
from txl_train.errors import ArtifactError, CheckpointError, ConfigError, DataError, EnvironmentUnfitError, ManifestError
from txl_train.interop.safetensors import read_safetensors
from txl_train.settings import resolve

ROOT = Path(__file__).resolve().parents[1]

# --- config files


def config(tmp_path: Path, text: str) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return str(path)


LAUGHS = "".join(f"  - &a{i} [{', '.join([f'*a{i - 1}'] * 9) if i else '1'}]\n" for i in range(9))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (f"model:\n  cutoffs:\n{LAUGHS}", r"run\.yaml:4: a config file repeats nothing by an alias \(`\*a0`\)"),
        ("model: &m {n_layer: 2}\noptim: {<<: *m}\n", "by an alias"),
        ("model: &m\n  cutoffs: *m\n", "by an alias"),
        (f"model:\n  cutoffs: {'[' * 5000}", "more than 20 deep"),
        (f"# {'x' * (1 << 20)}\n", "characters, as no config file has"),
        ("model: !!python/object/apply:os.system ['touch pwned']\n", "no valid YAML"),
        (f"model: {{n_layer: {'9' * 5000}}}\n", "no valid YAML"),
        ("model: {n_layer: 2001-99-99}\n", "no valid YAML"),
        ("optim: {lr: .nan}\n", "`lr`"),
        ("optim: {lr: .inf}\n", "`lr`"),
        ("model: {dropout: .nan}\n", "`dropout`"),
    ],
    ids=["laughs", "merged", "itself", "deep", "long", "code", "digits", "date", "nan", "inf", "nan-dropout"],
)
def test_a_config_file_that_unfolds_or_runs_or_counts_beyond_all_bounds_is_refused(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        resolve(config(tmp_path, text), environment={})
    assert not Path("pwned").exists()


# --- checkpoints


def test_a_checkpoint_with_a_zip_bomb_in_it_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    write_checkpoint(path, small_config())
    made = io.BytesIO()
    with zipfile.ZipFile(path) as before, zipfile.ZipFile(made, "w") as after:
        for info in before.infolist():
            bomb = info.filename.endswith("/data/0")
            content = bytes(1 << 26) if bomb else before.read(info)
            after.writestr(info.filename, content, zipfile.ZIP_DEFLATED if bomb else zipfile.ZIP_STORED)
        after.comment = before.comment
    path.write_bytes(checkpoint_mended(made.getvalue()))
    assert path.stat().st_size < 1 << 20
    with pytest.raises(CheckpointError, match="compressed"):
        load_model(path)


@pytest.mark.parametrize("shape", [[1 << 62, 4], [-1, 4], [1 << 64], [3, 3]])
def test_a_shape_that_no_file_of_this_size_can_fill_is_refused(tmp_path: Path, shape: list[int]) -> None:
    header = json.dumps({"w": {"dtype": "F32", "shape": shape, "data_offsets": [0, 16]}}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    with pytest.raises(CheckpointError, match="w"):
        read_safetensors(path)


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 2**32])
def test_a_header_longer_than_its_file_is_refused_before_it_is_read(tmp_path: Path, length: int) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match="does not fit"):
        read_safetensors(path)


def test_tensors_that_claim_more_than_they_store_are_refused(tmp_path: Path) -> None:
    """Strides of 0 make a large tensor of a small file."""
    path = tmp_path / "checkpoint.pt"
    write_checkpoint(path, small_config())
    with zipfile.ZipFile(path) as archive:
        comment = archive.comment
    payload = torch.load(path, weights_only=True)
    weights = next(value for value in payload.values() if isinstance(value, dict) and "embedding.weights.0" in value)
    weights["embedding.weights.0"] = torch.zeros(1).expand(1 << 20, 1 << 20)
    torch.save(payload, path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = comment
    path.write_bytes(checkpoint_mended(path.read_bytes()))
    with pytest.raises(CheckpointError, match="embedding"):
        load_model(path)


# --- graphs that take their numbers from elsewhere


def _field(number: int, content: bytes) -> bytes:
    size, length = len(content), b""
    while size >= 0x80:
        length += bytes([size & 0x7F | 0x80])
        size >>= 7
    key = number << 3 | 2
    head = bytes([key]) if key < 0x80 else bytes([key & 0x7F | 0x80, key >> 7])
    return head + length + bytes([size]) + content


def _tensor(location: str) -> bytes:
    return _field(13, _field(1, b"location") + _field(2, location.encode()))


PLACES = {
    "weight": lambda tensor: _field(7, _field(5, tensor)),
    "sparse weight": lambda tensor: _field(7, _field(15, _field(1, tensor))),
    "constant": lambda tensor: _field(7, _field(1, _field(5, _field(5, tensor)))),
    "constants": lambda tensor: _field(7, _field(1, _field(5, _field(10, tensor)))),
    "weight of a graph within a node": lambda tensor: _field(7, _field(1, _field(5, _field(6, _field(5, tensor))))),
    "constant of a function": lambda tensor: _field(25, _field(7, _field(5, _field(5, tensor)))),
    "training": lambda tensor: _field(20, _field(1, _field(5, tensor))),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("location", ["/etc/passwd", "../../secret", "other.bin", "*/_ORT_MEM_ADDR_/*"])
def test_a_graph_that_takes_numbers_from_outside_its_manifest_is_refused(tmp_path: Path, place: str, location: str) -> None:
    (tmp_path / "model.onnx").write_bytes(PLACES[place](_tensor(location)))
    with pytest.raises(ManifestError, match=re.escape(f"takes weights from {location}, which its manifest does not list")):
        claims.check_external_files(tmp_path / "model.onnx", MANIFEST)


def test_a_document_with_half_a_character_is_refused(tmp_path: Path) -> None:
    """No file can have it for a name. Bytes of a path that are not UTF-8 are held otherwise: test_manifest.py."""
    text = '{"schema_version": 2, "files": {"\\ud800": {"sha256": "", "bytes": 1}}}'
    with pytest.raises(ManifestError, match=r"is not valid JSON: '\\ud800' is no character, but half of one"):
        documents.parse(text, tmp_path / "manifest.json", ManifestError, "Export again.")


def test_no_manifest_can_list_an_address_in_memory(tmp_path: Path) -> None:
    """ONNX Runtime reads the memory at an offset for this name of a file."""
    name = "*/_ORT_MEM_ADDR_/*"
    (tmp_path / name).parent.mkdir(parents=True)
    (tmp_path / name).write_bytes(b"")
    (tmp_path / "model.onnx").write_bytes(b"graph")
    with pytest.raises(ManifestError, match="no file name"):
        write_manifest(tmp_path, MANIFEST, ["model.onnx", name])


def test_graphs_within_graphs_without_end_are_refused(tmp_path: Path) -> None:
    content = b""
    for _ in range(300):
        content = _field(1, _field(5, _field(6, content)))
    (tmp_path / "model.onnx").write_bytes(_field(7, content))
    with pytest.raises(ArtifactError, match="deep within each other"):
        claims.stored_matrices(tmp_path / "model.onnx")


# --- archives and prepared folders


def test_bzip2_within_a_zip_that_is_damaged_is_named(tmp_path: Path) -> None:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("train.txt", b"some words\n" * 500)
    data = made.getvalue()
    at = data.index(b"BZh") + 4
    path = tmp_path / "archive.zip"
    path.write_bytes(data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :])
    with pytest.raises(DataError, match="damaged or incomplete"):
        [list(member.blocks(1 << 20)) for member in members(path)]


def test_what_is_said_of_a_prepared_folder_is_not_read_where_it_is_nested_without_end(tmp_path: Path) -> None:
    (tmp_path / "corpus.json").write_text("[" * 100_000)
    assert read_info(tmp_path) is None


# --- records and reports


def test_a_line_of_metrics_without_a_kind_or_with_a_number_beyond_all_floats_is_passed_over(tmp_path: Path) -> None:
    good = {"kind": "train", "step": 1, "loss_nats_per_token": 2.0, "train_seconds": 1.0}
    lines: list[dict[str, Any]] = [{"step": 1, "nll_nats_per_token": 1.0}, good, {**good, "step": 2, "loss_nats_per_token": 10**400}]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    training = read_training(path)
    assert training is not None
    assert training.train == [(1, 2.0)]
    path.write_text("[" * 100_000 + "\n{}\n")
    with pytest.raises(ArtifactError, match="no JSON object"):
        read_training(path)


def test_a_perplexity_beyond_all_floats_is_no_score() -> None:
    assert scores(Findings(evaluations=[("eval.json", {"perplexity": 10**400}), ("e.json", {"perplexity": 20})]))[0].perplexity == 20.0


@pytest.mark.parametrize("content", ["[" * 100_000, '{"a":' * 60 + "1" + "}" * 60])
def test_a_record_nested_without_end_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "baselines.json").write_text(content)
    with pytest.raises(ArtifactError, match=r"baselines\.json"):
        gather(tmp_path)


def test_merges_of_somebody_else_are_refused(tmp_path: Path) -> None:
    (tmp_path / "vocab.bpe").write_text("#version: 0.2\na b\n")
    with pytest.raises(EnvironmentUnfitError, match="sha256 is another"):
        bpe.read_merges(tmp_path / "vocab.bpe")


# --- the document that promises all this


def test_every_test_that_the_threat_model_names_exists() -> None:
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", text)
    assert len(named) > 15
    for file, test in named:
        assert (ROOT / file).is_file(), file
        assert not test or f"def {test}(" in (ROOT / file).read_text(encoding="utf-8"), f"{file} has no {test}"
    for file in ("README.md", "CONTRIBUTING.md"):
        assert "SECURITY.md" in (ROOT / file).read_text(encoding="utf-8")
