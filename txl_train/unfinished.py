"""Files and folders that are still being made, beside the place that they will take.

They have a name that says so and on which machine they are made, and are locked as long as their process lives, so that what a killed
process has left is known for certain, whatever the clock says, and goes when the next one writes into the same folder.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import logging
import os
import platform
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

log = logging.getLogger(__name__)

_NAME = re.compile(r"\..+\.([0-9a-f]{8})-[0-9a-f]{8}\.tmp", re.DOTALL)
_LOCK = re.compile(r"\.(?:[0-9a-f]{40}\.(?:ids|vocab\.json)|corpus\.json)\.lock")
"""Locks of the token cache and of prepared folders, which go with their holder unless it is killed."""
_LONGEST_NAME = 50
"""Characters of the final name that are repeated; a file system takes 255 bytes, a character has 4 at most."""
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def name_beside(path: Path) -> Path:
    """Return a new name in the folder of `path` for what is to become `path`."""
    return path.with_name(f".{path.name[:_LONGEST_NAME]}.{_machine()}-{secrets.token_hex(4)}.tmp")


@contextlib.contextmanager
def file_beside(path: Path) -> Iterator[BinaryIO]:
    """Open a file that takes the name `path` where the block ends well and vanishes otherwise. Raises `OSError`."""
    remove_abandoned(path.parent)
    file, unfinished = _new_file(path)
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(unfinished, path)  # still locked
        _sync_folder(path.parent)
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)


@contextlib.contextmanager
def folder_beside(path: Path) -> Iterator[Path]:
    """Yield a new folder beside `path`; what has its name at the end vanishes. Raises `OSError`."""
    remove_abandoned(path.parent)
    with contextlib.ExitStack() as held:
        folder = _new_folder(path, held)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def exchange(folder: Path, path: Path) -> None:
    """Swap the names of two folders: in one step where the system can, so that a whole one is at `path` at any time. Raises `OSError`."""
    if _exchanged_at_once(folder, path):
        return
    aside = name_beside(path)
    os.rename(path, aside)
    try:
        os.rename(folder, path)
    except BaseException:
        os.rename(aside, path)
        raise
    os.rename(aside, folder)


def remove_abandoned(folder: Path) -> None:
    """Remove what killed processes of this machine have left unfinished in `folder`."""
    try:
        names = os.listdir(folder)
    except OSError:
        return
    for name in names:
        match = _NAME.fullmatch(name)
        if _LOCK.fullmatch(name) or (match and match[1] == _machine()):
            _remove_unless_held(folder / name)


def _remove_unless_held(path: Path) -> None:
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()
            log.debug("Removed %s, which a killed process had left.", path)
        finally:
            os.close(descriptor)


def _new_file(path: Path) -> tuple[BinaryIO, Path]:
    while True:
        unfinished = name_beside(path)
        file = open(unfinished, "xb")  # noqa: SIM115  # the caller closes it
        if _held(file.fileno(), unfinished):
            return file, unfinished
        file.close()


def _new_folder(path: Path, held: contextlib.ExitStack) -> Path:
    while True:
        folder = name_beside(path)
        folder.mkdir(mode=0o700)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        if _held(descriptor, folder):
            held.callback(os.close, descriptor)
            return folder
        os.close(descriptor)


def _held(descriptor: int, path: Path) -> bool:
    """Lock what was just made; False where somebody took it for abandoned in the moment before."""
    with contextlib.suppress(OSError):  # a file system without locks
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _exchanged_at_once(one: Path, other: Path) -> bool:
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2  # Linux
    except (AttributeError, OSError, TypeError):
        return False
    rename.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
    return bool(rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0)


def _machine() -> str:
    """A tag of this machine: the locks of another one may not be seen here."""
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]


def _sync_folder(folder: Path) -> None:
    """Make the move durable, where folders can be opened."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
