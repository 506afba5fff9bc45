"""The measurement itself, with runtimes whose times and results are known and a clock that only they move."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch

from tests.fakes import FakeClock, FakeRuntime
from tests.processes import in_processes
from txl_deploy.bench import boundaries
from txl_deploy.bench.harness import BenchSettings, Contender, ExpectedNll, block_sizes, measure, samples_for
from txl_deploy.bench.result import Proof, Row
from txl_deploy.bench.workload import Workload
from txl_deploy.runtimes.base import RuntimeInfo
from txl_train.distributed import World, join, world_of
from txl_train.errors import UsageError

QUICK = BenchSettings(duration_s=0, min_duration_s=0, min_samples=30, max_samples=30, max_warmup_steps=10)
SOUND = dataclasses.replace(QUICK, percentiles=(50,), min_samples=60, max_samples=60)
"""Enough samples for the one percentile asked for."""


def text_of(n_tokens: int = 2001, *, batch_size: int = 2, tgt_len: int = 4) -> Workload:
    return Workload(ids_N=np.arange(n_tokens) * 7 % 97, batch_size=batch_size, tgt_len=tgt_len)


def rivals(clock: FakeClock, *names: str, **common) -> list[FakeRuntime]:
    journal: list[str] = []
    return [FakeRuntime(name, clock=clock, journal=journal, **common) for name in names]


def run(runtimes, settings=QUICK, text=None, reference=None):
    contenders = [Contender(runtime, is_reference=runtime is reference) for runtime in runtimes]
    return measure(contenders, text or text_of(), settings, clock=runtimes[0].clock)


def test_a_sample_is_the_time_from_the_step_to_the_end_of_synchronize():
    clock = FakeClock()
    (row,) = run([FakeRuntime(clock=clock, latency_ms=2.5)])
    assert row.samples_ms == (2.5,) * 30
    assert row.latency.percentile_ms(50) == row.latency.percentile_ms(99) == row.latency.mean_ms == 2.5


def test_work_begun_before_a_step_is_not_measured():
    clock = FakeClock()

    class SlowToReset(FakeRuntime):
        def initial_memory(self, batch_size):
            clock.advance_ms(500)
            self._owed_ms += 500  # still under way when the step comes
            return super().initial_memory(batch_size)

    (row,) = run([SlowToReset(clock=clock, latency_ms=1.0)], dataclasses.replace(QUICK, settle_steps=0), text_of(41))
    assert row.latency.max_ms == 1.0


def test_warm_up_and_settling_steps_are_not_among_the_samples():
    clock = FakeClock()
    (row,) = run([FakeRuntime(clock=clock, latency_ms=lambda step: 99.0 if step < 10 else 1.0)])
    assert row.latency.max_ms == 1.0
    settings = dataclasses.replace(QUICK, settle_steps=2)
    slow_after_a_change = FakeRuntime(clock=clock, latency_ms=lambda step: 99.0 if step < 10 or (step - 10) % 5 < 2 else 1.0)
    (row,) = run([slow_after_a_change], settings)  # 30 samples: ten blocks of 3, each after 2 settling steps
    assert row.latency.max_ms == 1.0


def test_the_warm_up_lasts_until_the_memory_is_full():
    clock = FakeClock()
    runtime = FakeRuntime(clock=clock, mem_len=200, latency_ms=lambda step: 99.0 if step < 50 else 1.0)
    (row,) = run([runtime])
    assert row.latency.max_ms == 1.0
    assert runtime.lengths[49] == [196, 196]
    assert runtime.lengths[50] == [200, 200]


def test_runtimes_that_fill_their_memories_in_other_ways_go_on_with_the_same_tokens():
    clock = FakeClock()

    class AnyLength(FakeRuntime):
        def of_length(self, tgt_len: int) -> FakeRuntime:
            self.filler = FakeRuntime(clock=clock, tgt_len=tgt_len, mem_len=200)
            self._handed_out = self.filler._handed_out
            return self.filler

    quick, slow = (kind(kind.__name__, clock=clock, tgt_len=1, mem_len=200) for kind in (AnyLength, FakeRuntime))
    rows = run([quick, slow], text=text_of(tgt_len=1))
    assert len(quick.filler.inputs) == 3, "of 64 tokens; the 8 that are left are steps"
    assert len(slow.inputs) - len(quick.inputs) == 192
    assert quick.inputs == slow.inputs[192:]
    assert quick.lengths[8:] == slow.lengths[200:]
    assert rows[0].perplexity == rows[1].perplexity


def test_the_warm_up_goes_on_until_the_timing_is_steady():
    clock = FakeClock()
    becoming_faster = FakeRuntime(clock=clock, latency_ms=lambda step: max(1.0, 100.0 * 0.9**step))
    constant = FakeRuntime(clock=clock)
    rows = run([constant, becoming_faster], dataclasses.replace(SOUND, max_warmup_steps=1000))
    assert rows[0].stability is not None
    assert rows[1].stability is not None
    assert rows[1].latency.max_ms < 1.1
    assert rows[0].stability.warmup_steps == rows[1].stability.warmup_steps > 40  # both, so that they read the same tokens
    assert [row.stability.warmup_steady for row in rows] == [True, True]
    assert len(constant.inputs) == len(becoming_faster.inputs)


@pytest.mark.parametrize("limit", [{"max_warmup_steps": 25}, {"max_warmup_steps": 1000, "max_warmup_s": 3.0}])
def test_a_warm_up_that_does_not_become_steady_ends_all_the_same_and_the_row_is_invalid(limit):
    ever_slower = FakeRuntime(latency_ms=lambda step: 100.0 * 1.1 ** min(step, 30))
    (row,) = run([ever_slower], dataclasses.replace(SOUND, **limit))
    assert row.stability is not None
    assert row.stability.warmup_steps <= 25
    assert not row.stability.warmup_steady
    assert [reason for reason in row.invalid_reasons if "warm-up" in reason]


def test_a_row_of_steady_samples_enough_is_valid():
    clock = FakeClock()
    reference, other = (FakeRuntime(name, clock=clock, latency_ms=lambda step: 1.0 + step * 7 % 10 / 100) for name in ("pytorch", "onnx"))
    rows = run([reference, other], SOUND, reference=reference)
    assert [(row.valid, row.invalid_reasons) for row in rows] == [(True, ())] * 2
    assert [row.proof and row.proof.kind for row in rows] == ["reference", "in run"]


def test_a_row_of_too_few_samples_for_a_percentile_asked_for_is_invalid():
    (row,) = run([FakeRuntime()], dataclasses.replace(SOUND, percentiles=(99,)))
    assert row.valid is False
    assert [reason for reason in row.invalid_reasons if "p99" in reason]


def test_a_row_measured_for_too_short_a_time_is_invalid_whatever_was_asked_for():
    settings = dataclasses.replace(SOUND, duration_s=10, min_duration_s=0.5)  # 60 samples of 1 ms at most
    (row,) = run([FakeRuntime()], settings)
    assert [reason for reason in row.invalid_reasons if "0.5 s" in reason]
    assert not run([FakeRuntime()], dataclasses.replace(settings, duration_s=0.05))[0].valid
    assert run([FakeRuntime()], dataclasses.replace(settings, min_duration_s=0.01))[0].valid


def test_turns_are_recorded_so_that_rows_can_be_paired():
    clock = FakeClock()
    rows = run(rivals(clock, "a", "b"))
    assert rows[0].block_sizes == rows[1].block_sizes == (3,) * 10


def test_runtimes_take_turns_in_blocks_and_the_first_changes():
    clock = FakeClock()
    runtimes = rivals(clock, "a", "b", "c")
    run(runtimes, dataclasses.replace(QUICK, settle_steps=1))
    turns = runtimes[0].journal[3 * 10 :]
    blocks = ["".join(turns[i : i + 4]) for i in range(0, len(turns), 4)]
    assert blocks[:9] == ["aaaa", "bbbb", "cccc", "bbbb", "cccc", "aaaa", "cccc", "aaaa", "bbbb"]
    assert len(blocks) == 30


def test_all_runtimes_read_the_same_tokens_and_no_memory_but_their_own():
    clock = FakeClock()
    runtimes = rivals(clock, "a", "b", "c")  # a FakeRuntime refuses any memory but the one it returned last
    rows = run(runtimes)
    assert runtimes[0].inputs == runtimes[1].inputs == runtimes[2].inputs
    assert len(runtimes[0].inputs) == 10 + 10 * 2 + 30
    assert {row.perplexity for row in rows} == {rows[0].perplexity}
    assert {row.latency.n for row in rows} == {30}


def test_the_text_goes_on_without_a_gap_from_warm_up_to_the_last_sample():
    runtime = FakeRuntime()
    run([runtime], text=text_of(batch_size=1))
    read = np.array(runtime.inputs).reshape(-1)
    assert np.array_equal(read, np.arange(len(read)) * 7 % 97)


def test_the_memory_is_carried_on_and_starts_cold_where_the_text_begins_anew():
    runtime = FakeRuntime(mem_len=8)
    run([runtime], text=text_of(41))  # 40 targets: five steps of two streams
    assert [length_B[0] for length_B in runtime.lengths[:11]] == [0, 4, 8, 8, 8, 0, 4, 8, 8, 8, 0]


def test_perplexity_is_that_of_the_timed_tokens_alone():
    runtime = FakeRuntime(mem_len=8, base_nll=2.0)
    (row,) = run([runtime], dataclasses.replace(QUICK, settle_steps=0))
    text, nll, n_tokens = text_of(), 0.0, 0
    for step in range(10, 40):
        segment = text.segment(step)
        nll += (2.0 + (segment.input_ids_BT + 2 * segment.target_ids_BT) % 7 / 10 - 0.01 * 8).sum()
        n_tokens += 8
    assert row.n_tokens == n_tokens == 240
    assert row.nll_nats_per_token == pytest.approx(nll / n_tokens, rel=1e-6)  # the fake computes in float32
    assert row.perplexity == pytest.approx(math.exp(nll / n_tokens), rel=1e-6)


def test_throughput_counts_target_tokens_over_all_timed_steps():
    (row,) = run([FakeRuntime(latency_ms=lambda step: 1.0 + step % 2)])
    assert row.tokens_per_s == pytest.approx(8 / 1.5e-3)


def test_padding_counts_neither_as_tokens_nor_as_throughput():
    (row,) = run([FakeRuntime(latency_ms=1.0)], text=text_of(6))  # 5 targets in steps of 8 positions
    assert row.n_tokens == 5 * 30
    segment = text_of(6).segment(0)
    nll_BT = 3.0 + (segment.input_ids_BT + 2 * segment.target_ids_BT) % 7 / 10
    assert row.nll_nats_per_token == pytest.approx(nll_BT[segment.counted_BT].mean(), rel=1e-6)
    assert row.tokens_per_s == pytest.approx(5000)
    assert any("padding" in reason for reason in row.invalid_reasons)


def test_a_row_is_invalid_where_the_text_is_too_short_to_fill_the_memory():
    (row,) = run([FakeRuntime(mem_len=40)], SOUND, text=text_of(41))
    assert row.valid is False
    assert [reason for reason in row.invalid_reasons if "before a memory of 10 segments is full" in reason]


def test_equal_perplexities_are_verified_against_the_reference():
    clock = FakeClock()
    reference, other = rivals(clock, "pytorch", "onnx")
    rows = run([reference, other], reference=reference)
    assert [row.verified for row in rows] == [True, True]
    assert [row.is_reference for row in rows] == [True, False]
    assert rows[1].perplexity_rel_diff == 0.0


@pytest.mark.parametrize(("offset", "passes"), [(2e-6, True), (1e-3, False), (-1e-3, False)])
def test_a_runtime_whose_nll_is_off_fails_verification(offset, passes):
    clock = FakeClock()
    reference, other = FakeRuntime("pytorch", clock=clock), FakeRuntime("onnx", clock=clock, nll_offset=offset)
    rows = run([reference, other], reference=reference)
    assert rows[0].verified is True
    assert rows[1].verified is passes
    assert rows[1].perplexity_rel_diff == pytest.approx(math.expm1(offset), abs=3e-7)  # the fake computes in float32


def test_without_a_reference_nothing_is_verified():
    assert [row.verified for row in run([FakeRuntime()])] == [None]


def test_a_row_that_failed_against_the_reference_is_invalid_and_proves_nothing():
    clock = FakeClock()
    reference, other = FakeRuntime("pytorch", clock=clock), FakeRuntime("onnx", clock=clock, nll_offset=1e-3)
    rows = run([reference, other], SOUND, reference=reference)
    assert rows[0].valid
    assert rows[1].valid is False
    assert "perplexity is 1.0e-03 away" in rows[1].invalid_reasons[0]
    assert rows[1].proof is None


def test_a_proof_that_was_there_before_is_kept():
    clock, proof = FakeClock(), Proof(kind="receipt", receipt_sha256="ab" * 32)
    contenders = [Contender(FakeRuntime("pytorch", clock=clock), is_reference=True), Contender(FakeRuntime(clock=clock), proof=proof)]
    assert measure(contenders, text_of(), QUICK, clock=clock)[1].proof is proof


@pytest.mark.parametrize("different", [{"mem_len": 12}, {"clamp_len": 3}])
def test_a_row_of_other_lengths_than_the_reference_is_not_judged(different):
    clock = FakeClock()
    reference, other = FakeRuntime("pytorch", clock=clock), FakeRuntime("onnx", clock=clock, **different)
    assert [row.verified for row in run([reference, other], reference=reference)] == [True, None]


def test_a_precision_without_a_stated_bound_is_not_judged():
    clock = FakeClock()
    reference, other = FakeRuntime("pytorch", clock=clock), FakeRuntime("onnx", clock=clock, dtype="fp8")
    assert run([reference, other], reference=reference)[1].verified is None


@pytest.mark.parametrize("nll", [float("nan"), float("inf"), 1e4])
def test_a_perplexity_that_is_not_finite_has_failed_even_without_a_reference(nll):
    (row,) = run([FakeRuntime(base_nll=nll)])
    assert row.verified is False
    assert row.perplexity is None


def test_a_runtime_for_another_segment_length_is_refused():
    with pytest.raises(UsageError, match="`tgt_len` 8"):
        run([FakeRuntime(tgt_len=8)])


def test_progress_ends_at_its_total():
    seen: list[tuple[int, int]] = []
    measure([Contender(FakeRuntime())], text_of(), QUICK, clock=FakeClock(), progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (50, 50)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


@pytest.mark.parametrize(
    ("slowest_ms", "expected"),
    [
        (0.0, 1000),  # no measurable time
        (1.0, 1000),  # duration_s would take 2000, more than max_samples
        (10.0, 200),  # duration_s
        (100.0, 100),  # min_samples
        (500.0, 40),  # max_duration_s
        (1e5, 10),  # the least
    ],
)
def test_the_number_of_samples_follows_from_the_slowest_runtime(slowest_ms, expected):
    assert samples_for(slowest_ms, BenchSettings(duration_s=2, min_samples=100, max_samples=1000, max_duration_s=20)) == expected


def test_a_long_duration_is_not_cut_by_the_limit_meant_for_slow_models():
    assert samples_for(100.0, BenchSettings(duration_s=120, min_samples=1, max_duration_s=60)) == 1200


def test_fewer_samples_than_ten_are_taken_where_they_are_asked_for():
    assert samples_for(1e5, BenchSettings(duration_s=0, min_samples=3, max_samples=3)) == 3


def test_the_slowest_runtime_sets_the_number_of_samples_for_all():
    clock = FakeClock()
    rows = run(
        [FakeRuntime("fast", clock=clock, latency_ms=1.0), FakeRuntime("slow", clock=clock, latency_ms=20.0)],
        BenchSettings(duration_s=1, min_samples=5, max_samples=10000),
    )
    assert [row.latency.n for row in rows] == [50, 50]


@pytest.mark.parametrize("n", [1, 9, 10, 99, 500, 501, 662, 20000])
def test_blocks_are_even_and_no_longer_than_fifty(n):
    sizes = block_sizes(n)
    assert sum(sizes) == n
    assert max(sizes) <= 50
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"min_samples": 0},
        {"duration_s": -1},
        {"duration_s": math.inf},
        {"min_duration_s": -1},
        {"warmup_steps": 0},
        {"max_warmup_steps": 0},
        {"max_samples": 10},
        {"energy_s": -1},
        {"boundary": "enqueue"},
    ],
)
def test_settings_that_cannot_be_meant_are_refused(wrong):
    with pytest.raises(UsageError):
        BenchSettings(**wrong)


# --- what a receipt says -----------------------------------------------------------------------------------------------------------


def scored_by(runtime: FakeRuntime, text: Workload, *, bound: float = 1e-6) -> ExpectedNll:
    """Score the text once from a cold start, as an evaluation does."""
    memory, counts, sums = runtime.initial_memory(text.batch_size), [], []
    for step in range(text.steps_per_pass):
        segment = text.segment(step)
        nll_BT, memory = runtime.step(*text.tensors(segment, "cpu"), memory)
        counts.append(int(segment.counted_BT.sum()))
        sums.append(float(nll_BT.double().numpy()[segment.counted_BT].sum()))
    return ExpectedNll(batch_size=text.batch_size, tgt_len=4, n_tokens=tuple(counts), nll_nats=tuple(sums), bound=bound)


def timed_with(expected: ExpectedNll, runtime: FakeRuntime, text: Workload) -> Row:
    return measure([Contender(runtime, expected=expected)], text, SOUND, clock=runtime.clock)[0]


@pytest.mark.parametrize("n_tokens", [2001, 201])  # longer than what is timed, and read several times over
def test_the_timed_steps_are_compared_with_the_segments_of_the_receipt(n_tokens):
    text = text_of(n_tokens)
    row = timed_with(scored_by(FakeRuntime(), text), FakeRuntime(), text)
    assert row.valid
    assert row.notes == ("the nll of 60 timed steps is the receipt's within 0.0e+00 nats per token",)
    assert row.verified is True
    assert row.perplexity_rel_diff is None  # that was by a receipt, not by a reference


def test_a_timed_nll_that_is_not_the_receipts_fails_the_row_and_names_the_segment():
    class WrongOnce(FakeRuntime):
        def step(self, input_ids_BT, target_ids_BT, memory):
            output = super().step(input_ids_BT, target_ids_BT, memory)
            if len(self.inputs) == 40:
                output.nll_BT[0, 0] += 0.8
            return output

    text = text_of()
    row = timed_with(scored_by(FakeRuntime(), text), WrongOnce(), text)
    assert row.verified is False
    assert row.valid is False
    assert (
        row.invalid_reasons[0] == "the nll of timed steps is not the receipt's: segment 39 is off by 1.0e-01 nats per token (bound 1e-06)"
    )


def test_a_failure_by_the_receipt_stands_though_the_mean_is_the_references():
    clock, text = FakeClock(), text_of()
    expected = scored_by(FakeRuntime(nll_offset=1e-3), text)
    contenders = [Contender(FakeRuntime(clock=clock), is_reference=True), Contender(FakeRuntime(clock=clock), expected=expected)]
    rows = measure(contenders, text, SOUND, clock=clock)
    assert [row.verified for row in rows] == [True, False]


def test_a_receipt_of_another_batch_size_is_not_compared_and_that_is_said():
    text = text_of(batch_size=4)
    row = timed_with(scored_by(FakeRuntime(nll_offset=1.0), text_of()), FakeRuntime(), text)
    assert row.valid
    assert "not compared step by step with the receipt, which is of batch size 2" in row.notes[0]


def test_a_receipt_that_ends_early_is_compared_as_far_as_it_goes():
    text = text_of()
    whole = scored_by(FakeRuntime(), text)
    part = dataclasses.replace(whole, n_tokens=whole.n_tokens[:20], nll_nats=whole.nll_nats[:20])
    assert "the nll of 6 timed steps" in timed_with(part, FakeRuntime(), text).notes[0]  # of 10 to 19 four settle
    none = dataclasses.replace(whole, n_tokens=whole.n_tokens[:5], nll_nats=whole.nll_nats[:5])
    assert "ends before" in timed_with(none, FakeRuntime(), text).notes[0]


def test_a_receipt_that_counts_other_tokens_fails_the_row():
    text = text_of()
    expected = scored_by(FakeRuntime(), text)
    counts = tuple(count - 1 for count in expected.n_tokens)
    assert "count other tokens" in timed_with(dataclasses.replace(expected, n_tokens=counts), FakeRuntime(), text).invalid_reasons[0]


def test_a_timed_nll_that_is_no_number_is_not_the_receipts():
    text = text_of()
    row = timed_with(scored_by(FakeRuntime(), text), FakeRuntime(base_nll=math.nan), text)
    assert "the loss of stream 0 in segment" in row.invalid_reasons[0]
    assert "the perplexity is not a finite number" in row.invalid_reasons


# --- the machine -------------------------------------------------------------------------------------------------------------------


def state(clock_s: float, busy_s: float, process_s: float, **more: Any) -> dict[str, Any]:
    return {"clock_s": clock_s, "cpu_all_s": 2 * clock_s, "cpu_busy_s": busy_s, "process_cpu_s": process_s, "gpus": [], **more}


@pytest.mark.parametrize(("busy_s", "valid"), [(12.0, True), (16.0, False)])
def test_a_row_measured_beside_busy_processes_is_invalid(busy_s, valid):
    states = iter([state(0, 0, 0), state(10, busy_s, 11)])
    rows = measure([Contender(FakeRuntime())], text_of(), SOUND, clock=FakeClock(), environment=lambda: next(states))
    assert rows[0].valid is valid
    assert rows[0].invalid_reasons == (() if valid else ("other processes used 25% of the processors' time",))


def test_the_time_until_the_call_returned_is_told_where_the_device_works_on(monkeypatch):
    assert run([FakeRuntime(latency_ms=3.0)])[0].enqueue_ms_p50 is None
    monkeypatch.setattr(RuntimeInfo, "returns_early", True)
    assert run([FakeRuntime(latency_ms=3.0)])[0].enqueue_ms_p50 == 1.5  # half of its time passes in `synchronize`


class FakeMeter:
    """Counts 2 joules for each millisecond of a clock, and cannot be read `fails_at` that number of readings."""

    source = "fake"
    is_shared = False

    def __init__(self, clock: FakeClock, fails_at: int = -1) -> None:
        self.clock, self.left = clock, fails_at

    def read_joules(self) -> float:
        self.left -= 1
        if self.left == -1:
            raise OSError("gone")
        return 1000.0 + self.clock.now_ns / 1e6 * 2


def test_energy_is_that_of_a_runtimes_own_steps_per_counted_token():
    clock = FakeClock()
    runtimes = [FakeRuntime("slow", clock=clock, latency_ms=4.0), FakeRuntime("fast", clock=clock, latency_ms=1.0)]
    rows = measure([Contender(runtime) for runtime in runtimes], text_of(), QUICK, clock=clock, meter_for=lambda device: FakeMeter(clock))
    assert [row.energy.joules_per_token for row in rows if row.energy] == [1.0, 0.25]  # 8 tokens a step
    assert [row.energy.mean_watts for row in rows if row.energy] == [2000.0, 2000.0]
    assert rows[0].energy is not None
    assert rows[0].energy.source == "fake"
    assert rows[0].samples_ms == (4.0,) * 30


@pytest.mark.parametrize(
    "meter_for", [lambda device: None, lambda device: FakeMeter(FakeClock()), lambda device: FakeMeter(FakeClock(), 1)]
)
def test_energy_is_left_out_where_nothing_counts_it(meter_for):
    (row,) = measure([Contender(FakeRuntime())], text_of(), QUICK, clock=FakeClock(), meter_for=meter_for)
    assert row.energy is None


# --- boundaries --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("boundary", boundaries.BOUNDARIES)
def test_every_boundary_computes_the_same(boundary):
    text = text_of(41)  # begins anew after five steps
    resident = run([FakeRuntime()], SOUND, text)[0]
    (row,) = run([FakeRuntime()], dataclasses.replace(SOUND, boundary=boundary), text)
    assert row.boundary == boundary
    assert row.nll_nats_per_token == resident.nll_nats_per_token
    assert row.n_tokens == resident.n_tokens


# --- several processes -------------------------------------------------------------------------------------------------------------


def measure_here(kwargs: dict[str, Any]) -> list[Row]:
    """What each of several processes runs: the one of rank 1 is slower in every third step."""
    world = world_of()
    clock = FakeClock()
    slow = 3.0 if world.rank else 1.0
    runtimes = [
        FakeRuntime("pytorch", clock=clock, latency_ms=lambda step: slow if step % 3 == 0 else 2.0 - world.rank),
        FakeRuntime("onnx", clock=clock),
    ]
    text = text_of(batch_size=4)
    expected = scored_by(FakeRuntime(), text)
    contenders = [Contender(runtimes[0], is_reference=True), Contender(runtimes[1], expected=expected)]
    with join(world, torch.device("cpu")):
        return measure(contenders, text, SOUND, clock=clock, world=world, **kwargs)


def test_several_processes_share_the_streams_and_a_step_lasts_until_the_last_is_done():
    both = in_processes(2, measure_here, {})
    assert both[0] == both[1]
    reference, other = both[0]
    assert sorted(set(reference.samples_ms)) == [2.0, 3.0]  # never the 1.0 of a process that waits for the other
    assert reference.processes == other.processes == 2
    assert reference.batch_size == 4
    assert other.n_tokens == 60 * 16
    assert other.tokens_per_s == pytest.approx(16 / 1e-3)
    assert "the nll of 60 timed steps is the receipt's" in other.notes[0]
    alone = measure([Contender(FakeRuntime())], text_of(batch_size=4), SOUND, clock=FakeClock())[0]
    assert other.nll_nats_per_token == pytest.approx(alone.nll_nats_per_token, rel=1e-12)
    assert [row.valid for row in both[0]] == [True, True]


def test_streams_that_cannot_be_shared_equally_are_refused():
    with pytest.raises(UsageError, match="3 streams cannot be divided"):
        measure([Contender(FakeRuntime())], text_of(batch_size=3), QUICK, clock=FakeClock(), world=World(0, 2, 0))
