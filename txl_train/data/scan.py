"""One pass over a text, by several processes where it is large: its different tokens, how often each appears, and the text in numbers.

The text is read once. While it is read, tokens are numbered as they appear, and the numbers are spooled to the disk; when it is known
which ids the tokens get, the numbers are written again as ids. So memory holds the different tokens and never the text, and counting the
vocabulary and encoding by it take one pass together.

Each process reads a portion of the file. Their findings are merged in the order of the portions, so the result is that of one process to
the last bit. The other processes are started afresh with this interpreter, not forked: threads do no harm, and the program's own main
module is not run again. They end when this one does.

Knows nothing of vocabularies or caches (`txl_train.data.corpus`), nor how a portion is written (`txl_train.data.layouts`).
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import numpy.typing as npt

from txl_train.data.layouts import Found, Portion, Rule, portions, read
from txl_train.errors import EnvironmentUnfitError

PORTION_BYTES = 16 << 20
"""Smallest portion worth a process of its own, which takes a quarter of a second to start."""
MOST_PROCESSES = 16
"""More are not started unless asked for: the disk is the limit by then."""

DROPPED = -1
"""As a token's id: it is left out of the text."""

_PIECE_TOKENS = 1 << 18
"""Numbers handled at a time: bounds the memory that counting and writing take."""

_Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Tally:
    """What one portion holds."""

    symbols: list[str]
    """Different tokens by first appearance; none for subwords."""
    counts: _Ids
    """How often each appears, [len(symbols)]."""
    n_tokens: int
    n_plain: int
    """Tokens that do not stand for a line's end."""
    n_words: int
    """Words and line ends; 0 where a token is a character or a byte."""


class TextScan:
    """A text that was read: what it holds, ready to be written as ids. Made by `scan_text`."""

    def __init__(self, scans: Sequence[_Scan]) -> None:
        self._scans = scans
        tallies = [scan.tally() for scan in scans]
        self.n_tokens = sum(tally.n_tokens for tally in tallies)
        self.n_plain = sum(tally.n_plain for tally in tallies)
        self.n_words = sum(tally.n_words for tally in tallies)
        self._n_tokens_each = [tally.n_tokens for tally in tallies]
        numbers: dict[str, int] = {}
        self._places = [
            np.array([numbers.setdefault(symbol, len(numbers)) for symbol in tally.symbols], dtype=np.int64) for tally in tallies
        ]
        self.symbols = list(numbers)
        """Different tokens of the text, by first appearance; none for subwords."""
        self.counts: _Ids = np.zeros(len(numbers), dtype=np.int64)
        """How often each appears, [len(symbols)]."""
        self._counts_each = [tally.counts for tally in tallies]
        for places, counts in zip(self._places, self._counts_each):
            self.counts[places] += counts

    def write(self, file: Path, offset: int, ids: _Ids | None, dtype: np.dtype[Any]) -> int:
        """Write the text as ids into `file` from byte `offset` on, and return how many tokens that were.

        `ids` gives each symbol's id, `DROPPED` leaves it out; None writes the numbers as they are (subwords).
        """
        n_all = 0
        for scan, places, counts, n_tokens in zip(self._scans, self._places, self._counts_each, self._n_tokens_each):
            own = None if ids is None else ids[places]
            scan.start_writing(file, offset, own, dtype)
            n_written = n_tokens if own is None else int(counts[own != DROPPED].sum())
            offset += n_written * dtype.itemsize
            n_all += n_written
        for scan in self._scans:  # this process writes its own portion, the first, while the others write theirs
            scan.finish_writing()
        return n_all


@contextlib.contextmanager
def scan_text(path: Path, rule: Rule, *, spool_dir: Path, processes: int | None = None) -> Iterator[TextScan]:
    """Read a file by `rule`; the scan can be written as long as the block lasts.

    `spool_dir` is where numbers are spooled, 4 bytes a token. `processes` None means as many as there are processors, for large files.
    Raises `DataError` for text that cannot be read, `EnvironmentUnfitError` where a process ends without an answer, and `OSError` where
    nothing can be spooled.
    """
    with contextlib.ExitStack() as stack:
        first, *others = portions(path, rule, n_processes(path, processes))
        remote = [stack.enter_context(contextlib.closing(_RemoteScan(path, rule, portion, spool_dir))) for portion in others]
        yield TextScan([stack.enter_context(_scan_here(path, rule, first, spool_dir)), *remote])


