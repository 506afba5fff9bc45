"""The model of training through torch.compile, in parts: a layer, compiled once for all of them, and the softmax's scores.

Compiling the whole model instead takes as many times longer as it has layers, and steps are hardly faster. What lies between is left as it
is: embeddings, and the choice of the targets in tail clusters.
"""

# Shape suffixes: B batch, Q inputs (ext_len + tgt_len), M mem_len, K = M + Q, D d_model, N tokens, R tokens of one tail cluster, V words,
# W width of a table

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from txl_train.model.adaptive import AdaptiveLogSoftmax
from txl_train.model.attention import mask_scores
from txl_train.model.graphed import GraphedDecoder
from txl_train.model.transformer_xl import Decoder, DecoderLayer, TransformerXL


def compiled_twin(model: TransformerXL, *, dynamic: bool, graphed: bool = False) -> TransformerXL:
    """Return a model with the same layers and weights, and its mode of each, that compiles its layers when it is first called.

    Args:
        dynamic: for segments of any length at once, rather than for each length that comes.
        graphed: run the layers as CUDA graphs (`graphed`), on a GPU.
    """
    twin = copy.copy(model)
    twin._modules = dict(model._modules)  # of its own, so that what is replaced stays in the model
    decoder = CompiledDecoder(model.layers, dynamic=dynamic)
    twin.decoder = GraphedDecoder(decoder) if graphed else decoder
    twin.head = CompiledLogSoftmax(model.head, dynamic=dynamic)
    return twin


class CompiledDecoder(Decoder):
    """`Decoder` with a memory of hidden states; all that a layer does is one compiled function."""

    def __init__(self, layers: nn.ModuleList, *, dynamic: bool) -> None:
        super().__init__(layers)
        self._step: Callable[..., tuple[Tensor, Tensor]] = torch.compile(_own(_layer_step), dynamic=dynamic)

    def forward(
        self, x_BQD: Tensor, states: list[Tensor], position_terms: list[Tensor], visible_B1QK: Tensor, kv_memory: bool, ext_len: int
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the last layer's output for the segment, [B, T, D], and the new states; see `Decoder.forward`."""
        assert not kv_memory, "training keeps hidden states"
        tgt_len = x_BQD.shape[1] - ext_len
        mask_B1QK = mask_scores(visible_B1QK)
        new_states: list[Tensor] = []
        for layer, state, term in zip(self.layers, states, position_terms, strict=True):
            x_BQD, new_state = self._step(layer, x_BQD, state, term, mask_B1QK, tgt_len)
            new_states.append(new_state)
        return x_BQD[:, ext_len:], new_states


def _layer_step(
    layer: DecoderLayer, x_BQD: Tensor, state_BMD: Tensor, position_term: Tensor, mask_B1QK: Tensor, tgt_len: int
) -> tuple[Tensor, Tensor]:
    """Return a layer's output [B, Q, D] and the memory of its input for the next segment [B, M, D]."""
    memory_key, memory_value = layer.project_memory(state_BMD, position_term)
    with torch.no_grad():
        seen_BKD = torch.cat([state_BMD, x_BQD.to(state_BMD.dtype)], dim=1)
        new_BMD = seen_BKD[:, tgt_len:][:, : state_BMD.shape[1]].contiguous()
    x_BQD, _, _ = layer(x_BQD, memory_key, memory_value, position_term, mask_B1QK)
    return x_BQD, new_BMD


class CompiledLogSoftmax(AdaptiveLogSoftmax):
    """`AdaptiveLogSoftmax` whose scores are summed up in few passes: they are the largest tensors of training. Shares all with `plain`."""

    def __init__(self, plain: AdaptiveLogSoftmax, *, dynamic: bool) -> None:
        nn.Module.__init__(self)
        self.__dict__.update({name: copy.copy(value) for name, value in plain.__dict__.items()})
        self._head: Callable[..., Tensor] = torch.compile(_own(AdaptiveLogSoftmax.head_nll), dynamic=dynamic)
        self._tail: Callable[..., Tensor] = torch.compile(_own(AdaptiveLogSoftmax.tail_nll), dynamic=True)

    def scores(self, hidden_ND: Tensor, cluster: int, weight_VW: Tensor, bias_V: Tensor) -> Tensor:
        """As `AdaptiveLogSoftmax.scores`, with the bias added in float32: see `attention.for_exact_sums`."""
        return F.linear(self.project(hidden_ND, cluster), weight_VW).float() + bias_V

    def cluster_logits(self, hidden_ND: Tensor) -> Tensor:
        """As `AdaptiveLogSoftmax.cluster_logits`, in the same way."""
        return F.linear(self.project(hidden_ND, 0), self.cluster_weight).float() + self.cluster_bias

    def head_nll(self, hidden_ND: Tensor, target_ids_N: Tensor, weight_VW: Tensor, bias_V: Tensor) -> Tensor:
        """As `AdaptiveLogSoftmax.head_nll`."""
        return self._head(self, hidden_ND, target_ids_N, weight_VW, bias_V)

    def tail_nll(self, hidden_RD: Tensor, target_ids_R: Tensor, cluster: int, weight_VW: Tensor, bias_V: Tensor) -> Tensor:
        """As `AdaptiveLogSoftmax.tail_nll`; none or one token would be compiled for itself, so that is not."""
        if hidden_RD.shape[0] < 2:
            return super().tail_nll(hidden_RD, target_ids_R, cluster, weight_VW, bias_V)
        return self._tail(self, hidden_RD, target_ids_R, cluster, weight_VW, bias_V)


def _own(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function with code of its own: PyTorch keeps what it compiled by the code, for all copies of a model, and has a limit."""
    assert isinstance(function, types.FunctionType)
    return types.FunctionType(
        function.__code__.replace(), function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
