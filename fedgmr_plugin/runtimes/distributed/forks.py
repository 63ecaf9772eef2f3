"""Clients of one window trained by several processes of this machine.

Every worker is a fork of the process that built the run: model, data and trainer are there already, so only
sub-models and updates travel, through pipes.
"""

from __future__ import annotations

import multiprocessing
import signal
import threading
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import torch

from fedgmr_plugin.runtimes.distributed.channel import Frame, Gone, packed, unpacked
from fedgmr_plugin.runtimes.distributed.pool import PATIENCE, Pool, Train, Workers
from fedgmr_plugin.runtimes.distributed.tasks import Work
from fedgmr_plugin.runtimes.distributed.worker import Failed, serve


class Pipe:
    """A channel through a pipe; the parent's knows the process at its other end."""

    def __init__(self, end: Connection, name: str, process: BaseProcess | None = None) -> None:
        self.name, self.process = name, process
        self.end, self._sending = end, threading.Lock()

    def send(self, message: Frame) -> None:
        """See `Channel`."""
        try:
            with self._sending:
                self.end.send_bytes(packed(message))
        except OSError as error:
            raise Gone(self._why(error)) from error

    def receive(self) -> Frame:
        """See `Channel`."""
        try:
            return unpacked(bytearray(self.end.recv_bytes()))
        except (EOFError, OSError) as error:
            raise Gone(self._why(error)) from error

    def close(self) -> None:
        """End the process at the other end."""
        if self.process is not None:
            self.process.terminate()
            self.process.join(PATIENCE)
            self.process.kill()
            self.process.join()

    def _why(self, error: Exception) -> str:
        if self.process is None:
            return str(error)
        self.process.join(1.0)
        return f"it ended with exit code {self.process.exitcode}"


def forked(train: Train, count: int, work: Work = lambda client: 1.0) -> Workers:
    """An executor that trains on `count` processes of this machine.

    Args:
        train: trains one dispatch, in a fork of the process that gives the executor its first one.
        work: see `Pool`.
    """
    return Workers(lambda: Pool(_forks(train, count), work=work))


def _forks(train: Train, count: int) -> list[Pipe]:
    """Channels to new processes; forked all before any thread of ours starts."""
    context = multiprocessing.get_context("fork")
    pipes: list[Pipe] = []
    for number in range(count):
        ours, theirs = context.Pipe()
        inherited = [ours, *(pipe.end for pipe in pipes)]
        process = context.Process(target=_live, args=(theirs, inherited, train), daemon=True)
        process.start()
        theirs.close()
        pipes.append(Pipe(ours, f"worker {number + 1}", process))
    return pipes


def _live(end: Connection, inherited: Sequence[Connection], train: Train) -> None:
    """A worker's life.

    The fork has copies of the parent's ends; open, they would keep every worker waiting for a dead parent. An
    interrupt is for the parent to answer.
    """
    for other in inherited:
        other.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    with suppress(Gone, Failed):
        serve(Pipe(end, "the server"), train, beats=False)
