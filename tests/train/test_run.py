"""A whole run: what it leaves in its folder, stopping and continuing, what may change then, impossible requests."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.processes import start
from txl_train import callbacks as events
from txl_train import validation
from txl_train.callbacks import StepReport
from txl_train.checkpoint import load_checkpoint, load_model, save_checkpoint
from txl_train.config import ModelConfig, RunConfig, TrainConfig
from txl_train.data.corpus import load_corpus
from txl_train.data.datasets import get_dataset
from txl_train.data.segments import SegmentIterator
from txl_train.errors import ConfigError, DataError, EnvironmentUnfitError, UsageError, ValidationError
from txl_train.evaluate import EvalResult
from txl_train.optim.schedules import Schedule
from txl_train.run import complete_model_config, train
from txl_train.settings import Resolved, resolve
from txl_train.trainer import Trainer
from txl_train.validation import evaluation_config


@pytest.fixture
def text_folder(tmp_path: Path) -> Path:
    words = np.random.default_rng(0).choice(["a", "b", "c", "dd", "ee"], size=700)
    folder = tmp_path / "text"
    folder.mkdir()
    for split, part in (("train", words[:500]), ("valid", words[500:600]), ("test", words[600:])):
        (folder / f"{split}.txt").write_text(" ".join(part) + "\n", encoding="utf-8")
    return folder


@pytest.fixture
def settings(text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.delenv("TXL_CACHE_DIR", raising=False)
    model = {"n_layer": 1, "n_head": 2, "d_head": 4, "d_model": 8, "d_inner": 8, "mem_len": 6, "dropout": 0.1}
    data_and_optim = {"dataset": "text", "data": str(text_folder), "lr": 0.02, "lr_warmup_steps": 2, "work_dir": str(tmp_path / "W")}
    steps = {"max_step": 12, "batch_size": 4, "tgt_len": 5, "log_interval": 3, "eval_interval": 5, "eval_batch_size": 4, "eval_tgt_len": 5}
    return model | data_and_optim | steps


def resolved_from(settings: dict[str, Any], **changes: Any) -> Resolved:
    return resolve(environment={}, overrides=list((settings | changes).items()))


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_run_leaves_checkpoints_records_and_settings(settings: dict[str, Any], tmp_path: Path) -> None:
    result = train(resolved_from(settings))

    folder = tmp_path / "W"
    assert result.ending == "finished"
    assert {path.name for path in folder.iterdir()} == {
        *(".lock", "cache", "checkpoint_best.pt", "checkpoint_last.pt", "config.yaml", "metrics.jsonl", "train_log.log")
    }
    best, last = load_checkpoint(folder / "checkpoint_best.pt"), load_checkpoint(folder / "checkpoint_last.pt")
    assert best.training is None
    assert last.training is not None
    assert last.progress["step"] == 12
    assert last.data_folder == settings["data"]
    assert (folder / "checkpoint_best.pt").stat().st_size < (folder / "checkpoint_last.pt").stat().st_size
    assert resolve(str(folder / "config.yaml"), environment={}).config == resolved_from(settings).config


def test_the_records_of_a_run_tell_its_course(settings: dict[str, Any], tmp_path: Path) -> None:
    result = train(resolved_from(settings))

    log = (tmp_path / "W" / "train_log.log").read_text(encoding="utf-8")
    stamp = r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} - INFO - "
    assert len(re.findall(stamp + r"\| epoch +\d+ step +(?:3|6|9|12) \|", log, re.MULTILINE)) == 4
    assert re.findall(stamp + r"\| Eval +(\d+) at step +(\d+) \|", log, re.MULTILINE) == [("1", "5"), ("2", "10"), ("3", "12")]
    assert len(re.findall(stamp + r"=" * 100 + "$", log, re.MULTILINE)) == 2
    assert re.search(stamp + r"\| End of training \| test time", log, re.MULTILINE)
    assert re.search(r"INFO - Training time: \d+\.\d\d minutes\n.*INFO - Training throughput: \d+\.\d\d tok/s\n", log)
    records = read_metrics(tmp_path / "W")
    assert [record["kind"] for record in records] == ["start", "train", "valid", "train", "train", "valid", "train", "valid", "test"]
    assert records[1].keys() >= {
        "step",
        "loss_nats_per_token",
        "perplexity",
        "lr",
        "grad_norm",
        "tokens_per_s",
        "ms_per_step",
        "peak_memory_bytes",
    }
    assert result.test is not None
    assert records[-1]["nll_nats_per_token"] == result.test.nll_nats_per_token
    assert records[-1]["n_tokens"] == 100  # 101 tokens with <eos>, of which the first is no target


def test_the_best_checkpoint_is_the_one_with_the_lowest_validation_loss(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([5.0, 3.0, 4.0, 3.5, 9.0])  # at steps 2, 4, 6, 8, and on test.txt
    monkeypatch.setattr(
        validation, "evaluate", lambda *_, **__: EvalResult(nll_nats_sum=10 * next(losses), n_tokens=10, n_segments=1, seconds=1.0)
    )

    result = train(resolved_from(settings, eval_interval=2, max_step=8))

    best, last = (load_checkpoint(tmp_path / "W" / name) for name in ("checkpoint_best.pt", "checkpoint_last.pt"))
    assert (best.progress["step"], best.progress["best_valid_nll"]) == (4, 3.0)
    assert (last.progress["step"], last.progress["best_step"], last.progress["best_valid_nll"]) == (8, 4, 3.0)
    assert [record["best"] for record in read_metrics(tmp_path / "W") if record["kind"] == "valid"] == [True, True, False, False]
    assert result.valid is not None
    assert result.valid.nll_nats_per_token == 3.5
    assert result.to_dict()["best"] == {"step": 4, "nll_nats_per_token": 3.0, "perplexity": pytest.approx(math.exp(3.0))}


def test_a_best_score_at_the_last_step_is_in_both_checkpoints(settings: dict[str, Any], tmp_path: Path) -> None:
    train(resolved_from(settings, eval_interval=1, max_step=1))

    best, last = (load_checkpoint(tmp_path / "W" / name) for name in ("checkpoint_best.pt", "checkpoint_last.pt"))
    assert best.progress["best_step"] == 1
    assert best.progress == last.progress


def test_an_evaluation_after_a_spoiled_step_keeps_the_last_good_checkpoint(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Schedule, "learning_rate", lambda schedule, step: math.nan if step == 3 else 0.01)

    with pytest.raises(ValidationError, match="Training diverged: after step 3"):
        train(resolved_from(settings, eval_interval=1))

    last = load_checkpoint(tmp_path / "W" / "checkpoint_last.pt")
    assert last.progress["step"] == 2
    assert all(bool(weight.isfinite().all()) for weight in last.model.values())


def test_a_run_stopped_and_continued_equals_one_at_once(settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(resolved_from(settings, work_dir=str(tmp_path / "once")))

    def interrupt_at_7(run: Trainer) -> StepReport:
        report = step(run)
        if report.step == 7:
            os.kill(os.getpid(), signal.SIGINT)
        return report

    step = Trainer.step
    monkeypatch.setattr(Trainer, "step", interrupt_at_7)
    handler = signal.getsignal(signal.SIGINT)
    first = train(resolved_from(settings))
    assert (first.ending, first.progress.step, first.test) == ("sigint", 7, None)
    assert signal.getsignal(signal.SIGINT) is handler
    monkeypatch.undo()
    checkpoint = load_checkpoint(tmp_path / "W" / "checkpoint_last.pt")
    second = train(resolve(environment={}, stored=checkpoint.settings), continue_from=checkpoint)

    assert second.ending == "finished"
    once, continued = (load_checkpoint(tmp_path / folder / "checkpoint_last.pt") for folder in ("once", "W"))
    assert once.model.keys() == continued.model.keys()
    assert [name for name in once.model if not torch.equal(once.model[name], continued.model[name])] == []
    once.progress.pop("train_seconds"), continued.progress.pop("train_seconds")
    assert once.progress == continued.progress
    assert once.training is not None
    assert continued.training is not None
    assert torch.equal(once.training["rng"][0]["cpu"], continued.training["rng"][0]["cpu"])
    log = (tmp_path / "W" / "train_log.log").read_text(encoding="utf-8")
    assert log.index("Stopped at step 7") < log.index("Continuing after step 7 of 12") < log.index("End of training")


def test_a_signal_within_an_evaluation_cuts_it_short_and_saves(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def evaluate_and_interrupt(*arguments: Any, on_step: Any, **keywords: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*arguments, on_step=on_step, **keywords)

    evaluate = validation.evaluate
    monkeypatch.setattr(validation, "evaluate", evaluate_and_interrupt)

    result = train(resolved_from(settings))

    assert (result.ending, result.progress.step, result.valid) == ("sigterm", 5, None)
    assert load_checkpoint(tmp_path / "W" / "checkpoint_last.pt").progress["step"] == 5


def test_a_signal_counts_also_where_the_run_was_about_to_end_anyway(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def evaluate_and_interrupt(*arguments: Any, on_step: Any, **keywords: Any) -> Any:
        def count(n_segments: int) -> None:
            done.append(n_segments)
            on_step(n_segments)

        os.kill(os.getpid(), signal.SIGINT)
        return evaluate(*arguments, on_step=count, **keywords)

    evaluate = validation.evaluate
    monkeypatch.setattr(validation, "evaluate", evaluate_and_interrupt)
    for at_the_end in ({"max_minutes": 1e-6}, {"max_step": 1}):
        done: list[int] = []

        result = train(resolved_from(settings, **at_the_end), overwrite=True)

        assert (result.ending, result.progress.step, result.valid, result.test) == ("sigint", 1, None, None)
        assert done == [1]
        assert load_checkpoint(tmp_path / "W" / "checkpoint_last.pt").progress["step"] == 1
    done = []

    finished = load_checkpoint(tmp_path / "W" / "checkpoint_last.pt")
    again = train(resolved_from(settings, max_step=1), continue_from=finished)  # no step is left, only scoring

    assert (again.ending, again.test, done) == ("sigint", None, [1])


@pytest.mark.parametrize("changes", [{"max_minutes": 1e-6}, {"max_step": 1}, {"eval_interval": 1}])
def test_whatever_ends_an_evaluation_the_steps_before_it_are_saved(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    def interrupt_twice(*_: Any, **__: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the second signal should have raised")

    monkeypatch.setattr(validation, "evaluate", interrupt_twice)

    with pytest.raises(KeyboardInterrupt):
        train(resolved_from(settings, **changes))

    assert load_checkpoint(tmp_path / "W" / "checkpoint_last.pt").progress["step"] == 1
    monkeypatch.undo()
    monkeypatch.delenv("TXL_CACHE_DIR", raising=False)
    checkpoint = load_checkpoint(tmp_path / "W" / "checkpoint_last.pt")
    assert train(resolved_from(settings), continue_from=checkpoint).progress.step == 12


def test_evaluation_does_not_count_as_training_time(settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def evaluate_slowly(*arguments: Any, **keywords: Any) -> EvalResult:
        time.sleep(1.0)
        return evaluate(*arguments, **keywords)

    evaluate = validation.evaluate
    monkeypatch.setattr(validation, "evaluate", evaluate_slowly)

    result = train(resolved_from(settings, max_step=2, eval_interval=2))

    assert 0 < result.progress.train_seconds < 1.0
    assert load_checkpoint(tmp_path / "W" / "checkpoint_last.pt").progress["train_seconds"] < 1.0
    assert read_metrics(tmp_path / "W")[1]["train_seconds"] < 1.0


def test_a_second_ctrl_c_stops_at_once(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt_twice(run: Trainer) -> StepReport:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the second signal should have raised")

    monkeypatch.setattr(Trainer, "step", interrupt_twice)

    with pytest.raises(KeyboardInterrupt):
        train(resolved_from(settings))


def test_a_time_limit_ends_a_run_like_its_last_step(settings: dict[str, Any]) -> None:
    result = train(resolved_from(settings, max_minutes=1e-6))

    assert (result.ending, result.progress.step) == ("max_minutes", 1)
    assert result.valid is not None
    assert result.test is not None


def test_a_finished_run_that_is_continued_is_scored_again(settings: dict[str, Any], tmp_path: Path) -> None:
    first = train(resolved_from(settings))
    checkpoint = load_checkpoint(tmp_path / "W" / "checkpoint_last.pt")

    second = train(resolved_from(settings), continue_from=checkpoint)

    assert second.ending == "finished"
    assert second.progress.step == 12
    assert second.test is not None
    assert first.test is not None
    assert second.test.nll_nats_sum == first.test.nll_nats_sum


def test_more_steps_continue_along_the_new_schedule(settings: dict[str, Any], tmp_path: Path) -> None:
    train(resolved_from(settings))
    checkpoint = load_checkpoint(tmp_path / "W" / "checkpoint_last.pt")

    result = train(resolved_from(settings, max_step=15), continue_from=checkpoint)

    assert result.progress.step == 15


def test_settings_that_differ_from_the_checkpoints_are_in_the_log(settings: dict[str, Any], tmp_path: Path) -> None:
    train(resolved_from(settings, max_step=1))
    checkpoint = load_checkpoint(tmp_path / "W" / "checkpoint_last.pt")

    train(resolve(environment={}, stored=checkpoint.settings, assignments=["lr=0.01"]), continue_from=checkpoint)

    log = (tmp_path / "W" / "train_log.log").read_text(encoding="utf-8")
    assert log.count("INFO - lr: 0.02 in the checkpoint, now 0.01 (command line)\n") == 1
    assert log.count("in the checkpoint, now") == 1


@pytest.mark.parametrize("change", [{"n_layer": 2}, {"batch_size": 2}, {"tgt_len": 4}, {"dropout": 0.3}, {"optim": "adam"}])
def test_what_a_run_depends_on_cannot_change_when_it_is_continued(settings: dict[str, Any], tmp_path: Path, change: dict[str, Any]) -> None:
    train(resolved_from(settings, max_step=1))
    checkpoint = load_checkpoint(tmp_path / "W" / "checkpoint_last.pt")
    before = (tmp_path / "W" / "checkpoint_last.pt").read_bytes()

    with pytest.raises(UsageError, match=rf"\.{next(iter(change))} was .* and would be "):
        train(resolved_from(settings, **change), continue_from=checkpoint)

    assert (tmp_path / "W" / "checkpoint_last.pt").read_bytes() == before


def test_a_work_folder_with_a_model_is_not_overwritten_unasked(settings: dict[str, Any], tmp_path: Path) -> None:
    train(resolved_from(settings, max_step=1))
    before = {path.name: path.read_bytes() for path in (tmp_path / "W").iterdir() if path.is_file()}

    with pytest.raises(UsageError, match="holds a trained model already") as error:
        train(resolved_from(settings))

    assert all(option in str(error.value) for option in ("--resume", "--work-dir", "--overwrite"))
    assert {path.name: path.read_bytes() for path in (tmp_path / "W").iterdir() if path.is_file()} == before
    with pytest.raises(DataError):
        train(resolved_from(settings, data="nowhere"), overwrite=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "W").iterdir() if path.is_file()} == before
    assert train(resolved_from(settings), overwrite=True).progress.step == 12


def test_a_full_disk_while_saving_keeps_the_last_checkpoint(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save_until_full(path: Path, checkpoint: Any) -> None:
        if checkpoint.progress["step"] > 5:
            raise EnvironmentUnfitError("No space left on device.")
        save_checkpoint(path, checkpoint)

    monkeypatch.setattr(events, "save_checkpoint", save_until_full)

    with pytest.raises(EnvironmentUnfitError):
        train(resolved_from(settings))

    assert load_checkpoint(tmp_path / "W" / "checkpoint_last.pt").progress["step"] == 5


def test_the_test_score_is_that_of_the_best_checkpoint(settings: dict[str, Any], tmp_path: Path) -> None:
    result = train(resolved_from(settings))
    model, checkpoint = load_model(tmp_path / "W" / "checkpoint_best.pt")
    corpus = load_corpus(Path(settings["data"]), get_dataset("text"), cache_dir=tmp_path / "other", vocabulary=checkpoint.vocabulary)
    memory, total = model.initial_memory(1), 0.0
    for segment in SegmentIterator(corpus.ids("test"), batch_size=1, tgt_len=1):
        with torch.no_grad():
            hidden, memory = model(torch.from_numpy(segment.input_ids_BT), memory)
            total += float(model.nll(hidden, torch.from_numpy(segment.target_ids_BT)))

    assert result.test is not None
    assert result.test.nll_nats_sum == pytest.approx(total, rel=0.01)  # four streams start cold there, one here


def test_evaluation_reaches_as_far_as_training() -> None:
    config = TrainConfig(tgt_len=192, eval_tgt_len=64)

    assert evaluation_config(ModelConfig(mem_len=192), config).mem_len == 320
    assert evaluation_config(ModelConfig(mem_len=0), config).mem_len == 0
    assert evaluation_config(ModelConfig(mem_len=10), TrainConfig(tgt_len=10, eval_tgt_len=64)).mem_len == 0


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"data": "none"}, ConfigError, "`text` is read from a folder"),
        ({"data": "/no/such/folder"}, DataError, "no folder"),
        ({"dataset": "txet"}, ConfigError, "Did you mean `text`"),
        ({"vocab_size": 7000}, ConfigError, "`vocab_size` must be 0 or the vocabulary's size"),
        ({"adaptive": True, "cutoffs": "2,3000"}, ConfigError, "below the vocabulary's size"),
        ({"batch_size": 1000}, DataError, "--batch-size"),
        ({"eval_batch_size": 150}, DataError, "--eval-batch-size 100"),
        ({"sample_softmax": 2, "adaptive": True, "cutoffs": "2,4"}, ConfigError, "cannot be combined"),
        ({"multi_gpu": "ddp", "gpu0_bsz": 2}, UsageError, "the first GPU in `--multi-gpu dp`"),
        ({"init_from": "/no/such.pt"}, UsageError, "no checkpoint /no/such.pt"),
        ({"work_dir": "/dev/null/x"}, EnvironmentUnfitError, "cannot be made"),
        ({"work_dir": "/dev/null"}, UsageError, "is a file"),
    ],
)
def test_impossible_requests_end_with_one_clear_error(
    settings: dict[str, Any], changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        train(resolved_from(settings, **changes))


def test_small_vocabularies_get_a_plain_softmax_instead_of_an_adaptive_one(settings: dict[str, Any], tmp_path: Path) -> None:
    corpus = load_corpus(Path(settings["data"]), get_dataset("text"), cache_dir=tmp_path)

    completed = complete_model_config(resolved_from(settings, adaptive=True).config, corpus)

    assert (completed.adaptive, completed.cutoffs, completed.vocab_size) == (False, (), 7)


def test_the_built_in_corpus_is_written_into_the_work_folder(settings: dict[str, Any], tmp_path: Path) -> None:
    changes = {"dataset": "pydoc", "data": "none", "max_step": 1, "eval_max_steps": 1, "eval_batch_size": 64, "eval_tgt_len": 16}

    result = train(resolved_from(settings, **changes))

    assert result.data_folder == tmp_path / "W" / "data" / "pydoc"
    assert load_checkpoint(tmp_path / "W" / "checkpoint_best.pt").data_folder == str(result.data_folder)


def test_cutoffs_are_left_unused_without_the_adaptive_softmax(text_folder: Path) -> None:
    corpus = load_corpus(text_folder, get_dataset("text"), cache_dir=text_folder / "cache")
    config = complete_model_config(RunConfig(model=ModelConfig(cutoffs=(2, 3))), corpus)
    assert (config.adaptive, config.cutoffs) == (False, ())


def test_cutoffs_beyond_a_small_vocabulary_name_the_option_that_helps(text_folder: Path) -> None:
    corpus = load_corpus(text_folder, get_dataset("text"), cache_dir=text_folder / "cache")
    with pytest.raises(ConfigError, match="--no-adaptive"):
        complete_model_config(RunConfig(model=ModelConfig(adaptive=True, cutoffs=(500, 1000))), corpus)


def test_learned_positions_are_as_many_as_training_sees(settings: dict[str, Any], tmp_path: Path) -> None:
    corpus = load_corpus(Path(settings["data"]), get_dataset("text"), cache_dir=tmp_path)
    rows = [
        complete_model_config(resolved_from(settings, ext_len=2, attn_type=kind).config, corpus).position_rows for kind in ("0", "1", "3")
    ]
    assert rows == [0, 13, 13]  # tgt_len 5, ext_len 2, mem_len 6


def test_the_compatible_modes_set_their_rule_of_same_length(settings: dict[str, Any], tmp_path: Path) -> None:
    corpus = load_corpus(Path(settings["data"]), get_dataset("text"), cache_dir=tmp_path)
    rules = [
        complete_model_config(resolved_from(settings, compat=compat).config, corpus).same_length_rule
        for compat in ("nvidia-2019", "nvidia-2023")
    ]
    assert rules == ["mem_len", "mem_len+1"]


# Files


def test_a_debugged_run_writes_no_work_folder(settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = train(resolved_from(settings, debug=True))

    assert not (tmp_path / "W").exists()
    assert result.work_dir is None
    assert result.to_dict()["checkpoint_last"] is None
    assert result.test is not None
    assert {path.name for path in tmp_path.iterdir()} == {"text"}


@pytest.mark.parametrize(
    ("changes", "kept"), [({}, []), ({"save_all": True}, [2, 4, 6, 7]), ({"keep_last": 2}, [6, 7])], ids=["none", "all", "the newest two"]
)
def test_checkpoints_of_evaluations_are_kept_as_asked(
    settings: dict[str, Any], tmp_path: Path, changes: dict[str, Any], kept: list[int]
) -> None:
    train(resolved_from(settings, max_step=7, eval_interval=2, **changes))

    found = {path.name for path in (tmp_path / "W").glob("checkpoint_[0-9]*.pt")}
    assert found == {f"checkpoint_{step}.pt" for step in kept}
    assert [load_checkpoint(tmp_path / "W" / f"checkpoint_{step}.pt").progress["step"] for step in kept] == kept


def test_the_name_of_the_work_folder_may_tell_data_set_and_time(settings: dict[str, Any], tmp_path: Path) -> None:
    result = train(resolved_from(settings, append_dataset=True, append_time=True, max_step=1))

    assert result.work_dir is not None
    assert result.work_dir.parent == tmp_path / "W-text"
    assert re.fullmatch(r"[0-9]{8}-[0-9]{6}", result.work_dir.name)
    assert (result.work_dir / "checkpoint_last.pt").exists()


def test_training_may_begin_with_the_weights_of_a_checkpoint(settings: dict[str, Any], tmp_path: Path) -> None:
    train(resolved_from(settings))
    begun = train(resolved_from(settings, work_dir=str(tmp_path / "V"), init_from=str(tmp_path / "W" / "checkpoint_last.pt"), max_step=1))
    fresh = train(resolved_from(settings, work_dir=str(tmp_path / "U"), max_step=1))

    assert begun.valid is not None
    assert fresh.valid is not None
    assert begun.progress.step == 1
    assert begun.valid.nll_nats_per_token < fresh.valid.nll_nats_per_token


def test_weights_of_another_model_or_vocabulary_are_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    train(resolved_from(settings, max_step=1))
    start = {"init_from": str(tmp_path / "W" / "checkpoint_last.pt"), "work_dir": str(tmp_path / "V"), "max_step": 1}

    with pytest.raises(UsageError, match="of another model: n_layer is 1 there and 2 here"):
        train(resolved_from(settings, **start, n_layer=2))
    other = tmp_path / "other"
    other.mkdir()
    for split in ("train", "valid", "test"):
        (other / f"{split}.txt").write_text("x y z " * 60, encoding="utf-8")
    with pytest.raises(UsageError, match="another vocabulary"):
        train(resolved_from(settings, **start, data=str(other)))


def test_tensorboard_files_lie_in_the_work_folder(settings: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    train(resolved_from(settings, tensorboard=True, max_step=2))
    assert list((tmp_path / "W" / "tensorboard").glob("events.*"))


# Targets


@pytest.mark.parametrize(
    ("target", "missed"),
    [
        ({"target_perplexity": 1e6, "target_throughput": 1e-3}, None),
        ({"target_perplexity": 1.01}, r"validation perplexity achieved: \d+\.\d\d, target: 1\.01"),
        ({"target_throughput": 1e12}, r"throughput achieved: \d+\.\d\d tok/s, target: 1000000000000\.00"),
    ],
)
def test_a_missed_target_is_told_with_what_was_reached(settings: dict[str, Any], target: dict[str, float], missed: str | None) -> None:
    resolved = resolved_from(settings, max_step=2, **target)
    result = train(resolved)
    if missed is None:
        result.check_targets(resolved.config.train)
    else:
        with pytest.raises(ValidationError, match=missed):
            result.check_targets(resolved.config.train)


def test_a_target_that_nothing_was_measured_for_is_missed(settings: dict[str, Any]) -> None:
    resolved = resolved_from(settings, max_step=2, target_perplexity=5.0)
    result = train(resolved)
    result.progress.best_valid_nll = None
    with pytest.raises(ValidationError, match="none, as there was no evaluation"):
        result.check_targets(resolved.config.train)


# The learning rate that follows validation


def test_dev_perf_lowers_the_rate_and_a_continued_run_knows_it(settings: dict[str, Any], tmp_path: Path) -> None:
    # at such a rate the validation loss does not improve for long
    unsteady = {"scheduler": "dev_perf", "lr": 0.5, "lr_warmup_steps": 0, "eval_interval": 1, "log_interval": 1, "optim": "adam"}
    train(resolved_from(settings, **unsteady))
    rates = [record["lr"] for record in read_metrics(tmp_path / "W") if record["kind"] == "train"]
    assert rates[0] == 0.5
    assert rates[-1] < 0.5
    assert {round(math.log2(0.5 / rate), 6) % 1 for rate in rates} == {0.0}

    half = resolved_from(settings, **unsteady, work_dir=str(tmp_path / "half"), max_step=6)
    train(half)
    checkpoint = load_checkpoint(tmp_path / "half" / "checkpoint_last.pt")
    train(resolve(environment={}, stored=checkpoint.settings, overrides=[("max_step", 12)]), continue_from=checkpoint)
    assert [record["lr"] for record in read_metrics(tmp_path / "half") if record["kind"] == "train"] == rates


def test_an_evaluation_that_a_signal_cut_short_is_made_up_for(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: Any, on_step: Callable[[int], None] | None = None, **named: Any) -> EvalResult:
        os.kill(os.getpid(), signal.SIGTERM)
        assert on_step is not None
        on_step(1)
        raise AssertionError("the evaluation should have been cut short")

    monkeypatch.setattr(validation, "evaluate", interrupt)
    stopped = train(resolved_from(settings))
    monkeypatch.undo()
    assert (stopped.ending, stopped.progress.step) == ("sigterm", 5)
    checkpoint = load_checkpoint(tmp_path / "W" / "checkpoint_last.pt")
    train(resolve(environment={}, stored=checkpoint.settings), continue_from=checkpoint)

    assert [record["step"] for record in read_metrics(tmp_path / "W") if record["kind"] == "valid"] == [5, 10, 12]


# Options that are seen nowhere else


def test_evaluation_may_stop_early_and_read_in_its_own_portions(settings: dict[str, Any], tmp_path: Path) -> None:
    result = train(resolved_from(settings, max_step=2, eval_max_steps=3, eval_batch_size=2, eval_tgt_len=7))

    assert result.valid is not None
    assert (result.valid.n_segments, result.valid.n_tokens) == (3, 3 * 2 * 7)
    assert (result.eval_tgt_len, result.eval_mem_len) == (7, 4)  # as far back as in training: 6 + 5 - 7


@pytest.mark.parametrize(("tf32", "precision"), [(False, "highest"), (True, "high")])
def test_products_are_rounded_to_tf32_only_if_asked(settings: dict[str, Any], tmp_path: Path, tf32: bool, precision: str) -> None:
    before = torch.get_float32_matmul_precision()
    try:
        train(resolved_from(settings, max_step=1, tf32=tf32))
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)
    log = (tmp_path / "W" / "train_log.log").read_text(encoding="utf-8")
    assert ("in fp32 with TF32 products" in log) == tf32


def test_the_log_begins_with_every_setting_and_its_origin(settings: dict[str, Any], tmp_path: Path) -> None:
    train(resolved_from(settings, max_step=1))
    log = (tmp_path / "W" / "train_log.log").read_text(encoding="utf-8")
    assert re.search(r"train\.tgt_len +5 +command line", log)
    assert re.search(r"optim\.clip +0\.25 +default", log)
    assert log.count(" - INFO - ") > len(resolved_from(settings).origin)


def test_lines_are_written_as_often_as_asked(settings: dict[str, Any], tmp_path: Path) -> None:
    train(resolved_from(settings, max_step=7, log_interval=2))
    assert [record["step"] for record in read_metrics(tmp_path / "W") if record["kind"] == "train"] == [2, 4, 6, 7]


# Continuing what was kept, finished, renamed


def test_continuing_an_earlier_checkpoint_forgets_what_came_after_it(settings: dict[str, Any], tmp_path: Path) -> None:
    kept = settings | {"save_all": True, "eval_interval": 3}
    train(resolved_from(kept))
    earlier = load_checkpoint(tmp_path / "W" / "checkpoint_6.pt")
    earlier.progress["best_step"] = 3  # of another file than the best one there
    resolved = resolve(environment={}, stored=earlier.settings, overrides=[("max_step", 7), ("max_step_scheduler", 12)])

    result = train(resolved, continue_from=earlier)

    assert {path.name for path in (tmp_path / "W").glob("checkpoint_[0-9]*.pt")} == {f"checkpoint_{step}.pt" for step in (3, 6, 7)}
    assert result.progress.best_step == 7
    assert load_checkpoint(tmp_path / "W" / "checkpoint_best.pt").progress["step"] == 7


def test_a_run_is_not_continued_to_fewer_steps_than_it_has(settings: dict[str, Any], tmp_path: Path) -> None:
    train(resolved_from(settings))
    checkpoint = load_checkpoint(tmp_path / "W" / "checkpoint_last.pt")
    with pytest.raises(UsageError, match="has 12 steps, more than `max_step` 5"):
        train(resolve(environment={}, stored=checkpoint.settings, overrides=[("max_step", 5)]), continue_from=checkpoint)


def test_a_finished_run_that_is_continued_lowers_no_rate(settings: dict[str, Any], tmp_path: Path) -> None:
    train(resolved_from(settings, scheduler="dev_perf", lr=0.5, lr_warmup_steps=0, eval_interval=1, optim="adam"))
    states = []
    for _ in range(2):
        checkpoint = load_checkpoint(tmp_path / "W" / "checkpoint_last.pt")
        assert checkpoint.training is not None
        states.append(checkpoint.training["schedule"])
        train(resolve(environment={}, stored=checkpoint.settings), continue_from=checkpoint)
    assert states[0] == states[1]


def test_a_signal_is_heard_though_nobody_reads_standard_error(settings: dict[str, Any], tmp_path: Path) -> None:
    process, answer = start(train_unheard, settings)
    assert answer.poll(60)
    succeeded, ending = answer.recv()
    process.join()
    assert (succeeded, ending) == (True, "sigterm")
    assert load_checkpoint(tmp_path / "W" / "checkpoint_last.pt").progress["step"] == 4


def train_unheard(settings: dict[str, Any]) -> str:
    """Train with a standard error that is a broken pipe, and ask for the end after step 4."""
    reader, writer = os.pipe()
    os.dup2(writer, 2)
    os.close(reader)
    step = Trainer.step

    def stop_at_4(run: Trainer) -> StepReport:
        report = step(run)
        if report.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return report

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "step", stop_at_4)
        return train(resolved_from(settings)).ending


def train_here(settings: dict[str, Any]) -> str:
    try:
        train(resolved_from(settings))
    except UsageError as error:
        return str(error)
    return "trained"


def test_a_folder_that_another_run_works_in_is_left_alone(settings: dict[str, Any], tmp_path: Path) -> None:
    endless = settings | {"max_step": 100_000, "eval_interval": 100_000}  # so it leaves no checkpoint
    process, _ = start(train_here, endless)
    try:
        record = tmp_path / "W" / "metrics.jsonl"
        for _ in range(600):
            if record.exists() and record.stat().st_size:
                break
            time.sleep(0.1)
        told = train_here(settings | {"n_layer": 2})
        assert f"is in use by another run: process {process.pid} on " in told
        assert "n_layer: 1" in (tmp_path / "W" / "config.yaml").read_text(encoding="utf-8")
    finally:
        process.kill()
        process.join()
    assert train_here(settings) == "trained"  # the system has let go of it


def test_a_folder_prepared_for_another_data_set_is_told(
    settings: dict[str, Any], text_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (text_folder / "corpus.json").write_text('{"dataset": "wt103"}', encoding="utf-8")
    train(resolved_from(settings, max_step=1))
    assert "was prepared as data set wt103, and is read as text" in caplog.text
