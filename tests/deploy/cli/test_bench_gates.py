"""Each gate of `txl bench` refuses: no number of a model that is not proved, no verdict on figures that are not to be believed."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from tests.deploy.conftest import Exports
from txl_deploy.bench.result import BenchResult
from txl_deploy.cli.main import main
from txl_deploy.export.artifact import ExportRequest, export_artifact
from txl_deploy.manifest import read_manifest, write_manifest
from txl_deploy.receipt import Receipt
from txl_train.files import file_sha256

Capture = pytest.CaptureFixture[str]

QUICK = ("--duration", "0", "--min-samples", "12", "--max-samples", "12", "--accept-invalid")
ONE = ("--batch-sizes", "2", *QUICK)


def txl(*words: object) -> int:
    return main([str(word) for word in words])


@pytest.fixture
def artifact(proved: Exports, tmp_path: Path) -> Path:
    """Return a copy of the ONNX export with its receipt."""
    return Path(shutil.copytree(proved.onnx, tmp_path / "onnx"))


def rewritten(artifact: Path, **changes: object) -> None:
    """Write the manifest anew, so that its checksums fit what lies there now."""
    manifest = dataclasses.replace(read_manifest(artifact), **changes)  # type: ignore[arg-type]
    write_manifest(artifact, manifest, manifest.files)


def refusal(capsys: Capture) -> str:
    """Return what was said of a refusal, after which nothing may have been measured."""
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "timed steps of each" not in captured.err
    return captured.err


def test_with_its_receipt_an_artifact_is_measured_and_every_row_names_the_proof(artifact: Path, capsys: Capture) -> None:
    assert txl("bench", "--artifact", artifact, *ONE, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    (row,) = document["rows"]
    sha256 = file_sha256(artifact / "receipt.json")
    assert (row["proof"]["kind"], row["proof"]["receipt_sha256"]) == ("receipt", sha256)
    assert document["unvalidated"] is False
    (receipt,) = document["receipts"]
    assert (receipt["receipt_sha256"], receipt["passed"]) == (sha256, True)
    assert "segments" not in receipt


def test_a_missing_receipt_is_refused(artifact: Path, capsys: Capture) -> None:
    (artifact / "receipt.json").unlink()
    assert txl("bench", "--artifact", artifact, *ONE) == 1
    told = refusal(capsys)
    assert "has no receipt for the test split" in told
    assert f"txl eval --artifact {artifact} --checkpoint FILE --split test" in told


def test_a_flipped_weight_is_refused(artifact: Path, capsys: Capture) -> None:
    graph = artifact / "model.onnx"
    content = bytearray(graph.read_bytes())
    content[len(content) // 2] ^= 1
    graph.write_bytes(content)
    assert txl("bench", "--artifact", artifact, *ONE) == 4
    assert "was changed" in refusal(capsys)


def test_a_flipped_weight_under_a_manifest_that_was_made_to_fit_is_refused(artifact: Path, capsys: Capture) -> None:
    from onnx import load, numpy_helper, save

    graph = load(artifact / "model.onnx")
    weight = max(graph.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    values = numpy_helper.to_array(weight).copy()
    values.flat[0] += 1
    weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    save(graph, artifact / "model.onnx")
    rewritten(artifact)
    assert txl("bench", "--artifact", artifact, *ONE) == 1
    assert "of another artifact: it is stale" in refusal(capsys)


def test_another_split_is_refused(artifact: Path, capsys: Capture) -> None:
    assert txl("bench", "--artifact", artifact, *ONE, "--split", "valid") == 1
    assert "no receipt for the valid split (there is receipt.json" in refusal(capsys)
    shutil.copy(artifact / "receipt.json", artifact / "receipt-valid.json")
    assert txl("bench", "--artifact", artifact, *ONE, "--split", "valid") == 1
    assert "of another split: test there, valid here" in refusal(capsys)


def test_another_text_is_refused(artifact: Path, proved: Exports, tmp_path: Path, capsys: Capture) -> None:
    other = Path(shutil.copytree(proved.data, tmp_path / "data"))
    (other / "test.txt").write_text((other / "valid.txt").read_text())
    assert txl("bench", "--artifact", artifact, *ONE, "--data", other) == 1
    assert "of another text" in refusal(capsys)


def test_a_receipt_for_other_lengths_is_refused(proved: Exports, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "longer"
    export_artifact(ExportRequest(checkpoint=proved.checkpoint, out=out, format="torchscript", mem_len=9))
    shutil.copy(proved.torchscript / "receipt.json", out)
    assert txl("bench", "--artifact", out, *ONE) == 1
    assert "for other lengths: tgt 5, mem 7, ext 0, no clamp there, tgt 5, mem 9" in refusal(capsys)


def test_a_stale_receipt_is_refused(proved: Exports, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "again"
    export_artifact(ExportRequest(checkpoint=proved.checkpoint, out=out, format="torchscript", memory="hidden"))
    shutil.copy(proved.torchscript / "receipt.json", out)
    assert txl("bench", "--artifact", out, *ONE) == 1
    assert "it is stale (sha256 of the manifest)" in refusal(capsys)


def test_a_renamed_runtime_is_refused(proved: Exports, tmp_path: Path, capsys: Capture) -> None:
    """As NVIDIA's `--type onnx` of 2019, which timed the model in Python under that name."""
    disguised = Path(shutil.copytree(proved.torchscript, tmp_path / "onnx"))
    (disguised / "model.pt").rename(disguised / "model.onnx")
    manifest = read_manifest(disguised)
    files = ["model.onnx" if name == "model.pt" else name for name in manifest.files]
    write_manifest(disguised, dataclasses.replace(manifest, format="onnx"), files)
    assert txl("bench", "--artifact", disguised, *ONE) == 4
    assert "cannot be read as ONNX" in refusal(capsys)


