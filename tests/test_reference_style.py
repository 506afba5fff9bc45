"""The opponent of the inference benchmarks: computed in NVIDIA's way, it must yield what our own step yields."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from tests.fakes import FakeClock
from tests.support import MODEL_CONFIGS, SMALL, random_ids, small_config, write_checkpoint
from txl_deploy.bench.harness import BOUNDARIES, BenchSettings, Contender, measure
from txl_deploy.bench.workload import Workload
from txl_deploy.runtimes.base import HeadError, Runtime, ShapeRangeError
from txl_deploy.runtimes.registry import eager_from_checkpoint
from txl_train.config import ModelConfig
from txl_train.errors import ConfigError
from txl_train.files import file_sha256

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
TGT_LEN = 5
TAILS = {"cutoffs": (5, 9, 16)}
RELATIVE = {name: changes for name, changes in MODEL_CONFIGS.items() if "attn_type" not in changes and "ext_len" not in changes}
SAME = 2e-5
"""Nats: rounding of float32 through a few layers; a wrong distance or mask is off by hundredths."""


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import reference_style
    finally:
        sys.path.remove(str(BENCHMARKS))
    return reference_style


def lengths_of(config: ModelConfig) -> dict[str, Any]:
    return {"tgt_len": TGT_LEN, "mem_len": config.mem_len, "clamp_len": config.clamp_len, "same_length": config.same_length}


def scored(runtime: Runtime, config: ModelConfig, *, batch_size: int, n_segments: int = 5) -> torch.Tensor:
    """Return nll [segments, B, T] from a cold start; with the memory of 7 it is full before the third segment."""
    ids = torch.from_numpy(random_ids(config, batch_size, n_segments * TGT_LEN + 1))
    memory, found = runtime.initial_memory(batch_size), []
    for start in range(0, n_segments * TGT_LEN, TGT_LEN):
        output = runtime.step(ids[:, start : start + TGT_LEN], ids[:, start + 1 : start + TGT_LEN + 1], memory)
        memory = output.memory
        found.append(output.nll_BT.clone())
    return torch.stack(found)


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("scripted", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(TAILS | {"same_length": same_length, "clamp_len": clamp_len}, id=f"same_length={same_length}, clamp_len={clamp_len}")
        for same_length in (False, True)
        for clamp_len in (None, 4)
    ],
)
def test_every_token_costs_what_our_own_step_says(
    tmp_path: Path, reference: ModuleType, changes: dict[str, Any], scripted: bool, batch_size: int
) -> None:
    config = small_config(**changes)
    write_checkpoint(tmp_path / "model.pt", config)
    ours, _ = eager_from_checkpoint(tmp_path / "model.pt", tgt_len=TGT_LEN)
    theirs = reference.reference_runtime(tmp_path / "model.pt", scripted=scripted, **lengths_of(config))
    expected = scored(ours, config, batch_size=batch_size)
    torch.testing.assert_close(scored(theirs, config, batch_size=batch_size), expected, rtol=0, atol=SAME)
    if changes["same_length"]:  # the mask must matter here, or the agreement shows nothing
        unmasked, _ = eager_from_checkpoint(tmp_path / "model.pt", tgt_len=TGT_LEN, same_length=False)
        assert (scored(unmasked, config, batch_size=batch_size) - expected).abs().max() > 100 * SAME


@pytest.mark.parametrize("name", RELATIVE)
def test_every_relative_model_is_computed(tmp_path: Path, reference: ModuleType, name: str) -> None:
    config = small_config(**RELATIVE[name])
    write_checkpoint(tmp_path / "model.pt", config)
    ours, _ = eager_from_checkpoint(tmp_path / "model.pt", tgt_len=TGT_LEN, same_length_rule="mem_len+1")  # the rule of 2023
    expected = scored(ours, config, batch_size=2)
    for scripted in (False, True):
        theirs = reference.reference_runtime(tmp_path / "model.pt", scripted=scripted, **lengths_of(config))
        torch.testing.assert_close(scored(theirs, config, batch_size=2), expected, rtol=0, atol=SAME)


def test_lengths_are_those_asked_for_and_not_the_checkpoints(tmp_path: Path, reference: ModuleType) -> None:
    config = small_config(**TAILS, clamp_len=3, same_length=True, ext_len=2)
    write_checkpoint(tmp_path / "model.pt", config)
    asked = small_config(**TAILS, mem_len=11)
    ours, _ = eager_from_checkpoint(tmp_path / "model.pt", tgt_len=TGT_LEN, mem_len=11, ext_len=0, clamp_len=0, same_length=False)
    theirs = reference.reference_runtime(tmp_path / "model.pt", scripted=True, **lengths_of(asked))
    torch.testing.assert_close(scored(theirs, asked, batch_size=2), scored(ours, asked, batch_size=2), rtol=0, atol=SAME)


def test_one_token_at_a_time_equals_whole_segments(tmp_path: Path, reference: ModuleType) -> None:
    config = small_config(**TAILS, mem_len=4, same_length=True)
    write_checkpoint(tmp_path / "model.pt", config)
    theirs = reference.reference_runtime(tmp_path / "model.pt", scripted=True, **lengths_of(config) | {"tgt_len": 1})
    ours, _ = eager_from_checkpoint(tmp_path / "model.pt", tgt_len=1)
    ids = torch.from_numpy(random_ids(config, 2, 13))
    memory, expected_memory = theirs.initial_memory(2), ours.initial_memory(2)
    for i in range(12):
        output = theirs.step(ids[:, i : i + 1], ids[:, i + 1 : i + 2], memory)
        expected = ours.step(ids[:, i : i + 1], ids[:, i + 1 : i + 2], expected_memory)
        torch.testing.assert_close(output.nll_BT, expected.nll_BT, rtol=0, atol=SAME)
        memory, expected_memory = output.memory, expected.memory


def test_the_module_sees_a_memory_that_grows_from_nothing(tmp_path: Path, reference: ModuleType) -> None:
    config = small_config(**TAILS)
    write_checkpoint(tmp_path / "model.pt", config)
    runtime = reference.reference_runtime(tmp_path / "model.pt", scripted=False, **lengths_of(config))
    seen = []
    runtime._module.register_forward_pre_hook(lambda _, arguments: seen.append(tuple(arguments[2].shape)))
    scored(runtime, config, batch_size=3)
    assert seen == [(2, filled, 3, 8) for filled in (0, 5, 7, 7, 7)]


def test_weights_are_shared_with_the_script_and_half_of_them_take_half_the_bytes(tmp_path: Path, reference: ModuleType) -> None:
    config = small_config(**TAILS, tie_weights=True)
    write_checkpoint(tmp_path / "model.pt", config)
    sizes = {}
    for dtype in ("fp32", "fp16"):
        runtime = reference.reference_runtime(tmp_path / "model.pt", scripted=True, dtype=dtype, **lengths_of(config))
        by_address = {weight.data_ptr(): weight.numel() * weight.element_size() for weight in runtime._module.parameters()}
        sizes[dtype] = sum(by_address.values())
        assert runtime.info.dtype == runtime.info.memory_dtype == dtype
        assert runtime.initial_memory(1).states[0].dtype is {"fp32": torch.float32, "fp16": torch.float16}[dtype]
    assert sizes["fp32"] == 2 * sizes["fp16"]


def test_float16_is_the_same_model_coarsely(tmp_path: Path, reference: ModuleType) -> None:
    config = small_config(**TAILS, same_length=True)
    write_checkpoint(tmp_path / "model.pt", config)
    ours, _ = eager_from_checkpoint(tmp_path / "model.pt", tgt_len=TGT_LEN)
    theirs = reference.reference_runtime(tmp_path / "model.pt", scripted=True, dtype="fp16", **lengths_of(config))
    found, expected = scored(theirs, config, batch_size=2), scored(ours, config, batch_size=2)
    assert found.dtype is torch.float32
    difference = (found - expected).abs().max()
    assert SAME < difference < 0.1  # it really is float16, and no other model


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_the_harness_times_it_beside_ours_and_finds_the_same_perplexity(tmp_path: Path, reference: ModuleType, boundary: str) -> None:
    config = small_config(**TAILS, same_length=True)
    write_checkpoint(tmp_path / "model.pt", config)
    ids = np.random.default_rng(0).integers(0, config.vocab_size, 200)  # the text begins anew, so memories are reset on the way
    workload = Workload(ids_N=ids, batch_size=2, tgt_len=TGT_LEN)
    contenders = [
        Contender(runtime=eager_from_checkpoint(tmp_path / "model.pt", tgt_len=TGT_LEN)[0], is_reference=True),
        *(
            Contender(runtime=reference.reference_runtime(tmp_path / "model.pt", scripted=scripted, **lengths_of(config)))
            for scripted in (False, True)
        ),
    ]
    settings = BenchSettings(boundary=boundary, min_samples=30, max_samples=30, duration_s=0, max_warmup_s=0)
    ours, *theirs = measure(contenders, workload, settings, clock=FakeClock())
    assert [row.provider for row in theirs] == ["eager", "torchscript"]
    assert all((row.runtime, row.memory, row.mem_len, row.same_length) == ("reference", "hidden", 7, True) for row in theirs)
    assert all(row.checkpoint_sha256 == file_sha256(tmp_path / "model.pt") for row in theirs)
    assert all(row.verified is True and row.perplexity == pytest.approx(ours.perplexity, rel=SAME) for row in theirs)


def test_what_it_does_not_do_is_refused(tmp_path: Path, reference: ModuleType) -> None:
    config = small_config(**TAILS)
    write_checkpoint(tmp_path / "model.pt", config)
    runtime = reference.reference_runtime(tmp_path / "model.pt", scripted=False, **lengths_of(config))
    ids = torch.zeros(2, TGT_LEN, dtype=torch.int64)
    with pytest.raises(HeadError, match="no scores of the next token"):
        runtime.next_token(ids, runtime.initial_memory(2))
    with pytest.raises(ShapeRangeError, match=r"`input_ids` must have shape \[batch_size, 5\]"):
        runtime.step(ids[:, :3], ids, runtime.initial_memory(2))
    with pytest.raises(ShapeRangeError, match="`target_ids`"):
        runtime.step(ids, ids[:1], runtime.initial_memory(2))
    with pytest.raises(ShapeRangeError, match="for all 2 streams"):
        runtime.step(ids, ids, runtime.initial_memory(3))
    memory = runtime.initial_memory(2)
    with pytest.raises(ShapeRangeError, match=r"the lengths \[0, 5\]"):
        runtime.step(ids, ids, memory._replace(length_B=torch.tensor([0, 5])))
    with pytest.raises(ConfigError, match="`tgt_len` must be 1 or more"):
        reference.reference_runtime(tmp_path / "model.pt", scripted=False, **lengths_of(config) | {"tgt_len": 0})

    write_checkpoint(tmp_path / "shaw.pt", small_config(attn_type="shaw", position_rows=9))
    with pytest.raises(ConfigError, match="but this is `attn_type` shaw"):
        reference.reference_runtime(tmp_path / "shaw.pt", scripted=False, **lengths_of(config))


assert SMALL["mem_len"] == 7, "the tests above count on it"
