"""How long things take to begin: the command, opening a model, preparing text.

    python benchmarks/start.py                     # ten minutes, 10 GiB of memory; 100 million words of drawn text, as WikiText-103 has
    python benchmarks/start.py --quick --out /tmp/x

`txl --help` beside an interpreter that does nothing, by turns. Opening the base model's checkpoint and ONNX artifact, beside reading and
hashing the same files. Preparing a text of drawn words (Zipf's law, lines like WikiText's) beside a pass written after the way of NVIDIA's
vocabulary and corpus (`ReferenceVocabulary`); both must yield the same ids. Writes <out>.json and <out>.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import export_base
import numpy as np
import torch
from running import ROOT, TXL, child_environment, device_slug, without_folders

from txl_deploy.bench.environment import describe_environment
from txl_deploy.export.artifact import ExportRequest, export_artifact
from txl_train.data.corpus import load_corpus
from txl_train.data.datasets import get_dataset
from txl_train.files import file_sha256, write_json

WORDS_PER_LINE = 60
GOAL_HELP_S = 0.3
GOAL_PREPARING = 5.0


def seconds(work: Callable[[], object]) -> float:
    """Return the seconds that a call takes."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def by_turns(works: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Call each in turn, once without counting, and return the median seconds."""
    found: dict[str, list[float]] = {name: [] for name in works}
    for repeat in range(repeats + 1):
        for name, work in works.items():
            taken = seconds(work)
            if repeat:
                found[name].append(taken)
    return {name: statistics.median(values) for name, values in found.items()}


def run(command: list[str]) -> None:
    """Run a command without its output."""
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=child_environment(), cwd=ROOT)


def measure_help(repeats: int) -> dict[str, float]:
    """Return the seconds of `txl --help`, and of an interpreter that does nothing."""
    return by_turns({"txl --help": lambda: run([*TXL, "--help"]), "python -c pass": lambda: run([sys.executable, "-c", "pass"])}, repeats)


def _opened(path: str) -> float:
    """Return the seconds of opening a checkpoint or an artifact in a process that has imported everything already."""
    code = (
        "import sys, time, torch\nfrom pathlib import Path\nfrom txl_deploy.runtimes import registry\n"
        "import onnxruntime, txl_deploy.runtimes.eager, txl_deploy.runtimes.onnxrt, txl_train.checkpoint\n"
        "path = Path(sys.argv[1])\nbegun = time.perf_counter()\n"
        "registry.open_artifact(path) if path.is_dir() else registry.eager_from_checkpoint(path)\nprint(time.perf_counter() - begun)"
    )
    done = subprocess.run([sys.executable, "-c", code, path], check=True, capture_output=True, text=True, env=child_environment(), cwd=ROOT)
    return float(done.stdout.split()[-1])


def measure_opening(folder: Path, size: str, repeats: int) -> dict[str, dict[str, float]]:
    """Return the seconds of opening checkpoint and artifact, and of reading and of hashing their weights."""
    export_base.write_base_checkpoint(folder, size=size)
    checkpoint, artifact = folder / "checkpoint.pt", folder / "onnx"
    export_artifact(ExportRequest(checkpoint=checkpoint, out=artifact, format="onnx"))
    result = {}
    for name, path, weights in (("checkpoint", checkpoint, checkpoint), ("ONNX artifact", artifact, artifact / "model.onnx")):
        opening = statistics.median(_opened(str(path)) for _ in range(repeats))
        reading = by_turns({"reading": lambda w=weights: w.read_bytes(), "hashing": lambda w=weights: file_sha256(w)}, repeats)  # type: ignore[misc]
        result[name] = {"opening": opening, **reading, "bytes": weights.stat().st_size}
    return result


def write_text(folder: Path, n_words: int, vocabulary: int = 200_000) -> Path:
    """Write a text of drawn words as train.txt, an empty line after each few as in WikiText, and return the folder."""
    generator = np.random.default_rng(1)
    weights = 1.0 / np.arange(1, vocabulary + 1)
    folder.mkdir(parents=True)
    words = np.array([f"w{i:x}" for i in range(vocabulary)])
    with open(folder / "train.txt", "w", encoding="utf-8") as file:
        for _ in range(0, n_words, 100 * WORDS_PER_LINE):
            drawn = generator.choice(vocabulary, size=(100, WORDS_PER_LINE), p=weights / weights.sum())
            file.write("".join(f" {' '.join(line)} \n" + (" \n" if i % 5 == 0 else "") for i, line in enumerate(words[drawn].tolist())))
    for split in ("valid", "test"):
        (folder / f"{split}.txt").write_text(" w1 w2 \n", encoding="utf-8")
    return folder


