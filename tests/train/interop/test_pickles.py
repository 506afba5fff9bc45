"""The reader of pickles: harmless ones come out as they were, hostile ones are refused by name and not run."""

from __future__ import annotations

import functools
import io
import operator
import os
import pickle
import pickletools
import random
import struct
import time
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from txl_train.errors import CheckpointError
from txl_train.interop import pickles
from txl_train.interop.pickles import PLAIN, Inert, inert, read_pickle, shown
from txl_train.interop.torch_files import TORCH


def read(data: bytes, names: Any = PLAIN) -> Any:
    return read_pickle(data, names, what="the file")[0]


def refusal(data: bytes, names: Any = PLAIN) -> str:
    with pytest.raises(CheckpointError) as caught:
        read(data, names)
    return caught.value.message


# Harmless pickles


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize(
    "value",
    [
        None,
        [True, False, None],
        [0, 1, 255, 256, 65535, 65536, -1, -(2**31), 2**31, 2**63, -(2**200)],
        [0.0, -1.5, 1e300, float("inf")],
        ["", "a", "é€🙂", "x" * 300, "\ud800"],
        (1, (2, (3, ()))),
        {"a": [1, {"b": (1, 2, 3, 4)}], 2: None, None: 2, True: 3, ("x", "y"): 4},
        OrderedDict([("b", 1), ("a", 2)]),
        Counter("abracadabra"),
        [[i] * 2 for i in range(3000)],
    ],
    ids=range(10),
)
def test_plain_values_come_out_as_python_reads_them(value: Any, protocol: int) -> None:
    assert read(pickle.dumps(value, protocol)) == value


@pytest.mark.parametrize("protocol", [2, 4])
def test_sets_come_out_as_lists_and_bytes_as_bytes(protocol: int) -> None:
    assert sorted(read(pickle.dumps({"x", "y"}, protocol))) == ["x", "y"]
    assert read(pickle.dumps(frozenset([3]), protocol)) == [3]
    assert read(pickle.dumps([b"", b"\x00\xff" * 200], protocol)) == [b"", b"\x00\xff" * 200]


def test_what_is_shared_stays_shared_and_cycles_are_read() -> None:
    shared = [1]
    first, second = read(pickle.dumps([shared, shared], 2))
    assert first is second
    cycle: list[Any] = []
    cycle.append(cycle)
    found = read(pickle.dumps(cycle, 2))
    assert found[0] is found


def test_where_a_pickle_ends_is_told_so_that_the_next_can_be_read() -> None:
    first, second = pickle.dumps("one", 2), pickle.dumps("two", 4)
    value, end = read_pickle(first + second, PLAIN, what="f")
    assert (value, end) == ("one", len(first))
    assert read_pickle(first + second, PLAIN, what="f", start=end)[0] == "two"


def test_an_object_of_a_known_class_becomes_inert() -> None:
    data = b"\x80\x02ccollections\nOrderedDict\n)Rcmodule\nThing\n)\x81}X\x01\x00\x00\x00aK\x01sb\x86."
    _, thing = read(data, {**PLAIN, **inert("module.Thing")})
    assert isinstance(thing, Inert)
    assert (thing.kind, thing.class_name, thing.attributes) == ("module.Thing", "Thing", {"a": 1})


# Pickles that would run something

ran: list[str] = []


def boom(*_: object) -> str:
    ran.append("boom")
    return "boom"


