"""Attention over learned distances, after Shaw et al. 2018 (arXiv:1803.02155) as Transformer-XL's code does it.

Every layer has a vector and a bias for each of R distances; those farther away share the farthest one's. Score of a key at distance d:
(q + u)·k + q·r_d + b_d, scaled, with the layer's own content bias u.
"""

# Shape suffixes: B batch, Q queries (ext_len + tgt_len), N = B*Q, K keys, C = K + 1 distances, R position_rows, H heads, E d_head, W = H*E

from __future__ import annotations

import torch
from torch import Tensor, nn

from txl_train.config import ModelConfig
from txl_train.model.attention import Attention, for_exact_sums
from txl_train.model.relative import rel_shift


class ShawAttention(Attention):
    """Attention with learned distances; its position term is their keys and, as one more row, their biases."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        rows, heads = config.position_rows, config.n_head
        self.content_bias = nn.Parameter(torch.empty(heads, config.d_head))
        self.distance_keys = nn.Parameter(torch.empty(rows, heads, config.d_head))
        """[R, H, E]: the last row is distance 0, the one before it distance 1, …"""
        self.distance_bias = nn.Parameter(torch.empty(rows, heads))
        """[R, H], in the same order."""

    def position_term(self, positions: Tensor) -> Tensor:
        """Gather rows (int64 [K+1]) of keys and biases as [H, E+1, K+1]; the last is the bias, scaled."""
        keys_HEC = self.distance_keys.index_select(0, positions).permute(1, 2, 0)
        bias_H1C = self.distance_bias.index_select(0, positions).t()[:, None] * self.scale
        return torch.cat([keys_HEC, bias_H1C], dim=1)

    def scores(self, query_BQW: Tensor, key_BHKE: Tensor, position_term: Tensor) -> Tensor:
        """Return (q + u)·k + q·r + b, scaled, [B, H, Q, K]."""
        content_query_BHQE = (self.split_heads(query_BQW) + self.content_bias[:, None]) * self.scale
        content_scores_BHQK = torch.matmul(content_query_BHQE, key_BHKE.transpose(2, 3))
        B, Q, C = query_BQW.shape[0], query_BQW.shape[1], position_term.shape[2]
        query_NHE = query_BQW.reshape(B * Q, self.n_head, self.d_head) * self.scale
        keys_HEC, bias_H1C = position_term[:, : self.d_head], position_term[:, self.d_head :]
        by_distance_HNC = torch.matmul(query_NHE.transpose(0, 1), keys_HEC)
        if self.training:
            content_scores_BHQK, by_distance_HNC = for_exact_sums(content_scores_BHQK), for_exact_sums(by_distance_HNC)
        by_distance_HNC = by_distance_HNC + bias_H1C
        position_scores_BHQK = rel_shift(by_distance_HNC.view(self.n_head, B, Q, C)).transpose(0, 1)
        return content_scores_BHQK + position_scores_BHQK
