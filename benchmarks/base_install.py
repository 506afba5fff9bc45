"""Shows what works after `pip install txl` without any extra, and that everything else names the extra it lacks.

    python benchmarks/base_install.py                  # builds the wheel, installs it into a fresh environment; some minutes, 1 GiB
    python benchmarks/base_install.py --hide-extras    # in this environment, whose other packages cannot be imported meanwhile

Exit code 1 where a command of the base installation fails, or another one fails without naming an extra.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from running import ROOT

HIDDEN = (
    *("onnx", "onnxscript", "onnx_ir", "onnxruntime", "polygraphy", "tensorrt", "tensorrt_rtx", "jinja2", "matplotlib", "tensorboard"),
    *("hypothesis", "playwright"),
)
"""Packages that come with an extra. PyTorch itself needs Jinja2, so that the report's lacks matplotlib alone after a true installation."""
HIDE = f"""
from importlib.machinery import PathFinder
find = PathFinder.find_spec
PathFinder.find_spec = classmethod(
    lambda cls, name, path=None, target=None: None if name.partition(".")[0] in {HIDDEN!r} else find(name, path, target)
)
"""
WORKS, LACKS = True, False
TRAIN = "train --config tiny --dataset pydoc --data data --work-dir run --max-step 2 --batch-size 4 --eval-interval 2"
COMMANDS = (
    ("version", "--version", WORKS),
    ("data prepare", "data prepare pydoc --out data", WORKS),
    ("train", TRAIN, WORKS),
    ("eval", "eval --checkpoint run/checkpoint_last.pt --data data --dataset pydoc --split test --batch-size 8", WORKS),
    ("generate", "generate --checkpoint run/checkpoint_last.pt --prompt the --max-tokens 3 --seed 1", WORKS),
    ("export torchscript", "export --checkpoint run/checkpoint_last.pt --format torchscript --out script", WORKS),
    ("verify", "verify script", WORKS),
    ("inspect", "inspect script", WORKS),
    ("doctor", "doctor", WORKS),
    ("export onnx", "export --checkpoint run/checkpoint_last.pt --format onnx --out onnx", LACKS),
    ("train tensorboard", TRAIN.replace("work-dir run", "work-dir board") + " --tensorboard", LACKS),
    ("report", "report --work-dir run --out report.html", LACKS),
)


def fresh_environment(folder: Path) -> Path:
    """Build the wheel, install it without extras into an environment of its own, and return that one's Python."""
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)], check=True)
    (wheel,) = folder.glob("txl-*.whl")
    subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
    python = folder / "venv" / "bin" / "python"
    constraints = ["--constraint", str(ROOT / "constraints.txt")]
    subprocess.run([str(python), "-m", "pip", "install", "--quiet", *constraints, str(wheel)], check=True)
    return python


def main() -> int:
    """Run the commands and tell what came of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hide-extras", action="store_true", help="hide the extras of this environment rather than make a fresh one")
    parser.add_argument("--out", type=Path, help="write what was found as JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="txl-base-") as name:
        folder = Path(name)
        paths = [] if not options.hide_extras else [str(folder / "hook"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "CI": "true", "TXL_CACHE_DIR": str(folder / "cache")}
        python = Path(sys.executable) if options.hide_extras else fresh_environment(folder)
        (folder / "hook").mkdir()
        (folder / "hook" / "sitecustomize.py").write_text(HIDE, encoding="utf-8")
        listed = subprocess.run([str(python), "-m", "pip", "list", "--format=freeze"], capture_output=True, text=True, check=True)
        work = folder / "work"
        work.mkdir()
        found: dict[str, Any] = {"packages": [] if options.hide_extras else listed.stdout.split(), "commands": {}}
        failed = False
        program = "import sys; from txl_deploy.cli.main import main; sys.argv[0] = 'txl'; sys.exit(main())"
        for title, arguments, works in COMMANDS:
            command = [str(python), "-c", program, *arguments.split()]
            done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, check=False)
            told = done.stderr.strip()[-400:]
            fine = done.returncode == 0 if works else done.returncode == 3 and "pip install 'txl[" in told
            failed |= not fine
            found["commands"][title] = {"exit_code": done.returncode, "told": told}
            what = "" if works and fine else f"  {told}"
            print(f"{'ok    ' if fine else 'FAILED'} txl {arguments}  -> {done.returncode}{what}", flush=True)
    if options.out is not None:
        options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
