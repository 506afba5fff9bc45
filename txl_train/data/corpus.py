"""A folder of text as token ids: builds the vocabulary, keeps the ids on disk.

The ids are computed once and then memory-mapped. The cache is keyed by the text's hash, the tokenizer's version and the vocabulary's hash.
Counting the vocabulary and encoding the text it is counted on are one pass (`txl_train.data.scan`); several processes that ask for the
same text at once wait for the first.

Leaves how files are written to `txl_train.data.layouts`, the files of the cache to `txl_train.data.idcache`, batches to
`txl_train.data.segments` and raw prose to `txl_train.data.tokenizers`.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from txl_train.data import bpe
from txl_train.data.datasets import SPLITS, UNK, DatasetSpec, check_folder
from txl_train.data.idcache import (
    Entry,
    IdArray,
    IdCacheKey,
    default_cache_dir,
    digest,
    one_at_a_time,
    open_entry,
    remedy_of_cache,
    write_entry,
)
from txl_train.data.layouts import NEWLINE_TOKEN, Rule, check_symbols, line_of, rule_of, shortened, tokenizer_id, unreadable
from txl_train.data.scan import DROPPED, TextScan, scan_text
from txl_train.data.vocabulary import MISSING, Vocabulary
from txl_train.errors import ConfigError, DataError, EnvironmentUnfitError, nearest
from txl_train.files import file_sha256
from txl_train.unfinished import remove_abandoned

__all__ = ["Corpus", "IdArray", "check_vocabulary", "default_cache_dir", "encode_text", "load_corpus"]

VocabKind = Literal["word", "bpe"]

_LEFT_OUT = -2
"""As a symbol's id: neither an id nor `MISSING`."""
_OTHER_DATASET = "Give the data set that the model was trained on with `--dataset`."


class Corpus:
    """The splits of one folder as token ids. A split's text is read when it is first asked for; made by `load_corpus`."""

    def __init__(
        self,
        directory: Path,
        spec: DatasetSpec,
        vocabulary: Vocabulary,
        *,
        cache_dir: Path,
        hashes: Mapping[str, _Hashed] | None = None,
        processes: int | None = None,
    ) -> None:
        self.directory = directory
        self.spec = spec
        self.vocabulary = vocabulary
        self._cache_dir = cache_dir
        self._hashes = dict(hashes or {})
        self._processes = processes
        self._entries: dict[str, Entry] = {}
        remove_abandoned(cache_dir)

    def ids(self, split: str) -> IdArray:
        """Return the ids of a split, [N], read-only and memory-mapped: uint16 for up to 65,536 tokens in the vocabulary, else int32.

        A `DataError` where the file is missing, empty, wrongly written, or holds a token without an id; an `EnvironmentUnfitError`
        where the cache cannot be written.
        """
        return self._entry(split).ids

    def n_tokens(self, split: str) -> int:
        """Return the number of tokens of a split, those that end lines included."""
        return len(self._entry(split).ids)

    def n_words(self, split: str) -> int | None:
        """Return the number of words and line ends of a split, whatever its tokens are; None for a text of characters or bytes.

        The sum of a text's nll over its subwords, divided by this number, gives a perplexity per word.
        """
        return self._entry(split).n_words

    def oov(self, split: str) -> int:
        """Return how many tokens of a split the vocabulary lacks and `<unk>` stands for; `<unk>` written in the text is not among them."""
        return self._entry(split).n_unknown

    def sha256(self, split: str) -> str:
        """Return the hash of a split's text file, hexadecimal."""
        if split not in self._hashes:
            self._hashes[split] = _hashed(self._path(split))
        return self._hashes[split].sha256

    def _path(self, split: str) -> Path:
        if split not in self.spec.files:
            raise ConfigError(
                f"`{split}` is no split.{nearest(split, self.spec.files)}", remedy=f"Choose one of {', '.join(self.spec.files)}."
            )
        return check_folder(self.directory, self.spec, [split])[split]

    def _entry(self, split: str) -> Entry:
        if split not in self._entries:
            self._path(split)
            key = _key(self.spec, self.vocabulary, self.sha256(split))
            cached = key.path(self._cache_dir)
            entry = open_entry(cached, key)
            if entry is None:
                with one_at_a_time(cached):
                    entry = open_entry(cached, key) or self._encoded(self._hashes[split], key, cached)
            self._entries[split] = entry
        return self._entries[split]

    def _encoded(self, text: _Hashed, key: IdCacheKey, cached: Path) -> Entry:
        rule = rule_of(text.path, self.spec, subwords=self.vocabulary.unit == "subword")
        with remedy_of_cache(self._cache_dir), _scanned(text, rule, self._cache_dir, self._processes) as scan:
            _write_ids(scan, text.path, rule, self.spec, self.vocabulary, key, cached)
        entry = open_entry(cached, key)
        if entry is None:
            raise EnvironmentUnfitError(
                f"The token cache {cached} cannot be read back as it was written.",
                remedy="Check the disk, or set TXL_CACHE_DIR to a folder on another one.",
            )
        return entry


