"""Every shape of model, with either memory and in either type, is exported, is valid, and computes what the checkpoint computes.

Each artifact runs in ONNX Runtime from a cold start over twice the receptive field, on its own memory, beside the FP32 checkpoint in eager
PyTorch; the float16 graphs become engines of compute capability 7.5 too, which TensorRT-RTX builds without a GPU. Two layers, so that the
memory of one is made of the other.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import onnx
import pytest

from tests.support import small_config, write_checkpoint
from txl_deploy.export.artifact import ExportRequest, export_artifact
from txl_deploy.manifest import BatchRange, Dtype, read_manifest
from txl_deploy.parity.rollout import BATCH_SIZE, ParityResult, compare, default_segments, random_segments
from txl_deploy.runtimes.registry import eager_from_checkpoint, open_artifact
from txl_deploy.trt.builder import EngineSpec, build_engine
from txl_train.config import MemoryKind

TGT_LEN = 4

MODELS: dict[str, dict[str, Any]] = {
    "adaptive": {"cutoffs": (5, 9)},
    "non-adaptive": {},
    "div_val": {"cutoffs": (5, 9), "div_val": 2},
    "d_embed": {"cutoffs": (5, 9), "d_embed": 6},
    "untied": {"cutoffs": (5, 9), "div_val": 2, "tie_weights": False, "tie_projections": (False, False, False)},
    "pre_lnorm": {"cutoffs": (5, 9), "pre_lnorm": True},
    "char-level": {"vocab_size": 12, "clamp_len": 4, "same_length": True},
}
"""What a checkpoint can be; of the attention kinds, `export/test_attention_kinds.py` has the other ones."""

UNIT = 2.0**-11
"""What float16 rounds by, as a share of a value."""


def perplexity_bound(dtype: str, mean_nll: float) -> float:
    """Return how far the perplexity may differ, as a share.

    fp32: the same products, summed in another order.

    fp16: a mean nll is a mean of differences of logits, whose rounding is a share of them, so the bound is one unit of rounding for each
    nat of the mean nll. Measured over 420 rollouts (these models, both memories, 30 draws of weights and tokens, 192 tokens each) of eager
    PyTorch in float16, which rounds every product: 3.0e-4 per nat at most (`pre_lnorm`, whose sums grow unnormalised), 1.4e-4 for all
    others; 99 of 100 below 1.3e-4. ONNX Runtime on a CPU rounds less.
    """
    return 1e-6 if dtype == "fp32" else UNIT * max(1.0, mean_nll)


def checkpoint(folder: Path, model: str) -> Path:
    path = folder / f"{model}.pt"
    if not path.exists():
        write_checkpoint(path, small_config(**MODELS[model]), tgt_len=TGT_LEN)
    return path


def fixed_batch(memory: MemoryKind, dtype: str) -> int | None:
    """Return the number of streams of an artifact: any for one of them, and three for the others, which are exported in half the time."""
    return None if (memory, dtype) == ("kv", "fp16") else BATCH_SIZE


def exported(folder: Path, model: str, memory: MemoryKind, dtype: Dtype) -> Path:
    """Return the artifact, made once."""
    out = folder / f"{model}-{memory}-{dtype}"
    if not out.exists():
        source = checkpoint(folder, model)
        batch_size = fixed_batch(memory, dtype)
        request = ExportRequest(checkpoint=source, out=out, format="onnx", memory=memory, dtype=dtype, batch_size=batch_size)
        export_artifact(request)
    return out


def rollout(checkpoint: Path, artifact: Path, memory: MemoryKind) -> ParityResult:
    reference, _ = eager_from_checkpoint(checkpoint, memory=memory)
    config = reference.info.config
    segments = random_segments(config, tgt_len=TGT_LEN, n_segments=2 * default_segments(config, TGT_LEN))
    return compare(reference, open_artifact(artifact, threads=1), segments)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("matrix")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("memory", ["kv", "hidden"])
@pytest.mark.parametrize("model", MODELS)
def test_the_artifact_is_valid_and_keeps_the_checkpoint_s_perplexity(folder: Path, model: str, memory: MemoryKind, dtype: Dtype) -> None:
    artifact = exported(folder, model, memory, dtype)
    onnx.checker.check_model(str(artifact / "model.onnx"), full_check=True)
    found = read_manifest(artifact).precisions
    assert set(found["products"]) == {"float32" if dtype == "fp32" else "float16"}
    parity = rollout(checkpoint(folder, model), artifact, memory)
    assert parity.passed, parity.reason
    assert parity.n_segments >= 2 * parity.receptive_field_segments
    difference = abs(parity.perplexity_candidate / parity.perplexity_reference - 1)
    assert difference <= perplexity_bound(dtype, math.log(parity.perplexity_reference))


@pytest.mark.slow
@pytest.mark.parametrize("memory", ["kv", "hidden"])
@pytest.mark.parametrize("model", MODELS)
def test_tensorrt_rtx_builds_an_engine_for_compute_capability_7_5(folder: Path, model: str, memory: MemoryKind) -> None:
    pytest.importorskip("tensorrt_rtx")
    fixed = fixed_batch(memory, "fp16")
    batch = BatchRange(min=fixed or 1, opt=fixed or 8, max=fixed or 32)
    spec = EngineSpec(package="tensorrt_rtx", batch=batch, compute_capability="7.5")
    built = build_engine(exported(folder, model, memory, "fp16"), spec)
    assert len(built.built.plan) > 1000
    assert set(built.built.precisions.products) == {"float16"}
