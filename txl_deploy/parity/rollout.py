"""Runs two runtimes over the same tokens from a cold start, each on its own memory, and says by how much they differ.

One step in isolation proves little of a recurrent model: what it returns as memory is what the next step is computed from. So the rollout
is at least twice as long as the receptive field where the text allows, and rows of a batch start, start anew and end at different times.

What is compared is the nll of each target; of a runtime that scores the next token, the nll of every word as the next one. When rows
run is `schedule`'s business, what the differences mean `judgement`'s; where within the network two differ is not known here: see `layers`.
"""

# Shape suffixes: B batch, M mem_len, T tgt_len, V vocabulary, X what is compared: T of a head of given targets, otherwise V

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from txl_deploy.bootstrap import abs_mean_bound
from txl_deploy.parity.distribution import Asked, Distribution, ask, check_can_ask, compare_all_words, segments_to_ask
from txl_deploy.parity.judgement import Figures, Unit, judge
from txl_deploy.parity.schedule import Turn, schedule
from txl_deploy.parity.tolerances import Bounds, Tolerance, tolerance_for
from txl_deploy.parity.trend import FEWEST_SEGMENTS, Trend, trend
from txl_deploy.runtimes.base import Runtime
from txl_deploy.session import Session
from txl_train import metrics
from txl_train.config import MemoryKind, ModelConfig
from txl_train.data.segments import Segment
from txl_train.errors import UsageError
from txl_train.files import finite

BATCH_SIZE = 3
"""Streams of a comparison: more than one, so that the batch axis counts, and odd."""

DISTRIBUTION_SEGMENTS = 16
"""Segments at which `txl parity` compares whole distributions: each costs a dozen steps more."""

TREND_SEGMENTS = FEWEST_SEGMENTS + 4
"""Segments after the receptive field in a rollout of the default length."""


@dataclass(frozen=True, kw_only=True)
class SegmentParity:
    """How one segment compared."""

    index: int
    n_tokens: int
    """Tokens that are predicted: every target, or the next token of each stream."""
    n_compared: int
    reference_nll_sum: float
    """Over all that is compared, nats."""
    candidate_nll_sum: float
    mean_delta_nll: float
    """Mean of candidate minus reference, nats."""
    rms_delta_nll: float
    """Root of the mean squared difference, nats."""
    max_abs_delta_nll: float
    """Largest difference of one token, or of one word as the next token, nats."""
    memory_error: float
    """Largest difference of a state, relative to that state's largest magnitude."""
    memory_error_by_layer: list[float]
    """The same for each layer; empty where the memories are of two kinds."""
    reset_streams: list[int]
    """Streams that started, or started anew, before this segment."""
    live_streams: list[int]
    """Streams that score anything in this segment: they start and end at different times."""
    settled_rms_delta_nll: float | None
    """Root mean square over the streams whose memory is full, nats: what the trend is of. None where there is none."""


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
    upper_bound_mean_nll: float
    """What |mean difference| stays below with 95 % confidence, nats, by a block bootstrap over the segments: what is judged."""
    rms_delta_nll: float
    max_abs_delta_nll: float
    largest_nll: float
    """Of the reference, nats: what the bounds are shares of."""
    worst_token: dict[str, int]
    """Segment, stream and position of the largest difference; of a next token the word instead of the position."""
    max_memory_error: float
    memory_error_by_layer: list[float]
    """The largest of each layer; empty where the memories are of two kinds."""
    slope_per_segment: float
    """Slope of |mean difference| over all segments, nats per segment (least squares). Not judged: see `trend`."""
    trend: Trend
    """Whether the differences grow once memories are full."""
    distribution: Distribution | None
    """How the predictions of all words compared; None if that was not asked for."""
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
    """Return twice the receptive field, and enough segments with a full memory for a trend to be judged."""
    field = receptive_field_segments(config, tgt_len)
    return max(2 * field, field + TREND_SEGMENTS)


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