def load_corpus(
    directory: Path | str,
    spec: DatasetSpec,
    *,
    cache_dir: Path | str | None = None,
    vocabulary: Vocabulary | None = None,
    min_count: int = 1,
    vocab: VocabKind = "word",
    processes: int | None = None,
) -> Corpus:
    """Open the folder of a data set.

    Without a `vocabulary` (training) all splits must be there, and the vocabulary is counted as the spec says (or read, where the data
    set has a file for it); words seen fewer than `min_count` times become `<unk>`. With `vocab` "bpe" the words are read as GPT-2's
    subwords. With a vocabulary (from a checkpoint) it is used as it is, `min_count` and `vocab` mean nothing, and only those splits must be
    there that are asked for later.

    `cache_dir` defaults to `default_cache_dir()`; `processes` is how many read a large text, by default as many as there are processors.

    Raises `DataError` for a folder, file or vocabulary that does not fit, `ConfigError` for a `min_count` or `vocab` the data set cannot
    honour.
    """
    directory = Path(directory)
    cache = default_cache_dir() if cache_dir is None else Path(cache_dir)
    if vocabulary is not None:
        check_folder(directory, spec, [])
        check_vocabulary(vocabulary, spec)
        return Corpus(directory, spec, vocabulary, cache_dir=cache, processes=processes)
    if vocab == "bpe" and spec.unit != "word":
        raise ConfigError(
            f"Data set `{spec.name}` is made of {spec.unit}s, which BPE cannot read: it makes subwords of words.",
            remedy="Leave `--vocab bpe` out, or give a data set of words.",
        )
    if min_count < 1 or (min_count > 1 and (vocab == "bpe" or not spec.maps_unknown)):
        what = "with `--vocab bpe`" if vocab == "bpe" else f"for data set `{spec.name}`"
        raise ConfigError(
            f"`min_count` must be 1 {what}, but is {min_count} instead.",
            remedy="`--dataset text` replaces rare words by <unk>." if min_count > 1 and vocab != "bpe" else None,
        )
    paths = check_folder(directory, spec)
    if vocab == "bpe":
        return Corpus(directory, spec, bpe.vocabulary(), cache_dir=cache, processes=processes)
    vocab_file = directory / spec.vocab_file if spec.vocab_file is not None else None
    if vocab_file is not None and vocab_file.is_file():
        return Corpus(directory, spec, read_vocab_file(vocab_file, spec), cache_dir=cache, processes=processes)
    hashes = {split: _hashed(path) for split, path in paths.items()}
    counted = [hashes[split] for split in SPLITS if split in spec.counted_splits]
    key = ["vocabulary/1", tokenizer_id(spec), spec.unit, spec.maps_unknown, min_count, *(text.sha256 for text in counted)]
    cached = cache / f"{digest(key)}.vocab.json"
    vocabulary = _cached_vocabulary(cached)
    if vocabulary is None:
        with one_at_a_time(cached):
            vocabulary = _cached_vocabulary(cached)
            if vocabulary is None:
                vocabulary = _counted(counted, spec, min_count, cache, cached, processes)
    return Corpus(directory, spec, vocabulary, cache_dir=cache, hashes=hashes, processes=processes)


