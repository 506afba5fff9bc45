"""The ids of a text on the disk, mapped rather than read; built once, checked whenever they are opened.

One file per text and vocabulary: `HEADER_BYTES` of JSON, padded with blanks, ending with a line break, then the ids, little-endian. The
header's own checksum is its first field, over the rest of the header. An entry is named after all that its ids depend on, so a changed
text never meets old ids; one that is damaged is as good as none.

Knows nothing of how a text becomes ids (`txl_train.data.corpus`).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from txl_train.errors import EnvironmentUnfitError
from txl_train.exhaustion import LOADING, as_unfit
from txl_train.files import whole_or_absent

log = logging.getLogger(__name__)

IdArray = npt.NDArray[np.integer[Any]]

HEADER_BYTES = 1024
_ID_TYPES = ("<u2", "<i4")
_CHECKSUM_CHARS = 8
_READ_BYTES = 1 << 22


def default_cache_dir() -> Path:
    """Return the folder of the token cache: TXL_CACHE_DIR, else XDG_CACHE_HOME/txl, else ~/.cache/txl."""
    if folder := os.environ.get("TXL_CACHE_DIR"):
        return Path(folder)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "txl"


@dataclass(frozen=True)
class IdCacheKey:
    """All that the ids of a text depend on."""

    text_sha256: str
    tokenizer: str
    vocabulary_sha256: str

    def path(self, cache_dir: Path) -> Path:
        """Return the file of the entry."""
        return cache_dir / f"{digest(['ids/2', self.text_sha256, self.tokenizer, self.vocabulary_sha256])}.ids"


@dataclass(frozen=True)
class Entry:
    """One text's ids, mapped, with what the header says of them."""

    ids: IdArray
    n_unknown: int
    n_words: int | None


def digest(parts: Sequence[object]) -> str:
    """Return a name for a file of the cache, made of all that its content depends on."""
    return hashlib.sha256(json.dumps(list(parts)).encode()).hexdigest()[:40]


def write_entry(cached: Path, key: IdCacheKey, write: Callable[[Path, int], dict[str, Any]]) -> None:
    """Make the entry `cached`; it appears only when it is whole.

    `write` is called with a file and the byte from which on it is to write the ids there; it returns what the header shall say of them:
    dtype, n_tokens, n_unknown, n_words.
    """
    with whole_or_absent(cached) as file:
        file.write(b" " * HEADER_BYTES)
        file.flush()
        header = write(Path(file.name), HEADER_BYTES)
        checksum = 0
        with open(file.name, "rb") as written:
            written.seek(HEADER_BYTES)
            while block := written.read(_READ_BYTES):
                checksum = zlib.crc32(block, checksum)
        file.seek(0)
        file.write(_pack_header(header | vars(key) | {"crc32": checksum}))


def open_entry(cached: Path, key: IdCacheKey) -> Entry | None:
    """Map an entry read-only; None where there is none or where size, header or checksum are not as they were written.

    Raises `EnvironmentUnfitError` where memory ran out.
    """
    try:
        with cached.open("rb") as file:
            header = _unpack_header(file.read(HEADER_BYTES))
            if header is None or any(header.get(name) != value for name, value in vars(key).items()):
                return None
            dtype, n_tokens = np.dtype(header["dtype"]), header["n_tokens"]
            if not n_tokens or os.fstat(file.fileno()).st_size != HEADER_BYTES + n_tokens * dtype.itemsize:
                return None
            checksum = 0
            while block := file.read(_READ_BYTES):
                checksum = zlib.crc32(block, checksum)
            if checksum != header["crc32"]:
                return None
            ids = np.memmap(file, dtype=dtype, mode="r", offset=HEADER_BYTES, shape=(n_tokens,))
    except OSError as error:
        if told := as_unfit(error, LOADING, doing=f"when {cached} was opened"):
            raise told from error
        return None
    return Entry(ids=ids, n_unknown=header["n_unknown"], n_words=header["n_words"])


@contextlib.contextmanager
def one_at_a_time(cached: Path) -> Iterator[None]:
    """Let one process at a time make the file `cached`; another one waits, and then finds it made.

    Where the file system knows no locks, all make it, which costs time and nothing else. A process that ends gives its lock back.
    """
    lock = cached.with_name(f".{cached.name}.lock")
    with contextlib.ExitStack() as stack:
        try:
            cached.parent.mkdir(parents=True, exist_ok=True)
            while True:
                descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
                stack.callback(os.close, descriptor)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    log.info("Waiting for another process that prepares the same text.")
                    fcntl.flock(descriptor, fcntl.LOCK_EX)
                if _is_open_file(lock, descriptor):
                    break
                stack.pop_all().close()  # who had the lock has removed it: this is no longer the one that others meet
            stack.callback(_remove, lock)
        except OSError:
            stack.callback(_remove, lock)
            log.debug("No lock can be had on %s.", lock, exc_info=True)
        yield


@contextlib.contextmanager
def remedy_of_cache(cache_dir: Path) -> Iterator[None]:
    """Add to a failed write what helps with the cache: another folder for it."""
    try:
        yield
    except (EnvironmentUnfitError, OSError) as error:
        if isinstance(error, EnvironmentUnfitError) and not isinstance(error.__cause__, OSError):
            raise
        cause = error.message if isinstance(error, EnvironmentUnfitError) else f"{error.strerror or error}."
        raise EnvironmentUnfitError(
            f"The token cache in {cache_dir} cannot be used. {cause}",
            remedy="Set TXL_CACHE_DIR to a folder that can be written and has room, or free some disk space.",
        ) from error


def _is_open_file(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()


def _pack_header(values: dict[str, Any]) -> bytes:
    body = json.dumps(values, sort_keys=True).encode("ascii").ljust(HEADER_BYTES - _CHECKSUM_CHARS - 1) + b"\n"
    assert len(body) == HEADER_BYTES - _CHECKSUM_CHARS
    return f"{zlib.crc32(body):0{_CHECKSUM_CHARS}x}".encode("ascii") + body


def _unpack_header(header: bytes) -> dict[str, Any] | None:
    """Return the header's values, or None where a byte of it is not as it was written."""
    body = header[_CHECKSUM_CHARS:]
    if len(header) != HEADER_BYTES or header[:_CHECKSUM_CHARS] != f"{zlib.crc32(body):0{_CHECKSUM_CHARS}x}".encode("ascii"):
        return None
    try:
        values = json.loads(body)
    except (ValueError, RecursionError):
        return None
    if not isinstance(values, dict) or values.get("dtype") not in _ID_TYPES:
        return None
    counts = [values.get(name) for name in ("n_tokens", "n_unknown", "crc32")] + [values.setdefault("n_words", None) or 0]
    return values if all(type(count) is int and count >= 0 for count in counts) else None
