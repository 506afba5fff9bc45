"""The kernels of the step on a GPU compute what the plain step does, for every kind of model; here in Triton's interpreter, on the CPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from tests.support import MODEL_CONFIGS, build_model, random_ids, small_config
from txl_train.config import HeadKind, ModelConfig
from txl_train.model.adaptive import cluster_rows
from txl_train.model.inference import STEPS, FixedStep, InferenceStep
from txl_train.model.memory import Memory

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton"),
    # of Triton's interpreter, which computes with NumPy: a value that rounds to infinity, and infinities that are masked out
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION is unset:UserWarning"),
]

FUSED = [name for name, changes in MODEL_CONFIGS.items() if "attn_type" not in changes and changes.get("mem_len") != 0]
"""Models of relative attention with a memory."""
ALIGNED = {"mem_len": 24, "d_head": 4, "clamp_len": 9, "same_length": True, "cutoffs": (5, 9)}
"""With segments of 8 tokens: scores by distance are read sixteen bytes at a time."""


def both(config: ModelConfig, *, tgt_len: int, head: HeadKind = "nll", dtype: torch.dtype = torch.float32) -> tuple[FixedStep, Any]:
    from txl_train.model.fused import FusedStep, can_fuse

    plain = STEPS[head](build_model(config).eval(), tgt_len, dtype=dtype).eval()
    assert can_fuse(plain)
    return plain, FusedStep(plain)


def segments(config: ModelConfig, count: int, tgt_len: int, streams: int = 2) -> list[tuple[torch.Tensor, torch.Tensor]]:
    ids_BN = torch.from_numpy(random_ids(config, streams, config.ext_len + count * tgt_len + 1))
    return [
        (ids_BN[:, k : k + config.ext_len + tgt_len].contiguous(), ids_BN[:, k + config.ext_len + 1 :][:, :tgt_len].contiguous())
        for k in range(0, count * tgt_len, tgt_len)
    ]


def assert_alike(plain: FixedStep, fused: Any, config: ModelConfig, *, tgt_len: int, atol: float) -> None:
    """Run both over more segments than the ring has room for, and compare results, lengths and all that the memory shows."""
    from txl_train.model.fused import Ring

    ring, memory, start = Ring.empty(plain, 2, torch.device("cpu")), plain.initial_memory(2), 0
    for inputs, targets in segments(config, 2 + 2 * config.mem_len // tgt_len, tgt_len):
        rows = cluster_rows(targets.reshape(-1), list(config.cluster_ends))
        with torch.inference_mode():
            given = (inputs, targets, rows) if plain.head_kind == "nll" else (inputs,)
            expected, length_B, states = plain(*given, memory.length_B, memory.states)
            found = fused(inputs, targets, ring)
        start = (start + tgt_len) % ring.n_slot
        torch.testing.assert_close(found, expected, atol=atol, rtol=atol)
        assert int(ring.start) == start
        assert torch.equal(ring.length_B, length_B)
        for own, state in zip(ring.views(start, config.mem_len), states, strict=True):
            for b, length in enumerate((length_B - config.ext_len).clamp(0, config.mem_len).tolist()):
                torch.testing.assert_close(
                    own[b, :, config.mem_len - length :], state[b, :, config.mem_len - length :], atol=atol, rtol=atol
                )
        memory = Memory(states, length_B)


@pytest.mark.parametrize("name", FUSED)
def test_the_fused_step_scores_as_the_plain_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from txl_train.model import layer_kernels

    monkeypatch.setattr(layer_kernels, "attend_blocks", lambda *_: (16, 32, 4, 3, 1))  # few programs to interpret
    config = small_config(**MODEL_CONFIGS[name])
    plain, fused = both(config, tgt_len=5)
    assert_alike(plain, fused, config, tgt_len=5, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_it_does_where_scores_by_distance_are_aligned(dtype: torch.dtype) -> None:
    config = small_config(**ALIGNED)
    plain, fused = both(config, tgt_len=8, dtype=dtype)
    assert fused._layers._terms_HCE[0].shape[1] < config.mem_len + 8 + 1  # far keys have no column
    assert_alike(plain, fused, config, tgt_len=8, atol=2e-5 if dtype == torch.float32 else 5e-3)


@pytest.mark.parametrize(("mem_len", "tgt_len", "n_distance"), [(640, 64, 464), (24, 8, 17), (7, 16, 24), (320, 64, 385)])
def test_scores_of_eight_keys_lie_at_sixteen_bytes_for_every_query(mem_len: int, tgt_len: int, n_distance: int) -> None:
    """What the kernels tell Triton, whose interpreter does not look: on a GPU, it would end in a misaligned address."""
    from txl_train.model import layer_kernels

    H, E, N = 2, 4, 2 * tgt_len
    operands = torch.zeros(N, 3 * H * E), torch.zeros(H, E), torch.zeros(H, n_distance, E)
    ring = torch.zeros(2, 2, H, 2 * (mem_len + tgt_len), E)
    start = torch.zeros(1, dtype=torch.int64)
    scores_HNP = layer_kernels.score_and_keep(*operands, ring, start, n_query=tgt_len, mem_len=mem_len, scale=1.0)
    pitch, n_alike = scores_HNP.shape[2], mem_len + tgt_len - n_distance + 1
    first_key = scores_HNP.storage_offset() + pitch - n_distance + tgt_len - 1 - n_alike  # of query 0, as `_attend` finds it
    assert first_key % 8 == 0
    assert pitch % 8 == 1  # a query's row begins one place further, and its distances one earlier


@pytest.mark.slow
@pytest.mark.parametrize(("aligned", "n_part"), [(True, 1), (False, 1), (True, 3)])
def test_it_does_where_every_kernel_takes_several_blocks(aligned: bool, n_part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from txl_train.model import layer_kernels, softmax_kernels

    monkeypatch.setattr(layer_kernels, "attend_blocks", lambda *_: (16, 16, 4, 2, n_part))
    monkeypatch.setattr(layer_kernels, "score_blocks", lambda *_: (16, 16))
    monkeypatch.setattr(softmax_kernels, "tail_blocks", lambda *_: (16, 16, 4, 2))
    for name, size in (("TILE", 16), ("SUMMED", 16), ("SCANNED", 16)):
        monkeypatch.setattr(softmax_kernels, name, size)
    config = small_config(vocab_size=150, cutoffs=(40, 60, 110), n_layer=1, d_model=24, mem_len=72, clamp_len=20, same_length=True)
    tgt_len = 40 if aligned else 37
    plain, fused = both(config, tgt_len=tgt_len)
    assert_alike(plain, fused, config, tgt_len=tgt_len, atol=3e-5)


def test_ids_of_no_word_give_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    from txl_train.model.fused import Ring

    config = small_config(cutoffs=(5, 9))
    plain, fused = both(config, tgt_len=4)
    right = torch.tensor([[0, 5, 9, 22]])
    for wrong in (-1, 23, 2**40):
        bad = right.clone()
        bad[0, 2] = wrong
        with torch.inference_mode():
            assert fused(bad, right, Ring.empty(plain, 1, torch.device("cpu")))[0, 2:].isnan().all()
            nll_BT = fused(right, bad, Ring.empty(plain, 1, torch.device("cpu")))
        assert nll_BT.isnan().tolist() == [[False, False, True, False]]


@pytest.mark.parametrize("head", ["logits", "log_probs"])
def test_it_scores_every_word_as_the_next_one_as_the_plain_one_does(head: HeadKind) -> None:
    config = small_config(cutoffs=(5, 9), mem_len=3)
    plain, fused = both(config, tgt_len=1, head=head)
    assert_alike(plain, fused, config, tgt_len=1, atol=2e-5)


def test_one_that_is_fused_in_float16_is_as_near_to_float32_as_the_plain_one() -> None:
    config = small_config(cutoffs=(5, 9, 16), d_model=16, d_head=8)
    from txl_train.model.fused import FusedStep, Ring

    model = build_model(config).eval()
    exact, half = InferenceStep(model, 5).eval(), InferenceStep(model, 5, dtype=torch.float16).eval()
    ring, memories = Ring.empty(half, 2, torch.device("cpu")), [exact.initial_memory(2), half.initial_memory(2)]
    errors: list[list[float]] = [[], []]
    for inputs, targets in segments(config, 6, 5):
        rows, found = cluster_rows(targets.reshape(-1), list(config.cluster_ends)), []
        with torch.inference_mode():
            for i, step in enumerate((exact, half)):
                nll, length_B, states = step(inputs, targets, rows, memories[i].length_B, memories[i].states)
                memories[i] = Memory(states, length_B)
                found.append(nll)
            found.append(FusedStep(half)(inputs, targets, ring))
        for i in range(2):
            errors[i].append(float((found[i + 1] - found[0]).abs().mean()))
    assert sum(errors[1]) < 1.5 * sum(errors[0])


def test_a_memory_that_is_loaded_into_a_ring_goes_on() -> None:
    from txl_train.model.fused import Ring

    config = small_config(cutoffs=(5, 9))
    plain, fused = both(config, tgt_len=5)
    ring, memory = Ring.empty(plain, 2, torch.device("cpu")), plain.initial_memory(2)
    with torch.inference_mode():
        for n, (inputs, targets) in enumerate(segments(config, 5, 5)):
            rows = cluster_rows(targets.reshape(-1), list(config.cluster_ends))
            if n == 3:
                ring.load(memory.states, memory.length_B)
            expected, length_B, states = plain(inputs, targets, rows, memory.length_B, memory.states)
            memory = Memory(states, length_B)
            if n >= 3:
                torch.testing.assert_close(fused(inputs, targets, ring), expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("targets", [[0, 1, 2, 3], [22, 21, 20, 22], [5, 8, 9, 15, 16, 22, 0], [16] * 20], ids=str)
def test_targets_are_found_wherever_they_lie(targets: list[int]) -> None:
    from txl_train.model import softmax_kernels

    lows = torch.tensor([5, 9, 16, 23])
    target_ids_N = torch.tensor(targets)
    rows_N, offsets = softmax_kernels.find_rows(target_ids_N, lows)
    expected = cluster_rows(target_ids_N, [0, 5, 9, 16, 23])
    assert [rows_N[offsets[c] : offsets[c + 1]].tolist() for c in range(3)] == [rows.tolist() for rows in expected]


def test_tables_are_taken_as_one_only_if_they_were_cut_from_one() -> None:
    from txl_train.model.fused import whole_table

    table = torch.arange(24.0).view(6, 4)
    whole = whole_table([table[:2], table[2:3], table[3:]])
    assert whole is not None
    assert torch.equal(whole, table)
    assert torch.equal(whole_table([table[2:3], table[3:]]), table[2:])  # type: ignore[arg-type]
    assert whole_table([table[:2], table[3:]]) is None
    assert whole_table([table[:2], table[2:].clone()]) is None
    assert whole_table([table[:2], table[2:, :2]]) is None


def test_models_that_the_kernels_do_not_compute_are_left_alone() -> None:
    from txl_train.model.fused import can_fuse

    shaw = build_model(small_config(attn_type="shaw", position_rows=9)).eval()
    assert not can_fuse(InferenceStep(shaw, 4))
    assert not can_fuse(InferenceStep(build_model(small_config(mem_len=0)).eval(), 4))
    assert not can_fuse(InferenceStep(build_model(small_config()).eval(), 4, "hidden"))
    assert not can_fuse(InferenceStep(build_model(small_config()).eval(), 4, memory_dtype=torch.float16))


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_every_kernel_compiles_for_ampere_and_hopper_and_fits_into_their_shared_memory(capability: int) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.train.model.compile_kernels", str(capability)]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "wide loads of distances: True" in finished.stdout
