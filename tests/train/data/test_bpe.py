"""GPT-2's subwords: its numbers, any text there and back, and no network."""

from __future__ import annotations

import importlib
import socket
from importlib import resources

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from txl_train.data import bpe
from txl_train.data.vocabulary import Vocabulary
from txl_train.errors import EnvironmentUnfitError

pytest.importorskip("tiktoken")


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("Hello world", [15496, 995]),
        ("\n", [198]),
        ("\n\n", [628]),
        (" the", [262]),
        ("It's", [1026, 338]),
        ("<|endoftext|>", [27, 91, 437, 1659, 5239, 91, 29]),
        ("", []),
    ],
)
def test_known_texts_have_gpt_2s_numbers(text: str, ids: list[int]) -> None:
    assert bpe.encoder()(text) == ids


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_comes_back(text: str) -> None:
    assert bpe.decode(bpe.encoder()(text)) == text


@pytest.mark.parametrize("text", [" " * 1_000_001 + "x", "a" * 120_000, "\u3000 " * 60_000 + "a b"])
def test_long_runs_come_back_too(text: str) -> None:
    assert bpe.decode(bpe.encoder()(text)) == text


def test_the_vocabulary_is_written_as_in_gpt_2s_own_files() -> None:
    vocabulary = bpe.vocabulary()
    assert len(vocabulary) == bpe.SIZE == 50_257
    assert vocabulary.symbols[:2] == ("!", '"')
    assert vocabulary.symbols[15496] == "Hello"
    assert vocabulary.symbols[995] == "\u0120world"
    assert vocabulary.symbols[50_255:] == ("\u0120gazed", "<|endoftext|>")
    assert vocabulary.eos_id == bpe.NEWLINE_ID
    assert vocabulary.unk_id is None
    assert not vocabulary.counts_characters


def test_each_symbol_has_the_id_that_the_encoding_gives_it() -> None:
    symbols = bpe.vocabulary().symbols
    value_of = {written: value for value, written in bpe._WRITTEN.items()}
    for i in np.random.default_rng(0).integers(0, 50_256, 500):
        text = bytes(value_of[character] for character in symbols[i])
        assert bpe._encoding().encode_single_token(text) == i


def test_a_vocabulary_kept_in_a_checkpoint_is_known_again() -> None:
    kept = Vocabulary.from_dict(bpe.vocabulary().to_dict())
    assert bpe.is_gpt2(kept)
    assert bpe.is_gpt2(Vocabulary([*kept.symbols, "madeupword000000000"], unit="subword"))
    assert not bpe.is_gpt2(Vocabulary(["a"], unit="subword"))
    assert not bpe.is_gpt2(Vocabulary(["a"], unit="word"))


def test_nothing_is_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise AssertionError("somebody asked for the network")

    monkeypatch.setattr(socket.socket, "connect", refused)
    bpe._encoding.cache_clear()
    assert bpe.encoder()("Hello world") == [15496, 995]


def test_changed_merges_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bpe, "MERGES_SHA256", "0" * 64)
    bpe._merges.cache_clear()
    bpe._encoding.cache_clear()
    with pytest.raises(EnvironmentUnfitError, match="sha256 is another"):
        bpe.encoder()
    bpe._merges.cache_clear()


def test_without_tiktoken_the_message_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    bpe._encoding.cache_clear()
    with pytest.raises(EnvironmentUnfitError) as caught:
        bpe.encoder()
    assert "pip install tiktoken" in str(caught.value.remedy)


def test_the_merges_lie_beside_their_licence() -> None:
    folder = resources.files("txl_train.data").joinpath("gpt2")
    assert "Modified MIT License" in folder.joinpath("LICENSE").read_text(encoding="utf-8")
