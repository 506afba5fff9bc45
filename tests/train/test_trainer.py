"""Training: one step against plain PyTorch and against NVIDIA's recorded runs, continuing exactly, log lines, stopping, failures."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.reference import nvidia
from txl_train import callbacks as events
from txl_train import run as runs
from txl_train.callbacks import Callback, Progress, ProgressBar, Run, RunRecord, StepReport, end_line, eval_line, train_line
from txl_train.checkpoint import load_checkpoint, load_model, save_checkpoint
from txl_train.config import DataConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from txl_train.data.corpus import load_corpus
from txl_train.data.datasets import get_dataset
from txl_train.data.segments import Segment, SegmentIterator
from txl_train.data.vocabulary import Vocabulary
from txl_train.errors import CheckpointError, ConfigError, DataError, EnvironmentUnfitError, UsageError, ValidationError
from txl_train.evaluate import EvalResult
from txl_train.model.transformer_xl import TransformerXL
from txl_train.precision import Precision
from txl_train.run import complete_model_config, evaluation_config, select_device, train
from txl_train.settings import Resolved, resolve
from txl_train.trainer import Trainer

VOCAB = 40
MODEL = ModelConfig(
    vocab_size=VOCAB,
    n_layer=2,
    n_head=2,
    d_head=4,
    d_model=8,
    d_inner=16,
    mem_len=6,
    dropout=0.2,
    dropatt=0.1,
    adaptive=True,
    cutoffs=(10, 20),
)


def make_trainer(
    callbacks: list[Callback] | None = None, *, model: dict[str, Any] | None = None, n_ids: int = 300, **train_settings: Any
) -> Trainer:
    settings = {"batch_size": 4, "tgt_len": 5, "max_step": 12, "log_interval": 3} | train_settings
    config = RunConfig(
        model=dataclasses.replace(MODEL, **(model or {})),
        data=DataConfig(dataset="text"),
        optim=OptimConfig(lr=0.02, lr_warmup_steps=3, eta_min=0.001),
        train=TrainConfig(**settings),
    )
    torch.manual_seed(0)
    ids = np.random.default_rng(0).integers(0, VOCAB, n_ids)
    vocabulary = Vocabulary([f"w{i}" for i in range(VOCAB)], unit="word")
    return Trainer(config, TransformerXL(config.model), ids, vocabulary=vocabulary, callbacks=callbacks or [])


def weights_of(trainer: Trainer) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


def assert_same_weights(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


class StopAt(Callback):
    """Ends the run after a step, as a signal would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def after_step(self, run: Run, report: StepReport) -> None:
        if report.step == self.step:
            run.stop("sigterm")


# One step


def test_the_loss_of_a_step_is_the_mean_over_counted_tokens() -> None:
    trainer = make_trainer(
        model={"dropout": 0.0, "dropatt": 0.0}, n_ids=30, batch_size=4, tgt_len=16
    )  # 29 targets in streams of 8, 7, 7, 7
    segment = trainer.segments.segment(0)
    with torch.no_grad():
        hidden, _ = trainer.model(torch.from_numpy(segment.input_ids_BT), trainer.model.initial_memory(4))
        nll_BT = trainer.model.nll(hidden, torch.from_numpy(segment.target_ids_BT))
    expected = float(nll_BT[torch.from_numpy(segment.counted_BT)].mean())

    report = trainer.step()

    assert report.n_tokens == 29
    assert float(report.loss) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("chunks", [2, 4])
def test_a_batch_in_parts_gives_the_gradient_of_the_whole(chunks: int) -> None:
    no_dropout = {"dropout": 0.0, "dropatt": 0.0}
    whole = make_trainer(model=no_dropout, n_ids=31)  # streams of 8, 8, 7, 7: parts of unequal count
    parts = make_trainer(model=no_dropout, n_ids=31, batch_chunk=chunks)

    for _ in range(6):
        one, other = whole.step(), parts.step()
        assert float(one.loss) == pytest.approx(float(other.loss), rel=1e-5)
        assert float(one.grad_norm) == pytest.approx(float(other.grad_norm), rel=1e-4)


def test_gradients_are_clipped_to_their_common_norm() -> None:
    trainer = make_trainer()

    report = trainer.step()

    clipped = math.sqrt(sum(float(parameter.grad.norm()) ** 2 for parameter in trainer.model.parameters() if parameter.grad is not None))
    assert float(report.grad_norm) > 0.25
    assert clipped == pytest.approx(0.25, rel=1e-4)


