"""Goes on with a text, token by token, on any runtime that scores the next one.

A prompt is read in segments, the last of its tokens and everything after it one at a time. Without `same_length` a token within a
segment sees `mem_len` tokens and those before it in its segment, so beyond `mem_len` tokens the cut matters: it is always the same, whole
segments of the longest reader first. Knows ids alone; `txl_train.data.detokenizers` makes text of them.
"""

# Shape suffixes: B batch, N tokens of a prompt, Q tokens of a segment, V vocabulary

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy.typing as npt
import torch
from torch import Tensor

from txl_deploy.runtimes.base import HeadError, Runtime, RuntimeInfo
from txl_deploy.sampling import Chance, Sampling, distribution, log_probs
from txl_train.errors import UsageError
from txl_train.finite import check_memory, check_scores
from txl_train.model.memory import Memory


@dataclass(frozen=True)
class Token:
    """One token of one sample, as it comes."""

    sample: int
    id: int
    log_p: float
    """Nats, by the model itself: whatever `Sampling` made of its distribution."""
    end: str | None
    """Why the sample ends with it: `max-tokens`, or what the caller's `ends` said; None where it goes on."""


@dataclass
class Timing:
    """How long it took, in seconds."""

    prompt_s: float = 0.0
    """Reading the prompt, up to the scores of the first new token."""
    steps_s: list[float] = dataclasses.field(default_factory=list)
    """Each step after that, for all samples of a group together."""


class Generator:
    """One model, as a runtime that takes one token and scores the next, and others that read a prompt faster."""

    def __init__(self, step: Runtime, readers: Sequence[Runtime] = ()) -> None:
        """Check that the runtimes are the same model with the same memory.

        Args:
            step: takes one token a stream, and yields logits or log p.
            readers: take more tokens at a time; what they yield is not used, their memory is.

        Raises:
            HeadError: `step` scores given targets.
            UsageError: `step` takes more than one token, or a reader is of another model, memory or length.
        """
        info = step.info
        if info.head == "nll":
            raise HeadError(
                f"{info.origin or 'The runtime'} yields the nll of given targets, and no scores of the next token.",
                remedy="Export the checkpoint again with `txl export --head logits --tgt-len 1`.",
            )
        if info.tgt_len != 1 or info.config.ext_len:
            raise UsageError(
                f"{info.origin or 'The runtime'} takes {info.tgt_len} tokens a step and {info.config.ext_len} before them, "
                "but generation takes one.",
                remedy="Export the checkpoint again with `--head logits --tgt-len 1 --ext-len 0`; with a longer one, read the prompt by "
                "`--prefill-artifact`.",
            )
        for reader in readers:
            _check_same(info, reader.info)
        self.step = step
        self.readers = sorted(readers, key=lambda reader: -reader.info.tgt_len)

    @torch.inference_mode()
    def read(self, ids: npt.ArrayLike) -> tuple[Tensor, Memory]:
        """Read a prompt of one or more ids [N] from a cold start: scores [1, V] of the next token, and the memory of one stream."""
        ids_N = torch.as_tensor(ids, dtype=torch.int64)
        if ids_N.dim() != 1 or not len(ids_N):
            raise UsageError("There is no token to go on from.", remedy="Give a prompt.")
        memory = self.step.initial_memory(1)
        at = 0
        for reader in self.readers:
            Q = reader.info.tgt_len
            while len(ids_N) - at > Q:
                memory = _advance(reader, ids_N[at : at + Q], memory)
                at += Q
                check_memory(memory, at, n_newest=Q)
        for position in range(at, len(ids_N)):
            scores_BV, memory = _next(self.step, ids_N[position : position + 1, None], memory)
            check_scores(scores_BV, memory, position, n_newest=1)
        return scores_BV, memory

    @torch.inference_mode()
    def go_on(
        self,
        ids: npt.ArrayLike,
        *,
        max_tokens: int,
        sampling: Sampling,
        seed: int = 0,
        samples: int = 1,
        ends: Callable[[int, int], str | None] = lambda sample, token: None,
        timing: Timing | None = None,
    ) -> Iterator[Token]:
        """Yield the tokens of `samples` continuations as they come, one of each sample that still goes on per step.

        A sample depends on the prompt, `sampling`, `seed` and its own number alone; its log p depends on the number of samples as far as
        products of more rows round otherwise. Samples run side by side as far as the runtime's batch allows, in groups beyond that, and one
        by one where they would take part in each other's rounding.

        Args:
            ids: the prompt, one or more ids [N].
            ends: called with sample and token; returns why the sample ends there, None where it goes on.
            timing: filled in.
        """
        timing = Timing() if timing is None else timing
        begun = time.perf_counter()
        scores_1V, memory_1 = self.read(ids)
        first_V = log_probs(scores_1V[0])
        memory_1 = Memory([state.clone() for state in memory_1.states], memory_1.length_B.clone())  # groups begin from it again
        timing.prompt_s = time.perf_counter() - begun
        width = 1 if self.step.info.mixes_streams else min(samples, self.step.info.max_batch or samples)
        for start in range(0, samples, max(1, width)):
            numbers = range(start, min(start + width, samples))
            yield from self._group(numbers, first_V, memory_1, max_tokens, sampling, seed, ends, timing)

    def _group(
        self,
        numbers: Sequence[int],
        first_V: Tensor,
        memory_1: Memory,
        max_tokens: int,
        sampling: Sampling,
        seed: int,
        ends: Callable[[int, int], str | None],
        timing: Timing,
    ) -> Iterator[Token]:
        B = len(numbers)
        memory = _repeated(memory_1, B)
        chances = [Chance(seed, number) for number in numbers]
        log_p_BV: list[Tensor] = [first_V] * B
        going = [True] * B
        last_B = torch.zeros(B, dtype=torch.int64)
        for position in range(1, max_tokens + 1):
            for row, number in enumerate(numbers):
                if not going[row]:
                    continue  # its stream runs on with its last token, which changes no other
                drawn = chances[row].draw(distribution(log_p_BV[row], sampling))
                end = ends(number, drawn) or ("max-tokens" if position == max_tokens else None)
                going[row] = end is None
                last_B[row] = drawn
                yield Token(number, drawn, float(log_p_BV[row][drawn]), end)
            if not any(going):
                return
            begun = time.perf_counter()
            scores_BV, memory = _next(self.step, last_B[:, None], memory)
            check_scores(scores_BV, memory, position, n_newest=1)
            log_p_BV = [log_probs(scores_V) if going[row] else scores_V for row, scores_V in enumerate(scores_BV)]
            timing.steps_s.append(time.perf_counter() - begun)


