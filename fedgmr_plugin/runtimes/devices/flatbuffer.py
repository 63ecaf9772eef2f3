"""Reading a FlatBuffers message that nobody has checked: whatever its bytes are, an answer or `Damaged`.

A table starts with the distance back to its *vtable*, which lists, slot by slot, where each field lies behind
the table's start; 0 stands for an absent field. Strings, vectors and tables within a table are distances
forward. All numbers are little-endian. Every place is checked before it is read, nothing is followed on its
own account, and every length has a bound that the caller names.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass


class Damaged(ValueError):
    """The bytes are no such message."""


def _number(data: bytes, form: str, at: int) -> int | float:
    """The number of struct format `form` at a place."""
    if not 0 <= at <= len(data) - struct.calcsize(form):
        raise Damaged(f"a field lies at byte {at}, and the file has {len(data)}")
    value: int | float = struct.unpack_from(form, data, at)[0]
    return value


def _ahead(data: bytes, at: int) -> int:
    """Where the distance at a place leads."""
    return at + int(_number(data, "<I", at))


@dataclass(frozen=True)
class Vector:
    """`count` elements from byte `start` on, all within the message."""

    start: int
    count: int


@dataclass(frozen=True)
class Table:
    """A table of the message `data` that starts at byte `start`."""

    data: bytes
    start: int

    @staticmethod
    def root(data: bytes) -> Table:
        """The table that a message is."""
        return Table(data, _ahead(data, 0))

    def place(self, slot: int) -> int | None:
        """Byte of a field, None where it is absent."""
        vtable = self.start - int(_number(self.data, "<i", self.start))
        size = int(_number(self.data, "<H", vtable))
        entry = 4 + 2 * slot
        distance = int(_number(self.data, "<H", vtable + entry)) if entry + 2 <= size else 0
        return self.start + distance if distance else None

    def integer(self, slot: int, form: str = "<i", default: int = 0) -> int:
        """An integer of struct format `form`."""
        at = self.place(slot)
        return default if at is None else int(_number(self.data, form, at))

    def real(self, slot: int, default: float = 0.0) -> float:
        """A 32-bit number."""
        at = self.place(slot)
        return default if at is None else float(_number(self.data, "<f", at))

    def table(self, slot: int) -> Table:
        """A table within; one that is absent is damage."""
        at = self.place(slot)
        if at is None:
            raise Damaged(f"a table lacks its field {slot}")
        return Table(self.data, _ahead(self.data, at))

    def vector(self, slot: int, width: int, most: int) -> Vector:
        """The place of a vector of at most `most` elements of `width` bytes; an absent one is empty."""
        at = self.place(slot)
        if at is None:
            return Vector(0, 0)
        start = _ahead(self.data, at)
        count = int(_number(self.data, "<I", start))
        if count > most or start + 4 + width * count > len(self.data):
            raise Damaged(f"a vector claims {count} elements")
        return Vector(start + 4, count)

    def integers(self, slot: int, most: int) -> tuple[int, ...]:
        """A vector of 32-bit integers."""
        found = self.vector(slot, 4, most)
        return struct.unpack_from(f"<{found.count}i", self.data, found.start)

    def tables(self, slot: int, most: int) -> list[Table]:
        """A vector of tables."""
        found = self.vector(slot, 4, most)
        return [Table(self.data, _ahead(self.data, found.start + 4 * i)) for i in range(found.count)]

    def text(self, slot: int, most: int) -> str:
        """A string of at most `most` bytes."""
        found = self.vector(slot, 1, most)
        return self.data[found.start : found.start + found.count].decode("utf-8", "replace")
