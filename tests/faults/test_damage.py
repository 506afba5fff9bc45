"""Damage at every class of offset of every file that is read back is refused, mended, or makes no difference."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from tests.faults.corrupt import DAMAGES
from tests.faults.readers import READERS, damaged
from tests.faults.scenarios import Sources, make_sources

FROM_EXPORTS = {"onnx", "onnx with external data", "torchscript", "receipt"}


def check(name: str, sources: Sources, folder: Path) -> list[str]:
    outcomes = dict(damaged(READERS[name], sources, folder / "damage"))
    unseen = [place for place, outcome in outcomes.items() if outcome == "read"]
    assert not unseen
    assert len(outcomes) >= len(DAMAGES) - 1
    return list(outcomes.values())


@pytest.mark.parametrize("name", ["checkpoint", "token cache", "prepared folder", "kernel cache"])
def test_damage_of_what_is_written_in_training_is_found_or_mended(name: str, base_sources: Sources, tmp_path: Path) -> None:
    outcomes = check(name, base_sources, tmp_path)
    if name.endswith("cache"):
        assert set(outcomes) <= {"the same", "absent"}, "a damaged cache is as good as none"


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(FROM_EXPORTS))
def test_damage_of_an_artifact_or_its_receipt_is_refused(name: str, sources: Sources, tmp_path: Path) -> None:
    outcomes = check(name, sources, tmp_path)
    assert len([outcome for outcome in outcomes if outcome.endswith("Error")]) > 0.9 * len(outcomes)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="needs tensorrt_rtx")
def test_damage_of_an_engine_is_refused(tmp_path: Path) -> None:
    outcomes = check("engine", make_sources(tmp_path / "sources", engine=True), tmp_path)
    assert len([outcome for outcome in outcomes if outcome == "ManifestError"]) > 0.9 * len(outcomes)
