"""Faults of more than one process: a worker of a group is killed, two commands want one place, a download ends with its process.

And of what surrounds one: memory that runs out, and a clock that jumps.
"""

from __future__ import annotations

import hashlib
import os
import random
import resource
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tests.faults.harness import run, unfinished
from tests.faults.scenarios import SCENARIOS, Sources
from tests.processes import free_port, start
from tests.train.data.test_download import Handler, Server
from txl_train.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from txl_train.data.download import Source, download
from txl_train.distributed import world_of
from txl_train.run import train
from txl_train.settings import resolve

WORKERS = 3
BOUND_S = 60.0
"""The others must have ended by then after one of a group was killed."""
TRAINED_S = 900.0
"""A group that nobody kills must have trained to its end by then, on a busy machine too."""
SETTINGS: dict[str, Any] = {
    "n_layer": 2,
    "n_head": 2,
    "d_head": 4,
    "d_model": 8,
    "d_inner": 8,
    "mem_len": 6,
    "dropout": 0.1,
    "adaptive": False,
    "dataset": "text",
    "lr": 0.01,
    "batch_size": 6,
    "tgt_len": 5,
    "log_interval": 1,
    "eval_interval": 5,
    "eval_batch_size": 6,
    "eval_tgt_len": 5,
    "max_step": 20,
    "max_step_scheduler": 20,
    "save_all": False,
}


# --- a worker of a group is killed


def work(settings: dict[str, Any]) -> int:
    """What each process of a group runs: it begins, or goes on with what the work folder holds."""
    last = Path(settings["work_dir"]) / "checkpoint_last.pt"
    continued = load_checkpoint(last) if last.exists() else None
    resolved = resolve(environment={}, overrides=list(settings.items()))
    return train(resolved, continue_from=continued, overwrite=continued is None, world=world_of()).progress.step


def start_group(settings: dict[str, Any], size: int = WORKERS) -> list[Any]:
    """Start the processes of a group; return (process, answer) of each, by rank."""
    common = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [start(work, settings, RANK=str(rank), LOCAL_RANK=str(rank), **common) for rank in range(size)]


def results_of(group: list[Any], ranks: list[int], bound_s: float) -> list[tuple[bool, Any]]:
    """Return what these processes answer within so many seconds; none of the group is left."""
    deadline = time.monotonic() + bound_s
    try:
        answers = []
        for rank in ranks:
            assert group[rank][1].poll(max(0.0, deadline - time.monotonic())), f"process {rank} still waits after {bound_s:g} s"
            answers.append(group[rank][1].recv())
        return answers
    finally:
        for process, _ in group:
            process.join(10)
            process.kill()
            process.join()


def kill_worker(settings: dict[str, Any], rank: int, chance: random.Random) -> float:
    """Kill one process of a group while it trains; return the seconds after which the last of the others had ended, with its error."""
    record = Path(settings["work_dir"]) / "metrics.jsonl"
    before = record.stat().st_size if record.exists() else 0
    group = start_group(settings)
    deadline = time.monotonic() + TRAINED_S
    while not (record.exists() and record.stat().st_size > before) and time.monotonic() < deadline:
        time.sleep(0.002)
    time.sleep(chance.uniform(0, 0.3))
    group[rank][0].kill()
    killed = time.monotonic()
    others = [other for other in range(WORKERS) if other != rank]
    for succeeded, said in results_of(group, others, BOUND_S):
        assert not succeeded, f"a process whose partner was killed went on to the end: {said}"
        assert said.startswith("EnvironmentUnfitError: Process "), said
        assert "has lost the others" in said, said
        assert "--resume" in said, said
    return time.monotonic() - killed


def same_weights(one: Path, other: Path) -> None:
    """Raise unless two work folders hold the same weights."""
    found, expected = (load_checkpoint(folder / "checkpoint_last.pt").model for folder in (one, other))
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name


