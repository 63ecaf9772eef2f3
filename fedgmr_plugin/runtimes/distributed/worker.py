"""The life of a process that trains for a server in another one.

A thread receives tasks while this one trains: what is next has arrived when the present task is done.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
import traceback
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress

import torch

from fedgmr_plugin.engine.client import LocalUpdate
from fedgmr_plugin.engine.events import Dispatch
from fedgmr_plugin.errors import FedGMRError
from fedgmr_plugin.kernels.masks import Ranking
from fedgmr_plugin.runtimes.distributed import pool
from fedgmr_plugin.runtimes.distributed.channel import Channel, Frame, Gone, frame, text_frame
from fedgmr_plugin.runtimes.distributed.payloads import Parts, Remembered

_log = logging.getLogger(__name__)


class Failed(Exception):
    """The run has ended before its end: training failed here, and the server knows, or elsewhere."""


class _Inbox:
    """Receives in a thread of its own: tasks in their order, then None.

    Args:
        device: where payloads are wanted.
        late: is called where the run has ended and `served` is not set within half of `pool.FAREWELL`.
    """

    def __init__(
        self, channel: Channel, device: torch.device, served: threading.Event, late: Callable[[], None]
    ) -> None:
        self._channel, self._device, self._served, self._late = channel, device, served, late
        self._payloads = Remembered()
        self._rankings: OrderedDict[str, Ranking] = OrderedDict()
        self._tasks: queue.SimpleQueue[Dispatch | None] = queue.SimpleQueue()
        self.stopped = threading.Event()
        self.early = False
        self.lost: BaseException | None = None
        threading.Thread(target=self._receive, daemon=True).start()

    def get(self) -> Dispatch | None:
        """The next task; None when there is to be no more."""
        task = self._tasks.get()
        return None if self.stopped.is_set() else task

    def _receive(self) -> None:
        try:
            while True:
                message = self._channel.receive()
                kind = message.head["kind"]
                if kind == "stop":
                    self.early = message.head["early"]
                    break
                if kind == "ranking":
                    self._learn(message)
                elif kind == "task":
                    self._tasks.put(self._task(message))
        except BaseException as error:  # noqa: BLE001  (told by whoever waits for tasks)
            self.lost = error
        self.stopped.set()
        self._tasks.put(None)
        if self.lost is None and not self.early and not self._served.wait(pool.FAREWELL / 2):
            self._late()

    def _learn(self, message: Frame) -> None:
        rung_D = message.values.to(torch.int16).to(self._device)
        ranking = Ranking(tuple(message.head["densities"]), rung_D)
        pool.remember_ranking(self._rankings, message.head["digest"], ranking)

    def _task(self, message: Frame) -> Dispatch:
        head = message.head
        dispatch, client, version, count, density, rung, scale = head["task"]
        ranking = self._rankings[head["ranking"]]
        pool.remember_ranking(self._rankings, head["ranking"], ranking)
        parts = Parts(*head["parts"])
        arrived = message.values.to(self._device)
        values_S = parts.joined(arrived, self._payloads.payload(parts.base), head["size"])
        self._payloads.remember(version, head["ranking"], values_S)
        return Dispatch(dispatch, client, version, count, density, ranking, rung, values_S, scale)


def serve(
    channel: Channel,
    train: Callable[[Dispatch], LocalUpdate],
    device: torch.device | str = "cpu",
    *,
    beats: bool = True,
    leave: Callable[[], None] = lambda: None,
) -> None:
    """Train what comes through `channel` until the server says stop.

    Args:
        train: trains one dispatch.
        device: where payloads are wanted.
        beats: send signs of life: the other side has no other way to know.
        leave: ends this process; called from another thread after the goodbye, where the run has ended long
            ago and `train` has not.

    Raises:
        Failed: `train` raised, and the server has been told; or the server has stopped the run. Not where the
            run has come to its end without that training.
        Gone: the server does not answer any more.
    """
    ended = threading.Event()
    if beats:
        threading.Thread(target=_beat, args=(channel, ended), daemon=True).start()

    def late() -> None:
        with suppress(Gone):
            channel.send(frame("bye", late=True))
        leave()

    inbox = _Inbox(channel, torch.device(device), ended, late)
    try:
        while (task := inbox.get()) is not None:
            started = time.perf_counter()
            try:
                update = train(task)
            except (Exception, SystemExit) as error:
                _confess(channel, task, error)
                inbox.stopped.wait()
                if inbox.lost is None:
                    channel.send(frame("bye", late=False))
                if inbox.lost is not None or inbox.early:
                    raise Failed(str(error)) from error
                _log.warning("client=%d: training failed, but nobody needs it", task.client, exc_info=error)
                return
            seconds = time.perf_counter() - started
            channel.send(
                frame(
                    "update",
                    update.values_S,
                    dispatch=update.dispatch,
                    change_sq=update.change_sq,
                    stats=list(update.stats),
                    seconds=seconds,
                )
            )
    finally:
        ended.set()
    if isinstance(inbox.lost, BaseException):
        raise inbox.lost
    channel.send(frame("bye", late=False))
    if inbox.early:
        raise Failed("the server has stopped the run")


def _confess(channel: Channel, task: Dispatch, error: BaseException) -> None:
    trace = "".join(traceback.format_exception(error))
    if isinstance(error, FedGMRError):
        last = f"{error.code} {error.message}"
    else:
        last = f"client={task.client}: {type(error).__name__}: {error}"
    channel.send(text_frame("failure", trace, last=last[:500]))


def _beat(channel: Channel, ended: threading.Event) -> None:
    try:
        while not ended.wait(pool.HEARTBEAT):
            channel.send(frame("alive"))
    except Gone:
        return  # whoever receives learns it too
