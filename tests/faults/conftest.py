"""What the disturbed commands read, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.scenarios import Sources, make_sources


@pytest.fixture(scope="session")
def base_sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    """Return a text, an archive and checkpoints, without exports."""
    return make_sources(tmp_path_factory.mktemp("faults"), formats=())


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    """Return the same with exports and a receipt."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TXL_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        return make_sources(tmp_path_factory.mktemp("faults"))


@pytest.fixture(autouse=True)
def _cache_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep token caches out of the home folder."""
    monkeypatch.setenv("TXL_CACHE_DIR", str(tmp_path / "cache"))
