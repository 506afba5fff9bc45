"""Every runtime keeps the promises of the protocol, and computes what eager PyTorch computes."""

from __future__ import annotations

import dataclasses
import functools
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.deploy.conftest import TGT_LEN, Exports
from tests.support import random_ids, small_config, trace_only
from txl_deploy.export.artifact import ExportRequest, export_artifact
from txl_deploy.runtimes.base import Runtime, ShapeRangeError, check_shapes, torch_compute
from txl_deploy.runtimes.registry import eager_from_checkpoint, open_artifact, resolve_device
from txl_deploy.session import Session
from txl_train.errors import ArtifactError, EnvironmentUnfitError, ManifestError, UsageError
from txl_train.model.memory import Memory, empty_memory

EXPORTED = ["torchscript", "onnx"]
NAMES = ["pytorch", *EXPORTED, "compiled"]


def open_named(exports: Exports, name: str) -> Runtime:
    if name == "pytorch":
        return eager_from_checkpoint(exports.checkpoint)[0]
    if name == "compiled":
        return compiled(exports.checkpoint)
    return open_artifact(getattr(exports, name))


@functools.cache
def compiled(checkpoint: Path) -> Runtime:
    """One for all tests, as each number of streams takes seconds."""
    return eager_from_checkpoint(checkpoint, compiled=True)[0]


@pytest.fixture(autouse=True, scope="module")
def _only_traced() -> Iterator[None]:
    """Trace for the compiler, and run what was traced as it is: `test_compiled.py` compiles."""
    with pytest.MonkeyPatch.context() as patch:
        trace_only(patch)
        yield


