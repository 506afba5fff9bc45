"""Layers that are captured and replayed: what goes in and comes out. Captures are played by Python here; `test_gpu.py` makes real ones."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support import build_model, random_ids, small_config
from txl_train.errors import EnvironmentUnfitError
from txl_train.model import graphed
from txl_train.model.graphed import GraphedDecoder
from txl_train.model.transformer_xl import TransformerXL

CONFIG = small_config(cutoffs=(5, 9, 16), dropout=0.0)
Capture = Callable[[Callable[[], list[Tensor]]], tuple[Callable[[], None], list[Tensor]]]


@contextlib.contextmanager
def played(device: torch.device) -> Iterator[Capture]:
    """Yield a capture that computes anew in each replay, and writes the results where the first ones are, as a graph does."""

    def capture(function: Callable[[], list[Tensor]]) -> tuple[Callable[[], None], list[Tensor]]:
        results = function()
        places = [None if result is None else result.detach() for result in results]

        def replay() -> None:
            with torch.enable_grad():
                results[:] = function()
            for place, result in zip(places, results, strict=True):
                if place is not None:
                    place.copy_(result.detach())

        return replay, results

    with torch.random.fork_rng(devices=[]):
        yield capture


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> TransformerXL:
    monkeypatch.setattr(graphed, "_alone_on", played)
    return build_model(CONFIG).train()


def ids(batch_size: int, length: int, seed: int) -> Tensor:
    return torch.from_numpy(random_ids(CONFIG, batch_size, length, seed=seed))


def trained_on(model: TransformerXL, lengths: list[int]) -> list[tuple[float, dict[str, Tensor]]]:
    """Return the loss and the gradients of segments one after the other, and move the weights by each."""
    memory, found = model.initial_memory(2), []
    for number, length in enumerate(lengths):
        model.zero_grad(set_to_none=True)
        hidden, memory = model(ids(2, length, number), memory)
        loss = model.nll(hidden, ids(2, length, 100 + number)).mean()
        loss.backward()
        found.append(
            (float(loss.detach()), {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None})
        )
        with torch.no_grad():
            for weight in model.parameters():
                if weight.grad is not None:
                    weight -= 0.1 * weight.grad
    return found


def assert_alike(one: list[tuple[float, dict[str, Tensor]]], other: list[tuple[float, dict[str, Tensor]]]) -> None:
    for (loss, gradients), (other_loss, other_gradients) in zip(one, other, strict=True):
        assert loss == pytest.approx(other_loss, rel=1e-5)
        assert gradients.keys() == other_gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, other_gradients[name], rtol=1e-4, atol=1e-6)


def with_graphs(model: TransformerXL) -> GraphedDecoder:
    decoder = GraphedDecoder(model.decoder)
    model.decoder = decoder
    return decoder


def test_replayed_layers_have_the_losses_and_gradients_of_plain_ones_as_weights_and_memory_move_on(model: TransformerXL) -> None:
    expected = trained_on(build_model(CONFIG).train(), [4, 4, 4, 4])
    decoder = with_graphs(model)
    assert_alike(trained_on(model, [4, 4, 4, 4]), expected)
    assert decoder.replays == 4


def test_a_segment_of_another_length_runs_as_it_is(model: TransformerXL) -> None:
    expected = trained_on(build_model(CONFIG).train(), [4, 3, 4])
    decoder = with_graphs(model)
    assert_alike(trained_on(model, [4, 3, 4]), expected)
    assert decoder.replays == 2


def test_gradients_of_several_parts_of_a_batch_add_up(model: TransformerXL) -> None:
    sums = []
    for layers in (build_model(CONFIG).train(), model):
        if layers is model:
            with_graphs(model)
        for part in range(2):
            hidden, _ = layers(ids(2, 4, part), layers.initial_memory(2))
            layers.nll(hidden, ids(2, 4, 10 + part)).sum().backward()
        sums.append({name: weight.grad for name, weight in layers.named_parameters() if weight.grad is not None})
    for name, gradient in sums[0].items():
        torch.testing.assert_close(sums[1][name], gradient, rtol=1e-4, atol=1e-6)


def test_evaluation_is_not_replayed(model: TransformerXL) -> None:
    decoder = with_graphs(model)
    with torch.no_grad():
        model(ids(2, 4, 0), model.initial_memory(2))
    model.eval()
    model(ids(2, 4, 0), model.initial_memory(2))
    assert decoder.replays == 0


def test_the_memory_of_a_step_is_not_overwritten_by_the_next(model: TransformerXL) -> None:
    with_graphs(model)
    _, first = model(ids(2, 4, 0), model.initial_memory(2))
    kept = [state.clone() for state in first.states]
    model(ids(2, 4, 1), first)
    assert all(torch.equal(state, before) for state, before in zip(first.states, kept, strict=True))


def test_a_backward_pass_whose_forward_pass_was_overwritten_is_refused(model: TransformerXL) -> None:
    with_graphs(model)
    hidden, memory = model(ids(2, 4, 0), model.initial_memory(2))
    model(ids(2, 4, 1), memory)
    with pytest.raises(RuntimeError, match="What this backward pass needs is overwritten"):
        hidden.sum().backward()


def test_a_second_backward_pass_over_one_forward_pass_is_refused(model: TransformerXL) -> None:
    with_graphs(model)
    hidden, _ = model(ids(2, 4, 0), model.initial_memory(2))
    hidden.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="take it once"):
        hidden.sum().backward()


def test_another_precision_runs_as_it_is(model: TransformerXL) -> None:
    decoder = with_graphs(model)
    for autocast, replays in ((True, 1), (False, 1), (True, 2)):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            model(ids(2, 4, 0), model.initial_memory(2))
        assert decoder.replays == replays


def test_nothing_that_was_cast_is_kept_as_a_graph_would_read_it_for_ever(model: TransformerXL) -> None:
    with_graphs(model)
    keeps: list[bool] = []
    model.layers[0].register_forward_pre_hook(lambda *_: keeps.append(torch.is_autocast_cache_enabled()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(ids(2, 4, 0), model.initial_memory(2))
    assert keeps
    assert not any(keeps)


def test_what_cannot_be_captured_is_told_once_and_runs_as_it_is(
    model: TransformerXL, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(device: torch.device) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(graphed, "_alone_on", refused)
    monkeypatch.setattr(torch, "__version__", "2.13.0+cu130")
    expected = trained_on(build_model(CONFIG).train(), [4, 4])
    with_graphs(model)
    with caplog.at_level(logging.WARNING):
        assert_alike(trained_on(model, [4, 4]), expected)
    (record,) = caplog.records
    assert record.getMessage() == (
        "The layers cannot be replayed as CUDA graphs, so training is slower: operation not permitted when stream is capturing"
    )


def test_a_replay_drops_what_the_plain_pass_drops_and_is_compared_with_it_before_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphed, "_alone_on", played)
    dropping = small_config(cutoffs=(5, 9, 16), dropout=0.3, dropatt=0.2)
    model, plain = (build_model(dropping).train() for _ in range(2))
    decoder = with_graphs(model)
    found = []
    for each in (plain, model):
        torch.manual_seed(7)
        found.append(trained_on(each, [4, 4, 4]))
    assert_alike(*found)
    assert decoder.replays == 3


@pytest.mark.parametrize("wrong", ["hidden states", "gradients"])
def test_a_replay_that_yields_something_else_is_not_used(
    wrong: str, model: TransformerXL, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    @contextlib.contextmanager
    def damaged(device: torch.device) -> Iterator[Capture]:
        with played(device) as capture:
            number = 0

            def other(function: Callable[[], list[Tensor]]) -> tuple[Callable[[], None], list[Tensor]]:
                nonlocal number
                replay, results = capture(function)
                first, number = results[0].detach(), number + 1
                is_wrong = number == (1 if wrong == "hidden states" else 2)
                return (lambda: (replay(), first.mul_(1.2))) if is_wrong else replay, results

            yield other

    monkeypatch.setattr(graphed, "_alone_on", damaged)
    expected = trained_on(build_model(CONFIG).train(), [4, 4])
    decoder = with_graphs(model)
    assert_alike(trained_on(model, [4, 4]), expected)
    assert decoder.replays == 0
    (record,) = caplog.records
    assert "cannot be replayed as CUDA graphs, so training is slower: the first replay is off by" in record.getMessage()


def test_a_pytorch_that_does_not_outlive_a_failed_capture_is_told_from_one_that_does(
    model: TransformerXL, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(device: torch.device) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(graphed, "_alone_on", refused)
    monkeypatch.setattr(torch, "__version__", "2.11.0+cu130")
    with_graphs(model)
    with pytest.raises(EnvironmentUnfitError, match="cannot be captured as CUDA graphs: operation not permitted") as caught:
        model(ids(2, 4, 0), model.initial_memory(2))
    assert "`--compile`" in str(caught.value.remedy)


def test_without_memory_for_graphs_training_goes_on(
    model: TransformerXL, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def out_of_memory(device: torch.device) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    monkeypatch.setattr(graphed, "_alone_on", out_of_memory)
    with_graphs(model)
    assert model(ids(2, 4, 0), model.initial_memory(2))[0].isfinite().all()
    assert "so training is slower: CUDA out of memory. Tried to allocate 2 GiB." in caplog.text
