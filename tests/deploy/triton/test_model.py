"""What runs within the server, on a stand-in for the server's module: requests that no client of ours can be made to send at will."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.deploy.conftest import Exports
from tests.deploy.test_streams import Wrapped, alone, text
from txl_deploy.corpora import ModelData
from txl_deploy.opening import open_exported
from txl_deploy.triton import model as served
from txl_deploy.triton.config import ServeOptions
from txl_deploy.triton.repository import write_repository
from txl_deploy.triton.sequences import SequenceLost, Sequences
from txl_train.data.vocabulary import Vocabulary
from txl_train.errors import UsageError

START, END = served.START, served.END


class Tensor:
    def __init__(self, name: str, value: np.ndarray) -> None:
        self.name, self._value = name, value

    def as_numpy(self) -> np.ndarray:
        return self._value

    @staticmethod
    def from_dlpack(name: str, value: torch.Tensor) -> Tensor:
        return Tensor(name, value.numpy())


class TritonError(Exception):
    INVALID_ARG, INTERNAL = 3, 13

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class Response:
    def __init__(self, tensors: list[Tensor] | None = None, error: TritonError | None = None) -> None:
        self.values = {tensor.name: tensor.as_numpy()[0] for tensor in tensors or []}
        self.error = error


class Request:
    def __init__(self, key: int | str, flags: int = 0, **values: Any) -> None:
        self._key, self._flags, self.values = key, flags, values

    def correlation_id(self) -> int | str:
        return self._key

    def flags(self) -> int:
        return self._flags

    def requested_output_names(self) -> list[str]:
        return ["token_ids", "nll", "counted"]


class Metric:
    COUNTER, GAUGE = "counter", "gauge"

    def __init__(self, **facts: Any) -> None:
        self.value = 0.0

    def Metric(self, labels: dict[str, str]) -> Metric:  # its name in the server
        return self

    def increment(self, value: float) -> None:
        self.value += value

    def set(self, value: float) -> None:
        self.value = value


def get(request: Request, name: str) -> Tensor | None:
    value = request.values.get(name)
    if value is None:
        return None
    return Tensor(name, np.array([[value]], dtype=object) if name == "text" else np.atleast_2d(np.asarray(value)))


@pytest.fixture
def model(exports: Exports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> served.TritonPythonModel:
    module = types.SimpleNamespace(
        Tensor=Tensor,
        TritonError=TritonError,
        TritonModelException=RuntimeError,
        InferenceResponse=Response,
        MetricFamily=Metric,
        get_input_tensor_by_name=get,
    )
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", module)
    write_repository([exports.onnx], tmp_path / "repository", ServeOptions(max_batch_size=4, max_sequences=4, max_tokens=60))
    made = served.TritonPythonModel()
    parameters = {"max_tokens": "60", "max_sequences": "4", "max_idle_s": "5"}
    config = {"max_batch_size": 4, "parameters": {key: {"string_value": value} for key, value in parameters.items()}}
    made.initialize(
        {
            "model_config": json.dumps(config),
            "model_repository": str(tmp_path / "repository" / "txl"),
            "model_version": "1",
            "model_instance_kind": "CPU",
            "model_instance_device_id": "0",
            "model_name": "txl",
            "model_instance_name": "txl_0_0",
        }
    )
    return made


@pytest.fixture(scope="module")
def runtime(exports: Exports):
    return open_exported(exports.onnx).runtime


def test_a_sequence_twice_in_one_call_is_answered_in_order(model, runtime):
    """As when the server gave up a sequence whose client began it again."""
    first, again, on = model.execute(
        [Request("a", START, input_ids=text(1, 9)), Request("a", START, input_ids=text(2, 9)), Request("a", input_ids=text(3, 4))]
    )
    np.testing.assert_allclose(first.values["nll"][1:], alone(runtime, text(1, 9)), atol=2e-6)
    expected = alone(runtime, np.concatenate([text(2, 9), text(3, 4)]))
    np.testing.assert_allclose(np.concatenate([again.values["nll"][1:], on.values["nll"]]), expected, atol=2e-6)


def test_what_is_wrong_with_one_request_concerns_no_other(model, runtime):
    asked = [
        Request("a", START, input_ids=[99]),
        Request("b", START, input_ids=text(1, 9)),
        Request("c", START),
        Request("d", input_ids=[1]),
    ]
    wrong, fine, empty, lost = model.execute(asked)
    assert "Token 0 has the id 99" in str(wrong.error)
    assert "either `text` or `input_ids`" in str(empty.error)
    assert "has no memory here" in str(lost.error)
    assert {answer.error.code for answer in (wrong, empty, lost)} == {TritonError.INVALID_ARG}
    np.testing.assert_allclose(fine.values["nll"][1:], alone(runtime, text(1, 9)), atol=2e-6)


def test_a_request_that_cannot_be_read_concerns_no_other(model, runtime, monkeypatch):
    monkeypatch.setattr(served, "text_ids", lambda data, text: 1 / 0)
    broken, fine = model.execute([Request("a", START, text=b"word1"), Request("b", START, input_ids=text(1, 9))])
    assert "cannot be read: division by zero" in str(broken.error)
    assert broken.error.code == TritonError.INTERNAL
    assert fine.error is None


@pytest.mark.parametrize("how", ["nan", "fails"])
def test_after_a_failure_of_the_model_a_sequence_has_to_begin_again(model, runtime, how):
    """A cold start in the middle of a sequence would look like an answer."""
    wrapped = Wrapped(runtime)
    model._streams.runtime = wrapped
    model.execute([Request("a", START, input_ids=text(1, 9))])
    wrapped.fails, wrapped.not_a_number = how == "fails", 0 if how == "nan" else -1
    (answer,) = model.execute([Request("a", input_ids=text(2, 3))])
    assert answer.error.code == TritonError.INTERNAL
    wrapped.fails, wrapped.not_a_number = False, -1
    (answer,) = model.execute([Request("a", input_ids=text(2, 3))])
    assert "has no memory here" in str(answer.error)


def test_a_position_that_is_not_where_the_sequence_is_is_refused(model):
    model.execute([Request("a", START, input_ids=text(1, 9), position=0)])
    (answer,) = model.execute([Request("a", input_ids=text(2, 3), position=4)])
    assert "has read 9 tokens of it, not 4" in str(answer.error)
    (answer,) = model.execute([Request("a", input_ids=text(2, 3), position=9)])
    assert answer.error is None


def test_text_far_beyond_the_most_is_not_even_tokenised(model, monkeypatch):
    monkeypatch.setattr(served, "text_ids", lambda data, text: pytest.fail("tokenised"))
    (answer,) = model.execute([Request("a", START, text=b"x" * 4000)])
    assert "4,000 bytes of text" in str(answer.error)


@pytest.mark.parametrize("dataset", ["text8", "enwik8", "lm1b"])
def test_text_whose_tokens_depend_on_the_cut_comes_whole(dataset):
    data = ModelData(dataset, Vocabulary(["<unk>", "<S>"], unit="word"), None)
    with pytest.raises(UsageError, match="as a whole"):
        served.check_takes_parts(data)
    served.check_takes_parts(ModelData("wt103", Vocabulary(["<unk>", "<eos>"], unit="word"), None))


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_sequences_that_are_idle_for_too_long_or_too_many_are_let_go_the_longest_idle_first():
    clock, gone = Clock(), []
    sequences: Sequences[list[int]] = Sequences(list, gone.append, most=2, idle_s=10, clock=clock)
    streams = {}
    for key in "abc":
        streams[key] = sequences.take(key, starts=True)
        clock.now += 1
    sequences.take("a", starts=False)
    sequences.sweep()
    assert [stream is streams["b"] for stream in gone] == [True]
    clock.now += 10.5
    sequences.sweep()
    assert len(sequences) == 0
    with pytest.raises(SequenceLost):
        sequences.take("a", starts=False)


def test_a_sequence_is_not_idle_while_the_model_works_for_others(model, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(served.time, "monotonic", lambda: now[0])
    model.execute([Request("a", START, input_ids=text(1, 9))])
    score = model._streams.score

    def slow(parts):
        now[0] += 3600
        return score(parts)

    monkeypatch.setattr(model._streams, "score", slow)
    model.execute([Request("b", START, input_ids=text(1, 9))])
    (answer,) = model.execute([Request("a", input_ids=text(1, 9))])
    assert answer.error is None
