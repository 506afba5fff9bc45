"""Many texts side by side: each scores what it scores alone, in its order, as soon as it can be told."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.deploy.conftest import Exports
from tests.fakes import FakeRuntime
from tests.reference.naive_txl import naive_forward, naive_nll
from tests.support import small_config, write_checkpoint
from txl_deploy.runtimes.base import Runtime
from txl_deploy.runtimes.registry import eager_from_checkpoint, open_artifact
from txl_deploy.score import WAITING, Scorer
from txl_train.checkpoint import load_model
from txl_train.errors import DataError, UsageError

Ids = np.ndarray
ROUNDING = 2e-5
"""Nats of a token by which float32 differs where a product has other rows: the tails' products have those of all streams."""


def texts_of(lengths: list[int], vocab_size: int = 23, seed: int = 1) -> list[Ids]:
    generator = np.random.default_rng(seed)
    return [generator.integers(0, vocab_size, length) for length in lengths]


def scores(runtime: Runtime, batch_size: int, texts: list[Ids]) -> list[Ids]:
    found = list(Scorer(runtime, batch_size).scores(enumerate(texts)))
    assert [scored.unit for scored in found] == list(range(len(texts)))
    return [scored.nll_N for scored in found]


def expected_of_fake(ids: Ids, tgt_len: int = 4, mem_len: int = 8) -> list[float]:
    """The formula of `FakeRuntime`, which tells how much of the past a stream remembers: none, where a text begins."""
    at = np.arange(len(ids) - 1)
    remembered = np.minimum(at // tgt_len * tgt_len, mem_len)
    return list(FakeRuntime().nll + (ids[:-1] + 2 * ids[1:]) % 7 / 10 - 0.01 * remembered) if len(ids) > 1 else []


@settings(max_examples=60)
@given(st.lists(st.integers(0, 20), max_size=25), st.integers(1, 6))
def test_every_text_begins_at_a_cold_start_and_keeps_its_place(lengths: list[int], batch_size: int) -> None:
    texts = texts_of(lengths, 100)
    for found, ids in zip(scores(FakeRuntime(), batch_size, texts), texts, strict=True):
        assert found.tolist() == pytest.approx(expected_of_fake(ids), abs=1e-6)


def test_streams_without_a_text_are_counted_as_room() -> None:
    scorer = Scorer(FakeRuntime(), 4)
    assert len(list(scorer.scores(enumerate(texts_of([3, 9, 2], 100))))) == 3
    assert scorer.occupancy.scored == 2 + 8 + 1
    assert scorer.occupancy.computed % 16 == 0


def test_a_result_is_told_while_the_next_text_is_waited_for() -> None:
    told = threading.Event()

    def slow() -> Iterator[tuple[int, Ids]]:
        yield 0, texts_of([6])[0]
        yield 1, texts_of([1])[0]
        assert told.wait(20), "the first results were kept back until more came"
        yield 2, texts_of([3])[0]

    found = Scorer(FakeRuntime(), 4).scores(slow())
    assert [next(found).unit, next(found).unit] == [0, 1]
    told.set()
    assert [scored.unit for scored in found] == [2]


def test_whoever_stops_early_leaves_no_thread_behind() -> None:
    read = itertools.count()

    def endless() -> Iterator[tuple[int, Ids]]:
        for number in read:
            yield number, texts_of([5])[0]

    before = set(threading.enumerate())
    found = Scorer(FakeRuntime(), 2).scores(endless())
    assert [next(found).unit for _ in range(3)] == [0, 1, 2]
    found.close()
    for thread in set(threading.enumerate()) - before:
        thread.join(10)
        assert not thread.is_alive()
    assert next(read) < 40  # it was read a little ahead, not to the end of memory


def test_no_more_results_wait_for_a_long_text_than_there_is_room_for() -> None:
    read = itertools.count()

    def one_long() -> Iterator[tuple[int, Ids]]:
        yield next(read), texts_of([4 * (WAITING + 500)], 100)[0]
        for _ in range(2 * WAITING):
            yield next(read), texts_of([2], 100)[0]

    found = Scorer(FakeRuntime(), 2).scores(one_long())
    assert next(found).unit == 0
    assert next(read) <= WAITING + 2 + 4 * 2 + 3
    found.close()


def test_what_a_source_raises_comes_after_the_results_of_what_was_before_it() -> None:
    def broken() -> Iterator[tuple[int, Ids]]:
        yield 0, texts_of([30])[0]
        yield 1, texts_of([3])[0]
        raise DataError("Line 3 is damaged.")

    found = Scorer(FakeRuntime(), 3).scores(broken())
    assert [next(found).unit, next(found).unit] == [0, 1]
    with pytest.raises(DataError, match="Line 3"):
        next(found)


TEXTS = texts_of([6, 31, 2, 13, 1, 6, 8, 40, 3, 17])


def runtime_of(exports: Exports, name: str) -> Runtime:
    if name == "pytorch":
        return eager_from_checkpoint(exports.checkpoint, tgt_len=5)[0]
    return open_artifact(exports.onnx if name == "onnx" else exports.torchscript)


def naive_scores(checkpoint: Path, ids: Ids, tgt_len: int = 5) -> list[float]:
    model, _ = load_model(checkpoint)
    parameters = {name: value.double().numpy() for name, value in model.parameters_by_name().items()}
    memory, found = None, []
    for at in range(0, len(ids) - 1, tgt_len):
        part = ids[None, at : at + tgt_len + 1]
        hidden, memory = naive_forward(model.config, parameters, part[:, :-1], memory)
        found += naive_nll(model.config, parameters, hidden, part[:, 1:])[0].tolist()
    return found


@pytest.mark.parametrize("name", ["pytorch", "torchscript", "onnx"])
def test_the_nll_is_that_of_the_slow_model_on_every_runtime(exports: Exports, name: str) -> None:
    for found, ids in zip(scores(runtime_of(exports, name), 3, TEXTS), TEXTS, strict=True):
        assert found.tolist() == pytest.approx(naive_scores(exports.checkpoint, ids), abs=5e-5)  # the model's own float32


@pytest.mark.parametrize("name", ["pytorch", "torchscript", "onnx"])
def test_a_text_scores_the_same_whatever_is_scored_beside_it(exports: Exports, name: str) -> None:
    runtime = runtime_of(exports, name)
    alone = [scores(runtime, 4, [ids])[0] for ids in TEXTS]
    order = np.random.default_rng(2).permutation(len(TEXTS)).tolist()
    for batch_size in (1, 4, 16):
        together = scores(runtime, batch_size, [TEXTS[i] for i in order])
        for i, found in zip(order, together, strict=True):
            np.testing.assert_allclose(found, alone[i], rtol=0, atol=ROUNDING)


def test_one_batch_scores_the_same_to_the_bit_each_time(exports: Exports) -> None:
    runtime = runtime_of(exports, "pytorch")
    one, other = (scores(runtime, 1, TEXTS) for _ in range(2))
    assert all((a == b).all() for a, b in zip(one, other, strict=True))


def test_at_batch_size_1_a_text_scores_the_same_to_the_bit_whatever_comes_before_it(exports: Exports) -> None:
    for name in ("pytorch", "torchscript", "onnx"):
        runtime = runtime_of(exports, name)
        one, other = scores(runtime, 1, TEXTS), scores(runtime, 1, TEXTS[::-1])[::-1]
        assert all((a == b).all() for a, b in zip(one, other, strict=True)), name


@pytest.mark.parametrize(
    ("changes", "told"), [({"attn_type": "learned", "position_rows": 9}, "from a segment's end"), ({"ext_len": 3}, "--ext-len 0")]
)
def test_a_model_that_cannot_share_a_batch_is_refused_by_its_reason(tmp_path: Path, changes: dict, told: str) -> None:
    write_checkpoint(tmp_path / "c.pt", small_config(**changes))
    runtime, _ = eager_from_checkpoint(tmp_path / "c.pt", tgt_len=5)
    with pytest.raises(UsageError) as refused:
        Scorer(runtime, 2)
    assert told in str(refused.value)
