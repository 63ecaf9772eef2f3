"""Gradual model restoration: when each client's density rises, and how far.

A pair of pure functions, `start(rules, densities) -> state` and `step(rules, state, observation) ->
(state, restorations)`, called once per interval with metrics of the validation split (method page,
section 6). Densities never decrease. Axis: N clients.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

Cause = Literal["client_plateau", "server_plateau", "time", "gradient"]


class GMRRules(NamedTuple):
    """What does not change during a run.

    Attributes:
        trigger: ``plateau``, ``time``, ``mixed`` (both), ``gradient`` or ``none``.
        ladder: rungs, strictly increasing to 1.
        density_step: ``ladder``, ``fixed`` or ``proportional``.
        increment: step of ``fixed``; half the cap of ``proportional``.
        floor: where the server's floor minD starts.
        patience: checks without improvement that make a plateau.
        delta: smallest improvement that counts, in units of the metric.
        after: improvement over the first check before which there is no plateau; 0 looks at once.
        higher_is_better: whether the metric grows as the model improves.
        time_fractions, time_floors: the ``time`` trigger's schedule.
    """

    trigger: Literal["plateau", "time", "mixed", "gradient", "none"] = "plateau"
    ladder: tuple[float, ...] = (0.05, 0.1, 0.2, 0.5, 1.0)
    density_step: Literal["ladder", "fixed", "proportional"] = "ladder"
    increment: float = 0.1
    floor: float = 0.02
    patience: int = 5
    delta: float = 0.0
    after: float = 0.0
    higher_is_better: bool = True
    time_fractions: tuple[float, ...] = (0.2, 0.4, 0.6, 0.8)
    time_floors: tuple[float, ...] = (0.1, 0.2, 0.5, 1.0)


class Plateau(NamedTuple):
    """State of one plateau detector.

    Attributes:
        best: best metric so far; None before the first check.
        bad_checks: checks since it last improved.
        sleeps_until: number of the check at which it looks again.
        first: metric of the first check.
    """

    best: float | None = None
    bad_checks: int = 0
    sleeps_until: int = 0
    first: float | None = None


class GMRState(NamedTuple):
    """Everything that changes: serialisable as nested tuples of numbers.

    Attributes:
        densities: d_n [N].
        floor: the server's floor minD.
        checks: checks made.
        server: its detector.
        clients: their detectors [N].
    """

    densities: tuple[float, ...]
    floor: float
    checks: int
    server: Plateau
    clients: tuple[Plateau, ...]


class Observation(NamedTuple):
    """What one check looks at.

    Attributes:
        elapsed: share of the budget that has passed, in [0, 1].
        server: validation metric of the model that would be shipped; None if unknown.
        clients: validation metric of each client's sub-model [N]; None where unknown.
        gradient: for the ``gradient`` trigger, whether restoring client n is faster now [N].
    """

    elapsed: float
    server: float | None = None
    clients: Sequence[float | None] = ()
    gradient: Sequence[bool] = ()


class Restoration(NamedTuple):
    """One rise of density; `client` None is a rise of the floor that changed nobody."""

    client: int | None
    cause: Cause
    before: float
    after: float


def start(rules: GMRRules, densities: Sequence[float]) -> GMRState:
    """State before the first window, with the clients' initial densities d_n^0 [N]."""
    return GMRState(tuple(densities), rules.floor, 0, Plateau(), tuple(Plateau() for _ in densities))


def next_density(rules: GMRRules, density: float) -> float:
    """The density that one restoration leads to; 1 stays 1."""
    if density >= 1.0:
        return 1.0
    if rules.density_step == "ladder":
        return next(rung for rung in rules.ladder if rung > density)
    gain = rules.increment if rules.density_step == "fixed" else min(density, 2 * rules.increment)
    return min(1.0, round(density + gain, 12))


def server_patience(rules: GMRRules, floor: float) -> int:
    """Patience of the server's detector: min(5 patience, 50) once nothing is left to restore."""
    return rules.patience if floor < 1.0 and rules.trigger != "none" else min(5 * rules.patience, 50)


