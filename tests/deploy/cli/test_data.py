"""`txl data`: writes the built-in corpus, and counts what is in a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from txl_deploy.cli.main import main


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


def test_another_data_set_is_not_built(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "prepare", "enwik8", "--out", str(tmp_path / "x")]) == 2
    assert "train.txt valid.txt test.txt into a folder" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
    assert main(["data", "prepare", "pydocs", "--out", str(tmp_path / "x")]) == 2


def test_tokens_types_and_unknown_words_are_counted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = stats(capsys, "--dataset", "text", "--data", str(folder))
    assert document["vocabulary"]["tokens"] == 6  # <eos> a b c rare <unk>
    assert document["splits"]["test"] | {"sha256": ""} == {"tokens": 7, "types": 5, "oov": 1, "sha256": ""}
    assert document["unigram"]["split"] == "test"


def test_rare_words_may_become_unknown(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = stats(capsys, "--dataset", "text", "--data", str(folder), "--min-count", "2", "--no-baselines")
    assert document["vocabulary"]["tokens"] == 5
    assert document["splits"]["train"]["oov"] == 1
    assert "unigram" not in document


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
