"""Broker and store go away in the middle of a run and come back: nothing that was answered is lost.

    python -m benchmarks.outages --seconds 60 --json benchmarks/results/outages.json

A server and three devices, each a process, train handwritten digits over Mosquitto and moto's S3. One after
another goes away for so many seconds, and is back at the same address:

    broker      SIGKILL: connections break, then are refused; what it had queued is gone
    way         the store's forwarder (`benchmarks.door`) is killed: connections break, then are refused
    store       SIGSTOP: connections are accepted and nothing answers, until they time out
    both        broker and way at once

A store keeps what it acknowledged; moto has it in memory alone, so moto's own process is suspended and never
ended. Every device notes each answer that it gives. At the end each of them is in the run log, once; or was
given when the run was over already, which is one at most for each device; or had been given up, which is
told apart, because its device had missed a second deadline since. And `fedgmr replay` gives the same model.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import machine
from fedgmr_plugin.cli.local import write_project
from fedgmr_plugin.protocol.runlog import read_run
from fedgmr_plugin.runtimes.local.ports import HOST, free_port
from fedgmr_plugin.runtimes.local.stack import Stack

RESULTS = Path(__file__).parent / "results" / "outages.json"
REPOSITORY = Path(__file__).resolve().parent.parent
DEVICES, WINDOWS = 3, 40
#: Windows between two outages.
BETWEEN = 5
#: Client and dispatch.
Answer = tuple[int, int]
PYTHON = [sys.executable, "-m", "fedgmr_plugin"]
FILES = ["main.py", "--cf", "fedml_config.yaml"]
#: What a device adds to its script: training takes a while, and every answer is noted.
NOTING = """
import time
from fedgmr_plugin.engine.trainer import BuiltinTrainer
from fedgmr_plugin.runtimes.devices.device import Device
_train, _answer = BuiltinTrainer.train, Device._answer
def train(self, *given, **named):
    time.sleep(0.3)
    return _train(self, *given, **named)
def answer(self, note, sent, update):
    before = self.trained
    _answer(self, note, sent, update)
    if self.trained > before:
        with open("answered_%d" % self.device, "a") as file:
            file.write("%d\\n" % sent.dispatch)
