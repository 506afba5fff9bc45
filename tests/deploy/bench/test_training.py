"""Rows, tables and files of the training benchmark: what follows from the steps, what is refused, and NVIDIA's own table rebuilt."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from txl_deploy.bench.training import (
    FEWEST_STEPS,
    SCHEMA,
    TrainingResult,
    TrainingRow,
    measured_row,
    scaling_tables,
    skipped_row,
)
from txl_train.errors import ArtifactError

STEPS, WARMUP = 30, 5


def records(ms: list[float], *, losses: list[float | None] | None = None, peak: float | None = 2e9) -> list[dict[str, Any]]:
    """What metrics.jsonl holds after steps of these milliseconds, of 128 tokens each and 1e6 operations per token."""
    start = {"kind": "start", "step": 0, "flops_per_token": 1e6, "peak_flops": peak, "threads": 2}
    given = losses or [7.0 - step / 10 for step in range(len(ms))]
    trained = [
        {
            "kind": "train",
            "step": step + 1,
            "ms_per_step": one_ms,
            "tokens": 128 * (step + 1),
            "loss_nats_per_token": given[step],
            "train_seconds": sum(ms[: step + 1]) / 1e3,
            "peak_memory_bytes": 1000 + step,
        }
        for step, one_ms in enumerate(ms)
    ]
    return [start, *trained, {"kind": "valid", "step": len(ms)}, {"kind": "test", "step": len(ms)}]


def row(ms: list[float] | None = None, *, steps: int = STEPS, failure: str | None = None, **given: Any) -> TrainingRow:
    facts = {"processes": 2, "batch_size": 16, "dtype": "fp32", "device": "cuda", "warmup_steps": WARMUP}
    ms = [1000.0] * WARMUP + [100.0 + step % 3 for step in range(STEPS - WARMUP)] if ms is None else ms
    return measured_row(records(ms, **given), steps=steps, failure=failure, **facts)  # type: ignore[arg-type]


def of_rate(rate: float | None, *, processes: int, batch_size: int, dtype: str, device: str = "cuda") -> TrainingRow:
    """A row of that throughput; None is one that was skipped."""
    facts: dict[str, Any] = {"processes": processes, "batch_size": batch_size, "dtype": dtype, "device": device}
    if rate is None:
        return skipped_row("memory ran out", **facts, steps=STEPS, warmup_steps=0)
    return measured_row(records([128e3 / rate] * STEPS), **facts, steps=STEPS, warmup_steps=0)


def test_the_throughput_is_that_of_the_steps_after_the_warm_up() -> None:
    found = row()
    timed = found.ms_per_step[WARMUP:]
    assert found.valid
    assert len(found.ms_per_step) == len(found.tokens_per_step) == STEPS
    assert found.tokens_per_s == pytest.approx(128 * len(timed) / sum(timed) * 1e3)
    assert found.tokens_per_s_interval_95 is not None
    low, high = found.tokens_per_s_interval_95
    assert low < found.tokens_per_s < high < 1.02 * low
    assert found.training_minutes == pytest.approx(sum(found.ms_per_step) / 60e3)
    assert found.mfu == pytest.approx(found.tokens_per_s * 1e6 / 2e9)
    assert (found.loss_first, found.loss_last) == (7.0, 7.0 - 2.9)
    assert (found.peak_memory_bytes, found.threads) == (1000 + STEPS - 1, 2)


def test_without_a_measured_peak_there_is_no_share_of_it() -> None:
    assert row(peak=None).mfu is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"losses": [7.0] * 20 + [None] * 10}, "the loss of step 21 is no finite number"),
        ({"ms": [100.0] * 12}, "12 of 30 steps were trained"),
        ({"ms": [100.0] * (WARMUP + FEWEST_STEPS - 1), "steps": WARMUP + FEWEST_STEPS - 1}, "19 steps after the warm-up are too few"),
        ({"failure": "Training diverged"}, "Training diverged"),
    ],
)
def test_a_row_that_cannot_be_believed_says_why(changes: dict[str, Any], reason: str) -> None:
    found = row(**changes)
    assert not found.valid
    assert not found.figures_apply
    assert reason in found.invalid_reasons[0]
    found.check()


def test_as_many_steps_as_are_needed_are_enough() -> None:
    assert row([100.0] * (WARMUP + FEWEST_STEPS), steps=WARMUP + FEWEST_STEPS).valid


DGX_1 = """
1 16 11,499.8 24,028.9 2.089 1.000 1.000
2 16 19,574.0 40,001.7 2.044 1.702 1.665
4 16 42,184.9 85,391.2 2.024 3.668 3.554
8 16 84,803.6 159,122.2 1.876 7.374 6.622
1 32 N/A 31,072.4 2.702 N/A 1.000
2 32 N/A 55,534.1 2.837 N/A 1.787
4 32 N/A 117,200.6 2.778 N/A 3.772
8 32 N/A 234,437.3 2.764 N/A 7.545
"""
"""Base model on a DGX-1 with V100 of 16 GB, as NVIDIA published it in the README of DeepLearningExamples' Transformer-XL."""


