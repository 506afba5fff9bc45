"""The text of a sample: what was shown stays, and stops are found wherever tokens end."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from txl_deploy.text_stream import RawTokens, TextStream
from txl_train.data.datasets import get_dataset
from txl_train.data.detokenizers import Detokenizer
from txl_train.data.vocabulary import Vocabulary

WORDS = ["<eos>", "the", "well", "@-@", "known", ",", ".", '"', "it", "'s", "end"]
VOCABULARY = Vocabulary(WORDS, unit="word")


def stream(prompt: str = "the", **given) -> TextStream:
    return TextStream(Detokenizer(get_dataset("wt103"), VOCABULARY), VOCABULARY.encode(prompt.split()).tolist(), **given)


def feed(taker: TextStream, text: str) -> list[str | None]:
    return [taker.take(token) for token in VOCABULARY.encode(text.split()).tolist()]


def test_the_text_is_what_the_tokens_add_to_the_prompt():
    taker = stream("the well")
    feed(taker, "@-@ known end . <eos> it 's")
    assert taker.text == "-known end.\nit's"


@pytest.mark.parametrize("stop", ["known end", "-kn", "d.", "\n"])
def test_a_stop_is_found_across_tokens_and_is_not_shown(stop):
    taker = stream(stops=("never", stop))
    told = feed(taker, "well @-@ known end . <eos>")
    whole = " well-known end.\n"
    assert taker.text == whole[: whole.index(stop)]
    assert taker.stopped_by == stop
    assert next(reason for reason in told if reason) == stop


@settings(max_examples=200)
@given(
    st.lists(st.sampled_from(WORDS), min_size=1, max_size=15),
    st.lists(st.sampled_from(["known", "-", "l-k", "\n", '"', " the"]), max_size=2),
)
def test_what_is_shown_piece_by_piece_is_the_text(tokens, stops):
    taker, shown = stream(stops=stops), ""
    for i, token in enumerate(tokens):
        stopped = feed(taker, token)[0]
        ended = stopped is not None or i == len(tokens) - 1
        shown += taker.fresh(ended=ended)
        if ended:
            break
    assert shown == taker.text
    assert not any(stop in taker.text for stop in stops)


def test_raw_tokens_stay_as_they_are():
    taker = TextStream(RawTokens(VOCABULARY), [1])  # type: ignore[arg-type]
    feed(taker, "well @-@ known")
    assert taker.text == "well @-@ known "
