"""`txl bench` and `txl report` from the command line: what they print, what they refuse, how they end."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.deploy.bench.samples import result_of, rows_of
from tests.deploy.conftest import TGT_LEN
from tests.support import small_config, write_checkpoint
from txl_deploy.bench.result import BenchResult
from txl_deploy.cli import options
from txl_deploy.cli.main import main

FEW = ("--duration", "0", "--min-samples", "3", "--max-samples", "3", "--accept-invalid")


def txl(*words):
    return main([str(word) for word in words])


@pytest.fixture
def measured(proved, tmp_path, capsys):
    """Measure everything at two batch sizes, once, and return (exit code, standard output, result file)."""
    out = tmp_path / "benchmark.json"
    artifacts = ("--artifact", proved.torchscript, "--artifact", proved.onnx)
    code = txl("bench", *artifacts, "--checkpoint", proved.checkpoint, "--batch-sizes", "1..2", *FEW, "--out", out, "--json")
    return code, capsys.readouterr().out, out


def test_every_runtime_is_measured_and_verified_at_every_batch_size(measured, proved):
    code, printed, out = measured
    document = json.loads(printed)
    assert code == 0
    assert document == json.loads(out.read_text())
    assert [(row["runtime"], row["batch_size"]) for row in document["rows"]] == [
        (runtime, size) for size in (1, 2) for runtime in ("pytorch", "torchscript", "onnx")
    ]
    assert [row["verified"] for row in document["rows"]] == [True] * 6
    assert {row["tgt_len"] for row in document["rows"]} == {TGT_LEN}
    assert document["workload"]["dataset"] == "text"
    assert document["environment"]["packages"]["torch"]
    assert BenchResult.read(out).verified is True


def test_a_table_is_for_people_and_progress_stays_off_standard_output(proved, capsys):
    assert txl("bench", "--artifact", proved.torchscript, "--checkpoint", proved.checkpoint, "--batch-sizes", "2", *FEW) == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines()[1].split()[0] == "Runtime"
    assert "Verified: the perplexity of every row's timed steps is the checkpoint's" in printed.out
    assert "timed steps of each" not in printed.out


def test_without_a_checkpoint_the_receipt_is_the_proof(proved, capsys):
    assert txl("bench", "--artifact", proved.torchscript, "--batch-sizes", "1", *FEW) == 0
    told = capsys.readouterr().out
    assert "Receipt " in told
    assert "`--checkpoint FILE` does so at every batch size" in told


def test_a_checkpoint_alone_is_measured_with_the_lengths_asked_for(proved, capsys):
    assert txl("bench", "--checkpoint", proved.checkpoint, "--tgt-len", 3, "--mem-len", 4, "--batch-sizes", "1", *FEW, "--json") == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert (row["tgt_len"], row["mem_len"], row["is_reference"]) == (3, 4, True)


def test_an_artifact_that_computes_something_else_ends_with_1_after_the_result(proved, capsys, monkeypatch):
    from txl_deploy.runtimes.torchscript import TorchScriptRuntime

    honest = TorchScriptRuntime.step

    def off_by_a_thousandth(self, *arguments):
        output = honest(self, *arguments)
        return output._replace(nll_BT=output.nll_BT + 1e-3)

    monkeypatch.setattr(TorchScriptRuntime, "step", off_by_a_thousandth)
    assert txl("bench", "--artifact", proved.torchscript, "--checkpoint", proved.checkpoint, "--batch-sizes", "1", *FEW, "--json") == 1
    printed = capsys.readouterr()
    document = json.loads(printed.out)
    assert document["verified"] is False
    assert [row["verified"] for row in document["rows"]] == [True, False]
    assert "1.0e-03 away from the checkpoint's" in printed.err
    assert "txl parity" in printed.err


def test_an_artifact_of_another_checkpoint_is_refused(proved, tmp_path, capsys):
    other = tmp_path / "other.pt"
    write_checkpoint(other, small_config(cutoffs=(5, 9, 16), div_val=2), data=proved.data, tgt_len=TGT_LEN, seed=9)
    assert txl("bench", "--artifact", proved.torchscript, "--checkpoint", other, "--batch-sizes", "1", *FEW) == 4
    assert "was not made from" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ((), 2, "--artifact DIR"),
        (("--artifact", "absent"), 4, "There is no folder absent"),
        (("--checkpoint", "absent.pt"), 2, "absent.pt"),
        (("--artifact", "ARTIFACT", "--batch-sizes", "0"), 2, "--batch-sizes 1..32"),
        (("--artifact", "ARTIFACT", "--percentiles", "50,101"), 2, "between 0 and 100"),
        (("--artifact", "ARTIFACT", "--min-samples", "9", "--max-samples", "3"), 2, "--min-samples"),
        (("--artifact", "ARTIFACT", "--duration", "-1"), 2, "duration_s"),
        (("--artifact", "ARTIFACT", "--tgt-len", "3"), 2, "was exported for"),
        (("--artifact", "ARTIFACT", "--batch-sizes", "100000"), 2, "too few for 100000 streams"),
        (("--artifact", "ARTIFACT", "--data", "absent"), 2, "absent"),
        (("--artifact", "ARTIFACT", "--out", "ARTIFACT/manifest.json/x.json"), 3, "cannot be written"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_measuring(proved, capsys, words, code, message):
    words = [word.replace("ARTIFACT", str(proved.torchscript)) for word in words]
    assert txl("bench", *words) == code
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.out == ""


def test_underscores_are_understood(proved, capsys):
    assert (
        txl("bench", "--artifact", proved.torchscript, "--batch_sizes", 1, "--min_samples", 2, "--max_samples", 2, "--accept_invalid") == 0
    )
    assert "ONNX" not in capsys.readouterr().out


def test_the_recorded_command_can_be_given_again_and_names_no_home_folder(monkeypatch):
    home = str(Path("~").expanduser())
    monkeypatch.setattr(
        options.sys, "argv", ["/somewhere/txl", "bench", "--artifact", os.path.join(home, "my models"), "--out", "a b.json"]
    )
    assert options.command_line() == "txl bench --artifact ~'/my models' --out 'a b.json'"


def test_a_report_is_written_beside_its_charts(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="needs the extra `report`")
    result_of(rows_of((1, 2))).write(tmp_path / "benchmark.json")
    assert txl("report", "--work-dir", tmp_path, "--json") == 0
    assert json.loads(capsys.readouterr().out) == {
        "report": str(tmp_path / "report.html"),
        "charts": [str(tmp_path / f"{name}.png") for name in ("latency", "throughput", "distributions")],
    }
    assert (tmp_path / "report.html").read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ((), 2, "--work-dir"),
        (("--bench", "absent.json"), 2, "--out FILE"),
        (("--bench", "absent.json", "--out", "OUT/report.html"), 4, "There is no result file absent.json"),
        (("--work-dir", "OUT"), 2, "nothing to report"),
        (("--work-dir", "OUT/absent"), 2, "There is no folder"),
        (("--metrics", "absent.jsonl", "--out", "OUT/report.html"), 4, "absent.jsonl"),
    ],
)
def test_a_report_of_nothing_is_refused(tmp_path, capsys, words, code, message):
    assert txl("report", *(word.replace("OUT", str(tmp_path)) for word in words)) == code
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
