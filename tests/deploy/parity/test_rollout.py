"""Parity passes for a faithful export and fails for every way in which one was ever wrong."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.deploy.conftest import TGT_LEN, Exports
from tests.support import build_model, small_config
from txl_deploy.parity.rollout import (
    compare,
    default_segments,
    random_segments,
    receptive_field_segments,
)
from txl_deploy.parity.schedule import schedule
from txl_deploy.parity.tolerances import TOLERANCES
from txl_deploy.runtimes.base import Runtime, ScoresOutput
from txl_deploy.runtimes.eager import EagerRuntime
from txl_deploy.runtimes.registry import eager_from_checkpoint, open_artifact
from txl_deploy.session import Session
from txl_train.config import HeadKind, MemoryKind, ModelConfig
from txl_train.errors import UsageError
from txl_train.evaluate import StepOutput
from txl_train.model.memory import Memory
from txl_train.model.transformer_xl import TransformerXL

CONFIG = small_config(cutoffs=(5, 9, 16), div_val=2)


class Mutated:
    """A faithful runtime whose memory or nll is changed on the way."""

    def __init__(self, inner: Runtime, on_memory: Callable[[Memory], Memory], on_nll: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.inner, self.on_memory, self.on_nll = inner, on_memory, on_nll
        self.info = inner.info
        self.initial_memory = inner.initial_memory

    def step(self, input_ids_BT: torch.Tensor, target_ids_BT: torch.Tensor, memory: Memory) -> StepOutput:
        output = self.inner.step(input_ids_BT, target_ids_BT, self.on_memory(memory))
        return StepOutput(self.on_nll(output.nll_BT), output.memory)

    def synchronize(self) -> None:
        self.inner.synchronize()


def eager(config: ModelConfig = CONFIG, model: TransformerXL | None = None) -> EagerRuntime:
    return EagerRuntime(build_model(CONFIG) if model is None else model, tgt_len=TGT_LEN, config=config)


def with_swapped_layers() -> TransformerXL:
    model = build_model(CONFIG)
    parameters = model.parameters_by_name()
    swapped = {
        name.replace("layers.0.", "layers.x.").replace("layers.1.", "layers.0.").replace("layers.x.", "layers.1."): value.clone()
        for name, value in parameters.items()
    }
    model.load_parameters(swapped)
    return model


def with_clusters_reversed() -> TransformerXL:
    model = build_model(CONFIG)
    parameters = {name: value.clone() for name, value in model.parameters_by_name().items()}
    for name in ("head.cluster_weight", "head.cluster_bias"):
        parameters[name] = parameters[name].flip(0)
    model.load_parameters(parameters)
    return model


def same(value: Memory) -> Memory:
    return value


MUTATIONS: dict[str, Callable[[], Runtime]] = {
    "zero memory instead of an empty one": lambda: Mutated(
        eager(), lambda m: Memory(m.states, torch.full_like(m.length_B, 7)), torch.clone
    ),
    "memory shifted by one": lambda: Mutated(eager(), lambda m: Memory([s.roll(1, dims=2) for s in m.states], m.length_B), torch.clone),
    "stale memory": lambda: Mutated(eager(), lambda m: Memory([torch.zeros_like(s) for s in m.states], m.length_B), torch.clone),
    "memory of another stream": lambda: Mutated(eager(), lambda m: Memory([s.roll(1, dims=0) for s in m.states], m.length_B), torch.clone),
    "layers swapped": lambda: eager(model=with_swapped_layers()),
    "cluster order reversed": lambda: eager(model=with_clusters_reversed()),
    "one token off by a thousandth": lambda: Mutated(
        eager(), same, lambda nll: nll + torch.nn.functional.pad(torch.tensor([[1e-3]]), (2, 2, 1, 1))
    ),
    "a constant drift below the bound of a token": lambda: Mutated(eager(), same, lambda nll: nll + 3e-5),
    "not a number": lambda: Mutated(eager(), same, lambda nll: nll * math.nan),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_known_mistake_fails(name: str) -> None:
    result = compare(eager(), MUTATIONS[name](), random_segments(CONFIG, tgt_len=TGT_LEN))
    assert not result.passed
    assert result.reason


def test_the_same_weights_pass() -> None:
    result = compare(eager(), eager(), random_segments(CONFIG, tgt_len=TGT_LEN))
    assert result.passed
    assert result.max_abs_delta_nll == 0.0
    assert result.perplexity_candidate == result.perplexity_reference


@pytest.mark.parametrize("name", ["onnx", "torchscript"])
def test_an_export_passes_over_twice_the_receptive_field_with_streams_reset_at_different_times(exports: Exports, name: str) -> None:
    reference, _ = eager_from_checkpoint(exports.checkpoint)
    candidate = open_artifact(getattr(exports, name))
    count = default_segments(CONFIG, TGT_LEN)
    result = compare(reference, candidate, random_segments(CONFIG, tgt_len=TGT_LEN, n_segments=count))
    assert result.passed, result.reason
    assert result.n_segments == count >= 2 * result.receptive_field_segments
    assert sorted(b for part in result.segments for b in part.reset_streams) == [1, 1, 2], "one starts late, and both start anew"
    assert [part.live_streams for part in result.segments][:: count - 1] == [[0, 2], [0, 1]], "one starts late, one ends early"
    assert result.perplexity_candidate == pytest.approx(result.perplexity_reference, rel=1e-5)


def test_hidden_memory_and_kv_memory_are_compared_by_what_they_predict() -> None:
    model = build_model(CONFIG)
    hidden = EagerRuntime(model, tgt_len=TGT_LEN, memory="hidden")
    assert compare(hidden, eager(model=model), random_segments(CONFIG, tgt_len=TGT_LEN)).passed


def test_other_lengths_are_not_compared() -> None:
    other = EagerRuntime(build_model(small_config(cutoffs=(5, 9, 16), div_val=2, clamp_len=3)), tgt_len=TGT_LEN)
    with pytest.raises(UsageError, match="clamp_len None and 3"):
        compare(eager(), other, random_segments(CONFIG, tgt_len=TGT_LEN))


def test_other_heads_are_not_compared() -> None:
    with pytest.raises(UsageError, match="head nll and logits"):
        compare(eager(), EagerRuntime(build_model(CONFIG), tgt_len=TGT_LEN, head="logits"), random_segments(CONFIG, tgt_len=TGT_LEN))


class OneWordOff:
    """A faithful runtime that scores the next token, but for one word."""

    def __init__(self, inner: Runtime, word: int, by: float) -> None:
        self.inner, self.word, self.by = inner, word, by
        self.info = inner.info
        self.initial_memory = inner.initial_memory

    def next_token(self, input_ids_BQ: torch.Tensor, memory: Memory) -> ScoresOutput:
        scores_BV, new_memory = self.inner.next_token(input_ids_BQ, memory)
        scores_BV = scores_BV.clone()
        scores_BV[1, self.word] += self.by
        return ScoresOutput(scores_BV, new_memory)


@pytest.mark.parametrize("head", ["logits", "log_probs"])
@pytest.mark.parametrize("config", [CONFIG, small_config()], ids=["adaptive", "plain"])
def test_every_word_s_score_as_the_next_one_is_compared(head: HeadKind, config: ModelConfig) -> None:
    def runtime() -> EagerRuntime:
        return EagerRuntime(build_model(config), tgt_len=TGT_LEN, head=head)

    segments = random_segments(config, tgt_len=TGT_LEN, n_segments=7)
    same = compare(runtime(), runtime(), segments)
    assert same.passed
    assert same.unit == "word"
    n_tokens = 7 * 3 - 1 - 2  # one stream starts a segment late; one ends in the middle of the last but one
    assert (same.n_tokens, same.n_compared) == (n_tokens, n_tokens * config.vocab_size)
    wrong = compare(runtime(), OneWordOff(runtime(), word=17, by=1e-2), segments)  # type: ignore[arg-type]
    assert not wrong.passed
    assert wrong.worst_token == {"segment": wrong.worst_token["segment"], "stream": 1, "word": 17}
    assert "a word's nll as the next token differs" in wrong.reason


def test_the_perplexity_of_next_tokens_is_that_of_the_tokens_that_come() -> None:
    segments = random_segments(CONFIG, tgt_len=TGT_LEN)
    runtime = eager()
    last: list[torch.Tensor] = []
    session = Session(runtime, 3)
    for turn in schedule(segments):
        session.reset(turn.resets)
        nll_BT = session.step(torch.from_numpy(turn.segment.input_ids_BT), torch.from_numpy(turn.segment.target_ids_BT))
        last.append(nll_BT[torch.from_numpy(turn.segment.counted_BT[:, -1]), -1])
    other = EagerRuntime(build_model(CONFIG), tgt_len=TGT_LEN, head="log_probs")
    result = compare(other, other, segments)
    assert result.perplexity_reference == pytest.approx(math.exp(float(torch.cat(last).double().mean())), rel=1e-5)


def test_a_shift_of_all_logits_changes_nothing_and_one_of_all_log_probs_does() -> None:
    for head, passes in (("logits", True), ("log_probs", False)):
        inner = EagerRuntime(build_model(CONFIG), tgt_len=TGT_LEN, head=head)  # type: ignore[arg-type]
        shifted = OneWordOff(inner, word=slice(None), by=0.5)  # type: ignore[arg-type]
        assert compare(inner, shifted, random_segments(CONFIG, tgt_len=TGT_LEN)).passed is passes  # type: ignore[arg-type]


@pytest.mark.parametrize(("dtype", "memory_dtype"), [("fp16", "fp16"), ("fp16", "fp32"), ("fp32", "fp16")])
@pytest.mark.parametrize("memory", ["kv", "hidden"])
def test_memories_of_two_types_are_compared_by_their_values(dtype: str, memory_dtype: str, memory: MemoryKind) -> None:
    reference = EagerRuntime(build_model(CONFIG), tgt_len=TGT_LEN, memory=memory)
    candidate = EagerRuntime(build_model(CONFIG), tgt_len=TGT_LEN, memory=memory, dtype=dtype, memory_dtype=memory_dtype)
    result = compare(reference, candidate, random_segments(CONFIG, tgt_len=TGT_LEN))
    assert 1e-5 < result.max_memory_error < 1e-2
    assert result.candidate.startswith(f"pytorch (eager, {dtype}, {memory} memory in {memory_dtype})")
    assert result.passed, result.reason


def test_a_drift_too_small_for_any_token_fails_by_the_root_mean_square() -> None:
    noise = torch.Generator().manual_seed(0)
    shaken = Mutated(eager(), same, lambda nll: nll + 3e-5 * torch.randn(nll.shape, generator=noise).sign())
    result = compare(eager(), shaken, random_segments(CONFIG, tgt_len=TGT_LEN))
    assert not result.passed
    assert "root mean square" in result.reason


def test_both_sides_say_what_they_compute_in(fp16_onnx: Path) -> None:
    result = compare(eager(), open_artifact(fp16_onnx), random_segments(CONFIG, tgt_len=TGT_LEN))
    assert result.passed, result.reason
    assert result.reference.startswith("pytorch (eager, fp32, kv memory in fp32)")
    assert result.candidate.startswith("onnx (CPUExecutionProvider, fp16 computed in fp32, kv memory in fp16)")


def test_the_receptive_field_grows_with_layers_and_memory() -> None:
    assert receptive_field_segments(CONFIG, TGT_LEN) == math.ceil(2 * 7 / 5)
    assert receptive_field_segments(small_config(mem_len=0), TGT_LEN) == 0
    assert default_segments(small_config(mem_len=0), TGT_LEN) == 16, "enough for a trend"
    assert default_segments(small_config(mem_len=200), TGT_LEN) == 2 * 80


def test_random_segments_are_consecutive_and_meet_every_cluster() -> None:
    segments = random_segments(CONFIG, tgt_len=TGT_LEN)
    for before, after in zip(segments, segments[1:]):
        np.testing.assert_array_equal(before.target_ids_BT[:, -1], after.input_ids_BT[:, 0])
    seen = np.concatenate([segment.target_ids_BT.ravel() for segment in segments])
    for low, high in zip(CONFIG.cluster_ends, CONFIG.cluster_ends[1:]):
        assert ((seen >= low) & (seen < high)).any()


class Shifted:
    """A runtime whose every nll is off by the same amount, said to be of fp16."""

    def __init__(self, inner: EagerRuntime, by: float) -> None:
        self.inner, self.by = inner, by
        self.info = dataclasses.replace(inner.info, dtype="fp16")
        self.initial_memory = inner.initial_memory
        self.next_token = inner.next_token
        self.synchronize = inner.synchronize

    def step(self, input_ids_BQ: torch.Tensor, target_ids_BT: torch.Tensor, memory: Memory) -> StepOutput:
        nll_BT, new_memory = self.inner.step(input_ids_BQ, target_ids_BT, memory)
        return StepOutput(nll_BT + self.by, new_memory)


def test_a_shift_of_all_tokens_is_no_noise_however_few_they_are() -> None:
    reference = EagerRuntime(build_model(CONFIG), tgt_len=TGT_LEN)
    segments = random_segments(CONFIG, tgt_len=TGT_LEN)
    mean = compare(reference, Shifted(reference, 0.0), segments).tolerance.mean_nll
    assert compare(reference, Shifted(reference, 0.9 * mean), segments).passed
    shifted = compare(reference, Shifted(reference, 1.1 * mean), segments)
    assert not shifted.passed
    assert shifted.reason.startswith("the mean")


def test_the_mean_fails_where_a_larger_difference_than_the_bound_is_not_ruled_out() -> None:
    segments = random_segments(CONFIG, tgt_len=TGT_LEN, n_segments=24)
    wide = dataclasses.replace(TOLERANCES["fp16"], token=1.0, rms=2e-2, mean=1e-4)
    shifts = np.random.default_rng(1).permutation(np.repeat([-0.1, 0.1], 12))
    count = iter(range(24))
    uneven = Mutated(eager(), same, lambda nll: nll + float(shifts[next(count)]))
    result = compare(eager(), uneven, segments, tolerance=wide)
    assert result.upper_bound_mean_nll > 2 * abs(result.mean_delta_nll)
    assert abs(result.mean_delta_nll) < result.tolerance.mean_nll < result.upper_bound_mean_nll
    assert not result.passed
    assert result.reason.startswith("the mean nll, which differs by")


def test_sums_of_the_segments_are_those_of_the_rollout() -> None:
    result = compare(eager(), Mutated(eager(), same, lambda nll: nll + 1e-6), random_segments(CONFIG, tgt_len=TGT_LEN))
    ours, theirs = (sum(getattr(part, f"{side}_nll_sum") for part in result.segments) for side in ("reference", "candidate"))
    assert result.n_compared == sum(part.n_compared for part in result.segments) == result.n_tokens
    assert math.exp(ours / result.n_tokens) == pytest.approx(result.perplexity_reference)
    assert theirs - ours == pytest.approx(result.mean_delta_nll * result.n_compared, rel=1e-6)


def test_a_fault_in_one_layer_s_memory_is_told_by_layer() -> None:
    class Tilted:
        """Yields a memory whose second layer is off by a thousandth, but computes with the faithful one."""

        def __init__(self, inner: EagerRuntime) -> None:
            self.inner, self.info, self.initial_memory = inner, inner.info, inner.initial_memory

        def step(self, input_ids_BQ: torch.Tensor, target_ids_BT: torch.Tensor, memory: Memory) -> StepOutput:
            faithful = Memory([state / (1.001 if i >= 2 else 1.0) for i, state in enumerate(memory.states)], memory.length_B)
            nll_BT, new = self.inner.step(input_ids_BQ, target_ids_BT, faithful)
            return StepOutput(nll_BT, Memory([state * (1.001 if i >= 2 else 1.0) for i, state in enumerate(new.states)], new.length_B))

    result = compare(eager(), Tilted(eager()), random_segments(CONFIG, tgt_len=TGT_LEN))  # type: ignore[arg-type]
    first, second = result.memory_error_by_layer
    assert first < 1e-5
    assert second == pytest.approx(1e-3, rel=0.01) == result.max_memory_error
    assert not result.passed
    assert result.reason.startswith("the memories differ by")


class Fouled:
    """A faithful runtime that leaves rubbish in the memory where nothing is filled, which is never read."""

    def __init__(self, inner: EagerRuntime) -> None:
        self.inner, self.info = inner, inner.info

    def initial_memory(self, batch_size: int) -> Memory:
        memory = self.inner.initial_memory(batch_size)
        return Memory([state + 5.0 for state in memory.states], memory.length_B)

    def step(self, input_ids_BQ: torch.Tensor, target_ids_BT: torch.Tensor, memory: Memory) -> StepOutput:
        return self.inner.step(input_ids_BQ, target_ids_BT, memory)


def test_what_lies_beyond_the_valid_length_is_no_difference() -> None:
    assert compare(eager(), Fouled(eager()), random_segments(CONFIG, tgt_len=TGT_LEN)).passed  # type: ignore[arg-type]


class Growing:
    """A runtime whose nll strays a little more with every segment, by less than any bound on tokens."""

    def __init__(self, inner: EagerRuntime, by: float) -> None:
        self.inner, self.info, self.initial_memory = inner, inner.info, inner.initial_memory
        self.by, self.count, self.noise = by, 0, torch.Generator().manual_seed(0)

    def step(self, input_ids_BQ: torch.Tensor, target_ids_BT: torch.Tensor, memory: Memory) -> StepOutput:
        nll_BT, new_memory = self.inner.step(input_ids_BQ, target_ids_BT, memory)
        self.count += 1
        return StepOutput(nll_BT + self.by * self.count * torch.randn(nll_BT.shape, generator=self.noise), new_memory)


def test_a_difference_that_grows_within_every_bound_fails_by_its_trend() -> None:
    segments = random_segments(CONFIG, tgt_len=TGT_LEN, n_segments=40)
    growing = compare(eager(), Growing(eager(), 1.2e-7), segments)  # type: ignore[arg-type]
    assert growing.rms_delta_nll < growing.tolerance.rms_nll
    assert not growing.passed
    assert growing.trend.judged
    assert "grows by" in growing.reason
    slight = compare(eager(), Growing(eager(), 1e-8), segments)  # type: ignore[arg-type]
    assert slight.trend.interval is not None
    assert slight.trend.interval[0] > 0, "it is certain"
    assert slight.passed, "and does not matter"


def test_a_rollout_too_short_for_a_trend_says_so() -> None:
    result = compare(eager(), eager(), random_segments(CONFIG, tgt_len=TGT_LEN))
    assert not result.trend.judged
    assert result.trend.slope_per_segment is None
    assert "trend not judged: 3 segments with a full memory" in result.reason
