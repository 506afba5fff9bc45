"""Writing a result so that it is there whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from txl_train.data.datasets import whole_or_absent


def write_json(path: Path, document: Any) -> None:
    """Write `document` as JSON, making the folder where needed. Raises `EnvironmentUnfitError` if it cannot be written."""
    with whole_or_absent(path) as file:
        file.write((json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())
