"""The mistakes that exports of this model were really shipped with, each to be made again on purpose.

A mutation makes of a faithful export a wrong one: its graph, what runs it, how it is evaluated, or what its folder says of it. Switched
off, it goes the same way and changes nothing. Which check must find each is said here; whether it does is found out by `self_test`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from txl_deploy import claims
from txl_deploy.manifest import Dtype
from txl_deploy.parity.mutants import artifacts, graph, runtimes
from txl_deploy.parity.mutants.examples import Chooser, Example, export
from txl_deploy.runtimes.base import Runtime
from txl_deploy.runtimes.registry import open_artifact
from txl_train.data.segments import Segment
from txl_train.model.half import LARGEST

if TYPE_CHECKING:
    import onnx

Check = Literal["parity", "receipt", "claims", "verify", "export"]

CHECKS: dict[Check, str] = {
    "parity": "`txl parity`: both sides over a recurrent rollout, each on its own memory",
    "receipt": "`txl eval --artifact`: the receipt's verdict on a whole text, each token scored once",
    "claims": "every command that opens an artifact: what runs is read back and compared with what is claimed",
    "verify": "`txl verify`: the checksums, where the file was changed after the export",
    "export": "`txl export`: the types read back from the graph that was written",
}
"""What a user runs that may find a mistake."""

Place = Literal["graph", "runtime", "evaluation", "artifact"]


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """A wrong export, or with the switch off a right one that came the same way."""

    open: Callable[[], Runtime]
    """Opens it as the commands do: raises a `TxlError` where what is read back is not what is claimed."""
    directory: Path | None = None
    """Its folder, sealed, if it is not the faithful one."""
    unsealed: Path | None = None
    """The same before its manifest was written anew."""
    choose: Chooser = iter
    """Which segments of a text are scored."""


@dataclass(frozen=True, kw_only=True)
class Mutation:
    """One mistake of the field's history."""

    name: str
    what: str
    """What is wrong then, and how it is made."""
    history: str
    """Where it really happened."""
    where: Place
    expected: Check
    """The check that has to find it."""
    dtype: Dtype
    """Type of the export that it is made of."""
    make: Callable[[Example, Path, bool], Mutant]
    """Takes an export, a folder that does not exist yet, and whether the mistake is switched on."""
    not_applicable: Callable[[Example], str | None] = lambda example: None
    """Says why a model cannot have this mistake."""


# How each is made


def _in_graph(edit: Callable[[Example, onnx.GraphProto], None]) -> Callable[[Example, Path, bool], Mutant]:
    """Write the graph anew, edited or not, in two copies: one with the manifest it had, one with a manifest of its own."""

    def make(example: Example, folder: Path, on: bool) -> Mutant:
        change: Callable[[onnx.GraphProto], None] = functools.partial(edit, example) if on else lambda graph: None
        unsealed = artifacts.copy_of(example.directory, folder)
        artifacts.edit_graph(unsealed, change)
        sealed = artifacts.copy_of(unsealed, folder.with_name(f"{folder.name}-sealed"))
        artifacts.seal(sealed)
        return Mutant(open=functools.partial(open_artifact, sealed), directory=sealed, unsealed=unsealed)

    return make


def _wrapped(wrapper: type[runtimes.Wrapped]) -> Callable[[Example, Path, bool], Mutant]:
    def make(example: Example, folder: Path, on: bool) -> Mutant:
        return Mutant(open=lambda: wrapper(example.runtime, on=on))

    return make


def _trimmed(example: Example, folder: Path, on: bool) -> Mutant:
    return Mutant(open=lambda: example.runtime, choose=_whole_only if on else iter)


def _whole_only(segments: Iterable[Segment]) -> Iterable[Segment]:
    return (segment for segment in segments if segment.counted_BT.all())


def _labelled_cuda(example: Example, folder: Path, on: bool) -> Mutant:
    def opened() -> Runtime:
        runtime = runtimes.Labelled(example.runtime, on=on, device="cuda:0", provider="CUDAExecutionProvider")
        claims.audit(runtime.info, example.manifest)
        return runtime

    return Mutant(open=opened)


