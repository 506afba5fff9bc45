"""The step on a GPU with few and large operations: the matrix products of `inference.FixedStep`, and a kernel for all between two of them.

Launching small operations takes most of a step's time there, and moving scores and memories through the GPU's memory most of the rest.
So keys and values are written into a ring, where the memory's window moves on and nothing is copied; attention reads them there and keeps
its scores on the chip; a sum and its normalisation are one operation. All addresses stay the same from step to step, so that the layers
can be captured in a CUDA graph. The numbers are those of the plain step but for rounding: `tests/train/model/test_fused.py`.
"""

# Shape suffixes: B batch, T tgt_len, Q inputs (ext_len + tgt_len), M mem_len, S slots, H heads, E d_head, W = H*E, D d_model, N = B*Q,
# C distances, V words

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from txl_train.model import layer_kernels, softmax_kernels
from txl_train.model.adaptive import AdaptiveLogSoftmax
from txl_train.model.inference import FixedStep
from txl_train.model.relative import RelativeAttention, nearer
from txl_train.model.transformer_xl import DecoderLayer


def can_fuse(step: FixedStep) -> bool:
    """Return whether the kernels compute what this step does: relative attention over a memory of keys and values of the step's type."""
    layers = [layer for layer in step.decoder.layers if isinstance(layer, DecoderLayer)]
    return (
        step.kv_memory
        and step.memory_dtype == step.dtype
        and step.mem_len > 0
        and all(isinstance(layer.attention, RelativeAttention) for layer in layers)
    )


@dataclass
class Ring:
    """The keys and values of some streams, and where in them the memory lies.

    Slots go round: the memory is M of them from `start` on. Each is there twice, S slots apart, so that what follows a slot lies behind
    it wherever a window begins. With S = M + Q, what a step writes is beyond the memory that it reads.
    """

    states: Tensor
    """[2 * n_layer, B, H, 2 * S, E]: keys and values of the layers, in turn."""
    start: Tensor
    """int64 [1], below S."""
    length_B: Tensor
    """int64, valid tokens before the next segment."""

    @classmethod
    def empty(cls, step: FixedStep, batch_size: int, device: torch.device) -> Ring:
        """Return a ring of zeros for a step."""
        config = step.config
        slots = step.mem_len + step.ext_len + step.tgt_len
        shape = (2 * config.n_layer, batch_size, config.n_head, 2 * slots, config.d_head)
        states = torch.zeros(shape, dtype=step.memory_dtype, device=device)
        count = torch.zeros(batch_size, dtype=torch.int64, device=device)
        return cls(states, torch.zeros(1, dtype=torch.int64, device=device), count)

    @property
    def n_slot(self) -> int:
        """S."""
        return self.states.shape[3] // 2

    def views(self, start: int, mem_len: int) -> list[Tensor]:
        """Return the states of the memory that begins in a slot, [B, H, M, E] each: views of the ring."""
        return list(self.states[:, :, :, start : start + mem_len].unbind(0))

    def load(self, states: list[Tensor], length_B: Tensor) -> None:
        """Copy a memory into the first slots."""
        M, S = states[0].shape[2], self.n_slot
        torch._foreach_copy_(list(self.states[:, :, :, :M].unbind(0)), states)
        torch._foreach_copy_(list(self.states[:, :, :, S : S + M].unbind(0)), states)
        self.length_B.copy_(length_B)
        self.start.zero_()


