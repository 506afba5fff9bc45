"""Named workloads of `workloads/*.yaml`: ours against NVIDIA's way of computing, by turns in one run, with goals that are met or missed.

    python benchmarks/speed.py                                       # every workload: some 20 minutes on two cores, 6 GiB of memory
    python benchmarks/speed.py base-cpu-fp32 --work-dir runs/speed   # one; checkpoint, exports and receipts stay for the next time
    python benchmarks/speed.py --quick --out /tmp/x                  # a small model: does the script itself work?

Each is a run of `reference_bench.py`, which is `txl bench` with the opponent as one runtime more: exports need a receipt, all read the same
text with a full memory, and the perplexities of all timed steps are compared. The ratio is that of median latencies by pairs of turns,
with its 95 % interval; a goal that is not reached is written as MISSED. Weights are random and the text is drawn, since neither changes how
long a step takes; what share of the targets lies in each tail cluster does, and is that of WikiText-103, rounded. Writes <out>.json with
every sample, the machine and the versions, and <out>.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import export_base
import numpy as np
import yaml
from running import ROOT, child_environment, device_slug, txl_command, without_folders

from txl_deploy.bench.compare import LEAST_TURNS, Ratio, compare_paired
from txl_deploy.bench.environment import describe_environment
from txl_deploy.bench.result import BenchResult, Row
from txl_deploy.bench.roofline import measure_peak
from txl_deploy.bench.stats import percentile
from txl_train.errors import ConfigError, TxlError, ValidationError, nearest
from txl_train.files import write_json

FOLDER = Path(__file__).resolve().parent
SHARES = (0.88, 0.05, 0.055, 0.015)
"""Of the targets, in the shortlist and in each tail cluster."""
SIZES = {"base": export_base.BASE, "quick": export_base.QUICK}


@dataclass(frozen=True, kw_only=True)
class Run:
    """One batch size of a workload, and its goals."""

    batch_size: int
    samples: int
    ratio: float
    """How many times as fast as the baseline the best of ours is to be, by median latency."""
    peak_share: float | None = None
    """What share of the machine's measured matrix products it is to reach, by the step's arithmetic."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What is measured, as a file of `workloads/` says it."""

    name: str
    what: str
    model: str
    lengths: dict[str, Any]
    threads: int
    baseline: str
    runtimes: list[str]
    exports: list[str]
    n_tokens: int
    runs: list[Run]


def read_workload(path: Path) -> Workload:
    """Read a workload.

    Raises:
        ConfigError: there is no such file, or a key is missing or unknown.
    """
    if not path.is_file():
        known = sorted(file.stem for file in path.parent.glob("*.yaml"))
        raise ConfigError(f"There is no workload {path.stem}.{nearest(path.stem, known)}", remedy=f"There is {', '.join(known)}.")
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    return Workload(**{**_checked(values, Workload, path), "runs": [Run(**_checked(run, Run, path)) for run in values["runs"]]})


def _checked(values: dict[str, Any], kind: type[Any], path: Path) -> dict[str, Any]:
    fields = {field.name: field for field in dataclasses.fields(kind)}
    needed = {name for name, field in fields.items() if field.default is dataclasses.MISSING}
    for key in values:
        if key not in fields:
            raise ConfigError(f"{path.name} has the unknown key `{key}`.{nearest(key, fields)}")
    if needed - values.keys():
        raise ConfigError(f"{path.name} lacks {', '.join(sorted(needed - values.keys()))}.")
    return values


def smaller(workload: Workload) -> Workload:
    """Return the same with a small model and few samples."""
    tgt_len = 1 if workload.lengths["tgt_len"] == 1 else export_base.TGT_LEN["quick"]
    config = export_base.QUICK
    lengths = {"tgt_len": tgt_len, "mem_len": config.mem_len, "clamp_len": config.clamp_len, "same_length": config.same_length}
    runs = [dataclasses.replace(run, samples=LEAST_TURNS) for run in workload.runs[:1]]
    return dataclasses.replace(workload, model="quick", lengths=lengths, n_tokens=600, runs=runs)


