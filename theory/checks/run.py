"""One run with everything that its bounds are judged by: constants, assumptions, conditions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from theory.bounds import BOUNDS
from theory.checks.assumptions import assumptions
from theory.checks.conditions import Condition, conditions
from theory.estimators import Estimate, constants
from theory.frame import STATISTICS, Frame
from theory.intervals import Interval
from theory.judge import Case, Place, judge, law
from theory.verdict import Finding, Verdict, undetermined

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

#: Relative tolerance for bounds made of counts and weights alone, whose equality case is normal.
COUNTING = 1e-6

#: Bounds that compare losses or gradients at two moments of training, as if F were one function of w.
ACROSS_MOMENTS = frozenset(
    (
        "descent", "telescoped", "expectation", "staleness_lipschitz", "staleness", "drift_lipschitz",
        "drift", "corollary", "corollary_weighted", "corollary_nested",
    )
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """See the module."""

    frame: Frame
    assumed: Mapping[str, Finding]
    conditions: Mapping[str, Condition]
    constants: Mapping[str, Estimate]

    @classmethod
    def of(cls, frame: Frame) -> Run:
        """Measures a run."""
        return cls(frame, assumptions(frame), conditions(frame), constants(frame))

    def unmet(self, name: str) -> str:
        """The whole-run condition of bound `name` that is not met or not known, in words; '' if none.

        A bound across moments of training needs a model without buffers.

        TOPK, NEST and UNIF may hold for some rows; the checks select those.
        """
        for key in BOUNDS[name].hypotheses:
            if key in ("ALG", "DELTA", "REPL") and self.conditions[key].met is not True:
                return self.conditions[key].complaint
        return STATISTICS if self.frame.statistics_move and name in ACROSS_MOMENTS else ""

    def premises(self, name: str) -> dict[str, Verdict]:
        """Verdicts of the assumptions of bound `name`."""
        return {key: self.assumed[key].verdict for key in BOUNDS[name].hypotheses if key in self.assumed}

    def undecided(self, name: str, reason: str, **extra: Any) -> Finding:
        """UNDETERMINED for bound `name`."""
        bound = BOUNDS[name]
        group = "expectation" if bound.expectation else "inequality"
        return undetermined(name, group, bound.title, reason, equation=bound.number, **extra)

    def judged(self, name: str, values: Mapping[str, Interval], place: Place, **extra: Any) -> Finding:
        """Bound `name` with these values, or UNDETERMINED where a condition of the run is not met."""
        if reason := self.unmet(name):
            return self.undecided(name, reason)
        return judge(Case(BOUNDS[name], values, place, premises=self.premises(name), **extra))

    def smooth(self) -> tuple[dict[str, Interval], tuple[str, ...]]:
        """``({"L": value}, names known from below only)``; empty where L is not known at all."""
        found = self.constants["L"]
        if not found.known:
            return {}, ()
        return {"L": Interval(found.value)}, () if found.kind == "given" else ("L",)

    def counted(self, name: str, lhs: Floats, rhs: Floats, rows: Bools, place: Place, reason: str) -> Finding:
        """A bound made of counts and weights alone, compared with the tolerance `COUNTING`."""
        if unmet := self.unmet(name):
            return self.undecided(name, unmet)
        bound = BOUNDS[name]
        known = rows & ~np.isnan(lhs) & ~np.isnan(rhs)
        found = law(
            name, bound.title, lhs > rhs * (1 + COUNTING), place, applies=known, lhs=lhs, rhs=rhs,
            group="inequality", reason=reason,
        )  # fmt: skip
        if found.checks == 0:
            return self.undecided(name, found.reason)
        size = np.maximum(np.maximum(np.abs(lhs), np.abs(rhs))[known], 1e-300)
        sides = {
            "measured": float(lhs[known].mean()), "bound": float(rhs[known].mean()),
            "margin": float(((rhs - lhs)[known] / size).min()), "equation": bound.number,
        }  # fmt: skip
        return Finding(**{**vars(found), **sides})
