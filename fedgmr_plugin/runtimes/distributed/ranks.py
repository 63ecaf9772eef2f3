"""FedML's multi-process simulators: every rank trains, rank 0 also has the server.

    mpirun -np 4 python -m fedgmr_plugin main.py --cf fedml_config.yaml                    backend: "MPI"
    torchrun --nproc_per_node=4 -m fedgmr_plugin main.py --cf fedml_config.yaml            backend: "NCCL"

Each rank runs the user's script and has its own model, data and trainer. Rank 0 owns the run: clock, log,
checkpoints, report. The others train what they are sent; see `fedgmr_plugin.runtimes.distributed.pool`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType
from typing import Any, NoReturn, Protocol

import click
import numpy as np
import torch
from torch import Tensor, nn

from fedgmr_plugin import __version__
from fedgmr_plugin.config import effective
from fedgmr_plugin.engine.seeds import isolated_rng
from fedgmr_plugin.errors import HostError
from fedgmr_plugin.runtimes import resume
from fedgmr_plugin.runtimes.distributed import job
from fedgmr_plugin.runtimes.distributed.channel import Channel, Gone
from fedgmr_plugin.runtimes.distributed.pool import PATIENCE, Pool, Workers
from fedgmr_plugin.runtimes.distributed.worker import Failed, serve
from fedgmr_plugin.runtimes.recorded import threads
from fedgmr_plugin.runtimes.run import Run, assemble
from fedgmr_plugin.runtimes.settings import as_mapping
from fedgmr_plugin.runtimes.setup import Setup, prepare

_log = logging.getLogger(__name__)
#: Options that only rank 0 acts on.
OF_RANK_0 = job.RECORDING | {"workers"}


class Ranks(Protocol):
    """The processes of a job: `MPIRanks`, `TorchRanks`."""

    rank: int
    size: int

    def gather(self, text: str) -> list[str]: ...

    def channel(self, peer: int) -> Channel: ...

    def close(self, complete: bool = True) -> None: ...


@dataclass
class Server:
    """Rank 0 of a job: a run, for which the other ranks train too.

    Attributes:
        here: ids of the processes of this machine, by their rank.
    """

    run: Run
    ranks: Ranks
    workers: Workers
    here: dict[int, int]

    def train(self) -> None:
        """See `Run.train`; the other ranks return when its last record is written.

        A rank that does not within a minute, because it is in a training that nobody needs, is left behind.
        """
        with _terminable():
            _ = self.workers.pool  # signs of life, and the end, for ranks that may have nothing to train
            try:
                self.run.train()
            finally:
                self.workers.close(PATIENCE)  # nothing, where the run has ended them
        absent = self.workers.absent
        for name in absent.late + absent.silent:
            _say(f"{name} is left behind in a training that nobody needs")
            job.leave_behind(name)
        if not absent.silent:
            self.ranks.close(complete=not absent.late)
            job.finished()
            return
        numbers = [int(name.split()[-1]) for name in absent.silent]
        for number in set(numbers) - self.here.keys():
            _say(f"rank {number} is on another machine: under torchrun, see that it ends")
        job.finished([self.here[n] for n in numbers if n in self.here], absent.threads)


@dataclass
class Helper:
    """Another rank: trains for rank 0. Its model is scratch, and holds nothing of the run's afterwards."""

    setup: Setup
    ranks: Ranks

    def train(self) -> None:
        """Train what comes until rank 0 says that the run is over.

        Raises:
            HostError: GMR-507 if rank 0 is gone.
            SystemExit: the run has failed; rank 0 says why.
        """
        channel, bench = self.ranks.channel(0), self.setup.bench
        try:
            with _deaf_to_interrupts(), threads(self.setup.config.cpu_threads):
                serve(channel, bench.train, self.setup.device, leave=self._leave)
        except Gone as gone:
            raise HostError("GMR-507", f"rank 0 is gone: {gone}", where=f"rank {self.ranks.rank}") from None
        except Failed as failed:
            _log.error("rank %d: %s", self.ranks.rank, failed)
            with suppress(Gone):
                while True:  # until rank 0 has said why and has ended: the launcher ends all then
                    channel.receive()
            job.give_up(1)
        bench.reset()
        self.ranks.close()
        job.finished()

    def _leave(self) -> None:
        """End this process, whose training does not end."""
        self.ranks.close(complete=False)
        job.leave()


def build(
    backend: str,
    args: Any,
    device: Any,
    dataset: Any,
    model: nn.Module,
    client_trainer: Any = None,
    server_aggregator: Any = None,
) -> Server | Helper:
    """This rank's part of a run, from what FedML's simulators are constructed with.

    Args:
        backend: FedML's, "MPI" or "NCCL".
        client_trainer, server_aggregator: a user's own, honoured; a trainer that remembers something between
            clients remembers those of its rank.

    Raises:
        ConfigError, ModelError, DataError: as in one process.
        HostError: GMR-508 without a launcher; GMR-510 if the ranks do not have one and the same job.
    """
    job.require_launcher(backend)
    job.must_finish(backend)
    job.require_everybody()
    setup = prepare(args, _device(args, device), dataset, model, client_trainer)
    job.check_workers(backend, setup.config.model_dump())
    ranks = _ranks(backend, args, setup.device)
    here = _agree(ranks, setup)
    if ranks.rank:
        resume.take()
        return Helper(setup, ranks)
    say_threads(setup.config.cpu_threads)
    if ranks.size > setup.keys.in_flight:
        _say(
            f"{ranks.size} ranks, but at most {setup.keys.in_flight} clients train at the same time "
            "(client_num_per_round): some ranks will wait"
        )

    def start() -> Pool:
        return Pool([ranks.channel(n) for n in range(1, ranks.size)], setup.bench.train, setup.work)

    workers = Workers(start)
    run = assemble(setup, server_aggregator, workers)
    run.again = job.again(backend, ranks.size)
    return Server(run, ranks, workers, here)


