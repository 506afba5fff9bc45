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
from txl_deploy.bench.environment import describe_environment, describe_state, disturbances, git_commit, others_share


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
    monkeypatch.setattr(environment, "_SYS_THERMAL", tmp_path)
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
    assert record["cpu_governors"] == {}
    assert record["cpu_extensions"] == []
    assert record["cpu_boost"] is record["cpu_mhz"] is record["cpu_temperature_c"] is None
    state = describe_state()
    assert state["cpu_busy_s"] is state["cpu_all_s"] is state["cpu_throttle_count"] is None
    assert state["gpus"] == []
    assert disturbances(state, state) == ()


def test_the_share_of_time_that_others_use_is_read_from_the_systems_ticks(monkeypatch):
    states = iter(["cpu  100 0 50 800 50 0 0 0 0 0\ncpu0 1", "cpu  130 0 60 850 60 0 0 0 0 0\ncpu0 1"])
    monkeypatch.setattr(environment, "_read", lambda path: next(states) if path.name == "stat" else None)
    assert describe_environment()["cpu_busy_before"] == 0.4  # 40 of 100 ticks, idle and waiting for disks left out


def test_only_the_processors_that_this_process_may_use_are_counted(monkeypatch):
    lines = "cpu  900 0 0 900 0 0 0 0 0 0\ncpu0 1 0 2 3 4 0 0 0 0 0\ncpu1 10 0 20 30 40 0 0 5 0 0\ncpu2 800 0 0 800 0 0 0 0 0 0"
    monkeypatch.setattr(environment, "_read", lambda path: lines if path.name == "stat" else None)
    monkeypatch.setattr(environment.os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    monkeypatch.setattr(environment, "_ticks_per_second", lambda: 10)
    state = describe_state()
    assert (state["cpu_busy_s"], state["cpu_all_s"]) == (3.8, 11.5)  # what a hypervisor took for others (5) is busy too


def test_governors_and_boost_and_clocks_are_told_by_processor(monkeypatch, tmp_path):
    for number, governor in enumerate(["performance"] * 3 + ["powersave", "performance"]):
        folder = tmp_path / f"cpu{number}" / "cpufreq"
        folder.mkdir(parents=True)
        (folder / "scaling_governor").write_text(f"{governor}\n")
        (folder / "scaling_cur_freq").write_text(f"{2_000_000 + 500_000 * number}\n")
    (tmp_path / "intel_pstate").mkdir()
    (tmp_path / "intel_pstate" / "no_turbo").write_text("1\n")
    monkeypatch.setattr(environment, "_SYS_CPU", tmp_path)
    record = describe_environment()
    assert record["cpu_governors"] == {"performance": "0-2,4", "powersave": "3"}
    assert record["cpu_boost"] is False
    assert record["cpu_mhz"] == 3000.0
    (tmp_path / "cpufreq").mkdir()
    (tmp_path / "cpufreq" / "boost").write_text("1\n")
    assert describe_environment()["cpu_boost"] is True


def test_the_hottest_package_and_the_number_of_slowdowns_are_told(monkeypatch, tmp_path):
    for number, (kind, milli) in enumerate([("x86_pkg_temp", 61000), ("x86_pkg_temp", 64500), ("iwlwifi_1", 99000)]):
        zone = tmp_path / f"thermal_zone{number}"
        zone.mkdir()
        (zone / "type").write_text(kind)
        (zone / "temp").write_text(f"{milli}\n")
        throttle = tmp_path / f"cpu{number}" / "thermal_throttle"
        throttle.mkdir(parents=True)
        (throttle / "package_throttle_count").write_text("2\n")
    monkeypatch.setattr(environment, "_SYS_THERMAL", tmp_path)
    monkeypatch.setattr(environment, "_SYS_CPU", tmp_path)
    before = describe_state()
    assert (before["cpu_temperature_c"], before["cpu_throttle_count"]) == (64.5, 6)
    (tmp_path / "cpu1" / "thermal_throttle" / "package_throttle_count").write_text("3\n")
    assert disturbances(before, describe_state()) == ("a processor became too hot and was slowed down",)


def state(seconds: float, busy: float, own: float, **gpu: object) -> dict[str, object]:
    gpus = [{"visible_as": "cuda:0", **gpu}] if gpu else []
    return {"clock_s": seconds, "cpu_all_s": 4 * seconds, "cpu_busy_s": busy, "process_cpu_s": own, "gpus": gpus}


def test_what_this_process_uses_itself_is_not_what_others_use():
    before = state(100, 50, 20)
    assert others_share(before, state(110, 90, 60)) == 0.0  # all of four processors, all of it our own
    assert others_share(before, state(110, 60, 20)) == 0.25
    assert others_share(before, state(110, 90, 30)) == 0.75
    assert others_share(before, state(110, 90, 30), own_cpu_s=40) == 0.0  # of several processes of ours
    assert others_share(before, state(100.1, 50.4, 20)) is None  # too short to tell
    assert others_share({}, before) is None


def test_busy_neighbours_spoil_a_measurement_and_quiet_ones_do_not():
    before = state(100, 50, 20)
    assert disturbances(before, state(110, 53, 20)) == ()
    assert disturbances(before, state(110, 58, 20)) == ("other processes used 20% of the processors' time",)


@pytest.mark.parametrize(
    ("after", "found"),
    [
        ({"throttle_reasons": []}, ()),
        ({"throttle_reasons": ["sw_power_cap"]}, ()),  # its own limit, at which it runs every day
        ({"throttle_reasons": ["sw_power_cap", "hw_thermal_slowdown"]}, ("cuda:0 was slowed down (hw_thermal_slowdown)",)),
        ({"throttled_us": {"sw_thermal_slowdown": 1_050_000}}, ()),  # for half a percent of the time
        ({"throttled_us": {"sw_thermal_slowdown": 1_500_000}}, ("cuda:0 was slowed down (sw_thermal_slowdown)",)),
        ({"throttled_us": {"sw_power_cap": 9_000_000}}, ()),
        ({"compute_processes": 2}, ("other processes computed on cuda:0",)),
    ],
)
def test_a_gpu_that_was_slowed_down_or_shared_spoils_a_measurement(after, found):
    before = state(100, 0, 0, compute_processes=1, throttled_us={"sw_thermal_slowdown": 1_000_000, "sw_power_cap": 0})
    assert disturbances(before, state(110, 0, 0, **after), devices={"cuda:0"}) == found
    assert disturbances(before, state(110, 0, 0, **after), devices={"cpu"}) == ()


class Driver:
    """Answers as nvidia-smi does, for two GPUs; an older one does not know all fields."""

    def __init__(self, unknown: str = "counters") -> None:
        self.unknown = unknown

    def __call__(self, command: list[str]) -> str | None:
        if command[0] != "nvidia-smi" or self.unknown in command[1]:
            return None
        if "compute-apps" in command[1]:
            return "GPU-bb22\nGPU-bb22"
        answers = {"index": ("0", "1"), "uuid": ("GPU-aa11", "GPU-bb22"), "clocks_throttle_reasons.active": ("0x0000000000000001", "0x64")}
        fields = command[1].removeprefix("--query-gpu=").split(",")
        return "\n".join(", ".join(answers.get(field, ("41", "42"))[i] for field in fields) for i in range(2))


@pytest.mark.parametrize(("visible", "names"), [(None, ["cuda:0", "cuda:1"]), ("1", [None, "cuda:0"]), ("GPU-bb,0", ["cuda:1", "cuda:0"])])
def test_the_state_of_every_gpu_is_told_under_the_name_it_has_here(monkeypatch, visible, names):
    monkeypatch.setattr(environment, "_output", Driver("clocks_event_reasons"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    gpus = describe_state()["gpus"]
    assert [gpu["visible_as"] for gpu in gpus] == names
    assert [gpu["throttle_reasons"] for gpu in gpus] == [[], ["sw_power_cap", "sw_thermal_slowdown", "hw_thermal_slowdown"]]
    assert [gpu["compute_processes"] for gpu in gpus] == [0, 2]
    assert gpus[1]["sm_clock_mhz"] == "42"
    assert "throttled_us" not in gpus[1]
    assert "GPU-" not in json.dumps(gpus)  # which card it is, is nobody's business


def test_newer_drivers_tell_for_how_long_a_gpu_was_slowed_down(monkeypatch):
    monkeypatch.setattr(environment, "_output", Driver("nothing"))
    assert describe_state()["gpus"][0]["throttled_us"]["hw_slowdown"] == 41


def test_details_that_a_driver_does_not_know_leave_the_rest(monkeypatch):
    monkeypatch.setattr(environment, "_output", Driver("mig.mode"))
    (first, _) = describe_environment()["gpus"]
    assert first["name"] == "41"
    assert "max_sm_clock_mhz" not in first
    monkeypatch.setattr(environment, "_output", Driver("nothing"))
    assert describe_environment()["gpus"][0]["max_sm_clock_mhz"] == "41"


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


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("flags\t\t: fpu avx2 fma avx512_vnni_not avx512_vnni", ["avx2", "fma", "avx512_vnni"]),
        ("Features\t: fp asimd asimddp i8mm", ["asimddp", "i8mm"]),
    ],
)
def test_vector_instructions_are_told_by_their_whole_names(monkeypatch, tmp_path, line, expected):
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{line}\n")
    monkeypatch.setattr(environment, "_PROC", tmp_path)
    assert environment.cpu_extensions() == expected
