"""Would a float16 copy of this checkpoint overflow? Runs the FP32 model over real text and compares the largest values with 65504.

The points that are looked at are the results and operands of matrix products, which are float16 in such a graph, the states, and, for
comparison, the sums that stay float32 there. What is measured is the FP32 model: a value that float16 cannot hold is found before it
becomes infinite. How far rounding moves the result is parity's question.
"""

# Shape suffixes: B batch, T tgt_len, N = B*T, Q inputs, K keys, R tokens of one tail cluster, H heads, E d_head, D d_model

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from txl_deploy.corpora import ModelData, open_corpus
from txl_deploy.manifest import Dtype
from txl_deploy.parity.rollout import random_segments, receptive_field_segments
from txl_deploy.signature import ELEMENTS
from txl_train.config import MemoryKind, ModelConfig
from txl_train.data.segments import Segment, SegmentIterator
from txl_train.errors import DataError, UsageError, ValidationError
from txl_train.model.adaptive import cluster_rows
from txl_train.model.half import LARGEST, stays_float32
from txl_train.model.inference import InferenceStep
from txl_train.model.transformer_xl import DecoderLayer, TransformerXL

log = logging.getLogger(__name__)

STREAMS = 4
"""Streams that are read at most."""
MAX_TOKENS = 4096
"""Tokens after which no further segment is read, once the memory has been full."""
MIN_TOKENS = 512
"""Tokens that are read at least, if there are so many."""
ALMOST = 0.5
"""Share of what float16 holds above which a value is warned of."""

_SMALLEST_NORMAL = float(torch.finfo(torch.float16).tiny)
_SPLITS = ("valid", "test", "train")
_CHUNK = 1 << 24


@dataclass(frozen=True)
class AuditText:
    """What the model is run on."""

    segments: list[Segment]
    """In order, of one number of streams, nothing in them padding."""
    description: dict[str, Any]
    """`kind` is "text" (with its data set, split and sha256) or "random tokens" (with the reason)."""


def audit(
    model: TransformerXL, config: ModelConfig, text: AuditText, *, tgt_len: int, memory: MemoryKind, dtype: Dtype, memory_dtype: Dtype
) -> dict[str, Any]:
    """Return the largest magnitude at each point, as plain values for `Manifest.audit`.

    `points` has one entry per kind of point: the largest value over all layers and tokens, the layer it occurs in (from 0; None where
    there are no layers), the type it has in the graph, and `headroom`, how many times larger it could be in float16 (None for 0).
    `worst` is the float16 point with least headroom, if any. `weights` is about those that become float16: the largest, and which shares of
    them become zero or lose digits (subnormal: below 6.1e-5).

    Args:
        model: in float32 and evaluation mode; it is not changed.
        config: the model's with the lengths of the export.

    Raises:
        ValidationError: a point that is float16 in the graph exceeds what float16 holds.
    """
    listener = _Listener()
    step = InferenceStep(model, tgt_len, memory, config).eval()
    with torch.inference_mode(), listener.attached(step):
        _run(step, text.segments, listener)
    for i, (term, of) in enumerate(zip(step.position_terms, model.decoder_layers())):
        listener.note("added positions" if of.adds_positions else "position keys", term, i)
    points: list[dict[str, Any]] = []
    for name, (largest, layer) in listener.found.items():
        element = ELEMENTS[memory_dtype] if name == "memory" else "float32" if name in _FLOAT32_POINTS else ELEMENTS[dtype]
        headroom = LARGEST / largest if largest > 0 else None
        points.append({"point": name, "dtype": element, "largest": largest, "layer": layer, "headroom": headroom})
    weights = _weights(model) if dtype == "fp16" else None
    in_half = [point for point in points if point["dtype"] == "float16"]
    worst = max(in_half, key=lambda point: point["largest"] if not math.isnan(point["largest"]) else math.inf, default=None)
    if worst is not None and not worst["largest"] <= LARGEST:
        option = "--memory-dtype fp32" if dtype == "fp32" or worst["point"] == "memory" else "--dtype fp32"
        raise ValidationError(
            f"In float16, {_place(worst)} would reach {worst['largest']:.4g} on {_described(text)}, but float16 ends at {LARGEST:.0f}.",
            remedy=f"Use `{option}` for this checkpoint.",
        )
    result = {"limit": LARGEST, "text": _facts(text), "points": points, "worst": worst, "weights": weights}
    if worst is not None and worst["largest"] > ALMOST * LARGEST:
        log.warning("%s: another text may not fit into float16.", line(result))
    return result


def line(result: dict[str, Any]) -> str:
    """Say in one line what `audit` has found."""
    worst, text, weights = result["worst"], result["text"], result["weights"]
    if worst is None:
        return "Nothing is in float16: there is no memory."
    source = text["kind"] if text["kind"] != "text" else f"{text['dataset']} {text['split']}"
    room = "" if worst["headroom"] is None else f", {worst['headroom']:.3g} times below float16's {result['limit']:.0f}"
    lost = (
        "" if weights is None else f"; {weights['share_zero']:.2%} of the weights become zero, {weights['share_subnormal']:.2%} subnormal"
    )
    return f"Largest value in float16 over {text['n_tokens']:,} tokens of {source}: {worst['largest']:.4g} ({_place(worst)}){room}{lost}"


