"""The opponent of the training benchmarks: the same mathematics as our step, computed in the way of NVIDIA's code."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from txl_train.config import DataConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from txl_train.data.vocabulary import Vocabulary
from txl_train.errors import ConfigError
from txl_train.model.transformer_xl import TransformerXL
from txl_train.trainer import Trainer

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
VOCAB = 40
MODEL = ModelConfig(
    vocab_size=VOCAB, n_layer=2, n_head=2, d_head=4, d_model=8, d_inner=16, mem_len=6, dropout=0.0, adaptive=True, cutoffs=(10, 20)
)


@pytest.fixture(autouse=True)
def _path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def make(cls: type[Trainer], model: dict[str, Any] | None = None, **train: Any) -> Trainer:
    config = RunConfig(
        model=dataclasses.replace(MODEL, **(model or {})),
        data=DataConfig(dataset="text"),
        optim=OptimConfig(lr=0.02, lr_warmup_steps=3, clip=0.25),
        train=TrainConfig(**{"batch_size": 4, "tgt_len": 5, "max_step": 60} | train),
    )
    torch.manual_seed(0)
    ids = np.random.default_rng(0).integers(0, VOCAB, 403)
    return cls(config, TransformerXL(config.model), ids, vocabulary=Vocabulary([f"w{i}" for i in range(VOCAB)], unit="word"))


@pytest.mark.parametrize("model", [{}, {"pre_lnorm": True}, {"same_length": True, "clamp_len": 4}, {"untie_biases": True}, {"d_embed": 4}])
def test_without_dropout_both_trainings_are_the_same_also_over_an_epochs_end(model: dict[str, Any]) -> None:
    import reference_training

    own, reference = make(Trainer, model), make(reference_training.ReferenceTrainer, model)
    losses = [(float(own.step().loss), float(reference.step().loss)) for _ in range(25)]
    assert own.progress.epoch == reference.progress.epoch == 2
    assert max(abs(a - b) for a, b in losses) < 2e-5
    for (name, ours), theirs in zip(own.model.named_parameters(), reference.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=0, msg=lambda text, name=name: f"{name}: {text}")


def test_its_memory_begins_empty_and_grows_to_mem_len() -> None:
    import reference_training

    trainer = make(reference_training.ReferenceTrainer)
    lengths = []
    for _ in range(3):
        lengths.append(trainer.memories[0].states[0].shape[1])
        trainer.step()
    assert lengths == [0, 5, 6]


@pytest.mark.parametrize(("dtype", "tolerance"), [("bf16", 0.02), ("fp16", 0.005)])
def test_in_half_precision_it_follows_our_training_in_the_same_precision(dtype: str, tolerance: float) -> None:
    import reference_training

    own, reference = make(Trainer, dtype=dtype), make(reference_training.ReferenceTrainer, dtype=dtype)
    losses = [(float(own.step().loss), float(reference.step().loss)) for _ in range(20)]
    assert 0 < max(abs(a - b) for a, b in losses) < tolerance


def test_its_dropout_is_that_of_training() -> None:
    import reference_training

    def losses(cls: type[Trainer], dropout: float) -> list[float]:
        trainer = make(cls, {"dropout": dropout})
        return [float(trainer.step().loss) for _ in range(20)]

    reference = reference_training.ReferenceTrainer
    assert losses(reference, 0.3) != losses(reference, 0.0)
    assert np.mean(losses(reference, 0.3)) == pytest.approx(np.mean(losses(Trainer, 0.3)), abs=0.05)


@pytest.mark.parametrize(("model", "train", "what"), [({}, {"batch_chunk": 2}, "batch_chunk"), ({"dropatt": 0.1}, {}, "dropatt")])
def test_what_it_does_not_compute_is_refused(model: dict[str, Any], train: dict[str, Any], what: str) -> None:
    import reference_training

    with pytest.raises(ConfigError, match=what):
        make(reference_training.ReferenceTrainer, model, **train)
