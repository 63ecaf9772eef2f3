"""A broker and an object store inside the process, on a clock of their own, with every fault of a field.

For tests, load tests and experiments: what is published, stored and fetched arrives after seeded delays, in
another order, twice or not at all. The same seed gives the same history.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fedgmr_plugin.engine.seeds import numpy_generator
from fedgmr_plugin.errors import WireError
from fedgmr_plugin.protocol.pieces import Piece
from fedgmr_plugin.runtimes.devices.office import Content, Fetched

Receive = Callable[[str, bytes], None]


@dataclass(frozen=True)
class Faults:
    """What goes wrong.

    Attributes:
        loss: probability that a message is lost, or that a fetch finds nothing.
        duplicate: probability that a message arrives once more.
        least, most: seconds that a message or an object takes, uniform: order is not kept.
    """

    loss: float = 0.0
    duplicate: float = 0.0
    least: float = 0.01
    most: float = 0.1


class Loopback:
    """The world between a server and its devices.

    Attributes:
        now: seconds.
        objects: the store.
        published: every message, as (topic, payload), lost ones too.
        fetched_bytes, stored_bytes: that passed.
    """

    def __init__(self, seed: int = 0, faults: Faults | None = None) -> None:
        self.now = 0.0
        self.objects: dict[str, bytes] = {}
        self.published: list[tuple[str, bytes]] = []
        self.fetched_bytes = self.stored_bytes = 0
        self.faults = faults or Faults()
        self.keep_published = True
        self._random = numpy_generator(seed, "loopback")
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._subscribers: dict[str, list[Receive]] = defaultdict(list)

    def clock(self) -> float:
        """Seconds."""
        return self.now

    def at(self, time: float, action: Callable[[], None]) -> None:
        """Have `action` called at second `time`."""
        heapq.heappush(self._queue, (max(time, self.now), next(self._numbers), action))

    def subscribe(self, topic: str, receive: Receive) -> None:
        """Have `receive` called with what is published on `topic`."""
        self._subscribers[topic].append(receive)

    def unsubscribe(self, topic: str, receive: Receive) -> None:
        """Undo `subscribe`."""
        self._subscribers[topic].remove(receive)

    def step(self) -> bool:
        """Let the next thing happen; false if there is none."""
        if not self._queue:
            return False
        self.now, _, action = heapq.heappop(self._queue)
        action()
        return True

    def deliver(self, topic: str, payload: bytes, *, at_most_once: bool = False) -> None:
        """A message on its way: lost, delayed, or twice there unless it is `at_most_once`."""
        if self.keep_published:
            self.published.append((topic, payload))
        copies = 0 if self._random.random() < self.faults.loss else 1
        copies += int(self._random.random() < self.faults.duplicate)
        for _ in range(min(copies, 1) if at_most_once else copies):
            self.at(self.now + self._delay(), lambda: self._receive(topic, payload))

    def _receive(self, topic: str, payload: bytes) -> None:
        for receive in list(self._subscribers[topic]):
            receive(topic, payload)

    def _delay(self) -> float:
        return float(self._random.uniform(self.faults.least, self.faults.most))

    def get(self, piece: Piece, then: Fetched) -> None:
        """An object on its way from the store."""
        lost = self._random.random() < self.faults.loss
        self.at(self.now + self._delay(), lambda: then(self._content(piece, lost)))

    def _content(self, piece: Piece, lost: bool) -> bytearray | WireError:
        content = None if lost else self.objects.get(piece.key)
        problem = announced(piece, content)
        if problem is not None or content is None:
            return problem or WireError("GMR-746", piece.key)
        self.fetched_bytes += len(content)
        return bytearray(content)


class LoopbackHands:
    """One participant's access to a `Loopback`; see `fedgmr_plugin.runtimes.devices.office.Hands`."""

    def __init__(self, world: Loopback) -> None:
        self.world = world
        self.cut = False  # whether the participant is dead: nothing leaves, nothing comes back

    def put(self, piece: Piece, content: Content) -> None:
        if not self.cut:
            self.world.objects[piece.key] = bytes(content)
            self.world.stored_bytes += len(content)

    def publish(
        self,
        topic: str,
        payload: bytes,
        then: Callable[[], None] | None = None,
        *,
        at_most_once: bool = False,
    ) -> None:
        if not self.cut:
            self.world.deliver(topic, payload, at_most_once=at_most_once)
            if then is not None:
                then()

    def fetch(self, piece: Piece, then: Fetched) -> None:
        if not self.cut:
            self.world.get(piece, lambda content: None if self.cut else then(content))

    def delete(self, keys: Sequence[str]) -> None:
        for key in () if self.cut else keys:
            self.world.objects.pop(key, None)

    def unsent(self) -> list[tuple[Piece, Content]]:
        return []

    def undeleted(self) -> list[str]:
        return []

    def is_stuck(self) -> bool:
        return False


def announced(piece: Piece, content: Content | None) -> WireError | None:
    """Why `content` is not the object that was announced; None if it is."""
    if content is None:
        return WireError("GMR-746", f"key={piece.key} is not in the store")
    if not piece.sha256:  # its length and digest were not announced, only the most that is taken
        if len(content) <= piece.size:
            return None
        return WireError("GMR-746", f"key={piece.key} has {len(content)} bytes, {piece.size} at most")
    if len(content) != piece.size:
        return WireError("GMR-746", f"key={piece.key} has {len(content)} bytes instead of {piece.size}")
    if hashlib.sha256(content).hexdigest() != piece.sha256:
        return WireError("GMR-746", f"key={piece.key} has another SHA-256 than announced")
    return None
