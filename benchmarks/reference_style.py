"""The opponent of the inference benchmarks: our weights, computed in the way of NVIDIA's Transformer-XL (DeepLearningExamples, 2023).

What makes that way what it is, and what this keeps on purpose:

* time-first tensors, and a memory of the layers' inputs in one tensor, which begins with no positions at all and grows until it is full;
* queries, keys and values of memory and segment alike projected in every call, although only those of the segment are new;
* distances encoded and projected by every layer in every call, the mask built in every call, masked scores filled with -inf;
* scores re-aligned by a column of zeros, a concatenation and a view;
* the softmax's head matrix (shortlist and tail clusters) concatenated in every call, and the rows of each cluster found within the call;
* the new memory by stacking, concatenating and slicing;
* in float16 everything in float16: positions, normalisation and softmax too.

`reference_runtime` opens a checkpoint so, eager or in TorchScript, as a runtime like any other: `bench.harness.measure` times it beside
ours. Three things differ from the original. None costs time: nll goes into token order, which is an option of its own softmax; tail
cluster i has head column shortlist + i - 1 rather than the i-th from the end, as our checkpoints have it; and the two products of
attention scores are batched by hand in the eager form too, where the original's leaves that to einsum. Tokens come batch-first, and are
turned within the clock: microseconds.

Is it a fair stand-in? NVIDIA's own code ran beside it on 2026-11-24 outside this repository, step by step in turns: base model with the
same random weights, tgt 64, mem 640 (full), clamp 400, same_length, FP32, 2 threads of a shared CPU, PyTorch 2.13. Median latency of the
stand-in over that of NVIDIA's, of the steps during which other processes used little of the CPU. NVIDIA's TorchScript ran without the
profiling executor, as its eval.py has it, the stand-in with PyTorch's default. The nll of each segment's tokens, sorted since theirs are in
another order, were equal within 4e-6 nats.

| batch | eager | TorchScript |
|---|---|---|
| 1 | 0.98 (17 and 16 steps) | 0.99 (17 and 17) |
| 4 | 0.93 (13 and 13) | 0.99 (16 and 16) |
"""

# Shape suffixes: B batch, T tgt_len, S filled positions of the memory (0..mem_len), M mem_len, K = S + T keys, N = T*B tokens,
# R tokens of one cluster, L layers, H heads, E d_head, D d_model, W = H*E, V vocabulary

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from txl_deploy.runtimes.base import TORCH_TYPES, HeadError, RuntimeInfo, ShapeRangeError, torch_compute
from txl_deploy.runtimes.registry import resolve_device, use_threads
from txl_train.checkpoint import load_model
from txl_train.config import ModelConfig
from txl_train.errors import ConfigError
from txl_train.evaluate import StepOutput
from txl_train.model.adaptive import has_projections
from txl_train.model.memory import Memory
from txl_train.model.relative import RelativeAttention
from txl_train.model.transformer_xl import DecoderLayer, TransformerXL


def _shifted(scores_BHTK: Tensor) -> Tensor:
    """Move row t of scores by distance left by T-1-t, so that column k belongs to key k; the future's entries are leftovers."""
    B, H, T, K = scores_BHTK.shape
    zeros_BHT1 = torch.zeros([B, H, T, 1], dtype=scores_BHTK.dtype, device=scores_BHTK.device)
    padded = torch.cat([zeros_BHT1, scores_BHTK], dim=3).view(B, H, K + 1, T)
    return padded[:, :, 1:].view(B, H, T, K)


