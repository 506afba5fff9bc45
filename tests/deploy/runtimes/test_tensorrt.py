"""The TensorRT runtime without a GPU: an engine that computes with eager PyTorch reads and writes the addresses it is given.

So all that the runtime does itself is proved by numbers: shapes, padding, buffers that take turns, contexts and CUDA graphs. Before the
engine reads its inputs it spoils the places of its outputs, and a graph of it refuses to run once its context has other shapes.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import logging
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.deploy.conftest import Exports
from tests.support import build_model, random_ids, small_config
from txl_deploy import claims
from txl_deploy.cli.main import main
from txl_deploy.manifest import BatchRange, read_manifest
from txl_deploy.parity.rollout import compare, random_segments
from txl_deploy.parity.tolerances import tolerance_for
from txl_deploy.runtimes import tensorrt
from txl_deploy.runtimes.base import TORCH_TYPES, HeadError, RuntimeInfo, ShapeRangeError
from txl_deploy.runtimes.eager import EagerRuntime
from txl_deploy.runtimes.registry import eager_from_checkpoint, open_artifact
from txl_deploy.runtimes.tensorrt import CudaLauncher, KernelCache, TensorRTRuntime, bucket, padded_length
from txl_deploy.session import Session
from txl_deploy.signature import step_signature
from txl_deploy.trt import cuda
from txl_deploy.trt.cuda import Gpu
from txl_deploy.trt.profiles import Profile
from txl_train.checkpoint import load_model
from txl_train.config import ModelConfig
from txl_train.errors import ArtifactError, EnvironmentUnfitError, ManifestError, UsageError, ValidationError
from txl_train.model.inference import STEPS
from txl_train.model.memory import Memory
from txl_train.model.transformer_xl import TransformerXL

TGT_LEN = 5
ADAPTIVE = {"cutoffs": (5, 9, 16), "div_val": 2}
TYPES = {"int64": torch.int64, "float32": torch.float32, "float16": torch.float16}


def at(address: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """Return what lies at an address, as a tensor that shares it."""
    count = math.prod(shape)
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer((ctypes.c_char * (count * dtype.itemsize)).from_address(address), dtype=dtype).view(shape)


class HostContext:
    """An execution context that computes where the addresses say."""

    def __init__(self, engine: HostEngine, scratch: int, scratch_bytes: int) -> None:
        size = engine.device_memory_bytes
        assert size == 0 or (scratch != 0 and scratch % 256 == 0 and scratch_bytes >= size), (scratch, scratch_bytes)
        self.engine = engine
        self.scratch = at(scratch, torch.uint8, (size,))
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def set_shape(self, name: str, shape: tuple[int, ...]) -> None:
        profile = self.engine.profile_shapes(name)
        low, high = profile.min, profile.max
        assert len(shape) == len(low), name
        assert all(a <= b <= c for a, b, c in zip(low, shape, high)), f"{name}: {shape} is not within {low}..{high}"
        self.shapes[name] = tuple(shape)

    def set_address(self, name: str, address: int) -> None:
        assert address, f"{name} lies nowhere"
        self.addresses[name] = address

    def infer_missing(self) -> list[str]:
        return sorted({spec.name for spec in self.engine.signature.inputs} - self.shapes.keys())

    def enqueue(self, stream: int) -> None:
        self.compute(dict(self.shapes), dict(self.addresses))

    def compute(self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> None:
        self.scratch.fill_(7)
        signature = self.engine.signature
        B = shapes["input_ids"][0]
        places = []
        for spec in signature.outputs:
            shape = tuple(B if isinstance(axis, str) else axis for axis in spec.axes)
            places.append(at(addresses[spec.name], TYPES[spec.dtype], shape))
            places[-1].fill_(-7)
        given = [at(addresses[spec.name], TYPES[spec.dtype], shapes[spec.name]) for spec in signature.inputs]
        result, length_B, states = self.engine.step(*self.engine.arranged(given))
        for place, value in zip(places, [result, length_B, *states], strict=True):
            assert place.dtype == value.dtype
            place.copy_(value)


class HostEngine:
    """An engine of eager PyTorch."""

    device_memory_bytes = 1 << 12

    def __init__(self, model: TransformerXL, info: RuntimeInfo, products: str | None = None) -> None:
        self.info = info
        self.products = products or {"fp32": "float32", "fp16": "float16"}[info.dtype]
        types = {"dtype": TORCH_TYPES[info.dtype], "memory_dtype": TORCH_TYPES[info.memory_dtype]}
        self.module = STEPS[info.head](model, info.tgt_len, info.memory, info.config, **types).eval()
        self.signature = step_signature(
            info.config, tgt_len=info.tgt_len, memory=info.memory, head=info.head, memory_dtype=info.memory_dtype
        )
        self.contexts: list[HostContext] = []

    def tensors(self) -> list[Any]:
        return [
            SimpleNamespace(
                name=spec.name, mode=mode, dtype=spec.dtype, shape=[-1 if isinstance(axis, str) else axis for axis in spec.axes]
            )
            for mode, specs in (("input", self.signature.inputs), ("output", self.signature.outputs))
            for spec in specs
        ]

    def profile_shapes(self, name: str) -> Profile:
        spec = next(spec for spec in self.signature.inputs if spec.name == name)
        low, high = self.info.min_batch, self.info.max_batch or 0
        if name.startswith("target_rows"):
            return Profile(name=name, min=(1,), opt=(1,), max=(high * self.info.tgt_len,))
        least, most = (tuple(B if isinstance(axis, str) else axis for axis in spec.axes) for B in (low, high))
        return Profile(name=name, min=least, opt=least, max=most)

    def inspect(self) -> dict[str, Any]:
        """Return what TensorRT's inspector says of a fused product and of a normalisation."""
        layer = {"LayerType": "gemm", "Outputs": [{"Name": "x", "Datatype": {"float16": "Half", "float32": "Float"}[self.products]}]}
        return {"Layers": [layer, layer, {"LayerType": "kgen", "Outputs": [{"Name": "y", "Datatype": "Float"}]}]}

    def runtime_cache(self) -> bytes | None:
        """Return the kernels of TensorRT-RTX: here how many contexts there are."""
        return bytes([len(self.contexts)])

    def context(self, scratch: int, scratch_bytes: int) -> HostContext:
        self.contexts.append(HostContext(self, scratch, scratch_bytes))
        return self.contexts[-1]

    def arranged(self, given: list[Tensor]) -> list[Any]:
        """Return inputs in the order of the graph as arguments of the step."""
        n_tokens = 1 if self.info.head != "nll" else 2 + self.info.config.n_cluster
        rows = [given[2:n_tokens]] if self.info.head == "nll" else []
        return [*given[: min(2, n_tokens)], *rows, given[n_tokens], given[n_tokens + 1 :]]

    def step(self, *arguments: Any) -> Any:
        with torch.inference_mode():
            return self.module(*arguments)


