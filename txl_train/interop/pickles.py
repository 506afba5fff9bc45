"""Reads pickles without running them: a small machine for the instructions that harmless pickles are made of.

Python's own unpickler calls whatever a file names. This one knows only the names in a table that its caller gives: each stands for a
function of ours, or for an `Inert` object that keeps what it is given and does nothing. Any other name, and any instruction
that checkpoints have no need of, is refused by name, before anything is made of it. Memory stays in proportion to the bytes read: every
length is compared with what is left of the file, and nothing is made in advance. Knows nothing of PyTorch.
"""

from __future__ import annotations

import pickletools
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from txl_train.errors import CheckpointError

LARGEST_PICKLE_BYTES = 1 << 26
"""Eight times what a vocabulary of 270 thousand words takes; an object takes up to a hundred times the bytes that ask for it."""
DEEPEST_NESTING = 1000
"""Containers within containers; checkpoints have some twenty."""
LARGEST_INTEGER_BYTES = 64
"""Integers in checkpoints are sizes, ids, seeds and the magic number; longer ones only cost time."""
LARGEST_KEY = 1 << 60
"""Integers up to here are their own hash, so nobody can choose keys that collide."""

NOTHING_RUN = "It was not read further, and none of its code was run."


@dataclass(eq=False)
class Inert:
    """Stands for an object of a class of theirs: keeps its arguments and attributes, and does nothing."""

    kind: str
    """Module and name of the class."""
    arguments: tuple[Any, ...] = ()
    attributes: dict[str, Any] = field(default_factory=dict)
    state: Any = None
    """What it was given instead of attributes, if anything."""

    @property
    def class_name(self) -> str:
        """The name of the class, without its module."""
        return self.kind.rpartition(".")[2]


@dataclass(frozen=True, eq=False)
class Known:
    """A name that a pickle may use: `make` is called where the pickle calls it, `value` is read where it is passed on."""

    name: str
    make: Callable[..., Any] | None = None
    value: Any = None


Names = Mapping[tuple[str, str], Known]
"""(module, name) to what it stands for."""


def known(names: Mapping[str, Callable[..., Any]]) -> dict[tuple[str, str], Known]:
    """Return a table of names, written "module.name", and the function of ours that each stands for."""
    return {_parted(name): Known(name, make) for name, make in names.items()}


def inert(*names: str) -> dict[tuple[str, str], Known]:
    """Return a table of classes, written "module.name", whose objects become `Inert`."""
    return {_parted(name): Known(name, _maker(name)) for name in names}


def _parted(name: str) -> tuple[str, str]:
    module, _, last = name.rpartition(".")
    return module, last


def _maker(name: str) -> Callable[..., Inert]:
    return lambda *arguments: Inert(name, arguments)


def _listed(items: object = ()) -> list[Any]:
    if not isinstance(items, (list, tuple, set, frozenset)):
        raise CheckpointError("a set is made of something else than a list")
    return list(items)


def _mapping(items: object = ()) -> dict[Any, Any]:
    if isinstance(items, dict):
        return dict(items)
    pairs = {}
    for pair in _listed(items):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise CheckpointError("a dict is made of something else than pairs")
        pairs[_key(pair[0])] = pair[1]
    return pairs


def _encoded(text: object, encoding: object) -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise CheckpointError("bytes are written in another way than Python writes them")
    return text.encode("latin1")


PLAIN: Names = known(
    {
        "collections.OrderedDict": _mapping,
        "collections.Counter": _mapping,
        "collections.defaultdict": lambda factory=None, *items: _mapping(*items),
        "builtins.set": _listed,
        "builtins.frozenset": _listed,
        "__builtin__.set": _listed,
        "__builtin__.frozenset": _listed,
        "_codecs.encode": _encoded,
        "__builtin__.bytes": lambda: b"",
    }
)
"""Containers and bytes, as all pickles write them. Sets become lists: nobody asks them for members."""


