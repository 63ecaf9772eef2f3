"""How near the rule that gives clients to processes comes to the shortest possible time.

    python -m benchmarks.bench schedule

Simulated time, no training: 8 GPUs, 1,000 clients whose training takes log-normal times by client and more
with density, 5 % noise from one training to the next. The rule is the real one, `Tasks`, given out as `Pool`
does it: rank 0 trains while it waits, every other rank holds two tasks, and costs are learned from what came
back. A round cannot take less than max(work / speed of all, longest training / speed of the fastest).

References: FedML's scheduling, equal numbers of clients in the order sampled; and the longest first with
exact costs, each to whoever ends it first.

In asynchronous windows only some of what is in flight is needed. What counts there is the share of the GPUs'
time that went into updates that arrived, and the run's time against its bound: the work again, or the chain
of windows, each of which waits for what is sent after the one before.
"""

from __future__ import annotations

import heapq
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.measure import Row
from fedgmr_plugin.config import FedGMRConfig
from fedgmr_plugin.engine.events import Dispatch
from fedgmr_plugin.kernels.masks import Ranking
from fedgmr_plugin.runtimes.distributed.pool import DEPTH
from fedgmr_plugin.runtimes.distributed.tasks import Tasks, Work

Floats = NDArray[np.float64]

CLIENTS, GPUS = 1000, 8
ROUND, ROUNDS = 100, 30
SEEDS = range(5)
EQUAL = np.ones(GPUS)
UNEQUAL = np.linspace(1.0, 2.5, GPUS)
#: Spread of the clients' samples, and of one training of a client to the next (sigma of the logarithm).
BY_CLIENT, NOISE = 0.7, 0.05
#: Share of a training's time that does not depend on density.
FIXED = 0.3
#: Asynchronous windows: dispatches in flight, windows, seconds of a merge in mean trainings.
IN_FLIGHT, WINDOWS, MERGE = 100, 100, 0.25


