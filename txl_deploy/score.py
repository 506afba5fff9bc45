"""Scores many texts with one runtime: each from a cold start, several side by side, results in the order of the texts.

The batch size stays the same from the first step to the last: a stream without a text carries zeros. So what a text scores does not
depend on what is scored beside it, but for the rounding of products: those of the adaptive softmax's tails have as many rows as there are
rare words in the step, and a float32 product of other rows rounds otherwise. Int8 models differ by more: see `export.quantize`.

Knows ids alone; `txl_deploy.texts` makes them.
"""

# Shape suffixes: B batch, T tgt_len, N tokens of a text

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from txl_deploy.runtimes.base import Runtime
from txl_deploy.session import Session
from txl_train.errors import UsageError

Unit = TypeVar("Unit")

COUNTED_FROM_END = ("sinusoidal", "learned")
"""Kinds of attention to which a segment that is filled up behind its end is another one."""
WAITING = 1024
"""Results at most that wait for a longer text before them."""


@dataclass(frozen=True)
class Scored(Generic[Unit]):
    """One text and what its tokens cost."""

    unit: Unit
    nll_N: npt.NDArray[np.float32]
    """Nats of each token but the first."""


@dataclass
class Occupancy:
    """How well the streams were filled."""

    computed: int = 0
    """Positions that the runtime has computed."""
    scored: int = 0
    """Those that belong to a text."""


@dataclass
class _Row(Generic[Unit]):
    """A stream at work."""

    number: int
    unit: Unit
    ids_N: npt.NDArray[np.int64]
    nll_N: npt.NDArray[np.float32]
    at: int = 0


class Scorer:
    """`batch_size` streams on one runtime."""

    def __init__(self, runtime: Runtime, batch_size: int) -> None:
        """Raises `UsageError` for a model that cannot be scored so: one whose segments cannot be filled up, or that reads tokens twice."""
        info = runtime.info
        if info.config.attn_type in COUNTED_FROM_END:
            raise UsageError(
                f"A model of `attn_type` {info.config.attn_type} counts positions from a segment's end, so texts of other lengths cannot "
                "share a batch.",
                remedy="Score each text by itself: `txl eval --manual TEXT`.",
            )
        if info.config.ext_len:
            raise UsageError(
                f"{info.origin or 'The runtime'} reads {info.config.ext_len} tokens before each segment once more.",
                remedy="Export it again with `--ext-len 0`.",
            )
        self._runtime = runtime
        self._batch_size = batch_size
        self.occupancy = Occupancy()

    def scores(self, units: Iterable[tuple[Unit, npt.NDArray[np.int64]]]) -> Iterator[Scored[Unit]]:
        """Yield each unit with the nll of its ids but the first, in the order of `units`.

        `units` is read in a thread of its own, a little ahead. Where it is slow, streams run with what there is, and a result is yielded as
        soon as it and all before it are there. What `units` raises is raised after the results of everything before it.
        """
        feed = _Feed(units, ahead=4 * self._batch_size)
        session = Session(self._runtime, self._batch_size)
        rows: list[_Row[Unit] | None] = [None] * self._batch_size
        done: dict[int, Scored[Unit]] = {}
        taken = given = 0
        try:
            while True:
                fresh = []
                for number, row in enumerate(rows):
                    while row is None and taken - given < self._batch_size + WAITING:
                        item = feed.next(wait=not any(rows) and given == taken)
                        if item is None:
                            break
                        unit, ids_N = item
                        if len(ids_N) < 2:
                            done[taken] = Scored(unit, np.zeros(0, dtype=np.float32))
                        else:
                            row = rows[number] = _Row(taken, unit, ids_N, np.empty(len(ids_N) - 1, dtype=np.float32))
                            fresh.append(number)
                        taken += 1
                        while given in done:
                            yield done.pop(given)
                            given += 1
                if fresh:
                    session.reset(fresh)
                if any(rows):
                    self._step(session, rows, done)
                while given in done:
                    yield done.pop(given)
                    given += 1
                if not any(rows) and feed.is_over and given == taken:
                    break
        finally:
            feed.stop()
        if feed.error is not None:
            raise feed.error

    def _step(self, session: Session, rows: list[_Row[Unit] | None], done: dict[int, Scored[Unit]]) -> None:
        T = self._runtime.info.tgt_len
        ids_BT, targets_BT = np.zeros((2, self._batch_size, T), dtype=np.int64)
        for b, row in enumerate(rows):
            if row is not None:
                part = row.ids_N[row.at : row.at + T + 1]
                ids_BT[b, : len(part) - 1], targets_BT[b, : len(part) - 1] = part[:-1], part[1:]
        device = self._runtime.info.device
        nll_BT = session.step(torch.from_numpy(ids_BT).to(device), torch.from_numpy(targets_BT).to(device)).to("cpu").numpy()
        self.occupancy.computed += self._batch_size * T
        for b, row in enumerate(rows):
            if row is None:
                continue
            n = min(T, len(row.nll_N) - row.at)
            row.nll_N[row.at : row.at + n] = nll_BT[b, :n]
            row.at += n
            self.occupancy.scored += n
            if row.at == len(row.nll_N):
                done[row.number] = Scored(row.unit, row.nll_N)
                rows[b] = None


class _Feed(Generic[Unit]):
    """An iterable that is read by a thread, so that waiting for it can be left out."""

    def __init__(self, items: Iterable[Unit], ahead: int) -> None:
        self._queue: queue.Queue[tuple[bool, Unit | None]] = queue.Queue(ahead)
        self._stopped = threading.Event()
        self.error: BaseException | None = None
        self.is_over = False
        self._thread = threading.Thread(target=self._read, args=(iter(items),), name="txl-texts", daemon=True)
        self._thread.start()

    def _read(self, items: Iterator[Unit]) -> None:
        try:
            for item in items:
                if not self._put((True, item)):
                    return
        except BaseException as error:  # told to whoever waits for the next item
            self.error = error
        self._put((False, None))

    def _put(self, entry: tuple[bool, Unit | None]) -> bool:
        while not self._stopped.is_set():
            try:
                self._queue.put(entry, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def next(self, *, wait: bool) -> Unit | None:
        """Return the next item; None where there is none any more, or none yet and nobody waits."""
        while not self.is_over:
            try:
                there, item = self._queue.get(timeout=0.1) if wait else self._queue.get_nowait()
            except queue.Empty:
                if wait:
                    continue  # in turns, so that Ctrl-C is noticed
                return None
            if there:
                return item
            self.is_over = True
        return None

    def stop(self) -> None:
        """Let the thread end."""
        self._stopped.set()
