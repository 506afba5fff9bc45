"""What is written for Triton: configurations that the server's own schema accepts, and graphs that do under them what they should."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.deploy.conftest import TGT_LEN, Exports
from tests.deploy.test_streams import alone, text
from txl_deploy import manifest as manifests
from txl_deploy.cli.main import main
from txl_deploy.export.served import export_served
from txl_deploy.manifest import EngineFacts
from txl_deploy.opening import open_exported
from txl_deploy.triton.config import ServeOptions, pairs_of_states, to_text
from txl_deploy.triton.repository import write_repository
from txl_train.errors import UsageError

OPTIONS = ServeOptions(max_batch_size=4, max_sequences=16, max_idle_s=30, queue_delay_us=500, instances=2, threads=2)


@pytest.fixture(scope="module")
def served(exports: Exports, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("served") / "onnx"
    export_served(exports.onnx, out)
    return out


def engine_of(graph: Path, out: Path, capability: str, **changes: Any) -> Path:
    """Write an artifact as a target's build leaves it, with a plan of no meaning: a plan of TensorRT takes its GPU to build."""
    out.mkdir()
    parent = manifests.read_manifest(graph)
    (out / "model.plan").write_bytes(f"plan for {capability}".encode())
    (out / "parent.json").write_bytes((graph / "manifest.json").read_bytes())
    (out / "vocabulary.json").write_bytes((graph / "vocabulary.json").read_bytes())
    manifest = dataclasses.replace(
        parent,
        **{
            "format": "trt",
            "files": {},
            "batch": manifests.BatchRange(min=1, opt=4, max=8),
            "source": dataclasses.replace(
                parent.source,
                parent=manifests.Parent(manifest_sha256=manifests.file_sha256(out / "parent.json"), format="onnx"),
            ),
            "engine": EngineFacts(builder="tensorrt", builder_version="11.4.0", target="t4", compute_capability=capability),
            **changes,
        },
    )
    manifests.write_manifest(out, manifest, ["model.plan", "parent.json", "vocabulary.json"])
    return out


def parsed(folder: Path) -> Any:
    """Return the configuration as the server's own schema, which tritonclient ships, has it."""
    schema = pytest.importorskip("tritonclient.grpc.model_config_pb2", reason="tritonclient is not installed")
    from google.protobuf import text_format

    return text_format.Parse((folder / "config.pbtxt").read_text(encoding="utf-8"), schema.ModelConfig())


def test_the_python_backend_s_configuration_is_valid_and_says_what_was_asked_for(exports, tmp_path):
    written = write_repository([exports.onnx], tmp_path / "repository", dataclasses.replace(OPTIONS, name="lm"))
    config = parsed(tmp_path / "repository" / "lm")
    assert (config.name, config.backend, config.max_batch_size, written.backend) == ("lm", "python", 4, "python")
    assert [(tensor.name, list(tensor.dims), tensor.optional) for tensor in config.input] == [
        ("text", [1], True),
        ("input_ids", [-1], True),
        ("position", [1], True),
    ]
    assert [tensor.name for tensor in config.output] == ["token_ids", "nll", "counted"]
    sequences = config.sequence_batching
    assert sequences.max_sequence_idle_microseconds == 30_000_000
    assert sequences.oldest.max_candidate_sequences == 16
    assert sequences.oldest.max_queue_delay_microseconds == 500
    assert not sequences.state, "its memory is kept by the model"
    assert [(group.count, group.kind) for group in config.instance_group] == [(2, 2)]
    assert {key: value.string_value for key, value in config.parameters.items()} == {
        "max_tokens": "8192",
        "max_sequences": "16",
        "max_idle_s": "30",
        "threads": "2",
    }
    artifact = tmp_path / "repository" / "lm" / "1" / "artifact"
    assert manifests.verify(artifact) == []


