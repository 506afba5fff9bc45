"""A killed worker, two commands in one place, a killed download, a jumping clock; `benchmarks/faults.py` has more of each."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults import groups
from tests.faults.scenarios import Sources


@pytest.mark.slow
def test_workers_that_are_killed_end_their_group_and_the_next_one_goes_on_to_the_same_weights(
    base_sources: Sources, tmp_path: Path
) -> None:
    assert groups.workers_killed(base_sources, tmp_path / "groups", kills=3)["longest_wait_s"] < groups.BOUND_S


def test_two_processes_that_write_one_checkpoint_leave_a_whole_one_at_any_time(base_sources: Sources, tmp_path: Path) -> None:
    assert groups.two_writers(base_sources, tmp_path / "groups", count=20)["read_meanwhile"] > 0


@pytest.mark.parametrize("name", ["prepare", "tokens"])
def test_two_commands_at_once_in_one_place_both_succeed(name: str, base_sources: Sources, tmp_path: Path) -> None:
    groups.PARTS[f"two of {name}"](base_sources, tmp_path / "groups")


def test_of_two_trainings_in_one_folder_the_second_is_refused(base_sources: Sources, tmp_path: Path) -> None:
    groups.PARTS["two of train"](base_sources, tmp_path / "groups")


@pytest.mark.slow
def test_two_exports_to_one_folder_leave_a_whole_artifact(sources: Sources, tmp_path: Path) -> None:
    groups.PARTS["two of export torchscript"](sources, tmp_path / "groups")


def test_downloads_that_are_killed_go_on_where_they_were(base_sources: Sources, tmp_path: Path) -> None:
    assert groups.downloads_killed(base_sources, tmp_path / "groups", kills=8)["with_a_part"] > 0


def test_a_clock_that_jumps_changes_nothing(base_sources: Sources, tmp_path: Path) -> None:
    groups.clock_jumps(base_sources, tmp_path / "groups")
