"""How the files of the data sets are written, and how a portion of one becomes tokens.

- words: tokens separated by blanks; every line, also an empty one, ends with `<eos>` (One Billion Word: `<S>`, which also begins the
  text); case is kept.
- text8: one-character tokens separated by blanks, `_` for a blank, line breaks mean nothing (what prep_text8 writes); or raw: the
  letters a-z and blanks, no line break inside.
- enwik8: decimal byte values separated by blanks, a line break for byte 10 (what prep_enwik8 writes); or raw bytes.
- words, read by GPT-2's BPE: the text of each line as it is, then a token for its line break; nothing is lost but a byte order mark.

Prepared or raw is decided on the first 64 KiB of each file, see `detect_form`; a file that could be either is an error.

A `Rule` holds what of this applies to one file, as plain values, so that it can be handed to another process. Tokens are numbered here in
the order in which they appear; what ids they get is for others to say (`txl_train.data.corpus`), as is who reads which portion of a file
(`txl_train.data.scan`).
"""

from __future__ import annotations

import itertools
import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from txl_train.data import bpe
from txl_train.data.datasets import DatasetSpec, Layout
from txl_train.errors import DataError

Form = Literal["prepared", "raw"]
Kind = Literal["words", "symbols", "letters", "bytes", "subwords"]
Numbers = npt.NDArray[np.int32]

CHUNK_BYTES = 1 << 18
"""Bytes read at a time: bounds the memory that reading takes, and lets what is worked on stay in the processor's cache."""
SAMPLE_BYTES = 1 << 16
"""Bytes of a text8 or enwik8 file on which its form is decided."""

TEXT8_LETTERS = frozenset("abcdefghijklmnopqrstuvwxyz")
BYTE_TOKENS: tuple[str, ...] = tuple(str(value) for value in range(256))
NEWLINE_TOKEN = "10"
"""The byte 10 as a token of enwik8."""

_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Rule:
    """How one file becomes tokens."""

    kind: Kind
    """words; symbols (prepared text8 or enwik8); letters (raw text8); bytes (raw enwik8); subwords."""
    layout: Layout
    """Of the data set, for messages."""
    line_break: str = " "
    """What a line break becomes among words and symbols, with blanks around."""
    line_token: str | None = None
    """The token that ends every line, also a last one without a line break."""
    opening: bool = False
    """That token also begins the text."""

    @property
    def can_be_divided(self) -> bool:
        """True if portions of a file can be read independently."""
        return self.kind in ("words", "symbols", "subwords")


@dataclass(frozen=True)
class Portion:
    """A range of a file's bytes that begins and ends between tokens."""

    start: int
    end: int
    size: int
    """Bytes of the whole file."""

    @property
    def is_first(self) -> bool:
        """True if the file begins here."""
        return self.start == 0

    @property
    def is_last(self) -> bool:
        """True if the file ends here."""
        return self.end == self.size


@dataclass
class Found:
    """What reading a portion brought to light; filled while it is read."""

    numbers: defaultdict[str, int] = field(default_factory=lambda: defaultdict(itertools.count().__next__))
    """Each token's number, in the order of first appearance; empty for subwords, which have ids of their own."""
    n_plain: int = 0
    """Tokens that do not stand for a line's end."""
    n_words: int = 0
    """Words and line ends; 0 where a token is a character or a byte."""


def rule_of(path: Path, spec: DatasetSpec, *, subwords: bool = False) -> Rule:
    """Return how the file `path` of data set `spec` becomes tokens; a `DataError` where it is not written as the data set says."""
    if subwords:
        return Rule(kind="subwords", layout=spec.layout, opening=spec.line_end == "sentence")
    if spec.layout == "words":
        return Rule(
            kind="words",
            layout=spec.layout,
            line_break=f" {spec.line_token} ",
            line_token=spec.line_token,
            opening=spec.line_end == "sentence",
        )
    if detect_form(path, spec) == "prepared":
        return Rule(kind="symbols", layout=spec.layout, line_break=" " if spec.layout == "text8" else f" {NEWLINE_TOKEN} ")
    return Rule(kind="letters" if spec.layout == "text8" else "bytes", layout=spec.layout)


