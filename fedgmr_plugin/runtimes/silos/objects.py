"""Objects in the memory of one process, for a transport that carries them along with messages."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Sequence

from fedgmr_plugin.errors import WireError
from fedgmr_plugin.protocol.header import MOST_SEGMENTS
from fedgmr_plugin.protocol.pieces import Piece
from fedgmr_plugin.runtimes.devices.loopback import announced
from fedgmr_plugin.runtimes.devices.office import Content

#: Objects of one sender that are kept, at most: those of two dispatches.
MOST_OBJECTS = 4 * MOST_SEGMENTS


class Objects:
    """Objects, each under its key and digest: nobody can replace another's, or drive another's out.

    Args:
        received: bytes that are kept of each sender; the oldest go where there are more.
        own: the same for what this process put. None keeps all until they are deleted.
    """

    def __init__(self, received: int | None = None, own: int | None = None) -> None:
        self._most = received
        self._own = _Shelf(own)
        self._received: dict[str, _Shelf] = {}
        self._lock = threading.Lock()

    def put(self, piece: Piece, content: Content) -> None:
        """Keep an object of this process's own."""
        digest = piece.sha256 or hashlib.sha256(content).hexdigest()
        with self._lock:
            self._own.put(piece.key, digest, content)

    def receive(self, sender: str, piece: Piece, content: Content) -> None:
        """Keep an object that somebody sent; `sender` is one of a fixed set."""
        with self._lock:
            shelf = self._received.setdefault(sender, _Shelf(self._most))
            shelf.put(piece.key, piece.sha256, content)

    def get(self, piece: Piece) -> bytearray:
        """A copy of an object.

        Raises:
            WireError: GMR-746 if it is missing, or not as announced.
        """
        with self._lock:
            found = (shelf.get(piece) for shelf in (self._own, *self._received.values()))
            content = next((c for c in found if c is not None), None)
        problem = announced(piece, content)
        if problem is not None or content is None:
            raise problem or WireError("GMR-746", piece.key)
        return bytearray(content)

    def delete(self, keys: Sequence[str]) -> None:
        """Forget objects."""
        gone = frozenset(keys)
        with self._lock:
            for shelf in (self._own, *self._received.values()):
                shelf.delete(gone)

    def keys(self, prefix: str) -> list[str]:
        """Names of the objects that begin with `prefix`."""
        with self._lock:
            names = {key for s in (self._own, *self._received.values()) for key, _ in s.contents}
        return [key for key in names if key.startswith(prefix)]

    def volatile(self) -> list[tuple[Piece, Content]]:
        """What this process put: it is lost with it."""
        with self._lock:
            own = list(self._own.contents.items())
        return [(Piece(key, len(content), digest), content) for (key, digest), content in own]

    def held(self) -> int:
        """Bytes of all objects."""
        with self._lock:
            return self._own.bytes + sum(shelf.bytes for shelf in self._received.values())

    def __len__(self) -> int:
        with self._lock:
            return len(self._own.contents) + sum(len(s.contents) for s in self._received.values())


class _Shelf:
    """Objects of one origin, the oldest first."""

    def __init__(self, most: int | None) -> None:
        self._most = most
        self.bytes = 0
        self.contents: OrderedDict[tuple[str, str], Content] = OrderedDict()

    def put(self, key: str, digest: str, content: Content) -> None:
        self._pop((key, digest))
        self.contents[key, digest] = content
        self.bytes += len(content)
        while self._most is not None and (self.bytes > self._most or len(self.contents) > MOST_OBJECTS):
            self._pop(next(iter(self.contents)))

    def get(self, piece: Piece) -> Content | None:
        if piece.sha256:
            return self.contents.get((piece.key, piece.sha256))
        return next((content for (key, _), content in self.contents.items() if key == piece.key), None)

    def delete(self, keys: frozenset[str]) -> None:
        for name in [name for name in self.contents if name[0] in keys]:
            self._pop(name)

    def _pop(self, name: tuple[str, str]) -> None:
        self.bytes -= len(self.contents.pop(name, b""))