def test_a_provider_other_than_the_proved_one_is_refused(artifact: Path, capsys: Capture) -> None:
    path = artifact / "receipt.json"
    dataclasses.replace(Receipt.read(path), provider="CUDAExecutionProvider", device="cuda").write(path)
    assert txl("bench", "--artifact", artifact, *ONE) == 1
    assert "of another provider: CUDAExecutionProvider fp32 there, CPUExecutionProvider fp32 here" in refusal(capsys)


def test_a_failed_receipt_is_refused(artifact: Path, capsys: Capture) -> None:
    path = artifact / "receipt.json"
    receipt = Receipt.read(path)
    worse = dataclasses.replace(receipt.segments, nll_nats=[value + 0.1 for value in receipt.segments.nll_nats])
    dataclasses.replace(receipt, segments=worse).write(path)
    assert txl("bench", "--artifact", artifact, *ONE) == 1
    assert "proves nothing: its mean nll may differ" in refusal(capsys)


def test_a_receipt_that_was_edited_is_refused(artifact: Path, capsys: Capture) -> None:
    path = artifact / "receipt.json"
    path.write_text(path.read_text().replace('"split": "test"', '"split": "train"'))
    assert txl("bench", "--artifact", artifact, *ONE) == 4
    assert "was changed after it was written" in refusal(capsys)


