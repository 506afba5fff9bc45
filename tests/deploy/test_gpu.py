"""What only a GPU can show: every runtime on it computes what eager PyTorch computes on the CPU."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from tests.deploy.conftest import TGT_LEN, Exports
from tests.support import small_config
from txl_deploy.parity.rollout import compare, random_segments
from txl_deploy.runtimes.registry import eager_from_checkpoint, open_artifact

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

CONFIG = small_config(cutoffs=(5, 9, 16), div_val=2)


def test_eager_on_the_gpu_equals_the_cpu(exports: Exports) -> None:
    reference, _ = eager_from_checkpoint(exports.checkpoint, device="cpu")
    candidate, _ = eager_from_checkpoint(exports.checkpoint, device="cuda")
    assert candidate.info.device == "cuda:0"
    assert compare(reference, candidate, random_segments(CONFIG, tgt_len=TGT_LEN)).passed


@pytest.mark.parametrize("name", ["torchscript", "onnx"])
def test_an_artifact_exported_on_a_cpu_runs_on_the_gpu(exports: Exports, name: str) -> None:
    if name == "onnx" and (importlib.util.find_spec("onnxruntime") is None or not _has_cuda_provider()):
        pytest.skip("needs onnxruntime-gpu")
    reference, _ = eager_from_checkpoint(exports.checkpoint, device="cpu")
    candidate = open_artifact(getattr(exports, name), device="cuda")
    assert compare(reference, candidate, random_segments(CONFIG, tgt_len=TGT_LEN)).passed


def _has_cuda_provider() -> bool:
    import onnxruntime

    return "CUDAExecutionProvider" in onnxruntime.get_available_providers()
