"""Triton kernels of the step on a GPU: what lies between its large matrix products, each of them in one pass over its data.

Every kernel has one function that launches it and says what it computes; `fused` calls these, and tests hold them against the same step
in plain PyTorch (`inference.FixedStep`), on a CPU through Triton's interpreter. Sums, exponentials and normalisations are float32 whatever
the type of the operands is. The only file that imports triton.
"""

# Shape suffixes: B batch, Q inputs (ext_len + tgt_len), M mem_len, K = M + Q keys, S slots of a ring, H heads, E d_head, W = H*E,
# D d_model, N tokens, R tokens of one tail cluster, C distances, V words

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
LEAST = tl.constexpr(-1e30)


@triton.jit  # type: ignore[untyped-decorator]
def _embed(ids, table, scale, x, half, V, D, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0)
    d = tl.arange(0, BLOCK)
    inside = d < D
    token = tl.load(ids + row)
    is_word = (token >= 0) & (token < V)
    values = tl.load(table + tl.where(is_word, token, 0) * D + d, mask=inside, other=0.0).to(tl.float32) * scale
    values = tl.where(is_word, values, float("nan"))
    tl.store(x + row * D + d, values, mask=inside)
    tl.store(half + row * D + d, values.to(half.dtype.element_ty), mask=inside)


