"""Kills `txl` at random moments and at every operation on the file system, fills its disk, takes its memory, and damages its files.

    python benchmarks/faults.py                                     # everything, half an hour or more on two cores
    python benchmarks/faults.py --kills 20 --only kills --only disk prepare train

What is run and what must hold after each fault stands in tests/faults: an old or a new whole file is there and never half a one, the same
command then succeeds with the result of an undisturbed one, and nothing unfinished stays behind. Exit code 1 if something does not hold.
Writes benchmarks/results/faults_<device>_<yyyymm>.json and .md.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import errno
import functools
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from running import ROOT, device_slug, without_folders

IMPORTED = (
    *("txl_deploy.cli.main", "txl_deploy.cli.data", "txl_deploy.cli.train", "txl_deploy.cli.export", "txl_deploy.cli.eval"),
    *("txl_deploy.cli.bench", "txl_deploy.export.artifact", "onnxscript", "onnx", "onnxruntime", "torch.onnx._internal.exporter._core"),
)
"""What each process has imported before it begins, so that a kill comes while it works."""
SHARES = {
    "prepare": 1.5,
    "tokens": 1.0,
    "train": 1.5,
    "export onnx": 0.4,
    "export torchscript": 0.6,
    "build": 0.4,
    "eval": 0.8,
    "bench": 0.8,
}
"""Random kills of each command, times --kills: fewer of what takes long."""
EXPORTED_FOR = {"onnx": {"export onnx", "eval", "bench"}, "torchscript": {"export torchscript"}}
"""The exports that lie there beforehand, and the commands that need them; exporting takes seconds."""
PER_COMPLETION = {"prepare": 1, "tokens": 1}
"""Kills at operations, each in a new folder, after which a command is let go on to its end: of these every one, of others every third."""
_OF_EVERY_PART = ("part", "held", "seconds", "read_only", "command", "time_utc")
THEMES = ("kills", "disk", "full", "damage", "processes")


def attempt(results: list[dict[str, Any]], name: str, work: Callable[[], dict[str, Any]]) -> None:
    """Do a part, and record its figures or what did not hold."""
    started = time.monotonic()
    try:
        result = {"part": name, "held": True, **work()}
    except Exception as error:  # whatever it is, the others are still to be tried
        result = {"part": name, "held": False, "error": f"{type(error).__name__}: {error}"[-3000:]}
    result["seconds"] = round(time.monotonic() - started, 1)
    results.append(result)
    print(json.dumps(result), flush=True)


def kills_of(name: str, options: argparse.Namespace, sources: Any, base: Path) -> dict[str, Any]:
    """Kill one command at every operation and at random moments."""
    from tests.faults import kills
    from tests.faults.scenarios import SCENARIOS

    tally = kills.Tally()
    trial = kills.Trial(SCENARIOS[name], sources, base / name.replace(" ", "-"), tally)
    trial.expected()
    begun, chance = time.monotonic(), random.Random(f"{options.seed} {name}")
    half, end = begun + 30 * options.minutes, begun + 60 * options.minutes
    points = sum(1 for _ in kills.at_every_operation(trial, per_completion=PER_COMPLETION.get(name, 3), deadline=half))
    at_random = sum(1 for _ in kills.at_random_moments(trial, round(options.kills * SHARES[name]), chance, deadline=end))
    return {"points": points, "random": at_random, **dataclasses.asdict(tally)}


def failing_disk_of(name: str, sources: Any, base: Path) -> dict[str, Any]:
    """Let every operation of one command fail: as on a full disk from then on, and as in a read-only folder."""
    from tests.faults import kills
    from tests.faults.scenarios import SCENARIOS

    told: dict[str, Any] = {}
    for number in (errno.ENOSPC, errno.EROFS):
        tally = kills.Tally()
        trial = kills.Trial(SCENARIOS[name], sources, base / f"{name.replace(' ', '-')}-disk", tally)
        count = sum(1 for _ in kills.on_a_failing_disk(trial, number))
        told[errno.errorcode[number]] = {"operations": count, "exit_codes": tally.failures}
    return told


@contextlib.contextmanager
def small_disk(place: Path, kib: int) -> Iterator[None]:
    """Mount a disk of so many KiB at `place`."""
    place.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(place)], check=True, capture_output=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def full_disk_of(name: str, sources: Any, base: Path) -> dict[str, Any]:
    """Run one command on real disks with less and less room, and on one that is read-only; on a large one it must then succeed."""
    from tests.faults.harness import run
    from tests.faults.scenarios import SCENARIOS

    if os.geteuid() != 0 or shutil.which("mount") is None:
        return {"held": None, "error": "not run: mounting needs root"}
    scenario = SCENARIOS[name]
    disk = base / "disk"
    folder = disk / "work"
    codes: dict[str, int] = {}
    with small_disk(disk, 1 << 18):
        folder.mkdir()
        scenario.prepare(sources, folder)
        before = used(disk)
        assert run(scenario.arguments(sources, folder), folder, output=base / "said").code == 0
        expected, after = scenario.outcome(folder), used(disk)
    sizes = sorted({before + 4096 * round((after - before) / 4096 * share) for share in (0.02, 0.1, 0.25, 0.5, 0.75, 0.9, 1.1)})
    for size in sizes:
        with small_disk(disk, 1 << 18):
            folder.mkdir()
            scenario.prepare(sources, folder)
            resize(disk, size + 8192)
            ended = run(scenario.arguments(sources, folder), folder, output=base / "said")
            assert ended.code in (0, 3), f"with {size - before} bytes of room: exit code {ended.code}: {ended.said[-2000:]}"
            codes[str(ended.code)] = codes.get(str(ended.code), 0) + 1
            scenario.check(sources, folder)
            resize(disk, 1 << 28)
            again = run(scenario.arguments(sources, folder), folder, output=base / "said")
            assert again.code == 0, again.said[-2000:]
            assert scenario.outcome(folder) == expected, "the end is another than on a disk with room"
    with small_disk(disk, 1 << 18):
        folder.mkdir()
        scenario.prepare(sources, folder)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True, capture_output=True)
        ended = run(scenario.arguments(sources, folder), folder, output=base / "said")
        assert ended.code == 3, f"read-only: exit code {ended.code}: {ended.said[-2000:]}"
        last = ended.said.strip().splitlines()[-2:]
    return {"sizes": len(sizes), "exit_codes": codes, "read_only": last}


def used(disk: Path) -> int:
    """Return the bytes that a disk holds."""
    state = os.statvfs(disk)
    return (state.f_blocks - state.f_bfree) * state.f_frsize


def resize(disk: Path, size: int) -> None:
    """Give a mounted disk another size."""
    subprocess.run(["mount", "-o", f"remount,size={size}", str(disk)], check=True, capture_output=True)


def damage_of(name: str, sources: Any, base: Path) -> dict[str, Any]:
    """Damage every file that is read back, at each class of offset."""
    from tests.faults.readers import READERS, damaged

    reader = READERS[name]
    outcomes: dict[str, int] = {}
    for place, outcome in damaged(reader, sources, base / "damage"):
        assert not outcome.startswith("read"), f"{place}: {outcome}"
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
    return {"damages": sum(outcomes.values()), "outcomes": outcomes}


def main() -> int:
    """Run the parts that the command line names, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commands", nargs="*", help="commands to disturb (default: all)")
    parser.add_argument("--only", action="append", choices=THEMES, help="kinds of faults (default: all)")
    parser.add_argument("--part", action="append", metavar="NAME", help="only this part, by its name in the record")
    parser.add_argument("--kills", type=int, default=60, help="random kills of a command of usual length (default 60)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="for the kills of one command at most")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the record")
    options = parser.parse_args()
    themes = options.only or THEMES

    from tests.faults import groups, readers, scenarios
    from tests.processes import preload
    from txl_deploy.bench.environment import describe_environment

    names = options.commands or list(scenarios.SCENARIOS)
    everything = bool({"damage", "processes"} & set(themes))
    formats = tuple(form for form, users in EXPORTED_FOR.items() if everything or users & set(names))
    engine = "damage" in themes or "build" in names
    if formats or engine:
        preload(*IMPORTED)
    results: list[dict[str, Any]] = []
    environment = describe_environment()
    with tempfile.TemporaryDirectory(prefix="txl-faults-") as temporary:
        base = Path(temporary).resolve()
        os.environ["TXL_CACHE_DIR"] = str(base / "cache")
        sources = scenarios.make_sources(base / "sources", n_words=200_000, formats=formats, engine=engine)
        parts: dict[str, Callable[[], dict[str, Any]]] = {}
        if "damage" in themes:
            parts |= {f"damage {name}": functools.partial(damage_of, name, sources, base) for name in readers.READERS}
        if "processes" in themes:
            parts |= {f"processes {part}": functools.partial(work, sources, base / "groups") for part, work in groups.PARTS.items()}
        for name in names:
            if "kills" in themes:
                parts[f"kills {name}"] = functools.partial(kills_of, name, options, sources, base)
            if "disk" in themes:
                parts[f"disk {name}"] = functools.partial(failing_disk_of, name, sources, base)
            if "full" in themes:
                parts[f"full {name}"] = functools.partial(full_disk_of, name, sources, base)
        for part, work in parts.items():
            if options.part and part not in options.part:
                continue
            attempt(results, part, work)
            write(results, options, environment)  # what is done is recorded, whatever becomes of the rest
    return 0 if all(result["held"] is not False for result in results) else 1