class ReferenceLayer(nn.Module):
    """One layer over the weights of ours."""

    def __init__(self, config: ModelConfig, layer: DecoderLayer) -> None:
        super().__init__()
        attention = layer.attention
        assert isinstance(attention, RelativeAttention), "checked by ReferenceModel"
        self.n_head, self.d_head = config.n_head, config.d_head
        self.scale = config.d_head**-0.5
        self.pre_lnorm = config.pre_lnorm
        self.qkv, self.position, self.output = attention.qkv, attention.position, attention.output
        self.content_bias, self.position_bias = attention.content_bias, attention.position_bias
        self.attention_norm, self.feed_forward_norm = layer.attention_norm, layer.feed_forward_norm
        self.inner, self.outer = layer.feed_forward.inner, layer.feed_forward.outer

    def forward(self, x_TBD: Tensor, memory_SBD: Tensor, encoded_KD: Tensor, hidden_TK: Tensor) -> Tensor:
        """Return the layer's output [T, B, D]; `hidden_TK` is true where a query must not see a key."""
        seen_KBD = torch.cat([memory_SBD, x_TBD], dim=0)
        if self.pre_lnorm:
            seen_KBD = self.attention_norm(seen_KBD)
        mixed_TBD = self.attend(seen_KBD, encoded_KD, hidden_TK, x_TBD.shape[0])
        if self.pre_lnorm:
            x_TBD = x_TBD + mixed_TBD
            x_TBD = x_TBD + self.outer(torch.relu_(self.inner(self.feed_forward_norm(x_TBD))))
        else:
            x_TBD = self.attention_norm(x_TBD + mixed_TBD)
            x_TBD = self.feed_forward_norm(x_TBD + self.outer(torch.relu_(self.inner(x_TBD))))
        return x_TBD

    def attend(self, seen_KBD: Tensor, encoded_KD: Tensor, hidden_TK: Tensor, tgt_len: int) -> Tensor:
        """Return the attention's output [T, B, D]."""
        K, B = seen_KBD.shape[0], seen_KBD.shape[1]
        H, E, T = self.n_head, self.d_head, tgt_len
        query_KBW, key_KBW, value_KBW = torch.chunk(self.qkv(seen_KBD), 3, dim=2)
        distances_KHE = self.position(encoded_KD).view(K, H, E)
        query_TBHE = query_KBW[K - T :].view(T, B, H, E)

        content_query = (query_TBHE + self.content_bias).view(T, B * H, E).transpose(0, 1)
        keys = key_KBW.reshape(K, B * H, E).permute(1, 2, 0)
        content_scores_BHTK = torch.bmm(content_query, keys).view(B, H, T, K)

        position_query = (query_TBHE + self.position_bias).permute(2, 1, 0, 3).reshape(H, B * T, E)
        by_distance = torch.bmm(position_query, distances_KHE.permute(1, 2, 0)).view(H, B, T, K)
        scores_BHTK = content_scores_BHTK + _shifted(by_distance.transpose(0, 1))

        scores_BHTK.mul_(self.scale).masked_fill_(hidden_TK[None, None], -float("inf"))
        weights = torch.softmax(scores_BHTK, dim=3).view(B * H, T, K)
        values = value_KBW.reshape(K, B * H, E).transpose(0, 1)
        mixed_TBW = torch.bmm(weights, values).transpose(0, 1).reshape(T, B, H * E)
        mixed_TBD: Tensor = self.output(mixed_TBW)
        return mixed_TBD


class ReferenceEmbedding(nn.Module):
    """Token ids to scaled vectors; with tables of several widths each token is looked up in its own."""

    def __init__(self, config: ModelConfig, model: TransformerXL) -> None:
        super().__init__()
        self.one_table = config.div_val == 1
        self.ends = list(model.embedding.ends)
        self.d_model = config.d_model
        self.scale = config.d_model**0.5
        self.has_projections = has_projections(config)
        self.weights, self.projections = model.embedding.weights, model.embedding.projections

    def forward(self, input_ids_TB: Tensor) -> Tensor:
        """[T, B] -> [T, B, D]."""
        tables: list[Tensor] = []  # TorchScript knows no len() or [i] of parameters
        for table in self.weights:
            tables.append(table)
        projections: list[Tensor] = []
        for projection in self.projections:
            projections.append(projection)
        if self.one_table:
            x_TBD = F.embedding(input_ids_TB, tables[0])
            if self.has_projections:
                x_TBD = F.linear(x_TBD, projections[0])
        else:
            ids_N = input_ids_TB.reshape(-1)
            x_ND = torch.zeros([ids_N.shape[0], self.d_model], dtype=tables[0].dtype, device=ids_N.device)
            for i in range(len(tables)):
                low, high = self.ends[i], self.ends[i + 1]
                rows_R = torch.nonzero((ids_N >= low) & (ids_N < high)).squeeze(1)
                if rows_R.numel() > 0:
                    vectors = F.embedding(ids_N.index_select(0, rows_R) - low, tables[i])
                    x_ND.index_copy_(0, rows_R, F.linear(vectors, projections[i]))
            x_TBD = x_ND.view(input_ids_TB.shape[0], input_ids_TB.shape[1], self.d_model)
        return x_TBD.mul_(self.scale)


