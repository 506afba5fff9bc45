"""Feeds damaged and hostile files to every reader, guided by coverage, and records what came of it.

    python benchmarks/fuzz.py                                   # 100,000 inputs each; an hour or two on two cores
    python benchmarks/fuzz.py --inputs 2000 --seconds 60 manifest receipt
    python benchmarks/fuzz.py --more --seconds 600 config       # goes on where the record has fewer than 100,000, with other changes
    pip install atheris                                         # guides by coverage; without it, changes of what it kept are blind

What is read, and what counts as a fault, stands in tests/fuzz. Each reader has a process of its own, so that a crash of native code is
found and the others go on. An input that makes a fault is kept in --corpus. Exit code 1 if there was one. Writes
benchmarks/results/fuzz_<device>_<yyyymm>.json and .md; readers that were not run keep their rows.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import datetime
import importlib.metadata
import importlib.util
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

from running import ROOT, child_environment, device_slug, without_folders

INSTRUMENTED = ["txl_train", "txl_deploy", "zipfile", "tarfile", "pickletools", "yaml"]
TIDIED_EVERY = 500
"""Inputs after which the files that reading has left are removed."""
REPORTED = 30
"""Different faults of one reader that are told."""


def fuzz_one(name: str, n_inputs: int, seconds: float, corpus: Path, report: Path, seed: int, guided: bool) -> None:
    """Run one reader in this process, and write what came of it to `report`."""
    if guided:
        import atheris

        with atheris.instrument_imports(include=INSTRUMENTED):
            from tests.fuzz import harness, mutate, targets
    else:
        from tests.fuzz import harness, mutate, targets
    import torch

    torch.set_num_threads(1)
    target = targets.TARGETS[name]
    outcomes: Counter[str] = Counter()
    faults: dict[str, str] = {}
    begun = time.monotonic()
    work = tempfile.TemporaryDirectory(prefix="txl-fuzz-")
    folder = Path(work.name).resolve() / "input"
    os.environ["TXL_CACHE_DIR"] = str(folder / "cache")
    seeds = harness.fresh(target, folder)
    prepared = set(folder.rglob("*"))

    def finish() -> None:
        document = {"inputs": sum(outcomes.values()), "seconds": time.monotonic() - begun, "outcomes": dict(outcomes), "faults": faults}
        report.write_text(json.dumps(document))

    def one(data: bytes) -> None:
        (corpus / "current").write_bytes(data)  # what a crash leaves behind
        try:
            outcomes[harness.run(target, folder, data)] += 1
        except harness.Fault as fault:
            outcomes["fault"] += 1
            kind = re.sub(r"\d+|0x\w+", "N", str(fault))[:60]
            if kind not in faults and len(faults) < REPORTED:
                faults[kind] = str(fault)
                (corpus / f"fault-{len(faults)}").write_bytes(data)
        if sum(outcomes.values()) % TIDIED_EVERY == 0:
            harness.tidy(folder, {*prepared, folder / target.file})
            finish()  # what is counted so far stays if the next input ends this process
        if sum(outcomes.values()) >= n_inputs or time.monotonic() - begun > seconds:
            finish()
            work.cleanup()
            os._exit(0)  # libFuzzer ends the process by itself too, but without telling

    longest = 4 * max(len(data) for data in seeds) + 4096
    with harness.limited_memory(harness.LARGEST_BYTES):
        if not guided:
            kept = [path.read_bytes() for path in sorted(corpus.iterdir()) if re.fullmatch("[0-9a-f]{40}", path.name)]
            for data in harness.inputs(target, (*seeds, *kept), n_inputs + 1, seed):  # from what earlier runs found to reach new code, too
                one(data[:longest])
        for number, data in enumerate(seeds):
            (corpus / f"seed-{number}").write_bytes(data)

        def mutator(data: bytes, max_size: int, number: int) -> bytes:
            chance = random.Random(number)
            made = atheris.Mutate(data, max_size) if chance.random() < 0.4 else mutate.change(target, data, seeds, chance)
            if target.mend is not None and chance.random() < 0.75:
                with contextlib.suppress(Exception):
                    made = target.mend(made)
            return made[:max_size]

        options = [f"-max_len={longest}", f"-seed={seed}", "-timeout=60", "-rss_limit_mb=8192", "-runs=-1"]
        options += [f"-artifact_prefix={corpus}/", str(corpus)]  # where libFuzzer puts inputs that it found slow or fatal
        atheris.Setup([sys.argv[0], *options], one, custom_mutator=mutator)
        try:
            atheris.Fuzz()
        except BaseException:  # an error of this script: libFuzzer's way out of it would wait for ever
            traceback.print_exc()
            os._exit(1)


def run_target(name: str, options: argparse.Namespace, guided: bool) -> dict[str, Any]:
    """Run one reader in a process of its own, and return what it and libFuzzer tell. After a crash another process goes on."""
    begun = time.monotonic()
    result = run_once(name, options, guided)
    while "crash" in result["faults"] and (left := options.seconds - (time.monotonic() - begun)) > 0 and counted(result) < options.inputs:
        crashes = sum(key.startswith("crash") for key in result["faults"])
        changed = {"inputs": options.inputs - counted(result), "seconds": left, "seed": options.seed + 1000 * crashes}
        result["faults"][f"crash {crashes}"] = result["faults"].pop("crash")
        result = added(result, run_once(name, argparse.Namespace(**{**vars(options), **changed}), guided))
    print(f"{name:22} {counted(result):>8} inputs  {result['outcomes']}  {'; '.join(result['faults'].values())[:300]}", flush=True)
    return result


def run_once(name: str, options: argparse.Namespace, guided: bool) -> dict[str, Any]:
    """Run one process for a reader; if a crash ends it, what it had counted stays, and the input is kept."""
    corpus = options.corpus / name
    corpus.mkdir(parents=True, exist_ok=True)
    report = corpus / "report"
    report.unlink(missing_ok=True)
    command = [sys.executable, __file__, name, "--one", "--inputs", str(options.inputs), "--seconds", str(options.seconds)]
    command += ["--seed", str(options.seed), "--corpus", str(options.corpus), *([] if guided else ["--blind"])]
    with (corpus / "stderr").open("wb") as errors:
        process = subprocess.Popen(command, env=child_environment(OMP_NUM_THREADS="1"), stdout=subprocess.DEVNULL, stderr=errors)
        try:
            status: object = process.wait(options.seconds + 300)
        except subprocess.TimeoutExpired:
            process.kill()
            status = "none: it hung"
    told = (corpus / "stderr").read_text(errors="replace")
    nothing: dict[str, Any] = {"inputs": None, "seconds": None, "outcomes": {}, "faults": {}}
    result: dict[str, Any] = json.loads(report.read_text()) if report.exists() else nothing
    if status != 0:
        kept = corpus / f"crash-{options.seed}"
        if (current := corpus / "current").exists():
            shutil.copy(current, kept)
        last = (told.strip().splitlines() or ["no message"])[-1]
        result["faults"]["crash"] = f"exit status {status}, by the input that is kept as {kept.name}: {last[:120]}"
        result["outcomes"]["fault"] = result["outcomes"].get("fault", 0) + 1
        result["inputs"] = sum(result["outcomes"].values())
    covered = [int(text) for text in re.findall(r"cov: (\d+)", told)]
    result["coverage"] = [covered[0], covered[-1]] if covered else None
    return result


def table(results: dict[str, dict[str, Any]]) -> str:
    """Return the Markdown table of a record."""
    lines = [
        "| reader | inputs | read | refused by an error of ours | faults | seconds | edges of our code: first, last |",
        "|---|---:|---:|---:|---:|---:|---|",
    ]
    for name, result in results.items():
        outcomes = result["outcomes"]
        refused = sum(n for kind, n in outcomes.items() if kind not in ("read", "fault"))
        covered = "not measured" if result["coverage"] is None else "{:,}, {:,}".format(*result["coverage"])
        faults = outcomes.get("fault", 0) if result["inputs"] is not None else "crash"
        seconds = f"{result['seconds'] or 0:,.0f}"
        counts = [f"{n:,}" for n in (result["inputs"] or 0, outcomes.get("read", 0), refused)]
        if sum(outcomes.values()) < (result["inputs"] or 0):  # it was stopped
            counts[1:], seconds = ["not counted", "not counted"], "not counted"
        lines.append(f"| {' | '.join([name, *counts, str(faults), seconds, covered])} |")
    return "\n".join(lines)


def main() -> int:
    """Run the readers that the command line names, and write the record."""
    sys.path.insert(0, str(ROOT))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", help="readers (default: all)")
    parser.add_argument("--inputs", type=int, default=100_000, help="inputs for each reader (default 100000)")
    parser.add_argument("--seconds", type=float, default=3600, help="seconds for each reader at most (default 3600)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--corpus", type=Path, default=ROOT / "runs" / "fuzz", help="where inputs are kept (default runs/fuzz)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the record")
    parser.add_argument("--more", action="store_true", help="go on from the record, up to --inputs in all, by another seed")
    parser.add_argument("--jobs", type=int, default=1, help="readers side by side (default 1)")
    parser.add_argument("--blind", action="store_true", help="without coverage, even where atheris is installed")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.corpus = options.corpus.resolve()
    guided = not options.blind and importlib.util.find_spec("atheris") is not None
    if options.one:
        corpus = options.corpus / options.targets[0]
        fuzz_one(options.targets[0], options.inputs, options.seconds, corpus, corpus / "report", options.seed, guided)
        return 0
    from tests.fuzz.targets import TARGETS
    from txl_deploy.bench.environment import describe_environment

    unknown = sorted(set(options.targets) - set(TARGETS))
    if unknown:
        parser.error(f"there is no reader {', '.join(unknown)}; there are {', '.join(TARGETS)}")
    environment = describe_environment()
    names = options.targets or list(TARGETS)
    earlier = recorded(record_path(options.out, environment)) if options.more else {}
    names = [name for name in names if name not in earlier or counted(earlier[name]) < options.inputs]
    guide = f"guided by coverage (atheris {importlib.metadata.version('atheris')})" if guided else "without coverage"
    n_faults = 0
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        runs = {name: going_on(options, earlier.get(name)) for name in names}
        waiting = {pool.submit(run_target, name, runs[name], guided): name for name in names}
        for done in concurrent.futures.as_completed(waiting):
            result = {**done.result(), "seed": runs[waiting[done]].seed, "guide": guide, "time_utc": f"{utc_now():%Y-%m-%dT%H:%M:%S+00:00}"}
            n_faults += len(result["faults"])
            if waiting[done] in earlier:
                result = together(earlier[waiting[done]], result)
            write_record(options.out, waiting[done], result, environment, list(TARGETS))
    return 1 if n_faults else 0


def utc_now() -> datetime.datetime:
    """Return the time."""
    return datetime.datetime.now(datetime.timezone.utc)


def record_path(folder: Path, environment: dict[str, Any]) -> Path:
    """Return where this month's record of this machine is kept."""
    return folder / f"fuzz_{device_slug(None, environment['cores'])}_{utc_now():%Y%m}.json"