def workers_killed(sources: Sources, base: Path, kills: int = 9) -> dict[str, Any]:
    """Kill each worker in turn; the group is started again each time, and in the end has the weights of one that was left alone."""
    shutil.rmtree(base, ignore_errors=True)
    base.mkdir(parents=True)
    settings = SETTINGS | {"data": str(sources.text)}
    endless = settings | {"work_dir": str(base / "killed"), "max_step": 100_000, "max_step_scheduler": 100_000}
    seconds, chance = [], random.Random(0)
    for number in range(kills):
        seconds.append(kill_worker(endless, number % WORKERS, chance))
    last = base / "killed" / "checkpoint_last.pt"
    steps = (load_checkpoint(last).progress["step"] if last.exists() else 0) + 3
    for folder in ("killed", "at once"):
        group = start_group(endless | {"work_dir": str(base / folder), "max_step": steps})
        for succeeded, said in results_of(group, list(range(WORKERS)), TRAINED_S):
            assert succeeded, said
            assert said == steps
    same_weights(base / "killed", base / "at once")
    return {"kills": kills, "workers": WORKERS, "steps": steps, "longest_wait_s": round(max(seconds), 1)}


# --- two commands want one place


def together(name: str, codes: set[tuple[int, int]]) -> Callable[[Sources, Path], dict[str, Any]]:
    """Return a part that runs a command twice at once in one folder: both end with one of `codes`, and one whole result is there."""

    def part(sources: Sources, base: Path) -> dict[str, Any]:
        scenario, folder = SCENARIOS[name], base / "together"
        seen: list[list[int]] = []
        for _ in range(3):
            shutil.rmtree(base, ignore_errors=True)
            folder.mkdir(parents=True)
            scenario.prepare(sources, folder)
            arguments = scenario.arguments(sources, folder)
            ended: dict[int, Any] = {}

            def one(number: int, ended: dict[int, Any] = ended, arguments: list[str] = arguments) -> None:
                ended[number] = run(arguments, folder, output=base / f"said-{number}")

            threads = [threading.Thread(target=one, args=(number,)) for number in range(2)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            found = sorted(result.code for result in ended.values())
            assert tuple(found) in codes, [(result.code, result.said[-1500:]) for result in ended.values()]
            scenario.check(sources, folder)
            scenario.outcome(folder)
            assert not unfinished(folder), unfinished(folder)
            seen.append(found)
        return {"exit_codes": seen}

    return part


def save_many(path: str, weight: float, count: int) -> None:
    """Write a checkpoint whose weights all are `weight`, again and again."""
    checkpoint = load_checkpoint(Path(path).with_name("source.pt"))
    model = {name: torch.full_like(tensor, weight) for name, tensor in checkpoint.model.items()}
    for _ in range(count):
        save_checkpoint(path, Checkpoint(**{**vars(checkpoint), "model": model, "sha256": None}))


def two_writers(sources: Sources, base: Path, count: int = 50) -> dict[str, Any]:
    """Two processes write one checkpoint at once: it is always one of theirs, and whole."""
    shutil.rmtree(base, ignore_errors=True)
    base.mkdir(parents=True)
    shutil.copy(sources.checkpoint, base / "source.pt")
    target = base / "both.pt"
    writers = [start(save_many, str(target), float(weight), count) for weight in (1, 2)]
    read = 0
    while any(process.is_alive() for process, _ in writers):
        if target.exists():
            weights = {float(value) for tensor in load_checkpoint(target).model.values() for value in tensor.unique()}
            assert weights in ({1.0}, {2.0}), weights
            read += 1
    for process, answer in writers:
        process.join()
        succeeded, said = answer.recv()
        assert succeeded, said
    assert read
    assert not unfinished(base)
    return {"written": 2 * count, "read_meanwhile": read}


# --- a download ends with its process


CONTENT = bytes(range(256)) * 8192
CHECKSUM = f"sha256:{hashlib.sha256(CONTENT).hexdigest()}"


class _Slow(Handler):
    """Sends `CONTENT` bit by bit, from where it is asked to."""

    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        begin = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {begin}-{len(CONTENT) - 1}/{len(CONTENT)}")
        self.send_header("Content-Length", str(len(CONTENT) - begin))
        self.end_headers()
        try:
            for place in range(begin, len(CONTENT), 1 << 17):
                self.wfile.write(CONTENT[place : place + (1 << 17)])
                time.sleep(0.01)
        except OSError:
            pass  # whom it was for has been killed


@contextmanager
def slow_server() -> Iterator[Source]:
    """Serve `CONTENT`."""
    with Server(("127.0.0.1", 0), _Slow) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield Source(running.url("/file"), len(CONTENT), CHECKSUM)
        finally:
            running.shutdown()
            thread.join()


def downloads_killed(sources: Sources, base: Path, kills: int = 30) -> dict[str, Any]:
    """Kill a process that downloads; the next one goes on where it was, and in the end the file is whole."""
    chance, went_on, whole = random.Random(2), 0, 0
    shutil.rmtree(base, ignore_errors=True)
    base.mkdir(parents=True)
    target = base / "file"
    with slow_server() as source:
        for _ in range(kills):
            before = {path: path.stat().st_size for path in base.glob("*.part")}
            process, _answer = start(download, [source], target)
            while process.is_alive() and {path: path.stat().st_size for path in base.glob("*.part")} == before:
                time.sleep(0.001)
            time.sleep(chance.uniform(0, 0.05))
            process.kill()
            process.join()
            parts = [path.stat().st_size for path in base.glob("*.part")]
            went_on += any(0 < size < len(CONTENT) for size in parts)
            if target.exists():
                assert target.read_bytes() == CONTENT
                whole += 1
                target.unlink()
        download([source], target)
    assert target.read_bytes() == CONTENT
    assert [path.name for path in base.iterdir()] == ["file"]
    return {"kills": kills, "with_a_part": went_on, "arrived_before": whole}


# --- memory and clock


def memory_runs_out(sources: Sources, base: Path, extra_mib: tuple[int, ...] = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256)) -> dict[str, Any]:
    """Run commands with little address space beyond what a process has after importing: exit code 3 and a remedy, or success."""
    codes: dict[str, dict[str, int]] = {}
    for name in ("prepare", "train", "export torchscript", "eval", "bench"):
        scenario, folder = SCENARIOS[name], base / "memory"
        seen: dict[str, int] = {}
        for extra in extra_mib:
            shutil.rmtree(base, ignore_errors=True)
            folder.mkdir(parents=True)
            scenario.prepare(sources, folder)
            ended = run(scenario.arguments(sources, folder), folder, limits={resource.RLIMIT_AS: extra << 20}, may_crash=True)
            seen[str(ended.code)] = seen.get(str(ended.code), 0) + 1
            scenario.check(sources, folder)
            assert ended.code in (0, 3) or ended.code < 0, f"{name} with {extra} MiB: {ended.code}: {ended.said[-2000:]}"
            if ended.code == 3:
                assert "ran out" in ended.said or "Cannot allocate memory" in ended.said, ended.said[-2000:]
        codes[name] = seen
    return codes


