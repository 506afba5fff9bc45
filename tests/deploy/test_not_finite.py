"""Sessions, scoring, generation and benchmarks name segment and stream where a loss, or a memory in fp16, is not finite."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tests.deploy.bench.test_harness import run
from tests.fakes import FakeRuntime
from tests.support import build_model, small_config
from txl_deploy.generate import Generator
from txl_deploy.runtimes.eager import EagerRuntime
from txl_deploy.sampling import Sampling
from txl_deploy.score import Scorer
from txl_deploy.session import Session
from txl_train.errors import ValidationError
from txl_train.model.transformer_xl import TransformerXL


def damaged(*, value: float = math.nan, tied: bool = False) -> TransformerXL:
    """A model whose embedding of the token 7 is not finite, or as large as `value`; tied, it is a row of the softmax too."""
    model = build_model(small_config(tie_weights=tied))
    model.embedding.weights[0].data[7] = value
    return model


def overflowing() -> TransformerXL:
    """A sound model whose values are too large for fp16, in layer 1."""
    model = build_model(small_config())
    model.decoder_layers()[1].attention.get_parameter("qkv.weight").data.mul_(1e6)
    return model


def ids_of(tokens: list[list[int]]) -> torch.Tensor:
    return torch.tensor(tokens, dtype=torch.int64)


@pytest.mark.parametrize("nll", [math.nan, math.inf])
def test_a_session_on_any_runtime_names_segment_and_stream(nll: float) -> None:
    session = Session(FakeRuntime(base_nll=nll), 2)
    with pytest.raises(ValidationError, match="The loss of stream 0 in segment 0 is not finite"):
        session.step(ids_of([[1, 2, 3, 4]] * 2), ids_of([[2, 3, 4, 5]] * 2))


def test_a_session_names_the_stream_that_met_the_damaged_word() -> None:
    session = Session(EagerRuntime(damaged(), tgt_len=2), 3)
    session.step(ids_of([[1, 2]] * 3), ids_of([[2, 3]] * 3))
    with pytest.raises(ValidationError, match="The loss of stream 2 in segment 1 is not finite"):
        session.step(ids_of([[3, 4], [3, 4], [3, 7]]), ids_of([[4, 5]] * 3))


@pytest.mark.parametrize("memory", ["kv", "hidden"])
def test_a_memory_in_fp16_that_overflows_is_refused_at_the_step(memory: str) -> None:
    model = overflowing() if memory == "kv" else damaged(value=1e10)
    runtime = EagerRuntime(model, tgt_len=2, memory=memory, memory_dtype="fp16")  # type: ignore[arg-type]
    found = "(keys|values) of layer 1" if memory == "kv" else "inputs of layer 0"
    with pytest.raises(ValidationError, match=f"fp16 memory overflowed in segment 0: {found} of stream 0") as error:
        Session(runtime, 2).step(ids_of([[7, 7]] * 2), ids_of([[2, 3]] * 2))
    assert "--memory-dtype fp32" in str(error.value)


def test_the_same_memory_in_fp32_is_accepted() -> None:
    assert bool(Session(EagerRuntime(overflowing(), tgt_len=2), 2).step(ids_of([[7, 7]] * 2), ids_of([[2, 3]] * 2)).isfinite().all())


def test_scoring_texts_names_segment_and_stream() -> None:
    texts = iter([("sound", np.array([1, 2, 3])), ("damaged", np.array([4, 7, 5]))])
    with pytest.raises(ValidationError, match="The loss of stream 1 in segment 0 is not finite"):
        list(Scorer(EagerRuntime(damaged(), tgt_len=2), 2).scores(texts))


@pytest.mark.parametrize("prompt", [[1, 7], [1, 2]])
def test_generation_from_scores_that_are_not_finite_is_an_error(prompt: list[int]) -> None:
    generator = Generator(EagerRuntime(damaged(tied=True), tgt_len=1, head="logits"))
    with pytest.raises(ValidationError, match="next token of stream 0"):  # also where only the score of word 7 is not
        list(generator.go_on(prompt, max_tokens=3, sampling=Sampling()))


def test_a_benchmark_says_which_segment_and_stream_it_was() -> None:
    (row,) = run([FakeRuntime(base_nll=math.nan)])
    assert not row.valid
    assert row.invalid_reasons[0].startswith("the loss of stream 0 in segment ")
