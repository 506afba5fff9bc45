"""What NVIDIA's own code computed with its own checkpoints, recomputed here in eager PyTorch, TorchScript and ONNX Runtime.

Whole evaluations go through the command line alone: `txl import`, then `txl eval --protocol`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.reference.nvidia import load_nvidia_checkpoint
from tests.support import build_model
from txl_deploy.cli.main import main
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

ALL_CASES = [
    *(f"adaptive-{i:03d}" for i in range(0, 37, 2)),
    *("divval2nt-090", "divval2nt-092", "divval2nt-094", "text8-108", "text8-110"),
    *(f"adaptive-manual-{name}" for name in ("120", "122", "124", "126", "128", "multi")),
    *(f"seed2019-{i:03d}" for i in range(0, 17, 2)),
    *("seed2019-manual-018", "seed2019-manual-020"),
]
FAILED_THERE = "text8-112"
"""What NVIDIA's code ended with an error: two TorchScript models in one process."""

ELSEWHERE = {
    "torchscript": [
        *("adaptive-018", "adaptive-028", "adaptive-032", "adaptive-034", "adaptive-manual-128"),
        *("divval2nt-094", "seed2019-008", "text8-110"),
    ],
    "onnx": ["adaptive-034", "seed2019-014", "text8-110"],
}
"""Cases that other runtimes than eager PyTorch repeat: both lineages, extension, repeat, short memories, manual text."""

QUICK = ("pytorch/adaptive-manual-multi", "pytorch/seed2019-manual-020", "torchscript/text8-110")
CASES = [f"pytorch/{case}" for case in ALL_CASES] + [f"{name}/{case}" for name, cases in ELSEWHERE.items() for case in cases]


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Path]:
    """Import a checkpoint of NVIDIA's, once."""
    folder = tmp_path_factory.mktemp("imported")

    def import_once(path: Path) -> Path:
        ours = folder / path.name
        if not ours.exists():
            assert main(["import", str(path), "--out", str(ours)]) == 0
        return ours

    return import_once


@pytest.fixture(scope="module")
def documents() -> dict[tuple[str, ...], dict[str, Any]]:
    """What was printed for a command line: NVIDIA recorded several under two names."""
    return {}


def recorded(reference_cases: Path, case_id: str) -> dict[str, Any]:
    entries: list[dict[str, Any]] = json.loads((reference_cases / "expected.json").read_text())["cases"]
    return next(entry for entry in entries if entry["id"] == case_id)


def command_line(root: Path, case: dict[str, Any], checkpoint: Path, runtime: str) -> list[str]:
    """Return NVIDIA's own arguments behind the protocol of their lineage; the checkpoint and the runtime are ours."""
    arguments = list(case["args"])
    if "--type" in arguments:
        at = arguments.index("--type")
        del arguments[at : at + 2]
    protocol = f"nvidia-{case['lineage']}"
    ours = ["--checkpoint", str(checkpoint), "--data", str(root / case["data"]), "--protocol", protocol, "--runtime", runtime]
    return ["eval", *ours, *arguments]


def test_every_recorded_case_is_among_those_below(reference_cases: Path) -> None:
    entries = json.loads((reference_cases / "expected.json").read_text())["cases"]
    assert sorted(entry["id"] for entry in entries) == sorted([*ALL_CASES, FAILED_THERE])
    assert not {name.partition("/")[2] for name in CASES} - set(ALL_CASES)


@pytest.mark.parametrize("name", [case if case in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in CASES])
def test_the_command_line_has_the_loss_the_tokens_and_the_line_of_the_reference(
    reference_cases: Path,
    imported: Callable[[Path], Path],
    documents: dict[tuple[str, ...], dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    runtime, _, case_id = name.partition("/")
    case = recorded(reference_cases, case_id)
    arguments = tuple(command_line(reference_cases, case, imported(reference_cases / case["checkpoint"]), runtime))
    capsys.readouterr()
    if arguments not in documents:
        assert main([*arguments, "--json"]) == 0
        documents[arguments] = json.loads(capsys.readouterr().out)
    document = documents[arguments]
    assert document["nll_nats_per_token"] == pytest.approx(case["expected_loss_nats"], abs=LOSS_TOLERANCE)
    assert document["perplexity"] == pytest.approx(case["expected_ppl"], rel=LOSS_TOLERANCE)
    assert document["bits_per_char"] == pytest.approx(case["expected_bpc"], abs=1e-5)
    assert (document["n_tokens"], document["n_segments"]) == (case["tokens_scored"], case["segments"])
    assert document["runtime"] == runtime


def test_the_line_of_the_result_is_the_reference_s_to_the_blank_at_its_end(
    reference_cases: Path, imported: Callable[[Path], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    for case_id in ("adaptive-036", "text8-110"):
        case = recorded(reference_cases, case_id)
        assert main(command_line(reference_cases, case, imported(reference_cases / case["checkpoint"]), "pytorch")) == 0
        assert case["log_line"] in capsys.readouterr().out.splitlines()


@pytest.mark.slow
def test_what_nvidias_code_failed_to_compute_is_computed(
    reference_cases: Path, imported: Callable[[Path], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    case = recorded(reference_cases, FAILED_THERE)
    assert "reference_error" in case
    losses = []
    for runtime in ("pytorch", "torchscript"):
        arguments = command_line(reference_cases, case, imported(reference_cases / case["checkpoint"]), runtime)
        capsys.readouterr()
        assert main([*arguments, "--json"]) == 0
        document = json.loads(capsys.readouterr().out)
        assert document["n_tokens"] == 10 * (document["n_tokens_in_text"] // 10 - 1)
        losses.append(document["nll_nats_per_token"])
    assert losses[0] == pytest.approx(losses[1], abs=LOSS_TOLERANCE)
    assert 2.1 < losses[0] < 2.3, "that of its neighbours, text8-108 and text8-110"


def open_runtime(name: str, model: TransformerXL, config: ModelConfig, tgt_len: int, memory: MemoryKind, folder: Path) -> Stepper:
    if name == "pytorch":
        return EagerRuntime(model, tgt_len=tgt_len, memory=memory, config=config)
    step = InferenceStep(model, tgt_len, memory, config)
    info = RuntimeInfo(name=name, provider=name, device="cpu", dtype="fp32", memory=memory, tgt_len=tgt_len, config=config)
    if name == "torchscript":
        return TorchScriptRuntime(folder / export_torchscript(step, folder)[0], info)
    return OnnxRuntime(folder / export_onnx(step, folder, {})[0], info, threads=1)


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
