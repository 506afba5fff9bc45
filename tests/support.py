"""Small models for the tests, and how the oracle's parameters become a model's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.reference.naive_txl import random_parameters
from txl_train.checkpoint import Checkpoint, save_checkpoint
from txl_train.config import ModelConfig
from txl_train.data.vocabulary import Vocabulary
from txl_train.model.transformer_xl import TransformerXL

SMALL = {"vocab_size": 23, "n_layer": 2, "n_head": 2, "d_head": 3, "d_model": 8, "d_inner": 10, "mem_len": 7}

EVERYTHING = {"pre_lnorm": True, "clamp_len": 7, "same_length": True, "ext_len": 3}

MODEL_CONFIGS: dict[str, dict[str, Any]] = {
    "plain softmax": {},
    "adaptive softmax": {"cutoffs": (5, 9, 16)},
    "narrower tail clusters": {"cutoffs": (5, 9, 16), "div_val": 2},
    "embedding of another size": {"d_embed": 6},
    "adaptive, embedding of another size": {"cutoffs": (5, 9), "d_embed": 6},
    "untied weights": {"cutoffs": (5, 9), "div_val": 2, "tie_weights": False},
    "untied weights, one table": {"cutoffs": (5, 9), "tie_weights": False},
    "no tied projection": {"cutoffs": (5, 9), "div_val": 2, "tie_projections": (False, False, False)},
    "every projection tied": {"cutoffs": (5, 9), "div_val": 2, "tie_projections": (True, True, True)},
    "normalised before": {"pre_lnorm": True},
    "biases of every layer": {"untie_biases": True},
    "clamped distances": {"clamp_len": 4},
    "same length": {"same_length": True},
    "same length as in 2019": {"same_length": True, "same_length_rule": "mem_len"},
    "no memory": {"mem_len": 0},
    "memory shorter than a segment": {"mem_len": 3},
    "heads wider than the model": {"n_head": 3, "d_head": 5},
    "read once more": {"ext_len": 3},
    "more read once more than new": {"ext_len": 8},
    "read once more without a memory": {"ext_len": 4, "mem_len": 0},
    "read once more at the same length": {"ext_len": 2, "mem_len": 3, "same_length": True},
    "fewer learned distances than keys": {"attn_type": "shaw", "position_rows": 6},
    "more learned distances than keys": {"attn_type": "shaw", "position_rows": 40},
    "learned distances with everything": {"attn_type": "shaw", "position_rows": 9, **EVERYTHING},
    "sinusoidal positions": {"attn_type": "sinusoidal"},
    "sinusoidal positions with everything": {"attn_type": "sinusoidal", **EVERYTHING},
    "fewer learned positions than keys": {"attn_type": "learned", "position_rows": 6},
    "more learned positions than keys": {"attn_type": "learned", "position_rows": 40},
    "learned positions with everything": {"attn_type": "learned", "position_rows": 9, **EVERYTHING},
}
"""Everything that changes what a model computes, at least once each."""

ATTENTION_KINDS: dict[str, dict[str, Any]] = {
    "relative": {},
    "shaw": {"attn_type": "shaw", "position_rows": 9},
    "sinusoidal": {"attn_type": "sinusoidal"},
    "learned": {"attn_type": "learned", "position_rows": 9},
}
"""A setting of each `attn_type`."""


def small_config(**changes: Any) -> ModelConfig:
    """Return the configuration of a model that is computed in no time."""
    return ModelConfig(**{**SMALL, "dropout": 0.0, **changes, "adaptive": "cutoffs" in changes})


def build_model(config: ModelConfig, parameters: Mapping[str, np.ndarray] | None = None, *, seed: int = 0) -> TransformerXL:
    """Return a model in evaluation mode with the oracle's parameters (default: wide random ones)."""
    given = random_parameters(config, seed) if parameters is None else dict(parameters)
    if config.div_val == 1:  # the oracle has a table per cluster, the model one for all
        for name in ("embedding.weights", "head.weights", "head.biases"):
            parts = [given.pop(f"{name}.{i}") for i in range(config.n_cluster + 1) if f"{name}.{i}" in given]
            if parts:
                given[f"{name}.0"] = np.concatenate(parts)
    given.setdefault("head.cluster_weight", np.zeros((config.n_cluster, config.embed_size)))
    given.setdefault("head.cluster_bias", np.zeros(config.n_cluster))
    model = TransformerXL(config)
    model.load_parameters({name: torch.from_numpy(np.asarray(value, dtype=np.float32)) for name, value in given.items()})
    return model.eval()


