"""Named workloads of `workloads/*.yaml`: ours against NVIDIA's way of computing, by turns in one run, with goals that are met or missed.

    python benchmarks/speed.py                                       # every workload: an hour on two cores, 6 GiB of memory
    python benchmarks/speed.py base-cpu-fp32 --work-dir runs/speed   # one; checkpoint, exports and receipts stay for the next time
    python benchmarks/speed.py wikitext2-cpu --checkpoint W/checkpoint_best.pt --data wikitext-2      # a trained model
    python benchmarks/speed.py base-cpu-fp32 --profile               # and where the time goes, by kind of operator
    python benchmarks/speed.py --quick --out /tmp/x                  # a small model: does the script itself work?

Each batch size is a run of `reference_bench.py`, which is `txl bench` with the opponent as one runtime more: exports need a receipt, all
read the same text with a full memory, and the perplexities of all timed steps are compared. The ratio is that of median latencies by
pairs of turns, with its 95 % interval; a goal that is not reached is written as MISSED, and a row that is INVALID by its own verdict is
called so. The peak is measured before and after each run, and the larger one counts. Weights are random and the text is drawn, since
neither changes how long a step takes; what share of the targets lies in each tail cluster does, and was chosen to resemble English.
Writes <workload>_<device>_<yyyymm>.json with every sample, the machine and the versions, and the tables as .md beside it.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import hashlib
import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import export_base
import numpy as np
import torch
from running import ROOT, child_environment, device_slug, txl_command, without_folders
from speed_tables import Measured, Verdict, judge, profile_table, provenance, table

from txl_deploy.bench.compare import LEAST_TURNS
from txl_deploy.bench.environment import describe_environment
from txl_deploy.bench.result import BenchResult
from txl_deploy.cli.bench_contenders import RUNTIMES
from txl_train.errors import ConfigError, TxlError, UsageError, ValidationError, nearest
from txl_train.files import file_sha256, write_json
from txl_train.flops import measured_peak_flops
from txl_train.settings import plain_yaml

FOLDER = Path(__file__).resolve().parent
SHARES = (0.88, 0.05, 0.055, 0.015)
"""Of the targets, in the shortlist and in each tail cluster."""
SIZES = {"base": export_base.BASE, "quick": export_base.QUICK}
GIVEN = "given"
"""The `model` of a workload whose checkpoint and text the user names."""
ALLOWED = {
    "model": (*SIZES, GIVEN),
    "baseline": ("reference", "reference-eager"),
    "runtimes": RUNTIMES,
    "exports": ("fp32", "fp16", "int8"),
    "dtype": ("fp32", "int8"),
}
"""What a workload may name."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One batch size of a workload, and its goals."""

    batch_size: int
    samples: int
    ratio: float | None = None
    """How many times as fast as the baseline the best of ours is to be, by median latency; None where nothing is promised."""
    peak_share: float | None = None
    """What share of the machine's measured matrix products it is to reach, by the step's arithmetic."""


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """The lengths that a workload may set."""

    tgt_len: int | None = None
    mem_len: int | None = None
    clamp_len: int | None = None
    same_length: bool | None = None


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What is measured, as a file of `workloads/` says it."""

    name: str
    what: str
    model: str
    lengths: dict[str, Any]
    """`tgt_len`, `mem_len`, `clamp_len` in tokens, and `same_length`; those left out are the model's own."""
    threads: int
    baseline: str
    runtimes: list[str]
    exports: list[str]
    dtype: str = "fp32"
    """Of the checkpoint in `runtimes`. Eager PyTorch is measured in fp32 in any case, as it leads, and the baseline is in fp32."""
    n_tokens: int | None = None
    """Of the text that is drawn; None where it is given."""
    runs: list[Run]


