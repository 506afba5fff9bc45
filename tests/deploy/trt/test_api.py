"""The adapter where things go wrong: what it refuses before anything native is called, what it says, how it is interrupted."""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.trt.fake_tensorrt import PLAN, RELEASES, T4, V100, Fake, installed
from tests.deploy.trt.graphs import WIDTH, write_graph
from txl_deploy.trt import api, cuda
from txl_deploy.trt.profiles import Profile
from txl_train.errors import ArtifactError, EnvironmentUnfitError, TxlError, UsageError, ValidationError

SPEC = api.BuildSpec(onnx=Path("model.onnx"), profiles=[Profile(name="x", min=(1, 4), opt=(8, 4), max=(32, 4))])
SCRATCH = (4096, 1 << 20)
"""Address and size of what the pretended engine takes."""
ANY_BUILDER = pytest.mark.parametrize("release", ["11.4", "rtx-1.7"])


# What is not installed


@pytest.mark.parametrize(
    ("package", "command"),
    [
        ("tensorrt", "pip install --extra-index-url https://pypi.nvidia.com tensorrt-cu13==11.4.0.106"),
        ("tensorrt_rtx", "pip install tensorrt-rtx==1.7.1.116"),
    ],
)
def test_an_absent_package_names_the_command_that_installs_it(package: Any, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(EnvironmentUnfitError, match="is not installed") as caught:
        api.find(package)
    assert caught.value.exit_code == 3
    assert f"`{command}`" in str(caught.value)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import tensorrt_bindings_that_are_not_there", "installed incompletely"),
        ("raise ImportError('libnvinfer.so.10: cannot open shared object file')", "does not load: libnvinfer.so.10"),
        ("raise FileNotFoundError('Could not find: nvinfer_10.dll')", "does not load: Could not find"),
        (
            "__version__ = '8.6.1'\nclass ILogger:\n    class Severity:\n        INTERNAL_ERROR = ERROR = WARNING = INFO = 0",
            "too old: 10.4",
        ),
        (
            "__version__ = '10.0.1'\nclass ILogger:\n    class Severity:\n        INTERNAL_ERROR = ERROR = WARNING = INFO = 0",
            "TensorRT 10.0.1 is too old: 10.4 is the first that can be used",
        ),
    ],
)
def test_a_package_that_is_of_no_use_says_why(source: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tensorrt.py").write_text(source, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    with pytest.raises(EnvironmentUnfitError, match=expected) as caught:
        api.find("tensorrt")
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    assert "pip install" in str(caught.value)


# What this machine cannot do


def refusal(fake: Fake, monkeypatch: pytest.MonkeyPatch, gpus: list[cuda.Gpu], spec: api.BuildSpec = SPEC) -> TxlError:
    """Return the error of a build that is refused before anything native is called."""
    with installed(fake, monkeypatch, *gpus) as adapter:
        fake.calls.clear()
        with pytest.raises(TxlError) as caught:
            adapter.build(spec)
    assert fake.calls == []
    return caught.value


@pytest.mark.parametrize("release", ["10.4", "10.16", "11.4"])
def test_tensorrt_is_not_asked_to_build_where_there_is_no_gpu(release: str, monkeypatch: pytest.MonkeyPatch) -> None:
    error = refusal(Fake(release), monkeypatch, [])
    assert error.exit_code == 3
    assert "builds engines only on the GPU they are for, and this machine has none" in str(error)
    assert "txl export --kit" in str(error)


def test_tensorrt_is_not_asked_to_build_for_another_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    error = refusal(Fake("11.4"), monkeypatch, [T4, V100], dataclasses.replace(SPEC, compute_capability="9.0"))
    assert error.exit_code == 3
    assert "Tesla T4 of compute capability 7.5, not for 9.0" in str(error)


def test_a_hardware_compatibility_that_came_later_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = dataclasses.replace(SPEC, hardware_compatibility="same_compute_capability")
    error = refusal(Fake("10.4"), monkeypatch, [V100], spec)
    assert error.exit_code == 3
    assert "10.13" in str(error)
    fake = Fake("10.16")
    with installed(fake, monkeypatch, T4) as adapter:
        adapter.build(spec)
    assert fake.called("IBuilderConfig.hardware_compatibility_level")[0][0].name == "SAME_COMPUTE_CAPABILITY"


@pytest.mark.parametrize("wanted", ["7.0", "9.0"])
def test_tensorrt_rtx_names_what_it_can_build_for(wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    error = refusal(Fake("rtx-1.7"), monkeypatch, [], dataclasses.replace(SPEC, compute_capability=wanted))
    assert error.exit_code == 3
    assert f"7.5, 8.0, 8.6, 8.9, 12.0, 12.1, but not for {wanted}" in str(error)


def test_tensorrt_rtx_has_no_levels_of_compatibility(monkeypatch: pytest.MonkeyPatch) -> None:
    error = refusal(Fake("rtx-1.7"), monkeypatch, [], dataclasses.replace(SPEC, hardware_compatibility="ampere_plus"))
    assert error.exit_code == 2


@ANY_BUILDER
def test_no_engine_is_opened_where_there_is_no_gpu(release: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake(release)
    with installed(fake, monkeypatch) as adapter, pytest.raises(EnvironmentUnfitError, match="this machine has none"):
        adapter.open_engine(PLAN)
    assert fake.called("Runtime") == []


# What the package refuses


@ANY_BUILDER
def test_what_the_parser_finds_is_told_with_the_node(release: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake(release, parse_errors=[("No importer registered for op: Foo.", "node_3", "Foo"), ("Broken.", "", "")])
    with installed(fake, monkeypatch, T4) as adapter, pytest.raises(ValidationError) as caught:
        adapter.build(SPEC)
    assert caught.value.exit_code == 1
    assert "does not take model.onnx: No importer registered for op: Foo (at Foo `node_3`); Broken." in str(caught.value)
    assert fake.called("Builder.build_serialized_network") == []


@ANY_BUILDER
def test_a_graph_with_other_inputs_than_its_profiles_is_refused(release: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake(release)
    spec = dataclasses.replace(SPEC, profiles=[Profile(name="input_ids", min=(1, 4), opt=(8, 4), max=(32, 4))])
    with installed(fake, monkeypatch, T4) as adapter, pytest.raises(ValidationError, match="has the inputs x, which are others"):
        adapter.build(spec)


@ANY_BUILDER
def test_a_build_without_an_engine_tells_what_was_logged(release: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake(release, builds=False, build_errors=["FP32 GEMM is not supported."])
    with installed(fake, monkeypatch, T4) as adapter, pytest.raises(ValidationError, match="FP32 GEMM is not supported") as caught:
        adapter.build(SPEC)
    assert caught.value.exit_code == 1


def test_a_gpu_that_a_release_dropped_is_an_unfit_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake("10.16", builds=False, build_errors=["Target GPU SM 70 is not supported by this TensorRT release."])
    with installed(fake, monkeypatch, V100) as adapter, pytest.raises(EnvironmentUnfitError, match="SM 70") as caught:
        adapter.build(SPEC)
    assert "txl doctor" in str(caught.value)


def test_a_timing_cache_of_another_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake("11.4", takes_timing_cache=False)
    with installed(fake, monkeypatch, T4) as adapter, pytest.raises(ArtifactError, match="timing cache") as caught:
        adapter.build(dataclasses.replace(SPEC, timing_cache=b"of another"))
    assert caught.value.exit_code == 4
    assert fake.called("IBuilderConfig.set_timing_cache")[0][1] is False


def test_tensorrt_rtx_says_that_it_uses_no_timing_cache(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    with installed(Fake("rtx-1.7"), monkeypatch) as adapter:
        adapter.build(dataclasses.replace(SPEC, timing_cache=b"timings", compute_capability="7.5"))
    assert "the timing cache is not used" in caplog.text


@ANY_BUILDER
def test_an_engine_that_does_not_open_is_no_artifact(release: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with installed(Fake(release, opens=False), monkeypatch, T4) as adapter, pytest.raises(ArtifactError, match="does not open") as caught:
        adapter.open_engine(PLAN)
    assert caught.value.exit_code == 4


def test_a_shape_outside_the_profile_names_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    with installed(Fake("11.4", takes_shapes=False), monkeypatch, T4) as adapter:
        context = adapter.open_engine(PLAN).context(*SCRATCH)
        with pytest.raises(UsageError, match=r"takes `x` of \(1, 4\) to \(32, 4\), not \(64, 4\)"):
            context.set_shape("x", [64, 4])


def test_a_step_that_does_not_start_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with installed(Fake("11.4", runs=False), monkeypatch, T4) as adapter:
        context = adapter.open_engine(PLAN).context(*SCRATCH)
        with pytest.raises(EnvironmentUnfitError, match="could not run a step"):
            context.enqueue(0)


def test_kernels_compiled_elsewhere_are_compiled_anew(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with installed(Fake("rtx-1.7", takes_runtime_cache=False), monkeypatch, T4) as adapter:
        adapter.open_engine(PLAN, b"of another GPU")
    assert "made anew" in caplog.text


# Scratch memory


def start(fake: Fake, monkeypatch: pytest.MonkeyPatch, *scratch: int) -> None:
    """Open an engine and run a step of it."""
    with installed(fake, monkeypatch, T4) as adapter:
        adapter.open_engine(PLAN).context(*scratch).enqueue(7)


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("requires", [True, False])
def test_a_step_runs_in_the_scratch_memory_it_is_given(release: str, requires: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake(release, requires_user_allocation=requires)
    start(fake, monkeypatch, *SCRATCH)
    assert fake.called("IExecutionContext.set_device_memory") == [SCRATCH]
    (choice,) = fake.called("ICudaEngine.create_execution_context")[0]
    if fake.package == "tensorrt_rtx":
        ((choice,),) = fake.called("IRuntimeConfig.set_execution_context_allocation_strategy")
    assert choice.name == "USER_MANAGED"


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("scratch", [(4097, 1 << 20), (4096, (1 << 20) - 1), (0, 1 << 20)], ids=["crooked", "too small", "nowhere"])
def test_scratch_memory_that_is_refused_is_an_error(release: str, scratch: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EnvironmentUnfitError, match="cannot run the engine, which takes 1 MB of the GPU: no 1048576 aligned bytes"):
        start(Fake(release), monkeypatch, *scratch)


@pytest.mark.parametrize("release", RELEASES)
def test_an_engine_that_takes_none_is_given_none(release: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake(release, scratch_bytes=0)
    start(fake, monkeypatch, 0, 0)
    assert fake.called("IExecutionContext.set_device_memory") == []


@pytest.mark.parametrize("release", RELEASES)
def test_the_pretended_package_does_not_run_without_scratch_memory(release: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake(release)
    with installed(fake, monkeypatch, T4) as adapter:
        engine = adapter.open_engine(PLAN)
        assert engine._engine.create_execution_context(engine._config).execute_async_v3(0) is False


def test_the_pretended_tensorrt_rtx_makes_no_context_with_memory_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake("rtx-1.7")
    with installed(fake, monkeypatch, T4) as adapter:
        engine = adapter.open_engine(PLAN)
        assert engine._engine.create_execution_context() is None
        static = engine._engine.create_runtime_config()
        assert engine._engine.create_execution_context(static) is None
        engine._config = static
        with pytest.raises(EnvironmentUnfitError, match="kUSER_MANAGED allocation strategy"):
            engine.context(*SCRATCH)


# What it says


def test_messages_reach_the_log_at_their_level(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    says = [
        ("VERBOSE", "verbose"),
        ("INFO", "info"),
        ("WARNING", "ModelImporter.cpp:1071: Make sure input target_ids has Int64 binding."),
        ("WARNING", "warning"),
    ]
    with installed(Fake("11.4", says=says), monkeypatch, T4) as adapter:
        built = adapter.build(SPEC)
    levels = {record.getMessage(): record.levelname for record in caplog.records if record.name == "txl_deploy.trt.listening"}
    assert levels["info"] == "DEBUG"
    assert levels["warning"] == "WARNING"
    assert levels["ModelImporter.cpp:1071: Make sure input target_ids has Int64 binding"] == "DEBUG"
    assert "verbose" not in levels
    assert built.log == ["warning"]


def test_an_error_is_told_once_as_the_exception_it_leads_to(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    fake = Fake("11.4", builds=False, build_errors=["out of memory"])
    with installed(fake, monkeypatch, T4) as adapter:
        with pytest.raises(ValidationError, match="out of memory"):
            adapter.build(SPEC)
        assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
        adapter._listener.logger.log(fake.module.ILogger.Severity.ERROR, "nobody asked")
    assert [record.levelname for record in caplog.records if record.getMessage() == "nobody asked"] == ["ERROR"]


def test_there_is_one_logger_in_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake("11.4")
    with installed(fake, monkeypatch, T4) as adapter:
        adapter.build(SPEC)
        again = api.find("tensorrt")
        again.build(SPEC)
        again.open_engine(PLAN)
    loggers = {arguments[-1] for name in ("Builder", "OnnxParser", "Runtime") for arguments in fake.called(name)}
    assert len(loggers) == 1


# Ctrl-C


def interrupt_soon() -> None:
    """Send Ctrl-C to this process, and give it the time to arrive."""
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.3)


@ANY_BUILDER
def test_ctrl_c_ends_a_build_at_its_next_step(release: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake(release, steps=1000, during_build=interrupt_soon)
    with installed(fake, monkeypatch, T4) as adapter, pytest.raises(KeyboardInterrupt):
        adapter.build(SPEC)
    assert fake.steps_gone_on == 0
    assert "txl-build" not in {thread.name for thread in threading.enumerate()}, "the builder still works"


@ANY_BUILDER
def test_a_build_goes_on_where_nobody_interrupts(release: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake(release)
    with installed(fake, monkeypatch, T4) as adapter:
        adapter.build(SPEC)
    assert fake.steps_gone_on == fake.steps


@ANY_BUILDER
def test_what_fails_in_the_thread_of_the_build_reaches_the_caller(release: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("a bug of ours")

    with installed(Fake(release, during_build=fail), monkeypatch, T4) as adapter, pytest.raises(RuntimeError, match="a bug of ours"):
        adapter.build(SPEC)


# TensorRT-RTX itself


@pytest.fixture
def rtx() -> api.Api:
    """Return the installed TensorRT-RTX."""
    pytest.importorskip("tensorrt_rtx", reason="needs tensorrt_rtx")
    return api.find("tensorrt_rtx")


def spec_of(path: Path, **changes: Any) -> api.BuildSpec:
    """Return what to build of a small graph, for a T4."""
    profiles = [Profile(name=name, min=(1, WIDTH), opt=(8, WIDTH), max=(32, WIDTH)) for name in ("x", "mems.0")]
    return api.BuildSpec(**{"onnx": path, "profiles": profiles, "compute_capability": "7.5", **changes})


@pytest.mark.parametrize("compute_capability", ["7.5", "8.0", "8.6", "8.9", "12.0", "12.1", None])
def test_the_real_one_builds_without_a_gpu_for(compute_capability: str | None, rtx: api.Api, tmp_path: Path) -> None:
    built = rtx.build(spec_of(write_graph(tmp_path / "model.onnx"), compute_capability=compute_capability, workspace_bytes=1 << 28))
    assert len(built.plan) > 1000
    assert built.timing_cache is None
    assert built.log == []
    assert built.precisions.weights["float16"] == WIDTH * WIDTH
    assert built.precisions.products == {"float16": 1}
    assert built.precisions.layers["float16"] >= 3
    assert "float32" not in built.precisions.layers


def test_the_real_one_tells_what_it_does_not_parse(rtx: api.Api, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="Unheard") as caught:
        rtx.build(spec_of(write_graph(tmp_path / "model.onnx", operator="Unheard")))
    assert "at Unheard `node 0`" in str(caught.value)
    (tmp_path / "broken.onnx").write_bytes(b"nonsense")
    with pytest.raises(ValidationError, match="Failed to parse the ONNX model"):
        rtx.build(spec_of(tmp_path / "broken.onnx"))
    with pytest.raises(ValidationError, match="cannot be found"):
        rtx.build(spec_of(tmp_path / "absent.onnx"))


def test_the_real_one_refuses_products_of_fp32_for_a_t4(rtx: api.Api, tmp_path: Path) -> None:
    """What `builder.check_build` says beforehand is so."""
    path = write_graph(tmp_path / "model.onnx", dtype="float32")
    with pytest.raises(ValidationError, match="FP32 GEMM is not supported"):
        rtx.build(spec_of(path))
    assert rtx.build(spec_of(path, compute_capability="8.9")).precisions.products == {"float32": 1}


def test_the_real_one_does_not_notice_different_ranges_of_the_batch(rtx: api.Api, tmp_path: Path) -> None:
    """Why `profiles.check_profiles` has to."""
    profiles = [
        Profile(name="x", min=(1, WIDTH), opt=(8, WIDTH), max=(32, WIDTH)),
        Profile(name="mems.0", min=(1, WIDTH), opt=(8, WIDTH), max=(16, WIDTH)),
    ]
    assert rtx.build(spec_of(write_graph(tmp_path / "model.onnx"), profiles=profiles)).plan


def test_the_real_one_refuses_what_does_not_rise(rtx: api.Api, tmp_path: Path) -> None:
    profiles = [Profile(name=name, min=(9, WIDTH), opt=(8, WIDTH), max=(32, WIDTH)) for name in ("x", "mems.0")]
    with pytest.raises(ValidationError, match="refuses the ranges of shapes"):
        rtx.build(spec_of(write_graph(tmp_path / "model.onnx"), profiles=profiles))


def test_the_real_one_is_not_asked_to_open_an_engine_without_a_gpu(rtx: api.Api, tmp_path: Path) -> None:
    if cuda.devices():
        pytest.skip("this machine has a GPU")
    built = rtx.build(spec_of(write_graph(tmp_path / "model.onnx")))
    with pytest.raises(EnvironmentUnfitError, match="this machine has none"):
        rtx.open_engine(built.plan)


@pytest.mark.slow
def test_ctrl_c_ends_a_real_build(rtx: api.Api, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    spec = spec_of(write_graph(tmp_path / "model.onnx", n_layer=150))
    timer = threading.Timer(0.3, os.kill, [os.getpid(), signal.SIGINT])
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        rtx.build(spec)
    timer.join()
    assert "Build canceled by user" in caplog.text
    assert "txl-build" not in {thread.name for thread in threading.enumerate()}, "the builder still works"
    assert rtx.build(spec_of(write_graph(tmp_path / "small.onnx"))).plan, "and it builds again"
