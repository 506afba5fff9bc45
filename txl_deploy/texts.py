"""Files of text as units to be scored: lines, documents or whole files, as the ids of a model.

A unit's first token has a predecessor only if it is given one: the end of a line, as if one had ended before (`context` eos).
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import numpy.typing as npt

from txl_deploy.corpora import ModelData
from txl_train.data.corpus import encode_text
from txl_train.data.datasets import get_dataset
from txl_train.data.tokenizers import raw_line, raw_lines
from txl_train.errors import DataError

Per = Literal["line", "document", "file"]
Context = Literal["eos", "none"]


@dataclass(frozen=True)
class TextUnit:
    """Where a unit is from, and what of it the model does not know."""

    file: str
    index: int
    """Number of the unit in its file, from 0."""
    line: int
    """Its first line, from 1."""
    n_oov: int
    n_words: int
    """Tokens of the text, which the share of unknown ones refers to: without ends of lines."""


class Texts:
    """Reads files for one model."""

    def __init__(self, model_data: ModelData, *, dataset: str | None, per: Per, context: Context, tokenized: bool) -> None:
        self._vocabulary = model_data.vocabulary
        self._spec = get_dataset(dataset or model_data.dataset)
        self._per = per
        self._tokenized = tokenized
        self._reads_bytes = self._spec.unit == "byte" and not tokenized
        eos_id = self._vocabulary.eos_id
        begins = self._spec.line_end == "sentence"  # such a text begins with the token of a line's end by itself
        self._before = [eos_id] if context == "eos" and eos_id is not None and not begins else []

    @property
    def context(self) -> Context:
        """What stands before a unit, as far as the vocabulary has it."""
        return "eos" if self._before or self._spec.line_end == "sentence" else "none"

    def units(self, files: Iterable[Path]) -> Iterator[tuple[TextUnit, npt.NDArray[np.int64]]]:
        """Yield the units of all files with their ids (int64 [N]); a file named `-` is standard input, read as it comes.

        Raises `DataError` naming file and line for what is not UTF-8 or holds words that the vocabulary has no id for, and for a file that
        cannot be read.
        """
        for path in files:
            name = str(path)
            with self._opened(path) as file:
                for index, (line, lines) in enumerate(self._grouped(self._lines(file, name))):
                    yield self._unit(name, index, line, lines)

    @contextlib.contextmanager
    def _opened(self, path: Path) -> Iterator[BinaryIO]:
        if str(path) == "-":
            with _standard_input() as file:
                yield file
            return
        try:
            file = path.open("rb")
        except OSError as error:
            raise DataError(f"The text {path} cannot be read: {error.strerror}.") from error
        with file:
            yield file

    def _lines(self, file: BinaryIO, name: str) -> Iterator[str]:
        for number, data in enumerate(iter(file.readline, b""), 1):
            if self._reads_bytes:
                yield data.decode("utf-8", "surrogateescape").removesuffix("\n")
                continue
            try:
                yield data.decode("utf-8").removesuffix("\n").removesuffix("\r")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"Line {number} of {name} is not UTF-8: {error.reason} at byte {error.start}.",
                    remedy="Give text, and convert what is in another encoding: `iconv -t utf-8`.",
                ) from error

    def _grouped(self, lines: Iterable[str]) -> Iterator[tuple[int, list[str]]]:
        """Yield the number of the first line and the lines of each unit."""
        if self._per == "line":
            for number, line in enumerate(lines, 1):
                yield number, [line]
            return
        group: list[str] = []
        first = 1
        for number, line in enumerate(lines, 1):
            if self._per == "document" and not line.strip():
                if group:
                    yield first, group
                group = []
                continue
            if not group:
                first = number
            group.append(line)
        if group or self._per == "file":
            yield first, group

    def _unit(self, name: str, index: int, line: int, lines: list[str]) -> tuple[TextUnit, npt.NDArray[np.int64]]:
        vocabulary, spec = self._vocabulary, self._spec
        subwords = vocabulary.unit == "subword"
        if not self._tokenized:
            whole = spec.layout == "text8"
            lines = raw_lines("\n".join(lines), spec.name) if whole else [raw_line(text, spec, subwords=subwords) for text in lines]
        words = [token for tokens in lines for token in tokens.split()]
        n_oov = 0 if subwords else sum(token not in vocabulary for token in words)
        try:
            ids_N = encode_text(lines, spec, vocabulary)
        except DataError as error:
            raise DataError(f"{name}, line {line}: {error.message}", remedy=error.remedy) from error
        before = self._before if lines else []  # an empty file has nothing to be scored
        return TextUnit(name, index, line, n_oov, len(words)), np.concatenate([np.array(before, dtype=np.int64), ids_N])


def _standard_input() -> contextlib.AbstractContextManager[BinaryIO]:
    """Open standard input once more: a thread that waits in `sys.stdin` holds its lock, and Python aborts where it needs that to end."""
    if sys.stdin is None:
        raise DataError("There is no standard input to read.")
    try:
        number = sys.stdin.fileno()
    except OSError:  # a stand-in without a file
        return contextlib.nullcontext(sys.stdin.buffer)
    return open(number, "rb", closefd=False)
