"""Transformer-XL as the paper writes it: one number at a time, in float64, with NumPy. The oracle of the numerical tests.

Source: Dai et al. 2019, "Transformer-XL: Attentive Language Models Beyond a Fixed-Length Context", section 3.3 (arXiv 1901.02860);
adaptive embedding and softmax: Grave et al. 2017 and Baevski & Auli 2019. What the papers leave open follows NVIDIA's code. So do the
other kinds of positions: Shaw et al. 2018 (a vector and a bias per distance), Vaswani et al. 2017 (sinusoids added to the embeddings) and
Al-Rfou et al. 2018 (learned vectors added to the input of each layer); but memories are kept without positions and get them at use.

Slow on purpose. Each score is computed for one query, one key and one head from the paper's four terms, at their distance; the paper's
Appendix B (the shift that saves time) is not used. Streams are computed one after the other; their memories begin empty and may differ
in length. Every nll is read from a whole distribution. Knows the settings and the names of the parameters, nothing of the model it judges.

Shape suffixes: B batch, T tokens of the segment, Q tokens of the input (the segment and what is read once more before it), M positions in
the memory (0 at a cold start), K = M + Q keys, H heads, E d_head, D d_model, V vocabulary, N all positions of one stream.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from txl_train.config import ModelConfig

Floats: TypeAlias = npt.NDArray[np.float64]
Ids: TypeAlias = npt.NDArray[np.int64]
Parameters: TypeAlias = Mapping[str, npt.NDArray[Any]]
Weights: TypeAlias = dict[str, Floats]
"""The parameters, in float64."""
Memory: TypeAlias = list[list[Floats]]
"""memory[layer][stream] is [M, D]: the inputs that layer has seen last, oldest first."""

LAYER_NORM_EPS = 1e-5


def naive_forward(
    config: ModelConfig, parameters: Parameters, input_ids_BQ: Ids, memory: Memory | None = None, tgt_len: int | None = None
) -> tuple[Floats, Memory]:
    """Return what enters the softmax, [B, T, D], and the memory after the segment. No memory means a cold start.

    The segment is the last `tgt_len` tokens of the input (default: all of it); those before it are read once more, at most
    `ext_len`, fewer where the stream has begun just before.
    """
    weights = _as_float64(parameters)
    B, Q = input_ids_BQ.shape
    T = Q if tgt_len is None else tgt_len
    if memory is None:
        memory = empty_memory(config, B)
    hidden_BTD = np.zeros((B, T, config.d_model))
    new_memory: Memory = [[] for _ in range(config.n_layer)]
    for b in range(B):
        x_QD = np.array([_embed(config, weights, int(token)) for token in input_ids_BQ[b]])
        for layer in range(config.n_layer):
            new_memory[layer].append(_remembered(config, memory[layer][b], x_QD))
            x_QD = _layer(config, weights, layer, x_QD, memory[layer][b])
        hidden_BTD[b] = x_QD[Q - T :]
    return hidden_BTD, new_memory


def _remembered(config: ModelConfig, past_MD: Floats, x_QD: Floats) -> Floats:
    """Return the memory after the input: it ends where the next input begins, `ext_len` tokens before this one's end."""
    end = len(past_MD) + max(0, len(x_QD) - config.ext_len)
    return np.concatenate([past_MD, x_QD])[max(0, end - config.mem_len) : end]


def naive_nll(config: ModelConfig, parameters: Parameters, hidden_BTD: Floats, target_ids_BT: Ids) -> Floats:
    """Return -log p(target), [B, T], nats, in token order."""
    weights = _as_float64(parameters)
    B, T = target_ids_BT.shape
    nll_BT = np.zeros((B, T))
    for b in range(B):
        for t in range(T):
            log_probs_V = naive_log_probs(config, weights, hidden_BTD[b, t])
            nll_BT[b, t] = -log_probs_V[target_ids_BT[b, t]]
    return nll_BT


