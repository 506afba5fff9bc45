"""A folder of text as token ids: reads the files by their data set's rules, builds the vocabulary, keeps the ids on disk.

Knows how each layout is written:

- words: tokens separated by blanks; every line, also an empty one, ends with `<eos>`; case is kept.
- text8: one-character tokens separated by blanks, `_` for a blank, line breaks mean nothing (what prep_text8 writes); or raw: the
  letters a-z and blanks, no line break inside.
- enwik8: decimal byte values separated by blanks, a line break for byte 10 (what prep_enwik8 writes); or raw bytes.

Prepared or raw is decided on the first 64 KiB of each file, see `detect_form`; a file that could be either is an error.

The ids are computed once and then memory-mapped. The cache is keyed by the text's hash, the tokenizer's version and the vocabulary's
hash, so a changed text never meets old ids, and every opened entry is checked (size, header, checksum of the ids): a damaged one is
built anew. Leaves batches to `txl_train.data.segments` and raw prose to `txl_train.data.tokenizers`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from txl_train.data.datasets import EOS, SPLITS, DatasetSpec, check_folder
from txl_train.data.vocabulary import MISSING, Vocabulary
from txl_train.errors import ConfigError, DataError, EnvironmentUnfitError, nearest
from txl_train.files import file_sha256, whole_or_absent

IdArray = npt.NDArray[np.integer[Any]]
Form = Literal["prepared", "raw"]

CHUNK_CHARS = 1 << 20
"""Characters read at a time: bounds the memory that counting and encoding take."""
SAMPLE_BYTES = 1 << 16
"""Bytes of a text8 or enwik8 file on which its form is decided."""

TEXT8_LETTERS = frozenset("abcdefghijklmnopqrstuvwxyz")
BYTE_TOKENS: tuple[str, ...] = tuple(str(value) for value in range(256))
NEWLINE_TOKEN = "10"
"""The byte 10 as a token of enwik8."""


def default_cache_dir() -> Path:
    """Return the folder of the token cache: TXL_CACHE_DIR, else XDG_CACHE_HOME/txl, else ~/.cache/txl."""
    if folder := os.environ.get("TXL_CACHE_DIR"):
        return Path(folder)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "txl"


# --- the corpus --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Entry:
    """One split's ids, mapped, with what the cache's header says of them."""

    ids: IdArray
    n_unknown: int


class Corpus:
    """The splits of one folder as token ids. A split's text is read when it is first asked for; made by `load_corpus`."""

    def __init__(self, directory: Path, spec: DatasetSpec, vocabulary: Vocabulary, *, cache_dir: Path, sha256s: dict[str, str]) -> None:
        self.directory = directory
        self.spec = spec
        self.vocabulary = vocabulary
        self._cache_dir = cache_dir
        self._sha256s = dict(sha256s)
        self._entries: dict[str, _Entry] = {}

    def ids(self, split: str) -> IdArray:
        """Return the ids of a split, [N], read-only and memory-mapped: uint16 for up to 65,536 tokens in the vocabulary, else int32.

        A `DataError` where the file is missing, empty, wrongly written, or holds a token without an id; an `EnvironmentUnfitError`
        where the cache cannot be written.
        """
        return self._entry(split).ids

    def n_tokens(self, split: str) -> int:
        """Return the number of tokens of a split, `<eos>` included."""
        return len(self._entry(split).ids)

    def oov(self, split: str) -> int:
        """Return how many tokens of a split the vocabulary lacks and `<unk>` stands for; `<unk>` written in the text is not among them."""
        return self._entry(split).n_unknown

    def sha256(self, split: str) -> str:
        """Return the hash of a split's text file, hexadecimal."""
        if split not in self._sha256s:
            self._sha256s[split] = _text_sha256(self._path(split))
        return self._sha256s[split]

    def _path(self, split: str) -> Path:
        if split not in self.spec.files:
            raise ConfigError(
                f"`{split}` is no split.{nearest(split, self.spec.files)}", remedy=f"Choose one of {', '.join(self.spec.files)}."
            )
        return check_folder(self.directory, self.spec, [split])[split]

    def _entry(self, split: str) -> _Entry:
        if split not in self._entries:
            path = self._path(split)
            key = IdCacheKey(text_sha256=self.sha256(split), tokenizer=self.spec.tokenizer_id, vocabulary_sha256=self.vocabulary.sha256)
            cached = self._cache_dir / f"{key.digest}.ids"
            entry = _open_ids(cached, key)
            if entry is None:
                with _remedy_of_cache(self._cache_dir):
                    _write_ids(cached, key, path, self.spec, self.vocabulary)
                entry = _open_ids(cached, key)
                if entry is None:
                    raise EnvironmentUnfitError(
                        f"The token cache {cached} cannot be read back as it was written.",
                        remedy="Check the disk, or set TXL_CACHE_DIR to a folder on another one.",
                    )
            self._entries[split] = entry
        return self._entries[split]


