"""How time and memory grow: with the corpus, with the memory's length, with the batch, and over 100,000 segments.

    python benchmarks/growth.py                    # some ten minutes on two cores
    python benchmarks/growth.py --quick --out /tmp/x

A model of random weights in eager PyTorch and in ONNX Runtime, the sizes by turns, medians of each. Time per token must not depend on how
long the corpus is; time per step is fitted by a line in the memory's length and in the batch size. What a process holds more after a
model was opened and has run is compared with weights and states by formula. Over 100,000 segments of a very small model the resident size
must not grow. Writes <out>.json, <out>.md and <out>.png.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import datetime
import gc
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from running import ROOT, device_slug, without_folders

from txl_deploy.bench.environment import describe_environment
from txl_deploy.export.artifact import ExportRequest, export_artifact
from txl_deploy.runtimes.base import Runtime
from txl_deploy.runtimes.registry import eager_from_checkpoint, open_artifact
from txl_deploy.session import Session
from txl_train.checkpoint import Checkpoint, save_checkpoint
from txl_train.config import ModelConfig
from txl_train.data.vocabulary import Vocabulary
from txl_train.files import write_json
from txl_train.model.memory import state_count, state_shape
from txl_train.model.transformer_xl import TransformerXL

RUNTIMES = ("pytorch", "onnx")
NOTES = """What is held beyond the formulas has reasons. Eager PyTorch keeps keys and values in two stores that take turns, each with room
for two memories, so that none is moved at most steps; a packed copy of the shortlist's matrix; and encoded distances. ONNX Runtime packs
every matrix, and keeps those that the embedding reads too; its states are written into two sets in turn, and its steps need room for
keys, values and scores."""
LARGEST_GROWTH = 2**18
"""Bytes per 10,000 segments that the resident size may grow by: what is lost with every segment has 26 bytes at most."""
MOST_HELD = 1.05
"""How many times the bytes of weights or states by formula a process may hold for them."""


@dataclass(frozen=True)
class Sizes:
    """What is measured."""

    model: ModelConfig
    tgt_len: int
    corpora: tuple[int, ...]
    """Segments."""
    mem_lens: tuple[int, ...]
    batches: tuple[int, ...]
    repeats: int
    steps: int
    """Timed steps of each repeat."""
    segments: int
    """Of the long run."""
    large: ModelConfig
    """Whose weights and states are weighed."""


def _config(**changes: Any) -> ModelConfig:
    values: dict[str, Any] = {"dropout": 0.0, "adaptive": True, "clamp_len": 64, "same_length": True}
    return ModelConfig(**{**values, **changes})


TINY = {"vocab_size": 200, "n_layer": 2, "n_head": 2, "d_head": 8, "d_model": 16, "d_inner": 32, "cutoffs": (50, 100)}
FULL = Sizes(
    model=_config(vocab_size=5000, n_layer=4, n_head=4, d_head=32, d_model=128, d_inner=512, cutoffs=(1000, 2000), mem_len=128),
    tgt_len=32,
    corpora=(25, 50, 100, 200, 400, 800),
    mem_lens=(64, 128, 256, 512, 1024),
    batches=(1, 2, 4, 8, 16, 32),
    repeats=9,
    steps=10,
    segments=100_000,
    large=_config(vocab_size=60_000, n_layer=12, n_head=8, d_head=64, d_model=512, d_inner=2048, cutoffs=(10_000, 30_000), mem_len=640),
)
QUICK = Sizes(_config(**TINY, mem_len=8), 4, (4, 8), (8, 16), (1, 2), 3, 3, 400, _config(**TINY, mem_len=8))


def write_checkpoint(folder: Path, config: ModelConfig, tgt_len: int) -> Path:
    """Write a checkpoint of random weights into a folder of its own."""
    torch.manual_seed(0)
    words = ["<eos>", "<unk>", *(f"word{i}" for i in range(config.vocab_size - 2))]
    run = {"settings": {"train": {"eval_tgt_len": tgt_len}}, "data_folder": None}
    model = TransformerXL(config).parameters_by_name()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "checkpoint.pt"
    save_checkpoint(path, Checkpoint(config, model, Vocabulary(words, unit="word"), "text", run, {"step": 0}))
    return path


def open_runtime(name: str, checkpoint: Path, mem_len: int) -> Runtime:
    """Open a checkpoint in a runtime for a memory of another length, exporting it beside the checkpoint if it was not."""
    if name == "pytorch":
        return eager_from_checkpoint(checkpoint, mem_len=mem_len)[0]
    out = checkpoint.parent / f"onnx-{mem_len}"
    if not out.exists():
        export_artifact(ExportRequest(checkpoint=checkpoint, out=out, format="onnx", mem_len=mem_len))
    return open_artifact(out)


class Feed:
    """A session on random tokens, endlessly."""

    def __init__(self, runtime: Runtime, batch_size: int) -> None:
        info = runtime.info
        generator = torch.Generator().manual_seed(1)
        self._ids = torch.randint(0, info.config.vocab_size, (8, batch_size, info.tgt_len), generator=generator)
        self._session = Session(runtime, batch_size)
        self._place = 0

    def steps(self, count: int) -> float:
        """Run some segments and return the seconds they took."""
        begun = time.perf_counter()
        for _ in range(count):
            self._session.step(self._ids[self._place % 8], self._ids[(self._place + 1) % 8])
            self._place += 1
        return time.perf_counter() - begun


def by_turns(feeds: dict[int, Callable[[], float]], repeats: int) -> dict[int, float]:
    """Call each several times in turn, the first not counted, and return the medians."""
    found: dict[int, list[float]] = {size: [] for size in feeds}
    for repeat in range(repeats + 1):
        for size, timed in feeds.items():
            seconds = timed()
            if repeat:
                found[size].append(seconds)
    return {size: statistics.median(seconds) for size, seconds in found.items()}


def fit_line(points: dict[int, float]) -> dict[str, float]:
    """Return slope and intercept of the line that is nearest to the points, as shares of each, and how far the farthest lies from it."""
    x, y = np.array(list(points)), np.array(list(points.values()))
    slope, intercept = np.polyfit(x, y, 1, w=1 / y)
    return {"slope": float(slope), "intercept": float(intercept), "farthest": float(np.abs((slope * x + intercept) / y - 1).max())}


def measure_time(folder: Path, sizes: Sizes) -> dict[str, Any]:
    """Return milliseconds by length of the corpus (per token), length of the memory and batch size (per step), for each runtime."""
    checkpoint = write_checkpoint(folder / "model", sizes.model, sizes.tgt_len)
    result: dict[str, Any] = {}
    for name in RUNTIMES:
        runtime = open_runtime(name, checkpoint, sizes.model.mem_len)

        def whole(segments: int, runtime: Runtime = runtime) -> float:
            return Feed(runtime, 1).steps(segments) * 1e3 / (segments * sizes.tgt_len)

        corpus = by_turns({n: lambda n=n: whole(n) for n in sizes.corpora}, sizes.repeats)  # type: ignore[misc]
        memories = {m: Feed(open_runtime(name, checkpoint, m), 1) for m in sizes.mem_lens}
        for mem_len, feed in memories.items():
            feed.steps(mem_len // sizes.tgt_len + 1)
        memory = by_turns({m: lambda f=f: f.steps(sizes.steps) * 1e3 / sizes.steps for m, f in memories.items()}, sizes.repeats)  # type: ignore[misc]
        streams = {b: Feed(runtime, b) for b in sizes.batches}
        batch = by_turns({b: lambda f=f: f.steps(sizes.steps) * 1e3 / sizes.steps for b, f in streams.items()}, sizes.repeats)  # type: ignore[misc]
        result[name] = {
            "ms_per_token_by_corpus": corpus,
            "flat_within": max(corpus.values()) / min(corpus.values()) - 1,
            "ms_by_mem_len": memory,
            "mem_len_fit": fit_line(memory),
            "ms_by_batch": batch,
            "batch_fit": fit_line(batch),
        }
    return result


def resident_bytes() -> int:
    """Return the bytes of memory that this process holds now, after giving back what it can."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * 4096