def naive_log_probs(config: ModelConfig, parameters: Parameters, hidden_D: Floats) -> Floats:
    """Return log p of every token, [V], nats.

    The head is one softmax over the frequent words and, behind them, one column per tail cluster in order. A word of a tail cluster
    has the probability of its cluster times its probability within the cluster.
    """
    weights = _as_float64(parameters)
    n_tail = len(config.cutoffs)
    into_head = _project_hidden(config, weights, hidden_D, 0)
    word_logits = _head_weights(config, weights, 0) @ into_head + weights["head.biases.0"]
    shortlist = len(word_logits)
    if n_tail == 0:
        return _log_softmax(word_logits)
    cluster_logits = weights["head.cluster_weight"] @ into_head + weights["head.cluster_bias"]
    head_log_probs = _log_softmax(np.concatenate([word_logits, cluster_logits]))
    parts = [head_log_probs[:shortlist]]
    for i in range(1, n_tail + 1):
        into_tail = _project_hidden(config, weights, hidden_D, i)
        tail_logits = _head_weights(config, weights, i) @ into_tail + weights[f"head.biases.{i}"]
        parts.append(head_log_probs[shortlist + i - 1] + _log_softmax(tail_logits))
    return np.concatenate(parts)


def empty_memory(config: ModelConfig, batch_size: int) -> Memory:
    """Return the memory of a cold start: nothing, rather than zeros."""
    return [[np.zeros((0, config.d_model)) for _ in range(batch_size)] for _ in range(config.n_layer)]


# One layer


def _layer(config: ModelConfig, weights: Weights, layer: int, x_TD: Floats, past_MD: Floats) -> Floats:
    prefix = f"layers.{layer}"
    past_MD = _at_positions(config, weights, layer, past_MD, from_end=len(past_MD) + len(x_TD) - 1)
    x_TD = _at_positions(config, weights, layer, x_TD, from_end=len(x_TD) - 1)
    if config.pre_lnorm:  # the keys' inputs are normalised too; the memory itself is kept as it was
        keys_MD = _layer_norm(weights, f"{prefix}.attention_norm", past_MD)
        x_TD = x_TD + attend(config, weights, layer, _layer_norm(weights, f"{prefix}.attention_norm", x_TD), keys_MD)
        return x_TD + _feed_forward(weights, prefix, _layer_norm(weights, f"{prefix}.feed_forward_norm", x_TD))
    x_TD = _layer_norm(weights, f"{prefix}.attention_norm", x_TD + attend(config, weights, layer, x_TD, past_MD))
    return _layer_norm(weights, f"{prefix}.feed_forward_norm", x_TD + _feed_forward(weights, prefix, x_TD))


def _at_positions(config: ModelConfig, weights: Weights, layer: int, x_ND: Floats, from_end: int) -> Floats:
    """Add what the layer adds to its inputs for their places; the first is `from_end` tokens before the last token of all."""
    placed_ND = x_ND.copy()
    for n in range(len(x_ND)):
        if config.attn_type == "sinusoidal" and layer == 0:
            placed_ND[n] += encode_distance(config, from_end - n)
        if config.attn_type == "learned":
            placed_ND[n] += weights[f"layers.{layer}.attention.position_embedding"][learned_row(config, from_end - n)]
    return placed_ND


def attend(config: ModelConfig, weights: Weights, layer: int, x_TD: Floats, past_MD: Floats) -> Floats:
    """Attention of one stream's tokens over its memory and itself, score by score."""
    H, E = config.n_head, config.d_head
    T, M = len(x_TD), len(past_MD)
    all_ND = np.concatenate([past_MD, x_TD])
    query_weight, key_weight, value_weight = np.split(weights[f"layers.{layer}.attention.qkv.weight"], 3)
    query_NHE = (all_ND @ query_weight.T).reshape(-1, H, E)
    key_NHE = (all_ND @ key_weight.T).reshape(-1, H, E)
    value_NHE = (all_ND @ value_weight.T).reshape(-1, H, E)
    key_by_distance = [_key_of_distance(config, weights, layer, distance) for distance in range(M + T)]

    attended_THE = np.zeros((T, H, E))
    for t in range(T):
        here = M + t
        distances = [distance for distance in range(here + 1) if is_visible(config, distance)]
        for h in range(H):
            scores = np.zeros(len(distances))
            for n, distance in enumerate(distances):
                q, k = query_NHE[here, h], key_NHE[here - distance, h]
                scores[n] = _score(config, weights, layer, h, q, k, key_by_distance[distance][h], distance) / math.sqrt(E)
            attention = np.exp(_log_softmax(scores))
            for share, distance in zip(attention, distances, strict=True):
                attended_THE[t, h] += share * value_NHE[here - distance, h]
    attended_TD: Floats = attended_THE.reshape(T, H * E) @ weights[f"layers.{layer}.attention.output.weight"].T
    return attended_TD


