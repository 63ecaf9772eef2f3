"""A device's process: its connection, its training thread, its loop."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from fedgmr_plugin.engine.client import LocalUpdate
from fedgmr_plugin.engine.events import Dispatch
from fedgmr_plugin.engine.samples import BatchPlan, Samples
from fedgmr_plugin.engine.trainer import LocalTrainer
from fedgmr_plugin.engine.workbench import Clients, Training, Workbench
from fedgmr_plugin.errors import ConfigError, FedGMRError, HostError, WireError
from fedgmr_plugin.kernels.layout import build_layout
from fedgmr_plugin.kernels.rounding import PAYLOAD_TYPES
from fedgmr_plugin.protocol.notes import to_device
from fedgmr_plugin.protocol.pieces import Piece
from fedgmr_plugin.protocol.storekeys import probe_key
from fedgmr_plugin.runtimes.devices.connection import connection, device_keys, services
from fedgmr_plugin.runtimes.devices.device import Device
from fedgmr_plugin.runtimes.devices.file_training import train_file
from fedgmr_plugin.runtimes.devices.hands import Store, ThreadedHands
from fedgmr_plugin.runtimes.devices.inbox import Inbox
from fedgmr_plugin.runtimes.devices.memory import Memory
from fedgmr_plugin.runtimes.devices.mqtt import MqttLink
from fedgmr_plugin.runtimes.devices.plain_device import PlainDevice
from fedgmr_plugin.runtimes.devices.store import S3Store, Unreachable
from fedgmr_plugin.runtimes.recorded import threads
from fedgmr_plugin.runtimes.samples import samples_of
from fedgmr_plugin.runtimes.settings import fedml_keys, options
from fedgmr_plugin.runtimes.setup import builtin_trainer, refuse_without_trainer

_log = logging.getLogger(__name__)
#: Object by which a device measures its bandwidth at its start.
PROBE_BYTES = 1_000_000
#: Seconds between two turns of the loop beyond which the process has stood still, and heard nobody.
_STOOD_STILL = 60.0
#: Seconds from the start without a message of the server after which that is said, once.
_UNHEARD = 30.0
OWN_FILE = "Start each silo with its own --rank and its own file (docs/silos.md)."


class _Over(BaseException):
    """The run is: what is being trained is of no use. No `Exception`, which a user's trainer may catch."""


class Parts(NamedTuple):
    """What a device trains with.

    Attributes:
        samples: client to its training samples; a device has its own only.
        own: number of its samples.
        trainer: how it trains.
        client: which client it is, as it was started; None where only the server says.
    """

    samples: Callable[[int], Samples]
    own: int
    trainer: LocalTrainer
    client: int | None = None


