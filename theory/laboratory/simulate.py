"""A tiny reference simulation of the method on a `Problem`, which logs the truth.

It is written for being read beside the derivations, not for speed, and shares no code with the
plugin's engine. In window t every client whose delay has passed arrives; the server merges; then
each of them is sent a new sub-model of version t + 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np

from theory.laboratory import records
from theory.laboratory.decompose import (
    Arrival,
    Decomposition,
    Form,
    decompose,
    local_steps,
    merge,
    shares,
)
from theory.laboratory.masks import Ints, mask, ranking
from theory.laboratory.problems import Floats, Problem

#: ``(windows merged, w, densities) -> (client, density), ...``: restorations decided as the run goes.
Restorer = Callable[[int, Floats, Sequence[float]], Iterable[tuple[int, float]]]


@dataclass(frozen=True)
class Schedule:
    """How a laboratory run goes.

    Attributes:
        windows: T. eta: local step size. local_steps: K.
        densities: initial d_n. delays: windows that a sub-model of client n is away (0 arrives at once).
        delay_grows: multiply a delay by d_n over its initial value, so that restoring costs staleness.
        restorations: ``(windows merged, client, density)``; densities must not decrease.
        form: delta or replacement. interval: windows between rankings.
        staleness: weights c_n constant or (1 + tau)^-exponent, times samples.
        samples: samples a client processes, ``[N]``; all alike when absent.
        seed: root of every random draw.
        probe_interval: windows between `probe` and `terms` records.
    """

    windows: int = 20
    eta: float = 0.05
    local_steps: int = 2
    densities: tuple[float, ...] = (1.0, 0.5, 0.2)
    delays: tuple[int, ...] = (0, 1, 2)
    delay_grows: bool = False
    restorations: tuple[tuple[int, int, float], ...] = ()
    form: Form = "delta"
    interval: int = 1
    staleness: Literal["constant", "polynomial"] = "constant"
    exponent: float = 0.6
    samples: tuple[float, ...] = ()
    seed: int = 0
    probe_interval: int = 1

    @property
    def gamma(self) -> float:
        """eta * K."""
        return self.eta * self.local_steps


class _Flight(NamedTuple):
    dispatch: int
    version: int
    density: float
    due: int
    arrival: Arrival


@dataclass(frozen=True)
class Trace:
    """What a run leaves: its log records in order, its models w_0..w_T, a decomposition a probed window."""

    records: list[dict[str, Any]] = field(default_factory=list)
    models: list[Floats] = field(default_factory=list)
    decompositions: list[Decomposition] = field(default_factory=list)

    def lines(self) -> list[bytes]:
        """The log, a line a record."""
        return [records.line(record) for record in self.records]


class _Server:
    """Mutable state of one run."""

    def __init__(self, problem: Problem, schedule: Schedule, trace: Trace) -> None:
        self.problem, self.schedule, self.trace = problem, schedule, trace
        self.w = problem.start.astype(np.float64)
        self.density = list(schedule.densities)
        self.rng = [np.random.default_rng([schedule.seed, n]) for n in range(problem.clients)]
        self.probe_rng = np.random.default_rng([schedule.seed, problem.clients])
        self.flights: dict[int, _Flight] = {}
        self.dispatched = 0
        self.order: Ints = np.zeros(0, dtype=np.int64)
        self.bytes_down = 0.0

    def rank(self, version: int) -> None:
        if version % self.schedule.interval == 0:
            self.order = ranking(self.w, self.problem.prunable)

    def dispatch(self, client: int, version: int) -> None:
        d = self.density[client]
        keep = mask(self.problem, self.order, d)
        s = self.schedule
        samples = s.samples[client] if s.samples else float(s.local_steps)
        arrival = local_steps(
            self.problem,
            client,
            self.w,
            keep,
            eta=s.eta,
            steps=s.local_steps,
            weight=samples,
            rng=self.rng[client],
        )
        growth = d / s.densities[client] if s.delay_grows else 1.0
        due = version + round(s.delays[client] * growth)
        self.flights[client] = _Flight(self.dispatched, version, d, due, arrival)
        record = records.dispatch(self.problem, self.dispatched, client, version, d, self.order, keep, self.w)
        self.bytes_down += float(record["bytes_down"])
        self.trace.records.append(record)
        self.dispatched += 1

    def weight(self, tau: int) -> float:
        return 1.0 if self.schedule.staleness == "constant" else (1.0 + tau) ** -self.schedule.exponent

    def window(self, t: int) -> list[int]:
        s = self.schedule
        arrived = [n for n in sorted(self.flights) if self.flights[n].due <= t]
        flights = [self.flights.pop(n) for n in arrived]
        uploads = [f.arrival._replace(weight=f.arrival.weight * self.weight(t - f.version)) for f in flights]
        after = merge(self.w, uploads, s.form)
        pi = shares(uploads, self.problem.size)
        for f, upload, share in zip(flights, uploads, pi, strict=True):
            self.trace.records.append(
                records.arrival(
                    t, f.dispatch, f.version, f.density, f.arrival.weight, upload, float(share.max())
                )
            )
        self.trace.records.append(
            records.window(t, self.w, after, uploads, self.density, len(self.flights), s.eta, self.bytes_down)
        )
        if t % s.probe_interval == 0:
            exact = decompose(self.problem, self.w, uploads, gamma=s.gamma, form=s.form)
            names = [flight.dispatch for flight in flights]
            self.trace.records.append(records.probe(self.problem, t, self.w, after, uploads, self.probe_rng))
            self.trace.records.append(records.terms(t, exact, uploads, names, s.form))
            self.trace.decompositions.append(exact)
        self.w, self.bytes_down = after, 0.0
        self.trace.models.append(after)
        return arrived

    def restore(self, merged: int, restorer: Restorer | None) -> None:
        planned = [(n, d) for when, n, d in self.schedule.restorations if when == merged]
        decided = [] if restorer is None else restorer(merged, self.w, tuple(self.density))
        raised = []
        for client, density in [*planned, *decided]:
            if density > self.density[client]:
                before, self.density[client] = self.density[client], density
                raised.append(records.restoration(merged, client, before, density))
        for record in raised:
            record["floor"] = min(self.density)
        self.trace.records.extend(raised)


def simulate(problem: Problem, schedule: Schedule, restorer: Restorer | None = None) -> Trace:
    """Runs `schedule` on `problem`; `restorer` may add restorations before each window."""
    trace = Trace()
    server = _Server(problem, schedule, trace)
    trace.records.extend(records.preamble(problem, schedule))
    trace.models.append(server.w)
    idle = list(range(problem.clients))
    for t in range(schedule.windows):
        server.restore(t, restorer)
        server.rank(t)
        for client in idle:
            server.dispatch(client, t)
        idle = server.window(t)
    trace.records.append(
        {
            "type": "end",
            "windows": schedule.windows,
            "time": float(schedule.windows),
            "reason": "windows",
            "rejected": 0,
        }
    )
    return trace
