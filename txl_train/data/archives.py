"""Reads the files that an archive, a compressed file or a folder holds, one after the other, without unpacking anything.

What a file is, is seen from its first bytes: zip, tar, gzip, bzip2, xz (also a tar within these), or none of them, which is then one file
of text. Only contents and base names reach the caller, who decides what is written where: a member's path, links and special
files can do no harm. How much may be read of a member has a limit, so that a small archive cannot fill the disk.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import os
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO

from txl_train.errors import DataError
from txl_train.exhaustion import told_when_memory_runs_out

DEEPEST = 3
"""Levels of folders that are searched."""

_MEMORY = "Free some memory, or pack it anew with gzip: xz takes as much as the archive says."
_BLOCK_BYTES = 1 << 20
_HEAD_BYTES = 512

_COMPRESSED: tuple[tuple[bytes, Callable[[BinaryIO], Any]], ...] = (
    (b"\x1f\x8b", lambda file: gzip.GzipFile(fileobj=file, mode="rb")),
    (b"BZh", bz2.BZ2File),
    (b"\xfd7zXZ\x00", lzma.LZMAFile),
)
_DAMAGE = (
    *(zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile, struct.error),
    *(NotImplementedError, RuntimeError, IndexError, ValueError),
)
"""What the standard library raises for damaged, incomplete, encrypted or unknown archives; the last two are of names in zips."""


class Member:
    """A file within a source."""

    def __init__(self, name: str, stream: IO[bytes], source: Path) -> None:
        self.name = name
        """Its base name, without folders."""
        self._stream = stream
        self._source = source

    def blocks(self, limit: int) -> Iterator[bytes]:
        """Yield its content in portions; a `DataError` where that is damaged, or more than `limit` bytes."""
        n_bytes = 0
        with translated(self._source):
            while block := self._stream.read(_BLOCK_BYTES):
                n_bytes += len(block)
                if n_bytes > limit:
                    raise DataError(f"{self.name} in {self._source} is larger than {limit:,} bytes, more than it can rightly be.")
                yield block


def members(source: Path) -> Iterator[Member]:
    """Yield the files of a folder (sorted by path), of an archive (in its order), or a single file; each can be read until the next.

    A `DataError` where the source is missing, damaged, or a web page instead of an archive.
    """
    if not source.exists():
        raise DataError(f"There is no {source}.", remedy="Name the archive, the file or the folder that you have with `--source`.")
    try:
        if source.is_dir():
            yield from _of_folder(source)
            return
        with source.open("rb") as file:
            yield from _of_file(source, file)
    except OSError as error:
        raise DataError(f"{error.filename or source} cannot be read: {error.strerror or error}.") from error


@contextlib.contextmanager
def translated(source: Path) -> Iterator[None]:
    """Turn what the standard library says of a damaged archive into a `DataError`, and too little memory into `EnvironmentUnfitError`."""
    try:
        with told_when_memory_runs_out(_MEMORY, doing=f"when {source} was unpacked"):
            yield
    except (*_DAMAGE, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None and not isinstance(error, gzip.BadGzipFile):
            raise  # the disk's, not the archive's: bzip2 calls damage an OSError too, but one without a number
        raise DataError(
            f"{source} is damaged or incomplete: {error}.", remedy="Download or copy it again, and compare its size with the original's."
        ) from error


def _of_folder(folder: Path) -> Iterator[Member]:
    for directory, folders, names in os.walk(folder):
        folders.sort()
        if len(Path(directory).relative_to(folder).parts) >= DEEPEST:
            folders.clear()
        for name in sorted(names):
            path = Path(directory, name)
            if path.is_file():
                with path.open("rb") as stream:
                    yield Member(name, stream, path)


def _of_file(source: Path, file: BinaryIO) -> Iterator[Member]:
    head = file.read(_HEAD_BYTES)
    file.seek(0)
    if head.startswith(b"PK\x03\x04"):
        yield from _of_zip(source, file)
        return
    for magic, decompressed in _COMPRESSED:
        if head.startswith(magic):
            with io.BufferedReader(decompressed(file), _BLOCK_BYTES) as stream:
                with translated(source):
                    head = stream.peek(_HEAD_BYTES)[:_HEAD_BYTES]
                yield from _of_stream(source, source.name.rpartition(".")[0] or source.name, stream, head)
            return
    yield from _of_stream(source, source.name, file, head)


def _of_stream(source: Path, name: str, stream: IO[bytes], head: bytes) -> Iterator[Member]:
    if head[257:262] == b"ustar":
        yield from _of_tar(source, stream)
    elif is_web_page(head):
        raise DataError(
            f"{source} is a web page or an error message, not the archive it is named after: it begins with "
            f"`{head[:60].decode('utf-8', 'replace').strip()}`.",
            remedy="Its address no longer leads to the data: delete it and download it from another one.",
        )
    else:
        yield Member(name, stream, source)


def _of_zip(source: Path, file: BinaryIO) -> Iterator[Member]:
    with translated(source), zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            kind = stat.S_IFMT(info.external_attr >> 16)
            if info.compress_type == zipfile.ZIP_LZMA:
                raise DataError(
                    f"{source} holds {_base_name(info.filename)} compressed by LZMA, which may ask for any amount of memory.",
                    remedy="Pack it anew, with zip's usual compression.",
                )
            if not info.is_dir() and kind in (0, stat.S_IFREG):
                with archive.open(info) as stream:
                    yield Member(_base_name(info.filename), stream, source)


def _of_tar(source: Path, file: IO[bytes]) -> Iterator[Member]:
    with translated(source), tarfile.open(fileobj=file, mode="r|") as archive:
        for info in archive:
            stream = archive.extractfile(info) if info.isreg() else None
            if stream is not None:
                yield Member(_base_name(info.name), stream, source)


def _base_name(name: str) -> str:
    return name.replace("\\", "/").rpartition("/")[2]


def is_web_page(head: bytes) -> bool:
    """True if a file that begins like this is a page for people, or what a server says of an error. Wikipedia's XML is neither."""
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    return start.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<error")) and b"<mediawiki" not in start
