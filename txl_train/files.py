"""Files on disk: written whole or not at all, and known by the sha256 of their bytes. Knows nothing of what is in them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Iterator
from io import RawIOBase
from pathlib import Path
from typing import Any, BinaryIO

from txl_train.errors import EnvironmentUnfitError, UsageError
from txl_train.unfinished import file_beside


def file_sha256(path: str | Path) -> str:
    """Return the sha256 of a file's bytes as 64 hexadecimal digits. Raises `OSError` where it cannot be read."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        for block in blocks(file):
            digest.update(block)
    return digest.hexdigest()


def blocks(file: RawIOBase | BinaryIO, n_bytes: int | None = None) -> Iterator[memoryview]:
    """Yield what is left of a file, or its next `n_bytes`, in pieces that each lie where the one before did: half the time of new ones."""
    buffer = memoryview(bytearray(1 << 18))
    left = n_bytes
    while left is None or left > 0:
        size: int = file.readinto(buffer if left is None else buffer[: min(left, len(buffer))])  # type: ignore[union-attr]
        if not size:
            return
        yield buffer[:size]
        left = None if left is None else left - size


@contextlib.contextmanager
def whole_or_absent(path: Path) -> Iterator[BinaryIO]:
    """Open `path` for writing under a temporary name and rename it when the block ends well: no reader sees half a file.

    The folder is made where needed. An `OSError` in between (no permission, full disk) becomes an `EnvironmentUnfitError`.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with file_beside(path) as file:
            yield file
    except OSError as error:
        raise EnvironmentUnfitError(
            f"{path} cannot be written: {error.strerror or error}.",
            remedy="Free some disk space, allow writing there, or choose another folder.",
        ) from error


def check_replaceable(path: Path, beginning: bytes) -> None:
    """Refuse to write over a file that does not begin as results of this kind do: it is somebody's checkpoint or text.

    Raises `UsageError`. Called before the work whose result is to be written.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(len(beginning))
    except FileNotFoundError:
        return
    except OSError as error:
        raise EnvironmentUnfitError(f"{path} cannot be written: {error.strerror}.", remedy="Name another file with `--out`.") from error
    if start not in (b"", beginning):
        raise UsageError(f"{path} exists and is no earlier result, so it is not written over.", remedy="Name another file with `--out`.")


def finite(value: Any) -> Any:
    """Return plain values with None in place of every number that is not finite: JSON has no such numbers."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, (list, tuple)) else value


def write_json(path: Path, document: Any) -> None:
    """Write `document` as JSON, whole or not at all. Raises `EnvironmentUnfitError`, and `ValueError` for a number JSON does not have."""
    text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)
    with whole_or_absent(path) as file:
        file.write((text + "\n").encode())
