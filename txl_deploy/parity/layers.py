"""Where an ONNX graph leaves its checkpoint: tensors within the network, layer by layer, against eager PyTorch.

Both sides get one segment and the same memory, the reference's, so that nothing counts that went wrong before. Polygraphy marks tensors
of the graph as outputs and runs it in ONNX Runtime; the reference's are recorded while the module runs. A node's name says its module and
operation (`decoder.layers.1.attention/matmul_4`, see `export/onnx.py`): the n-th product of a module there is the n-th product here.
What the exporter has rewritten beyond that is left out, never guessed. Whether two runtimes agree is not judged here: see `rollout.py`.
"""

# Shape suffixes: B batch, T tgt_len

from __future__ import annotations

import contextlib
import math
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from txl_deploy.parity.rollout import ParityResult
from txl_deploy.parity.schedule import Turn, schedule
from txl_deploy.parity.tolerances import tolerance_for
from txl_deploy.runtimes.base import TORCH_TYPES, Runtime
from txl_deploy.runtimes.eager import EagerRuntime
from txl_deploy.session import Session
from txl_deploy.signature import state_names, step_signature
from txl_train.data.segments import Segment
from txl_train.errors import ArtifactError, EnvironmentUnfitError, UsageError
from txl_train.files import finite
from txl_train.model.adaptive import cluster_rows
from txl_train.model.memory import Memory

OPERATIONS = ("embedding", "linear", "matmul", "add", "softmax", "cat", "layer_norm", "relu", "log")
"""Operations whose results are compared. PyTorch's functions and the exporter's nodes have the same names."""

_INSTALL = "Install it with `pip install polygraphy`."
_LARGE_BYTES = 1_500_000_000
_OPERATION = re.compile(rf"({'|'.join(OPERATIONS)})(?:_\d+)?")
_LAYER = re.compile(r"decoder\.layers\.(\d+)(?:\.|$)")


@dataclass(frozen=True, kw_only=True)
class TensorParity:
    """How one tensor compared."""

    name: str
    """Of the node that makes it, or of the graph's output."""
    place: str
    """`embedding`, `layer 0` and so on, or `head`."""
    shape: list[int]
    dtype: str
    error: float
    """Largest difference, relative to the reference's largest magnitude; of an nll, to the reference's largest nll or 1."""
    bound: float

    @property
    def within(self) -> bool:
        """True if the bound is kept."""
        return self.error <= self.bound


@dataclass(frozen=True, kw_only=True)
class PlaceParity:
    """How the tensors of one layer compared."""

    place: str
    n_tensors: int
    error: float
    """The largest of its tensors'."""
    worst: str
    """The tensor it belongs to."""
    first_beyond: str | None
    """The first tensor that leaves its bound."""