def load_corpus(
    directory: Path | str,
    spec: DatasetSpec,
    *,
    cache_dir: Path | str | None = None,
    vocabulary: Vocabulary | None = None,
    min_count: int = 1,
) -> Corpus:
    """Open the folder of a data set.

    Without a `vocabulary` (training) all splits must be there, and the vocabulary is counted as the spec says; words seen fewer than
    `min_count` times become `<unk>`. With one (from a checkpoint) it is used as it is, `min_count` means nothing, and only
    those splits must be there that are asked for later. `cache_dir` defaults to `default_cache_dir()`.

    Raises `DataError` for a folder, file or vocabulary that does not fit, `ConfigError` for a `min_count` the data set cannot honour.
    """
    directory = Path(directory)
    cache = default_cache_dir() if cache_dir is None else Path(cache_dir)
    if vocabulary is not None:
        check_folder(directory, spec, [])
        check_vocabulary(vocabulary, spec)
        return Corpus(directory, spec, vocabulary, cache_dir=cache, sha256s={})
    if min_count < 1 or (min_count > 1 and not spec.maps_unknown):
        raise ConfigError(
            f"`min_count` must be 1 for data set `{spec.name}`, but is {min_count} instead.",
            remedy="`--dataset text` replaces rare words by <unk>." if min_count > 1 else None,
        )
    paths = check_folder(directory, spec)
    sha256s = {split: _text_sha256(path) for split, path in paths.items()}
    counted = [split for split in SPLITS if split in spec.counted_splits]
    key = ["vocabulary/1", spec.tokenizer_id, spec.unit, spec.maps_unknown, min_count, *(sha256s[split] for split in counted)]
    cached = cache / f"{_digest(key)}.vocab.json"
    vocabulary = _load_cached_vocabulary(cached)
    if vocabulary is None:
        vocabulary = count_vocabulary([paths[split] for split in counted], spec, min_count=min_count)
        with _remedy_of_cache(cache):
            vocabulary.save(cached)
    return Corpus(directory, spec, vocabulary, cache_dir=cache, sha256s=sha256s)


def check_vocabulary(vocabulary: Vocabulary, spec: DatasetSpec) -> None:
    """Raise a `DataError` unless `vocabulary` can hold the tokens of data set `spec`."""
    if vocabulary.unit != spec.unit:
        raise DataError(
            f"The vocabulary is one of {vocabulary.unit}s, but data set `{spec.name}` is made of {spec.unit}s.",
            remedy="Give the data set that the model was trained on with `--dataset`.",
        )
    if spec.line_end == "eos" and vocabulary.eos_id is None:
        raise DataError(
            f"The vocabulary has no token `{EOS}`, which ends every line of data set `{spec.name}`.",
            remedy="Give the data set that the model was trained on with `--dataset`.",
        )