def test_the_memory_starts_empty_at_each_epoch() -> None:
    trainer = make_trainer(n_ids=41, batch_size=4, tgt_len=5)  # 10 targets a stream: 2 batches an epoch

    lengths = []
    for _ in range(3):
        trainer.step()
        lengths.append((trainer.progress.epoch, trainer.progress.batch, trainer.memories[0].length_B.tolist()))

    assert lengths == [(1, 1, [5] * 4), (1, 2, [6] * 4), (2, 1, [5] * 4)]


def test_a_cluster_that_no_token_belongs_to_stays_as_it_is() -> None:
    trainer = make_trainer(model={"div_val": 2}, n_ids=100, batch_size=1, tgt_len=3)
    ids = np.array([0, 35, 1, 2] + [1, 2, 3] * 32)  # the last cluster, from 20 on, occurs in the first batch only
    trainer.segments = SegmentIterator(ids, batch_size=1, tgt_len=3)
    trainer.step()
    after_first = weights_of(trainer)
    for _ in range(5):
        trainer.step()

    now = weights_of(trainer)
    for name in ("embedding.weights.2", "embedding.projections.2", "head.biases.2"):
        assert torch.equal(now[name], after_first[name]), name
    assert not torch.equal(now["embedding.weights.0"], after_first["embedding.weights.0"])
    assert not torch.equal(now["head.cluster_weight"], after_first["head.cluster_weight"])


# NVIDIA's own training, recorded step by step


class Columns:
    """The batches of NVIDIA's training in order, endlessly enough for the recorded steps."""

    def __init__(self, ids: nvidia.Ids, batch_size: int, tgt_len: int) -> None:
        self._segments = list(nvidia.nvidia_segments(ids, batch_size, tgt_len, 0, "2019", max_size=40))

    def __len__(self) -> int:
        return 1000

    def segment(self, index: int) -> Segment:
        input_ids_BT, target_ids_BT, _ = self._segments[index]
        return Segment(input_ids_BT, target_ids_BT, np.ones_like(input_ids_BT, dtype=bool), index)


@pytest.mark.parametrize("case", ["jitlamb", "chunk2", "samelen", "divval2", "adam"])
def test_recorded_training_is_reproduced(reference_cases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    recorded = json.loads((reference_cases / "trajectories" / "trajectories.json").read_text(encoding="utf-8"))[case]
    arguments, steps = recorded["args"], recorded["steps"]
    corpus = load_corpus(reference_cases / arguments["data"], get_dataset(arguments["dataset"]), cache_dir=tmp_path)
    model_config = nvidia.map_config(recorded["model_config"], "2023")
    with np.load(reference_cases / "trajectories" / f"{case}.npz") as arrays:
        first, last = (
            nvidia.map_parameters({key.partition("/")[2]: arrays[key] for key in arrays.files if key.startswith(when)}, model_config)
            for when in ("init/", "final/")
        )
    config = RunConfig(
        model=model_config,
        optim=OptimConfig(
            optim="adam" if arguments["optim"] == "adam" else "lamb", lr=arguments["lr"], eta_min=arguments["eta_min"], clip=0.25
        ),
        train=TrainConfig(
            batch_size=arguments["batch_size"], batch_chunk=arguments["batch_chunk"], tgt_len=arguments["tgt_len"], max_step=40
        ),
    )
    model = TransformerXL(model_config)
    own = model.parameters_by_name()  # without clusters, theirs lacks what is empty in ours
    model.load_parameters({name: torch.from_numpy(first[name]) if name in first else own[name] for name in own})
    trainer = Trainer(config, model, corpus.ids("train")[:2000], vocabulary=corpus.vocabulary)
    trainer.segments = Columns(corpus.ids("train").astype(np.int64), arguments["batch_size"], arguments["tgt_len"])  # type: ignore[assignment]
    monkeypatch.setattr("txl_train.trainer.learning_rate", lambda optim, step, max_step: steps[step - 1]["lr"])

    reports = [trainer.step() for _ in steps]

    # measured: 2e-7, which is float32's rounding; 5e-5 for Adam's weights, where a gradient of nearly 0 has a random sign
    np.testing.assert_allclose([float(report.loss) for report in reports], [step["loss"] for step in steps], rtol=2e-6)
    np.testing.assert_allclose([float(report.grad_norm) for report in reports], [step["grad_norm"] for step in steps], rtol=2e-6)
    for name, parameter in model.named_parameters():
        if parameter.numel():
            np.testing.assert_allclose(
                parameter.detach().numpy(), last[name], rtol=1e-5, atol=1e-4 if case == "adam" else 2e-6, err_msg=name
            )


# Continuing


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        ({}, {}),
        ({"mem_len": 0}, {}),
        ({"same_length": True}, {"batch_chunk": 2}),
        ({}, {"dtype": "bf16"}),
    ],
)
def test_continuing_gives_the_same_weights_to_the_last_bit(tmp_path: Path, model: dict[str, Any], settings: dict[str, Any]) -> None:
    # 15 targets a stream: 3 batches an epoch, so the stop after 7 steps lies within epoch 3
    at_once = make_trainer(model=model, n_ids=61, **settings)
    at_once.run()

    stopped = make_trainer([StopAt(7)], model=model, n_ids=61, **settings)
    assert stopped.run() == "sigterm"
    save_checkpoint(tmp_path / "last.pt", stopped.checkpoint(training=True))
    torch.manual_seed(999)
    continued = make_trainer(model=model, n_ids=61, **settings)
    torch.rand(100)  # whatever happens before must not matter
    continued.restore(load_checkpoint(tmp_path / "last.pt"))
    assert (continued.progress.step, continued.progress.epoch, continued.progress.batch) == (7, 3, 1)
    assert continued.run() == "finished"

    assert at_once.progress.step == continued.progress.step == 12
    assert_same_weights(weights_of(at_once), weights_of(continued))
    for one, other in zip(at_once.memories, continued.memories, strict=True):
        assert torch.equal(one.length_B, other.length_B)
        assert all(torch.equal(a, b) for a, b in zip(one.states, other.states, strict=True))