def train_with_a_jumping_clock(settings: dict[str, Any], seed: int) -> int:
    """Train while the system's clock jumps by years with each look at it."""
    chance, real = random.Random(seed), time.time
    time.time = lambda: real() + chance.choice((-1, 1)) * chance.uniform(0, 3e8)
    return work(settings)


def clock_jumps(sources: Sources, base: Path) -> dict[str, Any]:
    """Training under a clock that jumps to and fro yields the weights of one under a steady clock; old and future files are no obstacle."""
    shutil.rmtree(base, ignore_errors=True)
    base.mkdir(parents=True)
    settings = SETTINGS | {"data": str(sources.text), "max_minutes": 60.0}
    for folder, function, more in (("steady", work, ()), ("jumping", train_with_a_jumping_clock, (1,))):
        process, answer = start(function, settings | {"work_dir": str(base / folder)}, *more, TXL_CACHE_DIR=str(base / "cache"))
        assert answer.poll(TRAINED_S)
        succeeded, said = answer.recv()
        process.join()
        assert succeeded, said
        assert said == SETTINGS["max_step"]
        for number, path in enumerate(sorted(base.rglob("*"))):
            os.utime(path, (0, 0) if number % 2 else (4e9, 4e9))  # 1970 and 2096
    same_weights(base / "jumping", base / "steady")
    return {"steps": SETTINGS["max_step"]}


PARTS: dict[str, Callable[..., dict[str, Any]]] = {
    "workers killed": workers_killed,
    "downloads killed": downloads_killed,
    "two of train": together("train", {(0, 2), (0, 0)}),
    "two of prepare": together("prepare", {(0, 0)}),
    "two of tokens": together("tokens", {(0, 0)}),
    "two of export torchscript": together("export torchscript", {(0, 0)}),
    "two of eval": together("eval", {(0, 0)}),
    "two of bench": together("bench", {(0, 0)}),
    "two writers of a checkpoint": two_writers,
    "memory runs out": memory_runs_out,
    "clock jumps": clock_jumps,
}
