"""The tables of groups: their numbers, and each against one of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fedgmr_plugin.report.results import Comparisons, Result
from fedgmr_plugin.report.statistics import FEWEST_PAIRS, Estimate
from fedgmr_plugin.report.svg import swatch
from fedgmr_plugin.report.tables import table
from fedgmr_plugin.report.text import NONE, THIN, megabytes, name, number, percent, seconds


def groups(rows: Sequence[Result]) -> str:
    """Every group in numbers."""
    first = rows[0].summaries[0]
    budget, target = first.budget_seconds, first.target_accuracy
    goal = percent(target) if target is not None else "target"
    head = [
        "Configuration",
        "Seeds",
        "Accuracy" + (f"<small>at {seconds(budget)}, mean ± 95 %</small>" if budget is not None else ""),
        f"Time<small>to {goal}, median</small>",
        f"MB<small>to {goal}, median</small>",
        "Staleness<small>mean</small>",
        "Traffic<small>MB, mean</small>",
    ]
    cells = []
    for row in rows:
        group, all_of = row.group, len(row.group.runs)
        few = "not reached" if row.reached == 0 else f"in {row.reached} of {all_of} seeds"
        some = "" if row.reached == all_of else f" <small>({row.reached} of {all_of})</small>"
        never = math.isinf(row.seconds)
        cells.append(
            [
                f"{swatch(group.colour, group.dash, 2.4, marker=True)}{name(group.label)}",
                number(all_of),
                interval(row.accuracy),
                few if never else seconds(row.seconds) + some,
                NONE if never else megabytes(row.megabytes) + some,
                number(row.staleness.value, 2),
                megabytes(row.traffic),
            ]
        )
    return table("Every configuration over its seeds", head, cells)


def interval(share: Estimate) -> str:
    """A mean share with half the width of its interval, in per cent."""
    if math.isnan(share.value):
        return NONE
    half = "" if math.isnan(share.half) else f" ± {number(100 * share.half, 2)}"
    return f"{number(100 * share.value, 2)}{half}{THIN}%"


def comparisons(rows: Sequence[Result], found: Comparisons) -> str:
    """Every group against the reference, paired by seed, and the rule of the verdicts."""
    against = rows[found.reference].group.label
    others = [(row, one) for row, one in zip(rows, found.others, strict=True) if one is not None]
    cells = []
    for row, one in others:
        d = one.difference
        cells.append(
            [
                f"{swatch(row.group.colour, row.group.dash, 2.4, marker=True)}{name(row.group.label)}",
                number(d.n),
                _signed(d.value),
                NONE if math.isnan(d.low) else f"{_signed(d.low)} to {_signed(d.high)}",
                NONE if math.isnan(one.p) else "&lt; 0.001" if one.p < 0.001 else number(one.p, 3),
                f'<span class="word">{_strong(one.verdict)}</span>',
            ]
        )
    many = len(others) > 1
    head = [
        "Configuration",
        "Pairs<small>seeds of both</small>",
        "Difference<small>points, mean</small>",
        "95 % interval<small>points</small>",
        "p" + ("<small>Holm</small>" if many else ""),
        "Verdict",
    ]
    why = "as asked for" if found.chosen else "the best mean; chosen after the fact, which favours it"
    rule = (
        f"Accuracy minus that of {name(against)} ({why}), seed by seed; Student’s paired t. "
        f"“Better” and “worse” need at least {FEWEST_PAIRS} pairs and p &lt; 0.05"
    )
    if many:
        rule += f", p corrected for {len(others)} comparisons after Holm; each interval is for itself alone."
    else:
        rule += ", which is an interval without 0."
    rule += " Anything else is “not enough seeds to tell”, and no claim that they are equal."
    body = table(f"Accuracy against {name(against)}, paired by seed", head, cells, text=(0, 5))
    return f'{body}<p class="quiet">{rule}</p>'


def _signed(share: float) -> str:
    """A difference of shares in percentage points, with its sign."""
    return ("+" if share > 0 else "") + number(100 * share, 2)


def _strong(verdict: str) -> str:
    return f"<strong>{verdict}</strong>" if verdict in ("better", "worse") else verdict