class FusedLayers:
    """The layers of a step, from token ids to what enters the softmax, sharing its weights.

    Args:
        step: in float16 or float32, on a GPU; `can_fuse` must hold.
    """

    def __init__(self, step: FixedStep) -> None:
        self._step = step
        config, n_query = step.config, step.ext_len + step.tgt_len
        self._layers = [layer for layer in step.decoder.layers if isinstance(layer, DecoderLayer)]
        terms = [nearer(term, config.clamp_len, n_query) for term in step.position_terms]
        self._terms_HCE = [term_HEC.transpose(1, 2).contiguous() for term_HEC in terms]
        self._table = whole_table(list(step.embedding.weights)) if not step.embedding.has_projections else None
        self._scale = config.d_head**-0.5

    def __call__(self, input_ids_BQ: Tensor, ring: Ring) -> Tensor:
        """Run a segment on the memory in a ring, move the ring on, and return the last layer's output [B*T, D] in the step's type."""
        step = self._step
        B, Q = input_ids_BQ.shape
        if self._table is not None:
            x_ND, half_ND = layer_kernels.embed(input_ids_BQ, self._table, step.embedding.scale)
        else:
            x_ND = step.embedding(input_ids_BQ).flatten(0, 1)
            half_ND = x_ND.to(step.dtype)
        pre = step.config.pre_lnorm
        if pre:
            half_ND = self._layers[0].attention_norm(x_ND).to(step.dtype)
        for n, layer in enumerate(self._layers):
            mixed_ND = self._attention(n, half_ND, ring, Q)
            x_ND, half_ND = layer_kernels.add_norm(x_ND, mixed_ND, layer.feed_forward_norm if pre else layer.attention_norm, keeps_sum=pre)
            more_ND = _feed_forward(layer, half_ND)
            if not pre:
                x_ND, half_ND = layer_kernels.add_norm(x_ND, more_ND, layer.feed_forward_norm, keeps_sum=False)
            elif n + 1 < len(self._layers):
                x_ND, half_ND = layer_kernels.add_norm(x_ND, more_ND, self._layers[n + 1].attention_norm, keeps_sum=True)
            else:
                half_ND = (x_ND + more_ND).to(step.dtype)
        layer_kernels.advance(ring.length_B, ring.start, step.tgt_len, step.mem_len + step.ext_len, ring.n_slot)
        return half_ND.view(B, Q, -1)[:, step.ext_len :].reshape(B * step.tgt_len, -1)

    def _attention(self, n: int, half_ND: Tensor, ring: Ring, n_query: int) -> Tensor:
        step, attention = self._step, self._layers[n].attention
        assert isinstance(attention, RelativeAttention)
        qkv_NW = F.linear(half_ND, attention.qkv.weight)
        states, term_HCE = ring.states[2 * n : 2 * n + 2], self._terms_HCE[n]
        sizes = {"n_query": n_query, "mem_len": step.mem_len, "scale": self._scale}
        by_distance_HNP = layer_kernels.score_and_keep(qkv_NW, attention.position_bias, term_HCE, states, ring.start, **sizes)
        mixed_NW = layer_kernels.attend(
            *(qkv_NW, attention.content_bias, states, by_distance_HNP, ring.length_B, ring.start),
            ext_len=step.ext_len,
            n_distance=term_HCE.shape[1],
            max_distance=step.max_distance,
            **sizes,
        )
        return F.linear(mixed_NW, attention.output.weight)


