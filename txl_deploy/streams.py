"""Streams that come, pause and go, on one runtime: each keeps a memory of its own, and whichever have something to read step together.

A stream's tokens may come in parts of any length. Segments are always cut from its beginning on, so what a token costs does not depend on
how the text was sent: the tokens of a segment that is not whole yet are kept, scored at once behind the memory as it is, and read again
when more of them are there. Knows ids alone; whose stream it is and how requests arrive is known by whoever serves (`txl_deploy.triton`).
"""

# Shape suffixes: B rows of a step, T tgt_len, N tokens that were sent

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from txl_deploy.runtimes.base import HeadError, Runtime
from txl_deploy.score import COUNTED_FROM_END
from txl_train.errors import TxlError, UsageError, ValidationError
from txl_train.model.memory import Memory

Result = npt.NDArray[np.float32] | TxlError
"""The nll of the tokens of one stream, or what is wrong with it."""


@dataclass(eq=False)
class Stream:
    """One text being read: its memory, and the tokens behind it that are no whole segment yet."""

    memory: Memory | None = None
    """Of this stream alone (B = 1); None at a cold start, and while its rows lie in the last step's memory."""
    open_ids: list[int] = field(default_factory=list)
    """Tokens behind the memory."""
    n_scored: int = 0
    """Of the tokens behind the first of `open_ids`, how many have been scored."""
    n_read: int = 0
    """Tokens since the beginning."""

    @property
    def n_open(self) -> int:
        """How many of the open tokens have one before them, so that they can be scored: all but the first."""
        return max(len(self.open_ids) - 1, 0)

    def forget(self) -> None:
        """Go back to a cold start."""
        self.memory, self.open_ids, self.n_scored, self.n_read = None, [], 0, 0


@dataclass
class _Work:
    """What one stream has to read in a call."""

    stream: Stream
    nll: list[npt.NDArray[np.float32]] = field(default_factory=list)
    error: TxlError | None = None


