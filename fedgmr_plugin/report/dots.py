"""All groups by accuracy: one row each, with its mean, its interval and every seed, as SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from fedgmr_plugin.report.results import Result
from fedgmr_plugin.report.scales import as_percent, nice_ticks
from fedgmr_plugin.report.svg import BOTTOM, COLOURS, TOP, WIDTH, point
from fedgmr_plugin.report.text import escape, name, number, percent, shorten

#: Height of a row; where the lanes begin and end; longest label in characters.
ROW, START, END, LONGEST = 19.0, 146.0, WIDTH - 76.0, 19


def order(rows: Sequence[Result]) -> list[int]:
    """Places of the groups that have an accuracy, the best mean first."""
    known = [place for place, row in enumerate(rows) if row.accuracy.n]
    return sorted(known, key=lambda place: -rows[place].accuracy.value)


def figure(rows: Sequence[Result], reference: int | None, *, ident: str) -> str:
    """The groups as a ``<figure>`` with its caption; empty where none has an accuracy.

    Args:
        rows: the groups in numbers.
        reference: place of the one that the others are compared with.
        ident: unique in the page.
    """
    places = order(rows)
    if not places:
        return ""
    if all(row.group.alone for row in rows):
        caption = "As tabled above."
    else:
        caption = "Marker: mean over seeds, as tabled above; line: its 95 % interval; ticks: seeds."
    if reference in places:
        caption += f" Dotted line: {rows[reference].group.label}."
    title = "Accuracy of all configurations"
    against = None if reference is None else rows[reference]
    svg = draw([rows[place] for place in places], against, ident=ident, title=title)
    return (
        f"<figure><figcaption><h3>{name(title)}</h3><p>{escape(caption)}</p></figcaption>"
        f'<div class="plot" tabindex="0">{svg}</div></figure>'
    )


def draw(rows: Sequence[Result], against: Result | None, *, ident: str, title: str) -> str:
    """The rows as an ``<svg>`` element."""
    seeds = [[s.accuracy for s in row.summaries if s.accuracy is not None] for row in rows]
    ends = [e for row in rows for e in (row.accuracy.low, row.accuracy.high) if math.isfinite(e)]
    values = [value for some in seeds for value in some]
    low, high = max(min([*ends, *values]), 0.0), min(max([*ends, *values]), 1.0)
    ticks = nice_ticks(low, high)
    low, high = max(ticks[0], 0.0), ticks[-1]
    bottom = TOP + ROW * len(rows)

    def x(value: float) -> float:
        return START + (min(max(value, low), high) - low) / (high - low) * (END - START)

    said = "; ".join(f"{row.group.label}: {percent(row.accuracy.value)}" for row in rows)
    parts = [
        f'<svg class="chart dots" viewBox="0 0 {WIDTH} {bottom + BOTTOM:.0f}" role="img" '
        f'aria-labelledby="{ident}-t {ident}-d"><title id="{ident}-t">{escape(title)}</title>'
        f'<desc id="{ident}-d">{escape(said)}</desc>'
    ]
    step = ticks[1] - ticks[0]
    for at in ticks:
        if low <= at <= high * (1 + 1e-9):
            parts.append(f'<line class="rule" x1="{x(at):.1f}" y1="{TOP}" x2="{x(at):.1f}" y2="{bottom}"/>')
            text = escape(as_percent(at, step))
            parts.append(f'<text x="{x(at):.1f}" y="{bottom + 18}" text-anchor="middle">{text}</text>')
    if against is not None and against.accuracy.n:
        at = x(against.accuracy.value)
        parts.append(f'<line class="mark" x1="{at:.1f}" y1="{TOP}" x2="{at:.1f}" y2="{bottom}"/>')
    for place, (row, own) in enumerate(zip(rows, seeds, strict=True)):
        parts += _row(row, own, TOP + ROW * (place + 0.5), x)
    parts.append(f'<line class="base" x1="{START}" y1="{bottom}" x2="{END}" y2="{bottom}"/>')
    label = f'<text class="label" x="{END}" y="{bottom + 36}" text-anchor="end">accuracy (%)</text>'
    return "".join([*parts, label]) + "</svg>"


def _row(row: Result, seeds: Sequence[float], y: float, x: Callable[[float], float]) -> list[str]:
    """One group: its name, the lane, the seeds, the interval, the mean, and the mean in numbers."""
    group, found = row.group, row.accuracy
    colour = group.colour % COLOURS
    parts = [
        f'<text class="t{colour}" x="{START - 12}" y="{y + 4:.1f}" text-anchor="end">'
        f"{escape(shorten(group.label, LONGEST))}<title>{escape(group.label)}</title></text>",
        f'<line class="lane" x1="{START}" y1="{y:.1f}" x2="{END}" y2="{y:.1f}"/>',
    ]
    if math.isfinite(found.low):
        parts.append(
            f'<line class="l s{colour} span" x1="{x(found.low):.1f}" y1="{y:.1f}" x2="{x(found.high):.1f}" '
            f'y2="{y:.1f}"/>'
        )
    if len(seeds) > 1:
        ticks = "".join(f"M{x(value):.1f} {y - 5:.1f}v10" for value in seeds)
        parts.append(f'<path class="l s{colour} seed" d="{ticks}"/>')
    parts.append(point(colour, group.dash, x(found.value), y))
    half = "" if math.isnan(found.half) else f" ± {number(100 * found.half, 1)}"
    parts.append(
        f'<text x="{WIDTH - 2}" y="{y + 4:.1f}" text-anchor="end">{number(100 * found.value, 1)}{half}</text>'
    )
    return parts
