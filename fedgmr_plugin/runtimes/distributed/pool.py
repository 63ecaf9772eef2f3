"""The server's side of several processes that train: an `Executor` over channels.

Two threads for each channel: one gives its process tasks, one takes the updates. A process holds two tasks
where enough are waited for, so that the second one travels while the first is trained. The server's own
process trains too, if it is given a workbench, whenever the server waits. Updates wait here for the window
that takes them in: nothing of the run's result depends on who trained what, or when.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from fedgmr_plugin.engine.client import LocalUpdate
from fedgmr_plugin.engine.events import Dispatch
from fedgmr_plugin.engine.trainer import LocalStats
from fedgmr_plugin.errors import HostError
from fedgmr_plugin.kernels.masks import Ranking
from fedgmr_plugin.runtimes.distributed.channel import Channel, Frame, Gone, frame, text_of
from fedgmr_plugin.runtimes.distributed.payloads import Remembered
from fedgmr_plugin.runtimes.distributed.tasks import Tasks, Work

Train = Callable[[Dispatch], LocalUpdate]

#: Tasks that a process holds at most, the one in training included.
DEPTH = 2
#: Rankings that a process remembers, the last used ones; both sides forget by the same rule.
RANKINGS = 4
#: Seconds between signs of life.
HEARTBEAT = 20.0
#: Seconds that the others have to come to an end after something failed.
PATIENCE = 5.0
#: Seconds that they have at the end of a run, to end trainings that nobody needs any more.
FAREWELL = 60.0

_log = logging.getLogger(__name__)


class RemoteTraceback(Exception):
    """The traceback of another process, as text."""


@dataclass(eq=False)
class _Peer:
    channel: Channel
    payloads: Remembered = field(default_factory=Remembered)
    rankings: OrderedDict[str, None] = field(default_factory=OrderedDict)
    tasks: dict[int, Dispatch] = field(default_factory=dict)
    threads: list[threading.Thread] = field(default_factory=list)
    failure: HostError | None = None
    late: bool = False


class Absent(NamedTuple):
    """Processes that did not end a training which nobody needs any more, by name.

    Attributes:
        late: have said goodbye all the same, and end.
        silent: have not.
        threads: of this process, that wait for the silent ones.
    """

    late: tuple[str, ...] = ()
    silent: tuple[str, ...] = ()
    threads: tuple[threading.Thread, ...] = ()


class Pool:
    """Trains on the processes behind `channels`, and here.

    Args:
        channels: one for each process that runs `fedgmr_plugin.runtimes.distributed.worker.serve`.
        local: trains a dispatch in this process; None leaves it free for the server.
        work: of a client's training, in any unit: what costs are guessed from before they are measured.

    Attributes:
        traffic: bytes of values that were sent (``down``) and received (``up``).
        busy: seconds of training, by who trained.
    """

    def __init__(
        self, channels: Sequence[Channel], local: Train | None = None, work: Work = lambda client: 1.0
    ) -> None:
        self._local = local
        self._peers = [_Peer(channel) for channel in channels]
        self._tasks = Tasks(work)
        self._done: dict[int, LocalUpdate] = {}
        self._changed = threading.Condition()
        self._closed = self._early = False
        self._failure: HostError | None = None
        self.traffic: Counter[str] = Counter()
        self.busy: defaultdict[str, float] = defaultdict(float)
        for peer in self._peers:
            for life in (self._give, self._take, self._beat):
                thread = threading.Thread(target=self._guarded, args=(life, peer), daemon=True)
                peer.threads.append(thread)
                thread.start()

    # -- the executor ----------------------------------------------------------------------------------

    def begin(self, sent: Dispatch) -> None:
        """See `Executor`: whoever is free may train it from now on."""
        with self._changed:
            self._tasks.add(sent)
            self._changed.notify_all()

    def finish(self, sent: Sequence[Dispatch]) -> list[LocalUpdate]:
        """See `Executor`.

        Raises:
            HostError: GMR-507 if a process is gone, or has failed in a training of `sent`; the others are
                stopped.
        """
        missing = {d.dispatch for d in sent}
        with self._changed:
            held = {n for peer in self._peers for n in peer.tasks}
            self._tasks.need(d for d in sent if d.dispatch not in self._done and d.dispatch not in held)
            self._changed.notify_all()
        while (task := self._own_task(missing)) is not None and self._local is not None:
            started = time.perf_counter()
            update = self._local(task)
            self._finished(task, update, "rank 0", time.perf_counter() - started)
        if self._failure is not None:
            self.close(PATIENCE)
            raise self._failure
        return [self._done.pop(d.dispatch) for d in sent]

    def _own_task(self, missing: set[int]) -> Dispatch | None:
        """What this process trains next; None when no update is missing any more, or something failed."""
        with self._changed:
            while True:
                missing.difference_update(self._done)
                self._failure = self._failure or self._failed(missing)
                if not missing or self._failure is not None:
                    return None
                task = None if self._local is None else self._tasks.take(None, ahead=False)
                if task is not None:
                    return task
                self._changed.wait()

    def _failed(self, missing: set[int]) -> HostError | None:
        """Why some of `missing` will not come: a failed process has it, or nobody is left to train it."""
        failed = [peer for peer in self._peers if peer.failure is not None]
        lost = next((peer for peer in failed if not missing.isdisjoint(peer.tasks)), None)
        if lost is None and failed and self._local is None and len(failed) == len(self._peers):
            lost = failed[0]
        return None if lost is None else lost.failure

    def _finished(self, task: Dispatch, update: LocalUpdate, who: str, seconds: float) -> None:
        with self._changed:
            self._tasks.costs.learn(task, seconds)
            self.busy[who] += seconds
            self._done[task.dispatch] = update
            self._changed.notify_all()

    def close(self, patience: float | None = None) -> Absent:
        """Stop the processes.

        Args:
            patience: None at the end of a run, to let them end what they are at within `FAREWELL`; before,
                seconds that they have for it.
        """
        with self._changed:
            self._closed, self._early = True, patience is not None
            self._changed.notify_all()
        give_up = time.monotonic() + (FAREWELL if patience is None else patience)

        def join(thread: threading.Thread) -> None:
            thread.join(max(0.0, give_up - time.monotonic()))

        for peer in self._peers:
            join(peer.threads[0])
            peer.channel.close()
        for peer in self._peers:
            join(peer.threads[1])
        silent = [peer for peer in self._peers if peer.threads[1].is_alive()]
        return Absent(
            tuple(peer.channel.name for peer in self._peers if peer.late),
            tuple(peer.channel.name for peer in silent),
            tuple(thread for peer in silent for thread in peer.threads),
        )

    # -- one process -----------------------------------------------------------------------------------

    def _guarded(self, life: Callable[[_Peer], None], peer: _Peer) -> None:
        """A thread's life; whatever ends it early ends the run."""
        name = peer.channel.name
        try:
            life(peer)
        except Gone as gone:
            self._fail(HostError("GMR-507", f"{name} is gone: {gone}", where=name))
        except Exception as error:  # noqa: BLE001  (a thread's error would be lost)
            failure = HostError("GMR-507", f"{name}: {type(error).__name__}: {error}", where=name)
            failure.__cause__ = error
            self._fail(failure)

    def _fail(self, failure: HostError) -> None:
        with self._changed:
            if not self._closed and self._failure is None:
                self._failure = failure
            self._changed.notify_all()

    def _give(self, peer: _Peer) -> None:
        """Give tasks to a process until the end."""
        trainers = len(self._peers) + (self._local is not None)
        while True:
            with self._changed:
                task = None
                while not self._closed:
                    if len(peer.tasks) < DEPTH and self._failure is None and peer.failure is None:
                        busy = bool(peer.tasks)
                        task = self._tasks.take(peer.channel.name, trainers * busy, ahead=not busy)
                    if task is not None:
                        peer.tasks[task.dispatch] = task
                        break
                    self._changed.wait()
            if task is None:
                peer.channel.send(frame("stop", early=self._early))
                return
            self._send(peer, task)

    def _send(self, peer: _Peer, sent: Dispatch) -> None:
        ranking = sent.ranking
        if ranking.digest not in peer.rankings:
            message = _ranking_frame(ranking)
            self._count("down", message)
            peer.channel.send(message)
        remember_ranking(peer.rankings, ranking.digest, None)
        parts = peer.payloads.parts(sent)
        values = parts.travelling(sent.values_S)
        peer.payloads.remember(sent.version, ranking.digest, sent.values_S)
        message = frame(
            "task",
            values,
            ranking=ranking.digest,
            size=len(sent.values_S),
            parts=list(parts),
            task=[
                sent.dispatch,
                sent.client,
                sent.version,
                sent.count,
                sent.density,
                sent.rung,
                sent.learning_rate_scale,
            ],
        )
        self._count("down", message)
        peer.channel.send(message)

    def _count(self, way: str, message: Frame) -> None:
        with self._changed:
            self.traffic[way] += message.values.nbytes

    def _take(self, peer: _Peer) -> None:
        """Take what a process answers until it says goodbye."""
        while True:
            message = peer.channel.receive()
            kind = message.head["kind"]
            if kind == "bye":
                peer.late = message.head["late"]
                return
            if kind == "failure":
                self._note_failure(peer, message)
            elif kind == "update":
                self._count("up", message)
                task = peer.tasks[message.head["dispatch"]]
                update = _update(task, message)
                with self._changed:  # at every moment a task is waiting, held or done
                    del peer.tasks[task.dispatch]
                    self._finished(task, update, peer.channel.name, message.head["seconds"])

    def _note_failure(self, peer: _Peer, message: Frame) -> None:
        """Of a training that is needed, or will be, or will not: `finish` learns it where it is."""
        failure = HostError("GMR-507", message.head["last"], where=peer.channel.name)
        failure.__cause__ = RemoteTraceback(f"\n{text_of(message)}")
        _log.warning("%s trains no more: %s", peer.channel.name, message.head["last"])
        with self._changed:
            peer.failure = failure
            self._changed.notify_all()

    def _beat(self, peer: _Peer) -> None:
        """Signs of life, for a process that waits for a long evaluation."""
        while not self._closed:
            with self._changed:
                self._changed.wait_for(lambda: self._closed, HEARTBEAT)
            if not self._closed:
                peer.channel.send(frame("alive"))