def count_vocabulary(paths: Sequence[Path], spec: DatasetSpec, *, min_count: int = 1) -> Vocabulary:
    """Count the tokens of `paths` in order, as a stream, and return their vocabulary.

    Order: `<eos>` (where lines end with it), then tokens by descending count, ties by first appearance.
    """
    counts: Counter[str] = Counter()
    for path in paths:
        for tokens in read_tokens(path, spec):
            counts.update(tokens)
    specials = (EOS,) if spec.line_end == "eos" else ()
    return Vocabulary.from_counts(counts, unit=spec.unit, specials=specials, min_count=min_count, maps_unknown=spec.maps_unknown)


def encode_text(lines: Iterable[str], spec: DatasetSpec, vocabulary: Vocabulary) -> npt.NDArray[np.int64]:
    """Return the ids of tokenised lines held in memory, int64 [N].

    Lines carry no line break and are written as in the data set's prepared files: tokens separated by blanks (`txl_train.data.
    tokenizers.raw_lines` makes them of raw text). Line ends become what the spec says: `<eos>` after every line, the byte 10
    between two lines, or nothing. A token without an id becomes `<unk>`, or is a `DataError` where there is none.
    """
    check_vocabulary(vocabulary, spec)
    tokens: list[str] = []
    for i, line in enumerate(lines):
        if i and spec.line_end == "byte" and NEWLINE_TOKEN in vocabulary:
            tokens.append(NEWLINE_TOKEN)
        tokens.extend(line.split())
        if spec.line_end == "eos":
            tokens.append(EOS)
    return vocabulary.encode(tokens)


def _text_sha256(path: Path) -> str:
    """Return the sha256 of a text file; a `DataError` where it cannot be read."""
    try:
        return file_sha256(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error


# --- text to tokens ----------------------------------------------------------------------------------------------------------------


def read_tokens(path: Path, spec: DatasetSpec) -> Iterator[list[str]]:
    """Yield the tokens of a file, a bounded portion at a time; a `DataError` names the file and line of what is wrong."""
    if spec.layout == "words":
        yield from _read_words(path)
    elif detect_form(path, spec) == "raw":
        yield from _read_raw_text8(path) if spec.layout == "text8" else _read_raw_enwik8(path)
    elif spec.layout == "text8":
        yield from _read_prepared(path, spec, lambda chunk: chunk.lower().split(), lambda token: len(token) == 1)
    else:
        known = frozenset(BYTE_TOKENS)
        yield from _read_prepared(path, spec, lambda chunk: chunk.replace("\n", f" {NEWLINE_TOKEN} ").split(), known.__contains__)


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
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error
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
            remedy="Put the text through text8's filter (27 characters) first; for bytes of any kind use `--dataset enwik8`.",
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


def _read_chunks(path: Path) -> Iterator[str]:
    """Yield the text of a file in portions that end after a blank or line break (but the last), so that no token is cut.

    UTF-8 with or without a byte order mark; any of LF, CR and CR LF is a line break.
    """
    rest: list[str] = []
    try:
        with path.open(encoding="utf-8-sig") as file:
            while block := file.read(CHUNK_CHARS):
                end = max(block.rfind(" "), block.rfind("\n")) + 1
                if end:
                    yield "".join([*rest, block[:end]])
                    rest = []
                rest.append(block[end:])
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}, line {_undecodable_line(path)}: not UTF-8 text ({error.reason}).", remedy="Convert the file to UTF-8."
        ) from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error
    if any(rest):
        yield "".join(rest)


def _read_words(path: Path) -> Iterator[list[str]]:
    n_words = 0
    ends_with_break = True
    line_end = f" {EOS} "
    for chunk in _read_chunks(path):
        tokens = chunk.replace("\n", line_end).split()
        n_words += len(tokens) - chunk.count("\n")
        ends_with_break = chunk.endswith("\n")
        yield tokens
    if not n_words:
        raise DataError(f"{path} holds no words, only blanks and line breaks.", remedy="Give a file of words separated by blanks.")
    if not ends_with_break:
        yield [EOS]


