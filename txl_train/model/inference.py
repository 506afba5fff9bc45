"""The model as deployed: fixed lengths, constants folded, plain tensors in and out.

A step shares the weights of a `TransformerXL` and runs the same layers. What depends on weights and lengths alone (the position terms) is
computed once. It is written so that eager PyTorch, TorchScript and the ONNX exporter take it as it is, in float32 and in float16.
`InferenceStep` scores given targets; `NextTokenStep` and `NextTokenLogProbsStep` say what may come next.
"""

# Shape suffixes: B batch, T tgt_len, Q inputs (ext_len + tgt_len), M mem_len, K = M + Q keys, D d_model, V vocabulary

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor, nn

from txl_train.config import HeadKind, MemoryKind, ModelConfig, SameLengthRule
from txl_train.errors import ConfigError
from txl_train.model.attention import visible_keys
from txl_train.model.half import in_half
from txl_train.model.memory import Memory, empty_memory, require_memory_kind
from txl_train.model.transformer_xl import Decoder, TransformerXL


class FixedStep(nn.Module):
    """What all steps of fixed lengths share: everything but what is made of the last layer's output.

    Args:
        model: whose weights are shared if `dtype` is float32, and copied otherwise. It is not changed, so it must be in evaluation mode
            while this runs.
        tgt_len: tokens per segment, T.
        memory: the kind of memory it carries.
        config: the model's configuration with other lengths (`with_lengths`); None keeps the model's own.
        dtype: of weights and matrix products: float32, or float16 as `half.in_half` has it.
        memory_dtype: of the states; None means `dtype`.

    Raises:
        ConfigError: there is no token per segment, or the model cannot have that kind of memory.
        ValidationError: a weight is too large for `dtype`.
    """

    HEAD: ClassVar[HeadKind]
    """What the step yields."""

    def __init__(
        self,
        model: TransformerXL,
        tgt_len: int,
        memory: MemoryKind = "kv",
        config: ModelConfig | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        memory_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.head_kind: HeadKind = self.HEAD
        if tgt_len < 1:
            raise ConfigError(f"`tgt_len` must be 1 or more, but is {tgt_len} instead.")
        self.config = model.config if config is None else config
        require_memory_kind(self.config, memory)
        self.memory: MemoryKind = memory
        self.kv_memory = memory == "kv"
        self.dtype = dtype
        self.memory_dtype = dtype if memory_dtype is None else memory_dtype
        self.memory_dtype_name = {torch.float32: "fp32", torch.float16: "fp16"}[self.memory_dtype]
        self.tgt_len = tgt_len
        self.mem_len = self.config.mem_len
        self.ext_len = self.config.ext_len
        self.max_distance = self.config.max_distance
        key_len = self.mem_len + self.ext_len + tgt_len
        with torch.no_grad():
            terms = [term.contiguous() for term in model.position_terms(self.config, key_len)]  # of float32 weights, whatever `dtype`
        if dtype == torch.float16:
            model = in_half(model)
            # those added to the inputs stay float32 as the inputs do; those multiplied with queries are an operand like any other
            terms = [term if layer.adds_positions else term.half() for term, layer in zip(terms, model.decoder_layers())]
        self.embedding = model.embedding.cut(self.config)
        self.decoder = Decoder(model.layers)
        self.head = model.head.cut(self.config, self.embedding if self.config.tie_weights else None)
        self.position_terms = nn.ParameterList([nn.Parameter(term, requires_grad=False) for term in terms])

    @torch.jit.unused
    def initial_memory(self, batch_size: int, device: torch.device | str = "cpu") -> Memory:
        """Return the memory of `batch_size` streams at a cold start, in this step's types."""
        return empty_memory(self.config, self.memory, batch_size, device=device, dtype=self.memory_dtype)

    def run_layers(self, input_ids_BQ: Tensor, memory_length_B: Tensor, states: list[Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Return the last layer's output [B, T, D], the new valid lengths [B] and the new states."""
        x_BQD = self.embedding(input_ids_BQ)
        visible_B1QK = visible_keys(self.tgt_len, self.mem_len, self.max_distance, memory_length_B, self.ext_len)
        position_terms: list[Tensor] = []
        for term in self.position_terms:  # TorchScript knows no list(...) of parameters
            position_terms.append(term)
        hidden_BTD, new_states = self.decoder(x_BQD, states, position_terms, visible_B1QK, self.kv_memory, self.ext_len)
        return hidden_BTD, (memory_length_B + self.tgt_len).clamp(max=self.mem_len + self.ext_len), new_states


class InferenceStep(FixedStep):
    """One segment of scoring: tokens, targets and memory in; per-token nll and memory out."""

    HEAD: ClassVar[HeadKind] = "nll"

    def forward(
        self, input_ids_BQ: Tensor, target_ids_BT: Tensor, target_rows: list[Tensor], memory_length_B: Tensor, states: list[Tensor]
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Return nll [B, T] (nats, float32, token order), the new valid lengths [B] and the new states.

        `input_ids_BQ` are the tokens before the targets, after the `ext_len` tokens before those.
        `target_rows` holds, per tail cluster, the flat positions b*T + t of the targets in it (`adaptive.cluster_rows`).
        """
        hidden_BTD, length_B, new_states = self.run_layers(input_ids_BQ, memory_length_B, states)
        nll_N = self.head(hidden_BTD.flatten(0, 1), target_ids_BT.reshape(-1), target_rows)
        nll_BT = nll_N.view_as(target_ids_BT)
        return nll_BT, length_B, new_states


class NextTokenStep(FixedStep):
    """One segment of generation: tokens and memory in; scores of every word as the next one, and memory out."""

    HEAD: ClassVar[HeadKind] = "logits"

    def forward(self, input_ids_BQ: Tensor, memory_length_B: Tensor, states: list[Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Return logits [B, V] (float32) after the last token, the new valid lengths [B] and the new states.

        The softmax of the logits is the distribution of the next token. A plain softmax's are as the last product leaves them; of an
        adaptive softmax they are log p itself.
        """
        hidden_BTD, length_B, new_states = self.run_layers(input_ids_BQ, memory_length_B, states)
        logits_BV = self.head.next_token_logits(hidden_BTD[:, -1])
        return logits_BV, length_B, new_states


class NextTokenLogProbsStep(FixedStep):
    """As `NextTokenStep`, with log p of every word."""

    HEAD: ClassVar[HeadKind] = "log_probs"

    def forward(self, input_ids_BQ: Tensor, memory_length_B: Tensor, states: list[Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Return log p [B, V] (nats, float32) of every word after the last token, the new valid lengths [B] and the new states."""
        hidden_BTD, length_B, new_states = self.run_layers(input_ids_BQ, memory_length_B, states)
        log_probs_BV = self.head.log_probs(hidden_BTD[:, -1])
        return log_probs_BV, length_B, new_states


STEPS: dict[HeadKind, type[FixedStep]] = {"nll": InferenceStep, "logits": NextTokenStep, "log_probs": NextTokenLogProbsStep}
"""The step that ends in each kind of head."""


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
