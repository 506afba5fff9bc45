"""The model as deployed: fixed lengths, constants folded, plain tensors in and out.

`InferenceStep` shares the weights of a `TransformerXL` and runs the same layers. What depends on weights and lengths alone (the
position terms) is computed once. It is written so that eager PyTorch, TorchScript and the ONNX exporter take it as it is.
"""

# Shape suffixes: B batch, T tgt_len, Q inputs (ext_len + tgt_len), M mem_len, K = M + Q keys, R tokens of one tail cluster, D d_model

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from txl_train.config import MemoryKind, ModelConfig, SameLengthRule
from txl_train.errors import ConfigError
from txl_train.model.attention import visible_keys
from txl_train.model.memory import require_memory_kind
from txl_train.model.transformer_xl import Decoder, TransformerXL


class InferenceStep(nn.Module):
    """One segment of scoring: tokens, targets and memory in; per-token nll and memory out.

    Args:
        model: whose weights are shared, not copied. It is not changed, so it must be in evaluation mode while this runs.
        tgt_len: tokens per segment, T.
        memory: the kind of memory it carries.
        config: the model's configuration with other lengths (`with_lengths`); None keeps the model's own.

    Raises:
        ConfigError: there is no token per segment, or the model cannot have that kind of memory.
    """

    def __init__(self, model: TransformerXL, tgt_len: int, memory: MemoryKind = "kv", config: ModelConfig | None = None) -> None:
        super().__init__()
        if tgt_len < 1:
            raise ConfigError(f"`tgt_len` must be 1 or more, but is {tgt_len} instead.")
        self.config = model.config if config is None else config
        require_memory_kind(self.config, memory)
        self.memory: MemoryKind = memory
        self.kv_memory = memory == "kv"
        self.tgt_len = tgt_len
        self.mem_len = self.config.mem_len
        self.ext_len = self.config.ext_len
        self.max_distance = self.config.max_distance
        self.embedding = model.embedding.cut(self.config)
        self.decoder = Decoder(model.layers)
        self.head = model.head.cut(self.config, self.embedding if self.config.tie_weights else None)
        key_len = self.mem_len + self.ext_len + tgt_len
        with torch.no_grad():
            terms = [term.contiguous() for term in model.position_terms(self.config, key_len)]
        self.position_terms = nn.ParameterList([nn.Parameter(term, requires_grad=False) for term in terms])

    def forward(
        self, input_ids_BQ: Tensor, target_ids_BT: Tensor, target_rows: list[Tensor], memory_length_B: Tensor, states: list[Tensor]
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Return nll [B, T] (nats, float32, token order), the new valid lengths [B] and the new states.

        `input_ids_BQ` are the tokens before the targets, after the `ext_len` tokens before those.
        `target_rows` holds, per tail cluster, the flat positions b*T + t of the targets in it (`adaptive.cluster_rows`).
        """
        x_BQD = self.embedding(input_ids_BQ)
        visible_B1QK = visible_keys(self.tgt_len, self.mem_len, self.max_distance, memory_length_B, self.ext_len)
        position_terms: list[Tensor] = []
        for term in self.position_terms:  # TorchScript knows no list(...) of parameters
            position_terms.append(term)
        hidden_BTD, new_states = self.decoder(x_BQD, states, position_terms, visible_B1QK, self.kv_memory, self.ext_len)
        nll_N = self.head(hidden_BTD.flatten(0, 1), target_ids_BT.reshape(-1), target_rows)
        nll_BT = nll_N.view_as(target_ids_BT)
        return nll_BT, (memory_length_B + self.tgt_len).clamp(max=self.mem_len + self.ext_len), new_states


def with_lengths(
    config: ModelConfig,
    *,
    mem_len: int | None = None,
    ext_len: int | None = None,
    clamp_len: int | None = None,
    same_length: bool | None = None,
    same_length_rule: SameLengthRule | None = None,
) -> ModelConfig:
    """Return `config` with other lengths; None keeps the value there is, and a `clamp_len` of 0 or less turns clamping off."""
    changes: dict[str, object] = {}
    if mem_len is not None:
        changes["mem_len"] = mem_len
    if ext_len is not None:
        changes["ext_len"] = ext_len
    if clamp_len is not None:
        changes["clamp_len"] = clamp_len if clamp_len > 0 else None
    if same_length is not None:
        changes["same_length"] = same_length
    if same_length_rule is not None:
        changes["same_length_rule"] = same_length_rule
    return dataclasses.replace(config, **changes)  # type: ignore[arg-type]
