"""ONNX Runtime: `model.onnx` on the CPU, or on a GPU where its CUDA provider really runs. The only file that imports onnxruntime.

Inputs are bound where they lie, and states are written into buffers that are used again: the memory that a step has read becomes the
place for what the step after the next one writes. So nothing is copied, and any number of sessions may take turns on one runtime. Each
set of buffers is handed out once only, what came from elsewhere is never written, and a memory that was overwritten is refused.

What really runs is read back from a profile of one step (`_profile`). `session.disable_cpu_ep_fallback` cannot serve for that: it refuses
every graph with a free axis, as the arithmetic on shapes is put on the CPU on purpose. So the provider is asked for alone, and what it
left to others is judged by `claims`.
"""

# Shape suffixes: B batch, T tgt_len

from __future__ import annotations

import dataclasses
import errno
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from txl_deploy.claims import FLOATS, compute_type, stored_matrices
from txl_deploy.runtimes.base import TORCH_TYPES, RuntimeInfo
from txl_deploy.runtimes.graph import GraphRuntime
from txl_deploy.signature import TensorSpec, step_signature
from txl_train.errors import ArtifactError, EnvironmentUnfitError, PackageMissingError, TxlError, UsageError
from txl_train.exhaustion import LOADING, as_unfit
from txl_train.model.int8 import sums_exactly
from txl_train.model.memory import Memory, state_count, state_shape

_INSTALL = "Install it with `pip install 'txl[onnx]'` (or `'txl[onnx-gpu]'` on a GPU)."
_TEMPORARY = "Free some space in the folder for temporary files, or name another one in TMPDIR."
_ELEMENTS: dict[torch.dtype, Any] = {torch.int64: np.int64, torch.float32: np.float32, torch.float16: np.float16}
_PRODUCTS = {"MatMul", "Gemm", "FusedMatMul", "FusedGemm", "FusedMatMulActivation", "GemmFastGelu", "TransposeMatMul"}
_INTEGER_PRODUCTS = {"MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul"}
"""Those of int8 weights; the last two are what onnxruntime fuses a product and the scaling of its result into."""
_PROFILED_TYPES = {"float": "float32", "double": "float64"}
_LENGTHS = ("tgt_len", "mem_len", "ext_len", "clamp_len")
_SETTINGS = (
    *_LENGTHS,
    *("same_length", "same_length_rule", "memory", "dtype", "memory_dtype", "head", "checkpoint_sha256", "vocabulary_sha256"),
)
"""What a graph says of itself, in its metadata under `txl.`."""
_ONNX_TYPES = {"int64": "tensor(int64)", "float32": "tensor(float)", "float16": "tensor(float16)"}


def has_cuda() -> bool:
    """Return whether an onnxruntime with a CUDA provider is installed."""
    try:
        import onnxruntime
    except ImportError:
        return False
    return "CUDAExecutionProvider" in onnxruntime.get_available_providers()


