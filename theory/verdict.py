"""What a check can say, and the record of one check."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any


class Verdict(str, Enum):
    """The four possible outcomes of a check.

    HOLDS: every check that could be made holds, rounding included, and no hypothesis is refuted.
    VIOLATED: at least one does not, rounding included; `Finding.witness` is the first.
    UNDETERMINED: the log does not hold what is needed, a hypothesis is refuted while the inequality
        happens to hold, a constant is known from below only, or both sides agree within rounding.
    VACUOUS: it holds, but the bound is more than `VACUOUS_FACTOR` times the measured value.
    """

    HOLDS = "HOLDS"
    VIOLATED = "VIOLATED"
    UNDETERMINED = "UNDETERMINED"
    VACUOUS = "VACUOUS"


#: A bound above this many times the measured value says nothing.
VACUOUS_FACTOR = 1000.0


@dataclass(frozen=True)
class Witness:
    """The first place where a check fails.

    Attributes:
        window, client, dispatch: where; None where it does not apply.
        line: line of the log, 0 where no single line is to blame.
        lhs, rhs: both sides; the bound says ``lhs <= rhs`` (or equals).
        detail: the same in words.
    """

    window: int | None = None
    client: int | None = None
    dispatch: int | None = None
    line: int = 0
    lhs: float | None = None
    rhs: float | None = None
    detail: str = ""

    def __str__(self) -> str:
        names = (("window", self.window), ("client", self.client), ("dispatch", self.dispatch))
        parts = [f"{name} {value}" for name, value in names if value is not None]
        if self.line:
            parts.append(f"line {self.line}")
        if self.lhs is not None and self.rhs is not None:
            parts.append(f"{self.lhs:.9g} against {self.rhs:.9g}")
        if self.detail:
            parts.append(self.detail)
        return ", ".join(parts)


@dataclass(frozen=True)
class Finding:
    """One row of the report.

    Attributes:
        name: stable name; those of bounds are the keys of `theory.bounds.BOUNDS`.
        group: ``log`` (is the log consistent?), ``assumption``, ``inequality`` or ``expectation``.
        title: in words.
        verdict: see `Verdict`.
        measured, bound: means over the checks of the two sides.
        margin: smallest ``(bound - measured) / max(|bound|, |measured|)`` over the checks.
        checks: how many inequalities were evaluated.
        ties: how many of them agree within rounding and were not settled.
        certificate: every constant in the bound is exact or given, so that its value is a guarantee
            under the hypotheses; False where an estimate from below entered.
        premises: hypothesis -> its verdict on this run.
        witness: the first failure.
        reason: why the verdict is what it is, in a sentence.
        equation: number in ``docs/derivations``.
    """

    name: str
    group: str
    title: str
    verdict: Verdict
    measured: float | None = None
    bound: float | None = None
    margin: float | None = None
    checks: int = 0
    ties: int = 0
    certificate: bool = True
    premises: dict[str, str] = field(default_factory=dict)
    witness: Witness | None = None
    reason: str = ""
    equation: str = ""

    def as_dict(self) -> dict[str, Any]:
        """JSON form, keys in the order above; no NaN, no infinity."""
        data = {key: getattr(self, key) for key in self.__dataclass_fields__}
        data["verdict"] = self.verdict.value
        data["witness"] = None if self.witness is None else dict(vars(self.witness))
        for key in ("measured", "bound", "margin"):
            value = data[key]
            if value is not None and not abs(value) < float("inf"):
                data[key] = None
        return data


def undetermined(name: str, group: str, title: str, reason: str, **extra: Any) -> Finding:
    """A finding that the log cannot settle."""
    return Finding(name, group, title, Verdict.UNDETERMINED, reason=reason, **extra)
