"""Every preset trains, made small, on text in its own data set's form, and its optimizer, schedule and softmax are in force."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from txl_deploy.cli.main import main
from txl_train import presets
from txl_train.checkpoint import load_checkpoint
from txl_train.config import RunConfig
from txl_train.settings import resolve
from txl_train.trainer import Trainer

STEPS, WARMUP = 6, 2
N_WORDS = 2400
"""Types of the generated text of words: enough for the adaptive softmax to be worth its while."""

SIZES = ["--n-layer", "2", "--n-head", "2", "--d-head", "8", "--d-model", "64", "--d-inner", "32", "--mem-len", "8"]
LENGTHS = ["--max-step", str(STEPS), "--batch-size", "8", "--tgt-len", "16", "--log-interval", "1"]
EVALUATION = ["--eval-tgt-len", "16", "--eval-batch-size", "4", "--eval-interval", str(STEPS), "--eval-max-steps", "2"]

WIDTHS = {"wt103-base": (64,) * 4, "wt103-large": (64, 16, 4, 1), "lm1b-base": (64, 16, 4, 1), "tiny": (64,) * 3}
"""Embedding widths of the clusters where d_model is 64; the other presets have a plain softmax."""


def write_lines_of_words(folder: Path) -> None:
    """As WikiText's files: words between blanks, one paragraph a line, empty lines; valid and test have words of train alone."""
    generator = np.random.default_rng(0)
    for split, ids in (
        ("train", np.concatenate([generator.permutation(N_WORDS), generator.permutation(N_WORDS)])),
        ("valid", generator.integers(0, N_WORDS, 300)),
        ("test", generator.integers(0, N_WORDS, 300)),
    ):
        rows = (ids[at : at + 40] for at in range(0, len(ids), 40))
        (folder / f"{split}.txt").write_text("\n".join(f" {' '.join(f'w{i}' for i in row)} \n" for row in rows), encoding="utf-8")


def write_sentences(folder: Path) -> None:
    """As One Billion Word's files: one sentence a line, and the published vocabulary with its counts."""
    write_lines_of_words(folder)
    for path in folder.iterdir():
        sentences = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
        path.write_text("".join(f"{sentence}\n" for sentence in sentences if sentence), encoding="utf-8")
    words = ["<S> 200", "<UNK> 100", *(f"w{i} 2" for i in range(N_WORDS))]
    (folder / "1b_word_vocab.txt").write_text("".join(f"{word}\n" for word in words), encoding="utf-8")


def write_letters(folder: Path) -> None:
    """As prep_text8.py's files: letters between blanks, _ for a blank, no line break."""
    generator = np.random.default_rng(0)
    for split, n in (("train", 3000), ("valid", 300), ("test", 300)):
        (folder / f"{split}.txt").write_text(" ".join(generator.choice(list("abcdefghijklmnopqrstuvwxyz_"), n)), encoding="utf-8")


def write_bytes(folder: Path) -> None:
    """As prep_enwik8.py's files: the values of bytes between blanks, and a line break as itself."""
    generator = np.random.default_rng(0)
    values = [*map(str, (32, 60, 62, 91, 93, *range(97, 123), 195, 188)), "\n"]
    for split, n in (("train", 3000), ("valid", 300), ("test", 300)):
        (folder / f"{split}.txt").write_text(" ".join(generator.choice(values, n)), encoding="utf-8")


CORPORA: dict[str, Callable[[Path], None] | None] = {
    "wt103": write_lines_of_words,
    "lm1b": write_sentences,
    "text8": write_letters,
    "enwik8": write_bytes,
    "pydoc": None,
}
"""Who writes a text of each data set's form; None for the built-in one."""


@dataclasses.dataclass
class Trained:
    """A run, what it was asked for, and what it left."""

    name: str
    preset: RunConfig
    trainer: Trainer
    initial: dict[str, torch.Tensor]
    weights: dict[str, torch.Tensor]
    rows: list[dict[str, Any]]
    """The records of its steps."""

    @property
    def dataset(self) -> str:
        return self.preset.data.dataset


