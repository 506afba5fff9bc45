"""Triton kernels of the adaptive softmax of given targets on a GPU: what comes after the shortlist's product, and the tail clusters.

As in `layer_kernels`, each has one function that launches it, and all sums are float32.
"""

# Shape suffixes: N tokens, R tokens of one tail cluster, W width of a table, V words

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from txl_train.model.layer_kernels import LEAST, LOG2_E, precision_of

LN_2 = tl.constexpr(0.6931471805599453)


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
    rows,
    offsets,
    lows,
    first_tiles,
    largest,
    total,
    c0,
    n_cluster,
    W,
    n_tile,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_W: tl.constexpr,
    WHOLE_WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tile = tl.program_id(0)
    clusters = tl.arange(0, BLOCK_C)
    c = tl.sum((tile >= tl.load(first_tiles + clusters, mask=clusters < n_cluster, other=2**30)).to(tl.int32), axis=0) - 1
    tile -= tl.load(first_tiles + c)
    before = tl.load(lows + c0)
    low, high = tl.load(lows + c0 + c), tl.load(lows + c0 + c + 1)
    first, last = tl.load(offsets + c0 + c), tl.load(offsets + c0 + c + 1)
    count = (high - low).to(tl.int32)
    word = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    w = tl.arange(0, BLOCK_W)
    table = weight + (low - before) * W
    lines = table + (tl.minimum(word, count - 1).to(tl.int64) * W)[:, None] + w[None, :]  # after the last word, that word again
    biases = tl.load(bias + (low - before) + word, mask=word < count, other=float("-inf")).to(tl.float32)
    for r0 in range(first, last, BLOCK_R):
        r = r0 + tl.arange(0, BLOCK_R)
        is_row = r < last
        states = hidden + (tl.load(rows + r, mask=is_row, other=0) * W)[:, None] + w[None, :]
        scores = tl.zeros([BLOCK_R, BLOCK_V], tl.float32)
        for w0 in range(0, W, BLOCK_W):
            if WHOLE_WIDTH:
                state = tl.load(states + w0)
                table_part = tl.load(lines + w0)
            else:
                inside = (w0 + w < W)[None, :]
                state = tl.load(states + w0, mask=inside, other=0.0)
                table_part = tl.load(lines + w0, mask=inside, other=0.0)
            scores = tl.dot(state, tl.trans(table_part), scores, input_precision=PRECISION)
        scores += biases[None, :]
        top = tl.max(scores, axis=1)
        some = tl.sum(tl.exp2((scores - top[:, None]) * LOG2_E), axis=1)
        tl.store(largest + r * n_tile + tile, top, mask=is_row)
        tl.store(total + r * n_tile + tile, some, mask=is_row)


@triton.jit  # type: ignore[untyped-decorator]
def _add_tail_nll(  # type: ignore[no-untyped-def]
    hidden,
    weight,
    bias,
    targets,
    rows,
    offsets,
    lows,
    largest,
    total,
    nll,
    c0,
    n_cluster,
    W,
    n_tile,
    BLOCK_V: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK: tl.constexpr,
):
    r = tl.program_id(0) + tl.load(offsets + c0)
    if r < tl.load(offsets + c0 + n_cluster):
        clusters = tl.arange(0, BLOCK_C)
        ends = tl.load(offsets + c0 + 1 + clusters, mask=clusters < n_cluster, other=2**30)
        c = c0 + tl.sum((r >= ends).to(tl.int32), axis=0)
        n = tl.load(rows + r)
        place = tl.load(targets + n) - tl.load(lows + c0)
        w = tl.arange(0, BLOCK_W)
        state = tl.load(hidden + n * W + w, mask=w < W, other=0.0).to(tl.float32)
        chosen = tl.sum(state * tl.load(weight + place * W + w, mask=w < W, other=0.0).to(tl.float32), axis=0)
        chosen += tl.load(bias + place).to(tl.float32)
        count = (tl.load(lows + c + 1) - tl.load(lows + c) + BLOCK_V - 1) // BLOCK_V
        tiles = tl.arange(0, BLOCK)
        tops = tl.load(largest + r * n_tile + tiles, mask=tiles < count, other=float("-inf"))
        sums = tl.load(total + r * n_tile + tiles, mask=tiles < count, other=0.0)
        top = tl.max(tops, axis=0)
        normaliser = tl.log2(tl.sum(sums * tl.exp2((tops - top) * LOG2_E), axis=0)) * LN_2 + top
        tl.store(nll + n, tl.load(nll + n) + normaliser - chosen)


TILE = 128
"""Words of a tail cluster that are scored together."""


def tail_blocks(dtype: torch.dtype, n_token: int) -> tuple[int, ...]:
    """Return block sizes for a step of so many tokens, of which some twentieth lies in each tail cluster."""
    if dtype == torch.float32:
        return (16, 32, 4, 4) if n_token <= 256 else (64, 32, 4, 3)
    return (16, 64, 4, 4) if n_token <= 256 else (64, 64, 4, 3) if n_token <= 1024 else (128, 128, 8, 1)


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
    largest, total = (torch.empty(N, n_tile, dtype=torch.float32, device=nll_N.device) for _ in range(2))
    block_r, block_w, warps, stages = blocks or tail_blocks(hidden_NW.dtype, N)
    block_w = min(block_w, max(16, triton.next_power_of_2(W)))
    block_c = triton.next_power_of_2(len(sizes))
    common = rows_N, offsets, lows
    _tail_scores[(sum(-(-size // TILE) for size in sizes),)](
        *(hidden_NW, weight_VW, bias_V, *common, first_tiles, largest, total, first_cluster, len(sizes), W, n_tile),
        BLOCK_C=block_c,
        BLOCK_R=block_r,
        BLOCK_V=TILE,
        BLOCK_W=block_w,
        WHOLE_WIDTH=W % block_w == 0,
        PRECISION=precision_of(hidden_NW.dtype),
        num_warps=warps,
        num_stages=stages,
    )
    last = {"BLOCK_V": TILE, "BLOCK_C": block_c, "BLOCK_W": triton.next_power_of_2(W), "BLOCK": triton.next_power_of_2(n_tile)}
    _add_tail_nll[(N,)](
        *(hidden_NW, weight_VW, bias_V, target_ids_N, *common, largest, total, nll_N, first_cluster, len(sizes), W, n_tile), **last
    )
