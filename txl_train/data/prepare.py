"""Makes the folder of a data set: train.txt, valid.txt and test.txt, from where the data set is published or from what the user has.

Knows where each data set is to be had and by what it is recognised (sizes, checksums, counts), which files of its archive are which
split, and where a single text is cut. How archives are read stands in `archives`, how files are fetched in `download`, text8's filter in
`text8`, the built-in corpus in `pydoc`.

What is written is recorded in corpus.json beside it: a second call finds it there, checks it and does nothing; one that was interrupted
goes on with what is missing.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any

from txl_train.data import text8
from txl_train.data.archives import Member, members
from txl_train.data.datasets import SPLITS, DatasetSpec, get_dataset
from txl_train.data.download import download, matches
from txl_train.data.idcache import one_at_a_time
from txl_train.data.prepared import INFO_FILE, FolderWriter, Prepared, is_whole, read_info
from txl_train.data.published import LM1B_VOCABULARY, PUBLISHED, Published
from txl_train.errors import DataError, EnvironmentUnfitError, UsageError
from txl_train.files import file_sha256

log = logging.getLogger(__name__)

_DOWNLOADS = ".download"

_LARGEST_BYTES = 1 << 34
"""Nothing in these data sets is larger, unpacked."""

LM1B_SHARDS = 99
"""Parts of One Billion Word's training text, numbered from 1."""
_LM1B_TRAIN = re.compile(r"news\.en-(\d{5})-of-00100")
_LM1B_HELDOUT = "news.en.heldout-00000-of-00050"
_LM1B_NOTE = (
    f"valid.txt and test.txt are the same text, {_LM1B_HELDOUT}, as in the authors' getdata.sh: "
    "the best checkpoint is chosen on the text it is tested on."
)
CHARACTERS = 100_000_000
"""Bytes of enwik8 and characters of text8, in all."""


def prepare(dataset: str, directory: Path, source: Path | None = None) -> Prepared:
    """Make the folder of a data set, unless it is there already.

    Args:
        dataset: wt103, lm1b, enwik8 or text8.
        directory: the folder to be made.
        source: an archive, a file or a folder that holds the data set; None downloads it. For wt103 also WikiText-2; for text8 any text or
            Wikipedia's XML, which are put through its filter; for all of them a folder of train.txt, valid.txt and test.txt.

    Raises:
        UsageError: the data set has no place to be had from.
        DataError: the source is damaged or something else, or the folder holds files of others.
        EnvironmentUnfitError: nothing can be downloaded, or the folder cannot be written.
    """
    spec = get_dataset(dataset)
    if dataset not in PUBLISHED:
        raise UsageError(f"`{dataset}` is published nowhere, so it cannot be prepared.", remedy=f"Choose one of {', '.join(PUBLISHED)}.")
    if source is not None and not source.exists():
        raise DataError(f"There is no {source}.", remedy="Name the archive, the file or the folder that you have with `--source`.")
    downloads = directory / _DOWNLOADS
    with _made_folder(directory), one_at_a_time(directory / INFO_FILE):
        before = read_info(directory)
        if before is not None and before.dataset == dataset and before.complete and is_whole(before, spec):
            before.already_there = True
            return before
        _check_nobody_elses(directory, spec, before)
        given = source if source is not None else _downloaded(dataset, downloads)
        writer = FolderWriter(spec, directory, _describe(given, PUBLISHED[dataset], from_user=source is not None), before)
        _MAKERS[dataset](given, writer)
        if dataset == "lm1b":
            _get_vocabulary(given, writer, downloads, from_user=source is not None)
        writer.finish()
        shutil.rmtree(downloads, ignore_errors=True)
        return writer.prepared