class OnnxRuntime(GraphRuntime):
    """One session of onnxruntime and its bindings."""

    def __init__(self, path: Path, info: RuntimeInfo, *, threads: int | None = None) -> None:
        """Open `path`; `info.device` chooses the provider, and what really runs is read back into `info`."""
        try:
            import onnxruntime
        except ImportError as error:
            raise as_unfit(error, LOADING) or PackageMissingError("onnxruntime is not installed.", remedy=_INSTALL) from error
        on_gpu = info.device.startswith("cuda")
        wanted = "CUDAExecutionProvider" if on_gpu else "CPUExecutionProvider"
        if wanted not in onnxruntime.get_available_providers():
            raise EnvironmentUnfitError(
                f"This onnxruntime has no {wanted}.", remedy="Install the GPU build: `pip install 'txl[onnx-gpu]'`, or use `--device cpu`."
            )
        super().__init__(info)
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
        self._result_len = info.tgt_len if info.head == "nll" else info.config.vocab_size
        self._device = torch.device(info.device)
        self._known = WeakTensorKeyDictionary()
        # TF32 would compute the products of an fp32 graph with 10 bits of mantissa, and is on unless it is turned off
        settings: dict[str, Any] = {"device_id": self._device.index or 0, "use_tf32": 0} if on_gpu else {}

        def start(profile: str | None = None) -> None:
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 3
            if info.dtype == "int8" and may_saturate():  # this takes other products, which are exact and slower: with VNNI by a third
                options.add_session_config_entry("session.x64quantprecision", "1")
            if threads is not None:
                options.intra_op_num_threads = threads
            if profile is not None:
                options.enable_profiling, options.profile_file_prefix = True, profile
                options.add_session_config_entry("session.disable_prepacking", "1")  # not worth it for one step
            # that fusion's kernel divides by the number of tokens: in a stranger's graph that leaves none, it would end this process, while
            # without it such a graph is refused for the shape of its results (ONNX Runtime 1.32)
            left_out = {"SkipLayerNormFusion"} if profile is not None else None
            self._session = onnxruntime.InferenceSession(
                str(path), options, providers=[(wanted, settings)], enable_fallback=0, disabled_optimizers=left_out
            )
            self._binding = self._session.io_binding()

        try:
            # two sessions: one that was profiled keeps some 100 bytes of each later run, and a server would lose a gigabyte in a day
            with tempfile.TemporaryDirectory(prefix="txl-") as folder:
                start(profile=str(Path(folder) / "profile"))
                self._check_provider(wanted)
                self._check_graph(path)
                self._somewhere = torch.zeros(1, device=self._device)
                profile = self._profile()
            del self._session, self._binding
            start()
            self._check_provider(wanted)
            metadata = self._session.get_modelmeta().custom_metadata_map
        except TxlError:
            raise
        except Exception as error:  # onnxruntime's exceptions share no public base class
            if told := as_unfit(error, LOADING, doing=f"when {path} was loaded"):
                raise told from error
            if isinstance(error, OSError):  # none of onnxruntime's own
                raise EnvironmentUnfitError(
                    f"The profile by which {path} is read back cannot be written: {error.strerror or error}.", remedy=_TEMPORARY
                ) from error
            reason = str(error).strip().splitlines()[0]
            if on_gpu:
                raise EnvironmentUnfitError(
                    f"ONNX Runtime cannot run {path} on {info.device}: {reason}", remedy="Run `txl doctor`, or use `--device cpu`."
                ) from error
            raise ArtifactError(
                f"ONNX Runtime cannot load {path}: {reason}", remedy="Export it again with `txl export --format onnx`."
            ) from error
        settings_found = settings_of(metadata)
        readback = {"weights": stored_matrices(path), **_read_back(profile, wanted), "settings": settings_found}
        compute = compute_type(readback["products"])
        if compute == "fp32" and str(self._session.get_provider_options()[wanted].get("use_tf32", "0")).lower() not in ("0", "false"):
            compute = "tf32"
        self._info = dataclasses.replace(info, provider=wanted, compute=compute, waits=True, readback=readback)

    def _check_provider(self, wanted: str) -> None:
        provider = self._session.get_providers()[0]
        if provider != wanted:
            raise EnvironmentUnfitError(
                f"ONNX Runtime fell back to {provider} instead of {wanted}.", remedy="Run `txl doctor` to see what is missing."
            )

    def _profile(self) -> list[Mapping[str, Any]]:
        """Run one step of nothing but zeros and return the events that the session recorded, which then records no more.

        Raises `OSError` where the session could not write them all.
        """
        info = self._info
        B, T = info.min_batch, info.tgt_len
        ids_BQ = torch.zeros((B, info.config.ext_len + T), dtype=torch.int64, device=self._device)
        targets = ids_BQ[:, -T:].contiguous() if info.head == "nll" else None
        rows = [torch.zeros(1, dtype=torch.int64, device=self._device) for _ in range(info.config.n_cluster)]
        self.run(ids_BQ, targets, rows, self.initial_memory(B))
        with open(self._session.end_profiling(), encoding="utf-8") as file:
            try:
                events: list[Mapping[str, Any]] = json.load(file)
            except ValueError as error:  # onnxruntime tells nothing of a disk that is full
                raise OSError(errno.EIO, "only a part of it arrived on the disk") from error
        return events

    def _check_graph(self, path: Path) -> None:
        for specs, found in ((self._signature.inputs, self._session.get_inputs()), (self._signature.outputs, self._session.get_outputs())):
            expected = [(spec.name, _ONNX_TYPES[spec.dtype], list(spec.axes)) for spec in specs]
            if expected != [(argument.name, argument.type, list(argument.shape)) for argument in found]:
                raise ArtifactError(
                    f"The graph in {path} has other inputs or outputs than its manifest says.", remedy="Export it again with `txl export`."
                )

    def run(self, input_ids_BQ: Tensor, target_ids_BT: Tensor | None, rows: list[Tensor], memory: Memory) -> tuple[Tensor, Memory]:
        """Bind everything where it lies, and run the graph."""
        served = self._info.served
        targets = [] if target_ids_BT is None else [target_ids_BT] if served else [target_ids_BT, *rows]
        length_BX = memory.length_B[:, None] if served else memory.length_B
        inputs = [tensor.contiguous() for tensor in (input_ids_BQ, *targets, length_BX, *memory.states)]
        B = input_ids_BQ.shape[0]
        result = torch.empty((B, self._result_len), device=self._device)
        new_length_BX = torch.empty_like(length_BX)
        target = self._next_buffers(self._source(memory), B)
        self._bind(self._binding.bind_input, self._signature.inputs, inputs)
        self._bind(self._binding.bind_output, self._signature.outputs, [result, new_length_BX, *target.states])
        self.synchronize()
        self._session.run_with_iobinding(self._binding)
        self._binding.synchronize_outputs()
        states = [state.detach() for state in target.states]  # objects for this memory alone, by which it is known
        for state in states:
            self._known[state] = (target, target.written)
        return result, Memory(states, new_length_BX.view(B))

    def _source(self, memory: Memory) -> _Buffers | None:
        """Return the set of buffers that a memory lies in; None if any part of it came from elsewhere, which is read where it lies."""
        found: list[tuple[_Buffers, int] | None] = [self._known.get(state) for state in memory.states]  # type: ignore[no-untyped-call]
        if any(known is not None and known[0].written != known[1] for known in found):
            raise UsageError(
                "This memory has been overwritten: it was valid until the step after the next one that continued it.",
                remedy="Clone the tensors of a memory that is kept for longer.",
            )
        first = found[0]
        if first is None or any(known is None or known[0] is not first[0] for known in found):
            return None
        return first[0]

    def _next_buffers(self, source: _Buffers | None, B: int) -> _Buffers:
        """Return the set to write: that of the memory before the one in `source`, unless it is in use again, or a new one."""
        previous = None
        if source is not None:
            previous, source.previous = source.previous, None
        if previous is not None and previous[0].written == previous[1]:
            target = previous[0]
        else:
            info = self._info
            shape, dtype = state_shape(info.config, info.memory, B), TORCH_TYPES[info.memory_dtype]
            count = state_count(info.config, info.memory)
            target = _Buffers([torch.empty(shape, dtype=dtype, device=self._device) for _ in range(count)])
        target.written += 1
        target.previous = None if source is None else (source, source.written)
        return target

    def _bind(self, bind: Callable[..., None], specs: tuple[TensorSpec, ...], tensors: list[Tensor]) -> None:
        for spec, tensor in zip(specs, tensors, strict=True):
            address = tensor.data_ptr() or self._somewhere.data_ptr()  # an empty tensor lies nowhere, which onnxruntime refuses
            bind(spec.name, self._device.type, self._device.index or 0, _ELEMENTS[tensor.dtype], tuple(tensor.shape), address)