def test_training_twice_gives_the_same_weights() -> None:
    one = make_trainer()
    one.run()
    other = make_trainer()
    other.run()

    assert_same_weights(weights_of(one), weights_of(other))


def test_a_checkpoint_for_use_cannot_be_continued() -> None:
    trainer = make_trainer()

    with pytest.raises(UsageError, match="holds no training state"):
        trainer.restore(trainer.checkpoint(training=False))


def test_another_text_cannot_be_continued() -> None:
    checkpoint = make_trainer().checkpoint(training=True)

    with pytest.raises(UsageError, match="text is not the one"):
        make_trainer(n_ids=301).restore(checkpoint)


@pytest.mark.parametrize("changes", [{"model": {"mem_len": 5}}, {"batch_chunk": 2}])
def test_another_model_or_batch_cannot_be_continued(changes: dict[str, Any]) -> None:
    checkpoint = make_trainer().checkpoint(training=True)

    with pytest.raises(UsageError, match="not those of this checkpoint"):
        make_trainer(**changes).restore(checkpoint)


@pytest.mark.parametrize("key", ["optimizer", "rng", "memory"])
def test_a_training_state_that_lacks_something_is_a_damaged_checkpoint(key: str) -> None:
    checkpoint = make_trainer().checkpoint(training=True)
    assert checkpoint.training is not None
    state = dict(checkpoint.training)
    state[key] = [{"wrong": 1}] if key == "memory" else {"wrong": 1} if key == "optimizer" else None

    with pytest.raises(CheckpointError, match="training state"):
        make_trainer().restore(dataclasses.replace(checkpoint, training=state))


# Precision and device


def test_bf16_trains_on_a_cpu() -> None:
    trainer = make_trainer(dtype="bf16")

    report = trainer.step()

    assert math.isfinite(float(report.loss))
    assert all(parameter.dtype == torch.float32 for parameter in trainer.model.parameters())
    assert all(state.dtype == torch.float32 for state in trainer.memories[0].states)


def test_fp16_on_a_cpu_is_refused_with_a_remedy() -> None:
    with pytest.raises(EnvironmentUnfitError, match="fp16 needs a GPU") as error:
        Precision("fp16", torch.device("cpu"))

    assert "--dtype bf16" in str(error.value)


def test_a_gpu_that_is_absent_is_refused_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    assert select_device("auto") == torch.device("cpu")
    with pytest.raises(EnvironmentUnfitError, match="A GPU was asked for"):
        select_device("cuda")


