"""Long runs and large loads: does txl drift, leak, lose precision, or need more memory than it should?

    python benchmarks/endurance.py                         # an hour or two on two cores, 15 GB of disk
    python benchmarks/endurance.py --cases rollout sums    # these alone; the record keeps what it knows of the others
    python benchmarks/endurance.py --quick --out /tmp/x

Each case is in `endurance_cases.py` and runs processes of its own, so that what one holds is not another's. Peak memory is read from the
system while they run. Writes <out>.json and <out>.md after each case; exit code 1 if one failed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from endurance_cases import CASES, FULL, QUICK
from running import ROOT, device_slug, without_folders

from txl_deploy.bench.environment import describe_environment
from txl_train.files import write_json


def table(record: dict[str, Any]) -> str:
    """Return the figures in Markdown, a section a case."""
    parts = []
    for name, case in record["cases"].items():
        verdict = "met" if case["met"] else "MISSED"
        parts.append(f"## {name}: {verdict}\n\n{case['promise']}\n")
        rows = case["rows"]
        if rows:
            heads = list(rows[0])
            lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
            lines += ["| " + " | ".join(str(row[head]) for head in heads) + " |" for row in rows]
            parts.append("\n".join(lines) + "\n")
        parts.append(f"{case['seconds']:.0f} s, {case['date']}.\n")
    return "\n".join(parts)


def main() -> int:
    """Run the cases and write the record; exit code 1 if one failed."""
    parser = argparse.ArgumentParser(description="Run long and large cases.")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES), help="[all]")
    parser.add_argument("--out", type=Path, help="the record, without its ending [benchmarks/results/endurance_<device>_<yyyymm>]")
    parser.add_argument("--work-dir", type=Path, help="where files are written meanwhile [a temporary folder]")
    parser.add_argument("--quick", action="store_true", help="small sizes: does the script itself work?")
    arguments = parser.parse_args()
    environment = describe_environment(threads=1, device="cpu")
    today = datetime.date.today()
    stem = arguments.out or ROOT / "benchmarks" / "results" / f"endurance_{device_slug(None, environment.get('cores_usable'))}_{today:%Y%m}"
    path = Path(f"{stem}.json")
    record: dict[str, Any] = {"theme": "endurance", "environment": environment, "cases": {}}
    if path.exists():
        record["cases"] = json.loads(path.read_text(encoding="utf-8"))["cases"]
    for name in arguments.cases:
        case = CASES[name]
        print(f"{name} ...", flush=True)
        begun = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="txl-", dir=arguments.work_dir) as folder:
            found = case(Path(folder), QUICK if arguments.quick else FULL)
        found |= {"promise": (case.__doc__ or "").strip(), "seconds": time.monotonic() - begun, "date": today.isoformat()}
        record["cases"][name] = json.loads(json.dumps(without_folders(found)))
        record["cases"] = {known: record["cases"][known] for known in CASES if known in record["cases"]}
        write_json(path, record)
        shown = table(record)
        Path(f"{stem}.md").write_text(
            f"# Long runs and large loads\n\n{shown}\nMade by `python benchmarks/endurance.py`.\n", encoding="utf-8"
        )
        print(f"{name}: {'met' if found['met'] else 'MISSED'}", flush=True)
    print(table(record))
    return int(not all(record["cases"][name]["met"] for name in arguments.cases))


if __name__ == "__main__":
    sys.exit(main())