def read_workload(path: Path) -> Workload:
    """Read a workload.

    Raises:
        ConfigError: there is no such file, a key is missing or unknown, or what it names does not exist.
    """
    if not path.is_file():
        known = sorted(file.stem for file in path.parent.glob("*.yaml"))
        raise ConfigError(f"There is no workload {path.stem}.{nearest(path.stem, known)}", remedy=f"There is {', '.join(known)}.")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path.name} is no text: {error!r:.200}.") from error
    values = plain_yaml(text, path.name)
    if not isinstance(values, dict):
        raise ConfigError(f"{path.name} must be made of `key: value` lines.")
    try:
        return _workload_of(values, path)
    except (TypeError, KeyError, AttributeError) as error:  # a value of another type than it should be
        raise ConfigError(f"{path.name} is no workload: {error!r:.200}.") from error


def _workload_of(values: dict[str, Any], path: Path) -> Workload:
    for key, names in ALLOWED.items():
        named = values.get(key, [])
        for name in [named] if isinstance(named, str) else named:
            if name not in names:
                raise ConfigError(f"{path.name}: there is no `{key}` {name}.{nearest(name, names)}", remedy=f"There is {', '.join(names)}.")
    _checked(values.get("lengths", {}), Lengths, path)
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
    tgt_len = 1 if workload.lengths.get("tgt_len") == 1 else export_base.TGT_LEN["quick"]
    config = export_base.QUICK
    lengths = {"tgt_len": tgt_len, "mem_len": config.mem_len, "clamp_len": config.clamp_len, "same_length": config.same_length}
    runs = [dataclasses.replace(run, samples=LEAST_TURNS) for run in workload.runs[:1]]
    return dataclasses.replace(workload, model="quick", lengths=lengths, n_tokens=600, runs=runs)


