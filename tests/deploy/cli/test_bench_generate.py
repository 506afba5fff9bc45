"""`txl bench generate` from the command line: rows of every runtime whose tokens agree, the result file, and how it ends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.deploy.conftest import Exports
from txl_deploy.cli.main import main
from txl_deploy.export.artifact import ExportRequest, export_artifact

Capture = pytest.CaptureFixture[str]
QUICK = ["--max-tokens", 4, "--min-samples", 3, "--warmup", 1, "--max-duration", 5, "--device", "cpu", "--threads", 1]


def bench_generate(*words: object) -> int:
    return main(["bench", "generate", *map(str, words)])


@pytest.mark.slow
def test_a_checkpoint_and_its_export_are_measured_on_the_same_tokens(exports: Exports, tmp_path: Path, capfd: Capture) -> None:
    step, out = tmp_path / "step", tmp_path / "generation.json"
    export_artifact(ExportRequest(checkpoint=exports.checkpoint, out=step, format="onnx", head="logits", tgt_len=1))
    named = ["--checkpoint", exports.checkpoint, "--segment-len", 5, "--artifact", step, "--prefill-artifact", exports.onnx]
    prompts = ["--prompt-lens", "3,12", "--num-samples", "1,2", "--seed", 3]
    assert bench_generate(*named, *prompts, *QUICK, "--out", out, "--json") == 1  # three generations are too few
    told = capfd.readouterr()
    assert "12 of" not in told.err
    assert "too few samples" in told.err
    document = json.loads(told.out)
    assert document == json.loads(out.read_text())
    assert [(row["runtime"], row["prompt_tokens"], row["samples"]) for row in document["rows"]] == [
        (runtime, length, samples) for length in (3, 12) for samples in (1, 2) for runtime in ("pytorch", "onnx")
    ]
    assert [row["same_tokens"] for row in document["rows"]] == [None, True] * 4
    assert {tuple(row["segment_lens"]) for row in document["rows"]} == {(5, 1)}
    assert document["settings"]["prompt"] == "random tokens"
    assert document["environment"]["cores"]

    assert bench_generate(*named, *prompts, *QUICK, "--accept-invalid", "--temperature", 1) == 0
    told = capfd.readouterr()
    assert "4 of 4 rows that were compared have drawn the tokens of the first generator" in told.out
    assert told.out.count("| INVALID |") == 8


def test_prompts_may_be_the_beginning_of_a_text(exports: Exports, tmp_path: Path, capfd: Capture) -> None:
    (tmp_path / "text").write_text("word1 word2 word3\nword4\n")
    one = ["--checkpoint", exports.checkpoint, "--prompt-file", tmp_path / "text", "--num-samples", 1, *QUICK, "--accept-invalid"]
    assert bench_generate(*one, "--prompt-lens", 5) == 0
    assert "compared with nothing" in capfd.readouterr().out
    assert bench_generate(*one, "--prompt-lens", 40) == 2
    assert "has 6 tokens, fewer than the 40" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((), "nothing to measure"),
        (("--artifact", "A", "--runtimes", "onnx"), "are for a checkpoint"),
        (("--checkpoint", "C", "--prefill-artifact", "A"), "goes with `--artifact`"),
        (("--checkpoint", "C", "--runtimes", "onx"), "is no runtime of a checkpoint"),
        (("--checkpoint", "C", "--prompt-lens", "x"), "no batch size"),
        (("--checkpoint", "C", "--percentiles", "101"), "between 0 and 100"),
        (("--checkpoint", "C", "--top-p", "0"), "--top-p"),
        (("--checkpoint", "nowhere.pt"), "There is no checkpoint"),
    ],
)
def test_wrong_usage_is_told(arguments: tuple[str, ...], told: str, capfd: Capture) -> None:
    assert bench_generate(*arguments) == 2
    assert told in capfd.readouterr().err


def test_a_file_that_is_no_result_is_not_written_over(tmp_path: Path, capfd: Capture) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert bench_generate("--checkpoint", "C", "--out", tmp_path / "notes.txt") == 2
    assert "not written over" in capfd.readouterr().err
