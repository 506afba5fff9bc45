"""Adaptive embedding and adaptive softmax (Baevski & Auli 2019; Grave et al. 2017), with the projections of Transformer-XL.

The vocabulary is sorted by frequency and cut at `cutoffs` into a shortlist and tail clusters. The head of the softmax has one
column per shortlist word and one per tail cluster; a tail word's probability is its cluster's times its own within the
cluster. Tail cluster i (from 1) has head column shortlist + i - 1.

Weights are kept in tables: one for all clusters where `div_val` is 1, otherwise one per cluster, each `div_val` times narrower
than the one before. Without `cutoffs` this is a plain embedding and a plain softmax.
"""

# Shape suffixes: N tokens, R tokens of one tail cluster, D d_model, V vocabulary, C tail clusters, W width of a table

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from txl_train.config import ModelConfig


def table_ends(config: ModelConfig) -> tuple[int, ...]:
    """Ids where each table of weights begins and the last one ends."""
    return (0, config.vocab_size) if config.div_val == 1 else config.cluster_ends


def has_projections(config: ModelConfig) -> bool:
    """True if embeddings and hidden states have to be projected onto each other."""
    return config.div_val > 1 or config.embed_size != config.d_model


def cluster_rows(target_ids_N: Tensor, cluster_ends: list[int]) -> list[Tensor]:
    """For each tail cluster, the positions (int64 [R]) of the targets that lie in it; R may be 0.

    The one step of the loss whose result has a size that depends on data, kept apart so that graphs can take it as input. It is taken on
    the host: for targets on a GPU this waits for the device once (not once a cluster), for targets that are on the host not at all.
    """
    device = target_ids_N.device
    if device.type != "cpu" and len(cluster_ends) > 2:
        host_rows = cluster_rows(target_ids_N.cpu(), cluster_ends)
        return [rows_R.to(device) for rows_R in host_rows]
    rows: list[Tensor] = []
    for low, high in zip(cluster_ends[1:-1], cluster_ends[2:]):
        rows.append(torch.nonzero((target_ids_N >= low) & (target_ids_N < high)).squeeze(1))
    return rows


def log_sum_exp(scores_NV: Tensor, more_NC: Tensor | None = None) -> Tensor:
    """Return log(sum(exp(scores))) of each row, [N], over the scores of both tensors where there are two.

    Written out, since an engine's own operator may be worse: that of ONNX Runtime 1.32 is 25 times less accurate over 160,000
    scores (5e-5) and 5 times slower than these four.
    """
    largest_N1 = scores_NV.detach().amax(dim=1, keepdim=True)
    if more_NC is None:
        return (scores_NV - largest_N1).exp().sum(dim=1).log() + largest_N1.squeeze(1)
    largest_N1 = torch.maximum(largest_N1, more_NC.detach().amax(dim=1, keepdim=True))
    total_N = (scores_NV - largest_N1).exp().sum(dim=1) + (more_NC - largest_N1).exp().sum(dim=1)
    return total_N.log() + largest_N1.squeeze(1)


class AdaptiveEmbedding(nn.Module):
    """Token ids to vectors of size d_model, scaled by sqrt(d_model)."""

    def __init__(self, config: ModelConfig, weights: list[nn.Parameter] | None = None, ends: tuple[int, ...] | None = None) -> None:
        """Make new tables, or, given `weights` cut at `ends`, share them."""
        super().__init__()
        self.ends = list(table_ends(config) if ends is None else ends)
        self.scale = config.d_model**0.5
        self.has_projections = has_projections(config)
        self.one_width = config.div_val == 1
        widths = config.cluster_widths
        if weights is None:
            sizes = [high - low for low, high in zip(self.ends, self.ends[1:])]
            weights = [nn.Parameter(torch.empty(size, width)) for size, width in zip(sizes, widths)]
        self.weights = nn.ParameterList(weights)
        projected = widths[:1] if self.one_width else widths
        self.projections = nn.ParameterList(
            [nn.Parameter(torch.empty(config.d_model, width)) for width in projected] if self.has_projections else []
        )

    def forward(self, input_ids: Tensor) -> Tensor:
        """int64 [...] -> [..., D]. Each table is read at every token, clamped, and the right one is chosen: no data-dependent shapes."""
        tables: list[Tensor] = []  # TorchScript knows no len() or [i] of parameters
        for table in self.weights:
            tables.append(table)
        projections: list[Tensor] = []
        for projection in self.projections:
            projections.append(projection)
        x: Tensor = self._read(tables, projections, 0, input_ids)
        for i in range(1, len(tables)):
            x = torch.where((input_ids >= self.ends[i]).unsqueeze(-1), self._read(tables, projections, i, input_ids), x)
        if self.has_projections and self.one_width:
            x = F.linear(x, projections[0])
        return x.float().mul(self.scale)  # float32 from here on: see `DecoderLayer`

    def _read(self, tables: list[Tensor], projections: list[Tensor], i: int, input_ids: Tensor) -> Tensor:
        low, high = self.ends[i], self.ends[i + 1]
        local_ids = input_ids if len(tables) == 1 else (input_ids - low).clamp(0, high - low - 1)
        x = F.embedding(local_ids, tables[i])
        return x if self.one_width else F.linear(x, projections[i])

    def cut(self, config: ModelConfig) -> AdaptiveEmbedding:
        """Return the same embedding with one table per cluster (views of this one's), as graphs need them."""
        twin = AdaptiveEmbedding(config, weights=cut_tables(list(self.weights), self.ends, config.cluster_ends), ends=config.cluster_ends)
        twin.projections = self.projections
        return twin