def _read_prepared(
    path: Path, spec: DatasetSpec, split: Callable[[str], list[str]], is_token: Callable[[str], bool]
) -> Iterator[list[str]]:
    n_tokens = 0
    for chunk in _read_chunks(path):
        tokens = split(chunk)
        for token in dict.fromkeys(tokens):
            if not is_token(token):
                expected = "a single character" if spec.layout == "text8" else "a number 0 to 255"
                raise DataError(
                    f"{path}, line {_line_of(path, token)}: `{_shortened(token)}` is no token of {spec.name} as the beginning of the file "
                    f"is written; expected is {expected}.",
                    remedy=f"Write the file again with prep_{spec.layout}, or give the raw file throughout.",
                )
        n_tokens += len(tokens)
        yield tokens
    if not n_tokens:
        raise DataError(f"{path} holds no tokens, only blanks.", remedy=f"Write the file again with prep_{spec.layout}.")


def _read_raw_text8(path: Path) -> Iterator[list[str]]:
    """Yield single letters and `_`; blanks and line breaks at both ends of the file do not count, as in prep_text8."""
    pending = ""
    started = False
    for chunk in _read_chunks(path):
        text = pending + chunk
        if not started:
            text = text.lstrip(" \n")
            started = bool(text)
        body = text.rstrip(" \n")
        pending = text[len(body) :]
        if foreign := set(body) - TEXT8_LETTERS - {" "}:
            character = min(foreign)
            raise DataError(
                f"{path}, line {_line_of(path, character, within=True)}: raw text8 has only the letters a-z and blanks, "
                f"but here is {'a line break' if character == chr(10) else repr(character)}.",
                remedy="Put the text through text8's filter (27 characters, one line) first.",
            )
        yield ["_" if character == " " else character for character in body]


def _read_raw_enwik8(path: Path) -> Iterator[list[str]]:
    try:
        with path.open("rb") as file:
            while block := file.read(CHUNK_CHARS):
                yield [BYTE_TOKENS[value] for value in block]
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error


def _line_of(path: Path, token: str, *, within: bool = False) -> int:
    """Return the number, from 1, of the first line that holds `token` (or the character, `within` a word)."""
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if token in line if within else token in line.split() or token in line.lower().split():
                return number
    return 1


def _undecodable_line(path: Path) -> int:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return number
    return 1


def _shortened(token: str, limit: int = 60) -> str:
    return token if len(token) <= limit else token[:limit] + "..."


# --- the cache of ids --------------------------------------------------------------------------------------------------------------
#
# One file per text and vocabulary: HEADER_BYTES of JSON, padded with blanks, ending with a line break, then the ids, little-endian.
# The header's own checksum is its first field, over the rest of the header.

HEADER_BYTES = 1024
_CHECKSUM_CHARS = 8


@dataclass(frozen=True)
class IdCacheKey:
    """All that the ids of a text depend on."""

    text_sha256: str
    tokenizer: str
    vocabulary_sha256: str

    @property
    def digest(self) -> str:
        """The name of the entry in the cache."""
        return _digest(["ids/1", self.text_sha256, self.tokenizer, self.vocabulary_sha256])


def _digest(parts: Sequence[object]) -> str:
    return hashlib.sha256(json.dumps(list(parts)).encode()).hexdigest()[:40]


