"""Trainings of a benchmark as processes: their command lines, what their endings mean, and what is refused before one begins."""

from __future__ import annotations

import json
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from txl_deploy.bench import training_runs
from txl_deploy.bench.training import TrainingRow
from txl_deploy.bench.training_runs import Combination, TrainingSettings, run, settings_of, train_command
from txl_train.errors import EnvironmentUnfitError, UsageError

ONE = Combination(processes=1, batch_size=4, dtype="fp32")


def settings(steps: int = 25, **changes: Any) -> TrainingSettings:
    train = {"eval_batch_size": 16, "device": "cpu", "batch_size": 256, "dtype": "fp32", "max_minutes": 4.0, "debug": False}
    folders = {"work_dir": "LM-TFM", "append_dataset": False, "append_time": False}
    resolved: dict[str, Any] = {"model": {}, "data": {"data": "some/where/wikitext"}, "optim": {}, "train": train | folders}
    return TrainingSettings(**({"options": ("--config", "tiny"), "resolved": resolved, "steps": steps, "warmup_steps": 2} | changes))


def assigned(command: list[str]) -> dict[str, str]:
    """Return what `--set` sets."""
    words = [value for flag, value in zip(command, command[1:]) if flag == "--set"]
    return dict(word.split("=", 1) for word in words)


def test_each_combination_is_a_txl_train_whose_options_come_before_the_benchmarks_settings() -> None:
    command = train_command(Combination(processes=1, batch_size=4, dtype="bf16"), settings(batch_chunk=2), Path("work"))
    assert command[1:3] == ["-m", "txl_deploy.cli.main"]
    assert command[3:6] == ["train", "--config", "tiny"]
    given = assigned(command)
    assert {given[f"train.{name}"] for name in ("batch_size", "dtype", "max_step", "batch_chunk")} == {"4", "bf16", "25", "2"}
    assert (given["train.log_interval"], given["train.max_minutes"], given["train.work_dir"]) == ("1", "none", "work")


def test_several_processes_are_started_by_torchrun_and_share_the_whole_batch() -> None:
    command = train_command(Combination(processes=3, batch_size=4, dtype="fp32"), settings(), Path("work"))
    assert command[1:6] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"]
    assert command[6:9] == ["-m", "txl_deploy.cli.main", "train"]
    assert assigned(command)["train.batch_size"] == "12"
    assert assigned(command)["train.eval_batch_size"] == "18"  # what three processes can share
    assert "train.batch_chunk" not in assigned(command)


