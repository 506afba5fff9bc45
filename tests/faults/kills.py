"""Kills a command again and again and lets it go on: what must hold after each kill, and in the end."""

from __future__ import annotations

import os
import random
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.faults.harness import KILLED, Disturbance, Ended, at_random, run, unfinished
from tests.faults.scenarios import Scenario, Sources
from tests.processes import start


@dataclass
class Tally:
    """What came of the kills, or failures, of one command."""

    seconds_undisturbed: float = 0.0
    operations: int = 0
    """On the file system, of an undisturbed run."""
    kills: int = 0
    while_unfinished: int = 0
    """Kills that left something unfinished behind."""
    too_late: int = 0
    """The command had ended before the kill came."""
    completions: int = 0
    """Times that the same command went on to its end and was compared with the undisturbed one."""
    failures: dict[str, int] = field(default_factory=dict)
    """Ends by exit code of runs with a failing disk."""


class Trial:
    """One command in one folder at a time."""

    def __init__(self, scenario: Scenario, sources: Sources, base: Path, tally: Tally) -> None:
        self.scenario, self.sources, self.base, self.tally = scenario, sources, base, tally
        self._expected: Any = None
        self._number = 0
        self.folder = base

    def expected(self) -> Any:
        """Return what the command yields undisturbed; it is run once for that."""
        if self._expected is None:
            start(os.getpid)[1].recv()  # which starts the server of processes, before the clock does
            self.begin()
            started = time.monotonic()
            ended = self.go()
            assert ended.code == 0, ended.said[-2000:]
            self.tally.seconds_undisturbed = time.monotonic() - started
            assert ended.operations
            self.tally.operations = ended.operations
            self._expected = self.scenario.outcome(self.folder)
        return self._expected

    def begin(self) -> None:
        """Lay out a new folder, always at one place, as paths may be part of what is written."""
        self._number += 1
        self.folder = self.base / "work"
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        self.scenario.prepare(self.sources, self.folder)

    def go(self, **disturbed: Any) -> Ended:
        """Run the command in the folder as it is."""
        return run(self.scenario.arguments(self.sources, self.folder), self.folder, **disturbed)

    def killed(self, **disturbed: Any) -> bool:
        """Run it, kill it, and look at what is there; False if it had ended before."""
        ended = self.go(**disturbed)
        if ended.code == KILLED:
            self.tally.kills += 1
            self.tally.while_unfinished += bool(unfinished(self.folder))
        else:
            assert ended.code == 0, ended.said[-2000:]
            self.tally.too_late += 1
        self.scenario.check(self.sources, self.folder)
        return ended.code == KILLED

    def complete(self) -> None:
        """Run it to its end, which must be that of an undisturbed run, with nothing left behind."""
        ended = self.go()
        assert ended.code == 0, ended.said[-2000:]
        self.scenario.check(self.sources, self.folder)
        outcome, expected = self.scenario.outcome(self.folder), self.expected()
        assert outcome == expected, f"the end is another than without a kill: {outcome} instead of {expected}"
        left = unfinished(self.folder)
        assert not left, f"{[path.name for path in left]} stay behind"
        self.tally.completions += 1


def at_every_operation(trial: Trial, *, step: int = 1, per_completion: int = 1, deadline: float = float("inf")) -> Iterator[int]:
    """Kill the command at its first operation on the file system, at its second ..., each time in a new folder."""
    trial.expected()
    number, since = 1, 0
    while time.monotonic() < deadline:
        trial.begin()
        killed = trial.killed(disturbance=Disturbance(number))
        yield number
        since += 1
        if since >= per_completion or not killed:
            since = 0
            trial.complete()
        if not killed:
            return
        number += step


def at_random_moments(trial: Trial, kills: int, chance: random.Random, *, chain: int = 4, deadline: float = float("inf")) -> Iterator[int]:
    """Kill the command at random moments, in chains: it goes on where the last one was killed, and at the end of a chain to its end."""
    trial.expected()
    for number in range(kills):
        if time.monotonic() >= deadline:
            break
        if number % chain == 0:
            trial.begin()
        trial.killed(kill=at_random(chance, trial.folder, trial.tally.seconds_undisturbed))
        yield number
        if number % chain == chain - 1 or number == kills - 1:
            trial.complete()


def on_a_failing_disk(trial: Trial, errno: int, *, step: int = 1, lasting: bool = True, deadline: float = float("inf")) -> Iterator[int]:
    """Let every operation in turn fail with `errno`: exit code 3 with a plain message, or success where it could do without."""
    trial.expected()
    number = 1
    while time.monotonic() < deadline:
        trial.begin()
        ended = trial.go(disturbance=Disturbance(number, errno, lasting))
        key = str(ended.code)
        trial.tally.failures[key] = trial.tally.failures.get(key, 0) + 1
        assert ended.code in (0, 3), f"operation {number}: exit code {ended.code}: {ended.said[-3000:]}"
        assert "Traceback" not in ended.said, ended.said[-3000:]
        trial.scenario.check(trial.sources, trial.folder)
        yield number
        if ended.operations is not None and ended.operations < number:
            trial.complete()
            return
        number += step
