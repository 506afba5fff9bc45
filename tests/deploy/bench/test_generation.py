"""The benchmark of generation: what the clock says, whose tokens are compared, and which rows are not believed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.fakes import FakeClock, FakeRuntime
from txl_deploy.bench.generation import GenerationResult, GenerationRow, GenerationSettings, measure
from txl_deploy.generate import Generator, Token
from txl_deploy.sampling import Sampling
from txl_train.errors import UsageError

SETTINGS = GenerationSettings(
    new_tokens=5,
    sampling=Sampling(temperature=0),
    seed=0,
    percentiles=(50, 90),
    min_samples=70,
    warmup=10,
    min_duration_s=0.1,
    max_duration_s=60,
)


class FakeGenerator:
    """A generator whose prompt takes 7 ms a token and each round of tokens 2 ms, but for what `slower` adds; its tokens are known."""

    def __init__(
        self,
        clock: FakeClock,
        name: str = "fake",
        *,
        readers: tuple[int, ...] = (),
        token: Callable[[int, int], int] = lambda sample, at: sample + at,
        slower: Callable[[int], float] = lambda count: 0.0,
        journal: list[str] | None = None,
        **info: Any,
    ) -> None:
        self.clock, self.token, self.slower, self.journal, self.count = clock, token, slower, journal, 0
        self.step = SimpleNamespace(info=dataclasses.replace(FakeRuntime(name, checkpoint_sha256="c").info, **info))
        self.readers = [SimpleNamespace(info=SimpleNamespace(tgt_len=length)) for length in readers]

    def go_on(self, ids: list[int], *, max_tokens: int, samples: int, **_: Any) -> Iterator[Token]:
        self.count += 1
        if self.journal is not None:
            self.journal.append(self.step.info.name)
        self.clock.advance_ms(7 * len(ids) + self.count % 3 / 100)
        for at in range(max_tokens):
            self.clock.advance_ms((2 + self.count % 3 / 100 if at else 0) + self.slower(self.count))
            for sample in range(samples):
                yield Token(sample, self.token(sample, at), -1.0, None)


def rows_of(clock: FakeClock, *generators: FakeGenerator, samples: int = 3, prompt: int = 4, **settings: Any) -> list[GenerationRow]:
    changed = dataclasses.replace(SETTINGS, **settings)
    return measure([cast(Generator, g) for g in generators], list(range(prompt)), samples, changed, clock=clock)


def test_the_first_token_and_the_steps_take_what_the_clock_says() -> None:
    clock = FakeClock()
    (row,) = rows_of(clock, FakeGenerator(clock, readers=(8,)))
    assert row.valid, row.invalid_reasons
    assert row.first_token["latency_ms_p50"] == pytest.approx(28.01)
    assert row.step["latency_ms_p50"] == pytest.approx(2.01)
    assert row.tokens_per_s == pytest.approx(3e3 / 2.01)
    assert row.tokens_per_s_interval_95 is not None
    assert row.tokens_per_s_interval_95[0] <= row.tokens_per_s <= row.tokens_per_s_interval_95[1]
    assert row.tokens_per_s_with_prompt == pytest.approx(3 * 5 * 1e3 / (28.01 + 4 * 2.01), rel=1e-3)
    assert (row.n, len(row.first_token_ms), len(row.step_ms)) == (70, 70, 280)
    assert row.token_ids == [[sample + at for at in range(5)] for sample in range(3)]
    assert (row.segment_lens, row.same_tokens) == ([8, 1], None)


def test_generators_take_turns_and_each_turn_begins_with_one_that_is_not_timed() -> None:
    clock, journal = FakeClock(), []
    one, other = (FakeGenerator(clock, name, journal=journal) for name in ("one", "other"))
    rows = rows_of(clock, one, other)
    assert [row.runtime for row in rows] == ["one", "other"]
    turns = [name for at, name in enumerate(journal) if at == 0 or journal[at - 1] != name]
    assert len(turns) > 10
    assert one.count == other.count == 10 + 70 + 10  # warm-up, timed, one more in each of ten blocks
    assert rows[0].n == rows[1].n == 70


def test_a_row_of_other_tokens_is_of_another_model() -> None:
    clock = FakeClock()
    other = FakeGenerator(clock, "other", token=lambda sample, at: sample + at + (at > 2 and sample == 1))
    one, two = rows_of(clock, FakeGenerator(clock, "one"), other)
    assert one.valid
    assert two.same_tokens is False
    assert two.invalid_reasons == ["its tokens are not those of one, from token 4 of sample 2 on"]


@pytest.mark.parametrize(
    ("changes", "prompt", "compared"),
    [
        ({}, 20, True),
        ({"dtype": "fp16"}, 4, False),
        ({"checkpoint_sha256": "another"}, 4, False),
        ({"readers": (4,)}, 4, True),
        ({"readers": (4,)}, 20, False),  # beyond the memory of 8 the cut of the prompt matters
    ],
)
def test_tokens_are_compared_where_they_must_agree(changes: dict[str, Any], prompt: int, compared: bool) -> None:
    clock = FakeClock()
    rows = rows_of(clock, FakeGenerator(clock), FakeGenerator(clock, token=lambda sample, at: 0, **changes), prompt=prompt)
    assert rows[1].same_tokens is (False if compared else None)
    assert rows[1].valid is not compared


def test_a_seed_that_draws_other_tokens_each_time_is_told() -> None:
    clock = FakeClock()
    generator = FakeGenerator(clock)
    generator.token = lambda sample, at: generator.count
    (row,) = rows_of(clock, generator)
    assert "generations of one seed have drawn different tokens" in row.invalid_reasons


@pytest.mark.parametrize(
    ("settings", "slower", "reason"),
    [
        ({"min_samples": 20}, lambda count: 0.0, "first token: too few samples for p90: 20 of 64"),
        ({"min_duration_s": 600}, lambda count: 0.0, "shorter than 600 s"),
        ({}, lambda count: 5.0 if count > 50 else 0.0, "step: drift"),
        ({}, lambda count: 20.0 / count, "did not become steady"),
    ],
)
def test_figures_that_are_not_to_be_believed_say_why(settings: dict[str, Any], slower: Callable[[int], float], reason: str) -> None:
    clock = FakeClock()
    (row,) = rows_of(clock, FakeGenerator(clock, slower=slower), **settings)
    assert not row.valid
    assert reason in "; ".join(row.invalid_reasons)


def test_a_slow_generator_is_timed_no_longer_than_was_allowed_but_ten_times() -> None:
    clock = FakeClock()
    (row,) = rows_of(clock, FakeGenerator(clock), max_duration_s=1.0)  # 36 ms each
    assert row.n == 27
    (row,) = rows_of(clock, FakeGenerator(clock), max_duration_s=0.1)
    assert row.n == 10


def test_more_samples_than_a_runtime_takes_and_settings_without_meaning_are_refused() -> None:
    clock = FakeClock()
    with pytest.raises(UsageError, match="2 samples side by side at most, not 3"):
        rows_of(clock, FakeGenerator(clock, max_batch=2))
    with pytest.raises(UsageError, match="`new_tokens` must be 2 or more"):
        rows_of(clock, FakeGenerator(clock), new_tokens=1)


def test_the_result_is_a_table_and_a_file(tmp_path: Path) -> None:
    clock = FakeClock()
    rows = rows_of(clock, FakeGenerator(clock), FakeGenerator(clock, "other", token=lambda sample, at: 0))
    result = GenerationResult(command="txl bench generate", settings={"percentiles": [50, 90]}, environment={}, rows=rows)
    lines = result.lines()
    assert lines[0].count("|") == lines[1].count("|") == lines[2].count("|")
    assert "first token p90 ms" in lines[0]
    assert lines[2].endswith("| 70 | VALID |")
    assert lines[3].endswith("| INVALID |")
    assert lines[4] == f"other fp32, prompt of 4, samples 3: INVALID: {rows[1].invalid_reasons[0]}"
    result.write(tmp_path / "r.json")
    document = json.loads((tmp_path / "r.json").read_text())
    assert document == json.loads(json.dumps(result.to_dict()))
    assert document["rows"][0]["first_token_ms"] == rows[0].first_token_ms
