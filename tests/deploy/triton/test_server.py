"""Serving on a real Triton Inference Server: what a sequence costs is what `txl eval` says, whatever else goes on beside it."""

from __future__ import annotations

import concurrent.futures
import contextlib
import itertools
import json
import re
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.deploy.conftest import TGT_LEN, Exports
from tests.deploy.test_streams import alone, cut, text
from tests.deploy.triton import server as servers
from txl_deploy.corpora import open_corpus
from txl_deploy.opening import open_exported
from txl_deploy.triton.config import ServeOptions
from txl_deploy.triton.repository import write_repository

pytest.importorskip("tritonclient.grpc", reason="tritonclient is not installed")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(servers.why_not() is not None, reason=str(servers.why_not())),
    pytest.mark.filterwarnings("ignore"),  # of gevent and gRPC about threads
]

from txl_deploy.triton.client import RequestRefused, SequenceClient, ServerUnreachable  # noqa: E402
from txl_deploy.triton.sequences import SequenceLost  # noqa: E402

MAX_SEQUENCES = 64
IDLE_S = 3.0


@pytest.fixture(scope="module")
def repository(exports: Exports, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models of one artifact: one as it comes, and one that forgets soon, holds few sequences and lets each step alone."""
    out = tmp_path_factory.mktemp("repository")
    write_repository([exports.onnx], out, ServeOptions(max_sequences=MAX_SEQUENCES, threads=1))
    options = ServeOptions(name="forgetful", max_batch_size=1, max_sequences=3, max_idle_s=IDLE_S, max_tokens=50, threads=1)
    write_repository([exports.onnx], out, options)
    return out


@pytest.fixture(scope="module")
def server(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[servers.Server]:
    with servers.running(repository, tmp_path_factory.mktemp("server")) as started:
        yield started


@pytest.fixture(scope="module")
def runtime(exports: Exports):
    return open_exported(exports.onnx).runtime


@pytest.fixture(params=["http", "grpc"])
def protocol(request: pytest.FixtureRequest) -> str:
    return request.param


def client(server: servers.Server, protocol: str = "grpc", **settings) -> SequenceClient:
    return SequenceClient(server.grpc if protocol == "grpc" else server.http, protocol=protocol, **settings)


def test_a_corpus_streamed_through_sequences_has_the_perplexity_of_txl_eval(server, exports, capsys):
    """Four sequences in turns, in parts of other lengths than segments."""
    from txl_deploy.cli.main import main

    assert main(["eval", "--artifact", str(exports.onnx), "--split", "test", "--batch-size", "4", "--json", "-qq"]) == 0
    expected = json.loads(capsys.readouterr().out)
    opened = open_exported(exports.onnx)
    ids = np.asarray(open_corpus(opened.model_data, dataset=None, data=None).ids("test"), dtype=np.int64)
    bounds = np.linspace(0, len(ids) - 1, 5).astype(int)
    streams = [ids[low : high + 1] for low, high in itertools.pairwise(bounds)]  # each token once as a target
    total, count = 0.0, 0
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(client(server)) for _ in streams]
        waiting = [cut(stream, [11, 3, TGT_LEN]) for stream in streams]
        while any(waiting):
            for one, parts in zip(clients, waiting):
                if parts:
                    part = parts.pop(0)
                    scores = one.score(input_ids=part, end=not parts)
                    total, count = total + scores.nll_nats_sum, count + int(scores.counted_N.sum())
    assert count == expected["n_tokens"] == len(ids) - 1
    cold = sum(alone(opened.runtime, stream).astype(np.float64).sum() for stream in streams)
    assert np.exp(total / count) == pytest.approx(np.exp(cold / count), rel=1e-6)


def test_one_sequence_of_the_whole_corpus_has_the_perplexity_of_txl_eval(server, exports, capsys, protocol):
    from txl_deploy.cli.main import main

    assert main(["eval", "--artifact", str(exports.onnx), "--split", "test", "--batch-size", "1", "--json", "-qq"]) == 0
    expected = json.loads(capsys.readouterr().out)
    ids = open_corpus(open_exported(exports.onnx).model_data, dataset=None, data=None).ids("test")
    total, count = 0.0, 0
    with client(server, protocol) as one:
        for part in cut(np.asarray(ids, dtype=np.int64), [13, 1, 40]):
            scores = one.score(input_ids=part)
            total, count = total + scores.nll_nats_sum, count + int(scores.counted_N.sum())
    assert count == expected["n_tokens"]
    assert np.exp(total / count) == pytest.approx(expected["perplexity"], rel=1e-6)


def test_64_interleaved_sequences_each_cost_what_they_cost_alone(server, runtime):
    """Of different lengths, starting, ending and idling at different times, from sixteen threads."""
    texts = [text(seed, 3 + 5 * (seed % 17)) for seed in range(64)]

    def send(seed: int) -> np.ndarray:
        generator = np.random.default_rng(seed)
        found = []
        with client(server, replay=False, sequence_id=seed + 1 if seed % 2 else f"user-{seed}") as one:
            time.sleep(generator.random() * 0.3)
            parts = cut(texts[seed], generator.integers(1, 20, 4).tolist())
            for i, part in enumerate(parts):
                scores = one.score(input_ids=part, end=i == len(parts) - 1)
                found.append(scores.nll_N[scores.counted_N])
                if generator.random() < 0.1:
                    time.sleep(generator.random() * 0.4)
        return np.concatenate(found)

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        together = list(pool.map(send, range(64)))
    for seed in range(64):
        np.testing.assert_allclose(together[seed], alone(runtime, texts[seed]), atol=2e-6)
    rows, steps = (_metric(server, f"txl_{name}_total") for name in ("rows", "steps"))
    assert rows > steps, "some of them have stepped together"


def test_interleaved_sequences_that_step_one_at_a_time_cost_the_same_to_the_last_bit(server, runtime):
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(client(server, model="forgetful")) for _ in range(3)]
        turns = zip(*(cut(text(seed, 60), [7 + seed]) for seed in range(3)))
        found = [[one.score(input_ids=part) for one, part in zip(clients, parts)] for parts in turns]
    for seed, results in enumerate(zip(*found)):
        costs = np.concatenate([scores.nll_N[scores.counted_N] for scores in results])
        np.testing.assert_array_equal(costs, alone(runtime, text(seed, 60))[: len(costs)])


def _metric(server: servers.Server, name: str) -> float:
    lines = [line for line in server.metrics_text().splitlines() if line.startswith(name) and 'model="txl"' in line]
    return float(lines[0].rsplit(" ", 1)[1])


def test_text_costs_what_its_tokens_cost(server, exports, protocol):
    """Sent in parts, with a word that the vocabulary lacks and the ends of lines."""
    with client(server, protocol) as by_text, client(server, protocol) as by_ids:
        first, second = by_text.score("word1 word2 unheard\nword3"), by_text.score(" word4\n", end=True)
        assert first.token_ids_N.tolist() == [3, 4, 1, 0, 5]
        assert second.token_ids_N.tolist() == [6, 0]
        assert first.counted_N.tolist() == [False, True, True, True, True]
        assert first.nll_N[0] == 0
        ids = by_ids.score(input_ids=[3, 4, 1, 0, 5, 6, 0])
    np.testing.assert_allclose(np.concatenate([first.nll_N, second.nll_N]), ids.nll_N, atol=2e-6)


def test_a_sequence_that_begins_again_never_sees_its_old_memory(server, runtime):
    with client(server, sequence_id=71, replay=False) as one:
        one.score(input_ids=text(1, 30))
    with client(server, sequence_id=71, replay=False) as again:  # dropped without an end, and its number is used again
        scores = again.score(input_ids=text(2, 20), end=True)
        np.testing.assert_allclose(scores.nll_N[1:], alone(runtime, text(2, 20)), atol=2e-6)
        after = again.score(input_ids=text(3, 20))
        np.testing.assert_allclose(after.nll_N[1:], alone(runtime, text(3, 20)), atol=2e-6)


def test_an_evicted_sequence_is_refused_and_its_place_is_a_cold_start(server, runtime):
    """Three sequences fill the server, and the ones that are idle for too long give way to others, who see nothing of them."""
    with contextlib.ExitStack() as stack:
        old = [stack.enter_context(client(server, model="forgetful", replay=False)) for _ in range(3)]
        for i, one in enumerate(old):
            one.score(input_ids=text(i, 25))
        waiting = stack.enter_context(client(server, model="forgetful", replay=False))
        scores = waiting.score(input_ids=text(9, 25), end=True)  # there is no place for it until the others are forgotten
        np.testing.assert_allclose(scores.nll_N[1:], alone(runtime, text(9, 25)), atol=2e-6)
        new = [stack.enter_context(client(server, model="forgetful", replay=False)) for _ in range(2)]
        for i, one in enumerate(new):
            scores = one.score(input_ids=text(10 + i, 25))
            np.testing.assert_allclose(scores.nll_N[1:], alone(runtime, text(10 + i, 25)), atol=2e-6)
        for one in old:
            with pytest.raises(SequenceLost, match="no longer has sequence"):
                one.score(input_ids=text(4, 5))
        for i, one in enumerate(new):  # who go on as if nothing was
            scores = one.score(input_ids=text(20 + i, 9), end=True)
            expected = alone(runtime, np.concatenate([text(10 + i, 25), text(20 + i, 9)]))[24:]
            np.testing.assert_allclose(scores.nll_N, expected, atol=2e-6)


def test_a_client_begins_again_what_the_server_forgot_and_goes_on(server, runtime):
    with client(server, model="forgetful", part_tokens=20) as one:
        first = one.score(input_ids=text(1, 45))
        time.sleep(IDLE_S + 2.5)  # the server looks once in a while
        second = one.score(input_ids=text(2, 11), end=True)
        assert one.n_replays == 1
    expected = alone(runtime, np.concatenate([text(1, 45), text(2, 11)]))
    np.testing.assert_allclose(np.concatenate([first.nll_N[1:], second.nll_N]), expected, atol=2e-6)


def test_a_server_that_has_read_something_else_of_a_sequence_is_noticed(server, runtime):
    """As one does that comes back behind a router with a memory of before: its memory would be of another text."""
    with client(server, sequence_id=505, replay=False) as one, client(server, sequence_id=505, replay=False) as stranger:
        one.score(input_ids=text(1, 12))
        stranger._sent, stranger._is_open = list(one._sent), True
        stranger.score(input_ids=text(9, 3))
        with pytest.raises(SequenceLost, match="has read 15 tokens of it, not 12"):
            one.score(input_ids=text(2, 6))
    with client(server, sequence_id=506) as one, client(server, sequence_id=506) as stranger:
        one.score(input_ids=text(1, 12))
        stranger._sent, stranger._is_open = list(one._sent), True
        stranger.score(input_ids=text(9, 3))
        after = one.score(input_ids=text(2, 6), end=True)
        assert one.n_replays == 1
    np.testing.assert_allclose(after.nll_N, alone(runtime, np.concatenate([text(1, 12), text(2, 6)]))[11:], atol=2e-6)


def test_a_last_request_that_is_refused_may_be_sent_again(server, runtime):
    with client(server) as one:
        one.score(input_ids=text(1, 12))
        with pytest.raises(RequestRefused):
            one.score(input_ids=[99], end=True)
        after = one.score(input_ids=text(2, 6), end=True)
    np.testing.assert_allclose(after.nll_N, alone(runtime, np.concatenate([text(1, 12), text(2, 6)]))[11:], atol=2e-6)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"input_ids": [1, 99]}, "Token 1 has the id 99, but the model's vocabulary has the ids 0 to 22"),
        ({"input_ids": [-3]}, "Token 0 has the id -3"),
        ({"input_ids": [1] * 51}, "50 tokens at most, but this one has 51"),
        ({"input_ids": []}, ""),
        ({"text": ""}, "one or more token ids"),
        ({"text": "word1 " * 60}, "50 tokens at most"),
    ],
)
def test_a_wrong_request_is_refused_with_its_reason_and_the_sequence_goes_on(server, runtime, protocol, asked, said):
    with client(server, protocol, model="forgetful", replay=False) as one:
        before = one.score(input_ids=text(1, 12))
        with pytest.raises(RequestRefused, match=said):
            one.score(**asked)
        after = one.score(input_ids=text(2, 6), end=True)
    expected = alone(runtime, np.concatenate([text(1, 12), text(2, 6)]))
    np.testing.assert_allclose(np.concatenate([before.nll_N[1:], after.nll_N]), expected, atol=2e-6)
    assert server.is_ready()


def test_wrong_shapes_types_and_names_get_clear_errors_and_leave_the_server_healthy(server):
    import tritonclient.grpc as grpc
    from tritonclient.utils import InferenceServerException

    raw = grpc.InferenceServerClient(server.grpc)

    def ask(name: str, kind: str, value: np.ndarray, model: str = "txl", **settings) -> None:
        tensor = grpc.InferInput(name, list(value.shape), kind)
        tensor.set_data_from_numpy(value)
        raw.infer(model, [tensor], **{"sequence_id": 901, "sequence_start": True, **settings})

    ids = np.array([[1, 2, 3]], dtype=np.int64)
    for arguments, settings, said in (
        (("input_ids", "INT64", ids[0]), {}, r"unexpected shape|\[1,-1\]|\[-1,-1\]"),
        (("input_ids", "INT64", ids[None]), {}, r"unexpected shape|\[-1,-1\]"),
        (("input_ids", "INT64", np.repeat(ids, 2, axis=0)), {}, "must specify batch-size 1"),
        (("input_ids", "INT64", np.repeat(ids, 9, axis=0)), {}, "batch-size must be <= 8"),
        (("input_ids", "INT32", ids.astype(np.int32)), {}, "data-type"),
        (("tokens", "INT64", ids), {}, "unexpected inference input 'tokens'"),
        (("input_ids", "INT64", ids), {"model": "absent"}, "unknown model"),
        (("input_ids", "INT64", ids), {"sequence_id": 0}, "non-zero or non-empty correlation ID"),
        (("input_ids", "INT64", ids), {"sequence_start": False, "sequence_id": 902}, "must specify the START flag"),
        (("text", "BYTES", np.array([[b"\xff\xfe"]], dtype=np.object_)), {}, "not UTF-8"),
    ):
        with pytest.raises(InferenceServerException, match=said):
            ask(*arguments, **settings)
        assert server.is_ready()
    ask("input_ids", "INT64", ids)


def test_the_documented_clients_run_as_they_stand(server, capsys):
    """The Python blocks of docs/serving.md, against this server."""
    document = (Path(__file__).resolve().parents[3] / "docs" / "serving.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", document, re.M | re.S)
    assert len(blocks) == 2
    for block in blocks:
        exec(block.replace("localhost:8000", server.http).replace("localhost:8001", server.grpc), {})
    shown = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"perplexity \d+\.\d over \d+ tokens", shown[0])
    assert len(shown) == 3


def test_what_each_answer_is_asked_for_is_all_it_holds(server):
    import tritonclient.grpc as grpc

    tensor = grpc.InferInput("input_ids", [1, 3], "INT64")
    tensor.set_data_from_numpy(np.array([[1, 2, 3]], dtype=np.int64))
    raw = grpc.InferenceServerClient(server.grpc)
    answer = raw.infer("txl", [tensor], outputs=[grpc.InferRequestedOutput("nll")], sequence_id=903, sequence_start=True, sequence_end=True)
    assert [output.name for output in answer.get_response().outputs] == ["nll"]


def test_a_killed_server_loses_only_what_was_in_flight(repository, runtime, tmp_path):
    """Clients get a clear error, and when the server is back they go on with the same numbers."""
    shutil.copytree(repository / "txl", tmp_path / "repository" / "txl")
    server = servers.Server(tmp_path / "repository", tmp_path)
    server.start()
    try:
        with client(server, "http") as one, client(server, "grpc") as other:
            found = [[one.score(input_ids=text(1, 23))], [other.score(input_ids=text(2, 23))]]
            stop = threading.Event()
            failures = []

            def hammer() -> None:
                with client(server, "grpc") as busy:
                    while not stop.is_set():
                        try:
                            busy.score(input_ids=text(3, 40))
                        except ServerUnreachable as error:
                            failures.append(error)
                            return

            thread = threading.Thread(target=hammer)
            thread.start()
            time.sleep(0.5)
            server.kill()
            thread.join(30)
            stop.set()
            assert failures, "the one in flight has heard of it"
            assert "did not answer" in failures[0].message or "could not answer" in failures[0].message
            for asked in (one, other):
                with pytest.raises(ServerUnreachable, match="answer"):
                    asked.score(input_ids=text(4, 8))
            server.start()
            for asked, results in ((one, found[0]), (other, found[1])):
                results.append(_until_reached(asked, text(4, 8)))
                assert asked.n_replays == 1
        for seed, results in ((1, found[0]), (2, found[1])):
            expected = alone(runtime, np.concatenate([text(seed, 23), text(4, 8)]))
            np.testing.assert_allclose(np.concatenate([results[0].nll_N[1:], results[1].nll_N]), expected, atol=2e-6)
    finally:
        server.kill()


def _until_reached(asked: SequenceClient, ids: np.ndarray):
    """Send until the connection is made again, which gRPC tries after a while."""
    until = time.monotonic() + 60
    while True:
        try:
            return asked.score(input_ids=ids)
        except ServerUnreachable:
            if time.monotonic() > until:
                raise
            time.sleep(0.2)


def test_a_changed_byte_keeps_the_server_from_loading_the_model(repository, tmp_path):
    copy = tmp_path / "repository"
    shutil.copytree(repository / "txl", copy / "txl")
    graph = copy / "txl" / "1" / "artifact" / "model.onnx"
    data = bytearray(graph.read_bytes())
    data[len(data) // 2] ^= 1
    graph.write_bytes(data)
    with pytest.raises(RuntimeError, match="is not what its manifest says"):
        servers.Server(copy, tmp_path).start()
