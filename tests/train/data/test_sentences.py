"""Sentences in random order: every one once, whole, and the same order for the same seed everywhere."""

from __future__ import annotations

import tracemalloc

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from txl_train.data.segments import SegmentIterator
from txl_train.data.sentences import ShuffledSentences
from txl_train.errors import DataError

Ids = npt.NDArray[np.uint16]
TEXT: Ids = np.array([9, 1, 2, 9, 3, 9, 4, 5, 6, 9], dtype=np.uint16)


def in_order(shuffled: ShuffledSentences) -> list[int]:
    return [int(i) for i in shuffled[np.arange(len(shuffled))]]


@pytest.mark.parametrize("seed", range(5))
def test_every_sentence_comes_once_and_whole_after_a_boundary(seed: int) -> None:
    tokens = in_order(ShuffledSentences(TEXT, 9, seed=seed))
    assert tokens[0] == 9
    assert sorted(" ".join(map(str, tokens)).strip("9 ").split(" 9 ")) == ["1 2", "3", "4 5 6"]


def test_the_order_is_that_of_the_seed_for_ever() -> None:
    """Restarted training must find the order again, on any machine and with any version of numpy."""
    assert in_order(ShuffledSentences(TEXT, 9, seed=1)) == [9, 4, 5, 6, 9, 1, 2, 9, 3, 9]
    assert in_order(ShuffledSentences(TEXT, 9, seed=0)) == [9, 4, 5, 6, 9, 3, 9, 1, 2, 9]


def test_seeds_give_different_orders() -> None:
    text = np.concatenate([[0], np.repeat(np.arange(1, 50), 2)])
    text[2::2] = 0
    assert len({tuple(in_order(ShuffledSentences(text, 0, seed=seed))) for seed in range(20)}) == 20


def test_any_shape_of_positions_may_be_asked_for() -> None:
    shuffled = ShuffledSentences(TEXT, 9, seed=3)
    positions = np.array([[9, 0], [4, 4], [2, 7]])
    assert shuffled[positions].tolist() == [[in_order(shuffled)[p] for p in row] for row in positions.tolist()]
    assert shuffled.n_sentences == 3


@given(st.lists(st.lists(st.integers(1, 5), max_size=4), min_size=1, max_size=12), st.booleans(), st.booleans(), st.integers(0, 1 << 62))
def test_no_token_is_lost_or_doubled(sentences: list[list[int]], opening: bool, ended: bool, seed: int) -> None:
    tokens = [0] * opening + [token for sentence in sentences for token in [*sentence, 0]]
    text = np.array(tokens if ended or len(tokens) == 1 else tokens[:-1])
    if 0 not in text:
        return
    shuffled = ShuffledSentences(text, 0, seed=seed)
    assert len(shuffled) == len(text)
    assert sorted(in_order(shuffled)) == sorted(text.tolist())


def test_segments_are_cut_from_it_as_from_any_text() -> None:
    shuffled = ShuffledSentences(TEXT, 9, seed=1)
    segments = list(SegmentIterator(shuffled, batch_size=2, tgt_len=3))
    targets = [int(i) for b in range(2) for s in segments for i in s.target_ids_BT[b][s.counted_BT[b]]]
    assert targets == in_order(shuffled)[1:]


def test_a_text_without_boundaries_is_refused() -> None:
    with pytest.raises(DataError, match="no token 7 between sentences"):
        ShuffledSentences(TEXT, 7, seed=0)


def test_only_offsets_are_kept_in_memory() -> None:
    text = np.ones(4_000_000, dtype=np.uint16)
    text[::25] = 0
    tracemalloc.start()
    shuffled = ShuffledSentences(text, 0, seed=0)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert shuffled.n_sentences == 160_000
    assert kept < 10 * shuffled.n_sentences  # 8 bytes a sentence; the text has 50
    assert peak < 16 * text.nbytes / 8 + 60 * shuffled.n_sentences