def tokenizer_id(spec: DatasetSpec, *, subwords: bool = False) -> str:
    """Name the rule that turns the files of `spec` into tokens, with its version: part of every cache key."""
    return f"{'gpt2' if subwords else spec.layout}-{spec.line_end}/1"


def detect_form(path: Path, spec: DatasetSpec) -> Form:
    """Say whether a text8 or enwik8 file is "prepared" or "raw", judging by its first 64 KiB.

    text8: prepared if all blank-separated pieces are single characters and `_` is among them; raw if there are only a-z and
    blanks, with a piece longer than one letter. enwik8: prepared if all pieces are decimal numbers 0..255; raw if at most half are.
    Anything else is a `DataError`.
    """
    try:
        with path.open("rb") as file:
            sample = file.read(SAMPLE_BYTES + 1)
    except OSError as error:
        raise unreadable(path, error) from error
    if len(sample) > SAMPLE_BYTES:  # drop the last piece, which may be cut
        sample = sample[: max(sample.rfind(b" "), sample.rfind(b"\n")) + 1] or sample
    pieces = sample.decode("utf-8", "replace").split()
    if spec.layout == "text8":
        if pieces and all(len(piece) == 1 for piece in pieces):
            if "_" in pieces or len(pieces) == 1:
                return "prepared"
            raise DataError(
                f"{path} may be text8 as prep_text8 writes it or raw: its first {len(pieces)} pieces are single characters, none is `_`.",
                remedy="Write characters with blanks between and `_` for a blank, as prep_text8 does.",
            )
        if pieces and all(TEXT8_LETTERS.issuperset(piece) for piece in pieces):
            return "raw"
        raise DataError(
            f"{path} is neither text8 as prep_text8 writes it (single characters, blanks between, `_` for a blank) "
            "nor raw text8 (only the letters a-z and blanks).",
            remedy="Put the text through text8's filter (27 characters) first, `txl data prepare text8 --source FILE`; "
            "for bytes of any kind use `--dataset enwik8`.",
        )
    n_numbers = sum(map(frozenset(BYTE_TOKENS).__contains__, pieces))
    if pieces and n_numbers == len(pieces):
        return "prepared"
    if 2 * n_numbers <= len(pieces):
        return "raw"
    raise DataError(
        f"{path} may be enwik8 as prep_enwik8 writes it or raw bytes: {n_numbers} of its first {len(pieces)} pieces are numbers 0 to 255.",
        remedy="Write every byte as its decimal value with blanks between (a line break for byte 10), as prep_enwik8 does.",
    )


def read(path: Path, rule: Rule, portion: Portion, found: Found) -> Iterator[Numbers]:
    """Yield the tokens of a portion of a file as numbers, [n] int32 at a time, and fill in `found`.

    Numbers count the different tokens in the order of first appearance; subwords have GPT-2's ids. A `DataError` names the file and
    line of text that cannot be read.
    """
    reader: Callable[[Path, Rule, Portion, Found], Iterator[Numbers]] = {
        "words": _read_words,
        "symbols": _read_words,
        "letters": _read_letters,
        "bytes": _read_bytes,
        "subwords": _read_subwords,
    }[rule.kind]
    yield from reader(path, rule, portion, found)


def check_symbols(path: Path, rule: Rule, symbols: list[str]) -> None:
    """Raise a `DataError` for the first of the different tokens of a prepared file that cannot be one of text8 or enwik8."""
    if rule.kind != "symbols":
        return
    known = frozenset(BYTE_TOKENS)
    for symbol in symbols:
        if symbol not in known if rule.layout == "enwik8" else len(symbol) != 1:
            expected = "a single character" if rule.layout == "text8" else "a number 0 to 255"
            raise DataError(
                f"{path}, line {line_of(path, symbol)}: `{shortened(symbol)}` is no token of {rule.layout} as the beginning of the file "
                f"is written; expected is {expected}.",
                remedy=f"Write the file again with prep_{rule.layout}, or give the raw file throughout.",
            )


