"""Faithful exports to be made wrong, each with its reference and texts: of two built-in models with random weights, or of a checkpoint.

The built-in models are as small as the mistakes allow: one of fp32 with tail clusters, clamp and same length, and one of fp16 with a long
memory, whose normalisations take values that float16 cannot square. Weights are random, of the size that makes attention and
predictions as decided as in a trained model.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch

from txl_deploy.corpora import ModelData, open_corpus
from txl_deploy.export.artifact import ExportRequest, export_artifact
from txl_deploy.manifest import Dtype, Format, Manifest, read_manifest
from txl_deploy.parity.rollout import BATCH_SIZE, default_segments
from txl_deploy.runtimes.base import Runtime
from txl_deploy.runtimes.eager import EagerRuntime
from txl_deploy.runtimes.registry import open_artifact
from txl_train.checkpoint import Checkpoint, load_model, save_checkpoint
from txl_train.config import ModelConfig
from txl_train.data.corpus import IdArray
from txl_train.data.segments import Segment, SegmentIterator
from txl_train.data.vocabulary import Vocabulary
from txl_train.errors import UsageError
from txl_train.evaluate import EvalResult, evaluate
from txl_train.model.transformer_xl import TransformerXL

FEWEST_SEGMENTS, MOST_SEGMENTS = 24, 96
"""Of a rollout: enough to ask for distributions and to judge a trend, and no more than a minute allows for all mistakes together."""

Chooser: TypeAlias = Callable[[Iterable[Segment]], Iterable[Segment]]
"""Leaves some segments of a text."""

TEXTS = 3
"""Texts that each mistake is looked for in."""

BUILT_IN: dict[Dtype, ModelConfig] = {
    "fp32": ModelConfig(
        vocab_size=60,
        n_layer=3,
        n_head=2,
        d_head=16,
        d_model=32,
        d_inner=48,
        adaptive=True,
        cutoffs=(20, 40),
        div_val=2,
        mem_len=24,
        clamp_len=16,
        same_length=True,
        init_std=0.18,
        proj_init_std=0.18,
    ),
    "fp16": ModelConfig(vocab_size=60, n_layer=2, n_head=2, d_head=16, d_model=32, d_inner=48, mem_len=640, init_std=0.18),
}
_TGT_LEN: dict[Dtype, int] = {"fp32": 8, "fp16": 64}
_WIDE = 600.0
"""How much larger what the blocks of the fp16 model add is than its normalised inputs: beyond 256, whose square float16 does not hold."""
_POSITIONS = 2.0
"""How much more that model minds positions than random weights do: attention by distance is what training makes of them."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """One checkpoint, exported in one type."""

    checkpoint: Path
    dtype: Dtype
    directory: Path
    """The ONNX artifact, as `txl export` wrote it."""
    manifest: Manifest
    runtime: Runtime
    """The artifact, opened."""
    reference: EagerRuntime
    """The checkpoint in FP32 eager PyTorch."""
    model: TransformerXL
    texts: Sequence[IdArray]
    told: str
    """What it is, in a few words."""
    _expected: dict[tuple[int, Chooser], EvalResult] = field(default_factory=dict)

    @property
    def config(self) -> ModelConfig:
        """The model's."""
        return self.reference.info.config

    @property
    def tgt_len(self) -> int:
        """Tokens per segment."""
        return self.reference.info.tgt_len

    def segments(self, text: int) -> SegmentIterator:
        """Return the segments of one of the texts."""
        ids = self.texts[text]
        return SegmentIterator(ids, batch_size=BATCH_SIZE, tgt_len=self.tgt_len, ext_len=self.config.ext_len)

    def expected(self, text: int, choose: Chooser = iter) -> EvalResult:
        """Return what the reference scores of those segments of one of the texts that `choose` leaves."""
        key = (text, choose)
        if key not in self._expected:
            self._expected[key] = evaluate(self.reference, choose(self.segments(text)), batch_size=BATCH_SIZE)
        return self._expected[key]

    def text_sha256(self, text: int) -> str:
        """Return the checksum of one of the texts."""
        return hashlib.sha256(np.ascontiguousarray(self.texts[text]).tobytes()).hexdigest()


