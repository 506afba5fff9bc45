"""Folders of data sets are made of what is published and of what the user has, checked, and never half."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import io
import json
import multiprocessing
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from txl_train.data import prepare as prepare_module
from txl_train.data import prepared as prepared_module
from txl_train.data import pydoc
from txl_train.data.corpus import load_corpus
from txl_train.data.datasets import SPLITS, get_dataset
from txl_train.data.download import Source
from txl_train.data.prepare import prepare
from txl_train.data.prepared import Prepared, read_info
from txl_train.data.published import PUBLISHED
from txl_train.errors import DataError, EnvironmentUnfitError, UsageError

WIKI = {"train": " \n = A = \n \n the cat <unk> \n", "valid": " the cat \n", "test": " a <unk> \n"}


def zipped(path: Path, files: dict[str, str]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


@pytest.fixture
def wikitext(tmp_path: Path) -> Path:
    """An archive in the manner of WikiText."""
    return zipped(tmp_path / "w.zip", {f"wikitext-103/wiki.{split}.tokens": WIKI[split] for split in ("test", "train", "valid")})


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def written(folder: Path) -> dict[str, str]:
    return {split: (folder / f"{split}.txt").read_text() for split in SPLITS}


def check_counts(prepared: Prepared, tmp_path: Path) -> None:
    """What was counted while writing is what the corpus reads."""
    corpus = load_corpus(prepared.directory, get_dataset(prepared.dataset), cache_dir=tmp_path / "cache")
    for name, split in prepared.splits.items():
        path = prepared.directory / split.file
        assert split.tokens == corpus.n_tokens(name)
        assert split.sha256 == corpus.sha256(name) == hashlib.sha256(path.read_bytes()).hexdigest()
        assert (split.bytes, split.lines) == (path.stat().st_size, path.read_bytes().count(b"\n"))


# --- WikiText ---


def test_wikitexts_archive_becomes_three_splits(wikitext: Path, out: Path, tmp_path: Path) -> None:
    prepared = prepare("wt103", out, wikitext)
    assert written(out) == WIKI
    assert prepared.source["sha256"] == hashlib.sha256(wikitext.read_bytes()).hexdigest()
    assert not prepared.source["published"]
    assert prepared.edition is None
    assert "103,227,021 tokens in train.txt" in prepared.notes[0]
    check_counts(prepared, tmp_path)
    assert sorted(path.name for path in out.iterdir()) == ["corpus.json", "test.txt", "train.txt", "valid.txt"]


def test_a_folder_that_is_there_is_checked_and_left_as_it_is(wikitext: Path, out: Path) -> None:
    first = prepare("wt103", out, wikitext)
    times = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    wikitext.unlink()
    again = prepare("wt103", out)
    assert again.already_there
    assert again.splits == first.splits
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == times


def test_a_damaged_split_is_written_again_and_the_others_are_kept(wikitext: Path, out: Path) -> None:
    prepare("wt103", out, wikitext)
    kept = (out / "train.txt").stat().st_mtime_ns
    (out / "valid.txt").write_text("half of it")
    prepared = prepare("wt103", out, wikitext)
    assert not prepared.already_there
    assert written(out) == WIKI
    assert (out / "train.txt").stat().st_mtime_ns == kept


def test_an_interrupted_run_goes_on_with_what_is_missing(wikitext: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = prepare_module.FolderWriter.write

    def interrupted(self: prepare_module.FolderWriter, split: str, blocks: object) -> None:
        if split == "valid":
            raise KeyboardInterrupt
        write(self, split, blocks)  # type: ignore[arg-type]

    monkeypatch.setattr(prepare_module.FolderWriter, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare("wt103", out, wikitext)
    monkeypatch.undo()
    info = read_info(out)
    assert info is not None
    assert not info.complete
    kept = (out / "train.txt").stat().st_mtime_ns
    assert prepare("wt103", out, wikitext).complete
    assert (out / "train.txt").stat().st_mtime_ns == kept
    assert written(out) == WIKI


def test_a_run_that_is_killed_between_a_split_and_its_record_goes_on(wikitext: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = prepared_module.write_json

    def interrupted(path: Path, document: dict[str, object]) -> None:
        if document["splits"]:
            raise KeyboardInterrupt
        write(path, document)

    monkeypatch.setattr(prepared_module, "write_json", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare("wt103", out, wikitext)
    monkeypatch.undo()
    assert (out / "test.txt").exists()  # as in the archive, the first
    assert prepare("wt103", out, wikitext).complete
    assert written(out) == WIKI


def test_another_source_replaces_what_an_interrupted_run_has_left(wikitext: Path, out: Path, tmp_path: Path) -> None:
    prepared = prepare("wt103", out, wikitext)
    info = prepared.to_dict() | {"complete": False}
    (out / "corpus.json").write_text(json.dumps(info))
    other = zipped(tmp_path / "other.zip", {f"wiki.{split}.tokens": f" {split} \n" for split in SPLITS})
    prepare("wt103", out, other)
    assert written(out)["train"] == " train \n"


@pytest.mark.parametrize("name", ["wiki.{}.tokens", "{}.txt"])
def test_a_folder_of_splits_is_taken_over(out: Path, tmp_path: Path, name: str) -> None:
    source = tmp_path / "mine" / "deeper"
    source.mkdir(parents=True)
    for split in SPLITS:
        (source / name.format(split)).write_text(WIKI[split])
    assert "sha256" not in prepare("wt103", out, source.parent).source
    assert written(out) == WIKI


def test_the_raw_edition_is_not_mistaken_for_words(out: Path, tmp_path: Path) -> None:
    source = zipped(tmp_path / "raw.zip", {f"wikitext-103-raw/wiki.{split}.raw": "x" for split in SPLITS})
    with pytest.raises(DataError, match="raw edition") as caught:
        prepare("wt103", out, source)
    assert "wikitext-103-v1.zip" in str(caught.value.remedy)
    assert not out.exists()


def test_several_data_sets_in_one_source_are_refused(out: Path, tmp_path: Path) -> None:
    files = {f"{folder}/wiki.{split}.tokens": "x" for folder in ("wikitext-2", "wikitext-103") for split in SPLITS}
    with pytest.raises(DataError, match=r"several files wiki\.train\.tokens|does not hold"):
        prepare("wt103", out, zipped(tmp_path / "both.zip", files))


def test_what_is_missing_is_said_with_what_is_there(out: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"does not hold wiki\.train\.tokens.*, but test\.csv, train\.csv"):
        prepare("wt103", out, zipped(tmp_path / "csv.zip", {"wikitext-103/train.csv": "x", "wikitext-103/test.csv": "x"}))


def test_files_of_others_are_not_overwritten(wikitext: Path, out: Path) -> None:
    out.mkdir()
    (out / "train.txt").write_text("mine")
    with pytest.raises(DataError, match=r"train\.txt is there already") as caught:
        prepare("wt103", out, wikitext)
    assert "--data" in str(caught.value.remedy)
    assert (out / "train.txt").read_text() == "mine"


def test_one_folder_holds_one_data_set(wikitext: Path, out: Path) -> None:
    prepare("wt103", out, wikitext)
    with pytest.raises(DataError, match="holds data set `wt103`"):
        prepare("enwik8", out, wikitext)
    with pytest.raises(DataError, match="does not belong to the built-in corpus"):
        pydoc.build(out)
    assert written(out) == WIKI


def test_text_that_is_not_utf8_is_refused(out: Path, tmp_path: Path) -> None:
    source = tmp_path / "mine"
    source.mkdir()
    for split in SPLITS:
        (source / f"{split}.txt").write_bytes(b"na\xefve\n")
    with pytest.raises(DataError, match="is not UTF-8"):
        prepare("wt103", out, source)


def test_real_wikitext_2_is_recognised_by_its_counts(shared_dir: Path, out: Path) -> None:
    prepared = prepare("wt103", out, shared_dir / "data" / "wikitext-2")
    assert prepared.edition == "WikiText-2"
    assert {name: split.tokens for name, split in prepared.splits.items()} == PUBLISHED["wt103"].editions["WikiText-2"]
    assert prepared.notes == []


# --- characters and bytes ---


def test_enwik8_is_cut_by_byte_in_its_proportions(out: Path, tmp_path: Path) -> None:
    text = bytes(range(256)) * 4
    (tmp_path / "enwik8.gz").write_bytes(gzip.compress(text))
    prepared = prepare("enwik8", out, tmp_path / "enwik8.gz")
    assert [(out / f"{split}.txt").read_bytes() for split in SPLITS] == [text[:922], text[922:973], text[973:]]
    assert any("1,024 bytes, not 100,000,000" in note for note in prepared.notes)
    check_counts(prepared, tmp_path)


def test_a_text_of_full_size_is_cut_as_published(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_module, "CHARACTERS", 1000)
    text = b"a b\nc" * 250  # longer: enwik9 for enwik8
    found = hashlib.sha256(text[:1000]).hexdigest()
    editions = {"enwik8": {"text_sha256": found}}
    monkeypatch.setattr(prepare_module, "PUBLISHED", {"enwik8": dataclasses.replace(PUBLISHED["enwik8"], editions=editions)})
    monkeypatch.setattr("txl_train.data.prepared.PUBLISHED", prepare_module.PUBLISHED)
    (tmp_path / "enwik9").write_bytes(text)
    prepared = prepare("enwik8", out, tmp_path / "enwik9")
    assert [prepared.splits[split].bytes for split in SPLITS] == [900, 50, 50]
    assert b"".join((out / f"{split}.txt").read_bytes() for split in SPLITS) == text[:1000]
    assert prepared.edition == "enwik8"
    assert prepared.notes == ["The text is longer than 1,000 bytes; the rest is left out."]
    again = prepare("enwik8", tmp_path / "copy", out)  # a folder of splits is known by what they are together
    assert again.edition == "enwik8"


@pytest.mark.parametrize(
    ("text", "filtered", "note"),
    [
        (" the cat sat on the mat" * 20, " the cat sat on the mat" * 20, None),
        ("It's 20 na\u00efve\nTests! " * 20, "it s two zero na ve tests " * 20, "as plain text"),
        ('<mediawiki><text xml:space="preserve">' + "The [[Cat|cats]] 1 " * 20 + "</text>", " the cats one" * 20, "as Wikipedia XML"),
    ],
)
def test_text8_is_filtered_where_it_is_not_yet(out: Path, tmp_path: Path, text: str, filtered: str, note: str | None) -> None:
    (tmp_path / "source.txt").write_text(text, encoding="utf-8")
    prepared = prepare("text8", out, tmp_path / "source.txt")
    assert "".join(written(out).values()) == filtered
    assert any("filter" in line for line in prepared.notes) == (note is not None)
    assert note is None or any(note in line for line in prepared.notes)
    check_counts(prepared, tmp_path)


def test_splits_as_prep_text8_writes_them_are_taken_over(out: Path, tmp_path: Path) -> None:
    source = tmp_path / "prepared"
    source.mkdir()
    for split in SPLITS:
        (source / f"{split}.txt").write_text("t h e _ c a t")
    check_counts(prepare("text8", out, source), tmp_path)
    assert written(out)["test"] == "t h e _ c a t"


def test_a_text_too_short_to_be_cut_is_refused(out: Path, tmp_path: Path) -> None:
    (tmp_path / "short").write_text("a cat")
    with pytest.raises(DataError, match="split would be empty"):
        prepare("text8", out, tmp_path / "short")


def test_of_several_files_none_is_guessed(out: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"does not hold one file of text, but a\.txt, b\.txt"):
        prepare("text8", out, zipped(tmp_path / "two.zip", {"a.txt": "x", "b.txt": "y"}))


# --- One Billion Word ---

SHARDS = {
    "heldout-monolingual.tokenized.shuffled/news.en.heldout-00000-of-00050": "Held out .\nAgain .\n",
    "heldout-monolingual.tokenized.shuffled/news.en.heldout-00001-of-00050": "Not this .\n",
    "training-monolingual.tokenized.shuffled/news.en-00003-of-00100": "Three .\n",
    "training-monolingual.tokenized.shuffled/news.en-00001-of-00100": "One .\n",
    "training-monolingual.tokenized.shuffled/news.en-00002-of-00100": "Two . One",
    "README": "read me",
}


def lm1b_tar(path: Path, shards: dict[str, str] = SHARDS) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in shards.items():
            info = tarfile.TarInfo(f"1-billion-word-language-modeling-benchmark-r13output/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content.encode()))
    return path


def lm1b_folder(path: Path) -> Path:
    for name, content in SHARDS.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(content)
    return path


@pytest.mark.parametrize("make", [lambda folder: lm1b_tar(folder / "a.tar.gz"), lambda folder: lm1b_folder(folder / "r13output")])
def test_the_shards_of_one_billion_word_are_joined_in_order(out: Path, tmp_path: Path, make: Callable[[Path], Path]) -> None:
    prepared = prepare("lm1b", out, make(tmp_path))
    assert written(out) == {"train": "One .\nTwo . One\nThree .\n", "valid": "Held out .\nAgain .\n", "test": "Held out .\nAgain .\n"}
    assert any("as in the authors' getdata.sh" in note for note in prepared.notes)
    assert any("3 of 99 shards" in note for note in prepared.notes)
    assert any("no 1b_word_vocab.txt" in note for note in prepared.notes)
    check_counts(prepared, tmp_path)


def test_the_published_vocabulary_comes_along(out: Path, tmp_path: Path) -> None:
    source = lm1b_folder(tmp_path / "lm1b")
    (source / "1b_word_vocab.txt").write_text("<S> 9\n. 5\nOne 2\n<UNK> 1\nThree 1\n")
    prepared = prepare("lm1b", out, source)
    assert prepared.files.keys() == {"1b_word_vocab.txt"}
    corpus = load_corpus(out, get_dataset("lm1b"), cache_dir=tmp_path / "cache")
    assert corpus.vocabulary.symbols == ("<S>", ".", "One", "<UNK>", "Three")
    assert " ".join(corpus.vocabulary.decode(corpus.ids("train"))) == "<S> One . <S> <UNK> . One <S> Three . <S>"
    assert corpus.oov("train") == 1


def test_without_the_held_out_shard_or_any_shard_it_is_not_one_billion_word(out: Path, tmp_path: Path) -> None:
    training = {name: content for name, content in SHARDS.items() if "training" in name}
    with pytest.raises(DataError, match=r"has no news\.en\.heldout-00000-of-00050"):
        prepare("lm1b", out, lm1b_tar(tmp_path / "a.tar.gz", training))
    with pytest.raises(DataError, match="has no shards"):
        prepare("lm1b", tmp_path / "other", lm1b_tar(tmp_path / "b.tar.gz", {"README": ""}))


def test_an_interrupted_one_billion_word_goes_on(out: Path, tmp_path: Path) -> None:
    source = lm1b_tar(tmp_path / "a.tar.gz")
    prepare("lm1b", out, source)
    (out / "test.txt").unlink()
    kept = (out / "train.txt").stat().st_mtime_ns
    prepare("lm1b", out, source)
    assert written(out)["test"] == "Held out .\nAgain .\n"
    assert (out / "train.txt").stat().st_mtime_ns == kept


# --- downloads ---


@pytest.fixture
def published(wikitext: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """WikiText is published in a file of ours."""
    checksum = f"sha256:{hashlib.sha256(wikitext.read_bytes()).hexdigest()}"
    sources = (Source("http://127.0.0.1:1/gone.zip", 1, checksum), Source(wikitext.as_uri(), wikitext.stat().st_size, checksum))
    monkeypatch.setattr(prepare_module, "PUBLISHED", {**PUBLISHED, "wt103": dataclasses.replace(PUBLISHED["wt103"], sources=sources)})

    def copied(sources: tuple[Source, ...], target: Path) -> Source:
        target.write_bytes(wikitext.read_bytes())
        return sources[-1]

    monkeypatch.setattr(prepare_module, "download", copied)
    return wikitext


def test_a_download_is_prepared_and_cleaned_away(published: Path, out: Path) -> None:
    prepared = prepare("wt103", out)
    assert written(out) == WIKI
    assert prepared.source["downloaded"]
    assert prepared.source["published"]
    assert sorted(path.name for path in out.iterdir()) == ["corpus.json", "test.txt", "train.txt", "valid.txt"]


def test_a_download_that_was_not_yet_unpacked_is_not_fetched_again(published: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (out / ".download").mkdir(parents=True)
    (out / ".download" / "wikitext-103-v1.zip").write_bytes(published.read_bytes())

    def unexpected(*_: object) -> None:
        raise AssertionError("it was fetched again")

    monkeypatch.setattr(prepare_module, "download", unexpected)
    assert prepare("wt103", out).complete


def test_without_a_network_nothing_is_left_behind(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = dataclasses.replace(PUBLISHED["enwik8"], sources=(Source("http://127.0.0.1:1/enwik8.zip"),))
    monkeypatch.setattr(prepare_module, "PUBLISHED", {"enwik8": gone})
    with pytest.raises(EnvironmentUnfitError, match=r"http://127\.0\.0\.1:1/enwik8\.zip"):
        prepare("enwik8", out)
    assert not out.exists()


def test_data_sets_that_are_published_nowhere_are_named(out: Path) -> None:
    with pytest.raises(UsageError, match="`text` is published nowhere"):
        prepare("text", out)


def test_what_is_published_has_addresses_and_something_to_know_it_by() -> None:
    for published in PUBLISHED.values():
        assert len(published.sources) >= 2
        assert all(source.url.startswith("http") and source.checksum is not None for source in published.sources)
        assert published.editions
    lengths = {"sha256": 64, "sha512": 128}
    for source in [source for published in PUBLISHED.values() for source in published.sources]:
        algorithm, _, digest = str(source.checksum).partition(":")
        assert len(digest) == lengths[algorithm]


def _prepare_in_another_process(out: Path, source: Path) -> bool:
    return prepare("wt103", out, source).complete


def test_two_processes_may_prepare_the_same_folder_at_once(wikitext: Path, out: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        assert pool.starmap(_prepare_in_another_process, [(out, wikitext)] * 4) == [True] * 4
    assert written(out) == WIKI
    assert sorted(path.name for path in out.iterdir()) == ["corpus.json", "test.txt", "train.txt", "valid.txt"]
