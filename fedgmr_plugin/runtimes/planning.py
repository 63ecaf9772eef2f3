"""What a run will cost, before it trains: layers, sub-models, seconds and windows per client."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, NoReturn

import torch
from torch import nn

from fedgmr_plugin.config import FedGMRConfig
from fedgmr_plugin.engine.decoupled import Budget
from fedgmr_plugin.engine.events import Dispatch
from fedgmr_plugin.engine.network import Transfer, VirtualNetwork, payload_megabytes
from fedgmr_plugin.engine.sampling import choose_idle
from fedgmr_plugin.kernels.layout import build_layout, validate
from fedgmr_plugin.kernels.masks import Ranking, rank, refuse_empty, scores
from fedgmr_plugin.kernels.rounding import PAYLOAD_TYPES
from fedgmr_plugin.protocol.sizes import MessageSizes
from fedgmr_plugin.runtimes import setup, single_process
from fedgmr_plugin.runtimes.distributed import job, ranks
from fedgmr_plugin.runtimes.settings import FedMLKeys, fedml_keys, options

#: A rehearsal ends after so many windows, even if some class of clients has not been heard of by then.
MOST_WINDOWS = 500


@dataclass(frozen=True)
class SubModel:
    """One density: its coordinates, its share of all, and what it moves on the simulated link (MB).

    With ``payload_rule: encoded`` the download includes the mask, which travels when a client first meets it.
    """

    density: float
    coordinates: int
    share: float
    megabytes_down: float
    megabytes_up: float


@dataclass(frozen=True)
class ClientClass:
    """Clients of one initial density, and what a flight costs them at the density that they start with and at
    each rung above, while every other client holds that rung or more.

    Attributes:
        seconds: one flight of the slowest of them, mean over its flights; None where none ended in
            `MOST_WINDOWS` windows.
        windows: the same in windows of the mean length.
    """

    initial_density: float
    clients: tuple[int, ...]
    seconds: dict[float, float | None]
    windows: dict[float, float | None]


@dataclass(frozen=True)
class RunPlan:
    """The answer of ``fedgmr plan``: sizes in MB (10^6 bytes), times in virtual seconds without jitter.

    Attributes:
        windows: windows that the run will have, about.
        first_restoration: window after which a density can be raised at the earliest; None where none is.
    """

    layers: tuple[dict[str, Any], ...]
    findings: tuple[dict[str, str], ...]
    coordinates: int
    prunable: int
    model_megabytes: float
    window_seconds: float
    windows: int
    mean_density: float
    first_restoration: int | None
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
    """While active, FedML's simulators plan the run and raises `Planned`."""

    def build(args: Any, _device: Any, _dataset: Any, model: nn.Module, *_: Any) -> NoReturn:
        raise Planned(plan_run(options(args), fedml_keys(args), model))

    originals = single_process.build, ranks.build
    single_process.build = build  # type: ignore[assignment]
    ranks.build = lambda _backend, *given: build(*given)
    try:
        with job.rehearsal():
            yield
    finally:
        single_process.build, ranks.build = originals


def fedml_simulation() -> None:
    """FedML's own script for a model and a data set of its hub."""
    import fedml

    fedml.run_simulation()


def plan_run(config: FedGMRConfig, keys: FedMLKeys, model: nn.Module) -> RunPlan:
    """Plan a run of `model`; nothing is trained and no data are read.

    The sizes of sub-models are those of the initial weights (pruned biases depend on the weights), ranked by
    |w|, whatever `score` is. Times come from rehearsals on the simulated network without jitter: clients
    share the server's links as in the run.

    Raises:
        ConfigError: GMR-109. ModelError: GMR-2xx.
    """
    layout = build_layout(model, config.dense_layers)
    initial, start = config.initial_densities(keys.clients), config.start_densities(keys.clients)
    rungs = [rung for rung in config.density_ladder if rung > min(start)]
    w_D = layout.gather(model)
    ranking = rank(
        layout,
        w_D,
        scores("magnitude", layout, w_D),
        sorted({*start, *rungs}),
        layer_floor=config.layer_floor,
        prune_biases=config.prune_biases,
    )
    refuse_empty(ranking)
    megabytes = setup.dense_megabytes(config, layout)
    decoupled = "decoupled" in (config.upload, config.download)
    budget = Budget(layout, initial) if decoupled else None
    stage = _Stage(config, keys, ranking, layout.dtype, initial, megabytes, budget)
    at_start, *restored = [stage.rehearse([max(d, rung) for d in start]) for rung in (0.0, *rungs)]
    classes = []
    for d0 in sorted(set(initial), reverse=True):
        members = tuple(n for n in range(keys.clients) if initial[n] == d0)
        own = start[members[0]]
        runs = {own: at_start} | {r: run for r, run in zip(rungs, restored, strict=True) if r > own}
        seconds = {d: _slowest(run.seconds[n] for n in members) for d, run in runs.items()}
        windows = {d: None if s is None else s / runs[d].window for d, s in seconds.items()}
        classes.append(ClientClass(d0, members, seconds, windows))
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
        window_seconds=at_start.window,
        windows=_windows(config, keys, at_start.window),
        mean_density=sum(start) / keys.clients,
        first_restoration=_first_restoration(config, at_start.window) if min(start) < 1.0 else None,
        sub_models=tuple(
            SubModel(d, end, end / layout.size, *stage.moves(d)[:2])
            for d, end in zip(ranking.densities, ranking.ends, strict=True)
        ),
        classes=tuple(classes),
    )