class HostLauncher:
    """Runs contexts at once, and keeps what a CUDA graph keeps: shapes and addresses."""

    def __init__(self, *, captures: bool = True) -> None:
        self.captures = captures
        self.enqueued = self.captured = self.replayed = 0

    def turn(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def enqueue(self, context: Any) -> None:
        self.enqueued += 1
        context.enqueue(0)

    def capture(self, context: Any) -> Callable[[], None]:
        if not self.captures:
            raise RuntimeError("operation not permitted when stream is capturing\nmore of it")
        self.captured += 1
        shapes, addresses = dict(context.shapes), dict(context.addresses)

        def replay() -> None:
            self.replayed += 1
            assert context.shapes == shapes, "the context of this graph was given other shapes"
            context.compute(shapes, addresses)

        return replay


@dataclasses.dataclass
class Pair:
    """The same model as an engine and in eager PyTorch."""

    runtime: TensorRTRuntime
    eager: EagerRuntime
    engine: HostEngine
    launcher: HostLauncher

    def segments(self, batch_size: int, count: int, seed: int = 3) -> list[tuple[Tensor, Tensor]]:
        ext_len = self.eager.info.config.ext_len
        ids = torch.from_numpy(random_ids(self.eager.info.config, batch_size, ext_len + count * TGT_LEN + 1, seed))
        starts = [ext_len + i * TGT_LEN for i in range(count)]
        return [(ids[:, s - ext_len : s + TGT_LEN].contiguous(), ids[:, s + 1 : s + TGT_LEN + 1].contiguous()) for s in starts]


def make_pair(config: ModelConfig | None = None, *, batch: tuple[int, int] = (1, 6), captures: bool = True, **settings: Any) -> Pair:
    model = build_model(small_config(**ADAPTIVE) if config is None else config)
    eager = EagerRuntime(model, tgt_len=TGT_LEN, **settings)
    info = dataclasses.replace(eager.info, name="trt", compute="", readback={}, min_batch=batch[0], max_batch=batch[1])
    engine, launcher = HostEngine(model, info), HostLauncher(captures=captures)
    return Pair(TensorRTRuntime(engine, info, launcher=launcher), eager, engine, launcher)  # type: ignore[arg-type]


def assert_same_rollout(pair: Pair, batch_size: int, count: int = 9) -> None:
    ours, theirs = Session(pair.eager, batch_size), Session(pair.runtime, batch_size)
    exact = pair.eager.info.dtype == "fp32"
    tolerance = {"atol": 1e-5, "rtol": 1e-5} if exact else {"atol": 5e-3, "rtol": 5e-3}  # fp16 sums in another order
    for number, (input_ids, target_ids) in enumerate(pair.segments(batch_size, count)):
        if number in (2, 5):
            for session in (ours, theirs):
                session.reset([batch_size - 1])
        if pair.eager.info.head == "nll":
            found, expected = theirs.step(input_ids, target_ids), ours.step(input_ids, target_ids)
        else:
            found, expected = theirs.next_token(input_ids), ours.next_token(input_ids)
        torch.testing.assert_close(found, expected, **tolerance)
        assert torch.equal(theirs.memory.length_B, ours.memory.length_B)
        for found, expected in zip(theirs.memory.states, ours.memory.states, strict=True):
            torch.testing.assert_close(found, expected, **tolerance)


@pytest.mark.parametrize("memory", ["kv", "hidden"])
@pytest.mark.parametrize("head", ["nll", "logits", "log_probs"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_rollout_with_reset_streams_equals_eager(head: str, memory: str, batch_size: int) -> None:
    pair = make_pair(head=head, memory=memory)
    assert_same_rollout(pair, batch_size)
    assert pair.launcher.enqueued > 0


@pytest.mark.parametrize(("dtype", "memory_dtype"), [("fp16", "fp16"), ("fp16", "fp32")])
def test_half_precision_and_the_type_of_the_memory(dtype: str, memory_dtype: str) -> None:
    pair = make_pair(dtype=dtype, memory_dtype=memory_dtype)
    assert_same_rollout(pair, 2)
    assert pair.runtime.info.compute == "fp16"


@pytest.mark.parametrize(
    "changes",
    [{}, {"cutoffs": (5, 9), "ext_len": 3}, {"cutoffs": (5,), "mem_len": 0}, {"mem_len": 3, "same_length": True, "pre_lnorm": True}],
    ids=["plain softmax", "read once more", "no memory", "short memory"],
)
def test_other_models(changes: dict[str, Any]) -> None:
    assert_same_rollout(make_pair(small_config(**changes)), 2)


def test_a_fixed_number_of_streams() -> None:
    pair = make_pair(batch=(4, 4))
    assert_same_rollout(pair, 4)
    three = pair.segments(3, 1)
    with pytest.raises(ShapeRangeError, match=r"must be 4 for"):
        pair.runtime.step(*three[0], pair.runtime.initial_memory(3))


@pytest.mark.parametrize("batch_size", [1, 7])
def test_a_number_of_streams_out_of_range_names_the_option(batch_size: int) -> None:
    pair = make_pair(batch=(2, 6))
    with pytest.raises(ShapeRangeError, match=rf"(?s)within 2\.\.6.*but is {batch_size}.*--batch-range") as caught:
        pair.runtime.step(*pair.segments(batch_size, 1)[0], pair.runtime.initial_memory(batch_size))
    assert caught.value.exit_code == 2
    assert pair.launcher.enqueued == 0


@pytest.mark.parametrize("target", [0, 5, 9, 16, 22])
def test_clusters_without_targets_are_padded_and_change_nothing(target: int) -> None:
    pair = make_pair()
    ids = torch.full((2, TGT_LEN), target)
    expected = pair.eager.step(ids, ids, pair.eager.initial_memory(2)).nll_BT
    torch.testing.assert_close(pair.runtime.step(ids, ids, pair.runtime.initial_memory(2)).nll_BT, expected, atol=1e-5, rtol=1e-5)


def test_batch_sizes_may_change_from_step_to_step() -> None:
    pair = make_pair()
    sessions = {B: (Session(pair.eager, B), Session(pair.runtime, B)) for B in (1, 2, 6)}
    segments = {B: pair.segments(B, 8) for B in sessions}
    for number in range(8):
        for B, (ours, theirs) in sessions.items():
            torch.testing.assert_close(theirs.step(*segments[B][number]), ours.step(*segments[B][number]), atol=1e-5, rtol=1e-5)
    assert pair.launcher.replayed > 0


def test_sessions_take_turns_without_disturbing_each_other() -> None:
    pair = make_pair(head="logits")
    texts = [pair.segments(2, 8, seed) for seed in (1, 2, 3)]
    ours, theirs = [Session(pair.eager, 2) for _ in texts], [Session(pair.runtime, 2) for _ in texts]
    for number in range(8):
        results = [session.next_token(text[number][0]) for session, text in zip(theirs, texts)]
        for result, session, text in zip(results, ours, texts):
            torch.testing.assert_close(result, session.next_token(text[number][0]), atol=1e-5, rtol=1e-5)
    assert pair.launcher.replayed > 0


def test_two_sets_of_buffers_take_turns() -> None:
    pair = make_pair()
    session = Session(pair.runtime, 2)
    places = []
    for segment in pair.segments(2, 9):
        session.step(*segment)
        places.append(session.memory.states[0].data_ptr())
    assert len(set(places)) == 2
    assert all(first != second for first, second in zip(places, places[1:]))


def test_recurring_shapes_are_captured_once_for_each_direction_and_replayed_from_then_on() -> None:
    pair = make_pair(head="logits")
    session = Session(pair.runtime, 2)
    for input_ids, _ in pair.segments(2, 20):
        session.next_token(input_ids)
    assert (pair.launcher.captured, pair.launcher.enqueued, pair.launcher.replayed) == (2, 5, 15)
    assert len(pair.engine.contexts) == 2  # the one for all shapes, and that of these


def test_tokens_of_each_step_reach_a_replayed_graph() -> None:
    pair = make_pair(head="log_probs")
    assert_same_rollout(pair, 2, count=14)
    assert pair.launcher.replayed > 5


def test_a_graph_that_cannot_be_captured_is_told_once_and_steps_go_on(caplog: pytest.LogCaptureFixture) -> None:
    pair = make_pair(head="logits", captures=False)
    with caplog.at_level(logging.WARNING):
        assert_same_rollout(pair, 2, count=12)
    assert [record.getMessage() for record in caplog.records] == [
        "CUDA graphs cannot be captured here, so every step is enqueued: operation not permitted when stream is capturing"
    ]
    assert (pair.launcher.replayed, pair.launcher.enqueued) == (0, 12)


def test_many_shapes_share_few_contexts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt, "MAX_CONTEXTS", 2)
    monkeypatch.setattr(tensorrt, "IDLE_STEPS", 3)
    pair = make_pair(head="logits")
    for B in (1, 2, 3, 4, 1, 5):
        assert_same_rollout(pair, B, count=7)
    assert len(pair.runtime._contexts._own) == 2
    assert pair.launcher.replayed > 0


@pytest.mark.parametrize("size", [0, 1, 5000])
def test_contexts_share_one_piece_of_scratch_memory(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HostEngine, "device_memory_bytes", size)
    pair = make_pair(head="logits")
    for B in (1, 2):
        assert_same_rollout(pair, B, count=4)
    assert len(pair.engine.contexts) == 3
    assert {context.scratch.numel() for context in pair.engine.contexts} == {size}
    assert len({context.scratch.data_ptr() for context in pair.engine.contexts}) == 1
    assert pair.runtime._contexts._scratch.numel() == (size + 256 if size else 0)


@pytest.mark.parametrize(("batch_size", "most_rare"), [(1, 5), (4, 8), (32, 24)])
def test_usual_text_takes_one_pair_of_graphs_whatever_its_words_are(batch_size: int, most_rare: int) -> None:
    """Rows of a cluster are padded to 5 of 5 targets, 8 of 20 and 24 of 160."""
    pair = make_pair(batch=(1, 32))
    ids = torch.zeros((batch_size, TGT_LEN), dtype=torch.int64)
    ours, theirs = Session(pair.eager, batch_size), Session(pair.runtime, batch_size)
    generator = torch.Generator().manual_seed(0)
    for number in range(20):
        words = ids.clone().view(-1)
        rare = torch.randperm(words.numel(), generator=generator)[: number * most_rare // 19]
        words[rare] = torch.randint(5, 20, (len(rare),), generator=generator)
        words = words.view_as(ids)
        torch.testing.assert_close(theirs.step(words, words), ours.step(words, words), atol=1e-5, rtol=1e-5)
    assert (pair.launcher.captured, pair.launcher.enqueued, pair.launcher.replayed) == (2, 5, 15)


def test_more_rare_words_than_usual_take_a_graph_of_their_own() -> None:
    pair = make_pair()
    session = Session(pair.runtime, 6)
    for word in (0, 6) * 12:
        ids = torch.full((6, TGT_LEN), word)
        session.step(ids, ids)
    assert {shapes[1] for shapes in pair.runtime._contexts._own} == {8, 6 * TGT_LEN}
    assert pair.launcher.replayed > 0


def test_a_memory_stays_valid_until_the_step_after_the_next_one() -> None:
    pair = make_pair()
    segments = pair.segments(2, 3)
    first = pair.runtime.step(*segments[0], pair.runtime.initial_memory(2))
    before = [tensor.clone() for tensor in (first.nll_BT, first.memory.length_B, *first.memory.states)]
    second = pair.runtime.step(*segments[1], first.memory)
    assert all(torch.equal(a, b) for a, b in zip(before, (first.nll_BT, first.memory.length_B, *first.memory.states)))
    pair.runtime.step(*segments[2], second.memory)
    with pytest.raises(UsageError, match=r"(?s)overwritten.*Clone"):
        pair.runtime.step(*segments[1], first.memory)


def test_a_memory_that_was_cloned_can_be_used_again() -> None:
    pair = make_pair()
    segments = pair.segments(2, 4)
    memory = pair.runtime.step(*segments[0], pair.runtime.initial_memory(2)).memory
    kept = Memory([state.clone() for state in memory.states], memory.length_B.clone())
    first = pair.runtime.step(*segments[1], memory).nll_BT.clone()
    pair.runtime.step(*segments[2], kept)
    assert torch.equal(pair.runtime.step(*segments[1], kept).nll_BT, first)


def test_two_continuations_of_one_memory_go_on_side_by_side() -> None:
    pair = make_pair()
    segments = pair.segments(2, 4)
    memory = pair.runtime.step(*segments[0], pair.runtime.initial_memory(2)).memory
    expected = pair.eager.step(*segments[0], pair.eager.initial_memory(2)).memory
    branches = [pair.runtime.step(*segments[i], memory).memory for i in (1, 2)]
    theirs = [pair.eager.step(*segments[i], expected).memory for i in (1, 2)]
    for i in (3, 1, 2, 0):
        results = [pair.runtime.step(*segments[i], branch) for branch in branches]
        references = [pair.eager.step(*segments[i], branch) for branch in theirs]
        for result, reference in zip(results, references):
            torch.testing.assert_close(result.nll_BT, reference.nll_BT, atol=1e-5, rtol=1e-5)
        branches, theirs = [result.memory for result in results], [reference.memory for reference in references]


def test_buffers_go_when_the_memory_goes() -> None:
    pair = make_pair()
    segments = pair.segments(2, 3)
    for _ in range(3):
        session = Session(pair.runtime, 2)
        for segment in segments:
            session.step(*segment)
    assert len(pair.runtime._known) == 1
    del session
    assert len(pair.runtime._known) == 0


def test_every_output_begins_where_tensorrt_takes_it() -> None:
    pair = make_pair(small_config(cutoffs=(5, 9), d_head=3, mem_len=7))
    session = Session(pair.runtime, 3)
    session.step(*pair.segments(3, 1)[0])
    context = pair.engine.contexts[0]
    outputs = [context.addresses[spec.name] for spec in pair.engine.signature.outputs]
    assert all((address - outputs[0]) % tensorrt.ALIGNMENT == 0 for address in outputs)
    assert len(set(outputs)) == len(outputs)


def test_a_head_is_asked_only_for_what_it_yields() -> None:
    pair = make_pair(head="logits")
    ids = torch.zeros((1, TGT_LEN), dtype=torch.int64)
    with pytest.raises(HeadError):
        pair.runtime.step(ids, ids, pair.runtime.initial_memory(1))


def test_an_engine_of_fp16_that_multiplies_in_fp32_is_found_out() -> None:
    model = build_model(small_config())
    info = dataclasses.replace(
        EagerRuntime(model, tgt_len=TGT_LEN, dtype="fp16").info, name="trt", device="cuda:0", max_batch=2, origin="engines/a", readback={}
    )
    engine = HostEngine(model, info, products="float32")
    found = TensorRTRuntime(engine, dataclasses.replace(info, device="cpu"), launcher=HostLauncher()).info  # type: ignore[arg-type]
    assert found.compute == "fp32"
    assert found.readback == {"products": {"float32": 2}, "layers": {"float32": 3}}
    with pytest.raises(ValidationError, match="engines/a is not what it claims to be: its products are computed in fp32 instead of fp16"):
        claims.audit(dataclasses.replace(found, device="cuda:0"))


def test_kernels_are_kept_when_shapes_are_met_first_and_not_again() -> None:
    kept: list[bytes] = []
    model = build_model(small_config())
    info = dataclasses.replace(EagerRuntime(model, tgt_len=TGT_LEN, head="logits").info, max_batch=4)
    runtime = TensorRTRuntime(HostEngine(model, info), info, launcher=HostLauncher(), keep=kept.append)  # type: ignore[arg-type]
    for B in (1, 2, 1):
        session = Session(runtime, B)
        for _ in range(4):
            session.next_token(torch.zeros((B, TGT_LEN), dtype=torch.int64))
    assert len(kept) == 2


def test_a_cache_of_kernels_gives_back_what_was_kept_and_nothing_that_was_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TXL_CACHE_DIR", str(tmp_path))
    gpu = Gpu(index=0, name="T4", compute_capability="7.5", memory_bytes=1, cuda="13.0", driver="580.1")
    cache = KernelCache.of("a" * 64, gpu)
    assert cache.load() is None
    cache.save(b"kernels")
    assert KernelCache.of("a" * 64, gpu).load() == b"kernels"
    assert KernelCache.of("a" * 64, dataclasses.replace(gpu, driver="580.2")).load() is None
    assert KernelCache.of("b" * 64, gpu).load() is None
    cache.path.write_bytes(cache.path.read_bytes()[:-1] + b"z")
    assert cache.load() is None


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    KernelCache(tmp_path / "file" / "kernels").save(b"kernels")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"memory": "hidden"}, "mems.0"),
        ({"memory_dtype": "fp16"}, "past_key_values.0.key"),
        ({"tgt_len": 4}, "input_ids"),
        ({"head": "logits"}, "nll"),
    ],
    ids=["memory", "memory type", "length", "head"],
)
def test_an_engine_with_another_interface_than_its_manifest_is_refused_with_4(changed: dict[str, Any], said: str) -> None:
    model = build_model(small_config())
    info = dataclasses.replace(EagerRuntime(model, tgt_len=TGT_LEN).info, max_batch=2)
    other = dataclasses.replace(info, **changed)
    with pytest.raises(ArtifactError, match="other inputs or outputs than its manifest says") as caught:
        TensorRTRuntime(HostEngine(model, other), info, launcher=HostLauncher())  # type: ignore[arg-type]
    assert said in caught.value.message
    assert caught.value.exit_code == 4