def test_timed_steps_that_are_not_those_of_the_receipt_fail(artifact: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    """A runtime that computes something else while it is timed: the receipt was made honestly."""
    from txl_deploy.runtimes.onnxrt import OnnxRuntime

    step = OnnxRuntime.step

    def lazy(self: OnnxRuntime, *arguments: object) -> object:
        output = step(self, *arguments)  # type: ignore[arg-type]
        return output._replace(nll_BT=output.nll_BT * 0.999)

    monkeypatch.setattr(OnnxRuntime, "step", lazy)
    assert txl("bench", "--artifact", artifact, *ONE) == 1
    captured = capsys.readouterr()
    assert "FAILED: 1 of 1 rows" in captured.out
    assert "Error: The perplexity of onnx at batch size 2" in captured.err


def test_a_batch_size_at_which_nothing_was_compared_is_invalid_without_the_checkpoint(
    artifact: Path, proved: Exports, capsys: Capture
) -> None:
    other = ("--batch-sizes", "3", *QUICK, "--json")
    assert txl("bench", "--artifact", artifact, *other) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert (row["verified"], row["valid"]) == (None, False)
    assert any("compared with nothing" in reason for reason in row["invalid_reasons"])
    assert txl("bench", "--artifact", artifact, "--checkpoint", proved.checkpoint, *other) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert all(row["verified"] and not any("nothing" in reason for reason in row["invalid_reasons"]) for row in rows)


def test_batch_sizes_that_an_export_does_not_take_are_refused_first(proved: Exports, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "fixed"
    export_artifact(ExportRequest(checkpoint=proved.checkpoint, out=out, format="torchscript", batch_size=2))
    assert txl("bench", "--artifact", out, "--unvalidated", "--batch-sizes", "1..4", *QUICK) == 2
    assert "takes batch sizes of 2 to 2, but 1 was asked for" in refusal(capsys)


def test_too_few_samples_are_invalid_and_end_with_1_after_the_result(artifact: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "benchmark.json"
    few = ("--batch-sizes", "2", "--duration", "0", "--min-samples", "100", "--max-samples", "100")
    assert txl("bench", "--artifact", artifact, *few, "--out", out) == 1
    captured = capsys.readouterr()
    assert "1 of 1 rows are INVALID" in captured.err
    (row,) = BenchResult.read(out).rows
    assert row.valid is False
    assert any("p99" in reason for reason in row.invalid_reasons)


def test_unvalidated_measures_and_stamps(artifact: Path, tmp_path: Path, capsys: Capture) -> None:
    (artifact / "receipt.json").unlink()
    out = tmp_path / "benchmark.json"
    assert txl("bench", "--artifact", artifact, *ONE, "--unvalidated", "--out", out) == 0
    assert "UNVALIDATED" in capsys.readouterr().out
    result = BenchResult.read(out)
    assert result.unvalidated is True
    assert result.rows[0].proof is not None
    assert (result.rows[0].proof.kind, "has no receipt" in result.rows[0].proof.reason) == ("none", True)


def test_a_receipt_may_lie_elsewhere(artifact: Path, tmp_path: Path) -> None:
    (artifact / "receipt.json").rename(tmp_path / "mine.json")
    assert txl("bench", "--artifact", artifact, *ONE, "--receipt", tmp_path / "mine.json") == 0
    assert txl("bench", "--artifact", artifact, *ONE, "--receipt", tmp_path / "none.json") == 2


def test_results_of_different_boundaries_are_never_compared(artifact: Path, tmp_path: Path, capsys: Capture) -> None:
    for name in ("step_device_resident", "step_with_state_roundtrip"):
        assert txl("bench", "--artifact", artifact, *ONE, "--boundary", name, "--out", tmp_path / f"{name}.json") == 0
    capsys.readouterr()
    assert txl("bench", "compare", *(tmp_path / f"{name}.json" for name in ("step_device_resident", "step_with_state_roundtrip"))) == 1
    told = capsys.readouterr().err
    assert "step_device_resident" in told
    assert "step_with_state_roundtrip" in told


def test_targets_that_are_missed_end_with_1_after_the_result(artifact: Path, capsys: Capture) -> None:
    for option, value, told in (
        ("--target-perplexity", 1.5, "above the target 1.5"),
        ("--target-throughput", 1e12, "below the target 1e+12"),
    ):
        assert txl("bench", "--artifact", artifact, *ONE, option, value, "--json") == 1
        captured = capsys.readouterr()
        assert json.loads(captured.out)["rows"]
        assert told in captured.err
    assert txl("bench", "--artifact", artifact, *ONE, "--target-perplexity", 1e9, "--target-throughput", 1e-9) == 0


def test_save_data_writes_where_one_stands(artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert txl("bench", "--artifact", artifact, *ONE, "--save-data") == 0
    assert BenchResult.read(tmp_path / "benchmark.json").rows


def test_two_that_take_turns_are_compared_pair_by_pair(proved: Exports, tmp_path: Path, capsys: Capture) -> None:
    both, out = ("--artifact", proved.torchscript, "--artifact", proved.onnx), tmp_path / "ab.json"
    assert txl("bench", *both, *ONE, "--ab", "--max-regression", "9900%", "--out", out) == 0
    (comparison,) = BenchResult.read(out).comparisons
    assert (comparison["batch_size"], comparison["paired"], comparison["regression"]) == (2, True, False)
    assert "Median latency of onnx (onnx) over torchscript (torchscript), pairs of turns" in capsys.readouterr().out


def test_a_regression_ends_with_1(artifact: Path, monkeypatch: pytest.MonkeyPatch, proved: Exports, capsys: Capture) -> None:
    import time

    from txl_deploy.runtimes.onnxrt import OnnxRuntime

    step = OnnxRuntime.step

    def slow(self: OnnxRuntime, *arguments: object) -> object:
        time.sleep(0.02)
        return step(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(OnnxRuntime, "step", slow)
    three = ("--checkpoint", proved.checkpoint, "--artifact", proved.torchscript, "--artifact", artifact)
    assert txl("bench", *three, *ONE, "--ab") == 1
    assert "beyond 2.0% by its whole interval" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--artifact", "{artifact}", "--ab"), "`--ab` compares two"),
        (("--artifact", "{artifact}", "--ab", "--max-regression", "much"), "`much` is no share"),
        (("--artifact", "{artifact}", "--save-data", "--out", "x.json"), "two files for one result"),
        (("--artifact", "{artifact}", "compare", "a.json", "b.json"), "stands before `compare`"),
        (("--artifact", "{artifact}", "comparr"), "Did you mean `compare`?"),
        (("--artifact", "{artifact}", "--boundary", "enqueue_only"), "step-device-resident"),
    ],
)
def test_what_cannot_be_meant_is_refused(artifact: Path, capsys: Capture, words: tuple[str, ...], message: str) -> None:
    assert txl("bench", *(word.format(artifact=artifact) for word in words)) == 2
    assert message in refusal(capsys)
