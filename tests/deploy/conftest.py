"""A small checkpoint with its corpus and its exports, made once: exporting takes seconds."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support import small_config, write_checkpoint, write_corpus
from txl_deploy.export.artifact import ExportRequest, export_artifact

TGT_LEN = 5


@dataclass(frozen=True)
class Exports:
    """Paths of a checkpoint and of what was exported from it. Tests that change something copy it first."""

    checkpoint: Path
    data: Path
    onnx: Path
    torchscript: Path


@pytest.fixture(scope="session")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Exports:
    """Return an adaptive model with K/V memory, exported to ONNX and TorchScript."""
    folder = tmp_path_factory.mktemp("exports")
    config = small_config(cutoffs=(5, 9, 16), div_val=2)
    data = write_corpus(folder / "data", config.vocab_size)
    checkpoint = folder / "checkpoint_best.pt"
    write_checkpoint(checkpoint, config, data=data, tgt_len=TGT_LEN)
    for format_name in ("onnx", "torchscript"):
        export_artifact(ExportRequest(checkpoint=checkpoint, out=folder / format_name, format=format_name))
    return Exports(checkpoint, data, folder / "onnx", folder / "torchscript")


@pytest.fixture(scope="session")
def proved(exports: Exports, tmp_path_factory: pytest.TempPathFactory) -> Exports:
    """Return a copy of the same with a receipt for the test split in each export; the checkpoint lies beside them."""
    from txl_deploy.cli.main import main

    folder = tmp_path_factory.mktemp("proved")
    checkpoint = Path(shutil.copy(exports.checkpoint, folder))
    copies = [Path(shutil.copytree(source, folder / source.name)) for source in (exports.onnx, exports.torchscript)]
    for copy in copies:
        (copy / "receipt.json").unlink(missing_ok=True)
        assert main(["eval", "--artifact", str(copy), "--batch-size", "2", "-qq"]) == 0
    return Exports(checkpoint, exports.data, *copies)


@pytest.fixture(scope="session")
def fp16_onnx(exports: Exports, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the same checkpoint as an ONNX graph in fp16."""
    out = tmp_path_factory.mktemp("fp16") / "onnx"
    export_artifact(ExportRequest(checkpoint=exports.checkpoint, out=out, format="onnx", dtype="fp16", data=exports.data))
    return out


@pytest.fixture(scope="session")
def logits_onnx(exports: Exports, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the same checkpoint as an ONNX graph in fp32 that scores the next token, with a memory of hidden states."""
    out = tmp_path_factory.mktemp("logits") / "onnx"
    export_artifact(ExportRequest(checkpoint=exports.checkpoint, out=out, format="onnx", head="logits", memory="hidden"))
    return out


@pytest.fixture(scope="session")
def t4_engine(fp16_onnx: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an engine of TensorRT-RTX for a T4, which is built without a GPU; skip where that is not installed."""
    pytest.importorskip("tensorrt_rtx")
    from txl_deploy.trt.artifact import EngineRequest, export_engine
    from txl_deploy.trt.profiles import parse_batch_range

    out = tmp_path_factory.mktemp("t4") / "engine"
    export_engine(EngineRequest(graph=fp16_onnx, checkpoint=None, out=out, batch=parse_batch_range("1,8,32"), target="t4", rtx_only=True))
    return out


@pytest.fixture(autouse=True)
def _cache_of_its_own(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep token caches out of the home folder."""
    monkeypatch.setenv("TXL_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "cache"))