def test_an_engine_for_fewer_streams_than_its_manifest_says_is_refused() -> None:
    model = build_model(small_config())
    info = dataclasses.replace(EagerRuntime(model, tgt_len=TGT_LEN).info, max_batch=8)
    engine = HostEngine(model, dataclasses.replace(info, max_batch=4))
    with pytest.raises(ArtifactError, match="takes 1 to 4 streams, but its manifest says 1 to 8"):
        TensorRTRuntime(engine, info, launcher=HostLauncher())  # type: ignore[arg-type]


@pytest.mark.parametrize("limit", [1, 5, 64, 2048])
def test_a_bucket_holds_its_rows_and_little_more(limit: int) -> None:
    sizes = [bucket(count, limit) for count in range(limit + 1)]
    assert all(count <= size <= limit for count, size in enumerate(sizes))
    assert sizes[0] >= 1
    assert all(size <= max(8, 1.5 * count) for count, size in enumerate(sizes))
    assert sizes == sorted(sizes)
    assert len(set(sizes)) <= 18


@pytest.mark.parametrize("n_targets", [1, 5, 64, 2048])
def test_rows_are_padded_to_the_usual_share_and_beyond_it_to_their_bucket(n_targets: int) -> None:
    least = bucket(n_targets // 8, n_targets)
    lengths = [padded_length(count, n_targets) for count in range(n_targets + 1)]
    assert lengths == [max(least, bucket(count, n_targets)) for count in range(n_targets + 1)]
    assert lengths[: n_targets // 8 + 1] == [least] * (n_targets // 8 + 1)
    assert all(1 <= length <= n_targets for length in lengths)


class GraphOfNothing:
    """A `torch.cuda.CUDAGraph` that writes down what is called."""

    def __init__(self, calls: list[Any], broken: bool) -> None:
        self.calls, self.broken = calls, broken

    def capture_begin(self, **options: Any) -> None:
        self.calls.append(("begin", options))

    def capture_end(self) -> None:
        self.calls.append("end")
        if self.broken:
            raise RuntimeError("capture was invalidated")

    def replay(self) -> None:
        self.calls.append("replay")


class StreamedContext:
    """A context that writes down when it runs, and fails where it should."""

    def __init__(self, calls: list[Any], error: Exception | None = None) -> None:
        self.calls, self.error = calls, error

    def is_capturable(self, stream: int) -> bool:
        return True

    def enqueue(self, stream: int) -> None:
        self.calls.append(stream)
        if self.error is not None:
            raise self.error


def cuda_launcher(calls: list[Any], monkeypatch: pytest.MonkeyPatch, *, broken: bool = False) -> CudaLauncher:
    """Return the launcher on a machine whose CUDA writes down what is called, and must neither wait nor free memory."""

    @contextlib.contextmanager
    def current(stream: Any) -> Iterator[None]:
        calls.append("on the stream")
        yield
        calls.append("off the stream")

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("called while a step may be timed")

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: SimpleNamespace(cuda_stream=7))
    monkeypatch.setattr(torch.cuda, "stream", current)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: GraphOfNothing(calls, broken))
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, never)
    monkeypatch.setattr(gc, "collect", never)
    return CudaLauncher("cuda:0")