def _read_words(path: Path, rule: Rule, portion: Portion, found: Found) -> Iterator[Numbers]:
    number = found.numbers.__getitem__
    n_tokens = n_breaks = 0
    if rule.opening and rule.line_token is not None and portion.is_first:
        yield np.array([number(rule.line_token)], dtype=np.int32)
    text = ""
    for block in _blocks(path, portion, _after_blank):
        text = _decoded(path, block)
        if "\r" in text:
            text = text.replace("\r\n", "\n").replace("\r", "\n")
        tokens = (text.lower() if rule.layout == "text8" else text).replace("\n", rule.line_break).split()
        n_tokens += len(tokens)
        n_breaks += text.count("\n")
        yield np.fromiter(map(number, tokens), dtype=np.int32, count=len(tokens))
    if rule.line_token is not None and portion.is_last and not text.endswith("\n"):
        n_tokens, n_breaks = n_tokens + 1, n_breaks + 1
        yield np.array([number(rule.line_token)], dtype=np.int32)
    found.n_plain = n_tokens - (n_breaks if rule.line_token is not None else 0)
    found.n_words = n_tokens if rule.kind == "words" else 0


def _read_subwords(path: Path, rule: Rule, portion: Portion, found: Found) -> Iterator[Numbers]:
    encode = bpe.encoder()
    ends_open = False
    if rule.opening and portion.is_first:
        yield np.array([bpe.NEWLINE_ID], dtype=np.int32)
    for block in _blocks(path, portion, _before_blank):
        lines = _decoded(path, block).split("\n")
        ids: list[int] = []
        for line in lines[:-1]:
            ids += encode(line)
            ids.append(bpe.NEWLINE_ID)
        ids += encode(lines[-1])
        n_words = sum(len(line.split()) for line in lines)
        found.n_plain += n_words
        found.n_words += n_words + len(lines) - 1
        ends_open = bool(lines[-1])
        yield np.array(ids, dtype=np.int32)
    if portion.is_last and ends_open:
        found.n_words += 1  # as among words, where a last line without a line break has an end too
        if rule.opening:
            yield np.array([bpe.NEWLINE_ID], dtype=np.int32)


def _read_letters(path: Path, rule: Rule, portion: Portion, found: Found) -> Iterator[Numbers]:
    """Yield single letters and `_`; blanks and line breaks at both ends of the file do not count, as in prep_text8."""
    pending = b""
    started = False
    table = _ByteTable(found, lambda value: "_" if value == ord(" ") else chr(value))
    for block in _blocks(path, portion, len):
        text = pending + block
        if not started:
            text = text.lstrip(b" \r\n")
            started = bool(text)
        body = text.rstrip(b" \r\n")
        pending = text[len(body) :]
        foreign = body.translate(None, b" abcdefghijklmnopqrstuvwxyz")
        if foreign:
            character = min(foreign.decode("utf-8", "replace").replace("\r", "\n"))
            raise DataError(
                f"{path}, line {line_of(path, character, within=True)}: raw text8 has only the letters a-z and blanks, "
                f"but here is {'a line break' if character == chr(10) else repr(character)}.",
                remedy="Put the text through text8's filter (27 characters, one line) first: `txl data prepare text8 --source FILE`.",
            )
        yield table(body)


def _read_bytes(path: Path, rule: Rule, portion: Portion, found: Found) -> Iterator[Numbers]:
    table = _ByteTable(found, BYTE_TOKENS.__getitem__)
    for block in _blocks(path, portion, len, keep_mark=True):
        yield table(block)


