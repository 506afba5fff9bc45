"""Writes a build kit: all that a target machine needs to build an engine which cannot be built here, and nothing of txl.

The kit holds the ONNX artifact as it is, the exact version of TensorRT as a requirement, the ranges of shapes, a manifest that lacks
only what the build yields, and one script. What the script does stands in `kit_build`; which versions a target needs, in `compat`.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from txl_deploy import manifest as manifests
from txl_deploy.bench.environment import git_commit
from txl_deploy.compat import Stack, Target
from txl_deploy.manifest import BatchRange, EngineFacts, Parent
from txl_deploy.trt import kit_build
from txl_deploy.trt.profiles import Profile
from txl_train.errors import ManifestError
from txl_train.files import file_sha256

BUILD_COMMAND = "sh build.sh"
ENGINE_FOLDER = "engine"
_GRAPH_FOLDER = "onnx"

_BUILD_SH = """\
#!/bin/sh
# Looks at this machine, installs {pin} into .venv beside this file, and builds the engine.
# PYTHON names the Python to use, {oldest} to {newest}: PYTHON=python{newest} sh build.sh
set -eu
cd "$(dirname "$0")"
PYTHON="${{PYTHON:-python3}}"
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 8))' || {{
    echo "There is no usable $PYTHON. Name a Python {oldest} to {newest}: PYTHON=python{newest} sh build.sh" >&2
    exit 3
}}
"$PYTHON" build.py --check
"$PYTHON" -m venv .venv
.venv/bin/python -m pip install --disable-pip-version-check -r requirements.txt
exec .venv/bin/python build.py "$@"
"""

_README = """\
Build kit for {target} (compute capability {capability}), written by {command}

It was not built where it was written: {why_not}.

On a machine with Linux, Python {oldest} to {newest}{machine}, run

    {build}

It installs {pin} into a virtual environment here, builds the engine with it, and writes the folder `{engine}`.
Where {pin} is installed already, `python build.py` does without the environment.

Then, with txl:

    txl verify {engine}
    txl parity --artifact {engine} --checkpoint {checkpoint}
    txl eval --artifact {engine} ...

To run the engine, versions that go together: pip install {run}
"""


@dataclass(frozen=True)
class KitInfo:
    """A written kit."""

    directory: Path
    build_command: str
    """To be run in the kit's folder on the target."""
    files: tuple[str, ...]
    """All of its files, by their paths within the folder."""


def write_kit(
    directory: Path,
    onnx_dir: Path,
    *,
    target: Target,
    stack: Stack,
    batch: BatchRange,
    profiles: Sequence[Profile],
    why_not: str,
    command: str,
    hardware_compatibility: str = "none",
    optimization_level: int | None = None,
) -> KitInfo:
    """Write a kit into the empty folder `directory`.

    Args:
        onnx_dir: an ONNX artifact; its checksums are recomputed.
        stack: one of `target`'s, whose builder the kit installs.
        batch: the numbers of streams that `profiles` allow.
        profiles: of every input, checked (`profiles.check_profiles`).
        why_not: why the engine is not built here, as part of a sentence.
        command: the command line that asked for the engine.
        hardware_compatibility: none, ampere_plus or same_compute_capability: other GPUs on which a TensorRT engine may run.
        optimization_level: 0 to 5; None keeps the builder's own.

    Raises `ManifestError` where the artifact is not what its manifest says or holds no ONNX.
    """
    parent = manifests.read_verified(onnx_dir)
    if parent.format != "onnx":
        raise ManifestError(f"{onnx_dir} holds {parent.format}, and an engine is built from ONNX.", remedy="Give an ONNX artifact.")
    graph = manifests.MODEL_FILES["onnx"]  # which a verified artifact lists
    copied = sorted(name for name in parent.files if name.endswith(".json"))  # the vocabulary
    manifest = dataclasses.replace(
        parent,
        format=manifests.BUILDER_FORMATS[stack.builder],
        files={},
        source=dataclasses.replace(
            parent.source, parent=Parent(manifest_sha256=file_sha256(onnx_dir / manifests.FILE_NAME), format=parent.format)
        ),
        batch=batch,
        versions=parent.versions | {stack.package: stack.builder_version},
        command=f"{command} && {BUILD_COMMAND}",
        precisions={},
        git_commit=git_commit(),
        engine=EngineFacts(
            builder=stack.builder,
            builder_version=stack.builder_version,
            target=target.name,
            compute_capability=stack.compute_capability,
            hardware_compatibility=hardware_compatibility,
            profiles=[profile.record() for profile in profiles],
        ),
    )
    document: dict[str, Any] = {
        "target": target.name,
        "compute_capability": stack.compute_capability,
        "needs_gpu": not stack.builds_without_gpu,
        "builder": stack.builder,
        "builder_name": stack.builder_name,
        "builder_version": stack.builder_version,
        "builder_pin": stack.builder_pin,
        "package": stack.package,
        "python": list(stack.python),
        "driver": list(stack.driver),
        "graph": graph,
        "copied": copied,
        "optimization_level": optimization_level,
        "manifest": dataclasses.asdict(manifest),
    }
    document["sha256"] = kit_build.checksum(document)
    for name in (*parent.files, manifests.FILE_NAME):
        destination = directory / _GRAPH_FOLDER / name
        destination.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(onnx_dir / name, destination)
    shutil.copyfile(kit_build.__file__, directory / "build.py")
    oldest, newest = stack.python
    words = {"pin": stack.builder_pin, "oldest": oldest, "newest": newest, "target": target.name}
    texts = {
        kit_build.KIT_FILE: json.dumps(document, indent=2, allow_nan=False) + "\n",
        "requirements.txt": "\n".join(filter(None, (shlex.join(stack.pip_options), stack.builder_pin))) + "\n",
        "build.sh": _BUILD_SH.format(**words),
        "README.txt": _README.format(
            **words,
            capability=stack.compute_capability,
            command=f"`{command}`",
            why_not=why_not,
            machine="" if stack.builds_without_gpu else f", a {target.name} and NVIDIA driver {_driver(stack)}",
            build=BUILD_COMMAND,
            engine=ENGINE_FOLDER,
            checkpoint=parent.source.checkpoint_name,
            run=shlex.join((*stack.pip_options, *stack.pins)),
        ),
    }
    for name, text in texts.items():
        (directory / name).write_text(text, encoding="utf-8", newline="\n")
    (directory / "build.sh").chmod(0o755)
    files = sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())
    return KitInfo(directory, BUILD_COMMAND, tuple(files))


def is_kit(directory: Path) -> bool:
    """True if the folder holds a kit as it was written and nothing else: its engine was not built, and nobody left files in it."""
    try:
        kit_build.read_kit(directory)
        names = {path.name for path in directory.iterdir()}
    except (kit_build.Refusal, OSError):
        return False
    return names <= {_GRAPH_FOLDER, "build.py", kit_build.KIT_FILE, "requirements.txt", "build.sh", "README.txt"}


def _driver(stack: Stack) -> str:
    oldest, newest = stack.driver
    return f"{oldest} or newer" if newest is None else f"{oldest} to {newest}"
