"""Broker and storage together, the settings that FedML needs to use them, and processes beside them."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from fedgmr_plugin.errors import HostError
from fedgmr_plugin.runtimes.local import broker as _broker
from fedgmr_plugin.runtimes.local import ports, record
from fedgmr_plugin.runtimes.local import storage as _storage
from fedgmr_plugin.runtimes.local.broker import Broker
from fedgmr_plugin.runtimes.local.processes import Supervisor
from fedgmr_plugin.runtimes.local.record import stop_recorded
from fedgmr_plugin.runtimes.local.storage import Storage

__all__ = ["Connection", "Stack", "connection", "stop_recorded"]

#: Name of the file, in a stack's folder, that has its connection settings.
NAME = record.CONNECTION
KEEPALIVE_SECONDS = 30


class Connection(NamedTuple):
    """FedML's two mappings that name an MQTT broker and an S3 endpoint."""

    customized_training_mqtt_config: dict[str, Any]
    customized_training_s3_config: dict[str, Any]

    def section(self) -> dict[str, dict[str, dict[str, Any]]]:
        """The section of FedML's YAML that has them."""
        return {"comm_args": self._asdict()}


class Stack:
    """A private broker and a private S3 endpoint, up within its `with` block.

    Args:
        folder: where logs, settings and the record of the processes are written; made if missing.
        users: the broker's users, name to password, of which FedML gets the first; one with a random
            password where None, or none where mosquitto_passwd is missing (see `has_passwords`).
        bucket: name of the bucket that is made.
        detached: leave everything running at the end of the block and of this process;
            `stop_recorded(folder)` stops it, and `connection(folder)` reads its settings.

    Raises:
        HostError: GMR-512 without Mosquitto, GMR-513 without moto's server, GMR-514 if the folder has
            running processes.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        users: Mapping[str, str] | None = None,
        bucket: str = "fedgmr",
        detached: bool = False,
    ) -> None:
        if users is None:
            users = {"fedgmr": secrets.token_urlsafe(18)} if _broker.can_check_passwords() else {}
        self.processes = Supervisor(folder, detached=detached)
        self.folder = self.processes.folder
        self.broker = Broker(self.processes, users=users)
        self.storage = Storage(self.processes, bucket=bucket)
        self._detached = detached

    @property
    def has_passwords(self) -> bool:
        """Whether the broker asks for one; else every user of this machine may connect."""
        return bool(self.broker.users)

    def start(self) -> None:
        """Start both services; nothing is left running if one of them cannot be started.

        Raises:
            HostError: GMR-512 or GMR-513 if a service does not answer.
        """
        try:
            self.broker.start()
            self.storage.start()
            record.write_json(self.folder / NAME, self.connection()._asdict())
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stop the processes beside the services, then the services; objects and messages are lost."""
        services = (_broker.NAME, _storage.NAME)
        self.processes.stop(*(name for name in self.processes.running() if name not in services))
        self.processes.close()
        (self.folder / NAME).unlink(missing_ok=True)

    def __enter__(self) -> Stack:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None or not self._detached:
            self.stop()

    def connection(self) -> Connection:
        """What FedML needs to know of the two services."""
        user, password = next(iter(self.broker.users.items()), ("", ""))
        key, secret = self.storage.keys
        return Connection(
            {
                "BROKER_HOST": ports.HOST,
                "BROKER_PORT": self.broker.port,
                "MQTT_USER": user,
                "MQTT_PWD": password,
                "MQTT_KEEPALIVE": KEEPALIVE_SECONDS,
            },
            {
                "CN_S3_AKI": key,
                "CN_S3_SAK": secret,
                "CN_REGION_NAME": _storage.REGION,
                "BUCKET_NAME": self.storage.bucket,
                "CN_S3_ENDPOINT": self.storage.endpoint,
            },
        )

    def run(
        self,
        name: str,
        command: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path | str | None = None,
    ) -> int:
        """Start a server or a device beside the services, as `Supervisor.start` does; its pid.

        Raises:
            HostError: GMR-514 if a process of this name runs, or there is no such program.
        """
        return self.processes.start(name, command, env=env, cwd=cwd)


def connection(folder: Path | str) -> Connection:
    """The settings of a stack that runs in a folder, started by this or another process.

    Raises:
        HostError: GMR-514 if none runs there, or its files are damaged.
    """
    path = Path(folder) / NAME
    if not {_broker.NAME, _storage.NAME} <= set(record.running(Path(folder))):
        raise HostError("GMR-514", f"no broker and storage run in {folder}")
    try:
        return Connection(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise HostError("GMR-514", f"{path} cannot be read: {error}") from error
