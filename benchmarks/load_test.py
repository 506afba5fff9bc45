"""Loads a Triton server with many sequences that send at random times, and says what that costs beside the same model in this process.

    python benchmarks/load_test.py --artifact W/onnx --rates 5,10,20 --seconds 60        # starts the server of `make triton`
    python benchmarks/load_test.py --artifact W/onnx --url localhost:8001 --rates 100     # one that runs already, with this artifact

Requests arrive as a Poisson process at a given rate whether or not earlier ones were answered (an open loop), each of the next sequence in
turn, with one segment of a text. A latency begins when its request was due, so a server that falls behind cannot hide it. Before that, one
sequence asks the server and a session in this process by turns: the difference of their medians is what the server adds to a step.

Exit code 1 if a request failed. Writes benchmarks/results/serving_<device>_<yyyymm>.json and .md.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import dataclasses
import datetime
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from running import ROOT, device_slug, without_folders

from txl_deploy.bench.environment import describe_environment, describe_state, git_commit
from txl_deploy.bench.stats import LatencySummary, parse_percentiles, ratio_interval
from txl_deploy.opening import open_exported
from txl_deploy.streams import Stream, Streams
from txl_deploy.triton.client import SequenceClient
from txl_deploy.triton.config import ServeOptions
from txl_deploy.triton.repository import write_repository
from txl_train.errors import TxlError
from txl_train.files import file_sha256

PERCENTILES = parse_percentiles("50,90,95,99")
ALONE_TURNS = 400
"""Steps of server and session by turns."""
WARM_UP = 20


@dataclasses.dataclass(frozen=True)
class Target:
    """Where the requests go."""

    url: str
    model: str
    tgt_len: int
    vocab_size: int


def texts(target: Target, count: int, segments: int, seed: int) -> list[np.ndarray]:
    """Return random ids for so many sequences of so many segments, and one more token."""
    generator = np.random.default_rng(seed)
    return [generator.integers(0, target.vocab_size, target.tgt_len * segments + 1) for _ in range(count)]


def alone(target: Target, streams: Streams, turns: int) -> dict[str, Any]:
    """Ask server and session by turns, with one sequence each, and compare their latencies and results."""
    (ids,) = texts(target, 1, turns + WARM_UP, 0)
    stream = Stream()
    latencies: dict[str, list[float]] = {"server": [], "session": []}
    difference = 0.0
    with SequenceClient(target.url, protocol="grpc", model=target.model) as client:
        streams.score([(stream, ids[:1])])
        client.score(input_ids=ids[:1])
        for turn in range(turns + WARM_UP):
            part = ids[1 + turn * target.tgt_len : 1 + (turn + 1) * target.tgt_len]
            begun = time.perf_counter()
            (here,) = streams.score([(stream, part)])
            middle = time.perf_counter()
            there = client.score(input_ids=part, end=turn == turns + WARM_UP - 1).nll_N
            ended = time.perf_counter()
            difference = max(difference, float(np.abs(here - there).max()))
            if turn >= WARM_UP:
                latencies["session"].append(1e3 * (middle - begun))
                latencies["server"].append(1e3 * (ended - middle))
    ratio = ratio_interval(latencies["server"], latencies["session"], 50)
    return {
        "n": turns,
        "latencies_ms": latencies,
        "summaries": {name: LatencySummary.of(values, PERCENTILES).to_row() for name, values in latencies.items()},
        "added_ms_p50": statistics.median(a - b for a, b in zip(latencies["server"], latencies["session"])),
        "ratio_p50": statistics.median(latencies["server"]) / statistics.median(latencies["session"]),
        "ratio_p50_interval": ratio,
        "largest_difference_nll": difference,
    }


def open_loop(target: Target, *, rate: float, seconds: float, sequences: int, seed: int, workers: int) -> dict[str, Any]:
    """Send segments at random times for so long; return latencies from when each was due, in order, and what failed."""
    generator = np.random.default_rng(seed)
    due = np.cumsum(generator.exponential(1 / rate, round(rate * seconds * 1.5) + 10))
    due = due[due < seconds]
    per_sequence = -(-len(due) // sequences)
    ids = texts(target, sequences, per_sequence, seed)
    clients = [SequenceClient(target.url, protocol="grpc", model=target.model, replay=False) for _ in range(sequences)]
    turns = [_Turns() for _ in clients]
    latencies = np.full(len(due), np.nan)
    failures: Counter[str] = Counter()
    for client, text in zip(clients, ids):
        client.score(input_ids=text[:1])
    begun = time.perf_counter()

    def send(number: int) -> None:
        which, turn = number % sequences, number // sequences
        part = ids[which][1 + turn * target.tgt_len : 1 + (turn + 1) * target.tgt_len]
        with turns[which].at(turn):
            try:
                clients[which].score(input_ids=part, end=number + sequences >= len(due))
            except TxlError as error:
                failures[type(error).__name__] += 1
                return
            latencies[number] = 1e3 * (time.perf_counter() - begun - due[number])

    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        waiting = []
        for number, moment in enumerate(due):
            delay = moment - (time.perf_counter() - begun)
            if delay > 0:
                time.sleep(delay)
            waiting.append(pool.submit(send, number))
        for future in waiting:
            future.result()
    took = time.perf_counter() - begun
    for which, client in enumerate(clients):
        if which >= len(due):  # nothing was due
            with contextlib.suppress(TxlError):
                client.score(input_ids=ids[which][1:2], end=True)
        client.close()
    answered = latencies[np.isfinite(latencies)]
    return {
        "rate_asked": rate,
        "seconds": took,
        "sequences": sequences,
        "requests": len(due),
        "answered": len(answered),
        "failures": dict(failures),
        "requests_per_s": len(answered) / took,
        "tokens_per_s": len(answered) * target.tgt_len / took,
        "latencies_ms": [round(float(value), 4) for value in answered],
        "summary": LatencySummary.of(answered, PERCENTILES).to_row() if len(answered) else {},
    }


class _Turns:
    """Lets the requests of one sequence go in their order, whichever thread has them."""

    def __init__(self) -> None:
        self._next = 0
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def at(self, turn: int) -> Iterator[None]:
        """Wait for this turn, and end it."""
        with self._changed:
            self._changed.wait_for(lambda: self._next == turn)
        try:
            yield
        finally:
            with self._changed:
                self._next = turn + 1
                self._changed.notify_all()


@contextlib.contextmanager
def server_of(artifact: Path, arguments: argparse.Namespace) -> Iterator[Target]:
    """Yield the server that was named, or start one with this artifact."""
    opened = open_exported(artifact)
    info = opened.runtime.info
    if arguments.url:
        yield Target(arguments.url, arguments.model, info.tgt_len, info.config.vocab_size)
        return
    from tests.deploy.triton import server as servers

    reason = servers.why_not()
    if reason is not None:
        raise SystemExit(f"{reason}.\nRun `make triton`, or name a server with --url.")
    with tempfile.TemporaryDirectory(prefix="txl-") as folder:
        options = ServeOptions(
            name=arguments.model, max_batch_size=arguments.max_batch_size, max_sequences=arguments.sequences + 8, threads=arguments.threads
        )
        write_repository([artifact], Path(folder) / "repository", options)
        with servers.running(Path(folder) / "repository", Path(folder)) as server:
            yield Target(server.grpc, arguments.model, info.tgt_len, info.config.vocab_size)


def table(record: dict[str, Any]) -> str:
    """Return the record for people."""
    one = record["alone"]
    rows = {name: one["summaries"][name] for name in ("session", "server")}
    interval = one["ratio_p50_interval"]
    bounds = "" if interval is None else f" (95 %: {interval[0]:.2f} to {interval[1]:.2f})"
    lines = [
        "# Serving on Triton Inference Server",
        "",
        f"`{record['command']}`, {record['date']}. Model of {record['parameters']:,} parameters (checkpoint sha256 "
        f"{record['checkpoint_sha256'][:12]}…), segments of {record['tgt_len']} tokens, gRPC; {record['server']}. "
        "Raw samples: the JSON beside this.",
        "",
        f"**One sequence, by turns** (n = {one['n']}): the server adds {one['added_ms_p50']:.2f} ms to a step (median of differences), "
        f"{one['ratio_p50']:.2f} times its latency{bounds}.",
        f"Their results differ by {one['largest_difference_nll']:.1e} nats at most.",
        "",
        "| | p50 ms | p95 ms | p99 ms |",
        "|---|---:|---:|---:|",
        *(
            f"| {name} | {row['latency_ms_p50']:.2f} | {row['latency_ms_p95']:.2f} | {row['latency_ms_p99']:.2f} |"
            for name, row in rows.items()
        ),
        "",
        f"**Open loop**: Poisson arrivals, {record['sequences']} sequences; "
        "latency from the moment a request was due. An interval is of 95 %; none where the samples are too few or too alike.",
        "",
        "| requests/s asked | answered/s | tokens/s | n | failed | p50 ms | p95 ms | p99 ms (95 %) | max ms |",
        "|---:|---:|---:|---:|---:|---:|---:|---|---:|",
    ]
    for load in record["loads"]:
        row = load["summary"]
        if not row:
            lines.append(f"| {load['rate_asked']:g} | 0 | 0 | 0 | {sum(load['failures'].values())} | | | | |")
            continue
        summary = LatencySummary.of(load["latencies_ms"], PERCENTILES)
        interval = summary.interval_ms(99)
        shown = "" if interval is None else f" ({interval[0]:.1f} to {interval[1]:.1f})"
        lines.append(
            f"| {load['rate_asked']:g} | {load['requests_per_s']:.1f} | {load['tokens_per_s']:,.0f} | {load['answered']} | "
            f"{sum(load['failures'].values())} | {row['latency_ms_p50']:.1f} | {row['latency_ms_p95']:.1f} | "
            f"{row['latency_ms_p99']:.1f}{shown} | {summary.max_ms:.1f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artifact", type=Path, required=True, help="folder that `txl export` wrote, with --head nll")
    parser.add_argument("--url", help="host:port of a server's gRPC; default: start one")
    parser.add_argument("--model", default="txl", help="its name in the server")
    parser.add_argument("--rates", default="5,10,20", help="requests per second, one after the other")
    parser.add_argument("--seconds", type=float, default=60, help="of each rate")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--max-batch-size", type=int, default=8, help="of a server that is started here")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of server and session")
    parser.add_argument("--turns", type=int, default=ALONE_TURNS, help="steps of server and session by turns")
    parser.add_argument("--workers", type=int, default=64, help="requests in flight at most")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results")
    arguments = parser.parse_args()
    before = describe_state()
    opened = open_exported(arguments.artifact, threads=arguments.threads)
    info = opened.runtime.info
    with server_of(arguments.artifact, arguments) as target:
        one = alone(target, Streams(opened.runtime, max_rows=1), arguments.turns)
        print(f"alone: the server adds {one['added_ms_p50']:.2f} ms", file=sys.stderr)
        loads = []
        for number, rate in enumerate(map(float, arguments.rates.split(","))):
            load = open_loop(
                target, rate=rate, seconds=arguments.seconds, sequences=arguments.sequences, seed=number, workers=arguments.workers
            )
            loads.append(load)
            print(f"{rate:g}/s: {load['requests_per_s']:.1f}/s answered, failures {load['failures']}", file=sys.stderr)
    environment = describe_environment(threads=arguments.threads)
    record = without_folders(
        {
            "kind": "serving",
            "date": datetime.date.today().isoformat(),
            "command": " ".join(["python", *sys.argv]),
            "git_commit": git_commit(),
            "environment": environment,
            "before": before,
            "after": describe_state(),
            "parameters": _parameters(arguments.artifact),
            "checkpoint_sha256": info.checkpoint_sha256,
            "manifest_sha256": file_sha256(arguments.artifact / "manifest.json"),
            "runtime": info.name,
            "dtype": info.dtype,
            "tgt_len": info.tgt_len,
            "mem_len": info.mem_len,
            "threads": arguments.threads,
            "sequences": arguments.sequences,
            "server": _server_told(arguments),
            "alone": one,
            "loads": loads,
        }
    )
    month = datetime.date.today().strftime("%Y%m")
    out = arguments.out or ROOT / "benchmarks" / "results"
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"serving_{device_slug(None, os.cpu_count())}_{month}"
    path.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(table(record), encoding="utf-8")
    print(table(record))
    return 1 if any(load["failures"] for load in loads) else 0


def _server_told(arguments: argparse.Namespace) -> str:
    if arguments.url:
        return f"the server at {arguments.url}, whose settings are not known here"
    threads, most = arguments.threads, arguments.max_batch_size
    return (
        f"a server on loopback, one instance of {threads} threads, up to {most} sequences in a step; client and session on the same cores"
    )


def _parameters(artifact: Path) -> int:
    from txl_deploy.manifest import read_manifest

    return sum(read_manifest(artifact).precisions["weights"].values())


if __name__ == "__main__":
    sys.exit(main())
