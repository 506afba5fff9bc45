"""The pieces of the adaptive softmax that the comparison with the oracle does not single out."""

from __future__ import annotations

import torch

from txl_train.model.adaptive import cluster_rows, log_sum_exp


def test_log_sum_exp_is_exact_over_a_large_vocabulary_and_large_scores() -> None:
    generator = torch.Generator().manual_seed(0)
    for shift in (0.0, 1000.0, -1000.0):
        scores = torch.randn(4, 100_000, generator=generator) * 3 + shift
        expected = torch.logsumexp(scores.double(), dim=1)
        torch.testing.assert_close(log_sum_exp(scores).double(), expected, atol=2e-6, rtol=1e-7)


def test_the_gradient_of_log_sum_exp_is_the_softmax() -> None:
    scores = torch.randn(3, 50, generator=torch.Generator().manual_seed(0), requires_grad=True)
    log_sum_exp(scores).sum().backward()
    torch.testing.assert_close(scores.grad, scores.detach().softmax(dim=1))


def test_log_sum_exp_of_no_rows_is_empty() -> None:
    assert log_sum_exp(torch.zeros(0, 7)).shape == (0,)


def test_rows_are_listed_per_tail_cluster_edges_included() -> None:
    targets = torch.tensor([0, 9, 5, 4, 8, 22, 16, 15])
    rows = cluster_rows(targets, [0, 5, 9, 16, 23])
    assert [part.tolist() for part in rows] == [[2, 4], [1, 7], [5, 6]]
    assert cluster_rows(targets, [0, 23]) == []
