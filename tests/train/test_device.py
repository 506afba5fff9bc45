"""Choosing a device: what the words in the settings stand for, and what is told where there is no GPU."""

from __future__ import annotations

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
