"""Training: one step against plain PyTorch and against NVIDIA's recorded runs, continuing exactly, log lines, stopping, failures."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from txl_train import callbacks as events
from txl_train import parallel
from txl_train.callbacks import Callback, LogProgress, ProgressBar, Run, StepReport, bar_text
from txl_train.checkpoint import load_checkpoint, save_checkpoint
from txl_train.config import DataConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from txl_train.data.segments import SegmentIterator
from txl_train.data.vocabulary import Vocabulary
from txl_train.errors import CheckpointError, ConfigError, UsageError, ValidationError
from txl_train.model.adaptive import cluster_rows
from txl_train.model.transformer_xl import TransformerXL
from txl_train.parallel import device_shares
from txl_train.records import RunRecord
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
    device: Any = "cpu",
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
    return Trainer(config, TransformerXL(config.model), ids, vocabulary=vocabulary, device=device, callbacks=callbacks or [])


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


class CountReads(TorchDispatchMode):
    """Counts what would make the host wait for a device: a value that is read, a shape that depends on values."""

    WAITING: ClassVar = {torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.masked_select, torch.ops.aten.equal}

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in self.WAITING:
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("dtype", "reads_a_step"), [("fp32", 0), ("bf16", 0), ("fp16", 1)])
def test_the_host_reads_losses_at_the_log_interval_and_nothing_of_the_device_between(
    monkeypatch: pytest.MonkeyPatch, dtype: str, reads_a_step: int
) -> None:
    trainer = make_trainer(dtype=dtype, optim={"clip": 0.25}, log_interval=3)
    trainer.step()  # the optimizer's state is made
    trainer.device = torch.device("cuda")  # as far as reading losses goes
    with CountReads() as reads:

        def on_the_host(targets: Tensor, ends: list[int]) -> list[Tensor]:
            assert targets.device.type == "cpu"
            with _disable_current_modes():
                return cluster_rows(targets, ends)

        monkeypatch.setattr(parallel, "cluster_rows", on_the_host)
        counts = []
        for _ in range(6):
            reads.names.clear()
            trainer.step()
            counts.append(len(reads.names))

    assert counts[0] == counts[1] == counts[3] == counts[4] == reads_a_step  # fp16's: did a gradient overflow
    assert counts[2] == counts[5] >= 3 * (1 if dtype == "fp16" else 2)  # losses of three steps; and norms, unless a loss scale sees to them


def test_the_counter_of_reads_sees_a_loss_that_finds_its_rows_on_the_device() -> None:
    trainer = make_trainer()
    with CountReads() as reads:
        trainer.model.nll(torch.zeros(2, 3, 8), torch.zeros(2, 3, dtype=torch.int64))
    assert reads.names == ["aten.nonzero.default"] * 2


@pytest.mark.parametrize("chunks", [1, 2])
def test_rows_of_the_host_give_the_loss_of_rows_of_the_device_to_the_last_bit(monkeypatch: pytest.MonkeyPatch, chunks: int) -> None:
    def train() -> dict[str, Tensor]:
        trainer = make_trainer(batch_chunk=chunks)
        for _ in range(4):
            trainer.step()
        return weights_of(trainer)

    by_host = train()
    nll = TransformerXL.nll
    monkeypatch.setattr(TransformerXL, "nll", lambda self, hidden, targets, rows: nll(self, hidden, targets))
    assert_same_weights(by_host, train())


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


# Options of the loss, the gradient and the data


def test_several_devices_of_one_process_give_the_gradient_of_one() -> None:
    no_dropout = {"dropout": 0.0, "dropatt": 0.0}
    one = make_trainer(model=no_dropout)
    two = make_trainer(model=no_dropout, device=[torch.device("cpu"), torch.device("cpu")], multi_gpu="dp", gpu0_bsz=1)
    for _ in range(6):
        alone, shared = one.step(), two.step()
        assert float(alone.loss) == pytest.approx(float(shared.loss), rel=1e-6)
    for name, weight in weights_of(one).items():
        torch.testing.assert_close(weights_of(two)[name], weight, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "shares"), [((8, 1), [8]), ((8, 3), [3, 3, 2]), ((8, 3, 2), [2, 3, 3]), ((8, 2, 0), [0, 8]), ((8, 1, 3), [8])]
)
def test_the_first_device_may_take_fewer_streams(arguments: tuple[int, ...], shares: list[int]) -> None:
    assert device_shares(*arguments) == shares


def test_more_streams_on_the_first_device_than_there_are_is_an_error() -> None:
    with pytest.raises(ConfigError, match="at most the batch's 4 streams, but is 5"):
        device_shares(4, 2, 5)


def test_clipping_may_leave_the_embeddings_out() -> None:
    all_clipped, others_clipped = make_trainer(), make_trainer(optim={"clip_nonemb": True})
    for trainer in (all_clipped, others_clipped):
        torch.manual_seed(1)
        trainer.step()
    embedding = {"embedding.weights.0"}

    def norm_of(trainer: Trainer, names: set[str]) -> float:
        gradients = [parameter.grad for name, parameter in trainer.model.named_parameters() if name in names]
        return math.sqrt(sum(float(gradient.norm()) ** 2 for gradient in gradients if gradient is not None))

    others = {name for name, _ in others_clipped.model.named_parameters()} - embedding
    assert norm_of(others_clipped, others) == pytest.approx(0.25, rel=1e-4)
    assert norm_of(others_clipped, embedding) > norm_of(all_clipped, embedding) * 1.01


def test_compatible_memory_lives_on_in_the_next_epoch() -> None:
    lengths = {}
    for compat in ("nvidia-2019", "nvidia-2023"):
        trainer = make_trainer(n_ids=44, batch_size=4, tgt_len=5, compat=compat)  # 11 tokens a stream: batches of 5 and 5 targets
        for _ in range(3):
            trainer.step()
        assert (trainer.progress.epoch, trainer.progress.batch) == (2, 1)
        lengths[compat] = trainer.memories[0].length_B.tolist()
    assert lengths == {"nvidia-2019": [5] * 4, "nvidia-2023": [6] * 4}


def test_memory_that_an_extended_context_cannot_follow_is_dropped_at_a_new_epoch() -> None:
    trainer = make_trainer(model={"ext_len": 3}, n_ids=44, batch_size=4, tgt_len=5, compat="nvidia-2023")
    for _ in range(3):
        trainer.step()
    assert trainer.progress.epoch == 2
    assert trainer.memories[0].length_B.tolist() == [5] * 4


def test_gradients_that_are_never_finite_end_training_in_fp16() -> None:
    trainer = make_trainer(dtype="fp16", max_step=200)
    trainer.model.layers[0].get_parameter("attention.qkv.weight").register_hook(lambda gradient: gradient * math.inf)

    with pytest.raises(ValidationError, match="the loss scale fell to") as error:
        trainer.run()
    assert "--dtype bf16" in str(error.value.remedy)
    assert trainer.progress.step < 40


def test_sampled_softmax_trains_the_full_one() -> None:
    trainer = make_trainer(model={"adaptive": False, "cutoffs": ()}, optim={"scheduler": "constant"}, sample_softmax=10, max_step=150)
    trainer.run()
    segment = trainer.segments.segment(0)
    with torch.no_grad():
        trainer.model.eval()
        hidden, _ = trainer.model(torch.from_numpy(segment.input_ids_BT), trainer.model.initial_memory(4))
        nll = float(trainer.model.nll(hidden, torch.from_numpy(segment.target_ids_BT)).mean())
    assert nll < 0.96 * math.log(VOCAB)  # what was drawn has taught what it learned of all words


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # PyTorch's compiler looks, and hides it from users
def test_a_compiled_model_trains_to_the_same_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    # without generating code, which takes a minute: what is tested is that the model can be taken as one graph
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager", fullgraph=True))
    no_dropout = {"dropout": 0.0, "dropatt": 0.0, "n_layer": 1}
    compiled, plain = make_trainer(model=no_dropout, compile=True, max_step=3), make_trainer(model=no_dropout, max_step=3)
    for trainer in (compiled, plain):
        trainer.run()
    for name, weight in weights_of(plain).items():
        torch.testing.assert_close(weights_of(compiled)[name], weight, rtol=0, atol=1e-5)


# Continuing


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        ({}, {}),
        ({"mem_len": 0}, {}),
        ({"same_length": True}, {"batch_chunk": 2}),
        ({}, {"dtype": "bf16"}),
        ({}, {"dtype": "fp16"}),
        ({}, {"roll": True}),
        ({"ext_len": 3}, {"varlen": True, "roll": True}),
        ({"adaptive": False, "cutoffs": ()}, {"sample_softmax": 8}),
        ({}, {"compat": "nvidia-2023"}),
    ],
)
def test_continuing_gives_the_same_weights_to_the_last_bit(tmp_path: Path, model: dict[str, Any], settings: dict[str, Any]) -> None:
    # 15 targets a stream: 3 batches an epoch, so the stop after 7 steps lies within epoch 3 (unless lengths are random)
    at_once = make_trainer(model=model, n_ids=61, **settings)
    at_once.run()

    stopped = make_trainer([StopAt(7)], model=model, n_ids=61, **settings)
    assert stopped.run() == "sigterm"
    save_checkpoint(tmp_path / "last.pt", stopped.checkpoint(training=True))
    torch.manual_seed(999)
    continued = make_trainer(model=model, n_ids=61, **settings)
    torch.rand(100)  # whatever happens before must not matter
    continued.restore(load_checkpoint(tmp_path / "last.pt"))
    assert (continued.progress.step, continued.progress.epoch, continued.progress.batch) == (7, 3, 3 if "varlen" in settings else 1)
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


@pytest.mark.parametrize("changes", [{"model": {"mem_len": 5}}, {"model": {"same_length": True}}])
def test_another_model_cannot_be_continued(changes: dict[str, Any]) -> None:
    checkpoint = make_trainer().checkpoint(training=True)

    with pytest.raises(UsageError, match="not that of this checkpoint"):
        make_trainer(**changes).restore(checkpoint)


def test_another_batch_size_cannot_be_continued() -> None:
    checkpoint = make_trainer().checkpoint(training=True)

    with pytest.raises(CheckpointError, match="memory is of 4 streams, not of 2"):
        make_trainer(batch_size=2).restore(checkpoint)


def test_a_run_may_go_on_in_other_parts() -> None:
    no_dropout = {"dropout": 0.0, "dropatt": 0.0}
    whole, begun = make_trainer(model=no_dropout), make_trainer(model=no_dropout)
    for trainer in (whole, begun):
        trainer.step()
    in_parts = make_trainer(model=no_dropout, batch_chunk=2)
    in_parts.restore(begun.checkpoint(training=True))
    for trainer in (whole, in_parts):
        trainer.step()

    for name, weight in weights_of(whole).items():
        torch.testing.assert_close(weights_of(in_parts)[name], weight, rtol=0, atol=1e-6)


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


def test_fp16_scales_the_loss_and_halves_the_scale_after_an_overflow() -> None:
    trainer = make_trainer(dtype="fp16")
    scale = trainer.loss_scale
    before = weights_of(trainer)

    trainer.step()

    assert scale == 65536.0
    assert not torch.equal(weights_of(trainer)["embedding.weights.0"], before["embedding.weights.0"])
    handle = trainer.model.layers[0].get_parameter("attention.qkv.weight").register_hook(lambda gradient: gradient * math.inf)
    at_overflow = weights_of(trainer)
    trainer.step()
    handle.remove()
    assert trainer.loss_scale == 32768.0
    assert_same_weights(weights_of(trainer), at_overflow)


def test_fp16_trains_like_fp32() -> None:
    no_dropout = {"dropout": 0.0, "dropatt": 0.0}
    half, single = make_trainer(model=no_dropout, dtype="fp16"), make_trainer(model=no_dropout)
    losses = [[float(trainer.step().loss) for _ in range(12)] for trainer in (half, single)]

    assert losses[0] == pytest.approx(losses[1], rel=2e-3)  # half precision has 11 bits
    assert losses[0] != losses[1]


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


def test_a_bar_says_what_was_logged_last() -> None:
    latest = {"loss_nats_per_token": 3.217, "model_flops_utilisation": 0.3512, "peak_memory_bytes": 3 * 2**30}

    assert bar_text(12345.6, {}) == "12,346 tokens/s"
    assert bar_text(12345.6, latest) == "12,346 tokens/s · loss 3.22 · 35% of peak · 3.0 GiB"
    assert bar_text(1.0, latest | {"model_flops_utilisation": None, "peak_memory_bytes": None}) == "1 tokens/s · loss 3.22"


def test_a_bar_follows_the_steps(capsys: pytest.CaptureFixture[str]) -> None:
    trainer = make_trainer([ProgressBar(LogProgress(RunRecord(None, append=False), 1, char=False))], max_step=2)

    trainer.run()

    assert capsys.readouterr().out == ""