# Divergence


class Spoil(Callback):
    """Makes the loss or only the gradient not finite at a step, and saves what can be saved after each."""

    def __init__(self, step: int, what: str, path: Path) -> None:
        self.step, self.what, self.path = step, what, path

    def after_step(self, run: Run, report: StepReport) -> None:
        save_checkpoint(self.path, run.checkpoint(training=True))
        if report.step == self.step:
            assert isinstance(run, Trainer)
            weight = run.model.layers[0].get_parameter("attention.qkv.weight")
            if self.what == "loss":
                weight.data.fill_(math.nan)
            else:
                weight.register_hook(lambda gradient: gradient * math.inf)


@pytest.mark.parametrize(("what", "loss"), [("loss", "nan"), ("gradient", r"\d")])
def test_divergence_names_the_step_and_leaves_the_last_checkpoint(tmp_path: Path, what: str, loss: str) -> None:
    trainer = make_trainer([Spoil(4, what, tmp_path / "last.pt")])

    with pytest.raises(ValidationError, match=f"at step 5 the loss is {loss}") as error:
        trainer.run()

    assert "--restart" in str(error.value)
    saved = load_checkpoint(tmp_path / "last.pt")
    assert saved.progress["step"] == 4
    assert all(bool(tensor.isfinite().all()) for tensor in saved.model.values())


# Log lines


def test_the_train_line_is_the_specifications() -> None:
    progress = Progress(step=36000, epoch=18, batch=283)

    line = train_line(progress, 2101, 1.22e-3, 185.1, 265585, 3.1227, char=False)

    assert (
        line
        == "| epoch  18 step    36000 | batches    283 / 2101 | lr 1.220e-03 | ms/batch 185.1 | tok/s  265585 | loss  3.12 | ppl     22.71"
    )


def test_the_eval_line_is_the_specifications() -> None:
    line = eval_line(7, 35000, 1.37, math.log(23.132), char=False)

    assert line == "| Eval   7 at step    35000 | time:  1.37s | valid loss  3.14 | valid ppl    23.132"


def test_the_end_line_is_the_references() -> None:
    assert end_line(1.5, math.log(23.304), char=False) == "| End of training | test time:  1.50s | test loss  3.15 | test ppl    23.304"


def test_characters_are_reported_in_bits() -> None:
    nll = 1.06 * math.log(2)

    assert train_line(Progress(), 9, 0.1, 1.0, 1.0, nll, char=True).endswith("| loss  0.73 | bpc   1.06000")
    assert eval_line(1, 1, 1.0, nll, char=True).endswith("| valid loss  0.73 | bpc   1.06000")
    assert end_line(1.0, nll, char=True).endswith("| test loss  0.73 | test bpc   1.06000")


def test_a_huge_loss_does_not_break_the_lines() -> None:
    assert "inf" in train_line(Progress(), 9, 0.1, 1.0, 1.0, 1000.0, char=False)


def test_metrics_are_valid_json_even_of_infinite_numbers(tmp_path: Path) -> None:
    record = RunRecord(tmp_path, append=False)
    record.measure("train", perplexity=math.inf, grad_norm=math.nan, step=1)
    record.close()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    assert json.loads((tmp_path / "metrics.jsonl").read_text(encoding="utf-8"), parse_constant=refuse) == {
        "kind": "train",
        "perplexity": None,
        "grad_norm": None,
        "step": 1,
    }


def test_a_line_cut_off_by_a_kill_is_dropped_when_continuing(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 1}\n{"kind": "tra', encoding="utf-8")

    record = RunRecord(tmp_path, append=True)
    record.measure("train", step=2)
    record.close()

    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()] == [1, 2]


