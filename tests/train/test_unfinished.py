"""What is being made is known by its name and its lock; what a killed process has left goes, and nothing else does."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.processes import start
from txl_train import unfinished
from txl_train.files import whole_or_absent
from txl_train.unfinished import exchange, file_beside, folder_beside, name_beside, remove_abandoned


def killed_while_making(kind: str, path: Path) -> None:
    with file_beside(path) if kind == "file" else folder_beside(path) as made:
        if isinstance(made, Path):
            (made / "part").write_bytes(b"half")
        else:
            made.write(b"half")
            made.flush()
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_a_killed_process_has_left_goes_with_the_next_write_into_the_folder(kind: str, tmp_path: Path) -> None:
    process, _ = start(killed_while_making, kind, tmp_path / "result")
    process.join()
    left = list(tmp_path.iterdir())
    assert [path.name.startswith(".result.") for path in left] == [True]

    with whole_or_absent(tmp_path / "another") as file:
        file.write(b"whole")

    assert [path.name for path in tmp_path.iterdir()] == ["another"]


def test_what_is_still_being_made_is_left_alone(tmp_path: Path) -> None:
    with file_beside(tmp_path / "file") as file, folder_beside(tmp_path / "folder") as folder:
        file.write(b"one")
        (folder / "part").write_bytes(b"two")
        remove_abandoned(tmp_path)
        assert (folder / "part").exists()
        assert len(list(tmp_path.iterdir())) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_is_of_another_machine_or_somebody_elses_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (".notes.tmp", "notes.tmp", ".config.lock", ".a.12345678-zzzzzzzz.tmp", ".lock"):
        (tmp_path / name).write_bytes(b"mine")
    with monkeypatch.context() as patch:
        patch.setattr(unfinished.platform, "node", lambda: "another")
        name_beside(tmp_path / "far").write_bytes(b"its locks may not be seen here")
    before = sorted(path.name for path in tmp_path.iterdir())
    remove_abandoned(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_the_lock_of_a_killed_process_goes_but_not_one_that_is_held(tmp_path: Path) -> None:
    from txl_train.data.idcache import one_at_a_time

    left = tmp_path / f".{'0' * 40}.ids.lock"
    left.touch()
    with one_at_a_time(tmp_path / f"{'1' * 40}.vocab.json"):
        remove_abandoned(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == [f".{'1' * 40}.vocab.json.lock"]


@pytest.mark.parametrize("at_once", [True, False])
def test_two_folders_exchange_their_names(at_once: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    if not at_once:
        monkeypatch.setattr(unfinished, "_exchanged_at_once", lambda one, other: False)
    exchange(tmp_path / "new", tmp_path / "old")
    assert (tmp_path / "old" / "new").exists()
    assert (tmp_path / "new" / "old").exists()
    assert len(list(tmp_path.iterdir())) == 2


def test_an_exchange_that_fails_halfway_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "old").mkdir()
    monkeypatch.setattr(unfinished, "_exchanged_at_once", lambda one, other: False)
    with pytest.raises(FileNotFoundError):
        exchange(tmp_path / "absent", tmp_path / "old")
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_long_names_and_names_beyond_ascii_are_written_too(tmp_path: Path) -> None:
    for name in ("x" * 255, "\N{SNOWMAN}" * 85):
        with whole_or_absent(tmp_path / name) as file:
            file.write(b"content")
        assert (tmp_path / name).read_bytes() == b"content"
