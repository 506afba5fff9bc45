"""The reader of PyTorch's two forms of files: what it reads, and what hostile files meet."""

from __future__ import annotations

import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train.interop.foreign_files import save
from txl_train.errors import CheckpointError
from txl_train.interop.tensors import StoredTensor
from txl_train.interop.torch_files import TORCH, open_torch


def loaded(path: Path) -> Any:
    """Return what is in a file, its tensors read."""

    def read(value: Any) -> Any:
        if isinstance(value, StoredTensor):
            return value.load()
        if isinstance(value, dict):
            return {key: read(item) for key, item in value.items()}
        return [read(item) for item in value] if isinstance(value, list) else value

    with open_torch(path, TORCH) as value:
        return read(value)


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        loaded(path)
    return str(caught.value)


def rezip(path: Path, changes: dict[str, bytes | None], *, compression: int = zipfile.ZIP_STORED) -> None:
    """Write a zip file again with other contents for some names; None leaves one out. A name without its folder is completed."""
    with zipfile.ZipFile(path) as archive:
        root = archive.namelist()[0].partition("/")[0]
        content = {name: archive.read(name) for name in archive.namelist()}
    for name, data in changes.items():
        full = name if name in content or name.startswith(("/", "..", "C:")) else f"{root}/{name}"
        if data is None:
            del content[full]
        else:
            content[full] = data
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in content.items():
            archive.writestr(name, data)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_tensors_of_every_dtype_shape_and_stride_come_out_as_torch_reads_them(tmp_path: Path, legacy: bool) -> None:
    base = torch.arange(24, dtype=torch.float32).view(4, 6)
    dtypes = (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
    tensors = OrderedDict(
        whole=base,
        transposed=base.t(),
        part=base[1:3, 2:5],
        reversed_rows=base.flip(0),
        scalar=torch.tensor(3.5),
        empty=torch.empty(0, 3),
        parameter=torch.nn.Parameter(base[0].clone()),
        **{str(dtype): base.to(dtype) for dtype in dtypes},
    )
    save({"tensors": tensors, "list": [base, (1, 2.5, "x")]}, tmp_path / "x.pt", legacy=legacy)
    found = loaded(tmp_path / "x.pt")
    for name, tensor in tensors.items():
        assert torch.equal(found["tensors"][name], tensor), name
        assert found["tensors"][name].dtype == tensor.dtype
        assert found["tensors"][name].is_contiguous()


def test_tensors_of_a_gpu_are_read_without_one(tmp_path: Path) -> None:
    for legacy in (False, True):
        save({"x": torch.ones(3)}, tmp_path / "x.pt", legacy=legacy)
        data = (tmp_path / "x.pt").read_bytes()
        if legacy:
            (tmp_path / "x.pt").write_bytes(data.replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0"))
        else:
            with zipfile.ZipFile(tmp_path / "x.pt") as archive:
                program = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
            rezip(tmp_path / "x.pt", {"data.pkl": program.replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0")})
        assert torch.equal(loaded(tmp_path / "x.pt")["x"], torch.ones(3))


def test_what_is_not_asked_for_is_not_read(tmp_path: Path) -> None:
    save({"model": torch.ones(3), "optimizer": torch.ones(5)}, tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "x.pt") as archive:
        place = archive.getinfo(next(name for name in archive.namelist() if name.endswith("data/1"))).header_offset
    data = bytearray((tmp_path / "x.pt").read_bytes())
    at = data.index(struct.pack("<5f", *[1.0] * 5), place)
    data[at] ^= 0xFF  # the optimizer's numbers are damaged
    (tmp_path / "x.pt").write_bytes(bytes(data))
    with open_torch(tmp_path / "x.pt", TORCH) as value:
        assert torch.equal(value["model"].load(), torch.ones(3))
        with pytest.raises(CheckpointError, match="cannot be read"):
            value["optimizer"].load()


def test_tied_weights_are_known_by_their_place(tmp_path: Path) -> None:
    weight = torch.ones(2, 3)
    for legacy in (False, True):
        save({"a": weight, "b": weight, "c": weight.clone(), "d": weight[0]}, tmp_path / "x.pt", legacy=legacy)
        with open_torch(tmp_path / "x.pt", TORCH) as value:
            assert value["a"].identity == value["b"].identity
            assert len({value[name].identity for name in "acd"}) == 3


# Hostile files


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_code_in_a_file_is_refused_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, legacy: bool) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.system, ("touch PWNED",)

    monkeypatch.chdir(tmp_path)
    save({"model_state": torch.ones(3), "x": Evil()}, tmp_path / "x.pt", legacy=legacy)
    assert "system`, which is no part of a Transformer-XL's checkpoint" in refusal(tmp_path / "x.pt")
    assert not (tmp_path / "PWNED").exists()


def tensor_program(
    size: tuple[Any, ...], stride: tuple[Any, ...], offset: Any, n_values: Any = 6, key: Any = "0", kind: bytes = b"FloatStorage"
) -> bytes:
    """Return the pickle of one tensor of storage `key`, written by hand."""

    def plain(value: Any) -> bytes:
        return pickle.dumps(value, 2)[2:-1].replace(b"q\x00", b"").replace(b"q\x01", b"")

    reference = b"(X\x07\x00\x00\x00storagectorch\n" + kind + b"\n" + plain(key) + plain("cpu") + plain(n_values) + b"tQ"
    return b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + reference + plain(offset) + plain(size) + plain(stride) + b"\x89NtR."


BEYOND = {
    "more rows than there are": ((3, 3), (3, 1), 0),
    "an offset beyond the end": ((1,), (1,), 6),
    "an offset that moves the end out": ((2, 3), (3, 1), 1),
    "a stride that leaps out": ((2, 2), (5, 2), 0),
    "a stride of exabytes": ((2,), (2**62,), 0),
    "one number repeated": ((1000, 1000), (0, 0), 0),
    "a negative offset": ((1,), (1,), -1),
    "a negative stride": ((2,), (-1,), 5),
    "a negative size": ((-1,), (1,), 0),
    "a size that is no number": (("x",), (1,), 0),
    "a size that is true": ((True,), (1,), 0),
    "an offset of another kind": ((1,), (1,), 1.5),
    "another rank of stride": ((2, 3), (1,), 0),
    "nine dimensions": ((1,) * 9, (1,) * 9, 0),
}


@pytest.mark.parametrize("name", BEYOND)
def test_a_tensor_that_reaches_outside_its_storage_is_refused(tmp_path: Path, name: str) -> None:
    save(torch.arange(6.0), tmp_path / "x.pt")
    size, stride, offset = BEYOND[name]
    rezip(tmp_path / "x.pt", {"data.pkl": tensor_program(size, stride, offset)})
    assert "`torch._utils._rebuild_tensor_v2`, a tensor" in refusal(tmp_path / "x.pt")


def test_a_tensor_written_by_hand_within_its_storage_is_read(tmp_path: Path) -> None:
    save(torch.arange(6.0), tmp_path / "x.pt")
    rezip(tmp_path / "x.pt", {"data.pkl": tensor_program((2, 2), (3, 1), 1)})
    assert loaded(tmp_path / "x.pt").tolist() == [[1, 2], [4, 5]]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"n_values": 10**12}, "should have 4000000000000 bytes, but has 24"),
        ({"n_values": 3}, "should have 12 bytes, but has 24"),
        ({"n_values": -6}, "refers to"),
        ({"key": "1"}, "is not there"),
        ({"key": "../data.pkl"}, "refers to"),
        ({"key": "/etc/passwd"}, "refers to"),
        ({"key": 0}, "refers to"),
        ({"kind": b"DoubleStorage"}, "should have 48 bytes, but has 24"),
        ({"kind": b"ComplexFloatStorage"}, "`torch.ComplexFloatStorage`"),
    ],
)
def test_a_storage_that_is_not_what_it_claims_is_refused(tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    save(torch.arange(6.0), tmp_path / "x.pt")
    rezip(tmp_path / "x.pt", {"data.pkl": tensor_program((6,), (1,), 0, **changes)})
    assert expected in refusal(tmp_path / "x.pt")


@pytest.mark.parametrize("name", ["/etc/evil", "../evil", "archive/../../evil", "C:evil", "a\\evil"])
def test_a_path_out_of_the_zip_file_is_refused(tmp_path: Path, name: str) -> None:
    save({"x": 1}, tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "x.pt", "a") as archive:
        archive.writestr(name, b"x")
    assert "evil' " in refusal(tmp_path / "x.pt") or "evil'." in refusal(tmp_path / "x.pt")


def test_a_zip_bomb_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    save({"x": torch.zeros(10)}, tmp_path / "x.pt")
    rezip(tmp_path / "x.pt", {"data/0": bytes(50_000_000)}, compression=zipfile.ZIP_DEFLATED)
    assert (tmp_path / "x.pt").stat().st_size < 1_000_000
    assert "is compressed" in refusal(tmp_path / "x.pt")


def test_parts_that_claim_more_bytes_than_the_file_has_are_refused(tmp_path: Path) -> None:
    save({"x": torch.zeros(10)}, tmp_path / "x.pt")
    data = (tmp_path / "x.pt").read_bytes()
    central = data.index(b"PK\x01\x02")
    for at in range(central, len(data) - 46):
        if data[at : at + 4] == b"PK\x01\x02":
            data = data[: at + 20] + struct.pack("<II", 10**9, 10**9) + data[at + 28 :]
            break
    (tmp_path / "x.pt").write_bytes(data)
    assert "its parts claim" in refusal(tmp_path / "x.pt")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_name_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    save({"x": 1}, tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "x.pt", "a") as archive:
        name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
        archive.writestr(name, pickle.dumps({"y": 2}, 2))
    assert "twice" in refusal(tmp_path / "x.pt")


def test_big_endian_numbers_are_refused(tmp_path: Path) -> None:
    save({"x": torch.zeros(2)}, tmp_path / "x.pt")
    rezip(tmp_path / "x.pt", {"byteorder": b"big"})
    assert "big-endian" in refusal(tmp_path / "x.pt")
    save({"x": torch.zeros(2)}, tmp_path / "x.pt", legacy=True)
    data = (tmp_path / "x.pt").read_bytes()
    at = data.index(b"little_endian")
    true = data.index(b"\x88", at)
    (tmp_path / "x.pt").write_bytes(data[:true] + b"\x89" + data[true + 1 :])
    assert "big-endian" in refusal(tmp_path / "x.pt")


def test_a_torchscript_program_is_named(tmp_path: Path) -> None:
    save({"x": 1}, tmp_path / "x.pt")
    rezip(tmp_path / "x.pt", {"constants.pkl": b"x"})
    assert "TorchScript" in refusal(tmp_path / "x.pt")


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_every_beginning_of_a_file_is_refused(tmp_path: Path, legacy: bool) -> None:
    save({"x": torch.arange(6.0), "y": [1, 2, 3]}, tmp_path / "x.pt", legacy=legacy)
    data = (tmp_path / "x.pt").read_bytes()
    for n_bytes in [*range(0, len(data), 11), len(data) - 1]:
        (tmp_path / "cut.pt").write_bytes(data[:n_bytes])
        refusal(tmp_path / "cut.pt")


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_changed_byte_gives_the_value_or_a_refusal_and_never_another_error(tmp_path: Path, legacy: bool) -> None:
    save({"x": torch.arange(6.0), "y": [1, "two", 3.0]}, tmp_path / "x.pt", legacy=legacy)
    data = (tmp_path / "x.pt").read_bytes()
    for at in range(0, len(data), 7):
        (tmp_path / "y.pt").write_bytes(data[:at] + bytes([data[at] ^ 0x15]) + data[at + 1 :])
        try:
            loaded(tmp_path / "y.pt")
        except CheckpointError:
            continue


def test_bytes_after_the_end_of_the_old_form_are_refused(tmp_path: Path) -> None:
    save({"x": torch.arange(6.0)}, tmp_path / "x.pt", legacy=True)
    with (tmp_path / "x.pt").open("ab") as file:
        file.write(b"more")
    assert "4 bytes follow its end" in refusal(tmp_path / "x.pt")


@pytest.mark.parametrize(
    ("start", "expected"),
    [
        (b"", "it is empty"),
        (b"\x89HDF\r\n", "HDF5"),
        (b"\0" * 257 + b"ustar", "tar archive"),
        (pickle.dumps([1]), "not one that `torch.save` wrote"),
        (b"hello", "it begins with b'hell'"),
        (b"PK\x03\x04 and nothing more", "damaged zip"),
    ],
)
def test_another_kind_of_file_is_named(tmp_path: Path, start: bytes, expected: str) -> None:
    (tmp_path / "x.pt").write_bytes(start)
    assert expected in refusal(tmp_path / "x.pt")


def test_a_zip_file_of_something_else_is_named(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("readme.txt", "hello")
    assert "`torch.save` did not write it" in refusal(tmp_path / "x.zip")
