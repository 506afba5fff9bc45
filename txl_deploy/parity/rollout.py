"""Runs two runtimes over the same tokens from a cold start, each on its own memory, and says by how much they differ.

One step in isolation proves little of a recurrent model: what it returns as memory is what the next step is computed from. So the rollout
is at least twice as long as the receptive field where the text allows, and rows of a batch are put back to a cold start at different times.
"""

# Shape suffixes: B batch, T tgt_len

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from txl_deploy.parity.tolerances import TOLERANCES, Tolerance
from txl_deploy.runtimes.base import Runtime
from txl_deploy.session import Session
from txl_train import metrics
from txl_train.config import ModelConfig
from txl_train.data.segments import Segment
from txl_train.errors import UsageError
from txl_train.files import finite

BATCH_SIZE = 3
"""Streams of a comparison: more than one, so that the batch axis counts, and odd."""


@dataclass(frozen=True, kw_only=True)
class SegmentParity:
    """How one segment compared."""

    index: int
    n_tokens: int
    mean_delta_nll: float
    """Mean of candidate minus reference, nats."""
    max_abs_delta_nll: float
    """Largest difference of one token, nats."""
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
    batch_size: int
    perplexity_reference: float
    perplexity_candidate: float
    mean_delta_nll: float
    max_abs_delta_nll: float
    worst_token: dict[str, int]
    """Segment, stream and position of the largest difference."""
    max_memory_error: float
    slope_per_segment: float
    """Trend of |mean difference| over the segments, nats per segment (least squares)."""
    tolerance: Tolerance
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
        tolerance: None takes the one for the candidate's dtype.

    Raises:
        UsageError: the two were made for different lengths, or there is no segment.
    """
    _check_same_lengths(reference, candidate)
    if not segments:
        raise UsageError("There is no segment to compare on.", remedy="Give a longer text.")
    bounds = TOLERANCES.get(candidate.info.dtype) if tolerance is None else tolerance
    if bounds is None:
        raise UsageError(f"There is no bound on the differences of {candidate.info.dtype} yet, so nothing could be judged.")
    batch_size = segments[0].input_ids_BT.shape[0]
    sessions = (Session(reference, batch_size), Session(candidate, batch_size))
    scores_targets = candidate.info.head == "nll"
    parts: list[SegmentParity] = []
    sums = np.zeros(2)
    n_tokens = 0
    worst, worst_at = 0.0, {"segment": 0, "stream": 0, "position": 0}
    for number, segment in enumerate(segments):
        resets = streams_to_reset(number, batch_size, len(segments))
        nll = [_step(session, segment, resets) for session in sessions]
        counted_BT = segment.counted_BT if scores_targets else np.ones_like(nll[0], dtype=bool)
        delta_BT = np.where(counted_BT, nll[1] - nll[0], 0.0)
        count = int(counted_BT.sum())
        magnitude_BT = np.where(np.isfinite(delta_BT), np.abs(delta_BT), np.inf)
        stream, position = np.unravel_index(int(magnitude_BT.argmax()), magnitude_BT.shape)
        if magnitude_BT[stream, position] > worst:
            worst = float(magnitude_BT[stream, position])
            worst_at = {"segment": segment.index, "stream": int(stream), "position": int(position)}
        parts.append(
            SegmentParity(
                index=segment.index,
                n_tokens=count,
                mean_delta_nll=float(delta_BT.sum()) / max(count, 1),
                max_abs_delta_nll=float(magnitude_BT.max()),
                memory_error=_memory_error(sessions[0], sessions[1]),
                reset_streams=resets,
            )
        )
        sums += [float(values[counted_BT].sum()) for values in nll]
        n_tokens += count
        if on_step is not None:
            on_step(number + 1)
    mean_reference, mean_candidate = (float(total) / max(n_tokens, 1) for total in sums)
    mean_delta = mean_candidate - mean_reference
    memory_error = max(part.memory_error for part in parts)
    passed, reason = _judge(worst, worst_at, mean_delta, memory_error, bounds)
    return ParityResult(
        passed=passed,
        reason=reason,
        reference=_describe(reference),
        candidate=_describe(candidate),
        n_segments=len(parts),
        receptive_field_segments=receptive_field_segments(reference.info.config, reference.info.tgt_len),
        n_tokens=n_tokens,
        batch_size=batch_size,
        perplexity_reference=metrics.perplexity(mean_reference),
        perplexity_candidate=metrics.perplexity(mean_candidate),
        mean_delta_nll=mean_delta,
        max_abs_delta_nll=worst,
        worst_token=worst_at,
        max_memory_error=memory_error,
        slope_per_segment=_slope([abs(part.mean_delta_nll) for part in parts]),
        tolerance=bounds,
        segments=parts,
    )


def _step(session: Session, segment: Segment, resets: list[int]) -> np.ndarray:
    """Return the nll of the targets [B, T], or of every word as the next one [B, V] where that is what the head knows."""
    if resets:
        session.reset(resets)
    info = session.runtime.info
    input_ids_BQ = torch.from_numpy(segment.input_ids_BT).to(info.device)
    if info.head != "nll":
        scores_BV = session.next_token(input_ids_BQ).to("cpu", torch.float64)
        return (scores_BV.logsumexp(dim=1, keepdim=True) - scores_BV if info.head == "logits" else -scores_BV).numpy()
    nll_BT = session.step(input_ids_BQ, torch.from_numpy(segment.target_ids_BT).to(info.device))
    return nll_BT.to("cpu", torch.float64).numpy()


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


def _judge(worst: float, worst_at: dict[str, int], mean_delta: float, memory_error: float, bounds: Tolerance) -> tuple[bool, str]:
    where = f"segment {worst_at['segment']}, stream {worst_at['stream']}, position {worst_at['position']}"
    if not worst <= bounds.token_nll:
        return False, f"a token's nll differs by {worst:.3g} nats ({where}), more than {bounds.token_nll:.0e}"
    if not abs(mean_delta) <= bounds.mean_nll:
        return False, f"the mean nll differs by {mean_delta:.3g} nats, more than {bounds.mean_nll:.0e}"
    if not memory_error <= bounds.memory:
        return False, f"the memories differ by {memory_error:.3g} of their magnitude, more than {bounds.memory:.0e}"
    worst_text = f"the worst token differs by {worst:.2g} nats (bound {bounds.token_nll:.0e})"
    return True, f"{worst_text}, the mean by {abs(mean_delta):.2g} (bound {bounds.mean_nll:.0e})"


def _slope(values: Sequence[float]) -> float:
    return float(np.polyfit(np.arange(len(values)), values, 1)[0]) if len(values) > 1 else 0.0


def _describe(runtime: Runtime) -> str:
    info = runtime.info
    return f"{info.name} ({info.provider}, {info.dtype}, {info.memory} memory) from {info.origin}"


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
