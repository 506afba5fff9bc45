"""Training on two machines: two network namespaces, each with its own address and its own torchrun, joined by a pair of virtual cards.

Where namespaces are not allowed, that is skipped; two torchruns that meet on the loopback run everywhere. What several processes of one
machine compute is in `test_distributed`.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.processes import free_port, in_processes, start
from txl_train import distributed, work_folder
from txl_train.checkpoint import load_checkpoint
from txl_train.distributed import join, world_of
from txl_train.errors import EnvironmentUnfitError, TxlError
from txl_train.run import train
from txl_train.settings import resolve

ROOT = Path(__file__).resolve().parents[2]
TXL = [sys.executable, "-c", "import sys; from txl_deploy.cli.main import main; sys.argv[0] = 'txl'; sys.exit(main())"]
LONG_S = 270
"""Longer than anything takes on a busy machine; torchrun itself would wait five minutes."""


@dataclass
class Network:
    """Two machines: how a command is started on each, at which address, and through which card."""

    addresses: tuple[str, str]
    cards: tuple[str, str]
    prefixes: tuple[list[str], list[str]]
    port: int
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    def torchrun(self, machine: int, options: list[str], out: Path) -> subprocess.Popen[str]:
        """Start one machine's part of a training; what it says goes to `out`."""
        here = ["--rdzv-conf", f"is_host={int(machine == 0)}", "--local-addr", self.addresses[machine]]
        meeting = ["--rdzv-backend", "c10d", "--rdzv-id", "trial", "--rdzv-endpoint", f"{self.addresses[0]}:{self.port}"]
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
        path = os.pathsep.join(part for part in (str(ROOT), os.environ.get("PYTHONPATH")) if part)
        settings = {"GLOO_SOCKET_IFNAME": self.cards[machine], "OMP_NUM_THREADS": "1", "CI": "true", "PYTHONPATH": path}
        with open(out, "w", encoding="utf-8") as file:
            process = subprocess.Popen(
                [*self.prefixes[machine], *launcher, *meeting, *here, "--no-python", *TXL, "train", *options],
                stdout=file,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
                env=os.environ | settings,
            )
        self.started.append(process)
        return process


def switch_off(torchrun: subprocess.Popen[str]) -> None:
    """Kill a machine's torchrun and what it has started, in the middle of whatever they do."""
    children = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()
    for process in (torchrun.pid, *map(int, children)):
        os.kill(process, signal.SIGKILL)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@contextlib.contextmanager
