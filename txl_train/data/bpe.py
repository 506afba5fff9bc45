"""GPT-2's byte-pair encoding: 50,257 subwords, from the merges that lie beside this file. Nothing is ever downloaded.

Any text can be encoded, and comes back as it was. The numbers are GPT-2's: 256 bytes, 50,000 merges in the order in which they were
made, and `<|endoftext|>`, which stands in no text here. A line break among other blanks can be part of a larger token; the files of a
data set are encoded line by line (`txl_train.data.layouts`), so that there it never is.

The only module that imports tiktoken.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import re
from collections.abc import Callable, Iterable
from importlib import resources
from typing import TYPE_CHECKING, Any

from txl_train.data.vocabulary import Vocabulary
from txl_train.errors import EnvironmentUnfitError

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

MERGES_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
SIZE = 50_257
"""Tokens in the vocabulary."""
END_OF_TEXT = "<|endoftext|>"
NEWLINE_ID = 198
"""The token of a line break."""

_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
"""What a text is cut into before it is merged: contractions, words, numbers, other marks, blanks (Radford et al. 2019)."""
_LONGEST_RUN = 100_000
_LONG_RUN = re.compile(rf"(\s{{{_LONGEST_RUN}}})")
"""So many blanks are encoded by themselves: tiktoken's stack overflows at a million in a row."""


def encoder() -> Callable[[str], list[int]]:
    """Return the function that turns text into ids; an `EnvironmentUnfitError` where tiktoken is missing."""
    encode: Callable[[str], list[int]] = _encoding().encode_ordinary

    def encode_any(text: str) -> list[int]:
        if len(text) < _LONGEST_RUN:
            return encode(text)
        return [i for piece in _LONG_RUN.split(text) for i in encode(piece)]

    return encode_any


def decode(ids: Iterable[int]) -> str:
    """Return the text of ids; bytes that are no UTF-8, where a character was cut, become U+FFFD."""
    text: str = _encoding().decode(list(map(int, ids)), errors="replace")
    return text


@functools.cache
def vocabulary() -> Vocabulary:
    """Return the 50,257 tokens as GPT-2's own files write them: each byte one printable character, `\\u0120` for a blank."""
    first_bytes = [_WRITTEN[value] for value in _BYTE_ORDER]
    return Vocabulary([*first_bytes, *(a + b for a, b in _merges()), END_OF_TEXT], unit="subword")


def is_gpt2(other: Vocabulary) -> bool:
    """True if `other` has GPT-2's tokens under GPT-2's ids; others may follow (NVIDIA fills up to a multiple of 8), no text has them."""
    return other.unit == "subword" and other.symbols[:SIZE] == vocabulary().symbols


def _byte_order() -> list[int]:
    """The bytes in the order of their ids: first those that Latin-1 prints, then the rest."""
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return printed + [value for value in range(256) if value not in set(printed)]


_BYTE_ORDER = _byte_order()
_N_PRINTED = 188
_WRITTEN = {value: chr(value) if place < _N_PRINTED else chr(256 + place - _N_PRINTED) for place, value in enumerate(_BYTE_ORDER)}
"""How each byte is written in GPT-2's files."""


@functools.cache
def _merges() -> tuple[tuple[str, str], ...]:
    return read_merges(resources.files("txl_train.data").joinpath("gpt2", "vocab.bpe"))


def read_merges(file: Traversable) -> tuple[tuple[str, str], ...]:
    """Return GPT-2's merges; an `EnvironmentUnfitError` where the file is gone, or a byte of it is another one."""
    try:
        content = file.read_bytes()
    except OSError as error:
        raise EnvironmentUnfitError(f"GPT-2's merges cannot be read: {error}.", remedy="Install txl again.") from error
    if hashlib.sha256(content).hexdigest() != MERGES_SHA256:
        raise EnvironmentUnfitError(
            "GPT-2's merges (txl_train/data/gpt2/vocab.bpe) are not as they were when txl was installed: their sha256 is another.",
            remedy="Install txl again.",
        )
    lines = content.decode().split("\n")[1:-1]
    return tuple((first, second) for first, _, second in (line.partition(" ") for line in lines))


@functools.cache
def _encoding() -> Any:
    try:
        tiktoken = importlib.import_module("tiktoken")
    except ImportError as error:
        raise EnvironmentUnfitError(
            "GPT-2's subwords are made by the package tiktoken, and it is not installed.",
            remedy="Install it with `pip install tiktoken`, or train on words with `--vocab word`.",
        ) from error
    value_of = {written: value for value, written in _WRITTEN.items()}
    ranks = {bytes([value]): place for place, value in enumerate(_BYTE_ORDER)}
    for first, second in _merges():
        ranks[bytes(value_of[character] for character in first + second)] = len(ranks)
    return tiktoken.Encoding("gpt2", pat_str=_PATTERN, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: SIZE - 1}, explicit_n_vocab=SIZE)
