"""ONNX Runtime: what it really runs is read back, no provider is exchanged for another, and every kind of graph is bound in place."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from tests.deploy.conftest import TGT_LEN, Exports
from tests.support import small_config, write_checkpoint
from txl_deploy import claims
from txl_deploy.export.artifact import ExportRequest, export_artifact
from txl_deploy.manifest import read_manifest, write_manifest
from txl_deploy.parity.rollout import compare, random_segments
from txl_deploy.runtimes import onnxrt
from txl_deploy.runtimes.base import HeadError, RuntimeInfo, ShapeRangeError
from txl_deploy.runtimes.onnxrt import OnnxRuntime
from txl_deploy.runtimes.registry import eager_from_checkpoint, open_artifact
from txl_train.errors import ArtifactError, EnvironmentUnfitError, ValidationError

BATCH = 2


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return a checkpoint, and its graph in fp16 with logits for two streams: everything that an ordinary graph is not."""
    folder = tmp_path_factory.mktemp("generator")
    checkpoint = folder / "checkpoint.pt"
    write_checkpoint(checkpoint, small_config(n_layer=1, cutoffs=(5, 9), ext_len=2), tgt_len=TGT_LEN)
    request = ExportRequest(checkpoint=checkpoint, out=folder / "onnx", format="onnx", dtype="fp16", head="logits", batch_size=BATCH)
    export_artifact(request)
    return checkpoint, folder / "onnx"


def test_a_graph_of_fp16_with_logits_and_a_fixed_batch_runs_as_the_checkpoint(generator: tuple[Path, Path]) -> None:
    checkpoint, graph = generator
    runtime = open_artifact(graph)
    info = runtime.info
    assert (info.dtype, info.memory_dtype, info.head, info.min_batch, info.max_batch) == ("fp16", "fp16", "logits", BATCH, BATCH)
    memory = runtime.initial_memory(BATCH)
    scores, memory = runtime.next_token(torch.zeros((BATCH, 2 + TGT_LEN), dtype=torch.int64), memory)
    assert (scores.dtype, tuple(scores.shape)) == (torch.float32, (BATCH, 23))
    assert {state.dtype for state in memory.states} == {torch.float16}
    reference, _ = eager_from_checkpoint(checkpoint, head="logits")
    assert compare(reference, runtime, random_segments(info.config, tgt_len=TGT_LEN, batch_size=BATCH)).passed


def test_a_graph_refuses_what_it_was_not_made_for(generator: tuple[Path, Path]) -> None:
    runtime = open_artifact(generator[1])
    ids = torch.zeros((3, 2 + TGT_LEN), dtype=torch.int64)
    with pytest.raises(ShapeRangeError, match=r"must be 2 for"):
        runtime.next_token(ids, runtime.initial_memory(3))
    with pytest.raises(HeadError, match="--head nll"):
        runtime.step(ids[:2], ids[:2, 2:], runtime.initial_memory(2))


def test_fp16_on_a_cpu_is_computed_in_fp32_and_says_so(generator: tuple[Path, Path]) -> None:
    info = open_artifact(generator[1]).info
    assert (info.dtype, info.compute) == ("fp16", "fp32")
    assert set(info.readback["weights"]) == {"float16"}
    assert set(info.readback["products"]) == {"float32"}


def test_every_node_is_counted_on_its_provider_and_every_product_by_its_type(exports: Exports) -> None:
    info = open_artifact(exports.onnx).info
    assert set(info.readback["nodes"]) == {"CPUExecutionProvider"}
    assert info.readback["nodes"]["CPUExecutionProvider"] > 100
    assert set(info.readback["products"]) == {"float32"}
    assert info.readback["products"]["float32"] >= 2 * 6 + 4, "of two layers six products each, and one of each cluster"
    assert "elsewhere" not in info.readback


def test_a_graph_says_what_it_was_exported_for(exports: Exports) -> None:
    found = open_artifact(exports.onnx).info.readback["settings"]
    assert (found["tgt_len"], found["mem_len"], found["ext_len"], found["clamp_len"], found["same_length"]) == (TGT_LEN, 7, 0, None, False)
    assert (found["memory"], found["dtype"], found["memory_dtype"], found["head"]) == ("kv", "fp32", "fp32", "nll")
    assert {len(found["checkpoint_sha256"]), len(found["vocabulary_sha256"])} == {64}
    assert found.keys() == set(onnxrt._SETTINGS)


def test_what_a_graph_says_is_read_as_values_and_what_is_none_stays_a_text() -> None:
    assert onnxrt.settings_of({"txl.clamp_len": "7", "txl.same_length": "true", "tgt_len": "6", "txl.other": "x"}) == {
        "clamp_len": 7,
        "same_length": True,
    }
    assert onnxrt.settings_of({"txl.tgt_len": "-5", "txl.same_length": "True"}) == {"tgt_len": "-5", "same_length": "True"}


def test_a_graph_that_says_of_itself_what_is_no_text_is_refused(exports: Exports, tmp_path: Path) -> None:
    content = (exports.onnx / "model.onnx").read_bytes()
    sha256 = open_artifact(exports.onnx).info.readback["settings"]["checkpoint_sha256"].encode()
    (tmp_path / "model.onnx").write_bytes(content.replace(sha256, b"\xff" + sha256[1:]))
    with pytest.raises(ArtifactError, match="cannot load"):
        OnnxRuntime(tmp_path / "model.onnx", open_artifact(exports.onnx).info)


