"""What the server of a run with real devices costs: 1,000 devices, and no training.

    python -m benchmarks.devices --json benchmarks/results/devices.json
    python -m benchmarks.devices --idle --json benchmarks/results/devices.json

The server is the real one (`Office`, journal on the disk and synchronised, signed notes, wire format,
merges), and so are the devices, except that they answer with a small random change. Messages and
objects pass through `Loopback`, so no broker or store is measured. The clock is virtual; times below are CPU
and disk time of this machine, spent inside the server's own calls.

Figures: arrivals a second that one server process could take; median, 99th percentile and longest of one
call, which is what the next message waits for its turn; and the resident memory after two minutes, at its
highest, and at the end. The journal begins anew every virtual minute, as it does behind a checkpoint.

With ``--idle`` a server of 1,000 devices of which none is there: the CPU time of its process while it listens
at a real broker, and over gRPC, in per cent of a core; the other figures of the file stay.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from benchmarks.measure import machine
from fedgmr_plugin.config import FedGMRConfig
from fedgmr_plugin.datasets import DigitsCNN
from fedgmr_plugin.engine.client import LocalUpdate
from fedgmr_plugin.engine.events import Dispatch
from fedgmr_plugin.engine.samples import BatchPlan, TensorSamples
from fedgmr_plugin.engine.seeds import isolated_rng
from fedgmr_plugin.engine.trainer import LocalStats
from fedgmr_plugin.protocol.journal import Journal
from fedgmr_plugin.runtimes import host
from fedgmr_plugin.runtimes.devices.connection import Broker as Where
from fedgmr_plugin.runtimes.devices.field import Field, Problem
from fedgmr_plugin.runtimes.devices.loopback import Loopback
from fedgmr_plugin.runtimes.local.broker import Broker
from fedgmr_plugin.runtimes.local.ports import free_port
from fedgmr_plugin.runtimes.local.processes import Supervisor
from fedgmr_plugin.runtimes.silos.objects import Objects

RESULTS = Path(__file__).parent / "results" / "devices.json"
DEVICES = 1000
#: Virtual seconds between two answers of a device, on average: its training, and the window.
TRAINING_SECONDS = 20.0
HEARTBEAT_SECONDS = 15.0


def model() -> torch.nn.Module:
    """The model of the demonstration, 18,378 parameters."""
    with isolated_rng(0):
        return DigitsCNN()


def nothing(count: int) -> TensorSamples:
    """Samples that nobody trains on."""
    return TensorSamples(torch.zeros(count, 1, 8, 8), torch.zeros(count, dtype=torch.int64))


def answer(sent: Dispatch) -> LocalUpdate:
    """A small random change instead of training, the same for every device of a rung."""
    generator = torch.Generator().manual_seed(sent.dispatch % 97)
    values_S = 1e-4 * torch.randn(len(sent.values_S), generator=generator)
    stats = LocalStats(5, 100, 1.0, 0.0)
    return LocalUpdate(sent.dispatch, sent.client, values_S, 1e-4, stats)


class Timed:
    """Wraps the server's calls and notes how long each took."""

    def __init__(self, field: Field) -> None:
        self.seconds: list[float] = []
        office = field.office
        for name in ("message", "tick", "_fetched"):
            setattr(office, name, self._timed(getattr(office, name)))

    def _timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*given: Any) -> Any:
            started = time.perf_counter()
            result = call(*given)
            self.seconds.append(time.perf_counter() - started)
            return result

        return timed


def rotate(field: Field) -> None:
    """Begin the journal anew, as a checkpoint does, and forget the field's own notes."""
    field.trained.clear()
    journal = field.office.journal
    if journal is not None:
        journal.close()
        journal.path.unlink()
        field.office.journal = Journal(journal.path)


