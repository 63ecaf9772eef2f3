"""What takes time, in threads: storing and sending in their order, fetching several at once."""

from __future__ import annotations

import logging
import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

from fedgmr_plugin.errors import FedGMRError, WireError
from fedgmr_plugin.protocol.pieces import Piece
from fedgmr_plugin.runtimes.devices.office import Content, Fetched
from fedgmr_plugin.runtimes.devices.store import Unreachable

_log = logging.getLogger(__name__)
_FIRST_WAIT, _LONGEST_WAIT = 0.25, 15.0
#: Seconds between two tries from which on the store counts as away.
_STUCK_WAIT = 2.0


class Store(Protocol):
    """As `S3Store`."""

    def put(self, piece: Piece, content: Content) -> None: ...
    def get(self, piece: Piece) -> bytearray: ...
    def delete(self, keys: Sequence[str]) -> None: ...
    def keys(self, prefix: str) -> list[str]: ...
    def volatile(self) -> list[tuple[Piece, Content]]: ...


class Link(Protocol):
    """As `MqttLink`."""

    connected: threading.Event

    def publish(self, topic: str, payload: bytes, *, at_most_once: bool = False) -> None: ...


class ThreadedHands:
    """See `fedgmr_plugin.runtimes.devices.office.Hands`; what is unreachable is tried again for ever.

    Args:
        store, link: where to.
        inbox: calls that are to be made in the owner's thread are put here.
        fetches: objects fetched at the same time.
    """

    def __init__(self, store: Store, link: Link, inbox: queue.Queue[Any], fetches: int = 8) -> None:
        self._store, self._link, self._inbox = store, link, inbox
        self._jobs: deque[Callable[[], None]] = deque()
        self._unsent: dict[int, tuple[Piece, Content]] = {}
        self._undeleted: dict[int, list[str]] = {}
        self._changed = threading.Condition()
        self._stopped = threading.Event()
        self._orders = 0
        self._stuck = False
        self._pool = ThreadPoolExecutor(fetches, thread_name_prefix="fedgmr-fetch")
        self._thread = threading.Thread(target=self._work, name="fedgmr-outbox", daemon=True)

    def start(self) -> None:
        """Begin to carry out what was given."""
        self._thread.start()

    def put(self, piece: Piece, content: Content) -> None:
        number = self._orders = self._orders + 1
        with self._changed:
            self._unsent[number] = piece, content

        def store() -> None:
            self._patiently(lambda: self._store.put(piece, content), in_order=True)
            with self._changed:
                del self._unsent[number]

        self._give(store)

    def publish(
        self,
        topic: str,
        payload: bytes,
        then: Callable[[], None] | None = None,
        *,
        at_most_once: bool = False,
    ) -> None:
        def publish() -> None:
            self._link.publish(topic, payload, at_most_once=at_most_once)
            if then is not None:
                self._inbox.put(then)

        self._give(publish)

    def delete(self, keys: Sequence[str]) -> None:
        if not keys:
            return
        number = self._orders = self._orders + 1
        with self._changed:
            self._undeleted[number] = list(keys)

        def delete() -> None:
            self._patiently(lambda: self._store.delete(list(keys)), in_order=True)
            with self._changed:
                del self._undeleted[number]

        self._give(delete)

    def fetch(self, piece: Piece, then: Fetched) -> None:
        def get() -> None:
            found: list[bytearray | WireError] = []
            try:
                self._patiently(lambda: found.append(self._store.get(piece)))
            except WireError as error:
                found.append(error)
            except FedGMRError as error:
                self._fail(error)
                return
            if found:
                self._inbox.put(lambda: then(found[0]))

        self._pool.submit(get).add_done_callback(self._report)

    def unsent(self) -> list[tuple[Piece, Content]]:
        with self._changed:
            waiting = list(self._unsent.values())
        return [*self._store.volatile(), *waiting]

    def undeleted(self) -> list[str]:
        with self._changed:
            return [key for keys in self._undeleted.values() for key in keys]

    def is_stuck(self) -> bool:
        return self._stuck or not self._link.connected.is_set()

    def flush(self, patience: float) -> bool:
        """Wait until everything given has been carried out, `patience` seconds at most."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._jobs, patience)

    def close(self) -> None:
        """Stop; what was not carried out is forgotten."""
        self._stopped.set()
        with self._changed:
            self._changed.notify_all()
        self._pool.shutdown(wait=False, cancel_futures=True)
        if self._thread.is_alive():
            self._thread.join(timeout=5)

    def sweep(self, prefixes: Sequence[str], is_needless: Callable[[str], bool], patience: float) -> None:
        """Delete what `is_needless` of all objects with these prefixes, in `patience` seconds or not at all.

        After `close`, as the last thing that is done with the store.
        """

        def sweep() -> None:
            try:
                found = {key for prefix in prefixes for key in self._store.keys(prefix)}
                self._store.delete([key for key in found if is_needless(key)])
            except (Unreachable, FedGMRError) as error:
                _log.warning("the run's objects stay in the store: %s", error)

        thread = threading.Thread(target=sweep, name="fedgmr-sweep", daemon=True)
        thread.start()
        thread.join(patience)
        if thread.is_alive():
            _log.warning("the store is slow: some of the run's objects may stay in it")

    def _give(self, job: Callable[[], None]) -> None:
        with self._changed:
            self._jobs.append(job)
            self._changed.notify_all()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs or self._stopped.is_set())
                if self._stopped.is_set():
                    return
                job = self._jobs[0]
            try:
                job()
            except Exception as error:  # noqa: BLE001  # one that nobody expected ends the run, not this thread alone
                self._fail(error)
            with self._changed:
                self._jobs.popleft()
                self._changed.notify_all()

    def _report(self, done: Future[None]) -> None:
        """An error that nobody expected, or the object would be waited for without end."""
        error = None if done.cancelled() else done.exception()
        if error is not None:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        """Have the owner raise `error`."""

        def fail() -> None:
            raise error

        self._inbox.put(fail)

    def _patiently(self, action: Callable[[], None], *, in_order: bool = False) -> None:
        """Do something until it works, ever more rarely.

        Args:
            in_order: whether everything that is given later waits for it.
        """
        wait = 0.0
        while not self._stopped.is_set():
            try:
                action()
            except Unreachable as error:
                if wait == 0.0:
                    _log.warning("the store cannot be reached, trying again: %s", error)
                wait = min(max(2 * wait, _FIRST_WAIT), _LONGEST_WAIT)
                self._stuck = self._stuck or (in_order and wait >= _STUCK_WAIT)
                self._stopped.wait(wait)
                continue
            if in_order:
                self._stuck = False
            if wait:
                _log.warning("the store can be reached again")
            return