@contextlib.contextmanager
def _made_folder(directory: Path) -> Iterator[None]:
    """Make a folder; where nothing comes of it, it goes again."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EnvironmentUnfitError(
            f"The folder {directory} cannot be made: {error.strerror or error}.", remedy="Name another with `--out`."
        ) from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            directory.rmdir()  # which does nothing to a folder with something in it


# --- where it comes from -------------------------------------------------------------------------------------------------------------


def _downloaded(dataset: str, downloads: Path) -> Path:
    published = PUBLISHED[dataset]
    target = downloads / published.archive
    if target.is_file() and any(matches(target, source) for source in published.sources):
        return target
    with _made_folder(downloads):
        download(published.sources, target)
    return target


def _describe(given: Path, published: Published, *, from_user: bool) -> dict[str, Any]:
    """Say what the source is; a file is known by its checksum."""
    described: dict[str, Any] = {"given": str(given.resolve()) if from_user else given.name, "downloaded": not from_user}
    if given.is_file():
        try:
            sha256 = file_sha256(given)
        except OSError as error:
            raise DataError(f"{given} cannot be read: {error.strerror or error}.") from error
        known = {source.checksum for source in published.sources}
        described |= {"bytes": given.stat().st_size, "sha256": sha256, "published": f"sha256:{sha256}" in known or not from_user}
    return described


def _get_vocabulary(given: Path, writer: FolderWriter, downloads: Path, *, from_user: bool) -> None:
    """Put the vocabulary's file beside the splits: the one that lies in the source's folder, or the published one."""
    name = writer.spec.vocab_file
    assert name is not None
    if name in writer.prepared.files:
        return
    found = next((path for path in (given / name, given.parent / name) if path.is_file()), None) if from_user else None
    if found is None and not from_user:
        try:
            download(LM1B_VOCABULARY, downloads / name)
            found = downloads / name
        except EnvironmentUnfitError as error:
            log.warning("%s", error.message)
    if found is not None:
        writer.copy(name, found)
    else:
        writer.note(f"There is no {name}, so the vocabulary is counted from train.txt; the published one has words seen 3 times or more.")


# --- which files are which split -----------------------------------------------------------------------------------------------------


def _make_words(source: Path, writer: FolderWriter) -> None:
    """WikiText: wiki.*.tokens, or files named after the splits."""
    names = _names(source)
    for pattern in ("wiki.{}.tokens", "{}.txt"):
        wanted = {pattern.format(split): split for split in SPLITS}
        if all(names[name] for name in wanted):
            _write_named(source, wanted, names, writer)
            return
    if names["wiki.train.raw"]:
        raise DataError(
            f"{source} is the raw edition of WikiText, which has no <unk> and another vocabulary.",
            remedy="Get wikitext-103-v1.zip, the edition for words.",
        )
    raise _not_found(source, names, "wiki.train.tokens, wiki.valid.tokens and wiki.test.tokens")


def _make_lm1b(source: Path, writer: FolderWriter) -> None:
    """One Billion Word: the shards of the training text in order, and the first shard held out as valid and as test."""
    if source.is_dir() and all((source / name).is_file() for name in writer.spec.files.values()):
        _write_named(source, {name: split for split, name in writer.spec.files.items()}, _names(source), writer)
        return
    writer.note(_LM1B_NOTE)
    with contextlib.ExitStack() as stack:
        shards = _Lm1bShards(source, lambda: stack.enter_context(tempfile.TemporaryFile(dir=writer.prepared.directory)))
        if writer.wants("train"):
            writer.write("train", shards.training_text())
        elif writer.wants("valid") or writer.wants("test"):
            for _ in shards.training_text():
                pass
        for split in ("valid", "test"):
            if writer.wants(split):
                writer.write(split, shards.held_out())
        if shards.numbers and len(shards.numbers) != LM1B_SHARDS:
            writer.note(f"The training text is {len(shards.numbers)} of {LM1B_SHARDS} shards.")


class _Lm1bShards:
    """The files of One Billion Word, read in the order in which they come; what comes too early waits in files without a name."""

    def __init__(self, source: Path, new_spool: Callable[[], IO[bytes]]) -> None:
        self._source = source
        self._new_spool = new_spool
        self._held_out: IO[bytes] | None = None
        self.numbers: list[int] = []
        """Shards of the training text that were found."""

    def training_text(self) -> Iterator[bytes]:
        """Yield the training text in the order of its shards, and see the shard that is held out pass."""
        waiting: dict[int, IO[bytes]] = {}
        following = 1
        for member in members(self._source):
            if member.name == _LM1B_HELDOUT:
                self._held_out = self._spooled(member)
            elif found := _LM1B_TRAIN.fullmatch(member.name):
                number = int(found.group(1))
                if number in self.numbers:
                    raise DataError(f"{self._source} holds {member.name} twice.", remedy="Name the folder that holds it once.")
                self.numbers.append(number)
                if number != following:
                    waiting[number] = self._spooled(member)
                    continue
                yield from _ended(member.blocks(_LARGEST_BYTES))
                following += 1
                while following in waiting:
                    yield from _ended(_rewound(waiting.pop(following)))
                    following += 1
        for number in sorted(waiting):
            yield from _ended(_rewound(waiting[number]))
        if not self.numbers:
            raise self._missing("shards of training text (news.en-00001-of-00100 and so on)")
        if self._held_out is None:
            raise self._missing(f"{_LM1B_HELDOUT}, which is valid.txt and test.txt")

    def held_out(self) -> Iterator[bytes]:
        """Yield the shard that is held out, once `training_text` has passed it."""
        assert self._held_out is not None
        return _rewound(self._held_out)

    def _spooled(self, member: Member) -> IO[bytes]:
        spool = self._new_spool()
        for block in member.blocks(_LARGEST_BYTES):
            spool.write(block)
        return spool

    def _missing(self, what: str) -> DataError:
        return DataError(f"{self._source} has no {what}.", remedy=f"Give the whole archive, {PUBLISHED['lm1b'].archive}.")


def _make_characters(source: Path, writer: FolderWriter) -> None:
    """enwik8 and text8: one text, of which the last 5 % are the test split, the 5 % before that the validation split."""
    names = _names(source)
    wanted = {name: split for split, name in writer.spec.files.items()}
    if all(names[name] for name in wanted):
        _write_named(source, wanted, names, writer)
        writer.prepared.source["text_sha256"] = _sha256_of_all(writer)
        return
    name = _single(source, names, ("enwik8", "enwik9", "text8"))
    unit = "byte" if writer.spec.unit == "byte" else "character"
    with tempfile.TemporaryFile(dir=writer.prepared.directory) as spool:
        digest = hashlib.sha256()
        n_characters = 0
        for member in members(source):
            if member.name == name:
                for block in _characters(member.blocks(_LARGEST_BYTES), writer):
                    piece = block[: CHARACTERS - n_characters]
                    digest.update(piece)
                    n_characters += spool.write(piece)
                    if len(piece) < len(block):
                        writer.note(f"The text is longer than {CHARACTERS:,} {unit}s; the rest is left out.")
                        break
                break
        writer.prepared.source["text_sha256"] = digest.hexdigest()
        n_held_out = n_characters * 5 // 100
        if n_characters != CHARACTERS:
            writer.note(f"The text has {n_characters:,} {unit}s, not {CHARACTERS:,}; it is cut in the same proportions, 90, 5 and 5 %.")
        sizes = {"train": n_characters - 2 * n_held_out, "valid": n_held_out, "test": n_held_out}
        spool.seek(0)
        for split, size in sizes.items():
            if writer.wants(split):
                writer.write(split, _next_bytes(spool, size))
            else:
                spool.seek(size, 1)


def _sha256_of_all(writer: FolderWriter) -> str:
    """Return the hash of the splits one after the other: the whole text's, unless they are written in another form."""
    digest = hashlib.sha256()
    for name in writer.spec.files.values():
        with (writer.prepared.directory / name).open("rb") as file:
            for block in _rewound(file):
                digest.update(block)
    return digest.hexdigest()


