"""Graphs in the form for servers: every tensor begins with the axis of streams, and the numbers are those of the original."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from tests.deploy.conftest import TGT_LEN, Exports
from tests.support import random_ids, small_config, write_checkpoint
from txl_deploy.cli.main import main
from txl_deploy.export.artifact import ExportRequest, export_artifact
from txl_deploy.export.served import export_served
from txl_deploy.manifest import read_manifest, verify
from txl_deploy.runtimes.registry import open_artifact
from txl_train.errors import EnvironmentUnfitError, UsageError

STATES = [f"{i}.{part}" for i in range(2) for part in ("key", "value")]


@pytest.fixture(scope="module")
def served(exports: Exports, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("served") / "onnx"
    export_served(exports.onnx, out)
    return out


def axes_of(values) -> dict[str, list[int | str]]:
    return {value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in values}


def test_every_tensor_begins_with_the_streams_and_has_another_axis(served):
    graph = onnx.load(str(served / "model.onnx")).graph
    state = ["batch_size", 2, 7, 3]
    assert axes_of(graph.input) == {
        "input_ids": ["batch_size", TGT_LEN],
        "target_ids": ["batch_size", TGT_LEN],
        "memory_length": ["batch_size", 1],
        **{f"past_key_values.{name}": state for name in STATES},
    }
    assert axes_of(graph.output) == {
        "nll": ["batch_size", TGT_LEN],
        "new_memory_length": ["batch_size", 1],
        **{f"present.{name}": state for name in STATES},
    }


@pytest.mark.parametrize("streams", [1, 3])
def test_it_computes_what_the_graph_it_was_made_of_does(served, exports, streams):
    """Targets in every cluster, in none but the shortlist, and all in one; streams that are cold and such that are full."""
    before, after = open_artifact(exports.onnx), open_artifact(served)
    memories = [runtime.initial_memory(streams) for runtime in (before, after)]
    config = before.info.config
    for turn, targets in enumerate(
        [
            random_ids(config, streams, TGT_LEN, seed=1),
            np.full((streams, TGT_LEN), 2),
            np.full((streams, TGT_LEN), config.vocab_size - 1),
            random_ids(config, streams, TGT_LEN, seed=4),
        ]
    ):
        ids = torch.from_numpy(random_ids(config, streams, TGT_LEN, seed=10 + turn))
        found = [runtime.step(ids, torch.from_numpy(targets), memory) for runtime, memory in zip((before, after), memories)]
        np.testing.assert_array_equal(found[1].nll_BT, found[0].nll_BT)
        memories = [output.memory for output in found]
        np.testing.assert_array_equal(memories[1].length_B, memories[0].length_B)
        for one, other in zip(memories[1].states, memories[0].states):
            np.testing.assert_array_equal(one, other)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "asked"),
    [
        ({"cutoffs": (5, 9), "untie_biases": True}, {"memory": "hidden"}),
        ({"cutoffs": (5, 9, 16), "div_val": 2}, {"head": "logits", "tgt_len": 1}),
        ({"cutoffs": (5, 9, 16), "div_val": 2}, {"dtype": "fp16"}),
        ({"cutoffs": (5, 9, 16)}, {"batch_size": 2}),
    ],
)
def test_every_kind_of_graph_has_that_form(tmp_path, changes, asked):
    checkpoint = tmp_path / "checkpoint.pt"
    write_checkpoint(checkpoint, small_config(**changes), tgt_len=4)
    export_artifact(ExportRequest(checkpoint=checkpoint, out=tmp_path / "onnx", format="onnx", **asked))
    made = export_served(tmp_path / "onnx", tmp_path / "served")
    assert made.parity is not None
    assert made.parity.passed
    assert made.parity.max_abs_delta_nll <= 1e-6
    assert made.manifest.served


def test_it_is_an_artifact_whose_chain_holds(served, exports, tmp_path):
    assert verify(served, checkpoint=exports.checkpoint, parent=exports.onnx) == []
    manifest = read_manifest(served)
    assert manifest.source.parent is not None
    assert manifest.settings == read_manifest(exports.onnx).settings
    copy = tmp_path / "copy"
    shutil.copytree(served, copy)
    (copy / "parent.json").write_bytes((copy / "parent.json").read_bytes() + b" ")
    assert [finding.file for finding in verify(copy)] == ["parent.json"]


def test_a_receipt_and_parity_prove_the_very_graph_that_is_served(served, exports, tmp_path, capsys):
    folder = tmp_path / "proved"
    folder.mkdir()
    copy = shutil.copytree(served, folder / "served")
    shutil.copy(exports.checkpoint, folder)
    assert main(["eval", "--artifact", str(copy), "--batch-size", "2", "-qq"]) == 0
    assert (copy / "receipt.json").exists()
    assert main(["parity", "--artifact", str(copy), "--checkpoint", str(exports.checkpoint), "--bisect", "-qq"]) == 0
    capsys.readouterr()


def test_the_same_graph_gives_the_same_bytes(served, exports, tmp_path):
    export_served(exports.onnx, tmp_path / "again")
    assert (tmp_path / "again" / "model.onnx").read_bytes() == (served / "model.onnx").read_bytes()


def test_the_command_writes_it(exports, tmp_path, capsys):
    arguments = ["export", "--format", "onnx", "--artifact", str(exports.onnx), "--for-triton", "--out", str(tmp_path / "out"), "--json"]
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["checked"] is True
    assert read_manifest(tmp_path / "out").served


def test_what_has_no_such_form_is_refused(served, exports, tmp_path):
    with pytest.raises(UsageError, match="has the form for servers already"):
        export_served(served, tmp_path / "out")
    with pytest.raises(UsageError, match="holds torchscript"):
        export_served(exports.torchscript, tmp_path / "out")
    checkpoint = tmp_path / "checkpoint.pt"
    write_checkpoint(checkpoint, small_config(ext_len=2), tgt_len=4)
    export_artifact(ExportRequest(checkpoint=checkpoint, out=tmp_path / "ext", format="onnx"))
    with pytest.raises(UsageError, match="--ext-len 0"):
        export_served(tmp_path / "ext", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tensorrt_rtx_builds_next_token_graphs_for_servers_and_refuses_what_it_has_no_operator_for(served, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    from txl_deploy.trt.artifact import EngineRequest, export_engine
    from txl_deploy.trt.profiles import parse_batch_range

    def build(graph: Path, out: Path, target: str = "a100"):
        batch = parse_batch_range("1,2,4")
        return export_engine(EngineRequest(graph=graph, checkpoint=None, out=out, batch=batch, target=target, rtx_only=True))

    with pytest.raises(EnvironmentUnfitError, match="has no NonZero"):
        build(served, tmp_path / "engine")
    checkpoint = tmp_path / "checkpoint.pt"
    write_checkpoint(checkpoint, small_config(cutoffs=(5, 9)), tgt_len=4)
    export_artifact(ExportRequest(checkpoint=checkpoint, out=tmp_path / "onnx", format="onnx", head="logits", tgt_len=1))
    export_served(tmp_path / "onnx", tmp_path / "served")
    built = build(tmp_path / "served", tmp_path / "engine")
    assert built.manifest is not None
    assert built.manifest.served
    assert {profile.name: profile.max for profile in built.manifest.engine.profiles}["memory_length"] == [4, 1]
