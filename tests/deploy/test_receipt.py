"""A receipt says what its segments say, is believed only whole, and proves only what it was made for."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support import small_config
from txl_deploy.documents import content_sha256
from txl_deploy.receipt import Lengths, Receipt, ReceiptError, SegmentSums, receipt_name, require_receipt, versions
from txl_deploy.runtimes.base import RuntimeInfo
from txl_train.errors import ValidationError

MANIFEST, CHECKPOINT, CORPUS, VOCABULARY = ("a" * 64, "b" * 64, "c" * 64, "d" * 64)
INFO = RuntimeInfo(
    name="onnx",
    provider="CPUExecutionProvider",
    device="cpu",
    dtype="fp32",
    compute="fp32",
    memory="kv",
    tgt_len=5,
    config=small_config(),
    manifest_sha256=MANIFEST,
    checkpoint_sha256=CHECKPOINT,
)
N_SEGMENTS, PER_SEGMENT = 40, 10


def receipt(**changes: Any) -> Receipt:
    """Return a receipt of an artifact that differs from its checkpoint by rounding alone."""
    generator = np.random.default_rng(3)
    reference = generator.normal(50.0, 5.0, N_SEGMENTS)
    sums = SegmentSums(
        n_tokens=[PER_SEGMENT] * N_SEGMENTS,
        nll_nats=list(reference + generator.normal(0.0, 1e-6, N_SEGMENTS)),
        reference_nll_nats=list(reference),
    )
    made = Receipt(
        manifest_sha256=MANIFEST,
        parent_manifest_sha256=None,
        checkpoint_sha256=CHECKPOINT,
        corpus_sha256=CORPUS,
        vocabulary_sha256=VOCABULARY,
        dataset="pydoc",
        split="test",
        lengths=Lengths.of(INFO),
        batch_size=2,
        processes=1,
        runtime="onnx",
        provider="CPUExecutionProvider",
        device="cpu",
        dtype="fp32",
        compute="fp32",
        memory="kv",
        memory_dtype="fp32",
        n_tokens_in_text=N_SEGMENTS * PER_SEGMENT + 1,
        segments=sums,
        reference_device="cpu",
        command="txl eval",
        versions=versions(),
        git_commit=None,
        time_utc="2026-11-23T00:00:00+00:00",
    )
    return dataclasses.replace(made, **changes)


def ask(folder: Path, info: RuntimeInfo = INFO, **changes: Any) -> Receipt:
    """Ask for the receipt in `folder` as `txl bench` does."""
    asked = {"dataset": "pydoc", "split": "test", "corpus_sha256": CORPUS, "vocabulary_sha256": VOCABULARY} | changes
    return require_receipt(folder, info, n_tokens=N_SEGMENTS * PER_SEGMENT + 1, **asked)[0]


def shifted(by_nats_per_token: float) -> SegmentSums:
    """Return segments in which the artifact is worse by so much at every token."""
    sums = receipt().segments
    assert sums.reference_nll_nats is not None
    return dataclasses.replace(sums, nll_nats=[value + by_nats_per_token * PER_SEGMENT for value in sums.reference_nll_nats])


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    made = receipt()
    made.write(tmp_path / "receipt.json")
    assert Receipt.read(tmp_path / "receipt.json") == made
    assert ask(tmp_path) == made


def test_its_figures_follow_from_its_segments() -> None:
    made = receipt()
    summary = made.summary()
    assert summary["perplexity"] == pytest.approx(math.exp(math.fsum(made.segments.nll_nats) / 400), rel=1e-12)
    low, high = summary["perplexity_interval_95"]
    assert low < summary["perplexity"] < high
    assert abs(summary["mean_delta_nll"]) <= summary["mean_delta_upper_bound"] <= summary["equivalence_bound"]
    assert summary["passed"] is True


def test_a_difference_beyond_the_bound_of_its_precision_fails() -> None:
    assert receipt(segments=shifted(1e-7)).verdict().passed
    verdict = receipt(segments=shifted(1e-4)).verdict()
    assert not verdict.passed
    assert "may differ from the checkpoint's by 1.00e-04 nats" in verdict.reason
    assert receipt(segments=shifted(1e-4), dtype="fp16").verdict().passed


def test_int8_may_cost_half_a_percent_of_the_perplexity_and_no_more() -> None:
    assert receipt(segments=shifted(math.log(1.0049)), dtype="int8", compute="int8").verdict().passed
    for wrong in (math.log(1.0051), -math.log(1.0051)):
        assert not receipt(segments=shifted(wrong), dtype="int8", compute="int8").verdict().passed


def test_differences_that_cancel_in_the_mean_are_no_proof_where_they_scatter() -> None:
    sums = receipt().segments
    assert sums.reference_nll_nats is not None
    noise = np.random.default_rng(5).normal(0.0, 0.01, N_SEGMENTS)
    scattered = [value + error for value, error in zip(sums.reference_nll_nats, noise - noise.mean())]
    verdict = receipt(segments=dataclasses.replace(sums, nll_nats=scattered)).verdict()
    assert verdict.mean_delta_nll == pytest.approx(0.0, abs=1e-12)
    assert not verdict.passed


def test_tokens_that_were_not_scored_make_it_worthless() -> None:
    verdict = receipt(n_tokens_in_text=N_SEGMENTS * PER_SEGMENT + 4).verdict()
    assert not verdict.passed
    assert "400 of the 403 tokens" in verdict.reason


def test_a_text_of_one_segment_is_too_short_to_prove_anything() -> None:
    one = SegmentSums(n_tokens=[PER_SEGMENT], nll_nats=[50.0], reference_nll_nats=[50.0])
    verdict = receipt(segments=one, n_tokens_in_text=PER_SEGMENT + 1).verdict()
    assert (verdict.passed, verdict.upper_bound) == (False, math.inf)


def test_what_is_beyond_all_numbers_is_written_down_as_none() -> None:
    beyond = dataclasses.replace(receipt().segments, nll_nats=[1e6] * N_SEGMENTS)
    summary = receipt(segments=beyond).summary()
    assert (summary["perplexity"], summary["passed"]) == (None, False)


def test_without_the_checkpoint_it_proves_nothing(tmp_path: Path) -> None:
    made = receipt(segments=dataclasses.replace(receipt().segments, reference_nll_nats=None))
    made.write(tmp_path / "receipt.json")
    with pytest.raises(ValidationError, match="not compared with its checkpoint"):
        ask(tmp_path)
    assert made.summary()["passed"] is False


OTHERS = {
    "missing": ({}, {"split": "valid"}, r"no receipt for the valid split \(there is receipt.json"),
    "other split": ({"split": "train"}, {}, "of another split: train there, test here"),
    "other text": ({"corpus_sha256": "e" * 64}, {}, "of another text"),
    "other vocabulary": ({"vocabulary_sha256": "e" * 64}, {}, "of another vocabulary"),
    "other checkpoint": ({"checkpoint_sha256": "e" * 64}, {}, "of another checkpoint"),
    "stale": ({"manifest_sha256": "e" * 64}, {}, "it is stale"),
    "renamed runtime": ({"runtime": "torchscript"}, {}, "of another runtime: torchscript there, onnx here"),
    "provider fallback": ({"provider": "CUDAExecutionProvider"}, {}, "of another provider: CUDAExecutionProvider"),
    "other device": ({"device": "cuda"}, {}, "of another device: cuda there, cpu here"),
    "other version": ({"versions": {"torch": "2.0.0"}}, {}, "of other versions: torch 2.0.0 there"),
    "other rules": ({}, {"dataset": "text"}, "data set, tokens"),
    "other precision": ({"memory_dtype": "fp16"}, {}, "of another precision"),
    "other lengths": ({"lengths": dataclasses.replace(Lengths.of(INFO), mem_len=640)}, {}, "for other lengths: tgt 5, mem 640"),
    "failed": ({"segments": shifted(0.01)}, {}, "proves nothing: its mean nll may differ"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_receipt_for_something_else_is_refused_by_its_reason(tmp_path: Path, name: str) -> None:
    recorded, asked, reason = OTHERS[name]
    receipt(**recorded).write(tmp_path / "receipt.json")
    with pytest.raises(ValidationError, match=reason) as caught:
        ask(tmp_path, **asked)
    assert "txl eval --artifact" in (caught.value.remedy or "")


def test_a_changed_receipt_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "receipt.json"
    receipt().write(path)
    document = json.loads(path.read_text())
    document["segments"]["nll_nats"][0] += 1.0
    path.write_text(json.dumps(document))
    with pytest.raises(ReceiptError, match="was changed after it was written"):
        ask(tmp_path)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"schema_version": 2}, "of schema txl.receipt 2"),
        ({"batch_size": "16"}, "`batch_size` must be of type int"),
        ({"segments": {"n_tokens": [1], "nll_nats": [], "reference_nll_nats": None}}, "equally many figures"),
        ({"segments": {"n_tokens": [], "nll_nats": [], "reference_nll_nats": None}}, "at least one"),
        ({"segments": {"n_tokens": [0], "nll_nats": [0.0], "reference_nll_nats": None}}, "no token"),
        ({"surprise": 1}, "`surprise` is unknown"),
    ],
)
def test_a_receipt_that_is_none_is_refused_though_its_checksum_fits(tmp_path: Path, change: dict[str, Any], told: str) -> None:
    path = tmp_path / "receipt.json"
    receipt().write(path)
    document = json.loads(path.read_text()) | change
    del document["sha256"]
    path.write_text(json.dumps(document | {"sha256": content_sha256(document)}))
    with pytest.raises(ReceiptError, match=told):
        Receipt.read(path)


def test_each_split_has_a_file_of_its_own() -> None:
    assert [receipt_name(split) for split in ("test", "valid", "train")] == ["receipt.json", "receipt-valid.json", "receipt-train.json"]


@pytest.mark.parametrize(("n_tokens", "nll_nats"), [([10**400, 1], [1.0, 1.0]), ([4, 4], [1e200, 1.0]), ([4, 4], [1.0, -1e300])], ids=str)
def test_figures_that_no_text_has_are_refused_before_anything_is_computed_of_them(n_tokens: list[int], nll_nats: list[float]) -> None:
    with pytest.raises(ReceiptError, match="no text has more"):
        SegmentSums(n_tokens=n_tokens, nll_nats=nll_nats, reference_nll_nats=None)