def two_namespaces() -> Iterator[Network]:
    """Two machines that reach each other through a virtual cable and nothing else; skip where that is not allowed."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("needs network namespaces: `ip` of iproute2, and root")
    names = tuple(f"txl-{os.getpid()}-{i}" for i in range(2))
    cards = tuple(f"txl{os.getpid() % 10**7}v{i}" for i in range(2))
    addresses = ("10.77.0.1", "10.77.0.2")
    with contextlib.ExitStack() as made:
        try:
            for name in names:
                ip("netns", "add", name)
                made.callback(subprocess.run, ["ip", "netns", "del", name], check=False)
            ip("link", "add", cards[0], "netns", names[0], "type", "veth", "peer", "name", cards[1], "netns", names[1])
            for name, card, address in zip(names, cards, addresses):
                ip("-n", name, "addr", "add", f"{address}/24", "dev", card)
                ip("-n", name, "link", "set", card, "up")
                ip("-n", name, "link", "set", "lo", "up")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces are not allowed here: {error.stderr.strip()}")
        inside = [["ip", "netns", "exec", name] for name in names]
        yield Network(addresses, (cards[0], cards[1]), (inside[0], inside[1]), port=29500)


@contextlib.contextmanager
def loopback() -> Iterator[Network]:
    yield Network(("127.0.0.1", "127.0.0.1"), ("lo", "lo"), ([], []), port=free_port())


@pytest.fixture
def network(request: pytest.FixtureRequest) -> Iterator[Network]:
    with request.param() as found:
        yield found
        for process in found.started:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    words = np.random.default_rng(0).choice([f"w{i}" for i in range(60)], 1145)
    folder = tmp_path / "text"
    folder.mkdir()
    for split, part in (("train", words[:905]), ("valid", words[905:1025]), ("test", words[1025:])):
        (folder / f"{split}.txt").write_text(" ".join(part) + "\n", encoding="utf-8")
    model = {"n_layer": 2, "n_head": 2, "d_head": 4, "d_model": 8, "d_inner": 8, "mem_len": 6, "dropout": 0.1, "adaptive": False}
    steps = {"batch_size": 8, "tgt_len": 30, "log_interval": 1, "lr": 0.02, "lr_warmup_steps": 2, "scheduler": "constant"}
    evaluation = {"eval_interval": 2, "eval_batch_size": 4, "eval_tgt_len": 5}
    return {"dataset": "text", "data": str(folder), **model, **steps, **evaluation, "work_dir": str(tmp_path / "W")}


def train_here(settings: dict[str, Any]) -> str:
    """What each process of a group runs; `of_second` holds what differs there. Returns the error, or how it ended."""
    torch.set_num_threads(1)
    world = world_of()
    settings |= settings.pop("of_second", {}) if world.rank else {}
    settings.pop("of_second", None)
    restart = settings.pop("restart", None)
    continued = None if restart is None else load_checkpoint(restart)
    try:
        resolved = resolve(environment={}, overrides=list(settings.items()))
        return train(resolved, continue_from=continued, world=world).ending
    except TxlError as error:
        return f"{type(error).__name__}: {error}"


def on_both(network: Network, settings: dict[str, Any], folder: Path, *options: str) -> list[subprocess.Popen[str]]:
    given = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    return [network.torchrun(machine, [*given, *options], folder / f"said-{machine}") for machine in range(2)]


def wait_for(text: str, path: Path, running: list[subprocess.Popen[str]]) -> None:
    deadline = time.monotonic() + LONG_S
    while not (path.exists() and text in path.read_text(encoding="utf-8")):
        for machine, process in enumerate(running):
            assert process.poll() is None, (path.parent / f"said-{machine}").read_text(encoding="utf-8")
        assert time.monotonic() < deadline, f"no {text} in {path}"
        time.sleep(0.05)


def assert_it_goes_on_to_the_weights_of_a_run_at_once(network: Network, settings: dict[str, Any], folder: Path) -> None:
    """Start the same command again, on both machines; two processes of one machine give what to compare with."""
    before = load_checkpoint(folder / "W" / "checkpoint_last.pt").progress["step"]
    again = on_both(network, settings | {"max_step": before + 3}, folder, "--auto-resume")
    assert [process.wait(LONG_S) for process in again] == [0, 0], (folder / "said-0").read_text(encoding="utf-8")
    at_once = settings | {"max_step": before + 3, "work_dir": str(folder / "at once")}
    assert in_processes(2, train_here, at_once) == ["finished", "finished"]

    together, expected = (load_checkpoint(folder / name / "checkpoint_last.pt") for name in ("W", "at once"))
    assert together.progress["step"] == before + 3
    for name, weight in expected.model.items():
        assert torch.equal(together.model[name], weight), name


@pytest.mark.slow
@pytest.mark.parametrize("network", [two_namespaces], indirect=True, ids=["namespaces"])
def test_a_machine_that_is_switched_off_ends_the_other_and_both_go_on(network: Network, settings: dict[str, Any], tmp_path: Path) -> None:
    running = on_both(network, settings | {"max_step": 100_000}, tmp_path, "--auto-resume")
    wait_for('"step": 3', tmp_path / "W" / "metrics.jsonl", running)
    switch_off(running[1])
    assert running[0].wait(LONG_S) == 1  # torchrun's own; of txl it says 3
    said = (tmp_path / "said-0").read_text(encoding="utf-8")
    assert "Error: Process 0 of 2 has lost the others" in said
    assert "--resume" in said

    assert_it_goes_on_to_the_weights_of_a_run_at_once(network, settings, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("network", [loopback], indirect=True, ids=["loopback"])
def test_a_machine_that_is_told_to_stop_stops_the_other_and_both_go_on(network: Network, settings: dict[str, Any], tmp_path: Path) -> None:
    running = on_both(network, settings | {"max_step": 100_000}, tmp_path, "--auto-resume")
    wait_for('"step": 3', tmp_path / "W" / "metrics.jsonl", running)
    running[1].send_signal(signal.SIGTERM)
    wait_for("Stopped after", tmp_path / "said-0", running[:1])
    running[0].send_signal(signal.SIGTERM)  # its torchrun would wait five minutes for that of the other machine
    for process in running:
        process.wait(LONG_S)
    steps = [json.loads(line)["step"] for line in (tmp_path / "W" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert load_checkpoint(tmp_path / "W" / "checkpoint_last.pt").progress["step"] == steps[-1] >= 3

    assert_it_goes_on_to_the_weights_of_a_run_at_once(network, settings, tmp_path)


# What machines must have in common


def test_a_work_folder_that_the_machines_do_not_share_is_refused_before_training(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    apart = settings | {"max_step": 2, "of_second": {"work_dir": str(tmp_path / "other machine")}}
    for said in in_processes(2, with_short_patience, apart):
        assert said.startswith("UsageError: Process 1 does not see what process 0 has written")
        assert "--work-dir" in said
    assert [path.name for path in (tmp_path / "W").iterdir()] == [".lock"]


def with_short_patience(settings: dict[str, Any]) -> str:
    work_folder._SEEN_WITHIN_S = 0.3
    return train_here(settings)


@pytest.mark.parametrize(
    ("of_second", "said"),
    [
        ({"lr": 0.03}, "What was set in process 1 is not that of process 0"),
        ({"seed": 2}, "What was set in process 1 is not that of process 0"),
        ({"restart": None}, "What it continues from in process 1 is not that of process 0"),
        ({"data": "other text"}, "The text in process 1 is not that of process 0"),
    ],
)
def test_processes_that_were_begun_differently_are_refused(
    settings: dict[str, Any], tmp_path: Path, of_second: dict[str, Any], said: str
) -> None:
    if "data" in of_second:
        shutil.copytree(tmp_path / "text", tmp_path / "other text")
        (tmp_path / "other text" / "train.txt").write_text("w1 w2 " * 400 + "\n", encoding="utf-8")
        of_second = {"data": str(tmp_path / "other text")}
    if "restart" in of_second:
        in_processes(2, train_here, settings | {"max_step": 2})
        settings["restart"] = str(tmp_path / "W" / "checkpoint_last.pt")
    for message in in_processes(2, train_here, settings | {"max_step": 4, "of_second": of_second}):
        assert message.startswith(f"UsageError: {said}")


def meet_in_vain() -> str:
    distributed._MEETING = distributed.datetime.timedelta(seconds=1)
    try:
        with join(world_of(), torch.device("cpu")):
            return "they met"
    except EnvironmentUnfitError as error:
        return str(error)


def test_a_process_that_never_comes_is_named_and_not_waited_for_without_end() -> None:
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # which torchrun has
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    process, answer = start(meet_in_vain, **place, TORCHELASTIC_USE_AGENT_STORE="True")
    assert answer.poll(120)
    assert answer.recv() == (
        True,
        "Process 0 of 3 has waited 0:00:01 for 1, 2, in vain.\n"
        "It has ended before, and says why where it was started, or was not started. Start all of them anew.",
    )
    process.join()