def recorded(path: Path) -> dict[str, Any]:
    """Return the rows of a record; none if there is no record."""
    rows: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["results"] if path.exists() else {}
    return rows


def counted(row: dict[str, Any]) -> int:
    """Return how many inputs of a row have an outcome: those of a run that was stopped have none."""
    return sum(row["outcomes"].values())


def going_on(options: argparse.Namespace, earlier: dict[str, Any] | None) -> argparse.Namespace:
    """Return the options for what is missing of the inputs, with a seed that no earlier run had."""
    if earlier is None:
        return options
    changed = {"inputs": options.inputs - counted(earlier), "seed": options.seed + earlier.get("runs", 1)}
    return argparse.Namespace(**{**vars(options), **changed})


def together(earlier: dict[str, Any], later: dict[str, Any]) -> dict[str, Any]:
    """Return the row of several runs of one reader; `added` says how."""
    guides = dict.fromkeys([*earlier["guide"].split(" and "), later["guide"]])
    return {**added(earlier, later), "runs": earlier.get("runs", 1) + 1, "guide": " and ".join(guides)}


def added(earlier: dict[str, Any], later: dict[str, Any]) -> dict[str, Any]:
    """Return what two processes for one reader tell together: what was counted is added up, and the first coverage stays."""
    outcomes = Counter(earlier["outcomes"]) + Counter(later["outcomes"])
    coverage = [(earlier["coverage"] or later["coverage"])[0], later["coverage"][-1]] if later["coverage"] else earlier["coverage"]
    return {
        **earlier,
        **later,
        "inputs": None if later["inputs"] is None else sum(outcomes.values()),
        "seconds": (earlier["seconds"] or 0) * bool(counted(earlier)) + (later["seconds"] or 0),
        "outcomes": dict(outcomes),
        "faults": {**earlier["faults"], **later["faults"]},
        "coverage": coverage,
    }


