"""The bounds made of counts and weights: coverage, nested coverage, density gaps under restoration."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from theory.checks.conditions import weight_ratio
from theory.checks.run import Run
from theory.checks.structure import place_of
from theory.frame import gather
from theory.verdict import Finding

_MISSING = "pibar, weight or rankings are not logged, or no window qualifies"


def coverage_bounds(run: Run) -> Iterator[Finding]:
    """Every bound of this module, in the order of the equations."""
    yield coverage(run)
    yield nested_coverage(run)
    yield rank_gap(run)
    yield average_restored(run)
    yield rank_restored(run)


def coverage(run: Run) -> Finding:
    """``pibar_n Gamma_t <= kappa_t``."""
    frame, arrival = run.frame, run.frame.log["arrival"]
    fewest = gather(frame.log["window"]["gamma_min"], frame.arrival_window)
    kappa = gather(weight_ratio(frame), frame.arrival_window)
    everywhere = np.ones(len(arrival), dtype=bool)
    return run.counted(
        "coverage", arrival["pibar"] * fewest, kappa, everywhere, place_of(frame, "arrival"), _MISSING
    )  # fmt: skip


def nested_coverage(run: Run) -> Finding:
    """``sum pibar_n <= 1 + log(sum c / c of the densest)``."""
    frame, arrival = run.frame, run.frame.log["arrival"]
    heavy, _ = frame.holders
    densest = frame.least(heavy)
    busy = frame.log["window"]["arrivals"] > 0
    with np.errstate(divide="ignore", invalid="ignore"):
        limit = 1 + np.log(frame.per_window(arrival["weight"]) / densest)
    return run.counted(
        "nested_coverage", frame.per_window(arrival["pibar"]), limit, frame.nested & busy,
        place_of(frame, "window"), _MISSING,
    )  # fmt: skip


def rank_gap(run: Run) -> Finding:
    """``sum pibar_n q_n <= kappa_t sum q_n / rank_n``."""
    frame, pibar = run.frame, run.frame.log["arrival"]["pibar"]
    q = gather(frame.pruned_share, frame.arrival_dispatch)
    busy = frame.log["window"]["arrivals"] > 0
    return run.counted(
        "rank_gap", frame.per_window(pibar * q), weight_ratio(frame) * frame.per_window(q / frame.rank),
        frame.nested & busy, place_of(frame, "window"), _MISSING,
    )  # fmt: skip


def average_restored(run: Run) -> Finding:
    """The average of q_n over a window's arrivals, against the same with initial densities."""
    frame = run.frame
    now = gather(frame.pruned_share, frame.arrival_dispatch)
    count = np.maximum(frame.log["window"]["arrivals"], 1)
    lhs, rhs = frame.per_window(now) / count, frame.per_window(frame.frozen_share) / count
    return _restored(run, "average_restored", lhs, rhs)


def rank_restored(run: Run) -> Finding:
    """The sum of q_n over the rank of d_n, against the same with initial densities."""
    frame = run.frame
    now = gather(frame.pruned_share, frame.arrival_dispatch)
    lhs = frame.per_window(now / frame.rank)
    rhs = frame.per_window(frame.frozen_share / frame.rank_of(frame.initial_density))
    return _restored(run, "rank_restored", lhs, rhs)


def _restored(
    run: Run, name: str, lhs: np.ndarray[tuple[int], np.dtype[np.float64]],
    rhs: np.ndarray[tuple[int], np.dtype[np.float64]],
) -> Finding:  # fmt: skip
    frame = run.frame
    raised = frame.per_window((frame.sent("density") != frame.initial_density) * 1.0) > 0
    reason = "no arrival has another density than at the start, or the header has no densities"
    return run.counted(name, lhs, rhs, raised & ~np.isnan(rhs), place_of(frame, "window"), reason)
