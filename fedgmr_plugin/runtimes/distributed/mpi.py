"""Ranks of an MPI job. One thread of each process talks to MPI; it sleeps where MPI itself would spin."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from typing import Any

import numpy as np

from fedgmr_plugin.errors import HostError
from fedgmr_plugin.runtimes.distributed.channel import Frame, Gone, packed, unpacked

_TAG = 1
#: Bytes of one MPI message at most: counts are 32-bit integers in MPI 3.
_PIECE = 2**30
#: Shortest and longest sleep between two looks for messages, seconds.
_NAPS = (2e-5, 4e-4)


class MPIRanks:
    """The ranks of a communicator, of which this process is one.

    Args:
        comm: mpi4py's; duplicated, so that nobody else's messages are met.
        silence: seconds without a sign of life after which a rank is given up.

    Raises:
        HostError: GMR-509 if MPI does not allow a thread to use it.
    """

    def __init__(self, comm: Any, silence: float = 300.0) -> None:
        from mpi4py import MPI

        if MPI.Query_thread() < MPI.THREAD_SERIALIZED:
            raise HostError("GMR-509", f"MPI was initialised with thread level {MPI.Query_thread()}")
        self._mpi, self._comm = MPI, comm.Dup()
        self.rank, self.size = self._comm.Get_rank(), self._comm.Get_size()
        self._silence = silence
        self._out: queue.SimpleQueue[tuple[int, memoryview]] = queue.SimpleQueue()
        self._in: dict[int, queue.SimpleQueue[Any]] = {n: queue.SimpleQueue() for n in range(self.size)}
        self._thread: threading.Thread | None = None
        self._closing = threading.Event()

    def gather(self, text: str) -> list[str]:
        """One text of every rank, in their order, on every rank; before any channel is used."""
        own = np.frombuffer(text.encode(), dtype=np.uint8)
        lengths = np.empty(self.size, dtype=np.int64)
        self._comm.Allgather(np.array([len(own)], dtype=np.int64), lengths)
        texts = np.empty(int(lengths.sum()), dtype=np.uint8)
        starts = np.concatenate([[0], lengths.cumsum()[:-1]])
        self._comm.Allgatherv(own, [texts, lengths, starts, self._mpi.BYTE])
        return [texts[a : a + n].tobytes().decode() for a, n in zip(starts, lengths, strict=True)]

    def channel(self, peer: int) -> MPIChannel:
        """Messages to a rank and from it."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, daemon=True)
            self._thread.start()
        return MPIChannel(self, peer)

    def close(self, complete: bool = True) -> None:
        """Send what is to be sent, and stop; every peer has to be there to take it."""
        self._closing.set()
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.join()

    def put(self, peer: int, data: memoryview) -> None:
        """Send bytes to a rank."""
        self._out.put((peer, data))

    def get(self, peer: int) -> bytearray:
        """The next bytes from a rank.

        Raises:
            Gone: MPI failed, or the rank was silent too long.
        """
        try:
            found = self._in[peer].get(timeout=self._silence)
        except queue.Empty as error:
            raise Gone(f"no sign of life for {self._silence:.0f} s") from error
        if isinstance(found, BaseException):
            self._in[peer].put(found)  # for whoever asks next
            raise Gone(str(found)) from found
        return found

    def _work(self) -> None:
        try:
            self._exchange()
        except Exception as error:  # noqa: BLE001  (told to whoever waits)
            for inbox in self._in.values():
                inbox.put(error)

    def _exchange(self) -> None:
        """Carry messages until closed and all are sent."""
        sending: deque[Any] = deque()  # (request, memory it reads)
        pieces: dict[int, tuple[bytearray, int]] = {}
        nap = _NAPS[0]
        status = self._mpi.Status()
        while True:
            moved = self._start_sends(sending)
            while sending and sending[0][0].Test():
                sending.popleft()
            if self._comm.Iprobe(self._mpi.ANY_SOURCE, _TAG, status):
                self._receive(status.Get_source(), status.Get_count(self._mpi.BYTE), pieces)
                moved = True
            if self._closing.is_set() and not sending and self._out.empty():
                return
            nap = _NAPS[0] if moved else min(2 * nap, _NAPS[1])
            if not moved:
                time.sleep(nap)

    def _start_sends(self, sending: deque[Any]) -> bool:
        started = False
        while not self._out.empty():
            peer, data = self._out.get()
            length = np.array([len(data)], dtype=np.int64)
            for part in [length, *(data[a : a + _PIECE] for a in range(0, len(data), _PIECE))]:
                sending.append((self._comm.Isend([part, self._mpi.BYTE], peer, _TAG), part))
            started = True
        return started

    def _receive(self, peer: int, count: int, pieces: dict[int, tuple[bytearray, int]]) -> None:
        """One MPI message: the length of what follows, or a piece of it."""
        if peer not in pieces:
            length = np.empty(1, dtype=np.int64)
            self._comm.Recv([length, self._mpi.BYTE], peer, _TAG)
            pieces[peer] = bytearray(int(length[0])), 0
            return
        data, filled = pieces[peer]
        self._comm.Recv([memoryview(data)[filled : filled + count], self._mpi.BYTE], peer, _TAG)
        pieces[peer] = data, filled + count
        if filled + count == len(data):
            self._in[peer].put(data)
            del pieces[peer]


class MPIChannel:
    """See `Channel`."""

    def __init__(self, ranks: MPIRanks, peer: int) -> None:
        self._ranks, self._peer = ranks, peer
        self.name = f"rank {peer}"

    def send(self, message: Frame) -> None:
        """See `Channel`; what is sent is copied first."""
        self._ranks.put(self._peer, packed(message))

    def receive(self) -> Frame:
        """See `Channel`."""
        return unpacked(self._ranks.get(self._peer))

    def close(self) -> None:
        """Nothing: the rank ends by itself."""
