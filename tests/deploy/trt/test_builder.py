"""From an exported graph to an engine: what is refused before a build, and what the engine is bound to."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.deploy.trt.fake_tensorrt import PLAN, T4, V100, Fake, Tensor, installed
from tests.deploy.trt.graphs import WIDTH, manifest, write_artifact
from tests.support import build_model, small_config
from txl_deploy.export.onnx import export_onnx
from txl_deploy.manifest import BatchRange, EngineFacts, ProfileRecord
from txl_deploy.signature import step_signature
from txl_deploy.trt import api, cuda
from txl_deploy.trt.builder import EngineSpec, build_engine, check_build
from txl_deploy.trt.profiles import DEFAULT_BATCH, Profile, check_profiles, profiles_for
from txl_train.errors import EnvironmentUnfitError, ManifestError, TxlError, UsageError
from txl_train.model.inference import InferenceStep

RTX_T4 = EngineSpec(package="tensorrt_rtx", batch=DEFAULT_BATCH, compute_capability="7.5")


def fake_of(release: str, **changes: Any) -> Fake:
    """Return a pretended TensorRT that finds in a graph what tests.deploy.trt.graphs writes."""
    return Fake(release, inputs=[Tensor("x", "HALF", (-1, WIDTH)), Tensor("mems.0", "HALF", (-1, WIDTH))], **changes)


@pytest.fixture
def nothing_native(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make it a failure to look for a package at all."""

    def find(package: str) -> None:
        raise AssertionError(f"{package} was looked for")

    monkeypatch.setattr("txl_deploy.trt.builder.find", find)


def test_an_engine_is_bound_to_the_gpu_it_was_built_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with installed(fake_of("10.4"), monkeypatch, V100):
        engine = build_engine(write_artifact(tmp_path / "graph"), EngineSpec(package="tensorrt", batch=DEFAULT_BATCH))
    shapes = {"min": [1, WIDTH], "opt": [8, WIDTH], "max": [32, WIDTH]}
    assert engine.built.plan == PLAN
    assert engine.facts("v100") == EngineFacts(
        builder="tensorrt",
        builder_version="10.4.0",
        target="v100",
        compute_capability="7.0",
        hardware_compatibility="none",
        gpu="Tesla V100",
        driver="570.86.15",
        profiles=[ProfileRecord(name="x", **shapes), ProfileRecord(name="mems.0", **shapes)],
    )


def test_an_engine_for_a_named_gpu_is_built_without_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with installed(fake_of("rtx-1.7"), monkeypatch):
        facts = build_engine(write_artifact(tmp_path / "graph"), RTX_T4).facts("t4")
    assert (facts.builder, facts.builder_version, facts.compute_capability) == ("tensorrt_rtx", "1.7.1.116", "7.5")
    assert (facts.gpu, facts.driver, facts.hardware_compatibility) == (None, None, "none")


def test_an_engine_for_no_gpu_in_particular_is_portable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with installed(fake_of("rtx-1.7"), monkeypatch, T4):
        spec = EngineSpec(package="tensorrt_rtx", batch=DEFAULT_BATCH)
        facts = build_engine(write_artifact(tmp_path / "graph"), spec).facts("rtx")
    assert (facts.compute_capability, facts.hardware_compatibility) == (None, "portable")


def refused(spec: EngineSpec, **changes: Any) -> TxlError:
    """Return the error of a build that is refused from its manifest."""
    with pytest.raises(TxlError) as caught:
        check_build(manifest(**changes), spec)
    return caught.value


@pytest.mark.usefixtures("nothing_native")
def test_a_graph_in_fp32_is_refused_for_a_t4_under_tensorrt_rtx() -> None:
    error = refused(RTX_T4, dtype="float32")
    assert isinstance(error, EnvironmentUnfitError)
    assert error.exit_code == 3
    assert "TensorRT-RTX has no matrix products of fp32 for compute capability 7.5" in str(error)
    assert "--dtype fp16" in str(error)