def test_the_onnx_runtime_backend_s_configuration_keeps_the_memory_as_implicit_state(exports, tmp_path):
    """The graph is brought into the form for servers on the way, and is an artifact still."""
    write_repository([exports.onnx], tmp_path / "repository", OPTIONS, backend="onnxruntime")
    folder = tmp_path / "repository" / "txl"
    config = parsed(folder)
    assert (config.backend, config.default_model_filename) == ("onnxruntime", "model.onnx")
    assert [(tensor.name, list(tensor.dims)) for tensor in config.input] == [("input_ids", [TGT_LEN]), ("target_ids", [TGT_LEN])]
    assert [(tensor.name, list(tensor.dims)) for tensor in config.output] == [("nll", [TGT_LEN])]
    states = {state.input_name: state for state in config.sequence_batching.state}
    assert list(states) == ["memory_length", *(f"past_key_values.{i}.{part}" for i in range(2) for part in ("key", "value"))]
    for name, state in states.items():
        assert list(state.dims) == ([1] if name == "memory_length" else [2, 7, 3]), "fixed shapes, without the axis of streams"
        (initial,) = state.initial_state
        assert initial.zero_data
        assert (list(initial.dims), initial.data_type) == (list(state.dims), state.data_type)
    assert manifests.read_verified(folder / "1").served


def test_engines_for_several_gpus_are_one_model_with_a_plan_for_each(served, tmp_path):
    engines = [engine_of(served, tmp_path / capability, capability) for capability in ("7.5", "7.0")]
    written = write_repository(engines, tmp_path / "repository", dataclasses.replace(OPTIONS, device="gpu"))
    folder = tmp_path / "repository" / "txl"
    config = parsed(folder)
    assert config.backend == written.backend == "tensorrt"
    assert dict(config.cc_model_filenames) == {"7.0": "model-7.0.plan", "7.5": "model-7.5.plan"}
    assert (folder / "1" / "model-7.5.plan").read_bytes() == b"plan for 7.5"
    assert config.instance_group[0].kind == 1
    assert len(config.sequence_batching.state) == 5
    assert manifests.read_manifest(folder / "1" / "7.0").engine.compute_capability == "7.0"


def test_states_are_in_the_same_order_by_their_names_before_and_after(served):
    """The server pairs them so, whatever the configuration says (triton-inference-server/server, issue 8586)."""
    pairs = pairs_of_states(manifests.read_manifest(served))
    assert sorted(pairs, key=lambda pair: pair[0].name) == sorted(pairs, key=lambda pair: pair[1].name)


class ImplicitState:
    """What a server does with a graph under its configuration: batches sequences, feeds back states, begins with the initial ones."""

    def __init__(self, folder: Path) -> None:
        import onnxruntime

        self.config = parsed(folder)
        self.session = onnxruntime.InferenceSession(
            str(folder / "1" / self.config.default_model_filename), providers=["CPUExecutionProvider"]
        )
        states = self.config.sequence_batching.state
        # paired by the order of their names, as the server does
        self.pairs = list(zip(sorted(state.input_name for state in states), sorted(state.output_name for state in states)))
        self.initial = {state.input_name: (list(state.dims), {9: np.int64, 11: np.float32}[state.data_type]) for state in states}
        self.held: dict[int, dict[str, np.ndarray]] = {}

    def infer(self, requests: dict[int, tuple[dict[str, np.ndarray], bool]]) -> dict[int, np.ndarray]:
        """Return the nll of each sequence's segment, of inputs and whether it starts."""
        for key, (_, starts) in requests.items():
            if starts:
                self.held[key] = {name: np.zeros((1, *dims), dtype) for name, (dims, dtype) in self.initial.items()}
        keys = list(requests)
        feeds = {name: np.concatenate([requests[key][0][name] for key in keys]) for name in ("input_ids", "target_ids")}
        feeds |= {name: np.concatenate([self.held[key][name] for key in keys]) for name in self.initial}
        names = ["nll", *(after for _, after in self.pairs)]
        nll, *states = self.session.run(names, feeds)
        for b, key in enumerate(keys):
            self.held[key] = {before: state[b : b + 1] for (before, _), state in zip(self.pairs, states)}
        return {key: nll[b : b + 1] for b, key in enumerate(keys)}


