"""What goes into an exported graph and what comes out: names, types and axes, derived from the model's configuration.

The one description that export, runtimes and manifest share. States have the names that optimum and ONNX Runtime's generation
use (`past_key_values.{i}.key`, `present.{i}.key`) and Transformer-XL's own for hidden states (`mems.{i}`, `new_mems.{i}`).
"""

from __future__ import annotations

from dataclasses import dataclass

from txl_train.config import HeadKind, MemoryKind, ModelConfig
from txl_train.model.memory import state_count, state_shape

BATCH = "batch_size"

ELEMENTS = {"fp32": "float32", "fp16": "float16"}
"""The name that numpy, and so a manifest, has for what `--dtype` calls so."""


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a graph; an axis is its length, or its name where the length is free."""

    name: str
    dtype: str
    axes: tuple[int | str, ...]


@dataclass(frozen=True)
class Signature:
    """Inputs and outputs of one scoring step, in the order of the call."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


def step_signature(
    config: ModelConfig,
    *,
    tgt_len: int,
    memory: MemoryKind,
    head: HeadKind = "nll",
    memory_dtype: str = "fp32",
    batch: int | None = None,
    served: bool = False,
) -> Signature:
    """Return the signature of the step with that head (`model.inference.STEPS`), its lists laid out flat.

    Inputs: `input_ids` (with `ext_len` tokens before the segment); for `nll` the `target_ids` and one `target_rows.{i}` per tail cluster
    (flat positions b*T + t of the targets in it, padded with B*T or empty); `memory_length`; the states. Outputs: `nll` of each target, or
    `logits` or `log_probs` of every word after the last token; `new_memory_length`; the new states.

    Args:
        batch: a fixed number of streams; None leaves the axis free.
        served: the form for servers that keep the memory of each stream themselves and put streams side by side: every tensor begins with
            the axis of streams and has another one behind it. So there are no `target_rows` (the graph finds them), and the valid lengths
            are [B, 1].
    """
    streams: int | str = BATCH if batch is None else batch
    tokens = (streams, tgt_len)
    clusters = range(1, config.n_cluster + 1) if not served else ()
    rows = [TensorSpec(f"target_rows.{i}", "int64", (f"target_rows_{i}",)) for i in clusters]
    lengths: tuple[int | str, ...] = (streams, 1) if served else (streams,)
    state_axes: tuple[int | str, ...] = (streams, *state_shape(config, memory, 1)[1:])
    old, new = state_names(config, memory)
    targets = [TensorSpec("target_ids", "int64", tokens), *rows] if head == "nll" else []
    return Signature(
        inputs=(
            TensorSpec("input_ids", "int64", (streams, config.ext_len + tgt_len)),
            *targets,
            TensorSpec("memory_length", "int64", lengths),
            *(TensorSpec(name, ELEMENTS[memory_dtype], state_axes) for name in old),
        ),
        outputs=(
            TensorSpec(head, "float32", tokens if head == "nll" else (streams, config.vocab_size)),
            TensorSpec("new_memory_length", "int64", lengths),
            *(TensorSpec(name, ELEMENTS[memory_dtype], state_axes) for name in new),
        ),
    )


def state_names(config: ModelConfig, memory: MemoryKind) -> tuple[list[str], list[str]]:
    """Return the names of the states as inputs and as outputs, in the order of `Memory.states`."""
    if memory == "hidden":
        layers = range(state_count(config, memory))
        return [f"mems.{i}" for i in layers], [f"new_mems.{i}" for i in layers]
    parts = [(i, part) for i in range(config.n_layer) for part in ("key", "value")]
    return [f"past_key_values.{i}.{part}" for i, part in parts], [f"present.{i}.{part}" for i, part in parts]
