"""What Triton's Python backend runs: an exported model in its own runtime, with a memory for each sequence.

The server's repository holds a `model.py` of three lines that names this class, and the artifact beside it. Requests of several sequences
step together; each is answered on its own, and an error concerns its request alone. `triton_python_backend_utils` is there only within the
server, so it is imported where it is used.
"""

from __future__ import annotations

import importlib
import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from txl_deploy.corpora import ModelData, encode_part
from txl_deploy.opening import open_exported
from txl_deploy.streams import Stream, Streams
from txl_deploy.triton.sequences import SequenceLost, Sequences
from txl_train.data.datasets import get_dataset
from txl_train.errors import TxlError, UsageError, ValidationError

log = logging.getLogger(__name__)

ARTIFACT_FOLDER = "artifact"
"""The exported model, beside `model.py`."""
START, END = 1, 2
"""Flags of a request: the first and the last one of its sequence."""
_LONGEST_TOKEN = 64
"""Bytes of text for each token that a request may have: more are not even tokenised."""


@dataclass(frozen=True)
class _Part:
    """What one request of a call is to read."""

    at: int
    """Number of the request in the call."""
    stream: Stream
    ids_N: npt.NDArray[np.int64]
    is_first: bool


class TritonPythonModel:
    """A model of the repository: one instance of it."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Open the artifact, with every byte of it checked; an error keeps the server from loading the model, and is in its log."""
        server: Any = importlib.import_module("triton_python_backend_utils")
        self._server = server
        config = json.loads(args["model_config"])
        settings = {key: value["string_value"] for key, value in config.get("parameters", {}).items()}
        folder = Path(args["model_repository"]) / args["model_version"] / ARTIFACT_FOLDER
        device = f"cuda:{args['model_instance_device_id']}" if args["model_instance_kind"] == "GPU" else "cpu"
        threads = settings.get("threads")
        try:
            opened = open_exported(folder, device=device, threads=None if threads is None else int(threads))
            self._data = opened.model_data
            self._streams = Streams(opened.runtime, max_rows=config["max_batch_size"])
        except TxlError as error:
            raise server.TritonModelException(_told(error)) from error
        self._max_tokens = int(settings["max_tokens"])
        self._busy_s = 0.0
        self._sequences: Sequences[Stream] = Sequences(
            Stream,
            self._streams.release,
            # the server admits the next sequence before the model has answered the last request of one that ends
            most=int(settings["max_sequences"]) + config["max_batch_size"],
            idle_s=2 * float(settings["max_idle_s"]) + 1,
            clock=lambda: time.monotonic() - self._busy_s,  # a sequence is not idle while the model works for others
        )
        self._meters = _Meters(server, args["model_name"], args["model_instance_name"])

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answer requests, each of another sequence, or of one that began again in between."""
        begun = time.monotonic()
        answers: list[Any] = [None] * len(requests)
        n_read = 0
        for turn in _turns([request.correlation_id() for request in requests]):
            n_read += self._answer_turn(requests, turn, answers)
        self._busy_s += time.monotonic() - begun
        self._sequences.sweep()
        self._meters.tell(self._streams, len(self._sequences), n_read)
        return answers

    def finalize(self) -> None:
        """Nothing is left to do."""

    def _answer_turn(self, requests: Sequence[Any], turn: Sequence[int], answers: list[Any]) -> int:
        """Answer the requests of these numbers, all of different sequences; return how many tokens were read."""
        parts: list[_Part] = []
        ended = [requests[i].correlation_id() for i in turn if requests[i].flags() & END]
        for i in turn:
            try:
                parts.append(self._part_of(i, requests[i]))
            except TxlError as error:
                answers[i] = self._refused(error)
            except Exception as error:  # a request that cannot be read concerns no other
                log.exception("A request cannot be read.")
                answers[i] = self._refused(TxlError(f"The request cannot be read: {error}."))
        try:
            results = self._streams.score([(part.stream, part.ids_N) for part in parts])
        except Exception as error:  # of the runtime: told to every client, and the server goes on
            log.exception("A step failed.")
            failure = ValidationError(f"The model failed: {error}. The memory of this sequence is gone.", remedy="Begin it again.")
            results = [failure] * len(parts)
        n_read = 0
        for part, result in zip(parts, results, strict=True):
            request = requests[part.at]
            if isinstance(result, TxlError):
                answers[part.at] = self._refused(result)
                if isinstance(result, ValidationError):  # its memory is no good, so it has to begin again
                    ended.append(request.correlation_id())
            else:
                answers[part.at] = self._answer(request, part, result)
                n_read += len(part.ids_N)
        self._sequences.end(ended)
        return n_read

    def _part_of(self, at: int, request: Any) -> _Part:
        starts = bool(request.flags() & START)
        stream = self._sequences.take(request.correlation_id(), starts=starts)
        position = self._server.get_input_tensor_by_name(request, "position")
        if position is not None and int(position.as_numpy().reshape(-1)[0]) != stream.n_read:
            raise SequenceLost(
                f"Sequence {request.correlation_id()} has no memory here of what was sent: this server has read {stream.n_read} tokens "
                f"of it, not {int(position.as_numpy().reshape(-1)[0])}.",
                remedy="Begin it again with its first request, and send its text once more.",
            )
        return _Part(at, stream, self._ids_of(request, starts=starts), stream.n_read == 0)

    def _ids_of(self, request: Any, *, starts: bool) -> npt.NDArray[np.int64]:
        """Return the token ids of a request [N], which has either text or ids."""
        text, ids = (self._server.get_input_tensor_by_name(request, name) for name in ("text", "input_ids"))
        if (text is None) == (ids is None):
            raise UsageError("A request has either `text` or `input_ids`.", remedy="Give one of them.")
        values: npt.NDArray[Any] = (ids if text is None else text).as_numpy()
        if values.shape[0] != 1:
            raise UsageError(f"A request is of one sequence, but has a batch of {values.shape[0]}.", remedy="Send [1, N].")
        ids_N: npt.NDArray[np.int64] = values[0].copy() if text is None else self._text_ids(values[0, 0], starts=starts)
        if len(ids_N) > self._max_tokens:
            raise self._too_long(f"{len(ids_N)}")
        return ids_N

    def _text_ids(self, text: bytes, *, starts: bool) -> npt.NDArray[np.int64]:
        if len(text) > _LONGEST_TOKEN * self._max_tokens:
            raise self._too_long(f"{len(text):,} bytes of text")
        if not starts:
            check_takes_parts(self._data)
        return text_ids(self._data, text)

    def _too_long(self, found: str) -> UsageError:
        return UsageError(
            f"A request has {self._max_tokens} tokens at most, but this one has {found}.",
            remedy="Send the text in parts, one after the other in one sequence: the result is the same.",
        )

    def _answer(self, request: Any, part: _Part, nll: npt.NDArray[np.float32]) -> Any:
        counted_N = np.ones(len(part.ids_N), dtype=bool)
        counted_N[0] = not part.is_first
        nll_N = np.zeros(len(part.ids_N), dtype=np.float32)
        nll_N[counted_N] = nll
        wanted = request.requested_output_names()
        values: dict[str, npt.NDArray[Any]] = {"token_ids": part.ids_N, "nll": nll_N, "counted": counted_N}
        return self._server.InferenceResponse([self._tensor(name, value[None]) for name, value in values.items() if name in wanted])

    def _tensor(self, name: str, value: npt.NDArray[Any]) -> Any:
        """Return an output. By DLPack: servers up to 2024 read arrays of numpy 2 as empty ones."""
        return self._server.Tensor.from_dlpack(name, torch.from_numpy(value))

    def _refused(self, error: TxlError) -> Any:
        code = self._server.TritonError.INVALID_ARG if isinstance(error, UsageError) else self._server.TritonError.INTERNAL
        return self._server.InferenceResponse(error=self._server.TritonError(_told(error), code))


def _turns(keys: Sequence[Any]) -> list[list[int]]:
    """Return the numbers of requests by turns, so that no sequence has two in one of them."""
    turns: list[list[int]] = []
    seen: dict[Any, int] = {}
    for i, key in enumerate(keys):
        turn = seen.get(key, 0)
        seen[key] = turn + 1
        if turn == len(turns):
            turns.append([])
        turns[turn].append(i)
    return turns


def check_takes_parts(data: ModelData) -> None:
    """Raise `UsageError` where text cannot be cut between words: its tokens would be others than those of the whole."""
    spec = get_dataset(data.dataset)
    if data.vocabulary.unit != "word" or spec.line_end != "eos":
        raise UsageError(
            f"A model of {data.dataset} reads a text as a whole: tokens at the ends of its parts would be others.",
            remedy="Send all of it in the first request, or send parts as `input_ids`.",
        )


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

    def __init__(self, server: Any, model: str, instance: str) -> None:
        self._families: list[Any] = []  # which must outlive their figures

        def family(name: str, what: str, kind: Any) -> Any:
            self._families.append(server.MetricFamily(name=name, description=what, kind=kind))
            return self._families[-1].Metric(labels={"model": model, "instance": instance})

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