class ReferenceSoftmax(nn.Module):
    """−log p of given targets, in the type of the weights."""

    def __init__(self, config: ModelConfig, model: TransformerXL) -> None:
        super().__init__()
        head = model.head
        self.one_table = config.div_val == 1
        self.ends = list(config.cluster_ends)
        self.n_cluster = config.n_cluster
        self.has_projections = has_projections(config)
        self.weights, self.biases, self.projections = head.weights, head.biases, head.projections
        self.cluster_weight, self.cluster_bias = head.cluster_weight, head.cluster_bias

    def project(self, hidden_ND: Tensor, cluster: int) -> Tensor:
        """Return the hidden states in the width of a cluster's table."""
        if not self.has_projections:
            return hidden_ND
        projections: list[Tensor] = []
        for projection in self.projections:
            projections.append(projection)
        return torch.matmul(hidden_ND, projections[cluster])

    def forward(self, hidden_ND: Tensor, target_ids_N: Tensor) -> Tensor:
        """Return [N] in token order."""
        weights: list[Tensor] = []
        for table in self.weights:
            weights.append(table)
        biases: list[Tensor] = []
        for bias in self.biases:
            biases.append(bias)
        if self.n_cluster == 0:
            log_probs_NV = torch.log_softmax(F.linear(self.project(hidden_ND, 0), weights[0], biases[0]), dim=1)
            return -log_probs_NV.gather(1, target_ids_N[:, None]).squeeze(1)

        shortlist = self.ends[1]
        head_weight = torch.cat([weights[0][:shortlist], self.cluster_weight])
        head_bias = torch.cat([biases[0][:shortlist], self.cluster_bias])
        head_NV = torch.log_softmax(F.linear(self.project(hidden_ND, 0), head_weight, head_bias), dim=1)
        nll_N = torch.zeros_like(target_ids_N, dtype=hidden_ND.dtype)
        for i in range(self.n_cluster + 1):
            low, high = self.ends[i], self.ends[i + 1]
            rows_R = torch.nonzero((target_ids_N >= low) & (target_ids_N < high)).squeeze(1)
            if rows_R.numel() > 0:
                targets_R1 = (target_ids_N.index_select(0, rows_R) - low)[:, None]
                head_RV = head_NV.index_select(0, rows_R)
                if i == 0:
                    log_prob_R = head_RV.gather(1, targets_R1).squeeze(1)
                else:
                    weight = weights[0][low:high] if self.one_table else weights[i]
                    bias = biases[0][low:high] if self.one_table else biases[i]
                    logits_RV = F.linear(self.project(hidden_ND.index_select(0, rows_R), i), weight, bias)
                    within_R = torch.log_softmax(logits_RV, dim=1).gather(1, targets_R1).squeeze(1)
                    log_prob_R = head_RV[:, shortlist + i - 1] + within_R
                nll_N.index_copy_(0, rows_R, -log_prob_R)
        return nll_N


