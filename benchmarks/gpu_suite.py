"""Everything that needs a GPU, in one call: CUDA tests, training throughput, exports, parity and the latency table, as one dated record.

    python benchmarks/gpu_suite.py                       the base model of the specification on the first GPU
    python benchmarks/gpu_suite.py --parts training      one part of it: tests, profile, training, inference
    python benchmarks/gpu_suite.py --minutes 9           what of it can be begun in time, what matters most first
    python benchmarks/gpu_suite.py --quick --device cpu  a small model without a GPU, to see that the suite itself works

Each step is a `txl` command (or the tests), run as a user would; a step that this machine cannot run is recorded as skipped with
its reason, and a failing one does not stop the others. Training is repeated with equal seed and text in every precision, compiled, and on
two devices, and its losses must follow those of FP32. Inference and training are measured against the reference's way of computing
(`reference_bench.py`, `reference_training.py`), and each goal is written as met, MISSED or not measured. The profile says what each kernel
of a step takes (`gpu_profile.py`). What is run stands in `gpu_plan`, how it is judged and shown in `gpu_tables`. Writes
`<out>/gpu_suite_<device>_<yyyymm>.json` and tables beside it.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gpu_plan import BASE, QUICK, Export, Plan, Training, write_corpus
from gpu_tables import Step, against_name, goal_lines, goals, summary_lines, training_name
from running import ROOT, child_environment, device_slug, txl_command

HERE = ROOT / "benchmarks"
PARTS = ("tests", "profile", "training", "inference")
STEP_TIMEOUT_S = 580
LEAST_S = 15
"""A step is not begun if less than this is left."""
ENVIRONMENT_UNFIT = 3
"""Exit code of a command that this machine cannot run."""


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

    def __init__(self, plan: Plan, work: Path, n_devices: int, minutes: float | None = None) -> None:
        self.plan, self.work, self.n_devices = plan, work, n_devices
        self._end = None if minutes is None else time.monotonic() + 60 * minutes
        self.steps: list[Step] = []
        self.figures: dict[str, dict[str, Any]] = {}
        """Of the trainings that were run, by name."""
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
        script: str | None = None,
        record: Path | None = None,
    ) -> Step:
        """Run a command whose standard output is one JSON document.

        Args:
            requires: a package; without it the step is skipped.
            needs: a file of an earlier step; without it the step is skipped.
            script: of this folder, which is run in the place of `txl`.
            record: the file that the JSON document is written to instead, also by a command that is stopped.
            may_be_unfit: that this machine cannot do it (exit code 3) is no failure. An engine that was built and does not run is one.
        """
        if requires is not None and importlib.util.find_spec(requires) is None:
            return self._keep(Step(name, "skipped", f"the package {requires} is not installed", command))
        if needs is not None and not needs.exists():
            return self._keep(Step(name, "skipped", f"an earlier step left no {needs.name}", command))
        limit_s = self._seconds_left()
        if limit_s < LEAST_S:
            return self._keep(Step(name, "skipped", "the time that `--minutes` gives was over", command))
        start = time.perf_counter()
        try:
            finished = subprocess.run(
                txl_command(command, processes) if script is None else [sys.executable, str(HERE / script), *command],
                cwd=ROOT,
                env=self.environment,
                capture_output=True,
                text=True,
                timeout=limit_s,
                check=False,
            )
        except subprocess.TimeoutExpired:
            result = json.loads(record.read_text(encoding="utf-8")) if record is not None and record.exists() else None
            if limit_s < STEP_TIMEOUT_S:
                return self._keep(
                    Step(name, "skipped", "the time that `--minutes` gives was over before it ended", command, limit_s, result)
                )
            return self._keep(Step(name, "failed", f"took more than {STEP_TIMEOUT_S} s", command, STEP_TIMEOUT_S, result))
        seconds = time.perf_counter() - start
        try:
            result = json.loads(finished.stdout if record is None else record.read_text(encoding="utf-8"))
        except (ValueError, OSError):
            result = None
        if finished.returncode == 0:
            return self._keep(Step(name, "done", "", command, seconds, result))
        status = "skipped" if may_be_unfit and finished.returncode == ENVIRONMENT_UNFIT else "failed"
        errors = [line for line in finished.stderr.splitlines() if line.strip()]
        reason = next((line for line in errors if line.startswith("Error:")), errors[-1] if errors else "")
        return self._keep(Step(name, status, f"exit code {finished.returncode}: {reason}", command, seconds, result))

    def _seconds_left(self) -> float:
        """Return how long a step may take."""
        return STEP_TIMEOUT_S if self._end is None else min(STEP_TIMEOUT_S, self._end - time.monotonic())

    def run_tests(self) -> None:
        """Run the tests that are marked as needing a GPU."""
        if self.plan.device == "cpu" or importlib.util.find_spec("pytest") is None:
            reason = "no GPU asked for" if self.plan.device == "cpu" else "the package pytest is not installed"
            self._keep(Step("tests that need a GPU", "skipped", reason))
            return
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", "tests/deploy"]
        start, limit_s = time.perf_counter(), self._seconds_left()
        try:
            finished = subprocess.run(command, cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=limit_s, check=False)
        except subprocess.TimeoutExpired:
            self._keep(Step("tests that need a GPU", "failed", f"took more than {limit_s:.0f} s", command[1:], limit_s))
            return
        lines = finished.stdout.strip().splitlines() or finished.stderr.strip().splitlines() or [""]
        failures = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
        status, seconds = "done" if finished.returncode == 0 else "failed", time.perf_counter() - start
        self._keep(Step("tests that need a GPU", status, lines[-1], command[1:], seconds, {"failures": failures} if failures else None))

    def _keep(self, step: Step) -> Step:
        print(f"{step.status:>8}  {step.seconds:6.1f} s  {step.name}  {step.reason}", file=sys.stderr, flush=True)
        self.steps.append(step)
        return step

    def run_all(self, parts: Collection[str]) -> None:
        """Run the steps of these parts."""
        write_corpus(self.work / "data", self.plan)
        if "tests" in parts:
            self.run_tests()
        if "profile" in parts:
            out, quick = self.work / "profile.json", [] if self.plan.goals_apply else ["--quick"]
            options = ["--device", self.plan.device, "--parts", "inference,training", "--out", str(out), *quick]
            self.run("profile of the steps", options, script="gpu_profile.py", record=out)
        if "training" in parts or "inference" in parts:
            self.run_trainings(self.plan.trainings[:1])
        if "inference" in parts:
            self.run_against([])
        if "training" in parts:
            self.run_trainings(self.plan.trainings[1:])
            self.compare_trainings(self.plan.trainings)
        if "inference" in parts:
            self.run_inference()

    def run_trainings(self, trainings: Collection[Training]) -> None:
        """Train in these ways."""
        for training in trainings:
            name, script = training_name(training), None if training.opponent is None else "reference_training.py"
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
            step = self.run(name, command, processes=training.processes, may_be_unfit=True, script=script)
            if step.status == "done":
                step.result["measured"] = self.figures[training.name] = measured(folder / "metrics.jsonl")
            for checkpoint in folder.glob("*.pt"):
                if folder != self.work / self.plan.trainings[0].name or checkpoint.name != "checkpoint_best.pt":
                    checkpoint.unlink()  # the base model's are gigabytes

    def compare_trainings(self, trainings: Collection[Training]) -> None:
        """Compare the losses of those that must be alike."""
        for training in trainings:
            if training.follows is not None:
                self._keep(self.compare(training, self.figures))

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
        if artifacts.get(plan.against.dtype):
            self.run_against(artifacts[plan.against.dtype])
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

    def run_against(self, artifacts: list[str]) -> None:
        """Measure our runtimes and exports taking turns with the reference's TorchScript, one batch size after the other."""
        checkpoint = self.work / self.plan.trainings[0].name / "checkpoint_best.pt"
        source, against = ["--checkpoint", str(checkpoint)], self.plan.against
        device = ["--device", self.plan.device, "--accept-invalid", "--json"]
        runtimes = ["--dtype", against.dtype, "--runtimes", f"{against.runtimes},reference"]
        lengths = [] if artifacts else self.plan.lengths
        for size in against.batch_sizes:
            options = [*runtimes, *lengths, *device, "--batch-sizes", str(size), *against.options, *artifacts]
            self.run(
                against_name(self.plan, size, exports=bool(artifacts)),
                ["bench", *source, *options],
                needs=checkpoint,
                script="reference_bench.py",
            )

    def export_command(self, export: Export, source: list[str], out: Path) -> list[str]:
        """Return the command that writes one exported model."""
        options = ["--format", export.format, "--out", str(out), "--json"]
        if export.of_onnx:
            graph = self.work / Export("onnx", export.memory, export.dtype, "").folder
            return ["export", "--artifact", str(graph), "--target", "portable", *options]
        return ["export", *source, "--memory", export.memory, "--dtype", export.dtype, *self.plan.lengths, *options]


