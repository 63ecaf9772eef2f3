"""A whole run with devices in one process, on a `Loopback`: for tests, load tests and experiments."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from fedgmr_plugin.config import FedGMRConfig
from fedgmr_plugin.engine.client import LocalUpdate
from fedgmr_plugin.engine.events import Dispatch
from fedgmr_plugin.engine.examiner import Examiner
from fedgmr_plugin.engine.samples import BatchPlan, Samples, in_batches
from fedgmr_plugin.engine.server import Plan, Server
from fedgmr_plugin.engine.trainer import BuiltinTrainer
from fedgmr_plugin.engine.workbench import Clients, HeldOut, Training, Workbench
from fedgmr_plugin.kernels.layout import build_layout
from fedgmr_plugin.kernels.width import rank_widths
from fedgmr_plugin.protocol.desk import Desk
from fedgmr_plugin.protocol.journal import Journal, read
from fedgmr_plugin.protocol.pieces import Pieces
from fedgmr_plugin.runtimes.devices.codecs import codec_of
from fedgmr_plugin.runtimes.devices.device import Device
from fedgmr_plugin.runtimes.devices.file_training import train_file
from fedgmr_plugin.runtimes.devices.loopback import Loopback, LoopbackHands
from fedgmr_plugin.runtimes.devices.memory import Memory
from fedgmr_plugin.runtimes.devices.office import Office
from fedgmr_plugin.runtimes.devices.plain import PlainOffice
from fedgmr_plugin.runtimes.devices.plain_device import PlainDevice

TOKEN = "0123456789abcdef"


@dataclass(frozen=True)
class Problem:
    """What is learnt.

    Attributes:
        model: makes the initial model, the same at every call.
        samples: training samples of each device.
        held, test: the server's validation and test samples.
        plan: batches.
        learning_rate: eta.
    """

    model: Callable[[], nn.Module]
    samples: Callable[[int], Samples]
    held: Samples
    test: Samples
    plan: BatchPlan
    learning_rate: float


class Field:
    """A server and its devices; device n has the id n + 1.

    Args:
        problem: what is learnt.
        config: options of the method.
        folder: of the server's journal.
        devices: N.
        windows: after which the run ends.
        world: where messages and objects pass.
        keys: the devices' keys by their ids; None for a run without.
        heartbeat: seconds.
        seconds: how long device n trains.
        rate: messages of one device a second.
        trains: what devices do instead of training; None trains.
        record: receives the run log's records; kept in `log` by default.
    """

    def __init__(
        self,
        problem: Problem,
        config: FedGMRConfig,
        folder: Path,
        devices: int,
        windows: int,
        world: Loopback,
        keys: Mapping[int, bytes] | None = None,
        heartbeat: float = 2.0,
        seconds: Callable[[int], float] = lambda n: 1.0,
        rate: float = 5.0,
        trains: Callable[[Dispatch], LocalUpdate] | None = None,
        record: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        self.problem, self.config, self.folder = problem, config, folder
        self.count, self.windows, self.world, self.keys = devices, windows, world, keys
        self.heartbeat, self.seconds, self.rate, self._trains = heartbeat, seconds, rate, trains
        self.layout = build_layout(problem.model())
        self.log: list[dict[str, Any]] = []
        self._record = record or self.log.append
        self.trained: list[tuple[int, int]] = []  # (device, dispatch), in the order in which they began
        self.devices: dict[int, Device | PlainDevice] = {}
        self._device_hands: dict[int, LoopbackHands] = {}
        self._behind = 0.0  # seconds by which the run's clock is behind the world's
        self.office = self._make_office()

    # -- the server -----------------------------------------------------------------------------------

    def parts(self) -> tuple[Server, Examiner]:
        """A server that has not started, and what measures its models."""
        problem, seed = self.problem, self.problem.plan.seed
        w_D = self.layout.gather(problem.model())
        plan = Plan(seed, self.windows, self.count, 3, (1,) * self.count)
        model = problem.model()
        masks = None
        if self.config.score == "width":
            masks = lambda w_D, densities, _: rank_widths(model, self.layout, densities)  # noqa: E731
        server = Server(self.config, plan, self.layout, w_D, masks=masks)
        bench = self._bench(HeldOut(problem.held, seed, self.count))
        return server, Examiner(server, bench, lambda: in_batches(problem.test, 512))

    def trainer_bench(self) -> Workbench:
        """Where any device's dispatch can be trained."""
        return self._bench(Clients(self.problem.samples, 0.0, 0, self.count))

    def _make_office(self) -> Office:
        desk = Desk(
            "7",
            0,
            range(1, self.count + 1),
            self.keys,
            rate=self.rate,
            burst=10 * self.rate,
            wall_clock=lambda: int(self.world.now * 1000),
        )
        self.hands = LoopbackHands(self.world)
        rest = (desk, Pieces(desk.run, TOKEN), TOKEN, self.hands, self.clock)
        common: tuple[Any, ...] = (self._record, *rest)
        if self.config.device_submodel != "wire":
            codec = codec_of(self.config, self.problem.model(), self.layout, self._input_shape)
            return PlainOffice(*self.parts(), *common, codec=codec)
        return Office(*self.parts(), *common)

    @property
    def _input_shape(self) -> tuple[int, ...]:
        x, _ = self.problem.test.take(np.arange(1))
        return tuple(x.shape)

    def _bench(self, clients: Clients | HeldOut) -> Workbench:
        training = Training(BuiltinTrainer(), self.problem.plan, self.problem.learning_rate)
        return Workbench(self.config, self.layout, self.problem.model(), clients, training)

    def clock(self) -> float:
        """Seconds since the run began, without those in which there was no server."""
        return self.world.now - self._behind

    @property
    def journal(self) -> Path:
        """What happened."""
        return self.folder / "journal"

    def begin(self) -> Field:
        """Start the server."""
        self.office.begin(Journal(self.journal))
        self._open()
        return self

    def kill(self) -> None:
        """The server is gone, whatever it was doing."""
        self.hands.cut = True
        for topic in self.office.desk.topics:
            self.world.unsubscribe(topic, self.office.message)
        if self.office.journal is not None:
            self.office.journal.close()

    def restart(self) -> None:
        """Another server goes on from the journal."""
        self.log.clear()
        self.office = self._make_office()
        entries = list(read(self.journal))
        last = max((float(entry.head["time"]) for entry in entries), default=0.0)
        self._behind = self.world.now - last
        self.office.resume(entries, Journal(self.journal), [])
        self._open()

    def _open(self) -> None:
        for topic in self.office.desk.topics:
            self.world.subscribe(topic, self.office.message)
        self.office.hello()
        self._tick(self.office)

    def _tick(self, office: Office) -> None:
        if office is self.office and office.end is None and not self.hands.cut:
            office.tick()
            due = office.next_tick()
            wait = 0.25 if due is None else min(max(due - self.clock(), 0.001), 0.25)
            self.world.at(self.world.now + wait, lambda: self._tick(office))

    # -- devices --------------------------------------------------------------------------------------

    def device(self, n: int, memory: Memory | None = None) -> Device:
        """Start device n, in place of the one that is there."""
        self.stop(n)
        work = self._trains or self.trainer_bench().train
        hands = LoopbackHands(self.world)

        def train(sent: Dispatch, then: Callable[[LocalUpdate], None]) -> None:
            self.trained.append((n, sent.dispatch))
            done = self.world.now + self.seconds(n)
            self.world.at(done, lambda: None if hands.cut else then(work(sent)))

        device = Device(
            "7",
            0,
            n + 1,
            None if self.keys is None else self.keys[n + 1],
            self.layout,
            len(self.problem.samples(n)),
            train,
            hands,
            memory or Memory(),
            self.world.clock,
            self.heartbeat,
            wall_clock=lambda: int(self.world.now * 1000),
        )
        self.devices[n], self._device_hands[n] = device, hands
        self.world.subscribe(device.hears, device.message)
        device.begin()
        self._beat(n, device)
        return device

    def stop(self, n: int) -> Memory | None:
        """Kill device n; returns what it would remember."""
        device = self.devices.pop(n, None)
        if device is None:
            return None
        self._device_hands.pop(n).cut = True
        self.world.unsubscribe(device.hears, device.message)
        return device.memory

    def plain_device(self, n: int, *, repeats: bool = True) -> PlainDevice:
        """Start device n as one of FedML's own; see `PlainDevice` for `repeats`."""
        self.stop(n)
        hands = LoopbackHands(self.world)
        samples = self.problem.samples(n)

        def train(content: bytearray, client: int, count: int, then: Callable[[bytes], None]) -> None:
            self.trained.append((n, count))

            def done() -> None:
                if not hands.cut:
                    then(
                        train_file(
                            content,
                            client % self.count,
                            count,
                            trainer=BuiltinTrainer(),
                            samples=samples,
                            plan=self.problem.plan,
                            learning_rate=self.problem.learning_rate,
                        )
                    )

            self.world.at(self.world.now + self.seconds(n), done)

        device = PlainDevice("7", 0, n + 1, len(samples), train, hands, self.world.clock, repeats=repeats)
        self.devices[n], self._device_hands[n] = device, hands
        self.world.subscribe(device.hears, device.message)
        device.begin()
        return device

    def _beat(self, n: int, device: Device) -> None:
        if self.devices.get(n) is device and not device.finished:
            device.tick()
            self.world.at(device.next_tick(), lambda: self._beat(n, device))

    # -- running --------------------------------------------------------------------------------------

    def run(self, seconds: float = 3000.0) -> dict[str, Any]:
        """Let the world go on to the end of the run; its `end` record.

        Raises:
            TimeoutError: it is not at its end after `seconds` of the world's.
        """
        self.until(lambda: self.office.end is not None, seconds)
        if self.office.journal is not None:
            self.office.journal.close()
        return self.office.end or {}

    def until(self, condition: Callable[[], bool], seconds: float = 3000.0) -> None:
        """Let the world go on until something is so.

        Raises:
            TimeoutError: it is not after `seconds` of the world's.
        """
        while not condition():
            if self.world.now > seconds or not self.world.step():
                raise TimeoutError(
                    f"not so after {self.world.now:.0f} s, window {self.office.server.version}"
                )

    def records(self, kind: str) -> list[dict[str, Any]]:
        """Records of one type, so far."""
        return [record for record in self.log if record["type"] == kind]
