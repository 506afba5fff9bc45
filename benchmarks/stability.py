"""The specification's training stability test: the same training from several random seeds, and how far their perplexities differ.

    python benchmarks/stability.py --seeds 5 --jobs 2 -- --config tiny --dataset pydoc
    python benchmarks/stability.py --seeds 20 --processes 8 -- --config wt103-base --data data/wikitext-103 --fp16

Everything after `--` are options of `txl train`. Each seed trains in a folder of its own below --work-dir. The same command goes on where
it was stopped: a finished seed is not trained again, an interrupted one is continued; a larger --seeds adds seeds. Writes <out>.json with
every value, the settings, versions and machine, and <out>.md with the specification's tables.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import fcntl
import json
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO, Any

from running import ROOT, child_environment, device_slug, txl_command, without_folders

from txl_deploy.bench.environment import describe_environment
from txl_deploy.bench.report import BUSY_SHARE, read_training
from txl_train.errors import EnvironmentUnfitError, TxlError, UsageError
from txl_train.files import check_replaceable, whole_or_absent, write_json
from txl_train.metrics import bits_per_char, perplexity

OURS = ("seed", "work-dir", "append-dataset", "append-time", "debug", "restart", "resume", "auto-resume", "overwrite", "dry-run", "json")
"""Options of `txl train` that this script sets itself, or that it has no use for."""

STATISTICS = ("mean", "standard_deviation", "minimum", "maximum", "median")

POLL_S = 0.1


@dataclass
class Seed:
    """One training of the test, and where it is."""

    number: int
    folder: Path
    process: subprocess.Popen[bytes] | None = None
    began: float = 0.0
    told_to_stop: bool = False
    failure: str | None = None
    """Why the latest attempt failed."""

    @property
    def result(self) -> dict[str, Any] | None:
        """What `txl train --json` said at its end; None if it did not come so far."""
        try:
            document = json.loads((self.folder / "result.json").read_bytes())
        except (OSError, ValueError):
            return None
        finished = isinstance(document, dict) and document.get("ending") in ("finished", "max_minutes") and document.get("test")
        return document if finished else None


@dataclass
class Test:
    """All seeds of one test: what they train, and the processes that do."""

    folder: Path
    options: list[str]
    jobs: int
    processes: int
    seeds: list[Seed]
    running: list[Seed] = field(default_factory=list)
    stopped_by: int | None = None
    """The signal that ended the test."""
    at_once: bool = False
    """A second signal came."""
    refusal: UsageError | None = None
    """Why no seed can be trained."""
    lock: IO[bytes] | None = None

    def command(self, seed: int, folder: Path, *last: str) -> list[str]:
        """Return the arguments of `txl` for one seed. A preset's time limit is lifted: seeds are compared at equal steps."""
        return ["train", "--max-minutes", "none", *self.options, *last, "--json", "--seed", str(seed), "--work-dir", str(folder)]

    def asked(self) -> dict[str, Any]:
        """Return {"settings": …, "origin": …} as `txl train` resolves the options. UsageError if it refuses them."""
        unused = self.folder / "none"
        command = txl_command(self.command(self.seeds[0].number, unused, "--dry-run"))
        done = subprocess.run(command, capture_output=True, text=True, env=child_environment(), check=False)
        if done.returncode:
            raise UsageError(f"`txl train` refuses these options. {_error_in(done.stderr)}")
        document: dict[str, Any] = json.loads(done.stdout)
        given = document["settings"]["train"]
        if (given["seed"], given["work_dir"]) != (self.seeds[0].number, str(unused)):
            raise UsageError(
                "Seed and work folder are this script's own to set.", remedy="Leave `--set seed=…` and `--set work_dir=…` out."
            )
        return document

    def run(self) -> None:
        """Train every seed that is not finished, `jobs` at a time. Ctrl-C and SIGTERM are passed on; a second one kills.

        Raises:
            UsageError: `txl train` cannot train so at all.
        """
        waiting = [seed for seed in self.seeds if seed.result is None]
        for seed in self.seeds:
            if seed not in waiting:
                _say(f"seed {seed.number}: finished before")
        with self._signals():
            try:
                while self.running or (waiting and not self._is_ending):
                    while waiting and len(self.running) < self.jobs and not self._is_ending:
                        self._start(waiting.pop(0))
                    time.sleep(POLL_S)
                    self._look_after()
            finally:
                self._kill()
        if self.refusal is not None:
            raise self.refusal

    @property
    def _is_ending(self) -> bool:
        return self.stopped_by is not None or self.refusal is not None

    def _start(self, seed: Seed) -> None:
        assert self.lock is not None
        seed.folder.mkdir(parents=True, exist_ok=True)
        environment = child_environment(TXL_CACHE_DIR=os.environ.get("TXL_CACHE_DIR") or str(self.folder / "cache"))
        if self.jobs > 1:
            environment.setdefault("OMP_NUM_THREADS", str(max(1, _cores() // self.jobs)))
        continued = ", continued" if (seed.folder / "checkpoint_last.pt").exists() else ""
        with open(seed.folder / "result.json", "wb") as result, open(seed.folder / "stderr.txt", "wb") as errors:
            seed.process = subprocess.Popen(
                txl_command(self.command(seed.number, seed.folder, "--auto-resume"), self.processes),
                stdin=subprocess.DEVNULL,
                stdout=result,
                stderr=errors,
                env=environment,
                start_new_session=True,  # Ctrl-C reaches it through `_look_after` alone, once
                pass_fds=(self.lock.fileno(),),  # held as long as one of them lives
            )
        seed.began = time.monotonic()
        self.running.append(seed)
        _say(f"seed {seed.number}: training{continued}; its log is {seed.folder / 'train_log.log'}")

    def _look_after(self) -> None:
        """Take note of what has ended, and pass on a signal that has come."""
        for seed in list(self.running):
            assert seed.process is not None
            code = seed.process.poll()
            if code is not None:
                self.running.remove(seed)
                self._ended(seed, code)
            elif self._is_ending and not seed.told_to_stop:
                seed.told_to_stop = True
                seed.process.send_signal(self.stopped_by or signal.SIGTERM)
        if self.at_once:
            self._kill()

    def _ended(self, seed: Seed, code: int) -> None:
        result, seconds = seed.result, time.monotonic() - seed.began
        if result is not None:
            score, name = _figure_of(result["test"])
            _say(f"seed {seed.number}: {result['ending']} at step {result['steps']:,} after {seconds:.0f} s, test {name} {score:.5g}")
        elif seed.told_to_stop:
            _say(f"seed {seed.number}: stopped after {seconds:.0f} s")
        else:
            error = _error_in((seed.folder / "stderr.txt").read_text(encoding="utf-8", errors="replace"))
            seed.failure = f"exit code {code}: {error}"
            _say(f"seed {seed.number}: failed, {seed.failure}")
            if code in (UsageError.exit_code, EnvironmentUnfitError.exit_code):
                self.refusal = UsageError(f"Seed {seed.number} cannot be trained. {error}")

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        def handle(number: int, frame: FrameType | None) -> None:
            if self.stopped_by is None:
                self.stopped_by = number
                os.write(2, b"\nEvery seed stops after its step and is saved. Once more stops at once.\n")
            else:
                self.at_once = True

        before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _kill(self) -> None:
        """End what runs, at once, with all its processes."""
        for seed in self.running:
            if seed.process is not None and seed.process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(seed.process.pid, signal.SIGKILL)
                seed.process.wait()

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep a second start out while a process of this test lives, also one that outlived its parent.

        Raises:
            UsageError: there is one.
            EnvironmentUnfitError: the folder cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock = open(self.folder / "lock", "wb")  # noqa: SIM115  # closed below
        except OSError as error:
            raise EnvironmentUnfitError(
                f"{self.folder} cannot be written: {error.strerror}.", remedy="Choose another `--work-dir`."
            ) from error
        with self.lock:
            try:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UsageError(f"The seeds in {self.folder} are being trained already.", remedy="Wait for them, or stop them.") from None
            yield

    def check_begun(self, document: dict[str, Any]) -> dict[str, Any]:
        """Return the machine as it was when the first seed began; the settings must be those of that time.

        Raises:
            UsageError: they are not.
        """
        path = self.folder / "begun.json"
        asked = _compared(document["settings"])
        if not any(self.folder.glob("seed-*/checkpoint_last.pt")):  # there is nothing to agree with
            write_json(path, {"settings": asked, "processes": self.processes, "environment": describe_environment()})
        try:
            begun: dict[str, Any] = json.loads(path.read_bytes())
        except OSError:
            raise UsageError(f"{self.folder} holds other runs.", remedy="Choose another `--work-dir`.") from None
        changed = [
            f"{name} was {begun['settings'].get(name)} and would be {value}"
            for name, value in asked.items()
            if value != begun["settings"].get(name)
        ]
        if begun["processes"] != self.processes:
            changed.append(f"processes were {begun['processes']} and would be {self.processes}")
        if changed:
            raise UsageError(
                f"The seeds in {self.folder} are trained with other settings: {', '.join(changed)}.",
                remedy="Give the same options, or another `--work-dir`.",
            )
        environment: dict[str, Any] = begun["environment"]
        return environment


def summary(values: Sequence[float]) -> dict[str, float | int | None]:
    """Return n, mean, standard deviation (over n - 1; None for one value), minimum, maximum and median."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    figures = (statistics.fmean(values), deviation, min(values), max(values), statistics.median(values))
    return {"n": len(values), **dict(zip(STATISTICS, figures))}


def record_of(test: Test, document: dict[str, Any], environment: dict[str, Any]) -> dict[str, Any]:
    """Return the record: every value of every seed, and the tables made of them.

    Raises:
        UsageError: no seed has finished.
    """
    seeds, by_step, tested, figure = [], dict[int, list[float]](), [], "perplexity"
    start: dict[str, Any] = {}
    for seed in test.seeds:
        result = seed.result
        if result is None:
            seeds.append({"seed": seed.number, "status": "failed", "reason": seed.failure or "not finished"})
            continue
        course = read_training(seed.folder / "metrics.jsonl")
        assert course is not None
        start = start or json.loads((seed.folder / "metrics.jsonl").read_text(encoding="utf-8").partition("\n")[0])
        score, figure = _figure_of(result["test"])
        tested.append(score)
        valid = []
        for step, nats in course.valid:
            value = bits_per_char(nats) if course.in_bits else perplexity(nats)
            by_step.setdefault(step, []).append(value)
            valid.append({"step": step, "nll_nats_per_token": nats, figure: value})
        kept = ("ending", "steps", "epoch", "tokens", "train_seconds", "tokens_per_s", "best", "test")
        seeds.append({"seed": seed.number, "status": "finished", **{key: result[key] for key in kept}, "valid": valid})
    if not tested:
        failures = "; ".join(f"seed {seed.number}: {seed.failure}" for seed in test.seeds)
        raise UsageError(f"No seed has finished. {failures}")
    origins = set(document["origin"].values())
    settings = document["settings"]
    settings["train"] = {key: value for key, value in settings["train"].items() if key not in ("seed", "work_dir")}
    record: dict[str, Any] = without_folders(
        {
            "theme": next((origin.split()[1] for origin in origins if origin.startswith("preset ")), settings["data"]["dataset"]),
            "finished_at": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "command": "python benchmarks/stability.py " + shlex.join([*_own_arguments(test), "--", *test.options]),
            "figure": figure,
            "jobs": test.jobs,
            "processes": test.processes,
            "settings": settings,
            "start": {key: value for key, value in start.items() if key not in ("kind", "step", "continuing", "seed")},
            "environment": environment,
            "seeds": seeds,
            "valid_by_step": [{"step": step, **summary(values)} for step, values in sorted(by_step.items())],
            "test": summary(tested),
        }
    )
    return record


def tables(record: dict[str, Any], name: str) -> str:
    """Return the record as the specification writes it, in Markdown."""
    char = record["figure"] == "bits_per_char"
    figure = "bits per character" if char else "perplexity"
    device = next((gpu["name"] for gpu in record["environment"]["gpus"]), None) if record["start"]["device"] != "cpu" else None
    device = device or f"{record['environment']['cores_usable']} CPU cores"
    finished = [seed for seed in record["seeds"] if seed["status"] == "finished"]
    failed = [seed for seed in record["seeds"] if seed["status"] != "finished"]
    steps = max(seed["steps"] for seed in finished)
    seconds = statistics.median(seed["train_seconds"] for seed in finished)
    n = len(finished)
    of = f"{n} different initial random seeds" if n > 1 else "one random seed"
    lines = [
        f"# Training stability test: {record['theme']} on {device}, {record['finished_at'][:10]}",
        "",
        f"The model ({record['start']['parameters']:,} parameters, data set {record['start']['dataset']}) was trained for {steps:,} "
        f"training steps, starting from {of}; a seed decides the initial weights and what dropout drops.",
        f"Training took {seconds:,.0f} s a seed (median).",
        f"Every value, the settings, versions and the machine: [{name}.json]({name}.json).",
        "",
        "```",
        record["command"],
        "```",
        "",
        f"Validation {figure}:",
        "",
        "|**Training step**|**Average**|**Standard deviation**|**Minimum**|**Maximum**|**Median**|",
        "|----------------:|----------:|---------------------:|----------:|----------:|---------:|",
    ]
    for row in record["valid_by_step"]:
        fewer = f" ({row['n']} of {n} seeds)" if row["n"] < n else ""
        lines.append(f"| {row['step']}{fewer} | {_cells(row, char)} |")
    lines += [
        "",
        f"Test {figure} of each seed's best checkpoint:",
        "",
        "|**Average**|**Standard deviation**|**Minimum**|**Maximum**|**Median**|",
        "|----------:|---------------------:|----------:|----------:|---------:|",
        f"| {_cells(record['test'], char)} |",
        "",
        f"Standard deviation: of a sample, over {n} − 1." if n > 1 else "There is one seed, so there is no deviation.",
    ]
    if (record["environment"].get("cpu_busy_before") or 0.0) > BUSY_SHARE:
        lines.append("Others used the processors too, so the seconds are no measure of speed.")
    if limited := [str(seed["seed"]) for seed in finished if seed["ending"] == "max_minutes"]:
        lines.append(f"The time limit ended seed {', '.join(limited)} early.")
    lines += [f"Seed {seed['seed']} is not in the tables. It failed: {seed['reason']}" for seed in failed]
    return "\n".join(lines) + "\n"


def _cells(row: dict[str, Any], char: bool) -> str:
    values = [row[key] for key in STATISTICS]
    texts = [
        f"{value:.5f}" if char or key == "standard_deviation" else f"{value:.2f}"
        for key, value in zip(STATISTICS, values)
        if value is not None
    ]
    return " | ".join(texts if len(texts) == len(STATISTICS) else [texts[0], "–", *texts[1:]])


def _own_arguments(test: Test) -> list[str]:
    jobs = [] if test.jobs == 1 else ["--jobs", str(test.jobs)]
    return ["--seeds", str(len(test.seeds)), *jobs, *([] if test.processes == 1 else ["--processes", str(test.processes)])]


def _compared(settings: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the settings that all seeds have in common, by `section.key`."""
    flat = {f"{section}.{key}": value for section, values in settings.items() for key, value in values.items()}
    return {name: value for name, value in flat.items() if name not in ("train.seed", "train.work_dir")}


def _figure_of(scored: dict[str, Any]) -> tuple[float, str]:
    name = "bits_per_char" if "bits_per_char" in scored else "perplexity"
    return scored[name], name


def _error_in(text: str) -> str:
    """Return the error that a command has printed, with its remedy, on one line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    start = next((at for at, line in enumerate(lines) if line.startswith("Error:")), None)
    return re.sub(r"^Error:\s*", "", " ".join(lines[start:] if start is not None else lines[-1:]))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def parse_arguments(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return this script's own arguments and those of `txl train`.

    Raises:
        UsageError: an option belongs to the other side.
    """
    own, mark, options = list(arguments), "--" in arguments, []
    if mark:
        own, options = own[: own.index("--")], own[own.index("--") + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, required=True, metavar="N", help="train from the seeds 1 to N")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="seeds that train at the same time  [default: 1]")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="processes of each training, through torchrun  [default: 1]")
    parser.add_argument("--work-dir", type=Path, default=Path("LM-TFM/stability"), metavar="DIR", help="folder of the seeds' folders")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="PATH",
        help="the record, without .json  [default: benchmarks/results/stability_<theme>_<device>_<yyyymm>]",
    )
    parsed = parser.parse_args(own)
    for name in ("seeds", "jobs", "processes"):
        if getattr(parsed, name) < 1:
            raise UsageError(f"`--{name}` must be 1 or more, but is {getattr(parsed, name)} instead.")
    for option in options:
        name = option.partition("=")[0].removeprefix("--").replace("_", "-")
        if option.startswith("--") and name.removeprefix("no-") in OURS:
            raise UsageError(f"`--{name}` is not for this script, which gives every seed its own.", remedy="Leave it out after the `--`.")
    return parsed, options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the test and write its record; 0 if every seed finished, 1 if one failed, 130 or 143 if a signal ended it."""
    try:
        own, options = parse_arguments(sys.argv[1:] if arguments is None else arguments)
        if own.out is not None:
            own.out = own.out.with_suffix("") if own.out.suffix in (".json", ".md") else own.out
            check_replaceable(Path(f"{own.out}.json"), b"{")
            check_replaceable(Path(f"{own.out}.md"), b"# ")
        seeds = [Seed(number, own.work_dir / f"seed-{number}") for number in range(1, own.seeds + 1)]
        test = Test(own.work_dir, options, own.jobs, own.processes, seeds)
        document = test.asked()
        with test.locked():
            environment = test.check_begun(document)
            test.run()
        if test.stopped_by is not None:
            _say("Stopped. The same command goes on from here.")
            return 128 + test.stopped_by
        record = record_of(test, document, environment)
        gpu = next((gpu["name"] for gpu in environment["gpus"]), None) if record["start"]["device"] != "cpu" else None
        name = f"stability_{record['theme']}_{device_slug(gpu, environment['cores_usable'])}_{record['finished_at'][:7].replace('-', '')}"
        out = own.out or ROOT / "benchmarks" / "results" / name
        write_json(Path(f"{out}.json"), record)
        with whole_or_absent(Path(f"{out}.md")) as file:
            file.write(tables(record, out.name).encode())
    except TxlError as error:
        _say(f"Error: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    print(f"{out}.md")
    return 1 if any(seed.result is None for seed in seeds) else 0


if __name__ == "__main__":
    sys.exit(main())
