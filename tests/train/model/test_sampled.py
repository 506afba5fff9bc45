"""The sampled softmax: what is drawn, how it is weighted, and what training on it means for the full softmax."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.support import build_model, small_config
from txl_train.errors import ConfigError
from txl_train.model.sampled import SampledSoftmax
from txl_train.model.transformer_xl import TransformerXL

V = 200
CPU = torch.device("cpu")


@pytest.fixture
def model() -> TransformerXL:
    return build_model(small_config(vocab_size=V, d_model=16))


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    """Return hidden states and targets, frequent ones more often."""
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(3, 20, 16, generator=generator) * 0.5
    targets = (V ** torch.rand(3, 20, generator=generator)).long() - 1
    return hidden, targets


def test_different_words_are_drawn_frequent_ones_more_often() -> None:
    sampled, generator = SampledSoftmax(small_config(vocab_size=V), 20), torch.Generator().manual_seed(0)
    counts = torch.zeros(V)
    for _ in range(300):
        ids, _ = sampled.draw(CPU, generator)
        assert len(ids.unique()) == len(ids) == 20
        counts[ids] += 1
    by_decade = [counts[:10].mean(), counts[10:50].mean(), counts[50:].mean()]
    assert by_decade[0] > 2 * by_decade[1] > 3 * by_decade[2] > 0


def test_the_first_word_of_a_sample_follows_zipf_s_law() -> None:
    sampled, generator = SampledSoftmax(small_config(vocab_size=V), 1), torch.Generator().manual_seed(0)
    drawn = torch.cat([sampled.draw(CPU, generator)[0] for _ in range(4000)])
    for limit in (1, 5, 50):
        expected = math.log(limit + 1) / math.log(V + 1)  # the sum of log((i + 2) / (i + 1)) / log(V + 1)
        assert (drawn < limit).float().mean().item() == pytest.approx(expected, abs=0.03)


def test_words_weighted_by_their_expected_count_give_sums_that_are_right_on_average() -> None:
    sampled, generator = SampledSoftmax(small_config(vocab_size=V), 20), torch.Generator().manual_seed(0)
    values = torch.rand(V, generator=generator)
    estimates = []
    for _ in range(2000):
        ids, log_count = sampled.draw(CPU, generator)
        estimates.append((values[ids] / log_count[ids].exp()).sum())
    error = torch.stack(estimates).std().item() / math.sqrt(2000)
    assert torch.stack(estimates).mean().item() == pytest.approx(values.sum().item(), abs=4 * error)


def test_the_loss_tells_each_target_from_the_words_drawn_with_scores_corrected_by_their_expected_counts(
    model: TransformerXL, batch: tuple[Tensor, Tensor]
) -> None:
    hidden, targets = batch
    sampled = SampledSoftmax(model.config, 25)
    drawn, log_count = sampled.draw(CPU, torch.Generator().manual_seed(7))
    loss = sampled(hidden, targets, model.head, torch.Generator().manual_seed(7))
    assert any(int(target) in drawn.tolist() for target in targets.flatten())
    for b, t in ((0, 0), (1, 7), (2, 19)):
        scores = (model.head.weights[0] @ hidden[b, t] + model.head.biases[0] - log_count).tolist()
        target = int(targets[b, t])
        others = [scores[word] for word in drawn.tolist() if word != target]
        expected = math.log(sum(math.exp(score) for score in [scores[target], *others])) - scores[target]
        assert loss[b, t].item() == pytest.approx(expected, abs=1e-5)


def test_with_all_words_the_loss_is_the_full_softmax_s(model: TransformerXL, batch: tuple[Tensor, Tensor]) -> None:
    hidden, targets = batch
    for n_samples in (V, 10 * V):
        loss = SampledSoftmax(model.config, n_samples)(hidden, targets, model.head)
        assert loss.shape == targets.shape
        torch.testing.assert_close(loss, model.nll(hidden, targets), atol=1e-5, rtol=1e-5)


def test_with_more_words_the_expected_loss_grows_to_the_full_softmax_s(model: TransformerXL, batch: tuple[Tensor, Tensor]) -> None:
    generator = torch.Generator().manual_seed(0)
    means = []
    for n_samples in (5, 40, 120, V - 1):
        sampled = SampledSoftmax(model.config, n_samples)
        means.append(sum(sampled(*batch, model.head, generator).mean().item() for _ in range(20)) / 20)
    full = model.nll(*batch).mean().item()
    assert means == sorted(means)
    assert means[-1] == pytest.approx(full, rel=0.01)
    assert means[0] < 0.7 * full


def test_the_mean_gradient_points_where_the_full_softmax_s_does(model: TransformerXL, batch: tuple[Tensor, Tensor]) -> None:
    hidden, targets = batch
    hidden.requires_grad_()
    (full,) = torch.autograd.grad(model.nll(hidden, targets).mean(), hidden)
    sampled, generator = SampledSoftmax(model.config, 60), torch.Generator().manual_seed(0)
    total = sum(sampled(hidden, targets, model.head, generator).mean() for _ in range(50))
    assert isinstance(total, Tensor)
    (mean,) = torch.autograd.grad(total / 50, hidden)
    assert torch.cosine_similarity(mean.flatten(), full.flatten(), dim=0) > 0.95


def test_a_target_that_is_drawn_does_not_compete_with_itself(model: TransformerXL) -> None:
    """Where the only other word is hopeless, the loss is 0; were the target counted twice, it would be log 2 or more."""
    config = small_config(vocab_size=2, d_model=16)
    model = build_model(config)
    with torch.no_grad():
        model.head.biases[0][0] += 100.0
    loss = SampledSoftmax(config, 2)(torch.zeros(1, 3, 16), torch.zeros(1, 3, dtype=torch.int64), model.head)
    assert loss.abs().max() < 1e-6


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("d_embed", [None, 6])
def test_training_on_it_lowers_the_full_softmax_s_loss(tied: bool, d_embed: int | None, batch: tuple[Tensor, Tensor]) -> None:
    torch.manual_seed(0)
    model = TransformerXL(small_config(vocab_size=V, d_model=16, tie_weights=tied, d_embed=d_embed))
    sampled = SampledSoftmax(model.config, 30)
    assert (model.head.weights[0] is model.embedding.weights[0]) == tied
    ids = batch[1]
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)

    def full_loss() -> float:
        with torch.no_grad():
            return model.nll(model(ids[:, :-1], model.initial_memory(3))[0], ids[:, 1:]).mean().item()

    before = full_loss()
    for _ in range(40):
        optimizer.zero_grad()
        hidden, _ = model(ids[:, :-1], model.initial_memory(3))
        sampled(hidden, ids[:, 1:], model.head).mean().backward()
        optimizer.step()
    assert full_loss() < 0.7 * before
    without = [name for name, p in model.named_parameters() if p.numel() and (p.grad is None or not p.grad.any())]
    assert without == []


def test_the_global_generator_decides_what_is_drawn(model: TransformerXL, batch: tuple[Tensor, Tensor]) -> None:
    sampled = SampledSoftmax(model.config, 10)
    losses = []
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        losses.append(sampled(*batch, model.head))
    assert torch.equal(losses[0], losses[2])
    assert not torch.equal(losses[0], losses[1])


def test_an_adaptive_softmax_or_no_samples_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"(?s)plain one.*--sample-softmax"):
        SampledSoftmax(small_config(cutoffs=(5, 9)), 10)
    with pytest.raises(ConfigError, match="1 or more"):
        SampledSoftmax(small_config(), 0)
