"""The bounds on masks and steps that dispatches, uploads and windows show without any probe."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from theory.checks.conditions import contraction, floor_bounds, fresh
from theory.checks.run import COUNTING, Bools, Run
from theory.checks.structure import place_of
from theory.intervals import Interval
from theory.judge import law
from theory.verdict import Finding, Verdict


def mask_bounds(run: Run) -> Iterator[Finding]:
    """Every bound of this module."""
    yield update(run)
    values = mask_values(run)
    yield topk(run, values)
    yield floored(run, values)
    yield aged(run, values)


def update(run: Run) -> Finding:
    """``||Delta||^2`` from the uploads; with one arrival the step *is* its change."""
    frame, table, arrival = run.frame, run.frame.log["window"], run.frame.log["arrival"]
    inside = frame.arrival_window >= 0
    model = np.where(np.isnan(frame.model_sq), 0.0, frame.model_sq)
    summed = (table["arrivals"] + 3) * frame.per_window(arrival["pibar"] * np.sqrt(arrival["change_sq"]))
    step = frame.precision.stored(table["step_sq"], model, np.where(np.isnan(summed), 0.0, summed))
    change = frame.precision.reduction(arrival["change_sq"])
    values = {
        "step_sq": step, "change_sq": change[inside],
        "pibar": frame.precision.share(arrival["pibar"][inside]),
    }  # fmt: skip
    found = run.judged(
        "update", values, place_of(frame, "window"), segment=frame.arrival_window[inside],
        applies=table["arrivals"] > 0, attained=frame.per_window(arrival["pibar"]) <= 1 + COUNTING,
        reason="step_sq, pibar or change_sq is not logged",
    )  # fmt: skip
    if found.checks == 0:
        return found
    alone = frame.precision.reduction(frame.per_window(arrival["change_sq"]))
    apart = (step.hi < alone.lo) | (alone.hi < step.lo)
    single = (table["arrivals"] == 1) & ~np.isnan(step.lo) & ~np.isnan(alone.lo)
    equal = law(
        "update",
        found.title,
        apart,
        place_of(frame, "window"),
        applies=single,
        lhs=table["step_sq"],
        rhs=alone.nominal,
        group="inequality",
        detail="one arrival: the step is its change",
    )
    return equal if equal.verdict is Verdict.VIOLATED else found


def mask_values(run: Run) -> dict[str, Interval]:
    """The symbols of the top-k bounds, one value a dispatch."""
    frame, table, reduction = run.frame, run.frame.log["dispatch"], run.frame.precision.reduction
    path = frame.path_sq(frame.ranking_version, table["version"])
    return {
        "masked_sq": reduction(table["masked_norm_sq"]), "prunable_sq": reduction(table["norm_sq"]),
        "q": Interval(frame.pruned_share), "theta": Interval(contraction(frame)), "k": Interval(frame.kept),
        "age": Interval(np.maximum(table["version"] - frame.ranking_version, 0.0)),
        "ranked_sq": reduction(frame.norm_at_ranking), "aged_path_sq": reduction(path),
    }  # fmt: skip


def topk(run: Run, values: dict[str, Interval]) -> Finding:
    """Top-k contraction of sub-models whose ranking is fresh."""
    condition, sparse = run.conditions["TOPK"], run.frame.log["dispatch"]["density"] < 1
    rows: Bools = np.zeros_like(sparse) if condition.rows is None else sparse & condition.rows
    reason = f"no sparse sub-model fits the condition TOPK ({condition.reason})"
    return _over_dispatches(run, "topk", values, rows, reason)


def floored(run: Run, values: dict[str, Interval]) -> Finding:
    """The same under a per-layer floor, from the layers' sizes, whichever way shares are rounded."""
    frame, bounds = run.frame, floor_bounds(run.frame)
    if bounds is None:
        return run.undecided(
            "floored_topk", "the run has no layer floor over magnitudes, or layers are not logged"
        )
    least, most, prunable = (Interval(bound) for bound in bounds)
    own = {**values, "phi_floor": least, "k_floor": most, "D_p": prunable}
    rows = (frame.log["dispatch"]["density"] < 1) & fresh(frame) & (frame.kept >= bounds[1])
    return _over_dispatches(run, "floored_topk", own, rows, "no sub-model is fresh and larger than the floor")


def aged(run: Run, values: dict[str, Interval]) -> Finding:
    """Either of them for rankings older than the model that is sent."""
    frame, table = run.frame, run.frame.log["dispatch"]
    rows = (table["density"] < 1) & (table["version"] > frame.ranking_version) & ~np.isnan(contraction(frame))
    reason = "no sub-model was cut from an older ranking by magnitude"
    return _over_dispatches(run, "aged_topk", values, rows, reason)


def _over_dispatches(run: Run, name: str, values: dict[str, Interval], rows: Bools, reason: str) -> Finding:
    return run.judged(name, values, place_of(run.frame, "dispatch"), applies=rows, reason=reason)
