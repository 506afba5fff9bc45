"""Runs two runtimes over the same tokens from a cold start, each on its own memory, and says by how much they differ.

One step in isolation proves little of a recurrent model: what it returns as memory is what the next step is computed from. So the rollout
is at least twice as long as the receptive field where the text allows, and rows of a batch are put back to a cold start at different times.

What is compared is the nll of each target; of a runtime that scores the next token, the nll of every word as the next one. Where within
the network two differ is not known here: see `layers.py`.
"""

# Shape suffixes: B batch, T tgt_len, V vocabulary, X what is compared: T of a head of given targets, otherwise V

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from txl_deploy.parity.tolerances import Bounds, Tolerance, tolerance_for
from txl_deploy.runtimes.base import Runtime
from txl_deploy.session import Session
from txl_train import metrics
from txl_train.config import ModelConfig
from txl_train.data.segments import Segment
from txl_train.errors import UsageError
from txl_train.files import finite

BATCH_SIZE = 3
"""Streams of a comparison: more than one, so that the batch axis counts, and odd."""


Unit = Literal["token", "word"]


@dataclass(frozen=True, kw_only=True)
class SegmentParity:
    """How one segment compared."""

    index: int
    n_tokens: int
    """Tokens that are predicted: every target, or the next token of each stream."""
    mean_delta_nll: float
    """Mean of candidate minus reference, nats."""
    rms_delta_nll: float
    """Root of the mean squared difference, nats."""
    max_abs_delta_nll: float
    """Largest difference of one token, or of one word as the next token, nats."""
    memory_error: float
    """Largest difference of a state, relative to that state's largest magnitude."""
    reset_streams: list[int]
    """Streams that started anew before this segment."""