class ReferenceModel(nn.Module):
    """A segment from token ids to nll, over the weights of `model`, which it shares.

    Args:
        model: whose weights are used.
        config: its configuration with the lengths in force; `ext_len` must be 0, and `same_length` means distances up to `mem_len`.

    Raises:
        ConfigError: the original's TorchScript has no such model.
    """

    def __init__(self, model: TransformerXL, config: ModelConfig) -> None:
        super().__init__()
        if config.attn_type != "relative" or config.ext_len:
            raise ConfigError(
                "The stand-in for NVIDIA's Transformer-XL computes `attn_type` relative without `ext_len`, "
                f"but this is `attn_type` {config.attn_type} with `ext_len` {config.ext_len}.",
                remedy="Compare a model of relative attention.",
            )
        self.mem_len = config.mem_len
        self.clamp_len = 0 if config.clamp_len is None else config.clamp_len
        self.same_length = config.same_length
        self.embedding = ReferenceEmbedding(config, model)
        self.layers = nn.ModuleList(ReferenceLayer(config, layer) for layer in model.decoder_layers())
        self.softmax = ReferenceSoftmax(config, model)
        frequencies = 10000 ** -(torch.arange(0, config.d_model, 2, dtype=torch.float32) / config.d_model)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, input_ids_TB: Tensor, target_ids_TB: Tensor, memory_LSBD: Tensor) -> tuple[Tensor, Tensor]:
        """Return nll [T, B] and the memory [L, S', B, D] of S' = min(S + T, M) positions."""
        x_TBD = self.embedding(input_ids_TB)
        T, S = input_ids_TB.shape[0], memory_LSBD.shape[1]
        hidden_TK = self.hidden_keys(T, S, x_TBD)
        encoded_KD = self.encode_distances(S + T, x_TBD)
        inputs: list[Tensor] = []
        for i, layer in enumerate(self.layers):
            inputs.append(x_TBD)
            x_TBD = layer(x_TBD, memory_LSBD[i], encoded_KD, hidden_TK)
        extended = torch.cat([memory_LSBD, torch.stack(inputs)], dim=1)
        new_memory = extended[:, max(0, S + T - self.mem_len) :]
        nll_N = self.softmax(x_TBD.view(-1, x_TBD.shape[2]), target_ids_TB.view(-1))
        return nll_N.view(T, -1), new_memory

    def hidden_keys(self, tgt_len: int, filled: int, like: Tensor) -> Tensor:
        """Return bool [T, K]: the key is in the future, or under `same_length` more than `mem_len` back."""
        key_len = filled + tgt_len
        ones_TK = torch.ones([tgt_len, key_len], dtype=like.dtype, device=like.device)
        hidden_TK = torch.triu(ones_TK, 1 + filled)
        if self.same_length:
            hidden_TK = hidden_TK + torch.tril(ones_TK, max(0, key_len - self.mem_len - 1) - tgt_len)
        return hidden_TK.to(torch.bool)

    def encode_distances(self, key_len: int, like: Tensor) -> Tensor:
        """Return sines and cosines [K, D] of the distances K-1 .. 0, which `clamp_len` limits."""
        distances_K = torch.arange(key_len - 1, -1, -1, dtype=like.dtype, device=like.device)
        if self.clamp_len > 0:
            distances_K = distances_K.clamp_(max=self.clamp_len)
        # a buffer, which may not be annotated, nor commented on behind the next line: TorchScript reads it
        angles = torch.outer(distances_K, self.frequencies)  # type: ignore[arg-type]
        return torch.cat([angles.sin(), angles.cos()], dim=1)


