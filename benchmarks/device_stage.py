"""A run with devices whose every step is somebody else's choice: what the fuzzer and the kill tests drive.

The server is the real one (`LiveRun`, its office, desk, journal, checkpoints), and so are the devices.
Between them nothing moves by itself: messages, objects, trainings and crashes happen when a rule says so, and
the clock stands still until a rule moves it, by multiples of 1/1024 s, so that times are exact.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fedgmr_plugin.config import FedGMRConfig, effective
from fedgmr_plugin.engine.client import LocalUpdate
from fedgmr_plugin.engine.events import Dispatch
from fedgmr_plugin.engine.examiner import Examiner
from fedgmr_plugin.engine.samples import BatchPlan, TensorSamples, in_batches
from fedgmr_plugin.engine.seeds import isolated_rng
from fedgmr_plugin.engine.server import Plan, Server
from fedgmr_plugin.engine.trainer import BuiltinTrainer, LocalStats
from fedgmr_plugin.engine.workbench import HeldOut, Training, Workbench
from fedgmr_plugin.errors import WireError
from fedgmr_plugin.kernels.layout import ModelLayout, build_layout
from fedgmr_plugin.protocol.desk import Desk
from fedgmr_plugin.protocol.pieces import Piece, Pieces
from fedgmr_plugin.protocol.runlog import LOG_NAME, RunLogWriter
from fedgmr_plugin.protocol.schema import SCHEMA
from fedgmr_plugin.runtimes.command import Command
from fedgmr_plugin.runtimes.devices.codecs import codec_of
from fedgmr_plugin.runtimes.devices.device import Device
from fedgmr_plugin.runtimes.devices.live_run import Clock, LiveRun, token_of
from fedgmr_plugin.runtimes.devices.loopback import announced
from fedgmr_plugin.runtimes.devices.memory import Memory
from fedgmr_plugin.runtimes.devices.office import Content, Fetched, Hands, Office
from fedgmr_plugin.runtimes.devices.plain import PlainOffice

#: FedML's run, and the devices' keys by their ids.
RUN = "7"
DEVICES = 3
KEYS = {n: bytes([n]) * 32 for n in range(1, DEVICES + 1)}
SEED = 3
OPTIONS: dict[str, Any] = {
    "densities": (1.0, 0.5, 0.25),
    "interval": 3,
    "patience": 1,
    "window_slack": 0.125,
    "answer_deadline": 8.0,
    "retry_seconds": 2.0,
    "progress": False,
}
HEARTBEAT = 2.0


def model() -> nn.Module:
    """31 parameters, the same at every call."""
    with isolated_rng(5):
        return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3))


LAYOUT = build_layout(model())


def samples(count: int, seed: int) -> TensorSamples:
    """The class is the largest of three features."""
    x = torch.randn(count, 3, generator=torch.Generator().manual_seed(seed))
    return TensorSamples(x, x.argmax(1))


HELD, TEST = samples(8, 1), samples(8, 2)


def answer(sent: Dispatch) -> LocalUpdate:
    """Instead of training: a change in sixteenths, the same for the same dispatch."""
    generator = torch.Generator().manual_seed(1000 * sent.client + sent.dispatch)
    values_D = torch.randint(-8, 9, (LAYOUT.size,), generator=generator) / 16
    values_S = values_D[sent.index_S]  # by coordinate: a device's order of them is its own
    stats = LocalStats(1 + sent.dispatch % 5, 2, 0.5, 0.0)
    return LocalUpdate(sent.dispatch, sent.client, values_S, float(values_S.square().sum()), stats)


class StageClock(Clock):
    """The clock of a run, on the stage's."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        super().__init__()

    def start(self, at: float) -> None:
        self._at, self._then = at, self._now()

    def __call__(self) -> float:
        return self._at + self._now() - self._then


class Inbox(queue.Queue[Any]):
    """An inbox that nobody waits at."""

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        return super().get(block=False)


