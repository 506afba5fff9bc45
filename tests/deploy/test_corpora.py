"""Text for a model: found where training had it, and read in the model's own tokens, also when it is typed by a person."""

from __future__ import annotations

from pathlib import Path

import pytest

from txl_deploy.corpora import ModelData, encode_manual, open_corpus
from txl_train.data import bpe
from txl_train.data.vocabulary import Vocabulary
from txl_train.errors import DataError, UsageError

WORDS = Vocabulary(["<eos>", "the", "cat", "@-@", "<unk>"], unit="word")


@pytest.fixture(autouse=True)
def _cache_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TXL_CACHE_DIR", str(tmp_path / "cache"))


def test_typed_text_becomes_the_words_of_the_data_set() -> None:
    ids, n_unknown = encode_manual(ModelData("wt103", WORDS, None), ["the", "cat-flap"], dataset=None)
    assert ids.tolist() == [1, 2, 3, 4, 0]
    assert n_unknown == 1


def test_typed_text_for_a_model_of_subwords_is_cut_as_its_training_text_was() -> None:
    pytest.importorskip("tiktoken")
    for dataset, text in (("wt103", " the cat @-@ flap \n"), ("text", "the cat-flap\n"), ("lm1b", "\nthe cat-flap\n")):
        ids, n_unknown = encode_manual(ModelData(dataset, bpe.vocabulary(), None), ["the", "cat-flap"], dataset=None)
        assert bpe.decode(ids) == text
        assert n_unknown == 0


def test_sentences_typed_for_one_billion_word_have_their_first_word_scored() -> None:
    vocabulary = Vocabulary(["<S>", "<UNK>", "the", "cat"], unit="word")
    ids, n_unknown = encode_manual(ModelData("lm1b", vocabulary, None), ["the dog"], dataset=None)
    assert ids.tolist() == [0, 2, 1, 0]
    assert n_unknown == 1


def test_too_little_typed_text_is_refused() -> None:
    with pytest.raises(DataError, match="fewer than two tokens"):
        encode_manual(ModelData("wt103", WORDS, None), [""], dataset=None)


def test_a_folder_of_text_is_read_as_the_models_vocabulary_says(tmp_path: Path) -> None:
    pytest.importorskip("tiktoken")
    (tmp_path / "test.txt").write_text("the cat\n")
    by_words = open_corpus(ModelData("wt103", WORDS, str(tmp_path)), dataset=None, data=None)
    assert by_words.ids("test").tolist() == [1, 2, 0]
    by_subwords = open_corpus(ModelData("wt103", bpe.vocabulary(), None), dataset="text", data=tmp_path)
    assert bpe.decode(by_subwords.ids("test")) == "the cat\n"


def test_a_folder_that_is_gone_or_was_never_known_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no longer in"):
        open_corpus(ModelData("wt103", WORDS, str(tmp_path / "gone")), dataset=None, data=None)
    with pytest.raises(UsageError, match="not recorded"):
        open_corpus(ModelData("wt103", WORDS, None), dataset=None, data=None)
