"""The measurement itself, with runtimes whose times and results are known and a clock that only they move."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from tests.fakes import FakeClock, FakeRuntime
from txl_deploy.bench.harness import BenchSettings, Contender, block_sizes, measure, samples_for
from txl_deploy.bench.workload import Workload
from txl_train.errors import UsageError

QUICK = BenchSettings(duration_s=0, min_samples=30, max_samples=30)


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
    assert any("padding" in note for note in row.notes)


def test_a_text_too_short_to_fill_the_memory_is_noted():
    (row,) = run([FakeRuntime(mem_len=40)], text=text_of(41))
    assert any("before a memory of 10 segments is full" in note for note in row.notes)


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
    [{"min_samples": 0}, {"duration_s": -1}, {"duration_s": math.inf}, {"warmup_steps": 0}, {"max_samples": 10}, {"boundary": "enqueue"}],
)
def test_settings_that_cannot_be_meant_are_refused(wrong):
    with pytest.raises(UsageError):
        BenchSettings(**wrong)
