"""Turns arrays of two sides into a `Finding`: exact laws of the log, and bounds under rounding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from theory.bounds import Bound
from theory.intervals import Interval, constant_interval, evaluate, evaluate_iv, segment_sum, total
from theory.symbols import TABLE, Expr, WindowSum
from theory.verdict import VACUOUS_FACTOR, Finding, Verdict, Witness, undetermined

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

#: At most so many ties are settled with mpmath.iv; the rest stay undecided.
MAX_EXACT = 256


@dataclass(frozen=True)
class Place:
    """Where each of n checks is, for witnesses: arrays ``[n]``, empty where it does not apply."""

    line: Ints
    window: Floats = field(default_factory=lambda: np.zeros(0))
    client: Floats = field(default_factory=lambda: np.zeros(0))
    dispatch: Floats = field(default_factory=lambda: np.zeros(0))

    def at(self, i: int, lhs: float | None = None, rhs: float | None = None, detail: str = "") -> Witness:
        """The witness for check i."""

        def number(column: Floats) -> int | None:
            return int(column[i]) if len(column) and np.isfinite(column[i]) else None

        line = int(self.line[i]) if len(self.line) else 0
        return Witness(
            number(self.window),
            number(self.client),
            number(self.dispatch),
            line,
            _finite(lhs),
            _finite(rhs),
            detail,
        )


def law(
    name: str,
    title: str,
    fails: Bools,
    place: Place,
    *,
    applies: Bools | None = None,
    lhs: Floats | None = None,
    rhs: Floats | None = None,
    detail: str = "",
    reason: str = "",
    group: str = "log",
) -> Finding:
    """A statement that must be true of every row.

    Args:
        fails: ``[n]``, True where it is not.
        applies: ``[n]``, rows that were checked; all when absent.
        lhs, rhs: ``[n]``, both sides, for the witness.
        detail: words for the witness. reason: why there is nothing to check, should there be nothing.
    """
    checked = np.ones(len(fails), dtype=bool) if applies is None else applies
    count = int(checked.sum())
    if count == 0:
        return undetermined(name, group, title, reason or "nothing to check in this log")
    bad = np.flatnonzero(fails & checked)
    if len(bad) == 0:
        return Finding(name, group, title, Verdict.HOLDS, checks=count)
    i = int(bad[0])
    sides = [None if side is None else float(side[i]) for side in (lhs, rhs)]
    return Finding(
        name, group, title, Verdict.VIOLATED, checks=count, witness=place.at(i, sides[0], sides[1], detail),
        reason=f"{len(bad)} of {count} fail",
    )  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A bound with the values of its symbols on one run.

    Attributes:
        bound: what is checked.
        values: symbol name -> `Interval`; a scalar (axis run), ``[n]`` (one value a check), or ``[A]``
            (inside an ArrivalSum).
        place: the n checks.
        segment: ``[A]``, the check that each arrival belongs to; needed for ArrivalSum.
        applies: ``[n]``, checks that can be made; rows with nan are left out anyway.
        attained: ``[n]``, checks whose two sides are equal by construction (one arrival, say), where
            agreement within rounding is what the theory says and counts as holding.
        premises: hypothesis -> verdict on this run.
        below: constants in `values` that are known only from below.
        reason: why nothing can be checked, should that be so.
        note: appended to the reason.
    """

    bound: Bound
    values: Mapping[str, Interval]
    place: Place
    segment: Ints | None = None
    applies: Bools | None = None
    attained: Bools | None = None
    premises: Mapping[str, Verdict] = field(default_factory=dict)
    below: tuple[str, ...] = ()
    reason: str = ""
    note: str = ""

    def side(self, expression: Expr) -> Interval:
        """An expression on this case, one interval a check."""
        segment, n = self.segment, len(self.place.line)
        values = self.values

        def arrival_sum(x: Interval) -> Interval:
            if segment is None:
                raise ValueError(f"{self.bound.name} needs the window of every arrival")
            return segment_sum(x, segment, n)

        def window_mean(x: Interval) -> Interval:
            return total(x) / float(x.lo.shape[-1])

        reductions = {
            "ArrivalSum": arrival_sum, "WindowSum": total, "WindowMean": window_mean, "log": Interval.log,
        }  # fmt: skip
        with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
            result: Interval = evaluate(expression, values, reductions, constant_interval)
        return Interval(*(np.broadcast_to(x, (n,)) for x in (result.lo, result.hi, result.nominal)))

    def exactly(self, i: int) -> tuple[bool, bool]:
        """(holds, fails) of check i by mpmath.iv."""
        boxes: dict[str, object] = {}
        over_windows = bool(self.bound.difference.has(WindowSum))
        for name, value in self.values.items():
            if value.lo.ndim == 0:
                boxes[name] = (float(value.lo), float(value.hi))
            elif over_windows:
                boxes[name] = list(zip(value.lo.tolist(), value.hi.tolist(), strict=True))
            elif self.segment is not None and TABLE[name].axis in ("arrival", "dispatch"):
                rows = np.flatnonzero(self.segment == i)
                boxes[name] = list(zip(value.lo[rows].tolist(), value.hi[rows].tolist(), strict=True))
            else:
                boxes[name] = (float(value.lo[i]), float(value.hi[i]))
        slack = evaluate_iv(self.bound.difference, boxes)
        return bool(slack.a >= 0), bool(slack.b < 0)


