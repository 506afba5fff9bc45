"""One sequence on a Triton server, as a client sees it: sends text or token ids, gets what each token costs.

A server keeps the memory of a sequence, and may lose it: it restarts, or hears nothing for too long. The client keeps what it has sent, so
it can begin the sequence again and go on where it was, with the same results. After a request of which nobody knows whether the server
has read it, it always does.
"""

# Shape suffixes: N tokens of a request

from __future__ import annotations

import importlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType, TracebackType
from typing import Any, Literal, NoReturn

import numpy as np
import numpy.typing as npt

from txl_deploy.triton.sequences import SequenceLost
from txl_train.errors import EnvironmentUnfitError, TxlError, UsageError, ValidationError

Protocol = Literal["http", "grpc"]
OUTPUTS = ("token_ids", "nll", "counted")
SEQUENCE_HEADER = "x-sequence-id"
"""By which a router in front of several servers finds the one that has the sequence (docker/serving)."""
_FAILED = ("The model failed", "no finite number")
"""What it says where the model is at fault."""
_LOST = ("must specify the START flag", "has no memory here")
"""What a server says of a sequence that it does not have."""


class ServerUnreachable(EnvironmentUnfitError):
    """No answer: the server is not there, went away, or took too long."""


class RequestRefused(TxlError):
    """The server has read the request and does not take it."""


class ModelFailed(ValidationError):
    """The model could not compute an answer, or none that is a number. The server has let go of the sequence."""


@dataclass(frozen=True)
class Scores:
    """The answer to a request."""

    token_ids_N: npt.NDArray[np.int64]
    nll_N: npt.NDArray[np.float32]
    """Nats of each token; 0 where it is not counted."""
    counted_N: npt.NDArray[np.bool_]
    """Whether the token has one before it in its sequence."""

    @property
    def nll_nats_sum(self) -> float:
        """Sum over the tokens that count."""
        return float(self.nll_N[self.counted_N].astype(np.float64).sum())


