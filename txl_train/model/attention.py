"""Attention of a segment over its memory and itself: what all kinds have in common, and which keys a query sees.

The kinds differ in how positions enter, and each is a file: `relative.py` (Dai et al. 2019), `shaw.py` (learned, by distance) and
`absolute.py` (sinusoids or learned vectors added to the inputs). Keys and values of the memory are given, so the same code serves a
memory of hidden states (projected by the caller) and one of keys and values.
"""

# Shape suffixes: B batch, Q queries (ext_len + tgt_len), M mem_len, K = M + Q keys, H heads, E d_head, D d_model, W = H*E

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from txl_train.config import ModelConfig

MASKED_SCORE = -1e30
"""Score of a key that must not be seen: its weight underflows to exactly 0. Finite, as engines dislike infinities."""


def visible_keys(tgt_len: int, mem_len: int, max_distance: int | None, memory_length_B: Tensor, ext_len: int = 0) -> Tensor:
    """Return bool [B, 1, Q, K]: the key is not in the future, not too far back, and a token of its stream.

    `max_distance` in tokens is the limit that `same_length` sets; None means none. `memory_length_B` counts the stream's tokens
    before the segment, back over the `ext_len` that are read once more into the memory.
    """
    device = memory_length_B.device
    query_Q1 = torch.arange(ext_len + tgt_len, device=device)[:, None]
    key_1K = torch.arange(mem_len + ext_len + tgt_len, device=device)[None, :]
    distance_QK = query_Q1 + mem_len - key_1K
    in_range_QK = distance_QK >= 0
    if max_distance is not None:
        in_range_QK = in_range_QK & (distance_QK <= max_distance)
    filled_BK = key_1K >= mem_len + ext_len - memory_length_B[:, None]
    return (in_range_QK[None] & filled_BK[:, None])[:, None]


def mask_scores(visible_B1QK: Tensor, masked_score: float = MASKED_SCORE) -> Tensor:  # TorchScript reads no globals
    """Return what to add to scores, float32 [B, 1, Q, K]: 0 for keys that are seen; for others so little that their weight becomes 0.

    Added rather than chosen by a condition: in float32 any score is lost beside it, so the softmax is the same to the last bit, and adding
    is the operation that engines do fast (ONNX Runtime 1.32 on a CPU: 36 times faster than choosing, over the heads of four streams).
    """
    return (~visible_B1QK).to(torch.float32) * masked_score


def append(memory_BHME: Tensor, new_BHQE: Tensor, key_len: int) -> Tensor:
    """Return memory and new rows in one tensor, [B, H, K, E], in the type of the new rows.

    A memory that has `key_len` rows already has room for the new ones at its end: they are written there, and nothing else is copied.
    """
    if memory_BHME.shape[2] == key_len:
        memory_BHME[:, :, key_len - new_BHQE.shape[2] :].copy_(new_BHQE)
        return memory_BHME.to(new_BHQE.dtype)
    return torch.cat([memory_BHME.to(new_BHQE.dtype), new_BHQE], dim=2)


def for_exact_sums(scores_BHQK: Tensor) -> Tensor:
    """Return the scores [B, H, Q, K] in float32, for training to add to.

    A compiler may keep a sum of half precision as it is in one place and rounded in another. Then a softmax is taken from other scores
    than its largest and its total are, its weights do not add up to 1, and the gradients are wrong by more the larger the scores are:
    PyTorch 2.11 does so (2.13 does not), and base models came to nothing after a hundred steps. A sum in float32 is the same everywhere.
    """
    return scores_BHQK.float()


