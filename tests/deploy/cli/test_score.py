"""`txl score` as a user meets it: the figures of `txl eval`, one JSON object a line, and an end for everything that goes wrong."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.conftest import TGT_LEN, Exports
from tests.support import small_config, write_checkpoint
from txl_deploy.cli.main import main
from txl_train.checkpoint import load_checkpoint, save_checkpoint

Capture = pytest.CaptureFixture[str]
ROOT = Path(__file__).resolve().parents[3]
TXL = [sys.executable, "-c", "import sys; from txl_deploy.cli.main import main; sys.exit(main())"]


def lines_of(capfd: Capture, *arguments: object) -> list[dict[str, Any]]:
    assert main(["score", *map(str, arguments)]) == 0
    return [json.loads(line) for line in capfd.readouterr().out.splitlines()]


def evaluated(capfd: Capture, *arguments: object) -> dict[str, Any]:
    assert main(["eval", *map(str, arguments), "--json"]) == 0
    return json.loads(capfd.readouterr().out)


@pytest.mark.parametrize("form", ["checkpoint", "onnx", "torchscript"])
def test_a_file_scores_what_txl_eval_says_of_it(exports: Exports, tmp_path: Path, form: str, capfd: Capture) -> None:
    model = ["--checkpoint" if form == "checkpoint" else "--artifact", getattr(exports, form)]
    text, summary = exports.data / "test.txt", tmp_path / "summary.json"
    expected = evaluated(capfd, *model, "--batch-size", 1, "--data", exports.data)
    arguments = [text, *model, "--per", "file", "--context", "none", "--tokenized", "--summary", summary]
    (found,) = lines_of(capfd, *arguments)
    assert found["tokens"] == expected["n_tokens"]
    assert found["nll_nats"] / found["tokens"] == pytest.approx(expected["nll_nats_per_token"], abs=1e-6)
    assert found["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-6)
    totals = json.loads(summary.read_text())
    assert totals["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-6)
    assert (totals["units"], totals["tgt_len"], totals["context"]) == (1, TGT_LEN, "none")
    assert 0 < totals["occupancy"] <= 1


def test_a_line_scores_what_txl_eval_says_of_that_text(exports: Exports, tmp_path: Path, capfd: Capture) -> None:
    texts = ["word1 word2 nobody word3", "word7", "word9 word4 word5 word6 word8 word2 word1"]
    (tmp_path / "text").write_text("\n".join(texts))
    expected = [evaluated(capfd, "--checkpoint", exports.checkpoint, "--manual", text) for text in texts]
    found = lines_of(capfd, tmp_path / "text", "--checkpoint", exports.checkpoint, "--context", "none", "--batch-size", 2)
    assert [line["tokens"] for line in found] == [document["n_tokens"] for document in expected] == [4, 1, 7]
    for line, document in zip(found, expected, strict=True):
        assert line["nll_nats"] / line["tokens"] == pytest.approx(document["nll_nats_per_token"], abs=2e-5)
    assert [(line["oov"], line["oov_share"]) for line in found] == [(1, 0.25), (0, 0.0), (0, 0.0)]


def test_all_tokens_are_told_where_that_is_asked_for(exports: Exports, tmp_path: Path, capfd: Capture) -> None:
    (tmp_path / "text").write_text("word1 word2\n\n")
    first, second = lines_of(capfd, tmp_path / "text", "--checkpoint", exports.checkpoint, "--tokens")
    assert len(first["token_nll_nats"]) == first["tokens"] == 3  # two words and the end of the line
    assert math.fsum(first["token_nll_nats"]) == first["nll_nats"]
    assert first["perplexity"] == pytest.approx(math.exp(first["nll_nats"] / 3))
    assert second["tokens"] == 1  # an empty line has an end, which a line's end comes before


def test_what_has_no_token_to_score_has_a_reason_instead(exports: Exports, tmp_path: Path, capfd: Capture) -> None:
    (tmp_path / "empty").write_text("")
    assert lines_of(capfd, tmp_path / "empty", "--checkpoint", exports.checkpoint) == []
    (found,) = lines_of(capfd, tmp_path / "empty", "--checkpoint", exports.checkpoint, "--per", "file")
    assert (found["tokens"], found["perplexity"], found["reason"]) == (0, None, "no token has a predecessor")


def test_several_files_are_scored_in_their_order(exports: Exports, tmp_path: Path, capfd: Capture) -> None:
    for name in ("b", "a"):
        (tmp_path / name).write_text("word1\n\nword2 word3\n\n\nword4\n")
    found = lines_of(capfd, tmp_path / "b", tmp_path / "a", "--checkpoint", exports.checkpoint, "--per", "document", "--batch-size", 3)
    assert [(Path(line["file"]).name, line["index"], line["line"]) for line in found] == [
        (name, index, line) for name in ("b", "a") for index, line in enumerate((1, 3, 6))
    ]
    assert [line["nll_nats"] for line in found[:3]] == pytest.approx([line["nll_nats"] for line in found[3:]], abs=1e-4)


def test_a_model_that_computes_no_number_is_no_perplexity(tmp_path: Path, capfd: Capture) -> None:
    model = write_checkpoint(tmp_path / "c.pt", small_config())
    checkpoint = load_checkpoint(tmp_path / "c.pt")
    parameters = {name: value.detach().clone() for name, value in model.parameters_by_name().items()}
    next(value for name, value in parameters.items() if "biases" in name).fill_(math.nan)
    save_checkpoint(tmp_path / "c.pt", dataclasses.replace(checkpoint, model=parameters))
    (tmp_path / "text").write_text("word1\n")
    assert main(["score", str(tmp_path / "text"), "--checkpoint", str(tmp_path / "c.pt")]) == 1
    assert "The loss of stream 0 in segment 0 is not finite" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((), "Missing argument 'FILE...'"),
        (("text",), "either `--checkpoint` or `--artifact`"),
        (("text", "--checkpoint", "C", "--artifact", "A"), "either `--checkpoint` or `--artifact`"),
        (("text", "--artifact", "A", "--runtime", "onnx"), "fixed in an exported model"),
        (("text", "--checkpoint", "nowhere.pt"), "There is no checkpoint"),
        (("text", "--checkpoint", "C", "--per", "word"), "--per"),
    ],
)
def test_wrong_usage_is_told(arguments: tuple[str, ...], told: str, capfd: Capture) -> None:
    assert main(["score", *arguments]) == 2
    assert told in capfd.readouterr().err


def test_what_cannot_be_read_is_told_after_the_results_before_it(exports: Exports, tmp_path: Path, capfd: Capture) -> None:
    (tmp_path / "text").write_bytes(b"word1\n\xff\xfe\nword2\n")
    assert main(["score", str(tmp_path / "text"), "--checkpoint", str(exports.checkpoint)]) == 2
    told = capfd.readouterr()
    assert len(told.out.splitlines()) == 1
    assert "Line 2 of" in told.err
    assert "not UTF-8" in told.err
    assert main(["score", str(tmp_path / "nowhere"), "--checkpoint", str(exports.checkpoint)]) == 2
    assert "No such file" in capfd.readouterr().err


def test_an_export_that_scores_the_next_token_names_the_command_for_one_that_scores_targets(
    exports: Exports, logits_onnx: Path, capfd: Capture
) -> None:
    assert main(["score", str(exports.data / "test.txt"), "--artifact", str(logits_onnx)]) == 2
    assert "--head nll" in capfd.readouterr().err


def process(exports: Exports) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*TXL, "score", "-", "--checkpoint", str(exports.checkpoint), "--device", "cpu"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.slow
def test_lines_of_a_pipe_are_scored_as_they_come_and_ctrl_c_ends_it(exports: Exports) -> None:
    with process(exports) as running:
        assert running.stdin is not None
        assert running.stdout is not None
        for number in range(3):
            running.stdin.write(f"word{number} word1\n")
            running.stdin.flush()
            assert json.loads(running.stdout.readline())["line"] == number + 1  # while the pipe is open and more may come
        running.send_signal(signal.SIGINT)
        _, told = running.communicate(timeout=60)
    assert running.returncode == 130
    assert told.splitlines()[-1] == "Interrupted."
    assert "Fatal Python error" not in told


@pytest.mark.slow
def test_a_reader_that_has_enough_ends_it_quietly(exports: Exports) -> None:
    with process(exports) as running:
        assert running.stdin is not None
        assert running.stdout is not None
        running.stdin.write("word1 word2\n")
        running.stdin.flush()
        assert json.loads(running.stdout.readline())["tokens"] == 3
        running.stdout.close()
        running.stdin.write("word1 word2\n" * 2000)
        running.stdin.flush()  # and it stays open
        assert running.wait(60) == 141
        assert running.stderr is not None
        told = running.stderr.read()
    assert "Error" not in told
    assert "Traceback" not in told
