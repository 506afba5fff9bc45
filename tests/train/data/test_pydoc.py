"""The built-in corpus: what is prose, what is not, and a folder that others can rely on."""

from __future__ import annotations

import hashlib
import importlib
import json
import platform
from pathlib import Path
from types import SimpleNamespace

import pytest

from txl_train.data import pydoc
from txl_train.data.corpus import load_corpus
from txl_train.data.datasets import get_dataset
from txl_train.data.pydoc import build, corpus_lines, paragraphs, read_info
from txl_train.errors import DataError, EnvironmentUnfitError

TOPIC = """The "assert" statement
**********************

Assert statements are a convenient way to insert debugging assertions
into a built-
in program:

   assert_stmt ::= "assert" expression ["," expression]

The simple form, "assert expression", is equivalent to

   if __debug__:
       if not expression: raise AssertionError

* They are *valid* numeric literals which, when passed to their class
  constructor, produce an object. [1]

* short item

Integers ("int")
   These represent numbers in an unlimited range, subject to available
   memory only.

+-----------+--------------------------------------------------+
| Operator  | This is a description of the operator and prose. |
+-----------+--------------------------------------------------+

Note: The operator
+= is read together with the words around it, and this is prose.

>>> print("This looks a little bit like prose but is code.")
"""


def test_prose_is_kept_and_headings_grammar_code_and_tables_are_not() -> None:
    assert list(paragraphs(TOPIC)) == [
        "Assert statements are a convenient way to insert debugging assertions into a built-in program:",
        "They are valid numeric literals which, when passed to their class constructor, produce an object.",
        "These represent numbers in an unlimited range, subject to available memory only.",
        "The operator += is read together with the words around it, and this is prose.",
    ]


def test_a_paragraph_of_several_topics_stands_in_one_split_only() -> None:
    shared = "This very paragraph stands in a large number of topics.\n\n"
    topics = {f"topic{i}": shared + f"But topic number {i} has this line of its own.\n" for i in range(60)}
    lines = [line for split in corpus_lines(topics).values() for topic in split.values() for line in topic]
    assert len(lines) == len(set(lines)) == 61


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> pydoc.BuildInfo:
    """Build the corpus once."""
    return build(tmp_path_factory.mktemp("pydoc"))


def test_the_splits_are_near_80_10_10_and_share_no_paragraph(built: pydoc.BuildInfo) -> None:
    share = {name: split.tokens / built.n_tokens for name, split in built.splits.items()}
    assert share["train"] == pytest.approx(0.8, abs=0.05)
    assert share["valid"] == pytest.approx(0.1, abs=0.04)
    assert share["test"] == pytest.approx(0.1, abs=0.04)
    lines = [line for name in built.splits for line in (built.directory / f"{name}.txt").read_text().splitlines()]
    assert len(lines) == len(set(lines))
    assert 40_000 < built.n_tokens < 90_000


def test_the_text_reads_like_prose_in_tokens(built: pydoc.BuildInfo) -> None:
    text = (built.directory / "train.txt").read_text()
    for line in text.splitlines():
        assert len(line.split(" ")) >= pydoc.MIN_WORDS
        assert "::=" not in line
        assert "  " not in line
    assert not set("\u2018\u2019\u201c\u201d\t") & set(text)
    words = text.split()
    assert sum(word.isalpha() and word.islower() for word in words) > 0.6 * len(words)


def test_the_counts_are_those_the_corpus_has_when_it_is_read(built: pydoc.BuildInfo, tmp_path: Path) -> None:
    corpus = load_corpus(built.directory, get_dataset("pydoc"), cache_dir=tmp_path)
    for name, split in built.splits.items():
        assert corpus.n_tokens(name) == split.tokens
        assert corpus.sha256(name) == split.sha256
    assert len(corpus.vocabulary) == built.splits["train"].types + 1  # <unk>


def test_building_twice_gives_the_same_bytes_and_says_what_they_are(built: pydoc.BuildInfo, tmp_path: Path) -> None:
    again = build(tmp_path)
    assert again.splits == built.splits
    said = json.loads((tmp_path / "corpus.json").read_text())
    assert said["python_version"] == platform.python_version()
    for name in built.splits:
        assert said["splits"][name]["sha256"] == hashlib.sha256((tmp_path / f"{name}.txt").read_bytes()).hexdigest()


def test_a_whole_folder_is_left_as_it_is_also_one_of_another_python(tmp_path: Path) -> None:
    build(tmp_path)
    said = json.loads((tmp_path / "corpus.json").read_text())
    (tmp_path / "corpus.json").write_text(json.dumps(said | {"python_version": "3.10.0"}))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert build(tmp_path).python_version == "3.10.0"
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_a_damaged_folder_is_built_anew(built: pydoc.BuildInfo, tmp_path: Path) -> None:
    build(tmp_path)
    (tmp_path / "valid.txt").write_text("changed\n")
    assert read_info(tmp_path) is None
    assert build(tmp_path).splits == built.splits
    assert read_info(tmp_path) is not None


def test_a_folder_whose_build_was_killed_halfway_is_built_anew(
    built: pydoc.BuildInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = pydoc.whole_or_absent

    def interrupted(path: Path) -> object:
        if path.name == "valid.txt":
            raise KeyboardInterrupt
        return write(path)

    monkeypatch.setattr(pydoc, "whole_or_absent", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path)
    monkeypatch.undo()
    assert (tmp_path / "train.txt").exists()
    assert read_info(tmp_path) is None
    assert build(tmp_path).splits == built.splits


def test_other_peoples_files_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("my own text\n")
    with pytest.raises(DataError, match="not overwritten") as caught:
        build(tmp_path)
    assert "--dataset text" in str(caught.value.remedy)
    assert (tmp_path / "train.txt").read_text() == "my own text\n"
    assert [path.name for path in tmp_path.iterdir()] == ["train.txt"]


def test_a_python_without_help_texts_is_an_unfit_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(EnvironmentUnfitError, match="pydoc_data") as caught:
        build(tmp_path)
    assert "--dataset text" in str(caught.value.remedy)


def test_help_texts_without_prose_are_an_unfit_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib, "import_module", lambda name: SimpleNamespace(topics={"assert": TOPIC}))
    with pytest.raises(EnvironmentUnfitError, match="too little prose"):
        build(tmp_path)
    assert not list(tmp_path.iterdir())
