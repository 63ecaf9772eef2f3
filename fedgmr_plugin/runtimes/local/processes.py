"""Named child processes that never outlive their supervisor, and restarts of them.

Each child leads a session of its own, so a Ctrl-C at the terminal reaches the supervisor alone and a
signal reaches all that the child has started. Before a child's program begins, its shell waits for a
line; it is written once the keeper and the folder's record know the child, so there is no moment at
which a killed supervisor could leave an orphan behind.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import fedgmr_plugin
from fedgmr_plugin.errors import HostError
from fedgmr_plugin.runtimes.local import groups, record

_WAIT_THEN_RUN = 'read -r go && exec "$@" </dev/null'


@dataclass(frozen=True)
class _Start:
    command: tuple[str, ...]
    env: dict[str, str] | None
    cwd: str | None


@dataclass
class _Child:
    popen: subprocess.Popen[bytes]
    leader: groups.Leader


class Supervisor:
    """Starts, watches and ends named processes; a context manager that ends all at its exit.

    To be used from one thread.

    Args:
        folder: where the record and the logs (`<name>.log`) are written; made if missing.
        detached: leave the processes running at this process's end, for `record.stop_recorded` to stop.

    Raises:
        HostError: GMR-514 if the folder cannot be made, or its record has processes that still run.
    """

    def __init__(self, folder: Path | str, *, detached: bool = False) -> None:
        self.folder = Path(folder).absolute()
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise HostError("GMR-514", f"{self.folder} cannot be made: {error.strerror}") from error
        if running := record.running(self.folder):
            raise HostError("GMR-514", f"{self.folder} has running processes: {', '.join(running)}")
        self._children: dict[str, _Child] = {}
        self._starts: dict[str, _Start] = {}
        self._codes: dict[str, int] = {}
        self._detached = detached
        self._keeper: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Supervisor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None or not self._detached:
            self.close()

    def start(
        self,
        name: str,
        command: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path | str | None = None,
    ) -> int:
        """Start a process, with standard output and error appended to its log, and nothing to read.

        Args:
            env: its whole environment; this process's where None.

        Returns:
            its pid, which is its group's too.

        Raises:
            HostError: GMR-514 if a process of this name runs, or there is no such program.
        """
        if self._lives(name):
            raise HostError("GMR-514", f"process={name!r} runs already")
        path = None if env is None else env.get("PATH")
        if shutil.which(command[0], path=path) is None:
            raise HostError("GMR-514", f"process={name!r} cannot start: no program {command[0]!r}")
        start = _Start(tuple(command), None if env is None else dict(env), None if cwd is None else str(cwd))
        self._starts[name] = start
        self._codes.pop(name, None)
        return self._launch(name, start)

    def _launch(self, name: str, start: _Start) -> int:
        self._ensure_keeper()
        with self.log(name).open("ab") as log:
            popen = subprocess.Popen(
                ["/bin/sh", "-c", _WAIT_THEN_RUN, "sh", *start.command],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=start.env,
                cwd=start.cwd,
                start_new_session=True,
            )
        began = groups.started(popen.pid)
        if began is None or popen.stdin is None:
            popen.wait()
            raise HostError("GMR-514", f"process={name!r} ended at once", where=str(self.log(name)))
        leader = groups.Leader(popen.pid, began)
        self._children[name] = _Child(popen, leader)
        self._tell(leader._asdict())
        self._record()
        try:
            popen.stdin.write(b"go\n")
            popen.stdin.close()
        except BrokenPipeError:
            pass  # killed already; poll tells
        return popen.pid

    def log(self, name: str) -> Path:
        """The file of a process's standard output and error."""
        return self.folder / f"{name}.log"

    def running(self) -> dict[str, int]:
        """Names and pids of the processes that run, in the order of their starts."""
        return {name: child.leader.pid for name, child in tuple(self._children.items()) if self._lives(name)}

    def poll(self, name: str) -> int | None:
        """A process's exit code (negative: the signal that ended it); None while it runs or if unknown.

        What an ended process left in its group is killed.
        """
        child = self._children.get(name)
        if child is not None and not groups.lives(child.leader):
            self._reap(name, child)
        return self._codes.get(name)

    def stop(self, *names: str, patience: float = 5.0) -> None:
        """End processes, all at once: SIGTERM, and SIGKILL after `patience` seconds."""
        children = {name: self._children[name] for name in names if name in self._children}
        groups.end([child.leader for child in children.values()], patience)
        for name, child in children.items():
            self._reap(name, child)

    def kill(self, name: str) -> None:
        """End a process as a crash would: SIGKILL to its group."""
        if child := self._children.get(name):
            groups.send(child.leader, signal.SIGKILL)
            self._reap(name, child)

    def restart(self, name: str, *, patience: float = 5.0) -> int:
        """End a process, if it runs, and start it with the same command; its new pid.

        Raises:
            HostError: GMR-514 if no process of this name was ever started.
        """
        if name not in self._starts:
            raise HostError("GMR-514", f"process={name!r} was never started")
        self.stop(name, patience=patience)
        self._codes.pop(name, None)
        return self._launch(name, self._starts[name])

    def pause(self, name: str) -> None:
        """Suspend a process: its connections stay open and nothing answers (SIGSTOP)."""
        self._signal(name, signal.SIGSTOP)

    def resume(self, name: str) -> None:
        """Let a suspended process go on (SIGCONT)."""
        self._signal(name, signal.SIGCONT)

    def close(self, *, patience: float = 5.0) -> None:
        """End every process, and the keeper."""
        self.stop(*self._children, patience=patience)
        if self._keeper is not None and self._keeper.stdin is not None and self._keeper.stdout is not None:
            self._keeper.stdin.close()
            self._keeper.wait()
            self._keeper.stdout.close()
            self._keeper = None

    def _lives(self, name: str) -> bool:
        return self.poll(name) is None and name in self._children

    def _signal(self, name: str, number: signal.Signals) -> None:
        if not self._lives(name):
            raise HostError("GMR-514", f"process={name!r} does not run", where=str(self.log(name)))
        groups.send(self._children[name].leader, number)

    def _reap(self, name: str, child: _Child) -> None:
        groups.sweep(child.leader.pid)  # before `wait` frees the number
        self._codes[name] = child.popen.wait()
        self._children.pop(name, None)
        self._tell({"ended": child.leader.pid})
        self._record()

    def _record(self) -> None:
        record.write(self.folder, {name: child.leader for name, child in self._children.items()})

    def _ensure_keeper(self) -> None:
        if self._detached or (self._keeper is not None and self._keeper.poll() is None):
            return
        package = str(Path(fedgmr_plugin.__file__).resolve().parent.parent)
        self._keeper = subprocess.Popen(
            [sys.executable, "-S", "-m", "fedgmr_plugin.runtimes.local.keeper", str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": package},
            start_new_session=True,
        )
        if self._keeper.stdout is None or self._keeper.stdout.readline() != b"ready\n":
            raise HostError("GMR-514", f"the keeper ended with exit status {self._keeper.wait()}")
        for child in self._children.values():
            self._tell(child.leader._asdict())

    def _tell(self, fields: dict[str, object]) -> None:
        if self._keeper is None or self._keeper.stdin is None:
            return
        try:
            self._keeper.stdin.write(json.dumps(fields).encode() + b"\n")
            self._keeper.stdin.flush()
        except BrokenPipeError:
            return  # the next start makes another keeper
