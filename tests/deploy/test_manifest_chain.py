"""The chain from an engine over its graph to the checkpoint, and manifests that older versions wrote."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from tests.deploy.test_manifest import MANIFEST
from txl_deploy.cli.main import main
from txl_deploy.manifest import (
    FILE_NAME,
    PARENT_FILE,
    SCHEMA_VERSION,
    BatchRange,
    EngineFacts,
    Manifest,
    Parent,
    ProfileRecord,
    read_manifest,
    read_parent,
    read_verified,
    verify,
    write_manifest,
)
from txl_train.errors import ManifestError
from txl_train.files import file_sha256

GOLDEN = Path(__file__).resolve().parents[1] / "golden"

ENGINE = EngineFacts(
    builder="tensorrt_rtx",
    builder_version="1.7.1.116",
    target="t4",
    compute_capability="7.5",
    profiles=[ProfileRecord(name="input_ids", min=[1, 8], opt=[8, 8], max=[32, 8])],
)


def write_graph(folder: Path, manifest: Manifest = MANIFEST) -> Path:
    folder.mkdir()
    (folder / "model.onnx").write_bytes(b"graph")
    write_manifest(folder, manifest, ["model.onnx"])
    return folder


def write_engine(folder: Path, graph: Path, **changes: object) -> Path:
    folder.mkdir()
    (folder / "model.plan").write_bytes(b"plan")
    shutil.copy(graph / FILE_NAME, folder / PARENT_FILE)
    parent = Parent(manifest_sha256=file_sha256(graph / FILE_NAME), format="onnx")
    source = dataclasses.replace(MANIFEST.source, parent=parent)
    manifest = dataclasses.replace(
        MANIFEST, format="trt-rtx", source=source, engine=ENGINE, batch=BatchRange(min=1, opt=8, max=32), audit={"points": {"q": 1.5}}
    )
    write_manifest(folder, dataclasses.replace(manifest, **changes), ["model.plan", PARENT_FILE])  # type: ignore[arg-type]
    return folder


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    """A graph's folder."""
    return write_graph(tmp_path / "graph")


@pytest.fixture
def engine(tmp_path: Path, graph: Path) -> Path:
    """The folder of an engine that was built from `graph`."""
    return write_engine(tmp_path / "engine", graph)


def test_an_engine_carries_the_manifest_of_its_graph(engine: Path, graph: Path) -> None:
    assert verify(engine, parent=graph) == []
    assert read_parent(engine) == read_manifest(graph)
    assert read_verified(engine).engine == ENGINE


def test_the_whole_chain_is_shown(engine: Path, graph: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(engine), "--parent", str(graph)]) == 0
    shown = capsys.readouterr().out
    assert f"ok       built from onnx graph, manifest sha256 {file_sha256(graph / FILE_NAME)}" in shown
    assert "made from checkpoint_best.pt" in shown
    assert main(["inspect", str(engine)]) == 0
    shown = capsys.readouterr().out
    assert "compute_capability      7.5" in shown
    assert "input_ids  min [1, 8]  opt [8, 8]  max [32, 8]" in shown


def test_another_graph_is_recognised(engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = write_graph(tmp_path / "other", dataclasses.replace(MANIFEST, command="txl export --format onnx --overwrite"))
    assert [finding.problem for finding in verify(engine, parent=other)] == ["other parent"]
    assert main(["verify", str(engine), "--parent", str(other)]) == 4
    assert "is intact, but was not built from" in capsys.readouterr().err


def test_a_changed_graph_breaks_the_chain(engine: Path, graph: Path) -> None:
    (graph / "model.onnx").write_bytes(b"grape")
    (finding,) = verify(engine, parent=graph)
    assert finding.file == f"{graph}/model.onnx"


def test_a_graph_is_not_built_from_another_one(graph: Path) -> None:
    (finding,) = verify(graph, parent=graph)
    assert "was made from the checkpoint itself" in finding.message


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"vocabulary_sha256": "c" * 64}, "vocabulary"),
        ({"model": {"n_layer": 3}}, "model"),
        ({"settings": dataclasses.replace(MANIFEST.settings, mem_len=17)}, "settings"),
    ],
)
def test_an_engine_whose_manifest_disagrees_with_its_graph_s_is_refused(
    tmp_path: Path, graph: Path, change: dict[str, object], named: str
) -> None:
    engine = write_engine(tmp_path / "forged", graph, **change)
    with pytest.raises(ManifestError, match=f"names another {named}"):
        read_verified(engine)


def test_a_swapped_manifest_of_the_graph_is_refused(tmp_path: Path, graph: Path) -> None:
    source = dataclasses.replace(MANIFEST.source, parent=Parent(manifest_sha256="d" * 64, format="onnx"))
    engine = write_engine(tmp_path / "forged", graph, source=source)
    with pytest.raises(ManifestError, match=r"parent\.json is not the manifest of the graph"):
        read_verified(engine)


def test_a_graph_s_manifest_that_is_not_listed_is_missed(tmp_path: Path, graph: Path) -> None:
    engine = write_engine(tmp_path / "forged", graph)
    write_manifest(engine, dataclasses.replace(read_manifest(engine), files={}), ["model.plan"])
    with pytest.raises(ManifestError, match=r"parent\.json is not among the files"):
        read_verified(engine)


@pytest.mark.parametrize("changes", [{"format": "onnx"}, {"engine": None}])
def test_only_engines_have_facts_of_an_engine(tmp_path: Path, graph: Path, changes: dict[str, object]) -> None:
    with pytest.raises(ManifestError, match="`engine` must be there for engines and for nothing else"):
        write_engine(tmp_path / "engine", graph, **changes)


def test_an_engine_without_its_graph_is_none(tmp_path: Path, graph: Path) -> None:
    with pytest.raises(ManifestError, match=r"`source\.parent` must be there for engines"):
        write_engine(tmp_path / "engine", graph, source=MANIFEST.source)


def test_an_engine_without_a_largest_batch_is_none(tmp_path: Path, graph: Path) -> None:
    with pytest.raises(ManifestError, match="must have a largest batch"):
        write_engine(tmp_path / "engine", graph, batch=BatchRange(min=1))


def test_an_artifact_without_its_model_is_missed(tmp_path: Path) -> None:
    (tmp_path / "vocabulary.json").write_text("{}")
    write_manifest(tmp_path, MANIFEST, ["vocabulary.json"])
    (finding,) = verify(tmp_path)
    assert finding.message == "lists no model.onnx, so there is no model"


def test_a_manifest_of_the_first_schema_is_read_as_what_it_meant(tmp_path: Path) -> None:
    shutil.copy(GOLDEN / "manifest_schema_1.json", tmp_path / FILE_NAME)
    (tmp_path / "model.onnx").write_bytes(b"graph")
    manifest = read_verified(tmp_path)
    assert dataclasses.replace(manifest, files={}) == MANIFEST
    assert (manifest.schema_version, manifest.settings.head, manifest.settings.memory_dtype) == (SCHEMA_VERSION, "nll", "fp32")


def test_an_older_manifest_is_not_trusted_further_than_its_checksum(tmp_path: Path) -> None:
    document = json.loads((GOLDEN / "manifest_schema_1.json").read_text())
    document["settings"]["mem_len"] = 17
    (tmp_path / FILE_NAME).write_text(json.dumps(document))
    with pytest.raises(ManifestError, match="was changed after it was written"):
        read_manifest(tmp_path)