def _key_of_distance(config: ModelConfig, weights: Weights, layer: int, distance: int) -> Floats:
    """Return what a query's content is compared with for a distance, [H, E]."""
    if config.attn_type == "relative":
        r_HE: Floats = weights[f"layers.{layer}.attention.position.weight"] @ encode_distance(config, distance)
        return r_HE.reshape(config.n_head, config.d_head)
    if config.attn_type == "shaw":
        return weights[f"layers.{layer}.attention.distance_keys"][learned_row(config, distance)]
    return np.zeros((config.n_head, config.d_head))  # positions are in the inputs


def _score(config: ModelConfig, weights: Weights, layer: int, h: int, q: Floats, k: Floats, r: Floats, distance: int) -> float:
    """Return the score of a key in head `h` by the paper's formula for A^rel, term by term; other kinds leave terms out or learn them."""
    prefix = f"layers.{layer}.attention"
    a = q @ k  # content of the query with content of the key
    b = q @ r  # content of the query with the distance
    if config.attn_type in ("sinusoidal", "learned"):
        return float(a)
    owner = f"{prefix}." if config.untie_biases or config.attn_type == "shaw" else ""
    c = weights[f"{owner}content_bias"][h] @ k  # what every query asks of the key's content
    if config.attn_type == "shaw":
        d = weights[f"{prefix}.distance_bias"][learned_row(config, distance), h]
    else:
        d = weights[f"{owner}position_bias"][h] @ r  # what every query asks of the distance
    return float(a + b + c + d)


def learned_row(config: ModelConfig, distance: int) -> int:
    """Return the row of a learned table for a distance: the last is 0, and the farthest is all beyond. `clamp_len` uses so many rows."""
    rows_in_use = config.position_rows if config.clamp_len is None else min(config.position_rows, config.clamp_len)
    return config.position_rows - 1 - min(distance, rows_in_use - 1)


def is_visible(config: ModelConfig, distance: int) -> bool:
    """Say whether a query may attend to the key `distance` positions before it (0: itself)."""
    if distance < 0:
        return False
    if not config.same_length:
        return True  # as far as the memory goes
    n_keys = {"mem_len+1": config.mem_len + 1, "mem_len": config.mem_len}[config.same_length_rule]
    return distance < n_keys


def encode_distance(config: ModelConfig, distance: int) -> Floats:
    """Return the sinusoids of a distance, [D]: all sines, then all cosines. From `clamp_len` on all distances look alike."""
    if config.clamp_len is not None:
        distance = min(distance, config.clamp_len)
    half = config.d_model // 2
    angles = [distance / 10000 ** (2 * i / config.d_model) for i in range(half)]
    return np.array([math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles])


def _feed_forward(weights: Weights, prefix: str, x_TD: Floats) -> Floats:
    inner = x_TD @ weights[f"{prefix}.feed_forward.inner.weight"].T + weights[f"{prefix}.feed_forward.inner.bias"]
    outer: Floats = np.maximum(inner, 0.0) @ weights[f"{prefix}.feed_forward.outer.weight"].T
    return outer + weights[f"{prefix}.feed_forward.outer.bias"]


def _layer_norm(weights: Weights, name: str, x_ND: Floats) -> Floats:
    mean = x_ND.mean(axis=-1, keepdims=True)
    variance = ((x_ND - mean) ** 2).mean(axis=-1, keepdims=True)
    normalised: Floats = (x_ND - mean) / np.sqrt(variance + LAYER_NORM_EPS)
    return normalised * weights[f"{name}.weight"] + weights[f"{name}.bias"]


# Into the layers and out of them


def _embed(config: ModelConfig, weights: Weights, token: int) -> Floats:
    ends = [0, *config.cutoffs, config.vocab_size]
    for i, (low, high) in enumerate(itertools.pairwise(ends)):
        if low <= token < high:
            embedded: Floats = weights[f"embedding.weights.{i}"][token - low]
            if _has_projections(config):
                embedded = _embedding_projection(config, weights, i) @ embedded
            return embedded * math.sqrt(config.d_model)
    raise IndexError(f"token {token} is outside the vocabulary of {config.vocab_size}")


