"""The model as deployed: fixed lengths, constants folded, plain tensors in and out.

`InferenceStep` shares the weights of a `TransformerXL` and runs the same layers. What depends on weights alone (the projected
distances) is computed once. It is written so that eager PyTorch, TorchScript and the ONNX exporter take it as it is.
"""

# Shape suffixes: B batch, T tgt_len, M mem_len, K = M + T keys, R tokens of one tail cluster, D d_model

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from txl_train.config import MemoryKind, ModelConfig
from txl_train.errors import ConfigError
from txl_train.model.attention import visible_keys
from txl_train.model.positional import relative_positions
from txl_train.model.transformer_xl import Decoder, TransformerXL


class InferenceStep(nn.Module):
    """One segment of scoring: tokens, targets and memory in; per-token nll and memory out.

    Args:
        model: whose weights are shared, not copied. It is not changed, so it must be in evaluation mode while this runs.
        tgt_len: tokens per segment, T.
        memory: the kind of memory it carries.
        config: the model's configuration with other lengths (`mem_len`, `clamp_len`, `same_length`); None keeps the model's own.
    """

    def __init__(self, model: TransformerXL, tgt_len: int, memory: MemoryKind = "kv", config: ModelConfig | None = None) -> None:
        super().__init__()
        if tgt_len < 1:
            raise ConfigError(f"`tgt_len` must be 1 or more, but is {tgt_len} instead.")
        self.config = model.config if config is None else config
        self.memory: MemoryKind = memory
        self.kv_memory = memory == "kv"
        self.tgt_len = tgt_len
        self.mem_len = self.config.mem_len
        self.max_distance = self.config.max_distance
        self.embedding = model.embedding.cut(self.config)
        self.decoder = Decoder(model.layers)
        self.head = model.head.cut(self.config, self.embedding if self.config.tie_weights else None)
        weight = model.embedding.weights[0]
        positions_CD = relative_positions(self.mem_len + tgt_len, self.config.d_model, self.config.clamp_len, weight.device)
        with torch.no_grad():
            keys = [layer.attention.position_keys(positions_CD.to(weight.dtype)).contiguous() for layer in model.decoder_layers()]
        self.position_keys = nn.ParameterList([nn.Parameter(key, requires_grad=False) for key in keys])

    def forward(
        self, input_ids_BT: Tensor, target_ids_BT: Tensor, target_rows: list[Tensor], memory_length_B: Tensor, states: list[Tensor]
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Return nll [B, T] (nats, float32, token order), the new valid lengths [B] and the new states.

        `target_rows` holds, per tail cluster, the flat positions b*T + t of the targets in it (`adaptive.cluster_rows`).
        """
        x_BTD = self.embedding(input_ids_BT)
        visible_B1TK = visible_keys(self.tgt_len, self.mem_len, self.max_distance, memory_length_B)
        position_keys: list[Tensor] = []
        for key in self.position_keys:  # TorchScript knows no list(...) of parameters
            position_keys.append(key)
        hidden_BTD, new_states = self.decoder(x_BTD, states, position_keys, visible_B1TK, self.kv_memory)
        nll_N = self.head(hidden_BTD.flatten(0, 1), target_ids_BT.reshape(-1), target_rows)
        return nll_N.view_as(target_ids_BT), (memory_length_B + self.tgt_len).clamp(max=self.mem_len), new_states


def with_lengths(
    config: ModelConfig, *, mem_len: int | None = None, clamp_len: int | None = None, same_length: bool | None = None
) -> ModelConfig:
    """Return `config` with other lengths; None keeps the value there is, and a `clamp_len` of 0 or less turns clamping off."""
    changes: dict[str, object] = {}
    if mem_len is not None:
        changes["mem_len"] = mem_len
    if clamp_len is not None:
        changes["clamp_len"] = clamp_len if clamp_len > 0 else None
    if same_length is not None:
        changes["same_length"] = same_length
    return dataclasses.replace(config, **changes)  # type: ignore[arg-type]
