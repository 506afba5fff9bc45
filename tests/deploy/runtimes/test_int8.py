"""A checkpoint in int8 in eager PyTorch: the commands that run it, what they say of it, and how near it is to the other int8 there is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.deploy.conftest import TGT_LEN, Exports
from tests.support import build_model, needs_exact_int8, random_ids, small_config
from txl_deploy.cli.main import main
from txl_deploy.opening import Lengths, open_checkpoint
from txl_deploy.parity.tolerances import tolerance_for
from txl_deploy.runtimes.eager import EagerRuntime
from txl_deploy.runtimes.registry import eager_from_checkpoint, resolve_device
from txl_train.errors import UsageError
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


def test_the_tokens_that_it_generates_are_drawn_from_its_own_scores(exports: Exports, capsys: Capture) -> None:
    options = ["--prompt", "word6 word1 word2", "--max-tokens", "4", "--temperature", "0"]
    found = run_json(capsys, "generate", "--checkpoint", exports.checkpoint, "--dtype", "int8", *options)
    runtime = eager_from_checkpoint(exports.checkpoint, tgt_len=1, dtype="int8", head="log_probs")[0]
    ids, memory = list(found["prompt_token_ids"]), runtime.initial_memory(1)
    for at in range(len(ids) + 3):
        scores_1V, memory = runtime.next_token(torch.tensor([[ids[at]]]), memory)
        if at + 1 >= len(found["prompt_token_ids"]):
            ids.append(int(scores_1V.argmax()))
    assert found["dtype"] == "int8"
    assert found["samples"][0]["token_ids"] == ids[len(found["prompt_token_ids"]) :]


def test_what_stands_beside_a_text_does_not_change_its_score(exports: Exports, tmp_path: Path, capsys: Capture) -> None:
    text = tmp_path / "text.txt"
    text.write_text("word6 word1 word2\nword3 word4\nword1\n")
    scores = []
    for batch_size in ("1", "3"):
        command = ["score", "--checkpoint", str(exports.checkpoint), "--dtype", "int8", "--batch-size", batch_size, str(text)]
        assert main(command) == 0
        printed = capsys.readouterr()
        assert "stands beside a text" not in printed.err
        scores.append([json.loads(line)["nll_nats"] for line in printed.out.splitlines()])
    assert scores[1] == pytest.approx(scores[0], abs=1e-5)


@needs_exact_int8()
def test_a_graph_in_int8_warns_of_what_stands_beside_a_text_and_generates_one_by_one(
    exports: Exports, tmp_path: Path, capsys: Capture
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("word6 word1 word2\n")
    model = ["--checkpoint", str(exports.checkpoint), "--dtype", "int8", "--runtime", "onnx"]
    assert main(["score", *model, str(text)]) == 0
    assert "what stands beside a text changes what it scores a little" in capsys.readouterr().err
    options = ["--prompt", "word6 word1", "--max-tokens", "4", "--seed", "3"]
    one, three = (run_json(capsys, "generate", *model, *options, "--num-samples", n)["samples"] for n in ("1", "3"))
    assert three[0] == one[0]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--runtime", "compiled"], "int8 is for the runtimes pytorch and onnx, not for compiled"),
        (["--runtime", "torchscript"], "int8 is for the runtimes pytorch and onnx, not for torchscript"),
        (["--fp16"], "`--fp16` and `--dtype int8` contradict each other"),
    ],
)
def test_what_it_is_not_for_is_refused(exports: Exports, capsys: Capture, options: list[str], reason: str) -> None:
    assert main(["eval", "--checkpoint", str(exports.checkpoint), "--dtype", "int8", *options]) == 2
    assert reason in capsys.readouterr().err


@needs_exact_int8()
def test_the_other_int8_there_is_has_nearly_the_same_perplexity(exports: Exports, capsys: Capture) -> None:
    ours, theirs = (
        run_json(capsys, "eval", "--checkpoint", exports.checkpoint, "--dtype", "int8", "--runtime", runtime)["nll_nats_per_token"]
        for runtime in ("pytorch", "onnx")
    )
    assert abs(ours - theirs) < 2e-3 * theirs


def test_on_a_machine_with_a_gpu_it_runs_on_the_cpu_unless_a_gpu_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert [resolve_device("auto", dtype=dtype) for dtype in (None, "fp16", "int8")] == ["cuda:0", "cuda:0", "cpu"]
    with (
        pytest.raises(UsageError, match="int8 is for CPUs, not for GPUs"),
        open_checkpoint(Path("any.pt"), runtime="onnx", lengths=Lengths(), dtype="int8", device="cuda"),
    ):
        pass


def test_states_of_fp16_are_refused_beside_it() -> None:
    with pytest.raises(UsageError, match="with states of fp32"):
        EagerRuntime(build_model(small_config()), tgt_len=4, dtype="int8", memory_dtype="fp16")


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
