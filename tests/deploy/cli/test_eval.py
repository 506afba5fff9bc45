"""`txl eval`: the same perplexity from every runtime, and one clear message for every wrong input."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.conftest import TGT_LEN, Exports
from tests.support import build_model, small_config
from txl_deploy.cli.main import main
from txl_train.data.corpus import load_corpus
from txl_train.data.datasets import get_dataset

Capture = pytest.CaptureFixture[str]


def run_json(capsys: Capture, *arguments: object) -> dict[str, Any]:
    assert main(["eval", *map(str, arguments), "--json"]) == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    return document


def test_every_token_with_a_predecessor_is_scored_at_every_batch_size(exports: Exports, capsys: Capture) -> None:
    n_tokens = sum(len(line.split()) + 1 for line in (exports.data / "test.txt").read_text().splitlines())
    for batch_size in (1, 3, 7, 16):
        document = run_json(capsys, "--checkpoint", exports.checkpoint, "--batch-size", batch_size)
        assert document["n_tokens"] == n_tokens - 1
        assert document["batch_size"] == batch_size


def test_the_perplexity_is_that_of_the_model_run_over_the_whole_text(exports: Exports, capsys: Capture) -> None:
    import torch

    document = run_json(capsys, "--checkpoint", exports.checkpoint, "--batch-size", 1, "--tgt-len", 7, "--mem-len", 7)
    model = build_model(small_config(cutoffs=(5, 9, 16), div_val=2))
    corpus = load_corpus(exports.data, get_dataset("text"), vocabulary=_vocabulary(exports))
    ids = torch.from_numpy(corpus.ids("test").astype("int64"))[None]
    memory, total = model.initial_memory(1), 0.0
    with torch.no_grad():
        for start in range(0, ids.shape[1] - 1, 7):
            stop = min(start + 7, ids.shape[1] - 1)
            hidden, memory = model(ids[:, start:stop], memory)
            total += float(model.nll(hidden, ids[:, start + 1 : stop + 1]).double().sum())
    assert document["nll_nats_per_token"] == pytest.approx(total / (ids.shape[1] - 1), abs=1e-6)
    assert document["perplexity"] == pytest.approx(math.exp(document["nll_nats_per_token"]))
    assert document["bits_per_char"] == pytest.approx(document["nll_nats_per_token"] / math.log(2))


def _vocabulary(exports: Exports) -> Any:
    from txl_train.data.vocabulary import Vocabulary

    return Vocabulary.load(exports.onnx / "vocabulary.json")


@pytest.mark.parametrize("name", ["onnx", "torchscript"])
def test_an_artifact_has_the_perplexity_of_its_checkpoint(exports: Exports, capsys: Capture, name: str) -> None:
    expected = run_json(capsys, "--checkpoint", exports.checkpoint)
    document = run_json(capsys, "--artifact", getattr(exports, name))
    assert document["runtime"] == name
    assert document["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-5)
    assert document["n_tokens"] == expected["n_tokens"]
    assert document["checkpoint_sha256"] == expected["checkpoint_sha256"]
    assert document["origin"] == str(getattr(exports, name))
    assert document["corpus_sha256"] == expected["corpus_sha256"]


@pytest.mark.slow
def test_a_checkpoint_is_evaluated_in_any_runtime_with_lengths_of_its_own(exports: Exports, capsys: Capture) -> None:
    options = ["--checkpoint", exports.checkpoint, "--tgt_len", 4, "--mem_len", 6, "--clamp_len", 3, "--same_length", "--batch_size", 4]
    documents = [run_json(capsys, *options, "--runtime", runtime) for runtime in ("pytorch", "torchscript", "onnx")]
    assert [document["runtime"] for document in documents] == ["pytorch", "torchscript", "onnx"]
    for document in documents:
        assert (document["tgt_len"], document["mem_len"], document["clamp_len"], document["same_length"]) == (4, 6, 3, True)
        assert document["perplexity"] == pytest.approx(documents[0]["perplexity"], rel=1e-5)


def test_lengths_change_the_perplexity(exports: Exports, capsys: Capture) -> None:
    perplexities = {
        run_json(capsys, "--checkpoint", exports.checkpoint, *options)["perplexity"]
        for options in ([], ["--mem-len", 2], ["--clamp-len", 2], ["--same-length", "--tgt-len", 6])
    }
    assert len(perplexities) == 4


def test_the_summary_has_the_lines_of_the_specification(exports: Exports, capsys: Capture) -> None:
    assert main(["eval", "--checkpoint", str(exports.checkpoint), "--batch-size", "4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"Evaluating with: math fp32 type pytorch bsz 4 tgt_len {TGT_LEN} ext_len 0 mem_len 7 clamp_len -1"
    assert lines[1].startswith("Time : ")
    assert lines[1].endswith("ms/segment")
    assert lines[2] == lines[4] == "=" * 100
    assert lines[3].startswith("| test loss ")
    assert "| test ppl " in lines[3]


def test_manual_text_is_scored_word_by_word(exports: Exports, capsys: Capture) -> None:
    document = run_json(capsys, "--checkpoint", exports.checkpoint, "--manual", "word3 word4 surely-unknown")
    assert document["n_tokens"] == 3  # two words after the first, and <eos>
    assert document["batch_size"] == 1
    assert document["n_oov"] == 1


def test_unknown_words_are_told_beside_the_perplexity(exports: Exports, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "test.txt").write_text("word1 new word2 newer newest\n" * 20)
    assert main(["eval", "--checkpoint", str(exports.checkpoint), "--data", str(tmp_path), "--batch-size", "2"]) == 0
    assert "60 of the text's 120 tokens (50.0 %) are not in the vocabulary" in capsys.readouterr().out


def test_repeating_scores_everything_again_from_a_cold_start(exports: Exports, capsys: Capture) -> None:
    once = run_json(capsys, "--checkpoint", exports.checkpoint)
    twice = run_json(capsys, "--checkpoint", exports.checkpoint, "--repeat", 2)
    assert twice["n_tokens"] == 2 * once["n_tokens"] == 2 * twice["n_tokens_per_pass"]
    assert twice["nll_nats_per_token"] == pytest.approx(once["nll_nats_per_token"], rel=1e-12)


def test_max_size_stops_after_so_many_segments(exports: Exports, capsys: Capture) -> None:
    document = run_json(capsys, "--checkpoint", exports.checkpoint, "--max-size", 2, "--batch-size", 3)
    assert document["n_tokens"] == 2 * 3 * TGT_LEN


def test_a_missed_target_exits_with_1_after_the_result(exports: Exports, capsys: Capture) -> None:
    assert main(["eval", "--checkpoint", str(exports.checkpoint), "--json", "--target-perplexity", "1.5"]) == 1
    captured = capsys.readouterr()
    assert json.loads(captured.out)["perplexity"] > 1.5
    assert ", above the target 1.5" in captured.err


WRONG = {
    "neither checkpoint nor artifact": (["eval"], 2, "--checkpoint FILE"),
    "a missing checkpoint": (["eval", "--checkpoint", "{tmp}/none.pt"], 2, "no checkpoint"),
    "a checkpoint that is a folder": (["eval", "--checkpoint", "{tmp}"], 2, "folder"),
    "a changed checkpoint": (["eval", "--checkpoint", "{tmp}/changed.pt"], 4, "was changed"),
    "a truncated checkpoint": (["eval", "--checkpoint", "{tmp}/short.pt"], 4, "damaged"),
    "a missing artifact": (["eval", "--artifact", "{tmp}/none"], 4, "no folder"),
    "a changed artifact": (["eval", "--artifact", "{tmp}/onnx"], 4, "was changed"),
    "a kind of memory an artifact does not have": (["eval", "--artifact", "{onnx}", "--memory", "hidden"], 2, "`--memory` kv"),
    "lengths an artifact does not have": (["eval", "--artifact", "{onnx}", "--mem-len", "9"], 2, "exported for `--mem-len` 7"),
    "a missing corpus": (["eval", "--checkpoint", "{checkpoint}", "--data", "{tmp}/nowhere"], 2, "no folder"),
    "an empty corpus": (["eval", "--checkpoint", "{checkpoint}", "--data", "{tmp}/empty"], 2, "empty"),
    "more streams than tokens": (["eval", "--checkpoint", "{checkpoint}", "--batch-size", "99999"], 2, "--batch-size"),
    "an impossible length": (["eval", "--checkpoint", "{checkpoint}", "--tgt-len", "0"], 2, "tgt-len"),
    "an unknown option": (["eval", "--checkpoint", "{checkpoint}", "--bach-size", "4"], 2, "--batch-size"),
    "an unknown runtime": (["eval", "--checkpoint", "{checkpoint}", "--runtime", "tensorflow"], 2, "torchscript"),
    "a GPU where there is none": (["eval", "--checkpoint", "{checkpoint}", "--device", "cuda"], 3, "--device cpu"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_input_is_one_message_with_its_exit_code(exports: Exports, tmp_path: Path, capsys: Capture, name: str) -> None:
    arguments, exit_code, fragment = WRONG[name]
    if exit_code == 3:
        import torch

        if torch.cuda.is_available():
            pytest.skip("there is a GPU")
    content = exports.checkpoint.read_bytes()
    (tmp_path / "changed.pt").write_bytes(
        content[: len(content) // 2] + bytes([content[len(content) // 2] ^ 1]) + content[len(content) // 2 + 1 :]
    )
    (tmp_path / "short.pt").write_bytes(content[: len(content) // 2])
    (tmp_path / "empty").mkdir()
    for split in ("train", "valid", "test"):
        (tmp_path / "empty" / f"{split}.txt").write_text("")
    shutil.copytree(exports.onnx, tmp_path / "onnx")
    graph = tmp_path / "onnx" / "model.onnx"
    graph.write_bytes(graph.read_bytes()[:-1] + b"?")
    filled = [part.format(tmp=tmp_path, checkpoint=exports.checkpoint, onnx=exports.onnx) for part in arguments]
    assert main(filled) == exit_code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert fragment in captured.err
    assert "Traceback" not in captured.err
    assert "bug in txl" not in captured.err