class ReferenceRuntime:
    """The stand-in as a runtime of `txl_deploy`.

    Its memory has one state, [L, M, B, D]: what the original carries, the filled positions, are the last ones of it, and the module gets
    and returns these alone. `length_B` says how many; all streams have as many, since the original knows no more than that. It stays in
    host memory so that reading it waits for nothing.
    """

    def __init__(self, info: RuntimeInfo, module: Callable[..., Any], plain: Callable[..., Any] | None = None) -> None:
        self._info = info
        self._module = module
        self._plain = plain or module

    def of_length(self, tgt_len: int) -> ReferenceRuntime:
        """Return the same model for segments of `tgt_len` tokens, not in TorchScript, which adapts to the shapes that it meets first."""
        return ReferenceRuntime(dataclasses.replace(self._info, tgt_len=tgt_len), self._plain)

    @property
    def info(self) -> RuntimeInfo:
        """What this is."""
        return self._info

    def initial_memory(self, batch_size: int) -> Memory:
        """Return the memory of `batch_size` streams at a cold start."""
        info, config = self._info, self._info.config
        shape = (config.n_layer, config.mem_len, batch_size, config.d_model)
        state = torch.zeros(shape, dtype=TORCH_TYPES[info.memory_dtype], device=info.device)
        return Memory([state], torch.zeros(batch_size, dtype=torch.int64))

    @torch.inference_mode()
    def step(self, input_ids_BT: Tensor, target_ids_BT: Tensor, memory: Memory) -> StepOutput:
        """Score one segment. Raises ShapeRangeError if tokens or memory are of another shape, or streams of different lengths."""
        (state,), M = memory.states, self._info.mem_len
        filled = self._check(input_ids_BT, target_ids_BT, memory)
        nll_TB, kept = self._module(input_ids_BT.t().contiguous(), target_ids_BT.t().contiguous(), state[:, M - filled :])
        length = kept.shape[1]
        if length < M:  # while it fills: whoever carries the memory expects one shape
            kept = torch.cat([kept.new_zeros([kept.shape[0], M - length, *kept.shape[2:]]), kept], dim=1)
        return StepOutput(nll_TB.t().float(), Memory([kept], torch.full((len(input_ids_BT),), length)))

    def next_token(self, input_ids_BT: Tensor, memory: Memory) -> NoReturn:
        """Raise HeadError: the original scores given targets and nothing else."""
        raise HeadError(
            "The stand-in for NVIDIA's Transformer-XL yields the nll of given targets, and no scores of the next token.",
            remedy="Generate with one of the toolkit's own runtimes.",
        )

    def synchronize(self) -> None:
        """Wait for the device."""
        if self._info.device.startswith("cuda"):
            torch.cuda.synchronize(self._info.device)

    def _check(self, input_ids_BT: Tensor, target_ids_BT: Tensor, memory: Memory) -> int:
        """Return the number of filled positions of the memory."""
        info, config = self._info, self._info.config
        for name, tensor in (("input_ids", input_ids_BT), ("target_ids", target_ids_BT)):
            if tensor.dim() != 2 or tuple(tensor.shape) != (input_ids_BT.shape[0], info.tgt_len):
                raise ShapeRangeError(f"`{name}` must have shape [batch_size, {info.tgt_len}], but has {list(tensor.shape)} instead.")
        B = input_ids_BT.shape[0]
        expected, found = (config.n_layer, config.mem_len, B, config.d_model), [tuple(state.shape) for state in memory.states]
        lengths = set(memory.length_B.tolist())
        if found != [expected] or len(memory.length_B) != B or len(lengths) != 1:
            raise ShapeRangeError(
                f"The memory must be one tensor of shape {list(expected)} with one valid length for all {B} streams, "
                f"but is of {found} with the lengths {sorted(lengths)} instead.",
                remedy="Begin with the runtime's own `initial_memory`, and let all streams begin together.",
            )
        return int(lengths.pop())


def reference_runtime(
    checkpoint: Path,
    *,
    scripted: bool,
    tgt_len: int,
    mem_len: int,
    clamp_len: int | None,
    same_length: bool,
    threads: int | None = None,
    dtype: str = "fp32",
    device: str = "cpu",
) -> ReferenceRuntime:
    """Open a checkpoint of ours in the way of NVIDIA's code.

    Args:
        scripted: TorchScript rather than eager PyTorch.
        tgt_len, mem_len: tokens.
        clamp_len: tokens; None means no limit.
        same_length: attend to distances up to `mem_len`, as the original has done since 2023.
        threads: CPU threads of PyTorch, for the whole process; None keeps its own choice.
        dtype: fp32, or fp16 for everything.

    Raises:
        CheckpointError: it is damaged.
        ConfigError: the original has no such model, or the lengths are impossible.
        EnvironmentUnfitError: the device is absent.
    """
    use_threads(threads)
    where = resolve_device(device)
    model, loaded = load_model(checkpoint)
    config = dataclasses.replace(
        model.config, mem_len=mem_len, ext_len=0, clamp_len=clamp_len, same_length=same_length, same_length_rule="mem_len+1"
    )
    if tgt_len < 1:
        raise ConfigError(f"`tgt_len` must be 1 or more, but is {tgt_len} instead.")
    plain = module = ReferenceModel(model, config).eval().requires_grad_(False).to(where, TORCH_TYPES[dtype])
    if scripted:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # torch.jit is deprecated since 2.13, and what the original runs in
            module = torch.jit.script(module)
    info = RuntimeInfo(
        name="reference",
        provider="torchscript" if scripted else "eager",
        device=where,
        dtype=dtype,
        compute=torch_compute(dtype, where),
        memory="hidden",
        memory_dtype=dtype,
        tgt_len=tgt_len,
        config=config,
        origin=str(checkpoint),
        checkpoint_sha256=loaded.sha256,
    )
    return ReferenceRuntime(info, module, plain)
