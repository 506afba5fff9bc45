"""Streams that come, pause and go: what a token costs depends on its own stream alone, and not on how it was sent."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.deploy.conftest import TGT_LEN, Exports
from txl_deploy.runtimes.base import HeadError, Runtime
from txl_deploy.runtimes.registry import eager_from_checkpoint, open_artifact
from txl_deploy.session import Session
from txl_deploy.streams import Stream, Streams
from txl_train.errors import UsageError, ValidationError
from txl_train.evaluate import StepOutput

VOCAB = 23


@pytest.fixture(scope="module", params=["pytorch", "onnx"])
def runtime(request: pytest.FixtureRequest, exports: Exports) -> Runtime:
    if request.param == "onnx":
        return open_artifact(exports.onnx)
    return eager_from_checkpoint(exports.checkpoint)[0]


def text(seed: int, length: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCAB, length)


def alone(runtime: Runtime, ids: np.ndarray) -> np.ndarray:
    """Score a stream in whole segments from a cold start, the way `txl eval` does."""
    session, found = Session(runtime, 1), []
    T = runtime.info.tgt_len
    for start in range(0, len(ids) - 1, T):
        part = ids[start : start + T + 1]
        inputs, targets = torch.zeros((2, 1, T), dtype=torch.int64)
        inputs[0, : len(part) - 1], targets[0, : len(part) - 1] = torch.as_tensor(part[:-1]), torch.as_tensor(part[1:])
        found.append(session.step(inputs, targets)[0, : len(part) - 1].numpy().copy())
    return np.concatenate(found)


def cut(ids: np.ndarray, lengths: list[int]) -> list[np.ndarray]:
    """Cut ids into parts of those lengths, over and over."""
    parts, at, turn = [], 0, 0
    while at < len(ids):
        length = lengths[turn % len(lengths)]
        parts.append(ids[at : at + length])
        at, turn = at + length, turn + 1
    return parts


@pytest.mark.parametrize("lengths", [[1], [2, 3], [TGT_LEN], [TGT_LEN + 1], [40], [1, 17, 4]])
def test_a_stream_costs_the_same_however_it_is_sent(runtime, lengths):
    ids = text(1, 38)
    streams, stream = Streams(runtime, max_rows=4), Stream()
    found = np.concatenate([streams.score([(stream, part)])[0] for part in cut(ids, lengths)])
    np.testing.assert_allclose(found, alone(runtime, ids), atol=2e-6)
    assert stream.n_read == 38


def test_the_first_token_of_a_stream_costs_nothing_as_nothing_is_before_it(runtime):
    streams, stream = Streams(runtime, max_rows=1), Stream()
    assert streams.score([(stream, [3])])[0].shape == (0,)
    assert streams.score([(stream, [4])])[0].shape == (1,)


@given(seed=st.integers(0, 2**32 - 1), n_streams=st.integers(1, 9), max_rows=st.integers(1, 5))
@settings(max_examples=25)
def test_interleaved_streams_cost_what_they_cost_alone(exports_runtime, seed, n_streams, max_rows):
    """Streams of other lengths begin, pause, end and begin again under the same place, in any company."""
    generator = np.random.default_rng(seed)
    streams = Streams(exports_runtime, max_rows=max_rows)
    texts = [text(int(generator.integers(2**31)), int(generator.integers(1, 40))) for _ in range(n_streams)]
    waiting = [cut(ids, generator.integers(1, 12, 3).tolist()) for ids in texts]
    found: list[list[np.ndarray]] = [[] for _ in texts]
    places = [Stream() for _ in texts]
    while any(waiting):
        able = [i for i, parts in enumerate(waiting) if parts]
        chosen = generator.permutation(able)[: generator.integers(1, len(able) + 1)]
        for i, result in zip(chosen, streams.score([(places[i], waiting[i].pop(0)) for i in chosen]), strict=True):
            found[i].append(result)
            if not waiting[i]:
                streams.release(places[i])
                if generator.random() < 0.3:  # and another text in the same place, of which nothing is kept here
                    streams.score([(places[i], text(0, 7))])
    for ids, results in zip(texts, found):
        expected = alone(exports_runtime, ids) if len(ids) > 1 else np.zeros(0)
        np.testing.assert_allclose(np.concatenate(results), expected, atol=2e-6)


@pytest.fixture(scope="module")
def exports_runtime(exports: Exports) -> Runtime:
    return open_artifact(exports.onnx)


def test_a_stream_that_begins_anew_knows_nothing_of_what_it_was(runtime):
    streams, stream, other = Streams(runtime, max_rows=2), Stream(), Stream()
    first = streams.score([(stream, text(3, 21)), (other, text(4, 21))])[0]
    streams.release(stream)
    again, going_on = streams.score([(stream, text(3, 21)), (other, text(5, 9))])
    np.testing.assert_allclose(again, first, atol=2e-6)
    np.testing.assert_allclose(going_on, alone(runtime, np.concatenate([text(4, 21), text(5, 9)]))[20:], atol=2e-6)


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        ([1, VOCAB], r"Token 1 has the id 23, but the model's vocabulary has the ids 0 to 22"),
        ([-1], r"Token 0 has the id -1"),
        ([], r"one or more token ids"),
        ([[1, 2]], r"shape \[1, 2\]"),
        ([1.5], r"float64"),
    ],
)
def test_wrong_ids_are_the_error_of_their_stream_alone(runtime, ids, said):
    streams, stream, other = Streams(runtime, max_rows=4), Stream(), Stream()
    before = streams.score([(stream, text(6, 12)), (other, text(7, 12))])[0]
    wrong, fine = streams.score([(stream, ids), (other, text(8, 5))])
    assert isinstance(wrong, UsageError)
    with pytest.raises(UsageError, match=said):
        raise wrong
    np.testing.assert_allclose(fine, alone(runtime, np.concatenate([text(7, 12), text(8, 5)]))[11:], atol=2e-6)
    after = streams.score([(stream, text(9, 6))])[0]  # which goes on where it was
    expected = alone(runtime, np.concatenate([text(6, 12), text(9, 6)]))
    np.testing.assert_allclose(np.concatenate([before, after]), expected, atol=2e-6)


class Wrapped:
    """A runtime with one thing wrong."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self.info = runtime.info
        self.initial_memory = runtime.initial_memory
        self.fails = False
        self.not_a_number = -1

    def step(self, input_ids_BT, target_ids_BT, memory):
        if self.fails:
            raise MemoryError("no more memory")
        nll_BT, memory = self._runtime.step(input_ids_BT, target_ids_BT, memory)
        if self.not_a_number >= 0:
            nll_BT = nll_BT.clone()
            nll_BT[self.not_a_number, 0] = float("nan")
        return StepOutput(nll_BT, memory)