class StageLink:
    """See `fedgmr_plugin.runtimes.devices.live_run.Connected`; `hands` publish."""

    refused = None
    connected = threading.Event()

    def publish(self, topic: str, payload: bytes, *, at_most_once: bool = False) -> None:
        raise NotImplementedError

    def keep(self, topic: str, payload: bytes) -> None:
        """Nothing is retained here."""

    def claim(self) -> bool:
        """Nobody else serves the run."""
        return True

    def start(self) -> None:
        """Nothing to connect to."""

    def stop(self, patience: float = 5.0) -> None:
        """Nothing to leave."""


class StageHands:
    """Puts, messages and deletes in their order, each when `work` is called; fetches when `fetched` is.

    Args:
        objects: the store.
        publish: takes a message.
        call: has a fetch's callback called.
        at_once: whether everything but fetches happens immediately.
    """

    def __init__(
        self,
        objects: dict[str, bytes],
        publish: Callable[[str, bytes], None],
        call: Callable[[Callable[[], None]], None] = lambda action: action(),
        *,
        at_once: bool,
    ) -> None:
        self._objects, self._publish, self._call, self._at_once = objects, publish, call, at_once
        self._jobs: deque[tuple[Any, ...]] = deque()
        self.fetches: list[tuple[Piece, Fetched]] = []

    def put(self, piece: Piece, content: Content) -> None:
        self._give("put", piece, bytes(content))

    def publish(
        self,
        topic: str,
        payload: bytes,
        then: Callable[[], None] | None = None,
        *,
        at_most_once: bool = False,
    ) -> None:
        self._give("publish", topic, payload, then)

    def delete(self, keys: Sequence[str]) -> None:
        if keys:
            self._give("delete", list(keys))

    def fetch(self, piece: Piece, then: Fetched) -> None:
        self.fetches.append((piece, then))

    def unsent(self) -> list[tuple[Piece, Content]]:
        return [(job[1], job[2]) for job in self._jobs if job[0] == "put"]

    def undeleted(self) -> list[str]:
        return [key for job in self._jobs if job[0] == "delete" for key in job[1]]

    def is_stuck(self) -> bool:
        return False

    def start(self) -> None:
        """For `LiveRun`."""

    def flush(self, patience: float) -> bool:
        """For `LiveRun`."""
        self.work()
        return True

    def close(self) -> None:
        """For `LiveRun`: what was not carried out is forgotten."""

    def sweep(self, prefixes: Sequence[str], is_needless: Callable[[str], bool], patience: float) -> None:
        """For `LiveRun`: nothing is left to be swept."""

    @property
    def jobs(self) -> int:
        """What has not been carried out."""
        return len(self._jobs)

    def work(self, most: int = 2**30) -> None:
        """Carry out the next jobs."""
        while self._jobs and most > 0:
            job = self._jobs.popleft()
            if job[0] == "put":
                self._objects[job[1].key] = job[2]
            elif job[0] == "publish":
                self._publish(job[1], job[2])
                if job[3] is not None:
                    self._call(job[3])
            else:
                for key in job[1]:
                    self._objects.pop(key, None)
            most -= 1

    def fetched(self, place: int, *, lost: bool = False) -> None:
        """Let a fetch end: with the object, if it is there and not `lost`."""
        piece, then = self.fetches.pop(place)
        content = None if lost else self._objects.get(piece.key)
        problem = announced(piece, content)
        found = problem if problem is not None or content is None else bytearray(content)
        self._call(lambda: then(found if found is not None else WireError("GMR-746", piece.key)))

    def _give(self, *job: Any) -> None:
        self._jobs.append(job)
        if self._at_once:
            self.work()


def configuration(**options: Any) -> FedGMRConfig:
    """Options of a staged run."""
    return FedGMRConfig(**{**OPTIONS, **options})