def _check_same(one: RuntimeInfo, other: RuntimeInfo) -> None:
    """Refuse a reader whose memory would mean something else to the step."""
    if other.config.ext_len:
        raise UsageError(f"{other.origin} reads {other.config.ext_len} tokens before each segment, as generation cannot.")
    pairs = (
        ("checkpoint", one.checkpoint_sha256, other.checkpoint_sha256),
        ("`--mem-len`", one.mem_len, other.mem_len),
        ("`--clamp-len`", one.config.clamp_len, other.config.clamp_len),
        ("`--same-length`", one.config.same_length, other.config.same_length),
        ("rule of `--same-length`", one.config.same_length_rule, other.config.same_length_rule),
        ("`--memory`", one.memory, other.memory),
        ("type of the memory", one.memory_dtype, other.memory_dtype),
        ("device", one.device, other.device),
    )
    for what, mine, its in pairs:
        if mine != its:
            raise UsageError(
                f"{other.origin} cannot read the prompt for {one.origin}: its {what} is {its}, not {mine}.",
                remedy="Export both from one checkpoint with the same lengths.",
            )


def _rows(runtime: Runtime, tensor: Tensor, least: int) -> Tensor:
    """Return a tensor [B, ...] on the runtime's device, with copies of its last row up to `least` rows."""
    missing = least - tensor.shape[0]
    if missing > 0:
        tensor = torch.cat([tensor, tensor[-1:].expand(missing, *tensor.shape[1:])])
    return tensor.to(runtime.info.device)


def _next(runtime: Runtime, ids_B1: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
    """Take one token of each stream; where the runtime takes no fewer than some streams, the memory keeps the copies."""
    least = max(runtime.info.min_batch, memory.length_B.shape[0])
    output = runtime.next_token(_rows(runtime, ids_B1, least), _widened(runtime, memory, least))
    return output.scores_BV[: ids_B1.shape[0]], output.memory


def _advance(reader: Runtime, ids_Q: Tensor, memory: Memory) -> Memory:
    """Read a segment of one stream."""
    least = max(reader.info.min_batch, memory.length_B.shape[0])
    ids_BQ = _rows(reader, ids_Q[None], least)
    memory = _widened(reader, memory, least)
    if reader.info.head == "nll":
        return reader.step(ids_BQ, torch.zeros_like(ids_BQ), memory).memory
    return reader.next_token(ids_BQ, memory).memory


def _widened(runtime: Runtime, memory: Memory, least: int) -> Memory:
    if memory.length_B.shape[0] >= least:
        return memory
    return Memory([_rows(runtime, state, least).contiguous() for state in memory.states], _rows(runtime, memory.length_B, least))


def _repeated(memory: Memory, B: int) -> Memory:
    """Return the first stream of a memory, B times."""
    states = [state[:1].expand(B, *state.shape[1:]).contiguous().clone() for state in memory.states]
    return Memory(states, memory.length_B[:1].repeat(B))
