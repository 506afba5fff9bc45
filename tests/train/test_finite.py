"""Numbers that are not finite are told by place: module, parameter, state, segment and stream. Sums of any length keep their precision."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.support import build_model, random_ids, small_config
from tests.train.test_trainer import make_trainer, weights_of
from txl_train.callbacks import LogProgress
from txl_train.data.segments import Segment, SegmentIterator
from txl_train.errors import ValidationError
from txl_train.evaluate import ModelStepper, StepOutput, evaluate
from txl_train.finite import check_scores, spoiled_memory, watched
from txl_train.model.memory import Memory
from txl_train.records import RunRecord
from txl_train.trainer import Trainer

# Evaluation


def scored(stepper: ModelStepper, n: int = 60) -> None:
    ids = random_ids(small_config(), 1, n)[0]
    evaluate(stepper, SegmentIterator(ids, batch_size=2, tgt_len=4), batch_size=2)


def test_evaluation_names_segment_stream_and_the_module_where_it_began() -> None:
    model = build_model(small_config())
    model.decoder_layers()[1].feed_forward.outer.weight.data[0, 0] = math.nan
    with pytest.raises(ValidationError) as error:
        scored(ModelStepper(model, tgt_len=4))
    assert "The loss of stream 0 in segment 0 is not finite" in error.value.message
    assert "the output of decoder.layers.1.feed_forward.outer, as is its weight" in error.value.message


def test_a_sound_model_has_no_module_that_is_not_finite() -> None:
    stepper = ModelStepper(build_model(small_config(cutoffs=(5, 9), mem_len=3)), tgt_len=4)
    with watched(stepper.step_module) as found:
        scored(stepper)
    assert found == []


class Overflowing:
    """A stepper whose losses are finite, but not a key that one stream keeps in fp16 from some step on."""

    def __init__(self, at: int) -> None:
        self._at, self._steps = at, 0

    def initial_memory(self, batch_size: int) -> Memory:
        return Memory([torch.zeros(batch_size, 1, 6, 2, dtype=torch.float16)] * 4, torch.zeros(batch_size, dtype=torch.int64))

    def step(self, input_ids_BQ: Tensor, target_ids_BT: Tensor, memory: Memory) -> StepOutput:
        states = [state.clone() for state in memory.states]
        if self._steps == self._at:
            states[2][1, 0, -2, 1] = -math.inf
        self._steps += 1
        return StepOutput(torch.ones(target_ids_BT.shape), Memory(states, memory.length_B))


def test_a_memory_that_overflows_fp16_is_refused_at_the_step_that_wrote_it() -> None:
    with pytest.raises(ValidationError, match="overflowed in segment 3: keys of layer 1 of stream 1 are too large") as error:
        scored(Overflowing(3))  # type: ignore[arg-type]
    assert "--memory-dtype fp32" in str(error.value)


def test_what_a_step_did_not_write_is_not_looked_at_again() -> None:
    memory = Overflowing(0).step(torch.zeros(2, 4), torch.zeros(2, 4), Overflowing(0).initial_memory(2)).memory
    assert spoiled_memory(memory, 1) is None
    assert spoiled_memory(memory, 2) is not None


def test_scores_may_exclude_words_but_not_all_of_them() -> None:
    memory = Memory([], torch.zeros(2, dtype=torch.int64))
    scores_BV = torch.zeros(2, 5)
    scores_BV[1, :4] = -math.inf
    check_scores(scores_BV, memory, 0, n_newest=1)
    for bad in (-math.inf, math.inf, math.nan):
        scores_BV[1, 4] = bad
        with pytest.raises(ValidationError, match="stream 1 at step 7"):
            check_scores(scores_BV, memory, 7, n_newest=1)


# Training


def test_a_loss_that_is_not_finite_is_told_by_module_before_the_weights_move() -> None:
    trainer = make_trainer()
    trainer.step()
    trainer.model.decoder_layers()[1].feed_forward.inner.bias.data[3] = math.nan
    before = weights_of(trainer)
    with pytest.raises(ValidationError, match=r"at step 2 the loss is nan.*the output of layers\.1\.feed_forward\.inner, as is its bias"):
        trainer.step()
    after = weights_of(trainer)
    assert all(torch.equal(after[name], before[name]) or "inner.bias" in name for name in before)
    assert trainer.progress.step == 1


def test_a_gradient_that_is_not_finite_is_told_by_parameter() -> None:
    trainer = make_trainer()
    trainer.model.layers[1].get_parameter("attention.qkv.weight").register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(ValidationError, match=r"First not finite: the gradient of layers\.1\.attention\.qkv\.weight\."):
        trainer.step()


def test_a_memory_that_is_not_finite_is_told_by_layer() -> None:
    trainer = make_trainer()
    trainer.step()
    trainer.memories[0].states[1][0, -1] = math.inf
    with pytest.raises(ValidationError, match="First not finite: the memory of layer 1"):
        trainer.step()


def test_looking_for_the_place_takes_no_random_numbers() -> None:
    trainer = make_trainer()
    trainer.model.head.biases[0].data[0] = math.nan
    segment = trainer.segments.segment(0)
    batch = tuple(torch.from_numpy(part) for part in (segment.input_ids_BT, segment.target_ids_BT, segment.counted_BT))
    state = torch.get_rng_state()
    assert trainer.engine.first_not_finite(batch, trainer.memories, trainer.precision)  # type: ignore[arg-type]
    assert torch.equal(torch.get_rng_state(), state)


def test_steps_that_fp16_skips_are_counted_and_kept() -> None:
    log = LogProgress(RunRecord(None, append=False), 1, char=False)
    trainer = make_trainer([log], dtype="fp16", max_step=4)
    factors = iter([1.0, math.inf, math.inf, 1.0])
    trainer.model.layers[0].get_parameter("attention.qkv.weight").register_hook(lambda gradient: gradient * next(factors))
    trainer.run()
    assert (trainer.progress.step, trainer.progress.skipped_steps) == (4, 2)
    assert log.latest["skipped_steps"] == 2
    assert trainer.checkpoint(training=True).progress["skipped_steps"] == 2


# Sums and sizes


class Given:
    """A stepper that yields the given losses in turn."""

    def __init__(self, losses: list[Tensor]) -> None:
        self._losses = itertools.cycle(losses)

    def initial_memory(self, batch_size: int) -> Memory:
        return Memory([], torch.zeros(batch_size, dtype=torch.int64))

    def step(self, input_ids_BQ: Tensor, target_ids_BT: Tensor, memory: Memory) -> StepOutput:
        return StepOutput(next(self._losses), memory)


def sum_of(losses: list[Tensor], n_segments: int) -> float:
    ids_BT = np.zeros(losses[0].shape, dtype=np.int64)
    counted_BT = np.ones(losses[0].shape, dtype=np.bool_)
    segments = (Segment(input_ids_BT=ids_BT, target_ids_BT=ids_BT, counted_BT=counted_BT, index=index) for index in range(n_segments))
    return evaluate(Given(losses), segments, batch_size=len(ids_BT)).nll_nats_sum


def test_small_losses_after_a_large_one_are_not_lost() -> None:
    """A running sum of float64 would stay at 2^53."""
    large, small = torch.full((1, 1), 2.0**53), torch.ones(1, 1)
    assert sum_of([large, *[small] * 999], 1000) == 2.0**53 + 1000  # the last 1 is lost in the representation of 2^53 + 999 itself


@pytest.mark.slow
def test_a_billion_losses_add_up_to_a_few_roundings() -> None:
    generator = torch.Generator().manual_seed(0)
    n_segments, shape = 250, (1000, 4000)
    units = torch.randint(0, 1 << 24, shape, generator=generator)  # of 2^-20 nats, exact in float32
    losses = (units * 2.0**-20).float()
    exact = Fraction(int(units.sum()) * n_segments, 1 << 20)
    assert units.numel() * n_segments == 10**9
    assert abs(Fraction(sum_of([losses], n_segments)) - exact) / exact < Fraction(1, 10**14)  # log2(4e6) roundings at the very most


def test_segments_of_a_trillion_tokens_take_no_memory_of_their_own() -> None:
    """As a list, the bounds of these would be 8 TB."""

    class Endless:
        def __len__(self) -> int:
            return 10**12 + 1

        def __getitem__(self, positions: np.ndarray) -> np.ndarray:
            return np.asarray(positions % 7)

    segments = SegmentIterator(Endless(), batch_size=1, tgt_len=1)
    assert len(segments) == 10**12
    assert segments.segment(10**12 - 1).target_ids_BT.tolist() == [[10**12 % 7]]
    assert segments.n_counted_in(10**12 - 1) == 1


# Loads


def test_thousands_of_streams_train_and_score() -> None:
    trainer: Trainer = make_trainer(n_ids=30_000, batch_size=4096, tgt_len=3)
    assert math.isfinite(float(trainer.step().loss))
    result = evaluate(
        ModelStepper(trainer.model.eval(), tgt_len=3),
        SegmentIterator(np.arange(30_000) % 40, batch_size=4096, tgt_len=3),
        batch_size=4096,
    )
    assert result.n_tokens == 29_999


def test_a_memory_of_more_than_10000_positions_is_the_same_in_both_kinds() -> None:
    config = small_config(mem_len=10_240, n_layer=1, n_head=1)
    model, ids = build_model(config), random_ids(config, 1, 10_241 + 1024)[0]
    sums = [
        evaluate(
            ModelStepper(model, tgt_len=1024, memory=kind), SegmentIterator(ids, batch_size=1, tgt_len=1024), batch_size=1
        ).nll_nats_sum
        for kind in ("kv", "hidden")
    ]
    assert sums[0] == pytest.approx(sums[1], rel=1e-6)


@pytest.mark.parametrize("mem_len", [0, 5])
def test_one_token_a_step_is_the_same_as_many(mem_len: int) -> None:
    config = small_config(mem_len=mem_len)
    model = build_model(config)
    ids = random_ids(config, 1, 41)[0]

    def score(tgt_len: int) -> tuple[float, ...]:
        stepper = ModelStepper(model, tgt_len=tgt_len)
        return evaluate(stepper, SegmentIterator(ids, batch_size=1, tgt_len=tgt_len), batch_size=1).segment_nll_nats

    single = score(1)
    assert len(single) == 40
    if mem_len == 0:  # each token alone: the same as streams of one target
        alone = evaluate(ModelStepper(model, tgt_len=1), SegmentIterator(ids, batch_size=40, tgt_len=1), batch_size=40)
        assert math.fsum(single) == pytest.approx(alone.nll_nats_sum, rel=1e-6)
    else:  # the first segment sees nothing that a memory would have dropped
        assert math.fsum(single[:5]) == pytest.approx(score(5)[0], rel=1e-6)
