"""The compiled step: compiled once for each number of streams, whatever the text, and refused where nothing can be compiled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import build_model, small_config, trace_only
from txl_deploy.parity.rollout import compare, random_segments
from txl_deploy.runtimes.compiled import CompiledRuntime
from txl_deploy.runtimes.eager import EagerRuntime
from txl_deploy.runtimes.registry import eager_from_checkpoint
from txl_train.config import ModelConfig
from txl_train.errors import EnvironmentUnfitError

TGT_LEN = 5
CONFIG = small_config(n_layer=1, cutoffs=(5, 9, 16), div_val=2)


def compiled(config: ModelConfig = CONFIG, **options: Any) -> CompiledRuntime:
    return CompiledRuntime(build_model(config), tgt_len=TGT_LEN, **options)


def compilations() -> int:
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


KINDS: dict[str, tuple[ModelConfig, dict[str, Any]]] = {
    "fp32": (CONFIG, {}),
    "fp16": (CONFIG, {"dtype": "fp16"}),
    "hidden memory": (CONFIG, {"memory": "hidden"}),
    "scores of the next token": (CONFIG, {"head": "log_probs"}),
    "tokens read once more": (small_config(n_layer=1, ext_len=3), {}),
}


@pytest.mark.parametrize(("config", "options"), KINDS.values(), ids=KINDS)
def test_it_computes_what_eager_computes_and_is_traced_once_for_each_number_of_streams(
    monkeypatch: pytest.MonkeyPatch, config: ModelConfig, options: dict[str, Any]
) -> None:
    """Targets fall into the clusters in other numbers at every step, none and one among them, and streams start anew in between."""
    trace_only(monkeypatch)
    known = {name: value for name, value in options.items() if name != "dtype"}
    reference, runtime = EagerRuntime(build_model(config), tgt_len=TGT_LEN, **known), compiled(config, **options)
    assert runtime.info.readback["weights"] == {"float16" if "dtype" in options else "float32": len(_matrices(runtime))}
    for batch_size in (1, 3):
        before = compilations()
        result = compare(reference, runtime, random_segments(config, tgt_len=TGT_LEN, batch_size=batch_size, n_segments=12))
        assert result.passed, result.reason
        assert compilations() - before == 1


def test_clusters_that_are_equally_full_at_first_may_differ_later(monkeypatch: pytest.MonkeyPatch) -> None:
    trace_only(monkeypatch)
    runtime = compiled()
    before = compilations()
    for ids in ([0, 0, 0, 0, 0], [5, 9, 16, 0, 0], [5, 5, 5, 9, 16], [22, 22, 22, 22, 22], [5, 6, 9, 9, 16]):
        ids_BT = torch.tensor([ids, ids])
        expected = EagerRuntime(build_model(CONFIG), tgt_len=TGT_LEN).step(ids_BT, ids_BT, runtime.initial_memory(2)).nll_BT
        torch.testing.assert_close(runtime.step(ids_BT, ids_BT, runtime.initial_memory(2)).nll_BT, expected, atol=1e-5, rtol=1e-5)
    assert compilations() - before == 1


@pytest.mark.slow
def test_the_code_that_is_produced_computes_what_eager_computes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    reference, runtime = EagerRuntime(build_model(CONFIG), tgt_len=TGT_LEN), compiled(dtype="fp16")
    before = compilations()
    result = compare(reference, runtime, random_segments(CONFIG, tgt_len=TGT_LEN, n_segments=10))
    assert result.passed, result.reason
    assert compilations() - before == 1


def _matrices(runtime: CompiledRuntime) -> list[torch.Tensor]:
    return [weight for weight in runtime.step_module.parameters() if weight.dim() >= 2]


def test_more_numbers_of_streams_than_the_compiler_expects_are_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    trace_only(monkeypatch)
    runtime = compiled(small_config(n_layer=1))
    before, limit = compilations(), torch._dynamo.config.recompile_limit
    for batch_size in range(1, limit + 3):
        ids = torch.zeros((batch_size, TGT_LEN), dtype=torch.int64)
        runtime.step(ids, ids, runtime.initial_memory(batch_size))
    assert compilations() - before == limit + 2


@pytest.mark.parametrize(("on_gpu", "expected"), [(False, [2, 2, 2, 3, 5, 15]), (True, [2, 2, 2, 4, 8, 16])])
def test_rows_are_padded_with_what_means_none(on_gpu: bool, expected: list[int]) -> None:
    """To two at least, since lengths of 0 and 1 are compiled for themselves; on a GPU each length is a CUDA graph of its own."""
    runtime = compiled()
    runtime._on_gpu = on_gpu
    for have, wanted in zip([0, 1, 2, 3, 5, 15], expected, strict=True):
        assert runtime._padded(torch.arange(have), 99).tolist() == [*range(have), *[99] * (wanted - have)]


def test_without_a_compiler_the_way_to_get_one_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import torch._inductor.cpp_builder as builder
    from torch._inductor.exc import InvalidCxxCompiler

    def none() -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr(builder, "get_cpp_compiler", none)
    with pytest.raises(EnvironmentUnfitError, match=r"C\+\+ compiler.*\n.*--runtime pytorch") as caught:
        compiled()
    assert caught.value.exit_code == 3


def test_factors_that_are_rounded_are_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("txl_deploy.runtimes.eager.torch_compute", lambda dtype, device: f"{dtype} of {device}")
    assert compiled(dtype="fp16").info.compute == "fp16 of cpu"


def test_other_lengths_of_a_compiled_checkpoint_are_compiled_too(exports: Any) -> None:
    runtime, _ = eager_from_checkpoint(exports.checkpoint, compiled=True, dtype="fp16")
    other = runtime.of_length(3)
    assert isinstance(other, CompiledRuntime)
    assert (other.info.name, other.info.tgt_len, other.info.dtype, other.info.memory_dtype) == ("compiled", 3, "fp16", "fp16")