class Attention(nn.Module):
    """Multi-head attention, projections without bias. A subclass says how positions enter.

    What a layer needs to know of positions is one tensor, its position term. It depends on weights and lengths alone, so inference
    computes it once.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.adds_positions = False  # if True, the position term is [K, D], to be added to the layer's memory and input
        self.n_head = config.n_head
        self.d_head = config.d_head
        self.scale = config.d_head**-0.5
        self.scores_at_once = 0  # if not 0, only as many streams at a time as have so many scores: see `packed.in_packs`
        width = config.n_head * config.d_head
        self.qkv = nn.Linear(config.d_model, 3 * width, bias=False)
        self.add_submodules(config)
        self.output = nn.Linear(width, config.d_model, bias=False)
        self.drop_weights = nn.Dropout(config.dropatt)

    def add_submodules(self, config: ModelConfig) -> None:
        """Add the kind's own linear layers, here because the order of weights is that of drawing them and of an optimizer's state."""

    def position_term(self, positions: Tensor) -> Tensor:
        """Return what this layer knows of positions, from what `positional.shared_positions` returned."""
        raise NotImplementedError

    def scores(self, query_BQW: Tensor, key_BHKE: Tensor, position_term: Tensor) -> Tensor:
        """Return the scores [B, H, Q, K], scaled by 1/sqrt(E); those of keys in the future may be anything finite."""
        raise NotImplementedError

    def split_heads(self, x_BQW: Tensor) -> Tensor:
        """[B, Q, H*E] -> [B, H, Q, E]."""
        return x_BQW.view(x_BQW.shape[0], x_BQW.shape[1], self.n_head, self.d_head).transpose(1, 2)

    def project_memory(self, memory_BMD: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values [B, H, M, E] of remembered hidden states."""
        width = self.n_head * self.d_head
        keys, values = torch.chunk(F.linear(memory_BMD.to(self.qkv.weight.dtype), self.qkv.weight[width:]), 2, dim=-1)
        return self.split_heads(keys), self.split_heads(values)

    def forward(
        self,
        x_BQD: Tensor,
        memory_key_BHME: Tensor,
        memory_value_BHME: Tensor,
        position_term: Tensor,
        mask_B1QK: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the attention's output [B, Q, D] and the keys and values [B, H, K, E] of memory and input together.

        `mask_B1QK` is what `mask_scores` returns.
        """
        query, key, value = torch.chunk(self.qkv(x_BQD.to(self.qkv.weight.dtype)), 3, dim=-1)
        key_BHKE = append(memory_key_BHME, self.split_heads(key), mask_B1QK.shape[3])
        value_BHKE = append(memory_value_BHME, self.split_heads(value), mask_B1QK.shape[3])

        B, n_scores = x_BQD.shape[0], self.n_head * mask_B1QK.shape[2] * mask_B1QK.shape[3]
        if self.scores_at_once > 0 and B * n_scores > self.scores_at_once:
            some = max(1, self.scores_at_once // n_scores)
            parts: list[Tensor] = []
            for b in range(0, B, some):
                streams = slice(b, b + some)
                parts.append(self.mix(query[streams], key_BHKE[streams], value_BHKE[streams], position_term, mask_B1QK[streams]))
            mixed_BQW = torch.cat(parts)
        else:
            mixed_BQW = self.mix(query, key_BHKE, value_BHKE, position_term, mask_B1QK)
        return self.output(mixed_BQW), key_BHKE, value_BHKE

    def mix(self, query_BQW: Tensor, key_BHKE: Tensor, value_BHKE: Tensor, position_term: Tensor, mask_B1QK: Tensor) -> Tensor:
        """Return the values mixed by the softmax of the scores, [B, Q, W]."""
        scores_BHQK = self.scores(query_BQW, key_BHKE, position_term).float().add_(mask_B1QK)
        if self.scores_at_once > 0:
            weights_BHQK = torch.softmax(scores_BHQK, dim=-1, out=scores_BHQK)  # row by row: each is read before it is written
        else:
            weights_BHQK = self.drop_weights(torch.softmax(scores_BHQK, dim=-1).to(value_BHKE.dtype))
        mixed_BHQE = torch.matmul(weights_BHQK, value_BHKE)
        return mixed_BHQE.transpose(1, 2).reshape(query_BQW.shape[0], query_BQW.shape[1], self.n_head * self.d_head)