class DeviceProcess:
    """One device of a run.

    Args:
        args: FedML's arguments, as the server's.
        device_id: its id, one of ``client_id_list``.
        data: its training samples, in any form that FedML users have; or `Parts`.
        model: the model; overwritten.
        device: where it trains.
        folder: what it remembers across restarts; None keeps nothing.
        transport: how it reaches the server, from the topic that it hears and its inbox; by
            default the broker and the store that `args` name.

    Raises:
        ConfigError, ModelError, DataError: everything wrong with them, before anything is sent.
        HostError: GMR-514 if another process uses `folder`.
    """

    def __init__(
        self,
        args: Any,
        device_id: int,
        data: Any,
        model: nn.Module,
        device: Any = None,
        folder: Path | None = None,
        transport: Callable[[str, queue.Queue[Any]], tuple[Any, Store]] | None = None,
    ) -> None:
        config, keys = options(args), fedml_keys(args)
        here = connection(args)
        where = getattr(args, "yaml_config_file", "") or "args"
        if device_id not in here.devices:
            raise ConfigError("GMR-112", f"device {device_id} is not in client_id_list", where=where)
        secret = device_keys(config, (device_id,), where)
        place = torch.device(device) if device is not None else torch.device("cpu")
        model.to(place)
        layout = build_layout(model, config.dense_layers)
        if isinstance(data, Parts):
            parts = data
        else:
            refuse_without_trainer(args)
            own = samples_of(data, f"device {device_id}")
            parts = Parts(lambda client: own, len(own), builtin_trainer(config, keys, place))
        steps = config.local_steps if isinstance(config.local_steps, int) else None
        plan = BatchPlan(keys.batch_size, steps, keys.epochs, config.shuffle, keys.seed)
        clients = Clients(parts.samples, 0.0, keys.seed, keys.clients)
        training = Training(parts.trainer, plan, keys.learning_rate)
        self._bench = Workbench(config, layout, model, clients, training)
        self._threads, self._clients = config.cpu_threads, keys.clients
        self._patience, self._run, self._client = config.server_patience, here.run, parts.client
        self._inbox = Inbox()
        self._over = threading.Event()
        self._trainer = ThreadPoolExecutor(1, thread_name_prefix="fedgmr-training")
        hears = to_device(here.run, here.server, device_id)
        if transport is None:
            broker, bucket = services(args)
            self._link: Any = MqttLink(broker, [hears], self._inbox)
            self._link.hear_kept(lambda topic, payload: self.device.kept(topic, payload))
            store: Store = S3Store(bucket)
        else:
            self._link, store = transport(hears, self._inbox)
        self._store, self._measured = store, config.measured_densities
        self._probe = probe_key(here.run, device_id)
        self._hands = ThreadedHands(store, self._link, self._inbox, fetches=4)
        common = (here.run, here.server, device_id)
        self._claim = None if folder is None else _claimed(folder)
        self.device: Device | PlainDevice
        if config.device_submodel != "wire":
            self.device = PlainDevice(*common, parts.own, self._train_file, self._hands, time.monotonic)
        else:
            self.device = Device(
                *common,
                None if secret is None else secret[device_id],
                layout,
                parts.own,
                self._train,
                self._hands,
                Memory.load(folder),
                time.monotonic,
                config.heartbeat_seconds,
                PAYLOAD_TYPES[config.payload_dtype],
            )
        self._looked = time.monotonic()
        self._unheard: tuple[float, float] | None = None  # its start, and `heard_at` then; None: it was told
        self._link.say_when_gone(self.device.speaks, self.device.last_will)

    def run(self) -> None:
        """Take part until the server says that the run is over.

        Raises:
            HostError: GMR-515 if the broker or the store refuses this device; GMR-518 if the server says
                nothing for `server_patience` seconds.
        """
        self._link.start()
        self._hands.start()
        self._looked = time.monotonic()
        self._unheard = self._looked, self.device.heard_at
        try:
            self._link.connected.wait(timeout=5)
            with threads(self._threads):
                if self._measured and isinstance(self.device, Device):
                    self.device.up, self.device.down = measure_bandwidth(self._store, self._probe)
                self.device.begin()
                while not self.device.finished:
                    self._next()
            self._hands.flush(10.0)
        except BaseException:
            # The broker says it only of a connection that breaks, and the server would wait for an answer.
            self._link.publish(self.device.speaks, self.device.last_will())
            raise
        finally:
            self._over.set()  # a training that goes on would keep the process
            self._trainer.shutdown(wait=False, cancel_futures=True)
            self._link.stop()
            self._hands.close()
            if self._claim is not None:
                os.close(self._claim)

    def _next(self) -> None:
        wait = min(max(self.device.next_tick() - time.monotonic(), 0.0), 1.0)
        try:
            item = self._inbox.get(timeout=wait)
            if callable(item):
                item()
            else:
                self.device.message(*item)
        except queue.Empty:
            if self._link.refused is not None:
                raise self._link.refused from None
        self.device.tick()
        now = time.monotonic()
        still, self._looked = now - self._looked, now
        self._tell_unheard(now)
        if still > _STOOD_STILL:  # what the server said meanwhile may be still to be read
            self.device.heard_at = min(now, self.device.heard_at + still)
        since = self.device.waits_since()
        if self._patience is not None and since is not None and not self.device.finished:
            silence = now - since
            if silence > self._patience:
                run = f"run_id={self._run}"
                raise HostError("GMR-518", f"no message of the server of {run} for {silence:.0f} seconds")

    def _tell_unheard(self, now: float) -> None:
        """Say, once, that there is no sign of a server: it may never come, or not know this device."""
        if self._unheard is None or now - self._unheard[0] < _UNHEARD:
            return
        if self.device.heard_at == self._unheard[1] and not self.device.finished:
            _log.warning(
                "nothing has been heard of a server of run_id=%s for %.0f seconds: it is not there, waits "
                "for others, or does not hear this device (%d): its key or run_id may be another, or it may "
                "have no right to its topics at the broker",
                *(self._run, now - self._unheard[0], self.device.device),
            )
        self._unheard = None

    def _train_file(self, content: bytearray, client: int, count: int, then: Callable[[bytes], None]) -> None:
        def over(done: Future[bytes]) -> None:
            error = done.exception()
            if isinstance(error, FedGMRError) and isinstance(self.device, PlainDevice):
                self.device.failed(error)  # anybody may have written that file
            else:
                then(done.result())

        def trained(done: Future[bytes]) -> None:
            self._inbox.put(lambda: over(done))

        training = self._bench.training
        client %= self._clients
        self._trainer.submit(
            train_file,
            content,
            client,
            count,
            trainer=training.trainer,
            samples=self._bench.clients.train(client),
            plan=training.plan,
            learning_rate=training.learning_rate,
            device=self._bench.device,
        ).add_done_callback(trained)

    def _train(self, sent: Dispatch, then: Callable[[LocalUpdate], None]) -> None:
        def trained(done: Future[LocalUpdate]) -> None:
            self._inbox.put(lambda: then(done.result()))  # raises here what training raised there

        if self._client not in (None, sent.client):
            problem = (
                f"--rank {self._client + 1} was given, but silo {self.device.device} is number "
                f"{sent.client + 1} in the server's client_id_list"
            )
            raise ConfigError("GMR-112", f"{problem}: a wrong --rank, or another silo's file", hint=OWN_FILE)
        self._trainer.submit(self._bench.train, sent, interrupt=self._go_on).add_done_callback(trained)

    def _go_on(self) -> None:
        """In the training thread, before each step."""
        if self._over.is_set():
            raise _Over


def _claimed(folder: Path) -> int | None:
    """Keep other processes from a folder while this descriptor is open; None where the disk does not let it.

    Raises:
        HostError: GMR-514 if one has it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise HostError("GMR-514", f"another process is the device of {folder}", where=str(folder)) from error
    except OSError as error:
        _log.warning("%s cannot be kept from other processes: %s", folder, error)
        return None
    return descriptor


def measure_bandwidth(store: Store, key: str, size: int = PROBE_BYTES) -> tuple[float | None, float | None]:
    """Upload and download bandwidth to the store in MB/s, by one object; None where it cannot be reached."""
    content = os.urandom(size)
    piece = Piece(key, size, hashlib.sha256(content).hexdigest())
    try:
        started = time.perf_counter()
        store.put(piece, content)
        stored = time.perf_counter()
        store.get(piece)
        fetched = time.perf_counter()
        store.delete([piece.key])
    except (Unreachable, WireError) as error:
        _log.warning("the bandwidth could not be measured: %s", error)
        return None, None
    return size / 1e6 / (stored - started), size / 1e6 / (fetched - stored)
