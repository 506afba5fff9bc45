"""`txl generate` as a user meets it."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from tests.deploy.conftest import Exports
from txl_deploy.cli.main import main

Capture = pytest.CaptureFixture[str]


def generate(*arguments: object) -> int:
    return main(["generate", *map(str, arguments)])


def document(capfd: Capture, *arguments: object) -> dict:
    assert generate(*arguments, "--json") == 0
    return json.loads(capfd.readouterr().out)


def test_it_goes_on_with_a_prompt_and_says_everything_in_json(exports: Exports, capfd: Capture) -> None:
    made = document(
        capfd, "--checkpoint", exports.checkpoint, "--prompt", "word1 word2 nobody", "--max-tokens", 7, "--num-samples", 2, "--seed", 3
    )
    assert made["unknown_words"] == ["nobody"]
    assert len(made["prompt_token_ids"]) == 3
    assert [len(sample["token_ids"]) for sample in made["samples"]] == [7, 7]
    assert made["samples"][0]["stop_reason"] == "max-tokens"
    assert made["samples"][0]["text"].split() == [token for token in made["samples"][0]["tokens"] if token != "<eos>"]
    assert all(log_p < 0 for sample in made["samples"] for log_p in sample["log_p"])
    assert made["checkpoint_sha256"]
    assert made["segment_lens"] == [64, 1]
    assert made["time_to_first_token_s"] > 0
    again = document(capfd, "--checkpoint", exports.checkpoint, "--prompt", "word1 word2 nobody", "--max-tokens", 7, "--seed", 3)
    one, other = again["samples"][0], made["samples"][0]
    assert one.pop("log_p") == pytest.approx(other.pop("log_p"), abs=1e-6)  # a product of one row rounds as one of two does not
    assert one == other


def test_streaming_prints_the_same_text(exports: Exports, capfd: Capture) -> None:
    arguments = ("--checkpoint", exports.checkpoint, "--prompt", "word1", "--max-tokens", 25, "--seed", 1)
    assert generate(*arguments) == 0
    whole = capfd.readouterr().out
    assert whole.startswith("word1 ")
    assert generate(*arguments, "--stream") == 0
    assert capfd.readouterr().out == whole
    assert generate(*arguments, "--no-echo") == 0
    assert "word1" + capfd.readouterr().out == whole


def test_a_stop_ends_the_text_before_it(exports: Exports, capfd: Capture) -> None:
    arguments = ("--checkpoint", exports.checkpoint, "--prompt", "", "--max-tokens", 40, "--seed", 2)
    free = document(capfd, *arguments)["samples"][0]
    word = free["tokens"][3]
    cut = document(capfd, *arguments, "--stop", word)["samples"][0]
    assert (cut["stop_reason"], cut["stopped_by"]) == ("stop", word)
    assert free["text"].startswith(cut["text"])
    assert word not in cut["text"]
    assert free["token_ids"][: len(cut["token_ids"])] == cut["token_ids"]


def test_a_prompt_may_come_from_a_file(exports: Exports, tmp_path: Path, capfd: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "prompt").write_text("word1 word2\n")
    made = document(capfd, "--checkpoint", exports.checkpoint, "--prompt-file", tmp_path / "prompt", "--max-tokens", 2)
    assert made["prompt_token_ids"][-1] == 0  # its line has an end
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"word1 \xff")))
    assert generate("--checkpoint", exports.checkpoint, "--prompt-file", "-") == 2
    assert "not UTF-8" in capfd.readouterr().err


def test_the_token_for_unknown_words_can_be_left_out(exports: Exports, capfd: Capture) -> None:
    arguments = ("--checkpoint", exports.checkpoint, "--prompt", "", "--max-tokens", 150, "--temperature", 5)
    assert "<unk>" in document(capfd, *arguments)["samples"][0]["tokens"]
    assert "<unk>" not in document(capfd, *arguments, "--no-unk")["samples"][0]["tokens"]


def test_an_artifact_generates_with_another_one_to_read_the_prompt(
    exports: Exports, logits_onnx: Path, tmp_path: Path, capfd: Capture
) -> None:
    step = tmp_path / "next"
    assert (
        main(
            [
                "export",
                "--checkpoint",
                str(exports.checkpoint),
                "--format",
                "onnx",
                "--head",
                "logits",
                "--tgt-len",
                "1",
                "--out",
                str(step),
                "-qq",
            ]
        )
        == 0
    )
    capfd.readouterr()
    prompt = " ".join(f"word{i}" for i in range(1, 13))
    made = document(capfd, "--artifact", step, "--prefill-artifact", exports.onnx, "--prompt", prompt, "--temperature", 0)
    assert made["segment_lens"] == [5, 1]
    assert made["runtime"] == "onnx"
    assert made["manifest_sha256"]
    eager = document(capfd, "--checkpoint", exports.checkpoint, "--segment-len", 5, "--prompt", prompt, "--temperature", 0)
    assert made["samples"][0]["token_ids"] == eager["samples"][0]["token_ids"]


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        ((), 2, "either `--checkpoint` or `--artifact`"),
        (("--checkpoint", "C"), 2, "either `--prompt` or `--prompt-file`"),
        (("--checkpoint", "C", "--prompt", "x", "--temperature", "-1"), 2, "--temperature"),
        (("--checkpoint", "C", "--prompt", "x", "--top-p", "2"), 2, "--top-p"),
        (("--checkpoint", "C", "--prompt", "x", "--stream", "--json"), 2, "--stream"),
        (("--checkpoint", "C", "--prompt", "x", "--prefill-artifact", "A"), 2, "--segment-len"),
        (("--artifact", "A", "--prompt", "x", "--mem-len", "3"), 2, "fixed in an exported model"),
        (("--checkpoint", "nowhere.pt", "--prompt", "x"), 2, "There is no checkpoint"),
    ],
)
def test_wrong_usage_is_told(arguments: tuple[str, ...], code: int, told: str, capfd: Capture) -> None:
    assert generate(*arguments) == code
    assert told in capfd.readouterr().err


def test_an_export_that_scores_targets_names_the_command_that_makes_one_for_generation(exports: Exports, capfd: Capture) -> None:
    assert generate("--artifact", exports.torchscript, "--prompt", "word1") == 2
    assert "--head logits --tgt-len 1" in capfd.readouterr().err
