"""The built-in corpus: the prose of CPython's own language help, so that a model can be trained without a download.

Knows how `pydoc_data.topics` (the text behind `help("assert")`) is laid out, which of its paragraphs are prose, how they become
words, and which topic belongs to which split. The result is an ordinary folder of train.txt, valid.txt and test.txt, one paragraph
a line, which `txl_train.data.corpus` reads like any other.

The text is narrow technical English and differs between Python versions: a perplexity on it means something only beside the
Python version and the hashes in corpus.json.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import platform
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from txl_train.data.datasets import SPLITS, get_dataset
from txl_train.errors import DataError, EnvironmentUnfitError
from txl_train.files import whole_or_absent

RULES_VERSION = 1
"""Version of the rules below; a folder built by other rules is built anew."""

INFO_FILE = "corpus.json"
"""The file beside the splits that says where they come from."""

SPLIT_SALT = "1632"
"""Chosen once, so that the three splits come out near 80, 10 and 10 % of the tokens under Python 3.10 to 3.13."""


@dataclass(frozen=True)
class SplitInfo:
    """Counts of one split; tokens include one `<eos>` a line."""

    lines: int
    tokens: int
    types: int
    topics: int
    sha256: str


@dataclass(frozen=True)
class BuildInfo:
    """What `build` wrote, or found already written."""

    directory: Path
    python_version: str
    splits: Mapping[str, SplitInfo]

    @property
    def n_tokens(self) -> int:
        """Tokens of all splits, one `<eos>` a line included."""
        return sum(split.tokens for split in self.splits.values())

    def to_dict(self) -> dict[str, Any]:
        """Return the content of corpus.json."""
        return {
            "what": "Prose paragraphs of CPython's pydoc_data.topics, tokenised, split by topic.",
            "licence": "Python Software Foundation License (documentation of CPython)",
            "rules_version": RULES_VERSION,
            "python_version": self.python_version,
            "splits": {name: vars(split) for name, split in self.splits.items()},
        }


# --- paragraphs ------------------------------------------------------------------------------------------------------------------

_BULLET = re.compile(r"^\s*(?:\*|\d+\.|\[\d+\]|\(\d+\))\s+")
_NOTE = re.compile(r"^(?:Note|See also|Warning|Caution|Tip|Hint|CPython implementation detail|Implementation note): ")
_FOOTNOTE_MARK = re.compile(r"\s*\[\d+\](?=[\s.,;:)]|$)")
_WORD = re.compile(r"^[(\"'*]*[A-Za-z][a-z]*(?:['-][A-Za-z][a-z]*)*[)\"'*.,;:!?]*$")
_SENTENCE_END = re.compile(r"[.?!:][\"')]*$")
_SENTENCE_START = re.compile(r"^[(\"'*]*[A-Z0-9_\"'*]")
_STRAIGHT = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "`": '"', "\u2026": "...", "\u00a0": " "})

MIN_TOKENS = 1_000
"""A split smaller than this many tokens cannot be learned from or judged on."""

MIN_WORDS = 6
"""A paragraph shorter than this many blank-separated words is a label rather than prose."""
MIN_PLAIN_SHARE = 0.6
"""Share of blank-separated words that must be plain English words, so that code and option lists are left out."""


def paragraphs(topic_text: str) -> Iterator[str]:
    """Yield the prose paragraphs of one topic as single lines, markup removed, in order.

    Headings, grammar rules, code, tables, signatures and labels are left out; the text of list items and definitions is kept
    where it is prose.
    """
    for block in re.split(r"\n[ \t]*\n", topic_text):
        lines = [line.rstrip() for line in block.split("\n") if line.strip()]
        for item in _items(lines):
            text = _plain(_unwrap(item))
            if _is_prose(text):
                yield text


def _items(lines: list[str]) -> Iterator[list[str]]:
    """Cut a block into list items, and a definition's term from its text: both begin where the indentation says so."""
    item: list[str] = []
    for line in lines:
        starts_item = bool(_BULLET.match(line))
        deeper_than_first = len(item) == 1 and not _BULLET.match(item[0]) and _indent(line) > _indent(item[0])
        if item and (starts_item or deeper_than_first):
            yield item
            item = []
        item.append(line)
    if item:
        yield item


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _unwrap(lines: list[str]) -> str:
    """Join wrapped lines; a word broken after its hyphen ("built-" / "in") is joined without a blank."""
    text = ""
    for line in lines:
        line = line.strip()
        if not text:
            text = line
        elif re.search(r"\w-$", text) and line[:1].isalnum():
            text += line
        else:
            text += " " + line
    return text


def _plain(text: str) -> str:
    """Remove what is markup and not text: bullets, emphasis, footnote marks, admonition labels; quotes become straight."""
    text = _BULLET.sub("", text.translate(_STRAIGHT))
    text = _FOOTNOTE_MARK.sub("", text)
    text = re.sub(r"\*\*(\w[^*]*)\*\*", r"\1", text)
    text = re.sub(r"(?<![\w*\"'])\*(\w[^*\"]*)\*(?![\w*])", r"\1", text)
    return _NOTE.sub("", text).strip()


def _is_prose(text: str) -> bool:
    words = text.split()
    if len(words) < MIN_WORDS or "::=" in text or ">>>" in text:
        return False
    if not _SENTENCE_START.search(text) or not _SENTENCE_END.search(text):
        return False
    return sum(1 for word in words if _WORD.match(word)) >= MIN_PLAIN_SHARE * len(words)


# --- words -------------------------------------------------------------------------------------------------------------------------

