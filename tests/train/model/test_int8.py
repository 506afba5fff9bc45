"""Linear layers in int8 multiply whole numbers exactly, round as they say, and leave the model they are made from as it is."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support import MODEL_CONFIGS, build_model, random_ids, small_config
from txl_train.config import MemoryKind
from txl_train.errors import EnvironmentUnfitError, ValidationError
from txl_train.model import int8
from txl_train.model.adaptive import cluster_rows
from txl_train.model.inference import STEPS, InferenceStep
from txl_train.model.int8 import INT8, Int8Linear, Int8LogSoftmax, in_int8, int8_weights, rounded_weight
from txl_train.model.memory import best_memory_kind
from txl_train.model.packed import PACKED, Packing, can_pack, in_packs, pack_step
from txl_train.model.transformer_xl import FeedForward

pytestmark = pytest.mark.skipif(not can_pack(), reason="this PyTorch was built without oneDNN")


class ByDefinition(torch.nn.Module):
    """Rounds a layer's inputs and weight, and multiplies what they became in float64, which holds all sums of whole numbers exactly."""

    def __init__(self, weight: Tensor, bias: Tensor | None, *, relu: bool = False, after_relu: bool = False) -> None:
        super().__init__()
        self.weight, self.bias, self.relu = weight, bias, relu
        self.steps = (255 if after_relu else 127) if int8.sums_exactly() else (127 if after_relu else 63)

    def forward(self, x: Tensor) -> Tensor:
        whole_OI, scale_O = rounded_weight(self.weight)
        scale = x.abs().amax(dim=-1, keepdim=True) * (1.0 / self.steps)
        scale = scale.clamp(min=1e-37)
        whole = torch.round(x * scale.reciprocal()).double()
        out = (whole @ whole_OI.double().T * scale_O.double()).float() * scale
        out = out if self.bias is None else out + self.bias
        return torch.relu(out) if self.relu else out


class SoftmaxByDefinition(Int8LogSoftmax):
    def pack(self) -> None:
        self.tables_int8 = torch.nn.ModuleList(ByDefinition(weight, bias) for weight, bias in zip(*self.tables(), strict=True))


def feed_forward_by_definition(plain: FeedForward) -> torch.nn.Module:
    inner = ByDefinition(plain.inner.weight, plain.inner.bias, relu=True)
    return torch.nn.Sequential(inner, ByDefinition(plain.outer.weight, plain.outer.bias, after_relu=True))


BY_DEFINITION = Packing(lambda linear: ByDefinition(linear.weight, linear.bias), feed_forward_by_definition, SoftmaxByDefinition)


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("shape", [(1, 24), (2, 5, 24), (70, 24), (0, 24)])
@pytest.mark.parametrize("options", [{}, {"relu": True}, {"after_relu": True}])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("n_output", [1, 13, 64])
def test_a_product_is_that_of_the_rounded_numbers(shape: tuple[int, ...], options: dict[str, bool], bias: bool, n_output: int) -> None:
    plain, x = torch.nn.Linear(24, n_output, bias=bias), torch.randn(shape)
    x = x.relu() if "after_relu" in options else x
    with torch.inference_mode():
        found, expected = (kind(plain.weight, plain.bias, **options)(x) for kind in (Int8Linear, ByDefinition))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("offset", [-7.0, 0.0, 7.0])
def test_what_rounding_costs_is_small_wherever_the_inputs_lie(offset: float) -> None:
    plain, x = torch.nn.Linear(512, 256), torch.randn(64, 512) + offset
    with torch.inference_mode():
        expected = plain(x)
        assert (in_int8(plain)(x) - expected).norm() < 0.03 * expected.norm()


def test_inputs_that_are_never_negative_have_twice_as_many_steps() -> None:
    plain, x = torch.nn.Linear(512, 256), torch.rand(64, 512)
    with torch.inference_mode():
        coarse, fine = ((Int8Linear(plain.weight, plain.bias, after_relu=after)(x) - plain(x)).norm() for after in (False, True))
    assert fine < 0.85 * coarse  # the weights' own rounding is in both


