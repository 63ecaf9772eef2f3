"""All runs of an experiment, each in a process of its own, with what is left to do always known from files.

    FOLDER/experiment.json   the experiment as it runs
    FOLDER/METHOD-SEED/      a run's directory
    FOLDER/METHOD-SEED.log   what its process printed

A run that is finished is not repeated, one that was interrupted goes on from its checkpoint.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from fedgmr_plugin.errors import ConfigError
from fedgmr_plugin.protocol.runlog import LOG_NAME
from fedgmr_plugin.runtimes import resume, trial
from fedgmr_plugin.runtimes.experiment import Experiment, run_name
from fedgmr_plugin.runtimes.trial import DESCRIPTION, NO_PROBLEM, is_finished

#: Seconds that processes have to end after an interruption.
_PATIENCE = 20.0
_INTERVAL = 0.5


class Task(NamedTuple):
    """One run of an experiment."""

    method: str
    seed: int

    @property
    def name(self) -> str:
        """Of its directory."""
        return run_name(*self)


class Status(NamedTuple):
    """How far a campaign is.

    Attributes:
        done, total: runs.
        failed: runs that cannot be carried out, `Campaign.skipped` ones among them.
        running: of each run under way its name and the share of its budget that is spent.
        seconds_left: at the speed so far; None before anything is known.
    """

    done: int
    total: int
    failed: int
    running: tuple[tuple[str, float], ...]
    seconds_left: float | None


class Campaign:
    """The runs of some methods and seeds of an experiment.

    Args:
        folder: of all its files; made if it is not there.
        jobs: processes at the same time.
        tell: is told the status, every half second.

    Attributes:
        tasks: the runs, in their order.
        failed: those that could not be carried out.
        skipped: those that were not begun, since another run of the seed had neither data nor model.
    """

    def __init__(
        self,
        experiment: Experiment,
        folder: Path,
        methods: Sequence[str],
        seeds: Sequence[int],
        jobs: int,
        tell: Callable[[Status], None] = lambda status: None,
    ) -> None:
        self.experiment, self.folder, self._jobs, self._tell = experiment, folder.absolute(), jobs, tell
        self.tasks = list(dict.fromkeys(Task(method, seed) for seed in seeds for method in methods))
        self.failed: list[Task] = []
        self.skipped: list[Task] = []
        self._waiting: list[Task] = []
        self._running: dict[Task, subprocess.Popen[bytes]] = {}
        self._shares: dict[Task, float] = {}

    def runs(self) -> list[Path]:
        """Directories of the runs that are finished, in order."""
        return [self.folder / task.name for task in self.tasks if self._is_finished(task)]

    def run(self) -> None:
        """Carry out what is not finished; `failed` and `skipped` then name the runs that could not be.

        Interrupted, by Ctrl-C, ``kill`` or a terminal that closes, it ends the processes and raises
        KeyboardInterrupt; the same campaign goes on later.

        Raises:
            ConfigError: GMR-110 if `folder` cannot be made or written to.
            RunLogError: GMR-604 if another campaign works in it.
        """
        with self._usable():
            self.folder.mkdir(parents=True, exist_ok=True)
        hint = "Wait for its end, or name another folder with `-o`."
        with resume.locked(self.folder, "another campaign works in this folder", hint):
            with self._usable():
                self._describe()
            self._carry_out()

    def _carry_out(self) -> None:
        waiting = [task for task in self.tasks if not self._is_finished(task)]
        self._waiting = list(waiting)
        before = len(self.tasks) - len(waiting)
        begun, gone = time.monotonic(), {task: self._share(task) for task in waiting}
        with _interruptible():
            try:
                while self._waiting or self._running:
                    while self._waiting and len(self._running) < self._jobs:
                        self._start(self._waiting.pop(0))
                    time.sleep(_INTERVAL)
                    self._collect()
                    self._tell(self._status(before, gone, time.monotonic() - begun))
            finally:
                self._end()

    @contextmanager
    def _usable(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            hint = "Name another folder with `-o`."
            raise ConfigError(
                "GMR-110", f"{self.folder} cannot be used: {error.strerror}", where="--output", hint=hint
            ) from error

    def _describe(self) -> None:
        """Write down the experiment, which the runs' processes read."""
        text = self.experiment.model_dump_json(by_alias=True, indent=1)
        (self.folder / DESCRIPTION).write_text(text + "\n", encoding="utf-8")

    def _is_finished(self, task: Task) -> bool:
        return is_finished(self.experiment, *task, self.folder)

    def _start(self, task: Task) -> None:
        command = [sys.executable, "-m", trial.__name__, str(self.folder), *map(str, task), str(os.getpid())]
        with (self.folder / f"{task.name}.log").open("wb") as log:
            # A group of its own: Ctrl-C reaches this process alone, which then ends the others in order.
            self._running[task] = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )

    def _collect(self) -> None:
        for task, process in list(self._running.items()):
            if process.poll() is None:
                continue
            del self._running[task]
            if process.returncode < 0:
                self._note_signal(task, -process.returncode)
            if process.returncode != 0 or not self._is_finished(task):
                self.failed.append(task)
            if process.returncode == NO_PROBLEM:
                self.skipped += [other for other in self._waiting if other.seed == task.seed]
                self._waiting = [other for other in self._waiting if other.seed != task.seed]

    def _note_signal(self, task: Task, number: int) -> None:
        """Say behind what a process printed which signal ended it, since it could not."""
        why = " (out of memory? fewer `--jobs` need less)" if number == signal.SIGKILL else ""
        with (self.folder / f"{task.name}.log").open("a", encoding="utf-8") as log:
            log.write(f"ended by signal {number}: {signal.strsignal(number)}{why}\n")

    def _end(self) -> None:
        for process in self._running.values():
            process.send_signal(signal.SIGINT)
        give_up = time.monotonic() + _PATIENCE
        for process in self._running.values():
            try:
                process.wait(max(0.0, give_up - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._running.clear()

    # -- progress ---------------------------------------------------------------------------------------

    def _status(self, before: int, gone: dict[Task, float], seconds: float) -> Status:
        lost = {*self.failed, *self.skipped}
        shares = {task: self._share(task) for task in gone if task not in lost}
        work = sum(share - gone[task] for task, share in shares.items())
        left = sum(1.0 - share for share in shares.values())
        running = tuple((task.name, shares[task]) for task in self._running)
        done = before + sum(share == 1.0 for task, share in shares.items() if task not in self._running)
        return Status(done, len(self.tasks), len(lost), running, seconds * left / work if work > 0 else None)

    def _share(self, task: Task) -> float:
        """Share of a run's budget that is spent, read from the end of its log; 1 only when it has ended."""
        if self._shares.get(task) == 1.0:
            return 1.0
        record = _last_window(self.folder / task.name / LOG_NAME)
        config = self.experiment.config(task.method)
        if self._is_finished(task):
            share = 1.0
        elif record is None:
            share = 0.0
        elif config.time_budget is not None:
            share = min(0.999, record["end"] / config.time_budget)
        else:
            share = min(0.999, (record["window"] + 1) / self.experiment.train_args["comm_round"])
        self._shares[task] = share
        return share


@contextmanager
def _interruptible() -> Iterator[None]:
    """While active, SIGTERM and SIGHUP interrupt as Ctrl-C does, unless somebody deals with them already."""

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    in_main = threading.current_thread() is threading.main_thread()
    numbers = [
        n for n in (signal.SIGTERM, signal.SIGHUP) if in_main and signal.getsignal(n) is signal.SIG_DFL
    ]
    for number in numbers:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


def _last_window(log: Path) -> dict[str, Any] | None:
    """The last whole `window` record near the end of a log."""
    try:
        with log.open("rb") as file:
            file.seek(max(file.seek(0, os.SEEK_END) - 2**16, 0))
            lines = file.read().split(b"\n")[:-1]
    except OSError:
        return None
    for line in reversed(lines):
        try:
            record: dict[str, Any] = json.loads(line)
        except ValueError:
            continue
        if record.get("type") == "window":
            return record
    return None