class ReferenceVocabulary:
    """What the original does with a text of words: it is read and split twice, once to be counted and once to be turned into ids."""

    def __init__(self) -> None:
        self.numbers: OrderedDict[str, int] = OrderedDict()

    def split(self, line: str) -> list[str]:
        """Return the words of a line."""
        return line.strip().split()

    def count(self, path: Path) -> None:
        """Number the words by descending count; the lines are kept as long as this takes."""
        counter: Counter[str] = Counter()
        lines = []
        with open(path, encoding="utf-8") as file:
            for line in file:
                words = self.split(line)
                counter.update(words)
                lines.append(words)
        for word in ("<eos>", *(word for word, _ in counter.most_common())):
            if word not in self.numbers:
                self.numbers[word] = len(self.numbers)

    def number(self, word: str) -> int:
        """Return the id of a word, looked up twice."""
        if word in self.numbers:
            return self.numbers[word]
        raise KeyError(word)

    def encode(self, path: Path) -> torch.Tensor:
        """Return the text as ids: a tensor of each line, concatenated."""
        lines = []
        with open(path, encoding="utf-8") as file:
            for line in file:
                words = [*self.split(line), "<eos>"]
                lines.append(torch.LongTensor([self.number(word) for word in words]))
        return torch.cat(lines)


def reference_ids(path: Path) -> torch.Tensor:
    """Return a text's ids as the reference's way finds them."""
    vocabulary = ReferenceVocabulary()
    vocabulary.count(path)
    return vocabulary.encode(path)


def measure_preparing(folder: Path, n_words: int, repeats: int) -> dict[str, Any]:
    """Return the seconds of both ways, and whether their ids are equal."""
    text = write_text(folder / "text", n_words)
    found: dict[str, Any] = {}
    runs = iter(range(1000))

    def ours() -> None:
        found["ours"] = load_corpus(text, get_dataset("wt103"), cache_dir=folder / f"cache-{next(runs)}").ids("train")

    def reference() -> None:
        found["reference"] = reference_ids(text / "train.txt")
        torch.save(found["reference"], folder / "cache.pt")  # as the original does, and as ours are kept

    taken = by_turns({"ours": ours, "reference": reference}, repeats)
    same = len(found["ours"]) == len(found["reference"]) and bool(np.array_equal(found["ours"], found["reference"].numpy()))
    return {**taken, "n_tokens": len(found["reference"]), "same_ids": same, "times_as_fast": taken["reference"] / taken["ours"]}


def table(record: dict[str, Any]) -> str:
    """Return the figures in Markdown."""
    starting, preparing = record["help"], record["preparing"]
    met = {True: "met", False: "MISSED"}
    lines = ["| what | seconds | beside | goal |", "|---|---:|---|---|"]
    taken = starting["txl --help"]
    goal = f"below {GOAL_HELP_S}: {met[taken < GOAL_HELP_S]}"
    lines.append(f"| `txl --help` | {taken:.3f} | an empty interpreter {starting['python -c pass']:.3f} | {goal} |")
    for name, parts in record["opening"].items():
        beside = f"reading {parts['reading']:.2f}, hashing {parts['hashing']:.2f} ({parts['bytes'] / 1e6:.0f} MB)"
        dominated = parts["reading"] + parts["hashing"] > parts["opening"] / 2
        lines.append(f"| opening the {name} | {parts['opening']:.2f} | {beside} | mostly reading and hashing: {met[dominated]} |")
    beside = f"the reference's way {preparing['reference']:.1f}, {preparing['times_as_fast']:.1f} times as long"
    fast = met[preparing["times_as_fast"] >= GOAL_PREPARING and preparing["same_ids"]]
    goal = f"{GOAL_PREPARING:g} times with equal ids: {fast}"
    lines.append(f"| preparing {preparing['n_tokens'] / 1e6:.1f} million tokens | {preparing['ours']:.1f} | {beside} | {goal} |")
    return "\n".join(lines)


def main() -> int:
    """Measure and write the record; exit code 1 if the two ways of preparing text find other ids."""
    parser = argparse.ArgumentParser(description="Measure how long things take to begin.")
    parser.add_argument("--out", type=Path, help="the record, without its ending [benchmarks/results/start_<device>_<yyyymm>]")
    parser.add_argument("--words", type=int, default=100_000_000, help="of the drawn text [100000000]")
    parser.add_argument("--quick", action="store_true", help="a small model, a short text, few repetitions")
    arguments = parser.parse_args()
    size, n_words, repeats = ("quick", 12_000, 1) if arguments.quick else ("base", arguments.words, 3)
    environment = describe_environment(threads=torch.get_num_threads(), device="cpu")
    with tempfile.TemporaryDirectory(prefix="txl-") as name:
        folder = Path(name)
        record = {
            "theme": "start",
            "date": datetime.date.today().isoformat(),
            "environment": environment,
            "help": measure_help(3 if arguments.quick else 20),
            "opening": measure_opening(folder, size, repeats),
            "preparing": measure_preparing(folder, n_words, 1 if arguments.quick else 2),
        }
    record = json.loads(json.dumps(without_folders(record)))
    today = datetime.date.today()
    stem = arguments.out or ROOT / "benchmarks" / "results" / f"start_{device_slug(None, environment.get('cores_usable'))}_{today:%Y%m}"
    write_json(Path(f"{stem}.json"), record)
    shown = table(record)
    made = f"Medians by turns; the files are in the cache of the system. Made by `python benchmarks/start.py`, {today}."
    Path(f"{stem}.md").write_text(f"# How long things take to begin\n\n{shown}\n\n{made}\n", encoding="utf-8")
    print(shown)
    return int(not record["preparing"]["same_ids"])


if __name__ == "__main__":
    sys.exit(main())
