"""The cases of `endurance.py`: what is run, and what must come of it."""

from __future__ import annotations

import contextlib
import os
import resource
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from growth import RUNTIMES, TINY, _config, in_process, long_run, open_runtime, write_checkpoint
from running import TXL, child_environment

from txl_deploy.session import Session
from txl_train.data.segments import Segment
from txl_train.evaluate import StepOutput, evaluate
from txl_train.model.memory import Memory

MOST_DRIFT = 1e-4
"""Nats by which the nll of a token may differ between a carried memory and one computed afresh: rounding of float32, once."""
MOST_SUM_ERROR = 1e-15
"""Relative error of a sum of nll: a few units in the last place of a float64."""
BESIDE_CORPUS = 1 << 30
"""Bytes of memory of its own that a process may take, whatever the corpus: libraries, a small model, one block of text."""
_MIB = 2**20


@dataclass(frozen=True)
class Sizes:
    """How long and how large."""

    segments: int
    """Of the rollout."""
    sum_segments: int
    sum_tokens: int
    """Of each segment."""
    corpus_bytes: int
    vocabulary: int
    """Different words."""
    streams: int
    mem_len: int


FULL = Sizes(100_000, 1_000_000, 1000, 3 << 30, 1_000_000, 4096, 12_288)
QUICK = Sizes(1000, 1000, 100, 1 << 20, 3000, 64, 300)


# Without the command


def rollout(folder: Path, sizes: Sizes) -> dict[str, Any]:
    """The resident size stays flat, and the nll of the carried memory is that of a memory computed afresh, to rounding."""
    config = _config(**TINY, mem_len=16, init_std=0.5, proj_init_std=0.5)
    checkpoint = write_checkpoint(folder / "model", config, 8)
    rows, raw = [], {}
    for name in RUNTIMES:
        open_runtime(name, checkpoint, config.mem_len)  # exports, where it has to be
        found = raw[name] = in_process(_rollout_in, name, checkpoint, config.mem_len, sizes.segments)
        rows.append(
            {
                "runtime": name,
                "segments": f"{found['segments'][-1]:,}",
                "growth, kB per 10,000": f"{found['bytes_per_10000'] / 1e3:.1f}",
                "largest drift, nats": f"{max(found['drift_nats']):.1e}",
                "at the end": f"{found['drift_nats'][-1]:.1e}",
                "what a lost memory would change, nats": f"{found['cold_nats']:.2f}",
            }
        )
    met = all(not found["grows"] and max(found["drift_nats"]) <= MOST_DRIFT for found in raw.values())
    return {"met": met, "rows": rows, "raw": raw}


