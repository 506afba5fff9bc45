"""Tokens become text again, and what was shown of it stays."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from txl_train.data import bpe
from txl_train.data.corpus import encode_text
from txl_train.data.datasets import get_dataset
from txl_train.data.detokenizers import Detokenizer
from txl_train.data.tokenizers import raw_lines, subword_lines
from txl_train.data.vocabulary import Vocabulary

SENTENCES = [
    "The film was released in 1999, and it cost $ 3.5 million.",
    'He said: "It is well-known that 1,234 people (most of them) came."',
    "It's Peter's dog; they don't care!\nA second line, with 50% more.",
]


def ids_of(text, dataset, vocabulary=None):
    spec = get_dataset(dataset)
    if vocabulary is None:
        lines = raw_lines(text, dataset)
        vocabulary = Vocabulary(dict.fromkeys(["<eos>", "<unk>", *" ".join(lines).split()]), unit="word")
    else:
        lines = subword_lines(text, spec)
    return Detokenizer(spec, vocabulary), encode_text(lines, spec, vocabulary).tolist()


@pytest.mark.parametrize("text", SENTENCES)
@pytest.mark.parametrize("dataset", ["wt103", "pydoc"])
def test_sentences_come_back(text, dataset):
    detokenizer, ids = ids_of(text, dataset)
    assert detokenizer.text(ids) == text.replace("$ 3.5", "$3.5") + "\n"


def test_words_between_blanks_stay_as_they_are():
    detokenizer, ids = ids_of("a , b ( c )\nd", "text")
    assert detokenizer.text(ids) == "a , b ( c )\nd\n"


def test_characters_and_bytes_and_subwords_come_back():
    letters = Vocabulary("_abc", unit="char")
    assert Detokenizer(get_dataset("text8"), letters).text([1, 2, 0, 3]) == "ab c"
    numbers = Vocabulary([str(i) for i in range(256)], unit="byte")
    assert Detokenizer(get_dataset("enwik8"), numbers).text("é€\n".encode()) == "é€\n"
    detokenizer, ids = ids_of("naïve café 🙂\nx", "text", bpe.vocabulary())
    assert detokenizer.text(ids) == "naïve café 🙂\nx\n"


MARKS = ["word", "@-@", "@,@", "@.@", ",", ".", '"', "'", "'s", "n't", "(", ")", "$", "<eos>", "<unk>", "5", "%", "=", "日", "&amp;"]


@settings(max_examples=300)
@given(st.lists(st.sampled_from(range(len(MARKS))), max_size=12))
def test_what_is_stable_stays_whatever_follows(ids):
    detokenizer = Detokenizer(get_dataset("wt103"), Vocabulary(MARKS, unit="word"))
    for n in range(len(ids) + 1):
        for m in range(n, len(ids) + 1):
            assert detokenizer.text(ids[:m]).startswith(detokenizer.stable(ids[:n]))


@settings(max_examples=100)
@given(st.text(max_size=8))
def test_no_half_of_a_character_is_stable(text):
    numbers = Vocabulary([str(i) for i in range(256)], unit="byte")
    by_bytes, ids = Detokenizer(get_dataset("enwik8"), numbers), list(text.encode("utf-8", "ignore"))
    by_subwords, pieces = Detokenizer(get_dataset("text"), bpe.vocabulary()), bpe.encoder()(text.encode("utf-8", "ignore").decode())
    for detokenizer, tokens in ((by_bytes, ids), (by_subwords, pieces)):
        whole = detokenizer.text(tokens)
        for n in range(len(tokens) + 1):
            assert whole.startswith(detokenizer.stable(tokens[:n]))
