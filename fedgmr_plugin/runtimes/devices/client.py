"""A device's process: its connection, its training thread, its loop."""

from __future__ import annotations

import logging
import queue
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedgmr_plugin.engine.client import BatchPlan, BuiltinTrainer, LocalUpdate, Samples
from fedgmr_plugin.engine.events import Dispatch
from fedgmr_plugin.engine.workbench import Clients, Training, Workbench
from fedgmr_plugin.errors import ConfigError
from fedgmr_plugin.kernels.layout import build_layout
from fedgmr_plugin.kernels.rounding import PAYLOAD_TYPES
from fedgmr_plugin.protocol.notes import to_device
from fedgmr_plugin.runtimes.devices.connection import connection, device_keys
from fedgmr_plugin.runtimes.devices.device import Device
from fedgmr_plugin.runtimes.devices.file_training import train_file
from fedgmr_plugin.runtimes.devices.hands import ThreadedHands
from fedgmr_plugin.runtimes.devices.memory import Memory
from fedgmr_plugin.runtimes.devices.mqtt import MqttLink
from fedgmr_plugin.runtimes.devices.plain_device import PlainDevice
from fedgmr_plugin.runtimes.devices.store import S3Store
from fedgmr_plugin.runtimes.recorded import threads
from fedgmr_plugin.runtimes.samples import samples_of
from fedgmr_plugin.runtimes.settings import fedml_keys, options

_log = logging.getLogger(__name__)


class DeviceProcess:
    """One device of a run.

    Args:
        args: FedML's arguments, as the server's.
        device_id: its id, one of ``client_id_list``.
        data: its training samples, in any form that FedML users have.
        model: the model; overwritten.
        device: where it trains.
        folder: what it remembers across restarts; None keeps nothing.

    Raises:
        ConfigError, ModelError, DataError: everything wrong with them, before anything is sent.
    """

    def __init__(
        self,
        args: Any,
        device_id: int,
        data: Any,
        model: nn.Module,
        device: Any = None,
        folder: Path | None = None,
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
        samples: Samples = data if hasattr(data, "take") else samples_of(data, f"device {device_id}")
        steps = config.local_steps if isinstance(config.local_steps, int) else None
        trainer = BuiltinTrainer(
            device=place,
            loss=config.loss,
            optimizer=keys.optimizer,
            momentum=config.client_momentum,
            weight_decay=keys.weight_decay,
            gradient_clip=config.gradient_clip,
        )
        plan = BatchPlan(keys.batch_size, steps, keys.epochs, config.shuffle, keys.seed)
        clients = Clients(lambda client: samples, 0.0, keys.seed, keys.clients)
        training = Training(trainer, plan, keys.learning_rate)
        self._bench = Workbench(config, layout, model, clients, training)
        self._threads = config.cpu_threads
        self._inbox: queue.Queue[Any] = queue.Queue(10_000)
        self._trainer = ThreadPoolExecutor(1, thread_name_prefix="fedgmr-training")
        hears = to_device(here.run, here.server, device_id)
        self._link = MqttLink(here.broker, [hears], self._inbox)
        self._hands = ThreadedHands(S3Store(here.bucket), self._link, self._inbox, fetches=4)
        self._training = trainer, samples, plan, keys.learning_rate
        self.device: Device | PlainDevice
        if config.device_submodel != "wire":
            self.device = PlainDevice(
                here.run,
                here.server,
                device_id,
                len(samples),
                self._train_file,
                self._hands,
                time.monotonic,
            )
            self._link.say_when_gone(self.device.speaks, self.device.last_will())
            return
        self.device = Device(
            here.run,
            here.server,
            device_id,
            None if secret is None else secret[device_id],
            layout,
            len(samples),
            self._train,
            self._hands,
            Memory.load(folder),
            time.monotonic,
            config.heartbeat_seconds,
            PAYLOAD_TYPES[config.payload_dtype],
        )
        self._link.say_when_gone(self.device.speaks, self.device.last_will())

    def run(self) -> None:
        """Take part until the server says that the run is over.

        Raises:
            HostError: GMR-515 if the broker or the store refuses this device.
        """
        self._link.start()
        self._hands.start()
        try:
            self._link.connected.wait(timeout=5)
            with threads(self._threads):
                self.device.begin()
                while not self.device.finished:
                    self._next()
            self._hands.flush(10.0)
        finally:
            self._trainer.shutdown(wait=False, cancel_futures=True)
            self._link.stop()
            self._hands.close()

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

    def _train_file(self, content: bytearray, client: int, count: int, then: Callable[[bytes], None]) -> None:
        def trained(done: Future[bytes]) -> None:
            self._inbox.put(lambda: then(done.result()))

        trainer, samples, plan, rate = self._training
        self._trainer.submit(
            train_file,
            content,
            client,
            count,
            trainer=trainer,
            samples=samples,
            plan=plan,
            learning_rate=rate,
        ).add_done_callback(trained)

    def _train(self, sent: Dispatch, then: Callable[[LocalUpdate], None]) -> None:
        def trained(done: Future[LocalUpdate]) -> None:
            self._inbox.put(lambda: then(done.result()))  # raises here what training raised there

        self._trainer.submit(self._bench.train, sent).add_done_callback(trained)
