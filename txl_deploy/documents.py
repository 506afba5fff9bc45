"""JSON documents that know their own checksum and are read strictly into dataclasses: manifests and receipts.

Knows how plain values become dataclasses and back, and when a file is not as it was written. What a document means is known to whoever
defines its class.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from txl_train.errors import ArtifactError, nearest


def to_text(instance: Any) -> str:
    """Return a dataclass as JSON with the checksum of its content. ValueError for a number that is not finite."""
    document = dataclasses.asdict(instance)
    document["sha256"] = content_sha256(document)
    return json.dumps(document, indent=2, allow_nan=False) + "\n"


def parse(text: str, path: Path, error: type[ArtifactError], remedy: str) -> dict[str, Any]:
    """Return the object in `text`, which was read from `path`, without its checksum.

    Raises `error`, with `remedy`, if it is no JSON object, or a byte of its content was changed.
    """
    try:
        document = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_no_constant, parse_float=finite)
        _check_depth(document)
        _check_texts(document)
    except (ValueError, RecursionError) as cause:
        raise error(f"{path} is not valid JSON: {cause}.", remedy=remedy) from cause
    if not isinstance(document, dict):
        raise error(f"{path} holds no object but a {type(document).__name__}.", remedy=remedy)
    return document


def check_content(document: dict[str, Any], path: Path, error: type[ArtifactError], remedy: str) -> None:
    """Take the checksum out of `document`, and raise `error` if the rest is not what it was made of."""
    if document.pop("sha256", None) != content_sha256(document):
        raise error(f"{path} was changed after it was written: its own checksum does not match.", remedy=remedy)


def content_sha256(document: Mapping[str, Any]) -> str:
    """Return the sha256 of a document's content, whatever its line breaks and the order of its keys."""
    canonical = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


_DEEPEST = 50
"""Objects and lists within each other; none of ours has ten."""


def _check_depth(document: Any) -> None:
    """Raise ValueError for values so deep within each other that copying or writing them would end in Python's limit."""
    level = [document]
    for _ in range(_DEEPEST):
        parts = [value for value in level if isinstance(value, (dict, list))]
        level = [item for part in parts for item in (part.values() if isinstance(part, dict) else part)]
        if not level:
            return
    raise ValueError(f"values are more than {_DEEPEST} deep within each other")


def _check_texts(document: Any) -> None:
    """Raise ValueError for half of a pair of surrogates: JSON can write it, and no file can have it for a name.

    U+DC80 to U+DCFF stay: as them Python holds the bytes of a path that are not UTF-8 (PEP 383).
    """
    try:
        json.dumps(document, ensure_ascii=False).encode(errors="surrogateescape")
    except UnicodeEncodeError as cause:
        raise ValueError(f"{cause.object[cause.start]!a} is no character, but half of one") from cause


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        raise ValueError("a key stands in it twice")
    return document


def finite(number: str) -> float:
    """Return a number of JSON. ValueError if it is too large for a float, which could not be written back."""
    value = float(number)
    if math.isinf(value):
        raise ValueError(f"{number[:40]} is too large for a number")
    return value


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def from_plain(expected: Any, value: Any, where: str = "", error: type[ArtifactError] = ArtifactError) -> Any:
    """Return `value` as `expected`, a type built of dataclasses, dicts, lists, literals and plain types; `error` where it is not."""
    if dataclasses.is_dataclass(expected) and isinstance(expected, type):
        return _dataclass_from_plain(expected, value, where, error)
    origin, arguments = get_origin(expected), get_args(expected)
    if origin is Literal:
        if value not in arguments:
            raise error(f"`{where}` must be one of {', '.join(arguments)}, but is {value!r} instead.{nearest(str(value), arguments)}")
        return value
    if origin is dict and isinstance(value, dict):
        return {key: from_plain(arguments[1], item, f"{where}.{key}", error) for key, item in value.items()}
    if origin is list and isinstance(value, list):
        return [from_plain(arguments[0], item, f"{where}[{i}]", error) for i, item in enumerate(value)]
    one_of = next((kind for kind in arguments if dataclasses.is_dataclass(kind)), None)
    if one_of is not None and origin not in (dict, list):  # a dataclass or None
        return None if value is None else from_plain(one_of, value, where, error)
    compound = next((kind for kind in arguments if origin is UnionType and get_origin(kind) is not None), None)
    if compound is not None and value is not None:  # a dict, a list or a literal, or None
        return from_plain(compound, value, where, error)
    # without the second condition Python 3.10 takes `list[int]` for a type
    kinds = tuple(kind for kind in (arguments or (expected,)) if isinstance(kind, type) and get_origin(kind) is None)
    if expected is Any or (origin not in (dict, list) and isinstance(value, kinds) and (not isinstance(value, bool) or bool in kinds)):
        return value
    name = getattr(expected, "__name__", str(expected)) if not arguments or origin in (dict, list) else str(expected)
    raise error(f"`{where}` must be of type {name}, but is {value!r} instead.")


def _dataclass_from_plain(expected: type, value: Any, where: str, error: type[ArtifactError]) -> Any:
    if not isinstance(value, dict):
        raise error(f"`{where}` must hold several values by name, but is {value!r} instead.")
    fields = {f.name: f for f in dataclasses.fields(expected)}
    prefix = f"{where}." if where else ""
    for key in value:
        if key not in fields:
            raise error(f"`{prefix}{key}` is unknown to this version of txl.{nearest(key, fields)}")
    for name in fields:
        if name not in value:
            raise error(f"`{prefix}{name}` is missing.")
    types = _type_hints(expected)
    return expected(**{name: from_plain(types[name], value[name], prefix + name, error) for name in fields})


@functools.cache
def _type_hints(expected: type) -> dict[str, Any]:
    return get_type_hints(expected)
