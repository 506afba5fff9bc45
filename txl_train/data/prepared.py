"""The folder of a data set while it is made: writes splits, counts what is in them, and records all of it in corpus.json beside them.

Every file is whole or absent. What an interrupted run has written of the same source is kept. Where the text comes from is known to
`txl_train.data.prepare`.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import logging
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from txl_train.data.datasets import SPLITS, DatasetSpec
from txl_train.data.layouts import Found, Portion, read, rule_of
from txl_train.data.published import PUBLISHED
from txl_train.errors import DataError
from txl_train.files import file_sha256, whole_or_absent, write_json

log = logging.getLogger(__name__)

INFO_FILE = "corpus.json"
FORMAT = "txl-prepared/1"


@dataclass(frozen=True)
class SplitFile:
    """What was written of one split."""

    file: str
    bytes: int
    lines: int
    tokens: int
    """As the data set is read: words and line ends, characters or bytes."""
    sha256: str


@dataclass
class Prepared:
    """A data set's folder, finished or on the way there."""

    dataset: str
    directory: Path
    source: dict[str, Any]
    """Where it is from: `given` (address or path), and for a file `bytes`, `sha256`, and whether it is the `published` one."""
    splits: dict[str, SplitFile] = field(default_factory=dict)
    edition: str | None = None
    """Name of the published edition that it is, by counts or checksum."""
    notes: list[str] = field(default_factory=list)
    """What a user should know of it."""
    files: dict[str, str] = field(default_factory=dict)
    """Other files that belong to it, with their sha256."""
    complete: bool = False
    already_there: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return the content of corpus.json."""
        return {
            "format": FORMAT,
            "dataset": self.dataset,
            "complete": self.complete,
            "edition": self.edition,
            "source": self.source,
            "splits": {name: vars(split) for name, split in self.splits.items()},
            "files": self.files,
            "notes": self.notes,
        }


def read_info(directory: Path) -> Prepared | None:
    """Return what corpus.json says of a folder, or None where it is not one of this module's."""
    try:
        values = json.loads((directory / INFO_FILE).read_bytes())
        if values["format"] != FORMAT:
            return None
        return Prepared(
            dataset=values["dataset"],
            directory=directory,
            source=values["source"],
            splits={name: SplitFile(**split) for name, split in values["splits"].items()},
            edition=values["edition"],
            notes=values["notes"],
            files=values["files"],
            complete=values["complete"],
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


class FolderWriter:
    """Writes splits, each whole or not at all, and records them; keeps those that an interrupted run has written of the same source."""

    def __init__(self, spec: DatasetSpec, directory: Path, source: dict[str, Any], before: Prepared | None) -> None:
        self.spec = spec
        self.prepared = Prepared(dataset=spec.name, directory=directory, source=source)
        if before is not None and before.dataset == spec.name and "sha256" in source and before.source.get("sha256") == source["sha256"]:
            self.prepared.splits = {name: split for name, split in before.splits.items() if _is_unchanged(directory, split)}
            self.prepared.files = {name: sha256 for name, sha256 in before.files.items() if _has_sha256(directory / name, sha256)}
            for name in self.prepared.splits:
                log.info("%s is there already.", directory / spec.files[name])

    def wants(self, split: str) -> bool:
        """True if a split is still to be written."""
        return split not in self.prepared.splits

    def write(self, split: str, blocks: Iterable[bytes]) -> None:
        """Write a split, given in portions."""
        name = self.spec.files[split]
        path = self.prepared.directory / name
        log.info("Writing %s", path)
        counts = _Counts(self.spec)
        with whole_or_absent(path) as file:
            for block in blocks:
                file.write(block)
                counts.add(block, path)
            if not counts.n_bytes:
                raise DataError(f"The {split} split would be empty.", remedy="Give the whole data set, or a longer text.")
            self._record()  # before the file has its name: killed in between, this folder must be known as ours
        self.prepared.splits[split] = SplitFile(
            file=name, bytes=counts.n_bytes, lines=counts.n_lines, tokens=counts.tokens(path), sha256=counts.sha256
        )
        self._record()

    def copy(self, name: str, source: Path) -> None:
        """Take over a file that is no split."""
        target = self.prepared.directory / name
        with source.open("rb") as content, whole_or_absent(target) as file:
            shutil.copyfileobj(content, file)
        self.prepared.files[name] = file_sha256(target)
        self._record()

    def note(self, text: str) -> None:
        """Add to what a user should know."""
        if text not in self.prepared.notes:
            self.prepared.notes.append(text)

    def finish(self) -> None:
        """Say that all is written."""
        editions = PUBLISHED[self.spec.name].editions
        self.prepared.splits = {split: self.prepared.splits[split] for split in SPLITS}
        self.prepared.edition = next((name for name, facts in editions.items() if self._has(facts)), None)
        if self.prepared.edition is None:
            expected = "; ".join(f"{name}: {_phrase(facts)}" for name, facts in editions.items())
            self.note(f"This is no published edition ({expected}).")
        self.prepared.complete = True
        self._record()

    def _has(self, facts: Mapping[str, int | str]) -> bool:
        splits = self.prepared.splits
        own: dict[str, int | str | None] = {split: splits[split].tokens for split in SPLITS}
        own |= {"train_lines": splits["train"].lines, "text_sha256": self.prepared.source.get("text_sha256")}
        return all(own[name] == value for name, value in facts.items())

    def _record(self) -> None:
        write_json(self.prepared.directory / INFO_FILE, self.prepared.to_dict())


class _Counts:
    """Counts a split while it is written."""

    def __init__(self, spec: DatasetSpec) -> None:
        self._spec = spec
        self._digest = hashlib.sha256()
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._within_word = False
        self._n_words = 0
        self._last = b"\n"
        self.n_bytes = 0
        self.n_lines = 0

    def add(self, block: bytes, path: Path) -> None:
        self._digest.update(block)
        self.n_bytes += len(block)
        self.n_lines += block.count(b"\n")
        self._last = block[-1:] or self._last
        if self._spec.layout == "words":
            try:
                text = self._decoder.decode(block)
            except UnicodeDecodeError as error:
                raise DataError(f"The text for {path} is not UTF-8 ({error.reason}).", remedy="Convert it to UTF-8.") from error
            if text:
                self._n_words += len(text.split()) - (self._within_word and not text[0].isspace())
                self._within_word = not text[-1].isspace()

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def tokens(self, path: Path) -> int:
        """Return how many tokens the data set has in the file `path`, which was just written."""
        if self._spec.layout == "words":
            return self._n_words + self.n_lines + (self._last != b"\n") + (self._spec.line_end == "sentence")
        whole = Portion(0, self.n_bytes, self.n_bytes)
        return sum(map(len, read(path, rule_of(path, self._spec), whole, Found())))


def is_whole(prepared: Prepared, spec: DatasetSpec) -> bool:
    """True if all splits are there and as they were written."""
    return set(prepared.splits) == set(spec.files) and all(_is_unchanged(prepared.directory, split) for split in prepared.splits.values())


def _is_unchanged(directory: Path, split: SplitFile) -> bool:
    path = directory / split.file
    return path.is_file() and path.stat().st_size == split.bytes and _has_sha256(path, split.sha256)


def _has_sha256(path: Path, sha256: str) -> bool:
    try:
        return file_sha256(path) == sha256
    except OSError:
        return False


def _phrase(facts: Mapping[str, int | str]) -> str:
    named = {"train_lines": "lines in train.txt", "text_sha256": "text with sha256"}
    return ", ".join(
        f"{value:,} {named.get(name, f'tokens in {name}.txt')}" if isinstance(value, int) else f"{named[name]} {value[:16]}..."
        for name, value in facts.items()
    )
