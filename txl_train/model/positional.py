"""Positions: sinusoidal encodings (Dai et al. 2019, section 3.3; Vaswani et al. 2017, section 3.5), and rows of learned ones."""

# Shape suffixes: K keys (mem_len + ext_len + tgt_len), D d_model

from __future__ import annotations

import torch
from torch import Tensor

from txl_train.config import ModelConfig


def encode_distances(distances: Tensor, d_model: int) -> Tensor:
    """Encode distances (any real dtype, [N]) as [N, D]: sines in the first half, cosines in the second, not interleaved.

    Always computed in float32: in half precision distances above 2048 are not even distinct.
    """
    frequencies = 10000 ** -(torch.arange(0, d_model, 2, dtype=torch.float32, device=distances.device) / d_model)
    angles = distances.to(torch.float32)[:, None] * frequencies[None, :]
    return torch.cat([torch.sin(angles), torch.cos(angles)], dim=1)


def shared_positions(config: ModelConfig, key_len: int, device: torch.device | None = None) -> Tensor:
    """Return what all layers read of positions: of each it makes its own position term.

    Entry c stands for distance K-1-c, the farthest first. Kinds that score distances (relative, shaw) have one more, K+1 in all: it is
    distance -1, a key in the future. Nothing attends to it; it is there so that `rel_shift` is one slice of a flat view. For the other
    kinds (sinusoidal, learned) it is the distance of key c from the segment's last token, of which there are K.

    relative and sinusoidal: encodings, float32 [.., D], of distances of at most `clamp_len`. shaw and learned: row numbers, int64 [..],
    of the `position_rows` rows, distance 0 being the last; the farthest row, or with `clamp_len` the last but `clamp_len` - 1, serves all
    distances beyond.
    """
    nearest = -1 if config.attn_type in ("relative", "shaw") else 0
    distances = torch.arange(key_len - 1, nearest - 1, -1, device=device).clamp(min=0)
    if config.attn_type in ("relative", "sinusoidal"):
        if config.clamp_len is not None:
            distances = distances.clamp(max=config.clamp_len)
        return encode_distances(distances, config.d_model)
    n_rows = config.position_rows if config.clamp_len is None else min(config.position_rows, config.clamp_len)
    return config.position_rows - 1 - distances.clamp(max=n_rows - 1)