def _labelled_onnx(example: Example, folder: Path, on: bool) -> Mutant:
    """Put a TorchScript export under the label `onnx`: once by hand, and once with all checksums right."""
    faithful = export(example.checkpoint, folder, "torchscript", example.dtype)
    unsealed = artifacts.copy_of(faithful, folder / "unsealed")
    sealed = artifacts.copy_of(faithful, folder / "sealed")
    if on:
        artifacts.relabel(unsealed, "onnx")
    artifacts.seal(sealed, **({"format": "onnx"} if on else {}))
    return Mutant(open=functools.partial(open_artifact, sealed), directory=sealed, unsealed=unsealed)


def _half_positions(example: Example, onnx_graph: onnx.GraphProto) -> None:
    terms = graph.position_terms(example.model, example.config, example.tgt_len, example.dtype, half=True)
    graph.other_positions(onnx_graph, terms)


def _wrong_clamp(example: Example, onnx_graph: onnx.GraphProto) -> None:
    """Leave the clamp out, or put one at half the reach where there is none."""
    config = example.config
    wrong = None if _clamps(example) else (config.mem_len + config.ext_len + example.tgt_len) // 2
    terms = graph.position_terms(example.model, dataclasses.replace(config, clamp_len=wrong), example.tgt_len, example.dtype)
    graph.other_positions(onnx_graph, terms)


def _nearer_by_one(example: Example, onnx_graph: onnx.GraphProto) -> None:
    reach = example.config.max_distance
    assert reach is not None  # otherwise it is not applicable
    graph.other_reach(onnx_graph, example.config, example.tgt_len, reach - 1)


# Which models can have which


def _needs_memory(example: Example) -> str | None:
    return None if example.config.mem_len else "the model has no memory"


def _needs_clusters(count: int) -> Callable[[Example], str | None]:
    def reason(example: Example) -> str | None:
        found = example.config.n_cluster
        return None if found >= count else f"the model has {found or 'no'} tail cluster{'' if found == 1 else 's'}"

    return reason


def _needs_far_sinusoids(example: Example) -> str | None:
    config = example.config
    if config.attn_type not in ("relative", "sinusoidal"):
        return f"positions of `attn_type` {config.attn_type} are learned"
    farthest = min(config.mem_len + config.ext_len + example.tgt_len - 1, config.clamp_len or math.inf)
    if farthest < FAR:
        return f"distances end at {farthest}; below {FAR} their encodings in float16 are within what fp16 costs anyway"
    return None


FAR = 400
"""Tokens. In two trained models, float16's encodings of distances up to 400 were found at 2.6 to 5 times fp16's bounds, up to 640 at 8 to
10 times, and up to 320 not at all."""


def _clamps(example: Example) -> bool:
    config = example.config
    return config.clamp_len is not None and config.clamp_len < config.mem_len + config.ext_len + example.tgt_len - 1


def _needs_same_length(example: Example) -> str | None:
    return None if example.config.max_distance else "the model has no `same_length`"


def _needs_wide_norms(example: Example) -> str | None:
    points: list[dict[str, Any]] = (example.manifest.audit or {}).get("points", [])
    largest = max((point["largest"] for point in points if point["point"] == "residual sum"), default=0.0)
    if largest**2 > 4 * LARGEST:
        return None
    return f"what its normalisations take is {largest:.0f} at most, and float16 squares up to 256"


