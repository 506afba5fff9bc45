"""Commands that are killed, or whose disk fails, at some of their operations on files; `benchmarks/faults.py` takes all of them."""

from __future__ import annotations

import errno
import random
import resource
from pathlib import Path

import pytest

from tests.faults.harness import run
from tests.faults.kills import Tally, Trial, at_every_operation, at_random_moments, on_a_failing_disk
from tests.faults.scenarios import SCENARIOS, Sources

WITH_ARTIFACTS = ["export torchscript", "eval", "bench"]


def trial_of(name: str, sources: Sources, folder: Path) -> Trial:
    return Trial(SCENARIOS[name], sources, folder / "trial", Tally())


@pytest.mark.parametrize(("name", "step"), [("prepare", 4), ("tokens", 5), ("train", 13)])
def test_what_is_killed_between_two_operations_on_files_goes_on_to_the_same_end(
    name: str, step: int, base_sources: Sources, tmp_path: Path
) -> None:
    trial = trial_of(name, base_sources, tmp_path)
    assert sum(1 for _ in at_every_operation(trial, step=step)) > 5
    assert trial.tally.while_unfinished > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_ARTIFACTS)
def test_an_artifact_a_receipt_and_a_result_are_old_or_new_whenever_their_command_is_killed(
    name: str, sources: Sources, tmp_path: Path
) -> None:
    trial = trial_of(name, sources, tmp_path)
    assert sum(1 for _ in at_every_operation(trial, step=2, per_completion=4)) > 4
    assert trial.tally.kills > 3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["prepare", "train"])
def test_what_is_killed_at_random_moments_goes_on_to_the_same_end(name: str, base_sources: Sources, tmp_path: Path) -> None:
    trial = trial_of(name, base_sources, tmp_path)
    assert sum(1 for _ in at_random_moments(trial, 8, random.Random(0))) == 8


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS], ids=["full", "read-only"])
@pytest.mark.parametrize(("name", "step"), [("prepare", 9), ("train", 24)])
def test_a_full_or_read_only_disk_ends_with_3_and_harms_nothing(
    name: str, step: int, number: int, base_sources: Sources, tmp_path: Path
) -> None:
    trial = trial_of(name, base_sources, tmp_path)
    assert sum(1 for _ in on_a_failing_disk(trial, number, step=step)) > 2
    assert trial.tally.failures["3"] > 1


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_ARTIFACTS)
def test_a_full_disk_leaves_the_earlier_artifact_receipt_and_result(name: str, sources: Sources, tmp_path: Path) -> None:
    trial = trial_of(name, sources, tmp_path)
    assert sum(1 for _ in on_a_failing_disk(trial, errno.ENOSPC, step=3)) > 2
    assert trial.tally.failures["3"] > 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["export onnx", "export torchscript"])
def test_a_disk_that_fills_up_within_a_file_ends_an_export_with_3(name: str, sources: Sources, tmp_path: Path) -> None:
    """As on a full disk, some bytes of the file arrive: native writers of files meet the error, rather than Python's `open`."""
    scenario, folder = SCENARIOS[name], tmp_path / "work"
    folder.mkdir()
    scenario.prepare(sources, folder)
    for largest in (1 << 13, 1 << 14):
        ended = run(scenario.arguments(sources, folder), folder, limits={resource.RLIMIT_FSIZE: largest})
        assert ended.code == 3, ended.said[-2000:]
        assert "cannot be written" in ended.said, ended.said[-2000:]
        scenario.check(sources, folder)