def audit_text(
    model_data: ModelData, config: ModelConfig, *, tgt_len: int, dataset: str | None = None, data: Path | None = None
) -> AuditText:
    """Return text to audit on: enough to fill the memory, up to twice the receptive field, or as much as there is.

    Of the folder `data`, or what the checkpoint was trained on; where that is not on this machine, random tokens.

    Raises:
        UsageError, DataError: `data` was given and is not what its data set promises.
    """
    try:
        corpus = open_corpus(model_data, dataset=dataset, data=data)
        split, ids = next((split, ids) for split in _SPLITS if len(ids := corpus.ids(split)) > tgt_len)
        sha256 = corpus.sha256(split)
    except (UsageError, StopIteration, OSError) as error:
        if data is not None:
            if isinstance(error, UsageError):
                raise
            raise DataError(
                f"{data} has no text of more than {tgt_len} tokens to audit float16 on.", remedy="Give a longer text."
            ) from error
        reason = error.message if isinstance(error, UsageError) else "its text is too short"
        n_segments = _wanted(config, tgt_len, STREAMS)
        segments = random_segments(config, tgt_len=tgt_len, n_segments=n_segments, batch_size=STREAMS)
        return AuditText(segments, {"kind": "random tokens", "reason": reason})
    n_targets = len(ids) - 1
    streams = max(1, min(STREAMS, n_targets // (tgt_len * _wanted(config, tgt_len, STREAMS))))
    iterator = SegmentIterator(ids, batch_size=streams, tgt_len=tgt_len, ext_len=config.ext_len)
    n_segments = min(n_targets // streams // tgt_len, _wanted(config, tgt_len, streams))
    return AuditText(
        [iterator.segment(i) for i in range(n_segments)],
        {"kind": "text", "dataset": dataset or model_data.dataset, "split": split, "sha256": sha256},
    )


def _wanted(config: ModelConfig, tgt_len: int, streams: int) -> int:
    """Number of segments: twice the receptive field where `MAX_TOKENS` allow, but more than fill the memory, and `MIN_TOKENS`, at least."""
    filling = math.ceil((config.mem_len + config.ext_len) / tgt_len) + 1
    return max(
        filling,
        -(-MIN_TOKENS // (streams * tgt_len)),
        min(2 * receptive_field_segments(config, tgt_len), MAX_TOKENS // (streams * tgt_len)),
    )


_FLOAT32_POINTS = ("residual sum", "added positions")
"""Those that are float32 in every graph."""


class _Listener:
    """Keeps the largest magnitude at each kind of point, and the layer it was seen in, while it is attached to a step."""

    def __init__(self) -> None:
        self.found: dict[str, tuple[float, int | None]] = {}

    def note(self, point: str, values: Tensor, layer: int | None = None) -> None:
        """Look at the values of a point."""
        if values.numel() == 0:
            return
        low, high = values.aminmax()
        largest = max(abs(float(low)), abs(float(high)))
        before = self.found.get(point)
        if before is None or largest > before[0] or math.isnan(largest):
            self.found[point] = (largest, layer)

    @contextmanager
    def attached(self, step: InferenceStep) -> Iterator[None]:
        """Listen to `step` through hooks, which see what modules take and return; what lies between is computed once more."""
        with ExitStack() as stack:

            def before(module: nn.Module, hook: Any) -> None:
                stack.callback(module.register_forward_pre_hook(hook).remove)

            def after(module: nn.Module, hook: Any) -> None:
                stack.callback(module.register_forward_hook(hook).remove)

            scale = step.embedding.scale
            after(step.embedding, lambda _, __, x: self.note("embedding", x / scale))
            for i, layer in enumerate(step.decoder.layers):
                assert isinstance(layer, DecoderLayer)
                before(layer.attention, lambda attention, given, i=i: self._attention(attention, i, *given))
                after(layer.attention, lambda _, __, result, i=i: self._keys_and_values(i, *result))
                after(layer.attention.output, lambda _, given, out, i=i: self._pair("attention mix", given[0], "attention output", out, i))
                for norm in (layer.attention_norm, layer.feed_forward_norm):
                    before(norm, lambda _, given, i=i: self.note("residual sum", given[0], i))
                inner, outer = layer.feed_forward.inner, layer.feed_forward.outer
                after(inner, lambda _, given, out, i=i: self._pair("feed-forward input", given[0], "feed-forward inner", out, i))
                after(outer, lambda _, __, out, i=i: self.note("feed-forward outer", out, i))
            before(step.head, lambda head, given: self._head(step, *given))
            yield

    def states(self, step: InferenceStep, states: Sequence[Tensor]) -> None:
        """Look at the memory, and at what products take of a memory of hidden states."""
        for j, state in enumerate(states):
            layer = j // 2 if step.kv_memory else j
            self.note("memory", state, layer)
            if not step.kv_memory and state.numel():
                of = step.decoder.layers[layer]
                assert isinstance(of, DecoderLayer)
                if of.adds_positions:
                    state = state + step.position_terms[layer][: state.shape[1]]
                self.note("attention input", F.layer_norm(state, *_norm(of.attention_norm)) if of.pre_lnorm else state, layer)

    def _pair(self, first: str, taken: Tensor, second: str, returned: Tensor, layer: int) -> None:
        self.note(first, taken, layer)
        self.note(second, returned, layer)

    def _attention(
        self, attention: Any, layer: int, x_BQD: Tensor, memory_key: Tensor, memory_value: Tensor, position_term: Tensor, mask_B1QK: Tensor
    ) -> None:
        self.note("attention input", x_BQD, layer)
        query, key, _ = torch.chunk(F.linear(x_BQD, attention.qkv.weight), 3, dim=-1)
        self.note("query", query, layer)
        query_BQHE = query.view(*query.shape[:2], attention.n_head, attention.d_head)
        for name in ("content_bias", "position_bias"):
            if hasattr(attention, name):
                self.note(f"query with {name.replace('_', ' ')}", query_BQHE + getattr(attention, name), layer)
        key_BHKE = torch.cat([memory_key, attention.split_heads(key)], dim=2)
        # scores are a sum of two products, and each is what is left where the other's operand is zero
        content = attention.scores(query, key_BHKE, torch.zeros_like(position_term))
        position = attention.scores(query, torch.zeros_like(key_BHKE), position_term)
        unseen_B1QK = mask_B1QK < 0
        for name, scores in (("content scores", content), ("position scores", position), ("scores", content + position)):
            self.note(name, scores.masked_fill(unseen_B1QK, 0.0), layer)

    def _keys_and_values(self, layer: int, _: Tensor, key_BHKE: Tensor, value_BHKE: Tensor) -> None:
        self._pair("key", key_BHKE, "value", value_BHKE, layer)

    def _head(self, step: InferenceStep, hidden_ND: Tensor, target_ids_N: Tensor, rows: list[Tensor]) -> None:
        head = step.head
        self.note("head input", hidden_ND)
        last_BD = hidden_ND[step.tgt_len - 1 :: step.tgt_len]  # those that a head for the next token reads
        for cluster in range(head.n_cluster + 1):
            tokens = hidden_ND if cluster == 0 else torch.cat([hidden_ND.index_select(0, rows[cluster - 1]), last_BD])
            if head.has_projections:
                self.note("head projection", head.project(tokens, cluster))
            name = "logits" if head.n_cluster == 0 else "logits of the shortlist" if cluster == 0 else f"logits of cluster {cluster}"
            self.note(name, head.logits(tokens, cluster))
        if head.n_cluster:
            self.note("logits of the clusters", head.cluster_logits(hidden_ND))


def _norm(norm: nn.LayerNorm) -> tuple[tuple[int, ...], Tensor, Tensor, float]:
    return norm.normalized_shape, norm.weight, norm.bias, norm.eps


def _run(step: InferenceStep, segments: Sequence[Segment], listener: _Listener) -> None:
    memory = step.initial_memory(len(segments[0].input_ids_BT))
    states, length_B = memory
    for segment in segments:
        target_ids_BT = torch.from_numpy(segment.target_ids_BT)
        rows = cluster_rows(target_ids_BT.reshape(-1), step.head.cluster_ends)
        listener.states(step, states)
        _, length_B, states = step(torch.from_numpy(segment.input_ids_BT), target_ids_BT, rows, length_B, states)
    listener.states(step, states)


def _weights(model: TransformerXL) -> dict[str, Any]:
    """Look at the weights that become float16."""
    largest, largest_name, n, n_zero, n_subnormal = 0.0, "", 0, 0, 0
    for name, parameter in model.named_parameters():
        if stays_float32(name) or not parameter.numel():
            continue
        for part in torch.split(parameter.detach().flatten(), _CHUNK):
            magnitude = part.abs()
            top = float(magnitude.max())
            if not top <= largest:
                largest, largest_name = top, name
            rounded = magnitude.half().float()
            zero = int(((rounded == 0) & (magnitude > 0)).sum())
            n, n_zero = n + part.numel(), n_zero + zero
            n_subnormal += int(((rounded > 0) & (rounded < _SMALLEST_NORMAL)).sum())
    return {"largest": largest, "name": largest_name, "n": n, "share_zero": n_zero / max(n, 1), "share_subnormal": n_subnormal / max(n, 1)}


def _place(point: dict[str, Any]) -> str:
    return str(point["point"]) if point["layer"] is None else f"{point['point']} of layer {point['layer']}"


def _facts(text: AuditText) -> dict[str, Any]:
    streams, length = text.segments[0].target_ids_BT.shape
    return {**text.description, "n_tokens": streams * length * len(text.segments), "n_segments": len(text.segments), "n_streams": streams}


def _described(text: AuditText) -> str:
    facts = _facts(text)
    source = facts["kind"] if facts["kind"] != "text" else f"{facts['dataset']} {facts['split']}"
    return f"{facts['n_tokens']:,} tokens of {source}"
