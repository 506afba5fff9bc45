"""A checkpoint in int8 in eager PyTorch: the commands that run it, what they say of it, and how near it is to the other int8 there is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.deploy.conftest import TGT_LEN, Exports
from tests.support import build_model, random_ids, small_config
from txl_deploy.cli.main import main
from txl_deploy.parity.tolerances import tolerance_for
from txl_deploy.runtimes.eager import EagerRuntime
from txl_deploy.runtimes.registry import eager_from_checkpoint
from txl_train.model.packed import can_pack

pytestmark = pytest.mark.skipif(not can_pack(), reason="this PyTorch was built without oneDNN")

Capture = pytest.CaptureFixture[str]


def run_json(capsys: Capture, *arguments: object) -> dict[str, Any]:
    assert main([*map(str, arguments), "--json"]) == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    return document


def test_an_evaluation_says_what_is_int8_and_stays_within_what_is_promised(exports: Exports, capsys: Capture) -> None:
    exact = run_json(capsys, "eval", "--checkpoint", exports.checkpoint)
    document = run_json(capsys, "eval", "--checkpoint", exports.checkpoint, "--dtype", "int8")
    assert (document["runtime"], document["dtype"], document["compute"], document["memory_dtype"]) == ("pytorch", "int8", "int8", "fp32")
    assert document["readback"]["weights"]["int8"] == 2 * 4 + 4  # of each layer four, and the shortlist's and three tails' tables
    tolerance = tolerance_for("int8")
    assert tolerance is not None
    assert 0 < abs(document["nll_nats_per_token"] - exact["nll_nats_per_token"]) < tolerance.mean_bound(exact["nll_nats_per_token"])


def test_it_is_measured_beside_fp32_and_held_to_its_perplexity(exports: Exports, capsys: Capture) -> None:
    few = ["--batch-sizes", "2", "--duration", "0", "--min-samples", "3", "--max-samples", "3", "--accept-invalid"]
    document = run_json(capsys, "bench", "--checkpoint", exports.checkpoint, "--dtype", "int8", *few)
    rows = [(row["runtime"], row["dtype"], row["compute"], row["verified"]) for row in document["rows"]]
    assert rows == [("pytorch", "fp32", "fp32", True), ("pytorch", "int8", "int8", True)]


def test_it_generates(exports: Exports, capsys: Capture) -> None:
    options = ["--dtype", "int8", "--prompt", "word6 word1 word2", "--max-tokens", "3"]
    assert run_json(capsys, "generate", "--checkpoint", exports.checkpoint, *options)["dtype"] == "int8"


def test_it_scores_texts_and_warns_where_they_stand_beside_each_other(exports: Exports, tmp_path: Path, capsys: Capture) -> None:
    text = tmp_path / "text.txt"
    text.write_text("word6 word1 word2\n")
    assert main(["score", "--checkpoint", str(exports.checkpoint), "--dtype", "int8", str(text)]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out.splitlines()[0])["tokens"] == 4
    assert "rounds all streams of a batch by one scale" in printed.err


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--runtime", "compiled"], "int8 is for the runtimes pytorch and onnx, not for compiled"),
        (["--runtime", "torchscript"], "int8 is for ONNX on a CPU, not for torchscript"),
        (["--fp16"], "`--fp16` and `--dtype int8` contradict each other"),
    ],
)
def test_what_it_is_not_for_is_refused(exports: Exports, capsys: Capture, options: list[str], reason: str) -> None:
    assert main(["eval", "--checkpoint", str(exports.checkpoint), "--dtype", "int8", *options]) == 2
    assert reason in capsys.readouterr().err


def test_it_is_as_far_from_fp32_as_the_graph_that_onnxruntime_runs(exports: Exports, capsys: Capture) -> None:
    pytest.importorskip("onnxruntime")
    ours, theirs = (
        run_json(capsys, "eval", "--checkpoint", exports.checkpoint, "--dtype", "int8", "--runtime", runtime)["nll_nats_per_token"]
        for runtime in ("pytorch", "onnx")
    )
    exact = run_json(capsys, "eval", "--checkpoint", exports.checkpoint)["nll_nats_per_token"]
    assert abs(ours - theirs) < 2e-3 * exact


def test_segments_of_another_length_go_on_with_the_same_memory(exports: Exports) -> None:
    runtime, checkpoint = eager_from_checkpoint(exports.checkpoint, dtype="int8")
    single = runtime.of_length(1)
    assert (single.info.dtype, single.info.tgt_len) == ("int8", 1)
    ids = torch.from_numpy(random_ids(runtime.info.config, 2, TGT_LEN + 1))
    memory = runtime.step(ids[:, :-1], ids[:, 1:], runtime.initial_memory(2)).memory
    slow = single.initial_memory(2)
    for t in range(TGT_LEN):
        slow = single.step(ids[:, t : t + 1], ids[:, t + 1 : t + 2], slow).memory
    for state, other in zip(memory.states, slow.states, strict=True):
        torch.testing.assert_close(state, other, atol=0.15, rtol=0)
    assert checkpoint.sha256 == runtime.info.checkpoint_sha256


def test_it_is_the_same_with_keys_and_values_in_place_and_copied() -> None:
    model = build_model(small_config(cutoffs=(5, 9)))
    runtimes = [EagerRuntime(model, tgt_len=4, dtype="int8", packed=packed) for packed in (False, True)]
    ids = torch.from_numpy(random_ids(model.config, 3, 41))
    memories = [runtime.initial_memory(3) for runtime in runtimes]
    for start in range(0, 40, 4):
        segment, targets = ids[:, start : start + 4], ids[:, start + 1 : start + 5]
        results = [runtime.step(segment, targets, memory) for runtime, memory in zip(runtimes, memories, strict=True)]
        memories = [result.memory for result in results]
        torch.testing.assert_close(results[1].nll_BT, results[0].nll_BT, atol=1e-5, rtol=1e-5)
