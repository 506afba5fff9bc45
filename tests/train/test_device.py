"""Choosing a device: what the words in the settings stand for, and what is told where there is no GPU."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from txl_train.device import resolve_device
from txl_train.errors import EnvironmentUnfitError


def test_auto_and_cuda_are_the_first_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    assert [resolve_device(name) for name in ("auto", "cuda", "cpu")] == ["cuda:0", "cuda:0", "cpu"]


def test_a_gpu_that_is_absent_is_refused_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    assert [resolve_device(name) for name in ("auto", "cpu")] == ["cpu", "cpu"]
    with pytest.raises(EnvironmentUnfitError, match="A GPU was asked for") as error:
        resolve_device("cuda")
    assert "--device cpu" in str(error.value)


def test_a_gpu_on_which_kernels_cannot_be_compiled_is_told_once_and_done_without(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import torch.utils._triton

    from txl_train.gpu_kernels import can_run_kernels

    monkeypatch.setattr(torch.utils._triton, "has_triton", lambda: True)
    nowhere = torch.device("cuda", 63)
    can_run_kernels.cache_clear()
    with caplog.at_level("WARNING"):
        assert [can_run_kernels(nowhere), can_run_kernels(nowhere)] == [False, False]
    assert [record.levelname for record in caplog.records if "kernels cannot be used on cuda:63" in record.getMessage()] == ["WARNING"]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_the_kernel_that_is_tried_works_in_the_interpreter() -> None:
    from txl_train.trial_kernel import one

    assert one(torch.device("cuda" if torch.cuda.is_available() else "cpu")) == 1
