"""What the model remembers from one segment to the next: fixed-size tensors and how much of them is filled.

Two kinds over the same weights:

* **hidden** (training; what the paper caches): the input of each layer, [B, M, D] per layer;
* **kv** (inference): the keys and values projected from those inputs, two [B, H, M, E] per layer. They depend on
  the weights alone, so keeping them gives the same result without projecting M positions again for each segment. Not so where
  positions are added to the inputs (`attn_type` sinusoidal and learned): there a memory of hidden states is the only one.

The newest position is last. `length_B` says how many of the last positions of each stream are filled: 0 is a cold start,
which equals the reference's memory of zero length exactly, because positions beyond the length are masked out.

With `ext_len`, a segment's input begins with that many tokens before it, which are read once more. The memory then ends where these
begin, and `length_B` counts both: the tokens of the stream directly before the segment, as far as extension and memory reach.
"""

# Shape suffixes: B batch, M mem_len, D d_model, H heads, E d_head

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from txl_train.config import MemoryKind, ModelConfig
from txl_train.errors import ConfigError


class Memory(NamedTuple):
    """The states of all layers, in order, and the valid length of each stream."""

    states: list[Tensor]
    """hidden: n_layer tensors [B, M, D]; kv: key and value of layer 0, of layer 1, … [B, H, M, E] each."""
    length_B: Tensor
    """int64 [B], 0..mem_len + ext_len: tokens directly before the next segment that are there to be seen."""


def state_shape(config: ModelConfig, kind: MemoryKind, batch_size: int) -> tuple[int, ...]:
    """Shape of each tensor of `Memory.states`."""
    if kind == "hidden":
        return (batch_size, config.mem_len, config.d_model)
    return (batch_size, config.n_head, config.mem_len, config.d_head)


def state_count(config: ModelConfig, kind: MemoryKind) -> int:
    """Number of tensors in `Memory.states`."""
    return config.n_layer if kind == "hidden" else 2 * config.n_layer


def best_memory_kind(config: ModelConfig) -> MemoryKind:
    """Return the kind of memory that saves most work among those the model can have."""
    return "hidden" if config.attn_type in ("sinusoidal", "learned") else "kv"


def require_memory_kind(config: ModelConfig, kind: MemoryKind) -> None:
    """Raise `ConfigError` if the model cannot have that kind of memory."""
    if kind == "kv" and best_memory_kind(config) == "hidden":
        raise ConfigError(
            f"A model of `attn_type` {config.attn_type} cannot keep keys and values: "
            "those of the memory depend on the position that it has in the segment where it is used.",
            remedy="Add `--memory hidden`.",
        )


def empty_memory(
    config: ModelConfig,
    kind: MemoryKind,
    batch_size: int,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Memory:
    """Return the memory of `batch_size` streams at a cold start."""
    shape = state_shape(config, kind, batch_size)
    states = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(state_count(config, kind))]
    return Memory(states, torch.zeros(batch_size, dtype=torch.int64, device=device))