def test_no_token_takes_part_in_the_rounding_of_another() -> None:
    layer, x = in_int8(torch.nn.Linear(512, 256)), torch.randn(5, 512)
    beside = x.clone()
    beside[1:] *= 1e6
    with torch.inference_mode():
        assert torch.equal(layer(x)[0], layer(beside)[0])
        assert torch.equal(layer(x)[0], layer(x[:1])[0])


@pytest.mark.parametrize("size", [1e-45, 1e-38, 1e-30, 1e30, 3e38])
def test_inputs_of_any_size_are_multiplied(size: float) -> None:
    plain, x = torch.nn.Linear(8, 16, bias=False), torch.full((2, 8), size)
    with torch.inference_mode():
        found, expected = in_int8(plain)(x), plain(x.double().float())
    assert found.isfinite().all()
    torch.testing.assert_close(found, expected, atol=max(0.02 * size, 1e-36), rtol=0.05)


def test_the_largest_numbers_there_are_do_not_saturate() -> None:
    linear = torch.nn.Linear(2048, 16, bias=False)
    torch.nn.init.ones_(linear.weight)
    with torch.inference_mode():
        for layer in (in_int8(linear), Int8Linear(linear.weight, None, after_relu=True)):
            torch.testing.assert_close(layer(torch.full((3, 2048), 2.0)), torch.full((3, 16), 4096.0), rtol=1e-6, atol=0)


