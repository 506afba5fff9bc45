"""The rest of the specification's options of `txl eval`: each does what it says, or is refused with the way to go instead."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import click
import pytest

from tests.deploy.conftest import TGT_LEN, Exports
from txl_deploy import manifest as manifests
from txl_deploy.cli.greedy import GreedyCommand
from txl_deploy.cli.main import main

Capture = pytest.CaptureFixture[str]


def run(exports: Exports, *arguments: object) -> int:
    return main(["eval", "--checkpoint", str(exports.checkpoint), *map(str, arguments)])


def run_json(capsys: Capture, exports: Exports, *arguments: object) -> dict[str, Any]:
    assert run(exports, *arguments, "--json") == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    return document


# Options that take several values


@click.command(cls=GreedyCommand, greedy=("--manual", "--p"))
@click.option("--manual", multiple=True)
@click.option("--p", multiple=True)
@click.option("--flag", "-f", is_flag=True)
@click.option("--one")
def several(manual: tuple[str, ...], p: tuple[str, ...], flag: bool, one: str | None) -> None:
    """A command with options that take several values, and others."""
    click.echo(json.dumps([manual, p, flag, one]))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--manual", "a", "b", "c"], [["a", "b", "c"], [], False, None]),
        (["--manual", "a", "--manual", "b"], [["a", "b"], [], False, None]),
        (["--manual=a b"], [["a b"], [], False, None]),
        (["--manual", "a", "-f", "--p", "9", "5", "--one", "x"], [["a"], ["9", "5"], True, "x"]),
        (["--one", "x", "--manual", "- a dash first", "-", "-5", "-.5"], [["- a dash first", "-", "-5", "-.5"], [], False, "x"]),
        (["--manual", ""], [[""], [], False, None]),
        (["--manual", "a=b", "--one=y"], [["a=b"], [], False, "y"]),
    ],
)
def test_an_option_takes_the_values_that_follow_it(capsys: Capture, arguments: list[str], expected: list[Any]) -> None:
    several.main(arguments, standalone_mode=False)
    assert json.loads(capsys.readouterr().out) == expected


@pytest.mark.parametrize("arguments", [["--manual"], ["--manual", "--flag"], ["--flag", "--p", "-f"]])
def test_an_option_without_its_values_is_refused(arguments: list[str]) -> None:
    with pytest.raises(click.BadOptionUsage, match="at least one value"):
        several.main(arguments, standalone_mode=False)


def test_a_value_that_belongs_to_no_option_is_refused() -> None:
    with pytest.raises(click.UsageError, match="unexpected extra argument"):
        several.main(["--flag", "stray"], standalone_mode=False)


def test_words_after_manual_are_one_text(exports: Exports, capsys: Capture) -> None:
    apart = run_json(capsys, exports, "--manual", "word3", "word4", "word5", "--batch_size", 7)
    together = run_json(capsys, exports, "--manual", "word3 word4 word5")
    assert apart["nll_nats_sum"] == together["nll_nats_sum"]
    assert apart["n_tokens"] == 3


# Lengths and splits


def test_tokens_read_once_more_are_context_and_not_scored(exports: Exports, capsys: Capture) -> None:
    plain = run_json(capsys, exports, "--mem-len", 3)
    extended = run_json(capsys, exports, "--mem-len", 3, "--ext_len", 4)
    assert (extended["ext_len"], extended["n_tokens"]) == (4, plain["n_tokens"])
    assert abs(extended["nll_nats_per_token"] - plain["nll_nats_per_token"]) > 1e-4
    # with memory and extension as long as the text, every token sees all before it, however the text is cut
    whole = [run_json(capsys, exports, "--batch-size", 10, *lengths) for lengths in (("--ext-len", 60), ("--mem-len", 60))]
    assert whole[0]["nll_nats_per_token"] == pytest.approx(whole[1]["nll_nats_per_token"], abs=1e-6)


def test_all_splits_are_valid_and_test_each_on_its_own(exports: Exports, capsys: Capture) -> None:
    document = run_json(capsys, exports, "--split", "all")
    assert document["split"] == "all"
    assert list(document["splits"]) == ["valid", "test"]
    for split, part in document["splits"].items():
        assert part["split"] == split
        assert part["nll_nats_sum"] == run_json(capsys, exports, "--split", split)["nll_nats_sum"]
    assert run(exports, "--split", "all") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[:12] for line in lines if "loss" in line] == ["| valid loss", "| test loss "]


def test_a_target_holds_for_every_split(exports: Exports, capsys: Capture) -> None:
    parts = run_json(capsys, exports, "--split", "all")["splits"]
    low, high = sorted(part["perplexity"] for part in parts.values())
    assert run(exports, "--split", "all", "--target-perplexity", high + 1) == 0
    assert "Perplexity test passed" in capsys.readouterr().out
    assert run(exports, "--split", "all", "--target-perplexity", (low + high) / 2) == 1
    captured = capsys.readouterr()
    assert captured.out.count("Perplexity test passed") == captured.out.count("Perplexity test failed") == 1


# Speed


def test_save_data_shows_and_keeps_latency_and_throughput(exports: Exports, capsys: Capture, tmp_path: Path) -> None:
    assert run(exports, "--batch-size", 2, "--save_data", "--work_dir", tmp_path, "--percentiles", 50, 99.9) == 0
    lines = capsys.readouterr().out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("Throughput Avg"))
    assert re.fullmatch(r"Throughput Avg: \d+\.\d\d tok/s", lines[start])
    assert re.fullmatch(r"Latency Avg: \d+\.\d\d ms", lines[start + 1])
    assert [line.partition(":")[0] for line in lines[start + 2 : start + 4]] == ["Latency 50%", "Latency 99.9%"]
    assert lines[start - 1] == lines[start + 4] == "=" * 100
    kept = json.loads((tmp_path / "eval_data_2_fp32_pytorch.json").read_text())
    samples = kept["samples"]
    assert len(samples["latency_s"]) == len(samples["tokens"]) == kept["n_segments"]
    assert sum(samples["tokens"]) == kept["n_tokens"]
    warm_up = 7 // TGT_LEN + 2
    speed = kept["speed"]
    assert (speed["timing_warmup_steps"], speed["n"]) == (warm_up, kept["n_segments"] - warm_up)
    total = sum(samples["latency_s"][warm_up:])
    assert speed["throughput_tokens_per_s"] == pytest.approx(sum(samples["tokens"][warm_up:]) / total)
    assert speed["latency_ms_mean"] == pytest.approx(1000 * total / speed["n"])
    assert kept["command"].startswith("txl")


def test_the_documents_that_are_printed_have_no_samples(exports: Exports, capsys: Capture, tmp_path: Path) -> None:
    document = run_json(capsys, exports, "--save-data", "--work-dir", tmp_path, "--batch-size", 2, "--out", tmp_path / "result.json")
    assert "samples" not in document
    assert "samples" not in json.loads((tmp_path / "result.json").read_text())
    assert document["speed"]["latency_ms_p95"] > 0


def test_too_few_steps_for_a_figure_are_no_error_without_a_target(exports: Exports, capsys: Capture, tmp_path: Path) -> None:
    options = ["--max-size", 2, "--save-data", "--work-dir", tmp_path]
    assert run(exports, *options) == 0
    assert "were not measured" in capsys.readouterr().out
    assert run(exports, *options, "--target-throughput", 1) == 1
    assert "was not measured, as all steps belong to the clock's warm-up" in capsys.readouterr().err


@pytest.mark.parametrize(("target", "code", "verdict"), [(0.5, 0, "passed"), (1e12, 1, "failed")])
def test_a_target_throughput_is_compared_with_the_timed_steps(
    exports: Exports, capsys: Capture, target: float, code: int, verdict: str
) -> None:
    assert run(exports, "--batch-size", 2, "--target-throughput", target) == code
    lines = capsys.readouterr().out.splitlines()
    assert f"Throughput test {verdict}" in lines
    assert any(re.fullmatch(rf"Throughput achieved: \d+\.\d\d target: {target:.2f}", line) for line in lines)
    assert not any(line.startswith("Latency") for line in lines), "only --save-data shows them"


# Folders and files


def test_the_work_folder_has_the_checkpoint_and_gets_the_log(exports: Exports, capsys: Capture, tmp_path: Path) -> None:
    shutil.copy(exports.checkpoint, tmp_path / "checkpoint_best.pt")
    for _ in range(2):
        assert main(["eval", "--work-dir", str(tmp_path)]) == 0
    printed = capsys.readouterr().out.splitlines()
    logged = (tmp_path / "eval_log.log").read_text().splitlines()
    assert len(logged) == len(printed)
    assert [line.split(" - ", 2)[1:] for line in logged] == [["INFO", line] for line in printed]


def test_debug_writes_no_files(exports: Exports, capsys: Capture, tmp_path: Path) -> None:
    assert run(exports, "--work-dir", tmp_path / "W", "--debug", "--save-data", "--batch-size", 2) == 0
    assert "Latency Avg" in capsys.readouterr().out
    assert not (tmp_path / "W").exists()


def test_what_is_refused_leaves_no_folder_behind(exports: Exports, tmp_path: Path) -> None:
    assert run(exports, "--work-dir", tmp_path / "W", "--batch-size", 99999) == 2
    assert not (tmp_path / "W").exists()


def test_a_file_of_another_kind_is_not_written_over(exports: Exports, capsys: Capture, tmp_path: Path) -> None:
    (tmp_path / "eval_data_16_fp32_pytorch.json").write_text("my notes")
    assert run(exports, "--save-data", "--work-dir", tmp_path) == 2
    assert "no earlier result" in capsys.readouterr().err


def test_a_saved_torchscript_is_an_artifact_that_can_be_loaded_again(exports: Exports, capsys: Capture, tmp_path: Path) -> None:
    folder = tmp_path / "scripted"
    saved = run_json(capsys, exports, "--type", "torchscript", "--save_torchscript", folder, "--tgt-len", 4)
    assert main(["verify", str(folder)]) == 0
    capsys.readouterr()
    assert main(["eval", "--load_torchscript", str(folder), "--json"]) == 0
    loaded = json.loads(capsys.readouterr().out)
    assert (loaded["runtime"], loaded["tgt_len"], loaded["nll_nats_sum"]) == ("torchscript", 4, saved["nll_nats_sum"])
    assert run(exports, "--load-torchscript", folder) == 0, "with the checkpoint it was made from"


REFUSED = {
    "two precisions": (["--fp16", "--dtype", "fp32"], 2, "contradict each other"),
    "a precision of training": (["--dtype", "bf16"], 2, "bf16 is for training only"),
    "two devices": (["--cuda", "--device", "cpu"], 2, "contradict each other"),
    "another process": (["--local-rank", "1"], 2, "torchrun --nproc-per-node"),
    "a file of TorchScript": (["--load-torchscript", "{file}"], 2, "txl export --format torchscript"),
    "a folder of another format": (["--load-torchscript", "{onnx}"], 2, "in the format onnx"),
    "an artifact of another checkpoint": (["--load-torchscript", "{stranger}"], 1, "was not made from"),
    "a script to keep of what is not scripted": (["--save-torchscript", "x"], 2, "--runtime torchscript"),
    "a script to load and to keep": (["--load-torchscript", "{onnx}", "--save-torchscript", "x"], 2, "nor another export"),
    "no percentile": (["--percentiles", "100"], 2, "between 0 and 100"),
    "an unknown protocol": (["--protocol", "nvidia-2020"], 2, "nvidia-2019"),
    "no positive length": (["--ext-len", "-1"], 2, "ext-len"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_done_is_refused_with_the_way_to_go(exports: Exports, capsys: Capture, tmp_path: Path, name: str) -> None:
    arguments, code, fragment = REFUSED[name]
    (tmp_path / "model.pt").write_bytes(b"PK")
    if "{stranger}" in arguments:
        shutil.copytree(exports.torchscript, tmp_path / "stranger")
        manifest = tmp_path / "stranger" / "manifest.json"
        _claim_another_checkpoint(manifest)
    filled = [part.format(file=tmp_path / "model.pt", onnx=exports.onnx, stranger=tmp_path / "stranger") for part in arguments]
    assert run(exports, *filled) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert fragment in captured.err
    assert "bug in txl" not in captured.err


def _claim_another_checkpoint(path: Path) -> None:
    """Rewrite a manifest so that it is whole, but of another checkpoint."""
    folder = path.parent
    manifest = manifests.read_manifest(folder)
    other = manifests.Source(checkpoint_sha256="0" * 64, checkpoint_name="other.pt")
    files = list(manifest.files)
    path.unlink()
    manifests.write_manifest(folder, dataclasses.replace(manifest, source=other), files)


@pytest.mark.parametrize(("option", "expected"), [("--cuda", 3), ("--local-rank=0", 0)])
def test_flags_of_older_launchers_are_understood(exports: Exports, option: str, expected: int) -> None:
    import torch

    if torch.cuda.is_available():
        expected = 0
    assert run(exports, option) == expected