def n_processes(path: Path, asked: int | None) -> int:
    """Return how many processes shall read a file: those asked for, or what its size and this machine's free processors suggest."""
    if not sys.executable:
        return 1
    if asked is not None:
        return asked
    size = path.stat().st_size
    return max(1, min(len(os.sched_getaffinity(0)), size // PORTION_BYTES, MOST_PROCESSES))


class _Scan(Protocol):
    """A portion that is being read, here or in another process."""

    def tally(self) -> Tally: ...

    def start_writing(self, file: Path, offset: int, ids: _Ids | None, dtype: np.dtype[Any]) -> None: ...

    def finish_writing(self) -> None: ...


@contextlib.contextmanager
def _scan_here(path: Path, rule: Rule, portion: Portion, spool_dir: Path) -> Iterator[_LocalScan]:
    """Read a portion in this process. Its spool has no name, so nothing is left behind however this ends."""
    spool_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=spool_dir) as spool:
        yield _LocalScan(path, rule, portion, spool)


class _LocalScan:
    """A portion that was read in this process."""

    def __init__(self, path: Path, rule: Rule, portion: Portion, spool: IO[bytes]) -> None:
        self._spool = spool
        self._writing: tuple[Path, int, _Ids | None, np.dtype[Any]] | None = None
        self._tally = self._read(path, rule, portion)

    def _read(self, path: Path, rule: Rule, portion: Portion) -> Tally:
        found = Found()
        n_tokens = 0
        for numbers in read(path, rule, portion, found):
            n_tokens += len(numbers)
            self._spool.write(numbers.data)
        counts: _Ids = np.zeros(len(found.numbers), dtype=np.int64)
        if found.numbers:
            for numbers in self._spooled():
                counts += np.bincount(numbers, minlength=len(counts))
        return Tally(list(found.numbers), counts, n_tokens, found.n_plain, found.n_words)

    def _spooled(self) -> Iterator[npt.NDArray[np.int32]]:
        self._spool.seek(0)
        while piece := self._spool.read(4 * _PIECE_TOKENS):
            yield np.frombuffer(piece, dtype=np.int32)

    def tally(self) -> Tally:
        return self._tally

    def start_writing(self, file: Path, offset: int, ids: _Ids | None, dtype: np.dtype[Any]) -> None:
        self._writing = (file, offset, ids, dtype)

    def finish_writing(self) -> None:
        assert self._writing is not None
        file, offset, ids, dtype = self._writing
        drops = ids is not None and bool((ids == DROPPED).any())
        narrow = ids if ids is None or drops else ids.astype(dtype)  # before a text's worth of them is looked up
        with open(file, "r+b") as target:
            target.seek(offset)
            for numbers in self._spooled():
                written = numbers if narrow is None else narrow[numbers]
                if drops:
                    written = written[written != DROPPED]
                target.write(written.astype(dtype, copy=False).data)


class _RemoteScan:
    """Reads a portion in another process."""

    def __init__(self, path: Path, rule: Rule, portion: Portion, spool_dir: Path) -> None:
        self._portion = portion
        self._path = path
        self._connection, theirs = multiprocessing.Pipe()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _START, str(theirs.fileno()), *sys.path],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )
        try:
            self._send((path, rule, portion, spool_dir))
        except BaseException:
            self.close()
            raise

    def tally(self) -> Tally:
        answer = self._receive()
        assert isinstance(answer, Tally)
        return answer

    def start_writing(self, file: Path, offset: int, ids: _Ids | None, dtype: np.dtype[Any]) -> None:
        self._send((file, offset, ids, dtype))

    def finish_writing(self) -> None:
        self._receive()

    def close(self) -> None:
        self._connection.close()
        self._process.terminate()
        self._process.wait()

    def _send(self, message: object) -> None:
        with self._explained():
            self._connection.send(message)

    def _receive(self) -> object:
        with self._explained():
            answer = self._connection.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (EOFError, ConnectionError):
            code = self._process.wait()
            portion = f"bytes {self._portion.start} to {self._portion.end} of {self._path}"
            raise EnvironmentUnfitError(
                f"A process that read {portion} ended with {code} without an answer.",
                remedy="If memory ran out, give it more, or fewer processors (`taskset -c 0 txl ...` reads with one).",
            ) from None


_START = "import sys; sys.path[:] = sys.argv[2:]; from txl_train.data.scan import serve; serve(int(sys.argv[1]))"


def serve(descriptor: int) -> None:
    """Do what `_RemoteScan` asks for, in the process it has started: read a portion, answer with its tally, write it."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the process that started this one, which then ends it
    with contextlib.suppress(EOFError, ConnectionError), Connection(descriptor) as connection:
        try:
            with _scan_here(*connection.recv()) as scan:
                connection.send(scan.tally())
                scan.start_writing(*connection.recv())
                scan.finish_writing()
                connection.send(None)
        except (EOFError, ConnectionError):
            raise
        except Exception as error:
            connection.send(error)