class Gadget:
    """Pickles as a call."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return self.call


GADGETS: dict[str, tuple[Any, str]] = {
    "os.system": (Gadget(os.system, ("touch PWNED",)), "system"),
    "eval": (Gadget(eval, ("open('PWNED','w')",)), "eval"),
    "exec": (Gadget(exec, ("open('PWNED','w')",)), "exec"),
    "open": (Gadget(open, ("PWNED", "w")), "open"),
    "getattr": (Gadget(getattr, ("x", "upper")), "getattr"),
    "import": (Gadget(__import__, ("antigravity",)), "__import__"),
    "a partial": (Gadget(functools.partial, (boom, 1)), "partial"),
    "a reduce of functools": (Gadget(functools.reduce, (boom, [1, 2])), "reduce"),
    "operator.attrgetter": (Gadget(operator.attrgetter, ("__class__.__base__",)), "attrgetter"),
    "operator.methodcaller": (Gadget(operator.methodcaller, ("system", "touch PWNED")), "methodcaller"),
    "a function of this file": (Gadget(boom, (1,)), "boom"),
    "map": (Gadget(map, (boom, [1])), "map"),
    "type": (Gadget(type, ("X", (), {})), "type"),
    "a NumPy array": (np.arange(3), "_reconstruct"),
    "a NumPy number": (np.float64(1.0), "scalar"),
    "torch.load again": (Gadget(torch.load, ("PWNED",)), "load"),
    "a generator of random numbers": (random.Random(1), "Random"),
    "a path": (Path("x"), "Path"),
    "a default factory": (defaultdict(boom, {1: 2}), "boom"),
    "a class of ours": (CheckpointError("x"), "CheckpointError"),
    "bytes to be decoded": (Gadget(io.BytesIO, (b"x",)), "BytesIO"),
}


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("name", GADGETS)
def test_a_call_of_anything_unknown_is_refused_by_name_and_not_made(
    name: str, protocol: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    value, named = GADGETS[name]
    message = refusal(pickle.dumps({"model_state": {}, "x": value}, protocol), TORCH)
    assert "it asks for `" in message
    assert named in message
    assert "none of its code was run" in message
    assert not (tmp_path / "PWNED").exists()
    assert ran == []


WRITTEN: dict[str, tuple[bytes, str]] = {
    "a name from parts on the stack": (b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x02id\x85R.", "`os.system`"),
    "a name with dots in it": (b"\x80\x04\x8c\x0bcollections\x8c\x14OrderedDict.fromkeys\x93.", "`collections.OrderedDict.fromkeys`"),
    "a name that is no text": (b"\x80\x04K\x01K\x02\x93.", "`something without a name`"),
    "a name with a line break hidden in it": (b"\x80\x02cbuiltins \neval\n.", "`builtins .eval`"),
    "a name that commands the terminal": (b"\x80\x04\x8c\x05\x1b[2J\n\x8c\x01x\x93.", "`\\x1b[2J\\n.x`"),
    "a name from the memo": (b"\x80\x04\x8c\x02os\x940\x8c\x06system\x94h\x00h\x01\x93.", "`os.system`"),
    "a call of a plain value": (b"\x80\x02K\x01)R.", "calls a int"),
    "a call of a storage's type": (b"\x80\x02ctorch\nFloatStorage\n)R.", "calls `torch.FloatStorage`"),
    "arguments that are no tuple": (b"\x80\x02ccollections\nOrderedDict\n]R.", "calls `collections.OrderedDict`"),
    "arguments that do not belong": (b"\x80\x02ctorch.Size\n\n.", "torch.Size"),
    "too many arguments": (b"\x80\x02ctorch\nSize\n(K\x01K\x02K\x03tR.", "arguments that do not belong"),
    "state of a plain value": (b"\x80\x02]}b.", "the state of a list"),
    "state of a name": (b"\x80\x02ccollections\nOrderedDict\n}b.", "the state of `collections.OrderedDict`"),
    "items of a list": (b"\x80\x02]K\x01K\x02s.", "sets items of a list"),
    "appending to a dict": (b"\x80\x02}K\x01a.", "appends to a dict"),
    "appending to a name": (b"\x80\x02ccollections\nOrderedDict\nK\x01a.", "appends to `collections.OrderedDict`"),
    "a key that is a list": (b"\x80\x02}]K\x01s.", "a key of a dict is of the kind list"),
    "a key that is a tuple of tuples": (b"\x80\x02}))\x86)\x86K\x01s.", "a key of a dict is of the kind tuple"),
    "a key whose hash was chosen": (b"\x80\x02}\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x1fK\x01s.", "a key of a dict is of the kind int"),
    "named arguments": (b"\x80\x04ccollections\nOrderedDict\n)}K\x01K\x02s\x92.", "named arguments"),
    "a reference outside itself": (b"\x80\x02K\x01Q.", "refers to something outside"),
    "a registered extension": (b"\x80\x02\x82\x01.", "EXT1"),
    "an instance the old way": (b"\x80\x02(ios\nsystem\n.", "INST"),
    "an object the old way": (b"\x80\x02(cos\nsystem\no.", "`os.system`"),
    "the object instruction": (b"\x80\x02(K\x01o.", "OBJ"),
    "a text as protocol 0 writes it": (b"\x80\x02S'a'\n.", "STRING"),
    "a number as protocol 0 writes it": (b"\x80\x02I1\n.", "INT"),
    "a buffer from elsewhere": (b"\x80\x05\x97.", "NEXT_BUFFER"),
    "no instruction": (b"\x80\x02\x00.", "no instruction"),
    "protocol 0": (b"\x80\x00.", "protocol 0"),
    "a protocol yet to come": (b"\x80\x09.", "protocol 9"),
    "an integer of a megabyte": (b"\x80\x02\x8b" + struct.pack("<I", 1 << 20) + b"\x01" * (1 << 20) + b".", "an integer of 1048576 bytes"),
    "a thousand containers in each other": (b"\x80\x02" + b"(" * 1001 + b".", "more than 1000 deep"),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_an_instruction_that_checkpoints_do_not_need_is_refused_by_name(name: str) -> None:
    data, expected = WRITTEN[name]
    assert expected in refusal(data, TORCH)


DAMAGED: dict[str, bytes] = {
    "nothing": b"",
    "no end": b"\x80\x02]",
    "an empty stack": b"\x80\x02.",
    "a stack that is popped empty": b"\x80\x02K\x01aa.",
    "no mark": b"\x80\x02K\x01t.",
    "a memo that nobody filled": b"\x80\x02h\x05.",
    "a text longer than the file": b"\x80\x02X\xff\xff\xff\x7fabc.",
    "a text of exabytes": b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7fabc.",
    "bytes longer than the file": b"\x80\x03B\xff\xff\xff\x7fabc.",
    "a frame longer than the file": b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f.",
    "a text that is no UTF-8": b"\x80\x02X\x02\x00\x00\x00\xff\xfe.",
    "a name without end": b"\x80\x02cos",
    "a key without value": b"\x80\x02}(K\x01u.",
    "a tuple of what is not there": b"\x80\x02K\x01\x87.",
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_pickle_is_said_to_be_damaged(name: str) -> None:
    assert "the file is damaged" in refusal(DAMAGED[name])


def test_every_beginning_of_a_pickle_is_damaged() -> None:
    data = pickle.dumps({"a": [1, 2.5, "text", (None, True)], "b": OrderedDict(c=2**70)}, 4)
    for n_bytes in range(len(data)):
        assert "damaged" in refusal(data[:n_bytes])


def test_a_memo_number_of_four_billion_takes_no_memory() -> None:
    assert read(b"\x80\x02]r\xff\xff\xff\xff.") == []


def test_containers_that_unfold_without_end_cost_nothing() -> None:
    """Each level holds the one before twice: written out, it would be 2**60 items."""
    bomb = b"\x80\x02)" + b"q\x00h\x00\x86" * 60
    start = time.perf_counter()
    assert "a key of a dict is of the kind tuple" in refusal(b"\x80\x02}" + bomb[2:] + b"K\x01s.")
    value = read(bomb + b".")
    assert shown(value) == "(a tuple, a tuple)"
    assert time.perf_counter() - start < 1.0


def test_a_pickle_that_is_too_long_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickles, "LARGEST_PICKLE_BYTES", 1 << 20)
    assert read(pickle.dumps(["x" * 1000] * 100, 2)) == ["x" * 1000] * 100
    assert "longer than 1 MiB" in refusal(pickle.dumps([str(i) * 100 for i in range(10_000)], 2))


def test_no_sequence_of_random_instructions_ends_in_anything_but_a_value_or_a_refusal() -> None:
    generator = random.Random(5)
    codes = [ord(op.code) for op in pickletools.opcodes]
    honest = pickle.dumps({"a": [1, 2.5, "text", (None, True)], "b": Counter("abc"), "c": {1, 2}}, 4)
    mutations: list[Callable[[bytearray, int], None]] = [
        lambda data, at: data.__setitem__(at, generator.choice(codes)),
        lambda data, at: data.insert(at, generator.choice(codes)),
        lambda data, at: data.__delitem__(at),
        lambda data, at: data.__setitem__(at, generator.randrange(256)),
    ]
    for _ in range(3000):
        data = bytearray(honest)
        for _ in range(generator.randint(1, 6)):
            generator.choice(mutations)(data, generator.randrange(len(data) - 1))
        try:
            read(bytes(data), TORCH)
        except CheckpointError:
            continue
