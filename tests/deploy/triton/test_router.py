"""The files for several servers: what they name fits together, and the router's own configuration sends sequences where their memory is."""

from __future__ import annotations

import contextlib
import re
import shutil
import socket
import subprocess
import sysconfig
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from tests.deploy.conftest import Exports
from tests.deploy.test_streams import alone, text
from tests.deploy.triton import server as servers
from tests.processes import free_port
from txl_deploy.opening import open_exported
from txl_deploy.triton.config import MINIMUM_SERVER, ServeOptions
from txl_deploy.triton.repository import write_repository

FOLDER = Path(__file__).resolve().parents[3] / "docker" / "serving"


def documents() -> dict[tuple[str, str], Any]:
    found = yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text(encoding="utf-8"))
    return {(document["kind"], document["metadata"]["name"]): document for document in found}


def test_the_linter_finds_nothing_in_the_image():
    linter = shutil.which("hadolint", path=sysconfig.get_path("scripts")) or shutil.which("hadolint")
    if linter is None:
        pytest.skip("needs hadolint")
    done = subprocess.run([linter, "--no-color", str(FOLDER / "triton.Dockerfile")], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_image_is_of_the_release_that_the_tests_run():
    image = (FOLDER / "triton.Dockerfile").read_text(encoding="utf-8")
    assert f"FROM nvcr.io/nvidia/tritonserver:{MINIMUM_SERVER['python']}-py3" in image
    root = FOLDER.parents[1]
    for pin in re.findall(r"(?:torch|numpy)==[\d.]+", image):
        assert pin in (root / "constraints.txt").read_text() + (root / "triton-constraints.txt").read_text()


def test_compose_starts_two_servers_and_a_router_that_knows_both():
    services = yaml.safe_load((FOLDER / "compose.yaml").read_text(encoding="utf-8"))["services"]
    triton = [name for name in services if name.startswith("triton")]
    config = (FOLDER / "nginx.conf").read_text(encoding="utf-8")
    for port in (8000, 8001):
        assert re.findall(rf"server (triton-\d):{port} ", config) == triton
    assert services["router"]["depends_on"].keys() == set(triton)
    assert config.count("hash $sequence consistent;") == 2


def test_kubernetes_selectors_ports_and_routes_name_what_is_there():
    found = documents()
    pods = {name: found[kind, name]["spec"]["template"] for kind, name in (("StatefulSet", "txl-triton"), ("Deployment", "txl-router"))}
    for (kind, _), document in found.items():
        selector = document["spec"].get("selector") if "spec" in document else None
        if kind == "Service":
            (pod,) = [pod for pod in pods.values() if selector.items() <= pod["metadata"]["labels"].items()]
            ports = {port["name"]: port["containerPort"] for container in pod["spec"]["containers"] for port in container["ports"]}
            for port in document["spec"]["ports"]:
                assert ports[port["name"]] == port["port"]
        elif selector is not None:
            assert any(selector["matchLabels"] == pod["metadata"]["labels"] for pod in pods.values())
    (triton,) = pods["txl-triton"]["spec"]["containers"]
    assert triton["readinessProbe"]["httpGet"]["path"] == "/v2/health/ready"
    assert triton["livenessProbe"]["httpGet"]["path"] == "/v2/health/live"
    claims = {
        volume["persistentVolumeClaim"]["claimName"]
        for volume in pods["txl-triton"]["spec"]["volumes"]
        if "persistentVolumeClaim" in volume
    }
    assert {("PersistentVolumeClaim", claim) for claim in claims} <= found.keys()
    envoy = yaml.safe_load(found["ConfigMap", "txl-router"]["data"]["envoy.yaml"])
    clusters = {cluster["name"]: cluster for cluster in envoy["static_resources"]["clusters"]}
    for listener in envoy["static_resources"]["listeners"]:
        (manager,) = listener["filter_chains"][0]["filters"]
        (route,) = manager["typed_config"]["route_config"]["virtual_hosts"][0]["routes"]
        assert route["route"]["hash_policy"] == [{"header": {"header_name": "x-sequence-id"}}]
        cluster = clusters[route["route"]["cluster"]]
        assert cluster["lb_policy"] == "RING_HASH"
        address = cluster["load_assignment"]["endpoints"][0]["lb_endpoints"][0]["endpoint"]["address"]["socket_address"]
        assert ("Service", address["address"]) in found
        assert address["port_value"] == listener["address"]["socket_address"]["port_value"]


@contextlib.contextmanager
def router(work: Path, backends: list[servers.Server]):
    """Run nginx with the shipped configuration, with these servers in place of those of the compose file; yield its two addresses."""
    config = (FOLDER / "nginx.conf").read_text(encoding="utf-8")
    for i, backend in enumerate(backends, 1):
        config = config.replace(f"triton-{i}:8000", backend.http).replace(f"triton-{i}:8001", backend.grpc)
    ports = {8000: free_port(), 8001: free_port(), 8003: free_port()}
    for usual, port in ports.items():
        config = config.replace(f"listen {usual}", f"listen 127.0.0.1:{port}")
    path = work / "nginx.conf"
    path.write_text(config.replace("/tmp/txl-router", str(work / "router")), encoding="utf-8")
    process = subprocess.Popen(["nginx", "-c", str(path), "-p", str(work), "-g", "daemon off; user root;"])
    try:
        until = time.monotonic() + 20
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", ports[8003]), timeout=1):
                break
            assert process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.05)
        yield f"127.0.0.1:{ports[8000]}", f"127.0.0.1:{ports[8001]}"
    finally:
        process.terminate()
        process.wait(20)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of gevent and gRPC about threads