def judge(case: Case, group: str = "inequality") -> Finding:
    """Decides a case; see `Verdict` for the rules."""
    bound = case.bound
    name, title, number = bound.name, bound.title, bound.number
    if any(expression not in case.values for expression in _needed(bound.difference)):
        return undetermined(name, group, title, case.reason or "not logged", equation=number)
    slack = case.side(bound.difference)
    applies = np.ones(len(slack.lo), dtype=bool) if case.applies is None else case.applies.copy()
    applies &= ~(np.isnan(slack.lo) | np.isnan(slack.hi))
    count = int(applies.sum())
    premises = {key: verdict.value for key, verdict in case.premises.items()}
    if count == 0:
        return undetermined(
            name,
            group,
            title,
            case.reason or "nothing to check in this log",
            equation=number,
            premises=premises,
        )
    holds, fails, ties = _states(case, slack, applies)
    lhs, rhs = case.side(bound.lhs).nominal, case.side(bound.rhs).nominal
    measured, limit = float(lhs[applies].mean()), float(rhs[applies].mean())
    size = np.maximum(np.abs(lhs), np.abs(rhs))
    margins = ((rhs - lhs)[applies & (size > 0)]) / size[applies & (size > 0)]
    verdict, reason = _verdict(case, measured, limit, holds, fails, ties)
    witness = None
    if fails.any():
        i = int(np.flatnonzero(fails)[0])
        witness = case.place.at(i, float(lhs[i]), float(rhs[i]))
    return Finding(
        name, group, title, verdict, _finite(measured), _finite(limit),
        _finite(float(margins.min())) if len(margins) else None, count, int(ties.sum()), not case.below,
        premises, witness, "; ".join(part for part in (reason, case.note) if part), number,
    )  # fmt: skip


def _needed(expression: Expr) -> list[str]:
    return [symbol.name for symbol in expression.free_symbols]


def _states(case: Case, slack: Interval, applies: Bools) -> tuple[Bools, Bools, Bools]:
    """(holds, fails, ties), each ``[n]``."""
    if case.bound.relation == "==":
        fails = applies & ((slack.lo > 0) | (slack.hi < 0))
        return applies & ~fails, fails, np.zeros_like(fails)
    holds, fails = applies & (slack.lo >= 0), applies & (slack.hi < 0)
    if case.attained is not None:
        holds |= applies & ~fails & case.attained
    for i in np.flatnonzero(applies & ~holds & ~fails)[:MAX_EXACT]:
        holds[i], fails[i] = case.exactly(int(i))
    return holds, fails, applies & ~holds & ~fails


def _verdict(
    case: Case, measured: float, limit: float, holds: Bools, fails: Bools, ties: Bools
) -> tuple[Verdict, str]:
    count = int(holds.sum() + fails.sum() + ties.sum())
    refuted = [name for name, verdict in case.premises.items() if verdict is Verdict.VIOLATED]
    because = f"hypothesis {', '.join(refuted)} is refuted on this run" if refuted else ""
    if fails.any():
        share = f"{int(fails.sum())} of {count} fail"
        if case.below:
            return Verdict.UNDETERMINED, f"{share}, but {', '.join(case.below)} is known from below only"
        return Verdict.VIOLATED, f"{share}; {because}, so this is no counterexample" if because else share
    if ties.any():
        tied = f"{int(ties.sum())} of {count} agree within rounding"
        return Verdict.UNDETERMINED, f"{tied}; {because}" if because else tied
    if refuted:
        return Verdict.UNDETERMINED, f"the numbers satisfy it, but {because}"
    if limit > VACUOUS_FACTOR * max(measured, 0.0) and case.bound.relation == "<=":
        return Verdict.VACUOUS, f"the bound exceeds {VACUOUS_FACTOR:g} times the measured value"
    note = f"with {', '.join(case.below)} measured, not given: no certificate" if case.below else ""
    return Verdict.HOLDS, note


def _finite(value: float | None) -> float | None:
    return value if value is not None and np.isfinite(value) else None
