"""One process at a time makes an entry of the cache. (What entries hold and how damage is met stands in test_corpus.)"""

from __future__ import annotations

import concurrent.futures
import subprocess
import sys
import time
from pathlib import Path

import pytest

from txl_train.data import idcache
from txl_train.data.idcache import one_at_a_time


def test_nobody_is_inside_together_however_many_wait(tmp_path: Path) -> None:
    inside: list[int] = []
    most = []

    def enter(number: int) -> None:
        for _ in range(10):
            with one_at_a_time(tmp_path / "entry"):
                inside.append(number)
                most.append(len(inside))
                time.sleep(0.0005)
                inside.remove(number)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(enter, range(8)))
    assert most == [1] * 80
    assert not list(tmp_path.iterdir())


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    program = (
        "import os, pathlib, sys\nfrom txl_train.data.idcache import one_at_a_time\n"
        "with one_at_a_time(pathlib.Path(sys.argv[1])):\n    os._exit(9)\n"
    )
    assert subprocess.run([sys.executable, "-c", program, str(tmp_path / "entry")], check=False).returncode == 9
    assert [path.name for path in tmp_path.iterdir()] == [".entry.lock"]
    with one_at_a_time(tmp_path / "entry"):
        pass
    assert not list(tmp_path.iterdir())


def test_without_locks_everybody_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(idcache.fcntl, "flock", unsupported)
    with one_at_a_time(tmp_path / "entry"), one_at_a_time(tmp_path / "entry"):
        pass
    assert not list(tmp_path.iterdir())
