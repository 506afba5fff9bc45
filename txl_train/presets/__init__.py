"""Named configurations: YAML files beside this one, each with its number of parameters, source and expected score."""

from __future__ import annotations

from importlib import resources


def names() -> tuple[str, ...]:
    """Return the names of all presets, sorted."""
    return tuple(sorted(entry.name.removesuffix(".yaml") for entry in resources.files(__name__).iterdir() if entry.name.endswith(".yaml")))


def read(name: str) -> str:
    """Return the text of the preset `name`, one of `names()`."""
    return resources.files(__name__).joinpath(f"{name}.yaml").read_text(encoding="utf-8")
