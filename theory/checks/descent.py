"""I0 and I1: the descent of the objective, from probes alone (equations 2 and 3).

They hold for any step of any algorithm whose size gamma is at most 1/L_dir, so they test the
hypothesis A4 and the probe, not the merge rule.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from theory.checks.run import Floats, Run
from theory.checks.structure import place_of
from theory.frame import gather
from theory.intervals import Interval
from theory.judge import Place
from theory.verdict import Finding


def descents(run: Run) -> Iterator[Finding]:
    """Both, in order."""
    values = probe_values(run)
    yield descent(run, values)
    yield telescoped(run, values)


def probe_values(run: Run) -> dict[str, Interval]:
    """The symbols of I0, one value a probe, with their errors."""
    table, p = run.frame.log["probe"], run.frame.precision
    grad, step = p.gradient(table["grad_sq"], table["grad_sq"]), p.reduction(table["step_sq"])
    slope = p.slope(table["grad_dot_step"], table["grad_sq"], table["step_sq"])
    gamma = Interval(gather(run.frame.gamma, run.frame.probe_window))
    with np.errstate(invalid="ignore", divide="ignore"):
        error = step / gamma**2 + slope * 2.0 / gamma + grad
    return {
        "F": p.loss(table["loss"]), "F_next": p.loss(table["loss_next"]), "grad_sq": grad, "step_sq": step,
        "grad_dot_step": slope, "gamma": gamma, "e_sq": error.clip_low(0.0),
    }  # fmt: skip


def descent(run: Run, values: dict[str, Interval]) -> Finding:
    """I0 at every probe whose step is not zero (where it is zero, both sides are the same number)."""
    table = run.frame.log["probe"]
    return run.judged(
        "descent", values, place_of(run.frame, "probe"), applies=table["step_sq"] > 0,
        reason="no probes, or gamma is not known",
    )  # fmt: skip


def telescoped(run: Run, values: dict[str, Interval]) -> Finding:
    """I1 over the longest stretch of consecutive probed windows."""
    table = run.frame.log["probe"]
    span = longest_run(table["window"])
    if reason := run.unmet("telescoped"):
        return run.undecided("telescoped", reason)
    if span is None or np.isnan(values["gamma"].lo[span]).any():
        return run.undecided("telescoped", "no two consecutive windows are probed (set probe_interval to 1)")
    inside = {name: box[span] for name, box in values.items()}
    inside |= {"F_0": inside["F"][0], "F_T": inside["F_next"][-1]}
    windows = table["window"][span]
    return run.judged(
        "telescoped", inside, Place(table.line[span][:1], windows[:1]),
        note=f"windows {int(windows[0])} to {int(windows[-1])} of {run.frame.windows}",
    )  # fmt: skip


def longest_run(windows: Floats) -> slice | None:
    """The longest stretch of consecutive numbers, of at least two."""
    if len(windows) < 2:
        return None
    breaks = np.flatnonzero(np.diff(windows) != 1) + 1
    starts = np.concatenate([[0], breaks])
    stops = np.concatenate([breaks, [len(windows)]])
    best = int(np.argmax(stops - starts))
    if stops[best] - starts[best] < 2:
        return None
    return slice(int(starts[best]), int(stops[best]))
