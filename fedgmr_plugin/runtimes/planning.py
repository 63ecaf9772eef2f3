"""What a run will cost, before it trains: layers, sub-models, seconds and windows per client."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, NoReturn

import torch
from torch import nn

from fedgmr_plugin.config import FedGMRConfig
from fedgmr_plugin.engine.network import mean_flight_seconds, payload_megabytes
from fedgmr_plugin.kernels.layout import build_layout, validate
from fedgmr_plugin.kernels.masks import rank, scores
from fedgmr_plugin.runtimes import single_process
from fedgmr_plugin.runtimes.settings import fedml_keys, options


@dataclass(frozen=True)
class SubModel:
    """One density: its coordinates, its share of all, and its size on the simulated link (MB)."""

    density: float
    coordinates: int
    share: float
    megabytes: float


@dataclass(frozen=True)
class ClientClass:
    """Clients of one initial density, and what a flight costs them at each density from there on.

    Attributes:
        seconds, windows: one flight, by density; a window is the unconstrained clients' flight and the slack.
    """

    initial_density: float
    clients: tuple[int, ...]
    seconds: dict[float, float]
    windows: dict[float, float]


@dataclass(frozen=True)
class RunPlan:
    """The answer of ``fedgmr plan``: sizes in MB (10^6 bytes), times in virtual seconds without jitter."""

    layers: tuple[dict[str, Any], ...]
    findings: tuple[dict[str, str], ...]
    coordinates: int
    prunable: int
    model_megabytes: float
    window_seconds: float
    mean_density: float
    sub_models: tuple[SubModel, ...]
    classes: tuple[ClientClass, ...]

    def as_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return asdict(self)


class Planned(BaseException):
    """Ends a script at the point where training would begin; `plan` is the answer."""

    def __init__(self, plan: RunPlan) -> None:
        self.plan = plan


@contextmanager
def instead_of_training() -> Iterator[None]:
    """While active, FedML's single-process simulator plans the run and raises `Planned`."""

    def build(args: Any, _device: Any, _dataset: Any, model: nn.Module, *_: Any) -> NoReturn:
        raise Planned(plan_run(options(args), fedml_keys(args).clients, model))

    original = single_process.build
    single_process.build = build  # type: ignore[assignment]
    try:
        yield
    finally:
        single_process.build = original


def fedml_simulation() -> None:
    """FedML's own script for a model and a data set of its hub."""
    import fedml

    fedml.run_simulation()


def plan_run(config: FedGMRConfig, clients: int, model: nn.Module) -> RunPlan:
    """Plan a run of `model` with `clients` clients; nothing is trained and no data are read.

    The sizes of sub-models are those of the initial weights (pruned biases depend on the weights); times
    are means without jitter. Sub-models are ranked by |w|, whatever `score` is.

    Raises:
        ConfigError: GMR-109. ModelError: GMR-2xx.
    """
    layout = build_layout(model, config.dense_layers)
    initial = config.initial_densities(clients)
    start = (1.0,) * clients if config.dense_start else initial
    densities = sorted({*start, *(rung for rung in config.density_ladder if rung > min(start))})
    w_D = layout.gather(model)
    ranking = rank(
        layout,
        w_D,
        scores("magnitude", layout, w_D),
        densities,
        layer_floor=config.layer_floor,
        prune_biases=config.prune_biases,
    )
    megabytes = config.model_megabytes or layout.size * torch.finfo(layout.dtype).bits / 8e6
    shares = {d: end / layout.size for d, end in zip(densities, ranking.ends, strict=True)}

    def payload(density: float) -> float:
        return payload_megabytes(config, megabytes, density, shares[density])

    def seconds(client: int, density: float) -> float:
        return mean_flight_seconds(config, payload(density), client, density, initial[client])

    is_sync = config.schedule == "sync"
    awaited = [n for n in range(clients) if is_sync or initial[n] == max(initial)]
    slack = 0.0 if is_sync else config.window_slack
    window = max(seconds(n, start[n]) for n in awaited) + slack + config.aggregation_seconds
    classes = []
    for d0 in sorted(set(initial), reverse=True):
        members = tuple(n for n in range(clients) if initial[n] == d0)
        reachable = [d for d in densities if d >= start[members[0]]]
        slowest = {d: max(seconds(n, d) for n in members) for d in reachable}
        classes.append(ClientClass(d0, members, slowest, {d: s / window for d, s in slowest.items()}))
    return RunPlan(
        layers=tuple(
            {"name": e.name, "kind": e.kind, "size": e.size, "shape": list(e.shape)} for e in layout.entries
        ),
        findings=tuple(
            {"code": f.code, "severity": f.severity, "message": f.message}
            for f in validate(model, config.dense_layers)
        ),
        coordinates=layout.size,
        prunable=layout.prunable,
        model_megabytes=megabytes,
        window_seconds=window,
        mean_density=sum(start) / clients,
        sub_models=tuple(
            SubModel(d, end, shares[d], payload(d)) for d, end in zip(densities, ranking.ends, strict=True)
        ),
        classes=tuple(classes),
    )