SATURATES = """
import torch
from txl_train.model.int8 import Int8Linear, in_int8, sums_exactly
linear = torch.nn.Linear(2048, 16, bias=False)
torch.nn.init.ones_(linear.weight)
with torch.inference_mode():
    x = torch.full((3, 2048), 2.0)
    result = torch.cat([in_int8(linear)(x), in_int8(linear)(-x).neg(), Int8Linear(linear.weight, None, after_relu=True)(x)])
print(sums_exactly(), float(result.min()), float(result.max()))
"""


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists() or "avx512_vnni" not in Path("/proc/cpuinfo").read_text(), reason="no VNNI here")
@pytest.mark.parametrize(("instructions", "exact"), [("AVX512_CORE_VNNI", True), ("AVX512_CORE", False), ("AVX2", False)])
def test_without_vnni_inputs_have_half_as_many_steps_so_that_sums_stay_exact(instructions: str, exact: bool) -> None:
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": instructions}
    done = subprocess.run([sys.executable, "-c", SATURATES], env=environment, capture_output=True, text=True, check=True)
    found, lowest, highest = done.stdout.split()
    assert found == str(exact)
    assert float(lowest) == pytest.approx(4096, rel=1e-6)
    assert float(highest) == pytest.approx(4096, rel=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_of_a_token_that_is_not_finite_no_result_is_and_of_others_all_are(bad: float) -> None:
    x = torch.ones(3, 8)
    x[1, 2] = bad
    with torch.inference_mode():
        finite = in_int8(torch.nn.Linear(8, 16))(x).isfinite()
    assert finite.all(dim=1).tolist() == [True, False, True]
    assert not finite[1].any()


def test_an_input_of_zeros_yields_the_bias() -> None:
    plain = torch.nn.Linear(8, 16)
    with torch.inference_mode():
        assert torch.equal(in_int8(plain)(torch.zeros(2, 8)), plain.bias.expand(2, 16))


def test_a_weight_that_is_not_finite_is_refused() -> None:
    plain = torch.nn.Linear(8, 16)
    torch.nn.init.constant_(plain.weight, math.inf)
    with pytest.raises(ValidationError, match="cannot be int8: it holds numbers that are not finite"):
        in_int8(plain)


def test_a_pytorch_without_onednn_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.backends.mkldnn.is_available", lambda: False)
    with pytest.raises(EnvironmentUnfitError, match="no products of int8 on this machine: it was built without oneDNN") as error:
        int8.require_int8()
    assert "txl export --format onnx --dtype int8" in str(error.value.remedy)


def test_a_processor_that_has_no_such_products_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused() -> bool:
        raise RuntimeError("could not create a primitive\nand more")

    monkeypatch.setattr(int8, "sums_exactly", refused)
    with pytest.raises(EnvironmentUnfitError, match=r"on this machine: could not create a primitive\.\n"):
        int8.require_int8()


@pytest.mark.parametrize("memory", ["best", "hidden"])
@pytest.mark.parametrize("changes", MODEL_CONFIGS.values(), ids=MODEL_CONFIGS.keys())
def test_a_step_in_int8_scores_as_its_rounded_numbers_do(changes: dict[str, Any], memory: str) -> None:
    model = build_model(small_config(**changes)).eval()
    config = model.config
    kind: MemoryKind = best_memory_kind(config) if memory == "best" else "hidden"
    before = {name: weight.clone() for name, weight in model.parameters_by_name().items()}
    models = [model, in_packs(model, kind, BY_DEFINITION), in_packs(model, kind, INT8)]
    plain, slow, rounded = (InferenceStep(each, 4, kind).eval() for each in models)
    pack_step(rounded)
    ids_BN = torch.from_numpy(random_ids(config, 2, config.ext_len + 4 * 3 + 1))
    memory_of = rounded.initial_memory(2)
    for start in range(0, 12, 4):
        inputs, targets = ids_BN[:, start : start + config.ext_len + 4], ids_BN[:, start + config.ext_len + 1 :][:, :4].contiguous()
        rows = cluster_rows(targets.reshape(-1), list(config.cluster_ends))
        with torch.inference_mode():
            exact, expected, found = (
                step(inputs, targets, rows, memory_of.length_B, [state.clone() for state in memory_of.states])
                for step in (plain, slow, rounded)
            )
        # where a sum in float32 lies on the border of two whole numbers, it may become either
        assert (found[0] - expected[0]).abs().median() < 1e-5
        assert (found[0] - expected[0]).abs().max() < 0.1 * (found[0] - exact[0]).abs().max() + 5e-3
        assert 0 < (found[0] - exact[0]).abs().max() < (0.1 if int8.sums_exactly() else 0.25)
        memory_of = memory_of._replace(length_B=found[1], states=found[2])
    n_linear = config.n_layer * (4 if kind == "kv" else 3) + len(config.cluster_ends) - 1
    assert [weight.dtype for weight in int8_weights(rounded)] == [torch.int8] * n_linear
    assert all(torch.equal(weight, before[name]) for name, weight in model.parameters_by_name().items())
    assert not any(isinstance(module, Int8Linear) for module in model.modules())


def test_steps_of_all_lengths_share_what_was_rounded_once() -> None:
    rounded = in_packs(build_model(small_config(cutoffs=(5, 9))).eval(), "kv", INT8)
    steps = [InferenceStep(rounded, tgt_len) for tgt_len in (1, 4)]
    weights = [[id(weight) for weight in int8_weights(step)] for step in steps]
    assert weights[0] == weights[1]


def test_the_distribution_of_the_next_token_is_one_and_that_of_the_targets() -> None:
    model = in_packs(build_model(small_config(cutoffs=(5, 9))).eval(), "kv", INT8)
    scoring, step = InferenceStep(model, 4).eval(), STEPS["log_probs"](model, 4).eval()
    memory, ids_BT = step.initial_memory(3), torch.from_numpy(random_ids(model.config, 3, 4))
    with torch.inference_mode():
        log_probs_BV = step(ids_BT, memory.length_B, memory.states)[0]
        rows = cluster_rows(ids_BT.reshape(-1), list(model.config.cluster_ends))
        nll_BT = scoring(ids_BT, ids_BT, rows, memory.length_B, memory.states)[0]
    torch.testing.assert_close(log_probs_BV.exp().sum(dim=1), torch.ones(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(-log_probs_BV.gather(1, ids_BT[:, -1:])[:, 0], nll_BT[:, -1], atol=1e-5, rtol=0)


def test_a_model_that_is_int8_is_not_rounded_again_and_not_packed_otherwise() -> None:
    rounded = in_packs(build_model(small_config()).eval(), "kv", INT8)
    assert in_packs(rounded, "kv", INT8) is rounded
    with pytest.raises(ValueError, match="Int8LogSoftmax already"):
        in_packs(rounded, "kv", PACKED)