BuiltinTrainer.train, Device._answer = train, answer
"""


class Run:
    """A local stack with a door before its store, and the processes of a run.

    Args:
        folder: of the project.
        options: of ``fedgmr_args``, that differ from those of `fedgmr local up`.
    """

    def __init__(self, folder: Path, stack: Stack, **options: Any) -> None:
        self.folder, self.stack = folder, stack
        self._door = free_port()
        self._env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "HOME": str(folder), "OMP_NUM_THREADS": "1"}
        connection = stack.connection().section()["comm_args"]
        connection["customized_training_s3_config"]["CN_S3_ENDPOINT"] = f"http://{HOST}:{self._door}"
        write_project(folder, DEVICES, WINDOWS, connection)
        config = folder / "fedml_config.yaml"
        extra = "".join(f"  {key}: {json.dumps(value)}\n" for key, value in options.items())
        config.write_text(config.read_text(encoding="utf-8") + extra, encoding="utf-8")

    @property
    def directory(self) -> Path:
        """Where the run is recorded."""
        return self.folder / "fedgmr_runs" / "local"

    def start(self) -> None:
        """Start the server and the devices."""
        self._open()
        self._run("server", [*PYTHON, *FILES])
        main = (self.folder / "main.py").read_text(encoding="utf-8")
        for n in range(1, DEVICES + 1):
            script = self.folder / f"main_{n}.py"
            script.write_text(main + NOTING, encoding="utf-8")
            self._run(f"device-{n}", [*PYTHON, "device", script.name, *FILES[1:], "--id", str(n)])

    def window(self) -> int:
        """Windows that are closed."""
        try:
            return int(json.loads((self.directory / "devices.json").read_text(encoding="utf-8"))["window"])
        except (OSError, ValueError, KeyError):
            return -1

    def ended(self) -> bool:
        """Whether the server has ended."""
        return self.stack.processes.poll("server") is not None

    def wait(self, condition: Callable[[], Any], seconds: float) -> None:
        """Wait until something is true.

        Raises:
            RuntimeError: it is not; with the ends of the logs.
        """
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                raise RuntimeError(self._logs())
            time.sleep(0.05)

    def outage(self, what: str, seconds: float) -> dict[str, Any]:
        """Let something go away and come back, and wait until windows close again."""
        leave, come = {
            "broker": ([self._kill_broker], [self.stack.broker.start]),
            "way": ([self._close], [self._open]),
            "store": ([self.stack.storage.pause], [self.stack.storage.resume]),
            "both": ([self._kill_broker, self._close], [self.stack.broker.start, self._open]),
        }[what]
        before = self.window()
        for act in leave:
            act()
        time.sleep(seconds)
        if self.ended():
            raise RuntimeError(f"the run was over before {what} came back\n{self._logs()}")
        meanwhile = self.window()
        for act in come:
            act()
        back = time.monotonic()
        self.wait(lambda: self.window() > meanwhile, 60.0 + seconds)
        went_on = time.monotonic() - back
        return {"what": what, "windows": [before, meanwhile], "seconds": seconds, "went_on_after": went_on}

    def replayed(self) -> bool:
        """Whether one process comes to the same model from the log."""
        self._run("replay", [*PYTHON, "replay", str(self.directory)])
        self.wait(lambda: self.stack.processes.poll("replay") is not None, 300.0)
        return "(the same)" in self.stack.processes.log("replay").read_text(encoding="utf-8")

    def answered(self) -> list[Answer]:
        """What the devices have answered."""
        files = {n - 1: self.folder / f"answered_{n}" for n in range(1, DEVICES + 1)}
        return [(client, int(n)) for client, path in files.items() for n in path.read_text().split()]

    def account(self) -> dict[str, int]:
        """What became of every answer; see `account`."""
        log = read_run(self.directory)
        merged, refused, clients = (log.records(kind) for kind in ("arrival", "rejected", "client"))
        overdue = [r for r in clients if r["state"] == "overdue"]
        pairs = [[(r["client"], r["dispatch"]) for r in found] for found in (merged, refused, overdue)]
        return account(pairs[0], pairs[1], self.answered(), pairs[2])

    def objects(self) -> list[str]:
        """What is left in the store."""
        storage = self.stack.storage
        found = storage.client().list_objects_v2(Bucket=storage.bucket)
        return [item["Key"] for item in found.get("Contents", ())]

    def _run(self, name: str, command: list[str]) -> None:
        self.stack.run(name, command, cwd=self.folder, env=self._env)

    def _kill_broker(self) -> None:
        self.stack.processes.kill("broker")

    def _open(self) -> None:
        target = str(self.stack.storage.port)
        self._run("door", [sys.executable, "-m", "benchmarks.door", str(self._door), target])
        self.wait(lambda: _listens(self._door), 20.0)

    def _close(self) -> None:
        self.stack.processes.kill("door")

    def _logs(self) -> str:
        return "\n".join(
            f"--- {path.name}\n{path.read_text(errors='replace')[-2500:]}"
            for path in sorted(self.folder.glob("*.log"))
            if path.name not in ("broker.log", "storage.log")
        )


def _listens(port: int) -> bool:
    try:
        socket.create_connection((HOST, port), timeout=1.0).close()
    except OSError:
        return False
    return True


def account(
    merged: Sequence[Answer],
    refused: Sequence[Answer],
    answered: Sequence[Answer],
    overdue: Sequence[Answer] = (),
) -> dict[str, int]:
    """What became of every answer.

    Args:
        merged, refused: those in the log.
        answered: those that devices gave, of each device in order.
        overdue: dispatches that were not answered by their deadline.

    Returns:
        `twice`: merged again. `unknown`: in the log, and given by nobody. Of those that are not in it:
        `given_up`, where their device has missed its next deadline too, as one late answer of each is waited
        for; `after_the_end`, the last ones of their devices; `lost`, all others.
    """
    given, logged = set(answered), {*merged, *refused}
    missing = given - logged
    last = set(dict(answered).items())
    late = set(overdue)
    given_up = {(c, d) for c, d in missing & late if any(c == n and d < k for n, k in late)}
    return {
        "answered": len(given),
        "merged": len(merged),
        "refused": len(refused),
        "twice": len(merged) - len(set(merged)),
        "unknown": len(logged - given),
        "given_up": len(given_up),
        "after_the_end": len((missing - given_up) & last),
        "lost": len(missing - given_up - last),
    }


def measure(seconds: float, folder: Path, **options: Any) -> dict[str, Any]:
    """One run with all outages.

    Args:
        seconds: that each lasts.
        options: as of `Run`.

    Raises:
        RuntimeError: it does not go on after one, or does not come to its end.
    """
    with Stack(folder) as stack:
        run = Run(folder, stack, **options)
        run.start()
        run.wait(lambda: run.window() >= BETWEEN, 120.0)
        outages = []
        for what in ("broker", "way", "store", "both"):
            outages.append(run.outage(what, seconds))
            print(outages[-1], flush=True)
            after = run.window()
            run.wait(lambda a=after: run.window() >= a + BETWEEN, 60.0)  # type: ignore[misc]
        run.wait(run.ended, 120.0)
        status = stack.processes.poll("server")
        for n in range(1, DEVICES + 1):
            run.wait(lambda n=n: stack.processes.poll(f"device-{n}") == 0, 60.0)  # type: ignore[misc]
        end = read_run(run.directory).end
        return {
            "devices": DEVICES,
            "windows": None if end is None else end["windows"],
            "status": status,
            "outages": outages,
            "answers": run.account(),
            "left_in_store": len(run.objects()),
            "replay_is_the_same": run.replayed(),
        }


def table(path: Path = RESULTS) -> str:
    """The committed figures."""
    found = json.loads(path.read_text(encoding="utf-8"))
    names = {
        "broker": "broker killed",
        "way": "way to the store cut",
        "store": "store suspended",
        "both": "broker killed and way to the store cut",
    }
    lines = ["| for so long | seconds | windows go on after |", "| --- | --- | --- |"]
    lines += [
        f"| {names[o['what']]} | {o['seconds']:.0f} | {o['went_on_after']:.1f} s |" for o in found["outages"]
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="that each outage lasts")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    if arguments.table:
        print(table())
        return
    with tempfile.TemporaryDirectory() as folder:
        found = {"machine": machine(), **measure(arguments.seconds, Path(folder))}
    text = json.dumps(found, indent=1)
    print(text)
    if arguments.json is not None:
        arguments.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
