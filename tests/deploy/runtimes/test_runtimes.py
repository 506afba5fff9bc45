"""Every runtime keeps the promises of the protocol, and computes what eager PyTorch computes."""

from __future__ import annotations

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
from txl_deploy.runtimes.base import Runtime, ShapeRangeError
from txl_deploy.runtimes.registry import eager_from_checkpoint, open_artifact, resolve_device
from txl_deploy.session import Session
from txl_train.errors import ArtifactError, EnvironmentUnfitError, ManifestError
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
    with pytest.raises(ArtifactError, match="cannot load"):
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