def test_a_graph_that_leaves_no_tokens_is_refused_and_does_not_end_the_process(exports: Exports, tmp_path: Path) -> None:
    """A fused normalisation of ONNX Runtime 1.32 divides by the number of tokens (SIGFPE); found by fuzzing."""
    import onnx
    from onnx import numpy_helper

    folder = Path(shutil.copytree(exports.onnx, tmp_path / "onnx"))
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    uses = {
        name: {(node.op_type, k) for node in model.graph.node for k, own in enumerate(node.input) if own == name}
        for name in (tensor.name for tensor in model.graph.initializer)
    }
    starts = [
        tensor
        for tensor in model.graph.initializer
        if uses[tensor.name] == {("Slice", 1)} and numpy_helper.to_array(tensor).tolist() == [TGT_LEN - 1]
    ]
    assert starts  # of the shift by distances
    for tensor in starts:
        tensor.CopyFrom(numpy_helper.from_array(np.array([2**40]), tensor.name))
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    manifest = read_manifest(folder)
    write_manifest(folder, manifest, list(manifest.files))
    code = (
        f"from txl_deploy.runtimes.registry import open_artifact; from pathlib import Path; open_artifact(Path({str(folder)!r}), threads=1)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "ArtifactError: ONNX Runtime cannot load" in done.stderr


def test_profiling_ends_before_the_first_real_step_and_leaves_no_file(
    exports: Exports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    runtime = open_artifact(exports.onnx)
    ids = torch.zeros((1, TGT_LEN), dtype=torch.int64)
    runtime.step(ids, ids, runtime.initial_memory(1))
    assert list(tmp_path.iterdir()) == []
    assert not runtime._session.get_session_options().enable_profiling, "one that was profiled loses 100 bytes with each later run"


def cuda_info(runtime: Any) -> RuntimeInfo:
    info: RuntimeInfo = runtime.info
    return RuntimeInfo(name="onnx", provider="onnx", device="cuda:0", dtype="fp32", memory="kv", tgt_len=TGT_LEN, config=info.config)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_session_that_falls_back_to_the_cpu_is_an_unfit_environment(exports: Exports, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    class Fallen(onnxruntime.InferenceSession):  # type: ignore[misc]
        """What onnxruntime-gpu does where CUDA's libraries are missing: it says nothing and takes the CPU."""

        def __init__(self, path: str, options: Any, providers: Any, **keywords: Any) -> None:
            asked.append((providers, keywords["enable_fallback"]))
            super().__init__(path, options, providers=["CPUExecutionProvider"])

    info = cuda_info(open_artifact(exports.onnx))
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "InferenceSession", Fallen)
    with pytest.raises(EnvironmentUnfitError, match="fell back to CPUExecutionProvider instead of CUDAExecutionProvider") as caught:
        OnnxRuntime(exports.onnx / "model.onnx", info)
    assert caught.value.exit_code == 3
    assert asked == [([("CUDAExecutionProvider", {"device_id": 0, "use_tf32": 0})], 0)]


def test_a_package_without_the_provider_names_the_one_that_has_it(exports: Exports) -> None:
    info = cuda_info(open_artifact(exports.onnx))
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has it")
    with pytest.raises(EnvironmentUnfitError, match=r"has no CUDAExecutionProvider.*\n.*txl\[onnx-gpu\]"):
        OnnxRuntime(exports.onnx / "model.onnx", info)


def event(op_name: str, provider: str, *outputs: dict[str, list[int]]) -> dict[str, Any]:
    """One node as onnxruntime's profile has it."""
    facts = {"op_name": op_name, "provider": provider, "output_type_shape": list(outputs), "input_type_shape": []}
    return {"cat": "Node", "name": f"node_{op_name}_kernel_time", "args": facts}


CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"


def test_arithmetic_on_shapes_may_run_elsewhere_and_nothing_else_may() -> None:
    events = [
        {"cat": "Session", "name": "model_run", "args": {}},
        event("MatMul", CUDA, {"float16": [2, 5, 8]}),
        event("Gemm", CUDA, {"float16": [10, 8]}),
        event("Shape", CPU, {"int64": [3]}),
        event("Concat", CPU, {"int64": [4]}),
        event("Mul", CPU, {"float": []}),
    ]
    found = onnxrt._read_back(events, CUDA)
    assert found == {"products": {"float16": 2}, "nodes": {CPU: 3, CUDA: 2}}
    found = onnxrt._read_back([*events, event("MatMul", CPU, {"float": [2, 8]}), event("Softmax", CPU, {"float": [2, 8]})], CUDA)
    assert found["elsewhere"] == {"MatMul": 1, "Softmax": 1}
    assert found["products"] == {"float16": 2, "float32": 1}


def test_a_session_that_says_cuda_and_computes_on_the_cpu_is_caught(exports: Exports, tmp_path: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(tmp_path / "profile")
    session = onnxruntime.InferenceSession(str(exports.onnx / "model.onnx"), options, providers=[CPU])
    kinds = {"tensor(int64)": torch.int64, "tensor(float)": torch.float32}
    feeds = {
        value.name: torch.zeros([1 if isinstance(axis, str) else axis for axis in value.shape], dtype=kinds[value.type]).numpy()
        for value in session.get_inputs()
    }
    session.run(None, feeds)
    found = onnxrt._read_back(json.loads(Path(session.end_profiling()).read_text()), CUDA)
    info = RuntimeInfo(
        name="onnx",
        provider=CUDA,
        device="cuda:0",
        dtype="fp32",
        compute="fp32",
        memory="kv",
        tgt_len=TGT_LEN,
        config=small_config(cutoffs=(5, 9, 16), div_val=2),
        readback=found,
    )
    with pytest.raises(ValidationError, match=r"no node runs on CUDAExecutionProvider.*MatMul.*Softmax"):
        claims.audit(info)
