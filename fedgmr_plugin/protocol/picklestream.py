"""Walks the opcodes of a pickle as data: nothing is imported, looked up or called by a name in the stream.

Python's unpickler is a machine whose programs come from the sender. This reader knows a closed list of
opcodes, those that CPython writes for plain data in protocols 2 to 5. A global becomes a `Symbol`, which is
a word; what REDUCE, NEWOBJ, BUILD and a persistent id mean for a symbol is said by the caller's `Vocabulary`,
whose functions are ours. Bytes and long texts stay views of the buffer. No step recurses.
"""

from __future__ import annotations

import pickletools
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from fedgmr_plugin.errors import WireError

#: Longest text that is decoded, bytes; a longer one stays a `LongText`.
MOST_TEXT = 1024
#: Longest module or attribute name of a global, bytes.
MOST_NAME = 128
#: Longest integer, bytes. CPython writes those within 32 bits otherwise; torch's magic number takes ten.
MOST_INTEGER = 16

Buffer = bytes | bytearray | memoryview


class Symbol(NamedTuple):
    """A global that a pickle names, such as ``collections.OrderedDict``: a word, not the object."""

    name: str


class LongText(NamedTuple):
    """A text that is not decoded: its UTF-8 in the buffer (protocol 2 writes bytes as such)."""

    view: memoryview


class Ordered(dict[str, Any]):
    """What an OrderedDict of the stream becomes."""


class Vocabulary(NamedTuple):
    """What the globals of one kind of stream mean; a symbol that is in no table is refused.

    Attributes:
        call: what REDUCE does with a symbol, given its tuple of arguments.
        create: what NEWOBJ makes of a symbol, given no arguments.
        values: symbols that stand for themselves, and what is put in their place.
        build: what BUILD does to an object, given its state.
        persistent: what a persistent id stands for; None where there is none.
    """

    call: Mapping[str, Callable[[tuple[Any, ...]], Any]]
    create: Mapping[str, Callable[[], Any]]
    values: Mapping[str, Any]
    build: Callable[[Any, Any], None]
    persistent: Callable[[Any], Any] | None = None


@dataclass
class Budget:
    """What may still be spent, by a stream and those within it.

    Attributes:
        opcodes: opcodes, and so also entries of the memo and of the stack.
        text: bytes of decoded texts.
        depth: open marks; fixed.
        transcoded: bytes of long texts that are made bytes again.
    """

    opcodes: int
    text: int
    depth: int
    transcoded: int

    def spend_opcode(self) -> None:
        """The same for one opcode, which is asked most often."""
        self.opcodes -= 1
        if self.opcodes < 0:
            raise WireError("GMR-727", "opcodes of the pickle are more than its model needs")

    def spend(self, name: str, amount: int) -> None:
        """Take `amount` off, or raise GMR-727."""
        left = getattr(self, name) - amount
        if left < 0:
            raise WireError("GMR-727", f"{name} of the pickle are more than its model needs")
        setattr(self, name, left)


def kind(value: Any) -> str:
    """What a value of the stream is, for an error; of constant length, whatever the value holds."""
    if isinstance(value, Symbol):
        return value.name[:60]
    text = type(value).__name__
    if value is None or type(value) in (bool, float) or (type(value) is int and abs(value) < 2**64):
        return f"{text} {value!r}"
    return f"{text} {value[:40]!r}" if type(value) is str else text


def read_pickle(view: memoryview, at: int, vocabulary: Vocabulary, budget: Budget) -> tuple[Any, int]:
    """The value of the pickle that starts at byte `at`, and where it ends.

    Raises:
        WireError: GMR-724 to GMR-727, or what the vocabulary raises.
    """
    walker = _Walker(view, at, vocabulary, budget)
    return walker.walk(), walker.at


