"""Downloads a file from the first of several addresses that still has it, whole and unchanged.

What has arrived is kept in a `.part` file beside the target, so that a later attempt goes on where this one stopped, also from another
address of the same file. A server that cannot continue begins anew; one that answers with a web page, another size or another checksum is
passed over. Uses the standard library alone, and honours the usual proxy variables.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import logging
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import txl_train
from txl_train.data.archives import is_web_page
from txl_train.errors import EnvironmentUnfitError

log = logging.getLogger(__name__)

ATTEMPTS = 4
"""Tries for one address that keeps breaking off."""
TIMEOUT_S = 30.0
"""Seconds without a byte after which a connection counts as broken."""

_BLOCK_BYTES = 1 << 18
_LOG_STEP = 0.1
_LARGEST_BYTES = 1 << 36
"""More is not taken from an address whose size is not known."""


@dataclass(frozen=True)
class Source:
    """One address of a file."""

    url: str
    size: int | None = None
    """Bytes, where known."""
    checksum: str | None = None
    """`sha256:...` or another algorithm of hashlib, hexadecimal, where known. Sources with one checksum are one file."""


class _PassOverError(Exception):
    """This address does not have the file; the message says why."""


class _BrokenOffError(Exception):
    """The connection ended early; what has arrived is kept."""


def download(sources: Sequence[Source], target: Path, *, attempts: int = ATTEMPTS, pause_s: float = 1.0) -> Source:
    """Get `target` from the first source that has it, and return that source. Its folder must exist.

    Raises:
        EnvironmentUnfitError: none of them has it, or it cannot be written; the message says what each answered.
    """
    reasons = []
    for source in sources:
        try:
            _from_source(source, target, attempts, pause_s)
            return source
        except _PassOverError as error:
            log.info("%s: %s", source.url, error)
            reasons.append(f"  {source.url}: {error}")
    listed = "\n".join(reasons)
    raise EnvironmentUnfitError(
        f"{target.name} could not be downloaded:\n{listed}",
        remedy="Without a network, get the file on another machine and give it with `--source FILE`.",
    )


def matches(path: Path, source: Source) -> bool:
    """True if a file has the size and checksum of `source`, as far as these are known, and one of them is."""
    if source.size is None and source.checksum is None:
        return False
    return (source.size is None or path.stat().st_size == source.size) and (
        source.checksum is None or _checksum(path, source.checksum) == source.checksum
    )


def _from_source(source: Source, target: Path, attempts: int, pause_s: float) -> None:
    known = hashlib.sha256((source.checksum or source.url).encode()).hexdigest()[:8]
    part = target.with_name(f"{target.name}.{known}.part")
    if source.checksum is None:
        part.unlink(missing_ok=True)  # nothing would tell whether the two halves belong together
    for attempt in range(attempts):
        resumed = part.exists() and part.stat().st_size > 0
        try:
            _receive(source, part)
        except _BrokenOffError as error:
            if attempt + 1 == attempts:
                raise _PassOverError(str(error)) from error
            log.info("%s: %s; trying again.", source.url, error)
            time.sleep(pause_s * 2**attempt)
            continue
        wrong = _difference(part, source)
        if wrong is None:
            part.replace(target)
            return
        part.unlink()
        if not resumed:
            raise _PassOverError(wrong)
        log.info("%s: %s; beginning anew.", source.url, wrong)
    raise _PassOverError("what arrives is never the same")


def _receive(source: Source, part: Path) -> None:
    """Append to `part` what it lacks, or begin it anew where the server cannot continue."""
    have = part.stat().st_size if part.exists() else 0
    if source.size is not None and have >= source.size:
        return
    request = urllib.request.Request(source.url, headers={"User-Agent": f"txl/{txl_train.__version__}", "Accept-Encoding": "identity"})
    if have:
        request.add_header("Range", f"bytes={have}-")
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
            start = _start_of(response)
            if start not in (0, have):
                part.unlink()
                raise _BrokenOffError(f"was asked for the bytes from {have} on and sends others")
            total = _total(response, start)
            if source.size is not None and total not in (None, source.size):
                raise _PassOverError(f"has {total:,} bytes, not {source.size:,}")
            with _opened(part, "ab" if start else "wb") as file:
                _copy(response, file, source, start, total)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE and have:
            part.unlink()
            raise _BrokenOffError("has no more bytes than have arrived") from error
        if error.code in (429, 500, 502, 503, 504):
            raise _BrokenOffError(f"answers {error.code} {error.reason}") from error
        raise _PassOverError(f"answers {error.code} {error.reason}") from error
    except urllib.error.URLError as error:
        raise _PassOverError(f"cannot be reached ({error.reason})") from error
    except (OSError, http.client.HTTPException) as error:
        raise _BrokenOffError(f"broke off ({type(error).__name__}: {error})") from error


def _copy(response: IO[bytes], file: IO[bytes], source: Source, start: int, total: int | None) -> None:
    limit = source.size or total or _LARGEST_BYTES
    have, logged = start, start
    log.info("Downloading %s%s%s", source.url, "" if total is None else f" ({total:,} bytes)", f", from byte {start:,} on" if start else "")
    while block := response.read(_BLOCK_BYTES):
        if have == 0 and is_web_page(block):
            raise _PassOverError("answers with a web page instead of the file")
        have += len(block)
        if have > limit:
            raise _PassOverError(f"sends more than {limit:,} bytes")
        try:
            file.write(block)
        except OSError as error:
            raise _cannot_write(file.name, error) from error
        if total and have - logged >= _LOG_STEP * total:
            logged = have
            log.info("  %.0f %%", 100 * have / total)
    if total is not None and have < total:
        raise _BrokenOffError(f"broke off after {have:,} of {total:,} bytes")


def _start_of(response: Any) -> int:
    """The byte of the file that the answer begins with."""
    if response.status != http.client.PARTIAL_CONTENT:
        return 0
    found = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    return int(found.group(1)) if found else -1


def _total(response: Any, start: int) -> int | None:
    length = response.headers.get("Content-Length", "")
    return start + int(length) if length.isdigit() else None


@contextlib.contextmanager
def _opened(part: Path, mode: str) -> Any:
    try:
        file = open(part, mode)  # noqa: SIM115
    except OSError as error:
        raise _cannot_write(str(part), error) from error
    with file:
        yield file


def _cannot_write(name: str, error: OSError) -> EnvironmentUnfitError:
    return EnvironmentUnfitError(
        f"{name} cannot be written: {error.strerror or error}.", remedy="Free some disk space, or name another folder with `--out`."
    )


def _difference(part: Path, source: Source) -> str | None:
    """Say what is wrong with a file that has arrived; None if it is what it should be."""
    size = os.path.getsize(part)
    if source.size is not None and size != source.size:
        return f"sent {size:,} bytes, not {source.size:,}"
    if source.checksum is not None:
        found = _checksum(part, source.checksum)
        if found != source.checksum:
            return f"sent a file with the checksum {found}, not {source.checksum}"
    return None


def _checksum(path: Path, like: str) -> str:
    algorithm = like.partition(":")[0]
    digest = hashlib.new(algorithm, usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return f"{algorithm}:{digest.hexdigest()}"
