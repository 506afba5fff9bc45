"""Raw text to tokens, the way each data set was built, so that text typed by a person can be scored by a model trained on it.

Not for files of a data set: those are tokenised already, and the rules here are not idempotent ("well @-@ known" would be cut again).
The only module that imports sacremoses, for WikiText and One Billion Word.
"""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType

from txl_train.data import pydoc, text8
from txl_train.data.datasets import EOS, UNK, DatasetSpec, get_dataset
from txl_train.errors import EnvironmentUnfitError

PROTECTED = (UNK, EOS, "<formula>", r"@[-,.]@")
"""What the WikiText tokenizer leaves alone (regular expressions)."""

_CURLY_QUOTES = str.maketrans(dict.fromkeys("\u2018\u2019\u201a\u201b", "'") | dict.fromkeys("\u201c\u201d\u201e\u201f", '"'))
_INNER_MARK = re.compile(r"(?<=\d)([.,])(?=\d)")


def tokenize_raw(text: str, dataset: str) -> list[str]:
    """Return the tokens of raw text, made by the rule of `dataset`; line breaks are treated like blanks, and no `<eos>` is added.

    wt103: Moses with WikiText's ` @-@ `, ` @,@ `, ` @.@ `. lm1b: Moses. pydoc: the built-in corpus' words. text: blanks separate. text8:
    27 characters with `_` for a blank. enwik8: UTF-8 bytes as decimal values, line breaks included. A `ConfigError` for an unknown
    data set, an `EnvironmentUnfitError` where sacremoses is needed and missing.
    """
    return _RULES[get_dataset(dataset).name](text)


def raw_lines(text: str, dataset: str) -> list[str]:
    """Return raw text as the lines of a prepared file of `dataset`: tokens with blanks between, for `corpus.encode_text`.

    One line for each line of the text; text8 has one line only.
    """
    if dataset == "text8":
        return [" ".join(tokenize_raw(text, dataset))]
    lines = text.split("\n") if dataset == "enwik8" else text.splitlines()
    return [" ".join(tokenize_raw(line, dataset)) for line in lines]


def subword_lines(text: str, spec: DatasetSpec) -> list[str]:
    """Return raw text as the lines that a model of subwords was trained on: its data set's tokens with blanks between, or as it is.

    A data set whose tokens are what stands between blanks (text) was not tokenised, so nothing is changed.
    """
    if _RULES[spec.name] is str.split:
        return text.splitlines()
    return [f"{spec.line_padding}{line}{spec.line_padding}" for line in raw_lines(text, spec.name)]


def raw_line(line: str, spec: DatasetSpec, *, subwords: bool) -> str:
    """Return one line of raw text as a prepared file of a data set has it: one line, whatever in it Unicode takes for the end of one.

    Not for text8, whose lines are one text.
    """
    if subwords and _RULES[spec.name] is str.split:
        return line
    padding = spec.line_padding if subwords else ""
    return f"{padding}{' '.join(tokenize_raw(line, spec.name))}{padding}"


def tokenized(lines: Iterable[str], spec: DatasetSpec) -> Iterator[str]:
    """Yield raw text, given line by line with its line breaks, as it is written in a prepared file of a data set: pieces to be joined.

    One line for each line of the text; text8 has one line only. Nothing is held but a line.
    """
    if spec.layout == "text8":
        blank = started = False
        for line in lines:
            letters = _letters(line)
            if body := letters.strip():
                if started:
                    yield " _ " if blank or letters.startswith(" ") else " "
                yield " ".join(body.replace(" ", "_"))
                started, blank = True, False
            blank = blank or letters.endswith(" ")
        return
    for line in lines:
        text = line.removesuffix("\n")
        yield f"{spec.line_padding}{' '.join(tokenize_raw(text, spec.name))}{spec.line_padding}"
        if text != line:
            yield "\n"


def _wikitext(text: str) -> list[str]:
    """Tokenise as WikiText was: Moses, line by line, then marks inside numbers set apart."""
    tokens: list[str] = []
    for line in text.translate(_CURLY_QUOTES).splitlines():
        for token in _moses()(line, aggressive_dash_splits=True, escape=False, protected_patterns=list(PROTECTED)):
            tokens.extend(_INNER_MARK.sub(r" @\1@ ", token).split() if token[0].isdigit() else [token])
    return tokens


def _lm1b(text: str) -> list[str]:
    """Tokenise as One Billion Word was: Moses, line by line; that text has no curly quotes."""
    return [token for line in text.translate(_CURLY_QUOTES).splitlines() for token in _moses()(line, escape=False)]


@functools.cache
def _moses() -> Callable[..., list[str]]:
    try:
        sacremoses = importlib.import_module("sacremoses")
    except ImportError as error:
        raise EnvironmentUnfitError(
            "Raw text becomes tokens by the Moses rules, which the package sacremoses holds, and it is not installed.",
            remedy="Install it with `pip install sacremoses`, or give text that is tokenised already.",
        ) from error
    tokenize: Callable[..., list[str]] = sacremoses.MosesTokenizer(lang="en").tokenize
    return tokenize


def _text8(text: str) -> list[str]:
    """Keep 27 characters, as Mahoney's filter does: lower case, digits spelt out, anything else a blank; runs of blanks are one."""
    return list(_letters(text).strip().replace(" ", "_"))


def _letters(text: str) -> str:
    return text8.letters(text.encode("utf-8", "replace")).decode()


def _enwik8(text: str) -> list[str]:
    return [str(value) for value in text.encode("utf-8", "surrogateescape")]


_RULES: Mapping[str, Callable[[str], list[str]]] = MappingProxyType(
    {"wt103": _wikitext, "lm1b": _lm1b, "pydoc": pydoc.tokenize, "text": str.split, "text8": _text8, "enwik8": _enwik8}
)