def embed(ids_BQ: Tensor, table_VD: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return the scaled embeddings of tokens [N, D], in float32 and in the type of the table; of what is no word's id, nan."""
    N, D = ids_BQ.numel(), table_VD.shape[1]
    x_ND = torch.empty(N, D, dtype=torch.float32, device=ids_BQ.device)
    half_ND = torch.empty(N, D, dtype=table_VD.dtype, device=ids_BQ.device)
    _embed[(N,)](ids_BQ, table_VD, scale, x_ND, half_ND, len(table_VD), D, BLOCK=triton.next_power_of_2(D))
    return x_ND, half_ND


@triton.jit  # type: ignore[untyped-decorator]
def _add_norm(x, more, weight, bias, out, half, D, eps, KEEPS_SUM: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0)
    d = tl.arange(0, BLOCK)
    inside = d < D
    total = tl.load(x + row * D + d, mask=inside, other=0.0)
    total += tl.load(more + row * D + d, mask=inside, other=0.0).to(tl.float32)
    centred = tl.where(inside, total - tl.sum(total, axis=0) / D, 0.0)
    normal = centred * tl.rsqrt(tl.sum(centred * centred, axis=0) / D + eps)
    normal = normal * tl.load(weight + d, mask=inside, other=0.0) + tl.load(bias + d, mask=inside, other=0.0)
    tl.store(out + row * D + d, total if KEEPS_SUM else normal, mask=inside)
    tl.store(half + row * D + d, normal.to(half.dtype.element_ty), mask=inside)


def add_norm(x_ND: Tensor, more_ND: Tensor, norm: nn.LayerNorm, *, keeps_sum: bool) -> tuple[Tensor, Tensor]:
    """Return the normalised sum in float32, or the sum itself if `keeps_sum`, and the normalised sum in the type of `more_ND`."""
    N, D = x_ND.shape
    out_ND, half_ND = torch.empty_like(x_ND), torch.empty_like(more_ND)
    block = triton.next_power_of_2(D)
    _add_norm[(N,)](x_ND, more_ND, norm.weight, norm.bias, out_ND, half_ND, D, norm.eps, KEEPS_SUM=keeps_sum, BLOCK=block)
    return out_ND, half_ND


@triton.jit  # type: ignore[untyped-decorator]
def _keep(qkv, key, value, start, stride_b, stride_h, Q, M, S, H, E, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0)
    b, i = row // Q, row % Q
    w = tl.arange(0, BLOCK)
    W = H * E
    inside = w < W
    slot = (tl.load(start) + M + i) % S
    place = b.to(tl.int64) * stride_b + (w // E) * stride_h + slot * E + w % E
    kept = tl.load(qkv + row * 3 * W + W + w, mask=inside, other=0.0)
    tl.store(key + place, kept, mask=inside)
    tl.store(key + place + S * E, kept, mask=inside)
    kept = tl.load(qkv + row * 3 * W + 2 * W + w, mask=inside, other=0.0)
    tl.store(value + place, kept, mask=inside)
    tl.store(value + place + S * E, kept, mask=inside)


def keep(qkv_NW: Tensor, ring_2BHSE: Tensor, start: Tensor, n_query: int, mem_len: int) -> None:
    """Write the keys and values of a segment into a ring, at both places of each slot.

    Args:
        qkv_NW: queries, keys and values of each token, [N, 3*W].
        ring_2BHSE: keys and values [2, B, H, 2*S, E]; the second half of the slots is the same as the first.
        start: int64 [1], the slot in which the memory begins, below S.
    """
    H, slots, E = ring_2BHSE.shape[2:]
    key, value = ring_2BHSE[0], ring_2BHSE[1]
    sizes = n_query, mem_len, slots // 2, H, E
    block = triton.next_power_of_2(H * E)
    _keep[(qkv_NW.shape[0],)](qkv_NW, key, value, start, key.stride(0), key.stride(1), *sizes, BLOCK=block)


@triton.jit  # type: ignore[untyped-decorator]
def _score_distances(  # type: ignore[no-untyped-def]
    qkv,
    position_bias,
    term,
    out,
    scale,
    first,
    H,
    N,
    C,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    n, c = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    h, e = tl.program_id(2), tl.arange(0, BLOCK_E)
    is_row, is_column, is_width, W = n < N, c < C, e < E, H * E
    query = tl.load(qkv + n[:, None] * (3 * W) + h * E + e[None, :], mask=is_row[:, None] & is_width[None, :], other=0.0)
    bias = tl.load(position_bias + h * E + e, mask=is_width, other=0.0).to(tl.float32)
    query = ((query.to(tl.float32) + bias[None, :]) * scale).to(query.dtype)
    distances = tl.load(term + (h * C + c)[:, None] * E + e[None, :], mask=is_column[:, None] & is_width[None, :], other=0.0)
    scores = tl.dot(query, tl.trans(distances), input_precision=PRECISION)
    place = first + (h * N + n).to(tl.int64)[:, None] * C + c[None, :]
    tl.store(out + place, scores.to(out.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])


MARGIN = 256
"""Values before and after scores by distance that may be read, and mean nothing."""


def score_distances(qkv_NW: Tensor, position_bias_HE: Tensor, term_HCE: Tensor, n_query: int, key_len: int, scale: float) -> Tensor:
    """Return the scores by distance [H, N, C], (q + v)·r scaled, laid out for `attend`: a view of a larger tensor.

    Where a key's score lies within its row differs by one from query to query. With C = 1 mod 8, and as many values before all rows as
    `_shift` says, the scores of the first key of a block lie at a multiple of 16 bytes for every query (of float16), and are read as such.
    No library multiplies fast into rows of such a length, so this is a kernel.

    Args:
        qkv_NW: queries, keys and values of each token, [N, 3*W].
        term_HCE: encoded distances, the farthest first.
    """
    H, C, E = term_HCE.shape
    N = qkv_NW.shape[0]
    first = MARGIN + _shift(n_query, key_len, C)
    room = torch.empty(first + H * N * C + MARGIN + key_len, dtype=qkv_NW.dtype, device=qkv_NW.device)
    is_float = qkv_NW.dtype == torch.float32
    block_n, block_c = (16, 32) if is_float else (64, 64)
    _score_distances[(triton.cdiv(N, block_n), triton.cdiv(C, block_c), H)](
        *(qkv_NW, position_bias_HE, term_HCE, room, scale, first, H, N, C),
        E=E,
        BLOCK_E=max(16, triton.next_power_of_2(E)),
        BLOCK_N=block_n,
        BLOCK_C=block_c,
        PRECISION="ieee" if is_float else "tf32",
    )
    return room[first : first + H * N * C].view(H, N, C)


def _shift(n_query: int, key_len: int, n_column: int) -> int:
    return (key_len - n_column + 1 - (n_query - 1)) % 8


@triton.jit  # type: ignore[untyped-decorator]
def _attend(  # type: ignore[no-untyped-def]
    qkv,
    content_bias,
    key,
    value,
    by_distance,
    length,
    start,
    out,
    stride_b,
    stride_h,
    scale,
    max_distance,
    shift,
    H,
    N,
    Q,
    M,
    EXT,
    C,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    first = tl.program_id(0) * BLOCK_Q
    b, h = tl.program_id(1) // H, tl.program_id(1) % H
    i, e = first + tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_E)
    is_query, is_width = i < Q, e < E
    row, W, K = b * Q + i, H * E, M + Q
    query = tl.load(qkv + row[:, None] * (3 * W) + h * E + e[None, :], mask=is_query[:, None] & is_width[None, :], other=0.0)
    bias = tl.load(content_bias + h * E + e, mask=is_width, other=0.0).to(tl.float32)
    query = ((query.to(tl.float32) + bias[None, :]) * scale).to(query.dtype)
    place = b.to(tl.int64) * stride_b + h * stride_h + tl.load(start) * E
    n_alike = K - C + 1
    # of key 0: the row of a query begins `Q - 1 - i` columns early, so that a key has one column more than the key before
    nearest = by_distance + ((h * N + b * Q).to(tl.int64) * C + shift + Q - 1 - n_alike)

    n_empty = tl.maximum(M + EXT - tl.load(length + b).to(tl.int32), 0)
    begin = tl.maximum(tl.maximum(n_empty, first + M - max_distance), 0) // BLOCK_K * BLOCK_K
    end = tl.minimum(K, M + first + BLOCK_Q)
    largest = tl.full([BLOCK_Q], LEAST, tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    mixed = tl.zeros([BLOCK_Q, BLOCK_E], tl.float32)
    far = tl.minimum(tl.maximum(n_alike // BLOCK_K * BLOCK_K, begin), end)
    for part in tl.static_range(2):  # keys so far back that their distances add nothing, and the others
        for j0 in range(begin if part == 0 else far, far if part == 0 else end, BLOCK_K):
            j = j0 + tl.arange(0, BLOCK_K)
            is_key = j < K
            there = is_key[:, None] & is_width[None, :]
            keys = tl.load(key + place + j[:, None] * E + e[None, :], mask=there, other=0.0).to(query.dtype)
            scores = tl.dot(query, tl.trans(keys), input_precision=PRECISION)
            if part == 1:
                places = nearest + (i[:, None] * (C - 1) + j[None, :])
                if IS_ALIGNED:
                    places = tl.max_contiguous(tl.multiple_of(places, (16, 16)), (1, 8))
                near = tl.load(places, mask=is_query[:, None], other=0.0).to(tl.float32)
                scores += tl.where(j[None, :] >= n_alike, near, 0.0)
            distance = i[:, None] + M - j[None, :]
            visible = (distance >= 0) & (distance <= max_distance) & (j[None, :] >= n_empty) & is_key[None, :]
            scores = tl.where(visible, scores * LOG2_E, LEAST)
            larger = tl.maximum(largest, tl.max(scores, axis=1))
            weights = tl.where(visible, tl.exp2(scores - larger[:, None]), 0.0)
            shrink = tl.exp2(largest - larger)
            total = total * shrink + tl.sum(weights, axis=1)
            values = tl.load(value + place + j[:, None] * E + e[None, :], mask=there, other=0.0).to(query.dtype)
            mixed = mixed * shrink[:, None] + tl.dot(weights.to(query.dtype), values, input_precision=PRECISION)
            largest = larger
    mixed = mixed / tl.where(total > 0, total, 1.0)[:, None]  # an extension before the stream's beginning sees nothing
    tl.store(out + row[:, None] * W + h * E + e[None, :], mixed.to(out.dtype.element_ty), mask=is_query[:, None] & is_width[None, :])


def attend_blocks(dtype: torch.dtype, n_head: int, n_query: int, d_head: int) -> tuple[int, ...]:
    """Return what was fastest on an H200, for the heads of all streams: see `benchmarks/gpu_profile.py`."""
    if dtype == torch.float32:
        return 16, 32, 4, 3
    # few streams: more and smaller programs, or most of the GPU would have nothing to do
    is_few = n_head * triton.cdiv(n_query, 64) < 96 or n_query <= 16
    return (16, 128, 4, 3) if is_few and d_head <= 64 else (64, 64, 4, 3)


def attend(
    qkv_NW: Tensor,
    content_bias_HE: Tensor,
    ring_2BHSE: Tensor,
    by_distance_HNC: Tensor,
    length_B: Tensor,
    start: Tensor,
    *,
    n_query: int,
    mem_len: int,
    ext_len: int,
    max_distance: int | None,
    scale: float,
    blocks: tuple[int, ...] | None = None,
) -> Tensor:
    """Return the values mixed by attention over memory and segment, [N, W]; no score of a key ever reaches the GPU's memory.

    Which keys a query sees is as in `attention.visible_keys`.

    Args:
        qkv_NW: queries, keys and values of each token, [N, 3*W]; the keys and values are read from the ring, where `keep` has put them.
        by_distance_HNC: what `score_distances` returns.
        length_B: int64, tokens of each stream before the segment.
        start: int64 [1], the slot in which the memory begins.
        blocks: queries and keys of a program, its warps and stages; None means `attend_blocks`.
    """
    _, B, H, _, E = ring_2BHSE.shape
    N, C = qkv_NW.shape[0], by_distance_HNC.shape[2]
    out_NW = torch.empty(N, H * E, dtype=qkv_NW.dtype, device=qkv_NW.device)
    key, value = ring_2BHSE[0], ring_2BHSE[1]
    furthest = mem_len + n_query if max_distance is None else max_distance
    block_q, block_k, warps, stages = blocks or attend_blocks(qkv_NW.dtype, B * H, n_query, E)
    room = by_distance_HNC.as_strided((1,), (1,), 0)  # whose address is divisible by 16, as the kernel's view of it is not
    _attend[(triton.cdiv(n_query, block_q), B * H)](
        *(qkv_NW, content_bias_HE, key, value, room, length_B, start, out_NW, key.stride(0), key.stride(1), scale, furthest),
        *(by_distance_HNC.storage_offset(), H, N, n_query, mem_len, ext_len, C),
        E=E,
        BLOCK_E=max(16, triton.next_power_of_2(E)),
        BLOCK_Q=block_q,
        BLOCK_K=block_k,
        IS_ALIGNED=C % 8 == 1 and n_query % 8 == 0,
        PRECISION="ieee" if qkv_NW.dtype == torch.float32 else "tf32",
        num_warps=warps,
        num_stages=stages,
    )
    return out_NW


@triton.jit  # type: ignore[untyped-decorator]
def _advance(length, start, B, T, most, S, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    b = tl.arange(0, BLOCK)
    longer = tl.load(length + b, mask=b < B, other=0) + T
    tl.store(length + b, tl.minimum(longer, most), mask=b < B)
    tl.store(start, (tl.load(start) + T) % S)


def advance(length_B: Tensor, start: Tensor, tgt_len: int, most: int, n_slot: int) -> None:
    """Move on, in place, by a segment: lengths up to `most`, the start around the ring of `n_slot` slots."""
    B = length_B.shape[0]
    _advance[(1,)](length_B, start, B, tgt_len, most, n_slot, BLOCK=triton.next_power_of_2(B))


@triton.jit  # type: ignore[untyped-decorator]
def _head_nll(scores, targets, lows, nll, V, n_word, n_cluster, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr):  # type: ignore[no-untyped-def]
    n = tl.program_id(0)
    line = scores + n.to(tl.int64) * V
    v = tl.arange(0, BLOCK)
    largest = tl.full([BLOCK], LEAST, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for v0 in range(0, V, BLOCK):
        more = tl.load(line + v0 + v, mask=v0 + v < V, other=float("-inf")).to(tl.float32) * LOG2_E
        larger = tl.maximum(largest, more)
        total = total * tl.exp2(largest - larger) + tl.exp2(more - larger)
        largest = larger
    top = tl.max(largest, axis=0)
    normaliser = (tl.log2(tl.sum(total * tl.exp2(largest - top), axis=0)) + top) * LN_2
    target = tl.load(targets + n)
    c = tl.arange(0, BLOCK_C)
    cluster = tl.sum((target >= tl.load(lows + c, mask=c < n_cluster, other=2**40)).to(tl.int64), axis=0)
    column = tl.where(target < n_word, target, n_word + cluster - 1)
    is_word = (target >= 0) & (target < tl.load(lows + n_cluster))
    chosen = tl.load(line + tl.where(is_word, column, 0)).to(tl.float32)
    tl.store(nll + n, tl.where(is_word, normaliser - chosen, float("nan")))


SUMMED = 4096
"""Scores of a token that are summed up together."""


def head_nll(scores_NV: Tensor, target_ids_N: Tensor, lows: Tensor, n_word: int) -> Tensor:
    """Return −log p, nats, float32 [N], of the target, or of its tail cluster if it lies in one; of what is no word's id, nan.

    Args:
        scores_NV: those of the shortlist's `n_word` words, and then of the tail clusters.
        lows: int64, the first word of each tail cluster, and one more than the last word of all.
    """
    N, V = scores_NV.shape
    nll_N = torch.empty(N, dtype=torch.float32, device=scores_NV.device)
    n_cluster = len(lows) - 1
    blocks = {"BLOCK": SUMMED, "BLOCK_C": triton.next_power_of_2(max(1, n_cluster))}
    _head_nll[(N,)](scores_NV, target_ids_N, lows, nll_N, V, n_word, n_cluster, **blocks, num_warps=8)
    return nll_N


@triton.jit  # type: ignore[untyped-decorator]
def _find_rows(targets, lows, rows, offsets, N, n_cluster, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    n = tl.arange(0, BLOCK)
    found = 0
    for c in range(n_cluster):
        tl.store(offsets + c, found)
        low, high = tl.load(lows + c), tl.load(lows + c + 1)
        for n0 in range(0, N, BLOCK):
            target = tl.load(targets + n0 + n, mask=n0 + n < N, other=-1)
            inside = ((target >= low) & (target < high)).to(tl.int32)
            tl.store(rows + found + tl.cumsum(inside, axis=0) - 1, n0 + n, mask=inside > 0)
            found += tl.sum(inside, axis=0)
    tl.store(offsets + n_cluster, found)


SCANNED = 1024
"""Targets that are looked at together."""


def find_rows(target_ids_N: Tensor, lows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the positions of the targets in tail clusters, one cluster after the other, int32 [N], and where each cluster's begin.

    What `adaptive.cluster_rows` finds, without a length that the host has to know; `lows` is that of `head_nll`.
    """
    N, n_cluster = target_ids_N.shape[0], len(lows) - 1
    rows_N = torch.empty(N, dtype=torch.int32, device=lows.device)
    offsets = torch.empty(n_cluster + 1, dtype=torch.int32, device=lows.device)
    _find_rows[(1,)](target_ids_N, lows, rows_N, offsets, N, n_cluster, BLOCK=SCANNED, num_warps=8)
    return rows_N, offsets


@triton.jit  # type: ignore[untyped-decorator]
def _tail_scores(  # type: ignore[no-untyped-def]
    hidden,
    weight,
    bias,
    targets,
    rows,
    offsets,
    lows,
    first_tiles,
    largest,
    total,
    chosen,
    c0,
    n_cluster,
    D,
    n_tile,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tile = tl.program_id(0)
    clusters = tl.arange(0, BLOCK_C)
    c = tl.sum((tile >= tl.load(first_tiles + clusters, mask=clusters < n_cluster, other=2**30)).to(tl.int32), axis=0) - 1
    tile -= tl.load(first_tiles + c)
    begin = tl.load(lows + c0)
    c += c0
    low, high = tl.load(lows + c), tl.load(lows + c + 1)
    first, last = tl.load(offsets + c), tl.load(offsets + c + 1)
    word = low + tile * BLOCK_V + tl.arange(0, BLOCK_V)
    is_word = word < high
    for r0 in range(first, last, BLOCK_R):
        r = r0 + tl.arange(0, BLOCK_R)
        is_row = r < last
        n = tl.load(rows + r, mask=is_row, other=0)
        scores = tl.zeros([BLOCK_R, BLOCK_V], tl.float32)
        for d0 in range(0, D, BLOCK_D):
            d = d0 + tl.arange(0, BLOCK_D)
            is_d = d < D
            h = tl.load(hidden + n[:, None] * D + d[None, :], mask=is_row[:, None] & is_d[None, :], other=0.0)
            w = tl.load(weight + (word - begin)[:, None] * D + d[None, :], mask=is_word[:, None] & is_d[None, :], other=0.0)
            scores += tl.dot(h, tl.trans(w), input_precision=PRECISION)
        scores += tl.load(bias + word - begin, mask=is_word, other=0.0).to(tl.float32)[None, :]
        top = tl.max(tl.where(is_word[None, :], scores, float("-inf")), axis=1)
        some = tl.sum(tl.where(is_word[None, :], tl.exp2((scores - top[:, None]) * LOG2_E), 0.0), axis=1)
        tl.store(largest + r * n_tile + tile, top, mask=is_row)
        tl.store(total + r * n_tile + tile, some, mask=is_row)
        target = tl.load(targets + n, mask=is_row, other=-1)
        is_target = word[None, :] == target[:, None]
        is_here = tl.sum(is_target.to(tl.int32), axis=1) > 0
        tl.store(chosen + r, tl.sum(tl.where(is_target, scores, 0.0), axis=1), mask=is_row & is_here)


@triton.jit  # type: ignore[untyped-decorator]
def _add_tail_nll(  # type: ignore[no-untyped-def]
    rows,
    offsets,
    lows,
    largest,
    total,
    chosen,
    nll,
    c0,
    n_cluster,
    n_tile,
    BLOCK_V: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    r = tl.program_id(0) + tl.load(offsets + c0)
    if r < tl.load(offsets + c0 + n_cluster):
        clusters = tl.arange(0, BLOCK_C)
        ends = tl.load(offsets + c0 + 1 + clusters, mask=clusters < n_cluster, other=2**30)
        c = c0 + tl.sum((r >= ends).to(tl.int32), axis=0)
        count = (tl.load(lows + c + 1) - tl.load(lows + c) + BLOCK_V - 1) // BLOCK_V
        tiles = tl.arange(0, BLOCK)
        tops = tl.load(largest + r * n_tile + tiles, mask=tiles < count, other=float("-inf"))
        sums = tl.load(total + r * n_tile + tiles, mask=tiles < count, other=0.0)
        top = tl.max(tops, axis=0)
        normaliser = tl.log2(tl.sum(sums * tl.exp2((tops - top) * LOG2_E), axis=0)) * LN_2 + top
        n = tl.load(rows + r)
        tl.store(nll + n, tl.load(nll + n) + normaliser - tl.load(chosen + r))


TILE = 128
"""Words of a tail cluster that are scored together."""


def tail_blocks(dtype: torch.dtype, n_token: int) -> tuple[int, ...]:
    """Return block sizes for a step of so many tokens, of which few lie in a tail; not measured yet."""
    if dtype == torch.float32:
        return 16, 32, 4, 4
    return (16, 64, 4, 4) if n_token <= 128 else (64, 64, 4, 3) if n_token <= 1024 else (128, 64, 8, 3)


def add_tail_nll(
    nll_N: Tensor,
    hidden_NW: Tensor,
    weight_VW: Tensor,
    bias_V: Tensor,
    target_ids_N: Tensor,
    rows_N: Tensor,
    offsets: Tensor,
    lows: Tensor,
    first_tiles: Tensor,
    *,
    first_cluster: int,
    sizes: list[int],
    blocks: tuple[int, ...] | None = None,
) -> None:
    """Add, in place, −log p of the target within its tail cluster, to the tokens of some clusters: those whose words are in one table.

    A cluster without targets is not read.

    Args:
        hidden_NW: hidden states, projected to the width of the table.
        weight_VW: [V, W], the words of these clusters.
        rows_N, offsets: what `find_rows` returns.
        first_tiles: int32, the number of `TILE`s of words before each of these clusters.
        first_cluster: which of `lows` and `offsets` the first of them is.
        sizes: words of each.
        blocks: tokens of a program, and of their width at a time, its warps and stages; None means `tail_blocks`.
    """
    N, W = hidden_NW.shape
    n_tile = max(-(-size // TILE) for size in sizes)
    device = nll_N.device
    largest, total = (torch.empty(N, n_tile, dtype=torch.float32, device=device) for _ in range(2))
    chosen = torch.empty(N, dtype=torch.float32, device=device)
    block_r, block_d, warps, stages = blocks or tail_blocks(hidden_NW.dtype, N)
    block_c = triton.next_power_of_2(len(sizes))
    common = rows_N, offsets, lows
    _tail_scores[(sum(-(-size // TILE) for size in sizes),)](
        *(hidden_NW, weight_VW, bias_V, target_ids_N, *common, first_tiles, largest, total, chosen, first_cluster, len(sizes), W, n_tile),
        BLOCK_C=block_c,
        BLOCK_R=block_r,
        BLOCK_V=TILE,
        BLOCK_D=min(block_d, max(16, triton.next_power_of_2(W))),
        PRECISION="ieee" if hidden_NW.dtype == torch.float32 else "tf32",
        num_warps=warps,
        num_stages=stages,
    )
    last = {"BLOCK_V": TILE, "BLOCK_C": block_c, "BLOCK": triton.next_power_of_2(n_tile)}
    _add_tail_nll[(N,)](*common, largest, total, chosen, nll_N, first_cluster, len(sizes), n_tile, **last)