def check_vocabulary(vocabulary: Vocabulary, spec: DatasetSpec) -> None:
    """Raise a `DataError` unless `vocabulary` can hold the tokens of data set `spec`."""
    if vocabulary.unit == "subword" and spec.unit == "word":
        if not bpe.is_gpt2(vocabulary):
            raise DataError("The vocabulary is one of subwords that are not GPT-2's, so the text cannot be cut into them.")
        return
    if vocabulary.unit != spec.unit:
        raise DataError(
            f"The vocabulary is one of {vocabulary.unit}s, but data set `{spec.name}` is made of {spec.unit}s.", remedy=_OTHER_DATASET
        )
    if spec.line_token is not None and spec.line_token not in vocabulary:
        raise DataError(
            f"The vocabulary has no token `{spec.line_token}`, which ends every line of data set `{spec.name}`.", remedy=_OTHER_DATASET
        )


def read_vocab_file(path: Path, spec: DatasetSpec) -> Vocabulary:
    """Read a vocabulary as One Billion Word has it: a word and its count a line, in the order of the ids; a word written twice counts once.

    A `DataError` where it lacks the token that ends lines or the one for unknown words.
    """
    try:
        with path.open(encoding="utf-8") as file:
            symbols = list(dict.fromkeys(line.split()[0] for line in file if line.strip()))
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no vocabulary: it is not UTF-8 text ({error.reason}).") from error
    except OSError as error:
        raise unreadable(path, error) from error
    for token in (spec.line_token, spec.unk):
        if token is not None and token not in symbols:
            raise DataError(
                f"{path} is no vocabulary of data set `{spec.name}`: it has no `{token}`.",
                remedy="Get the file again, or take it away; the words are then counted.",
            )
    return Vocabulary(symbols, unit=spec.unit)


def encode_text(lines: Iterable[str], spec: DatasetSpec, vocabulary: Vocabulary) -> npt.NDArray[np.int64]:
    """Return the ids of tokenised lines held in memory, int64 [N].

    Lines carry no line break and are written as in the data set's prepared files: tokens separated by blanks (`txl_train.data.
    tokenizers.raw_lines` makes them of raw text). Line ends become what the spec says: `<eos>` after every line, `<S>` also before the
    first, the byte 10 between two lines, or nothing. A token without an id becomes `<unk>`, or is a `DataError` where there is none.
    A vocabulary of subwords encodes lines as they are, each followed by the token of a line break.
    """
    check_vocabulary(vocabulary, spec)
    if vocabulary.unit == "subword":
        encode = bpe.encoder()
        ids = [bpe.NEWLINE_ID] if spec.line_end == "sentence" else []
        for line in lines:
            ids += encode(line)
            ids.append(bpe.NEWLINE_ID)
        return np.array(ids, dtype=np.int64)
    end = spec.line_token
    tokens: list[str] = [end] if end is not None and spec.line_end == "sentence" else []
    for i, line in enumerate(lines):
        if i and spec.line_end == "byte" and NEWLINE_TOKEN in vocabulary:
            tokens.append(NEWLINE_TOKEN)
        tokens.extend(line.split())
        if end is not None:
            tokens.append(end)
    return vocabulary.encode(tokens)


@dataclass(frozen=True)
class _Hashed:
    """A text file as it was when its hash was taken."""

    path: Path
    sha256: str
    state: tuple[int, int]
    """Time of the last change, in ns, and size in bytes."""

    def check(self) -> None:
        """Raise a `DataError` where the file is another by now: what was read may not go by the old hash."""
        if _state(self.path) != self.state:
            raise DataError(f"{self.path} was changed while it was read.", remedy="Start again when it is finished.")


def _hashed(path: Path) -> _Hashed:
    try:
        return _Hashed(path, state=_state(path), sha256=file_sha256(path))
    except OSError as error:
        raise unreadable(path, error) from error


