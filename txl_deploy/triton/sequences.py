"""What becomes of the sequences of clients: which streams they are, when one begins, ends, or is forgotten.

The server tells a model of a sequence's first and last request, and nothing of one that it dropped for being idle or whose client is gone.
So at most `max_sequences` are kept, and those idle for longer than the server waits are let go. A request whose sequence is not here is
refused: it never meets another one's memory. Knows no type of the server's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

from txl_train.errors import UsageError

T = TypeVar("T")


class SequenceLost(UsageError):
    """A request goes on with a sequence whose memory is not here."""


@dataclass
class _Entry(Generic[T]):
    stream: T
    used_at: float


class Sequences(Generic[T]):
    """The streams of sequences by their correlation ids.

    Args:
        make: returns a stream at a cold start.
        release: is given each stream that is let go.
        most: sequences at once; of more, the one idle for longest is let go.
        idle_s: seconds after which an idle one is let go. The server forgets it earlier, so nobody can ask for it.
        clock: seconds that never run backwards.
    """

    def __init__(
        self,
        make: Callable[[], T],
        release: Callable[[T], None],
        *,
        most: int,
        idle_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._make, self._release = make, release
        self._most, self._idle_s, self._clock = most, idle_s, clock
        self._entries: dict[Hashable, _Entry[T]] = {}  # the longest idle first

    def __len__(self) -> int:
        return len(self._entries)

    def take(self, key: Hashable, *, starts: bool) -> T:
        """Return the stream of a request: a new one where the sequence starts, whatever had that id before.

        Raises `SequenceLost` where a sequence goes on that is not here.
        """
        now = self._clock()
        entry = self._entries.pop(key, None)
        if starts:
            if entry is not None:
                self._release(entry.stream)
            entry = _Entry(self._make(), now)
        if entry is None:
            raise SequenceLost(
                f"Sequence {key} has no memory here: it ended, was idle for too long, or began on a server that is gone.",
                remedy="Begin it again with its first request, and send its text once more.",
            )
        entry.used_at = now
        self._entries[key] = entry
        return entry.stream

    def end(self, keys: Iterable[Hashable]) -> None:
        """Let go of sequences that have ended."""
        for key in keys:
            entry = self._entries.pop(key, None)
            if entry is not None:
                self._release(entry.stream)

    def sweep(self) -> None:
        """Let go of what is idle for too long, and of the longest idle beyond the most."""
        now = self._clock()
        while self._entries:
            key, entry = next(iter(self._entries.items()))
            if len(self._entries) <= self._most and now - entry.used_at <= self._idle_s:
                return
            del self._entries[key]
            self._release(entry.stream)
