"""Damages a file at each class of offset: its beginning, header, middle and end, by a bit, by cutting and by adding."""

from __future__ import annotations

from collections.abc import Callable

_HEADER_BYTES = 16


def _flipped(at: Callable[[int], int]) -> Callable[[bytes], bytes]:
    def flip(data: bytes) -> bytes:
        place = at(len(data))
        return data[:place] + bytes([data[place] ^ 0x10]) + data[place + 1 :]

    return flip


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "first byte": _flipped(lambda size: 0),
    "header": _flipped(lambda size: min(_HEADER_BYTES, size - 1)),
    "first quarter": _flipped(lambda size: size // 4),
    "middle": _flipped(lambda size: size // 2),
    "last quarter": _flipped(lambda size: 3 * size // 4),
    "last but one byte": _flipped(lambda size: max(0, size - 2)),
    "last byte": _flipped(lambda size: size - 1),
    "zeros in the middle": lambda data: data[: len(data) // 2] + bytes(min(512, len(data) - len(data) // 2)) + data[len(data) // 2 + 512 :],
    "without its first byte": lambda data: data[1:],
    "without its last byte": lambda data: data[:-1],
    "half": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "a byte more": lambda data: data + b"\0",
    "a sector more": lambda data: data + bytes(512),
    "twice": lambda data: data + data,
}
"""By name: makes other bytes of a file's."""
