"""The reader of safetensors and its bounds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train.interop.foreign_files import write_safetensors
from txl_train.errors import CheckpointError
from txl_train.interop.safetensors import read_safetensors


def write(path: Path, header: Any, data: bytes = b"", *, length: int | None = None) -> Path:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(encoded) if length is None else length).to_bytes(8, "little") + encoded + data)
    return path


def test_tensors_come_out_as_they_were_written(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(1.5), "c": torch.ones(4)}
    write_safetensors(tmp_path / "x.safetensors", tensors)
    found = read_safetensors(tmp_path / "x.safetensors")
    assert {name: tensor.load().tolist() for name, tensor in found.items()} == {name: tensor.tolist() for name, tensor in tensors.items()}


def test_half_precision_is_read(tmp_path: Path) -> None:
    for name, dtype in (("F16", torch.float16), ("BF16", torch.bfloat16)):
        expected = torch.tensor([0.5, -3.0], dtype=dtype)
        data = bytes(expected.view(torch.uint8).tolist())
        path = write(tmp_path / "x", {"a": {"dtype": name, "shape": [2], "data_offsets": [0, 4]}}, data)
        assert torch.equal(read_safetensors(path)["a"].load(), expected)


def entry(**changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}


REFUSED: dict[str, tuple[Any, bytes, str]] = {
    "no JSON": (b"{", b"", "no JSON"),
    "a header that is a list": ([], b"", "no table"),
    "an entry that is a number": ({"a": 1}, b"", "`a` is not understood"),
    "an unknown dtype": ({"a": entry(dtype="F8")}, bytes(8), "'F8'"),
    "a shape longer than its data": ({"a": entry(shape=[3])}, bytes(8), "not as long as its shape"),
    "a shape that overflows": ({"a": entry(shape=[2**40, 2**40])}, bytes(8), "not as long as its shape"),
    "a negative size": ({"a": entry(shape=[-2])}, bytes(8), "impossible numbers"),
    "a size that is no number": ({"a": entry(shape=["2"])}, bytes(8), "impossible numbers"),
    "an end before its beginning": ({"a": entry(data_offsets=[8, 0])}, bytes(8), "impossible numbers"),
    "data beyond the file": ({"a": entry(shape=[4], data_offsets=[0, 16])}, bytes(8), "its tensors end at byte"),
    "a gap": ({"a": entry(), "b": entry(data_offsets=[12, 20])}, bytes(20), "does not lie where the one before it ends"),
    "an overlap": ({"a": entry(), "b": entry(data_offsets=[4, 12])}, bytes(12), "does not lie where the one before it ends"),
    "bytes that belong to nobody": ({"a": entry()}, bytes(12), "its tensors end at byte"),
    "a name twice": (b'{"a": {"dtype": "F32"}, "a": {}}', b"", "twice"),
    "three offsets": ({"a": entry(data_offsets=[0, 4, 8])}, bytes(8), "`a` is not understood"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_header_that_does_not_fit_its_file_is_refused(tmp_path: Path, name: str) -> None:
    header, data, expected = REFUSED[name]
    with pytest.raises(CheckpointError) as caught:
        read_safetensors(write(tmp_path / "x", header, data))
    assert expected in caught.value.message


@pytest.mark.parametrize("length", [2**62, 100, 0])
def test_a_header_length_that_cannot_be_is_refused(tmp_path: Path, length: int) -> None:
    with pytest.raises(CheckpointError):
        read_safetensors(write(tmp_path / "x", {"a": entry()}, bytes(8), length=length))


def test_a_file_of_a_few_bytes_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    with pytest.raises(CheckpointError, match="does not fit"):
        read_safetensors(tmp_path / "x")