def step(rules: GMRRules, state: GMRState, seen: Observation) -> tuple[GMRState, tuple[Restoration, ...]]:
    """One check, at the end of an interval.

    Order: clients' detectors, then the server's, then the ``time`` schedule; each acts on the densities
    that the former left. A client that fires sleeps for 2 patience checks; when the server fires,
    everybody sleeps for patience checks. A detector that fires starts counting from zero.
    """
    check = state.checks + 1
    densities = list(state.densities)
    clients = list(state.clients)
    server, floor = state.server, state.floor
    done: list[Restoration] = []

    watches_plateau = rules.trigger in ("plateau", "mixed")
    for n, detector in enumerate(clients if watches_plateau or rules.trigger == "gradient" else ()):
        if watches_plateau and n < len(seen.clients):
            clients[n], fired = _look(rules, detector, seen.clients[n], check, rules.patience)
            cause: Cause = "client_plateau"
        elif rules.trigger == "gradient" and n < len(seen.gradient):
            fired = seen.gradient[n] and check > detector.sleeps_until
            cause = "gradient"
        else:
            continue
        if fired and densities[n] < 1.0:
            after = next_density(rules, densities[n])
            done.append(Restoration(n, cause, densities[n], after))
            densities[n] = after
            clients[n] = clients[n]._replace(bad_checks=0, sleeps_until=check + 2 * rules.patience)

    if watches_plateau:
        server, fired = _look(rules, server, seen.server, check, server_patience(rules, floor))
        if fired and floor < 1.0:
            before, floor = floor, next(rung for rung in rules.ladder if rung > floor)
            done += _raise_to(densities, before, floor, "server_plateau")
            until = check + rules.patience
            server = server._replace(bad_checks=0, sleeps_until=until)
            clients = [c._replace(bad_checks=0, sleeps_until=max(c.sleeps_until, until)) for c in clients]

    if rules.trigger in ("time", "mixed"):
        due = [f for at, f in zip(rules.time_fractions, rules.time_floors, strict=True) if seen.elapsed >= at]
        if due and due[-1] > floor:
            before, floor = floor, due[-1]
            done += _raise_to(densities, before, floor, "time")

    return GMRState(tuple(densities), floor, check, server, tuple(clients)), tuple(done)


def _look(
    rules: GMRRules, detector: Plateau, metric: float | None, check: int, patience: int
) -> tuple[Plateau, bool]:
    """One detector's check: (new detector, whether it fires)."""
    if metric is None or check <= detector.sleeps_until:
        return detector, False
    sign = 1 if rules.higher_is_better else -1
    if not math.isfinite(metric):
        metric = -sign * math.inf  # the worst: never an improvement
    elif detector.best is None or (metric - detector.best) * sign > rules.delta:
        first = metric if detector.first is None else detector.first
        return detector._replace(best=metric, bad_checks=0, first=first), False
    gained = 0.0
    if detector.best is not None and detector.first is not None:
        gained = (detector.best - detector.first) * sign
    if gained < rules.after:
        return detector, False
    bad = detector.bad_checks + 1
    return detector._replace(bad_checks=0 if bad >= patience else bad), bad >= patience


def _raise_to(densities: list[float], before: float, floor: float, cause: Cause) -> list[Restoration]:
    """Lift `densities` in place to at least the new `floor`, which was `before`."""
    raised = [Restoration(n, cause, d, floor) for n, d in enumerate(densities) if d < floor]
    densities[:] = [max(d, floor) for d in densities]
    return raised or [Restoration(None, cause, before, floor)]


def restoring_pays(held_sq: float, gained_sq: float, seconds: float, seconds_after: float) -> bool:
    """The ``gradient`` trigger: whether a step on the larger sub-model is faster per second.

    A step on mask m lowers F by at most 1.5 eta ||m grad F||^2; a step on m' by at least
    (eta / 2) ||(m' - m) grad F||^2 (for eta <= 1/L; see the method page, section 6).

    Args:
        held_sq: ||m grad F(w)||^2.
        gained_sq: ||(m' - m) grad F(w)||^2.
        seconds, seconds_after: time of one flight at the present and at the next density, T(d) and T(d').
    """
    return gained_sq >= 3.0 * held_sq * seconds_after / seconds