class Workload:
    """Clients, their densities, and how long they train, in seconds on a GPU of speed 1; one seed."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.densities = FedGMRConfig(heterogeneity="high").initial_densities(CLIENTS)
        self.samples = self.rng.lognormal(0.0, BY_CLIENT, CLIENTS)
        self.mean = self.samples * (FIXED + (1 - FIXED) * np.asarray(self.densities))
        rungs = sorted(set(self.densities))
        self._ranking = Ranking(tuple(rungs), torch.zeros(1, dtype=torch.int16))
        self._values = [torch.empty(round(1000 * density)) for density in rungs]
        self._count = 0

    def dispatch(self, client: int, version: int) -> tuple[Dispatch, float]:
        """What the server sends, and how long it will train."""
        density = self.densities[client]
        rung = self._ranking.rung(density)
        sent = Dispatch(self._count, client, version, 0, density, self._ranking, rung, self._values[rung])
        self._count += 1
        return sent, float(self.mean[client] * self.rng.lognormal(0.0, NOISE))

    def round(self, version: int, size: int) -> list[tuple[Dispatch, float]]:
        """So many clients, drawn without replacement, in the order drawn."""
        clients = self.rng.choice(CLIENTS, size, replace=False)
        return [self.dispatch(int(n), version) for n in clients]


class Ranks:
    """`Pool` in simulated time: GPU 0 is the server's own.

    Args:
        speeds: of the GPUs, as factors.
        work: what is known of the clients' costs beforehand.
        depth: tasks that a rank holds.
        travel: seconds that a task, or an update, is under way.

    Attributes:
        now: simulated seconds.
        busy: seconds of training by dispatch.
    """

    def __init__(
        self,
        speeds: Floats,
        work: Work = lambda client: 1.0,
        depth: int = DEPTH,
        travel: float = 0.0,
    ) -> None:
        self.tasks, self.now = Tasks(work), 0.0
        self.busy: dict[int, float] = {}
        self._speeds, self._depth, self._travel = speeds, depth, travel
        self._cost: dict[int, float] = {}
        self._held: list[dict[int, Dispatch]] = [{} for _ in speeds]
        self._free_at = np.zeros(len(speeds))
        self._events: list[tuple[float, int, int]] = []
        self._done: set[int] = set()

    def begin(self, sent: Dispatch, cost: float, *, ahead: bool = True) -> None:
        """See `Pool.begin`; where not `ahead`, nobody trains it before it is needed."""
        self._cost[sent.dispatch] = cost
        if ahead:
            self.tasks.add(sent)
            self._give(waiting=False)

    def finish(self, sent: Sequence[Dispatch]) -> None:
        """See `Pool.finish`: on return, `now` is when the last of these updates was there."""
        held = {n for held in self._held for n in held}
        missing = {d.dispatch for d in sent} - self._done
        self.tasks.need(d for d in sent if d.dispatch in missing and d.dispatch not in held)
        self._give(waiting=True)
        while missing or self._held[0]:
            missing.discard(self._next())
            self._give(waiting=bool(missing))
        self._done.difference_update(d.dispatch for d in sent)

    def pass_time(self, seconds: float) -> None:
        """The server is busy with something else."""
        until = self.now + seconds
        while self._events and self._events[0][0] <= until:
            self._next()
            self._give(waiting=False)
        self.now = until

    def _next(self) -> int:
        """An update comes back; its dispatch."""
        self.now, rank, number = heapq.heappop(self._events)
        sent = self._held[rank].pop(number)
        self.tasks.costs.learn(sent, self.busy[number])
        self._done.add(number)
        return number

    def _give(self, *, waiting: bool) -> None:
        """Everybody takes what the rule gives, in turn, those that hold less first."""
        given = True
        while given:
            given = False
            for rank in sorted(range(len(self._held)), key=lambda r: (len(self._held[r]), r)):
                held = self._held[rank]
                if rank == 0:
                    sent = self.tasks.take(None, ahead=False) if waiting and not held else None
                elif len(held) < self._depth:
                    sent = self.tasks.take(rank, len(self._held) * bool(held), ahead=not held)
                else:
                    sent = None
                if sent is not None:
                    self._train(rank, sent)
                    given = True

    def _train(self, rank: int, sent: Dispatch) -> None:
        travel = self._travel if rank else 0.0
        seconds = self._cost.pop(sent.dispatch) / self._speeds[rank]
        self._held[rank][sent.dispatch] = sent
        self.busy[sent.dispatch] = seconds
        self._free_at[rank] = max(self._free_at[rank], self.now + travel) + seconds
        heapq.heappush(self._events, (self._free_at[rank] + travel, rank, sent.dispatch))


def bound(costs: Floats, speeds: Floats) -> float:
    """Seconds that a round takes at least."""
    return float(max(costs.sum() / speeds.sum(), costs.max() / speeds.max()))


def in_equal_numbers(costs: Floats, speeds: Floats) -> float:
    """Seconds of a round whose clients are cut, in the order drawn, into parts of equal numbers."""
    parts = np.array_split(costs, len(speeds))
    return max(float(part.sum() / speed) for part, speed in zip(parts, speeds, strict=True))


def longest_first(costs: Floats, speeds: Floats) -> float:
    """Seconds of a round, the longest first, each to the GPU that ends it first; all costs are known."""
    ends = np.zeros(len(speeds))
    for cost in sorted(costs, reverse=True):
        best = int(np.argmin(ends + cost / speeds))
        ends[best] += cost / speeds[best]
    return float(ends.max())


@dataclass
class Ratios:
    """Seconds of rounds, divided by the least possible, one list for each way."""

    ours: list[float]
    equal_numbers: list[float]
    oracle: list[float]


def rounds(
    speeds: Floats,
    seed: int,
    size: int = ROUND,
    depth: int = DEPTH,
    travel: float = 0.0,
    *,
    counts: bool = False,
) -> Ratios:
    """Synchronous rounds, the first one included; with `counts` the clients' samples are known."""
    workload = Workload(seed)
    work = workload.samples.__getitem__ if counts else lambda client: 1.0
    ranks = Ranks(speeds, work, depth, travel)
    ratios = Ratios([], [], [])
    for version in range(ROUNDS):
        sampled = workload.round(version, size)
        start = ranks.now
        for sent, cost in sampled:
            ranks.begin(sent, cost)
        ranks.finish([sent for sent, _ in sampled])
        costs = np.array([cost for _, cost in sampled])
        least = bound(costs, speeds)
        ratios.ours.append((ranks.now - start) / least)
        ratios.equal_numbers.append(in_equal_numbers(costs, speeds) / least)
        ratios.oracle.append(longest_first(costs, speeds) / least)
    return ratios