def _write_ids(cached: Path, key: IdCacheKey, path: Path, spec: DatasetSpec, vocabulary: Vocabulary) -> None:
    """Encode a text into its cache entry, a portion at a time; the entry appears only when it is whole."""
    dtype = np.dtype("<u2") if len(vocabulary) <= 1 << 16 else np.dtype("<i4")
    drops_newline = spec.line_end == "byte" and NEWLINE_TOKEN not in vocabulary
    unk_id = vocabulary.unk_id
    n_tokens = n_unknown = checksum = 0
    with whole_or_absent(cached) as file:
        file.write(b" " * HEADER_BYTES)
        for tokens in read_tokens(path, spec):
            if drops_newline:
                tokens = [token for token in tokens if token != NEWLINE_TOKEN]
            ids = vocabulary.find(tokens)
            missing = ids == MISSING
            if missing.any():
                if unk_id is None:
                    raise _unknown_token(path, tokens[int(missing.argmax())], spec)
                ids[missing] = unk_id
                n_unknown += int(missing.sum())
            block = ids.astype(dtype).tobytes()
            checksum = zlib.crc32(block, checksum)
            n_tokens += len(tokens)
            file.write(block)
        if not n_tokens:
            raise DataError(f"{path} holds no token of the vocabulary, only line breaks.", remedy="Give a text with more in it.")
        file.seek(0)
        file.write(_pack_header({"dtype": dtype.str, "n_tokens": n_tokens, "n_unknown": n_unknown, "crc32": checksum, **vars(key)}))


def _open_ids(cached: Path, key: IdCacheKey) -> _Entry | None:
    """Map a cache entry read-only; None where there is none or where size, header or checksum are not as they were written."""
    try:
        with cached.open("rb") as file:
            header = _unpack_header(file.read(HEADER_BYTES))
            if header is None or any(header.get(name) != value for name, value in vars(key).items()):
                return None
            dtype, n_tokens, n_unknown = np.dtype(header["dtype"]), header["n_tokens"], header["n_unknown"]
            if not n_tokens or os.fstat(file.fileno()).st_size != HEADER_BYTES + n_tokens * dtype.itemsize:
                return None
            ids = np.memmap(file, dtype=dtype, mode="r", offset=HEADER_BYTES, shape=(n_tokens,))
    except OSError:
        return None
    checksum = 0
    for start in range(0, n_tokens, CHUNK_CHARS):
        checksum = zlib.crc32(ids[start : start + CHUNK_CHARS].data, checksum)
    return _Entry(ids=ids, n_unknown=n_unknown) if checksum == header["crc32"] else None


def _pack_header(values: dict[str, Any]) -> bytes:
    body = json.dumps(values, sort_keys=True).encode("ascii").ljust(HEADER_BYTES - _CHECKSUM_CHARS - 1) + b"\n"
    assert len(body) == HEADER_BYTES - _CHECKSUM_CHARS
    return f"{zlib.crc32(body):0{_CHECKSUM_CHARS}x}".encode("ascii") + body


def _unpack_header(header: bytes) -> dict[str, Any] | None:
    """Return the header's values, or None where a byte of it is not as it was written."""
    body = header[_CHECKSUM_CHARS:]
    if len(header) != HEADER_BYTES or header[:_CHECKSUM_CHARS] != f"{zlib.crc32(body):0{_CHECKSUM_CHARS}x}".encode("ascii"):
        return None
    values = json.loads(body)
    return values if isinstance(values, dict) else None


def _load_cached_vocabulary(cached: Path) -> Vocabulary | None:
    try:
        return Vocabulary.load(cached) if cached.is_file() else None
    except DataError:
        return None


def _unknown_token(path: Path, token: str, spec: DatasetSpec) -> DataError:
    line = "" if spec.layout != "words" else f", line {_line_of(path, token)}"
    unit = {"word": "word", "char": "character", "byte": "byte"}[spec.unit]
    return DataError(
        f"{path}{line}: the {unit} `{_shortened(token)}` is not in the vocabulary, and it has no `<unk>` to stand for it.",
        remedy="Give the text that belongs to this vocabulary, or train with `--dataset text`: unknown words then become <unk>."
        if spec.unit == "word"
        else "Give the text that belongs to this vocabulary.",
    )


@contextlib.contextmanager
def _remedy_of_cache(cache_dir: Path) -> Iterator[None]:
    """Add to a failed write what helps with the cache: another folder for it."""
    try:
        yield
    except EnvironmentUnfitError as error:
        raise EnvironmentUnfitError(
            f"The token cache in {cache_dir} cannot be used. {error.message}",
            remedy="Set TXL_CACHE_DIR to a folder that can be written and has room, or free some disk space.",
        ) from error