class _Walker:
    """The stack, the memo and the place in the buffer."""

    def __init__(self, view: memoryview, at: int, vocabulary: Vocabulary, budget: Budget) -> None:
        self.view = view.toreadonly()
        self.at = at
        self.end = len(view)
        self.vocabulary = vocabulary
        self.budget = budget
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def walk(self) -> Any:
        """Up to STOP."""
        code, protocol = self.take(2)
        if code != _PROTO or not 2 <= protocol <= 5:
            raise WireError("GMR-725", f"no pickle of protocol 2 to 5 at byte {self.at - 2}")
        while True:
            self.budget.spend_opcode()
            code = self.byte()
            if code == _STOP:
                break
            handler = _HANDLERS.get(code)
            if handler is None:
                raise WireError("GMR-725", f"opcode={_NAMES.get(code, code)} at byte {self.at - 1}")
            handler(self)
        value = self.pop()
        if self.stack or self.marks:
            raise WireError("GMR-724", f"values are left over at byte {self.at}")
        return value

    # -- bytes --

    def take(self, length: int) -> memoryview:
        """The next `length` bytes, as a view."""
        if length > self.end - self.at:
            raise WireError("GMR-724", f"{length} bytes at byte {self.at} of {self.end}")
        self.at += length
        return self.view[self.at - length : self.at]

    def byte(self) -> int:
        if self.at >= self.end:
            raise WireError("GMR-724", f"the pickle ends at byte {self.at}")
        self.at += 1
        return self.view[self.at - 1]

    def natural(self, width: int) -> int:
        return int.from_bytes(self.take(width), "little")

    def line(self) -> str:
        """Up to the next newline."""
        found = bytes(self.view[self.at : self.at + MOST_NAME + 1])
        length = found.find(b"\n")
        if length < 0:
            raise WireError("GMR-724", f"no name of at most {MOST_NAME} bytes at byte {self.at}")
        self.at += length + 1
        return self.decode(found[:length])

    def decode(self, data: Buffer) -> str:
        self.budget.spend("text", len(data))
        try:
            return bytes(data).decode("utf-8")
        except UnicodeDecodeError as error:
            raise WireError("GMR-724", f"a text before byte {self.at} is not UTF-8") from error

    # -- stack --

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def top(self) -> Any:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise WireError("GMR-724", f"the stack is empty at byte {self.at}")
        return self.stack[-1]

    def pop(self) -> Any:
        value = self.top()
        del self.stack[-1]
        return value

    def since_mark(self) -> list[Any]:
        """Pop all that was pushed since the last mark, and the mark."""
        if not self.marks:
            raise WireError("GMR-724", f"no mark is open at byte {self.at}")
        start = self.marks.pop()
        found = self.stack[start:]
        del self.stack[start:]
        return found

    # -- opcodes --

    def mark(self) -> None:
        if len(self.marks) >= self.budget.depth:
            raise WireError("GMR-727", f"depth={len(self.marks) + 1} at byte {self.at}")
        self.marks.append(len(self.stack))

    def frame(self) -> None:
        length = self.natural(8)
        if length > self.end - self.at:
            raise WireError("GMR-724", f"frame={length} bytes at byte {self.at} of {self.end}")

    def long1(self) -> None:
        length = self.byte()
        if length > MOST_INTEGER:
            raise WireError("GMR-727", f"an integer of {length} bytes at byte {self.at}")
        self.push(int.from_bytes(self.take(length), "little", signed=True))

    def text(self, width: int) -> None:
        data = self.take(self.natural(width))
        self.push(LongText(data) if len(data) > MOST_TEXT else self.decode(data))

    def tuple(self, length: int) -> None:
        self.push(tuple(reversed([self.pop() for _ in range(length)])))

    def append(self, values: list[Any]) -> None:
        target = self.top()
        if type(target) is not list:
            raise WireError("GMR-724", f"APPEND to {kind(target)} at byte {self.at}")
        target.extend(values)

    def set_items(self, pairs: list[Any]) -> None:
        target = self.top()
        if type(target) not in (dict, Ordered) or len(pairs) % 2:
            raise WireError("GMR-724", f"SETITEM of {len(pairs)} values in {kind(target)} at byte {self.at}")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            # Only texts: their hash is a secret of this process, so no sender can make keys collide.
            if type(key) is not str:
                raise WireError("GMR-728", f"key={kind(key)} is no text")
            if key in target:
                raise WireError("GMR-728", f"key={key[:40]!r} is repeated")
            target[key] = value

    def set_item(self) -> None:
        value, key = self.pop(), self.pop()
        self.set_items([key, value])

    def symbol(self, module: Any, name: Any) -> None:
        if type(module) is not str or type(name) is not str:
            raise WireError("GMR-724", f"a global of {kind(module)} and {kind(name)} at byte {self.at}")
        if "." in name:  # Python would look for attributes of attributes
            raise WireError("GMR-726", f"global={name[:60]!r} of {module[:60]!r}")
        full = f"{module}.{name}"
        known = self.vocabulary
        if full in known.values:
            self.push(known.values[full])
        elif full in known.call or full in known.create:
            self.push(Symbol(full))
        else:
            raise WireError("GMR-726", f"global={full[:120]!r}")

    def stack_global(self) -> None:
        name, module = self.pop(), self.pop()
        self.symbol(module, name)

    def reduce(self) -> None:
        arguments, target = self.pop(), self.pop()
        if type(target) is not Symbol or target.name not in self.vocabulary.call:
            raise WireError("GMR-726", f"REDUCE of {kind(target)} at byte {self.at}")
        if type(arguments) is not tuple:
            raise WireError("GMR-724", f"{kind(arguments)} instead of arguments at byte {self.at}")
        self.push(self.vocabulary.call[target.name](arguments))

    def new(self) -> None:
        arguments, target = self.pop(), self.pop()
        if type(target) is not Symbol or target.name not in self.vocabulary.create:
            raise WireError("GMR-726", f"NEWOBJ of {kind(target)} at byte {self.at}")
        if type(arguments) is not tuple or arguments:
            raise WireError("GMR-728", f"{target.name} made with arguments")
        self.push(self.vocabulary.create[target.name]())

    def build(self) -> None:
        state = self.pop()
        self.vocabulary.build(self.top(), state)

    def persistent_id(self) -> None:
        if self.vocabulary.persistent is None:
            raise WireError("GMR-725", f"opcode=BINPERSID at byte {self.at - 1}")
        self.push(self.vocabulary.persistent(self.pop()))

    def put(self, index: int) -> None:
        if index != len(self.memo):  # CPython counts; its reader would make room up to any index
            raise WireError("GMR-724", f"memo={index} instead of {len(self.memo)} at byte {self.at}")
        self.memo[index] = self.top()

    def get(self, index: int) -> None:
        if index not in self.memo:
            raise WireError("GMR-724", f"memo={index} was never filled, at byte {self.at}")
        self.push(self.memo[index])

    def float(self) -> None:
        self.push(struct.unpack(">d", self.take(8))[0])


