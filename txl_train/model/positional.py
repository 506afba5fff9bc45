"""Sinusoidal encodings of distances (Dai et al. 2019, section 3.3; Vaswani et al. 2017, section 3.5)."""

# Shape suffixes: T tgt_len, K keys (mem_len + tgt_len), D d_model

from __future__ import annotations

import torch
from torch import Tensor


def encode_distances(distances: Tensor, d_model: int) -> Tensor:
    """Encode distances (any real dtype, [N]) as [N, D]: sines in the first half, cosines in the second, not interleaved.

    Always computed in float32: in half precision distances above 2048 are not even distinct.
    """
    frequencies = 10000 ** -(torch.arange(0, d_model, 2, dtype=torch.float32, device=distances.device) / d_model)
    angles = distances.to(torch.float32)[:, None] * frequencies[None, :]
    return torch.cat([torch.sin(angles), torch.cos(angles)], dim=1)


def relative_positions(key_len: int, d_model: int, clamp_len: int | None, device: torch.device | None = None) -> Tensor:
    """Return the encodings [K+1, D] that relative attention reads: column c is distance K-1-c, at most `clamp_len`.

    The last row stands for distance -1, a key in the future. Nothing attends to it; it is there so that
    `rel_shift` is one slice of a flat view.
    """
    distances = torch.arange(key_len - 1, -2, -1, device=device).clamp(min=0)
    if clamp_len is not None:
        distances = distances.clamp(max=clamp_len)
    return encode_distances(distances, d_model)