def write(results: list[dict[str, Any]], options: argparse.Namespace, environment: dict[str, Any]) -> None:
    """Write the record; parts of an earlier run that were not done again stay in it."""
    now = datetime.datetime.now(datetime.timezone.utc)
    only = "".join(f" --only {theme}" for theme in options.only or ()) + "".join(f' --part "{part}"' for part in options.part or ())
    command = " ".join(
        [f"benchmarks/faults.py --kills {options.kills} --minutes {options.minutes:g} --seed {options.seed}{only}", *options.commands]
    )
    path = options.out / f"faults_{device_slug(None, environment['cores'])}_{now:%Y%m}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    parts = [{**result, "command": command, "time_utc": now.isoformat(timespec="seconds")} for result in without_folders(results)]
    if path.exists():
        done = {result["part"] for result in parts}
        parts += [result for result in json.loads(path.read_bytes())["results"] if result["part"] not in done]
    document = {"theme": "faults", "time_utc": now.isoformat(timespec="seconds"), "environment": environment, "results": parts}
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text("\n".join(lines(document, path.name)) + "\n", encoding="utf-8")


def lines(document: dict[str, Any], name: str) -> list[str]:
    """Return the record for readers."""
    results = document["results"]
    killed = [result for result in results if result["part"].startswith("kills ") and result["held"]]
    total, left = sum(result["kills"] for result in killed), sum(result["while_unfinished"] for result in killed)
    commands = ", ".join(f"`{command}`" for command in dict.fromkeys(result["command"] for result in results))
    text = [
        f"# Kills, full disks and damaged files, {document['time_utc'][:10]}",
        "",
        f"{commands}. Figures: [{name}]({name}). What must hold: tests/faults.",
        f"{total} kills, {left} of them while something was unfinished.",
        "",
        "| command | operations on files | starts killed at one of them | at random moments | kills | that left something unfinished "
        "| ended before the kill | gone on to the end |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for result in killed:
        columns = ("operations", "points", "random", "kills", "while_unfinished", "too_late", "completions")
        text.append(f"| {result['part'].removeprefix('kills ')} | {' | '.join(str(result[column]) for column in columns)} |")
    text += ["", "| other faults | outcome |", "|---|---|"]
    for result in results:
        if not result["part"].startswith("kills ") and result["held"]:
            figures = {
                key: value for key, value in result.items() if key not in ("part", "held", "seconds", "read_only", "command", "time_utc")
            }
            text.append(f"| {result['part']} | {json.dumps(figures)[1:-1] or 'held'} |")
    failed = [f"- {result['part']}: {result['error']}" for result in results if not result["held"]]
    return [*text, "", "Everything held." if not failed else "Did not hold, or was not run:", "", *failed]


if __name__ == "__main__":
    sys.exit(main())
