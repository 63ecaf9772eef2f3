"""What waits for a process's one thread: messages, bounded in bytes, and calls."""

from __future__ import annotations

import queue
import threading
from typing import Any

#: Bytes of messages that wait, at most; several thousand of a usual length.
MOST_WAITING = 2**26
#: What a message costs besides its topic and payload.
_EACH = 128


class Inbox(queue.Queue[Any]):
    """A queue of messages (topic, payload), and of calls to be made, which always find room.

    Args:
        most: bytes of messages; one that does not fit is refused at once, for its sender to repeat.
    """

    def __init__(self, most: int = MOST_WAITING) -> None:
        super().__init__()
        self._most, self._bytes = most, 0
        self._counting = threading.Lock()

    def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
        """Add a message or a call; never waits.

        Raises:
            queue.Full: there is no room for this message.
        """
        size = _size(item)
        with self._counting:
            if size and self._bytes + size > self._most:
                raise queue.Full
            self._bytes += size
        super().put(item)

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        """The next message or call, as `queue.Queue.get`."""
        item = super().get(block, timeout)
        with self._counting:
            self._bytes -= _size(item)
        return item


def _size(item: Any) -> int:
    return 0 if callable(item) else len(item[0]) + len(item[1]) + _EACH