_CODES = {opcode.name: ord(opcode.code) for opcode in pickletools.opcodes}
_NAMES = {code: name for name, code in _CODES.items()}
_PROTO, _STOP = _CODES["PROTO"], _CODES["STOP"]
#: Every opcode that is read, besides PROTO in front and STOP behind. Not among them, though CPython knows
#: them: EXT1 to EXT4, INST, OBJ, NEWOBJ_EX, PERSID, sets, bytearrays, buffers out of band, DUP, POP, LONG4,
#: and all of protocols 0 and 1.
_HANDLERS: dict[int, Callable[[_Walker], None]] = {
    _CODES[name]: handler
    for name, handler in {
        "FRAME": _Walker.frame,
        "MARK": _Walker.mark,
        "NONE": lambda w: w.push(None),
        "NEWTRUE": lambda w: w.push(True),
        "NEWFALSE": lambda w: w.push(False),
        "BININT": lambda w: w.push(int.from_bytes(w.take(4), "little", signed=True)),
        "BININT1": lambda w: w.push(w.byte()),
        "BININT2": lambda w: w.push(w.natural(2)),
        "LONG1": _Walker.long1,
        "BINFLOAT": _Walker.float,
        "SHORT_BINUNICODE": lambda w: w.text(1),
        "BINUNICODE": lambda w: w.text(4),
        "BINUNICODE8": lambda w: w.text(8),
        "SHORT_BINBYTES": lambda w: w.push(w.take(w.natural(1))),
        "BINBYTES": lambda w: w.push(w.take(w.natural(4))),
        "BINBYTES8": lambda w: w.push(w.take(w.natural(8))),
        "EMPTY_TUPLE": lambda w: w.push(()),
        "TUPLE1": lambda w: w.tuple(1),
        "TUPLE2": lambda w: w.tuple(2),
        "TUPLE3": lambda w: w.tuple(3),
        "TUPLE": lambda w: w.push(tuple(w.since_mark())),
        "EMPTY_LIST": lambda w: w.push([]),
        "APPEND": lambda w: w.append([w.pop()]),
        "APPENDS": lambda w: w.append(w.since_mark()),
        "EMPTY_DICT": lambda w: w.push({}),
        "SETITEM": _Walker.set_item,
        "SETITEMS": lambda w: w.set_items(w.since_mark()),
        "GLOBAL": lambda w: w.symbol(w.line(), w.line()),
        "STACK_GLOBAL": _Walker.stack_global,
        "REDUCE": _Walker.reduce,
        "NEWOBJ": _Walker.new,
        "BUILD": _Walker.build,
        "BINPERSID": _Walker.persistent_id,
        "BINPUT": lambda w: w.put(w.byte()),
        "LONG_BINPUT": lambda w: w.put(w.natural(4)),
        "MEMOIZE": lambda w: w.put(len(w.memo)),
        "BINGET": lambda w: w.get(w.byte()),
        "LONG_BINGET": lambda w: w.get(w.natural(4)),
    }.items()
}
