"""The counting baselines: they are distributions, they score what the network scores, and known cases come out right."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from txl_train.data import ngram
from txl_train.data.ngram import TrigramModel, UnigramModel, trigram_perplexity, unigram_perplexity
from txl_train.errors import DataError

V = 12


@pytest.fixture(scope="module")
def train_ids() -> np.ndarray:
    """Give a text of a second-order chain over ids 0..9; 10 and 11 never occur."""
    rng = np.random.default_rng(0)
    ids = [0, 1]
    for _ in range(3000):
        ids.append(int((ids[-1] * 3 + ids[-2] + rng.choice([0, 1, 5], p=[0.6, 0.3, 0.1])) % 10))
    return np.array(ids, dtype=np.uint16)


def test_unigram_probabilities_sum_to_one_and_none_is_zero(train_ids: np.ndarray) -> None:
    p = UnigramModel(train_ids, V).probabilities()
    assert p.sum() == pytest.approx(1.0, abs=1e-12)
    assert (p > 0).all()


@pytest.mark.parametrize("context", [(3, 4), (0, 1), (10, 3), (3, 10), (11, 11), (5,), (10,)], ids=str)
def test_trigram_probabilities_sum_to_one_for_seen_and_unseen_contexts(train_ids: np.ndarray, context: tuple[int, ...]) -> None:
    p = TrigramModel(train_ids, V).probabilities(*context)
    assert p.shape == (V,)
    assert p.sum() == pytest.approx(1.0, abs=1e-12)
    assert (p > 0).all()


@settings(max_examples=40)
@given(st.lists(st.integers(0, 5), min_size=3, max_size=40), st.integers(0, 6), st.integers(0, 6))
def test_trigram_probabilities_sum_to_one_on_any_short_text(ids: list[int], u: int, v: int) -> None:
    p = TrigramModel(np.array(ids), 7).probabilities(u, v)
    assert p.sum() == pytest.approx(1.0, abs=1e-12)
    assert (p > 0).all()


def test_scores_are_those_of_the_probabilities_token_by_token(train_ids: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ngram, "BLOCK_TARGETS", 7)
    model = TrigramModel(train_ids, V)
    text = np.array([3, 3, 4, 10, 2, 1, 0, 7, 7, 9, 11, 11, 2, 5, 6, 1, 1, 4])
    expected = [-math.log(model.probabilities(*text[max(0, i - 2) : i])[text[i]]) for i in range(1, len(text))]
    np.testing.assert_allclose(model.nll_nats(text), expected, rtol=1e-12)


def test_every_token_but_the_first_is_scored(train_ids: np.ndarray) -> None:
    text = train_ids[:100]
    assert len(UnigramModel(train_ids, V).nll_nats(text)) == 99
    assert len(TrigramModel(train_ids, V).nll_nats(text)) == 99
    p = UnigramModel(train_ids, V).probabilities()
    assert unigram_perplexity(train_ids, text, V) == pytest.approx(math.exp(-np.log(p[text[1:]]).mean()), rel=1e-12)


def test_interpolated_kneser_ney_by_hand() -> None:
    # Text a b a b a b c. Trigrams: aba 2, bab 2, abc 1; Y = 1/(1 + 2*2) = 1/5, so 1/5 is taken off a count of 1, and of 2 (no count is 3).
    # Bigrams count their left neighbours, the start of the text being one: ab 2 (start, b), ba 1 (a), bc 1 (a); Y = 2/(2 + 2*1) = 1/2.
    # Unigrams count the bigrams that end in them: a 1, b 1, c 1, so each has 1/3.
    # p(c | b) = (1 - 1/2)/2 + (1/2 + 1/2)/2 * 1/3 = 5/12.
    # p(c | a b) = (1 - 1/5)/3 + (1/5 + 1/5)/3 * 5/12 = 29/90.
    model = TrigramModel(np.array([0, 1, 0, 1, 0, 1, 2]), 3)
    assert model.probabilities(1)[2] == pytest.approx(5 / 12)
    assert model.probabilities(0, 1)[2] == pytest.approx(29 / 90)


def test_more_context_is_worth_more_on_a_text_that_has_it(train_ids: np.ndarray) -> None:
    held_out = train_ids[2400:]
    train = train_ids[:2400]
    unigram, trigram = unigram_perplexity(train, held_out, V), trigram_perplexity(train, held_out, V)
    best_possible = math.exp(-sum(p * math.log(p) for p in (0.6, 0.3, 0.1)))
    assert unigram == pytest.approx(10, rel=0.05)
    # The discounts are estimated for text, where rare words abound; on this chain they are larger than need be.
    assert best_possible < trigram < 1.4 * best_possible


def test_a_text_that_is_too_short_or_of_another_vocabulary_is_refused(train_ids: np.ndarray) -> None:
    with pytest.raises(DataError, match="takes at least 2"):
        unigram_perplexity(train_ids, train_ids[:1], V)
    with pytest.raises(DataError, match="takes at least 3"):
        trigram_perplexity(train_ids[:2], train_ids, V)
    with pytest.raises(DataError, match="vocabulary has only 0 to 4"):
        trigram_perplexity(train_ids, train_ids, 5)