class AdaptiveLogSoftmax(nn.Module):
    """Negative log-likelihood of given targets, and the full distribution, from hidden states."""

    def __init__(
        self,
        config: ModelConfig,
        weights: list[nn.Parameter],
        biases: list[nn.Parameter],
        projections: list[nn.Parameter],
        ends: tuple[int, ...] | None = None,
    ) -> None:
        """`weights` and `biases` are cut at `ends`; `projections` has one [D, W] per cluster, or none at all."""
        super().__init__()
        self.table_ends = list(table_ends(config) if ends is None else ends)
        self.cluster_ends = list(config.cluster_ends)
        self.n_cluster = config.n_cluster
        self.has_projections = len(projections) > 0
        self.weights = nn.ParameterList(weights)
        self.biases = nn.ParameterList(biases)
        self.projections = nn.ParameterList(projections)
        self.cluster_weight = nn.Parameter(torch.zeros(config.n_cluster, config.embed_size))
        self.cluster_bias = nn.Parameter(torch.zeros(config.n_cluster))

    def tables(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return weights [V_cluster, W] and biases [V_cluster] of each cluster: a table of all is split once, and so is its gradient."""
        weights: list[Tensor] = []  # TorchScript knows no len() or [i] of parameters
        for table in self.weights:
            weights.append(table)
        biases: list[Tensor] = []
        for bias in self.biases:
            biases.append(bias)
        if len(weights) > 1 or self.n_cluster == 0:
            return weights, biases
        sizes: list[int] = []
        for i in range(len(self.cluster_ends) - 1):
            sizes.append(self.cluster_ends[i + 1] - self.cluster_ends[i])
        return list(torch.split(weights[0], sizes)), list(torch.split(biases[0], sizes))

    def logits(self, hidden_ND: Tensor, cluster: int) -> Tensor:
        """Unnormalised scores [N, V_cluster] within a cluster; cluster 0 is the shortlist, without the columns of the tails."""
        weights, biases = self.tables()
        return self.scores(hidden_ND, cluster, weights[cluster], biases[cluster])

    def scores(self, hidden_ND: Tensor, cluster: int, weight_VW: Tensor, bias_V: Tensor) -> Tensor:
        """Return the logits [N, V_cluster] within the cluster whose tables these are."""
        return F.linear(self.project(hidden_ND, cluster), weight_VW, bias_V).float()

    def normaliser(self, scores_NV: Tensor, more_NC: Tensor | None) -> Tensor:
        """Return `log_sum_exp` of scores that are not read again."""
        return log_sum_exp(scores_NV, more_NC)

    def project(self, hidden_ND: Tensor, cluster: int) -> Tensor:
        """[N, D] -> [N, W]: the size of the cluster's embeddings, in the type of the weights."""
        hidden_ND = hidden_ND.to(self.cluster_weight.dtype)
        if not self.has_projections:
            return hidden_ND
        projections: list[Tensor] = []
        for projection in self.projections:
            projections.append(projection)
        return torch.matmul(hidden_ND, projections[cluster])

    def cluster_logits(self, hidden_ND: Tensor) -> Tensor:
        """Scores [N, C] of the tail clusters themselves, beside those of the shortlist."""
        return F.linear(self.project(hidden_ND, 0), self.cluster_weight, self.cluster_bias).float()

    def forward(self, hidden_ND: Tensor, target_ids_N: Tensor, rows: list[Tensor]) -> Tensor:
        """Return −log p(target), nats, float32 [N], in token order.

        `rows` is what `cluster_rows` returns. A graph that cannot hold an empty tensor may pad a cluster's rows with the value N.
        """
        weights, biases = self.tables()
        nll_N = self.head_nll(hidden_ND, target_ids_N, weights[0], biases[0])
        if self.n_cluster == 0:
            return nll_N
        last = hidden_ND.shape[0] - 1
        nll_N1 = F.pad(nll_N, [0, 1])  # the extra place takes what padded rows write
        for i, rows_R in enumerate(rows):
            tokens_R = rows_R.clamp(max=last)
            hidden_RD, targets_R = hidden_ND.index_select(0, tokens_R), target_ids_N.index_select(0, tokens_R)
            within_R = self.tail_nll(hidden_RD, targets_R, i + 1, weights[i + 1], biases[i + 1])
            nll_N1 = nll_N1.scatter(0, rows_R, nll_N.index_select(0, tokens_R) + within_R)
        return nll_N1[:-1]

    def head_nll(self, hidden_ND: Tensor, target_ids_N: Tensor, weight_VW: Tensor, bias_V: Tensor) -> Tensor:
        """Return −log p [N] of the target, or of its tail cluster if it lies in one, given the tables of the shortlist."""
        shortlist = self.cluster_ends[1]
        logits_NV = self.scores(hidden_ND, 0, weight_VW, bias_V)
        chosen_N = torch.gather(logits_NV, 1, target_ids_N.clamp(max=shortlist - 1)[:, None]).squeeze(1)
        if self.n_cluster == 0:
            return self.normaliser(logits_NV, None) - chosen_N
        clusters_NC = self.cluster_logits(hidden_ND)
        normaliser_N = self.normaliser(logits_NV, clusters_NC)
        cluster_N = torch.zeros_like(target_ids_N)
        for low in self.cluster_ends[2:-1]:
            cluster_N = cluster_N + (target_ids_N >= low).to(target_ids_N.dtype)
        of_cluster_N = torch.gather(clusters_NC, 1, cluster_N[:, None]).squeeze(1)
        return normaliser_N - torch.where(target_ids_N < shortlist, chosen_N, of_cluster_N)

    def tail_nll(self, hidden_RD: Tensor, target_ids_R: Tensor, cluster: int, weight_VW: Tensor, bias_V: Tensor) -> Tensor:
        """Return −log p [R] of the targets within their tail cluster, from 1, given its tables; anything for targets elsewhere."""
        low, high = self.cluster_ends[cluster], self.cluster_ends[cluster + 1]
        logits_RV = self.scores(hidden_RD, cluster, weight_VW, bias_V)
        chosen_R = torch.gather(logits_RV, 1, (target_ids_R - low).clamp(0, high - low - 1)[:, None]).squeeze(1)
        return self.normaliser(logits_RV, None) - chosen_R

    def log_probs(self, hidden_ND: Tensor) -> Tensor:
        """Return log p of every word, nats, float32 [N, V]."""
        head_NV = self.logits(hidden_ND, 0)
        if self.n_cluster == 0:
            return head_NV - log_sum_exp(head_NV)[:, None]
        head_NV = torch.cat([head_NV, self.cluster_logits(hidden_ND)], dim=1)
        head_NV = head_NV - log_sum_exp(head_NV)[:, None]
        shortlist = self.cluster_ends[1]
        parts = [head_NV[:, :shortlist]]
        for i in range(1, self.n_cluster + 1):
            within_NV = self.logits(hidden_ND, i)
            parts.append(head_NV[:, shortlist + i - 1, None] + (within_NV - log_sum_exp(within_NV)[:, None]))
        return torch.cat(parts, dim=1)

    def next_token_logits(self, hidden_ND: Tensor) -> Tensor:
        """Return float32 [N, V] whose softmax is the distribution: the scores of a plain softmax, log p of an adaptive one."""
        return self.logits(hidden_ND, 0) if self.n_cluster == 0 else self.log_probs(hidden_ND)

    def cut(self, config: ModelConfig, embedding: AdaptiveEmbedding | None) -> AdaptiveLogSoftmax:
        """Return the same softmax with one table per cluster; where tied, the tables are those of the cut `embedding`."""
        weights = list(embedding.weights) if embedding is not None else cut_tables(list(self.weights), self.table_ends, config.cluster_ends)
        biases = cut_tables(list(self.biases), self.table_ends, config.cluster_ends)
        twin = AdaptiveLogSoftmax(config, weights, biases, list(self.projections), ends=config.cluster_ends)
        twin.cluster_weight, twin.cluster_bias = self.cluster_weight, self.cluster_bias
        return twin


def cut_tables(tables: list[nn.Parameter], table_ends: list[int], cluster_ends: tuple[int, ...]) -> list[nn.Parameter]:
    """Cut one table of all words into one per cluster (views, sharing memory); tables already cut are returned as they are."""
    if len(tables) == len(cluster_ends) - 1:
        return tables
    (table,) = tables
    return [nn.Parameter(table.detach()[low:high], requires_grad=False) for low, high in zip(cluster_ends, cluster_ends[1:])]
