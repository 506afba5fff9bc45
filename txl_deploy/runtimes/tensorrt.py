"""TensorRT and TensorRT-RTX: an engine on a GPU. Knows shapes, buffers and CUDA graphs; the packages themselves are `trt.api`'s.

The memory never leaves the device. A step reads one set of buffers and writes another, and the set that the memory before was in is
written next, so two sets take turns for each sequence of segments, and any number of sequences may take turns on one engine.

Tail clusters' `target_rows` are padded to what is usual for the number of streams or, of a batch with more of them, to the next of a few
lengths: with usual text all batches of one size have the same shapes. Shapes that return get an execution context of their own and, for
each pair of sets, a CUDA graph: captured once and replayed from then on, which is right because tokens are copied to the same place
before every step. Where capturing fails, the step is enqueued as usual and the log says so once. All contexts share one piece of
scratch memory, since the steps of a runtime run one after the other on one stream.
"""

# Shape suffixes: B batch, T tgt_len, Q ext_len + tgt_len, R target rows of a cluster, V vocabulary

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from txl_deploy import manifest as manifests
from txl_deploy.claims import FLOATS, compute_type
from txl_deploy.manifest import Manifest
from txl_deploy.runtimes.base import RuntimeInfo
from txl_deploy.runtimes.graph import GraphRuntime
from txl_deploy.signature import Signature, TensorSpec, step_signature
from txl_deploy.trt.api import Api, ContextHandle, EngineHandle, find
from txl_deploy.trt.cuda import Gpu
from txl_deploy.trt.inspect import describe_engine, engine_precisions
from txl_deploy.trt.refusals import PLAN_FILE, check_fits, check_version
from txl_train.data.idcache import default_cache_dir
from txl_train.errors import ArtifactError, ManifestError, TxlError, UsageError
from txl_train.files import whole_or_absent
from txl_train.model.memory import Memory

log = logging.getLogger(__name__)

ALIGNMENT = 256
"""What TensorRT asks of an address, bytes."""
MAX_CONTEXTS = 16
"""Recurring shapes with a context of their own at most."""
MAX_GRAPHS = 8
"""CUDA graphs of one context at most: each pair of buffer sets has one, and a sequence of segments has two pairs."""
IDLE_STEPS = 64
"""Steps without use after which shapes may lose their context to others."""

USUAL_SHARE = 8
"""A tail cluster's rows are padded to at least one in so many targets: the share that engines are tuned for (`trt.profiles`), which a
cluster of rarer words seldom exceeds, so that the length depends on the number of streams alone."""

_SMALLEST_BUCKET = 8
_TORCH_TYPES = {"int64": torch.int64, "float32": torch.float32, "float16": torch.float16}


def bucket(count: int, limit: int) -> int:
    """Return the length that a list of `count` rows is padded to: 8, 12, 16, 24, 32, 48 and so on, at most `limit`, at least 1.

    Half an octave apart, so that no more than a third of more than 8 rows is padding, and counts that differ little share a length.
    """
    size = _SMALLEST_BUCKET
    while size < count:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return max(1, min(size, limit))


