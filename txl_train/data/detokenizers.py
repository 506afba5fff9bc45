"""Tokens back to text for people to read, by the rules each data set was built with.

What the rules lost stays lost (curly quotes, text8's capitals), so it is not the exact inverse of `tokenizers`, the other module that
imports sacremoses.
"""

from __future__ import annotations

import codecs
import functools
import importlib
import re
from collections.abc import Callable, Iterable, Sequence

from txl_train.data import bpe
from txl_train.data.datasets import DatasetSpec
from txl_train.data.vocabulary import Vocabulary
from txl_train.errors import EnvironmentUnfitError

_HELD = 2
"""Tokens at the end of a line whose blanks may still change: the first two of `built @-@ in`."""
_INNER_MARK = re.compile(r"(?<=\S) @([-,.])@ (?=\S)")


class Detokenizer:
    """The text of a model's tokens."""

    def __init__(self, spec: DatasetSpec, vocabulary: Vocabulary) -> None:
        self._spec = spec
        self._vocabulary = vocabulary

    def text(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`: words with their marks in place and a line break for each line's end, characters, or bytes as UTF-8.

        Raises `DataError` for an id outside the vocabulary, `EnvironmentUnfitError` where sacremoses is needed and missing.
        """
        return self._text(list(ids), whole=True)

    def stable(self, ids: Iterable[int]) -> str:
        """Return the beginning of `text(ids)` that stays as it is whatever tokens follow."""
        return self._text(list(ids), whole=False)

    def _text(self, ids: Sequence[int], *, whole: bool) -> str:
        unit = self._vocabulary.unit
        tokens = self._vocabulary.decode(ids)
        if unit == "byte":
            return codecs.getincrementaldecoder("utf-8")("replace").decode(bytes(map(int, tokens)), final=whole)
        if unit == "char":
            return "".join(tokens).replace("_", " ")
        if unit == "subword":
            text = bpe.decode(ids)
            if not whole:
                text = text.rstrip("\ufffd")
            if self._spec.layout != "words" or not self._has_marks:
                return text
            lines = text.split("\n")
            done = [self._line(line.split()) for line in lines[:-1]]
            return "\n".join([*done, self._open_line(lines[-1].split(), whole)])
        return self._words(tokens, whole)

    def _words(self, tokens: Sequence[str], whole: bool) -> str:
        end = self._spec.line_token
        lines: list[list[str]] = [[]]
        for token in tokens:
            if token == end:
                lines.append([])
            else:
                lines[-1].append(token)
        done = [self._line(line) for line in lines[:-1]]
        return "\n".join([*done, self._open_line(lines[-1], whole)])

    @property
    def _has_marks(self) -> bool:
        """Whether marks were set apart from words."""
        return self._spec.name != "text"

    def _open_line(self, tokens: Sequence[str], whole: bool) -> str:
        joined = self._joined(tokens)
        return self._shown(joined if whole else joined[: max(0, len(joined) - _HELD)])

    def _line(self, tokens: Sequence[str]) -> str:
        return self._shown(self._joined(tokens))

    def _joined(self, tokens: Sequence[str]) -> list[str]:
        """Put together what was set apart within words and numbers."""
        line = " ".join(tokens)
        return (_INNER_MARK.sub(r"\1", line) if self._has_marks else line).split()

    def _shown(self, joined: Sequence[str]) -> str:
        return _moses()(list(joined), unescape=False) if self._has_marks else " ".join(joined)


@functools.cache
def _moses() -> Callable[..., str]:
    try:
        sacremoses = importlib.import_module("sacremoses")
    except ImportError as error:
        raise EnvironmentUnfitError(
            "Words become text by the Moses rules, which the package sacremoses holds, and it is not installed.",
            remedy="Install it with `pip install sacremoses`, or add `--raw` to see the tokens as they are.",
        ) from error
    detokenize: Callable[..., str] = sacremoses.MosesDetokenizer(lang="en").detokenize
    return detokenize