def _characters(blocks: Iterator[bytes], writer: FolderWriter) -> Iterator[bytes]:
    """Yield a text as it is (enwik8), or in the 27 characters of text8, by the filter that it needs."""
    if writer.spec.layout == "enwik8":
        yield from blocks
        return
    head = next(blocks, b"")
    blocks = _again(head, blocks)
    if not head.translate(None, b" abcdefghijklmnopqrstuvwxyz"):
        yield from blocks
        return
    is_xml = b"<mediawiki" in head or b"<text " in head
    writer.note(f"The text was put through text8's filter, as {'Wikipedia XML' if is_xml else 'plain text'}.")
    yield from (text8.filter_xml if is_xml else text8.filter_prose)(blocks)


_MAKERS: Mapping[str, Callable[[Path, FolderWriter], None]] = MappingProxyType(
    {"wt103": _make_words, "lm1b": _make_lm1b, "enwik8": _make_characters, "text8": _make_characters}
)


def _names(source: Path) -> Counter[str]:
    """Return how often each base name appears among a source's files."""
    return Counter(member.name for member in members(source))


def _write_named(source: Path, wanted: Mapping[str, str], names: Counter[str], writer: FolderWriter) -> None:
    """Write the splits whose files have the names `wanted`."""
    twice = [name for name in wanted if names[name] > 1]
    if twice:
        raise DataError(f"{source} holds several files {twice[0]}.", remedy="Name the folder that holds one data set.")
    for member in members(source):
        split = wanted.get(member.name)
        if split is not None and writer.wants(split):
            writer.write(split, member.blocks(_LARGEST_BYTES))


def _single(source: Path, names: Counter[str], known: tuple[str, ...]) -> str:
    """Return the name of the one text among a source's files."""
    found = [name for name in known if names[name] == 1]
    if not found:
        found = [name for name in names if not name.startswith(".")]
    if len(found) != 1 or names[found[0]] != 1:
        raise _not_found(source, names, "one file of text")
    return found[0]


def _not_found(source: Path, names: Counter[str], what: str) -> DataError:
    listed = ", ".join(sorted(names)[:8]) or "nothing"
    return DataError(
        f"{source} does not hold {what}, but {listed}{', ...' if len(names) > 8 else ''}.",
        remedy="Give the archive as it is published, or a folder of train.txt, valid.txt and test.txt.",
    )


def _check_nobody_elses(directory: Path, spec: DatasetSpec, before: Prepared | None) -> None:
    """Raise a `DataError` rather than write over files that were not written here."""
    if before is not None and before.dataset != spec.name:
        raise DataError(f"{directory} holds data set `{before.dataset}`.", remedy="Name another folder with `--out`.")
    for name in spec.files.values():
        if before is None and (directory / name).exists():
            raise DataError(
                f"{directory / name} is there already and was not written by this command, so it is not overwritten.",
                remedy="Name another folder with `--out`. Files that are the splits already need no preparation: give their folder with "
                "`--data`.",
            )


def _rewound(file: IO[bytes]) -> Iterator[bytes]:
    file.seek(0)
    while block := file.read(1 << 20):
        yield block


def _next_bytes(file: IO[bytes], size: int) -> Iterator[bytes]:
    while size and (block := file.read(min(size, 1 << 20))):
        size -= len(block)
        yield block


def _ended(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """Yield a text, and a line break after it where it has none."""
    last = b"\n"
    for block in blocks:
        last = block
        yield block
    if not last.endswith(b"\n"):
        yield b"\n"


def _again(first: bytes, rest: Iterator[bytes]) -> Iterator[bytes]:
    if first:
        yield first
    yield from rest
