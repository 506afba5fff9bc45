"""`txl bench train` from the command line: the specification's lines and table, the result file, and how it ends."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from tests.deploy.bench.test_training import of_rate
from tests.support import write_corpus
from txl_deploy.bench import training_runs
from txl_deploy.bench.training import TrainingResult, TrainingRow, measured_row
from txl_deploy.bench.training_runs import Combination
from txl_deploy.cli.main import main

MODEL = ["--n_layer", "1", "--n_head", "2", "--d_head", "4", "--d_model", "8", "--d_inner", "8", "--mem_len", "6", "--tgt_len", "5"]
SMALL = [*MODEL, "--dataset", "text", "--eval_tgt_len", "5", "--eval_batch_size", "4", "--device", "cpu", "--threads", "1"]
FEW = ["--steps", "25", "--warmup", "5"]


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in [name for name in os.environ if name.startswith("TXL_") and name != "TXL_SHARED_DIR"]:
        monkeypatch.delenv(variable)


def bench_train(*words: object) -> int:
    return main(["bench", "train", *map(str, words)])


def test_a_training_is_measured_and_shown_as_the_specification_shows_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder, out = write_corpus(tmp_path / "text", 20), tmp_path / "training.json"
    assert bench_train("--data", folder, *SMALL, *FEW, "--batch-sizes", 4, "--dtypes", "fp32", "--out", out) == 0
    printed = capfd.readouterr()
    lines = printed.out.splitlines()
    assert re.fullmatch(r"Training time: \d+\.\d\d minutes", lines[0])
    assert re.fullmatch(r"Training throughput: \d+\.\d\d tok/s", lines[1])
    assert "fp32, 1 process, batch size 4 each" in lines[2]
    assert "VALID" in lines[2]
    assert lines[4].startswith("| Processes | Batch Size / Process | Throughput - FP32 (tok/s) |")
    steps = [line for line in printed.err.splitlines() if re.match(r"\| epoch +\d+ step +\d+ \| batches", line)]
    assert len(steps) == 25

    result = TrainingResult.read(out)
    (row,) = result.rows
    assert row.tokens_per_step[0] == 4 * 5
    assert row.tokens_per_s is not None
    assert f"{row.tokens_per_s:,.1f}" in lines[6]
    assert (row.device, row.threads, row.dtype) == ("cpu", 1, "fp32")
    assert row.loss_first is not None
    assert str(tmp_path) not in json.dumps([result.settings, result.environment])
    assert set(tmp_path.iterdir()) == {folder, out}


@pytest.mark.slow
def test_two_processes_train_twice_the_streams(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = write_corpus(tmp_path / "text", 20)
    options = ["--data", folder, *SMALL, *FEW, "--batch-sizes", 4, "--processes", "1,2", "--dtypes", "bf16", "--json"]
    assert bench_train(*options) == 0
    document = json.loads(capfd.readouterr().out)
    found = [(row["processes"], row["dtype"], row["tokens_per_step"][0], row["skipped"]) for row in document["rows"]]
    assert found == [(1, "bf16", 20, None), (2, "bf16", 40, None)]


def faked(monkeypatch: pytest.MonkeyPatch, rows: dict[str, TrainingRow]) -> None:
    """Give these rows, by precision, for trainings."""

    def run(combination: Combination, *_: object, **__: object) -> TrainingRow:
        return rows[combination.dtype]

    monkeypatch.setattr(training_runs, "run", run)


def test_if_nothing_can_be_run_the_exit_code_says_that_the_machine_is_unfit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    skipped = of_rate(None, processes=1, batch_size=16, dtype="fp32")
    faked(monkeypatch, {"fp32": skipped})
    out = tmp_path / "training.json"
    assert bench_train("--config", "tiny", "--dtypes", "fp32", "--device", "cpu", "--out", out) == 3
    assert "None of the trainings could be run here" in capfd.readouterr().err
    assert TrainingResult.read(out).rows == [skipped]


def test_what_was_skipped_beside_what_ran_is_no_failure(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    skipped = of_rate(None, processes=1, batch_size=16, dtype="fp32")
    faked(monkeypatch, {"fp32": skipped, "bf16": of_rate(100.0, processes=1, batch_size=16, dtype="bf16")})
    assert bench_train("--config", "tiny", "--device", "cpu") == 0
    assert "fp32, 1 process, batch size 16 each: skipped: memory ran out" in capfd.readouterr().out


def test_a_training_that_diverged_is_exit_1(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    broken = measured_row([], processes=1, batch_size=16, dtype="fp32", device="cpu", steps=30, warmup_steps=5, failure="Training diverged")
    faked(monkeypatch, {"fp32": broken})
    assert bench_train("--config", "tiny", "--dtypes", "fp32", "--device", "cpu") == 1
    printed = capfd.readouterr()
    assert "INVALID: Training diverged" in printed.out
    assert "1 of 1 trainings are INVALID" in printed.err


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--dtypes", "fp8"], "no precision of training"),
        (["--processes", "1,0"], "no list of numbers"),
        (["--batch-sizes", "x"], "batch size"),
        (["--dtype", "fp16"], "--dtypes"),
    ],
)
def test_wrong_usage_is_told_before_anything_is_trained(options: list[str], reason: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert bench_train("--config", "tiny", *options) == 2
    assert reason in capfd.readouterr().err


def test_a_file_that_is_no_result_is_not_written_over(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert bench_train("--config", "tiny", "--out", tmp_path / "notes.txt") == 2
    assert "not written over" in capfd.readouterr().err