def main() -> int:
    """Run the suite and write its record; 0 if no step failed, 1 if one did, 3 if there is no such device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="a small model and few steps")
    parser.add_argument("--parts", default=",".join(PARTS), metavar="A,B", help=f"what to run, of {', '.join(PARTS)}  [default: all]")
    parser.add_argument("--minutes", type=float, metavar="N", help="begin no step that would go on after N minutes  [default: no limit]")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the record")
    arguments = parser.parse_args()
    parts = arguments.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"argument --parts: {sorted(unknown)[0]!r} is none of {', '.join(PARTS)}")
    import torch
    from gpu_profile import lines as profile_lines

    from txl_deploy.bench.environment import describe_environment

    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("There is no GPU that PyTorch can use. Nothing was measured; `--quick --device cpu` tries the suite itself.", file=sys.stderr)
        skipped = [dataclasses.replace(goal, outcome="not measured: there is no GPU") for goal in goals(BASE, [], "no GPU")]
        print("\n".join(goal_lines(skipped)), file=sys.stderr)
        return 3
    plan = dataclasses.replace(QUICK if arguments.quick else BASE, device=arguments.device)
    environment = describe_environment(threads=torch.get_num_threads(), device="cuda:0" if plan.device == "cuda" else "cpu")
    with tempfile.TemporaryDirectory(prefix="txl-gpu-suite-") as folder:
        suite = Suite(plan, Path(folder), n_devices=torch.cuda.device_count() if plan.device == "cuda" else 2, minutes=arguments.minutes)
        suite.run_all(parts)
    device_name = torch.cuda.get_device_name(0) if plan.device == "cuda" else "cpu"
    today = datetime.datetime.now(datetime.timezone.utc)
    part = "" if set(parts) == set(PARTS) else "_" + "_".join(part for part in PARTS if part in parts)
    name = f"gpu_suite_{device_slug(device_name, None)}{'_quick' if arguments.quick else ''}{part}_{today:%Y%m}"
    arguments.out.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {
        "measured_at": today.isoformat(timespec="seconds"),
        "device": device_name,
        "environment": environment,
        "plan": asdict(plan),
    }
    judged = goals(plan, suite.steps, device_name)
    record["goals"] = [asdict(goal) for goal in judged]
    text = json.dumps({**record, "steps": [asdict(step) for step in suite.steps]}, indent=1).replace(folder, "WORK")
    (arguments.out / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    profiled = next((step.result["rows"] for step in suite.steps if step.name == "profile of the steps" and step.result), [])
    table = "\n".join([*goal_lines(judged), "", *summary_lines(suite.steps), *profile_lines(profiled)]).replace(folder, "WORK")
    head = f"# GPU suite on {device_name}, {today:%Y-%m-%d}\n\nMade by `python benchmarks/gpu_suite.py`; all figures: `{name}.json`.\n\n"
    (arguments.out / f"{name}.md").write_text(head + table + "\n", encoding="utf-8")
    print(arguments.out / f"{name}.md")
    return 1 if any(step.status == "failed" for step in suite.steps) else 0


if __name__ == "__main__":
    sys.exit(main())