def _windows(config: FedGMRConfig, keys: FedMLKeys, window_seconds: float) -> int:
    """Windows of the run, as long as they are of this length."""
    if config.time_budget is None:
        return keys.windows
    return min(keys.windows, math.ceil(config.time_budget / window_seconds))


def _first_restoration(config: FedGMRConfig, window_seconds: float) -> int | None:
    """Windows before the earliest look at which the trigger can raise a density."""
    looks = [1] if config.trigger == "gradient" else []
    if config.trigger in ("plateau", "mixed"):
        looks.append(config.patience + 1)
    if config.trigger in ("time", "mixed") and config.time_budget is not None:
        due = config.time_fractions[0] * config.time_budget / window_seconds
        looks.append(max(1, math.ceil(due / config.interval)))
    return min(looks) * config.interval if looks else None


class _Rehearsal(NamedTuple):
    """Mean length of a window, and mean seconds of each client's flights [N]; None where none ended."""

    window: float
    seconds: list[float | None]


@dataclass(frozen=True)
class _Stage:
    """The simulated network of a run, without jitter, and what its dispatches move."""

    config: FedGMRConfig
    keys: FedMLKeys
    ranking: Ranking
    dtype: torch.dtype
    initial: tuple[float, ...]
    megabytes: float
    budget: Budget | None = None

    def moves(self, density: float) -> Transfer:
        """MB of a client's first dispatch at `density` and of its answer."""
        return self._transfer(self._sizes(), 0, 0, density)

    def rehearse(self, densities: Sequence[float]) -> _Rehearsal:
        """Fly clients of fixed `densities` for an interval at least, and until every class has landed.

        Clients are chosen as the server chooses them.
        """
        still = self.config.model_copy(update={"client_jitter": 0.0, "server_jitter": 0.0})
        links = setup.links(still, self.initial, self.keys.seed)
        network = VirtualNetwork(still, self.initial, self.megabytes, links)
        sizes = self._sizes()
        since: dict[int, float] = {}
        flown: list[list[float]] = [[] for _ in self.initial]
        silent = set(self.initial)
        flights = 0
        while network.window < MOST_WINDOWS and (silent or network.window < self.config.interval):
            if network.window % self.config.interval == 0:
                sizes.forget_clients()
            chosen = choose_idle(
                self.keys.seed, network.window, self.keys.clients, since, self.keys.in_flight
            )
            for n in chosen:
                d, flights = densities[n], flights + 1
                network.dispatch(flights, n, d, self._share(d), self._transfer(sizes, n, flights, d))
                since[n] = network.now
            for arrival in network.close_window().arrivals:
                flown[arrival.client].append(arrival.time - since.pop(arrival.client))
                silent.discard(self.initial[arrival.client])
        return _Rehearsal(
            network.now / network.window, [sum(took) / len(took) if took else None for took in flown]
        )

    def _sizes(self) -> MessageSizes:
        return MessageSizes(PAYLOAD_TYPES[self.config.payload_dtype])

    def _transfer(self, sizes: MessageSizes, client: int, dispatch: int, density: float) -> Transfer:
        rung = self.ranking.rung(density)
        if self.budget is not None:
            return self.budget.transfer(self.config, self.megabytes, client, self.ranking, rung)
        if self.config.payload_rule == "encoded":
            values_S = torch.empty(self.ranking.ends[rung], dtype=self.dtype, device="meta")
            return sizes(Dispatch(dispatch, client, 0, 0, density, self.ranking, rung, values_S, 1.0))
        size = payload_megabytes(self.config, self.megabytes, density, self._share(density))
        return Transfer(size, size)

    def _share(self, density: float) -> float:
        return self.ranking.ends[self.ranking.rung(density)] / self.ranking.rung_D.numel()


def _slowest(seconds: Iterable[float | None]) -> float | None:
    """The largest that is known."""
    return max((s for s in seconds if s is not None), default=None)