def live_run(
    directory: Path,
    config: FedGMRConfig,
    windows: int,
    hands: Hands,
    now: Callable[[], float],
    inbox: queue.Queue[Any] | None = None,
    on_record: Callable[[dict[str, Any]], None] = lambda record: None,
    make: Callable[[], nn.Module] = model,
) -> LiveRun:
    """The server of a run, new or (where the directory has one) to be continued.

    Args:
        make: the initial model.
    """
    resumed = (directory / LOG_NAME).exists()
    directory.mkdir(parents=True, exist_ok=True)
    shipped = make()
    layout = build_layout(shipped)
    w_D = layout.gather(shipped)
    server = Server(config, Plan(SEED, windows, DEVICES, 4, (1,) * DEVICES), layout, w_D)
    training = Training(BuiltinTrainer(), BatchPlan(8, 2, 1, True, SEED), 0.1)
    bench = Workbench(config, layout, shipped, HeldOut(HELD, SEED, DEVICES), training)
    token = token_of(directory, resumed)
    wall = lambda: int(now() * 1000)  # noqa: E731
    plain = config.device_submodel != "wire"
    desk = Desk(RUN, 0, sorted(KEYS), None if plain else KEYS, rate=1e6, burst=1e6, wall_clock=wall)
    clock = StageClock(now)
    run: LiveRun
    given = (
        server,
        Examiner(server, bench, lambda: in_batches(TEST, 8)),
        lambda fields: run.record(fields),
        desk,
        Pieces(RUN, token),
        token,
        hands,
        clock,
    )
    office: Office
    if plain:
        office = PlainOffice(
            *given, codec=codec_of(config, make(), layout, (1, *HELD.take(np.arange(1))[0].shape[1:]))
        )
    else:
        office = Office(*given)
    run = LiveRun(
        office.live,
        shipped,
        header(config, windows, layout),
        directory,
        on_record,
        Command("", [], "", 1),
        resumed=resumed,
        office=office,
        hands=hands,  # type: ignore[arg-type]
        link=StageLink(),
        inbox=inbox or Inbox(),
        clock=clock,
    )
    return run


def header(config: FedGMRConfig, windows: int, layout: ModelLayout) -> dict[str, Any]:
    """The run log's first record."""
    return {
        "type": "header",
        "schema": SCHEMA,
        "method": "fedgmr",
        "run_name": "staged",
        "seed": SEED,
        "config": effective(config),
        "fedml": {},
        "versions": {},
        "clients": DEVICES,
        "client_samples": [1] * DEVICES,
        "densities": list(config.initial_densities(DEVICES)),
        "layout": {"size": layout.size, "prunable": layout.prunable, "dtype": "float32", "layers": []},
        "model_megabytes": 4e-6 * layout.size,
        "eta": 0.1,
        "local_steps": 2,
        "windows": windows,
        "time_budget": None,
    }


def opened(run: LiveRun) -> RunLogWriter:
    """Begin or continue a run as `LiveRun.train` does, up to its loop; the writer of its log."""
    run._write_config = lambda: None  # type: ignore[method-assign]  # slow, and read by nobody here
    checkpoint = run._prepare()
    writer = RunLogWriter(
        run.directory,
        overwrite=run.resumed,
        resume_at=None if checkpoint is None else checkpoint.meta["log_bytes"],
    )
    run._writer = writer
    run._progress = _Silent()  # type: ignore[assignment]
    if checkpoint is None:
        writer.write(run.header)
    run._open(checkpoint)
    return writer


class _Silent:
    def record(self, fields: dict[str, Any]) -> None:
        pass


def device(
    n: int,
    hands: Hands,
    memory: Memory,
    now: Callable[[], float],
    train: Callable[[Dispatch, Callable[[LocalUpdate], None]], None],
) -> Device:
    """Device of client n, whose id is n + 1."""
    wall = lambda: int(now() * 1000)  # noqa: E731
    return Device(RUN, 0, n + 1, KEYS[n + 1], LAYOUT, 4 + n, train, hands, memory, now, HEARTBEAT, None, wall)
