"""Attention by content alone, for models whose positions are vectors added to the inputs.

Two kinds: sinusoids added to the embeddings (Vaswani et al. 2017) and learned vectors added to the input of every layer (Al-Rfou et al.
2018, arXiv:1808.04444). Positions are counted back from the segment's end. The memory is kept without them and gets those of the
segment it is used in, so that a token that stays for several segments has one position at a time.
"""

# Shape suffixes: B batch, Q queries (ext_len + tgt_len), K keys, R position_rows, H heads, E d_head, D d_model, W = H*E

from __future__ import annotations

import torch
from torch import Tensor, nn

from txl_train.config import ModelConfig
from txl_train.model.attention import Attention


class AbsoluteAttention(Attention):
    """Plain attention; its position term is the given encodings, or nothing where an earlier layer has added them."""

    def __init__(self, config: ModelConfig, *, adds_positions: bool) -> None:
        super().__init__(config)
        self.adds_positions = adds_positions

    def position_term(self, positions: Tensor) -> Tensor:
        """Return the encodings [K, D], or [0, D]."""
        return positions if self.adds_positions else positions[:0]

    def scores(self, query_BQW: Tensor, key_BHKE: Tensor, position_term: Tensor) -> Tensor:
        """Return q·k, scaled, [B, H, Q, K]."""
        return torch.matmul(self.split_heads(query_BQW) * self.scale, key_BHKE.transpose(2, 3))


class LearnedAttention(AbsoluteAttention):
    """Plain attention of a layer with positions of its own; its position term is their vectors."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, adds_positions=True)
        self.position_embedding = nn.Parameter(torch.empty(config.position_rows, config.d_model))
        """[R, D]: the last row is the segment's last token, the one before it that before, …"""

    def position_term(self, positions: Tensor) -> Tensor:
        """Gather rows (int64 [K]) as [K, D]."""
        return self.position_embedding.index_select(0, positions)