class Bench:
    """The folder with checkpoint, text and exports, and what is run in it.

    Args:
        work_dir: what is made stays here for the next time.
        given: checkpoint and folder of the text for the workloads that ask for them.
    """

    def __init__(self, work_dir: Path, given: tuple[Path, Path] | None = None) -> None:
        self.work_dir = work_dir
        self.given = given

    def txl(self, arguments: list[str], done_if: Path) -> None:
        """Run `txl`, unless what it makes is there already. Raises ValidationError if it fails."""
        if not done_if.exists():
            self.run(txl_command(arguments))

    def run(self, command: list[str]) -> None:
        """Run a command; its own messages are shown. Raises ValidationError if it fails."""
        code = subprocess.run(command, cwd=ROOT, env=child_environment(), stdout=subprocess.DEVNULL, check=False).returncode
        if code:
            raise ValidationError(f"`{' '.join(command[-8:])}` ended with {code}.")

    def checkpoint(self, size: str) -> Path:
        """Return the checkpoint: the one given, or one of random weights, written if it is not there."""
        if size == GIVEN:
            assert self.given is not None, "checked by main"
            return self.given[0]
        folder = self.work_dir / size
        if not (folder / "checkpoint.pt").is_file():
            folder.mkdir(parents=True, exist_ok=True)
            export_base.write_base_checkpoint(folder, size=size)
        return folder / "checkpoint.pt"

    def text(self, workload: Workload) -> list[str]:
        """Return the options that name the text: the one given, or words of the vocabulary in lines of 25, written if not there."""
        if workload.model == GIVEN:
            assert self.given is not None, "checked by main"
            return ["--data", str(self.given[1])]
        n_tokens = workload.n_tokens
        assert n_tokens is not None, "a model of random weights reads a text that is drawn"
        folder = self.work_dir / workload.model / f"text-{n_tokens}"
        if not (folder / "test.txt").is_file():
            folder.mkdir(parents=True, exist_ok=True)
            ids = draw_ids(SIZES[workload.model].cluster_ends, n_tokens)
            lines = [" ".join(f"word{i - 2}" for i in ids[k : k + 25]) for k in range(0, n_tokens, 25)]
            for split in ("train", "valid", "test"):
                (folder / f"{split}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return ["--data", str(folder), "--dataset", "text"]

    def export(self, workload: Workload, dtype: str) -> Path:
        """Return the export with its receipt, made unless this very code has made it from this checkpoint before."""
        checkpoint, text = self.checkpoint(workload.model), self.text(workload)
        key = hashlib.sha256(repr((file_sha256(checkpoint), code_sha256(), text, workload.lengths)).encode()).hexdigest()[:8]
        out = self.work_dir / workload.model / f"onnx-{dtype}-{key}"
        options = ["--format", "onnx", "--dtype", dtype, "--out", str(out), *_options(workload.lengths)]
        self.txl(["export", "--checkpoint", str(checkpoint), *options], done_if=out)
        proof = ["eval", "--artifact", str(out), "--checkpoint", str(checkpoint), *text, "--batch-size", "4"]
        self.txl([*proof, "--threads", str(workload.threads)], done_if=out / "receipt.json")
        return out

    def measure(self, workload: Workload, *, with_profile: bool = False) -> list[Measured]:
        """Export what is missing, prove it, and measure each batch size by turns with the baseline."""
        checkpoint, text = self.checkpoint(workload.model), self.text(workload)
        exports = {dtype: self.export(workload, dtype) for dtype in workload.exports}
        folder = self.work_dir / workload.model
        folder.mkdir(parents=True, exist_ok=True)
        threads = ["--threads", str(workload.threads)]
        found = []
        for run in workload.runs:
            out = folder / f"{workload.name}-{run.batch_size}.json"
            options = ["--runtimes", ",".join([*workload.runtimes, workload.baseline]), "--batch-sizes", str(run.batch_size)]
            options += ["--min-samples", str(run.samples), "--max-samples", str(run.samples), "--max-duration", "600"]
            options += ["--dtype", workload.dtype, *([] if exports else _options(workload.lengths))]
            options += [*text, "--device", "cpu", *threads, "--percentiles", "50"]
            command = [sys.executable, str(FOLDER / "reference_bench.py"), "bench", "--checkpoint", str(checkpoint), *options]
            command += [part for path in exports.values() for part in ("--artifact", str(path))]
            before = peak_flops(workload.threads)
            self.run([*command, "--accept-invalid", "--out", str(out)])
            result, after = BenchResult.read(out), peak_flops(workload.threads)
            profiles = []
            types = dict.fromkeys(("fp32", workload.dtype)) if "pytorch" in workload.runtimes else ()
            eager = ["--checkpoint", str(checkpoint), *_options(workload.lengths)]
            wanted = [(f"pytorch {dtype}", [*eager, "--dtype", dtype]) for dtype in types]
            wanted += [(f"onnx {dtype}", ["--artifact", str(path)]) for dtype, path in exports.items()]
            for name, opened in wanted if with_profile else []:
                out = folder / f"profile-{workload.name}-{run.batch_size}.json"
                options = [*opened, *text, "--batch-size", str(run.batch_size), *threads, "--out", str(out)]
                self.run([sys.executable, str(FOLDER / "speed_profile.py"), *options])
                profiles.append({"runtime": name, **json.loads(out.read_text(encoding="utf-8"))})
            found.append(Measured(result=result, peak_before=before, peak_after=after, profiles=profiles))
        return found


def code_sha256() -> str:
    """Return the checksum of both packages: an export that other code made may be another graph."""
    digest = hashlib.sha256()
    for path in sorted(path for package in ("txl_train", "txl_deploy") for path in (ROOT / package).rglob("*.py")):
        digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()


def peak_flops(threads: int) -> float:
    """Return the operations per second of large products in FP32 on so many threads of a CPU, now."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            return measured_peak_flops(torch.device("cpu"), torch.float32)
    finally:
        torch.set_num_threads(before)


def draw_ids(ends: tuple[int, ...], n_tokens: int, seed: int = 1) -> np.ndarray:
    """Return ids whose clusters have the shares of SHARES; within one, all words but the special ones are alike."""
    generator = np.random.default_rng(seed)
    cluster = generator.choice(len(ends) - 1, size=n_tokens, p=SHARES)
    low, high = np.array(ends[:-1])[cluster], np.array(ends[1:])[cluster]
    ids: np.ndarray = np.maximum(low + (generator.random(n_tokens) * (high - low)).astype(np.int64), 2)
    return ids


def _options(lengths: dict[str, Any]) -> list[str]:
    options = []
    for name in ("tgt_len", "mem_len", "clamp_len"):
        if name in lengths:
            options += [f"--{name.replace('_', '-')}", str(-1 if lengths[name] is None else lengths[name])]
    if "same_length" in lengths:
        options.append("--same-length" if lengths["same_length"] else "--no-same-length")
    return options


def main() -> int:
    """Measure the workloads asked for and write the record; exit code 1 for a goal missed only with --require-goals."""
    known = sorted(path.stem for path in (FOLDER / "workloads").glob("*.yaml"))
    parser = argparse.ArgumentParser(description="Measure named workloads against NVIDIA's way of computing.")
    parser.add_argument("workloads", nargs="*", help=f"some of {', '.join(known)} [all that need no checkpoint, or all]")
    parser.add_argument("--checkpoint", type=Path, help="a trained one, for the workloads that measure the one given")
    parser.add_argument("--data", type=Path, help="the folder of its text")
    parser.add_argument("--work-dir", type=Path, default=ROOT / "runs" / "speed", help="where checkpoint, exports and receipts stay")
    parser.add_argument("--out", type=Path, default=FOLDER / "results", help="the folder of the records [benchmarks/results]")
    parser.add_argument("--quick", action="store_true", help="a small model and few samples")
    parser.add_argument("--profile", action="store_true", help="also where the time goes, by kind of operator, in untimed steps")
    parser.add_argument("--require-goals", action="store_true", help="end with 1 where a goal is missed")
    arguments = parser.parse_args()
    try:
        if (arguments.checkpoint is None) != (arguments.data is None):
            raise UsageError("`--checkpoint` and `--data` belong together.", remedy="Give both, or neither.")
        given = None if arguments.checkpoint is None else (arguments.checkpoint.resolve(), arguments.data.resolve())
        workloads = [read_workload(FOLDER / "workloads" / f"{name}.yaml") for name in arguments.workloads or known]
        workloads = [smaller(workload) for workload in workloads] if arguments.quick else workloads
        if not arguments.workloads and given is None:
            workloads = [workload for workload in workloads if workload.model != GIVEN]
        lacking = next((workload.name for workload in workloads if workload.model == GIVEN), None)
        if lacking is not None and given is None:
            raise UsageError(f"{lacking} measures a model that is given.", remedy="Name it with `--checkpoint FILE --data DIR`.")
        bench = Bench(arguments.work_dir.resolve(), given)
        missed = False
        for workload in workloads:
            environment = describe_environment(threads=workload.threads, device="cpu")
            measured = bench.measure(workload, with_profile=arguments.profile)
            verdicts = judge(workload, measured)
            device = device_slug(None, environment.get("cores_usable"), environment.get("cpu_extensions", ()))
            stem = f"{workload.name}_{device}_{datetime.date.today():%Y%m}"
            print(write_record(arguments.out / stem, workload, measured, verdicts, environment))
            missed |= any("MISSED" in goal for verdict in verdicts for goal in verdict.goals())
    except TxlError as error:
        print(f"Error: {error.message} {error.remedy or ''}".strip(), file=sys.stderr)
        return error.exit_code
    return 1 if missed and arguments.require_goals else 0


def write_record(
    stem: Path, workload: Workload, measured: list[Measured], verdicts: list[Verdict], environment: Mapping[str, Any], today: str = ""
) -> str:
    """Write `<stem>.json` with everything and `<stem>.md` with the tables, and return the latter."""
    today = today or datetime.date.today().isoformat()
    record = {
        "theme": workload.name,
        "date": today,
        "command": " ".join(["benchmarks/speed.py", *sys.argv[1:]]),
        "environment": dict(environment),
        "workload": dataclasses.asdict(workload),
        "verdicts": [verdict.to_dict() for verdict in verdicts],
        "results": [one.to_dict() for one in measured],
    }
    record = without_folders(record)
    stem.parent.mkdir(parents=True, exist_ok=True)
    write_json(Path(f"{stem}.json"), json.loads(json.dumps(record)))
    shown = f"{table(verdicts, workload)}{profile_table(workload, measured)}{provenance(record)}"
    Path(f"{stem}.md").write_text(shown, encoding="utf-8")
    return shown


if __name__ == "__main__":
    sys.exit(main())