def _device(args: Any, device: Any) -> Any:
    """FedML's choice, or the GPU of the local rank where one is asked for and nothing maps ranks to GPUs."""
    wanted = getattr(args, "using_gpu", False) and not getattr(args, "gpu_mapping_file", None)
    if not wanted or not torch.cuda.is_available():
        return device
    chosen = torch.device("cuda", job.local_rank() % torch.cuda.device_count())
    torch.cuda.set_device(chosen)
    return chosen


def _ranks(backend: str, args: Any, device: torch.device) -> Ranks:
    if backend == "MPI":
        from fedgmr_plugin.runtimes.distributed.mpi import MPIRanks

        return MPIRanks(args.comm)
    from fedgmr_plugin.runtimes.distributed.collective import TorchRanks

    try:
        found = TorchRanks(device)
    except RuntimeError as error:
        raise HostError("GMR-510", f"not all ranks have come: {str(error).splitlines()[0]}") from error
    if found.rank == 0:
        because = f": {found.why}" if found.why else ""
        _say(f"{found.size} ranks; values travel through {found.transport}{because}")
    return found


def say_threads(cpu_threads: int) -> None:
    """Say what ``cpu_threads: 0`` amounts to: results depend on it, and launchers change it.

    torchrun allows each of several processes one thread, mpirun often as many as it binds it to cores.
    """
    if cpu_threads == 0:
        _say(
            f"cpu_threads=0: torch uses {torch.get_num_threads()} threads here; results depend on the number"
        )


def _say(text: str) -> None:
    _log.info("%s", text)
    click.echo(text, err=True)


def _agree(ranks: Ranks, setup: Setup) -> dict[int, int]:
    """Refuse ranks that would not work on the same thing.

    Returns:
        Ids of the processes of this machine, by their rank.

    Raises:
        HostError: GMR-510, on rank 0; the others exit.
    """
    own = [_identity(setup), socket.gethostname(), os.getpid()]
    told = [json.loads(text) for text in ranks.gather(json.dumps(own))]
    parts = [identity for identity, _, _ in told]
    misfit = _misfit(parts)
    hint = "Every rank must run the same script, with equal arguments, data and versions."
    if not misfit and ranks.size > setup.keys.clients:
        misfit = f"{ranks.size} ranks for client_num_in_total={setup.keys.clients} clients"
        hint = "Start at most one rank for each client."
    if misfit and ranks.rank:
        _leave_to_rank_0()
    if misfit:
        raise HostError("GMR-510", misfit, hint=hint)
    return {n: process for n, (_, host, process) in enumerate(told) if host == own[1]}


def _misfit(parts: list[dict[str, Any]]) -> str:
    """Which rank's part is another than rank 0's; "" if none is."""
    for what in parts[0]:
        for n, part in enumerate(parts):
            if part[what] != parts[0][what]:
                return f"{what} of rank {n} is {part[what]}, of rank 0 {parts[0][what]}"
    return ""


def _leave_to_rank_0() -> NoReturn:
    """Wait for rank 0 to say what is wrong and to end the job; end in any case."""
    time.sleep(2 * PATIENCE)
    job.give_up(1)


def _identity(setup: Setup) -> dict[str, Any]:
    """What has to be equal on all ranks; the weights do not: rank 0's are the run's."""
    config = {k: v for k, v in effective(setup.config).items() if k not in OF_RANK_0}
    fixed = b"".join(name.encode() + _raw(tensor) for name, tensor in sorted(setup.bench.fixed.items()))
    entries = [(e.name, e.kind, e.shape) for e in setup.layout.entries]
    return {
        "fedgmr": __version__,
        "torch": torch.__version__.partition("+")[0],
        "device type": setup.device.type,
        "configuration": _digest(json.dumps([config, as_mapping(setup.keys)], sort_keys=True)),
        "cpu_threads": 0
        if setup.device.type != "cpu"
        else setup.config.cpu_threads or torch.get_num_threads(),
        "model": f"{setup.layout.size} numbers, {_digest(str(entries))}",
        "buffers": _digest(fixed),
        "data": f"{sum(setup.counts)} samples, {_digest(str(setup.counts).encode() + _some_labels(setup))}",
        "trainer": type(setup.trainer).__name__,
    }


def _some_labels(setup: Setup) -> bytes:
    """The first labels of some clients: they show a partition that is another on every rank."""
    labels = []
    for client in range(0, setup.keys.clients, max(1, setup.keys.clients // 4)):
        samples = setup.bench.clients.train(client)
        with isolated_rng(0):
            _, y = samples.take(np.arange(min(16, len(samples))))
        labels.append(_raw(torch.as_tensor(y)))
    return b"".join(labels)


def _raw(tensor: Tensor) -> bytes:
    """The bytes of a tensor of any type."""
    return tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()


def _digest(data: str | bytes) -> str:
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()[:12]


@contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """Ctrl-C reaches all ranks; rank 0 answers it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _terminable() -> Iterator[None]:
    """A launcher that ends the job lets the run say how to continue."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
