"""Triton kernels of the layers on a GPU: what lies between their large matrix products, each of them in one pass over its data.

Every kernel has one function that launches it and says what it computes; `fused` calls these, and tests hold them against the same step
in plain PyTorch (`inference.FixedStep`), on a CPU through Triton's interpreter. Sums, exponentials and normalisations are float32 whatever
the type of the operands is.
"""

# Shape suffixes: B batch, Q inputs (ext_len + tgt_len), M mem_len, K = M + Q keys, S slots of a ring, H heads, E d_head, W = H*E,
# D d_model, N tokens, C distances, P places of a row of them, V words

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

LOG2_E = tl.constexpr(1.4426950408889634)
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
def _score_and_keep(  # type: ignore[no-untyped-def]
    qkv,
    position_bias,
    term,
    out,
    key,
    value,
    start,
    stride_b,
    stride_h,
    scale,
    first,
    H,
    N,
    Q,
    M,
    S,
    C,
    pitch,
    n_row_block,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    residue, block, h = tl.program_id(0) // n_row_block, tl.program_id(0) % n_row_block, tl.program_id(2)
    n, e = (block * BLOCK_N + tl.arange(0, BLOCK_N)) * 8 + residue, tl.arange(0, BLOCK_E)
    W = H * E
    inside = (n < N)[:, None] & (e < E)[None, :]
    line = qkv + n[:, None] * (3 * W) + h * E + e[None, :]
    if tl.program_id(1) == tl.num_programs(1) - 1:  # keys and values
        slot = (tl.load(start) + M + n % Q) % S
        place = (n // Q).to(tl.int64)[:, None] * stride_b + h * stride_h + slot[:, None] * E + e[None, :]
        kept = tl.load(line + W, mask=inside, other=0.0)
        tl.store(key + place, kept, mask=inside)
        tl.store(key + place + S * E, kept, mask=inside)
        kept = tl.load(line + 2 * W, mask=inside, other=0.0)
        tl.store(value + place, kept, mask=inside)
        tl.store(value + place + S * E, kept, mask=inside)
    else:  # scores by distance
        query = tl.load(line, mask=inside, other=0.0)
        bias = tl.load(position_bias + h * E + e, mask=e < E, other=0.0).to(tl.float32)
        query = ((query.to(tl.float32) + bias[None, :]) * scale).to(query.dtype)
        # from the first column on that lies at a multiple of 8 in every row of this residue
        begin = 1 + (7 - (first + h * N + residue) % 8)
        p = begin + tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
        c = p - (pitch - C)
        is_column = (c >= 0) & (c < C)
        distances = tl.load(term + (h * C + c)[:, None] * E + e[None, :], mask=is_column[:, None] & (e < E)[None, :], other=0.0)
        scores = tl.dot(query, tl.trans(distances), input_precision=PRECISION)
        places = out + ((first + (h * N + n).to(tl.int64) * pitch)[:, None] + p[None, :])
        places = tl.max_contiguous(tl.multiple_of(places, (16, 16)), (1, 8))
        tl.store(places, scores.to(out.dtype.element_ty), mask=(n < N)[:, None])


MARGIN = 512
"""Values before and after scores by distance that may be read or written, and mean nothing."""


def score_blocks(dtype: torch.dtype, n_token: int) -> tuple[int, int]:
    """Return tokens and distances of a program, for a step of so many tokens."""
    if dtype == torch.float32:
        return (16, 32) if n_token <= 256 else (64, 64)
    return (16 if n_token <= 128 else 32 if n_token <= 256 else 64), (64 if n_token <= 256 else 128)


def score_and_keep(
    qkv_NW: Tensor,
    position_bias_HE: Tensor,
    term_HCE: Tensor,
    ring_2BHSE: Tensor,
    start: Tensor,
    *,
    n_query: int,
    mem_len: int,
    scale: float,
    blocks: tuple[int, ...] | None = None,
) -> Tensor:
    """Write a segment's keys and values into the ring, and return the scores by distance [H, N, P], laid out for `attend`.

    These are (q + v)·r, scaled, for base 2. The C distances are the last of a row of P places; what lies before them means nothing. Where
    a key's score lies within its row differs by one from query to query. With P = 1 mod 8, and as many values before all rows as is right,
    the scores of the first key of a block lie at a multiple of 16 bytes for every query (of float16), and are read as such. They are
    written 16 bytes at a time too: a program takes every eighth token, whose rows all begin alike. No library multiplies into such rows.

    Args:
        qkv_NW: queries, keys and values of each token, [N, 3*W].
        term_HCE: encoded distances, the farthest first.
        ring_2BHSE: keys and values [2, B, H, 2*S, E]; the second half of the slots is the same as the first.
        start: int64 [1], the slot in which the memory begins, below S.
        blocks: tokens and distances of a program; None means `score_blocks`.
    """
    H, C, E = term_HCE.shape
    N, n_slot = qkv_NW.shape[0], ring_2BHSE.shape[3] // 2
    block_n, block_c = blocks or score_blocks(qkv_NW.dtype, N)
    n_column_block = triton.cdiv(C + 7, block_c)
    pitch = n_column_block * block_c + 1
    first = MARGIN + (mem_len + n_query + 1) % 8
    room = torch.empty(first + H * N * pitch + MARGIN, dtype=qkv_NW.dtype, device=qkv_NW.device)
    key, value = ring_2BHSE[0], ring_2BHSE[1]
    n_row_block = triton.cdiv(triton.cdiv(N, 8), block_n)
    _score_and_keep[(min(8, N) * n_row_block, n_column_block + 1, H)](
        *(qkv_NW, position_bias_HE, term_HCE, room, key, value, start, key.stride(0), key.stride(1), scale * LOG2_E.value),
        *(first, H, N, n_query, mem_len, n_slot, C, pitch, n_row_block),
        E=E,
        BLOCK_E=max(16, triton.next_power_of_2(E)),
        BLOCK_N=block_n,
        BLOCK_C=block_c,
        PRECISION=precision_of(qkv_NW.dtype),
    )
    return room[first : first + H * N * pitch].view(H, N, pitch)


def precision_of(dtype: torch.dtype) -> str:
    """Return how float32 is multiplied: as three products of TF32, which together are as exact."""
    return "tf32x3" if dtype == torch.float32 else "tf32"


@triton.jit  # type: ignore[untyped-decorator]
def _block(lines, i, count, j0, BLOCK_K: tl.constexpr, IS_ALIGNED: tl.constexpr):  # type: ignore[no-untyped-def]
    places = lines + (j0 + tl.arange(0, BLOCK_K))[None, :]
    if IS_ALIGNED:
        places = tl.max_contiguous(tl.multiple_of(places, (16, 16)), (1, 8))
    return tl.load(places, mask=(i < count)[:, None], other=0.0)


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
    largests,
    totals,
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
    pitch,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    N_PART: tl.constexpr,
    ALL_KEYS: tl.constexpr,
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
    nearest = by_distance + ((h * N + b * Q).to(tl.int64) * pitch + shift + pitch - C + Q - 1 - n_alike)

    n_empty = tl.maximum(M + EXT - tl.load(length + b).to(tl.int32), 0)
    begin = tl.maximum(tl.maximum(n_empty, first + M - max_distance), 0) // BLOCK_K * BLOCK_K
    end = (tl.minimum(K, M + first + BLOCK_Q) + BLOCK_K - 1) // BLOCK_K * BLOCK_K
    if N_PART > 1:  # the keys of a query are those of several programs
        each = ((end - begin) // BLOCK_K + N_PART - 1) // N_PART * BLOCK_K
        begin = tl.minimum(begin + tl.program_id(2) * each, end)
        end = tl.minimum(begin + each, end)
    # blocks between these have only keys that all queries see; of them, those between the other two have keys with and without a column
    whole_from = tl.maximum(n_empty, first + BLOCK_Q - 1 + M - max_distance)
    whole_from = tl.minimum(tl.maximum((whole_from + BLOCK_K - 1) // BLOCK_K * BLOCK_K, begin), end)
    whole_to = tl.maximum(tl.minimum((M + first + 1) // BLOCK_K * BLOCK_K, end), whole_from)
    far_to = tl.minimum(tl.maximum(n_alike // BLOCK_K * BLOCK_K, whole_from), whole_to)
    near_from = tl.minimum(tl.maximum((n_alike + BLOCK_K - 1) // BLOCK_K * BLOCK_K, whole_from), whole_to)
    n_first, n_between = (whole_from - begin) // BLOCK_K, (near_from - far_to) // BLOCK_K
    n_other = n_first + n_between + tl.maximum(end - whole_to, 0) // BLOCK_K

    largest = tl.full([BLOCK_Q], LEAST, tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    mixed = tl.zeros([BLOCK_Q, BLOCK_E], tl.float32)
    lines = nearest + i[:, None] * (pitch - 1)
    # of near keys, read a block ahead, as their scores are added at once
    ahead = _block(lines, i, tl.where(near_from < whole_to, Q, 0), near_from, BLOCK_K, IS_ALIGNED)
    for part in tl.static_range(3):  # far keys, whose distances add nothing; near ones; and all blocks that are not alike throughout
        count = (far_to - whole_from) // BLOCK_K if part == 0 else (whole_to - near_from) // BLOCK_K if part == 1 else n_other
        for t in range(count):
            if part == 0:
                j0 = whole_from + t * BLOCK_K
            elif part == 1:
                j0 = near_from + t * BLOCK_K
            else:
                j0 = tl.where(t < n_first, begin, tl.where(t < n_first + n_between, far_to - n_first * BLOCK_K, whole_to))
                j0 += tl.where(t < n_first + n_between, t, t - n_first - n_between) * BLOCK_K
            j = j0 + tl.arange(0, BLOCK_K)
            if (part < 2 or ALL_KEYS) and BLOCK_E == E:
                keys = tl.load(key + place + j[:, None] * E + e[None, :]).to(query.dtype)
            else:
                there = (j < K)[:, None] & is_width[None, :]
                keys = tl.load(key + place + j[:, None] * E + e[None, :], mask=there, other=0.0).to(query.dtype)
            scores = tl.dot(query, tl.trans(keys), input_precision=PRECISION)
            if part == 1:
                scores += ahead.to(tl.float32)
                ahead = _block(lines, i, tl.where(j0 + BLOCK_K < whole_to, Q, 0), j0 + BLOCK_K, BLOCK_K, IS_ALIGNED)
            if part == 2:
                near = _block(lines, i, tl.where(j0 + BLOCK_K > n_alike, Q, 0), j0, BLOCK_K, IS_ALIGNED)
                scores += tl.where(j[None, :] >= n_alike, near.to(tl.float32), 0.0)
            if part == 2:
                distance = i[:, None] + M - j[None, :]
                visible = (distance >= 0) & (distance <= max_distance) & ((j >= n_empty) & (j < K))[None, :]
                scores = tl.where(visible, scores, float("-inf"))
            larger = tl.maximum(largest, tl.max(scores, axis=1))
            weights = tl.exp2(scores - larger[:, None])
            shrink = tl.exp2(largest - larger)
            total = total * shrink + tl.sum(weights, axis=1)
            if (part < 2 or ALL_KEYS) and BLOCK_E == E:
                values = tl.load(value + place + j[:, None] * E + e[None, :]).to(query.dtype)
            else:
                values = tl.load(value + place + j[:, None] * E + e[None, :], mask=there, other=0.0).to(query.dtype)
            mixed = tl.dot(weights.to(query.dtype), values, mixed * shrink[:, None], input_precision=PRECISION)
            largest = larger
    if N_PART > 1:
        row += tl.program_id(2) * N
        tl.store(largests + row * H + h, largest, mask=is_query)
        tl.store(totals + row * H + h, total, mask=is_query)
    else:
        mixed = mixed / tl.where(total > 0, total, 1.0)[:, None]  # an extension before the stream's beginning sees nothing
    tl.store(out + row[:, None] * W + h * E + e[None, :], mixed.to(out.dtype.element_ty), mask=is_query[:, None] & is_width[None, :])


@triton.jit  # type: ignore[untyped-decorator]
def _join(parts, largests, totals, out, N, W, H, E: tl.constexpr, N_PART: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row, w = tl.program_id(0), tl.arange(0, BLOCK)
    inside, h = w < W, w // E
    largest = tl.full([BLOCK], LEAST, tl.float32)
    total, mixed = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for part in tl.static_range(N_PART):
        line = part * N + row
        other = tl.load(largests + line * H + h, mask=inside, other=LEAST)
        larger = tl.maximum(largest, other)
        shrink, weight = tl.exp2(largest - larger), tl.exp2(other - larger)
        total = total * shrink + tl.load(totals + line * H + h, mask=inside, other=0.0) * weight
        mixed = mixed * shrink + tl.load(parts + line * W + w, mask=inside, other=0.0) * weight
        largest = larger
    tl.store(out + row * W + w, (mixed / tl.where(total > 0, total, 1.0)).to(out.dtype.element_ty), mask=inside)


def attend_blocks(dtype: torch.dtype, n_head: int, n_query: int, d_head: int) -> tuple[int, ...]:
    """Return what was fastest for the heads of all streams: float16 on an H200 (`benchmarks/gpu_profile.py`); float32 by its spills."""
    # few streams: more and smaller programs, or most of the GPU would have nothing to do; so too, if need be, parts of the keys
    n_part = max(1, min(3, 128 // (n_head * triton.cdiv(n_query, 16))))
    if dtype == torch.float32:
        return (32, 32, 4, 3, 1) if n_head * triton.cdiv(n_query, 32) >= 256 and d_head <= 64 else (16, 32, 4, 3, n_part)
    is_few = n_head * triton.cdiv(n_query, 64) < 96 or n_query <= 16
    return (16, 128, 4, 3, n_part) if is_few and d_head <= 64 else (64, 64, 4, 3, 1)


def attend(
    qkv_NW: Tensor,
    content_bias_HE: Tensor,
    ring_2BHSE: Tensor,
    by_distance_HNP: Tensor,
    length_B: Tensor,
    start: Tensor,
    *,
    n_query: int,
    mem_len: int,
    ext_len: int,
    n_distance: int,
    max_distance: int | None,
    scale: float,
    blocks: tuple[int, ...] | None = None,
) -> Tensor:
    """Return the values mixed by attention over memory and segment, [N, W]; no score of a key ever reaches the GPU's memory.

    Which keys a query sees is as in `attention.visible_keys`. Only blocks in which some query does not see some key are masked.

    Args:
        qkv_NW: queries, keys and values of each token, [N, 3*W]; the keys and values are read from the ring.
        by_distance_HNP: what `score_and_keep` returns.
        length_B: int64, tokens of each stream before the segment.
        start: int64 [1], the slot in which the memory begins.
        n_distance: C, the distances of `by_distance_HNP` that mean something.
        blocks: queries and keys of a program, its warps and stages, and into how many parts the keys of a query are cut; None means
            `attend_blocks`.
    """
    _, B, H, _, E = ring_2BHSE.shape
    N, pitch = qkv_NW.shape[0], by_distance_HNP.shape[2]
    out_NW = torch.empty(N, H * E, dtype=qkv_NW.dtype, device=qkv_NW.device)
    key, value = ring_2BHSE[0], ring_2BHSE[1]
    furthest = mem_len + n_query if max_distance is None else max_distance
    block_q, block_k, warps, stages, n_part = blocks or attend_blocks(qkv_NW.dtype, B * H, n_query, E)
    mixed = largests = totals = out_NW
    if n_part > 1:
        sizes = [n_part * N * H * size for size in (E, 1, 1)]
        mixed, largests, totals = torch.split(torch.empty(sum(sizes), dtype=torch.float32, device=qkv_NW.device), sizes)
    block_e = max(16, triton.next_power_of_2(E))
    room = by_distance_HNP.as_strided((1,), (1,), 0)  # whose address is divisible by 16, as the kernel's view of it is not
    _attend[(triton.cdiv(n_query, block_q), B * H, n_part)](
        *(qkv_NW, content_bias_HE, key, value, room, length_B, start, mixed, largests, totals),
        *(key.stride(0), key.stride(1), scale * LOG2_E.value, furthest),
        *(by_distance_HNP.storage_offset(), H, N, n_query, mem_len, ext_len, n_distance, pitch),
        E=E,
        BLOCK_E=block_e,
        BLOCK_Q=block_q,
        BLOCK_K=block_k,
        N_PART=n_part,
        ALL_KEYS=(mem_len + n_query) % block_k == 0,
        IS_ALIGNED=n_query % 8 == 0,
        PRECISION=precision_of(qkv_NW.dtype),
        num_warps=warps,
        num_stages=stages,
    )
    if n_part > 1:
        width = {"E": E, "N_PART": n_part, "BLOCK": triton.next_power_of_2(H * E)}
        _join[(N,)](mixed, largests, totals, out_NW, N, H * E, H, **width)
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
