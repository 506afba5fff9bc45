"""Generation goes on with a prompt the same way on every runtime, whatever else is generated beside it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.deploy.conftest import Exports
from tests.reference.naive_txl import naive_forward, naive_log_probs
from tests.support import trace_only
from txl_deploy.export.artifact import ExportRequest, export_artifact
from txl_deploy.generate import Generator, Timing
from txl_deploy.runtimes.base import HeadError
from txl_deploy.runtimes.registry import eager_from_checkpoint, open_artifact
from txl_deploy.sampling import Sampling, distribution, log_probs
from txl_train.checkpoint import load_model
from txl_train.errors import UsageError

PROMPT = [3, 7, 1, 0, 12, 5, 5, 2, 9, 4, 11, 6]
GREEDY = Sampling(temperature=0)


def eager(exports: Exports, readers: tuple[int, ...] = (5,)) -> Generator:
    step, _ = eager_from_checkpoint(exports.checkpoint, tgt_len=1, head="logits")
    return Generator(step, [step.of_length(length) for length in readers])


def exported(exports: Exports, folder: Path, form: str, head: str = "logits", *, batch: int | None = None, tgt_len: int = 1) -> Path:
    out = folder / f"{form}-{head}-{batch}-{tgt_len}"
    export_artifact(ExportRequest(checkpoint=exports.checkpoint, out=out, format=form, head=head, tgt_len=tgt_len, batch_size=batch))
    return out


def ids(generator: Generator, *, samples: int = 1, sampling: Sampling = GREEDY, prompt: list[int] = PROMPT, **given) -> list[list[int]]:
    made: list[list[int]] = [[] for _ in range(samples)]
    for token in generator.go_on(prompt, max_tokens=given.pop("max_tokens", 30), sampling=sampling, samples=samples, **given):
        made[token.sample].append(token.id)
    return made


def test_greedy_tokens_are_those_of_the_slow_model(exports):
    """Prompt and continuation through the oracle from the paper, one token at a time."""
    model, _ = load_model(exports.checkpoint)
    config, parameters = model.config, {name: value.double().numpy() for name, value in model.parameters_by_name().items()}
    tokens, memory, expected = list(PROMPT[:4]), None, []
    for token in tokens:
        hidden, memory = naive_forward(config, parameters, np.array([[token]]), memory)
    for _ in range(6):
        log_p_V = naive_log_probs(config, parameters, hidden[0, -1])
        expected.append((int(log_p_V.argmax()), float(log_p_V.max())))
        hidden, memory = naive_forward(config, parameters, np.array([[expected[-1][0]]]), memory)
    made = list(eager(exports, ()).go_on(PROMPT[:4], max_tokens=6, sampling=GREEDY))
    assert [token.id for token in made] == [token for token, _ in expected]
    assert [token.log_p for token in made] == pytest.approx([log_p for _, log_p in expected], abs=1e-5)
    assert [token.end for token in made] == [None] * 5 + ["max-tokens"]


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, 22), min_size=1, max_size=14))
def test_what_is_drawn_from_is_the_full_softmax_of_the_slow_model_after_any_prompt(exports, prompt):
    """The oracle reads the prompt in the same cut: segments of five while more follows, then single tokens."""
    model, _ = load_model(exports.checkpoint)
    config, parameters = model.config, {name: value.double().numpy() for name, value in model.parameters_by_name().items()}
    at, memory = 0, None
    while at < len(prompt):
        size = 5 if len(prompt) - at > 5 else 1
        hidden, memory = naive_forward(config, parameters, np.array([prompt[at : at + size]]), memory)
        at += size
    exact_V = naive_log_probs(config, parameters, hidden[0, -1])
    drawn_from = distribution(log_probs(eager(exports).read(prompt)[0][0]), Sampling())
    assert drawn_from.sum() == pytest.approx(1, abs=1e-12)
    assert drawn_from.log().tolist() == pytest.approx(exact_V.tolist(), abs=5e-5)  # the model's float32


def test_greedy_tokens_are_the_same_when_compiled(exports, monkeypatch):
    trace_only(monkeypatch)
    step, _ = eager_from_checkpoint(exports.checkpoint, tgt_len=1, head="logits", compiled=True)
    assert ids(Generator(step)) == ids(eager(exports, ()))


@pytest.mark.slow
@pytest.mark.parametrize("form", ["torchscript", "onnx"])
@pytest.mark.parametrize("head", ["logits", "log_probs"])
def test_greedy_tokens_are_the_same_on_every_runtime(exports, tmp_path, form, head):
    step = open_artifact(exported(exports, tmp_path, form, head))
    reader = open_artifact(exports.onnx if form == "onnx" else exports.torchscript)  # of the nll head, whose memory is as good
    assert ids(Generator(step)) == ids(eager(exports, ()))
    assert ids(Generator(step, [reader])) == ids(eager(exports, (5,)))
    assert ids(Generator(step, [reader]), samples=3, sampling=Sampling(), seed=5) == ids(
        eager(exports), samples=3, sampling=Sampling(), seed=5
    )


@pytest.mark.slow
def test_an_export_of_a_fixed_batch_generates_what_a_free_one_does(exports, tmp_path):
    fixed = open_artifact(exported(exports, tmp_path, "onnx", batch=2))
    free = eager(exports, ())
    for samples in (1, 2, 3):
        assert ids(Generator(fixed), samples=samples, sampling=Sampling(), seed=2) == ids(
            free, samples=samples, sampling=Sampling(), seed=2
        )


def test_a_sample_is_the_same_to_the_bit_whatever_is_generated_beside_it(exports):
    generator = eager(exports)
    three = ids(generator, samples=3, sampling=Sampling(), seed=4)
    assert len({tuple(sample) for sample in three}) == 3
    assert three == ids(generator, samples=3, sampling=Sampling(), seed=4)
    assert three[0] == ids(generator, samples=1, sampling=Sampling(), seed=4)[0]
    assert three[:2] == ids(generator, samples=2, sampling=Sampling(), seed=4)
    assert three != ids(generator, samples=3, sampling=Sampling(), seed=5)


def test_a_sample_that_ended_changes_no_other(exports):
    generator = eager(exports)
    whole = ids(generator, samples=3, sampling=Sampling(), seed=4)
    cut = ids(
        generator,
        samples=3,
        sampling=Sampling(),
        seed=4,
        ends=lambda sample, token: "stop" if sample == 1 and token == whole[1][2] else None,
    )
    first = whole[1].index(whole[1][2]) + 1
    assert cut == [whole[0], whole[1][:first], whole[2]]


def test_the_cut_of_the_prompt_does_not_matter_where_every_token_sees_as_many(exports):
    step, _ = eager_from_checkpoint(exports.checkpoint, tgt_len=1, head="logits", same_length=True)
    alone = Generator(step).read(PROMPT * 3)[0]
    for lengths in ((2,), (5,), (7, 3)):
        torch.testing.assert_close(Generator(step, [step.of_length(n) for n in lengths]).read(PROMPT * 3)[0], alone, rtol=0, atol=2e-5)


def test_segments_read_a_prompt_as_single_tokens_do_within_the_memory(exports):
    short = PROMPT[: load_model(exports.checkpoint)[0].config.mem_len]
    torch.testing.assert_close(eager(exports, (3, 2)).read(short)[0], eager(exports, ()).read(short)[0], rtol=0, atol=2e-5)


def test_drawn_tokens_have_the_frequencies_of_the_full_softmax(exports):
    generator, n = eager(exports), 3000
    p_V = torch.softmax(generator.read(PROMPT)[0][0].double(), 0)
    drawn = torch.tensor([sample[0] for sample in ids(generator, samples=n, sampling=Sampling(), seed=1, max_tokens=1)])
    expected = n * p_V
    counts = torch.bincount(drawn, minlength=len(p_V)).double()
    often = expected >= 5
    chi_square = float(((counts - expected)[often] ** 2 / expected[often]).sum())
    degrees = int(often.sum()) - 1
    assert chi_square < degrees + 4 * (2 * degrees) ** 0.5


def test_timing_tells_the_prompt_and_each_step(exports):
    timing = Timing()
    ids(eager(exports), max_tokens=7, timing=timing)
    assert timing.prompt_s > 0
    assert len(timing.steps_s) == 6  # the first token needs none


def test_what_cannot_generate_is_refused_by_its_reason(exports):
    with pytest.raises(HeadError, match="head logits"):
        Generator(open_artifact(exports.torchscript))
    step, _ = eager_from_checkpoint(exports.checkpoint, tgt_len=1, head="logits")
    with pytest.raises(UsageError, match="takes 4 tokens"):
        Generator(step.of_length(4))
    other, _ = eager_from_checkpoint(exports.checkpoint, tgt_len=4, head="logits", mem_len=3)
    with pytest.raises(UsageError, match="`--mem-len` is 3"):
        Generator(step, [other])
    with pytest.raises(UsageError, match="no token"):
        Generator(step).read([])