def resident_megabytes() -> float:
    """Resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6


def measure(minutes: float, devices: int = DEVICES) -> dict[str, Any]:
    """One run of so many virtual minutes."""
    problem = Problem(
        model, lambda n: nothing(20), nothing(20), nothing(20), BatchPlan(20, 5, 1, True, 0), 0.1
    )
    config = FedGMRConfig(
        heterogeneity="high",
        trigger="none",
        window_slack=0.5,
        window_limit=2.0,
        answer_deadline=300.0,
        validation_fraction=0.0,
    )
    generator = np.random.default_rng(0)
    pace = generator.lognormal(0.0, 0.5, devices) * TRAINING_SECONDS
    counts: Counter[str] = Counter()
    keys = {n: n.to_bytes(32, "little") for n in range(1, devices + 1)}
    with tempfile.TemporaryDirectory() as folder:
        world = Loopback(0)
        world.keep_published = False
        field = Field(
            problem,
            config,
            Path(folder),
            devices,
            1_000_000,
            world,
            keys,
            heartbeat=HEARTBEAT_SECONDS,
            seconds=lambda n: float(pace[n]),
            trains=answer,
            record=lambda fields: counts.update([fields["type"]]),
        )
        timed = Timed(field)
        field.begin()
        for n in range(devices):
            field.device(n)
        field.until(lambda: world.now >= 120.0, 10**9)
        timed.seconds.clear()
        arrivals, start_memory, started = counts["arrival"], resident_megabytes(), world.now
        memory = [start_memory]
        for minute in range(1, int(minutes) + 1):
            field.until(lambda m=minute: world.now >= started + 60.0 * m, 10**9)  # type: ignore[misc]
            memory.append(resident_megabytes())
            rotate(field)
        arrived = counts["arrival"] - arrivals
        busy = sum(timed.seconds)
        return {
            "devices": devices,
            "virtual_minutes": int(minutes),
            "arrivals": arrived,
            "windows": field.office.server.version,
            "calls": len(timed.seconds),
            "arrivals_per_second": arrived / busy,
            "milliseconds_per_arrival": 1e3 * busy / arrived,
            "call_p99_ms": 1e3 * float(np.percentile(timed.seconds, 99)),
            "call_median_ms": 1e3 * statistics.median(timed.seconds),
            "call_longest_ms": 1e3 * max(timed.seconds),
            "memory_start_mb": start_memory,
            "memory_end_mb": memory[-1],
            "memory_highest_mb": max(memory),
        }


def idle_percent(transport: str, seconds: float, devices: int = DEVICES) -> float:
    """CPU time of a server's process in per cent of the time that it waits; `transport` is mqtt or grpc."""
    host.prepare()
    from fedgmr_plugin.runtimes.devices.server import assemble_live, prepare_server

    with tempfile.TemporaryDirectory() as folder, Supervisor(folder) as processes:
        ids = list(range(1, devices + 1))
        args = SimpleNamespace(
            client_id_list=ids,
            client_num_in_total=devices,
            client_num_per_round=devices,
            comm_round=10,
            random_seed=0,
            batch_size=20,
            learning_rate=0.1,
            dataset="none",
            fedgmr_args={"device_authentication": "off", "output_dir": folder, "progress": False},
        )
        data = [(torch.zeros(20, 1, 8, 8), torch.zeros(20, dtype=torch.int64))]
        setup = prepare_server(args, None, data, model())
        run = assemble_live(setup, None, _listener(transport, processes, setup.model))
        spent: list[float] = []

        def watch() -> None:
            time.sleep(5.0)  # the beginning is not counted
            started = time.process_time()
            time.sleep(seconds)
            spent.append(time.process_time() - started)
            run.inbox.put(_stop)

        threading.Thread(target=watch, daemon=True).start()
        with suppress(_Over):
            run.train()
    return 100 * spent[0] / seconds


class _Over(Exception):
    """Nothing more is measured."""


def _stop() -> None:
    raise _Over


def _listener(transport: str, processes: Supervisor, net: torch.nn.Module) -> Callable[..., Any]:
    """How a server listens."""
    from fedgmr_plugin.runtimes.devices.mqtt import MqttLink
    from fedgmr_plugin.runtimes.devices.server import Transport
    from fedgmr_plugin.runtimes.silos.grpc import GrpcLink, Peer

    def mqtt(desk: Any, inbox: Any) -> Transport:
        broker = Broker(processes)
        broker.start()
        return Transport(MqttLink(Where("127.0.0.1", broker.port), desk.topics, inbox), Objects())

    def grpc(desk: Any, inbox: Any) -> Transport:
        expected = {name: (tuple(t.shape), t.dtype) for name, t in net.state_dict().items()}
        rows, objects = {0: Peer("127.0.0.1", free_port())}, Objects()
        known = (expected, desk.keys_by_topic)
        return Transport(GrpcLink("0", 0, 0, rows, inbox, objects, *known, plain=False), objects)

    return {"mqtt": mqtt, "grpc": grpc}[transport]


def table(path: Path = RESULTS) -> str:
    """The committed figures."""
    d = json.loads(path.read_text(encoding="utf-8"))
    calls = f"{d['call_median_ms']:.2f}, {d['call_p99_ms']:.1f}, {d['call_longest_ms']:.0f} ms"
    memory = f"{d['memory_start_mb']:.0f}, {d['memory_end_mb']:.0f} MB"
    idle = ", ".join(f"{d['idle'][transport]:.1f}" for transport in ("mqtt", "grpc"))
    loop = [
        (
            f"{s['devices']:,} devices, real broker and store, {s['answers'] / s['seconds']:.1f} answers a "
            "second: from a stored answer to the next task without waiting for the window: median, "
            "99th percentile",
            f"{s['own_median_ms'] / 1e3:.2f}, {s['own_p99_ms'] / 1e3:.2f} s",
        )
        for s in d["loop"]["sizes"]
    ]
    each = f"{d['milliseconds_per_arrival']:.1f} ms each, journal synchronised"
    rows = (
        ("arrivals", f"{d['arrivals']:,} in {d['virtual_minutes']} virtual minutes, {d['windows']} windows"),
        ("arrivals a second that one process can take", f"{d['arrivals_per_second']:.0f} ({each})"),
        ("one call of the server: median, 99th percentile, longest", calls),
        ("resident memory, beginning and end", f"{memory}, the devices' included"),
        ("CPU of a server whose devices are away: MQTT, gRPC", f"{idle} % of a core"),
        *loop,
    )
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows)])


def main() -> None:
    """Measure and write the figures, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0, help="virtual minutes after two of warming up")
    parser.add_argument("--devices", type=int, default=DEVICES)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--idle", action="store_true", help="measure only what an idle server costs")
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    if arguments.table:
        print(table())
        return
    torch.set_num_threads(1)
    is_there = arguments.json is not None and arguments.json.exists()
    before = json.loads(arguments.json.read_text(encoding="utf-8")) if is_there else {}
    if arguments.idle:
        percent = {transport: idle_percent(transport, 60.0) for transport in ("mqtt", "grpc")}
        found = {**before, "idle": {"machine": machine(), **percent}}
    else:
        found = {**before, "machine": machine(), **measure(arguments.minutes, arguments.devices)}
    text = json.dumps(found, indent=1)
    print(text)
    if arguments.json is not None:
        arguments.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
