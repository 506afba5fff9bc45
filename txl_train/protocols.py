"""How a text is cut, which of its tokens are scored and how their mean is taken: this toolkit's own protocol, and NVIDIA's two.

`exact` is `data.segments.SegmentIterator`: every token that has a predecessor is scored once, from a cold start. NVIDIA's evaluation
differs from it, and its code of 2019 (commit ca28f554 of DeepLearningExamples) from that of 2023 (8f822371): equal columns, the rest of
the text dropped, a shorter last segment, in 2023 unscored segments before the text, a memory that outlives a pass. All of it is known
here, for comparison with results that were made so; the arithmetic of a segment is known to whoever runs it.
"""

# Shape suffixes: B columns, T targets of a segment, Q its inputs (with the extension there is), M mem_len, N tokens of the text

from __future__ import annotations

import functools
import html
import importlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from txl_train.config import SameLengthRule
from txl_train.data.segments import Segment, TokenSource
from txl_train.distributed import World
from txl_train.errors import DataError, EnvironmentUnfitError, UsageError
from txl_train.evaluate import EvalResult, StepOutput, Stepper
from txl_train.model.memory import Memory

ProtocolName = Literal["exact", "nvidia-2019", "nvidia-2023"]
PROTOCOL_NAMES: tuple[ProtocolName, ...] = get_args(ProtocolName)


@dataclass(frozen=True, kw_only=True)
class NvidiaRules:
    """In what NVIDIA's evaluations of 2019 and of 2023 differ."""

    same_length_rule: SameLengthRule
    """How many keys a token sees under `same_length`."""
    warms_up: bool
    """Segments that fill the memory come before the text, unscored."""
    clock_warm_up: int
    """Steps that are not timed, beyond those that fill the memory."""


NVIDIA: Mapping[str, NvidiaRules] = {
    "nvidia-2019": NvidiaRules(same_length_rule="mem_len", warms_up=False, clock_warm_up=1),
    "nvidia-2023": NvidiaRules(same_length_rule="mem_len+1", warms_up=True, clock_warm_up=2),
}
"""NVIDIA's protocols by name."""


@dataclass(frozen=True, kw_only=True)
class NvidiaLengths:
    """The lengths of NVIDIA's `eval.py` where its command line does not name them; those of the checkpoint mean nothing to it."""

    tgt_len: int = 64
    ext_len: int = 0
    mem_len: int = 640
    clamp_len: int = -1
    same_length: bool = False


def clock_warm_up(protocol: ProtocolName, *, tgt_len: int, mem_len: int) -> int:
    """Return the number of steps that latencies leave out: while the memory fills, and one or two more, as in NVIDIA's code."""
    return mem_len // tgt_len + (NVIDIA[protocol].clock_warm_up if protocol in NVIDIA else 2)


def mean_nll(protocol: ProtocolName, result: EvalResult) -> float:
    """Return the mean −log p of a token, nats.

    Of several processes, NVIDIA's code takes the plain mean of their means, in float32, whatever their numbers of tokens.
    """
    if protocol == "exact" or not result.by_process:
        return result.nll_nats_per_token
    total = np.float32(0.0)
    for part in result.by_process:
        total += np.float32(part.nll_nats_sum / part.n_tokens)
    return float(total / np.float32(len(result.by_process)))


