"""Baselines that count: what perplexity a unigram and a trigram model reach on a split, to judge a small network by.

Both are proper probability distributions over the whole vocabulary for every context, so their perplexities may be set beside a
network's. They score the same targets as `txl_train.data.segments`: every token but the first, `<eos>` included, each given the tokens
before it (two at most; line ends do not cut a context).

- Unigram: absolute discounting of the training counts, the mass set free spread evenly over the vocabulary. Lower, so a harder
  mark to pass, than add-one counts.
- Trigram: interpolated Kneser-Ney with three discounts per order, taken from the counts of counts ("modified", Chen and Goodman
  1998, section 3); below the bigrams a Kneser-Ney unigram, below that the uniform distribution.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from txl_train.data.corpus import IdArray
from txl_train.errors import DataError

_Ints = npt.NDArray[np.int64]
_Floats = npt.NDArray[np.float64]

LARGEST_VOCAB = 2_000_000
"""Three ids are packed into one 64-bit number."""
BLOCK_TARGETS = 1 << 20
"""Targets scored at a time: bounds the memory that scoring takes."""


def unigram_perplexity(train_ids: IdArray, eval_ids: IdArray, vocab_size: int) -> float:
    """Return the perplexity on `eval_ids` [N] of a unigram model of `train_ids`; a `DataError` where either is too short."""
    return _perplexity(UnigramModel(train_ids, vocab_size).nll_nats(eval_ids))


def trigram_perplexity(train_ids: IdArray, eval_ids: IdArray, vocab_size: int) -> float:
    """Return the perplexity on `eval_ids` [N] of a Kneser-Ney trigram model of `train_ids`; a `DataError` where either is too short."""
    return _perplexity(TrigramModel(train_ids, vocab_size).nll_nats(eval_ids))


class UnigramModel:
    """p(w) = (max(c(w) - d, 0) + d * types / V) / tokens, with d = n1 / (n1 + 2 n2) from the counts of counts."""

    def __init__(self, train_ids: IdArray, vocab_size: int) -> None:
        ids = _checked(train_ids, vocab_size, at_least=1, what="training text")
        counts = np.bincount(ids, minlength=vocab_size).astype(np.float64)
        n_once, n_twice = int((counts == 1).sum()), int((counts == 2).sum())
        discount = n_once / (n_once + 2 * n_twice) if n_once else 0.5
        freed = discount * int((counts > 0).sum())
        self._probabilities_V: _Floats = (np.maximum(counts - discount, 0.0) + freed / vocab_size) / len(ids)

    def probabilities(self) -> _Floats:
        """Return p(w) for every token, [V]."""
        return self._probabilities_V

    def nll_nats(self, eval_ids: IdArray) -> _Floats:
        """Return -log p of every token of `eval_ids` [N] but the first, [N-1]."""
        ids = _checked(eval_ids, len(self._probabilities_V), at_least=2, what="text to be scored")
        scores: _Floats = -np.log(self._probabilities_V[ids[1:]])
        return scores


class TrigramModel:
    """Interpolated modified Kneser-Ney of order 3 over V tokens."""

    def __init__(self, train_ids: IdArray, vocab_size: int) -> None:
        ids = _checked(train_ids, vocab_size, at_least=3, what="training text")
        V = vocab_size
        self._vocab_size = V
        pairs = ids[:-1] * V + ids[1:]
        trigrams, trigram_counts = np.unique(pairs[:-1] * V + ids[2:], return_counts=True)
        # Lower orders count in how many different contexts a gram has been seen (its "continuations"), not how often.
        bigrams, bigram_counts = np.unique(np.concatenate([pairs[:1], trigrams % (V * V)]), return_counts=True)
        continuations = np.bincount(bigrams % V, minlength=V).astype(np.float64)
        discounts = _discounts(continuations[continuations > 0])
        taken = discounts[np.minimum(continuations, 3).astype(np.int64)]
        self._unigram_V: _Floats = (continuations - taken + taken.sum() / V) / continuations.sum()
        self._bigrams = _Order(bigrams, bigram_counts, V)
        self._trigrams = _Order(trigrams, trigram_counts, V)

    def probabilities(self, *context: int) -> _Floats:
        """Return p(w | context) for every token, [V]; `context` is the last one or two tokens, in order."""
        tokens = np.arange(self._vocab_size, dtype=np.int64)
        before = [np.full_like(tokens, token) for token in context]
        return self._conditional(before[-2] if len(before) > 1 else None, before[-1], tokens)

    def nll_nats(self, eval_ids: IdArray) -> _Floats:
        """Return -log p of every token of `eval_ids` [N] but the first, [N-1]; the second has one token before it."""
        ids = _checked(eval_ids, self._vocab_size, at_least=2, what="text to be scored")
        parts = [self._conditional(None, ids[:1], ids[1:2])]
        for start in range(2, len(ids), BLOCK_TARGETS):
            end = min(start + BLOCK_TARGETS, len(ids))
            parts.append(self._conditional(ids[start - 2 : end - 2], ids[start - 1 : end - 1], ids[start:end]))
        scores: _Floats = -np.log(np.concatenate(parts))
        return scores

    def _conditional(self, before_last: _Ints | None, last: _Ints, tokens: _Ints) -> _Floats:
        """Return p(token | before_last, last) for rows of ids of one length."""
        p = self._bigrams.interpolated(last, tokens, self._unigram_V[tokens])
        if before_last is not None:
            p = self._trigrams.interpolated(before_last * self._vocab_size + last, tokens, p)
        return p


class _Order:
    """One order of the model: discounted counts of grams, and for each context what it leaves to the order below."""

    def __init__(self, grams: _Ints, counts: _Ints, vocab_size: int) -> None:
        discounts = _discounts(counts)
        taken = discounts[np.minimum(counts, 3)]
        self._vocab_size = vocab_size
        self._grams = grams  # sorted, so the grams of one context stand side by side
        self._discounted: _Floats = counts - taken
        self._contexts, first = np.unique(grams // vocab_size, return_index=True)
        self._totals: _Floats = np.add.reduceat(counts.astype(np.float64), first)
        self._left_over: _Floats = np.add.reduceat(taken, first) / self._totals

    def interpolated(self, contexts: _Ints, tokens: _Ints, lower: _Floats) -> _Floats:
        """Return p(token | context), given p by the order below; a context never seen leaves all to it."""
        row, context_seen = _look_up(self._contexts, contexts)
        gram, gram_seen = _look_up(self._grams, contexts * self._vocab_size + tokens)
        own = np.where(gram_seen, self._discounted[gram] / self._totals[row], 0.0)
        return np.where(context_seen, own + self._left_over[row] * lower, lower)


def _look_up(table: _Ints, keys: _Ints) -> tuple[_Ints, npt.NDArray[np.bool_]]:
    """Return for each key its place in the sorted table (0 where absent) and whether it is there."""
    place = np.minimum(np.searchsorted(table, keys), len(table) - 1)
    found = table[place] == keys
    return np.where(found, place, 0), found


def _discounts(counts: npt.NDArray[Any]) -> _Floats:
    """Return what is taken off a count of 0, 1, 2, and 3 or more: [4], from how many counts are 1, 2, 3, 4 (Chen and Goodman 1998).

    Where a small text has none of these, the estimate is undefined or negative; then the plain discount of Ney et al. (or a half) serves.
    """
    n = [0, *(int((counts == k).sum()) for k in (1, 2, 3, 4))]
    plain = n[1] / (n[1] + 2 * n[2]) if n[1] and n[2] else 0.5
    discounts = [0.0]
    for k in (1, 2, 3):
        estimate = k - (k + 1) * plain * n[k + 1] / n[k] if n[k] and n[k + 1] else plain
        discounts.append(estimate if 0.0 < estimate < k else plain)
    return np.array(discounts)


def _checked(ids: IdArray, vocab_size: int, *, at_least: int, what: str) -> _Ints:
    if not 1 <= vocab_size <= LARGEST_VOCAB:
        raise DataError(f"A vocabulary of {vocab_size} tokens is outside 1..{LARGEST_VOCAB}.")
    array = np.asarray(ids).astype(np.int64)
    if len(array) < at_least:
        raise DataError(f"The {what} has {len(array)} tokens, but it takes at least {at_least}.", remedy="Give a longer text.")
    if array.min() < 0 or array.max() >= vocab_size:
        raise DataError(f"The {what} has ids up to {array.max()}, but the vocabulary has only 0 to {vocab_size - 1}.")
    return array


def _perplexity(nll_nats: _Floats) -> float:
    return math.exp(math.fsum(nll_nats) / len(nll_nats))