def write_built_in(folder: Path, dtype: Dtype, *, seed: int = 1) -> Path:
    """Write a checkpoint of the built-in model for `dtype` into `folder`, with weights drawn from `seed`, and return it."""
    config = BUILT_IN[dtype]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = TransformerXL(config)
        for name, parameter in model.named_parameters():
            if "bias" in name and "norm" not in name:
                parameter.normal_(0.0, config.init_std)
        if dtype == "fp16":
            for layer in model.decoder_layers():
                layer.attention.output.weight.mul_(_WIDE)
                layer.feed_forward.outer.weight.mul_(_WIDE / 4)
                layer.attention.get_submodule("position").get_parameter("weight").mul_(_POSITIONS)
    words = ["<eos>", "<unk>", *(f"word{i}" for i in range(config.vocab_size - 2))]
    path = folder / f"built-in-{dtype}.pt"
    run: dict[str, Any] = {"settings": {"train": {"eval_tgt_len": _TGT_LEN[dtype]}}}
    checkpoint = Checkpoint(
        model_config=config,
        model=model.parameters_by_name(),
        vocabulary=Vocabulary(words, unit="word"),
        dataset="text",
        run=run,
        progress={"step": 0},
    )
    save_checkpoint(path, checkpoint)
    return path


def make_example(checkpoint: Path, folder: Path, dtype: Dtype, *, built_in: bool, seed: int = 1) -> Example:
    """Export `checkpoint` to ONNX in `folder` and open it.

    Raises:
        UsageError, CheckpointError: the checkpoint cannot be read.
        ValidationError: it cannot be exported in that type: float16 does not hold what it computes, or the export does not agree with it.
        EnvironmentUnfitError: onnx or onnxruntime is not installed.
    """
    directory = export(checkpoint, folder, "onnx", dtype)
    runtime = open_artifact(directory)
    info = runtime.info
    model, loaded = load_model(checkpoint)
    reference = EagerRuntime(model, tgt_len=info.tgt_len, memory=info.memory, config=info.config, checkpoint_sha256=loaded.sha256)
    texts, source = random_texts(info.config, info.tgt_len, seed), "random tokens"
    if not built_in:
        data = ModelData(loaded.dataset, loaded.vocabulary, loaded.data_folder)
        texts, source = _real_text(data, info.config, info.tgt_len) or (texts[:1], source)
    name = f"built-in model of {dtype}" if built_in else f"{checkpoint.name} in {dtype}"
    return Example(
        checkpoint=checkpoint,
        dtype=dtype,
        directory=directory,
        manifest=read_manifest(directory),
        runtime=runtime,
        reference=reference,
        model=model,
        texts=texts,
        told=f"{name}, {len(texts)} {'text' if len(texts) == 1 else 'texts'} of {len(texts[0]):,} {source}",
    )


def export(checkpoint: Path, folder: Path, form: Format, dtype: Dtype) -> Path:
    """Export `checkpoint` into a folder within `folder`, and return that."""
    out = folder / f"{form}-{dtype}"
    export_artifact(ExportRequest(checkpoint=checkpoint, out=out, format=form, dtype=dtype))
    return out


def random_texts(config: ModelConfig, tgt_len: int, seed: int = 1) -> list[IdArray]:
    """Return texts of uniformly drawn tokens, so that every cluster is met; they end in the middle of a segment."""
    generator = np.random.default_rng(seed)
    return [generator.integers(0, config.vocab_size, _length(config, tgt_len), dtype=np.int32) for _ in range(TEXTS)]


def _length(config: ModelConfig, tgt_len: int) -> int:
    """Tokens of a text: its last segment is not full."""
    n_segments = min(max(default_segments(config, tgt_len), FEWEST_SEGMENTS), MOST_SEGMENTS)
    return BATCH_SIZE * n_segments * tgt_len + 1 - max(1, math.ceil(tgt_len / 3))


def _real_text(data: ModelData, config: ModelConfig, tgt_len: int) -> tuple[list[IdArray], str] | None:
    """Return the beginning of the checkpoint's own text, test or validation, where that is here and long enough."""
    length = _length(config, tgt_len)
    try:
        corpus = open_corpus(data, dataset=None, data=None)
        for split in ("test", "valid"):
            ids = corpus.ids(split)
            if len(ids) >= length:
                return [np.asarray(ids[:length])], f"tokens of {data.dataset} {split}"
    except (UsageError, OSError):
        return None
    return None