def windows(seed: int, *, ahead: bool) -> tuple[float, float]:
    """Asynchronous windows on equal GPUs.

    A dispatch arrives in the window that it was made for, or, from a client of less than the whole model,
    some windows later: geometric, one in four a window.

    Returns:
        Share of the GPUs' time that went into updates that arrived; the run's time against its bound.
    """
    workload, ranks = Workload(seed), Ranks(EQUAL)
    merge = MERGE * float(workload.mean.mean())
    due: dict[int, list[Dispatch]] = {}

    def send(clients: Iterable[int], window: int) -> None:
        for n in clients:
            sent, cost = workload.dispatch(n, window)
            late = 0 if sent.density == 1.0 else int(workload.rng.geometric(0.25)) - 1
            due.setdefault(window + late, []).append(sent)
            ranks.begin(sent, cost, ahead=ahead)

    send(map(int, workload.rng.choice(CLIENTS, IN_FLIGHT, replace=False)), 0)
    work, opened = 0.0, [0.0]
    for window in range(WINDOWS):
        needed = due.pop(window, [])
        ranks.finish(needed)
        costs = {d: ranks.busy[d.dispatch] for d in needed}
        work += sum(costs.values())
        opened.append(max([opened[-1], *(opened[d.version] + cost for d, cost in costs.items())]) + merge)
        ranks.pass_time(merge)
        send(map(int, workload.rng.choice(CLIENTS, len(needed), replace=False)), window + 1)
    return work / (GPUS * ranks.now), ranks.now / max(opened[-1], work / GPUS)


def synchronous(name: str, speeds: Floats) -> list[Row]:
    """Rounds of 100 clients: medians of their ratios to the bound, the first round of a seed apart."""
    runs = [rounds(speeds, seed) for seed in SEEDS]

    def row(what: str, which: Callable[[Ratios], list[float]]) -> Row:
        values = [ratio for run in runs for ratio in which(run)]
        detail = f"worst {max(values):.2f} of {len(values)} rounds"
        return Row(f"{what} on {name}", "least time", statistics.median(values), "", detail)

    return [
        row("round", lambda run: run.ours[1:]),
        row("first round", lambda run: run.ours[:1]),
        row("equal numbers", lambda run: run.equal_numbers[1:]),
        row("exact costs", lambda run: run.oracle[1:]),
    ]


def asynchronous() -> list[Row]:
    """Windows with and without training ahead."""
    rows = []
    for ahead in (True, False):
        runs = [windows(seed, ahead=ahead) for seed in SEEDS]
        share, ratio = (statistics.median(values) for values in zip(*runs, strict=True))
        what = "training ahead" if ahead else "nothing trained ahead"
        rows.append(Row(f"windows, {what}", "least time", ratio, "", f"GPUs busy {share:.1%}"))
    return rows


def measure() -> list[Row]:
    """The rows of this benchmark."""
    return [
        *synchronous("8 equal GPUs", EQUAL),
        *synchronous("8 GPUs of speed 1 to 2.5", UNEQUAL),
        *asynchronous(),
    ]
