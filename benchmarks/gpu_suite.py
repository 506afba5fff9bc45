"""Everything that needs a GPU, in one call: CUDA tests, training throughput, exports, parity and the latency table, as one dated record.

    python benchmarks/gpu_suite.py                       the base model of the specification on the first GPU
    python benchmarks/gpu_suite.py --quick --device cpu  a small model without a GPU, to see that the suite itself works

Each step is a `txl` command (or the tests), run as a user would; a step that this machine cannot run is recorded as skipped with
its reason, and a failing one does not stop the others. Writes `<out>/gpu_suite_<device>_<yyyymm>.json` and a table beside it.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
TXL = [sys.executable, "-c", "import sys; from txl_deploy.cli.main import main; sys.argv[0] = 'txl'; sys.exit(main())"]
STEP_TIMEOUT_S = 580


@dataclass
class Step:
    """One command of the suite and what came of it."""

    name: str
    status: str
    """done, failed or skipped."""
    reason: str = ""
    command: list[str] = field(default_factory=list)
    seconds: float = 0.0
    result: Any = None


@dataclass(frozen=True)
class Plan:
    """Sizes of a run."""

    device: str
    preset: list[str]
    """Options that choose the model."""
    vocab_size: int
    n_tokens: int
    train_steps: int
    train_batch_sizes: tuple[int, ...]
    dtypes: tuple[str, ...]
    lengths: list[str]
    """Options that choose the lengths of inference."""
    bench: list[str]


BASE = Plan(
    device="cuda",
    preset=["--config", "wt103-base"],
    vocab_size=267_735,
    n_tokens=3_000_000,
    train_steps=60,
    train_batch_sizes=(32, 64),
    dtypes=("fp32", "bf16", "fp16"),
    lengths=["--tgt-len", "64", "--mem-len", "640", "--clamp-len", "400", "--same-length"],
    bench=["--batch-sizes", "1..32", "--duration", "3"],
)
QUICK = Plan(
    device="cpu",
    preset=["--n-layer", "2", "--d-model", "32", "--n-head", "2", "--d-head", "16", "--d-inner", "64", "--adaptive"],
    vocab_size=3_000,
    n_tokens=20_000,
    train_steps=4,
    train_batch_sizes=(8,),
    dtypes=("fp32", "bf16"),
    lengths=["--tgt-len", "16", "--mem-len", "24"],
    bench=["--batch-sizes", "1,2", "--duration", "0.2", "--min-samples", "5", "--max-duration", "1"],
)


def write_corpus(folder: Path, plan: Plan, seed: int = 1) -> None:
    """Write text whose words follow Zipf's law, each of the vocabulary at least once: clusters are used as real text uses them."""
    generator = np.random.default_rng(seed)
    n_words = plan.vocab_size - 1  # <eos> is the other token
    weights = 1.0 / np.arange(1, n_words + 1)
    drawn = generator.choice(n_words, size=max(plan.n_tokens - n_words, 1), p=weights / weights.sum())
    train = generator.permutation(np.concatenate([np.arange(n_words), drawn]))
    held_out = generator.choice(n_words, size=max(plan.n_tokens // 50, 4000), p=weights / weights.sum())
    folder.mkdir(parents=True)
    for split, ids in (("train", train), ("valid", held_out), ("test", held_out[::-1])):
        rows = (ids[at : at + 50] for at in range(0, len(ids), 50))
        (folder / f"{split}.txt").write_text("".join(" ".join(f"w{i}" for i in row) + "\n" for row in rows), encoding="utf-8")


class Suite:
    """Runs steps one after the other and keeps what they print."""

    def __init__(self, plan: Plan, work: Path) -> None:
        self.plan, self.work = plan, work
        self.steps: list[Step] = []
        self.environment = {**os.environ, "PYTHONPATH": str(ROOT), "CI": "true", "TXL_CACHE_DIR": str(work / "cache")}

    def run(self, name: str, command: list[str], *, requires: str | None = None, needs: Path | None = None) -> Step:
        """Run a command whose standard output is one JSON document; `requires` names a package, `needs` a file of an earlier step."""
        if requires is not None and importlib.util.find_spec(requires) is None:
            return self._keep(Step(name, "skipped", f"the package {requires} is not installed", command))
        if needs is not None and not needs.exists():
            return self._keep(Step(name, "skipped", f"an earlier step left no {needs.name}", command))
        start = time.perf_counter()
        try:
            finished = subprocess.run(
                [*TXL, *command], cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=STEP_TIMEOUT_S, check=False
            )
        except subprocess.TimeoutExpired:
            return self._keep(Step(name, "failed", f"took more than {STEP_TIMEOUT_S} s", command, STEP_TIMEOUT_S))
        seconds = time.perf_counter() - start
        try:
            result = json.loads(finished.stdout)
        except ValueError:
            result = None
        if finished.returncode == 0:
            return self._keep(Step(name, "done", "", command, seconds, result))
        errors = [line for line in finished.stderr.splitlines() if line.strip()]
        reason = next((line for line in errors if line.startswith("Error:")), errors[-1] if errors else "")
        return self._keep(Step(name, "failed", f"exit code {finished.returncode}: {reason}", command, seconds, result))

    def run_tests(self) -> None:
        """Run the tests that are marked as needing a GPU."""
        if self.plan.device == "cpu" or importlib.util.find_spec("pytest") is None:
            reason = "no GPU asked for" if self.plan.device == "cpu" else "the package pytest is not installed"
            self._keep(Step("tests that need a GPU", "skipped", reason))
            return
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", "tests"]
        start = time.perf_counter()
        finished = subprocess.run(
            command, cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=STEP_TIMEOUT_S, check=False
        )
        summary = finished.stdout.strip().splitlines()[-1:] or [finished.stderr.strip()[-300:]]
        status = "done" if finished.returncode == 0 else "failed"
        self._keep(Step("tests that need a GPU", status, summary[0], command[1:], time.perf_counter() - start))

    def _keep(self, step: Step) -> Step:
        print(f"{step.status:>8}  {step.seconds:6.1f} s  {step.name}  {step.reason}", file=sys.stderr, flush=True)
        self.steps.append(step)
        return step

    def run_all(self) -> None:
        """Run every step of the plan."""
        plan, work = self.plan, self.work
        data = work / "data"
        write_corpus(data, plan)
        self.run_tests()
        checkpoint = work / "train-fp32" / "checkpoint_best.pt"
        for dtype in plan.dtypes:
            for batch_size in plan.train_batch_sizes:
                folder = work / (f"train-{dtype}" if batch_size == plan.train_batch_sizes[0] else f"train-{dtype}-{batch_size}")
                steps = ["--max-step", str(plan.train_steps), "--eval-interval", str(plan.train_steps), "--eval-max-steps", "4"]
                small = ["--lr-warmup-steps", str(plan.train_steps // 2), "--log-interval", "5", "--eval-batch-size", "8"]
                options = ["--dataset", "wt103", "--data", str(data), "--device", plan.device, "--dtype", dtype]
                self.run(
                    f"train {dtype}, batch {batch_size}",
                    ["train", *plan.preset, *options, *steps, *small, "--batch-size", str(batch_size), "--work-dir", str(folder), "--json"],
                )
        artifacts = []
        for format_name, memory, package in (
            ("torchscript", "hidden", "torch"),
            ("torchscript", "kv", "torch"),
            ("onnx", "kv", "onnxruntime"),
        ):
            out = work / f"{format_name}-{memory}"
            source = ["--checkpoint", str(checkpoint)]
            self.run(
                f"export {format_name}, {memory} memory",
                ["export", *source, "--format", format_name, "--memory", memory, *plan.lengths, "--out", str(out), "--json"],
                requires=package,
                needs=checkpoint,
            )
            compared = ["parity", *source, "--artifact", str(out), "--device", plan.device, "--json"]
            step = self.run(f"parity {format_name}, {memory} memory on {plan.device}", compared, requires=package, needs=out)
            if step.status == "done":
                artifacts += ["--artifact", str(out)]
        self.run(
            "latency table",
            ["bench", "--checkpoint", str(checkpoint), *artifacts, *plan.lengths, "--device", plan.device, *plan.bench, "--json"],
            needs=checkpoint,
        )
        for name in ("tensorrt", "tensorrt_rtx"):
            self._keep(Step(f"engines of {name}", "skipped", "this version of txl builds no TensorRT engines"))


def summary_lines(steps: list[Step]) -> Iterator[str]:
    """Yield the record as Markdown: every step, training throughput, the latency table."""
    yield "| step | status | seconds | reason |"
    yield "|---|---|---:|---|"
    for step in steps:
        yield f"| {step.name} | {step.status} | {step.seconds:.1f} | {step.reason} |"
    trained = [step for step in steps if step.name.startswith("train ") and step.result]
    if trained:
        yield ""
        yield "| training | tokens/s | steps | valid nll (nats per token) |"
        yield "|---|---:|---:|---:|"
        for step in trained:
            valid = (step.result.get("valid") or {}).get("nll_nats_per_token", float("nan"))
            yield f"| {step.name[6:]} | {step.result['tokens_per_s']:,.0f} | {step.result['steps']} | {valid:.3f} |"
    rows = next((step.result["rows"] for step in steps if step.name == "latency table" and step.result), [])
    if rows:
        yield ""
        yield "| runtime | memory | batch size | n | p50 ms | p99 ms | tokens/s | perplexity | verified |"
        yield "|---|---|---:|---:|---:|---:|---:|---:|---|"
        for row in rows:
            name = f"{row['runtime']} ({row['provider']}) | {row['memory']}"
            latency = f"{row['n']} | {row['latency_ms_p50']:.3f} | {row['latency_ms_p99']:.3f}"
            yield f"| {name} | {row['batch_size']} | {latency} | {row['tokens_per_s']:,.0f} | {row['perplexity']:.3f} | {row['verified']} |"


def main() -> int:
    """Run the suite and write its record; 0 if no step failed, 1 if one did, 3 if there is no such device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="a small model and few steps")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the record")
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    import torch

    from txl_deploy.bench.environment import describe_environment

    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("There is no GPU that PyTorch can use. Nothing was measured; `--quick --device cpu` tries the suite itself.", file=sys.stderr)
        return 3
    sizes = QUICK if arguments.quick else BASE
    plan = Plan(**{**sizes.__dict__, "device": arguments.device})
    environment = describe_environment(threads=torch.get_num_threads(), device="cuda:0" if plan.device == "cuda" else "cpu")
    with tempfile.TemporaryDirectory(prefix="txl-gpu-suite-") as folder:
        suite = Suite(plan, Path(folder))
        suite.run_all()
    device_name = torch.cuda.get_device_name(0) if plan.device == "cuda" else "cpu"
    today = datetime.datetime.now(datetime.timezone.utc)
    name = f"gpu_suite_{re.sub('[^a-z0-9]+', '-', device_name.lower()).strip('-')}{'_quick' if arguments.quick else ''}_{today:%Y%m}"
    arguments.out.mkdir(parents=True, exist_ok=True)
    record = {"measured_at": today.isoformat(timespec="seconds"), "device": device_name, "environment": environment, "plan": asdict(plan)}
    text = json.dumps({**record, "steps": [asdict(step) for step in suite.steps]}, indent=1).replace(folder, "WORK")
    (arguments.out / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    table = "\n".join(summary_lines(suite.steps)).replace(folder, "WORK")
    head = f"# GPU suite on {device_name}, {today:%Y-%m-%d}\n\nMade by `python benchmarks/gpu_suite.py`; all figures: `{name}.json`.\n\n"
    (arguments.out / f"{name}.md").write_text(head + table + "\n", encoding="utf-8")
    print(arguments.out / f"{name}.md")
    return 1 if any(step.status == "failed" for step in suite.steps) else 0


if __name__ == "__main__":
    sys.exit(main())
