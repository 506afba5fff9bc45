"""Changes inputs: bytes of any format, values within JSON, members of zip files."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import random
import zipfile
from typing import Any

from tests.fuzz.harness import Target

_NUMBERS = (0, 1, -1, 127, 128, 255, 256, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, -(2**63), 2**64 - 1)
_VALUES: tuple[Any, ...] = (
    *(None, True, False, "", "x" * 70, "\ud800", "../../../x", "/etc/passwd", "nan", "C:\\x", "a\x00b", [], {}, [[]], [{}], {"": None}),
    *(0, 1, -1, 2**31, 2**63, 2**64, -(2**70), 10**400, 1.5, -0.0, 1e308, float("nan"), float("inf"), float("-inf")),
)
MOST_PLACES = 20_000
"""Values of a document that one change may add: a hundred times a hundred times a part takes minutes to make."""


def change(target: Target, data: bytes, seeds: tuple[bytes, ...], chance: random.Random) -> bytes:
    """Return another input made of `data`."""
    if chance.random() < 0.7:
        with contextlib.suppress(Exception):  # what is damaged already is changed as bytes
            if target.kind == "json":
                return _json(data, chance)
            if target.kind == "zip":
                return _zip(data, target, seeds, chance)
    return changed_bytes(data, target.tokens, seeds, chance)


def changed_bytes(data: bytes, tokens: tuple[bytes, ...], seeds: tuple[bytes, ...], chance: random.Random) -> bytes:
    """Return `data` after a few changes that know nothing of its format but its tokens."""
    made = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 3, 8))):
        at = chance.randrange(len(made) + 1)
        if chance.random() < 0.3:  # beginnings and ends are where formats have their lengths
            at = min(len(made), chance.randrange(64)) if chance.random() < 0.5 else max(0, len(made) - chance.randrange(1, 128))
        span = min(chance.choice((1, 1, 2, 4, 8, 32, 256)), len(made) - at)
        kind = chance.randrange(9)
        if kind == 0 and span:
            made[at] ^= 1 << chance.randrange(8)
        elif kind == 1:
            made[at : at + span] = chance.randbytes(span)
        elif kind == 2:
            del made[at : at + span]
        elif kind == 3:
            made[at:at] = made[at : at + span] * chance.choice((1, 2, 50))
        elif kind == 4:
            size = chance.choice((1, 2, 4, 8))
            made[at : at + size] = (chance.choice(_NUMBERS) % (1 << 8 * size)).to_bytes(size, chance.choice(("little", "big")))
        elif kind == 5 and tokens:
            token = chance.choice(tokens)
            made[at : at + chance.choice((0, len(token)))] = token
        elif kind == 6:
            del made[at:]
        elif kind == 7:
            other = chance.choice(seeds)
            start = chance.randrange(len(other) + 1)
            made[at : at + span] = other[start : start + chance.choice((1, 4, 16, 64, 1024))]
        else:
            made[at : at + span] = bytes([chance.choice((0, 32, 48, 57, 91, 123, 127, 128, 255))]) * span
    return bytes(made)


def _json(data: bytes, chance: random.Random) -> bytes:
    document = json.loads(data)
    for _ in range(chance.choice((1, 1, 2, 4))):
        places = list(_places(document))
        holder, key = chance.choice(places) if places else (None, None)
        if holder is None:
            return json.dumps(chance.choice(_VALUES)).encode("utf-8", "surrogatepass")
        kind = chance.randrange(6)
        shown = sum(other is holder for other, _ in places) / len(holder)  # lists that were repeated are one list in many places
        most = MOST_PLACES / shown
        if kind == 0:
            del holder[key]
        elif kind == 1 and isinstance(holder, dict):
            holder[chance.choice(("", "x", "__class__", f"{key}2", "\ud800"))] = holder[key]
        elif kind == 2:
            times = chance.choice((0, 1, 3, 100))
            holder[key] = [holder[key]] * (times if times * _size(holder[key]) <= most else 1)
        elif kind == 3:
            for _ in range(min(chance.choice((1, 30, 300, 900, 2000)), int(most))):
                holder[key] = [holder[key]]
        elif kind == 4:
            other, name = chance.choice(places)
            fits = other is not holder and not _contains(other[name], holder) and _size(other[name]) <= most
            holder[key] = other[name] if fits else None
        else:
            holder[key] = copy.deepcopy(chance.choice(_VALUES))  # which later changes would change for all inputs to come
    return json.dumps(document, ensure_ascii=chance.random() < 0.8).encode("utf-8", "surrogatepass")


def _places(value: Any) -> Any:
    """Yield every (holder, key) of a document, depth first, without recursion."""
    waiting = [value]
    while waiting:
        holder = waiting.pop()
        items = list(holder.items()) if isinstance(holder, dict) else list(enumerate(holder)) if isinstance(holder, list) else []
        for key, item in items:
            yield holder, key
            if isinstance(item, (dict, list)):
                waiting.append(item)


def _size(value: Any) -> int:
    return 1 + sum(1 for _ in _places(value))


def _contains(value: Any, holder: Any) -> bool:
    return value is holder or any(inner is holder for inner, _ in _places(value))


def _zip(data: bytes, target: Target, seeds: tuple[bytes, ...], chance: random.Random) -> bytes:
    """Change members, names, sizes, or what the directory says of them."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [(info.filename, archive.read(info)) for info in archive.infolist()]
        comment = archive.comment
    compression = zipfile.ZIP_STORED
    for _ in range(chance.choice((1, 1, 2))):
        at = chance.randrange(len(members))
        name, content = members[at]
        kind = chance.randrange(8)
        if kind == 0:
            del members[at]
            if not members:
                return b""
        elif kind == 1:
            members[at] = (chance.choice((f"../{name}", f"/{name}", f"{name}/", "", name.upper(), f"{name}\\..\\x", "x" * 300)), content)
        elif kind == 2:
            members.append((name, content))
        elif kind == 3:
            compression = chance.choice((zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
        elif kind == 4:
            members[at] = (name, content * chance.choice((0, 2, 100)))
        else:
            small = [i for i, member in enumerate(members) if member[0].endswith(".pkl")] or [at]
            at = chance.choice(small)
            members[at] = (members[at][0], changed_bytes(members[at][1], target.tokens, seeds, chance))
    made = io.BytesIO()
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of doubled names
        with zipfile.ZipFile(made, "w", compression) as archive:
            for name, content in members:
                info = zipfile.ZipInfo(name or "x")
                info.compress_type = compression
                if chance.random() < 0.05:
                    info.external_attr = 0o120777 << 16  # a symbolic link
                archive.writestr(info, content)
            archive.comment = comment
    return made.getvalue()
