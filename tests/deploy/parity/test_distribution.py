"""What two runtimes predict is compared over all words, also where a runtime only scores the words it is given."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from tests.deploy.conftest import TGT_LEN, Exports
from tests.support import build_model, small_config
from txl_deploy.parity.distribution import Asked, Distribution, compare_all_words, divergence, segments_to_ask
from txl_deploy.parity.rollout import ParityResult, compare, random_segments
from txl_deploy.runtimes.eager import EagerRuntime
from txl_deploy.runtimes.registry import eager_from_checkpoint, open_artifact
from txl_train.config import HeadKind
from txl_train.errors import UsageError
from txl_train.evaluate import StepOutput
from txl_train.model.memory import Memory
from txl_train.model.transformer_xl import TransformerXL

CONFIG = small_config(cutoffs=(5, 9, 16), div_val=2, vocab_size=60)
SEGMENTS = random_segments(CONFIG, tgt_len=TGT_LEN, n_segments=16)


def runtime(model: TransformerXL | None = None, *, head: HeadKind = "nll", dtype: str = "fp32") -> EagerRuntime:
    return EagerRuntime(build_model(CONFIG) if model is None else model, tgt_len=TGT_LEN, head=head, dtype=dtype)


def with_other_biases(by: float) -> TransformerXL:
    """Return a model that predicts a little otherwise, in every cluster."""
    model = build_model(CONFIG)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for bias in model.head.biases:
            bias += by * torch.randn(bias.shape, generator=generator)
    return model


def distribution_of(result: ParityResult) -> Distribution:
    assert result.distribution is not None
    return result.distribution


def test_nothing_is_asked_unless_it_is_wanted() -> None:
    assert compare(runtime(), runtime(), SEGMENTS).distribution is None


def test_the_same_weights_predict_the_same() -> None:
    found = distribution_of(compare(runtime(), runtime(), SEGMENTS, distribution_segments=4))
    assert found.n_segments == 4
    assert found.kl_nats < 1e-12
    assert found.largest_swap_nats == 0.0
    assert found.top1_agreement in (1.0, None)
    assert found.top1_decided + found.top1_undecided == found.n_positions


def test_the_divergence_by_asking_is_that_over_all_words() -> None:
    other = with_other_biases(0.3)
    asked = distribution_of(compare(runtime(), runtime(other), SEGMENTS, distribution_segments=16))
    log_ps = []
    for model in (build_model(CONFIG), other):
        whole = runtime(model)
        memory = whole.initial_memory(3)
        with torch.no_grad():
            hidden_BTD, _, _ = whole.step_module.run_layers(torch.from_numpy(SEGMENTS[0].input_ids_BT), memory.length_B, memory.states)
            log_ps.append(whole.step_module.head.log_probs(hidden_BTD.flatten(0, 1)).double())
    exact = float((log_ps[0].exp() * (log_ps[0] - log_ps[1])).sum(dim=1).mean())
    assert asked.compared == "words asked"
    assert asked.kl_nats == pytest.approx(exact, rel=0.3), "of other segments, so not the same, but nearly"
    assert asked.kl_standard_error < 0.2 * asked.kl_nats


def test_a_head_that_scores_all_words_is_compared_in_all_of_them() -> None:
    model = with_other_biases(0.3)
    for head in ("logits", "log_probs"):
        result = compare(runtime(head=head), runtime(model, head=head), SEGMENTS, distribution_segments=16)
        found = distribution_of(result)
        assert (found.compared, found.top1_undecided) == ("all words", 0)
        assert 0.005 < found.kl_nats < 0.2
        assert found.top1_agreement is not None
        assert found.top1_agreement < 1.0
        assert found.largest_swap_nats > 0


def test_the_other_words_being_wrong_is_found_where_the_words_that_come_are_right() -> None:
    class RightForTheText:
        """Scores the text's own words as it should and swaps words 0 and 1, of which the text has none."""

        def __init__(self, inner: EagerRuntime) -> None:
            self.inner, self.info, self.initial_memory = inner, inner.info, inner.initial_memory

        def step(self, input_ids_BQ: torch.Tensor, target_ids_BT: torch.Tensor, memory: Memory) -> StepOutput:
            swapped_BT = torch.where(target_ids_BT <= 1, 1 - target_ids_BT, target_ids_BT)
            return self.inner.step(input_ids_BQ, swapped_BT, memory)

    segments = [dataclasses.replace(part, target_ids_BT=np.maximum(part.target_ids_BT, 2)) for part in SEGMENTS]
    assert min(part.target_ids_BT.min() for part in segments) == 2  # padding is a 0, which is not compared
    candidate = RightForTheText(runtime())
    assert compare(runtime(), candidate, segments).passed  # type: ignore[arg-type]
    result = compare(runtime(), candidate, segments, distribution_segments=4)  # type: ignore[arg-type]
    assert not result.passed
    assert "(KL)" in result.reason


