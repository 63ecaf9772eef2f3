"""The bounds on the terms of the decomposition, where the log has ``terms`` records.

Each term is checked in two steps and as a whole: merging (convexity of the square, no constant at
all), smoothness of single clients (needs L), and both together.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from theory.checks.conditions import contraction, fresh
from theory.checks.identity import arrival_of, error_norm, term_sq, window_of
from theory.checks.run import COUNTING, Bools, Run
from theory.checks.structure import place_of
from theory.frame import Ints, gather, rows_of
from theory.intervals import Interval
from theory.judge import Place, law
from theory.verdict import Finding, Verdict


class _Part(NamedTuple):
    letter: str
    distance: str


_PARTS = {
    "mask": _Part("M", "mask_sq"),
    "staleness": _Part("S", "stale_sq"),
    "drift": _Part("D", "drift_sq"),
}
_NO_SMOOTHNESS = "L is neither given nor measured"
_NONE = "no terms records, or arrivals in them without the fields needed"


def term_bounds(run: Run) -> Iterator[Finding]:
    """Every bound of this module, in the order of the equations."""
    terms = TermBounds(run)
    yield terms.split("split_delta")
    yield terms.split("split_replacement")
    yield from terms.part("mask")
    yield terms.density_gap()
    yield from terms.part("staleness")
    yield terms.path()
    yield from terms.part("drift")
    yield terms.heterogeneity()
    yield terms.uncovered()
    yield terms.residual()


class TermBounds:
    """Values of one run's ``terms`` records, R of them with E entries for arrivals."""

    def __init__(self, run: Run) -> None:
        self.run, self.frame = run, run.frame
        self.terms, self.entries = run.frame.log["terms"], run.frame.log["term_arrivals"]
        self.segment: Ints = rows_of(self.terms["window"], self.entries["window"])
        self.error = error_norm(self.frame)
        self.place = place_of(self.frame, "terms")
        self.entry_place = Place(
            self.entries.line, self.entries["window"], self.entries["client"], self.entries["dispatch"]
        )

    def count(self, weights: Any) -> Any:
        """Sum over the entries of each record, ``[R]``."""
        return np.bincount(self.segment, weights=weights, minlength=len(self.terms))

    def is_average(self) -> Bools:
        """Records whose shares sum to one: merging is then an average, which can attain its bound."""
        return np.asarray(self.count(self.entries["pibar"]) <= 1 + COUNTING)

    def entry(self, key: str) -> Interval:
        """A column of the entries with its error, ``[E]``."""
        value = self.entries[key]
        if key in ("mask_sq", "stale_sq", "drift_sq"):
            return self.frame.precision.reduction(value)
        if key == "pibar":
            return self.frame.precision.share(value)
        error = gather(self.error, self.segment)
        radius = np.where(value == 0, 0.0, 2 * np.sqrt(np.maximum(value, 0)) * error + error**2)
        return Interval(np.maximum(value - radius, 0.0), value + radius, value)

    def judged(self, name: str, values: dict[str, Interval], **extra: Any) -> Finding:
        """A bound with one check for each record."""
        return self.run.judged(name, values, self.place, segment=self.segment, reason=_NONE, **extra)

    def split(self, name: str) -> Finding:
        """||b||^2 from the terms; an identity where only U is not zero."""
        keys = ("b_sq", "D_sq", "M_sq", "S_sq", "H_sq", "U_sq", "rho_sq")
        values = {key: term_sq(self.frame, key) for key in keys}
        others = sum(self.terms[key] for key in ("D_sq", "M_sq", "S_sq", "H_sq", "rho_sq"))
        values["gamma"] = Interval(self.terms["gamma"])
        return self.run.judged(name, values, self.place, attained=np.asarray(others == 0), reason=_NONE)

    def part(self, name: str) -> Iterator[Finding]:
        """Merging, smoothness, and both, for M, S or D."""
        letter, distance = _PARTS[name]
        merged, pibar = term_sq(self.frame, f"{letter}_sq"), self.entry("pibar")
        own, far = self.entry(f"{letter}_sq"), self.entry(distance)
        yield self.judged(
            f"{name}_merge", {f"{letter}_sq": merged, f"{letter}_n_sq": own, "pibar": pibar},
            attained=self.is_average(),
        )  # fmt: skip
        smooth, below = self.run.smooth()
        if not smooth:
            for bound in (f"{name}_lipschitz", name):
                yield self.run.undecided(bound, self.run.unmet(bound) or _NO_SMOOTHNESS)
            return
        single = self.run.judged(
            f"{name}_lipschitz", {**smooth, f"{letter}_n_sq": own, distance: far}, self.entry_place,
            applies=far.hi > 0, below=below, reason=_NONE,
        )  # fmt: skip
        yield single if single.checks == 0 or not below else replace(
            single, verdict=Verdict.UNDETERMINED, witness=None,
            reason="L is the largest measured ratio of these very sides; give L to check them",
        )  # fmt: skip
        yield self.judged(
            name, {**smooth, f"{letter}_sq": merged, distance: far, "pibar": pibar}, below=below
        )

    def density_gap(self) -> Finding:
        """The mask error from the average density gap, in records whose sub-models are all top-k."""
        name, (smooth, below) = "density_gap", self.run.smooth()
        if not smooth:
            return self.run.undecided(name, self.run.unmet(name) or _NO_SMOOTHNESS)
        dispatch, reduction = self.frame.log["dispatch"], self.frame.precision.reduction
        rows = rows_of(dispatch["dispatch"], self.entries["dispatch"])
        usable = fresh(self.frame) | (dispatch["density"] == 1)
        bias = reduction(dispatch["full_masked_norm_sq"]) - reduction(dispatch["masked_norm_sq"])
        values = {
            **smooth, "M_sq": term_sq(self.frame, "M_sq"), "pibar": self.entry("pibar"),
            "theta": Interval(gather(np.where(usable, contraction(self.frame), np.nan), rows)),
            "prunable_sq": reduction(gather(dispatch["norm_sq"], rows)),
            "bias_sq": Interval(
                *(gather(part, rows) for part in (bias.lo, bias.hi, bias.nominal))
            ).clip_low(0.0),
        }  # fmt: skip
        sparse = self.count((self.entries["mask_sq"] > 0) * 1.0) > 0
        found = self.judged(name, values, below=below, applies=sparse)
        if found.checks == 0 and not found.reason.startswith("condition"):
            why = self.run.conditions["TOPK"].reason
            return self.run.undecided(name, f"no terms record whose sparse sub-models are all top-k ({why})")
        return found

    def path(self) -> Finding:
        """||w_t - w_s||^2 from the steps between; equal to them for tau = 0 and 1."""
        arrival = self.frame.log["arrival"]
        rows = arrival_of(self.frame)
        tau, path = gather(arrival["staleness"], rows), gather(self.frame.arrival_path_sq, rows)
        far, along = self.entry("stale_sq"), self.frame.precision.reduction(path)
        found = self.run.judged(
            "path", {"stale_sq": far, "tau": Interval(tau), "path_sq": along}, self.entry_place,
            applies=tau > 0, attained=tau <= 1, reason="no terms records, or step_sq is not logged",
        )  # fmt: skip
        apart = (far.hi < along.lo) | (along.hi < far.lo)
        equal = law(
            "path",
            found.title,
            apart,
            self.entry_place,
            applies=(tau <= 1) & ~np.isnan(path),
            lhs=self.entries["stale_sq"],
            rhs=path,
            group="inequality",
            detail="within one window both are the step",
        )
        return equal if equal.verdict is Verdict.VIOLATED else found

    def heterogeneity(self) -> Finding:
        """||H||^2 from the clients' gaps."""
        values = {
            "H_sq": term_sq(self.frame, "H_sq"),
            "pibar": self.entry("pibar"),
            "gap_sq": self.entry("gap_sq"),
        }
        return self.judged("heterogeneity", values, attained=self.is_average())

    def uncovered(self) -> Finding:
        """||U||^2 is the probe's gradient off C_t, and 0 where everything is covered."""
        rows = rows_of(self.frame.log["probe"]["window"], self.terms["window"])
        probe = gather(self.frame.log["probe"]["grad_uncovered_sq"], rows)
        covered = gather(self.frame.log["window"]["uncovered"], window_of(self.frame)) == 0
        reference = np.where(covered, 0.0, probe)
        radius = 2 * np.sqrt(np.maximum(reference, 0)) * self.error + self.error**2
        values = {
            "U_sq": term_sq(self.frame, "U_sq"),
            "grad_uncovered_sq": Interval.around(reference, np.where(reference == 0, 0.0, radius)),
        }
        return self.judged("uncovered", values)

    def residual(self) -> Finding:
        """||rho||^2 from the distances since dispatch."""
        values = {
            "rho_sq": term_sq(self.frame, "rho_sq"), "pibar": self.entry("pibar"),
            "stale_sq": self.entry("stale_sq"),
        }  # fmt: skip
        return self.judged("residual", values, attained=self.is_average())