@dataclass(frozen=True, kw_only=True)
class Bisection:
    """What was found in one segment."""

    segment: int
    provider: str
    """What computed the graph with its tensors marked."""
    n_nodes: int
    """Nodes of the graph, of which those in `tensors` have a counterpart in PyTorch."""
    place: str | None
    """The first layer that leaves its bound; None if none does."""
    tensor: str | None
    """The first tensor in it that does."""
    reason: str
    """One sentence for people."""
    places: list[PlaceParity]
    tensors: list[TensorParity]

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain values for JSON; a figure that is not finite becomes None."""
        document: dict[str, Any] = finite(asdict(self))
        return document


def check_can_bisect(candidate: Runtime) -> None:
    """Raise `UsageError` for what has no graph to look into, and `EnvironmentUnfitError` where a package is missing."""
    if candidate.info.name != "onnx":
        raise UsageError(
            f"`--bisect` looks into an ONNX graph, and {candidate.info.origin or 'this'} is an artifact of {candidate.info.name}.",
            remedy="Give the ONNX artifact of the same checkpoint (`txl export --format onnx`): if that one agrees, the fault lies in what "
            "was made from it.",
        )
    try:
        import polygraphy  # noqa: F401
    except ImportError as error:
        raise EnvironmentUnfitError("polygraphy is not installed, and `--bisect` needs it.", remedy=_INSTALL) from error


def segment_to_examine(result: ParityResult) -> int:
    """Return the number of the segment to look into: the first one beyond a bound, or else the one that differs most."""
    bounds = result.tolerance
    for number, part in enumerate(result.segments):
        if not (part.max_abs_delta_nll <= bounds.token_nll and part.memory_error <= bounds.memory):
            return number
    by_mean = not result.passed and result.max_abs_delta_nll <= bounds.token_nll
    size: Callable[[int], float] = lambda i: result.segments[i].rms_delta_nll if by_mean else result.segments[i].max_abs_delta_nll  # noqa: E731
    return max(range(len(result.segments)), key=size)


def bisect(reference: EagerRuntime, candidate: Runtime, graph: Path, segments: Sequence[Segment], number: int) -> Bisection:
    """Compare the tensors within `graph` with those within `reference`, over one segment.

    Args:
        reference: the FP32 checkpoint in eager PyTorch, not `packed`, of the candidate's lengths, head and kind of memory.
        candidate: the runtime of `graph`; its own result is compared too, as it may run the graph otherwise than with marked tensors.
        graph: the ONNX file.
        segments: of the rollout; those before segment `number` fill the memory.

    Raises:
        UsageError: the candidate has no ONNX graph.
        EnvironmentUnfitError: polygraphy is not installed.
        ArtifactError: the graph cannot be run with marked tensors, or its nodes do not name their modules.
    """
    check_can_bisect(candidate)
    info = candidate.info
    tolerance = tolerance_for(info.dtype, info.head, info.memory_dtype)
    assert tolerance is not None  # the comparison before this needed it too
    turns = schedule(segments)
    memory = _memory_before(reference, turns[: number + 1])
    segment = turns[number].segment
    memory_type = TORCH_TYPES[info.memory_dtype]
    given = Memory([state.to(memory_type) for state in memory.states], memory.length_B)
    same = Memory([state.float() for state in given.states], memory.length_B)  # what both can represent

    recorded, result, states = _record(reference, segment, same)
    inputs = _named_inputs(reference, segment, given, served=info.served)
    marked = _run_marked(graph, info.provider, inputs)
    tensors: list[TensorParity] = []
    outputs = dict(zip(state_names(info.config, info.memory)[1], states))
    for node in _paired(marked.nodes, recorded, info.config.n_layer):
        ours = outputs.get(node.output) if node.reference is None else node.reference
        theirs = torch.from_numpy(marked.values[node.value])
        if node.output == info.head:
            error, bound = _nll_error(result, theirs, info.head), tolerance.token
        elif ours is None or ours.shape != theirs.shape or ours.numel() == 0 or not ours.is_floating_point():
            continue
        else:
            error, bound = _relative_error(ours, theirs), tolerance.memory
        name = node.name if node.reference is not None else node.output
        dtype = str(theirs.dtype).removeprefix("torch.")
        tensors.append(TensorParity(name=name, place=node.place, shape=list(theirs.shape), dtype=dtype, error=error, bound=bound))
    if not any("/" in tensor.name for tensor in tensors):
        raise ArtifactError(
            f"The nodes of {graph} do not name their modules, so they cannot be told apart.",
            remedy="Export the checkpoint again with this version of `txl export`.",
        )
    own_error = _nll_error(result, _own_result(candidate, segment, given), info.head)
    first = next((tensor for tensor in tensors if not tensor.within), None)
    return Bisection(
        segment=segment.index,
        provider=marked.provider,
        n_nodes=len(marked.nodes),
        place=None if first is None else first.place,
        tensor=None if first is None else first.name,
        reason=_reason(first, tensors, own_error, tolerance.token),
        places=_by_place(tensors),
        tensors=tensors,
    )


def _reason(first: TensorParity | None, tensors: Sequence[TensorParity], own_error: float, token_bound: float) -> str:
    if first is not None:
        return (
            f"{first.place} is the first to leave the bound: {first.name} differs by {first.error:.2g} of its magnitude "
            f"(bound {first.bound:.2g})"
        )
    worst = max(tensors, key=lambda tensor: tensor.error / tensor.bound)
    grown, factor = _largest_growth(tensors)
    if not own_error <= token_bound:
        return (
            "no tensor of the graph leaves the bound, but the runtime's own result does: it computes the graph otherwise once its tensors "
            "need not be kept (fusions), or on another device"
        )
    growth = f", and the error grows most at {grown.name} of {grown.place}, {factor:.1f} times" if factor >= 2 else ""
    return (
        f"no tensor leaves the bound in this segment with the reference's memory; the nearest to it is {worst.name} of {worst.place} with "
        f"{worst.error:.2g} (bound {worst.bound:.2g}){growth}"
    )


def _largest_growth(tensors: Sequence[TensorParity]) -> tuple[TensorParity, float]:
    """Return the tensor whose error is the most times the largest before it, or a twentieth of its bound, which rounding alone comes to."""
    largest, found, factor = 0.0, tensors[0], 0.0
    for tensor in tensors:
        here = tensor.error / max(largest, tensor.bound / 20)
        if here > factor:
            found, factor = tensor, here
        largest = max(largest, tensor.error)
    return found, factor


def _by_place(tensors: Sequence[TensorParity]) -> list[PlaceParity]:
    groups: dict[str, list[TensorParity]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.place, []).append(tensor)
    places = []
    for place, group in groups.items():
        worst = max(group, key=lambda tensor: tensor.error)
        beyond = next((tensor.name for tensor in group if not tensor.within), None)
        places.append(PlaceParity(place=place, n_tensors=len(group), error=worst.error, worst=worst.name, first_beyond=beyond))
    return places


# The reference


def _memory_before(reference: EagerRuntime, turns: Sequence[Turn]) -> Memory:
    """Return the memory that the last of `turns` begins with."""
    session = Session(reference, turns[0].segment.input_ids_BT.shape[0], checked=False)
    for turn in turns[:-1]:
        session.reset(turn.resets)
        _own_step(session, turn.segment)
    session.reset(turns[-1].resets)
    return session.memory


def _own_step(session: Session, segment: Segment) -> Tensor:
    device = session.runtime.info.device
    input_ids_BQ = torch.from_numpy(segment.input_ids_BT).to(device)
    if session.runtime.info.head == "nll":
        return session.step(input_ids_BQ, torch.from_numpy(segment.target_ids_BT).to(device))
    return session.next_token(input_ids_BQ)


def _own_result(candidate: Runtime, segment: Segment, memory: Memory) -> Tensor:
    session = Session(candidate, segment.input_ids_BT.shape[0], checked=False)
    device = candidate.info.device
    session.memory = Memory([state.to(device) for state in memory.states], memory.length_B.to(device))
    return _own_step(session, segment).cpu()


class _Recorder(TorchFunctionMode):
    """Keeps the results of `OPERATIONS` by the module that called for them, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.modules = [""]
        self.results: defaultdict[tuple[str, str], list[Tensor]] = defaultdict(list)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "").removesuffix("_")  # one in place is the same operation, of which a graph knows nothing
        if name in OPERATIONS and isinstance(result, Tensor):
            self.results[self.modules[-1], name].append(result.clone())  # another in place may follow
        return result