class Workers:
    """An `Executor` on a pool that begins with the first dispatch.

    Args:
        start: makes the pool.

    Attributes:
        absent: who had not ended when the pool was closed.
    """

    def __init__(self, start: Callable[[], Pool]) -> None:
        self.absent = Absent()
        self._start = start
        self._pool: Pool | None = None

    @property
    def pool(self) -> Pool:
        """The processes that train."""
        if self._pool is None:
            self._pool = self._start()
        return self._pool

    def begin(self, sent: Dispatch) -> None:
        """See `Executor`."""
        self.pool.begin(sent)

    def finish(self, sent: Sequence[Dispatch]) -> list[LocalUpdate]:
        """See `Executor`.

        Raises:
            HostError: GMR-507 as `Pool.finish`.
        """
        return self.pool.finish(sent)

    def close(self, patience: float | None = None) -> None:
        """See `Pool.close`; nothing where no pool has begun."""
        if self._pool is not None:
            self.absent = self._pool.close(patience)
            self._pool = None


def _ranking_frame(ranking: Ranking) -> Frame:
    rung_D = ranking.rung_D if len(ranking.densities) > 126 else ranking.rung_D.to(torch.int8)
    return frame("ranking", rung_D, digest=ranking.digest, densities=list(ranking.densities))


def _update(task: Dispatch, message: Frame) -> LocalUpdate:
    head = message.head
    values_S = message.values.to(task.values_S.device)
    return LocalUpdate(task.dispatch, task.client, values_S, head["change_sq"], LocalStats(*head["stats"]))


def remember_ranking(rankings: OrderedDict[str, Any], digest: str, ranking: Any) -> None:
    """Note that a ranking was used; beyond `RANKINGS`, the one that was not for longest is forgotten."""
    rankings[digest] = ranking
    rankings.move_to_end(digest)
    if len(rankings) > RANKINGS:
        rankings.popitem(last=False)
