"""Attention over distances: every score depends on what is at a key and on how far back it is (Dai et al. 2019, section 3.3).

The four terms of the paper's equation are two products here: (a)+(c), the query and the content bias u with the keys, and
(b)+(d), the query and the position bias v with encoded distances. Keys and values of the memory are given, so the
same code serves a memory of hidden states (projected by the caller) and one of keys and values.
"""

# Shape suffixes: B batch, T tgt_len, N = B*T, M mem_len, K = M + T keys, C = K + 1 distances, H heads, E d_head, D d_model, W = H*E

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from txl_train.config import ModelConfig

MASKED_SCORE = -1e30
"""Score of a key that must not be seen: its weight underflows to exactly 0. Finite, as engines dislike infinities."""


def visible_keys(tgt_len: int, mem_len: int, max_distance: int | None, memory_length_B: Tensor) -> Tensor:
    """Return bool [B, 1, T, K]: the key is not in the future, not too far back, and within its stream's valid memory.

    `max_distance` in tokens is the limit that `same_length` sets; None means none.
    """
    device = memory_length_B.device
    query_T1 = torch.arange(tgt_len, device=device)[:, None]
    key_1K = torch.arange(mem_len + tgt_len, device=device)[None, :]
    distance_TK = query_T1 + mem_len - key_1K
    in_range_TK = distance_TK >= 0
    if max_distance is not None:
        in_range_TK = in_range_TK & (distance_TK <= max_distance)
    filled_BK = key_1K >= mem_len - memory_length_B[:, None]
    return (in_range_TK[None] & filled_BK[:, None])[:, None]


def rel_shift(scores: Tensor) -> Tensor:
    """Re-align scores indexed by distance, [X, Y, T, K+1] (column c is distance K-1-c), so that column k belongs to key k.

    Query t sees key k at distance t + M - k, which is column T-1-t+k; over the flattened last two axes that is one slice of
    T*K values starting at T-1 (the trick of Dai et al. 2019, Appendix B, without its padding), and a view. Where the key is in the
    future, the result holds leftovers that the mask must remove. The leading axes, batch and heads, may come in either order.
    """
    X, Y, T, C = scores.shape
    K = C - 1
    return scores.view(X, Y, T * C)[:, :, T - 1 : T - 1 + T * K].view(X, Y, T, K)


class RelativeAttention(nn.Module):
    """Multi-head attention with relative positions: projections without bias, content bias u and position bias v."""

    def __init__(self, config: ModelConfig, content_bias: nn.Parameter, position_bias: nn.Parameter) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.d_head = config.d_head
        self.scale = config.d_head**-0.5
        self.masked_score = MASKED_SCORE  # TorchScript does not read globals
        width = config.n_head * config.d_head
        self.qkv = nn.Linear(config.d_model, 3 * width, bias=False)
        self.position = nn.Linear(config.d_model, width, bias=False)
        self.output = nn.Linear(width, config.d_model, bias=False)
        self.content_bias = content_bias
        self.position_bias = position_bias
        self.drop_weights = nn.Dropout(config.dropatt)

    def split_heads(self, x_BTW: Tensor) -> Tensor:
        """[B, T, H*E] -> [B, H, T, E]."""
        return x_BTW.view(x_BTW.shape[0], x_BTW.shape[1], self.n_head, self.d_head).transpose(1, 2)

    def project_memory(self, memory_BMD: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values [B, H, M, E] of remembered hidden states."""
        width = self.n_head * self.d_head
        keys, values = torch.chunk(F.linear(memory_BMD, self.qkv.weight[width:]), 2, dim=-1)
        return self.split_heads(keys), self.split_heads(values)

    def position_keys(self, positions_CD: Tensor) -> Tensor:
        """Project encoded distances [K+1, D] to [H, E, K+1]. They depend on weights alone, so inference does it once."""
        projected = F.linear(positions_CD, self.position.weight)
        return projected.view(positions_CD.shape[0], self.n_head, self.d_head).permute(1, 2, 0)

    def forward(
        self,
        x_BTD: Tensor,
        memory_key_BHME: Tensor,
        memory_value_BHME: Tensor,
        position_keys_HEC: Tensor,
        visible_B1TK: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the attention's output [B, T, D] and the keys and values [B, H, K, E] of memory and segment together."""
        width = self.n_head * self.d_head
        query, key, value = torch.chunk(F.linear(x_BTD, self.qkv.weight), 3, dim=-1)
        query_BHTE = self.split_heads(query)
        key_BHKE = torch.cat([memory_key_BHME, self.split_heads(key)], dim=2)
        value_BHKE = torch.cat([memory_value_BHME, self.split_heads(value)], dim=2)

        content_query_BHTE = (query_BHTE + self.content_bias[:, None]) * self.scale
        content_scores_BHTK = torch.matmul(content_query_BHTE, key_BHKE.transpose(2, 3))
        # all streams share the distances, so the batch joins the rows of one product per head: up to 3 times faster in training
        B, T, C = x_BTD.shape[0], x_BTD.shape[1], position_keys_HEC.shape[2]
        position_query_NHE = (query.reshape(B * T, self.n_head, self.d_head) + self.position_bias) * self.scale
        by_distance_HNC = torch.matmul(position_query_NHE.transpose(0, 1), position_keys_HEC)
        position_scores_BHTK = rel_shift(by_distance_HNC.view(self.n_head, B, T, C)).transpose(0, 1)
        scores_BHTK = (content_scores_BHTK + position_scores_BHTK).float().masked_fill(~visible_B1TK, self.masked_score)
        weights_BHTK = self.drop_weights(torch.softmax(scores_BHTK, dim=-1).to(value_BHKE.dtype))

        mixed_BHTE = torch.matmul(weights_BHTK, value_BHKE)
        mixed_BTW = mixed_BHTE.transpose(1, 2).reshape(B, T, width)
        return self.output(mixed_BTW), key_BHKE, value_BHKE
