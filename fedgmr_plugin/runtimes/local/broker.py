"""A private Mosquitto on the loopback interface: nothing kept on disk, passwords where it can check them."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from fedgmr_plugin.errors import HostError
from fedgmr_plugin.runtimes.local import mqtt, ports
from fedgmr_plugin.runtimes.local.processes import Supervisor

NAME = "broker"
#: Most bytes of one MQTT packet. Models travel through S3; what is left is JSON of a few kB.
MAX_PACKET_BYTES = 1 << 20
#: Seconds until a broker that does not answer is given up.
PATIENCE = 10.0
#: Tries to find a port that nobody else takes in the meantime.
TRIES = 5
#: Where package managers put programs of system services, often outside PATH.
_PLACES = ("/usr/sbin", "/usr/local/sbin", "/opt/homebrew/sbin", "/usr/local/opt/mosquitto/sbin")


def find(program: str) -> str | None:
    """Path of one of Mosquitto's programs, in PATH or where package managers put it; None if missing."""
    return shutil.which(program) or shutil.which(program, path=os.pathsep.join(_PLACES))


def can_check_passwords() -> bool:
    """Whether mosquitto_passwd, which encodes passwords, is installed."""
    return find("mosquitto_passwd") is not None


class Broker:
    """A Mosquitto under a supervisor, as the process `broker`; it keeps its port once it has one.

    Args:
        users: name to password; anyone on this machine may connect if empty.
        port: TCP port; a free one is chosen where None.

    Raises:
        HostError: GMR-512 without Mosquitto, or with `users` without mosquitto_passwd.
    """

    def __init__(
        self, supervisor: Supervisor, *, users: Mapping[str, str] | None = None, port: int | None = None
    ) -> None:
        program = find("mosquitto")
        if program is None:
            raise HostError("GMR-512", "mosquitto is not installed")
        self._program = program
        self._supervisor = supervisor
        self._folder = supervisor.folder
        self._chosen = port
        self.users = dict(users or {})
        if self.users:
            self._write_passwords()

    @property
    def port(self) -> int:
        """Its TCP port; 0 before the first start where none was given."""
        return self._chosen or 0

    def start(self) -> None:
        """Start it, and return when it has accepted an MQTT connection.

        Raises:
            HostError: GMR-512 if it ends or does not answer; the message has the end of its log.
        """
        if self._chosen is not None:
            self._start(self._chosen)
            return
        for attempt in range(TRIES):
            port = ports.free_port()
            try:
                self._start(port)
            except HostError:
                if attempt + 1 == TRIES or ports.is_free(port):
                    raise
            else:
                self._chosen = port
                return

    def stop(self) -> None:
        """Stop it; queued and retained messages are lost, and clients are refused."""
        self._supervisor.stop(NAME)

    def restart(self) -> None:
        """Stop and start it on the same port; queued and retained messages are lost.

        Raises:
            HostError: GMR-512 as in `start`.
        """
        self.stop()
        self.start()

    def pause(self) -> None:
        """Suspend it: connections stay open and nothing answers."""
        self._supervisor.pause(NAME)

    def resume(self) -> None:
        """Let it go on after `pause`."""
        self._supervisor.resume(NAME)

    def _start(self, port: int) -> None:
        settings = self._folder / "mosquitto.conf"
        settings.write_text(self._configuration(port), encoding="utf-8")
        log = self._supervisor.log(NAME)
        began = log.stat().st_size if log.exists() else 0
        self._supervisor.start(NAME, [self._program, "-c", str(settings)])
        user, password = next(iter(self.users.items()), ("", ""))
        if not ports.wait_until(
            lambda: mqtt.handshake(port, user, password) == 0,
            alive=lambda: self._supervisor.poll(NAME) is None,
            patience=PATIENCE,
        ):
            self._supervisor.stop(NAME)
            said = log.read_bytes()[began:].decode("utf-8", "replace").strip().splitlines()[-3:]
            raise HostError(
                "GMR-512", f"mosquitto does not answer on port={port}: {'; '.join(said)}", where=str(log)
            )

    def _configuration(self, port: int) -> str:
        lines = [
            f"listener {port} {ports.HOST}",
            "allow_anonymous false" if self.users else "allow_anonymous true",
            "persistence false",
            f"max_packet_size {MAX_PACKET_BYTES}",
            "log_dest stderr",  # the supervisor's log file
            "log_timestamp_format %Y-%m-%dT%H:%M:%S",
        ]
        if self.users:
            lines.append(f"password_file {self._folder / 'passwords'}")
        if os.geteuid() == 0:
            lines.append("user root")  # another user could not read the folder
        return "\n".join(lines) + "\n"

    def _write_passwords(self) -> None:
        for name, password in self.users.items():
            if not name or ":" in name or not (name + password).isprintable():
                raise HostError(
                    "GMR-512", f"user={name!r} or its password has a character that cannot be used"
                )
        path = self._folder / "passwords"
        write_passwords(path, self.users)


def write_passwords(path: Path, users: Mapping[str, str]) -> None:
    """Write a password file; no password is ever on a command line, where others could read it.

    Raises:
        HostError: GMR-512 if mosquitto_passwd is missing or refuses.
    """
    program = find("mosquitto_passwd")
    if program is None:
        raise HostError("GMR-512", "mosquitto_passwd is not installed, so passwords cannot be used")
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.writelines(f"{name}:{password}\n" for name, password in users.items())
    done = subprocess.run([program, "-U", str(path)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        path.unlink(missing_ok=True)
        raise HostError("GMR-512", f"mosquitto_passwd -U failed: {done.stderr.strip()}")
