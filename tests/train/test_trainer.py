"""Training: one step against plain PyTorch and against NVIDIA's recorded runs, continuing exactly, log lines, stopping, failures."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.reference import nvidia
from txl_train import callbacks as events
from txl_train.callbacks import Callback, Progress, ProgressBar, Run, RunRecord, StepReport, end_line, eval_line, train_line
from txl_train.checkpoint import load_checkpoint, save_checkpoint
from txl_train.config import DataConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from txl_train.data.corpus import load_corpus
from txl_train.data.datasets import get_dataset
from txl_train.data.segments import Segment, SegmentIterator
from txl_train.data.vocabulary import Vocabulary
from txl_train.errors import CheckpointError, EnvironmentUnfitError, UsageError, ValidationError
from txl_train.model.transformer_xl import TransformerXL
from txl_train.precision import Precision
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
    callbacks: list[Callback] | None = None,
    *,
    model: dict[str, Any] | None = None,
    optim: dict[str, Any] | None = None,
    n_ids: int = 300,
    **train_settings: Any,
) -> Trainer:
    settings = {"batch_size": 4, "tgt_len": 5, "max_step": 12, "log_interval": 3} | train_settings
    config = RunConfig(
        model=dataclasses.replace(MODEL, **(model or {})),
        data=DataConfig(dataset="text"),
        optim=OptimConfig(lr=0.02, lr_warmup_steps=3, eta_min=0.001, **(optim or {})),
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


@pytest.mark.parametrize("optim", ["lamb", "adam"])
def test_a_weight_decay_given_when_continuing_is_used(optim: Literal["lamb", "adam"]) -> None:
    # LAMB's trust ratio takes back what decay adds to a step's length, so it is the weights' course that tells, not their size
    checkpoint = make_trainer(optim={"optim": optim, "weight_decay": 0.0}).checkpoint(training=True)
    decayed, begun_so, undecayed = (make_trainer(optim={"optim": optim, "weight_decay": decay}) for decay in (0.5, 0.5, 0.0))
    for trainer in (decayed, undecayed):
        trainer.restore(checkpoint)

    for trainer in (decayed, begun_so, undecayed):
        torch.manual_seed(1)
        trainer.step()

    assert [group["weight_decay"] for group in decayed.optimizer.param_groups] == [0.5]
    assert_same_weights(weights_of(decayed), weights_of(begun_so))
    assert not torch.equal(weights_of(decayed)["embedding.weights.0"], weights_of(undecayed)["embedding.weights.0"])


def test_training_twice_gives_the_same_weights() -> None:
    one = make_trainer()
    one.run()
    other = make_trainer()
    other.run()

    assert_same_weights(weights_of(one), weights_of(other))


def test_a_signal_goes_before_a_time_limit_and_the_first_signal_stays() -> None:
    trainer = make_trainer()
    seen = []

    for ending in ("max_minutes", "sigint", "sigterm", "max_minutes"):
        trainer.stop(ending)
        seen.append(trainer.ending)

    assert seen == ["max_minutes", "sigint", "sigint", "sigint"]


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

    assert "--resume" in str(error.value)
    saved = load_checkpoint(tmp_path / "last.pt")
    assert saved.progress["step"] == 4
    assert all(bool(tensor.isfinite().all()) for tensor in saved.model.values())


def test_weights_that_are_not_finite_are_not_saved() -> None:
    trainer = make_trainer()
    trainer.step()
    trainer.model.layers[0].get_parameter("attention.qkv.weight").data[0, 0] = math.inf

    with pytest.raises(ValidationError, match=r"after step 1 the weights layers\.0\.attention\.qkv\.weight"):
        trainer.checkpoint(training=True)


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
