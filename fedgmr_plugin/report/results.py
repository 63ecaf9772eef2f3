"""What the groups come down to, and how they compare, seed by seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from fedgmr_plugin.protocol.runlog import RunLog
from fedgmr_plugin.report import statistics
from fedgmr_plugin.report.groups import Group, grouped
from fedgmr_plugin.report.statistics import Difference, Estimate, Verdict
from fedgmr_plugin.report.summary import Summary, common_budget, default_target, summarise


class Result(NamedTuple):
    """One group in numbers; accuracies are shares of 1.

    Attributes:
        group: whose.
        summaries: of its runs, by seed.
        accuracy: `Summary.accuracy`, mean over seeds at the budget that all runs share, Student's t interval.
        iqm: interquartile mean of the same.
        seconds, megabytes: median over seeds of virtual time and traffic until the target; infinite where
            half of the seeds or more did not reach it.
        reached: seeds that reached it.
        staleness: mean over seeds of the mean staleness of a run's uploads, in windows.
        traffic: mean over seeds of all bytes up and down, MB (10^6 bytes).
    """

    group: Group
    summaries: tuple[Summary, ...]
    accuracy: Estimate
    iqm: float
    seconds: float
    megabytes: float
    reached: int
    staleness: Estimate
    traffic: float


class Comparison(NamedTuple):
    """A group against the reference, paired by seed.

    Attributes:
        difference: of the accuracies, group minus reference, shares of 1.
        p: Holm's correction of its p-value for all comparisons of the page.
        verdict: on the group.
    """

    difference: Difference
    p: float
    verdict: Verdict


class Comparisons(NamedTuple):
    """All groups against one of them.

    Attributes:
        reference: its place among the groups.
        chosen: it was named, rather than taken because its mean accuracy is the best.
        others: a comparison for each group; None for the reference.
    """

    reference: int
    chosen: bool
    others: tuple[Comparison | None, ...]


class Table(NamedTuple):
    """All groups in numbers, their comparisons if any, and evaluations that an accuracy is the mean of."""

    rows: tuple[Result, ...]
    comparisons: Comparisons | None
    last: int = 1


def tabulate(
    runs: Sequence[RunLog], *, target: float | None = None, against: str | None = None, last: int = 1
) -> Table:
    """The runs' groups in numbers, with one target and one budget for all, and compared with one of them.

    Args:
        runs: at least one.
        target: accuracy in [0, 1]; 95 % of the best last accuracy where None.
        against: name of a group, or of one of its runs; the group of the best mean accuracy where None.
        last: evaluations that a run's accuracy is the mean of.

    Raises:
        ValueError: `against` names no group.
    """
    goal = default_target(runs) if target is None else target
    rows = results(grouped(runs), goal, common_budget(runs), last)
    return Table(tuple(rows), compare(rows, against), last)


def results(
    groups: Sequence[Group], target: float | None, budget: float | None, last: int = 1
) -> list[Result]:
    """Every group in numbers, with the target and the budget that all of them share."""
    found = []
    for group in groups:
        rows = tuple(summarise(run.run, target, budget=budget, last=last) for run in group.runs)
        accuracy = [_number(row.accuracy) for row in rows]
        found.append(
            Result(
                group=group,
                summaries=rows,
                accuracy=statistics.mean(accuracy),
                iqm=statistics.iqm(accuracy),
                seconds=statistics.median([_late(row.seconds_to_target) for row in rows]),
                megabytes=statistics.median([_late(row.megabytes_to_target) for row in rows]),
                reached=sum(row.seconds_to_target is not None for row in rows),
                staleness=statistics.mean([_number(row.mean_staleness) for row in rows]),
                traffic=statistics.mean([row.megabytes_up + row.megabytes_down for row in rows]).value,
            )
        )
    return found


def find(groups: Sequence[Group], name: str) -> int:
    """Place of the group of that name, or of the one that has a run of that name.

    Raises:
        ValueError: there is none, or several; the message lists the names.
    """
    exact = [place for place, group in enumerate(groups) if group.label == name]
    within = [place for place, group in enumerate(groups) if any(run.run.name == name for run in group.runs)]
    found = exact or within
    if len(found) != 1:
        known = ", ".join(group.label for group in groups)
        raise ValueError(f"{name!r} names {'several groups' if found else 'no group'}; there are {known}")
    return found[0]


def compare(rows: Sequence[Result], against: str | None = None) -> Comparisons | None:
    """Every group against the named one, or the one of the best mean accuracy.

    None for a single group, and where nothing was named and no group has an accuracy or all are single runs.

    Raises:
        ValueError: `against` names no group.
    """
    groups = [row.group for row in rows]
    reference = None if against is None else find(groups, against)
    if len(rows) < 2:
        return None
    if reference is None:
        known = [place for place, row in enumerate(rows) if row.accuracy.n]
        if not known or all(group.alone for group in groups):
            return None
        reference = max(known, key=lambda place: rows[place].accuracy.value)
    differences = [_paired(row, rows[reference]) for row in rows]
    others = [place for place in range(len(rows)) if place != reference]
    corrected = statistics.holm([differences[place].p for place in others])
    comparisons: list[Comparison | None] = [None] * len(rows)
    for place, p in zip(others, corrected.tolist(), strict=True):
        said = statistics.verdict(differences[place], p)
        comparisons[place] = Comparison(differences[place], p, said)
    return Comparisons(reference, against is not None, tuple(comparisons))


def _paired(ours: Result, theirs: Result) -> Difference:
    mine = {row.seed: _number(row.accuracy) for row in ours.summaries}
    other = {row.seed: _number(row.accuracy) for row in theirs.summaries}
    seeds = sorted(mine.keys() & other.keys())
    return statistics.paired([mine[seed] for seed in seeds], [other[seed] for seed in seeds])


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _late(value: float | None) -> float:
    return math.inf if value is None else value