def _record(reference: EagerRuntime, segment: Segment, memory: Memory) -> tuple[dict[tuple[str, str], list[Tensor]], Tensor, list[Tensor]]:
    """Run the reference; return the results by module and operation, what the head yields, and the new states."""
    recorder = _Recorder()
    with recorder, _modules_followed(reference.step_module, recorder.modules):
        session = Session(reference, segment.input_ids_BT.shape[0], checked=False)
        session.memory = memory
        result = _own_step(session, segment)
    return recorder.results, result, session.memory.states


@contextlib.contextmanager
def _modules_followed(step: nn.Module, stack: list[str]) -> Iterator[None]:
    """Keep the names of the modules that are running on `stack`."""
    hooks = []
    for name, module in step.named_modules():
        if name:
            hooks.append(module.register_forward_pre_hook(lambda _module, _inputs, name=name: stack.append(name)))
            hooks.append(module.register_forward_hook(lambda _module, _inputs, _output: stack.pop() and None))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _named_inputs(reference: EagerRuntime, segment: Segment, memory: Memory, *, served: bool) -> dict[str, npt.NDArray[Any]]:
    """Return a segment's inputs by name, of a graph in the form for servers if it is `served`."""
    info = reference.info
    tensors = [torch.from_numpy(segment.input_ids_BT)]
    if info.head == "nll":
        targets_BT = torch.from_numpy(segment.target_ids_BT)
        rows = [] if served else cluster_rows(targets_BT.reshape(-1), list(info.config.cluster_ends))
        tensors += [targets_BT, *rows]
    tensors += [memory.length_B[:, None] if served else memory.length_B, *memory.states]
    signature = step_signature(info.config, tgt_len=info.tgt_len, memory=info.memory, head=info.head, served=served)
    names = [spec.name for spec in signature.inputs]
    return {name: np.ascontiguousarray(tensor.cpu().numpy()) for name, tensor in zip(names, tensors, strict=True)}


# The graph


@dataclass(frozen=True)
class _Node:
    name: str
    value: str
    """The first tensor it makes."""
    output: str
    """The name of the graph's output, if that tensor is one; otherwise empty."""
    place: str = ""
    reference: Tensor | None = None