def _state(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_mtime_ns, stat.st_size


@contextlib.contextmanager
def _scanned(text: _Hashed, rule: Rule, cache: Path, processes: int | None) -> Iterator[TextScan]:
    """Read a text; a `DataError` where it holds nothing, or tokens that its layout cannot have."""
    with scan_text(text.path, rule, spool_dir=cache, processes=processes) as scan:
        text.check()
        check_symbols(text.path, rule, scan.symbols)
        if not scan.n_plain:
            words = rule.kind in ("words", "subwords")
            raise DataError(
                f"{text.path} holds no {'words' if words else 'tokens'}, only blanks{' and line breaks' if words else ''}.",
                remedy="Give a file of words separated by blanks." if words else f"Write the file again with prep_{rule.layout}.",
            )
        yield scan


def _counted(texts: Sequence[_Hashed], spec: DatasetSpec, min_count: int, cache: Path, cached: Path, processes: int | None) -> Vocabulary:
    """Count the vocabulary of texts, keep it in `cached`, and at once write the texts' ids.

    Order: the token that ends lines (where there is one), then tokens by descending count, ties by first appearance.
    """
    with remedy_of_cache(cache), contextlib.ExitStack() as stack:
        counts: Counter[str] = Counter()
        scans: list[tuple[_Hashed, Rule, TextScan]] = []
        for text in texts:
            rule = rule_of(text.path, spec)
            scan = stack.enter_context(_scanned(text, rule, cache, processes))
            for symbol, count in zip(scan.symbols, scan.counts.tolist()):
                counts[symbol] += count
            scans.append((text, rule, scan))
        vocabulary = Vocabulary.from_counts(
            counts,
            unit=spec.unit,
            specials=() if spec.line_token is None else (spec.line_token,),
            min_count=min_count,
            maps_unknown=spec.maps_unknown,
            unk=spec.unk,
        )
        for text, rule, scan in scans:
            key = _key(spec, vocabulary, text.sha256)
            _write_ids(scan, text.path, rule, spec, vocabulary, key, key.path(cache))
        vocabulary.save(cached)
    return vocabulary


def _write_ids(scan: TextScan, path: Path, rule: Rule, spec: DatasetSpec, vocabulary: Vocabulary, key: IdCacheKey, cached: Path) -> None:
    """Write a text that was read into its cache entry; a `DataError` where it holds a token without an id."""
    dtype = np.dtype("<u2") if len(vocabulary) <= 1 << 16 else np.dtype("<i4")
    ids, n_unknown = _symbol_ids(scan, path, spec, vocabulary) if rule.kind != "subwords" else (None, 0)
    if ids is not None and not (scan.counts[ids != DROPPED]).any():
        raise DataError(f"{path} holds no token of the vocabulary, only line breaks.", remedy="Give a text with more in it.")

    def write(file: Path, offset: int) -> dict[str, Any]:
        n_tokens = scan.write(file, offset, ids, dtype)
        return {"dtype": dtype.str, "n_tokens": n_tokens, "n_unknown": n_unknown, "n_words": scan.n_words or None}

    write_entry(cached, key, write)


def _symbol_ids(scan: TextScan, path: Path, spec: DatasetSpec, vocabulary: Vocabulary) -> tuple[npt.NDArray[np.int64], int]:
    """Return the id of each symbol of a text, and how often one was unknown."""
    ids = vocabulary.find(scan.symbols)
    if spec.line_end == "byte" and NEWLINE_TOKEN not in vocabulary:
        ids[[symbol == NEWLINE_TOKEN for symbol in scan.symbols]] = _LEFT_OUT
    missing = ids == MISSING
    if missing.any():
        if vocabulary.unk_id is None:
            raise _unknown_token(path, scan.symbols[int(missing.argmax())], spec)
        ids[missing] = vocabulary.unk_id
    ids[ids == _LEFT_OUT] = DROPPED
    return ids, int(scan.counts[missing].sum())


def _key(spec: DatasetSpec, vocabulary: Vocabulary, text_sha256: str) -> IdCacheKey:
    tokenizer = tokenizer_id(spec, subwords=vocabulary.unit == "subword")
    return IdCacheKey(text_sha256=text_sha256, tokenizer=tokenizer, vocabulary_sha256=vocabulary.sha256)


def _cached_vocabulary(cached: Path) -> Vocabulary | None:
    try:
        return Vocabulary.load(cached) if cached.is_file() else None
    except DataError:
        return None


def _unknown_token(path: Path, token: str, spec: DatasetSpec) -> DataError:
    line = "" if spec.layout != "words" else f", line {line_of(path, token)}"
    unit = {"word": "word", "char": "character", "byte": "byte"}[spec.unit]
    return DataError(
        f"{path}{line}: the {unit} `{shortened(token)}` is not in the vocabulary, and it has no `{UNK}` to stand for it.",
        remedy=f"Give the text that belongs to this vocabulary, or train with `--dataset text`: unknown words then become {UNK}."
        if spec.unit == "word"
        else "Give the text that belongs to this vocabulary.",
    )