class FusedNll:
    """The adaptive softmax of given targets: the shortlist and the clusters' own scores in one product, and of the tails what is asked for.

    Which targets lie in which cluster is found on the device, so that nothing here has a size that depends on data.

    Args:
        head: cut into clusters (`AdaptiveLogSoftmax.cut`), whose tail weights are shared; those of the shortlist are copied, to lie
            before the clusters' own.
    """

    def __init__(self, head: AdaptiveLogSoftmax) -> None:
        self._head = head
        weights, biases = head.tables()
        weight, bias = torch.cat([weights[0], head.cluster_weight]), torch.cat([biases[0], head.cluster_bias])
        more = -len(weight) % 16  # words of no probability: then every line of scores begins at a multiple of 16 bytes
        self._weight, self._bias = F.pad(weight, [0, 0, 0, more]), F.pad(bias, [0, more], value=float("-inf"))
        device, ends = self._weight.device, head.cluster_ends
        self._lows = torch.tensor(ends[1:], dtype=torch.int64, device=device)
        tails, tail_biases = list(weights[1:]), list(biases[1:])
        together = whole_table(tails) if tails and not head.has_projections else None
        self._groups: list[_Group] = []
        for first, table, bias, sizes in (
            [(0, together, torch.cat(tail_biases), [len(tail) for tail in tails])]
            if together is not None
            else [(c, tail, bias, [len(tail)]) for c, (tail, bias) in enumerate(zip(tails, tail_biases))]
        ):
            tiles = [-(-size // softmax_kernels.TILE) for size in sizes]
            first_tiles = torch.tensor([sum(tiles[:c]) for c in range(len(tiles))], dtype=torch.int32, device=device)
            self._groups.append(_Group(first, table.detach().contiguous(), bias.detach().contiguous(), sizes, first_tiles))

    def __call__(self, hidden_ND: Tensor, target_ids_N: Tensor) -> Tensor:
        """Return −log p of the targets, nats, float32 [N]."""
        head = self._head
        scores_NV = F.linear(head.project(hidden_ND, 0), self._weight, self._bias)
        nll_N = softmax_kernels.head_nll(scores_NV, target_ids_N, self._lows, head.cluster_ends[1])
        if self._groups:
            found = softmax_kernels.find_rows(target_ids_N, self._lows)
            for group in self._groups:
                hidden_NW = head.project(hidden_ND, group.first + 1).contiguous()
                tables = group.weight_VW, group.bias_V, target_ids_N, *found, self._lows, group.first_tiles
                softmax_kernels.add_tail_nll(nll_N, hidden_NW, *tables, first_cluster=group.first, sizes=group.sizes)
        return nll_N


class FusedStep:
    """A step of whole segments: layers and head, from token ids to what the head yields, in the memory of a ring.

    Args:
        step: as for `FusedLayers`.
    """

    def __init__(self, step: FixedStep) -> None:
        self.step = step
        self._layers = FusedLayers(step)
        self._nll = FusedNll(step.head) if step.head_kind == "nll" else None

    def __call__(self, input_ids_BQ: Tensor, target_ids_BT: Tensor, ring: Ring) -> Tensor:
        """Return the nll [B, T] of the targets, or the scores [B, V] of every word as the next one (whatever the targets are), float32."""
        hidden_ND = self._layers(input_ids_BQ, ring)
        if self._nll is not None:
            return self._nll(hidden_ND, target_ids_BT.view(-1)).view_as(target_ids_BT)
        last_BD = hidden_ND.view(input_ids_BQ.shape[0], self.step.tgt_len, -1)[:, -1]
        head = self.step.head
        return head.log_probs(last_BD) if self.step.head_kind == "log_probs" else head.next_token_logits(last_BD)


@dataclass
class _Group:
    """Tail clusters whose words are in one table."""

    first: int
    weight_VW: Tensor
    bias_V: Tensor
    sizes: list[int]
    first_tiles: Tensor


def whole_table(parts: list[Tensor]) -> Tensor | None:
    """Return the table [V, W] that these were cut from, if they lie one behind the other and are alike; otherwise None."""
    width, place = parts[0].shape[1], parts[0].data_ptr()
    for part in parts:
        if part.shape[1] != width or not part.is_contiguous() or part.data_ptr() != place:
            return None
        place += part.numel() * part.element_size()
    first = parts[0].detach()
    if sum(part.numel() for part in parts) > first.untyped_storage().nbytes() // first.element_size() - first.storage_offset():
        return None  # neighbours by chance
    return first.as_strided((sum(part.shape[0] for part in parts), width), (width, 1))


def _feed_forward(layer: DecoderLayer, half_ND: Tensor) -> Tensor:
    inner, outer = layer.feed_forward.inner, layer.feed_forward.outer
    hidden_NF: Tensor = torch._addmm_activation(inner.bias, half_ND, inner.weight.t())
    return F.linear(hidden_NF, outer.weight, outer.bias)
