"""The records of a run: log lines that other programs read, metrics as JSON lines, TensorBoard."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from txl_train.callbacks import Progress
from txl_train.errors import EnvironmentUnfitError
from txl_train.records import RunRecord, end_line, eval_line, train_line


def test_the_train_line_is_the_specifications() -> None:
    progress = Progress(step=36000, epoch=18, batch=283)

    line = train_line(progress, 2101, 1.22e-3, 185.1, 265585, 3.1227, char=False)

    assert (
        line
        == "| epoch  18 step    36000 | batches    283 / 2101 | lr 1.220e-03 | ms/batch 185.1 | tok/s  265585 | loss  3.12 | ppl     22.71"
    )


def test_the_eval_line_is_the_specifications() -> None:
    line = eval_line(7, 35000, 1.37, math.log(23.132), char=False)

    assert line == "| Eval   7 at step    35000 | time:  1.37s | valid loss  3.14 | valid ppl    23.132"


def test_the_end_line_is_the_references() -> None:
    assert end_line(1.5, math.log(23.304), char=False) == "| End of training | test time:  1.50s | test loss  3.15 | test ppl    23.304"


def test_characters_are_reported_in_bits() -> None:
    nll = 1.06 * math.log(2)

    assert train_line(Progress(), 9, 0.1, 1.0, 1.0, nll, char=True).endswith("| loss  0.73 | bpc   1.06000")
    assert eval_line(1, 1, 1.0, nll, char=True).endswith("| valid loss  0.73 | bpc   1.06000")
    assert end_line(1.0, nll, char=True).endswith("| test loss  0.73 | test bpc   1.06000")


def test_a_huge_loss_does_not_break_the_lines() -> None:
    assert "inf" in train_line(Progress(), 9, 0.1, 1.0, 1.0, 1000.0, char=False)


def test_metrics_are_valid_json_even_of_infinite_numbers(tmp_path: Path) -> None:
    record = RunRecord(tmp_path, append=False)
    record.measure("train", perplexity=math.inf, grad_norm=math.nan, step=1)
    record.close()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    assert json.loads((tmp_path / "metrics.jsonl").read_text(encoding="utf-8"), parse_constant=refuse) == {
        "kind": "train",
        "perplexity": None,
        "grad_norm": None,
        "step": 1,
    }


def test_a_line_cut_off_by_a_kill_is_dropped_when_continuing(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 1}\n{"kind": "tra', encoding="utf-8")

    record = RunRecord(tmp_path, append=True)
    record.measure("train", step=2)
    record.close()

    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()] == [1, 2]


def test_another_process_writes_files_of_its_own_and_signs_its_lines(tmp_path: Path) -> None:
    record = RunRecord(tmp_path, append=False, rank=2)
    record.say("hello")
    record.measure("train", step=1)
    record.close()

    assert (tmp_path / "train_log.rank2.log").read_text(encoding="utf-8").endswith("INFO - [process 2] hello\n")
    assert {path.name for path in tmp_path.iterdir()} == {"train_log.rank2.log", "metrics.rank2.jsonl"}


@pytest.mark.parametrize("arguments", [{"folder": None}, {"silent": True}], ids=["without a folder", "in silence"])
def test_a_record_may_leave_no_files(tmp_path: Path, arguments: dict[str, object]) -> None:
    record = RunRecord(**{"folder": tmp_path, "append": False, **arguments})  # type: ignore[arg-type]
    record.say("hello")
    record.measure("train", step=1, loss=2.0)
    record.close()

    assert list(tmp_path.iterdir()) == []


def test_tensorboard_gets_every_number_at_its_step(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is not installed")
    record = RunRecord(tmp_path, append=False, tensorboard=True)
    for step in (1, 2):
        record.measure("train", step=step, loss_nats_per_token=5.0 - step, device="cpu", best=True, loss_scale=None)
    record.close()

    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Tags()["scalars"] == ["train/loss_nats_per_token"]
    assert [(event.step, event.value) for event in events.Scalars("train/loss_nats_per_token")] == [(1, 4.0), (2, 3.0)]


def test_without_tensorboard_installed_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)

    with pytest.raises(EnvironmentUnfitError, match="TensorBoard is not installed") as error:
        RunRecord(tmp_path, append=False, tensorboard=True)
    assert "txl[tensorboard]" in str(error.value.remedy)