def may_saturate() -> bool:
    """Return whether int8 products of this CPU may saturate: those without VNNI add two at a time in 16 bits.

    PyTorch's tell, with AVX-512 as well: of the VNNI that there is without that, it is not known whether ONNX Runtime uses it.
    """
    try:
        return torch.backends.cpu.get_cpu_capability() != "AVX512" or not sums_exactly()
    except (AttributeError, RuntimeError):  # a PyTorch without such products
        return True


class _Buffers:
    """The states that a step writes."""

    def __init__(self, states: list[Tensor]) -> None:
        self.states = states
        self.written = 0
        """How many steps have written here."""
        self.previous: tuple[_Buffers, int] | None = None
        """The set that what lies here was computed from, and its `written` then; None once that was handed out."""


def settings_of(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return what a graph says of itself, in the terms of `claims`: its metadata under `txl.`, as `export_onnx` writes them.

    A graph of other makers has none of them, and what cannot be read as a value stays a text, which no claim equals.
    """
    found: dict[str, Any] = {}
    for name in _SETTINGS:
        text = metadata.get(f"txl.{name}")
        if text is None:
            continue
        value: Any = text
        if name in _LENGTHS:
            value = None if text == "None" else int(text) if text.isdecimal() else text
        elif name == "same_length":
            value = {"true": True, "false": False}.get(text, text)
        found[name] = value
    return found


def _read_back(events: Iterable[Mapping[str, Any]], provider: str) -> dict[str, dict[str, int]]:
    """Return what a profile says, in the terms of `claims`: matrix products by type, nodes by provider, and those elsewhere that should
    not be. Arithmetic on shapes may run on the CPU: it deals in integers and in vectors."""
    products: Counter[str] = Counter()
    nodes: Counter[str] = Counter()
    elsewhere: Counter[str] = Counter()
    kernels: Counter[str] = Counter()
    for event in events:
        if event.get("cat") != "Node" or not event["name"].endswith("_kernel_time"):
            continue
        facts = event["args"]
        found = [(_PROFILED_TYPES.get(dtype, dtype), shape) for part in facts["output_type_shape"] for dtype, shape in part.items()]
        nodes[facts["provider"]] += 1
        if facts["op_name"] in _PRODUCTS:
            products.update(dtype for dtype, _ in found[:1])
        if facts["op_name"] in _INTEGER_PRODUCTS:
            products["int8"] += 1
            kernels[facts["op_name"]] += 1
        if facts["provider"] != provider and any(dtype in FLOATS and len(shape) >= 2 for dtype, shape in found):
            elsewhere[facts["op_name"]] += 1
    return {
        "products": dict(sorted(products.items())),
        "nodes": dict(sorted(nodes.items())),
        **({"integer_kernels": dict(sorted(kernels.items()))} if kernels else {}),
        **({"elsewhere": dict(sorted(elsewhere.items()))} if elsewhere else {}),
    }