def segments_of(runtime: Runtime, batch_size: int, count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    ids = torch.from_numpy(random_ids(runtime.info.config, batch_size, count * TGT_LEN + 1))
    return [
        (ids[:, i : i + TGT_LEN].contiguous(), ids[:, i + 1 : i + TGT_LEN + 1].contiguous()) for i in range(0, count * TGT_LEN, TGT_LEN)
    ]


@pytest.mark.parametrize("name", NAMES)
def test_a_runtime_says_what_it_is(exports: Exports, name: str) -> None:
    info = open_named(exports, name).info
    assert (info.name, info.dtype, info.memory, info.tgt_len, info.mem_len, info.device) == (name, "fp32", "kv", TGT_LEN, 7, "cpu")
    providers = {"pytorch": "eager", "compiled": "inductor", "torchscript": "torchscript", "onnx": "CPUExecutionProvider"}
    assert (info.provider, info.compute) == (providers[name], "fp32")
    assert set(info.readback["weights"]) == {"float32"}


@pytest.mark.parametrize("batch_size", [1, 2, 5])
@pytest.mark.parametrize("name", [*EXPORTED, "compiled"])
def test_every_token_equals_eager_at_any_batch_size(exports: Exports, name: str, batch_size: int) -> None:
    ours, theirs = Session(open_named(exports, "pytorch"), batch_size), Session(open_named(exports, name), batch_size)
    for input_ids, target_ids in segments_of(ours.runtime, batch_size, 5):
        torch.testing.assert_close(theirs.step(input_ids, target_ids), ours.step(input_ids, target_ids), atol=1e-5, rtol=1e-5)
        assert torch.equal(ours.memory.length_B, theirs.memory.length_B)


@pytest.mark.parametrize("name", NAMES)
def test_targets_of_a_single_cluster_leave_the_others_empty(exports: Exports, name: str) -> None:
    runtime, eager = open_named(exports, name), open_named(exports, "pytorch")
    for target in (0, 5, 9, 16, 22):
        ids = torch.full((2, TGT_LEN), target)
        expected = eager.step(ids, ids, eager.initial_memory(2)).nll_BT
        torch.testing.assert_close(runtime.step(ids, ids, runtime.initial_memory(2)).nll_BT, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_stale_contents_beyond_the_valid_length_do_not_matter(exports: Exports, name: str) -> None:
    runtime = open_named(exports, name)
    (input_ids, target_ids) = segments_of(runtime, 2, 1)[0]
    cold = runtime.step(input_ids, target_ids, runtime.initial_memory(2)).nll_BT.clone()
    empty = runtime.initial_memory(2)
    dirty = Memory([torch.full_like(state, 50.0) for state in empty.states], empty.length_B)
    assert torch.equal(runtime.step(input_ids, target_ids, dirty).nll_BT, cold)


@pytest.mark.parametrize("name", NAMES)
def test_a_memory_that_was_cloned_can_be_used_again(exports: Exports, name: str) -> None:
    runtime = open_named(exports, name)
    segments = segments_of(runtime, 2, 4)
    memory = runtime.step(*segments[0], runtime.initial_memory(2)).memory
    kept = Memory([state.clone() for state in memory.states], memory.length_B.clone())
    first = runtime.step(*segments[1], memory).nll_BT.clone()
    runtime.step(*segments[2], kept)
    assert torch.equal(runtime.step(*segments[1], kept).nll_BT, first)


@pytest.mark.parametrize("name", NAMES)
def test_a_step_does_not_overwrite_the_memory_it_reads(exports: Exports, name: str) -> None:
    runtime = open_named(exports, name)
    memory = runtime.initial_memory(3)
    for input_ids, target_ids in segments_of(runtime, 3, 5):
        before = [state.clone() for state in memory.states]
        output = runtime.step(input_ids, target_ids, memory)
        assert all(torch.equal(a, b) for a, b in zip(before, memory.states))
        memory = output.memory


@pytest.mark.parametrize("name", NAMES)
def test_sessions_that_take_turns_on_one_runtime_do_not_disturb_each_other(exports: Exports, name: str) -> None:
    runtime = open_named(exports, name)
    segments = segments_of(runtime, 3, 12)
    alone = []
    for own in (segments[:6], segments[6:]):
        session = Session(runtime, 3)
        alone.append([session.step(*segment).clone() for segment in own])
    first, second = Session(runtime, 3), Session(runtime, 3)
    for i in range(6):
        torch.testing.assert_close(first.step(*segments[i]), alone[0][i], atol=1e-6, rtol=0)
        torch.testing.assert_close(second.step(*segments[6 + i]), alone[1][i], atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_a_step_never_writes_where_it_reads_even_after_a_reset(exports: Exports, name: str) -> None:
    runtime = open_named(exports, name)
    session = Session(runtime, 2)
    for i, segment in enumerate(segments_of(runtime, 2, 8)):
        if i in (2, 3, 6):
            session.reset([1])
        read = {state.data_ptr() for state in session.memory.states}
        session.step(*segment)
        assert not read & {state.data_ptr() for state in session.memory.states}


def copy_of(memory: Memory) -> Memory:
    return Memory([state.clone() for state in memory.states], memory.length_B.clone())


@pytest.mark.parametrize("name", NAMES)
def test_a_memory_that_is_continued_twice_has_two_futures_that_do_not_meet(exports: Exports, name: str) -> None:
    runtime = open_named(exports, name)
    segments = segments_of(runtime, 2, 6)
    root = runtime.step(*segments[1], runtime.step(*segments[0], runtime.initial_memory(2)).memory).memory
    alone = []
    for i in (2, 4):
        nll, memory = runtime.step(*segments[i], copy_of(root))
        alone.append(
            (runtime.step(*segments[i + 1], memory).nll_BT.clone(), copy_of(runtime.step(*segments[i + 1], copy_of(memory)).memory))
        )
    a, b = (runtime.step(*segments[i], root).memory for i in (2, 4))
    after_a, after_b = runtime.step(*segments[3], a), runtime.step(*segments[5], b)
    assert not {state.data_ptr() for state in after_a.memory.states} & {state.data_ptr() for state in after_b.memory.states}
    for (nll, memory), (expected_nll, expected) in zip((after_a, after_b), alone, strict=True):
        torch.testing.assert_close(nll, expected_nll, atol=1e-6, rtol=0)
        for ours, theirs in zip(memory.states, expected.states, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


@pytest.mark.parametrize("place", [0, 3])
@pytest.mark.parametrize("name", NAMES)
def test_a_tensor_that_was_put_into_a_memory_is_read_and_never_written(exports: Exports, name: str, place: int) -> None:
    runtime = open_named(exports, name)
    segments = segments_of(runtime, 2, 6)
    memory = runtime.step(*segments[1], runtime.step(*segments[0], runtime.initial_memory(2)).memory).memory
    own = memory.states[place] * 0.5
    kept = own.clone()
    mixed = Memory([own if i == place else state for i, state in enumerate(memory.states)], memory.length_B)
    expected = runtime.step(*segments[2], copy_of(mixed)).nll_BT.clone()
    output = runtime.step(*segments[2], mixed)
    torch.testing.assert_close(output.nll_BT, expected, atol=1e-6, rtol=0)
    for segment in segments[3:]:
        output = runtime.step(*segment, output.memory)
        assert torch.equal(own, kept)


def test_onnx_runtime_refuses_a_memory_that_was_overwritten_whole_or_in_part(exports: Exports) -> None:
    runtime = open_named(exports, "onnx")
    segment = segments_of(runtime, 2, 1)[0]
    old = runtime.step(*segment, runtime.initial_memory(2)).memory
    kept = copy_of(old)
    new = runtime.step(*segment, old).memory
    runtime.step(*segment, old)  # not yet
    runtime.step(*segment, new)
    for place in (None, 0, 3):
        states = [ours if i == place else theirs for i, (ours, theirs) in enumerate(zip(kept.states, old.states))]
        with pytest.raises(UsageError, match=r"(?s)has been overwritten.*Clone the tensors") as caught:
            runtime.step(*segment, Memory(states, old.length_B))
        assert caught.value.exit_code == 2
    runtime.step(*segment, kept)


def test_onnx_runtime_uses_two_sets_of_buffers_by_turns(exports: Exports) -> None:
    session = Session(open_named(exports, "onnx"), 2)
    places = set()
    for segment in segments_of(session.runtime, 2, 9):
        session.step(*segment)
        places.add(session.memory.states[0].data_ptr())
    assert len(places) == 2


@pytest.mark.parametrize("name", NAMES)
def test_a_memory_of_another_kind_is_refused(exports: Exports, name: str) -> None:
    runtime = open_named(exports, name)
    ids = torch.zeros((2, TGT_LEN), dtype=torch.int64)
    hidden = empty_memory(runtime.info.config, "hidden", 2)
    with pytest.raises(ShapeRangeError, match="must be 4 tensors of shape"):
        runtime.step(ids, ids, hidden)


@pytest.mark.parametrize("name", NAMES)
def test_segments_of_another_length_name_the_export_command(exports: Exports, name: str) -> None:
    runtime = open_named(exports, name)
    ids = torch.zeros((2, TGT_LEN + 1), dtype=torch.int64)
    with pytest.raises(ShapeRangeError, match=rf"(?s)input_ids.*\[batch_size, {TGT_LEN}\].*--tgt-len {TGT_LEN + 1}") as caught:
        runtime.step(ids, ids, runtime.initial_memory(2))
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("name", NAMES)
def test_a_memory_of_another_batch_size_is_refused(exports: Exports, name: str) -> None:
    runtime = open_named(exports, name)
    ids = torch.zeros((2, TGT_LEN), dtype=torch.int64)
    with pytest.raises(ShapeRangeError, match="memory is of 3 streams"):
        runtime.step(ids, ids, runtime.initial_memory(3))


@pytest.mark.parametrize("name", NAMES)
def test_tensors_of_another_type_or_device_do_not_reach_native_code(exports: Exports, name: str) -> None:
    """The device meta holds nothing: whatever read there would end the process."""
    runtime = open_named(exports, name)
    ids, memory = torch.zeros((2, TGT_LEN), dtype=torch.int64), runtime.initial_memory(2)
    for other in (ids.int(), ids.float(), ids.to("meta")):
        with pytest.raises(ShapeRangeError, match=r"`input_ids` .* must be int64 on cpu"):
            runtime.step(other, ids, memory)
        with pytest.raises(ShapeRangeError, match=r"`target_ids` .* must be int64 on cpu"):
            runtime.step(ids, other, memory)
    for length in (memory.length_B.int(), memory.length_B.to("meta")):
        with pytest.raises(ShapeRangeError, match=r"`length` .* must be int64 on cpu"):
            runtime.step(ids, ids, Memory(memory.states, length))
    with pytest.raises(ShapeRangeError, match="memory is of 0 streams"):
        runtime.step(ids, ids, Memory(memory.states, torch.tensor(0)))
    for place in range(4):
        for change in (torch.Tensor.half, torch.Tensor.double, lambda state: state.to("meta")):
            states = [change(state) if i == place else state for i, state in enumerate(memory.states)]
            with pytest.raises(ShapeRangeError, match=r"must be of torch.float32 on cpu, but is of torch.\w+ on (cpu|meta) instead"):
                runtime.step(ids, ids, Memory(states, memory.length_B))


def test_a_cpu_may_have_a_number_and_a_gpu_is_one_of_several(exports: Exports) -> None:
    runtime = open_named(exports, "pytorch")
    ids = torch.zeros((1, TGT_LEN), dtype=torch.int64, device="cpu:0")
    memory = runtime.initial_memory(1)
    check_shapes(runtime.info, {"input_ids": ids}, memory)
    for device, called in (("cuda", "cuda:0"), ("cuda:1", "cuda:1")):
        with pytest.raises(ShapeRangeError, match=f"must be int64 on {called}, but is int64 on cpu"):
            check_shapes(dataclasses.replace(runtime.info, device=device), {"input_ids": ids}, memory)


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_factors_that_pytorch_rounds_on_a_gpu_are_read_back(monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    class Newer:
        fp32_precision = precision

        @property
        def allow_tf32(self) -> bool:
            raise RuntimeError("a mix of the legacy and new APIs")

    class Older:
        allow_tf32 = precision == "tf32"

    for settings in (Newer(), Older()):
        monkeypatch.setattr(torch.backends.cuda, "matmul", settings)
        assert torch_compute("fp32", "cuda:0") == {"ieee": "fp32", "tf32": "tf32"}[precision]
        assert (torch_compute("fp16", "cuda:0"), torch_compute("fp32", "cpu")) == ("fp16", "fp32")


def test_every_way_to_let_pytorch_round_is_seen() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert torch_compute("fp32", "cuda:0") == "tf32"
        torch.set_float32_matmul_precision("highest")
        assert torch_compute("fp32", "cuda:0") == "fp32"
        torch.backends.cuda.matmul.allow_tf32 = True
        assert torch_compute("fp32", "cuda:0") == "tf32"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("name", EXPORTED)
def test_a_changed_byte_is_found_before_anything_is_loaded(exports: Exports, name: str, tmp_path: Path) -> None:
    copy = tmp_path / name
    shutil.copytree(getattr(exports, name), copy)
    graph = next(copy.glob("model.*"))
    content = bytearray(graph.read_bytes())
    content[len(content) // 2] ^= 1
    graph.write_bytes(content)
    with pytest.raises(ManifestError, match="was changed"):
        open_artifact(copy)


@pytest.mark.parametrize("name", EXPORTED)
def test_a_truncated_graph_behind_a_matching_manifest_is_one_clear_error(exports: Exports, name: str, tmp_path: Path) -> None:
    from txl_deploy.manifest import read_manifest, write_manifest

    copy = tmp_path / name
    shutil.copytree(getattr(exports, name), copy)
    graph = next(copy.glob("model.*"))
    graph.write_bytes(graph.read_bytes()[:2000])
    manifest = read_manifest(copy)
    write_manifest(copy, manifest, manifest.files)
    with pytest.raises(ArtifactError, match=r"cannot (load|be read as ONNX)"):
        open_artifact(copy)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_asked_for_and_absent_is_an_unfit_environment(exports: Exports) -> None:
    with pytest.raises(EnvironmentUnfitError, match="--device cpu") as caught:
        resolve_device("cuda")
    assert caught.value.exit_code == 3
    with pytest.raises(EnvironmentUnfitError):
        open_artifact(exports.onnx, device="cuda")


# A script holds no device


@pytest.fixture(scope="module", params=["fp32", "fp16"])
def script(request: pytest.FixtureRequest, exports: Exports, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return `model.pt` of each type of weights."""
    if request.param == "fp32":
        return exports.torchscript / "model.pt"
    out = tmp_path_factory.mktemp("script") / "fp16"
    export_artifact(ExportRequest(checkpoint=exports.checkpoint, out=out, format="torchscript", dtype="fp16"))
    return out / "model.pt"


def load_script(path: Path, device: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.load(str(path), map_location=device)


def test_a_script_has_no_device_among_its_constants(script: Path) -> None:
    graph = load_script(script, "cpu").inlined_graph
    constants = [node for node in graph.findAllNodes("prim::Constant", True) if node.output().type().str() == "Device"]
    assert constants == []
    assert len(graph.findAllNodes("aten::arange", True)) == 2, "they take the device of a tensor"


def test_a_script_saved_on_the_cpu_runs_wholly_on_another_device(script: Path) -> None:
    """The meta device computes shapes alone, and refuses to mix with any other: a tensor made on the CPU would end the step."""
    module = load_script(script, "meta")
    dtype = module.embedding.projections.__getattr__("0").dtype
    ids = torch.zeros((2, TGT_LEN), dtype=torch.int64, device="meta")
    rows = [torch.zeros(1, dtype=torch.int64, device="meta") for _ in range(3)]
    memory = empty_memory(small_config(cutoffs=(5, 9, 16), div_val=2), "kv", 2, device="meta", dtype=dtype)
    nll, length, states = module(ids, ids, rows, memory.length_B, memory.states)
    assert {tensor.device.type for tensor in (nll, length, *states)} == {"meta"}
    assert (nll.dtype, {state.dtype for state in states}) == (torch.float32, {dtype})