def test_asking_changes_nothing_of_the_rollout(exports: Exports, monkeypatch: pytest.MonkeyPatch) -> None:
    reference, _ = eager_from_checkpoint(exports.checkpoint)
    segments = random_segments(reference.info.config, tgt_len=TGT_LEN, n_segments=12)
    for artifact in (exports.onnx, exports.torchscript):
        plain = compare(reference, open_artifact(artifact), segments)
        asked = compare(reference, open_artifact(artifact), segments, distribution_segments=12)
        assert asked.passed, asked.reason
        assert dataclasses.replace(asked, distribution=None) == plain


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_rounding_keeps_the_bounds(dtype: str) -> None:
    result = compare(runtime(), runtime(dtype=dtype), SEGMENTS, distribution_segments=16)
    assert result.passed, result.reason
    if dtype == "fp16":
        assert 0 < distribution_of(result).kl_nats < result.tolerance.kl


def test_a_reference_that_cannot_say_what_it_leaves_to_others_is_refused(exports: Exports) -> None:
    artifact = open_artifact(exports.onnx)
    segments = random_segments(artifact.info.config, tgt_len=TGT_LEN)
    assert compare(artifact, artifact, segments).passed
    with pytest.raises(UsageError, match="a reference in PyTorch"):
        compare(artifact, artifact, segments, distribution_segments=2)


def test_terms_are_never_negative_and_add_up_to_the_divergence() -> None:
    generator = np.random.default_rng(0)
    p, q = (values / values.sum() for values in generator.exponential(size=(2, 50)))
    terms = divergence(-np.log(p), np.log(q / p))
    assert (terms >= 0).all()
    assert terms.sum() == pytest.approx((p * np.log(p / q)).sum())
    assert divergence(-np.log(p), np.log(2 * q / p)).sum() == pytest.approx((p * np.log(p / q)).sum() - math.log(2) + 1)
    assert divergence(np.array([1.0]), np.array([math.nan]))[0] == math.inf


def test_words_of_nearly_the_same_likelihood_may_swap_and_are_told_by_how_far_apart_they_are() -> None:
    asked = Asked(exact=True)
    ours = [[0.4, 0.39, 0.21], [0.6, 0.2, 0.2]]
    theirs = [[0.39, 0.4, 0.21], [0.6, 0.2, 0.2]]
    compare_all_words(asked, -np.log(ours), -np.log(theirs))
    found = asked.result()
    assert found is not None
    assert (found.top1_agreement, found.top1_decided) == (0.5, 2)
    assert found.largest_swap_nats == pytest.approx(math.log(0.4 / 0.39))


def test_segments_to_ask_are_spread_and_never_more_than_there_are() -> None:
    assert segments_to_ask(100, 5) == {0, 25, 50, 74, 99}
    assert segments_to_ask(3, 16) == {0, 1, 2}
    assert segments_to_ask(3, 0) == segments_to_ask(0, 4) == set()
