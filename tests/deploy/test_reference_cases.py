"""What NVIDIA's own code computed with its own checkpoints, recomputed here in eager PyTorch, TorchScript and ONNX Runtime."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.reference.nvidia import ReferenceCase, encode_split, load_nvidia_checkpoint, read_cases
from tests.support import build_model
from txl_deploy.export.onnx import export_onnx
from txl_deploy.export.torchscript import export_torchscript
from txl_deploy.runtimes.base import RuntimeInfo
from txl_deploy.runtimes.eager import EagerRuntime
from txl_deploy.runtimes.onnxrt import OnnxRuntime
from txl_deploy.runtimes.torchscript import TorchScriptRuntime
from txl_train.config import MemoryKind, ModelConfig
from txl_train.evaluate import Stepper
from txl_train.model.inference import InferenceStep, with_lengths
from txl_train.model.transformer_xl import TransformerXL

LOSS_TOLERANCE = 5e-6
"""Agreement that the reference states for a correct FP32 implementation, nats per token."""

RUNTIMES = ["pytorch", "torchscript", "onnx"]
QUICK = ["adaptive-004", "adaptive-014"]
THOROUGH = [
    "adaptive-000",
    "adaptive-002",
    "adaptive-008",
    "adaptive-010",
    "adaptive-016",
    "adaptive-030",
    "seed2019-002",
    "divval2nt-090",
    "text8-110",
]


def open_runtime(name: str, model: TransformerXL, config: ModelConfig, tgt_len: int, memory: MemoryKind, folder: Path) -> Stepper:
    if name == "pytorch":
        return EagerRuntime(model, tgt_len=tgt_len, memory=memory, config=config)
    step = InferenceStep(model, tgt_len, memory, config)
    info = RuntimeInfo(name=name, provider=name, device="cpu", dtype="fp32", memory=memory, tgt_len=tgt_len, config=config)
    if name == "torchscript":
        return TorchScriptRuntime(folder / export_torchscript(step, folder)[0], info)
    return OnnxRuntime(folder / export_onnx(step, folder, {})[0], info, threads=1)


def padded(segments: Iterator[tuple[np.ndarray, np.ndarray, bool]], tgt_len: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, int, bool]]:
    """Yield inputs and targets of full length, with the number of real tokens: only the last segment is shorter."""
    for input_ids, target_ids, counted in segments:
        length = input_ids.shape[1]
        widths = ((0, 0), (0, tgt_len - length))
        yield torch.from_numpy(np.pad(input_ids, widths)), torch.from_numpy(np.pad(target_ids, widths)), length, counted


def loss_of(case: ReferenceCase, stepper: Stepper, symbols: list[str]) -> tuple[float, int]:
    """Return the mean nll over what the reference scores, in its order, and the number of tokens."""
    total, n_tokens = 0.0, 0
    memory = stepper.initial_memory(case.batch_size)
    for input_ids, target_ids, length, counted in padded(case.evaluation_segments(encode_split(case, symbols)), case.tgt_len):
        nll, memory = stepper.step(input_ids, target_ids, memory)
        if counted:
            total += float(nll[:, :length].double().sum())
            n_tokens += input_ids.shape[0] * length
    return total / n_tokens, n_tokens


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("case_id", [*QUICK, *(pytest.param(case_id, marks=pytest.mark.slow) for case_id in THOROUGH)])
def test_the_loss_of_a_whole_evaluation_equals_the_reference(reference_cases: Path, tmp_path: Path, case_id: str, runtime: str) -> None:
    case = next(case for case in read_cases(reference_cases) if case.id == case_id)
    saved = load_nvidia_checkpoint(case.checkpoint)
    config = case.model_config(saved.config)
    model = build_model(saved.config, saved.parameters)
    stepper = open_runtime(runtime, model, config, case.tgt_len, "kv", tmp_path)
    loss, n_tokens = loss_of(case, stepper, saved.symbols)
    assert n_tokens == case.tokens_scored
    assert loss == pytest.approx(case.expected_loss_nats, abs=LOSS_TOLERANCE)


@pytest.mark.parametrize("memory", ["kv", "hidden"])
@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("name", ["seed2019_plain", "text8"])
def test_every_token_of_successive_segments_from_a_cold_start_equals_the_reference(
    reference_cases: Path, tmp_path: Path, name: str, runtime: str, memory: MemoryKind
) -> None:
    facts = json.loads((reference_cases / "segments" / f"{name}.json").read_text())
    arrays = np.load(reference_cases / "segments" / f"{name}.npz")
    saved = load_nvidia_checkpoint(reference_cases / facts["checkpoint"])
    config = with_lengths(saved.config, mem_len=facts["mem_len"], clamp_len=facts["clamp_len"], same_length=facts["same_length"])
    model = build_model(saved.config, saved.parameters)
    T, B = facts["tgt_len"], facts["batch"]
    stepper = open_runtime(runtime, model, config, T, memory, tmp_path)
    state = stepper.initial_memory(B)
    for s in range(facts["segments"]):
        tokens = torch.from_numpy(arrays["tokens"][s * T : s * T + T + 1].astype(np.int64)).T
        nll, state = stepper.step(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), state)
        np.testing.assert_allclose(nll, arrays[f"nll{s}"].T, atol=LOSS_TOLERANCE)
        if memory == "hidden":
            kept = arrays[f"mems{s}"][: config.n_layer].transpose(0, 2, 1, 3)  # [L, B, filled, D]; 2019 keeps one layer more
            filled = kept.shape[2]
            assert state.length_B.tolist() == [filled] * B
            for layer, expected in enumerate(kept):
                np.testing.assert_allclose(state.states[layer][:, config.mem_len - filled :], expected, atol=1e-5)  # values up to 15
