"""Everything that needs a GPU, in one call: CUDA tests, training throughput, exports, parity and the latency table, as one dated record.

    python benchmarks/gpu_suite.py                       the base model of the specification on the first GPU
    python benchmarks/gpu_suite.py --parts training      one part of it: tests, training, inference
    python benchmarks/gpu_suite.py --quick --device cpu  a small model without a GPU, to see that the suite itself works

Each step is a `txl` command (or the tests), run as a user would; a step that this machine cannot run is recorded as skipped with
its reason, and a failing one does not stop the others. Training is repeated with equal seed and text in every precision, compiled, and on
two devices, and its losses must follow those of FP32. Writes `<out>/gpu_suite_<device>_<yyyymm>.json` and tables beside it.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from running import ROOT, child_environment, device_slug, txl_command

PARTS = ("tests", "training", "inference")
STEP_TIMEOUT_S = 580
ENVIRONMENT_UNFIT = 3
"""Exit code of a command that this machine cannot run."""


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
class Training:
    """One training of the plan."""

    name: str
    options: tuple[str, ...]
    batch_size: int
    steps: int
    processes: int = 1
    follows: str | None = None
    """The training whose losses it must have."""
    left_out: str = ""
    """Why it is not run; empty if it is."""


@dataclass(frozen=True)
class Export:
    """One exported model of the plan."""

    format: str
    memory: str
    dtype: str
    package: str
    """What it needs."""
    of_onnx: bool = False
    """Built from the ONNX graph of the same memory and type, exported before, for every GPU that the builder supports."""

    @property
    def name(self) -> str:
        """What its steps call it."""
        return f"{self.format}, {self.memory} memory, {self.dtype}"

    @property
    def folder(self) -> str:
        """Where it is written."""
        return f"{self.format}-{self.memory}-{self.dtype}"


@dataclass(frozen=True)
class Plan:
    """Sizes of a run."""

    device: str
    preset: list[str]
    """Options that choose the model."""
    vocab_size: int
    n_tokens: int
    trainings: tuple[Training, ...]
    """The first one makes the checkpoint that is exported."""
    tolerance_nats: float
    """How far the mean loss of the last fifth of a training may lie from that of the training it follows."""
    exports: tuple[Export, ...]
    lengths: list[str]
    """Options that choose the lengths of inference."""
    bench: list[str]
    compiled: list[str]
    """Options of `txl bench` for the compiled step, which takes a minute or more for each batch size; empty leaves it out."""


BASE = Plan(
    device="cuda",
    preset=["--config", "wt103-base"],
    vocab_size=267_735,
    n_tokens=3_000_000,
    trainings=(
        Training("fp32", ("--dtype", "fp32"), 32, 300),
        Training("fp32 with TF32", ("--dtype", "fp32", "--tf32"), 32, 300, follows="fp32"),
        Training("bf16", ("--dtype", "bf16"), 32, 300, follows="fp32"),
        Training("fp16", ("--dtype", "fp16"), 32, 300, follows="fp32"),
        Training("fp16, compiled", ("--dtype", "fp16", "--compile"), 32, 300, follows="fp32"),
        Training("fp16, two devices", ("--dtype", "fp16"), 32, 300, processes=2, follows="fp32"),
        Training("fp32, larger batch", ("--dtype", "fp32"), 64, 60),
        Training("bf16, larger batch", ("--dtype", "bf16"), 64, 60),
        Training("fp16, larger batch", ("--dtype", "fp16"), 64, 60),
    ),
    tolerance_nats=0.05,
    exports=(
        Export("torchscript", "hidden", "fp32", "torch"),
        *(
            export
            for dtype in ("fp32", "fp16")
            for export in (
                Export("torchscript", "kv", dtype, "torch"),
                Export("onnx", "kv", dtype, "onnxruntime"),
                Export("trt-rtx", "kv", dtype, "tensorrt_rtx", of_onnx=True),
            )
        ),
    ),
    lengths=["--tgt-len", "64", "--mem-len", "640", "--clamp-len", "400", "--same-length"],
    bench=["--batch-sizes", "1..32", "--duration", "3"],
    compiled=["--batch-sizes", "1,32", "--duration", "3"],
)
QUICK = Plan(
    device="cpu",
    preset=[
        "--n-layer",
        "2",
        "--d-model",
        "32",
        "--n-head",
        "2",
        "--d-head",
        "16",
        "--d-inner",
        "64",
        "--adaptive",
        "--tgt-len",
        "32",
        "--mem-len",
        "32",
    ],
    vocab_size=3_000,
    n_tokens=20_000,
    trainings=(
        Training("fp32", ("--dtype", "fp32"), 8, 60),
        Training("bf16", ("--dtype", "bf16"), 8, 60, follows="fp32"),
        Training("fp32, compiled", ("--dtype", "fp32", "--compile"), 8, 60, follows="fp32", left_out="compiling takes longer than --quick"),
        Training("fp32, two devices", ("--dtype", "fp32"), 8, 60, processes=2, follows="fp32"),
    ),
    tolerance_nats=0.02,
    exports=(
        Export("torchscript", "hidden", "fp32", "torch"),
        Export("onnx", "kv", "fp32", "onnxruntime"),
        Export("torchscript", "kv", "fp16", "torch"),
        Export("trt-rtx", "kv", "fp32", "tensorrt_rtx", of_onnx=True),
    ),
    lengths=["--tgt-len", "16", "--mem-len", "24"],
    bench=["--batch-sizes", "1,2", "--duration", "0.2", "--min-samples", "5", "--max-duration", "1"],
    compiled=[],
)


def write_corpus(folder: Path, plan: Plan, seed: int = 1) -> None:
    """Write text that can be learned: phrases of a book, some of them frequent, and after each few of them some word of the vocabulary.

    Every word of the vocabulary comes at least once, a tenth of the tokens are drawn from all alike, the phrases' words follow Zipf's
    law: about as many tokens as in WikiText-103 fall into the tail clusters.
    """
    generator = np.random.default_rng(seed)
    n_words = plan.vocab_size - 1  # <eos> is the other token

    def zipf(n: int, size: int) -> np.ndarray:
        weights = 1.0 / np.arange(1, n + 1)
        return generator.choice(n, size=size, p=weights / weights.sum())

    lengths = generator.integers(4, 17, size=max(20, n_words // 100))
    book = np.split(zipf(n_words, int(lengths.sum())), np.cumsum(lengths)[:-1])

    def write(name: str, n_tokens: int, rare: np.ndarray) -> None:
        drawn = iter(zipf(len(book), n_tokens // 4))
        with open(folder / name, "w", encoding="utf-8") as file:
            for few in np.array_split(rare, max(1, n_tokens // 50)):
                words = np.concatenate([book[next(drawn)] for _ in range(4)] + [few])
                file.write(" ".join(f"w{i}" for i in words) + "\n")

    folder.mkdir(parents=True)
    write("train.txt", plan.n_tokens, generator.permutation(n_words))
    for split in ("valid", "test"):
        n_tokens = max(plan.n_tokens // 50, 4000)
        write(f"{split}.txt", n_tokens, generator.integers(0, n_words, n_tokens // 10))


def measured(metrics: Path) -> dict[str, Any]:
    """Return what a training's metrics.jsonl says of speed, memory and loss; the first fifth of the steps does not count for speed."""
    records = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    start = next(record for record in records if record["kind"] == "start")
    rows = [record for record in records if record["kind"] == "train"]
    before, last = rows[len(rows) // 5], rows[-1]
    tokens_per_s = (last["tokens"] - before["tokens"]) / (last["train_seconds"] - before["train_seconds"])
    share = None if start["peak_flops"] is None else tokens_per_s * start["flops_per_token"] / start["peak_flops"]
    return {
        "tokens_per_s": tokens_per_s,
        "model_flops_utilisation": share,
        "peak_flops_measured": start["peak_flops"],
        "flops_per_token": start["flops_per_token"],
        "peak_memory_bytes": last["peak_memory_bytes"],
        "loss_scale": last["loss_scale"],
        "loss_first": rows[0]["loss_nats_per_token"],
        "loss_last_fifth": _mean_loss(rows[-(len(rows) // 5) :]),
        "curve": [[row["step"], row["loss_nats_per_token"]] for row in rows],
    }


def _mean_loss(rows: list[dict[str, Any]]) -> float:
    return float(sum(row["loss_nats_per_token"] for row in rows) / len(rows))


class Suite:
    """Runs steps one after the other and keeps what they print."""

    def __init__(self, plan: Plan, work: Path, n_devices: int) -> None:
        self.plan, self.work, self.n_devices = plan, work, n_devices
        self.steps: list[Step] = []
        self.environment = child_environment(TXL_CACHE_DIR=str(work / "cache"))

    def run(
        self,
        name: str,
        command: list[str],
        *,
        requires: str | None = None,
        needs: Path | None = None,
        processes: int = 1,
        may_be_unfit: bool = False,
    ) -> Step:
        """Run a command whose standard output is one JSON document.

        Args:
            requires: a package; without it the step is skipped.
            needs: a file of an earlier step; without it the step is skipped.
            may_be_unfit: that this machine cannot do it (exit code 3) is no failure. An engine that was built and does not run is one.
        """
        if requires is not None and importlib.util.find_spec(requires) is None:
            return self._keep(Step(name, "skipped", f"the package {requires} is not installed", command))
        if needs is not None and not needs.exists():
            return self._keep(Step(name, "skipped", f"an earlier step left no {needs.name}", command))
        start = time.perf_counter()
        try:
            finished = subprocess.run(
                txl_command(command, processes),
                cwd=ROOT,
                env=self.environment,
                capture_output=True,
                text=True,
                timeout=STEP_TIMEOUT_S,
                check=False,
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
        status = "skipped" if may_be_unfit and finished.returncode == ENVIRONMENT_UNFIT else "failed"
        errors = [line for line in finished.stderr.splitlines() if line.strip()]
        reason = next((line for line in errors if line.startswith("Error:")), errors[-1] if errors else "")
        return self._keep(Step(name, status, f"exit code {finished.returncode}: {reason}", command, seconds, result))

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

    def run_all(self, parts: Collection[str]) -> None:
        """Run the steps of these parts."""
        write_corpus(self.work / "data", self.plan)
        if "tests" in parts:
            self.run_tests()
        if "training" in parts:
            self.run_trainings(self.plan.trainings)
        elif "inference" in parts:
            self.run_trainings(self.plan.trainings[:1])
        if "inference" in parts:
            self.run_inference()

    def run_trainings(self, trainings: Collection[Training]) -> None:
        """Train in every way of the plan, and compare the losses of those that must be alike."""
        figures: dict[str, dict[str, Any]] = {}
        for training in trainings:
            name = f"train {training.name}, batch {training.batch_size}"
            if training.left_out:
                self._keep(Step(name, "skipped", training.left_out))
                continue
            if training.processes > self.n_devices:
                self._keep(Step(name, "skipped", f"this machine has {self.n_devices} GPU"))
                continue
            folder, steps = self.work / training.name.replace(", ", "-").replace(" ", "-"), str(training.steps)
            lengths = ["--batch-size", str(training.batch_size), "--max-step", steps, "--lr-warmup-steps", str(training.steps // 3)]
            evaluation = ["--eval-interval", steps, "--eval-max-steps", "4", "--eval-batch-size", "8", "--log-interval", "5"]
            options = ["--dataset", "wt103", "--data", str(self.work / "data"), "--device", self.plan.device, *training.options]
            command = ["train", *self.plan.preset, *options, *lengths, *evaluation, "--work-dir", str(folder), "--json"]
            step = self.run(name, command, processes=training.processes, may_be_unfit=True)
            if step.status == "done":
                step.result["measured"] = figures[training.name] = measured(folder / "metrics.jsonl")
            for checkpoint in folder.glob("*.pt"):
                if folder != self.work / self.plan.trainings[0].name or checkpoint.name != "checkpoint_best.pt":
                    checkpoint.unlink()  # the base model's are gigabytes
        for training in trainings:
            if training.follows is not None:
                self._keep(self.compare(training, figures))

    def compare(self, training: Training, figures: dict[str, dict[str, Any]]) -> Step:
        """Say whether a training's losses end where those of the one it follows do.

        The tolerance is for what may differ although seed and text are equal: rounding, dropout's masks (they may be others in another
        precision or process), and the first steps, which fp16 spends on finding its loss scale.
        """
        name = f"{training.name} follows {training.follows}"
        own, other = figures.get(training.name), figures.get(training.follows or "")
        if own is None or other is None:
            return Step(name, "skipped", "one of the two was not trained")
        tolerance = self.plan.tolerance_nats
        learned, difference = other["loss_first"] - other["loss_last_fifth"], own["loss_last_fifth"] - other["loss_last_fifth"]
        both = list(zip(own["curve"], other["curve"]))
        tenths = [both[len(both) * i // 10 : len(both) * (i + 1) // 10] for i in range(10)]
        result = {
            "what": "mean loss of the last fifth of the steps, nats per token",
            "difference": difference,
            "tolerance": tolerance,
            "agrees": abs(difference) <= tolerance,
            "learned": learned,
            "difference_by_tenth_of_the_steps": [sum(a[1] - b[1] for a, b in tenth) / len(tenth) for tenth in tenths],
        }
        if learned < 10 * tolerance:
            return Step(name, "failed", f"the loss fell by {learned:.3f} nats only, so being alike means nothing", result=result)
        reason = "" if result["agrees"] else f"the losses differ by {difference:+.4f} nats, allowed are {tolerance}"
        return Step(name, "done" if result["agrees"] else "failed", reason, result=result)

    def run_inference(self) -> None:
        """Export the first training's checkpoint, prove the exports and measure them."""
        plan, work = self.plan, self.work
        checkpoint = work / plan.trainings[0].name / "checkpoint_best.pt"
        source = ["--checkpoint", str(checkpoint)]
        artifacts: dict[str, list[str]] = {}
        for export in plan.exports:
            out = work / export.folder
            names = f"export {export.name}", f"parity {export.name} on {plan.device}", f"receipt {export.name} on {plan.device}"
            if export.of_onnx and plan.device == "cpu":
                for name in names:
                    self._keep(Step(name, "skipped", "engines run on a GPU alone"))
                continue
            self.run(names[0], self.export_command(export, source, out), requires=export.package, needs=checkpoint, may_be_unfit=True)
            compared = ["parity", *source, "--artifact", str(out), "--device", plan.device, "--json"]
            self.run(names[1], compared, requires=export.package, needs=out / "manifest.json")
            scored = ["eval", *source, "--artifact", str(out), "--device", plan.device, "--json"]
            if self.run(names[2], scored, requires=export.package, needs=out / "manifest.json").status == "done":
                artifacts.setdefault(export.dtype, []).extend(["--artifact", str(out)])
        for dtype in ("fp32", "fp16"):
            bench = ["bench", *source, "--dtype", dtype, *plan.lengths, "--device", plan.device, "--accept-invalid", "--json"]
            self.run(f"latency table, {dtype}", [*bench, *artifacts.get(dtype, []), *plan.bench], needs=checkpoint)
            name = f"latency table of the compiled step, {dtype}"
            if plan.compiled:
                self.run(name, [*bench, "--runtimes", "compiled", *plan.compiled], needs=checkpoint, may_be_unfit=True)
            else:
                self._keep(Step(name, "skipped", "compiling takes longer than --quick"))
        name = f"latency on {self.n_devices} devices at once"
        if self.n_devices > 1:
            sizes = ["--batch-sizes", str(4 * self.n_devices), "--duration", "3"]
            self.run(
                name, ["bench", *source, *plan.lengths, "--accept-invalid", "--json", *sizes], processes=self.n_devices, needs=checkpoint
            )
        else:
            self._keep(Step(name, "skipped", "this machine has one device"))
        self._keep(
            Step("engines of tensorrt", "skipped", "not on this machine's index: `txl export --format trt` builds them on their GPU")
        )

    def export_command(self, export: Export, source: list[str], out: Path) -> list[str]:
        """Return the command that writes one exported model."""
        options = ["--format", export.format, "--out", str(out), "--json"]
        if export.of_onnx:
            graph = self.work / Export("onnx", export.memory, export.dtype, "").folder
            return ["export", "--artifact", str(graph), "--target", "portable", *options]
        return ["export", *source, "--memory", export.memory, "--dtype", export.dtype, *self.plan.lengths, *options]


def summary_lines(steps: list[Step]) -> Iterator[str]:
    """Yield the record as Markdown: every step, training, what follows what, the latency table."""
    yield "| step | status | seconds | reason |"
    yield "|---|---|---:|---|"
    for step in steps:
        yield f"| {step.name} | {step.status} | {step.seconds:.1f} | {step.reason} |"
    trained = [step for step in steps if step.name.startswith("train ") and step.status == "done"]
    if trained:
        yield ""
        yield "Training: tokens/s without the first fifth of the steps; MFU is the share of the peak that was measured on matrix products."
        yield ""
        yield "| training | steps | tokens/s | MFU | peak memory GiB | loss, last fifth (nats) | loss scale | valid nll (nats) |"
        yield "|---|---:|---:|---:|---:|---:|---:|---:|"
        for step in trained:
            figures, valid = step.result["measured"], (step.result["valid"] or {}).get("nll_nats_per_token", float("nan"))
            share, scale, held = figures["model_flops_utilisation"], figures["loss_scale"], figures["peak_memory_bytes"]
            cells = [
                step.name[6:],
                f"{step.result['steps']}",
                f"{figures['tokens_per_s']:,.0f}",
                "–" if share is None else f"{share:.1%}",
                "–" if held is None else f"{held / 2**30:.2f}",
                f"{figures['loss_last_fifth']:.4f}",
                "–" if scale is None else f"{scale:g}",
                f"{valid:.3f}",
            ]
            yield f"| {' | '.join(cells)} |"
    compared = [step for step in steps if " follows " in step.name and step.result]
    if compared:
        yield ""
        yield "| mean loss of the last fifth | difference (nats) | allowed | the loss fell by (nats) |"
        yield "|---|---:|---:|---:|"
        for step in compared:
            yield f"| {step.name} | {step.result['difference']:+.4f} | {step.result['tolerance']} | {step.result['learned']:.3f} |"
    rows: list[dict[str, Any]] = [
        row for step in steps if step.name.startswith("latency table") and step.result for row in step.result["rows"]
    ]
    if rows:
        yield ""
        yield "| runtime | dtype | memory | batch size | n | p50 ms | p99 ms | tokens/s | of the roofline | perplexity | verified | valid |"
        yield "|---|---|---|---:|---:|---:|---:|---:|---:|---:|---|---|"
        for row in rows:
            name = f"{row['runtime']} ({row['provider']}) | {row['dtype']} | {row['memory']}"
            latency = f"{row['n']} | {row['latency_ms_p50']:.3f} | {row['latency_ms_p99']:.3f}"
            roofline = row["roofline"]
            share = "–" if roofline is None else f"{roofline['share_of_peak']:.1%} ({roofline['bound']})"
            proved = f"{row['perplexity']:.3f} | {row['verified']} | {row['valid']}"
            yield f"| {name} | {row['batch_size']} | {latency} | {row['tokens_per_s']:,.0f} | {share} | {proved} |"


def main() -> int:
    """Run the suite and write its record; 0 if no step failed, 1 if one did, 3 if there is no such device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="a small model and few steps")
    parser.add_argument("--parts", default=",".join(PARTS), metavar="A,B", help=f"what to run, of {', '.join(PARTS)}  [default: all]")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the record")
    arguments = parser.parse_args()
    parts = arguments.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"argument --parts: {sorted(unknown)[0]!r} is none of {', '.join(PARTS)}")
    import torch

    from txl_deploy.bench.environment import describe_environment

    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("There is no GPU that PyTorch can use. Nothing was measured; `--quick --device cpu` tries the suite itself.", file=sys.stderr)
        return 3
    sizes = QUICK if arguments.quick else BASE
    plan = Plan(**{**sizes.__dict__, "device": arguments.device})
    environment = describe_environment(threads=torch.get_num_threads(), device="cuda:0" if plan.device == "cuda" else "cpu")
    with tempfile.TemporaryDirectory(prefix="txl-gpu-suite-") as folder:
        suite = Suite(plan, Path(folder), n_devices=torch.cuda.device_count() if plan.device == "cuda" else 2)
        suite.run_all(parts)
    device_name = torch.cuda.get_device_name(0) if plan.device == "cuda" else "cpu"
    today = datetime.datetime.now(datetime.timezone.utc)
    part = "" if set(parts) == set(PARTS) else "_" + "_".join(part for part in PARTS if part in parts)
    name = f"gpu_suite_{device_slug(device_name, None)}{'_quick' if arguments.quick else ''}{part}_{today:%Y%m}"
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
