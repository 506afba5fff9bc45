"""Reads what `torch.save` wrote, in its zip form and in the form before PyTorch 1.6, without `torch.load` and without running anything.

Both hold one pickle that refers to storages, runs of numbers kept beside it. The pickle is read by `pickles`; the storages stay in the
file until a tensor is asked for, so an optimizer's state costs nothing. What is stored is compared with the file's size first.
"""

from __future__ import annotations

import contextlib
import mmap
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch

from txl_train.errors import CheckpointError
from txl_train.interop.pickles import COPY_AGAIN, NOTHING_RUN, PLAIN, Known, Names, inert, known, read_pickle, shown
from txl_train.interop.tensors import Storage, StoredTensor

LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""How a file of the old form begins: a pickle of the number 0x1950a86a20f9469cfc6c."""
LEGACY_PROTOCOL = 1001

_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


def _tensor(storage: object, offset: Any, size: object, stride: object, *_: object) -> StoredTensor:
    if not isinstance(storage, Storage) or not isinstance(size, tuple) or not isinstance(stride, tuple):
        raise CheckpointError("a tensor is made of something else than a storage, a shape and a stride")
    return StoredTensor(storage, offset, size, stride)


def _parameter(tensor: object, *_: object) -> StoredTensor:
    if not isinstance(tensor, StoredTensor):
        raise CheckpointError("a parameter is made of something else than a tensor")
    return tensor


def _size(numbers: object = ()) -> tuple[Any, ...]:
    if not isinstance(numbers, (list, tuple)):
        raise CheckpointError("a shape is made of something else than numbers")
    return tuple(numbers)


TORCH: Names = {
    **PLAIN,
    **known(
        {
            "torch._utils._rebuild_tensor": _tensor,
            "torch._utils._rebuild_tensor_v2": _tensor,
            "torch._utils._rebuild_parameter": _parameter,
            "torch.nn.parameter.Parameter": _parameter,
            "torch.Size": _size,
        }
    ),
    **inert("torch.device", "argparse.Namespace"),
    **{
        (module, name): Known(f"{module}.{name}", value=dtype)
        for name, dtype in _STORAGES.items()
        for module in ("torch", "torch.cuda", "torch.storage")
    },
    **{("torch", name): Known(f"torch.{name}") for name in ("float64", "float32", "float16", "bfloat16", "int64")},
}
"""What every file of PyTorch may name: tensors, shapes, dtypes, and the arguments of a program."""


@contextlib.contextmanager
def open_torch(path: Path, names: Names) -> Iterator[Any]:
    """Yield the value that `torch.save` wrote, tensors as `StoredTensor`, which can be read until the block ends.

    Raises:
        CheckpointError: the file is of another form, is damaged, or holds anything but tensors, plain values and `names`.
    """
    with path.open("rb") as file:
        start = file.read(512)
        if start.startswith(b"PK\x03\x04"):
            yield _read_zip(path, file, names)
        elif start.startswith(LEGACY_MAGIC):
            yield _Legacy(path, memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)), names).value
        else:
            raise CheckpointError(f"{path} is no file of PyTorch: {_resembles(start)}.", remedy=_REMEDY)


_REMEDY = "Give NVIDIA's checkpoint_best.pt, the authors' model.pt, or a folder that Hugging Face's save_pretrained wrote."


def _resembles(start: bytes) -> str:
    if not start:
        return "it is empty"
    if start.startswith(b"\x89HDF"):
        return "it is HDF5, as TensorFlow's weights are, which are not read here"
    if start[257:262] == b"ustar":
        return "it is a tar archive, as PyTorch wrote before 0.2, which is not read here"
    if start[:1] == b"\x80":
        return "it is a pickle, but not one that `torch.save` wrote"
    return f"it begins with {start[:4]!r}"


# --- the zip form


_ZIP_ERRORS = (zipfile.BadZipFile, NotImplementedError, EOFError, ValueError, OSError, struct.error)
"""What `zipfile` raises for damaged files, one way or another."""


def _read_zip(path: Path, file: BinaryIO, names: Names) -> Any:
    size = path.stat().st_size
    try:
        archive = zipfile.ZipFile(file)
    except _ZIP_ERRORS as error:
        raise CheckpointError(f"{path} is a damaged zip file ({error}).", remedy=COPY_AGAIN) from error
    entries = _checked_entries(path, archive, size)
    pickles = [name for name in entries if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1:
        raise CheckpointError(f"{path} is a zip file, but `torch.save` did not write it: it holds no data.pkl.", remedy=_REMEDY)
    root = pickles[0].removesuffix("data.pkl")
    if f"{root}constants.pkl" in entries:
        raise CheckpointError(f"{path} is a TorchScript program, not a checkpoint.", remedy=_REMEDY)

    def read(name: str) -> bytes:
        try:
            return archive.read(entries[name])
        except _ZIP_ERRORS as error:
            raise CheckpointError(f"{path} is damaged: {name} cannot be read ({error}).", remedy=COPY_AGAIN) from error

    if f"{root}byteorder" in entries and read(f"{root}byteorder") != b"little":
        raise _big_endian(path)

    def storage(reference: Any) -> Storage:
        dtype, key, n_values, _ = _storage_reference(path, reference, fields=5)
        entry = entries.get(f"{root}data/{key}")
        if entry is None or entry.file_size != n_values * dtype.itemsize:
            raise CheckpointError(
                f"{path} is damaged: storage {key} should have {n_values * dtype.itemsize} bytes, but "
                f"{'is not there' if entry is None else f'has {entry.file_size}'}.",
                remedy=COPY_AGAIN,
            )
        return Storage(key, dtype, n_values, lambda: read(f"{root}data/{key}"))

    return read_pickle(read(pickles[0]), names, what=str(path), persistent=storage)[0]


def _checked_entries(path: Path, archive: zipfile.ZipFile, size: int) -> dict[str, zipfile.ZipInfo]:
    """Return the entries by name; refuse what `torch.save` never writes: compression, doubled names, paths out of the archive."""
    entries: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        name = info.filename
        if name in entries:
            raise CheckpointError(f"{path} is refused: it holds {name!r:.100} twice. {NOTHING_RUN}")
        if name.startswith(("/", "\\")) or "\\" in name or ":" in name or ".." in name.split("/"):
            raise CheckpointError(f"{path} is refused: it holds a file with the name {name!r:.100}. {NOTHING_RUN}")
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size or info.flag_bits & 1:
            raise CheckpointError(f"{path} is refused: {name!r:.100} in it is compressed or encrypted, as PyTorch writes nothing.")
        entries[name] = info
    total = sum(info.file_size for info in entries.values())
    if total > size:
        raise CheckpointError(f"{path} is refused: its parts claim {total} bytes, but it has {size}.")
    return entries


# --- the form before PyTorch 1.6


class _Legacy:
    """Five pickles in a row (magic number, protocol, machine, value, keys), then every storage: its length and its numbers."""

    def __init__(self, path: Path, data: memoryview, names: Names) -> None:
        self.path = path
        self.data = data
        self.referred: dict[str, tuple[torch.dtype, int]] = {}
        self.places: dict[str, int] = {}
        at = len(LEGACY_MAGIC)
        protocol, at = self._pickle(at, PLAIN)
        machine, at = self._pickle(at, PLAIN)
        if protocol != LEGACY_PROTOCOL or not isinstance(machine, dict):
            raise self._damaged("its header is not understood")
        if machine.get("little_endian") is not True:
            raise _big_endian(path)
        self.value, at = read_pickle(data, names, what=str(path), start=at, persistent=self._persistent)
        keys, at = self._pickle(at, PLAIN)
        self._locate(keys, at)

    def _pickle(self, at: int, names: Names) -> tuple[Any, int]:
        return read_pickle(self.data, names, what=str(self.path), start=at)

    def _persistent(self, reference: Any) -> Any:
        if isinstance(reference, tuple) and len(reference) == 4 and reference[0] == "module" and isinstance(reference[1], Known):
            return reference[1]  # a class, with the file and the text it was defined in
        dtype, key, n_values, view = _storage_reference(self.path, reference, fields=6)
        if self.referred.setdefault(key, (dtype, n_values)) != (dtype, n_values):
            raise self._damaged(f"storage {key} is referred to in two ways")
        if view is None:
            return Storage(key, dtype, n_values, lambda: self._read(key, 0, n_values))
        if not (isinstance(view, tuple) and len(view) == 3 and all(type(n) is int and n >= 0 for n in view[1:])):
            raise self._damaged(f"storage {key} is referred to by {shown(view)}")
        _, offset, n_viewed = view
        if offset + n_viewed > n_values:
            raise self._damaged(f"a part of storage {key} lies outside it")
        return Storage(f"{key}+{offset}", dtype, n_viewed, lambda: self._read(key, offset, n_viewed))

    def _locate(self, keys: Any, at: int) -> None:
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or sorted(keys) != sorted(self.referred):
            raise self._damaged("the list of its storages does not belong to it")
        for key in keys:
            dtype, n_values = self.referred[key]
            if int.from_bytes(self.data[at : at + 8], "little") != n_values or at + 8 + n_values * dtype.itemsize > len(self.data):
                raise self._damaged(f"storage {key} is not there, or not as long as it should be")
            self.places[key] = at + 8
            at += 8 + n_values * dtype.itemsize
        if at != len(self.data):
            raise self._damaged(f"{len(self.data) - at} bytes follow its end")

    def _read(self, key: str, offset: int, n_values: int) -> bytes:
        itemsize = self.referred[key][0].itemsize
        start = self.places[key] + offset * itemsize
        return bytes(self.data[start : start + n_values * itemsize])

    def _damaged(self, reason: str) -> CheckpointError:
        return CheckpointError(f"{self.path} is damaged: {reason}.", remedy=COPY_AGAIN)


def _storage_reference(path: Path, reference: Any, *, fields: int) -> tuple[torch.dtype, str, int, Any]:
    """Return dtype, key, number of values and the view (None in the zip form) of ("storage", type, key, device, n[, view])."""
    if isinstance(reference, tuple) and len(reference) == fields and reference[0] == "storage":
        kind, key, n_values = reference[1], reference[2], reference[4]
        if (
            isinstance(kind, Known)
            and isinstance(kind.value, torch.dtype)
            and isinstance(key, str)
            and key.isascii()
            and key.isdigit()
            and type(n_values) is int
            and n_values >= 0
        ):
            return kind.value, key, n_values, reference[5] if fields == 6 else None
    raise CheckpointError(f"{path} is refused: its pickle refers to {shown(reference)}. {NOTHING_RUN}")


def _big_endian(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path} holds big-endian numbers, which are not read here.", remedy="Load and save it again on the machine that wrote it."
    )
