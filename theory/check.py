"""Checks recorded runs against the theory: consistency, assumptions, inequalities, expectations.

>>> from theory import check_runs
>>> report = check_runs(["demo_runs/001/fedgmr"])  # what `fedgmr demo` writes
>>> report.status()
0
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from theory.advice import advice
from theory.checks.coverage import coverage_bounds
from theory.checks.decomposition import term_bounds
from theory.checks.descent import descents
from theory.checks.echoes import echoes
from theory.checks.expectation import expectations
from theory.checks.identity import term_laws
from theory.checks.masks import mask_bounds
from theory.checks.nulls import nulls
from theory.checks.order import order
from theory.checks.promises import promises
from theory.checks.run import Run
from theory.checks.structure import structure
from theory.checks.values import values
from theory.estimators import Estimate
from theory.frame import Frame
from theory.log import RunLog, read_log
from theory.schema import SLACK, constant_complaint
from theory.verdict import Finding, Verdict

#: Order of the groups in a report.
GROUPS = ("log", "assumption", "condition", "inequality", "expectation")


@dataclass(frozen=True)
class RunReport:
    """What was found on one run; `advice` says what would decide more of it."""

    path: str
    name: str
    findings: tuple[Finding, ...]
    constants: Mapping[str, Estimate]
    advice: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> Finding:
        for finding in self.findings:
            if finding.name == name:
                return finding
        raise KeyError(name)

    def violated(self) -> tuple[Finding, ...]:
        """The findings that are VIOLATED."""
        return tuple(f for f in self.findings if f.verdict is Verdict.VIOLATED)


@dataclass(frozen=True)
class Report:
    """One report for each run; `expectations` are judged over all of them together."""

    runs: tuple[RunReport, ...]
    expectations: tuple[Finding, ...]

    def __getitem__(self, name: str) -> Finding:
        for finding in self.expectations:
            if finding.name == name:
                return finding
        return self.runs[0][name]

    def violated(self) -> tuple[Finding, ...]:
        """Everything that is VIOLATED, over all runs."""
        bad = [finding for run in self.runs for finding in run.violated()]
        return (*bad, *(f for f in self.expectations if f.verdict is Verdict.VIOLATED))

    def status(self, accept: Sequence[str] = ()) -> int:
        """Exit status: 1 if something is VIOLATED whose name is not in `accept`, else 0."""
        return int(any(finding.name not in accept for finding in self.violated()))

    def as_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "schema": "1.0",
            "runs": [
                {
                    "path": run.path,
                    "name": run.name,
                    "constants": {key: _constant(estimate) for key, estimate in run.constants.items()},
                    "findings": [finding.as_dict() for finding in run.findings],
                    "advice": list(run.advice),
                }
                for run in self.runs
            ],
            "expectations": [finding.as_dict() for finding in self.expectations],
        }


def check_runs(
    paths: Sequence[str | Path], *, given: Mapping[str, float] | None = None, slack: float = SLACK
) -> Report:
    """Reads and checks runs; several are taken as seeds of one configuration.

    Args:
        paths: log files or run directories.
        given: known constants (``L``, ``sigma_sq``, ``sigma_g_sq``, ``F_inf``, ``G_sq``, ``W_sq``), which
            win over the log's own ``constants`` record.
        slack: see `theory.schema.SLACK`.

    Raises:
        LogError: a log cannot be read.
        ValueError: a given constant is unknown or out of its range.
    """
    return check_logs([read_log(path) for path in paths], given=given, slack=slack)


@np.errstate(all="ignore")
def check_logs(
    logs: Sequence[RunLog], *, given: Mapping[str, float] | None = None, slack: float = SLACK
) -> Report:
    """`check_runs` for logs that were read already.

    Numbers of a log may overflow what is computed of them; what is then nan or infinite decides nothing.

    Raises:
        ValueError: a given constant is unknown or out of its range.
    """
    for name, value in (given or {}).items():
        if complaint := constant_complaint(name, value):
            raise ValueError(complaint)
    runs = [Run.of(Frame.of(log, dict(given or {}), slack)) for log in logs]
    expected = tuple(expectations(runs)) if runs else ()
    return Report(tuple(_report(run, expected) for run in runs), expected)


def _report(run: Run, expected: Sequence[Finding]) -> RunReport:
    frame = run.frame
    findings = (
        *structure(frame), *order(frame), *nulls(frame), *promises(frame), *echoes(frame),
        *values(frame), *term_laws(frame),
        *run.assumed.values(),
        *(condition.finding for condition in run.conditions.values()),
        *descents(run), *term_bounds(run), *mask_bounds(run), *coverage_bounds(run),
    )  # fmt: skip
    ordered = sorted(findings, key=lambda f: (GROUPS.index(f.group), _number(f.equation)))
    more = advice(frame, run.conditions, [*ordered, *expected])
    return RunReport(frame.log.path, frame.log.name, tuple(ordered), run.constants, more)


def _number(equation: str) -> int:
    return int(equation) if equation else 0


def _constant(estimate: Estimate) -> dict[str, Any]:
    data = estimate._asdict()
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in data.items()
    }
