"""`txl import`: what it writes, what it says of the evidence, and what the other commands make of the result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.reference.naive_txl import random_parameters
from tests.support import small_config, write_checkpoint
from tests.train.interop.foreign_files import bigram_model, symbols, write_huggingface, write_kimiyoung, write_nvidia
from txl_deploy.cli.main import main
from txl_train.checkpoint import load_checkpoint


@pytest.fixture(scope="module")
def nvidia(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return NVIDIA's checkpoint of a model that knows the built-in text."""
    path = tmp_path_factory.mktemp("nvidia") / "checkpoint_best.pt"
    config, parameters, words = bigram_model()
    write_nvidia(path, config, parameters, words=words)
    return path


def run(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> tuple[str, str]:
    """Run `txl` with these arguments and return what it wrote."""
    assert main([str(argument) for argument in arguments]) == code
    captured = capsys.readouterr()
    return captured.out, captured.err


def document_of(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> dict[str, Any]:
    document = json.loads(run(capsys, *arguments, "--json", code=code)[0])
    assert isinstance(document, dict)
    return document


def test_the_summary_shows_the_evidence_and_what_to_do_next(tmp_path: Path, nvidia: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "imported.pt"
    shown, _ = run(capsys, "import", nvidia, "--out", out)
    assert "NVIDIA's checkpoint, format of 2023" in shown
    assert "96 words" in shown
    assert "cutoffs 24, 48, 72" in shown
    assert "30 steps, best validation loss 3.2500 nats a token" in shown
    assert "as imported" in shown
    assert "clusters reversed" in shown
    assert "identity    proved." in shown
    assert "Not imported: the optimizer's state" in shown
    assert f"txl eval --checkpoint {out} --data DIR" in shown
    assert load_checkpoint(out).run["imported"]["lineage"] == "nvidia-2023"


def test_the_document_says_what_was_read_and_what_was_proved(tmp_path: Path, nvidia: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = document_of(capsys, "import", nvidia, "--out", tmp_path / "imported.pt")
    assert document["family"] == "nvidia"
    assert document["lineage"] == "nvidia-2023"
    assert document["vocabulary"]["tokens"] == 96
    assert document["model"]["same_length_rule"] == "mem_len+1"
    assert document["clusters_reversed_in_file"] is True
    assert document["identity"]["verdict"] == "proved"
    assert document["identity"]["perplexity"] < document["identity"]["perplexity_reversed"]
    assert document["progress"] == {"step": 30, "epoch": 2, "best_valid_nll": 3.25}
    assert document["out"] == str(tmp_path / "imported.pt")


def test_evidence_against_the_order_of_clusters_ends_with_1_and_writes_nothing(
    tmp_path: Path, nvidia: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "imported.pt"
    document = document_of(capsys, "import", nvidia, "--out", out, "--reverse-clusters", code=1)
    assert document["identity"]["verdict"] == "contradicted"
    assert document["out"] is None
    assert not out.exists()
    shown, errors = run(capsys, "import", nvidia, "--out", out, "--reverse-clusters", code=1)
    assert "identity    contradicted." in shown
    assert "was not written: perplexity" in errors
    assert "--force" in errors
    assert not out.exists()
    document = document_of(capsys, "import", nvidia, "--out", out, "--reverse-clusters", "--force")
    assert document["identity"]["verdict"] == "contradicted"
    assert load_checkpoint(out).run["imported"]["identity"]["verdict"] == "contradicted"


def test_the_other_commands_take_the_result_as_their_own(tmp_path: Path, nvidia: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, data = tmp_path / "imported.pt", tmp_path / "data"
    run(capsys, "data", "prepare", "pydoc", "--out", data)
    run(capsys, "import", nvidia, "--out", out, "--data", data, "--dataset", "text")
    scored = document_of(capsys, "eval", "--checkpoint", out, "--split", "valid")
    assert scored["perplexity"] < 25  # a bigram model of 96 words, most of the others being one
    assert scored["tgt_len"] == 4
    assert document_of(capsys, "inspect", out)["run"]["imported"]["identity"]["verdict"] == "proved"
    assert document_of(capsys, "data", "stats", "--checkpoint", out, "--no-baselines")["vocabulary"]["tokens"] == 96
    exported = document_of(capsys, "export", "--checkpoint", out, "--format", "torchscript", "--out", tmp_path / "exported")
    assert exported["checked"]["passed"]


def test_an_existing_file_is_replaced_only_on_request_and_only_if_it_is_a_checkpoint(
    tmp_path: Path, nvidia: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "imported.pt"
    write_checkpoint(out, small_config())
    before = out.read_bytes()
    assert "exists already" in run(capsys, "import", nvidia, "--out", out, code=2)[1]
    assert out.read_bytes() == before
    run(capsys, "import", nvidia, "--out", out, "--overwrite")
    assert load_checkpoint(out).run["imported"]["family"] == "nvidia"
    out.write_text("my notes", encoding="utf-8")
    run(capsys, "import", nvidia, "--out", out, "--overwrite", code=4)
    assert out.read_text(encoding="utf-8") == "my notes"
    assert "is what is to be imported" in run(capsys, "import", nvidia, "--out", nvidia, "--overwrite", code=2)[1]


def test_a_folder_that_is_not_there_is_said_before_anything_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "There is no folder" in run(capsys, "import", tmp_path / "none.pt", "--out", tmp_path / "no" / "x.pt", code=2)[1]


def test_the_authors_model_takes_a_vocabulary_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = small_config(cutoffs=(5, 9))
    write_kimiyoung(tmp_path / "model.pt", config, random_parameters(config), legacy=True)
    (tmp_path / "words.txt").write_text("\n".join(symbols(config.vocab_size)), encoding="utf-8")
    assert "--vocab FILE" in run(capsys, "import", tmp_path / "model.pt", "--out", tmp_path / "x.pt", code=2)[1]
    document = document_of(capsys, "import", tmp_path, "--from", "kimiyoung", "--vocab", tmp_path / "words.txt", "--out", tmp_path / "x.pt")
    assert document["identity"]["verdict"] == "undecided"
    assert document["model"]["same_length_rule"] == "mem_len"


def test_hugging_faces_folder_is_found_out_by_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = small_config(cutoffs=(5, 9), untie_biases=True)
    write_huggingface(tmp_path / "model", config, random_parameters(config))
    document = document_of(capsys, "import", tmp_path / "model", "--out", tmp_path / "x.pt")
    assert document["family"] == "huggingface"
    assert document["clusters_reversed_in_file"] is False
    assert set(document["sha256"]) == {"config.json", "model.safetensors", "vocab.pkl"}
    assert any("cold start" in note for note in document["notes"])


def test_a_file_that_would_run_something_ends_with_4(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import os

    import torch

    class Evil:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {tmp_path / 'PWNED'}",)

    torch.save({"model_state": {}, "model_config": {}, "x": Evil()}, tmp_path / "evil.pt")
    _, errors = run(capsys, "import", tmp_path / "evil.pt", "--out", tmp_path / "x.pt", code=4)
    assert "system`" in errors
    assert "none of its code was run" in errors
    assert not (tmp_path / "PWNED").exists()
    assert not (tmp_path / "x.pt").exists()