def own_streams(protocol: ProtocolName, batch_size: int, world: World) -> slice:
    """Return which of `batch_size` streams this process scores: contiguous parts in order of the ranks.

    `exact` makes them as equal as can be. NVIDIA's code gives each process the batch size divided by their number, rounded up, and the
    last one what is left.

    Raises:
        UsageError: a process would have none.
    """
    n, size, rank = batch_size, world.size, world.rank
    if protocol == "exact":
        enough = n >= size
        part = slice(n * rank // size, n * (rank + 1) // size)
    else:
        width = -(-n // size)
        enough = (size - 1) * width < n
        part = slice(rank * width, min((rank + 1) * width, n))
    if not enough:
        raise UsageError(
            f"{n} stream{'s are' if n > 1 else ' is'} too few to give each of {size} processes one"
            + ("." if n < size else f": parts of {-(-n // size)} go to fewer of them."),
            remedy=f"Give `--batch-size {-(-n // size) * size}`, or start fewer processes.",
        )
    return part


class NvidiaSegments:
    """One pass over a text as NVIDIA's evaluation reads it; every iteration is one, and they can follow each other with one memory.

    The text becomes `batch_size` columns of equal length, and what is left over at its end is dropped. The first token of a column is
    never a target. A segment's input begins with as many of the `ext_len` tokens before it as there are, and the last segment may be
    shorter: shapes vary, so a runtime of fixed shape needs an `UnevenStepper`.

    With `warm_up_len`, so many rows (a multiple of `tgt_len`) precede each column and are not scored: the end of the column before it,
    and for the first one that of the last. A column that is shorter than that precedes its neighbour whole, yet as many rows go
    unscored, at the cost of the column's own (`n_lost`).

    Args:
        ids_N: the tokens; may be memory-mapped.
        batch_size: columns, of all processes.
        tgt_len: targets per column and segment.
        ext_len: tokens before each segment that its input begins with.
        warm_up_len: unscored rows before each column.
        columns: those that are read here; None means all.
        max_segments: end after so many, those of the warm-up included.

    Raises:
        DataError: the text is too short for so many columns, or no token would be scored.
    """

    def __init__(
        self,
        ids_N: TokenSource,
        *,
        batch_size: int,
        tgt_len: int,
        ext_len: int = 0,
        warm_up_len: int = 0,
        columns: slice | None = None,
        max_segments: int | None = None,
    ) -> None:
        self._ids_N = ids_N
        rows = len(ids_N) // batch_size
        self._column_len = rows
        chosen = range(batch_size)[columns or slice(None)]
        self._start_B = np.array(chosen, dtype=np.int64) * rows
        self._before_B = (np.array(chosen, dtype=np.int64) - 1) % batch_size * rows
        self._n_before = min(warm_up_len, rows)
        self._first_scored = warm_up_len
        self._n_targets = self._n_before + rows - 1
        self.tgt_len, self.ext_len = tgt_len, ext_len
        self.batch_size = len(chosen)
        self.n_trimmed = len(ids_N) - rows * batch_size
        """Tokens at the text's end that are in no column."""
        self.n_lost = min(warm_up_len - self._n_before, max(0, rows - 1)) * batch_size
        """Targets of all columns that go unscored because the columns are shorter than the warm-up."""
        if rows < 2:
            raise DataError(
                f"A text of {len(ids_N)} tokens gives {batch_size} columns nothing to predict: each takes at least 2.",
                remedy=f"Give `--batch-size {max(1, len(ids_N) // 2)}` or smaller, or a longer text.",
            )
        n_segments = -(-self._n_targets // tgt_len)
        self._n_segments = n_segments if max_segments is None else min(n_segments, max_segments)
        self.n_warm_up = warm_up_len // tgt_len
        """Segments of a pass that are not scored."""
        if self._n_segments <= self.n_warm_up:
            cause, mend = f"`--max-size` {max_segments} ends before a warm-up of {self.n_warm_up} does", "a larger `--max-size`"
            if n_segments <= self.n_warm_up:
                cause = f"columns of {rows} tokens are too short for a warm-up of {warm_up_len}"
                mend = "a smaller `--batch-size` or `--mem-len`"
            raise DataError(
                f"No token would be scored: all {self._n_segments} segments belong to the warm-up ({cause}).",
                remedy=f"Give {mend}, or use `--protocol exact`, which scores every token.",
            )

    def __len__(self) -> int:
        """Return the number of segments of a pass."""
        return self._n_segments

    def __iter__(self) -> Iterator[Segment]:
        for index in range(len(self)):
            first, before, length = self._shape(index)
            row_Q1 = np.arange(first - before, first + length + 1)
            ids_BQ1 = self._read(row_Q1)
            counted_BT = np.full((self.batch_size, length), first >= self._first_scored)
            yield Segment(
                input_ids_BT=ids_BQ1[:, :-1].copy(), target_ids_BT=ids_BQ1[:, before + 1 :].copy(), counted_BT=counted_BT, index=index
            )

    def lengths_to_continue(self) -> set[int]:
        """Return the lengths of the further steppers that going on after every segment takes: see `UnevenStepper`."""
        lengths: set[int] = set()
        for index in range(len(self)):
            _, before, length = self._shape(index)
            if before < self.ext_len or length < self.tgt_len:
                lengths |= {n for n in (before + length, before + length - self.ext_len) if n > 0}
        return lengths

    def _shape(self, index: int) -> tuple[int, int, int]:
        """Return a segment's first row, the number of rows before it that it reads, and of targets."""
        first = index * self.tgt_len
        return first, min(first, self.ext_len), min(self.tgt_len, self._n_targets - first)

    def _read(self, row_R: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The tokens of all columns at these rows, of which the first `_n_before` are the neighbour's last."""
        own_R = row_R - self._n_before
        there_BR = self._before_B[:, None] + self._warm_up_row(row_R)[None]
        here_BR = self._start_B[:, None] + own_R.clip(min=0)[None]
        return np.asarray(self._ids_N[np.where(own_R >= 0, here_BR, there_BR)]).astype(np.int64)

    def _warm_up_row(self, row_R: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Which row of its own column a row of the warm-up is: the columns are rotated, so one that is too short begins in its middle."""
        return (row_R - self._first_scored) % self._column_len


class UnevenStepper:
    """Takes segments of uneven shape, as `NvidiaSegments` yields them, to steppers of fixed shape, exactly.

    Its memory's length counts what the memory holds, 0..mem_len, without the extension. Where the first stepper's shape does not fit:

    - with nothing remembered, a missing extension is padding that is never seen, and a short segment is filled up behind its end;
    - where a memory goes on, further steppers without extension are used: one over all inputs, whose memory is discarded, and one over
      those inputs that the memory takes in, all but the last `ext_len`. Attention looks back only, so both agree with one step that
      could do it.

    Args:
        stepper: for `ext_len` + `tgt_len` inputs and `tgt_len` targets.
        others: by their tgt_len, steppers of the same model without extension: those of `lengths_to_continue` where passes continue
            each other (or padding would change the model's positions), none otherwise.
    """

    def __init__(self, stepper: Stepper, others: Mapping[int, Stepper], *, tgt_len: int, ext_len: int) -> None:
        self._stepper = stepper
        self._others = others
        self._tgt_len, self._ext_len = tgt_len, ext_len

    def initial_memory(self, batch_size: int) -> Memory:
        """Return the memory of `batch_size` columns at a cold start."""
        return self._stepper.initial_memory(batch_size)

    def step(self, input_ids_BQ: Tensor, target_ids_BT: Tensor, memory: Memory) -> StepOutput:
        """Score one segment of up to `tgt_len` targets and as much of the extension as there is."""
        T = target_ids_BT.shape[1]
        before = input_ids_BQ.shape[1] - T
        missing, short = self._ext_len - before, self._tgt_len - T
        if self._others and (short or (missing and int(memory.length_B.max()))):
            return self._uneven(input_ids_BQ, target_ids_BT, memory)
        nll_BT, after = self._stepper.step(
            F.pad(input_ids_BQ, (missing, short)), F.pad(target_ids_BT, (0, short)), Memory(memory.states, memory.length_B + before)
        )
        return StepOutput(nll_BT[:, :T], Memory(after.states, (after.length_B - self._ext_len).clamp(min=0)))

    def _uneven(self, input_ids_BQ: Tensor, target_ids_BT: Tensor, memory: Memory) -> StepOutput:
        Q, T = input_ids_BQ.shape[1], target_ids_BT.shape[1]
        kept = Q - self._ext_len
        target_ids_BQ = torch.cat([input_ids_BQ[:, 1 : Q - T + 1], target_ids_BT], dim=1)
        nll_BQ, after = self._others[Q].step(input_ids_BQ, target_ids_BQ, memory)
        if kept <= 0:
            after = memory
        elif kept < Q:
            after = self._others[kept].step(input_ids_BQ[:, :kept].contiguous(), target_ids_BQ[:, :kept].contiguous(), memory).memory
        return StepOutput(nll_BQ[:, Q - T :], after)


_MARKS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"(\d)\.(\d)"), r"\1 @.@ \2"),
    (re.compile(r"(\d),(\d)"), r"\1 @,@ \2"),
    (re.compile(r"(\w)-(\w)"), r"\1 @-@ \2"),
)


def nvidia_words(text: str) -> list[str]:
    """Return the words of raw text as NVIDIA's `--manual` makes them, without the `<eos>` that follows.

    Moses' rules with its HTML escapes, of which only those of the two quotes are undone; then marks within numbers and hyphens within words
    are set apart, from left to right without overlap, so that `1,2,3` becomes `1 @,@ 2,3`.

    Raises:
        EnvironmentUnfitError: sacremoses is not installed.
    """
    tokenized = " ".join(_moses()(text))
    for escape in ("&quot;", "&apos;"):
        tokenized = tokenized.replace(escape, html.unescape(escape))
    for pattern, replacement in _MARKS:
        tokenized = pattern.sub(replacement, tokenized)
    return tokenized.split()


@functools.cache
def _moses() -> Callable[[str], Any]:
    try:
        sacremoses = importlib.import_module("sacremoses")
    except ImportError as error:
        raise EnvironmentUnfitError(
            "NVIDIA's `--manual` takes words apart by the Moses rules, which the package sacremoses holds, and it is not installed.",
            remedy="Install it with `pip install sacremoses`.",
        ) from error
    tokenize: Callable[[str], Any] = sacremoses.MosesTokenizer("en").tokenize
    return tokenize