def fake_training(monkeypatch: pytest.MonkeyPatch, *, steps: int, ending: str) -> None:
    """Let every training write so many steps, then do what `ending` says."""
    script = f"""
        import json, os, pathlib, signal, sys
        work = pathlib.Path(sys.argv[1])
        work.mkdir(parents=True)
        with open(work / "metrics.jsonl", "w") as file:
            for step in range(1, {steps} + 1):
                print("| epoch   1 step", step, file=sys.stderr)
                figures = {{"ms_per_step": 2.0, "tokens": 8 * step, "loss_nats_per_token": 3.0, "train_seconds": step / 500}}
                file.write(json.dumps({{"kind": "train", "step": step, **figures}}) + "\\n")
            file.write('{{"kind": "tr')
        {ending}
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    monkeypatch.setattr(training_runs, "train_command", lambda combination, settings, work_dir: [*command, str(work_dir)])


def row_of(tmp_path: Path, lines: list[str] | None = None, **options: Any) -> TrainingRow:
    said: list[str] = [] if lines is None else lines
    return run(ONE, settings(), tmp_path, **({"device": "cpu", "n_devices": None, "on_line": said.append} | options))


def test_a_training_that_ends_well_is_a_row_and_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_training(monkeypatch, steps=25, ending="")
    lines: list[str] = []
    row = row_of(tmp_path, lines)
    assert row.valid
    assert row.tokens_per_s == pytest.approx(4000)
    assert len(lines) == 25
    assert list(tmp_path.iterdir()) == []


def test_a_training_that_diverges_is_invalid_and_keeps_its_steps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_training(monkeypatch, steps=7, ending="sys.exit('Error: Training diverged: at step 8 the loss is nan.')")
    row = row_of(tmp_path)
    assert (row.valid, row.skipped, len(row.ms_per_step)) == (False, None, 7)
    assert row.invalid_reasons == ["Training diverged: at step 8 the loss is nan", "7 of 25 steps were trained"]


@pytest.mark.parametrize(
    ("ending", "reason"),
    [
        ("print('Error: Memory ran out.', file=sys.stderr); sys.exit(3)", "Memory ran out"),
        ("print('Error: The text is too short.', file=sys.stderr); sys.exit(2)", "The text is too short"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "killed"),
        (
            "print('Error: Process 0 has lost the others.\\nError: Memory ran out.\\n  exitcode  : 3 (pid: 7)', file=sys.stderr)"
            "; sys.exit(1)",
            "Memory ran out",
        ),
    ],
    ids=["unfit", "usage", "killed", "torchrun"],
)
def test_what_this_machine_cannot_train_is_skipped_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ending: str, reason: str
) -> None:
    fake_training(monkeypatch, steps=3, ending=ending)
    row = row_of(tmp_path)
    assert row.skipped is not None
    assert reason in row.skipped
    assert row.ms_per_step == []
    row.check()


def test_an_ending_without_a_word_is_told_by_its_exit_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_training(monkeypatch, steps=25, ending="sys.exit(70)")
    assert row_of(tmp_path).invalid_reasons == ["`txl train` ended with exit code 70"]


def test_more_processes_than_gpus_start_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(training_runs, "_train", lambda *_: pytest.fail("something was started"))
    two = Combination(processes=2, batch_size=4, dtype="fp32")
    row = run(two, settings(), tmp_path, device="cuda", n_devices=1, on_line=print)
    assert row.skipped == "this machine has 1 GPU"


def test_ctrl_c_ends_the_training_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_training(monkeypatch, steps=1, ending="import time; time.sleep(60)")

    def interrupt(line: str) -> None:
        raise KeyboardInterrupt

    started: list[Any] = []
    popen = training_runs.subprocess.Popen
    monkeypatch.setattr(
        training_runs.subprocess, "Popen", lambda *words, **options: started.append(popen(*words, **options)) or started[-1]
    )
    with pytest.raises(KeyboardInterrupt):
        row_of(tmp_path, on_line=interrupt)
    assert started[0].returncode is not None


def test_the_record_leaves_out_what_differs_between_rows_and_where_things_lie() -> None:
    recorded = settings(steps=25, batch_chunk=2).recorded()
    assert recorded["data"]["data"] == "wikitext"
    assert recorded["train"] == {"device": "cpu", "max_step": 25, "log_interval": 1, "batch_chunk": 2}


def test_the_options_are_those_that_txl_train_reads() -> None:
    found = settings_of(["--config", "tiny", "--n_layer", "1", "--device", "cpu"], steps=30, warmup_steps=5)
    assert found.resolved["model"]["n_layer"] == 1
    assert found.device == "cpu"
    json.dumps(found.recorded())


@pytest.mark.parametrize(
    ("options", "steps", "reason"),
    [
        (["--dtype", "fp16"], 30, "`--dtype` of the trainings is set by the benchmark"),
        (["--fp16"], 30, "--dtypes"),
        (["--set", "batch_size=8"], 30, "--batch-sizes"),
        (["--n-leyer", "2"], 30, "n-layer"),
        (["--auto_resume"], 30, "begins anew"),
        ([], 5, "leaves none of 5"),
    ],
    ids=str,
)
def test_what_cannot_be_meant_is_refused_before_anything_is_trained(options: list[str], steps: int, reason: str) -> None:
    with pytest.raises(UsageError) as caught:
        settings_of(options, steps=steps, warmup_steps=5)
    assert reason in str(caught.value)


def test_the_reason_that_txl_train_gives_keeps_its_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        training_runs, "_txl", lambda: [sys.executable, "-c", "import sys; print('Error: no disk.', file=sys.stderr); sys.exit(3)"]
    )
    with pytest.raises(EnvironmentUnfitError, match="no disk"):
        settings_of([], steps=30, warmup_steps=5)
