"""`txl data`: makes folders of data sets, tokenises raw text, and counts what is in a folder."""

from __future__ import annotations

import io
import json
import re
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from txl_deploy.cli.main import main
from txl_train.data import prepare as prepare_module
from txl_train.data.download import Source
from txl_train.data.published import Published


@pytest.fixture(autouse=True)
def _cache_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TXL_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small corpus; `d` is unknown to train, `rare` stands there once."""
    directory = tmp_path / "text"
    directory.mkdir()
    (directory / "train.txt").write_text("a b a b c\n" * 20 + "rare\n")
    (directory / "valid.txt").write_text("a b\n")
    (directory / "test.txt").write_text("a b d\nb c\n")
    return directory


def stats(capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    assert main(["data", "stats", *options, "--json", "-q"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    document = json.loads(captured.out)
    assert isinstance(document, dict)
    return document


def test_the_built_in_corpus_is_written_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "pydoc"
    assert main(["data", "prepare", "pydoc", "--out", str(out), "--json"]) == 0
    prepared = json.loads(capsys.readouterr().out)
    assert sorted(path.name for path in out.glob("*.txt")) == ["test.txt", "train.txt", "valid.txt"]
    document = stats(capsys, "--dataset", "pydoc", "--data", str(out))
    for split, counts in document["splits"].items():
        assert counts["tokens"] == prepared["splits"][split]["tokens"]
        assert counts["types"] <= prepared["splits"][split]["types"]
    assert document["trigram"]["perplexity"] < document["unigram"]["perplexity"] < document["vocabulary"]["tokens"]
    assert document["unigram"]["n_tokens"] == document["splits"]["test"]["tokens"] - 1


@pytest.fixture
def wikitext(tmp_path: Path) -> Path:
    """An archive in the manner of WikiText."""
    path = tmp_path / "w.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for split, lines in (("train", 3), ("valid", 1), ("test", 2)):
            archive.writestr(f"wikitext-2/wiki.{split}.tokens", " a <unk> \n" * lines)
    return path


def test_an_archive_becomes_a_folder_that_can_be_counted(wikitext: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "wt"
    assert main(["data", "prepare", "wt103", "--out", str(out), "--source", str(wikitext), "--json", "-q"]) == 0
    captured = capsys.readouterr()
    prepared = json.loads(captured.out)
    assert captured.err == ""
    assert prepared["directory"] == str(out)
    assert prepared["source"]["given"] == str(wikitext)
    assert re.fullmatch("[0-9a-f]{64}", prepared["source"]["sha256"])
    assert not prepared["already_there"]
    document = stats(capsys, "--dataset", "wt103", "--data", str(out))
    for split, counts in document["splits"].items():
        assert counts["tokens"] == counts["words"] == prepared["splits"][split]["tokens"]
        assert counts["sha256"] == prepared["splits"][split]["sha256"]


def test_a_second_call_says_that_all_is_there(wikitext: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["data", "prepare", "wt103", "--out", str(tmp_path / "wt"), "--source", str(wikitext)]
    assert main(command) == 0
    captured = capsys.readouterr()
    assert "train.txt  30 bytes, 3 lines, 9 tokens  sha256 " in captured.out
    assert "Note: This is no published edition" in captured.err
    assert main(command) == 0
    assert "(there already)" in capsys.readouterr().out


def test_without_a_network_the_addresses_and_the_way_out_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    published = Published(archive="enwik8.zip", sources=(Source("http://127.0.0.1:1/enwik8.zip", 1, "sha256:0"),))
    monkeypatch.setattr(prepare_module, "PUBLISHED", {"enwik8": published})
    assert main(["data", "prepare", "enwik8", "--out", str(tmp_path / "x")]) == 3
    captured = capsys.readouterr()
    assert "http://127.0.0.1:1/enwik8.zip: cannot be reached" in captured.err
    assert "--source FILE" in captured.err
    assert captured.out == ""
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("text",), "`text` is any folder of yours"),
        (("pydoc", "--source", "x"), "comes with Python"),
        (("pydocs",), "pydocs"),
        (("wt103", "--source", "/nowhere.zip"), "There is no /nowhere.zip"),
    ],
)
def test_what_cannot_be_prepared_is_said(
    arguments: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "prepare", *arguments, "--out", str(tmp_path / "x")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_raw_text_of_a_file_is_tokenised(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "raw.txt").write_text("It's 3.5 well-known.\n\u00e9\n", encoding="utf-8")
    assert main(["data", "tokenize", "--dataset", "wt103", str(tmp_path / "raw.txt")]) == 0
    assert capsys.readouterr().out == " It 's 3 @.@ 5 well @-@ known . \n \u00e9 \n"


def test_raw_text_of_standard_input_is_tokenised(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for dataset, expected in (("text8", "a _ t w o"), ("enwik8", "97 32 50\n255\n")):
        monkeypatch.setattr(
            sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a 2\n\xff\n" if dataset == "enwik8" else b"a 2\n"), encoding="ascii")
        )
        assert main(["data", "tokenize", "--dataset", dataset]) == 0
        assert capsys.readouterr().out == expected


def test_raw_text_that_is_not_utf8_is_named_with_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "raw.txt").write_bytes(b"fine\n\xff\n")
    assert main(["data", "tokenize", "--dataset", "lm1b", str(tmp_path / "raw.txt")]) == 2
    assert "Line 2 is not UTF-8" in capsys.readouterr().err


@pytest.mark.slow
def test_the_raw_test_split_of_wikitext_comes_back_tokenised(
    shared_dir: Path, tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    sacremoses = pytest.importorskip("sacremoses")
    join = sacremoses.MosesDetokenizer("en").detokenize
    lines = (shared_dir / "data" / "wikitext-2-raw" / "wiki.test.raw").read_text(encoding="utf-8").split("\n")
    raw = [join(re.sub(r" @([-,.])@ ", r"\1", line).split(), unescape=False) for line in lines]
    (tmp_path / "raw.txt").write_text("\n".join(raw), encoding="utf-8")
    assert main(["data", "tokenize", "--dataset", "wt103", str(tmp_path / "raw.txt")]) == 0
    found = capsysbinary.readouterr().out.decode().split("\n")
    curly = str.maketrans("\u2018\u2019\u201c\u201d", "''\"\"")
    pairs = [(a.split(), b.translate(curly).split()) for a, b in zip(found, lines, strict=True) if b.strip()]
    exact = sum(a == b for a, b in pairs)
    assert exact >= 0.99 * len(pairs)  # 99.4 %; what is left is mostly Chinese and Japanese


def test_tokens_types_and_unknown_words_are_counted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = stats(capsys, "--dataset", "text", "--data", str(folder))
    assert document["vocabulary"]["tokens"] == 6  # <eos> a b c rare <unk>
    assert document["splits"]["test"] | {"sha256": ""} == {"tokens": 7, "words": 7, "types": 5, "oov": 1, "sha256": ""}
    assert document["unigram"]["split"] == "test"


def test_rare_words_may_become_unknown(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = stats(capsys, "--dataset", "text", "--data", str(folder), "--min-count", "2", "--no-baselines")
    assert document["vocabulary"]["tokens"] == 5
    assert document["splits"]["train"]["oov"] == 1
    assert "unigram" not in document


def test_words_may_be_counted_as_subwords(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tiktoken")
    document = stats(capsys, "--dataset", "text", "--data", str(folder), "--vocab", "bpe")
    assert document["vocabulary"]["unit"] == "subword"
    assert document["vocabulary"]["tokens"] == 50_257
    assert document["splits"]["train"]["tokens"] > document["splits"]["train"]["words"] == 122
    assert document["unigram"]["perplexity"] < 50_257
    assert main(["data", "stats", "--dataset", "text", "--data", str(folder), "--vocab", "bpe"]) == 0
    assert "bits per" not in capsys.readouterr().out


def test_another_split_can_be_scored(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = stats(capsys, "--dataset", "text", "--data", str(folder), "--split", "valid")
    assert document["trigram"]["split"] == "valid"
    assert document["trigram"]["n_tokens"] == 2


def test_the_document_is_written_too(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "W" / "baselines.json"
    document = stats(capsys, "--dataset", "text", "--data", str(folder), "--out", str(target))
    assert json.loads(target.read_text()) == document
    named = {name: entry["perplexity"] for name, entry in document.items() if isinstance(entry, dict) and "perplexity" in entry}
    assert set(named) == {"unigram", "trigram"}  # how a report finds them


def test_as_text_it_is_a_small_table(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "stats", "--dataset", "text", "--data", str(folder)]) == 0
    captured = capsys.readouterr()
    assert "test               7          5         1" in captured.out
    assert "unigram model of train on test: perplexity" in captured.out
    assert "counting test" in captured.err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "Give `--dataset` and `--data DIR`"),
        (("--dataset", "text"), "Give `--dataset` and `--data DIR`"),
        (("--dataset", "text", "--data", "/nowhere"), "There is no folder /nowhere"),
        (("--dataset", "txet", "--data", "/nowhere"), "txet"),
        (("--dataset", "wt103", "--min-count", "2"), "min_count"),
        (("--checkpoint", "/nowhere/checkpoint_best.pt"), "There is no checkpoint"),
        (("--checkpoint", "c.pt", "--min-count", "2"), "Leave one of them out"),
        (("--checkpoint", "c.pt", "--vocab", "bpe"), "`--vocab` has no meaning"),
    ],
)
def test_wrong_requests_end_with_2_and_say_what_to_give(
    options: tuple[str, ...], words: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if "wt103" in options:
        options = (*options, "--data", str(folder))
    assert main(["data", "stats", *options]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert words in captured.err


def test_a_checkpoint_brings_its_vocabulary(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from txl_train.checkpoint import Checkpoint, save_checkpoint
    from txl_train.config import ModelConfig
    from txl_train.data.vocabulary import Vocabulary

    vocabulary = Vocabulary(["<eos>", "a", "b", "<unk>"], unit="word")
    path = tmp_path / "checkpoint_best.pt"
    save_checkpoint(path, Checkpoint(ModelConfig(vocab_size=4), {}, vocabulary, "text", run={}, progress={}))
    document = stats(capsys, "--checkpoint", str(path), "--data", str(folder))
    assert document["vocabulary"] == {"tokens": 4, "unit": "word", "sha256": vocabulary.sha256}
    assert document["splits"]["test"]["oov"] == 2
