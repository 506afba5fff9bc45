"""Every name that the adapter uses exists in the real TensorRT 10.4, 10.16, 11.4 and TensorRT-RTX 1.7, with the parameters it passes."""

from __future__ import annotations

import ast
import dataclasses
import importlib.metadata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.trt import record_api
from tests.deploy.trt.fake_tensorrt import PLAN, RELEASES, T4, Fake, installed
from txl_deploy.trt import api, listening
from txl_deploy.trt.profiles import Profile

SPEC = api.BuildSpec(
    onnx=Path("model.onnx"),
    profiles=[Profile(name="x", min=(1, 4), opt=(8, 4), max=(32, 4))],
    compute_capability="7.5",
    optimization_level=3,
    workspace_bytes=1 << 30,
)
"""Every choice made once."""

USED_UNDER = {"Api": RELEASES, "RtxApi": ("rtx-1.7",)}
"""Releases whose names the methods of a class may use; everything else in the file is for all of them."""


def names_used() -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield each `trt.X.Y` in the adapter as X.Y, with the releases it is used under."""
    for part in (part for module in (api, listening) for part in ast.parse(Path(module.__file__).read_text(encoding="utf-8")).body):
        releases = USED_UNDER.get(part.name, RELEASES) if isinstance(part, ast.ClassDef) else RELEASES
        inner = {id(node.value) for node in ast.walk(part) if isinstance(node, ast.Attribute)}
        for node in ast.walk(part):
            if isinstance(node, ast.Attribute) and id(node) not in inner:
                names = ast.unparse(node).split(".")
                for start in (["trt"], ["self", "_trt"]):
                    if names[: len(start)] == start and len(names) > len(start):
                        yield ".".join(names[len(start) :]), releases


def exists(record: dict[str, Any], name: str) -> bool:
    """Whether a recorded module has the dotted name."""
    classes = record["classes"]
    outer, *rest = name.split(".")
    for known in (".".join([outer, *rest[:1]]), outer):
        if known in classes:
            rest = name.split(".")[len(known.split(".")) :]
            content = classes[known]
            if not rest or rest[0] in ("__members__", "__init__"):
                return True
            return (
                rest[0] in content.get("members", {}) or rest[0] in content.get("methods", {}) or rest[0] in content.get("properties", {})
            )
    return False


def run_everything(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> api.Built:
    """Build an engine, open it, look at all of it and run a step."""
    with installed(fake, monkeypatch, T4) as adapter:
        for hardware in ("none", "ampere_plus") if fake.package == "tensorrt" else ("none", "portable"):
            built = adapter.build(dataclasses.replace(SPEC, hardware_compatibility=hardware))
        engine = adapter.open_engine(built.plan, b"kernels")
        assert [(tensor.name, tensor.mode, tensor.dtype) for tensor in engine.tensors()] == [
            ("x", "input", "float16"),
            ("y", "output", "float16"),
        ]
        assert engine.profile_shapes("x") == Profile(name="x", min=(1, 4), opt=(8, 4), max=(32, 4))
        assert engine.inspect() == fake.information
        assert engine.device_memory_bytes == 1 << 20
        context = engine.context(256, 1 << 20)
        context.set_shape("x", (3, 4))
        assert context.infer_missing() == []
        context.set_address("x", 4096)
        context.set_address("y", 8192)
        assert context.is_capturable(7)
        context.enqueue(7)
        assert engine.runtime_cache() == (None if fake.package == "tensorrt" else b"kernels")
    return built


@pytest.mark.parametrize("release", RELEASES)
def test_an_engine_is_built_opened_and_run_with_the_names_of(release: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake(release)
    built = run_everything(fake, monkeypatch)
    assert built.plan == PLAN
    assert fake.called("IOptimizationProfile.set_shape")[-1] == ("x", (1, 4), (8, 4), (32, 4))
    assert fake.called("IExecutionContext.execute_async_v3") == [(7,)]
    assert fake.called("IExecutionContext.set_device_memory") == [(256, 1 << 20)]
    assert fake.called("Runtime.deserialize_cuda_engine") == [(PLAN,)]
    assert fake.called("IBuilderConfig.builder_optimization_level")[-1] == (3,)


@pytest.mark.parametrize("release", RELEASES)
def test_networks_are_strongly_typed_and_no_builder_flag_changes_a_precision_in(release: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake(release)
    run_everything(fake, monkeypatch)
    strongly_typed = 1 << fake.record["classes"]["NetworkDefinitionCreationFlag"]["members"]["STRONGLY_TYPED"]
    assert set(fake.called("Builder.create_network")) == {(strongly_typed,)}
    assert {flag.name for (flag,) in fake.called("IBuilderConfig.clear_flag")} == {"TF32"}
    flags = {flag.name for (flag,) in fake.called("IBuilderConfig.set_flag")}
    assert flags == ({"REQUIRE_USER_ALLOCATION"} if fake.package == "tensorrt_rtx" else set())


def test_the_compute_capability_is_named_where_no_gpu_tells_it(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake("rtx-1.7")
    run_everything(fake, monkeypatch)
    assert fake.called("IBuilderConfig.num_compute_capabilities")[0] == (1,)
    member, index = fake.called("IBuilderConfig.set_compute_capability")[0]
    assert (member.name, index) == ("SM75", 0)


def test_timings_are_kept_with_tensorrt_and_kernels_with_tensorrt_rtx(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_everything(Fake("11.4"), monkeypatch).timing_cache == b"timings of 11.4"
    fake = Fake("rtx-1.7")
    assert run_everything(fake, monkeypatch).timing_cache is None
    assert fake.called("IRuntimeCache.deserialize") == [(b"kernels",)]
    assert len(fake.called("IRuntimeConfig.set_runtime_cache")) == 1
    (strategy,) = fake.called("IRuntimeConfig.dynamic_shapes_kernel_specialization_strategy")[0]
    assert strategy.name == "EAGER"


def test_the_adapter_uses_names_at_all() -> None:
    used = dict(names_used())
    assert {"Builder", "OnnxParser", "BuilderFlag.TF32", "ILogger.Severity.INFO", "ComputeCapability.__members__"} <= set(used)
    assert used["ComputeCapability.__members__"] == ("rtx-1.7",)


@pytest.mark.parametrize(("name", "releases"), sorted(set(names_used())), ids=lambda value: value if isinstance(value, str) else "")
def test_a_name_exists_in_every_release_it_is_used_under(name: str, releases: tuple[str, ...]) -> None:
    assert [release for release in releases if not exists(record_api.read(release), name)] == []


def test_what_the_records_lack_is_seen() -> None:
    assert not exists(record_api.read("11.4"), "BuilderFlag.FP16")
    assert exists(record_api.read("10.4"), "BuilderFlag.FP16")
    assert not exists(record_api.read("10.4"), "ComputeCapability")
    fake = Fake("10.4")
    with pytest.raises(AttributeError):
        fake.module.ComputeCapability  # noqa: B018
    builder = fake.module.Builder(logger_of(fake))
    with pytest.raises(TypeError, match="incompatible function arguments"):
        builder.create_network("strongly typed")
    with pytest.raises(TypeError, match="incompatible function arguments"):
        builder.build_serialized_network(builder.create_network(0))
    with pytest.raises(AttributeError):
        builder.create_builder_config().num_compute_capabilities = 1
    with pytest.raises(TypeError, match="No constructor"):
        fake.module.ICudaEngine()


def test_a_logger_that_forgets_its_base_is_refused_as_by_the_real_one() -> None:
    fake = Fake("10.4")

    class Logger(fake.module.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            pass

    with pytest.raises(TypeError, match="must be called when overriding"):
        fake.module.ILogger.log(Logger(), fake.module.ILogger.Severity.INFO, "hello")


def test_records_are_small_and_of_the_releases_they_are_named_for() -> None:
    for release, (_, requirement) in record_api.RELEASES.items():
        assert record_api.path_of(release).stat().st_size < 300_000
        version = record_api.read(release)["version"]
        assert version.startswith(release.removeprefix("rtx-"))
        assert requirement is None or requirement.endswith(f"=={version}")


def test_the_installed_tensorrt_rtx_is_the_one_that_was_recorded() -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs tensorrt_rtx")
    recorded = record_api.read("rtx-1.7")
    version = importlib.metadata.version("tensorrt_rtx")
    if version != recorded["version"]:
        pytest.skip(f"tensorrt_rtx {version} is installed, and {recorded['version']} was recorded")
    assert record_api.record("rtx-1.7") == recorded


@pytest.mark.slow
@pytest.mark.parametrize("release", [release for release, (_, requirement) in record_api.RELEASES.items() if requirement])
def test_the_record_is_what_the_real_wheel_offers(release: str) -> None:
    try:
        fresh = record_api.record(release)
    except record_api.CannotRecord as error:
        pytest.skip(str(error))
    assert fresh == record_api.read(release), "run `python -m tests.deploy.trt.record_api` and read the difference"


def logger_of(fake: Fake) -> Any:
    """Return a logger as the adapter makes one."""
    return listening.listener_of(fake.module).logger


def test_the_pretended_package_is_found_like_a_real_one(monkeypatch: pytest.MonkeyPatch) -> None:
    with installed(Fake("10.4"), monkeypatch) as adapter:
        assert (adapter.package, adapter.version, adapter.version_tuple) == ("tensorrt", "10.4.0", (10, 4, 0))
