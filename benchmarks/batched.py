"""The clients of a window trained together (`batch_clients`) against one after another.

    python -m benchmarks.bench batched

On the GPU if there is one, else the smallest model on one thread of the CPU, where it is no goal: together is
slower there. Groups are ten clients of high heterogeneity, K = 5, batch 20. *Windows a second* is a whole run
of VGG11 on images of CIFAR-10's size, evaluation left out.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks import models
from benchmarks.measure import Row, seconds
from fedgmr_plugin.config import FedGMRConfig
from fedgmr_plugin.engine.batched import Batched
from fedgmr_plugin.engine.network import LogNormalLinks, VirtualNetwork
from fedgmr_plugin.engine.samples import BatchPlan, TensorSamples
from fedgmr_plugin.engine.server import Plan, Server
from fedgmr_plugin.engine.simulate import Simulation
from fedgmr_plugin.engine.trainer import BuiltinTrainer
from fedgmr_plugin.engine.workbench import Clients, Training, Workbench
from fedgmr_plugin.kernels.layout import build_layout

CLIENTS = 10
WINDOWS = 50
#: Name, model, shape of an image, classes.
Model = tuple[str, Callable[[], nn.Module], tuple[int, ...], int]
MODELS: tuple[Model, ...] = (
    ("tiny_cnn", models.tiny_cnn, (1, 28, 28), 10),
    ("Conv2", models.conv2, (1, 28, 28), 62),
    ("VGG11", models.vgg11, (3, 32, 32), 10),
)


def simulation(model: nn.Module, x: Tensor, y: Tensor, batch: int = 20) -> Simulation:
    """A run of ten clients who all have the samples `x`, `y`, on the model's device."""
    config = FedGMRConfig(validation_fraction=0.0, trigger="none", heterogeneity="high")
    layout, samples, device = build_layout(model), TensorSamples(x, y), next(model.parameters()).device
    densities = config.initial_densities(CLIENTS)
    trainer = BuiltinTrainer(device=device)
    bench = Workbench(
        config,
        layout,
        model,
        Clients(lambda _: samples, 0.0, 0, CLIENTS),
        Training(trainer, BatchPlan(batch, 5, 1, True, 0), 0.01),
    )
    return Simulation(
        Server(config, Plan(0, 10**6, CLIENTS, 10**6, (len(y),) * CLIENTS), layout, layout.gather(model)),
        VirtualNetwork(config, densities, 37.2, LogNormalLinks(config, densities, 0)),
        bench,
        lambda: [],
        lambda record: None,
        Batched(bench, CLIENTS),
    )


def measure() -> list[Row]:
    """The rows of this benchmark."""
    torch.set_num_threads(1)
    if not torch.cuda.is_available():
        return [_together(MODELS[0], torch.device("cpu"), 3, "")[0]]
    rows = []
    for which in MODELS:
        row, run = _together(which, torch.device("cuda"), 7, ">= 4")
        rows.append(row)
    return [*rows, _whole_run(run)]


def _together(which: Model, device: torch.device, repeats: int, goal: str) -> tuple[Row, Simulation]:
    """One window of a model, both ways."""
    name, make, shape, classes = which
    torch.manual_seed(0)
    x = torch.rand(400, *shape, device=device)
    y = torch.randint(classes, (400,), device=device)
    run = simulation(make().to(device), x, y)
    run.start()
    sent = list(run.pending.values())

    def in_turn() -> None:
        for dispatch in sent:
            run.bench.train(dispatch)
        _wait(device)

    def together() -> None:
        Batched(run.bench, CLIENTS).finish(sent)
        _wait(device)

    reference, ours = seconds(in_turn, repeats), seconds(together, repeats)
    detail = f"{1e3 * ours:.0f} ms, one after another {1e3 * reference:.0f} on {device.type}"
    what = f"speed of {CLIENTS} clients of {name} together"
    row = Row(what, "one after another", reference / ours, goal, detail)
    return row, run


def _whole_run(run: Simulation) -> Row:
    device = next(run.bench.model.parameters()).device
    for _ in range(5):
        run.step()
    _wait(device)
    start = time.perf_counter()
    for _ in range(WINDOWS):
        run.step()
    _wait(device)
    rate = WINDOWS / (time.perf_counter() - start)
    return Row("windows a second, VGG11", "", rate, ">= 60", f"{CLIENTS} clients, nobody restored")


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
