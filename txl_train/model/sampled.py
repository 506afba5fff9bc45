"""Sampled softmax: a loss for training a plain softmax over a large vocabulary from some of its words (Jean et al. 2015, section 3).

Each target is told apart from words that are drawn anew for every batch, from a log-uniform (Zipf's) distribution over ids, which are
sorted by frequency: P(id) = log((id + 2) / (id + 1)) / log(V + 1). Scores are corrected by the log of how often a word is expected in
such a sample, so that rare words are not favoured. Evaluation is always over all words.
"""

# Shape suffixes: B batch, T tgt_len, N = B*T targets, S words drawn, D d_model, V vocabulary

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from txl_train.config import ModelConfig
from txl_train.errors import ConfigError
from txl_train.model.adaptive import AdaptiveLogSoftmax

_REMOVED = -1e30
"""Score of a drawn word that is the target itself: its share underflows to exactly 0."""


class SampledSoftmax:
    """The loss, over the weights and biases of a model's own head.

    Args:
        config: of the model; its softmax must be plain.
        n_samples: different words drawn for each batch. With as many as the vocabulary has, the loss is the full softmax's.

    Raises:
        ConfigError: the model has an adaptive softmax, or `n_samples` is below 1.
    """

    def __init__(self, config: ModelConfig, n_samples: int) -> None:
        if config.adaptive or config.cutoffs:
            raise ConfigError(
                "A sampled softmax replaces a plain one, but the model has an adaptive softmax.",
                remedy="Leave out `--sample-softmax`, or `--adaptive` and `--cutoffs`.",
            )
        if n_samples < 1:
            raise ConfigError(f"`sample_softmax` must be 1 or more, but is {n_samples} instead.")
        self.n_samples = min(n_samples, config.vocab_size)
        ids_V = torch.arange(config.vocab_size, dtype=torch.float64)
        self._prob_V = (torch.log1p(1 / (ids_V + 1)) / math.log(config.vocab_size + 1)).float()

    def draw(self, device: torch.device, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Return different word ids, int64 [S], and for every word the log of its expected count in such a sample, float32 [V].

        Words come at random times, each at a rate of its probability, and the S first ones are taken: the same as drawing again and again
        until there are S different ones. Up to the time of the next word, a word of probability p has come with probability
        1 - exp(-p * time); given that time, weighting with it makes sums over the sample right on average (Duffield et al. 2007).
        """
        if self._prob_V.device != device:
            self._prob_V = self._prob_V.to(device)
        arrival_V = torch.empty_like(self._prob_V).exponential_(generator=generator) / self._prob_V
        if self.n_samples == len(arrival_V):
            return torch.arange(self.n_samples, device=device), torch.zeros_like(arrival_V)
        first, ids = torch.topk(arrival_V, self.n_samples + 1, largest=False)
        return ids[:-1], torch.log(-torch.expm1(-self._prob_V * first[-1]))

    def __call__(
        self, hidden_BTD: Tensor, target_ids_BT: Tensor, head: AdaptiveLogSoftmax, generator: torch.Generator | None = None
    ) -> Tensor:
        """Return the loss of each target, nats, float32 [B, T], in token order.

        Args:
            hidden_BTD: what enters the softmax.
            target_ids_BT: int64 ids.
            head: whose weights and biases are trained.
            generator: on the hidden states' device; None draws from PyTorch's global one there.
        """
        hidden_NW = head.project(hidden_BTD.flatten(0, 1), 0)
        target_N = target_ids_BT.reshape(-1)
        weights, biases = head.weights[0], head.biases[0]
        with torch.no_grad():
            drawn_S, log_count_V = self.draw(hidden_NW.device, generator)
            is_target_NS = target_N[:, None] == drawn_S
        drawn_scores_NS = F.linear(hidden_NW, F.embedding(drawn_S, weights), biases[drawn_S]).float() - log_count_V[drawn_S]
        drawn_scores_NS = drawn_scores_NS.masked_fill(is_target_NS, _REMOVED)
        target_score_N = (hidden_NW * F.embedding(target_N, weights)).float().sum(dim=1) + biases[target_N] - log_count_V[target_N]
        scores_NC = torch.cat([target_score_N[:, None], drawn_scores_NS], dim=1)  # C = 1 + S
        loss_N: Tensor = torch.logsumexp(scores_NC, dim=1) - target_score_N
        return loss_N.view_as(target_ids_BT)