_TOKEN = re.compile(
    r"""
    https?://[^\s()<>"]*[^\s()<>".,;:]              # an address
  | (?:e\.g|i\.e|etc|vs)\.(?!\w)                    # abbreviations keep their dots
  | (?<=[A-Za-z])'(?:s|t|re|ve|ll|d|m)\b            # the rest of "it's", "don't"
  | (?P<word>\w+(?:(?:[-.]|,(?=\d{3}\b))\w+)*)      # a word, name or number, with marks inside
  | \.\.\. | ::= | (?:\*\*|//|<<|>>)=? | [-+*/%@&|^=!<>:]= | -> | --
  | \\[A-Za-z]
  | \S
    """,
    re.VERBOSE,
)
_INNER_MARK = re.compile(r"(?<=\w)([-.,])(?=\w)")


def tokenize(text: str) -> list[str]:
    """Return the words and marks of a text in WikiText's manner: `built-in` is `built @-@ in`, `3.11` is `3 @.@ 11`; case is kept."""
    tokens: list[str] = []
    for match in _TOKEN.finditer(text.translate(_STRAIGHT)):
        if match.lastgroup == "word":
            tokens.extend(_INNER_MARK.sub(r" @\1@ ", match.group()).split())
        else:
            tokens.append(match.group())
    return tokens


# --- the folder --------------------------------------------------------------------------------------------------------------------


def split_of(topic: str) -> str:
    """Return the split a topic belongs to, by a hash of its name: the same on every machine and in every Python version."""
    bucket = int(hashlib.sha256(f"{SPLIT_SALT}:{topic}".encode()).hexdigest(), 16) % 10
    return {8: "valid", 9: "test"}.get(bucket, "train")


def corpus_lines(topics: Mapping[str, str]) -> dict[str, dict[str, list[str]]]:
    """Return split to topic to tokenised lines. A paragraph that several topics share stays with the first in alphabetical order."""
    lines: dict[str, dict[str, list[str]]] = {split: {} for split in SPLITS}
    seen: set[str] = set()
    for topic in sorted(topics):
        for paragraph in paragraphs(topics[topic]):
            line = " ".join(tokenize(paragraph))
            if line not in seen:
                seen.add(line)
                lines[split_of(topic)].setdefault(topic, []).append(line)
    return lines


def build(directory: Path | str) -> BuildInfo:
    """Write train.txt, valid.txt, test.txt and corpus.json into `directory`, and return what they hold.

    A folder that holds such a corpus whole and unchanged is left as it is, also one made by another Python version, so that a run
    can go on with its text. A folder with other people's files of these names is a `DataError`; a Python without the
    help texts, or a folder that cannot be written, an `EnvironmentUnfitError`.
    """
    directory = Path(directory)
    found = read_info(directory)
    if found is not None:
        return found
    spec = get_dataset("pydoc")
    if not _is_ours(directory):
        for name in spec.files.values():
            if (directory / name).exists():
                raise DataError(
                    f"{directory / name} is there already and does not belong to the built-in corpus, so it is not overwritten.",
                    remedy="Give another folder for the built-in corpus, or train on this text with `--dataset text`.",
                )
    splits: dict[str, SplitInfo] = {}
    texts: dict[str, bytes] = {}
    for split, topics in corpus_lines(_topics()).items():
        lines = [line for topic_lines in topics.values() for line in topic_lines]
        words = Counter(word for line in lines for word in line.split(" "))
        texts[split] = "".join(f"{line}\n" for line in lines).encode()
        splits[split] = SplitInfo(
            lines=len(lines),
            tokens=words.total() + len(lines),
            types=len(words) + 1,
            topics=len(topics),
            sha256=hashlib.sha256(texts[split]).hexdigest(),
        )
    if any(split.tokens < MIN_TOKENS for split in splits.values()):
        raise EnvironmentUnfitError(
            f"The help texts of Python {platform.python_version()} hold too little prose to train on.",
            remedy="Use Python 3.10 to 3.13, or text of your own with `--dataset text`.",
        )
    info = BuildInfo(directory=directory, python_version=platform.python_version(), splits=splits)
    with whole_or_absent(directory / INFO_FILE) as file:  # first, so that a folder is known as ours whenever this is killed
        file.write((json.dumps(info.to_dict(), indent=2) + "\n").encode())
    for split, text in texts.items():
        with whole_or_absent(directory / spec.files[split]) as file:
            file.write(text)
    return info


def _is_ours(directory: Path) -> bool:
    """True if corpus.json says that this module wrote the folder's files, be they still whole or not."""
    try:
        return "rules_version" in json.loads((directory / INFO_FILE).read_bytes())
    except (OSError, ValueError, TypeError, RecursionError):
        return False


def read_info(directory: Path) -> BuildInfo | None:
    """Return what corpus.json says of a folder, or None unless it is whole: this version's rules, and files as they were written."""
    try:
        values = json.loads((directory / INFO_FILE).read_bytes())
        if values["rules_version"] != RULES_VERSION:
            return None
        splits = {name: SplitInfo(**split) for name, split in values["splits"].items()}
        for split, name in get_dataset("pydoc").files.items():
            if hashlib.sha256((directory / name).read_bytes()).hexdigest() != splits[split].sha256:
                return None
        return BuildInfo(directory=directory, python_version=values["python_version"], splits=splits)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _topics() -> Mapping[str, str]:
    try:
        topics: Mapping[str, str] = importlib.import_module("pydoc_data.topics").topics
    except (ImportError, AttributeError) as error:
        raise EnvironmentUnfitError(
            "This Python comes without its help texts (module pydoc_data.topics), of which the built-in corpus is made.",
            remedy="Install the full standard library, or train on text of your own with `--dataset text`.",
        ) from error
    return topics
