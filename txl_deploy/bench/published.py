"""The tables that NVIDIA published for this model, as data: `benchmarks/published/*.json`, transcribed cell by cell.

Knows the schema of those files and which table is of which GPU. They are somebody else's measurements, on other machines, by other
software: whoever shows them says so at every table, and never puts them into a table or a line of own figures.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from txl_train.errors import ArtifactError

SCHEMA = "txl.published"
SCHEMA_VERSION = 1
Choice = Literal["v100", "t4", "all"]
CHOICES: tuple[str, ...] = get_args(Choice)


@dataclass(frozen=True, kw_only=True)
class PublishedTable:
    """One table, its cells as they were printed."""

    key: str
    """Names it within this project: "inference-v100-fp16-torchscript"."""
    what: str
    """What the file it stands in is about."""
    gpu: str
    """v100 or t4."""
    device: str
    section: str
    """Heading of the section it stands in, as printed."""
    heading: str | None
    """What stands above the table itself; None if nothing does."""
    conditions: str
    """How it was measured, as far as the source says."""
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    """Cells as printed: "3,346.3", "N/A"."""
    publisher: str
    source: str
    """Title, place and date of the document."""


def number(cell: str) -> float | None:
    """Return a cell's number: 3346.3 of "3,346.3", None of "N/A"."""
    return None if cell == "N/A" else float(cell.replace(",", ""))


def published_tables(choice: str = "all") -> tuple[PublishedTable, ...]:
    """Return the tables of a GPU, `v100` or `t4`, or all of them. ArtifactError if the package's files are damaged."""
    return tuple(table for table in _tables(_folder()) if choice in ("all", table.gpu))


def _folder() -> Path:
    """Return where the files lie: within the installed package, or in `benchmarks` beside it in a checkout."""
    installed = Path(__file__).resolve().parents[1] / "published"
    return installed if installed.is_dir() else Path(__file__).resolve().parents[2] / "benchmarks" / "published"


@functools.cache
def _tables(folder: Path) -> tuple[PublishedTable, ...]:
    tables: list[PublishedTable] = []
    for path in sorted(folder.glob("*.json")):
        try:
            document = json.loads(path.read_bytes())
            if (document["schema"], document["schema_version"]) != (SCHEMA, SCHEMA_VERSION):
                raise ValueError(f"its schema is {document['schema']} {document['schema_version']}")
            tables += [_table(document, values) for values in document["tables"]]
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"The published tables {path.name} are damaged: {error!r}.", remedy="Install txl again.") from error
    if not tables:
        raise ArtifactError(f"There are no published tables in {folder}.", remedy="Install txl again.")
    return tuple(tables)


def _table(document: Mapping[str, Any], values: Mapping[str, Any]) -> PublishedTable:
    source = document["source"]
    columns = tuple(values["columns"])
    rows = tuple(tuple(row) for row in values["rows"])
    if not rows or any(len(row) != len(columns) for row in rows):
        raise ValueError(f"`{values['key']}` has rows of another width than its {len(columns)} columns")
    for cell in (cell for row in rows for cell in row):
        number(cell)
    named = {name: values[name] for name in ("key", "gpu", "device", "section", "heading", "conditions")}
    return PublishedTable(
        **named,
        what=document["what"],
        columns=columns,
        rows=rows,
        publisher=source["publisher"],
        source=f"{source['title']}, {source['repository']}, {source['published']}",
    )
