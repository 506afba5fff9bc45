"""The bounds of fp16 are wide enough for rounding and narrow enough for the faults that fp16 is known for."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.support import ATTENTION_KINDS, MODEL_CONFIGS, build_model, small_config
from txl_deploy.parity.rollout import ParityResult, compare, random_segments
from txl_deploy.parity.tolerances import TOLERANCES, Tolerance, tolerance_for
from txl_deploy.runtimes.eager import EagerRuntime
from txl_train.config import HeadKind, ModelConfig
from txl_train.model.memory import best_memory_kind
from txl_train.model.positional import encode_distances
from txl_train.model.transformer_xl import TransformerXL

TGT_LEN = 5
LARGE = ModelConfig(vocab_size=30_000, n_layer=2, n_head=2, d_head=8, d_model=16, d_inner=16, mem_len=16, dropout=0.0)
LONG = small_config(mem_len=640)
LONG_TGT_LEN = 64

Change = Callable[[EagerRuntime, TransformerXL], None]


def half_against_full(
    model: TransformerXL, change: Change | None = None, *, head: HeadKind = "nll", memory_dtype: str = "fp16", tgt_len: int = TGT_LEN
) -> ParityResult:
    """Compare fp16 with fp32, both in eager PyTorch on a CPU, where fp16 rounds every product: more than a GPU does."""
    memory = best_memory_kind(model.config)
    segments = random_segments(model.config, tgt_len=tgt_len, n_segments=12)
    reference = EagerRuntime(model, tgt_len=tgt_len, memory=memory, head=head)
    candidate = EagerRuntime(model, tgt_len=tgt_len, memory=memory, head=head, dtype="fp16", memory_dtype=memory_dtype)
    if change is not None:
        change(candidate, model)
    return compare(reference, candidate, segments)


def attending_by_distance(config: ModelConfig) -> TransformerXL:
    """Return a model whose scores depend on positions more than on anything else, as single heads of trained models do."""
    model = build_model(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("attention.position.weight"):
                parameter *= 12
    return model


@pytest.mark.parametrize("name", MODEL_CONFIGS)
def test_rounding_keeps_the_bounds_in_every_kind_of_model(name: str) -> None:
    model = build_model(small_config(**MODEL_CONFIGS[name]), seed=2)
    for head in ("nll", "log_probs"):
        result = half_against_full(model, head=head)
        assert result.passed, result.reason
        assert result.max_abs_delta_nll > 1e-5, "fp16 is not what was computed"


@pytest.mark.parametrize("kind", ATTENTION_KINDS)
def test_a_memory_of_fp16_costs_next_to_nothing(kind: str) -> None:
    model = build_model(small_config(**ATTENTION_KINDS[kind]))
    halves, full = (half_against_full(model, memory_dtype=dtype) for dtype in ("fp16", "fp32"))
    assert halves.passed
    assert full.passed
    assert halves.rms_delta_nll <= 1.5 * full.rms_delta_nll


def test_larger_logits_are_allowed_the_larger_errors_that_they_have() -> None:
    model = build_model(small_config(pre_lnorm=True))
    with torch.no_grad():
        for table in model.embedding.weights:
            table *= 8
    result = half_against_full(model)
    assert result.max_abs_delta_nll > 0.03, "no fixed bound of 0.02 nats would do"
    assert result.passed, result.reason


def with_layer_norm_in_half(runtime: EagerRuntime, _: TransformerXL) -> None:
    def normalise(norm: torch.nn.LayerNorm) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            centred = x.half() - x.half().mean(-1, keepdim=True)
            variance = (centred * centred).mean(-1, keepdim=True)
            return ((centred * torch.rsqrt(variance + norm.eps)) * norm.weight.half() + norm.bias.half()).float()

        return forward

    for module in runtime.step_module.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.forward = normalise(module)  # type: ignore[method-assign]


def with_angles_in_half(runtime: EagerRuntime, model: TransformerXL) -> None:
    """Multiply distances and frequencies in fp16: from 2048 on not even the distances are distinct."""
    config, distances = model.config, _distances(runtime)
    frequencies = 10000 ** -(torch.arange(0, config.d_model, 2) / config.d_model)
    angles = (distances.half()[:, None] * frequencies.half()[None]).float()
    _encode(runtime, model, torch.cat([angles.sin(), angles.cos()], dim=1))


def with_encodings_in_half(runtime: EagerRuntime, model: TransformerXL) -> None:
    _encode(runtime, model, encode_distances(_distances(runtime), model.config.d_model).half().float())


def with_another_clamp(runtime: EagerRuntime, model: TransformerXL) -> None:
    _encode(runtime, model, encode_distances(_distances(runtime).clamp(max=4), model.config.d_model))


def _distances(runtime: EagerRuntime) -> Tensor:
    return torch.arange(runtime.info.mem_len + runtime.info.tgt_len - 1, -2, -1).clamp(min=0)


def _encode(runtime: EagerRuntime, model: TransformerXL, encoded: Tensor) -> None:
    with torch.no_grad():
        for term, layer in zip(runtime.step_module.position_terms, model.decoder_layers()):
            term.data = layer.attention.position_term(encoded).half().contiguous()


def with_one_wrong_bias(runtime: EagerRuntime, _: TransformerXL) -> None:
    with torch.no_grad():
        runtime.step_module.decoder.layers[1].feed_forward.outer.bias[2] += 0.1


def log_sum_exp_in_half(scores_NV: Tensor, more_NC: Tensor | None = None) -> Tensor:
    scores = (scores_NV if more_NC is None else torch.cat([scores_NV, more_NC], dim=1)).half()
    largest = scores.amax(dim=1, keepdim=True)
    exps = (scores - largest).exp()
    lanes = torch.zeros(len(scores), 32, dtype=torch.float16)  # as many sums at once as a warp has threads
    for part in exps.split(32, dim=1):
        lanes[:, : part.shape[1]] += part
    total = torch.zeros(len(scores), dtype=torch.float16)
    for lane in lanes.unbind(dim=1):
        total += lane
    return (total.log() + largest.squeeze(1)).float()


def test_a_log_sum_exp_of_fp16_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    model = TransformerXL(LARGE)
    assert half_against_full(model).passed

    def patched(runtime: EagerRuntime, _: TransformerXL) -> None:
        real = runtime.step

        def step(*tensors):  # type: ignore[no-untyped-def]
            with monkeypatch.context() as patch:
                patch.setattr("txl_train.model.adaptive.log_sum_exp", log_sum_exp_in_half)
                return real(*tensors)

        monkeypatch.setattr(runtime, "step", step)

    result = half_against_full(model, patched)
    assert not result.passed
    assert abs(result.mean_delta_nll) > result.tolerance.mean_nll


def test_a_layer_norm_of_fp16_fails_where_its_input_is_large_and_only_there() -> None:
    moderate, large = build_model(small_config()), build_model(small_config())
    with torch.no_grad():
        for name, parameter in large.named_parameters():  # what is normalised becomes larger than the root of 65504
            if name.endswith(("feed_forward.outer.bias", "feed_forward.outer.weight")):
                parameter *= 300
    assert half_against_full(moderate, with_layer_norm_in_half).passed, "a fault without consequences here"
    assert half_against_full(large).passed
    assert not half_against_full(large, with_layer_norm_in_half).passed


def test_positions_computed_in_fp16_fail_over_long_distances() -> None:
    model = attending_by_distance(LONG)
    assert half_against_full(model, tgt_len=LONG_TGT_LEN).passed
    assert not half_against_full(model, with_angles_in_half, tgt_len=LONG_TGT_LEN).passed


def test_encodings_that_are_only_rounded_to_fp16_pass_as_they_are_no_worse_than_other_operands() -> None:
    assert half_against_full(attending_by_distance(LONG), with_encodings_in_half, tgt_len=LONG_TGT_LEN).passed


@pytest.mark.parametrize("change", [with_another_clamp, with_one_wrong_bias])
def test_a_wrong_constant_fails(change: Change) -> None:
    assert not half_against_full(build_model(small_config(mem_len=16)), change).passed


def test_bounds_are_shares_of_the_reference_s_nll_of_one_nat_at_least() -> None:
    tolerance = Tolerance(token=1e-3, rms=1e-4, mean=1e-5, memory=1e-2, kl=1e-8, swap=1e-3)
    wide = tolerance.bounds(largest_nll=20.0, mean_nll=5.0, n_compared=10**12)
    narrow = tolerance.bounds(largest_nll=0.1, mean_nll=0.01, n_compared=10**12)
    assert dataclasses.astuple(wide) == pytest.approx((2e-2, 2e-3, 5e-5, 1e-2, 4e-6, 2e-2), rel=1e-3)
    assert dataclasses.astuple(narrow) == pytest.approx((1e-3, 1e-4, 1e-5, 1e-2, 1e-8, 1e-3), rel=1e-3)
    assert tolerance.mean_bound(math.nan) == tolerance.mean_bound(math.inf) == 1e-5


def test_the_bound_on_the_mean_is_wider_for_few_tokens_and_knows_nothing_of_the_differences() -> None:
    tolerance = TOLERANCES["fp16"]
    few, many, corpus = (tolerance.bounds(largest_nll=10.0, mean_nll=4.0, n_compared=n).mean_nll for n in (78, 10_000, 280_000))
    assert few == pytest.approx(6e-4 + 4 * 2.5e-3 / math.sqrt(78))
    assert few > many > corpus > tolerance.mean_bound(4.0)
    assert corpus < 1.05 * tolerance.mean_bound(4.0)


def test_the_next_token_s_mean_over_all_words_has_its_own_bound_in_fp16_alone() -> None:
    assert tolerance_for("fp16", "nll") is TOLERANCES["fp16"]
    assert tolerance_for("fp32", "logits") is TOLERANCES["fp32"]
    heads = [tolerance_for("fp16", head) for head in ("logits", "log_probs")]
    assert heads[0] == heads[1]
    assert heads[0] is not None
    assert heads[0].mean > TOLERANCES["fp16"].mean
    assert tolerance_for("int8", "logits") is TOLERANCES["int8"]
    assert tolerance_for("bf16", "nll") is None


def test_states_of_fp16_have_a_bound_between_fp32_and_fp16() -> None:
    full, half, between = TOLERANCES["fp32"], TOLERANCES["fp16"], tolerance_for("fp32", "nll", "fp16")
    assert between is not None
    for name in ("token", "rms", "mean", "memory"):
        assert getattr(full, name) < getattr(between, name) < getattr(half, name)
    assert tolerance_for("fp16", "nll", "fp32") == tolerance_for("fp16", "nll", "fp16") == half