def padded_length(count: int, n_targets: int) -> int:
    """Return the length that a tail cluster's `count` rows are padded to in a batch of `n_targets`: 1 to `n_targets`.

    The bucket of the usual share, or that of `count` where it is larger.
    """
    return max(bucket(count, n_targets), bucket(n_targets // USUAL_SHARE, n_targets))


class Launcher(Protocol):
    """Gives work to a device."""

    def turn(self) -> AbstractContextManager[None]:
        """Do what the body does after what the caller has given to the device before, and before what it gives after."""
        ...

    def enqueue(self, context: ContextHandle) -> None:
        """Run the engine once."""
        ...

    def capture(self, context: ContextHandle) -> Callable[[], None]:
        """Return what runs the engine once more, with the addresses and shapes of now.

        Raises `RuntimeError`, or what `enqueue` raises, where that cannot be.
        """
        ...


class CudaLauncher:
    """A CUDA stream of its own: TensorRT synchronises more than needed on the default one."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Wait for the caller's stream, and let it wait."""
        callers = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(callers)
        with torch.cuda.stream(self._stream):
            yield
        callers.wait_stream(self._stream)

    def enqueue(self, context: ContextHandle) -> None:
        """Run on the stream."""
        context.enqueue(self._stream.cuda_stream)

    def capture(self, context: ContextHandle) -> Callable[[], None]:
        """Capture a CUDA graph, without the waiting and the freeing of memory of `torch.cuda.graph`: steps may be timed."""
        if not context.is_capturable(self._stream.cuda_stream):
            raise RuntimeError("the engine says that a step of these shapes cannot be captured")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream):
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                context.enqueue(self._stream.cuda_stream)
            except BaseException:
                with contextlib.suppress(RuntimeError):  # ends the capture, but says again that it went wrong
                    graph.capture_end()
                raise
            graph.capture_end()  # where it raises, the capture has ended too
        return graph.replay


def open_engine(directory: Path, info: RuntimeInfo, manifest: Manifest) -> TensorRTRuntime:
    """Open the engine of an artifact. The bytes that are opened are those whose checksum is compared, whatever was checked before.

    Raises:
        ManifestError: the engine was changed; nothing native was loaded.
        UsageError, EnvironmentUnfitError: this machine is not what the engine was built for (`trt.refusals`); nothing native was loaded.
        ArtifactError: it is not the engine that its manifest describes.
    """
    gpu, api, plan, plan_sha256 = _checked(directory, manifest, device=info.device, origin=info.origin)
    cache = KernelCache.of(plan_sha256, gpu) if api.package == "tensorrt_rtx" else None
    with torch.cuda.device(info.device):
        engine = api.open_engine(plan, None if cache is None else cache.load())
        readback = {"package": api.package, "version": api.version, "gpu": gpu.name}
        described = dataclasses.replace(info, provider=api.name, readback=readback)
        return TensorRTRuntime(engine, described, keep=None if cache is None else cache.save)


def layers_of(directory: Path) -> list[str]:
    """Return a line for each layer of the engine in an artifact, as the package's inspector tells them on its GPU.

    Raises what `open_engine` raises, and `ManifestError` where the artifact is not what its manifest says.
    """
    manifest = manifests.read_verified(directory)
    _, api, plan, _ = _checked(directory, manifest, device="cuda:0", origin=str(directory))
    return describe_engine(api.open_engine(plan).inspect())


def _checked(directory: Path, manifest: Manifest, *, device: str, origin: str) -> tuple[Gpu, Api, bytes, str]:
    """Return the GPU, the package, the plan and its checksum, after everything that is refused before a native loader sees the plan."""
    gpu = check_fits(manifest, device=device, origin=origin)
    assert manifest.engine is not None  # or it was refused
    facts = manifest.engine
    plan = manifests.artifact_file(directory, PLAN_FILE).read_bytes()
    actual, record = hashlib.sha256(plan).hexdigest(), manifest.files.get(PLAN_FILE)
    if record is None or actual != record.sha256:
        expected = "absent from its manifest" if record is None else f"not {record.sha256[:12]}…"
        raise ManifestError(
            f"{PLAN_FILE} of {origin or directory} was changed: its sha256 is {actual[:12]}…, {expected}.",
            remedy="Export it again with `txl export`, or copy it again.",
        )
    api = find(facts.builder)
    check_version(facts, api.version, origin=origin)
    return gpu, api, plan, actual


class TensorRTRuntime(GraphRuntime):
    """One engine with its buffers."""

    def __init__(
        self,
        engine: EngineHandle,
        info: RuntimeInfo,
        *,
        launcher: Launcher | None = None,
        keep: Callable[[bytes], None] | None = None,
    ) -> None:
        """Take an engine that was opened on `info.device`.

        Args:
            info: as the manifest has it; what the engine is found to be is read back into it.
            launcher: what runs it; None means a CUDA stream.
            keep: is given the kernels that TensorRT-RTX has compiled whenever there may be more of them.

        Raises:
            ArtifactError: the engine has other inputs, outputs or shapes than its manifest says.
        """
        readback = {**info.readback, **read_back(engine)}
        super().__init__(dataclasses.replace(info, compute=compute_type(readback["products"]), readback=readback))
        self._engine = engine
        self._device = torch.device(info.device)
        fixed = info.max_batch if info.max_batch == info.min_batch else None
        self._signature = step_signature(
            info.config,
            tgt_len=info.tgt_len,
            memory=info.memory,
            head=info.head,
            memory_dtype=info.memory_dtype,
            batch=fixed,
            served=info.served,
        )
        _check_engine(engine, self._signature, info)
        self._n_rows = info.config.n_cluster if info.head == "nll" and not info.served else 0
        self._launcher: Launcher = CudaLauncher(info.device) if launcher is None else launcher
        self._tokens: dict[int, _Tokens] = {}
        self._known = WeakTensorKeyDictionary()
        with self._launcher.turn():
            self._contexts = _Contexts(engine, self._device)
        self._can_capture = True
        self._keep = keep

    def run(self, input_ids_BQ: Tensor, target_ids_BT: Tensor | None, rows: list[Tensor], memory: Memory) -> tuple[Tensor, Memory]:
        """Copy the tokens to their place, and let the engine go from one set of buffers to the other."""
        B = input_ids_BQ.shape[0]
        with torch.inference_mode(), self._launcher.turn():
            if B not in self._tokens:
                self._tokens[B] = _Tokens(self._signature, self._n_rows, B, self._device)
            tokens = self._tokens[B]
            source = self._buffers_of(memory, B)
            target = self._next_buffers(source, B)
            targets = [] if target_ids_BT is None else [target_ids_BT]
            sizes = tokens.fill([input_ids_BQ, *targets], rows[: self._n_rows], memory.length_B)
            self._execute((B, *sizes), tokens, source, target)
        result, length_BX, *states = target.tensors
        states[0] = states[0].view_as(states[0])  # an object for this memory alone, by which it is known
        self._known[states[0]] = (target, target.written)
        return result, Memory(states, length_BX.view(B))

    def _buffers_of(self, memory: Memory, B: int) -> _Buffers:
        """Return the set that a memory is in: that of the step which made it, or a new one with a copy of what came from elsewhere."""
        known: tuple[_Buffers, int] | None = self._known.get(memory.states[0])  # type: ignore[no-untyped-call]
        if known is not None and all(ours is theirs for ours, theirs in zip(known[0].states[1:], memory.states[1:])):
            buffers, written = known
            if buffers.written != written:
                raise UsageError(
                    "This memory has been overwritten: it was valid until the step after the next one that continued it.",
                    remedy="Clone the tensors of a memory that is kept for longer.",
                )
            return buffers
        buffers = _Buffers(self._signature, B, self._device)
        for place, state in zip(buffers.states, memory.states):
            place.copy_(state)
        return buffers

    def _next_buffers(self, source: _Buffers, B: int) -> _Buffers:
        """Return the set to write: that of the memory before the one in `source`, unless it is in use again, or a new one."""
        previous, source.previous = source.previous, None
        target: _Buffers | None = None
        if previous is not None:
            candidate, written = previous
            if candidate.written == written:
                target = candidate
        if target is None:
            target = _Buffers(self._signature, B, self._device)
        target.written += 1
        target.previous = (source, source.written)
        return target

    def _execute(self, shapes: tuple[int, ...], tokens: _Tokens, source: _Buffers, target: _Buffers) -> None:
        own = self._contexts.of(shapes)
        places = (source.address, target.address)
        if own is not None and places in own.graphs:
            own.graphs.move_to_end(places)
            own.graphs[places]()
            return
        context = self._contexts.general if own is None else own.context
        for spec, tensor in zip(self._signature.inputs, (*tokens.given(shapes[1:]), *source.states), strict=True):
            context.set_shape(spec.name, tuple(tensor.shape))
            context.set_address(spec.name, tensor.data_ptr() or source.address)  # an empty tensor lies nowhere, which no engine takes
        for spec, tensor in zip(self._signature.outputs, target.tensors, strict=True):
            context.set_address(spec.name, tensor.data_ptr() or target.address)
        missing = context.infer_missing()
        assert not missing, f"the engine's shapes depend on {missing}"
        self._launcher.enqueue(context)
        if own is None:
            self._keep_kernels()
        elif self._can_capture:
            self._capture(own, places)

    def _keep_kernels(self) -> None:
        """Hand over what was compiled for shapes that were not met before."""
        if self._keep is not None and self._contexts.are_new:
            cache = self._engine.runtime_cache()
            if cache:
                self._keep(cache)

    def _capture(self, own: _Context, places: tuple[int, int]) -> None:
        """Keep a CUDA graph of what was just enqueued, if it was not for the first time."""
        if places not in own.seen:
            own.seen.add(places)
            return
        try:
            own.graphs[places] = self._launcher.capture(own.context)
        except (RuntimeError, TxlError) as error:
            self._can_capture = False
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            log.warning("CUDA graphs cannot be captured here, so every step is enqueued: %s", reason)
            return
        if len(own.graphs) > MAX_GRAPHS:
            own.graphs.popitem(last=False)


def read_back(engine: EngineHandle) -> dict[str, dict[str, int]]:
    """Return the matrix products and the layers of an engine by their type, as `claims` judges them; what it does not tell is left out."""
    found = engine_precisions(engine.inspect())
    return {
        "products": {name: count for name, count in sorted(found.products.items()) if name in FLOATS},
        "layers": dict(sorted(found.layers.items())),
    }


@dataclasses.dataclass(frozen=True)
class KernelCache:
    """Kernels that TensorRT-RTX has compiled for an engine on one GPU, kept in the user's cache folder from one process to the next."""

    path: Path

    @classmethod
    def of(cls, plan_sha256: str, gpu: Gpu) -> KernelCache:
        """Return the place for an engine on a GPU with its driver."""
        key = hashlib.sha256(f"{plan_sha256} {gpu.name} {gpu.compute_capability} {gpu.driver}".encode()).hexdigest()
        return cls(default_cache_dir() / "trt-rtx" / f"{key}.kernels")

    def load(self) -> bytes | None:
        """Return what was kept; None where there is nothing, or where a byte of it has changed."""
        try:
            content = self.path.read_bytes()
        except OSError:
            return None
        checksum, kernels = content[:32], content[32:]
        return kernels if hashlib.sha256(kernels).digest() == checksum else None

    def save(self, kernels: bytes) -> None:
        """Keep kernels instead of those there are. A folder that cannot be written is no reason to end: they are compiled again."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with whole_or_absent(self.path) as file:
                file.write(hashlib.sha256(kernels).digest() + kernels)
        except (OSError, TxlError) as error:
            log.debug("Compiled kernels cannot be kept in %s: %s", self.path, error)


class _Tokens:
    """Where the tokens of a step of B streams lie: always at the same addresses."""

    def __init__(self, signature: Signature, n_rows: int, B: int, device: torch.device) -> None:
        specs = {spec.name: spec for spec in signature.inputs}
        names = [name for name in ("input_ids", "target_ids") if name in specs]
        self._ids = [torch.zeros(_shape(specs[name], B), dtype=torch.int64, device=device) for name in names]
        self._padding = B * int(specs["input_ids"].axes[1]) if n_rows == 0 else self._ids[1].numel()
        # apart, so that each begins at an address that TensorRT takes
        self._rows = [torch.full((self._padding,), self._padding, dtype=torch.int64, device=device) for _ in range(n_rows)]
        self._length_BX = torch.zeros(_shape(specs["memory_length"], B), dtype=torch.int64, device=device)

    def fill(self, ids: Sequence[Tensor], rows: Sequence[Tensor], length_B: Tensor) -> list[int]:
        """Copy tokens, rows and valid lengths to their place; return the padded number of rows of each cluster."""
        for place, tensor in zip(self._ids, ids, strict=True):
            place.copy_(tensor)
        self._length_BX.copy_(length_B.view_as(self._length_BX))
        sizes = []
        for place_R, rows_R in zip(self._rows, rows, strict=True):
            count = rows_R.shape[0]
            size = padded_length(count, self._padding)
            place_R[:count].copy_(rows_R)
            place_R[count:size].fill_(self._padding)
            sizes.append(size)
        return sizes

    def given(self, sizes: Sequence[int]) -> list[Tensor]:
        """Return the inputs before the states, in the order of the call."""
        return [*self._ids, *(place_R[:size] for place_R, size in zip(self._rows, sizes, strict=True)), self._length_BX]


class _Buffers:
    """Everything that a step of B streams writes, in one piece of the device's memory."""

    def __init__(self, signature: Signature, B: int, device: torch.device) -> None:
        specs = signature.outputs
        shapes = [_shape(spec, B) for spec in specs]
        types = [_TORCH_TYPES[spec.dtype] for spec in specs]
        sizes = [torch.Size(shape).numel() * dtype.itemsize for shape, dtype in zip(shapes, types)]
        starts = [0]
        for size in sizes:
            starts.append(starts[-1] + max(1, -(-size // ALIGNMENT)) * ALIGNMENT)
        slab = torch.empty(starts[-1], dtype=torch.uint8, device=device)
        self.address = slab.data_ptr()
        """Where it begins."""
        self.tensors = [
            slab[start : start + size].view(dtype).view(shape) for start, size, dtype, shape in zip(starts, sizes, types, shapes)
        ]
        """The outputs in the order of the call: the head's, the valid lengths, the states."""
        self.written = 0
        """How many steps have written here."""
        self.previous: tuple[_Buffers, int] | None = None
        """The set that what lies here was computed from, and its `written` then."""

    @property
    def states(self) -> list[Tensor]:
        """The states of all layers."""
        return self.tensors[2:]


@dataclasses.dataclass
class _Context:
    """An execution context for one set of shapes: a CUDA graph stays right only while its context keeps them."""

    context: ContextHandle
    graphs: OrderedDict[tuple[int, int], Callable[[], None]] = dataclasses.field(default_factory=OrderedDict)
    """By the addresses of the sets that are read and written."""
    seen: set[tuple[int, int]] = dataclasses.field(default_factory=set)
    used: int = 0
    """The step that used it last."""


class _Contexts:
    """One execution context for all shapes, and one for each that returns, up to `MAX_CONTEXTS`; with the scratch memory of all."""

    def __init__(self, engine: EngineHandle, device: torch.device) -> None:
        self._engine = engine
        size = engine.device_memory_bytes
        self._scratch = torch.empty(size + ALIGNMENT if size > 0 else 0, dtype=torch.uint8, device=device)
        self._scratch_bytes = size
        self._own: OrderedDict[tuple[int, ...], _Context] = OrderedDict()
        self._met: OrderedDict[tuple[int, ...], None] = OrderedDict()
        self._steps = 0
        self.general = self._new()
        self.are_new = False
        """The shapes of the last step were not met before."""

    def of(self, shapes: tuple[int, ...]) -> _Context | None:
        """Count a step, and return the context of these shapes alone; None means the general one."""
        self._steps += 1
        own = self._own.get(shapes)
        self.are_new = own is None and shapes not in self._met
        if own is None:
            if self.are_new:
                self._met[shapes] = None
                if len(self._met) > 64 * MAX_CONTEXTS:
                    self._met.popitem(last=False)
                return None
            if len(self._own) >= MAX_CONTEXTS:
                oldest = next(iter(self._own))
                if self._own[oldest].used > self._steps - IDLE_STEPS:
                    return None
                del self._own[oldest]
            own = self._own[shapes] = _Context(self._new())
        own.used = self._steps
        self._own.move_to_end(shapes)
        return own

    def _new(self) -> ContextHandle:
        aligned = -(-self._scratch.data_ptr() // ALIGNMENT) * ALIGNMENT
        return self._engine.context(aligned, self._scratch_bytes)


def _shape(spec: TensorSpec, B: int) -> tuple[int, ...]:
    """Return the shape of an input or output other than `target_rows` for B streams."""
    return tuple(B if isinstance(axis, str) else axis for axis in spec.axes)


def _check_engine(engine: EngineHandle, signature: Signature, info: RuntimeInfo) -> None:
    """Refuse an engine that is not the one its manifest describes: addresses are given to it by these names and shapes."""
    remedy = "Export it again with `txl export`."
    found = {tensor.name: tensor for tensor in engine.tensors()}
    expected = {spec.name: ("input", spec) for spec in signature.inputs} | {spec.name: ("output", spec) for spec in signature.outputs}
    differing = sorted(found.keys() ^ expected.keys())
    for name, (mode, spec) in expected.items():
        tensor = found.get(name)
        if tensor is not None:
            fits = len(tensor.shape) == len(spec.axes) and all(
                have == -1 if isinstance(axis, str) else have in (axis, -1) for have, axis in zip(tensor.shape, spec.axes)
            )
            if (tensor.mode, tensor.dtype) != (mode, spec.dtype) or not fits:
                differing.append(name)
    if differing:
        raise ArtifactError(
            f"The engine of {info.origin or 'this artifact'} has other inputs or outputs than its manifest says: "
            f"{', '.join(differing[:4])}.",
            remedy=remedy,
        )
    profile = engine.profile_shapes("input_ids")
    low, high = profile.min[0], profile.max[0]
    if low > info.min_batch or info.max_batch is None or high < info.max_batch:
        raise ArtifactError(
            f"The engine of {info.origin or 'this artifact'} takes {low} to {high} streams, but its manifest says "
            f"{info.min_batch} to {info.max_batch}.",
            remedy=remedy,
        )