def read_pickle(
    data: bytes | memoryview, names: Names, *, what: str, start: int = 0, persistent: Callable[[Any], Any] | None = None
) -> tuple[Any, int]:
    """Return the value of the pickle at `start` of `data`, and where it ends.

    Args:
        data: bytes that hold it; what follows its end is not looked at.
        names: what the pickle may name.
        what: how errors call it, such as a path.
        persistent: turns references to things outside the pickle into values; None refuses them.

    Raises:
        CheckpointError: it names something unknown, uses an instruction that is not needed, or is damaged.
    """
    machine = _Machine(memoryview(data)[: start + LARGEST_PICKLE_BYTES], start, names, what, persistent)
    try:
        return machine.run(), machine.at
    except (IndexError, KeyError, struct.error, UnicodeDecodeError) as error:
        if len(machine.data) < len(data) and (isinstance(error, _PastTheEnd) or machine.at >= len(machine.data)):
            machine.refuse(f"its pickle, without the tensors, is longer than {LARGEST_PICKLE_BYTES >> 20} MiB")
        raise CheckpointError(f"{what} is damaged: its pickle breaks off or contradicts itself.", remedy=COPY_AGAIN) from error


COPY_AGAIN = "Copy it again from where it came."


def shown(value: object) -> str:
    """Return a value of a file as a few characters; containers within it are named only, as they may unfold without end."""
    if isinstance(value, (tuple, list)):
        return f"({', '.join(_part(item) for item in value[:8])}{', …' if len(value) > 8 else ''})"
    return _part(value)


def _part(value: object) -> str:
    return repr(value)[:60] if isinstance(value, (str, int, float, type(None))) else _kind(value)


def printable(text: str, limit: int = 100) -> str:
    """Return a name of a file as it can be shown on a terminal, which it must not command."""
    cut = text[:limit]
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in cut) + ("…" if len(text) > limit else "")


def _key(value: Any) -> Any:
    """Return `value` if it may be a key: texts and small numbers, whose hashes cost nothing and cannot be chosen."""
    if value is None or isinstance(value, (str, bytes, bool)):
        return value
    if isinstance(value, int) and -LARGEST_KEY < value < LARGEST_KEY:
        return value
    if isinstance(value, tuple) and all(isinstance(item, str) for item in value):
        return value
    raise CheckpointError(f"a key of a dict is of the kind {type(value).__name__}")


class _PastTheEnd(IndexError):
    """A length reaches beyond the data."""


