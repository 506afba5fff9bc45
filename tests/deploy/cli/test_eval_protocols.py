"""`txl eval --protocol`: NVIDIA's two ways to evaluate, from the command line, in every runtime."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.conftest import Exports
from tests.support import build_model, small_config, write_checkpoint
from txl_deploy.cli.main import main
from txl_train.data.corpus import load_corpus
from txl_train.data.datasets import get_dataset
from txl_train.data.vocabulary import Vocabulary
from txl_train.evaluate import ModelStepper, evaluate
from txl_train.model.inference import with_lengths
from txl_train.protocols import NvidiaSegments, UnevenStepper

Capture = pytest.CaptureFixture[str]

SHORT = ["--tgt-len", 4, "--mem-len", 6]


def run_json(capsys: Capture, exports: Exports, *arguments: object) -> dict[str, Any]:
    assert main(["eval", "--checkpoint", str(exports.checkpoint), *map(str, arguments), "--json"]) == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    return document


def loss_below_the_command_line(
    exports: Exports, *, warm_up_len: int, batch_size: int, tgt_len: int, mem_len: int, ext_len: int = 0, repeat: int = 1
) -> float:
    """Return what the parts say that the command puts together."""
    vocabulary = Vocabulary.load(exports.onnx / "vocabulary.json")
    ids = load_corpus(exports.data, get_dataset("text"), vocabulary=vocabulary).ids("test")
    model = build_model(small_config(cutoffs=(5, 9, 16), div_val=2))
    segments = NvidiaSegments(ids, batch_size=batch_size, tgt_len=tgt_len, ext_len=ext_len, warm_up_len=warm_up_len)
    config = with_lengths(model.config, mem_len=mem_len)
    others = {n: ModelStepper(model, tgt_len=n, config=config) for n in segments.lengths_to_continue()} if repeat > 1 else {}
    main_stepper = ModelStepper(model, tgt_len=tgt_len, config=with_lengths(config, ext_len=ext_len))
    stepper = UnevenStepper(main_stepper, others, tgt_len=tgt_len, ext_len=ext_len)
    return evaluate(stepper, itertools.chain.from_iterable([segments] * repeat), batch_size=batch_size).nll_nats_per_token


def test_the_lengths_are_those_of_nvidias_command_line_unless_given(exports: Exports, capsys: Capture) -> None:
    document = run_json(capsys, exports, "--protocol", "nvidia-2019", "--batch-size", 3)
    lengths = {key: document[key] for key in ("tgt_len", "mem_len", "ext_len", "clamp_len", "same_length")}
    assert lengths == {"tgt_len": 64, "mem_len": 640, "ext_len": 0, "clamp_len": None, "same_length": False}
    document = run_json(capsys, exports, "--protocol", "nvidia-2019", "--batch-size", 3, "--mem-len", 9, "--clamp-len", 5)
    assert (document["tgt_len"], document["mem_len"], document["clamp_len"]) == (64, 9, 5)
    assert run_json(capsys, exports)["mem_len"] == 7, "the checkpoint's own in the exact protocol"


@pytest.mark.parametrize(("protocol", "warm_up_len", "rule"), [("nvidia-2019", 0, "mem_len"), ("nvidia-2023", 8, "mem_len+1")])
def test_each_lineage_has_its_warm_up_and_its_same_length(
    exports: Exports, capsys: Capture, protocol: str, warm_up_len: int, rule: str
) -> None:
    document = run_json(capsys, exports, "--protocol", protocol, "--batch-size", 3, *SHORT, "--same-length")
    assert document["same_length_rule"] == rule
    assert document["n_warm_up_segments"] == warm_up_len // 4
    document = run_json(capsys, exports, "--protocol", protocol, "--batch-size", 3, *SHORT)
    rows = document["n_tokens_in_text"] // 3
    assert document["n_tokens"] == 3 * (rows - 1)
    assert document["n_tokens_trimmed"] == document["n_tokens_in_text"] - 3 * rows
    expected = loss_below_the_command_line(exports, warm_up_len=warm_up_len, batch_size=3, tgt_len=4, mem_len=6)
    assert document["nll_nats_per_token"] == pytest.approx(expected, abs=1e-7)
    assert document["nll_nats_per_token"] != pytest.approx(run_json(capsys, exports, *SHORT)["nll_nats_per_token"], abs=1e-5)


@pytest.mark.parametrize(("runtime", "ext_len"), [("pytorch", 2), ("torchscript", 2), pytest.param("onnx", 0, marks=pytest.mark.slow)])
def test_a_second_pass_remembers_the_first_in_every_runtime(exports: Exports, capsys: Capture, runtime: str, ext_len: int) -> None:
    lengths = ["--tgt-len", 5, "--mem-len", 3, "--ext-len", ext_len, "--batch-size", 3]
    document = run_json(capsys, exports, "--protocol", "nvidia-2019", *lengths, "--repeat", 2, "--runtime", runtime)
    expected = loss_below_the_command_line(exports, warm_up_len=0, batch_size=3, tgt_len=5, mem_len=3, ext_len=ext_len, repeat=2)
    once = loss_below_the_command_line(exports, warm_up_len=0, batch_size=3, tgt_len=5, mem_len=3, ext_len=ext_len)
    assert document["nll_nats_per_token"] == pytest.approx(expected, abs=1e-6)
    assert abs(expected - once) > 1e-5
    assert document["n_tokens"] == 2 * document["n_tokens_per_pass"]


@pytest.mark.parametrize("name", ["onnx", "torchscript"])
def test_an_artifact_is_evaluated_by_nvidias_rules_with_its_own_lengths(exports: Exports, capsys: Capture, name: str) -> None:
    options = ["--protocol", "nvidia-2023", "--batch-size", "3", "--json"]
    assert main(["eval", "--artifact", str(getattr(exports, name)), *options]) == 0
    document = json.loads(capsys.readouterr().out)
    expected = run_json(capsys, exports, *options[:4], "--tgt-len", 5, "--mem-len", 7)
    assert (document["tgt_len"], document["mem_len"]) == (5, 7)
    assert document["nll_nats_per_token"] == pytest.approx(expected["nll_nats_per_token"], abs=1e-6)


def test_an_artifact_is_refused_where_its_fixed_length_cannot_go_on(exports: Exports, capsys: Capture) -> None:
    options = ["--protocol", "nvidia-2019", "--repeat", "2", "--batch-size", "3"]
    assert main(["eval", "--artifact", str(exports.onnx), *options]) == 2
    assert "takes segments of 5 tokens only" in capsys.readouterr().err
    assert main(["eval", "--artifact", str(exports.onnx), *options, "--max-size", "3"]) == 0, "whole segments can"


def test_an_artifact_of_the_other_lineages_same_length_is_refused(exports: Exports, tmp_path: Path, capsys: Capture) -> None:
    kept = tmp_path / "kept"
    options = ["--same-length", "--mem-len", 6, "--tgt-len", 4, "--batch-size", 3, "--runtime", "torchscript", "--save-torchscript", kept]
    first = run_json(capsys, exports, "--protocol", "nvidia-2019", *options)
    assert main(["eval", "--artifact", str(kept), "--protocol", "nvidia-2019", "--batch-size", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["nll_nats_per_token"] == first["nll_nats_per_token"]
    assert main(["eval", "--artifact", str(kept), "--protocol", "nvidia-2023", "--batch-size", "3"]) == 2
    assert "over mem_len keys, but mem_len+1 were asked for" in capsys.readouterr().err


def test_tokens_lost_to_the_warm_up_are_told_and_counted(exports: Exports, capsys: Capture) -> None:
    options = ["--protocol", "nvidia-2023", "--batch-size", "20", "--tgt-len", "4", "--mem-len", "12"]
    assert main(["eval", "--checkpoint", str(exports.checkpoint), *options, "--json"]) == 0
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    rows = document["n_tokens_in_text"] // 20
    assert document["n_tokens_lost_to_warm_up"] == (12 - rows) * 20 > 0
    assert document["n_tokens"] == 20 * (rows - 1) - document["n_tokens_lost_to_warm_up"]
    assert "shorter than the warm-up" in captured.err


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        (["--batch-size", "20", "--mem-len", "640"], "all 1 segments belong to the warm-up"),
        (["--batch-size", "2", *map(str, SHORT), "--max-size", "2"], "`--max-size` 2 ends before a warm-up of 2 does"),
        (["--batch-size", "150"], "nothing to predict"),
    ],
)
def test_an_evaluation_of_nothing_is_an_error_with_its_reason(exports: Exports, capsys: Capture, options: list[str], fragment: str) -> None:
    assert main(["eval", "--checkpoint", str(exports.checkpoint), "--protocol", "nvidia-2023", *options]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert fragment in captured.err


def test_manual_text_has_nvidias_words_no_warm_up_and_one_column(exports: Exports, capsys: Capture) -> None:
    words = ["word3", "word4-word5", "<unk>", "&"]
    document = run_json(capsys, exports, "--protocol", "nvidia-2023", "--manual", *words)
    assert document["manual"] == words
    assert (document["batch_size"], document["n_warm_up_segments"]) == (1, 0)
    assert document["n_tokens_in_text"] == 9  # word3 word4 @-@ word5 &lt; unk &gt; &amp; <eos>
    assert document["n_oov"] == 5
    ours = run_json(capsys, exports, "--manual", *words)
    assert ours["n_tokens_in_text"] == 5  # blanks separate, and <unk> is a word of this data set


def test_the_line_before_an_evaluation_is_that_of_its_lineage(exports: Exports, capsys: Capture) -> None:
    for protocol, beginning in (("nvidia-2019", "Evaluating with math"), ("nvidia-2023", "Evaluating with: math")):
        options = ["--protocol", protocol, "--tgt-len", "4", "--mem-len", "4", "--ext-len", "3", "--batch-size", "3"]
        assert main(["eval", "--checkpoint", str(exports.checkpoint), *options]) == 0
        line = capsys.readouterr().out.splitlines()[0]
        assert line == f"{beginning} fp32 type pytorch bsz 3 tgt_len 4 ext_len 3 mem_len 4 clamp_len -1"


def test_without_memory_same_length_is_each_lineages_own(exports: Exports, capsys: Capture) -> None:
    options = ["--same-length", "--mem-len", "0", "--tgt-len", "4", "--batch-size", "3"]
    assert run_json(capsys, exports, "--protocol", "nvidia-2023", *options)["same_length_rule"] == "mem_len+1"  # each token sees itself
    assert main(["eval", "--checkpoint", str(exports.checkpoint), "--protocol", "nvidia-2019", *options]) == 2
    assert "leaves no key to attend to" in capsys.readouterr().err


def test_positions_that_count_from_the_end_take_segments_as_they_are(exports: Exports, tmp_path: Path, capsys: Capture) -> None:
    config = small_config(attn_type="sinusoidal")
    write_checkpoint(tmp_path / "absolute.pt", config, data=exports.data)
    options = ["--checkpoint", str(tmp_path / "absolute.pt"), "--protocol", "nvidia-2019", "--tgt-len", "4", "--mem-len", "6"]
    assert main(["eval", *options, "--batch-size", "3", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["memory"] == "hidden", "the only kind that such a model can have"
    assert main(["eval", *options, "--batch-size", "3", "--ext-len", "2"]) == 2
    assert "counts positions from a segment's end" in capsys.readouterr().err
