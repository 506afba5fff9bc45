"""Transformer-XL (Dai et al. 2019, arXiv:1901.02860): the only definition of the model there is.

`TransformerXL` is the model with its weights: `hidden, memory = model(input_ids, memory)` for training and for whoever wants hidden
states; the loss is a separate head. Its layers run in `Decoder`, which takes either kind of memory (see `memory.py`);
`inference.py` wraps the same weights for scoring with fixed lengths, and export traces that.
"""

# Shape suffixes: B batch, T tgt_len, Q inputs (ext_len + tgt_len), M mem_len, K = M + Q keys, H heads, E d_head, D d_model, V vocabulary

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from txl_train.config import ModelConfig
from txl_train.errors import CheckpointError, ConfigError
from txl_train.model.absolute import AbsoluteAttention, LearnedAttention
from txl_train.model.adaptive import AdaptiveEmbedding, AdaptiveLogSoftmax, cluster_rows, has_projections
from txl_train.model.attention import Attention, mask_scores, visible_keys
from txl_train.model.memory import Memory, empty_memory
from txl_train.model.positional import shared_positions
from txl_train.model.relative import RelativeAttention
from txl_train.model.shaw import ShawAttention


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
        out_BTD: Tensor = self.drop_outer(self.outer(self.drop_inner(F.relu(self.inner(x_BTD.to(self.inner.weight.dtype))))))
        return out_BTD


class DecoderLayer(nn.Module):
    """Attention and feed-forward, each added to its input and normalised, after (as published) or before (`pre_lnorm`).

    What runs from layer to layer, and is added to and normalised, has the type of the normalisation's weights (float32, also where the
    matrices are float16); each product takes it in the type of its own weights.
    """

    def __init__(self, config: ModelConfig, attention: Attention) -> None:
        super().__init__()
        self.pre_lnorm = config.pre_lnorm
        self.adds_positions = attention.adds_positions
        self.attention = attention
        self.attention_norm = nn.LayerNorm(config.d_model)
        self.feed_forward = FeedForward(config)
        self.feed_forward_norm = nn.LayerNorm(config.d_model)
        self.drop = nn.Dropout(config.dropout)

    def project_memory(self, memory_BMD: Tensor, position_term: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, M, E] of remembered inputs of this layer, which are kept before positions and normalisation."""
        if self.adds_positions:
            memory_BMD = memory_BMD + position_term[: memory_BMD.shape[1]]
        normal_BMD: Tensor = self.attention_norm(memory_BMD.to(self.attention_norm.weight.dtype)) if self.pre_lnorm else memory_BMD
        return self.attention.project_memory(normal_BMD)

    def forward(
        self,
        x_BQD: Tensor,
        memory_key_BHME: Tensor,
        memory_value_BHME: Tensor,
        position_term: Tensor,
        mask_B1QK: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the layer's output [B, Q, D] and the keys and values [B, H, K, E] of memory and input."""
        if self.adds_positions:
            x_BQD = x_BQD + position_term[memory_key_BHME.shape[2] :]
        attended = self.attention_norm(x_BQD) if self.pre_lnorm else x_BQD
        mixed, key_BHKE, value_BHKE = self.attention(attended, memory_key_BHME, memory_value_BHME, position_term, mask_B1QK)
        x_BQD = x_BQD + self.drop(mixed)
        if self.pre_lnorm:
            x_BQD = x_BQD + self.feed_forward(self.feed_forward_norm(x_BQD))
        else:
            x_BQD = self.attention_norm(x_BQD)
            x_BQD = self.feed_forward_norm(x_BQD + self.feed_forward(x_BQD))
        return x_BQD, key_BHKE, value_BHKE


