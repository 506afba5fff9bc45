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
from txl_train.model.int8 import Int8Linear, Int8LogSoftmax, in_int8, int8_weights, rounded_weight
from txl_train.model.memory import best_memory_kind
from txl_train.model.packed import can_pack, in_packs, pack_step

pytestmark = pytest.mark.skipif(not can_pack(), reason="this PyTorch was built without oneDNN")


def by_definition(linear: torch.nn.Linear, x: Tensor, largest: int) -> Tensor:
    """Round a layer's input and weight, and multiply what they became in float64, which holds all sums of whole numbers exactly."""
    whole_OI, scale_O = rounded_weight(linear.weight)
    lowest, highest = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    scale = (highest - lowest) / largest or 1.0
    zero_point = math.floor(-lowest / scale)
    whole = torch.floor(x.double() / scale + zero_point + 0.5).clamp(0, largest)
    product = (whole - zero_point) @ whole_OI.double().T * scale * scale_O.double()
    return (product if linear.bias is None else product + linear.bias.double()).float()


@pytest.mark.parametrize("shape", [(1, 24), (2, 5, 24), (0, 24)])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("n_output", [1, 13, 64])
def test_a_product_is_that_of_the_rounded_numbers(shape: tuple[int, ...], relu: bool, bias: bool, n_output: int) -> None:
    plain, x = torch.nn.Linear(24, n_output, bias=bias), torch.randn(shape)
    with torch.inference_mode():
        found = in_int8(plain, relu=relu)(x)
        expected = plain(x) if x.numel() == 0 else by_definition(plain, x, int8.largest_input())
        expected = torch.relu(expected) if relu else expected
        # an input that lies on the border of two whole numbers may become either, in the arithmetic of float32 and of float64
        torch.testing.assert_close(found, expected, atol=1e-2, rtol=0)
        assert ((found - expected).abs() < 1e-5).float().mean() > 0.9 or x.numel() == 0


@pytest.mark.parametrize("offset", [-7.0, 0.0, 7.0])
def test_what_rounding_costs_is_small_wherever_the_inputs_lie(offset: float) -> None:
    torch.manual_seed(0)
    plain, x = torch.nn.Linear(512, 256), torch.randn(64, 512) + offset
    with torch.inference_mode():
        expected = plain(x)
        assert (in_int8(plain)(x) - expected).norm() < 0.03 * expected.norm()


def test_the_largest_numbers_there_are_do_not_saturate() -> None:
    linear = torch.nn.Linear(2048, 16, bias=False)
    torch.nn.init.ones_(linear.weight)
    with torch.inference_mode():
        torch.testing.assert_close(in_int8(linear)(torch.full((3, 2048), 2.0)), torch.full((3, 16), 4096.0), rtol=1e-6, atol=0)


SATURATES = """
import torch
from txl_train.model.int8 import in_int8, largest_input
linear = torch.nn.Linear(2048, 16, bias=False)
torch.nn.init.ones_(linear.weight)
with torch.inference_mode():
    result = in_int8(linear)(torch.full((3, 2048), 2.0))
print(largest_input(), float(result.min()), float(result.max()))
"""


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists() or "avx512_vnni" not in Path("/proc/cpuinfo").read_text(), reason="no VNNI here")
@pytest.mark.parametrize(("instructions", "largest"), [("AVX512_CORE_VNNI", 255), ("AVX512_CORE", 127), ("AVX2", 127)])
def test_without_vnni_inputs_have_half_as_many_steps_so_that_sums_stay_exact(instructions: str, largest: int) -> None:
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": instructions}
    done = subprocess.run([sys.executable, "-c", SATURATES], env=environment, capture_output=True, text=True, check=True)
    found, lowest, highest = done.stdout.split()
    assert int(found) == largest
    assert float(lowest) == pytest.approx(4096, rel=1e-6)
    assert float(highest) == pytest.approx(4096, rel=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_an_input_that_is_not_finite_yields_no_number_at_all(bad: float) -> None:
    x = torch.ones(3, 8)
    x[1, 2] = bad
    with torch.inference_mode():
        assert in_int8(torch.nn.Linear(8, 16))(x).isnan().all()


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
    with pytest.raises(EnvironmentUnfitError, match="no products of int8") as error:
        int8.require_int8()
    assert "txl export --format onnx --dtype int8" in str(error.value.remedy)


@pytest.mark.parametrize("memory", ["best", "hidden"])
@pytest.mark.parametrize("changes", MODEL_CONFIGS.values(), ids=MODEL_CONFIGS.keys())
def test_a_step_in_int8_scores_nearly_as_the_plain_one(changes: dict[str, Any], memory: str) -> None:
    model = build_model(small_config(**changes)).eval()
    config = model.config
    kind: MemoryKind = best_memory_kind(config) if memory == "best" else "hidden"
    before = {name: weight.clone() for name, weight in model.parameters_by_name().items()}
    plain, rounded = InferenceStep(model, 4, kind).eval(), InferenceStep(in_packs(model, kind, in_int8), 4, kind).eval()
    pack_step(rounded, Int8LogSoftmax)
    ids_BN = torch.from_numpy(random_ids(config, 2, config.ext_len + 4 * 3 + 1))
    memories = [step.initial_memory(2) for step in (plain, rounded)]
    for start in range(0, 12, 4):
        inputs, targets = ids_BN[:, start : start + config.ext_len + 4], ids_BN[:, start + config.ext_len + 1 :][:, :4].contiguous()
        rows = cluster_rows(targets.reshape(-1), list(config.cluster_ends))
        found = []
        for i, step in enumerate((plain, rounded)):
            with torch.inference_mode():
                nll, length, states = step(inputs, targets, rows, memories[i].length_B, memories[i].states)
            memories[i] = memories[i]._replace(length_B=length, states=states)
            found.append(nll)
        assert 0 < (found[1] - found[0]).abs().max() < 0.1
    n_linear = config.n_layer * (4 if kind == "kv" else 3) + len(config.cluster_ends) - 1
    assert [weight.dtype for weight in int8_weights(rounded)] == [torch.int8] * n_linear
    assert all(torch.equal(weight, before[name]) for name, weight in model.parameters_by_name().items())
    assert not any(isinstance(module, Int8Linear) for module in model.modules())


def test_the_distribution_of_the_next_token_is_one() -> None:
    model = build_model(small_config(cutoffs=(5, 9))).eval()
    step = STEPS["log_probs"](in_packs(model, "kv", in_int8), 4).eval()
    pack_step(step, Int8LogSoftmax)
    memory = step.initial_memory(3)
    with torch.inference_mode():
        log_probs_BV = step(torch.from_numpy(random_ids(model.config, 3, 4)), memory.length_B, memory.states)[0]
    torch.testing.assert_close(log_probs_BV.exp().sum(dim=1), torch.ones(3), atol=1e-5, rtol=0)


def test_a_model_that_is_int8_is_not_rounded_again() -> None:
    rounded = in_packs(build_model(small_config()).eval(), "kv", in_int8)
    assert in_packs(rounded, "kv", in_int8) is rounded
