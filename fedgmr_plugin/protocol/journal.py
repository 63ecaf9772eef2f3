"""What happened to a run since its last checkpoint, event by event: on the disk before it takes effect.

A journal is a file of entries: 4 bytes ``FGJ1``, the lengths of head and payload (8 bytes each,
little-endian), SHA-256 of what follows (32 bytes), the head (JSON) and the payload. A crash tears the last
entry at most, which then never took effect: it is cut off. Damage before it is an error.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple

from fedgmr_plugin.errors import RunLogError

_MAGIC = b"FGJ1"
_FRAME = len(_MAGIC) + 16 + 32


class Entry(NamedTuple):
    """One event: JSON-able `head`, and bytes."""

    head: Mapping[str, Any]
    payload: bytes | memoryview = b""


class Journal:
    """Appends entries to a file, each on the disk when `append` returns.

    Args:
        path: of the file; made where it is missing, continued where not.

    Raises:
        RunLogError: GMR-607 if an entry before the last one is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        is_new = not path.exists()
        self._size = 0 if is_new else _sound_bytes(path)
        self._file = path.open("ab", buffering=0)
        self._file.truncate(self._size)
        self._is_torn = False  # whether something lies behind `_size`
        if is_new:
            sync(path.parent)

    def append(self, entries: Iterable[Entry]) -> None:
        """Write entries and bring them to the disk: all of them or, where that fails, none.

        Raises:
            OSError: there is no space, or the disk fails; the journal is as it was before.
        """
        self._mend()
        try:
            self._is_torn = True
            for entry in entries:
                for piece in _framed(entry):
                    _write(self._file.fileno(), piece)
            os.fsync(self._file.fileno())
        except OSError:
            self._mend()
            raise
        self._size = os.fstat(self._file.fileno()).st_size
        self._is_torn = False

    def _mend(self) -> None:
        """Cut off what a failed append left; where that fails too, the next append begins with it."""
        if self._is_torn:
            self._file.truncate(self._size)
            self._is_torn = False

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read(path: Path) -> Iterator[Entry]:
    """The entries of a journal, without a torn last one; none where there is no file.

    Raises:
        RunLogError: GMR-607 if an entry before the last one is damaged.
    """
    if path.exists():
        for _, entry in _entries(path):
            yield entry


def _framed(entry: Entry) -> tuple[bytes, bytes, bytes | memoryview]:
    head = json.dumps(entry.head, separators=(",", ":"), allow_nan=False).encode()
    digest = hashlib.sha256(head)
    digest.update(entry.payload)
    lengths = len(head).to_bytes(8, "little") + len(entry.payload).to_bytes(8, "little")
    return _MAGIC + lengths + digest.digest(), head, entry.payload


def _write(descriptor: int, piece: bytes | memoryview) -> None:
    """Write all of `piece`, however little the system takes at once."""
    left = memoryview(piece)
    while left:
        left = left[os.write(descriptor, left) :]


def _entries(path: Path) -> Iterator[tuple[int, Entry]]:
    """End and content of each sound entry."""
    at = 0
    with path.open("rb") as file:
        while True:
            found = _next(file)
            if found is None:
                break
            at, entry = found
            yield at, entry
        file.seek(at)
        if _has_sound_entry(file, path.stat().st_size):
            raise RunLogError("GMR-607", f"the entry at byte {at} is damaged", where=str(path))


def _next(file: BinaryIO) -> tuple[int, Entry] | None:
    """End and content of the entry at the file's position; None if there is no sound one."""
    frame = file.read(_FRAME)
    head_bytes, payload_bytes = (int.from_bytes(frame[i : i + 8], "little") for i in (4, 12))
    left = os.fstat(file.fileno()).st_size - file.tell()
    if len(frame) < _FRAME or frame[:4] != _MAGIC or head_bytes + payload_bytes > left:
        return None
    head, payload = file.read(head_bytes), file.read(payload_bytes)
    digest = hashlib.sha256(head)
    digest.update(payload)
    if digest.digest() != frame[20:]:
        return None
    return file.tell(), Entry(json.loads(head), payload)


def _has_sound_entry(file: BinaryIO, size: int) -> bool:
    """Whether an entry that was written whole begins behind the file's position."""
    start = file.tell()
    rest = file.read(size - start)
    at = rest.find(_MAGIC, 1)
    while at >= 0:
        file.seek(start + at)
        if _next(file) is not None:
            return True
        at = rest.find(_MAGIC, at + 1)
    return False


def _sound_bytes(path: Path) -> int:
    """Length of the journal without a torn last entry."""
    return max((end for end, _ in _entries(path)), default=0)


def sync(path: Path) -> None:
    """Bring a file, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