@dataclass(frozen=True, kw_only=True)
class ParityResult:
    """The verdict on a rollout, and what it rests on."""

    passed: bool
    reason: str
    """One clause: the bound that was exceeded and where, or by how much all of them were kept."""
    reference: str
    candidate: str
    n_segments: int
    receptive_field_segments: int
    """Segments after which a token no longer depends on the cold start: ceil(n_layer * mem_len / tgt_len)."""
    n_tokens: int
    """Tokens that are predicted, over which the perplexity is taken."""
    unit: Unit
    """What is compared one by one: each target token, or each word as the next token."""
    n_compared: int
    batch_size: int
    perplexity_reference: float
    perplexity_candidate: float
    mean_delta_nll: float
    rms_delta_nll: float
    max_abs_delta_nll: float
    largest_nll: float
    """Of the reference, nats: what the bounds are shares of."""
    worst_token: dict[str, int]
    """Segment, stream and position of the largest difference; of a next token the word instead of the position."""
    max_memory_error: float
    slope_per_segment: float
    """Trend of |mean difference| over the segments, nats per segment (least squares)."""
    tolerance: Bounds
    segments: list[SegmentParity]

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain values for JSON; a figure that is not finite becomes None."""
        document: dict[str, Any] = finite(asdict(self))
        return document


def receptive_field_segments(config: ModelConfig, tgt_len: int) -> int:
    """Return the number of segments a token can be influenced by through the memories of all layers (Dai et al. 2019, section 3.2)."""
    return math.ceil(config.n_layer * config.mem_len / tgt_len)


def default_segments(config: ModelConfig, tgt_len: int) -> int:
    """Return twice the receptive field, at least 4 segments."""
    return max(4, 2 * receptive_field_segments(config, tgt_len))


def random_segments(
    config: ModelConfig, *, tgt_len: int, n_segments: int = 6, batch_size: int = BATCH_SIZE, seed: int = 1
) -> list[Segment]:
    """Return segments of uniformly drawn tokens, so that every cluster of the vocabulary is met."""
    generator = np.random.default_rng(seed)
    ids_BN = generator.integers(0, config.vocab_size, (batch_size, n_segments * tgt_len + 1), dtype=np.int64)
    counted_BT = np.ones((batch_size, tgt_len), dtype=bool)
    extended_BN = np.pad(ids_BN, ((0, 0), (config.ext_len, 0)))
    segments = []
    for i in range(n_segments):
        first, end = i * tgt_len, (i + 1) * tgt_len
        input_ids_BQ, target_ids_BT = extended_BN[:, first : end + config.ext_len], ids_BN[:, first + 1 : end + 1]
        segments.append(Segment(input_ids_BQ.copy(), target_ids_BT.copy(), counted_BT, i))
    return segments


def streams_to_reset(index: int, batch_size: int, n_segments: int) -> list[int]:
    """Return the streams that start anew before segment `index`: each but the first once, spread over the first half of the rollout."""
    return [b for b in range(1, batch_size) if index == max(1, b * n_segments // (2 * batch_size))] if index > 0 else []


def compare(
    reference: Runtime,
    candidate: Runtime,
    segments: Sequence[Segment],
    *,
    tolerance: Tolerance | None = None,
    on_step: Callable[[int], None] | None = None,
) -> ParityResult:
    """Run both over `segments` and judge the differences.

    Args:
        reference: the FP32 checkpoint in eager PyTorch.
        candidate: what was exported from it, for the same lengths.
        segments: of one batch size, in order.
        tolerance: None takes the one for the candidate's dtype, head and type of states.

    Raises:
        UsageError: the two were made for different lengths, or there is no segment.
    """
    _check_same_lengths(reference, candidate)
    if not segments:
        raise UsageError("There is no segment to compare on.", remedy="Give a longer text.")
    info = candidate.info
    chosen = tolerance_for(info.dtype, info.head, info.memory_dtype) if tolerance is None else tolerance
    if chosen is None:
        raise UsageError(f"There is no bound on the differences of {info.dtype} yet, so nothing could be judged.")
    unit: Unit = "token" if info.head == "nll" else "word"
    batch_size = segments[0].input_ids_BT.shape[0]
    sessions = (Session(reference, batch_size), Session(candidate, batch_size))
    parts: list[SegmentParity] = []
    totals = _Totals()
    worst, worst_at = 0.0, {"segment": 0, "stream": 0, "position" if unit == "token" else "word": 0}
    for number, segment in enumerate(segments):
        resets = streams_to_reset(number, batch_size, len(segments))
        ours, theirs = (_step(session, segment, resets) for session in sessions)
        compared_BX = segment.counted_BT if unit == "token" else np.ones_like(ours.nll_BX, dtype=bool)
        delta_BX = np.where(compared_BX, theirs.nll_BX - ours.nll_BX, 0.0)
        magnitude_BX = np.where(np.isfinite(delta_BX), np.abs(delta_BX), np.inf)
        stream, position = np.unravel_index(int(magnitude_BX.argmax()), magnitude_BX.shape)
        if magnitude_BX[stream, position] > worst:
            worst = float(magnitude_BX[stream, position])
            worst_at = dict(zip(worst_at, (segment.index, int(stream), int(position))))
        count = max(int(compared_BX.sum()), 1)
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is judged as infinite
            squares = float((delta_BX**2).sum())
        parts.append(
            SegmentParity(
                index=segment.index,
                n_tokens=int(ours.scored_BT.sum()),
                mean_delta_nll=float(delta_BX.sum()) / count,
                rms_delta_nll=math.sqrt(squares / count) if math.isfinite(squares) else math.inf,
                max_abs_delta_nll=float(magnitude_BX.max()),
                memory_error=_memory_error(sessions[0], sessions[1]),
                reset_streams=resets,
            )
        )
        totals.add(ours, theirs, compared_BX, float(delta_BX.sum()), squares)
        if on_step is not None:
            on_step(number + 1)
    mean_delta, rms_delta = totals.delta / max(totals.n_compared, 1), totals.rms()
    n_compared = max(totals.n_compared, 1)
    spread = math.sqrt(max(rms_delta**2 - mean_delta**2, 0.0)) if math.isfinite(rms_delta) else math.inf  # a shift of all is no noise
    noise = spread / math.sqrt(n_compared)
    bounds = chosen.bounds(largest_nll=totals.largest_nll, mean_nll=totals.compared_nll / n_compared, noise=noise)
    memory_error = max(part.memory_error for part in parts)
    passed, reason = _judge(worst, worst_at, rms_delta, mean_delta, memory_error, bounds, unit)
    return ParityResult(
        passed=passed,
        reason=reason,
        reference=_describe(reference),
        candidate=_describe(candidate),
        n_segments=len(parts),
        receptive_field_segments=receptive_field_segments(reference.info.config, reference.info.tgt_len),
        n_tokens=totals.n_tokens,
        unit=unit,
        n_compared=totals.n_compared,
        batch_size=batch_size,
        perplexity_reference=metrics.perplexity(totals.nll_reference / max(totals.n_tokens, 1)),
        perplexity_candidate=metrics.perplexity(totals.nll_candidate / max(totals.n_tokens, 1)),
        mean_delta_nll=mean_delta,
        rms_delta_nll=rms_delta,
        max_abs_delta_nll=worst,
        largest_nll=totals.largest_nll,
        worst_token=worst_at,
        max_memory_error=memory_error,
        slope_per_segment=_slope([abs(part.mean_delta_nll) for part in parts]),
        tolerance=bounds,
        segments=parts,
    )


@dataclass(frozen=True)
class _Scores:
    """What one side says of one segment."""

    nll_BX: npt.NDArray[np.float64]
    """All that is compared: of each target, or of each word as the next token."""
    scored_nll: float
    """Sum over the tokens that really come, nats."""
    scored_BT: npt.NDArray[np.bool_]
    """Which those are: [B, T], or [B, 1] of the next token."""


@dataclass
class _Totals:
    """Sums over the rollout."""

    n_tokens: int = 0
    n_compared: int = 0
    nll_reference: float = 0.0
    nll_candidate: float = 0.0
    compared_nll: float = 0.0
    largest_nll: float = 0.0
    delta: float = 0.0
    squares: float = 0.0

    def add(self, ours: _Scores, theirs: _Scores, compared_BX: npt.NDArray[np.bool_], delta: float, squares: float) -> None:
        compared = ours.nll_BX[compared_BX]
        self.n_tokens += int(ours.scored_BT.sum())
        self.n_compared += compared.size
        self.nll_reference += ours.scored_nll
        self.nll_candidate += theirs.scored_nll
        self.compared_nll += float(compared.sum())
        self.largest_nll = max(self.largest_nll, float(compared.max(initial=0.0)))
        self.delta += delta
        self.squares += squares

    def rms(self) -> float:
        mean = self.squares / max(self.n_compared, 1)
        return math.sqrt(mean) if math.isfinite(mean) else math.inf


def _step(session: Session, segment: Segment, resets: list[int]) -> _Scores:
    if resets:
        session.reset(resets)
    info = session.runtime.info
    input_ids_BQ = torch.from_numpy(segment.input_ids_BT).to(info.device)
    if info.head == "nll":
        nll_BT = session.step(input_ids_BQ, torch.from_numpy(segment.target_ids_BT).to(info.device)).to("cpu", torch.float64).numpy()
        return _Scores(nll_BT, float(nll_BT[segment.counted_BT].sum()), segment.counted_BT)
    scores_BV = session.next_token(input_ids_BQ).to("cpu", torch.float64)
    nll_BV = (scores_BV.logsumexp(dim=1, keepdim=True) - scores_BV if info.head == "logits" else -scores_BV).numpy()
    next_B1, counted_B1 = segment.target_ids_BT[:, -1:], segment.counted_BT[:, -1:]
    return _Scores(nll_BV, float(np.take_along_axis(nll_BV, next_B1, axis=1)[counted_B1].sum()), counted_B1)


def _memory_error(reference: Session, candidate: Session) -> float:
    """Return the largest difference of a state relative to its magnitude; infinite for another valid length or kind of memory."""
    if reference.runtime.info.memory != candidate.runtime.info.memory:
        return 0.0  # two kinds of memory are compared by what is computed from them
    ours, theirs = reference.memory, candidate.memory
    if not torch.equal(ours.length_B.cpu(), theirs.length_B.cpu()):
        return math.inf
    error = 0.0
    for a, b in zip(ours.states, theirs.states):
        if a.numel():
            a, b = a.float().cpu(), b.float().cpu()
            difference = (a - b).abs().max() / a.abs().max().clamp(min=1e-12)
            error = max(error, float(difference)) if math.isfinite(float(difference)) else math.inf
    return error


def _judge(
    worst: float, worst_at: dict[str, int], rms: float, mean_delta: float, memory_error: float, bounds: Bounds, unit: Unit
) -> tuple[bool, str]:
    where = ", ".join(f"{name} {number}" for name, number in worst_at.items())
    whose = "a token's nll" if unit == "token" else "a word's nll as the next token"
    if not worst <= bounds.token_nll:
        return False, f"{whose} differs by {worst:.3g} nats ({where}), more than {bounds.token_nll:.1e}"
    if not rms <= bounds.rms_nll:
        return False, f"the {unit}s' nll differ by {rms:.3g} nats (root mean square), more than {bounds.rms_nll:.1e}"
    if not abs(mean_delta) <= bounds.mean_nll:
        return False, f"the mean nll differs by {mean_delta:.3g} nats, more than {bounds.mean_nll:.1e}"
    if not memory_error <= bounds.memory:
        return False, f"the memories differ by {memory_error:.3g} of their magnitude, more than {bounds.memory:.1e}"
    worst_text = f"the worst {unit} differs by {worst:.2g} nats (bound {bounds.token_nll:.1e})"
    rms_text = f"all of them by {rms:.2g} (root mean square; bound {bounds.rms_nll:.1e})"
    return True, f"{worst_text}, {rms_text}, the mean by {abs(mean_delta):.2g} (bound {bounds.mean_nll:.1e})"


def _slope(values: Sequence[float]) -> float:
    return float(np.polyfit(np.arange(len(values)), values, 1)[0]) if len(values) > 1 else 0.0


def _describe(runtime: Runtime) -> str:
    info = runtime.info
    computed = f" computed in {info.compute}" if info.compute not in ("", info.dtype) else ""
    return f"{info.name} ({info.provider}, {info.dtype}{computed}, {info.memory} memory in {info.memory_dtype}) from {info.origin}"


def _check_same_lengths(reference: Runtime, candidate: Runtime) -> None:
    ours, theirs = reference.info, candidate.info
    differing = [
        f"{name} {a} and {b}"
        for name, a, b in (
            ("tgt_len", ours.tgt_len, theirs.tgt_len),
            ("mem_len", ours.mem_len, theirs.mem_len),
            ("clamp_len", ours.config.clamp_len, theirs.config.clamp_len),
            ("same_length", ours.config.max_distance, theirs.config.max_distance),
            ("vocab_size", ours.config.vocab_size, theirs.config.vocab_size),
            ("head", ours.head, theirs.head),
        )
        if a != b
    ]
    if differing:
        raise UsageError(
            f"The two were made for different models or lengths: {'; '.join(differing)}.", remedy="Export the checkpoint again."
        )