@dataclass(frozen=True)
class _Marked:
    nodes: list[_Node]
    values: dict[str, npt.NDArray[Any]]
    provider: str


def _run_marked(graph: Path, provider: str, inputs: dict[str, npt.NDArray[Any]]) -> _Marked:
    """Run the graph in ONNX Runtime with every tensor marked that a node of `OPERATIONS` makes."""
    from polygraphy.backend.onnx import modify_outputs, onnx_from_path, save_onnx
    from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx
    from polygraphy.logger import G_LOGGER

    try:
        with tempfile.TemporaryDirectory(prefix="txl-") as folder, G_LOGGER.verbosity(G_LOGGER.CRITICAL):
            model = onnx_from_path(str(graph))
            outputs = [value.name for value in model.graph.output]
            nodes = [_Node(node.name, node.output[0], node.output[0] if node.output[0] in outputs else "") for node in model.graph.node]
            names = [node.value for node in nodes if _operation(node.name)[1] and not node.output]
            path = str(Path(folder) / "marked.onnx")
            external = "marked.onnx_data" if sum(tensor.ByteSize() for tensor in model.graph.initializer) > _LARGE_BYTES else None
            save_onnx(modify_outputs(model, outputs=[*outputs, *names]), path, external_data_path=external)
            with OnnxrtRunner(SessionFromOnnx(path, providers=[provider])) as runner:
                values = runner.infer(inputs)
                computed_by = runner.sess.get_providers()[0]
    except Exception as error:  # of polygraphy, onnx or onnxruntime, which share no base class
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ArtifactError(f"{graph} cannot be run with its tensors marked: {reason}") from error
    return _Marked(nodes, dict(values), computed_by)


def _operation(name: str) -> tuple[str, str]:
    """Split a node's name into its module and the operation, which is empty if it is not one of `OPERATIONS`."""
    module, _, rest = name.rpartition("/")
    match = _OPERATION.fullmatch(rest)
    return module, match[1] if match else ""


def _paired(nodes: Sequence[_Node], recorded: dict[tuple[str, str], list[Tensor]], n_layer: int) -> list[_Node]:
    """Return the nodes whose tensors have a counterpart in the reference, and those that make outputs, in the order of the graph."""
    found: defaultdict[tuple[str, str], list[_Node]] = defaultdict(list)
    for node in nodes:
        key = _operation(node.name)
        if key[1]:
            found[key].append(node)
    paired = []
    for node in nodes:
        key = _operation(node.name)
        group, ours = found.get(key, []), recorded.get(key, [])
        reference, place = None, _place(key[0])
        if group and len(group) == len(ours):
            i = group.index(node)
            reference = ours[i]
            if place is None and len(group) % n_layer == 0:  # what the decoder does itself, it does once a layer: projecting hidden memory
                place = f"layer {i * n_layer // len(group)}"
        if reference is None and node.output:
            place = _place_of_output(node.output)
        if place is not None and (reference is not None or node.output):
            paired.append(_Node(node.name, node.value, node.output, place, reference))
    return paired


def _place(module: str) -> str | None:
    """Return where a module belongs. What the whole step does itself, beside its modules, is the end of the distribution over words."""
    if match := _LAYER.match(module):
        return f"layer {match[1]}"
    return {"": "head", "head": "head", "embedding": "embedding"}.get(module.partition(".")[0])


def _place_of_output(name: str) -> str | None:
    """A new state belongs to its layer (the hidden state of layer i is that layer's input), the result to the head."""
    if match := re.match(r"(?:present|new_mems)\.(\d+)", name):
        return f"layer {match[1]}"
    return None if name == "new_memory_length" else "head"


# The differences


def _relative_error(ours: Tensor, theirs: Tensor) -> float:
    a, b = ours.double().cpu(), theirs.double()
    error = float((a - b).abs().max() / a.abs().max().clamp(min=1e-12))
    return error if math.isfinite(error) else math.inf


def _nll_error(ours: Tensor, theirs: Tensor, head: str) -> float:
    """Return the largest difference of an nll, relative to the largest nll, 1 at least: as the tolerance has it."""
    a, b = (_nll(scores, head) for scores in (ours, theirs))
    error = float((a - b).abs().max() / a.max().clamp(min=1.0))
    return error if math.isfinite(error) else math.inf


def _nll(scores: Tensor, head: str) -> Tensor:
    scores = scores.double().cpu()
    if head == "logits":
        return scores.logsumexp(dim=1, keepdim=True) - scores
    return scores if head == "nll" else -scores