class _ByteTable:
    """Numbers bytes in the order of first appearance, all of a block at once."""

    def __init__(self, found: Found, name: Callable[[int], str]) -> None:
        self._found = found
        self._name = name
        self._number = np.full(256, -1, dtype=np.int32)

    def __call__(self, block: bytes) -> Numbers:
        values = np.frombuffer(block, dtype=np.uint8)
        self._found.n_plain += len(values)
        new = np.flatnonzero((np.bincount(values, minlength=256) > 0) & (self._number < 0))
        for value in sorted(new.tolist(), key=block.index):
            self._number[value] = self._found.numbers[self._name(value)]
        numbers: Numbers = self._number[values]
        return numbers


# --- bytes of a file ---------------------------------------------------------------------------------------------------------------


def portions(path: Path, rule: Rule, n: int) -> list[Portion]:
    """Divide a file into at most `n` portions of about one size that can be read independently."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            points = [0]
            for k in range(1, n if rule.can_be_divided else 1):
                target = size * k // n
                file.seek(target)
                window = file.read(CHUNK_BYTES)
                cut = window.find(b"\n") + 1 or (_before_blank if rule.kind == "subwords" else _after_blank)(window)
                if cut and target + cut > points[-1]:
                    points.append(target + cut)
    except OSError as error:
        raise unreadable(path, error) from error
    ends = [*(point for point in points[1:] if point < size), size]
    return [Portion(start, end, size) for start, end in zip([0, *ends], ends)]


def _blocks(path: Path, portion: Portion, last_cut: Callable[[bytes], int], *, keep_mark: bool = False) -> Iterator[bytes]:
    """Yield the bytes of a portion in blocks that end where `last_cut` says (0: nowhere in this one); the last one ends where it ends.

    A byte order mark at the beginning of the file is left out, unless it is to be kept.
    """
    rest: list[bytes] = []
    try:
        with path.open("rb") as file:
            if portion.is_first and not keep_mark and file.read(len(_BOM)) == _BOM:
                left = portion.end - len(_BOM)
            else:
                file.seek(portion.start)
                left = portion.end - portion.start
            while left and (block := file.read(min(CHUNK_BYTES, left))):
                left -= len(block)
                cut = last_cut(block)
                if cut:
                    yield b"".join([*rest, block[:cut]])
                    rest = []
                rest.append(block[cut:])
    except OSError as error:
        raise unreadable(path, error) from error
    if any(rest):
        yield b"".join(rest)


def _after_blank(block: bytes) -> int:
    """Return where the block can be cut between words: after its last blank or line break."""
    return max(block.rfind(b" "), block.rfind(b"\n")) + 1


def _before_blank(block: bytes) -> int:
    """Return where the block can be cut between subwords: after its last line break, or before a blank that begins a later word.

    A blank belongs to the word after it, unless it stands among others; before a single one there is always a border.
    """
    cut = block.rfind(b"\n") + 1
    end = len(block) - 1  # what comes after the blank must be seen
    while (blank := block.rfind(b" ", cut + 1, end)) > 0:
        if 0x20 < block[blank - 1] < 0x7F:
            return blank
        end = blank
    return cut


def _decoded(path: Path, block: bytes) -> str:
    try:
        return block.decode()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}, line {_undecodable_line(path)}: not UTF-8 text ({error.reason}).", remedy="Convert the file to UTF-8."
        ) from error


# --- what is said of a file that cannot be read --------------------------------------------------------------------------------------


def line_of(path: Path, token: str, *, within: bool = False) -> int:
    """Return the number, from 1, of the first line that holds `token` (or the character, `within` a word)."""
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if token in line if within else token in line.split() or token in line.lower().split():
                return number
    return 1


def shortened(token: str, limit: int = 60) -> str:
    """Return a token as it is shown in a message."""
    return token if len(token) <= limit else token[:limit] + "..."


def unreadable(path: Path, error: OSError) -> DataError:
    """Return the error for a file that cannot be read."""
    return DataError(f"{path} cannot be read: {error.strerror or error}.")


def _undecodable_line(path: Path) -> int:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return number
    return 1
