"""`txl eval --artifact` writes a receipt: what it says, when there is none, and how one that proves nothing ends."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from tests.deploy.conftest import Exports
from tests.support import write_checkpoint
from txl_deploy.cli.main import main
from txl_deploy.manifest import read_manifest
from txl_deploy.receipt import Receipt
from txl_train.files import file_sha256

Capture = pytest.CaptureFixture[str]


def txl(*words: object) -> int:
    return main([str(word) for word in words])


@pytest.fixture
def artifact(exports: Exports, tmp_path: Path) -> Path:
    """Return a copy of the ONNX export without a receipt, its checkpoint beside it."""
    shutil.copy(exports.checkpoint, tmp_path)
    copy = Path(shutil.copytree(exports.onnx, tmp_path / "onnx"))
    (copy / "receipt.json").unlink(missing_ok=True)
    return copy


def test_evaluating_an_export_writes_its_receipt(artifact: Path, exports: Exports, capsys: Capture) -> None:
    assert txl("eval", "--artifact", artifact, "--batch-size", 3, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    receipt = Receipt.read(artifact / "receipt.json")
    assert receipt.manifest_sha256 == file_sha256(artifact / "manifest.json")
    assert receipt.checkpoint_sha256 == file_sha256(exports.checkpoint)
    assert receipt.corpus_sha256 == printed["corpus_sha256"]
    assert receipt.vocabulary_sha256 == read_manifest(artifact).vocabulary_sha256
    assert (receipt.batch_size, receipt.split, receipt.dataset) == (3, "test", "text")
    assert receipt.n_tokens == receipt.n_tokens_in_text - 1 == printed["n_tokens"]
    assert receipt.nll_nats_sum == pytest.approx(printed["nll_nats_sum"], rel=1e-14)
    assert receipt.verdict().passed
    assert printed["receipt"]["passed"] is True
    assert printed["receipt"]["receipt_sha256"] == file_sha256(artifact / "receipt.json")


def test_its_reference_is_the_checkpoint_in_eager_pytorch(artifact: Path, exports: Exports, capsys: Capture) -> None:
    assert txl("eval", "--artifact", artifact, "--json") == 0
    capsys.readouterr()
    assert txl("eval", "--checkpoint", exports.checkpoint, "--json") == 0
    eager = json.loads(capsys.readouterr().out)["nll_nats_sum"]
    assert Receipt.read(artifact / "receipt.json").reference_nll_nats_sum == pytest.approx(eager, rel=1e-14)


def test_a_person_is_told_the_interval_and_the_verdict(artifact: Path, capsys: Capture) -> None:
    assert txl("eval", "--artifact", artifact) == 0
    told = capsys.readouterr().out
    assert f"Receipt: {artifact / 'receipt.json'}" in told
    assert "95 % interval" in told
    assert "PASSED: its mean nll differs from the checkpoint's by" in told


def test_each_split_has_its_own(artifact: Path) -> None:
    assert txl("eval", "--artifact", artifact, "--split", "all") == 0
    assert [Receipt.read(artifact / name).split for name in ("receipt.json", "receipt-valid.json")] == ["test", "valid"]


def test_without_the_checkpoint_it_says_that_it_proves_nothing(artifact: Path, capsys: Capture) -> None:
    next(artifact.parent.glob("*.pt")).unlink()
    assert txl("eval", "--artifact", artifact) == 0
    assert "`--checkpoint FILE` makes the receipt a proof" in capsys.readouterr().out
    assert Receipt.read(artifact / "receipt.json").segments.reference_nll_nats is None


def test_the_checkpoint_may_lie_elsewhere(artifact: Path, exports: Exports) -> None:
    next(artifact.parent.glob("*.pt")).unlink()
    assert txl("eval", "--artifact", artifact, "--checkpoint", exports.checkpoint) == 0
    assert Receipt.read(artifact / "receipt.json").verdict().passed


def test_a_proof_is_not_replaced_by_what_proves_nothing(artifact: Path, capsys: Capture) -> None:
    assert txl("eval", "--artifact", artifact) == 0
    proof = (artifact / "receipt.json").read_bytes()
    next(artifact.parent.glob("*.pt")).unlink()
    assert txl("eval", "--artifact", artifact) == 0
    assert "is kept" in capsys.readouterr().out
    assert (artifact / "receipt.json").read_bytes() == proof


def test_another_checkpoint_is_refused(artifact: Path, exports: Exports, tmp_path: Path, capsys: Capture) -> None:
    from tests.support import small_config

    other = tmp_path / "other.pt"
    write_checkpoint(other, small_config(cutoffs=(5, 9, 16), div_val=2), data=exports.data, tgt_len=5, seed=9)
    assert txl("eval", "--artifact", artifact, "--checkpoint", other) == 1
    assert "was not made from" in capsys.readouterr().err
    assert not (artifact / "receipt.json").exists()


def test_an_artifact_that_computes_something_else_fails_and_its_receipt_says_so(
    artifact: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    from txl_deploy.runtimes.onnxrt import OnnxRuntime

    step = OnnxRuntime.step

    def worse(self: OnnxRuntime, *arguments: object) -> object:
        output = step(self, *arguments)  # type: ignore[arg-type]
        return output._replace(nll_BT=output.nll_BT + 1e-4)

    monkeypatch.setattr(OnnxRuntime, "step", worse)
    assert txl("eval", "--artifact", artifact) == 1
    assert "not proved on the test split: its mean nll may differ" in capsys.readouterr().err
    assert not Receipt.read(artifact / "receipt.json").verdict().passed


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--max-size", 2), "not the whole split"),
        (("--repeat", 2), "not the whole split"),
        (("--manual", "w1 w2 w3"), "no split of a corpus"),
        (("--protocol", "nvidia-2023", "--tgt-len", 5, "--mem-len", 7), "does not score every token once"),
    ],
)
def test_what_is_no_whole_split_gives_none(artifact: Path, capsys: Capture, options: tuple[object, ...], reason: str) -> None:
    assert txl("eval", "--artifact", artifact, *options) == 0
    assert "No receipt is written: " in (told := capsys.readouterr().err)
    assert reason in told
    assert not (artifact / "receipt.json").exists()


def test_none_is_written_where_none_is_wanted_or_elsewhere_where_that_is_said(artifact: Path, tmp_path: Path) -> None:
    assert txl("eval", "--artifact", artifact, "--no-receipt") == 0
    assert txl("eval", "--artifact", artifact, "--receipt", tmp_path / "mine.json") == 0
    assert not (artifact / "receipt.json").exists()
    assert Receipt.read(tmp_path / "mine.json").verdict().passed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--checkpoint", "{checkpoint}", "--receipt", "r.json"), "receipts are of exported models"),
        (("--artifact", "{artifact}", "--receipt", "r.json", "--split", "all"), "there is a receipt for each split"),
        (("--artifact", "{artifact}", "--receipt", "{checkpoint}"), "is no earlier result"),
        (("--artifact", "{artifact}", "--receipt", "r.json", "--max-size", "2"), "not the whole split"),
    ],
)
def test_a_receipt_that_cannot_be_is_refused_first(
    artifact: Path, exports: Exports, capsys: Capture, words: tuple[str, ...], message: str
) -> None:
    assert txl("eval", *(word.format(artifact=artifact, checkpoint=exports.checkpoint) for word in words)) == 2
    assert message in capsys.readouterr().err


def test_verify_looks_at_the_receipts_too(artifact: Path, capsys: Capture) -> None:
    assert txl("eval", "--artifact", artifact) == 0
    assert txl("verify", artifact) == 0
    assert "ok       receipt.json perplexity" in capsys.readouterr().out
    receipt = Receipt.read(artifact / "receipt.json")
    for change, told in (({"manifest_sha256": "e" * 64}, "is stale"), ({"dtype": "fp16"}, "is not of what the manifest describes")):
        dataclasses.replace(receipt, **change).write(artifact / "receipt.json")
        assert txl("verify", artifact) == 1
        assert f"FAILED   receipt.json {told}" in capsys.readouterr().out