def test_under_implicit_state_interleaved_sequences_cost_what_they_cost_alone(exports, tmp_path):
    """Of what the configuration says, without a server: its ONNX Runtime backend is not to be had here."""
    write_repository([exports.onnx], tmp_path / "repository", OPTIONS, backend="onnxruntime")
    server = ImplicitState(tmp_path / "repository" / "txl")
    runtime = open_exported(exports.onnx).runtime
    texts = [text(seed, 1 + TGT_LEN * (2 + seed)) for seed in range(5)]
    generator = np.random.default_rng(0)
    found: list[list[np.ndarray]] = [[] for _ in texts]
    while able := [i for i, ids in enumerate(texts) if len(found[i]) * TGT_LEN < len(ids) - 1]:
        chosen = generator.permutation(able)[: generator.integers(1, 5)]
        requests = {}
        for i in chosen:
            start = len(found[i]) * TGT_LEN
            part = texts[i][start : start + TGT_LEN + 1][None]
            requests[int(i)] = ({"input_ids": part[:, :-1], "target_ids": part[:, 1:]}, start == 0)
        for i, nll in server.infer(requests).items():
            found[i].append(nll[0])
    for ids, results in zip(texts, found):
        np.testing.assert_allclose(np.concatenate(results), alone(runtime, ids), atol=2e-6)


def test_the_command_says_what_it_wrote_and_replaces_only_its_own(exports, tmp_path, capsys):
    out = tmp_path / "repository"
    command = ["export", "--format", "triton", "--artifact", str(exports.onnx), "--out", str(out), "--max-batch-size", "4"]
    assert main(command) == 0
    assert f"tritonserver --model-repository={out}" in capsys.readouterr().out
    assert main(command) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main([*command, "--overwrite", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["backend"] == "python"
    assert main([*command, "--name", "other"]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["other", "txl"]
    (out / "stranger").mkdir()
    (out / "stranger" / "config.pbtxt").write_text('name: "stranger"')
    capsys.readouterr()
    assert main([*command, "--name", "stranger", "--overwrite"]) == 2
    assert (out / "stranger" / "config.pbtxt").read_text() == 'name: "stranger"'


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--tgt-len", "3"], "`--tgt-len` says how to export a checkpoint"),
        (["--name", "a/b"], "is no name for a model"),
        (["--max-sequences", "2"], "`--max-sequences` must be `--max-batch-size` (8) or more"),
        (["--backend", "tensorrt"], "holds onnx"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(exports, tmp_path, capsys, options, said):
    out = tmp_path / "repository"
    assert main(["export", "--format", "triton", "--artifact", str(exports.onnx), "--out", str(out), *options]) == 2
    assert said in capsys.readouterr().err
    assert not (out / "txl").exists()


def test_options_of_a_server_are_refused_elsewhere(exports, tmp_path, capsys):
    arguments = ["export", "--checkpoint", str(exports.checkpoint), "--format", "onnx", "--out", str(tmp_path / "out"), "--max-idle", "3"]
    assert main(arguments) == 2
    assert "`--max-idle` is for a server" in capsys.readouterr().err
    assert main(["export", "--format", "triton", "--out", str(tmp_path / "out")]) == 2
    assert "Give `--artifact DIR`" in capsys.readouterr().err


def test_what_cannot_be_served_is_refused(exports, served, logits_onnx, fp16_onnx, tmp_path):
    other = tmp_path / "other"
    export_served(fp16_onnx, other)
    for artifacts, backend, said in (
        ([logits_onnx], None, "--head nll"),
        ([exports.torchscript], "onnxruntime", "holds torchscript"),
        ([exports.onnx, exports.torchscript], None, "engines for different GPUs"),
        ([engine_of(exports.onnx, tmp_path / "plain", "7.5", source=manifests.read_manifest(served).source)], "tensorrt", "no server can"),
        ([engine_of(served, tmp_path / "a", "7.5"), engine_of(served, tmp_path / "b", "7.5")], None, "two engines for compute capability"),
        ([engine_of(served, tmp_path / "c", "7.5"), engine_of(other, tmp_path / "d", "7.0")], None, "another settings"),
        ([engine_of(served, tmp_path / "e", "7.5", batch=manifests.BatchRange(min=2, opt=4, max=8))], None, "at least"),
        ([engine_of(served, tmp_path / "f", "7.5", batch=manifests.BatchRange(min=1, opt=2, max=2))], None, "takes 2 streams at most"),
    ):
        with pytest.raises(UsageError, match=said):
            write_repository(artifacts, tmp_path / "repository", OPTIONS, backend=backend)
    assert not (tmp_path / "repository" / "txl").exists()


def test_text_in_a_configuration_is_quoted():
    assert to_text({"a": 'say "x"\n', "b": [1, 2], "c": True, "d": {"e": 0.5}}).splitlines() == [
        'a: "say \\"x\\"\\n"',
        "b: 1",
        "b: 2",
        "c: true",
        "d {",
        "  e: 0.5",
        "}",
    ]