class _Machine:
    """The stack machine. `marked` holds the stacks below each open mark."""

    def __init__(self, data: memoryview, start: int, names: Names, what: str, persistent: Callable[[Any], Any] | None) -> None:
        self.data = data
        self.at = start
        self.names = names
        self.what = what
        self.persistent = persistent
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        actions = {code: method.__get__(self) for code, method in _ACTIONS.items()}
        data = self.data
        while True:
            code = data[self.at]
            self.at += 1
            if code == _STOP:
                break
            action = actions.get(code)
            if action is None:
                self.refuse_instruction(code)
            action()
        return self.take_top()

    # --- errors

    def refuse(self, reason: str) -> NoReturn:
        raise CheckpointError(f"{self.what} is refused: {reason}. {NOTHING_RUN}", remedy=_UNEXPECTED)

    def refuse_instruction(self, code: int) -> NoReturn:
        name = _NAMES_OF_CODES.get(code)
        self.refuse("its pickle has a byte that is no instruction" if name is None else f"its pickle has the instruction {name}")

    # --- reading

    def take(self, n_bytes: int) -> memoryview:
        if n_bytes > len(self.data) - self.at:
            raise _PastTheEnd
        start, self.at = self.at, self.at + n_bytes
        return self.data[start : self.at]

    def number(self, form: str, size: int) -> int:
        value: int = struct.unpack(form, self.take(size))[0]
        return value

    def line(self) -> str:
        start = self.at
        while self.data[self.at] != 0x0A:
            self.at += 1
        self.at += 1
        return str(self.data[start : self.at - 1], "utf-8")

    def push_text(self, n_bytes: int) -> None:
        self.stack.append(str(self.take(n_bytes), "utf-8", "surrogatepass"))

    def push_bytes(self, n_bytes: int) -> None:
        self.stack.append(bytes(self.take(n_bytes)))

    def push_long(self, n_bytes: int) -> None:
        if n_bytes > LARGEST_INTEGER_BYTES:
            self.refuse(f"its pickle has an integer of {n_bytes} bytes")
        self.stack.append(int.from_bytes(self.take(n_bytes), "little", signed=True))

    def frame(self) -> None:
        if self.number("<Q", 8) > len(self.data) - self.at:
            raise _PastTheEnd

    # --- the stack

    def mark(self) -> None:
        if len(self.marked) == DEEPEST_NESTING:
            self.refuse(f"its pickle nests containers more than {DEEPEST_NESTING} deep")
        self.marked.append(self.stack)
        self.stack = []

    def to_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marked.pop()
        return items

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def take_top(self) -> Any:
        return self.stack.pop()

    def pop(self) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self.to_mark()

    def push_tuple(self, size: int) -> None:
        if len(self.stack) < size:
            raise IndexError("an empty stack")
        self.stack[len(self.stack) - size :] = [tuple(self.stack[len(self.stack) - size :])]

    def remember(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def recall(self, index: int) -> None:
        self.stack.append(self.memo[index])

    def append(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, list):
            self.refuse(f"its pickle appends to {_kind(target)}")
        target.extend(items)

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict):
            self.refuse(f"its pickle sets items of {_kind(target)}")
        self.fill(target, items)

    def fill(self, target: dict[Any, Any], items: list[Any]) -> dict[Any, Any]:
        if len(items) % 2:
            raise IndexError("a key without a value")
        for i in range(0, len(items), 2):
            target[self.key(items[i])] = items[i + 1]
        return target

    def key(self, value: Any) -> Any:
        try:
            return _key(value)
        except CheckpointError as error:
            self.refuse(error.message)

    # --- names and what is made of them

    def push_name(self, module: Any, name: Any) -> None:
        texts = isinstance(module, str) and isinstance(name, str)
        found = self.names.get((module, name)) if texts else None
        if found is None:
            named = printable(f"{module}.{name}") if texts else "something without a name"
            self.refuse(f"it asks for `{named}`, which is no part of a Transformer-XL's checkpoint")
        self.stack.append(found)

    def push_stacked_name(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.push_name(module, name)

    def call(self) -> None:
        arguments, called = self.stack.pop(), self.stack.pop()
        if not isinstance(called, Known) or called.make is None or not isinstance(arguments, tuple):
            self.refuse(f"its pickle calls {_kind(called)}")
        try:
            self.stack.append(called.make(*arguments))
        except CheckpointError as error:
            self.refuse(f"of `{called.name}`, {error.message}")
        except TypeError:
            self.refuse(f"its pickle calls `{called.name}` with arguments that do not belong to it")

    def call_with_names(self) -> None:
        if self.stack.pop() != {}:
            self.refuse("its pickle makes an object with named arguments")
        self.call()

    def build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Inert):
            parts = state if isinstance(state, tuple) and len(state) == 2 else (state,)
            if all(part is None or (isinstance(part, dict) and all(isinstance(key, str) for key in part)) for part in parts):
                for part in parts:
                    target.attributes.update(part or {})
            else:
                target.state = state
        elif not isinstance(target, dict):  # an OrderedDict of theirs may have attributes, which say nothing here
            self.refuse(f"its pickle sets the state of {_kind(target)}")

    def refer(self) -> None:
        reference = self.stack.pop()
        if self.persistent is None:
            self.refuse("its pickle refers to something outside itself")
        self.stack.append(self.persistent(reference))

    def protocol(self) -> None:
        version = self.take(1)[0]
        if not 2 <= version <= 5:
            self.refuse(f"its pickle is of protocol {version}; checkpoints are of 2 to 5")


def _kind(value: object) -> str:
    if isinstance(value, Inert):
        return f"an object of `{value.kind}`"
    if isinstance(value, Known):
        return f"`{value.name}`"
    return f"a {type(value).__name__}"


_UNEXPECTED = "If it is a Transformer-XL's checkpoint all the same, save its weights alone, with the program that made it."
_STOP = 0x2E