def test_a_graph_in_fp32_is_taken_for_later_gpus_and_by_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    with installed(fake_of("rtx-1.7"), monkeypatch):
        check_build(manifest(dtype="float32"), dataclasses.replace(RTX_T4, compute_capability="8.9"))
    with installed(fake_of("11.4"), monkeypatch, T4):
        check_build(manifest(dtype="float32"), dataclasses.replace(RTX_T4, package="tensorrt"))


@pytest.mark.usefixtures("nothing_native")
def test_ranges_that_differ_between_inputs_are_refused() -> None:
    profiles = [
        Profile(name="x", min=(1, WIDTH), opt=(8, WIDTH), max=(32, WIDTH)),
        Profile(name="mems.0", min=(1, WIDTH), opt=(8, WIDTH), max=(16, WIDTH)),
    ]
    error = refused(dataclasses.replace(RTX_T4, profiles=profiles))
    assert isinstance(error, UsageError)
    assert error.exit_code == 2
    assert "`mems.0` has another range of batch_size than `x`" in str(error)


@pytest.mark.usefixtures("nothing_native")
def test_a_graph_for_a_fixed_number_of_streams_is_refused_for_others() -> None:
    assert "takes 4 streams" in str(refused(RTX_T4, batch=4))
    assert "no end" in str(refused(dataclasses.replace(RTX_T4, batch=BatchRange())))


@pytest.mark.usefixtures("nothing_native")
def test_only_onnx_becomes_an_engine() -> None:
    assert refused(RTX_T4, format="torchscript").exit_code == 2


@pytest.mark.usefixtures("nothing_native")
def test_a_changed_graph_is_refused(tmp_path: Path) -> None:
    folder = write_artifact(tmp_path / "graph")
    path = folder / "model.onnx"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(ManifestError, match="changed") as caught:
        build_engine(folder, RTX_T4)
    assert caught.value.exit_code == 4


def test_no_gpu_where_one_is_needed_is_refused_before_the_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = fake_of("11.4")
    with installed(fake, monkeypatch), pytest.raises(EnvironmentUnfitError, match="this machine has none"):
        build_engine(write_artifact(tmp_path / "graph"), EngineSpec(package="tensorrt", batch=DEFAULT_BATCH))
    assert fake.called("Builder") == []


def test_a_real_engine_of_a_small_graph(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs tensorrt_rtx")
    engine = build_engine(write_artifact(tmp_path / "graph", batch=4), dataclasses.replace(RTX_T4, batch=BatchRange(min=4, opt=4, max=4)))
    assert engine.built.plan
    assert engine.profiles[0] == Profile(name="x", min=(4, WIDTH), opt=(4, WIDTH), max=(4, WIDTH))


@pytest.mark.slow
def test_a_transformer_xl_in_fp16_becomes_an_engine_for_a_t4_and_for_a_4090(tmp_path: Path) -> None:
    """The weights and the products are fp16 in the network that the builder sees; norms and log-sum-exp are fp32."""
    pytest.importorskip("tensorrt_rtx", reason="needs tensorrt_rtx")
    config = small_config(cutoffs=(5, 9, 16), div_val=2, d_head=4)
    export_onnx(InferenceStep(build_model(config), 5, "kv", dtype=torch.float16, memory_dtype=torch.float16), tmp_path, {})
    signature = step_signature(config, tgt_len=5, memory="kv", memory_dtype="fp16")
    profiles = profiles_for(signature, DEFAULT_BATCH, 5)
    check_profiles(signature, profiles)
    for compute_capability in ("7.5", "8.9"):
        spec = api.BuildSpec(onnx=tmp_path / "model.onnx", profiles=profiles, compute_capability=compute_capability)
        built = api.find("tensorrt_rtx").build(spec)
        assert len(built.plan) > 100_000
        assert built.log == []
        assert set(built.precisions.products) == {"float16"}
        assert built.precisions.layers["float32"] > 0
        assert built.precisions.weights["float16"] > 10 * built.precisions.weights["float32"]
    if not cuda.devices():
        with pytest.raises(EnvironmentUnfitError):
            api.find("tensorrt_rtx").open_engine(built.plan)
