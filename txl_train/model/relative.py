"""Attention over distances: every score depends on what is at a key and on how far back it is (Dai et al. 2019, section 3.3).

The four terms of the paper's equation are two products here: (a)+(c), the query and the content bias u with the keys, and
(b)+(d), the query and the position bias v with encoded distances.
"""

# Shape suffixes: B batch, Q queries (ext_len + tgt_len), N = B*Q, M mem_len, K = M + Q keys, C = K + 1 distances, or fewer (see `nearer`),
# H heads, E d_head, D d_model, W = H*E

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from txl_train.config import ModelConfig
from txl_train.model.attention import Attention, for_exact_sums


def rel_shift(scores: Tensor) -> Tensor:
    """Re-align scores indexed by distance, [X, Y, Q, K+1] (column c is distance K-1-c), so that column k belongs to key k.

    Query q sees key k at distance q + M - k, which is column Q-1-q+k; over the flattened last two axes that is one slice of
    Q*K values starting at Q-1 (the trick of Dai et al. 2019, Appendix B, without its padding), and a view. Where the key is in the
    future, the result holds leftovers that the mask must remove. The leading axes, batch and heads, may come in either order. Columns
    after distance -1 become keys after the last one, which mean nothing.
    """
    X, Y, Q, C = scores.shape
    K = C - 1
    return scores.view(X, Y, Q * C)[:, :, Q - 1 : Q - 1 + Q * K].view(X, Y, Q, K)


def nearer(term_HEC: Tensor, clamp_len: int | None, n_query: int) -> Tensor:
    """Return the encoded distances up to `clamp_len` alone, less that of `clamp_len`: for the same softmax, fewer products.

    From `clamp_len` on all distances are encoded alike, so what they add to a query's scores is one number, and a softmax does not change
    when it is taken from all of them. Then those keys get nothing, and the farthest, which no query sees nearer, need no column.
    `scores` knows how many from how many columns are left.
    """
    key_len = term_HEC.shape[2] - 1
    n_alike = 0 if clamp_len is None else key_len - n_query + 1 - clamp_len  # earliest keys: that far back for every query
    return term_HEC if n_alike < 1 else (term_HEC - term_HEC[:, :, :1])[:, :, n_alike:].contiguous()


def in_whole_lines(term_HEC: Tensor) -> Tensor:
    """Return the encoded distances, on a GPU with zeros after the last ones, so that a line is a multiple of 16 bytes in half precision.

    Without that, the three products of training that read or write such lines take up to five times as long there. On a CPU they gain
    nothing, and of short lines the zeros would be more than a tenth.
    """
    return F.pad(term_HEC, [0, -term_HEC.shape[2] % 8]) if term_HEC.is_cuda and term_HEC.shape[2] > 64 else term_HEC


class RelativeAttention(Attention):
    """Attention with encoded distances, content bias u and position bias v; its position term is the keys of the distances."""

    def __init__(self, config: ModelConfig, content_bias: nn.Parameter, position_bias: nn.Parameter) -> None:
        super().__init__(config)
        self.content_bias = content_bias
        self.position_bias = position_bias

    def add_submodules(self, config: ModelConfig) -> None:
        """Add the projection of distances."""
        self.position = nn.Linear(config.d_model, config.n_head * config.d_head, bias=False)

    def position_term(self, positions: Tensor) -> Tensor:
        """Project encoded distances [K+1, D] to [H, E, K+1]."""
        projected = F.linear(positions, self.position.weight)
        return projected.view(positions.shape[0], self.n_head, self.d_head).permute(1, 2, 0)

    def scores(self, query_BQW: Tensor, key_BHKE: Tensor, position_term: Tensor) -> Tensor:
        """Return (q + u)·k + (q + v)·r, scaled, [B, H, Q, K]; if the position term is of the nearer keys alone, it is added to theirs."""
        content_query_BHQE = (self.split_heads(query_BQW) + self.content_bias[:, None]) * self.scale
        content_scores_BHQK = torch.matmul(content_query_BHQE, key_BHKE.transpose(2, 3))
        # all streams share the distances, so the batch joins the rows of one product per head: up to 3 times faster in training
        B, Q, C = query_BQW.shape[0], query_BQW.shape[1], position_term.shape[2]
        position_query_NHE = (query_BQW.reshape(B * Q, self.n_head, self.d_head) + self.position_bias) * self.scale
        if self.training:
            content_scores_BHQK, position_term = for_exact_sums(content_scores_BHQK), in_whole_lines(position_term)
        by_distance_HNC = torch.matmul(position_query_NHE.transpose(0, 1), position_term)
        by_distance_HBQC = by_distance_HNC.view(self.n_head, B, Q, position_term.shape[2])
        position_scores_BHQK = rel_shift(by_distance_HBQC)[:, :, :, : C - 1].transpose(0, 1)
        n_alike = key_BHKE.shape[2] - C + 1
        near_scores_BHQK = content_scores_BHQK[:, :, :, n_alike:] if n_alike > 0 else content_scores_BHQK
        near_scores_BHQK.add_(position_scores_BHQK)  # in place: no other large tensor to be had and given back
        return content_scores_BHQK