def test_what_is_no_number_ends_the_stream_it_is_in_and_no_other(exports_runtime):
    wrapped = Wrapped(exports_runtime)
    streams, stream, other = Streams(wrapped, max_rows=4), Stream(), Stream()
    streams.score([(stream, text(6, 11)), (other, text(7, 11))])
    wrapped.not_a_number = 0
    broken, fine = streams.score([(stream, text(8, 3)), (other, text(9, 3))])
    with pytest.raises(ValidationError, match=r"no finite number within 3 tokens after token 10 of the stream"):
        raise broken
    np.testing.assert_allclose(fine, alone(exports_runtime, np.concatenate([text(7, 11), text(9, 3)]))[10:], atol=2e-6)
    assert stream.n_read == 0, "it is at a cold start"


def test_a_runtime_that_fails_leaves_no_stream_half_read(exports_runtime):
    wrapped = Wrapped(exports_runtime)
    streams, stream, other = Streams(wrapped, max_rows=4), Stream(), Stream()
    streams.score([(stream, text(6, 11)), (other, text(7, 11))])
    wrapped.fails = True
    with pytest.raises(MemoryError):
        streams.score([(stream, text(8, 3))])
    wrapped.fails = False
    assert stream.n_read == 0
    again, fine = streams.score([(stream, text(6, 11)), (other, text(9, 3))])
    np.testing.assert_allclose(again, alone(exports_runtime, text(6, 11)), atol=2e-6)
    np.testing.assert_allclose(fine, alone(exports_runtime, np.concatenate([text(7, 11), text(9, 3)]))[10:], atol=2e-6)


def test_what_cannot_be_scored_in_parts_is_refused(exports, logits_onnx, exports_runtime):
    with pytest.raises(HeadError, match="--head nll"):
        Streams(open_artifact(logits_onnx), max_rows=1)
    streams, stream = Streams(exports_runtime, max_rows=2), Stream()
    with pytest.raises(UsageError, match="twice"):
        streams.score([(stream, [1]), (stream, [2])])