class Decoder(nn.Module):
    """The stack of layers over one segment and its memory."""

    def __init__(self, layers: nn.ModuleList) -> None:
        super().__init__()
        self.layers = layers

    def forward(
        self, x_BQD: Tensor, states: list[Tensor], position_terms: list[Tensor], visible_B1QK: Tensor, kv_memory: bool, ext_len: int
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the last layer's output for the segment, [B, T, D], and the new states.

        These are the M positions of memory and input that end `ext_len` before the end, where the next input begins.
        `states` are keys and values if `kv_memory`, otherwise the hidden inputs of the layers; `position_terms` has one per layer,
        as `TransformerXL.position_terms` returns them. Keys and values may have K rows rather than M: see `attention.append`.
        """
        tgt_len = x_BQD.shape[1] - ext_len
        mem_len = visible_B1QK.shape[3] - x_BQD.shape[1]
        mask_B1QK = mask_scores(visible_B1QK)
        new_states: list[Tensor] = []
        for i, layer in enumerate(self.layers):
            if kv_memory:
                memory_key, memory_value = states[2 * i], states[2 * i + 1]
            else:
                # a ModuleList yields Modules, of which any attribute may be a tensor; TorchScript allows no comment after the next one
                memory_key, memory_value = layer.project_memory(states[i], position_terms[i])  # type: ignore[operator]
                seen_BKD = torch.cat([states[i], x_BQD.to(states[i].dtype)], dim=1)
                new_states.append(seen_BKD[:, tgt_len:][:, : states[i].shape[1]])
            x_BQD, key_BHKE, value_BHKE = layer(x_BQD, memory_key, memory_value, position_terms[i], mask_B1QK)
            if kv_memory:
                new_states.append(key_BHKE[:, :, tgt_len:][:, :, :mem_len].to(memory_key.dtype))
                new_states.append(value_BHKE[:, :, tgt_len:][:, :, :mem_len].to(memory_value.dtype))
        return x_BQD[:, ext_len:], new_states


class TransformerXL(nn.Module):
    """A Transformer-XL language model with freshly drawn weights (from PyTorch's global generator).

    Raises:
        ConfigError: the configuration names no vocabulary size, or not how many positions are learned.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if config.vocab_size < 1:
            raise ConfigError(f"`vocab_size` must be 1 or more to build a model, but is {config.vocab_size} instead.")
        if config.attn_type in ("shaw", "learned") and config.position_rows < 1:
            raise ConfigError(
                f"`position_rows` must be 1 or more to build a model of `attn_type` {config.attn_type}, but is 0 instead.",
                remedy="Give the number of positions it learns, such as tgt_len + ext_len + mem_len.",
            )
        self.config = config
        if config.attn_type == "relative" and not config.untie_biases:
            self.content_bias, self.position_bias = self._make_biases()
        self.embedding = AdaptiveEmbedding(config)
        self.layers = nn.ModuleList(DecoderLayer(config, self._make_attention(i)) for i in range(config.n_layer))
        self.decoder = Decoder(self.layers)
        self.head = self._make_head()
        self.drop = nn.Dropout(config.dropout)
        if torch.get_default_device().type != "meta":  # where there is nothing to draw, and drawing would load PyTorch's compiler
            self.reset_parameters()

    def _make_biases(self) -> tuple[nn.Parameter, nn.Parameter]:
        shape = (self.config.n_head, self.config.d_head)
        return nn.Parameter(torch.empty(shape)), nn.Parameter(torch.empty(shape))

    def _make_attention(self, layer: int) -> Attention:
        config = self.config
        match config.attn_type:
            case "relative":
                biases = self._make_biases() if config.untie_biases else (self.content_bias, self.position_bias)
                return RelativeAttention(config, *biases)
            case "shaw":
                return ShawAttention(config)
            case "sinusoidal":
                return AbsoluteAttention(config, adds_positions=layer == 0)
            case "learned":
                return LearnedAttention(config)

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
        """Draw all weights anew, as the reference does: projections and normalisations have distributions of their own.

        So have the embeddings where `emb_init` is given, an output matrix that is tied to them included.
        """
        config = self.config
        projections = {id(p) for p in [*self.embedding.projections, *self.head.projections]}
        embeddings = {id(p) for p in self.embedding.weights} if config.emb_init is not None else set()
        for name, parameter in self.named_parameters():
            kind = name.rsplit(".", 1)[-1]
            if "norm." in name:
                nn.init.zeros_(parameter) if kind == "bias" else nn.init.normal_(parameter, 1.0, config.init_std)
            elif id(parameter) in projections:
                nn.init.normal_(parameter, 0.0, config.proj_init_std)
            elif kind in ("bias", "cluster_bias", "distance_bias") or "biases." in name:
                nn.init.zeros_(parameter)
            else:
                own = id(parameter) in embeddings
                distribution, half_width = (config.emb_init, config.emb_init_range) if own else (config.init, config.init_range)
                if distribution == "uniform":
                    nn.init.uniform_(parameter, -half_width, half_width)
                else:
                    nn.init.normal_(parameter, 0.0, config.init_std)

    def forward(self, input_ids_BQ: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """Run one segment of any length.

        Args:
            input_ids_BQ: int64 token ids: `ext_len` tokens that come before the segment, any ids where there are none, and the segment.
            memory: of hidden states, as `initial_memory` or an earlier call returned it.

        Returns:
            The hidden states [B, T, D] of the segment, which enter the softmax, and the memory for the next one, without gradient.

        Raises:
            ConfigError: the input is no longer than `ext_len`.
        """
        config = self.config
        T = input_ids_BQ.shape[1] - config.ext_len
        if T < 1:
            raise ConfigError(f"An input of {input_ids_BQ.shape[1]} tokens has no segment after the `ext_len` of {config.ext_len}.")
        position_terms = self.position_terms(config, config.mem_len + config.ext_len + T, self.drop)
        visible_B1QK = visible_keys(T, config.mem_len, config.max_distance, memory.length_B, config.ext_len)
        x_BQD = self.drop(self.embedding(input_ids_BQ))
        hidden_BTD, states = self.decoder(x_BQD, memory.states, position_terms, visible_B1QK, False, config.ext_len)
        length_B = (memory.length_B + T).clamp(max=config.mem_len + config.ext_len)
        return self.drop(hidden_BTD), Memory([state.detach() for state in states], length_B)

    def position_terms(self, config: ModelConfig, key_len: int, drop: nn.Module | None = None) -> list[Tensor]:
        """Return each layer's position term for `key_len` keys, with the lengths of `config`.

        `drop` is applied to encoded positions, once for all layers, and not to learned ones, as in the reference.
        """
        weight = self.embedding.weights[0]
        positions = shared_positions(config, key_len, weight.device)
        if positions.is_floating_point():
            positions = positions.to(weight.dtype)
            if drop is not None:
                positions = drop(positions)
        return [layer.attention.position_term(positions) for layer in self.decoder_layers()]

    def nll(self, hidden_BTD: Tensor, target_ids_BT: Tensor, rows: list[Tensor] | None = None) -> Tensor:
        """Return −log p(target), nats, float32 [B, T].

        `rows` is what `cluster_rows` returns for the flat targets, on the device; who has it from the host need not wait for the device.
        """
        target_ids_N = target_ids_BT.reshape(-1)
        if rows is None:
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
        own = self._fitting(parameters)
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(parameters[name])

    @classmethod
    def from_parameters(cls, config: ModelConfig, parameters: dict[str, Tensor]) -> TransformerXL:
        """Return a model that has these tensors for weights, not copies of them; no weight is drawn.

        Raises:
            ConfigError: as the constructor.
            CheckpointError: as `load_parameters`.
        """
        with torch.device("meta"):
            shapes = cls(config)
        memo = {id(own): nn.Parameter(parameters[name].to(own.dtype)) for name, own in shapes._fitting(parameters).items()}
        return copy.deepcopy(shapes, memo=dict[int, object](memo))  # which keeps tied weights tied

    def _fitting(self, parameters: dict[str, Tensor]) -> dict[str, nn.Parameter]:
        """Return the own weights by name, if those given have the same names and shapes."""
        own = dict(self.named_parameters())
        missing, unknown = sorted(own.keys() - parameters.keys()), sorted(parameters.keys() - own.keys())
        if missing or unknown:
            raise CheckpointError(f"The weights do not fit the configuration: missing {missing or 'none'}, unknown {unknown or 'none'}.")
        for name, parameter in own.items():
            if parameter.shape != parameters[name].shape:
                raise CheckpointError(f"Weight `{name}` must have shape {list(parameter.shape)}, but has {list(parameters[name].shape)}.")
        return own
