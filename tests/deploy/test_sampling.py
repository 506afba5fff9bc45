"""What is drawn follows the distribution that was asked for, and can be drawn again."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.reference.naive_txl import naive_log_probs, random_parameters
from tests.support import MODEL_CONFIGS, build_model, small_config
from txl_deploy.sampling import Chance, Sampling, distribution, log_probs
from txl_train.errors import UsageError

scores = st.lists(st.floats(-30, 30), min_size=1, max_size=40).map(lambda values: torch.tensor(values, dtype=torch.float32))


@settings(max_examples=200)
@given(scores)
def test_without_filters_it_is_the_softmax(scores_V):
    p_V = distribution(log_probs(scores_V), Sampling())
    exact = [math.exp(float(s) - max(scores_V.tolist())) for s in scores_V]
    assert p_V.tolist() == pytest.approx([value / math.fsum(exact) for value in exact], rel=1e-12, abs=1e-300)


@pytest.mark.parametrize("changes", [{}, {"cutoffs": (5, 9, 16)}, {"cutoffs": (5, 9, 16), "div_val": 2}])
def test_the_distribution_of_a_step_is_the_full_softmax_of_the_slow_model(changes):
    config = small_config(**changes)
    parameters = random_parameters(config, seed=2)
    head = build_model(config, parameters).head
    hidden_D = torch.randn(config.d_model, generator=torch.Generator().manual_seed(1))
    exact = naive_log_probs(config, parameters, hidden_D.double().numpy())
    for scores_BV in (head.next_token_logits(hidden_D[None]), head.log_probs(hidden_D[None])):
        p_V = distribution(log_probs(scores_BV[0]), Sampling())
        assert p_V.sum() == pytest.approx(1, abs=1e-12)
        assert p_V.log().tolist() == pytest.approx(exact.tolist(), abs=2e-5)  # the model's own float32


def slow_distribution(log_p: list[float], temperature: float, top_k: int | None, top_p: float | None) -> tuple[list[float], float]:
    """Return the probabilities by the words of `txl generate --help`, in sums of Python, and how near another choice of tokens was."""
    largest = max(log_p)
    weights = [math.exp((value - largest) / temperature) for value in log_p]
    order = sorted(range(len(log_p)), key=lambda token: (-log_p[token], token))
    kept = order[:top_k]
    ties = {log_p[token] for token in order[:top_k]} & {log_p[token] for token in order[len(kept) :]}
    margin = 1.0 if len(kept) == len(order) or ties else log_p[kept[-1]] - log_p[order[len(kept)]]
    if top_p is not None:
        total, reached, nucleus = math.fsum(weights[token] for token in kept), 0.0, []
        for token in kept:
            nucleus.append(token)
            reached = math.fsum(weights[chosen] for chosen in nucleus) / total
            margin = min(margin, abs(reached - top_p))
            if reached >= top_p:
                break
        kept = nucleus
    total = math.fsum(weights[token] for token in kept)
    return [weights[token] / total if token in kept else 0.0 for token in range(len(log_p))], margin


filters = {"temperature": st.floats(0.2, 5), "top_k": st.none() | st.integers(1, 30), "top_p": st.none() | st.floats(0.01, 1)}


@settings(max_examples=300)
@given(st.lists(st.integers(-40, 40), min_size=1, max_size=25), st.fixed_dictionaries(filters))
def test_filters_do_what_a_slow_reading_of_their_words_does(quarters, asked):
    """Scores in quarters, so that there are equal ones, and those that are not differ by more than rounding."""
    log_p_V = log_probs(torch.tensor(quarters, dtype=torch.float32) / 4)
    expected, margin = slow_distribution(log_p_V.tolist(), **asked)
    assume(margin > 1e-9)
    assert distribution(log_p_V, Sampling(**asked)).tolist() == pytest.approx(expected, rel=1e-9, abs=1e-300)


@settings(max_examples=60)
@given(
    st.sampled_from(["plain softmax", "adaptive softmax", "narrower tail clusters", "untied weights", "no tied projection"]),
    st.integers(0, 10**6),
    st.fixed_dictionaries(filters),
)
def test_what_a_head_gives_is_the_full_softmax_of_the_slow_model_whatever_is_asked_for(kind, seed, asked):
    config = small_config(**MODEL_CONFIGS[kind])
    parameters = random_parameters(config, seed)
    hidden_D = torch.randn(config.d_model, generator=torch.Generator().manual_seed(seed))
    exact = naive_log_probs(config, parameters, hidden_D.double().numpy()).tolist()
    assert math.fsum(map(math.exp, exact)) == pytest.approx(1, abs=1e-12)
    expected, margin = slow_distribution(exact, **asked)
    assume(margin > 1e-4)
    head = build_model(config, parameters).head
    assert float(head.log_probs(hidden_D[None]).detach().double().exp().sum()) == pytest.approx(1, abs=1e-5)
    for scores_BV in (head.next_token_logits(hidden_D[None]), head.log_probs(hidden_D[None])):
        p_V = distribution(log_probs(scores_BV[0]), Sampling(**asked))
        assert p_V.sum() == pytest.approx(1, abs=1e-12)
        assert p_V.tolist() == pytest.approx(expected, abs=2e-4)  # the model's float32, at a temperature of 0.2


@settings(max_examples=200)
@given(scores, st.integers(1, 45), st.floats(0.01, 1), st.floats(0.1, 5))
def test_filters_keep_the_most_probable_and_the_proportions_among_them(scores_V, top_k, top_p, temperature):
    log_p_V = log_probs(scores_V)
    whole = distribution(log_p_V, Sampling(temperature=temperature))
    kept = distribution(log_p_V, Sampling(temperature=temperature, top_k=top_k, top_p=top_p))
    chosen = kept > 0
    assert kept.sum() == pytest.approx(1, abs=1e-12)
    assert int(chosen.sum()) <= top_k
    if not bool(chosen.all()):
        assert whole[chosen].min() >= whole[~chosen].max()
    if top_k > 1:
        assert kept[chosen].tolist() == pytest.approx((whole[chosen] / whole[chosen].sum()).tolist(), rel=1e-9)


def test_top_p_takes_the_fewest_that_reach_it():
    log_p_V = torch.tensor([0.2, 0.5, 0.1, 0.2]).double().log()
    assert distribution(log_p_V, Sampling(top_p=0.499)).tolist() == [0, 1, 0, 0]
    assert distribution(log_p_V, Sampling(top_p=0.51)).tolist() == pytest.approx([2 / 7, 5 / 7, 0, 0])
    assert (distribution(log_p_V, Sampling(top_p=1.0)) > 0).all()


def test_greedy_takes_the_lowest_of_equal_ids():
    log_p_V = torch.tensor([0.1, 0.4, 0.4, 0.1]).double().log()
    for sampling in (Sampling(temperature=0), Sampling(top_k=1)):
        assert distribution(log_p_V, sampling).tolist() == [0, 1, 0, 0]


def test_what_is_forbidden_is_never_drawn_and_the_rest_shares():
    log_p_V = torch.tensor([0.5, 0.3, 0.2]).double().log()
    assert distribution(log_p_V, Sampling(forbidden=(0,))).tolist() == pytest.approx([0, 0.6, 0.4])
    with pytest.raises(UsageError, match="No token is left"):
        distribution(log_p_V, Sampling(forbidden=(0, 1, 2)))


def test_draws_have_the_frequencies_of_the_distribution():
    p_V = torch.tensor([0.5, 0.0, 0.3, 0.15, 0.05], dtype=torch.float64)
    chance, n = Chance(3, 0), 20_000
    counts = torch.bincount(torch.tensor([chance.draw(p_V) for _ in range(n)]), minlength=5).double()
    assert counts[1] == 0
    expected = n * p_V
    chi_square = float(((counts - expected)[p_V > 0] ** 2 / expected[p_V > 0]).sum())
    assert chi_square < 16.3  # 99.9 % of chi-square with 3 degrees of freedom


def test_a_sample_depends_on_the_seed_and_its_own_number_alone():
    p_V = torch.full((1000,), 1e-3, dtype=torch.float64)

    def some(seed, sample):
        chance = Chance(seed, sample)
        return [chance.draw(p_V) for _ in range(5)]

    assert some(1, 2) == some(1, 2)
    assert len({tuple(some(seed, sample)) for seed in (0, 1, -1, 2**80) for sample in range(5)}) == 20


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1}, {"temperature": float("nan")}, {"temperature": float("inf")}, {"top_k": 0}, {"top_p": 0}, {"top_p": 1.1}]
)
def test_what_cannot_be_meant_is_refused(wrong):
    with pytest.raises(UsageError, match="--"):
        Sampling(**wrong)