# The whole run


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
        *("cache", "checkpoint_best.pt", "checkpoint_last.pt", "config.yaml", "metrics.jsonl", "train_log.log")
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
        runs, "evaluate", lambda *_, **__: EvalResult(nll_nats_sum=10 * next(losses), n_tokens=10, n_segments=1, seconds=1.0)
    )

    result = train(resolved_from(settings, eval_interval=2, max_step=8))

    best, last = (load_checkpoint(tmp_path / "W" / name) for name in ("checkpoint_best.pt", "checkpoint_last.pt"))
    assert (best.progress["step"], best.progress["best_valid_nll"]) == (4, 3.0)
    assert (last.progress["step"], last.progress["best_step"], last.progress["best_valid_nll"]) == (8, 4, 3.0)
    assert [record["best"] for record in read_metrics(tmp_path / "W") if record["kind"] == "valid"] == [True, True, False, False]
    assert result.valid is not None
    assert result.valid.nll_nats_per_token == 3.5
    assert result.to_dict()["best"] == {"step": 4, "nll_nats_per_token": 3.0, "perplexity": pytest.approx(math.exp(3.0))}


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
    assert_same_weights(once.model, continued.model)
    once.progress.pop("train_seconds"), continued.progress.pop("train_seconds")
    assert once.progress == continued.progress
    assert once.training is not None
    assert continued.training is not None
    assert torch.equal(once.training["rng"]["cpu"], continued.training["rng"]["cpu"])
    log = (tmp_path / "W" / "train_log.log").read_text(encoding="utf-8")
    assert log.index("Stopped at step 7") < log.index("Continuing after step 7 of 12") < log.index("End of training")


def test_a_signal_within_an_evaluation_cuts_it_short_and_saves(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def evaluate_and_interrupt(*arguments: Any, on_step: Any, **keywords: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*arguments, on_step=on_step, **keywords)

    evaluate = runs.evaluate
    monkeypatch.setattr(runs, "evaluate", evaluate_and_interrupt)

    result = train(resolved_from(settings))

    assert (result.ending, result.progress.step, result.valid) == ("sigterm", 5, None)
    assert load_checkpoint(tmp_path / "W" / "checkpoint_last.pt").progress["step"] == 5


def test_evaluation_does_not_count_as_training_time(settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def evaluate_slowly(*arguments: Any, **keywords: Any) -> EvalResult:
        time.sleep(1.0)
        return evaluate(*arguments, **keywords)

    evaluate = runs.evaluate
    monkeypatch.setattr(runs, "evaluate", evaluate_slowly)

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

    assert all(option in str(error.value) for option in ("--restart", "--work-dir", "--overwrite"))
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
        ({"cutoffs": "2,3"}, ConfigError, "`cutoffs` belong to the adaptive softmax"),
        ({"adaptive": True, "cutoffs": "2,3000"}, ConfigError, "below the vocabulary's size"),
        ({"batch_size": 1000}, DataError, "--batch-size"),
        ({"eval_batch_size": 150}, DataError, "--eval-batch-size 100"),
        ({"dtype": "fp16", "device": "cpu"}, EnvironmentUnfitError, "fp16 needs a GPU"),
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

    completed = complete_model_config(resolved_from(settings, adaptive=True).config.model, corpus)

    assert (completed.adaptive, completed.cutoffs, completed.vocab_size) == (False, (), 7)


def test_the_built_in_corpus_is_written_into_the_work_folder(settings: dict[str, Any], tmp_path: Path) -> None:
    changes = {"dataset": "pydoc", "data": "none", "max_step": 1, "eval_max_steps": 1, "eval_batch_size": 64, "eval_tgt_len": 16}

    result = train(resolved_from(settings, **changes))

    assert result.data_folder == tmp_path / "W" / "data" / "pydoc"
    assert load_checkpoint(tmp_path / "W" / "checkpoint_best.pt").data_folder == str(result.data_folder)


# The progress bar


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """A standard error that says it is a terminal, in an environment that says nothing else."""
    for variable in ("CI", "TERM", "NO_COLOR"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    events.log.setLevel("INFO")
    yield monkeypatch
    events.log.setLevel("NOTSET")


def test_a_bar_is_drawn_on_terminals_only(terminal: pytest.MonkeyPatch) -> None:
    assert ProgressBar.is_wanted()

    terminal.setenv("CI", "true")
    assert not ProgressBar.is_wanted()
    terminal.delenv("CI")
    terminal.setenv("TERM", "dumb")
    assert not ProgressBar.is_wanted()
    terminal.delenv("TERM")
    events.log.setLevel("WARNING")
    assert not ProgressBar.is_wanted()
    events.log.setLevel("INFO")
    terminal.setattr("sys.stderr.isatty", lambda: False)
    assert not ProgressBar.is_wanted()


def test_a_bar_follows_the_steps(capsys: pytest.CaptureFixture[str]) -> None:
    trainer = make_trainer([ProgressBar()], max_step=2)

    trainer.run()

    assert capsys.readouterr().out == ""