MUTATIONS: tuple[Mutation, ...] = (
    Mutation(
        name="sum instead of product in the tail",
        what="a tail word's probability is its cluster's plus its own within the cluster",
        history="microsoft/archai's ONNX export of Transformer-XL (2021–22), whose check compared one call with the same wrong forward",
        where="graph",
        expected="parity",
        dtype="fp32",
        make=_in_graph(lambda example, onnx_graph: graph.sum_in_the_tail(onnx_graph)),
        not_applicable=_needs_clusters(1),
    ),
    Mutation(
        name="cluster order",
        what="tail cluster i takes the score of the last but i",
        history="NVIDIA and the authors read cluster i at column −i, Hugging Face at shortlist + i − 1; the shapes agree, so it loads",
        where="graph",
        expected="parity",
        dtype="fp32",
        make=_in_graph(lambda example, onnx_graph: graph.clusters_in_reverse(onnx_graph)),
        not_applicable=_needs_clusters(2),
    ),
    Mutation(
        name="zero instead of empty memory",
        what="a cold start attends to a memory of zeros, which takes attention from what is there",
        history="Hugging Face TransfoXL begins with unmasked zeros; single tokens differ by 0.4 to 0.9 nats",
        where="runtime",
        expected="parity",
        dtype="fp32",
        make=_wrapped(runtimes.ZerosSeen),
        not_applicable=_needs_memory,
    ),
    Mutation(
        name="off-by-one memory shift",
        what="the memory ends one position before the newest, so every key seems one token nearer",
        history="huggingface/transformers#7511, #14832: no mask, and a shift in it that was wrong",
        where="graph",
        expected="parity",
        dtype="fp32",
        make=_in_graph(lambda example, onnx_graph: graph.memory_one_position_late(onnx_graph, example.config, example.runtime.info.memory)),
        not_applicable=_needs_memory,
    ),
    Mutation(
        name="FP16 positions",
        what="distances and their encodings are computed in float16",
        history="NVIDIA's eval.py in FP16 (`model.to(float16)`); distances above 2048 are not even distinct there",
        where="graph",
        expected="parity",
        dtype="fp16",
        make=_in_graph(_half_positions),
        not_applicable=_needs_far_sinusoids,
    ),
    Mutation(
        name="stale memory",
        what="each segment reads the memory of the segment before the last one",
        history="NVIDIA's training with --roll goes on after a restart with a memory that is not of the text before",
        where="runtime",
        expected="parity",
        dtype="fp32",
        make=_wrapped(runtimes.OneSegmentLate),
        not_applicable=_needs_memory,
    ),
    Mutation(
        name="wrong clamp",
        what="the clamp on distances is left out (or one is put in where there is none)",
        history="NVIDIA's eval.py replaces a checkpoint's clamp_len by the command line's, and --load_torchscript ignores the option",
        where="graph",
        expected="parity",
        dtype="fp32",
        make=_in_graph(_wrong_clamp),
        not_applicable=_needs_memory,
    ),
    Mutation(
        name="same_length off by one",
        what="each token sees one key fewer",
        history="NVIDIA changed the limit from mem_len keys (2019) to mem_len + 1 (2023) under one name",
        where="graph",
        expected="parity",
        dtype="fp32",
        make=_in_graph(_nearer_by_one),
        not_applicable=_needs_same_length,
    ),
    Mutation(
        name="trimmed tail",
        what="segments that are not full are not scored",
        history="NVIDIA's iterator drops the last 1 to 33 tokens of WikiText-103's test set, by batch size; kimiyoung/transformer-xl#99",
        where="evaluation",
        expected="receipt",
        dtype="fp32",
        make=_trimmed,
    ),
    Mutation(
        name="provider fallback",
        what="the graph runs on the CPU under a CUDA label",
        history="ONNX Runtime falls back to its CPU provider, and says so in a log at most",
        where="runtime",
        expected="claims",
        dtype="fp32",
        make=_labelled_cuda,
    ),
    Mutation(
        name="mislabelled runtime",
        what="a TorchScript module is kept, and would be timed, under the label onnx",
        history="`--type onnx` of NVIDIA's 2019 README: eval.py timed TorchScript under that name, and there was no ONNX file",
        where="artifact",
        expected="claims",
        dtype="fp32",
        make=_labelled_onnx,
    ),
    Mutation(
        name="aliased state buffers",
        what="every step writes its states over those that another session still needs",
        history="huggingface/optimum#365, #784, Ki6an/fastT5#49: outputs differ once states are bound to buffers that are used again",
        where="runtime",
        expected="parity",
        dtype="fp32",
        make=_wrapped(runtimes.OneBufferForAll),
        not_applicable=_needs_memory,
    ),
    Mutation(
        name="LayerNorm in FP16 with large inputs",
        what="normalisations square deviations in float16, which ends at the square of 256",
        history="NVIDIA/TensorRT#2564, #2781, #3692: layer norms overflow in FP16 engines",
        where="graph",
        expected="parity",
        dtype="fp16",
        make=_in_graph(lambda example, onnx_graph: graph.layer_norm_in_half(onnx_graph)),
        not_applicable=_needs_wide_norms,
    ),
    Mutation(
        name="swapped layers",
        what="the first two layers have each other's weights",
        history="importers of four checkpoint families rename layers; any two have the same shapes, so a mistake loads",
        where="graph",
        expected="parity",
        dtype="fp32",
        make=_in_graph(lambda example, onnx_graph: graph.layers_exchanged(onnx_graph, 0, 1)),
        not_applicable=lambda example: None if example.config.n_layer > 1 else "the model has one layer",
    ),
)
"""In the order in which they are told."""
