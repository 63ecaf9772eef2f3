"""Client updates a second of whole simulated runs, against a bare PyTorch loop.

    python -m benchmarks.bench updates

A CNN of 18,378 parameters on Fashion-MNIST, 50 clients, 10 in flight, K = 5, batch 20, high heterogeneity,
one thread a process. The bare loop is what one would write without a framework: a shuffling DataLoader per
client, SGD, the global weights loaded before and copied after. Loop and runs take turns in one process.
"""

from __future__ import annotations

import statistics
import time

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from benchmarks import data, models
from benchmarks.measure import Row
from fedgmr_plugin.config import FedGMRConfig
from fedgmr_plugin.engine.network import LogNormalLinks, VirtualNetwork
from fedgmr_plugin.engine.samples import BatchPlan, TensorSamples
from fedgmr_plugin.engine.server import Plan, Server
from fedgmr_plugin.engine.simulate import Simulation
from fedgmr_plugin.engine.trainer import BuiltinTrainer
from fedgmr_plugin.engine.workbench import Clients, Training, Workbench
from fedgmr_plugin.kernels.layout import build_layout
from fedgmr_plugin.runtimes.distributed.forks import forked

CLIENTS, IN_FLIGHT, STEPS, BATCH, RATE = 50, 10, 5, 20, 0.05
ROUNDS, WINDOWS = 7, 10


class Run:
    """A simulated run that can be timed window by window."""

    def __init__(self, parts: list[TensorSamples], workers: int) -> None:
        config = FedGMRConfig(validation_fraction=0.0, trigger="time", heterogeneity="high")
        torch.manual_seed(0)
        model, trainer = models.tiny_cnn(), BuiltinTrainer()
        layout = build_layout(model)
        plan = Plan(0, 100_000, IN_FLIGHT, 100_000, tuple(len(p) for p in parts))
        training = Training(trainer, BatchPlan(BATCH, STEPS, 1, True, 0), RATE)
        clients = Clients(parts.__getitem__, 0.0, 0, CLIENTS)
        bench = Workbench(config, layout, model, clients, training)
        self.workers = forked(bench.train, workers) if workers > 1 else None
        densities = config.initial_densities(CLIENTS)
        self.simulation = Simulation(
            Server(config, plan, layout, layout.gather(model)),
            VirtualNetwork(config, densities, 26.0, LogNormalLinks(config, densities, 0)),
            bench,
            lambda: [],
            self._count,
            executor=self.workers,
        )
        self.arrived = 0
        self.simulation.start()

    def _count(self, record: dict[str, object]) -> None:
        self.arrived += record["type"] == "arrival"

    def seconds_per_update(self) -> float:
        before, start = self.arrived, time.perf_counter()
        for _ in range(WINDOWS):
            self.simulation.step()
        return (time.perf_counter() - start) / (self.arrived - before)


def bare_seconds_per_update(parts: list[TensorSamples], model: nn.Module, chosen: np.ndarray) -> float:
    """FedAvg's local training as anybody writes it."""
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    start = time.perf_counter()
    for n in chosen:
        model.load_state_dict(weights)
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
        loader = iter(DataLoader(TensorDataset(parts[n].x, parts[n].y), batch_size=BATCH, shuffle=True))
        for _ in range(STEPS):
            x, y = next(loader)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        _ = {name: value.clone() for name, value in model.state_dict().items()}
    return (time.perf_counter() - start) / len(chosen)


def clients() -> list[TensorSamples]:
    """Fifty parts of Fashion-MNIST; of noise where the data are not at hand, which takes as long."""
    try:
        x, y = (tensor[:10_000] for tensor in data.load("fashion_mnist").train.tensors)
    except data.DataMissing:
        x, y = torch.rand(10_000, 1, 28, 28), torch.randint(0, 10, (10_000,))
    return [TensorSamples(*pair) for pair in zip(x.split(200), y.split(200), strict=True)]


def measure() -> list[Row]:
    """The rows of this benchmark."""
    torch.set_num_threads(1)
    parts = clients()
    model = models.tiny_cnn()
    rng = np.random.default_rng(0)
    runs = {workers: Run(parts, workers) for workers in (1, 2)}
    times: dict[int, list[float]] = {0: [], 1: [], 2: []}
    try:
        for round_ in range(ROUNDS + 1):
            taken = {0: bare_seconds_per_update(parts, model, rng.integers(0, CLIENTS, 30))}
            taken |= {workers: run.seconds_per_update() for workers, run in runs.items()}
            for kind, seconds in taken.items():
                times[kind] += [seconds] if round_ else []
    finally:
        if runs[2].workers is not None:
            runs[2].workers.close()
    bare = 1 / statistics.median(times[0])
    rows = []
    for workers, goal in ((1, ">= 1.3"), (2, ">= 2.2")):
        ratio = statistics.median(a / b for a, b in zip(times[0], times[workers], strict=True))
        ours = 1 / statistics.median(times[workers])
        name = f"client updates a second, {workers} process{'es' if workers > 1 else ''}"
        rows.append(Row(name, "bare loop", ratio, goal, f"{ours:.0f} against {bare:.0f}"))
    return rows
