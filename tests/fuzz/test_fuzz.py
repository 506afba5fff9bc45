"""A short run over every reader, and what long runs found, which stays mended. `benchmarks/fuzz.py` runs for longer, guided by coverage."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import socket
import zipfile
from pathlib import Path

import pytest

from tests.fuzz.harness import LARGEST_BYTES, Fault, Target, fresh, inputs, limited_memory, run
from tests.fuzz.targets import TARGETS, checkpoint_mended, entry_mended
from txl_train.data import idcache

N_INPUTS = int(os.environ.get("TXL_FUZZ_INPUTS", "100"))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TXL_CACHE_DIR", str(tmp_path / "input" / "cache"))
    return tmp_path / "input"


@pytest.mark.parametrize("name", TARGETS)
def test_a_damaged_file_is_read_or_refused_and_does_nothing_else(name: str, folder: Path) -> None:
    target = TARGETS[name]
    seeds = fresh(target, folder)
    assert (run(target, folder, seeds[0]) == "read") == target.opens
    outcomes = set()
    with limited_memory(LARGEST_BYTES):
        for number, data in enumerate(inputs(target, seeds, N_INPUTS // target.cost, seed=1)):
            try:
                outcomes.add(run(target, folder, data))
            except Fault as fault:
                kept = folder.parent / f"{name}-{number}"
                kept.write_bytes(data)
                pytest.fail(f"{fault} (the input is {kept})")
    assert outcomes - {"read"} or not target.refuses, "nothing was refused: the changes do not reach the reader"


# --- the harness itself must see what it is there for


def target_that(read: object) -> Target:
    return Target("t", "f", lambda folder: None, read)  # type: ignore[arg-type]


def connect(folder: Path) -> None:
    with socket.socket() as client:
        client.connect(("127.0.0.1", 9))


@pytest.mark.parametrize(
    ("read", "found"),
    [
        (lambda folder: os.system("true"), "os.system"),
        (lambda folder: (folder.parent / "elsewhere").write_text("x"), "open outside its folder"),
        (lambda folder: os.remove(folder.parent / "nothing"), "os.remove outside"),
        (lambda folder: [][1], "IndexError"),
        (lambda folder: bytearray(8 << 30), "MemoryError"),
        (connect, "socket.connect"),
    ],
)
def test_whatever_a_reader_must_not_do_is_a_fault(read: object, found: str, tmp_path: Path) -> None:
    with pytest.raises(Fault, match=found), limited_memory(LARGEST_BYTES):
        run(target_that(read), tmp_path, b"")


def test_a_fault_that_the_reader_hides_is_found_all_the_same(tmp_path: Path) -> None:
    def read(folder: Path) -> None:
        with contextlib.suppress(BaseException):
            os.system("true")

    with pytest.raises(Fault, match=r"os\.system"):
        run(target_that(read), tmp_path, b"")


@pytest.mark.parametrize("name", ["vocabulary", "report", "archive-zip"])
def test_the_same_seed_gives_the_same_inputs(name: str, folder: Path) -> None:
    target = TARGETS[name]
    seeds = fresh(target, folder)
    first = list(inputs(target, seeds, 300, seed=3))
    assert first == list(inputs(target, seeds, 300, seed=3))  # whatever was made before
    assert first != list(inputs(target, seeds, 300, seed=4))


# --- pickles that would do something


class _Calls:
    def __init__(self, function: object, *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return self.call


def _gadgets() -> dict[str, bytes]:
    def raw(module: str, name: str, argument: str, opcode: bytes = b"R") -> bytes:
        if opcode == b"i":
            return f"(S'{argument}'\ni{module}\n{name}\n.".encode()
        if opcode == b"o":
            return f"(c{module}\n{name}\nS'{argument}'\no.".encode()
        if opcode == b"\x93":
            return (
                b"\x80\x04"
                + b"".join(bytes([0x8C, len(t)]) + t.encode() for t in (module, name))
                + b"\x93"
                + bytes([0x8C, len(argument)])
                + argument.encode()
                + b"\x85R."
            )
        return f"c{module}\n{name}\n(S'{argument}'\ntR.".encode()

    import builtins
    import subprocess

    made = {
        f"{module}.{name} by {opcode!r}": raw(module, name, "touch pwned", opcode)
        for module, name in (
            *(
                ("os", "system"),
                ("posix", "system"),
                ("nt", "system"),
                ("subprocess", "call"),
                ("subprocess", "check_output"),
                ("pty", "spawn"),
            ),
            *(
                ("builtins", "eval"),
                ("builtins", "exec"),
                ("__builtin__", "eval"),
                ("builtins", "__import__"),
                ("builtins", "open"),
                ("runpy", "run_path"),
            ),
            *(
                ("importlib", "import_module"),
                ("code", "interact"),
                ("timeit", "timeit"),
                ("pickle", "loads"),
                ("_pickle", "loads"),
                ("marshal", "loads"),
            ),
            *(("torch", "load"), ("torch.hub", "load"), ("torch.jit", "load"), ("torch", "classes"), ("torch.storage", "_load_from_bytes")),
            *(
                ("torch.serialization", "load"),
                ("torch._utils", "eval"),
                ("torch.utils.cpp_extension", "load"),
                ("torch.ops", "load_library"),
            ),
            *(
                ("numpy", "load"),
                ("numpy.testing._private.utils", "runstring"),
                ("functools", "partial"),
                ("operator", "methodcaller"),
                ("shutil", "rmtree"),
            ),
            *(
                ("webbrowser", "open"),
                ("ctypes", "CDLL"),
                ("cProfile", "run"),
                ("bdb", "Bdb"),
                ("asyncio", "create_subprocess_shell"),
                ("pip", "main"),
            ),
            *(("collections", "OrderedDict.__reduce__"), ("torch.nn.modules.module", "Module.__setattr__"), ("os.path", "os.system")),
        )
        for opcode in (b"R", b"i", b"o", b"\x93")
    }
    for function, arguments in ((builtins.exec, ("open('pwned','w')",)), (subprocess.Popen, (["touch", "pwned"],)), (os.remove, ("x",))):
        for protocol in (0, 2, 4, 5):
            made[f"{function!r} in protocol {protocol}"] = pickle.dumps({"state_dict": _Calls(function, *arguments)}, protocol)
    return made


GADGETS = _gadgets()


@pytest.mark.parametrize(
    "name", ["checkpoint", "import-nvidia", "import-nvidia-legacy", "import-authors", "import-hf-bin", "import-hf-vocab"]
)
def test_no_pickle_of_a_stranger_is_executed(name: str, folder: Path) -> None:
    target = TARGETS[name]
    (valid,) = fresh(target, folder)
    for what, gadget in GADGETS.items():
        if target.kind == "zip":
            made = io.BytesIO()
            with zipfile.ZipFile(io.BytesIO(valid)) as before, zipfile.ZipFile(made, "w") as after:
                for info in before.infolist():
                    after.writestr(info, gadget if info.filename.endswith("data.pkl") else before.read(info))
                after.comment = before.comment
            data = target.mend(made.getvalue()) if target.mend else made.getvalue()
        else:
            marked = gadget if gadget.startswith(b"\x80") else b"\x80\x02" + gadget  # else it would be read as a list of words
            data = valid[: valid.index(b"\x80\x02", 20)] + gadget if name.endswith("legacy") else marked
        assert run(target, folder, data) == "CheckpointError", what
    assert not Path("pwned").exists()


# --- found by long runs


def test_a_checkpoint_whose_pickle_breaks_an_assertion_of_pytorch_is_damaged(folder: Path) -> None:
    target = TARGETS["checkpoint"]
    (valid,) = fresh(target, folder)
    for pickled in (b"\x80\x02K\x01Q.", b"\x80\x02a.", b"\x80\x02h\x05.", b"."):
        made = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(valid)) as before, zipfile.ZipFile(made, "w") as after:
            for info in before.infolist():
                after.writestr(info, pickled if info.filename.endswith("data.pkl") else before.read(info))
            after.comment = before.comment
        assert run(target, folder, checkpoint_mended(made.getvalue())) == "CheckpointError"


@pytest.mark.parametrize("header", [b"\xff\xfe", b"[1, 2]", b'{"dtype": "<u2"}', b'{"dtype": "<u2", "n_tokens": -1}', b"{", b"1 2"])
def test_a_cache_entry_with_a_header_of_something_else_is_made_anew(header: bytes, folder: Path) -> None:
    target = TARGETS["id-cache"]
    (valid,) = fresh(target, folder)
    body = header.ljust(idcache.HEADER_BYTES - 8)
    assert run(target, folder, entry_mended(valid[:8] + body + valid[idcache.HEADER_BYTES :])) == "read"
    assert idcache.open_entry(folder / "ids.bin", idcache.IdCacheKey("a" * 64, "words", "b" * 64)) is None
