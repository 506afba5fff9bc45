"""The record of the machine: complete where it can be, silent about people, and never an error."""

from __future__ import annotations

import getpass
import json
import platform
import socket
import subprocess
from pathlib import Path

import pytest

from txl_deploy.bench import environment
from txl_deploy.bench.environment import describe_environment, git_commit


def test_the_record_holds_what_influences_a_latency():
    record = describe_environment(threads=2)
    assert {
        "cpu",
        "cores",
        "cpu_governor",
        "load_average_1min",
        "memory_gib",
        "os",
        "python",
        "gpus",
        "git_commit",
        "time_utc",
    } <= record.keys()
    assert record["threads"] == 2
    assert record["python"] == platform.python_version()
    assert "numpy" in record["packages"]
    json.dumps(record, allow_nan=False)


def test_neither_host_nor_user_are_named():
    values = json.dumps(describe_environment())
    for name in {socket.gethostname(), platform.node()} | ({getpass.getuser()} - {"root"}):
        assert len(name) < 4 or name not in values


def test_a_machine_that_tells_nothing_is_no_error(monkeypatch, tmp_path):
    monkeypatch.setattr(environment, "_PROC", tmp_path)
    monkeypatch.setattr(environment, "_SYS_CPU", tmp_path)
    monkeypatch.setenv("PATH", "")
    for name in ("getloadavg", "sched_getaffinity", "sysconf"):
        monkeypatch.delattr(environment.os, name, raising=False)
    record = describe_environment()
    assert (
        record["cpu_governor"]
        is record["cpu_busy_before"]
        is record["load_average_1min"]
        is record["memory_gib"]
        is record["git_commit"]
        is None
    )
    assert record["gpus"] == []


def test_the_share_of_time_that_others_use_is_read_from_the_systems_ticks(monkeypatch):
    states = iter(["cpu  100 0 50 800 50 0 0 0 0 0\ncpu0 1", "cpu  130 0 60 850 60 0 0 0 0 0\ncpu0 1"])
    monkeypatch.setattr(environment, "_read", lambda path: next(states) if path.name == "stat" else None)
    assert describe_environment()["cpu_busy_before"] == 0.4  # 40 of 100 ticks, idle and waiting for disks left out


def test_a_gpu_is_described_as_its_driver_does(monkeypatch):
    line = "Some GPU, 555.10, 16384, 1410, 300.00, 41\n"
    monkeypatch.setattr(environment, "_output", lambda command: line if command[0] == "nvidia-smi" else None)
    (gpu,) = describe_environment()["gpus"]
    assert gpu["name"] == "Some GPU"
    assert gpu["driver"] == "555.10"
    assert gpu["memory_mib"] == "16384"


@pytest.fixture
def checkout(tmp_path):
    def git(*words: str) -> None:
        name = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
        subprocess.run(["git", "-C", str(tmp_path), *name, *words], check=True, capture_output=True)

    try:
        git("init")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs git")
    (tmp_path / "module.py").write_text("1\n")
    git("add", "module.py")
    git("commit", "-m", "one")
    return tmp_path


def test_the_commit_of_a_checkout_is_named_and_its_changes_are_marked(checkout):
    commit = git_commit(checkout / "module.py")
    assert len(commit) == 40
    (checkout / "module.py").write_text("2\n")
    assert git_commit(checkout / "module.py") == f"{commit}+changes"


def test_a_package_installed_below_somebody_elses_checkout_has_no_commit(checkout):
    (checkout / "site-packages").mkdir()
    installed = Path(checkout / "site-packages" / "module.py")
    installed.write_text("1\n")
    assert git_commit(installed) is None