class Streams:
    """Scores the tokens of many streams on one runtime.

    Args:
        runtime: with the head `nll`.
        max_rows: streams that step together at most.

    Raises:
        HeadError: the runtime scores no given targets.
        UsageError: its segments cannot be filled up behind their end, or begin with tokens read before; or it takes fewer rows.
    """

    def __init__(self, runtime: Runtime, *, max_rows: int) -> None:
        info = runtime.info
        origin = info.origin or "The runtime"
        if info.head != "nll":
            raise HeadError(f"{origin} yields no nll of given targets.", remedy="Export the checkpoint again with `--head nll`.")
        if info.config.attn_type in COUNTED_FROM_END:
            raise UsageError(
                f"A model of `attn_type` {info.config.attn_type} counts positions from a segment's end, so the tokens of a segment cannot "
                "be scored before all of them are there.",
                remedy="Score whole texts with `txl eval`.",
            )
        if info.config.ext_len:
            raise UsageError(
                f"{origin} reads {info.config.ext_len} tokens before each segment once more.", remedy="Export it again with `--ext-len 0`."
            )
        if info.max_batch is not None and info.max_batch < max_rows:
            raise UsageError(f"{origin} takes {info.max_batch} streams at most, fewer than {max_rows}.", remedy="Ask for fewer.")
        self.runtime = runtime
        self.max_rows = max_rows
        self._least = info.min_batch
        self._last: tuple[list[Stream], Memory] | None = None
        """The streams of the last step in the order of its rows, and what it left; None where nobody has a memory there."""
        self.n_steps = 0
        self.n_rows = 0
        """Steps so far, and the rows at work in them."""

    def score(self, parts: Sequence[tuple[Stream, npt.ArrayLike]]) -> list[Result]:
        """Read the next tokens of some streams; return the nll of each token that has one before it in its stream.

        So of N ids the first call of a stream returns N - 1 values (float32, nats), and every later one N. What is wrong with one stream
        is returned in its place, and concerns no other: a `UsageError` for ids that the model does not know or none at all (that stream
        has not moved), a `ValidationError` where the model yields what is no number (it is at a cold start).

        Args:
            parts: different streams with their ids [N].

        Raises whatever the runtime raises; all streams of the call are at a cold start then.
        """
        if len({id(stream) for stream, _ in parts}) != len(parts):
            raise UsageError("A stream was given twice in one call.")
        works: list[_Work] = []
        for stream, ids in parts:
            work = _Work(stream)
            works.append(work)
            try:
                ids_N = self._checked(ids)
            except UsageError as error:
                work.error = error
            else:
                stream.open_ids.extend(ids_N.tolist())
                stream.n_read += len(ids_N)
        try:
            while waiting := [work for work in works if work.error is None and work.stream.n_open > work.stream.n_scored]:
                for at in range(0, len(waiting), self.max_rows):
                    self._step(waiting[at : at + self.max_rows])
        except BaseException:
            for work in works:
                self.release(work.stream)
            raise
        return [np.concatenate([np.zeros(0, dtype=np.float32), *work.nll]) if work.error is None else work.error for work in works]

    def release(self, stream: Stream) -> None:
        """Forget a stream."""
        stream.forget()
        if self._last is not None and any(other is stream for other in self._last[0]):
            self._settle()

    def _checked(self, ids: npt.ArrayLike) -> npt.NDArray[np.int64]:
        ids_N = np.asarray(ids)
        if ids_N.ndim != 1 or not len(ids_N) or ids_N.dtype.kind not in "iu":
            raise UsageError(f"A stream reads a list of one or more token ids, but was given {ids_N.dtype} of shape {list(ids_N.shape)}.")
        size = self.runtime.info.config.vocab_size
        wrong = np.flatnonzero((ids_N < 0) | (ids_N >= size))
        if len(wrong):
            raise UsageError(f"Token {wrong[0]} has the id {ids_N[wrong[0]]}, but the model's vocabulary has the ids 0 to {size - 1}.")
        return ids_N.astype(np.int64)

    @torch.inference_mode()
    def _step(self, works: Sequence[_Work]) -> None:
        """Run one segment of each of some streams, whole or not."""
        info = self.runtime.info
        T, B = info.tgt_len, max(len(works), self._least)
        streams = [work.stream for work in works]
        ids_BT, targets_BT = np.zeros((2, B, T), dtype=np.int64)
        for b, stream in enumerate(streams):
            part = stream.open_ids[: T + 1]
            ids_BT[b, : len(part) - 1], targets_BT[b, : len(part) - 1] = part[:-1], part[1:]
        before = self._memory_of(streams, B)
        output = self.runtime.step(torch.from_numpy(ids_BT).to(info.device), torch.from_numpy(targets_BT).to(info.device), before)
        nll_BT = output.nll_BT.to("cpu").numpy()
        self.n_steps += 1
        self.n_rows += len(works)
        whole = [stream.n_open >= T for stream in streams]
        broken = []
        for b, (work, is_whole) in enumerate(zip(works, whole)):
            stream = work.stream
            end = T if is_whole else stream.n_open
            work.nll.append(nll_BT[b, stream.n_scored : end].copy())
            if not np.isfinite(work.nll[-1]).all():
                work.error = ValidationError(
                    f"{info.origin or 'The model'} yields an nll that is no finite number within {end} tokens after token "
                    f"{stream.n_read - len(stream.open_ids)} of the stream.",
                    remedy="`txl eval` with the same text says where; fp16 may overflow: export again with `--dtype fp32`.",
                )
                broken.append(stream)
            stream.n_scored = 0 if is_whole else end
            if is_whole:
                del stream.open_ids[:T]
        self._keep(streams, whole, before, output.memory)
        for stream in broken:
            self.release(stream)

    def _memory_of(self, streams: Sequence[Stream], B: int) -> Memory:
        """Return the memory of some streams as rows, in which the last step left it if they are the same, and gathered otherwise."""
        if self._last is not None:
            last, memory = self._last
            if len(last) == len(streams) and all(one is other for one, other in zip(last, streams)) and memory.length_B.shape[0] == B:
                return memory
            self._settle()
        memory = self.runtime.initial_memory(B)
        for b, stream in enumerate(streams):
            if stream.memory is not None:
                for state, row in zip(memory.states, stream.memory.states):
                    state[b] = row[0]
                memory.length_B[b] = stream.memory.length_B[0]
        return memory

    def _keep(self, streams: Sequence[Stream], whole: Sequence[bool], before: Memory, after: Memory) -> None:
        """Let each stream have the memory behind its segment, or keep the one before where that is not whole yet."""
        if all(whole):
            for stream in streams:
                stream.memory = None
            self._last = (list(streams), after)
            return
        if not any(whole):
            return  # all of them are where they were
        was_last, self._last = self._last is not None, None
        for b, (stream, is_whole) in enumerate(zip(streams, whole)):
            if is_whole:
                stream.memory = _row(after, b)
            elif was_last:
                stream.memory = _row(before, b)

    def _settle(self) -> None:
        """Give each stream of the last step a memory of its own."""
        if self._last is None:
            return
        streams, memory = self._last
        rows = [_row(memory, b) if stream.n_read else None for b, stream in enumerate(streams)]  # all, or none where memory runs out
        self._last = None
        for stream, row in zip(streams, rows):
            stream.memory = row


def _row(memory: Memory, b: int) -> Memory:
    """Return one stream's memory as a copy."""
    return Memory([state[b : b + 1].clone() for state in memory.states], memory.length_B[b : b + 1].clone())
