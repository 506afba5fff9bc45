"""Which text a checkpoint or an artifact is to be scored on: finds its folder, and reads it with the model's own vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from txl_train.data.corpus import Corpus, default_cache_dir, encode_text, load_corpus
from txl_train.data.datasets import get_dataset
from txl_train.data.tokenizers import raw_lines, subword_lines
from txl_train.data.vocabulary import Vocabulary
from txl_train.errors import DataError, UsageError


@dataclass(frozen=True)
class ModelData:
    """What a model knows of its data: kept in checkpoints and in artifacts alike."""

    dataset: str
    vocabulary: Vocabulary
    folder: str | None
    """Where its text was when it was trained."""


def open_corpus(model_data: ModelData, *, dataset: str | None, data: Path | None) -> Corpus:
    """Return the corpus in `data` (default: where training had it), encoded with the model's vocabulary.

    Raises:
        UsageError: no folder is given and none is recorded, or the recorded one is gone.
        DataError: the folder is not what its data set promises.
    """
    if data is None and model_data.folder is None:
        raise UsageError("It is not recorded which text the model was trained on.", remedy="Give its folder with `--data DIR`.")
    folder = Path(model_data.folder or "") if data is None else data
    if data is None and not folder.is_dir():
        raise UsageError(f"The text the model was trained on is no longer in {folder}.", remedy="Give a folder with `--data DIR`.")
    spec = get_dataset(dataset or model_data.dataset)
    return load_corpus(folder, spec, cache_dir=default_cache_dir(), vocabulary=model_data.vocabulary)


def encode_manual(model_data: ModelData, texts: Sequence[str], *, dataset: str | None) -> tuple[npt.NDArray[np.int64], int]:
    """Tokenise raw text the way the data set was built; return its ids (int64), and how many of its tokens the vocabulary lacks.

    For a model of subwords, the tokens are cut further into these, which lack nothing.

    Raises:
        DataError: fewer than two tokens, so that none has a predecessor to be predicted from.
    """
    spec = get_dataset(dataset or model_data.dataset)
    subwords = model_data.vocabulary.unit == "subword"
    text = " ".join(texts)
    lines = subword_lines(text, spec) if subwords else raw_lines(text, spec.name)
    ids = encode_text(lines, spec, model_data.vocabulary)
    n_unknown = 0 if subwords else sum(token not in model_data.vocabulary for line in lines for token in line.split())
    if len(ids) < 2:
        raise DataError("The text has fewer than two tokens, so there is nothing to predict.", remedy="Give more text to `--manual`.")
    return ids, n_unknown


def encode_part(model_data: ModelData, text: str, *, dataset: str | None = None) -> tuple[npt.NDArray[np.int64], list[str]]:
    """Tokenise a part of a text the way the data set was built; return its ids (int64, perhaps none) and the words the vocabulary lacks.

    Its last line has an end only if the text ends with a line break. Raises `DataError` for words that the vocabulary has no id for.
    """
    vocabulary = model_data.vocabulary
    spec = get_dataset(dataset or model_data.dataset)
    subwords = vocabulary.unit == "subword"
    lines = subword_lines(text, spec) if subwords else raw_lines(text, spec.name)
    ids = encode_text(lines, spec, vocabulary) if lines else np.array([], dtype=np.int64)
    if (subwords or spec.line_token is not None) and lines and not text.endswith("\n"):
        ids = ids[:-1]
        if subwords and spec.line_padding:  # a blank that begins the next word rather than one that ends the line
            ids = encode_text([*lines[:-1], lines[-1].removesuffix(spec.line_padding)], spec, vocabulary)[:-1]
    unknown = [] if subwords else [token for line in lines for token in line.split() if token not in vocabulary]
    return ids, unknown


def encode_prompt(model_data: ModelData, text: str, *, dataset: str | None) -> tuple[npt.NDArray[np.int64], list[str]]:
    """Tokenise the beginning of a text as `encode_part` does; one without tokens becomes the end of a line, after which a new one begins.

    Raises:
        DataError: there is no token, and the vocabulary has none for the end of a line.
    """
    ids, unknown = encode_part(model_data, text, dataset=dataset)
    eos_id = model_data.vocabulary.eos_id
    if not len(ids):
        if eos_id is None:
            raise DataError("The prompt has no token, so there is nothing to go on from.", remedy="Give some text to `--prompt`.")
        ids = np.array([eos_id], dtype=np.int64)
    return ids, unknown
