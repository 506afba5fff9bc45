"""Every kind of attention, and context that is read once more, as a TorchScript module and as an ONNX graph."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor

from tests.deploy.conftest import TGT_LEN
from tests.support import ATTENTION_KINDS, build_model, random_ids, segment_of, small_config
from txl_deploy.export.onnx import export_onnx
from txl_deploy.export.precision import onnx_precisions
from txl_deploy.export.torchscript import export_torchscript
from txl_deploy.signature import step_signature
from txl_train.config import MemoryKind
from txl_train.model.adaptive import cluster_rows
from txl_train.model.inference import InferenceStep

CASES: list[tuple[str, MemoryKind]] = [("relative", "kv"), ("shaw", "kv"), ("sinusoidal", "hidden"), ("learned", "hidden")]


def small_step(kind: str, memory: MemoryKind, dtype: torch.dtype = torch.float32) -> InferenceStep:
    config = small_config(**ATTENTION_KINDS[kind], ext_len=3, pre_lnorm=True, clamp_len=8)
    return InferenceStep(build_model(config), TGT_LEN, memory, dtype=dtype).eval()


def roll(step: InferenceStep, call: Any) -> list[Tensor]:
    """Return the nll of five segments, with the memory carried from one to the next."""
    ids = random_ids(step.config, 2, 5 * TGT_LEN + 1)
    states, length_B = step.initial_memory(2)
    losses = []
    for s in range(5):
        input_ids, target_ids = (torch.from_numpy(part) for part in segment_of(step.config, ids, s, TGT_LEN)[:2])
        rows = cluster_rows(target_ids.reshape(-1), step.head.cluster_ends)
        with torch.inference_mode():
            nll, length_B, states = call(input_ids, target_ids, rows, length_B, states)
        losses.append(nll)
    return losses


@pytest.mark.parametrize(("kind", "memory"), [*CASES, ("relative", "hidden"), ("shaw", "hidden")])
def test_torchscript_computes_what_the_model_computes(kind: str, memory: MemoryKind, tmp_path: Path) -> None:
    step = small_step(kind, memory)
    export_torchscript(step, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch.jit is deprecated and works
        script: Any = torch.jit.load(str(tmp_path / "model.pt"))  # type: ignore[no-untyped-call]
    for theirs, ours in zip(roll(step, script), roll(step, step), strict=True):
        torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-5)


def in_onnx_runtime(step: InferenceStep, folder: Path, batch_size: int | None) -> list[Tensor]:
    """Export the step and return the nll of five segments."""
    export_onnx(step, folder, {}, batch_size=batch_size)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options)
    specs = step_signature(step.config, tgt_len=TGT_LEN, memory=step.memory, memory_dtype=step.memory_dtype_name, batch=batch_size).inputs
    assert specs[0].axes == (batch_size or "batch_size", 3 + TGT_LEN)
    assert [(value.name, value.shape) for value in session.get_inputs()] == [(spec.name, list(spec.axes)) for spec in specs]

    def call(input_ids: Tensor, target_ids: Tensor, rows: list[Tensor], length_B: Tensor, states: list[Tensor]) -> tuple[Any, ...]:
        tensors = (input_ids, target_ids, *rows, length_B, *states)
        feed = {spec.name: tensor.numpy() for spec, tensor in zip(specs, tensors, strict=True)}
        nll, length_B, *states = (torch.from_numpy(value) for value in session.run(None, feed))
        return nll, length_B, states

    return roll(step, call)


@pytest.mark.parametrize(("kind", "memory"), CASES)
def test_onnx_runtime_computes_what_the_model_computes(kind: str, memory: MemoryKind, tmp_path: Path) -> None:
    step = small_step(kind, memory)
    for theirs, ours in zip(in_onnx_runtime(step, tmp_path, None), roll(step, step), strict=True):
        torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("kind", "memory"), [*CASES, ("shaw", "hidden")])
def test_in_float16_it_computes_the_same_but_for_rounding(kind: str, memory: MemoryKind, tmp_path: Path) -> None:
    exact = small_step(kind, memory)
    theirs = torch.stack(in_onnx_runtime(small_step(kind, memory, torch.float16), tmp_path, 2))
    ours = torch.stack(roll(exact, exact))
    # 1.5e-3 of the largest nll: three units of rounding, as `parity.tolerances` has it for a token
    assert float((theirs - ours).abs().max()) < 1.5e-3 * float(ours.max())
    found = onnx_precisions(tmp_path / "model.onnx")
    assert (set(found.products), set(found.states), found.problems) == ({"float16"}, {"float16"}, [])
