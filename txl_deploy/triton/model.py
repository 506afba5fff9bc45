"""What Triton's Python backend runs: an exported model in its own runtime, with a memory for each sequence.

The server's repository holds a `model.py` of three lines that names this class, and the artifact beside it. Requests of several sequences
step together; each is answered on its own, and an error concerns its request alone. `triton_python_backend_utils` is there only within the
server, so it is imported where it is used.
"""

from __future__ import annotations

import importlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from txl_deploy.corpora import ModelData, encode_part
from txl_deploy.opening import open_exported
from txl_deploy.streams import Stream, Streams
from txl_deploy.triton.sequences import Sequences
from txl_train.errors import TxlError, UsageError

log = logging.getLogger(__name__)

ARTIFACT_FOLDER = "artifact"
"""The exported model, beside `model.py`."""
START, END = 1, 2
"""Flags of a request: the first and the last one of its sequence."""


class TritonPythonModel:
    """A model of the repository: one instance of it."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Open the artifact, with every byte of it checked; an error keeps the server from loading the model, and is in its log."""
        server: Any = importlib.import_module("triton_python_backend_utils")
        self._server = server
        config = json.loads(args["model_config"])
        settings = {key: value["string_value"] for key, value in config.get("parameters", {}).items()}
        folder = Path(args["model_repository"]) / args["model_version"] / ARTIFACT_FOLDER
        device = "cuda" if args["model_instance_kind"] == "GPU" else "cpu"
        threads = settings.get("threads")
        try:
            opened = open_exported(folder, device=device, threads=None if threads is None else int(threads))
            self._data = opened.model_data
            self._streams = Streams(opened.runtime, max_rows=config["max_batch_size"])
        except TxlError as error:
            raise server.TritonModelException(_told(error)) from error
        self._max_tokens = int(settings["max_tokens"])
        self._sequences: Sequences[Stream] = Sequences(
            Stream,
            self._streams.release,
            # the server admits the next sequence before the model has answered the last request of one that ends
            most=int(settings["max_sequences"]) + config["max_batch_size"],
            idle_s=2 * float(settings["max_idle_s"]) + 1,
        )
        self._meters = _Meters(server, args["model_name"])

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answer requests, each of another sequence."""
        answers: list[Any] = [None] * len(requests)
        parts: list[tuple[int, Stream, npt.NDArray[np.int64]]] = []
        ended = []
        for i, request in enumerate(requests):
            key, flags = request.correlation_id(), request.flags()
            try:
                stream = self._sequences.take(key, starts=bool(flags & START))
                parts.append((i, stream, self._ids_of(request)))
            except TxlError as error:
                answers[i] = self._refused(error)
            if flags & END:
                ended.append(key)
        begun = [stream.n_read == 0 for _, stream, _ in parts]
        try:
            results = self._streams.score([(stream, ids_N) for _, stream, ids_N in parts])
        except Exception as error:  # of the runtime: told to every client, and the server goes on
            log.exception("A step failed.")
            failure = TxlError(f"The model failed: {error}. The memory of this sequence is gone.", remedy="Begin the sequence again.")
            results = [failure] * len(parts)
            self._sequences.end(requests[i].correlation_id() for i, _, _ in parts)
        for (i, _, ids_N), is_first, result in zip(parts, begun, results, strict=True):
            answers[i] = self._refused(result) if isinstance(result, TxlError) else self._answer(requests[i], ids_N, result, is_first)
        self._sequences.end(ended)
        self._sequences.sweep()
        self._meters.tell(self._streams, len(self._sequences), sum(len(ids_N) for _, _, ids_N in parts))
        return answers

    def finalize(self) -> None:
        """Nothing is left to do."""

    def _ids_of(self, request: Any) -> npt.NDArray[np.int64]:
        """Return the token ids of a request [N], which has either text or ids."""
        text, ids = (self._server.get_input_tensor_by_name(request, name) for name in ("text", "input_ids"))
        if (text is None) == (ids is None):
            raise UsageError("A request has either `text` or `input_ids`.", remedy="Give one of them.")
        values: npt.NDArray[Any] = (ids if text is None else text).as_numpy()
        if values.shape[0] != 1:
            raise UsageError(
                f"A request is of one sequence, but has a batch of {values.shape[0]}.", remedy="Send [1, N]; the server batches."
            )
        ids_N: npt.NDArray[np.int64] = values[0].copy() if text is None else text_ids(self._data, values[0, 0])
        if len(ids_N) > self._max_tokens:
            raise UsageError(
                f"A request has {self._max_tokens} tokens at most, but this one has {len(ids_N)}.",
                remedy="Send the text in parts, one after the other in one sequence: the result is the same.",
            )
        return ids_N

    def _answer(self, request: Any, ids_N: npt.NDArray[np.int64], nll: npt.NDArray[np.float32], is_first: bool) -> Any:
        counted_N = np.ones(len(ids_N), dtype=bool)
        counted_N[0] = not is_first
        nll_N = np.zeros(len(ids_N), dtype=np.float32)
        nll_N[counted_N] = nll
        wanted = request.requested_output_names()
        values: dict[str, npt.NDArray[Any]] = {"token_ids": ids_N, "nll": nll_N, "counted": counted_N}
        return self._server.InferenceResponse([self._tensor(name, value[None]) for name, value in values.items() if name in wanted])

    def _tensor(self, name: str, value: npt.NDArray[Any]) -> Any:
        """Return an output. By DLPack: servers up to 2024 read arrays of numpy 2 as empty ones."""
        return self._server.Tensor.from_dlpack(name, torch.from_numpy(value))

    def _refused(self, error: TxlError) -> Any:
        code = self._server.TritonError.INVALID_ARG if isinstance(error, UsageError) else self._server.TritonError.INTERNAL
        return self._server.InferenceResponse(error=self._server.TritonError(_told(error), code))


def text_ids(data: ModelData, text: bytes) -> npt.NDArray[np.int64]:
    """Return the ids [N] of raw text, as the data set was built: of lines that end with a line break, and of a last one that need not.

    Raises `UsageError` for what is not UTF-8, `DataError` for words that the vocabulary has no id for.
    """
    try:
        decoded = text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"The text is not UTF-8: {error.reason} at byte {error.start}.") from error
    return encode_part(data, decoded)[0]


def _told(error: TxlError) -> str:
    return error.message if error.remedy is None else f"{error.message}\n{error.remedy}"


class _Meters:
    """Figures for the server's page of metrics, in the Prometheus format."""

    def __init__(self, server: Any, model: str) -> None:
        self._families: list[Any] = []  # which must outlive their figures

        def family(name: str, what: str, kind: Any) -> Any:
            self._families.append(server.MetricFamily(name=name, description=what, kind=kind))
            return self._families[-1].Metric(labels={"model": model})

        counter, gauge = server.MetricFamily.COUNTER, server.MetricFamily.GAUGE
        self._tokens = family("txl_tokens_total", "Tokens read", counter)
        self._steps = family("txl_steps_total", "Steps of the model", counter)
        self._rows = family("txl_rows_total", "Sequences that took part in them", counter)
        self._held = family("txl_sequences", "Sequences with a memory", gauge)
        self._told = (0, 0)

    def tell(self, streams: Streams, held: int, tokens: int) -> None:
        """Add what happened since the last time."""
        steps, rows = self._told
        self._tokens.increment(tokens)
        self._steps.increment(streams.n_steps - steps)
        self._rows.increment(streams.n_rows - rows)
        self._held.set(held)
        self._told = (streams.n_steps, streams.n_rows)