def own_bytes() -> int:
    """Return the part of `resident_bytes` that no file lies behind: pages of files come and go as the system needs room for others."""
    resident_bytes()  # gives back what it can
    lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssAnon:", "RssShmem:")))


def growth_per_10000(segments: Sequence[int], sizes: Sequence[int]) -> float:
    """Return by how many bytes the resident size grows in 10,000 segments, from the second half of the samples: the first is warm-up."""
    half = len(segments) // 2
    return float(np.polyfit(segments[half:], sizes[half:], 1)[0] * 10_000)


def long_run(feed: Callable[[int], object], segments: int, samples: int = 100) -> dict[str, Any]:
    """Run many segments and return the resident size on the way, without that of mapped files, with its growth."""
    every = max(1, segments // samples)
    done, resident = [], []
    for number in range(every, segments + 1, every):
        feed(every)
        done.append(number)
        resident.append(own_bytes())
    growth = growth_per_10000(done, resident)
    return {"segments": done, "resident_bytes": resident, "bytes_per_10000": growth, "grows": growth > LARGEST_GROWTH}


def _long_run_in(name: str, checkpoint: Path, mem_len: int, segments: int, queue: Any) -> None:
    torch.set_num_threads(1)
    queue.put(long_run(Feed(open_runtime(name, checkpoint, mem_len), 2).steps, segments))


def _weigh_in(name: str, checkpoint: Path, mem_len: int, batch_size: int, queue: Any) -> None:
    """Put what the process holds more after opening a model, and after steps of so many streams with a full memory."""
    small = write_checkpoint(checkpoint.parent / f"small-{name}", QUICK.model, QUICK.tgt_len)
    Feed(open_runtime(name, small, QUICK.model.mem_len), 1).steps(3)  # libraries, threads and pools are no part of it
    before = resident_bytes()
    runtime = open_runtime(name, checkpoint, mem_len)
    opened = resident_bytes()
    sessions = [Feed(runtime, batch_size)]
    sessions[0].steps(2 * mem_len // runtime.info.tgt_len + 3)
    queue.put({"weights_bytes": opened - before, "states_and_work_bytes": resident_bytes() - opened})


def in_process(target: Callable[..., None], *arguments: Any) -> dict[str, Any]:
    """Return what a process of its own puts into its queue. Raises RuntimeError if it ends without."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=target, args=(*arguments, queue))
    process.start()
    while True:
        try:
            found: dict[str, Any] = queue.get(timeout=1)
        except Exception as error:
            if not process.is_alive():
                raise RuntimeError(f"{target.__name__} ended with {process.exitcode}.") from error
        else:
            process.join()
            return found


def measure_memory(folder: Path, sizes: Sizes) -> dict[str, Any]:
    """Return bytes of weights and states beside their formulas, and the resident size over the long run, for each runtime."""
    large = write_checkpoint(folder / "large", sizes.large, sizes.tgt_len)
    config = sizes.large
    n_parameters = sum(parameter.numel() for parameter in TransformerXL(config).parameters())
    batch_size = 8
    state = 4 * state_count(config, "kv") * int(np.prod(state_shape(config, "kv", batch_size)))
    tiny_config = _config(**TINY, mem_len=16)
    tiny = write_checkpoint(folder / "tiny", tiny_config, 8)
    result: dict[str, Any] = {"weights_formula": 4 * n_parameters, "state_formula": state, "batch_size": batch_size}
    for name in RUNTIMES:
        open_runtime(name, large, config.mem_len)  # exports, where it has to be
        open_runtime(name, tiny, tiny_config.mem_len)
        weighed = in_process(_weigh_in, name, large, config.mem_len, batch_size)
        result[name] = {**weighed, "long_run": in_process(_long_run_in, name, tiny, tiny_config.mem_len, sizes.segments)}
    return result


def plot(record: dict[str, Any], path: Path) -> None:
    """Draw the four series."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(10, 7), layout="constrained")
    drawings = (
        ("ms_per_token_by_corpus", "segments of the corpus", "ms per token", axes[0, 0]),
        ("ms_by_mem_len", "mem_len, tokens", "ms per step", axes[0, 1]),
        ("ms_by_batch", "batch size", "ms per step", axes[1, 0]),
    )
    for key, x_label, y_label, axis in drawings:
        for name in RUNTIMES:
            points = record["time"][name][key]
            axis.plot([int(x) for x in points], list(points.values()), marker="o", label=name)
        axis.set(xlabel=x_label, ylabel=y_label)
        axis.set_ylim(bottom=0)
    corpora = [int(x) for x in record["time"][RUNTIMES[0]]["ms_per_token_by_corpus"]]
    axes[0, 0].set_xscale("log")
    axes[0, 0].set_xticks(corpora, labels=[str(x) for x in corpora], minor=False)
    axes[0, 0].set_xticks([], minor=True)
    for name in RUNTIMES:
        run = record["memory"][name]["long_run"]
        axes[1, 1].plot(run["segments"], [size / 2**20 for size in run["resident_bytes"]], label=name)
    axes[1, 1].set(xlabel="segments run", ylabel="resident size, MiB")
    axes[1, 1].set_ylim(bottom=0)
    for axis in axes.flat:
        axis.legend(frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def _met(is_met: bool) -> str:
    return "met" if is_met else "MISSED"


def table(record: dict[str, Any]) -> str:
    """Return the figures in Markdown."""
    memory = record["memory"]
    mega = 1e-6
    lines = ["| | " + " | ".join(RUNTIMES) + " |", "|---|" + "---:|" * len(RUNTIMES)]

    def row(what: str, value: Callable[[str], str]) -> None:
        lines.append(f"| {what} | " + " | ".join(value(name) for name in RUNTIMES) + " |")

    times = record["time"]
    row("time per token, longest over shortest median of all corpus lengths", lambda n: f"{1 + times[n]['flat_within']:.3f}")
    row("time per step by mem_len: farthest from a line", lambda n: f"{times[n]['mem_len_fit']['farthest']:.1%}")
    row("time per step by batch size: farthest from a line", lambda n: f"{times[n]['batch_fit']['farthest']:.1%}")
    weights, state = memory["weights_formula"], memory["state_formula"]

    def held(found: float, formula: float) -> str:
        return f"{found * mega:.0f} ({found / formula:.2f} times: {_met(found <= MOST_HELD * formula)})"

    row(f"held after opening, MB (weights by formula {weights * mega:.0f})", lambda n: held(memory[n]["weights_bytes"], weights))
    row(
        f"held more by {memory['batch_size']} streams, MB (their states by formula {state * mega:.0f})",
        lambda n: held(memory[n]["states_and_work_bytes"], state),
    )
    runs = {name: memory[name]["long_run"] for name in RUNTIMES}
    last = runs[RUNTIMES[0]]["segments"][-1]
    row(f"growth over {last:,} segments, kB per 10,000", lambda n: f"{runs[n]['bytes_per_10000'] / 1e3:.1f}: {_met(not runs[n]['grows'])}")
    return "\n".join(lines)


def main() -> int:
    """Measure and write the record; exit code 1 if the resident size grows."""
    parser = argparse.ArgumentParser(description="Measure how time and memory grow.")
    parser.add_argument("--out", type=Path, help="the record, without its ending [benchmarks/results/growth_<device>_<yyyymm>]")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch and ONNX Runtime [1]")
    parser.add_argument("--quick", action="store_true", help="very small models and few steps")
    arguments = parser.parse_args()
    sizes = QUICK if arguments.quick else FULL
    torch.set_num_threads(arguments.threads)
    environment = describe_environment(threads=arguments.threads, device="cpu")
    with tempfile.TemporaryDirectory(prefix="txl-") as folder:
        times, memory = measure_time(Path(folder), sizes), measure_memory(Path(folder), sizes)
    today = datetime.date.today()
    record = {"theme": "growth", "date": today.isoformat(), "environment": environment, "time": times, "memory": memory}
    record = json.loads(json.dumps(without_folders(record)))
    stem = arguments.out or ROOT / "benchmarks" / "results" / f"growth_{device_slug(None, environment.get('cores_usable'))}_{today:%Y%m}"
    write_json(Path(f"{stem}.json"), record)
    plot(record, Path(f"{stem}.png"))
    shown = table(record)
    command = "python benchmarks/growth.py"
    picture = f"![Time and memory by size]({stem.name}.png)"
    Path(f"{stem}.md").write_text(
        f"# How time and memory grow\n\n{shown}\n\n{picture}\n\n{NOTES}\n\nMade by `{command}`, {today}.\n", encoding="utf-8"
    )
    print(shown)
    return int(any(memory[name]["long_run"]["grows"] for name in RUNTIMES))


if __name__ == "__main__":
    sys.exit(main())
