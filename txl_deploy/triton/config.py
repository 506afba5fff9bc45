"""`config.pbtxt`, as Triton Inference Server reads it: what a model takes and yields, how its sequences are batched, where its memory lies.

Knows the fields of the server's `ModelConfig` message and how its text form is written; which files lie beside it is known by `repository`.
Fields: https://github.com/triton-inference-server/common/blob/main/protobuf/model_config.proto
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from txl_deploy.manifest import Manifest
from txl_deploy.signature import TensorSpec, state_names
from txl_train.config import model_config_from_dict
from txl_train.errors import UsageError

Backend = Literal["python", "onnxruntime", "tensorrt"]
BACKENDS: tuple[Backend, ...] = ("python", "onnxruntime", "tensorrt")

MINIMUM_SERVER: dict[Backend, str] = {"python": "24.10", "onnxruntime": "24.10", "tensorrt": "24.10"}
"""The oldest release of the server: the one that the tests run. States that begin at zero need 22.01 (server issue 6023)."""

TYPES = {"int64": "TYPE_INT64", "float32": "TYPE_FP32", "float16": "TYPE_FP16"}


class Word(str):
    """A value of an enumeration, which is written without quotes."""

    __slots__ = ()


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """How a model is served."""

    name: str = "txl"
    """Of the model; what clients ask for."""
    max_batch_size: int = 8
    """Sequences that step together at most."""
    max_sequences: int = 64
    """Sequences that have a memory on the server at once; further ones wait until one ends or was idle for too long."""
    max_idle_s: float = 60.0
    """Seconds without a request after which the server forgets a sequence."""
    queue_delay_us: int = 0
    """How long a request waits for others to step with, in microseconds."""
    max_tokens: int = 8192
    """Tokens of one request at most, in the Python backend."""
    instances: int = 1
    """Copies of the model on each device, each with its own sequences."""
    device: Literal["cpu", "gpu"] = "cpu"
    """Where the model runs."""
    threads: int | None = None
    """CPU threads of each instance; None leaves it to the runtime."""

    def __post_init__(self) -> None:
        if not self.name or not self.name.replace("_", "").replace("-", "").replace(".", "").isalnum() or self.name.startswith("."):
            raise UsageError(f"`{self.name}` is no name for a model.", remedy="Use letters, digits, `_`, `-` and `.`.")
        for what, value, low in (
            ("max-batch-size", self.max_batch_size, 1),
            ("max-sequences", self.max_sequences, self.max_batch_size),
            ("max-tokens", self.max_tokens, 1),
            ("instances", self.instances, 1),
            ("queue-delay", self.queue_delay_us, 0),
        ):
            if value < low:
                least = f"`--max-batch-size` ({low})" if what == "max-sequences" else str(low)
                raise UsageError(f"`--{what}` must be {least} or more, but is {value} instead.")
        if not 0.1 <= self.max_idle_s <= 10**9:
            raise UsageError(f"`--max-idle` must be within 0.1 and 1e9 seconds, but is {self.max_idle_s} instead.")


def python_config(options: ServeOptions) -> dict[str, Any]:
    """Return the configuration of a model that runs in the Python backend (`txl_deploy.triton.model`).

    A sequence sends text or token ids, of any length up to `max_tokens`, and may say how many tokens it has sent before (`position`): a
    server that has read others, or not all of them, refuses the request. Its memory is kept by the model, which learns what happens to a
    sequence from the flags of its requests.
    """
    inputs = [("text", "TYPE_STRING", 1), ("input_ids", "TYPE_INT64", -1), ("position", "TYPE_INT64", 1)]
    outputs = [("token_ids", "TYPE_INT64", -1), ("nll", "TYPE_FP32", -1), ("counted", "TYPE_BOOL", -1)]
    parameters = {
        "max_tokens": options.max_tokens,
        "max_sequences": options.max_sequences,
        "max_idle_s": options.max_idle_s,
        **({} if options.threads is None else {"threads": options.threads}),
    }
    return {
        **_head(options, "python"),
        "input": [{**_tensor(name, kind, (length,)), "optional": True} for name, kind, length in inputs],
        "output": [_tensor(name, kind, (length,)) for name, kind, length in outputs],
        "sequence_batching": _sequences(options),
        "instance_group": _instances(options),
        "parameters": [{"key": key, "value": {"string_value": str(value)}} for key, value in parameters.items()],
    }


def graph_config(
    manifest: Manifest, options: ServeOptions, backend: Backend, *, files: Mapping[str, str] | None = None, default: str | None = None
) -> dict[str, Any]:
    """Return the configuration of a graph or engine in the form for servers, whose memory the server keeps as implicit state.

    A sequence sends segments of `tgt_len` tokens. All states begin at zero, so a valid length of zero, which is a cold start.

    Args:
        files: the plan for each compute capability, such as `{"7.5": "model-7.5.plan"}`.
        default: the file for all others.
    """
    states = pairs_of_states(manifest)
    carried = {spec.name for pair in states for spec in pair}
    sequences = _sequences(options)
    sequences["state"] = [
        {
            "input_name": before.name,
            "output_name": after.name,
            "data_type": Word(TYPES[before.dtype]),
            "dims": list(before.axes[1:]),
            "initial_state": {
                "name": f"cold {before.name}",
                "data_type": Word(TYPES[before.dtype]),
                "dims": list(before.axes[1:]),
                "zero_data": True,
            },
        }
        for before, after in states
    ]
    inputs, outputs = (
        [_tensor(record.name, TYPES[record.dtype], tuple(record.axes[1:])) for record in records if record.name not in carried]
        for records in (manifest.inputs, manifest.outputs)
    )
    config: dict[str, Any] = {
        **_head(options, backend),
        "input": inputs,
        "output": outputs,
        "sequence_batching": sequences,
        "instance_group": _instances(options),
    }
    if default is not None:
        config["default_model_filename"] = default
    if files:
        config["cc_model_filenames"] = [{"key": key, "value": value} for key, value in sorted(files.items())]
    if backend == "onnxruntime" and options.threads is not None:
        config["parameters"] = [{"key": "intra_op_thread_count", "value": {"string_value": str(options.threads)}}]
    return config


def pairs_of_states(manifest: Manifest) -> list[tuple[TensorSpec, TensorSpec]]:
    """Return each state as it goes in and as it comes out.

    The server pairs them by the order of their names, whatever the configuration says (server issue 8586), so a pair that it would swap
    is refused.
    """
    old, new = state_names(model_config_from_dict(manifest.model), manifest.settings.memory)
    names = list(zip(["memory_length", *old], ["new_memory_length", *new]))
    if sorted(names) != sorted(names, key=lambda pair: pair[1]):
        raise UsageError("The server would swap states of these names, as it pairs them in the order of their names.")
    inputs, outputs = (
        {record.name: TensorSpec(record.name, record.dtype, tuple(record.axes)) for record in records}
        for records in (manifest.inputs, manifest.outputs)
    )
    return [(inputs[before], outputs[after]) for before, after in names]


def to_text(config: Mapping[str, Any]) -> str:
    """Return a configuration in the text form of protocol buffers."""
    return "\n".join(_lines(config, 0)) + "\n"


def _head(options: ServeOptions, backend: Backend) -> dict[str, Any]:
    return {"name": options.name, "backend": backend, "max_batch_size": options.max_batch_size}


def _tensor(name: str, kind: str, axes: tuple[int | str, ...]) -> dict[str, Any]:
    return {"name": name, "data_type": Word(kind), "dims": list(axes)}


def _sequences(options: ServeOptions) -> dict[str, Any]:
    oldest = {
        "max_candidate_sequences": options.max_sequences,
        "preferred_batch_size": [options.max_batch_size],
        "max_queue_delay_microseconds": options.queue_delay_us,
    }
    return {"max_sequence_idle_microseconds": round(options.max_idle_s * 1e6), "oldest": oldest}


def _instances(options: ServeOptions) -> list[dict[str, Any]]:
    return [{"count": options.instances, "kind": Word(f"KIND_{options.device.upper()}")}]


def _lines(message: Mapping[str, Any], depth: int) -> Iterable[str]:
    indent = "  " * depth
    for name, value in message.items():
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, Mapping):
                yield f"{indent}{name} {{"
                yield from _lines(item, depth + 1)
                yield f"{indent}}}"
            else:
                yield f"{indent}{name}: {_scalar(item)}"


def _scalar(value: Any) -> str:
    if isinstance(value, Word):
        return str(value)
    if isinstance(value, bool):
        return str(value).lower()
    return json.dumps(value) if isinstance(value, str) else str(value)
