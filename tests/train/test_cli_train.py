"""`txl train`: options and their spellings, dry run, documents on standard output, exit codes, stopping and continuing."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest

from txl_deploy.cli.main import main
from txl_deploy.cli.train import command
from txl_train import validation
from txl_train.callbacks import StepReport
from txl_train.checkpoint import load_checkpoint
from txl_train.config import SECTIONS, field_docs
from txl_train.trainer import Trainer

MODEL = ["--n-layer", "1", "--n-head", "2", "--d-head", "4", "--d-model", "8", "--d-inner", "8", "--mem-len", "6"]
STEPS = ["--max-step", "6", "--batch-size", "4", "--tgt-len", "5", "--log-interval", "2", "--lr", "0.02", "--warmup-step", "2"]
EVALUATION = ["--eval-tgt-len", "5", "--eval-batch-size", "4", "--eval-interval", "4"]
SMALL = [*MODEL, *STEPS, *EVALUATION, "--dataset", "text"]


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in [name for name in os.environ if name.startswith("TXL_") and name != "TXL_SHARED_DIR"]:
        monkeypatch.delenv(variable)


@pytest.fixture
def text_folder(tmp_path: Path) -> Path:
    words = np.random.default_rng(0).choice(["a", "b", "c", "dd", "ee"], size=700)
    folder = tmp_path / "text"
    folder.mkdir()
    for split, part in (("train", words[:500]), ("valid", words[500:600]), ("test", words[600:])):
        (folder / f"{split}.txt").write_text(" ".join(part) + "\n", encoding="utf-8")
    return folder


def dry_run(capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    """Return {"settings": …, "origin": …} as `txl train` resolves these options."""
    assert main(["train", *options, "--dry-run", "--json"]) == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    return document


def error_of(capsys: pytest.CaptureFixture[str], exit_code: int, *options: str) -> str:
    """Return what is told of a run that must fail with `exit_code`, leaving standard output empty."""
    assert main(["train", *options]) == exit_code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    return captured.err


# Options


def test_every_setting_has_an_option_with_its_sentence_default_and_name() -> None:
    help_texts = {option.name: str(option.help) for option in command.params if isinstance(option, click.Option)}

    for section, cls in SECTIONS.items():
        for field in dataclasses.fields(cls):
            text = help_texts[f"setting_{section}_{field.name}"]
            assert text.startswith(field_docs(cls)[field.name])
            assert f"[{section}.{field.name}; default: " in text


def test_help_shows_types_and_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help"]) == 0

    text = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert "--max-step N Number of optimizer steps. [train.max_step; default: 40000]" in text
    assert "--cutoffs N,..." in text
    assert "--adaptive / --no-adaptive" in text
    assert "--dtype [fp32|bf16|fp16]" in text
    assert "default: none]" in text


@pytest.mark.parametrize(
    ("options", "name", "value"),
    [
        (["--warmup-step", "5"], "optim.lr_warmup_steps", 5),
        (["--warmup_step", "5"], "optim.lr_warmup_steps", 5),
        (["--lr-warmup-steps", "5"], "optim.lr_warmup_steps", 5),
        (["--work_dir", "here"], "train.work_dir", "here"),
        (["--not-tied"], "model.tie_weights", False),
        (["--not_tied"], "model.tie_weights", False),
        (["--no-tie-weights"], "model.tie_weights", False),
        (["--adaptive"], "model.adaptive", True),
        (["--no-adaptive", "--config", "wt103-base"], "model.adaptive", False),
        (["--pre_lnorm"], "model.pre_lnorm", True),
        (["--same_length"], "model.same_length", True),
        (["--clamp_len", "-1"], "model.clamp_len", None),
        (["--clamp-len", "none"], "model.clamp_len", None),
        (["--d_embed", "-1"], "model.d_embed", None),
        (["--eval_max_steps", "-1"], "train.eval_max_steps", None),
        (["--cuda"], "train.device", "cuda"),
        (["--fp16"], "train.dtype", "fp16"),
        (["--bf16", "--dtype", "bf16"], "train.dtype", "bf16"),
        (["--cutoffs", "10,20"], "model.cutoffs", [10, 20]),
        (["--set", "train.max_step=9"], "train.max_step", 9),
        (["--set", "max-step=9", "--max-step", "3"], "train.max_step", 9),
        (["--lr", "1e-3"], "optim.lr", 0.001),
        (["--optim", "adam"], "optim.optim", "adam"),
    ],
)
def test_an_option_sets_its_setting(capsys: pytest.CaptureFixture[str], options: list[str], name: str, value: object) -> None:
    document = dry_run(capsys, *options)

    section, _, key = name.partition(".")
    assert document["settings"][section][key] == value
    assert document["origin"][name] == "command line"


def test_options_win_over_environment_over_preset(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TXL_MAX_STEP", "5")
    monkeypatch.setenv("TXL_OPTIM_LR", "0.5")

    document = dry_run(capsys, "--config", "wt103-large", "--max-step", "6")

    assert document["settings"]["train"]["max_step"] == 6
    assert document["settings"]["optim"]["lr"] == 0.5
    assert document["origin"]["optim.lr"] == "environment TXL_OPTIM_LR"
    assert document["settings"]["model"]["n_layer"] == 18
    assert document["origin"]["model.n_layer"] == "preset wt103-large"
    assert document["origin"]["train.seed"] == "default"


def test_a_dry_run_prints_a_table_and_touches_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["train", "--work-dir", str(tmp_path / "W"), "--dry-run"]) == 0

    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["train.max_step", "40000", "default"] in rows
    assert not (tmp_path / "W").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-stpe", "3"], "--max-step"),
        (["--set", "max_stpe=3"], "Did you mean `max_step`?"),
        (["--set", "3"], "key=value"),
        (["--max-step", "many"], "`max_step` must be a whole number, but is 'many' instead. (command line)"),
        (["--max-step", "0"], "`max_step` must be 1 or more, but is 0 instead. (max_step: command line)"),
        (["--dtype", "fp8"], "fp8"),
        (["--dataset", "wt104"], "wt104"),
        (["--config", "tinny"], "Did you mean `tiny`?"),
        (["--config", "no/such/file.yaml"], "There is no config file"),
        (["--fp16", "--bf16"], "`--fp16` and `--bf16` contradict each other"),
        (["--fp16", "--dtype", "fp32"], "`--dtype` and `--fp16` contradict each other"),
        (["--cuda", "--device", "cpu"], "`--device` and `--cuda` contradict each other"),
        (["--restart", "--resume"], "Give only one of"),
        (["--auto-resume", "--resume"], "Give only one of"),
        (["--restart", "missing.pt"], "There is no checkpoint missing.pt"),
        (["--lr", "0.0001"], "the cosine would climb"),
        (["surplus"], "surplus"),
    ],
)
def test_a_wrong_request_is_told_and_exits_with_2(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, options: list[str], message: str
) -> None:
    told = error_of(capsys, 2, "--work-dir", str(tmp_path / "W"), *options)

    assert message in told
    assert not (tmp_path / "W").exists()


def test_restart_in_an_empty_folder_is_told(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "There is nothing to continue in" in error_of(capsys, 2, "--work-dir", str(tmp_path), "--restart")


def test_a_gpu_that_is_not_there_exits_with_3(
    capsys: pytest.CaptureFixture[str], text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    told = error_of(capsys, 3, *SMALL, "--data", str(text_folder), "--work-dir", str(tmp_path / "W"), "--fp16", "--cuda")

    assert "--device cpu" in told


def test_a_missed_target_exits_with_1_after_the_result(capsys: pytest.CaptureFixture[str], text_folder: Path, tmp_path: Path) -> None:
    assert (
        main(["train", *SMALL, "--data", str(text_folder), "--work-dir", str(tmp_path / "W"), "--target_perplexity", "1.5", "--json"]) == 1
    )
    captured = capsys.readouterr()
    assert json.loads(captured.out)["best"]["perplexity"] > 1.5
    assert "A target was missed: validation perplexity achieved" in captured.err


def test_auto_resume_begins_where_there_is_nothing_and_continues_where_there_is(
    capsys: pytest.CaptureFixture[str], text_folder: Path, tmp_path: Path
) -> None:
    command = ["train", *SMALL, "--data", str(text_folder), "--work-dir", str(tmp_path / "W"), "--auto-resume", "--json"]
    steps = []
    for more in ([], ["--max-step", "20"]):
        assert main([*command, *more]) == 0
        steps.append(json.loads(capsys.readouterr().out)["steps"])
    assert steps[1] == 20 > steps[0]
    assert "Continuing after step" in (tmp_path / "W" / "train_log.log").read_text(encoding="utf-8")


@pytest.mark.parametrize("named", [["--append-dataset"], ["--append-time"], ["--append_dataset", "--append_time"]], ids=" ".join)
def test_a_run_in_a_folder_that_was_named_is_found_again(
    capsys: pytest.CaptureFixture[str], text_folder: Path, tmp_path: Path, named: list[str]
) -> None:
    command = ["train", *SMALL, "--data", str(text_folder), "--work-dir", str(tmp_path / "W"), *named, "--json"]
    folders = []
    for more in (["--auto-resume"], ["--auto-resume", "--max-step", "14"], ["--resume", "--max-step", "15"]):
        assert main([*command, *more]) == 0
        result = json.loads(capsys.readouterr().out)
        folders.append(result["work_dir"])
    assert result["steps"] == 15
    assert len(set(folders)) == 1
    last = Path(folders[0]) / "checkpoint_last.pt"
    assert main([*command, "--restart", str(last), "--max-step", "16"]) == 0
    assert json.loads(capsys.readouterr().out)["work_dir"] == folders[0]


def test_a_signal_with_a_target_ends_well(
    capsys: pytest.CaptureFixture[str], text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("txl_train.trainer.Trainer.agree", lambda trainer: trainer.stop("sigterm") or trainer.ending)
    target = ["--target-perplexity", "1.5", "-q"]
    assert main(["train", *SMALL, "--data", str(text_folder), "--work-dir", str(tmp_path / "W"), *target]) == 0


def test_beginning_with_a_checkpoint_takes_its_models_settings_too(
    capsys: pytest.CaptureFixture[str], text_folder: Path, tmp_path: Path
) -> None:
    first = ["--data", str(text_folder), "--work-dir", str(tmp_path / "W"), "-q"]
    assert main(["train", *SMALL, *first]) == 0
    last = tmp_path / "W" / "checkpoint_last.pt"
    of_training = [word for word in SMALL if word in ("--dataset", "text")]
    second = [
        "--data",
        str(text_folder),
        "--work-dir",
        str(tmp_path / "V"),
        "--init-from",
        str(last),
        "--batch-size",
        "4",
        "--tgt-len",
        "5",
    ]
    more = ["--max-step", "1", "--lr-warmup-steps", "1", "--eval-batch-size", "4", "--eval-tgt-len", "5", "--device", "cpu", "--json", "-q"]
    capsys.readouterr()

    assert main(["train", *of_training, *second, *more]) == 0

    result = json.loads(capsys.readouterr().out)
    assert result["parameters"] == sum(weight.numel() for weight in load_checkpoint(last).model.values())
    assert dry_run(capsys, "--init-from", str(last))["origin"]["model.n_layer"] == "checkpoint"


def test_a_damaged_checkpoint_exits_with_4(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "checkpoint_last.pt").write_bytes(b"PK, but nothing else")

    assert "is no checkpoint of txl" in error_of(capsys, 4, "--work-dir", str(tmp_path), "--restart")


def test_missing_and_empty_texts_exit_with_2(capsys: pytest.CaptureFixture[str], text_folder: Path, tmp_path: Path) -> None:
    options = [*SMALL, "--work-dir", str(tmp_path / "W")]
    assert "there is no folder" in error_of(capsys, 2, *options, "--data", str(tmp_path / "nowhere")).lower()
    (text_folder / "valid.txt").write_text("")
    assert "valid.txt" in error_of(capsys, 2, *options, "--data", str(text_folder))
    (text_folder / "valid.txt").unlink()
    assert "valid.txt" in error_of(capsys, 2, *options, "--data", str(text_folder))


# Runs


def test_a_run_prints_one_json_document_and_its_log_elsewhere(
    capsys: pytest.CaptureFixture[str], text_folder: Path, tmp_path: Path
) -> None:
    assert main(["train", *SMALL, "--data", str(text_folder), "--work-dir", str(tmp_path / "W"), "--json"]) == 0

    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert document["ending"] == "finished"
    assert document["steps"] == 6
    assert document["tokens"] == 6 * 4 * 5
    assert document["valid"]["n_tokens"] == document["test"]["n_tokens"] == 100
    assert document["test"]["perplexity"] == pytest.approx(np.exp(document["test"]["nll_nats_per_token"]))
    for key in ("checkpoint_best", "checkpoint_last", "metrics", "log", "settings"):
        assert Path(document[key]).is_file()
    assert re.search(r"^\| epoch   1 step        6 \| batches      6 / 25 \| lr 1\.000e-03 \|", captured.err, re.MULTILINE)
    assert "| End of training | test time:" in captured.err


def test_quiet_runs_say_nothing_but_log_to_their_file(capsys: pytest.CaptureFixture[str], text_folder: Path, tmp_path: Path) -> None:
    assert main(["train", *SMALL, "--data", str(text_folder), "--work-dir", str(tmp_path / "W"), "-q"]) == 0

    captured = capsys.readouterr()
    assert captured.err == ""
    assert "Finished after 6 steps" in captured.out
    assert re.search(r"test +perplexity \d+\.\d{3} \(\d\.\d{4} nats per token over 100 tokens\)", captured.out)
    assert "| epoch   1 step        2 |" in (tmp_path / "W" / "train_log.log").read_text(encoding="utf-8")


def test_a_run_is_continued_with_more_steps(capsys: pytest.CaptureFixture[str], text_folder: Path, tmp_path: Path) -> None:
    folder = str(tmp_path / "W")
    assert main(["train", *SMALL, "--data", str(text_folder), "--work-dir", folder]) == 0
    capsys.readouterr()

    assert main(["train", "--work-dir", folder, "--resume", "--max-step", "8", "--json"]) == 0

    assert json.loads(capsys.readouterr().out)["steps"] == 8
    continued = dry_run(capsys, "--work-dir", folder, "--restart", str(tmp_path / "W" / "checkpoint_last.pt"))
    assert continued["origin"]["model.n_layer"] == "checkpoint"
    assert continued["settings"]["train"]["max_step"] == 8


def test_continuing_keeps_what_was_set_on_top_of_a_preset(capsys: pytest.CaptureFixture[str], text_folder: Path, tmp_path: Path) -> None:
    preset = tmp_path / "preset.yaml"
    preset.write_text("optim: {lr: 0.5, eta_min: 0}\ntrain: {max_step: 1200}\n", encoding="utf-8")
    options = ["--config", str(preset), "--work-dir", str(tmp_path / "W")]
    assert main(["train", *SMALL, *options, "--data", str(text_folder), "--lr", "0.0005"]) == 0
    capsys.readouterr()

    kept = dry_run(capsys, *options, "--resume")
    assert (kept["settings"]["optim"]["lr"], kept["settings"]["train"]["max_step"]) == (0.0005, 6)
    assert main(["train", *options, "--resume", "--lr", "0.01", "--dry-run"]) == 0
    dry = capsys.readouterr()
    assert main(["train", *options, "--resume", "--lr", "0.01", "--json"]) == 0
    run = capsys.readouterr()

    assert ["optim.lr", "0.01", "command", "line"] in [line.split() for line in dry.out.splitlines()]
    for told in (dry.err, run.err):
        assert told.count("lr: 0.0005 in the checkpoint, now 0.01 (command line)\n") == 1
        assert told.count("max_step: 6 as in the checkpoint, not 1200 (preset.yaml:2)\n") == 1
    assert json.loads(run.out)["steps"] == 6
    assert dry_run(capsys, "--work-dir", str(tmp_path / "W"), "--resume", "--lr", "0.0001")["settings"]["optim"]["lr"] == 0.0001


def test_a_run_is_neither_overwritten_nor_changed_by_mistake(capsys: pytest.CaptureFixture[str], text_folder: Path, tmp_path: Path) -> None:
    options = [*SMALL, "--data", str(text_folder), "--work-dir", str(tmp_path / "W")]
    assert main(["train", *options]) == 0
    capsys.readouterr()
    before = (tmp_path / "W" / "checkpoint_last.pt").read_bytes()

    assert "--overwrite" in error_of(capsys, 2, *options)
    assert "model.n_layer was 1 and would be 2" in error_of(capsys, 2, *options, "--restart", "--n-layer", "2")
    assert "give one of them" in error_of(capsys, 2, *options, "--restart", "--overwrite")
    assert "no training state" in error_of(capsys, 2, *options, "--restart", str(tmp_path / "W" / "checkpoint_best.pt"))

    assert (tmp_path / "W" / "checkpoint_last.pt").read_bytes() == before
    assert main(["train", *options, "--overwrite"]) == 0


def test_a_checkpoint_is_continued_in_its_own_folder_or_in_a_new_one(
    capsys: pytest.CaptureFixture[str], text_folder: Path, tmp_path: Path
) -> None:
    last, other = tmp_path / "W" / "checkpoint_last.pt", tmp_path / "other"
    assert main(["train", *SMALL, "--data", str(text_folder), "--work-dir", str(tmp_path / "W")]) == 0
    capsys.readouterr()
    before = last.read_bytes()

    assert main(["train", "--restart", str(last), "--work-dir", str(other), "--max-step", "8", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["checkpoint_best"] == str(other / "checkpoint_best.pt")
    assert last.read_bytes() == before
    assert "--overwrite" in error_of(capsys, 2, "--restart", str(last), "--work-dir", str(other))
    assert main(["train", "--restart", str(last), "--max-step", "8", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["work_dir"] == str(tmp_path / "W")
    assert last.read_bytes() != before


def test_a_divergent_run_exits_with_1(
    capsys: pytest.CaptureFixture[str], text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("txl_train.optim.schedules.Schedule.learning_rate", lambda schedule, step: float("nan"))

    told = error_of(capsys, 1, *SMALL, "--data", str(text_folder), "--work-dir", str(tmp_path / "W"), "-q")

    assert "at step 2 the loss is nan" in told


def wait_for(path: Path, text: str, process: subprocess.Popen[str]) -> None:
    for _ in range(600):
        if path.exists() and text in path.read_text(encoding="utf-8"):
            return
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        time.sleep(0.05)
    raise AssertionError(f"{path} never said {text!r}")


def test_ctrl_c_finishes_the_step_saves_and_exits_with_130(text_folder: Path, tmp_path: Path) -> None:
    run = [sys.executable, "-c", "import sys; from txl_deploy.cli.main import main; sys.exit(main())"]
    options = [
        "train",
        *SMALL,
        "--data",
        str(text_folder),
        "--work-dir",
        str(tmp_path / "W"),
        "--max-step",
        "1000000",
        "--eval-interval",
        "1000000",
    ]
    with subprocess.Popen([*run, *options, "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        wait_for(tmp_path / "W" / "train_log.log", "| epoch   1 step       10 |", process)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)

    assert process.returncode == 130, err
    document = json.loads(out)
    assert (document["ending"], document["valid"], document["test"]) == ("sigint", None, None)
    assert document["steps"] >= 10
    assert Path(document["checkpoint_last"]).is_file()
    assert f"Stopped at step {document['steps']}" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("end", [("--max-minutes", "1e-6"), ("--max-step", "1")])
def test_ctrl_c_in_the_last_evaluation_saves_and_exits_with_130(
    capsys: pytest.CaptureFixture[str], text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: tuple[str, str]
) -> None:
    def evaluate_and_interrupt(*arguments: Any, **keywords: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return evaluate(*arguments, **keywords)

    evaluate = validation.evaluate
    monkeypatch.setattr(validation, "evaluate", evaluate_and_interrupt)

    assert main(["train", *SMALL, "--data", str(text_folder), "--work-dir", str(tmp_path / "W"), *end, "--json"]) == 130

    document = json.loads(capsys.readouterr().out)
    assert (document["ending"], document["steps"], document["valid"], document["test"]) == ("sigint", 1, None, None)
    assert Path(document["checkpoint_last"]).is_file()


def test_sigterm_finishes_the_step_saves_and_exits_with_0(
    capsys: pytest.CaptureFixture[str], text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def terminate_at_3(trainer: Trainer) -> StepReport:
        report = step(trainer)
        if report.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return report

    step = Trainer.step
    monkeypatch.setattr(Trainer, "step", terminate_at_3)

    assert main(["train", *SMALL, "--data", str(text_folder), "--work-dir", str(tmp_path / "W"), "--json"]) == 0

    document = json.loads(capsys.readouterr().out)
    assert (document["ending"], document["steps"], document["checkpoint_best"]) == ("sigterm", 3, None)
    assert Path(document["checkpoint_last"]).is_file()
