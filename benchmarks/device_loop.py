"""How long a device waits for its next sub-model, with a real broker and a real store in the loop.

    python -m benchmarks.device_loop --json benchmarks/results/devices.json

The server is the one of every run (`LiveRun`: MQTT, S3, journal, signed notes, merges), over Mosquitto and
moto's S3 on the loopback interface. The devices are real ones too, all in one other process with one MQTT
connection: they fetch, store and sign, but answer with a small random change instead of training, after a
pause. Measured is the time from the moment in which a device has stored its answer and tells so to that in
which its next task arrives; and the same without the time in which the server waited for the window to
close, which the configuration says. The other figures of the file stay.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from benchmarks.devices import RESULTS, answer, model
from benchmarks.measure import machine
from fedgmr_plugin.engine.events import Dispatch
from fedgmr_plugin.engine.seeds import numpy_generator
from fedgmr_plugin.kernels.layout import build_layout
from fedgmr_plugin.protocol.notes import AnswerNote, TaskNote
from fedgmr_plugin.protocol.runlog import read_run
from fedgmr_plugin.runtimes import host
from fedgmr_plugin.runtimes.devices.connection import services
from fedgmr_plugin.runtimes.devices.device import Device
from fedgmr_plugin.runtimes.devices.hands import ThreadedHands
from fedgmr_plugin.runtimes.devices.inbox import Inbox
from fedgmr_plugin.runtimes.devices.memory import Memory
from fedgmr_plugin.runtimes.devices.mqtt import MqttLink
from fedgmr_plugin.runtimes.devices.store import S3Store
from fedgmr_plugin.runtimes.local.stack import Stack

RUN = "1"
#: Devices, and the median of their pauses in seconds: four to five answers a second.
SIZES = ((100, 20.0), (1000, 200.0))
#: Outboxes of the devices' process: what one device stores does not wait for all others.
OUTBOXES = 16
OPTIONS = {
    "heterogeneity": "high",
    "trigger": "none",
    "window_slack": 0.5,
    "window_limit": 2.0,
    "answer_deadline": 600.0,
    "validation_fraction": 0.0,
}


def key(device: int) -> bytes:
    """The key of a device."""
    return device.to_bytes(32, "little")


# -- the devices -------------------------------------------------------------------------------------------


class Watched(Device):
    """A device that notes when it said what, and when it was told.

    Attributes:
        said: dispatch to the second at which its answer was ready to be told.
        told: dispatches and seconds of the tasks that it was told, in order.
    """

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self.said: dict[int, float] = {}
        self.told: list[tuple[int, float]] = []

    def _say(self, note: Any, fields: dict[str, Any]) -> None:
        super()._say(note, fields)
        if isinstance(note, AnswerNote):
            # After the answer's object, and in order: the outbox has told it.
            self._hands._give(lambda: self.said.setdefault(note.dispatch, time.monotonic()))  # type: ignore[attr-defined]

    def _task(self, note: TaskNote) -> None:
        if all(note.dispatch != dispatch for dispatch, _ in self.told):
            self.told.append((note.dispatch, time.monotonic()))
        super()._task(note)


def crowd(devices: int, pause: float, args: Any, until: Path) -> None:
    """Be so many devices until the file `until` is there; then write into it what was noted."""
    broker, bucket = services(args)
    inbox, due = Inbox(), list[tuple[float, int, Callable[[], None]]]()
    numbers = itertools.count()
    layout = build_layout(model())
    pace = numpy_generator(0, "pace").lognormal(0.0, 0.5, devices) * pause
    there: dict[str, Watched] = {}
    topics = [f"fedml_{RUN}_0_{n}" for n in range(1, devices + 1)]
    link, store = MqttLink(broker, topics, inbox), S3Store(bucket)
    hands = [ThreadedHands(store, link, inbox, fetches=2) for _ in range(OUTBOXES)]

    def later(seconds: float, call: Callable[[], None]) -> None:
        heapq.heappush(due, (time.monotonic() + seconds, next(numbers), call))

    def train(n: int) -> Callable[[Dispatch, Any], None]:
        return lambda sent, then: later(float(pace[n - 1]), lambda: then(answer(sent)))

    def beat(device: Watched) -> None:
        device.tick()
        later(max(device.next_tick() - time.monotonic(), 0.01), lambda: beat(device))

    link.start()
    for some in hands:
        some.start()
    link.connected.wait(10.0)
    for n in range(1, devices + 1):
        common = (RUN, 0, n, key(n), layout, 100, train(n), hands[n % OUTBOXES], Memory(), time.monotonic)
        device = Watched(*common, 30.0)
        there[device.hears] = device
        later(n * 20.0 / devices, lambda d=device: (d.begin(), beat(d)))  # type: ignore[misc]
    while not until.exists():
        while due and due[0][0] <= time.monotonic():
            heapq.heappop(due)[2]()
        wait = min(due[0][0] - time.monotonic(), 0.2) if due else 0.2
        with suppress(queue.Empty):
            item = inbox.get(timeout=max(wait, 0.0)) if wait > 0 else inbox.get_nowait()
            item() if callable(item) else there[item[0]].message(*item)
    noted = [[list(d.said.items()), d.told] for d in there.values()]
    until.with_name("noted.json").write_text(json.dumps(noted), encoding="utf-8")
    link.stop()


# -- the server --------------------------------------------------------------------------------------------


class _Over(Exception):
    """Nothing more is measured."""


def _stop() -> None:
    raise _Over


def measure(devices: int, pause: float, warm: float, seconds: float) -> dict[str, Any]:
    """One run, of which the last `seconds` count."""
    host.prepare()
    from fedgmr_plugin.runtimes.devices.server import Transport, assemble_live, prepare_server

    with tempfile.TemporaryDirectory() as name, Stack(name) as stack:
        folder = Path(name)
        ids = list(range(1, devices + 1))
        (folder / "keys.json").write_text(json.dumps({str(n): key(n).hex() for n in ids}))
        connection = stack.connection().section()["comm_args"]
        args = SimpleNamespace(
            run_id=RUN,
            client_id_list=ids,
            client_num_in_total=devices,
            client_num_per_round=devices,
            comm_round=1_000_000,
            random_seed=0,
            batch_size=20,
            learning_rate=0.1,
            dataset="none",
            fedgmr_args={
                **OPTIONS,
                "device_keys": str(folder / "keys.json"),
                "output_dir": name,
                "run_name": "loop",
                "progress": False,
            },
            **connection,
        )
        data = [(torch.zeros(20, 1, 8, 8), torch.zeros(20, dtype=torch.int64))]
        broker, bucket = services(args)
        run = assemble_live(
            prepare_server(args, None, data, model()),
            None,
            lambda desk, inbox: Transport(MqttLink(broker, desk.topics, inbox), S3Store(bucket)),
        )
        began: list[float] = []

        def watch() -> None:
            time.sleep(warm)
            began.append(time.monotonic())
            time.sleep(seconds)
            began.append(time.monotonic())
            run.inbox.put(_stop)

        (folder / "args.json").write_text(json.dumps(connection), encoding="utf-8")
        command = [sys.executable, "-m", "benchmarks.device_loop", "--crowd", str(folder)]
        others = subprocess.Popen([*command, "--devices", str(devices), "--pause", str(pause)])
        threading.Thread(target=watch, daemon=True).start()
        with suppress(_Over):
            run.train()
        (folder / "over").touch()
        if others.wait(60) != 0:
            raise RuntimeError("the devices' process has failed")
        noted = json.loads((folder / "noted.json").read_text(encoding="utf-8"))
        zero = run.clock._then - run.clock._at
        log = read_run(folder / "loop")
        windows = {r["window"]: r["end"] + zero for r in log.records("window")}
        arrived = {
            r["dispatch"]: (r["time"] + zero, windows[r["window"]])
            for r in log.records("arrival")
            if r["window"] in windows
        }
    return {"devices": devices, "seconds": seconds, **latencies(noted, arrived, began[0], began[1])}


def latencies(
    noted: Any, arrived: dict[int, tuple[float, float]], begin: float, end: float
) -> dict[str, Any]:
    """Medians and 99th percentiles in milliseconds, of the answers told between two seconds.

    Args:
        noted: `said` and `told` of each device.
        arrived: dispatch to when its answer was read, and when its window had closed.
    """
    whole, own, reading, telling = [], [], [], []
    unanswered = 0
    for said, told in noted:
        for dispatch, second in said:
            if not begin <= second < end:
                continue
            following = [when for number, when in told if number > dispatch]
            if not following or dispatch not in arrived:
                unanswered += 1
                continue
            read, closed = arrived[dispatch]
            whole.append(following[0] - second)
            own.append(whole[-1] - (closed - read))
            reading.append(read - second)
            telling.append(following[0] - closed)

    def milliseconds(found: list[float], percent: float) -> float:
        return 1e3 * float(np.percentile(found, percent))

    return {
        "answers": len(whole),
        "under_way_at_the_end": unanswered,
        "next_task_median_ms": milliseconds(whole, 50),
        "next_task_p99_ms": milliseconds(whole, 99),
        "own_median_ms": milliseconds(own, 50),
        "own_p99_ms": milliseconds(own, 99),
        "until_read_p99_ms": milliseconds(reading, 99),
        "from_close_p99_ms": milliseconds(telling, 99),
    }


def main() -> None:
    """Measure and add to the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--seconds", type=float, default=120.0, help="that are measured")
    parser.add_argument("--warm", type=float, default=230.0, help="that come before")
    parser.add_argument("--crowd", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--devices", type=int, help="instead of 100, and then 1,000")
    parser.add_argument("--pause", type=float, default=20.0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.crowd is not None:
        args = SimpleNamespace(**json.loads((arguments.crowd / "args.json").read_text(encoding="utf-8")))
        crowd(arguments.devices, arguments.pause, args, arguments.crowd / "over")
        return
    sizes = SIZES if arguments.devices is None else ((arguments.devices, arguments.pause),)
    found = []
    for devices, pause in sizes:
        found.append(measure(devices, pause, arguments.warm, arguments.seconds))
        print(json.dumps(found[-1], indent=1), flush=True)
    if arguments.json is not None:
        before = json.loads(RESULTS.read_text(encoding="utf-8"))
        loop = {"machine": machine(), "sizes": found}
        arguments.json.write_text(json.dumps({**before, "loop": loop}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