class SequenceClient:
    """A sequence on a model of the Python backend.

    Args:
        url: host and port, such as `localhost:8000` for HTTP and `localhost:8001` for gRPC.
        model: its name in the server.
        sequence_id: a number above 0 or a text that no other client uses; None draws one.
        replay: begin again what the server has lost, with all that was sent so far; otherwise `SequenceLost` is raised.
        timeout_s: seconds to wait for an answer.
        part_tokens: tokens of a request at most, when a sequence is sent again.

    Raises `EnvironmentUnfitError` where tritonclient is not installed.
    """

    def __init__(
        self,
        url: str,
        *,
        model: str = "txl",
        protocol: Protocol = "http",
        sequence_id: int | str | None = None,
        replay: bool = True,
        timeout_s: float = 120.0,
        part_tokens: int = 4096,
    ) -> None:
        self.model, self.url, self.replay = model, url, replay
        self._timeout_s, self._part_tokens = timeout_s, part_tokens
        self._module = _client_module(protocol)
        self._protocol = protocol
        settings: dict[str, Any] = {"network_timeout": timeout_s, "connection_timeout": timeout_s} if protocol == "http" else {}
        self._client = self._module.InferenceServerClient(url, **settings)
        self.sequence_id = sequence_id or secrets.randbits(62) + 1
        self._sent: list[npt.NDArray[np.int64]] = []
        """The ids of every answered request of the sequence."""
        self._is_open = False
        """Whether the server has the sequence with all of `_sent`, as far as is known here."""
        self.n_replays = 0

    def __enter__(self) -> SequenceClient:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection. A sequence that was not ended is forgotten by the server when it was idle for long enough."""
        self._client.close()

    def score(self, text: str | None = None, *, input_ids: Sequence[int] | None = None, end: bool = False) -> Scores:
        """Send the next part of the sequence, and return what its tokens cost.

        Args:
            text: raw text; give this or `input_ids`.
            end: it is the last part: the server forgets the sequence, and the next call begins another one.

        Raises:
            UsageError: neither text nor ids.
            RequestRefused: the server does not take it; the sequence is where it was, and with `end` is sent again by the next call.
            SequenceLost: the server does not have the sequence, and nothing is sent again (`replay` is off). The next call begins another.
            ModelFailed: the model is at fault; the next call sends the sequence again.
            ServerUnreachable: there is no answer. The same call may be made again when the server is back.
        """
        if (text is None) == (input_ids is None):
            raise UsageError("A request has either `text` or `input_ids`.")
        if self._sent and not self._is_open:
            self._again()
        begins = not self._sent
        try:
            answer = self._send(text, input_ids, starts=begins, ends=end)
        except SequenceLost:
            if begins or not self.replay:
                self._sent = []  # the next call begins another sequence
                raise
            self._again()
            answer = self._send(text, input_ids, starts=False, ends=end)
        self._sent.append(answer.token_ids_N)
        if end:
            self._sent, self._is_open = [], False
        return answer

    def _again(self) -> None:
        """Begin the sequence again, with all that was sent."""
        ids_N = np.concatenate(self._sent)
        if not self.replay:
            self._sent = []
            raise SequenceLost(f"Nobody knows what the server has read of sequence {self.sequence_id}.", remedy="Begin it again.")
        for at in range(0, len(ids_N), self._part_tokens):
            self._send(None, ids_N[at : at + self._part_tokens], starts=at == 0, ends=False, position=at)
        self.n_replays += 1

    def _send(
        self,
        text: str | None,
        ids: Sequence[int] | npt.NDArray[np.int64] | None,
        *,
        starts: bool,
        ends: bool,
        position: int | None = None,
    ) -> Scores:
        """Send one request; `position` tokens of the sequence were sent before it (None: all of `_sent`)."""
        value: npt.NDArray[Any]
        if text is not None:
            name, kind, value = "text", "BYTES", np.array([[text.encode("utf-8")]], dtype=np.object_)
        else:
            name, kind, value = "input_ids", "INT64", np.asarray(ids, dtype=np.int64)[None]
        tensor = self._module.InferInput(name, list(value.shape), kind)
        tensor.set_data_from_numpy(value)
        before = self._module.InferInput("position", [1, 1], "INT64")
        sent = sum(map(len, self._sent)) if position is None else position
        before.set_data_from_numpy(np.array([[0 if starts else sent]], dtype=np.int64))
        wanted = [self._module.InferRequestedOutput(output) for output in OUTPUTS]
        was_open, self._is_open = self._is_open, False  # until the server has answered, whatever happens on the way
        timeout: dict[str, Any] = {"client_timeout": self._timeout_s} if self._protocol == "grpc" else {}
        try:
            answer = self._client.infer(
                self.model,
                [tensor, before],
                outputs=wanted,
                sequence_id=self.sequence_id,
                sequence_start=starts,
                sequence_end=ends,
                headers={SEQUENCE_HEADER: str(self.sequence_id)},
                **timeout,
            )
        except Exception as error:  # of tritonclient, gevent and gRPC, which share no base class
            self._is_open = was_open and not ends and _was_read(error)
            _explain(error, self.url, self.sequence_id)
        self._is_open = True
        return Scores(*(answer.as_numpy(output)[0] for output in OUTPUTS))


def _client_module(protocol: Protocol) -> ModuleType:
    try:
        return importlib.import_module(f"tritonclient.{protocol}")
    except ImportError as error:
        raise EnvironmentUnfitError(
            f"{error.name} is not installed.", remedy="Install it with `pip install 'txl[triton-client]'`."
        ) from error


def _was_read(error: Exception) -> bool:
    """Return whether an error is the server's own answer, so that it has the sequence where it was."""
    from tritonclient.utils import InferenceServerException

    return isinstance(error, InferenceServerException) and _status(error) in ("INVALID_ARGUMENT", "400", "NOT_FOUND", "404")


def _status(error: Any) -> str:
    return str(error.status() or "").removeprefix("StatusCode.")


def _explain(error: Exception, url: str, sequence_id: int | str) -> NoReturn:
    """Raise what a failed request means."""
    from tritonclient.utils import InferenceServerException

    if not isinstance(error, InferenceServerException):
        raise ServerUnreachable(
            f"The server at {url} did not answer: {str(error) or type(error).__name__}.",
            remedy="Is it there? `GET /v2/health/ready` tells.",
        ) from error
    said = str(error.message())
    if any(part in said for part in _LOST):
        raise SequenceLost(f"The server at {url} no longer has sequence {sequence_id}: {said}") from error
    if _was_read(error) or _status(error) in ("413", "RESOURCE_EXHAUSTED"):
        raise RequestRefused(f"The server at {url} refused the request: {said}") from error
    if any(part in said for part in _FAILED):
        raise ModelFailed(f"The model of the server at {url} failed: {said}") from error
    raise ServerUnreachable(
        f"The server at {url} could not answer ({_status(error)}): {said}", remedy="Send it again; its log tells more."
    ) from error