class Bench:
    """The folder with checkpoint, text and exports, and what is run in it."""

    def __init__(self, work_dir: Path) -> None:
        self.work_dir = work_dir

    def txl(self, arguments: list[str], done_if: Path | None = None) -> None:
        """Run `txl`, unless what it makes is there already. Raises ValidationError if it fails."""
        if done_if is None or not done_if.exists():
            self.run(txl_command(arguments))

    def run(self, command: list[str], allowed: tuple[int, ...] = (0,)) -> None:
        """Run a command; its own messages are shown. Raises ValidationError if it ends otherwise than allowed."""
        code = subprocess.run(command, cwd=ROOT, env=child_environment(), stdout=subprocess.DEVNULL, check=False).returncode
        if code not in allowed:
            raise ValidationError(f"`{' '.join(command[-8:])}` ended with {code}.")

    def checkpoint(self, size: str) -> Path:
        """Return the checkpoint of random weights, written if it is not there."""
        folder = self.work_dir / size
        if not (folder / "checkpoint.pt").is_file():
            folder.mkdir(parents=True, exist_ok=True)
            export_base.write_base_checkpoint(folder, size=size)
        return folder / "checkpoint.pt"

    def text(self, size: str, n_tokens: int) -> Path:
        """Return the folder of a text of the vocabulary's words, in lines of 25."""
        folder = self.work_dir / size / f"text-{n_tokens}"
        if not (folder / "test.txt").is_file():
            folder.mkdir(parents=True, exist_ok=True)
            ids = draw_ids(SIZES[size].cluster_ends, n_tokens)
            lines = [" ".join(f"word{i - 2}" for i in ids[k : k + 25]) for k in range(0, n_tokens, 25)]
            for split in ("train", "valid", "test"):
                (folder / f"{split}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return folder

    def measure(self, workload: Workload) -> list[BenchResult]:
        """Export what is missing, prove it, and measure each batch size by turns with the baseline."""
        checkpoint, text = self.checkpoint(workload.model), self.text(workload.model, workload.n_tokens)
        lengths = _options(workload.lengths)
        artifacts: list[str] = []
        for dtype in workload.exports:
            out = self.work_dir / workload.model / f"onnx-{dtype}-{workload.lengths['tgt_len']}"
            export = ["export", "--checkpoint", str(checkpoint), "--format", "onnx", "--dtype", dtype, "--out", str(out), *lengths]
            self.txl(export, done_if=out)
            proof = ["eval", "--artifact", str(out), "--checkpoint", str(checkpoint), "--data", str(text), "--dataset", "text"]
            self.txl([*proof, "--batch-size", "4", "--threads", str(workload.threads)], done_if=out / "receipt.json")
            artifacts += ["--artifact", str(out)]
        results = []
        for run in workload.runs:
            out = self.work_dir / workload.model / f"{workload.name}-{run.batch_size}.json"
            options = ["--runtimes", ",".join([*workload.runtimes, workload.baseline]), "--batch-sizes", str(run.batch_size)]
            options += ["--min-samples", str(run.samples), "--max-samples", str(run.samples), "--max-duration", "600"]
            options += [] if artifacts else lengths
            options += ["--data", str(text), "--dataset", "text", "--device", "cpu", "--threads", str(workload.threads)]
            command = [sys.executable, str(FOLDER / "reference_bench.py"), "bench", "--checkpoint", str(checkpoint), *artifacts, *options]
            self.run([*command, "--accept-invalid", "--out", str(out)])
            results.append(BenchResult.read(out))
        return results


def draw_ids(ends: tuple[int, ...], n_tokens: int, seed: int = 1) -> np.ndarray:
    """Return ids whose clusters have the shares of SHARES; within one, all words but the special ones are alike."""
    generator = np.random.default_rng(seed)
    cluster = generator.choice(len(ends) - 1, size=n_tokens, p=SHARES)
    low, high = np.array(ends[:-1])[cluster], np.array(ends[1:])[cluster]
    return np.maximum(low + (generator.random(n_tokens) * (high - low)).astype(np.int64), 2)


def _options(lengths: dict[str, Any]) -> list[str]:
    options = [part for name in ("tgt_len", "mem_len", "clamp_len") for part in (f"--{name.replace('_', '-')}", str(lengths[name]))]
    return [*options, "--same-length" if lengths["same_length"] else "--no-same-length"]


@dataclass(frozen=True)
class Verdict:
    """One row of the table: a runtime of ours against the baseline, with what it was to reach."""

    workload: str
    batch_size: int
    runtime: str
    baseline_ms: float
    own_ms: float
    speedup: Ratio
    """Latency of the baseline over ours."""
    peak_share: float
    is_best: bool
    run: Run
    invalid_reasons: tuple[str, ...]

    def goals(self) -> list[str]:
        """Return each goal with whether it is met; only the best runtime has goals."""
        if not self.is_best:
            return []
        found = [(f"{self.run.ratio:g}×", self.speedup.ratio >= self.run.ratio)]
        if self.run.peak_share is not None:
            found.append((f"{self.run.peak_share:.0%} of peak", self.peak_share >= self.run.peak_share))
        return [f"{goal} {'met' if met else 'MISSED'}" for goal, met in found]


def judge(workload: Workload, results: list[BenchResult], peak_flops: float) -> list[Verdict]:
    """Compare the rows of ours with the baseline's, by pairs of turns.

    Raises:
        ValidationError: a row's perplexity is not the checkpoint's, so it is another model that was timed.
    """
    verdicts = []
    for run, result in zip(workload.runs, results, strict=True):
        (baseline,) = (row for row in result.rows if row.runtime == "reference")
        for row in result.rows:
            if row.verified is False:
                raise ValidationError(f"{_name(row)} of {workload.name} computes something else than the checkpoint.")
        wanted = [row for row in result.rows if row is not baseline and (row.runtime in workload.runtimes or row.artifact is not None)]
        best = min(wanted, key=lambda row: percentile(row.samples_ms, 50))
        for row in wanted:
            flops = row.roofline.flops_per_step if row.roofline else 0.0
            verdicts.append(
                Verdict(
                    workload=workload.name,
                    batch_size=run.batch_size,
                    runtime=_name(row),
                    baseline_ms=percentile(baseline.samples_ms, 50),
                    own_ms=percentile(row.samples_ms, 50),
                    speedup=compare_paired(row, baseline),
                    peak_share=flops / (percentile(row.samples_ms, 50) / 1e3) / peak_flops,
                    is_best=row is best,
                    run=run,
                    invalid_reasons=row.invalid_reasons,
                )
            )
    return verdicts


def _name(row: Row) -> str:
    return f"{row.runtime} {row.dtype}"


def table(verdicts: list[Verdict], workloads: list[Workload]) -> str:
    """Return the table in Markdown."""
    lines = []
    for workload in workloads:
        lines += [f"**{workload.name}.** {workload.what}", ""]
        lines += ["| batch | runtime | baseline, ms | ours, ms | times as fast (95 %) | share of GEMM peak | goals |"]
        lines += ["|---:|---|---:|---:|---|---:|---|"]
        for v in (v for v in verdicts if v.workload == workload.name):
            low, high = v.speedup.interval_95
            ratio = f"{v.speedup.ratio:.2f} ({low:.2f} to {high:.2f})"
            goals = ", ".join(v.goals())
            lines.append(
                f"| {v.batch_size} | {v.runtime} | {v.baseline_ms:.1f} | {v.own_ms:.1f} | {ratio} | {v.peak_share:.0%} | {goals} |"
            )
        lines.append("")
    return "\n".join(lines)


def main() -> int:
    """Measure the workloads asked for and write the record; exit code 1 for a goal missed only with --require-goals."""
    known = sorted(path.stem for path in (FOLDER / "workloads").glob("*.yaml"))
    parser = argparse.ArgumentParser(description="Measure named workloads against NVIDIA's way of computing.")
    parser.add_argument("workloads", nargs="*", default=known, help=f"some of {', '.join(known)} [all]")
    parser.add_argument("--work-dir", type=Path, default=ROOT / "runs" / "speed", help="where checkpoint, exports and receipts stay")
    parser.add_argument("--out", type=Path, help="the record, without its ending [benchmarks/results/speed_<device>_<yyyymm>]")
    parser.add_argument("--quick", action="store_true", help="a small model and few samples")
    parser.add_argument("--require-goals", action="store_true", help="end with 1 where a goal is missed")
    arguments = parser.parse_args()
    try:
        workloads = [read_workload(FOLDER / "workloads" / f"{name}.yaml") for name in arguments.workloads]
        workloads = [smaller(workload) for workload in workloads] if arguments.quick else workloads
        bench = Bench(arguments.work_dir.resolve())
        environment = describe_environment(threads=workloads[0].threads, device="cpu")
        peak = measure_peak("cpu", "fp32", workloads[0].threads).flops
        results = {workload.name: bench.measure(workload) for workload in workloads}
        verdicts = [verdict for workload in workloads for verdict in judge(workload, results[workload.name], peak)]
    except TxlError as error:
        print(f"Error: {error.message} {error.remedy or ''}".strip(), file=sys.stderr)
        return error.exit_code
    today = datetime.date.today()
    stem = arguments.out or FOLDER / "results" / f"speed_{device_slug(None, environment.get('cores_usable'))}_{today:%Y%m}"
    record = {
        "theme": "speed",
        "date": today.isoformat(),
        "peak_flops_fp32": peak,
        "environment": environment,
        "workloads": [dataclasses.asdict(workload) for workload in workloads],
        "verdicts": [{**dataclasses.asdict(v), "speedup": v.speedup.to_dict(), "goals": v.goals()} for v in verdicts],
        "results": {name: [result.to_dict() for result in found] for name, found in results.items()},
    }
    write_json(Path(f"{stem}.json"), json.loads(json.dumps(without_folders(record))))
    shown = table(verdicts, workloads)
    Path(f"{stem}.md").write_text(f"{shown}\nMeasured peak: {peak / 1e9:.0f} GFLOP/s in FP32. {today}.\n", encoding="utf-8")
    print(shown)
    missed = any("MISSED" in goal for v in verdicts for goal in v.goals())
    return 1 if missed and arguments.require_goals else 0


if __name__ == "__main__":
    sys.exit(main())