def _project_hidden(config: ModelConfig, weights: Weights, hidden_D: Floats, cluster: int) -> Floats:
    if not _has_projections(config):
        return hidden_D
    if config.projection_is_tied(cluster):
        return hidden_D @ _embedding_projection(config, weights, cluster)
    return hidden_D @ weights[f"head.projections.{cluster}"]


def _head_weights(config: ModelConfig, weights: Weights, cluster: int) -> Floats:
    return weights[f"{'embedding' if config.tie_weights else 'head'}.weights.{cluster}"]


def _embedding_projection(config: ModelConfig, weights: Weights, cluster: int) -> Floats:
    """All clusters share one projection unless their widths differ."""
    return weights[f"embedding.projections.{0 if config.div_val == 1 else cluster}"]


def _has_projections(config: ModelConfig) -> bool:
    return config.div_val > 1 or config.embed_size != config.d_model


def _log_softmax(logits: Floats) -> Floats:
    shifted: Floats = logits - logits.max()
    return shifted - math.log(np.exp(shifted).sum())


def _as_float64(parameters: Parameters) -> Weights:
    return {name: np.asarray(values, dtype=np.float64) for name, values in parameters.items()}


# Weights to test with


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every parameter, each tied one once, under its name in the embedding."""
    D, HE, n_tail = config.d_model, config.n_head * config.d_head, len(config.cutoffs)
    ends = [0, *config.cutoffs, config.vocab_size]
    widths = [config.embed_size // config.div_val**i for i in range(n_tail + 1)]
    shapes: dict[str, tuple[int, ...]] = {}
    for i, width in enumerate(widths):
        n_words = ends[i + 1] - ends[i]
        shapes[f"embedding.weights.{i}"] = (n_words, width)
        if not config.tie_weights:
            shapes[f"head.weights.{i}"] = (n_words, width)
        shapes[f"head.biases.{i}"] = (n_words,)
        if _has_projections(config):
            if i == 0 or config.div_val > 1:
                shapes[f"embedding.projections.{i}"] = (D, width)
            if not config.projection_is_tied(i):
                shapes[f"head.projections.{i}"] = (D, width)
    if n_tail:
        shapes["head.cluster_weight"] = (n_tail, widths[0])
        shapes["head.cluster_bias"] = (n_tail,)
    if config.attn_type == "relative":
        for owner in [f"layers.{layer}.attention." for layer in range(config.n_layer)] if config.untie_biases else [""]:
            shapes[f"{owner}content_bias"] = shapes[f"{owner}position_bias"] = (config.n_head, config.d_head)
    for layer in range(config.n_layer):
        prefix = f"layers.{layer}"
        shapes[f"{prefix}.attention.qkv.weight"] = (3 * HE, D)
        match config.attn_type:
            case "relative":
                shapes[f"{prefix}.attention.position.weight"] = (HE, D)
            case "shaw":
                shapes[f"{prefix}.attention.content_bias"] = (config.n_head, config.d_head)
                shapes[f"{prefix}.attention.distance_keys"] = (config.position_rows, config.n_head, config.d_head)
                shapes[f"{prefix}.attention.distance_bias"] = (config.position_rows, config.n_head)
            case "learned":
                shapes[f"{prefix}.attention.position_embedding"] = (config.position_rows, D)
        shapes[f"{prefix}.attention.output.weight"] = (D, HE)
        shapes[f"{prefix}.feed_forward.inner.weight"] = (config.d_inner, D)
        shapes[f"{prefix}.feed_forward.inner.bias"] = (config.d_inner,)
        shapes[f"{prefix}.feed_forward.outer.weight"] = (D, config.d_inner)
        shapes[f"{prefix}.feed_forward.outer.bias"] = (D,)
        for norm in ("attention_norm", "feed_forward_norm"):
            shapes[f"{prefix}.{norm}.weight"] = shapes[f"{prefix}.{norm}.bias"] = (D,)
    return shapes


def random_parameters(config: ModelConfig, seed: int = 0, std: float = 0.4) -> dict[str, Floats]:
    """Draw every parameter from a normal distribution, wide enough that each part of the model moves the result."""
    rng = np.random.default_rng(seed)
    return {name: rng.normal(0.0, std, shape) for name, shape in parameter_shapes(config).items()}