@pytest.fixture(scope="module", params=presets.names())
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Train the preset, made small, from the command line."""
    name: str = request.param
    preset = resolve(name, environment={}).config
    work, data = tmp_path_factory.mktemp("work"), tmp_path_factory.mktemp("data")
    options = ["--config", name, *SIZES, *LENGTHS, *EVALUATION, "--work-dir", str(work)]
    options += ["--warmup-step", str(WARMUP)] if preset.optim.lr_warmup_steps else []
    options += ["--d-embed", "64"] if preset.model.d_embed is not None else []
    write = CORPORA[preset.data.dataset]
    if write is not None:
        write(data)
        options += ["--data", str(data)]
    seen: list[tuple[Trainer, dict[str, torch.Tensor]]] = []
    run = Trainer.run

    def remember_and_run(trainer: Trainer) -> Any:
        seen.append((trainer, {name: weight.clone() for name, weight in trainer.model.parameters_by_name().items()}))
        return run(trainer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "run", remember_and_run)
        for variable in [name for name in os.environ if name.startswith("TXL_")]:
            patch.delenv(variable)
        assert main(["train", *options]) == 0
    ((trainer, initial),) = seen
    records = [json.loads(line) for line in (work / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert records[-1]["kind"] == "test"
    weights = dict(load_checkpoint(work / "checkpoint_last.pt").model)
    return Trained(name, preset, trainer, initial, weights, [record for record in records if record["kind"] == "train"])


def test_every_parameter_moves(trained: Trained) -> None:
    assert trained.weights.keys() == trained.initial.keys()
    still = [name for name, weight in trained.weights.items() if weight.numel() and torch.equal(weight, trained.initial[name])]
    assert still == []
    assert all(bool(weight.isfinite().all()) for weight in trained.weights.values())


def test_the_optimizer_is_the_presets_own(trained: Trained) -> None:
    asked, used = trained.preset.optim, trained.trainer.config.optim
    assert dataclasses.replace(used, lr_warmup_steps=asked.lr_warmup_steps) == asked
    assert type(trained.trainer.optimizer).__name__ == {"lamb": "Lamb", "adam": "Adam"}[asked.optim]
    assert trained.trainer.optimizer.defaults["weight_decay"] == asked.weight_decay


def test_the_learning_rate_warms_up_and_follows_half_a_cosine(trained: Trained) -> None:
    optim = trained.preset.optim
    assert optim.scheduler == "cosine"
    warmup = WARMUP if optim.lr_warmup_steps else 0

    def rate(step: int) -> float:
        done = (step - warmup) / (STEPS - warmup)
        return (
            optim.lr * step / warmup if step < warmup else optim.eta_min + (optim.lr - optim.eta_min) * (1 + math.cos(math.pi * done)) / 2
        )

    assert [row["step"] for row in trained.rows] == list(range(1, STEPS + 1))
    assert [row["lr"] for row in trained.rows] == pytest.approx([rate(row["step"]) for row in trained.rows])
    assert trained.rows[-1]["lr"] == pytest.approx(optim.eta_min)


def test_the_softmax_is_the_presets_own(trained: Trained) -> None:
    asked, used = trained.preset.model, trained.trainer.model.config
    assert used.adaptive == bool(used.cutoffs) == asked.adaptive
    assert used.cluster_widths == WIDTHS.get(trained.name, (64,))
    assert used.div_val == asked.div_val
    if asked.cutoffs:
        assert used.cutoffs == asked.cutoffs
    elif asked.adaptive:  # the data set's, in proportion to the smaller vocabulary
        full_size, cutoffs = {"wt103": (267_735, (19_997, 39_997, 199_997)), "lm1b": (793_471, (59_997, 99_997, 639_997))}[trained.dataset]
        assert used.vocab_size > N_WORDS
        assert used.cutoffs == tuple(cutoff * used.vocab_size // full_size for cutoff in cutoffs)
        assert [used.projection_is_tied(cluster) for cluster in range(4)] == [False] + [trained.dataset == "wt103"] * 3


def test_what_is_not_a_size_or_a_length_is_the_presets_own(trained: Trained) -> None:
    asked, used = trained.preset.model, trained.trainer.model.config
    for name in (
        "dropout",
        "dropatt",
        "attn_type",
        "pre_lnorm",
        "tie_weights",
        "same_length",
        "clamp_len",
        "init",
        "init_std",
        "proj_init_std",
    ):
        assert getattr(used, name) == getattr(asked, name), name
    in_characters = trained.dataset in ("enwik8", "text8")
    assert all(("bits_per_char" in row) == in_characters for row in trained.rows)