def compare(
    reference: Runtime,
    candidate: Runtime,
    segments: Sequence[Segment],
    *,
    tolerance: Tolerance | None = None,
    distribution_segments: int = 0,
    on_step: Callable[[int], None] | None = None,
) -> ParityResult:
    """Run both over `segments` and judge the differences.

    Args:
        reference: the FP32 checkpoint in eager PyTorch.
        candidate: what was exported from it, for the same lengths.
        segments: of one batch size, in order. Rows start, start anew and end at different times: see `schedule`.
        tolerance: None takes the one for the candidate's dtype, head and type of states.
        distribution_segments: segments at which the predictions of all words are compared too. A runtime that scores given targets then
            runs these a dozen times more, from the memory before them, after its own step.
        on_step: called with the number of segments done.

    Raises:
        UsageError: the two were made for different lengths, there is no segment, or the reference cannot yield distributions.
    """
    _check_same_lengths(reference, candidate)
    if not segments:
        raise UsageError("There is no segment to compare on.", remedy="Give a longer text.")
    info = candidate.info
    chosen = tolerance_for(info.dtype, info.head, info.memory_dtype) if tolerance is None else tolerance
    if chosen is None:
        raise UsageError(f"There is no bound on the differences of {info.dtype} yet, so nothing could be judged.")
    if distribution_segments > 0:
        check_can_ask(reference, candidate)
    unit: Unit = "token" if info.head == "nll" else "word"
    batch_size = segments[0].input_ids_BT.shape[0]
    field = receptive_field_segments(reference.info.config, reference.info.tgt_len)
    asked_at = segments_to_ask(len(segments), distribution_segments)
    asked = Asked(exact=unit == "word")
    sessions = (Session(reference, batch_size, checked=False), Session(candidate, batch_size, checked=False))
    parts: list[SegmentParity] = []
    totals = _Totals()
    worst, worst_at = 0.0, {"segment": 0, "stream": 0, "position" if unit == "token" else "word": 0}
    for number, turn in enumerate(schedule(segments)):
        segment = turn.segment
        for session in sessions:
            session.reset(turn.resets)
        before = (sessions[0].memory, sessions[1].memory)
        ours, theirs = (_step(session, segment) for session in sessions)
        compared_BX = segment.counted_BT if unit == "token" else np.broadcast_to(segment.counted_BT[:, -1:], ours.nll_BX.shape)
        with np.errstate(invalid="ignore"):
            delta_BX = np.where(compared_BX, theirs.nll_BX - ours.nll_BX, 0.0)
        magnitude_BX = np.where(np.isfinite(delta_BX), np.abs(delta_BX), np.inf)
        stream, position = np.unravel_index(int(magnitude_BX.argmax()), magnitude_BX.shape)
        if magnitude_BX[stream, position] > worst:
            worst = float(magnitude_BX[stream, position])
            worst_at = dict(zip(worst_at, (segment.index, int(stream), int(position))))
        by_layer = _memory_errors(sessions[0], sessions[1], turn)
        settled_BX = compared_BX & (turn.age_B >= field)[:, None]
        totals.add(ours, theirs, compared_BX, delta_BX)
        count = max(int(compared_BX.sum()), 1)
        parts.append(
            SegmentParity(
                index=segment.index,
                n_tokens=int(ours.scored_BT.sum()),
                n_compared=int(compared_BX.sum()),
                reference_nll_sum=float(ours.nll_BX[compared_BX].sum()),
                candidate_nll_sum=float(theirs.nll_BX[compared_BX].sum()),
                mean_delta_nll=float(delta_BX.sum()) / count,
                rms_delta_nll=_rms(delta_BX[compared_BX]),
                max_abs_delta_nll=float(magnitude_BX.max()),
                memory_error=max(by_layer, default=0.0),
                memory_error_by_layer=by_layer,
                reset_streams=turn.resets,
                live_streams=np.flatnonzero(turn.live_B).tolist(),
                settled_rms_delta_nll=_rms(delta_BX[settled_BX]) if settled_BX.any() else None,
            )
        )
        if number in asked_at and unit == "word":
            live_B = segment.counted_BT[:, -1]
            compare_all_words(asked, ours.nll_BX[live_B], theirs.nll_BX[live_B])
        elif number in asked_at:
            ask(asked, reference, candidate, segment, before, seed=number)
        if on_step is not None:
            on_step(number + 1)
    n_compared = max(totals.n_compared, 1)
    bounds = chosen.bounds(largest_nll=totals.largest_nll, mean_nll=totals.compared_nll / n_compared, n_compared=n_compared)
    by_layer = [max(errors) for errors in zip(*(part.memory_error_by_layer for part in parts))]
    settled = [part for part in parts if part.settled_rms_delta_nll is not None]
    figures = Figures(
        worst=worst,
        worst_at=worst_at,
        unit=unit,
        rms=totals.rms(),
        mean=totals.delta / n_compared,
        upper_bound_mean=_upper_bound(parts),
        memory=max(by_layer, default=0.0),
        distribution=asked.result(),
        trend=trend(
            [part.settled_rms_delta_nll for part in settled if part.settled_rms_delta_nll is not None],
            [part.memory_error for part in settled] if by_layer else None,
            rms_bound=bounds.rms_nll,
            memory_bound=bounds.memory,
        ),
    )
    passed, reason = judge(figures, bounds)
    return ParityResult(
        passed=passed,
        reason=reason,
        reference=_describe(reference),
        candidate=_describe(candidate),
        n_segments=len(parts),
        receptive_field_segments=field,
        n_tokens=totals.n_tokens,
        unit=unit,
        n_compared=totals.n_compared,
        batch_size=batch_size,
        perplexity_reference=metrics.perplexity(totals.nll_reference / max(totals.n_tokens, 1)),
        perplexity_candidate=metrics.perplexity(totals.nll_candidate / max(totals.n_tokens, 1)),
        mean_delta_nll=figures.mean,
        upper_bound_mean_nll=figures.upper_bound_mean,
        rms_delta_nll=figures.rms,
        max_abs_delta_nll=worst,
        largest_nll=totals.largest_nll,
        worst_token=worst_at,
        max_memory_error=figures.memory,
        memory_error_by_layer=by_layer,
        slope_per_segment=_slope([abs(part.mean_delta_nll) for part in parts]),
        trend=figures.trend,
        distribution=figures.distribution,
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

    def add(self, ours: _Scores, theirs: _Scores, compared_BX: npt.NDArray[np.bool_], delta_BX: npt.NDArray[np.float64]) -> None:
        compared = ours.nll_BX[compared_BX]
        self.n_tokens += int(ours.scored_BT.sum())
        self.n_compared += compared.size
        self.nll_reference += ours.scored_nll
        self.nll_candidate += theirs.scored_nll
        self.compared_nll += float(compared.sum())
        self.largest_nll = max(self.largest_nll, float(compared.max(initial=0.0)))
        self.delta += float(delta_BX.sum())
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is judged as infinite
            self.squares += float((delta_BX**2).sum())

    def rms(self) -> float:
        mean = self.squares / max(self.n_compared, 1)
        return math.sqrt(mean) if math.isfinite(mean) else math.inf


def _step(session: Session, segment: Segment) -> _Scores:
    info = session.runtime.info
    input_ids_BQ = torch.from_numpy(segment.input_ids_BT).to(info.device)
    if info.head == "nll":
        nll_BT = session.step(input_ids_BQ, torch.from_numpy(segment.target_ids_BT).to(info.device)).to("cpu", torch.float64).numpy()
        return _Scores(nll_BT, float(nll_BT[segment.counted_BT].sum()), segment.counted_BT)
    scores_BV = session.next_token(input_ids_BQ).to("cpu", torch.float64)
    nll_BV = (scores_BV.logsumexp(dim=1, keepdim=True) - scores_BV if info.head == "logits" else -scores_BV).numpy()
    next_B1, counted_B1 = segment.target_ids_BT[:, -1:], segment.counted_BT[:, -1:]
    return _Scores(nll_BV, float(np.take_along_axis(nll_BV, next_B1, axis=1)[counted_B1].sum()), counted_B1)


def _rms(delta: npt.NDArray[np.float64]) -> float:
    with np.errstate(over="ignore", invalid="ignore"):
        mean = float((delta**2).mean()) if delta.size else 0.0
    return math.sqrt(mean) if math.isfinite(mean) else math.inf


def _upper_bound(parts: Sequence[SegmentParity]) -> float:
    """Return what |mean difference| stays below with 95 % confidence, nats: the further end of the interval of both one-sided tests."""
    kept = [part for part in parts if part.n_compared > 0]
    sums = [part.mean_delta_nll * part.n_compared for part in kept]
    return abs_mean_bound(sums, [float(part.n_compared) for part in kept]) if kept and all(map(math.isfinite, sums)) else math.inf


def _memory_errors(reference: Session, candidate: Session, turn: Turn) -> list[float]:
    """Return the largest difference of each layer's states relative to a state's magnitude, over what is filled of rows without padding.

    Infinite for another valid length; empty for another kind of memory, which is compared by what is computed from it.
    """
    info = reference.runtime.info
    if info.memory != candidate.runtime.info.memory:
        return []
    n_layer, config = info.config.n_layer, info.config
    ours, theirs = reference.memory, candidate.memory
    whole_B = torch.from_numpy(turn.whole_B)
    length_B = ours.length_B.cpu()
    if not torch.equal(length_B[whole_B], theirs.length_B.cpu()[whole_B]):
        return [math.inf] * n_layer
    filled_B = (length_B - config.ext_len).clamp(0, config.mem_len)
    filled_BM = (torch.arange(config.mem_len) >= config.mem_len - filled_B[:, None]) & whole_B[:, None]
    errors = [_state_error(a, b, filled_BM, info.memory) for a, b in zip(ours.states, theirs.states, strict=True)]
    each = len(errors) // n_layer
    return [max(errors[i * each : (i + 1) * each]) for i in range(n_layer)]


def _state_error(ours: Tensor, theirs: Tensor, filled_BM: Tensor, kind: MemoryKind) -> float:
    a, b = (state.float().cpu() for state in (ours, theirs))
    if kind == "kv":  # [B, H, M, E]
        a, b = a.transpose(1, 2), b.transpose(1, 2)
    a, b = a[filled_BM], b[filled_BM]
    if not a.numel():
        return 0.0
    error = float((a - b).abs().max() / a.abs().max().clamp(min=1e-12))
    return error if math.isfinite(error) else math.inf


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