Action = Callable[[_Machine], None]


def _constant(value: object) -> Action:
    return lambda m: m.push(value)


def _new(make: Callable[[], object]) -> Action:
    return lambda m: m.push(make())


def _number(form: str, size: int) -> Action:
    return lambda m: m.push(m.number(form, size))


def _counted(push: Callable[[_Machine, int], None], form: str, size: int) -> Action:
    """What begins with a length."""
    return lambda m: push(m, m.number(form, size))


def _tuple(size: int) -> Action:
    return lambda m: m.push_tuple(size)


_NAMED_ACTIONS: dict[str, Action] = {
    "PROTO": _Machine.protocol,
    "FRAME": _Machine.frame,
    "MARK": _Machine.mark,
    "POP": _Machine.pop,
    "POP_MARK": lambda m: m.to_mark().clear(),
    "NONE": _constant(None),
    "NEWTRUE": _constant(True),
    "NEWFALSE": _constant(False),
    "BININT": _number("<i", 4),
    "BININT1": _number("<B", 1),
    "BININT2": _number("<H", 2),
    "BINFLOAT": _number(">d", 8),
    "LONG1": _counted(_Machine.push_long, "<B", 1),
    "LONG4": _counted(_Machine.push_long, "<I", 4),
    "SHORT_BINUNICODE": _counted(_Machine.push_text, "<B", 1),
    "BINUNICODE": _counted(_Machine.push_text, "<I", 4),
    "BINUNICODE8": _counted(_Machine.push_text, "<Q", 8),
    "SHORT_BINBYTES": _counted(_Machine.push_bytes, "<B", 1),
    "BINBYTES": _counted(_Machine.push_bytes, "<I", 4),
    "BINBYTES8": _counted(_Machine.push_bytes, "<Q", 8),
    "SHORT_BINSTRING": _counted(_Machine.push_text, "<B", 1),
    "BINSTRING": _counted(_Machine.push_text, "<I", 4),
    "EMPTY_TUPLE": _constant(()),
    "TUPLE1": _tuple(1),
    "TUPLE2": _tuple(2),
    "TUPLE3": _tuple(3),
    "TUPLE": lambda m: m.push(tuple(m.to_mark())),
    "EMPTY_LIST": _new(list),
    "LIST": lambda m: m.push(m.to_mark()),
    "APPEND": lambda m: m.append([m.take_top()]),
    "APPENDS": lambda m: m.append(m.to_mark()),
    "EMPTY_SET": _new(list),
    "ADDITEMS": lambda m: m.append(m.to_mark()),
    "FROZENSET": lambda m: m.push(m.to_mark()),
    "EMPTY_DICT": _new(dict),
    "DICT": lambda m: m.push(m.fill({}, m.to_mark())),
    "SETITEM": lambda m: m.set_items([m.take_top(), m.take_top()][::-1]),
    "SETITEMS": lambda m: m.set_items(m.to_mark()),
    "BINPUT": _counted(_Machine.remember, "<B", 1),
    "LONG_BINPUT": _counted(_Machine.remember, "<I", 4),
    "MEMOIZE": lambda m: m.remember(len(m.memo)),
    "BINGET": _counted(_Machine.recall, "<B", 1),
    "LONG_BINGET": _counted(_Machine.recall, "<I", 4),
    "GLOBAL": lambda m: m.push_name(m.line(), m.line()),
    "STACK_GLOBAL": _Machine.push_stacked_name,
    "REDUCE": _Machine.call,
    "NEWOBJ": _Machine.call,
    "NEWOBJ_EX": _Machine.call_with_names,
    "BUILD": _Machine.build,
    "BINPERSID": _Machine.refer,
}
"""What every instruction that is understood does. Python 2 wrote texts as BINSTRING; sets are read as lists."""

_NAMES_OF_CODES = {ord(op.code): op.name for op in pickletools.opcodes}
_ACTIONS: dict[int, Action] = {code: _NAMED_ACTIONS[name] for code, name in _NAMES_OF_CODES.items() if name in _NAMED_ACTIONS}
