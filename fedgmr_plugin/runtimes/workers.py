"""Clients of one window trained by several processes of this machine.

Every worker is a fork of the process that built the run: model, data and trainer are there already, so only
messages in the wire format travel, through pipes. What a worker computes depends on the dispatch, the
client's data and the seed alone: the model's bits are those of one process, whoever trains whom and however
long it takes.
"""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing
import signal
import traceback
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

import numpy as np
import torch

from fedgmr_plugin.engine.client import LocalStats, LocalUpdate
from fedgmr_plugin.engine.events import Dispatch
from fedgmr_plugin.errors import HostError
from fedgmr_plugin.kernels.layout import ModelLayout
from fedgmr_plugin.kernels.masks import Ranking
from fedgmr_plugin.protocol.header import Outcome
from fedgmr_plugin.protocol.messages import (
    PayloadOrder,
    dispatch_message,
    dispatched,
    update_message,
)
from fedgmr_plugin.protocol.wire import Limits, decode, encode

_log = logging.getLogger(__name__)

Train = Callable[[Dispatch], LocalUpdate]

_RUN = "workers"
#: First byte of what travels; the rest is a ranking, a dispatch, an update, or an error's text.
_RANKING, _DISPATCH, _UPDATE, _FAILURE = b"R", b"D", b"U", b"F"
#: Rankings that a worker remembers, the last used ones; both ends forget by the same rule.
_REMEMBERED = 4


@dataclass(eq=False)
class _Worker:
    process: BaseProcess
    pipe: Connection
    rankings: OrderedDict[str, Ranking] = field(default_factory=OrderedDict)
    task: int | None = None  # position in the window's dispatches; one at a time, so no pipe ever fills


class Workers:
    """An `Executor` that trains on `count` processes; `close` ends them.

    Args:
        train: trains one dispatch, in a fork of the process that calls this object first.
        layout: map of the global vector.
        count: processes.
    """

    def __init__(self, train: Train, layout: ModelLayout, count: int) -> None:
        self._train, self._count = train, count
        self._limits = Limits(layout.size, (layout.dtype,), run=_RUN)
        self._workers: list[_Worker] = []

    def __call__(self, sent: Sequence[Dispatch]) -> list[LocalUpdate]:
        """The updates of `sent`, in its order.

        Raises:
            HostError: GMR-507 if a worker failed; all of them are ended.
        """
        if not self._workers:
            for _ in range(self._count):
                self._workers.append(self._fork())
        waiting = deque(sorted(range(len(sent)), key=lambda n: -len(sent[n].values_S)))  # longest first
        updates: dict[int, LocalUpdate] = {}
        try:
            while len(updates) < len(sent):
                for worker in self._workers:
                    if waiting and worker.task is None:
                        worker.task = waiting.popleft()
                        self._send(worker, sent[worker.task])
                ready = wait([w.pipe for w in self._workers if w.task is not None])
                for worker in self._workers:
                    if worker.task is not None and worker.pipe in ready:
                        updates[worker.task] = self._receive(worker, sent[worker.task])
                        worker.task = None
        except BaseException:
            self.close()
            raise
        return [updates[n] for n in range(len(sent))]

    def close(self) -> None:
        """End the processes."""
        for worker in self._workers:
            worker.process.terminate()
            worker.pipe.close()
        for worker in self._workers:
            worker.process.join()
        self._workers = []

    def _fork(self) -> _Worker:
        context = multiprocessing.get_context("fork")
        ours, theirs = context.Pipe()
        inherited = [ours, *(w.pipe for w in self._workers)]
        process = context.Process(
            target=_serve, args=(theirs, inherited, self._train, self._limits), daemon=True
        )
        process.start()
        theirs.close()
        return _Worker(process, ours)

    def _send(self, worker: _Worker, sent: Dispatch) -> None:
        ranking = sent.ranking
        try:
            if ranking.digest not in worker.rankings:
                worker.pipe.send_bytes(_RANKING + _pack(ranking))
            _remember(worker.rankings, ranking)
            order = PayloadOrder.by_rung(ranking, sent.rung)
            worker.pipe.send_bytes(_DISPATCH + encode(dispatch_message(sent, order, run=_RUN)))
        except OSError as error:
            raise _lost(worker) from error

    def _receive(self, worker: _Worker, sent: Dispatch) -> LocalUpdate:
        try:
            data = worker.pipe.recv_bytes()
        except (EOFError, OSError) as error:
            raise _lost(worker) from error
        if data[:1] == _FAILURE:
            raise HostError("GMR-507", f"client={sent.client}: {data[1:].decode()}", where="workers")
        message = decode(data[1:], self._limits)
        outcome = message.header.outcome or Outcome(0.0)
        stats = LocalStats(outcome.steps, int(outcome.samples), outcome.train_loss, outcome.drift_sq)
        return LocalUpdate(sent.dispatch, sent.client, message.values, outcome.change_sq or 0.0, stats)


def _lost(worker: _Worker) -> HostError:
    worker.process.join(1.0)
    return HostError(
        "GMR-507", f"a worker process ended with exit code {worker.process.exitcode}", where="workers"
    )


def _pack(ranking: Ranking) -> bytes:
    densities = json.dumps(ranking.densities).encode()
    rungs = ranking.rung_D.cpu().numpy().astype("<i2").tobytes()
    return len(densities).to_bytes(4, "little") + densities + rungs


def _unpack(data: bytes) -> Ranking:
    stop = 4 + int.from_bytes(data[:4], "little")
    rungs = np.frombuffer(data[stop:], dtype="<i2").astype(np.int16)
    return Ranking(tuple(json.loads(data[4:stop])), torch.from_numpy(rungs))


def _remember(rankings: OrderedDict[str, Ranking], ranking: Ranking) -> None:
    rankings[ranking.digest] = ranking
    rankings.move_to_end(ranking.digest)
    if len(rankings) > _REMEMBERED:
        rankings.popitem(last=False)


def _serve(pipe: Connection, inherited: Sequence[Connection], train: Train, limits: Limits) -> None:
    """A worker's life: train what comes, until the parent closes its end of the pipe, or dies.

    The fork has copies of the parent's ends; open, they would keep every worker waiting for a dead parent. An
    interrupt is for the parent to answer.
    """
    for other in inherited:
        other.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    rankings: OrderedDict[str, Ranking] = OrderedDict()
    with contextlib.suppress(EOFError, OSError):
        while True:
            data = pipe.recv_bytes()
            if data[:1] == _RANKING:
                _remember(rankings, _unpack(data[1:]))
                continue
            try:
                answer = _UPDATE + _train_one(data[1:], rankings, train, limits)
            except Exception as error:  # noqa: BLE001  (whatever it is, the parent says it)
                _log.error("%s", traceback.format_exc())
                answer = _FAILURE + "".join(traceback.format_exception_only(error)).strip().encode()
            pipe.send_bytes(answer)


def _train_one(data: bytes, rankings: OrderedDict[str, Ranking], train: Train, limits: Limits) -> bytes:
    message = decode(bytearray(data), limits)
    ranking = rankings[message.header.ranking]
    _remember(rankings, ranking)
    sent = dispatched(message, ranking)
    update = train(sent)
    stats = update.stats
    outcome = Outcome(stats.samples, stats.steps, stats.train_loss, stats.drift_sq, update.change_sq)
    order = PayloadOrder.by_rung(ranking, sent.rung)
    return bytes(encode(update_message(message.header, order.cuts, update.values_S, outcome)))