def random_ids(config: ModelConfig, batch_size: int, length: int, seed: int = 3) -> np.ndarray:
    """Return int64 ids [B, length]; every id occurs when there is room for it."""
    generator = np.random.default_rng(seed)
    n_ids = batch_size * length
    every = generator.permutation(config.vocab_size)
    drawn = generator.integers(0, config.vocab_size, max(0, n_ids - len(every)))
    ids = generator.permutation(np.concatenate([every, drawn])[:n_ids])
    return ids.reshape(batch_size, length).astype(np.int64)


def segment_of(config: ModelConfig, ids: np.ndarray, index: int, tgt_len: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Return segment `index` of streams [B, N]: inputs [B, ext_len + T], targets [B, T], and how many of the inputs precede the streams."""
    start = index * tgt_len
    n_absent = max(0, config.ext_len - start)
    before = np.full((len(ids), n_absent), (1 + index) % config.vocab_size)  # any token: it must not be seen
    input_ids = np.concatenate([before, ids[:, start - config.ext_len + n_absent : start + tgt_len]], axis=1)
    return input_ids, ids[:, start + 1 : start + tgt_len + 1].copy(), n_absent


def words(count: int) -> list[str]:
    """Return `count` different symbols, `<eos>` and `<unk>` first."""
    return ["<eos>", "<unk>", *(f"word{i}" for i in range(count - 2))]


def write_checkpoint(path: Path, config: ModelConfig, *, data: Path | None = None, tgt_len: int = 5, seed: int = 0) -> TransformerXL:
    """Write a checkpoint of a small model with random weights, and return the model."""
    model = build_model(config, seed=seed)
    checkpoint = Checkpoint(
        model_config=config,
        model=model.parameters_by_name(),
        vocabulary=Vocabulary(words(config.vocab_size), unit="word"),
        dataset="text",
        run={"settings": {"train": {"eval_tgt_len": tgt_len}}, "data_folder": None if data is None else str(data)},
        progress={"step": 0},
    )
    save_checkpoint(path, checkpoint)
    return model


def write_corpus(folder: Path, vocab_size: int, *, n_lines: int = 30, seed: int = 5) -> Path:
    """Write train.txt, valid.txt and test.txt of random words of `words`, and return the folder."""
    generator = np.random.default_rng(seed)
    symbols = words(vocab_size)[2:]
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "valid", "test"):
        lines = [" ".join(generator.choice(symbols, size=generator.integers(3, 9))) for _ in range(n_lines)]
        (folder / f"{split}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def trace_only(patch: pytest.MonkeyPatch) -> None:
    """Let torch.compile trace as it always does, and run what it traced as it is: producing code takes half a minute a step."""
    real = torch.compile
    patch.setattr(torch, "compile", lambda model, **options: real(model, **(options | {"backend": "eager", "mode": None})))


def needs_exact_int8() -> pytest.MarkDecorator:
    """Skip where ONNX Runtime has no exact int8 products: 1.23, the last one for Python 3.10, saturates without VNNI whatever is set, so
    that an export is refused."""
    from packaging.version import Version

    from txl_deploy.bench.environment import cpu_extensions

    try:
        import onnxruntime
    except ImportError:
        return pytest.mark.skip(reason="onnxruntime is not installed")
    is_exact = Version(onnxruntime.__version__) >= Version("1.24") or {"avx_vnni", "avx512_vnni"} & set(cpu_extensions())
    return pytest.mark.skipif(not is_exact, reason="this ONNX Runtime has no exact int8 products on CPUs without VNNI")