@pytest.mark.skipif(servers.why_not() is not None, reason=str(servers.why_not()))
@pytest.mark.skipif(shutil.which("nginx") is None, reason="needs nginx")
def test_a_router_before_two_servers_keeps_each_sequence_on_its_server_and_moves_those_of_a_lost_one(exports: Exports, tmp_path: Path):
    pytest.importorskip("tritonclient.grpc", reason="tritonclient is not installed")
    from txl_deploy.triton.client import SequenceClient, ServerUnreachable

    write_repository([exports.onnx], tmp_path / "repository", ServeOptions(threads=1))
    runtime = open_exported(exports.onnx).runtime
    with contextlib.ExitStack() as stack:
        backends = []
        for i in (1, 2):
            (tmp_path / str(i)).mkdir()
            backends.append(stack.enter_context(servers.running(tmp_path / "repository", tmp_path / str(i))))
        http, grpc = stack.enter_context(router(tmp_path, backends))
        clients = [
            stack.enter_context(SequenceClient(url, protocol=protocol, sequence_id=f"user-{i}", replay=False))
            for i in range(12)
            for url, protocol in [(http, "http") if i % 2 else (grpc, "grpc")]
        ]
        found: list[list[np.ndarray]] = [[] for _ in clients]
        for turn in range(4):
            for i, one in enumerate(clients):  # without a replay: another server would refuse it
                found[i].append(one.score(input_ids=text(100 * turn + i, 9)).nll_N)
        held = [float(re.search(r"^txl_sequences\S* (\S+)", backend.metrics_text(), re.M).group(1)) for backend in backends]
        assert sum(held) == 12
        assert min(held) > 0, "both servers have some"
        backends[0].kill()
        for one in clients:
            one.replay = True
        for i, one in enumerate(clients):
            until = time.monotonic() + 30
            while True:
                try:
                    found[i].append(one.score(input_ids=text(400 + i, 9)).nll_N)
                    break
                except ServerUnreachable:  # until the router has noticed
                    assert time.monotonic() < until
                    time.sleep(0.1)
        assert sum(one.n_replays for one in clients) == held[0], "those of the lost server began again, and no others"
    for i, results in enumerate(found):
        expected = alone(runtime, np.concatenate([text(100 * turn + i, 9) for turn in range(5)]))
        np.testing.assert_allclose(np.concatenate(results)[1:], expected, atol=2e-6)