@pytest.mark.parametrize("told", [True, False], ids=["skipped", "not asked for"])
def test_from_nvidias_throughputs_comes_nvidias_table(told: bool) -> None:
    expected = [tuple(line.split()) for line in DGX_1.strip().splitlines()]
    rows = []
    for processes, batch_size, fp32, mixed, *_ in expected:
        for dtype, cell in (("fp16", mixed), ("fp32", fp32)):
            rate = None if cell == "N/A" else float(cell.replace(",", ""))
            if rate is not None or told:
                rows.append(of_rate(rate, processes=int(processes), batch_size=int(batch_size), dtype=dtype))
    (table,) = scaling_tables(rows)
    assert table.mixed == "fp16"
    assert table.header[:3] == ("GPUs", "Batch Size / GPU", "Throughput - FP32 (tok/s)")
    assert table.header[-1] == "Weak Scaling - Mixed precision"
    for cells, published in zip(table.cells, expected, strict=True):
        assert cells[:4] == published[:4]
        for ratio, theirs in zip(cells[4:], published[4:], strict=True):  # theirs are of throughputs before these were rounded
            assert ratio == theirs or float(ratio) == pytest.approx(float(theirs), abs=0.0011)


def test_an_invalid_row_enters_no_table_and_no_ratio() -> None:
    broken = dataclasses.replace(of_rate(100.0, processes=1, batch_size=16, dtype="fp32"), valid=False, invalid_reasons=["it diverged"])
    small = of_rate(80.0, processes=1, batch_size=8, dtype="fp32")
    mixed = of_rate(300.0, processes=1, batch_size=16, dtype="bf16", device="cpu")
    (table,) = scaling_tables([small, broken, mixed])
    assert table.cells[1] == ("1", "16", "N/A", "300.0", "N/A", "N/A", "1.000")  # it did hold that batch: no smaller one stands in for it


def test_each_mixed_precision_has_a_table_and_fp32_alone_has_one() -> None:
    rows = [of_rate(100.0, processes=1, batch_size=16, dtype=dtype, device="cpu") for dtype in ("fp32", "bf16", "fp16")]
    assert [table.mixed for table in scaling_tables(rows)] == ["bf16", "fp16"]
    (table,) = scaling_tables(rows[:1])
    assert table.cells == (("1", "16", "100.0", "N/A", "N/A", "1.000", "N/A"),)
    assert table.header[0] == "Processes"
    first, rule, line = table.lines()
    assert len(first) == len(rule) == len(line)
    assert set(rule) == set("|-: ")


def result() -> TrainingResult:
    skipped = skipped_row(
        "this machine has 1 GPU", processes=4, batch_size=16, dtype="fp32", device="cuda", steps=STEPS, warmup_steps=WARMUP
    )
    return TrainingResult(
        command="txl bench train --config tiny", settings={"train": {"tgt_len": 32}}, environment={"cpu": None}, rows=[row(), skipped]
    )


def test_a_result_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "training.json"
    result().write(path)
    assert TrainingResult.read(path) == result()
    assert json.loads(path.read_text()) == result().to_dict()
    assert len(path.read_text().splitlines()) < 20


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"tokens_per_s": 1e6}, "its steps say"),
        ({"tokens_per_s": None}, "its steps say"),
        ({"tokens_per_step": [128] * 29}, "29 numbers of tokens"),
        ({"ms_per_step": "fast"}, "ms_per_step"),
        ({"steps": 31}, "30 steps instead of 31"),
        ({"valid": False}, "0 reasons against it"),
        ({"invalid_reasons": ["noise"]}, "1 reasons against it"),
        ({"skipped": "no GPU"}, "was skipped, but has figures"),
        ({"colour": "red"}, "colour"),
    ],
    ids=str,
)
def test_a_row_that_does_not_follow_from_its_steps_is_refused(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    document = result().to_dict()
    document["rows"][0] |= changes
    (tmp_path / "training.json").write_text(json.dumps(document))
    with pytest.raises(ArtifactError, match=reason):
        TrainingResult.read(tmp_path / "training.json")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "not valid JSON"),
        ("[]", "no object"),
        (json.dumps({"schema": SCHEMA})[:-1] + ', "rows": [{"mfu": 1e999}]}', "1e999 is too large for a number"),
        (json.dumps({"schema": "txl.benchmark"}), "no result of `txl bench train`"),
        (json.dumps({"schema": SCHEMA, "schema_version": 7}), "schema version 7"),
        (json.dumps({"schema": SCHEMA, "schema_version": 1}), "missing"),
    ],
)
def test_what_is_no_result_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "training.json").write_text(text)
    with pytest.raises(ArtifactError, match=reason):
        TrainingResult.read(tmp_path / "training.json")


def test_a_missing_result_is_told_with_the_command_that_makes_one(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="bench train --out"):
        TrainingResult.read(tmp_path / "training.json")


def test_a_larger_batch_of_fp32_is_no_base_for_a_speedup() -> None:
    rows = [of_rate(200.0, processes=1, batch_size=32, dtype="fp32"), of_rate(300.0, processes=1, batch_size=16, dtype="fp16")]
    (table,) = scaling_tables(rows)
    assert table.cells[0] == ("1", "16", "N/A", "300.0", "N/A", "N/A", "1.000")
