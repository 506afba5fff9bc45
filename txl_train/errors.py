"""The errors a user can meet, each with its cause, its remedy and the exit code of `txl`.

    TxlError                       exit code
    ├── ValidationError            1    a check ran and failed: parity, perplexity, a target
    ├── UsageError                 2    the request itself is wrong
    │   ├── ConfigError            2      a setting is unknown or out of range
    │   └── DataError              2      a corpus is missing, empty or not what its data set says
    ├── EnvironmentUnfitError      3    this machine lacks what was asked for: a GPU, a package, a free disk
    └── ArtifactError              4    a file is unreadable, tampered with or of another version
        ├── CheckpointError        4      a checkpoint
        └── ManifestError          4      an exported artifact and its manifest

`txl` prints the message and the remedy on standard error and never a traceback for these; anything else is
a bug of ours. Ctrl-C ends with 130. This module imports nothing of the toolkit.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import ClassVar


class TxlError(Exception):
    """Base of all errors the toolkit raises on purpose.

    `message` names the cause; `remedy` says what to do next (`None` where the message says it already).
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, remedy: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return self.message if self.remedy is None else f"{self.message}\n{self.remedy}"


class ValidationError(TxlError):
    """A check was carried out and failed."""

    exit_code = 1


class UsageError(TxlError):
    """What was asked for cannot be meant."""

    exit_code = 2


class ConfigError(UsageError):
    """A setting is unknown, of the wrong type or out of range."""


class DataError(UsageError):
    """A corpus is missing, empty, or not what its data set promises."""


class EnvironmentUnfitError(TxlError):
    """This machine lacks something: a GPU, a package, a writable folder, free disk space."""

    exit_code = 3


class PackageMissingError(EnvironmentUnfitError):
    """A package that is not part of every installation is missing: what it would have checked may be left out and said so."""


class ArtifactError(TxlError):
    """A file we wrote is unreadable, was changed, or belongs to another version."""

    exit_code = 4


class CheckpointError(ArtifactError):
    """A checkpoint is unreadable or does not hold what is needed."""


class ManifestError(ArtifactError):
    """An artifact has no manifest, or does not match the one it has."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return " Did you mean `x`?" for the known name closest to `name`, or an empty string."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean `{matches[0]}`?" if matches else ""
