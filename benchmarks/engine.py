"""What the engine costs beyond the clients' steps, and how that grows with the number of clients.

    python -m benchmarks.bench engine

Overhead: windows of ten clients (high heterogeneity) on VGG11 with a trainer that does nothing, so what is
timed is everything else: ranking, cutting, placing, reading batches, gathering, admitting, merging, the
clock, the run log's records. It is set against the clients' SGD steps of batch 20, measured alone in the same
process. Growth: cost of an arrival among 10,000 and 100,000 clients against among 100. Memory: peak of a run,
less one model and the payloads down and up.
"""

from __future__ import annotations

import gc
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import models
from benchmarks.measure import Row, seconds
from fedgmr_plugin.config import FedGMRConfig
from fedgmr_plugin.engine.network import LogNormalLinks, VirtualNetwork
from fedgmr_plugin.engine.samples import Batch, BatchPlan, TensorSamples
from fedgmr_plugin.engine.server import Plan, Server
from fedgmr_plugin.engine.simulate import Simulation
from fedgmr_plugin.engine.trainer import LocalStats, Metrics
from fedgmr_plugin.engine.workbench import Clients, Training, Workbench
from fedgmr_plugin.kernels.layout import build_layout


class Idle:
    """A trainer that reads its batches and does nothing."""

    def train(
        self,
        model: nn.Module,
        batches: Sequence[Batch],
        masks: dict[str, Tensor] | None,
        *,
        learning_rate: float,
        client: int,
    ) -> LocalStats:
        samples = sum(len(y) for _, y in batches)
        return LocalStats(len(batches), samples, 0.0, 0.0)

    def evaluate(self, model: nn.Module, batches: Iterable[Batch]) -> Metrics:
        return Metrics(0.5, 0.5, sum(len(y) for _, y in batches))


def simulation(
    model: nn.Module, samples: TensorSamples, clients: int, in_flight: int, windows: int
) -> Simulation:
    """A run that trains nothing; every client has `samples`."""
    config = FedGMRConfig(validation_fraction=0.0, trigger="time", heterogeneity="high")
    layout = build_layout(model)
    densities = config.initial_densities(clients)
    plan = Plan(0, windows, in_flight, windows, (len(samples),) * clients)
    return Simulation(
        Server(config, plan, layout, layout.gather(model)),
        VirtualNetwork(config, densities, 37.2, LogNormalLinks(config, densities, 0)),
        Workbench(
            config,
            layout,
            model,
            Clients(lambda _: samples, 0.0, 0, clients),
            Training(Idle(), BatchPlan(20, 5, 1, True, 0), 0.1),
        ),
        lambda: [],
        lambda record: None,
    )


def overhead() -> Row:
    """Engine against fifty steps of VGG11."""
    torch.manual_seed(0)
    model = models.vgg11()
    images = TensorSamples(torch.rand(200, 3, 32, 32), torch.randint(0, 10, (200,)))
    run = simulation(model, images, 10, 10, 1000)
    run.start()
    per_window: list[float] = []
    arrivals = 0
    for _ in range(26):  # one interval: masks are rebuilt once
        start, before = time.perf_counter(), run.server.dispatches
        run.step()
        per_window.append(time.perf_counter() - start)
        arrivals += run.server.dispatches - before
    ours = float(np.mean(per_window[1:])) / (arrivals / 26)

    x, y = images.take(np.arange(20))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    bare = seconds(step)
    detail = f"{1e3 * ours:.0f} ms a dispatch beside 5 steps of {1e3 * bare:.0f} ms"
    return Row("engine beyond the steps, VGG11", "bare loop", 1 + ours / (5 * bare), "<= 1.05", detail)


def growth() -> list[Row]:
    """Cost of an arrival against the number of clients, ten in flight."""
    samples = TensorSamples(torch.rand(40, 1, 28, 28), torch.randint(0, 10, (40,)))
    cost = {}
    for clients in (100, 10_000, 100_000):
        run = simulation(models.tiny_cnn(), samples, clients, 10, 10_000)
        run.start()
        times = []
        for _ in range(8):
            start, before = time.perf_counter(), run.server.dispatches
            for _ in range(25):
                run.step()
            times.append((time.perf_counter() - start) / (run.server.dispatches - before))
        cost[clients] = float(np.median(times[1:]))
    return [
        Row(
            f"an arrival among {clients:,} clients",
            "among 100",
            cost[clients] / cost[100],
            "<= 1.2",
            f"{1e6 * cost[clients]:.0f} us",
        )
        for clients in (10_000, 100_000)
    ]


def memory() -> Row:
    """Peak memory of an idle run of VGG11 beyond one model and the payloads, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.engine"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    above, vector = map(float, printed.split())
    detail = f"{above / 1e6:.0f} MB, a vector {vector / 1e6:.0f} MB"
    return Row("peak memory above model and payloads", "dense vector", above / vector, "<= 4", detail)


def print_memory() -> None:
    """Peak resident bytes beyond one model and the payloads in flight, and the bytes of a dense vector."""
    torch.set_num_threads(1)
    model = models.vgg11()
    images = TensorSamples(torch.rand(200, 3, 32, 32), torch.randint(0, 10, (200,)))
    simulation(model, images, 10, 10, 1000)  # what is imported and allocated once is not the run's
    gc.collect()
    before = _memory("VmRSS")
    run = simulation(model, images, 10, 10, 1000)
    run.start()
    payloads = 0
    for _ in range(30):
        down = {id(sent.values_S): sent.values_S.nbytes for sent in run.pending.values()}
        sizes = {number: sent.values_S.nbytes for number, sent in run.pending.items()}
        run.step()
        up = sum(size for number, size in sizes.items() if number not in run.pending)
        payloads = max(payloads, sum(down.values()) + up)
    vector = 4 * run.layout.size
    print(_memory("VmHWM") - before - payloads - vector, vector)


def _memory(kind: str) -> int:
    """Bytes of this process in memory: VmRSS now, VmHWM at most so far."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{kind}:"):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status has no {kind}")


def measure() -> list[Row]:
    """The rows of this benchmark."""
    torch.set_num_threads(1)
    return [overhead(), *growth(), memory()]


if __name__ == "__main__":
    print_memory()