def write_record(folder: Path, name: str, result: dict[str, Any], environment: dict[str, Any], order: list[str]) -> None:
    """Put what came of one reader into the record, in place of what is there of it."""
    now = utc_now()
    path = record_path(folder, environment)
    path.parent.mkdir(parents=True, exist_ok=True)
    found = recorded(path)
    found[name] = without_folders(result)
    results = {name: found[name] for name in order if name in found}
    document = {"theme": "fuzz", "time_utc": now.isoformat(timespec="seconds"), "environment": environment, "results": results}
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    faults = [f"- {name}: {text}" for name, one in results.items() for text in one["faults"].values()]
    lines = [
        f"# Damaged and hostile files, {now:%Y-%m-%d}",
        "",
        f"`benchmarks/fuzz.py`, {', '.join(sorted({part for one in results.values() for part in one['guide'].split(' and ')}))}, on "
        f"{environment['cores']} cores,",
        "shared with other work. A reader that is run again replaces its row; with `--more` its counts are added.",
        f"Figures: [{path.name}]({path.name}). What counts as a fault: tests/fuzz/harness.py.",
        "",
        table(results),
        "",
        f"Not run at length: {', '.join(name for name in order if name not in results) or 'none'}.",
        "",
        "Faults:" if faults else "No faults.",
        *(["", *faults] if faults else []),
        "",
        *(f"{name}: {one['note']}\n" for name, one in results.items() if "note" in one),
    ]
    path.with_suffix(".md").write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