class Rollout:
    """Two streams of random tokens on one runtime, and at times the same tokens from a cold start."""

    STREAMS = 2

    def __init__(self, runtime: Any, segments: int) -> None:
        info = runtime.info
        self._runtime, self._tgt_len = runtime, info.tgt_len
        generator = np.random.default_rng(1)
        self._ids = generator.integers(0, info.config.vocab_size, (self.STREAMS, segments * info.tgt_len + 1), dtype=np.int64)
        self._session = Session(runtime, self.STREAMS)
        self._done = 0
        self._reach = -(-info.config.n_layer * info.mem_len // info.tgt_len) + 1
        """Segments, the last included, that the nll of one depends on."""

    def _segment(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        first = number * self._tgt_len
        ids = self._ids[:, first : first + self._tgt_len + 1]
        return torch.from_numpy(ids[:, :-1].copy()), torch.from_numpy(ids[:, 1:].copy())

    def run(self, count: int) -> None:
        """Run some segments."""
        for _ in range(count):
            self.nll_BT = self._session.step(*self._segment(self._done))
            self._done += 1

    def difference(self, reach: int | None = None) -> float:
        """Return by how many nats a token of the last segment differs from a session that began `reach` segments before its end."""
        carried_BT, fresh = self.nll_BT.clone(), Session(self._runtime, self.STREAMS)
        for number in range(max(0, self._done - (reach or self._reach)), self._done):
            nll_BT = fresh.step(*self._segment(number))
        return float((nll_BT - carried_BT).abs().max())


def _rollout_in(name: str, checkpoint: Path, mem_len: int, segments: int, queue: Any) -> None:
    torch.set_num_threads(1)
    rollout = Rollout(open_runtime(name, checkpoint, mem_len), segments)
    drifts: list[float] = []

    def feed(count: int) -> None:
        rollout.run(count)
        drifts.append(rollout.difference())

    found = long_run(feed, segments)
    queue.put({**found, "drift_nats": drifts, "cold_nats": rollout.difference(1)})


class Fixed:
    """A stepper that yields known losses."""

    def __init__(self, nll: list[torch.Tensor]) -> None:
        self._nll, self._steps = nll, 0

    def initial_memory(self, batch_size: int) -> Memory:
        """Return a memory of nothing."""
        return Memory([], torch.zeros(batch_size, dtype=torch.int64))

    def step(self, input_ids_BQ: torch.Tensor, target_ids_BT: torch.Tensor, memory: Memory) -> StepOutput:
        """Return the next losses."""
        self._steps += 1
        return StepOutput(self._nll[(self._steps - 1) % len(self._nll)], memory)


def summed(n_segments: int, n_tokens: int) -> dict[str, Any]:
    """Score known losses by `evaluate`, and return how far its sum lies from the exact one, beside simpler ways to add up."""
    generator = np.random.default_rng(2)
    units = generator.integers(0, 1 << 24, (min(997, n_segments), 1, n_tokens))  # of 2^-20 nats: exact in float32, up to 16 nats
    nll = [torch.from_numpy((part * 2.0**-20).astype(np.float32)) for part in units]
    ids_BT, counted_BT = np.zeros((1, n_tokens), dtype=np.int64), np.ones((1, n_tokens), dtype=np.bool_)

    def segments() -> Iterator[Segment]:
        for index in range(n_segments):
            yield Segment(input_ids_BT=ids_BT, target_ids_BT=ids_BT, counted_BT=counted_BT, index=index)

    result = evaluate(Fixed(nll), segments(), batch_size=1)
    of_each = [int(part.sum()) for part in units]
    exact = Fraction(sum(of_each[index % len(units)] for index in range(n_segments)), 1 << 20)
    running32, running64 = np.float32(0), 0.0
    for index in range(n_segments):
        part = of_each[index % len(units)] * 2.0**-20
        running32 += np.float32(part)
        running64 += part

    def error(value: float) -> float:
        return float(abs(Fraction(value) - exact) / exact)

    return {
        "n_tokens": result.n_tokens,
        "nll_nats_sum": result.nll_nats_sum,
        "evaluate": error(result.nll_nats_sum),
        "running float64": error(running64),
        "running float32": error(float(running32)),
    }


def sums(folder: Path, sizes: Sizes) -> dict[str, Any]:
    """The sum of 10⁹ losses, of a million segments, has the relative error of a few roundings."""
    found = summed(sizes.sum_segments, sizes.sum_tokens)
    row = {"tokens": f"{found['n_tokens']:,}"} | {
        f"relative error, {way}": f"{found[way]:.1e}" for way in ("evaluate", "running float64", "running float32")
    }
    met = found["evaluate"] <= MOST_SUM_ERROR and found["n_tokens"] == sizes.sum_segments * sizes.sum_tokens
    return {"met": met, "rows": [row], "raw": found}


# By the command


@dataclass(frozen=True)
class Ran:
    """One call of `txl`."""

    arguments: list[str]
    code: int
    seconds: float
    own_bytes: int
    """The most that its largest process held of its own at a time, files that are mapped left out."""
    errors: str

    def row(self, what: str) -> dict[str, Any]:
        """Return what a table says of it."""
        return {
            "what": what,
            "exit code": self.code,
            "seconds": f"{self.seconds:.0f}",
            "most memory of its own, MiB": f"{self.own_bytes / _MIB:.0f}",
        }


def txl(*arguments: object, limit: int | None = None) -> Ran:
    """Run `txl`; `limit` is how many bytes of memory of its own each of its processes may ask the system for."""
    words = [str(argument) for argument in arguments]

    def bound() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

    begun = os.times().elapsed
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [*TXL, *words],
            stdout=subprocess.DEVNULL,
            stderr=errors,
            env=child_environment(OMP_NUM_THREADS="1"),
            preexec_fn=bound,
        )
        watch = _Watch(process.pid)
        code = process.wait()
        most = watch.stop()
        errors.seek(0)
        return Ran(words, code, os.times().elapsed - begun, most, errors.read()[-2000:])


class _Watch:
    """Reads, until it is stopped, how much a process and those it has started hold of their own."""

    def __init__(self, pid: int) -> None:
        self._pid, self._most, self._over = pid, 0, threading.Event()
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        while not self._over.wait(0.02):
            for pid in _family(self._pid):
                with contextlib.suppress(OSError, ValueError):
                    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
                    line = next((line for line in status.splitlines() if line.startswith("RssAnon:")), "RssAnon: 0 kB")
                    self._most = max(self._most, int(line.split()[1]) * 1024)

    def stop(self) -> int:
        """Return the most that one of them held."""
        self._over.set()
        self._thread.join()
        return self._most


def _family(pid: int) -> list[int]:
    found = [pid]
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text(encoding="ascii").split():
                found += _family(int(child))
    return found


SMALL = ["--n-layer", 2, "--n-head", 2, "--d-head", 16, "--d-model", 32, "--d-inner", 64, "--dropout", 0.0]
STEPS = ["--max-step", 4, "--log-interval", 2, "--eval-interval", 4, "--eval-max-steps", 4, "--threads", 1, "--lr", 0.001]


def _train(data: Path, work: Path, *more: object, limit: int | None = None) -> Ran:
    return txl("train", "--dataset", "text", "--data", data, "--work-dir", work, *SMALL, *STEPS, *more, limit=limit)


def _checked(rows: list[tuple[str, Ran]], **raw: Any) -> dict[str, Any]:
    """Return the outcome of calls that all must end with 0."""
    calls = [{"what": what, **vars(ran)} for what, ran in rows]
    return {"met": all(ran.code == 0 for _, ran in rows), "rows": [ran.row(what) for what, ran in rows], "raw": {"calls": calls, **raw}}


def write_text(folder: Path, n_bytes: int, n_words: int, *, held_out: int = 1 << 18) -> Path:
    """Write train.txt of about so many bytes and so many different words, most of them rare, and two short other splits."""
    generator = np.random.default_rng(3)
    words = np.array([f"w{number:x}" for number in range(n_words)])
    folder.mkdir(parents=True, exist_ok=True)
    line = 20
    blocks = []
    for _ in range(64 if n_bytes > 1 << 26 else 4):
        drawn = words[np.minimum((n_words * generator.random(1 << 18) ** 3).astype(np.int64), n_words - 1)]
        blocks.append("\n".join(" ".join(drawn[first : first + line]) for first in range(0, len(drawn), line)) + "\n")
    with open(folder / "train.txt", "w", encoding="utf-8") as file:
        for first in range(0, n_words, line):  # every word at least once
            file.write(" ".join(words[first : first + line]) + "\n")
        while file.tell() < n_bytes:
            file.write(blocks[generator.integers(len(blocks))])
    for split in ("valid", "test"):
        (folder / f"{split}.txt").write_text(blocks[0][:held_out].rsplit("\n", 1)[0] + "\n", encoding="utf-8")
    return folder


def corpus(folder: Path, sizes: Sizes) -> dict[str, Any]:
    """A text several times larger than the memory a process may take is prepared, trained on and scored."""
    data = write_text(folder / "data", sizes.corpus_bytes, 60_000 if sizes.corpus_bytes > 1 << 26 else 2000)
    (data / "valid.txt").unlink()
    os.link(data / "train.txt", data / "valid.txt")  # which is evaluated in part
    size = (data / "train.txt").stat().st_size
    lengths = ["--batch-size", 8, "--eval-batch-size", 8, "--tgt-len", 64, "--mem-len", 64, "--eval-tgt-len", 64]
    first = _train(data, folder / "w", *lengths, limit=BESIDE_CORPUS)
    again = _train(data, folder / "w", *lengths, "--resume", "--max-step", 8, limit=BESIDE_CORPUS)
    best = folder / "w" / "checkpoint_best.pt"
    scored = txl("eval", "--checkpoint", best, "--data", data, "--split", "valid", "--max-size", 50, limit=BESIDE_CORPUS)
    rows = [(f"prepare {size / 1e9:.2f} GB of text, train", first), ("go on training", again), ("score 50 segments of it", scored)]
    return _checked(rows, text_bytes=size, limit_bytes=BESIDE_CORPUS)


def _everywhere(folder: Path, checkpoint: Path, data: Path, *lengths: object, batch_size: int = 4) -> list[tuple[str, Ran]]:
    """Score, export to both graphs, score those, and compare."""
    scoring = ["--data", data, "--split", "test", "--batch-size", batch_size, "--max-size", 4]
    rows = [("score the checkpoint", txl("eval", "--checkpoint", checkpoint, *lengths, *scoring))]
    for kind in ("onnx", "torchscript"):
        out = folder / kind
        rows.append((f"export to {kind}", txl("export", "--checkpoint", checkpoint, "--format", kind, "--out", out, *lengths)))
        rows.append((f"score {kind}", txl("eval", "--artifact", out, "--checkpoint", checkpoint, *scoring)))
    return rows


def vocabulary(folder: Path, sizes: Sizes) -> dict[str, Any]:
    """A million different words: counted, trained, saved, exported and scored."""
    n = sizes.vocabulary
    data = write_text(folder / "data", 20 * n, n)
    cutoffs = ",".join(str(n * share // 100) for share in (2, 10, 40))
    work = folder / "w"
    lengths = ["--tgt-len", 16, "--mem-len", 16]
    few = ["--batch-size", 4, "--eval-batch-size", 4, "--eval-tgt-len", 16]  # each token of the last cluster takes 600,000 scores
    rows = [(f"train on {n:,} words", _train(data, work, *lengths, *few, "--adaptive", "--cutoffs", cutoffs, "--div-val", 2))]
    rows += _everywhere(folder, work / "checkpoint_best.pt", data, *lengths)
    return _checked(rows)


def streams(folder: Path, sizes: Sizes) -> dict[str, Any]:
    """Thousands of streams at once, in training and in evaluation."""
    n = sizes.streams
    data = write_text(folder / "data", 400 * n, 1000, held_out=200 * n)
    work = folder / "w"
    lengths = ["--tgt-len", 8, "--mem-len", 8]
    rows = [(f"train {n} streams", _train(data, work, "--batch-size", n, "--eval-batch-size", n, "--eval-tgt-len", 8, *lengths))]
    rows += _everywhere(folder, work / "checkpoint_best.pt", data, *lengths, batch_size=n)
    return _checked(rows)


def memory(folder: Path, sizes: Sizes) -> dict[str, Any]:
    """A memory of more than 10,000 positions, full: trained, scored, exported, compared."""
    n = sizes.mem_len
    data = write_text(folder / "data", 1 << 20, 1000)
    work = folder / "w"
    lengths = ["--tgt-len", 64, "--mem-len", n]
    rows = [(f"train with mem_len {n}", _train(data, work, "--batch-size", 2, "--eval-batch-size", 2, "--eval-tgt-len", 64, *lengths))]
    best = work / "checkpoint_best.pt"
    rows += _everywhere(folder, best, data, *lengths, batch_size=1)
    segments = 2 * n // 64 + 2
    rows += [
        (f"parity of {kind}", txl("parity", "--checkpoint", best, "--artifact", folder / kind, "--segments", segments, "--batch-size", 2))
        for kind in ("onnx", "torchscript")
    ]
    return _checked(rows)


def edges(folder: Path, sizes: Sizes) -> dict[str, Any]:
    """One token a step, no memory, and both."""
    data = write_text(folder / "data", 1 << 18, 300)
    rows = []
    for tgt_len, mem_len in ((1, 16), (16, 0), (1, 0)):
        here = folder / f"{tgt_len}-{mem_len}"
        work = here / "w"
        lengths = ["--tgt-len", tgt_len, "--mem-len", mem_len]
        found = [("train", _train(data, work, "--batch-size", 4, "--eval-tgt-len", tgt_len, *lengths))]
        best = work / "checkpoint_best.pt"
        found += _everywhere(here, best, data, *lengths)
        found += [
            (f"parity of {kind}", txl("parity", "--checkpoint", best, "--artifact", here / kind, "--data", data))
            for kind in ("onnx", "torchscript")
        ]
        rows += [(f"tgt_len {tgt_len}, mem_len {mem_len}: {what}", ran) for what, ran in found]
    return _checked(rows)


CASES: dict[str, Callable[[Path, Sizes], dict[str, Any]]] = {
    "rollout": rollout,
    "sums": sums,
    "corpus": corpus,
    "vocabulary": vocabulary,
    "streams": streams,
    "memory": memory,
    "edges": edges,
}