CAPTURE = ["on the stream", ("begin", {"capture_error_mode": "thread_local"}), 7, "end"]


def test_a_graph_is_captured_on_the_launchers_stream_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    replay = cuda_launcher(calls, monkeypatch).capture(StreamedContext(calls))  # type: ignore[arg-type]
    assert calls == [*CAPTURE, "off the stream"]
    replay()
    assert calls[-1] == "replay"


@pytest.mark.parametrize("broken", [False, True])
@pytest.mark.parametrize("error", [RuntimeError("cannot be enqueued"), EnvironmentUnfitError("could not run a step")])
def test_a_step_that_fails_while_it_is_captured_ends_the_capture(broken: bool, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    launcher = cuda_launcher(calls, monkeypatch, broken=broken)
    with pytest.raises(type(error)) as caught:
        launcher.capture(StreamedContext(calls, error))  # type: ignore[arg-type]
    assert caught.value is error
    assert calls == CAPTURE


def test_a_capture_that_does_not_end_well_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    launcher = cuda_launcher(calls, monkeypatch, broken=True)
    with pytest.raises(RuntimeError, match="capture was invalidated"):
        launcher.capture(StreamedContext(calls))  # type: ignore[arg-type]
    assert calls == CAPTURE


class HostApi:
    """An adapter over no package, whose engines compute with PyTorch."""

    name = "TensorRT-RTX 1.7.1.116"
    package = "tensorrt_rtx"

    def __init__(self, checkpoint: Path, info: RuntimeInfo, version: str) -> None:
        self.version = version
        self.engine = HostEngine(load_model(checkpoint)[0], info)
        self.opened: list[tuple[bytes, bytes | None]] = []

    def open_engine(self, plan: bytes, runtime_cache: bytes | None = None) -> HostEngine:
        self.opened.append((plan, runtime_cache))
        return self.engine


@pytest.fixture
def host_api(exports: Exports, t4_engine: Path, monkeypatch: pytest.MonkeyPatch) -> HostApi:
    """Let the engine for a T4 be opened here."""
    info = eager_from_checkpoint(exports.checkpoint, dtype="fp16")[0].info
    assert read_manifest(t4_engine).engine is not None
    api = HostApi(exports.checkpoint, dataclasses.replace(info, max_batch=32), "1.7.1.116")
    gpu = Gpu(index=0, name="Tesla T4", compute_capability="7.5", memory_bytes=1, cuda="13.0", driver="580.1")
    monkeypatch.setattr(tensorrt, "check_fits", lambda *_, **__: gpu)
    monkeypatch.setattr(tensorrt, "find", lambda package: api)
    monkeypatch.setattr(tensorrt, "CudaLauncher", lambda device: HostLauncher())
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    return api


def test_an_artifact_opens_as_what_it_is_and_keeps_its_kernels(
    exports: Exports, t4_engine: Path, host_api: HostApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TXL_CACHE_DIR", str(tmp_path))
    runtime = open_artifact(t4_engine)
    info = runtime.info
    assert (info.name, info.provider, info.compute, info.min_batch, info.max_batch) == ("trt-rtx", host_api.name, "fp16", 1, 32)
    assert info.readback == {
        "package": "tensorrt_rtx",
        "version": "1.7.1.116",
        "gpu": "Tesla T4",
        "products": {"float16": 2},
        "layers": {"float16": 2, "float32": 1},
    }
    reference = eager_from_checkpoint(exports.checkpoint)[0]
    parity = compare(reference, runtime, random_segments(info.config, tgt_len=info.tgt_len))
    assert parity.passed, parity.reason
    open_artifact(t4_engine)
    plan = (t4_engine / "model.plan").read_bytes()
    assert [(content == plan, kernels is None) for content, kernels in host_api.opened] == [(True, True), (True, False)]


def test_a_package_that_is_not_the_version_of_its_metadata_does_not_see_the_engine(t4_engine: Path, host_api: HostApi) -> None:
    host_api.version = "1.6.0.10"
    with pytest.raises(EnvironmentUnfitError, match=r"built by TensorRT-RTX 1\.7\.1\.116.*but 1\.6\.0\.10 is installed") as caught:
        open_artifact(t4_engine)
    assert "pip install tensorrt-rtx==1.7.1.116" in str(caught.value.remedy)
    assert host_api.opened == []


def test_the_layers_of_an_engine_are_listed_on_its_gpu(
    exports: Exports, t4_engine: Path, host_api: HostApi, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(t4_engine), "--layers"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[lines.index("layers:") + 1].split()
    assert main(["inspect", str(exports.onnx), "--layers"]) == 2
    assert "is no engine" in capsys.readouterr().err


def test_without_a_gpu_no_layers_are_listed(t4_engine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("txl_deploy.trt.cuda.devices", list)
    assert main(["inspect", str(t4_engine), "--layers"]) == 3
    assert "no NVIDIA GPU" in capsys.readouterr().err


@pytest.mark.parametrize("change", ["another byte", "not listed"])
def test_an_engine_that_changes_after_it_was_verified_is_refused_before_it_is_opened(
    change: str, t4_engine: Path, host_api: HostApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = Path(shutil.copytree(t4_engine, tmp_path / "engine"))
    manifest = read_manifest(copied)
    if change == "another byte":
        plan = bytearray((copied / "model.plan").read_bytes())
        plan[-1] ^= 1
        (copied / "model.plan").write_bytes(plan)
    else:
        manifest = dataclasses.replace(manifest, files={name: file for name, file in manifest.files.items() if name != "model.plan"})

    def loaded(package: str) -> None:
        raise AssertionError("the package was loaded")

    monkeypatch.setattr(tensorrt, "find", loaded)
    with pytest.raises(ManifestError, match=r"model\.plan of .* was changed: its sha256 is") as caught:
        tensorrt.open_engine(copied, dataclasses.replace(host_api.engine.info, origin="engines/a"), manifest)
    assert caught.value.exit_code == 4
    assert host_api.opened == []


@pytest.mark.gpu
@pytest.mark.parametrize("head", ["nll", "logits"])
def test_a_real_engine_equals_eager_and_replays_cuda_graphs(exports: Exports, tmp_path: Path, head: Any) -> None:
    pytest.importorskip("tensorrt_rtx")
    gpus = cuda.devices()
    if not gpus or float(gpus[0].compute_capability) < 8:
        pytest.skip("needs a GPU of compute capability 8.0 or newer: the engine is for no GPU in particular")
    from txl_deploy.export.artifact import ExportRequest
    from txl_deploy.trt.artifact import EngineRequest, export_engine

    checkpoint = ExportRequest(checkpoint=exports.checkpoint, out=tmp_path / "e", format="onnx", dtype="fp16", head=head, data=exports.data)
    batch = BatchRange(min=1, opt=2, max=4)
    request = EngineRequest(graph=None, checkpoint=checkpoint, out=tmp_path / "e", batch=batch, target="portable", rtx_only=True)
    result = export_engine(request)
    assert result.parity is not None, result.not_compared
    runtime = open_artifact(tmp_path / "e", device="cuda:0")
    assert isinstance(runtime, TensorRTRuntime)
    reference = eager_from_checkpoint(exports.checkpoint, head=head)[0]
    for streams in (1, 3):
        segments = random_segments(runtime.info.config, tgt_len=TGT_LEN, n_segments=30, batch_size=streams)
        parity = compare(reference, runtime, segments, tolerance=tolerance_for("fp16", head))
        assert parity.passed, parity.reason
    assert runtime._can_capture
    assert any(own.graphs for own in runtime._contexts._own.values())
