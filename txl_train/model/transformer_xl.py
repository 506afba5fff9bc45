"""Transformer-XL (Dai et al. 2019, arXiv:1901.02860): the only definition of the model there is.

`TransformerXL` is the model with its weights: `hidden, memory = model(input_ids, memory)` for training and for whoever wants hidden
states; the loss is a separate head. Its layers run in `Decoder`, which takes either kind of memory (see `memory.py`);
`inference.py` wraps the same weights for scoring with fixed lengths, and export traces that.
"""

# Shape suffixes: B batch, T tgt_len, M mem_len, K = M + T keys, H heads, E d_head, D d_model, C = K + 1 encoded distances, V vocabulary

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from txl_train.config import ModelConfig
from txl_train.errors import CheckpointError, ConfigError
from txl_train.model.adaptive import AdaptiveEmbedding, AdaptiveLogSoftmax, cluster_rows, has_projections
from txl_train.model.attention import RelativeAttention, visible_keys
from txl_train.model.memory import Memory, empty_memory
from txl_train.model.positional import relative_positions


class FeedForward(nn.Module):
    """Two linear layers with a ReLU between, position by position."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.inner = nn.Linear(config.d_model, config.d_inner)
        self.outer = nn.Linear(config.d_inner, config.d_model)
        self.drop_inner = nn.Dropout(config.dropout)
        self.drop_outer = nn.Dropout(config.dropout)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        out_BTD: Tensor = self.drop_outer(self.outer(self.drop_inner(F.relu(self.inner(x_BTD)))))
        return out_BTD


class DecoderLayer(nn.Module):
    """Attention and feed-forward, each added to its input and normalised, after (as published) or before (`pre_lnorm`)."""

    def __init__(self, config: ModelConfig, content_bias: nn.Parameter, position_bias: nn.Parameter) -> None:
        super().__init__()
        self.pre_lnorm = config.pre_lnorm
        self.attention = RelativeAttention(config, content_bias, position_bias)
        self.attention_norm = nn.LayerNorm(config.d_model)
        self.feed_forward = FeedForward(config)
        self.feed_forward_norm = nn.LayerNorm(config.d_model)
        self.drop = nn.Dropout(config.dropout)

    def project_memory(self, memory_BMD: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, M, E] of remembered inputs of this layer, which are kept before any normalisation."""
        normal_BMD: Tensor = self.attention_norm(memory_BMD) if self.pre_lnorm else memory_BMD
        return self.attention.project_memory(normal_BMD)

    def forward(
        self,
        x_BTD: Tensor,
        memory_key_BHME: Tensor,
        memory_value_BHME: Tensor,
        position_keys_HEC: Tensor,
        visible_B1TK: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the layer's output [B, T, D] and the keys and values [B, H, K, E] of memory and segment."""
        attended = self.attention_norm(x_BTD) if self.pre_lnorm else x_BTD
        mixed, key_BHKE, value_BHKE = self.attention(attended, memory_key_BHME, memory_value_BHME, position_keys_HEC, visible_B1TK)
        x_BTD = x_BTD + self.drop(mixed)
        if self.pre_lnorm:
            x_BTD = x_BTD + self.feed_forward(self.feed_forward_norm(x_BTD))
        else:
            x_BTD = self.attention_norm(x_BTD)
            x_BTD = self.feed_forward_norm(x_BTD + self.feed_forward(x_BTD))
        return x_BTD, key_BHKE, value_BHKE


class Decoder(nn.Module):
    """The stack of layers over one segment and its memory."""

    def __init__(self, layers: nn.ModuleList) -> None:
        super().__init__()
        self.layers = layers

    def forward(
        self, x_BTD: Tensor, states: list[Tensor], position_keys: list[Tensor], visible_B1TK: Tensor, kv_memory: bool
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the last layer's output [B, T, D] and the new states: of memory and segment, the last M positions.

        `states` are keys and values if `kv_memory`, otherwise the hidden inputs of the layers; `position_keys` has one
        [H, E, K+1] per layer.
        """
        tgt_len = x_BTD.shape[1]
        new_states: list[Tensor] = []
        for i, layer in enumerate(self.layers):
            if kv_memory:
                memory_key, memory_value = states[2 * i], states[2 * i + 1]
            else:
                # a ModuleList yields Modules, of which any attribute may be a tensor; TorchScript allows no comment after the next one
                memory_key, memory_value = layer.project_memory(states[i])  # type: ignore[operator]
                new_states.append(torch.cat([states[i], x_BTD.to(states[i].dtype)], dim=1)[:, tgt_len:])
            x_BTD, key_BHKE, value_BHKE = layer(x_BTD, memory_key, memory_value, position_keys[i], visible_B1TK)
            if kv_memory:
                new_states.append(key_BHKE[:, :, tgt_len:])
                new_states.append(value_BHKE[:, :, tgt_len:])
        return x_BTD, new_states


class TransformerXL(nn.Module):
    """A Transformer-XL language model with freshly drawn weights (from PyTorch's global generator).

    Raises:
        ConfigError: the configuration names no vocabulary size.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if config.vocab_size < 1:
            raise ConfigError(f"`vocab_size` must be 1 or more to build a model, but is {config.vocab_size} instead.")
        self.config = config
        bias_shape = (config.n_head, config.d_head)
        if not config.untie_biases:
            self.content_bias = nn.Parameter(torch.empty(bias_shape))
            self.position_bias = nn.Parameter(torch.empty(bias_shape))
        self.embedding = AdaptiveEmbedding(config)
        self.layers = nn.ModuleList(
            DecoderLayer(
                config,
                nn.Parameter(torch.empty(bias_shape)) if config.untie_biases else self.content_bias,
                nn.Parameter(torch.empty(bias_shape)) if config.untie_biases else self.position_bias,
            )
            for _ in range(config.n_layer)
        )
        self.decoder = Decoder(self.layers)
        self.head = self._make_head()
        self.drop = nn.Dropout(config.dropout)
        self.reset_parameters()

    def _make_head(self) -> AdaptiveLogSoftmax:
        config, embedding = self.config, self.embedding
        tables = list(embedding.weights)
        weights = tables if config.tie_weights else [nn.Parameter(torch.empty_like(table)) for table in tables]
        biases = [nn.Parameter(torch.empty(table.shape[0])) for table in tables]
        projections: list[nn.Parameter] = []
        if has_projections(config):
            for i, width in enumerate(config.cluster_widths):
                tied = embedding.projections[0 if config.div_val == 1 else i]
                projections.append(tied if config.projection_is_tied(i) else nn.Parameter(torch.empty(config.d_model, width)))
        return AdaptiveLogSoftmax(config, weights, biases, projections)

    def reset_parameters(self) -> None:
        """Draw all weights anew, as the reference does: projections and normalisations have distributions of their own."""
        config = self.config
        projections = {id(p) for p in [*self.embedding.projections, *self.head.projections]}
        for name, parameter in self.named_parameters():
            kind = name.rsplit(".", 1)[-1]
            if "norm." in name:
                nn.init.zeros_(parameter) if kind == "bias" else nn.init.normal_(parameter, 1.0, config.init_std)
            elif id(parameter) in projections:
                self._draw(parameter, config.proj_init_std)
            elif kind in ("bias", "cluster_bias") or "biases." in name:
                nn.init.zeros_(parameter)
            else:
                self._draw(parameter, config.init_std)

    def _draw(self, parameter: Tensor, std: float) -> None:
        if self.config.init == "uniform":
            nn.init.uniform_(parameter, -self.config.init_range, self.config.init_range)
        else:
            nn.init.normal_(parameter, 0.0, std)

    def forward(self, input_ids_BT: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """Run one segment of any length.

        Args:
            input_ids_BT: int64 token ids.
            memory: of hidden states, as `initial_memory` or an earlier call returned it.

        Returns:
            The hidden states [B, T, D] that enter the softmax, and the memory for the next segment, without gradient.
        """
        config = self.config
        T = input_ids_BT.shape[1]
        positions_CD = relative_positions(config.mem_len + T, config.d_model, config.clamp_len, input_ids_BT.device)
        positions_CD = self.drop(positions_CD.to(self.embedding.weights[0].dtype))
        position_keys = [layer.attention.position_keys(positions_CD) for layer in self.decoder_layers()]
        visible_B1TK = visible_keys(T, config.mem_len, config.max_distance, memory.length_B)
        x_BTD = self.drop(self.embedding(input_ids_BT))
        x_BTD, states = self.decoder(x_BTD, memory.states, position_keys, visible_B1TK, False)
        return self.drop(x_BTD), Memory([state.detach() for state in states], (memory.length_B + T).clamp(max=config.mem_len))

    def nll(self, hidden_BTD: Tensor, target_ids_BT: Tensor) -> Tensor:
        """Return −log p(target), nats, float32 [B, T]."""
        target_ids_N = target_ids_BT.reshape(-1)
        rows = cluster_rows(target_ids_N, self.head.cluster_ends)
        nll_N: Tensor = self.head(hidden_BTD.flatten(0, 1), target_ids_N, rows)
        return nll_N.view_as(target_ids_BT)

    def log_probs(self, hidden_BTD: Tensor) -> Tensor:
        """Return log p of every word at every position, nats, float32 [B, T, V]."""
        log_probs_NV = self.head.log_probs(hidden_BTD.flatten(0, 1))
        return log_probs_NV.view(*hidden_BTD.shape[:2], -1)

    def initial_memory(self, batch_size: int) -> Memory:
        """Return the memory of hidden states at a cold start, on the model's device."""
        weight = self.embedding.weights[0]
        return empty_memory(self.config, "hidden", batch_size, device=weight.device, dtype=weight.dtype)

    def decoder_layers(self) -> list[DecoderLayer]:
        """The layers, with their type."""
        return [layer for layer in self.layers if isinstance(layer, DecoderLayer)]

    def parameters_by_name(self) -> dict[str, Tensor]:
        """Every weight once, detached, under its first name (tied weights have several): what a checkpoint holds."""
        return {name: parameter.detach() for name, parameter in self.named_parameters()}

    def load_parameters(self, parameters: dict[str, Tensor]) -> None:
        """Copy weights by name; the names and shapes must be exactly those of `parameters_by_name`.

        Raises:
            CheckpointError: a weight is missing, unknown or of another shape; nothing has been copied then.
        """
        own = dict(self.named_parameters())
        missing, unknown = sorted(own.keys() - parameters.keys()), sorted(parameters.keys() - own.keys())
        if missing or unknown:
            raise CheckpointError(f"The weights do not fit the configuration: missing {missing or 'none'}, unknown {unknown or 'none'}.")
        for name, parameter in own.items():
            if parameter.shape != parameters[name].shape:
                raise CheckpointError(f"Weight `{name}` must have shape {list(parameter.shape)}, but has {list(parameters[name].shape)}.")
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(parameters[name])
