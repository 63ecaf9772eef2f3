"""Who contributed when: one row for each client, and its mean staleness beside it, as SVG.

Legend: R rows (clients, or bundles of clients), B bins of virtual time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedgmr_plugin.protocol.runlog import RunLog
from fedgmr_plugin.report.scales import nice_ticks, plain
from fedgmr_plugin.report.svg import BOTTOM, LEFT, TOP, WIDTH, Axis
from fedgmr_plugin.report.text import escape, name, number
from fedgmr_plugin.report.tracks import ClientClass, classes

Array = NDArray[np.float64]

#: Most rows, and bins of time.
ROWS, TIMES = 40, 90
#: Shades at most; the lightest has this opacity, the darkest 1.
SHADES, LIGHTEST = 5, 0.35
#: Where the raster ends, and where the bars of the staleness begin and end.
EDGE, BAR, BAR_END = 398, 416, 516
#: Height of a row from which its number is written.
NUMBERED = 12


class Row(NamedTuple):
    """One line of the raster.

    Attributes:
        label: the client's number, or those of a bundle.
        density: initial density of its class.
        arrivals: merged uploads in each bin [B].
        uploads: merged uploads in all.
        staleness: their mean staleness, in windows; NaN without uploads.
    """

    label: str
    density: float
    arrivals: NDArray[np.int64]
    uploads: int
    staleness: float


def rows(run: RunLog, end: float) -> list[Row]:
    """The clients of a run, densest class first, in bundles where there are more than `ROWS` of them.

    Args:
        end: virtual seconds at which the last bin ends.
    """
    arrival = run.columns("arrival", "client", "time", "staleness")
    client, time, staleness = arrival.values()
    known = np.isfinite(time)
    place = np.clip((np.where(known, time, 0.0) / end * TIMES).astype(np.int64), 0, TIMES - 1)
    found = []
    for density, bundle in _bundles(run):
        mine = np.isin(client, bundle)
        count = int(mine.sum())
        found.append(
            Row(
                label=_label(bundle),
                density=density,
                arrivals=np.bincount(place[mine & known], minlength=TIMES),
                uploads=count,
                staleness=float(staleness[mine].mean()) if count else math.nan,
            )
        )
    return found


def _bundles(run: RunLog) -> list[tuple[float, tuple[int, ...]]]:
    """Class density and clients of each row."""
    groups = classes(run)
    each = math.ceil(sum(len(group.clients) for group in groups) / ROWS)
    if each > 1 and len(groups) > ROWS // 2:  # too many classes to give each a row of its own
        merged = tuple(client for group in groups for client in group.clients)
        groups = [ClientClass(groups[0].density, merged)]
    return [
        (group.density, group.clients[start : start + each])
        for group in groups
        for start in range(0, len(group.clients), each)
    ]


def _label(bundle: tuple[int, ...]) -> str:
    first, last = bundle[0], bundle[-1]
    if len(bundle) == 1:
        return str(first)
    return f"{first}–{last}" if last - first == len(bundle) - 1 else f"{first} …"


def levels(most: int) -> list[int]:
    """Smallest number of uploads of each shade: 1, 2, 3, ... or powers of the least number that do."""
    if most <= SHADES:
        return list(range(1, max(most, 1) + 1))
    base = 2
    while base**SHADES <= most:
        base += 1
    return [base**power for power in range(SHADES) if base**power <= most]


def opacity(shade: int, shades: int) -> float:
    """Opacity of one of so many shades; one alone is the darkest."""
    return 1.0 if shades == 1 else LIGHTEST + (1 - LIGHTEST) * shade / (shades - 1)


def ranges(edges: Sequence[int], most: int) -> list[str]:
    """What each shade stands for, in words."""
    ends = [*(edge - 1 for edge in edges[1:]), max(most, edges[-1])]
    return [str(a) if a == b else f"{a}–{b}" for a, b in zip(edges, ends, strict=True)]


def sample(shade: int, shades: int) -> str:
    """A short sample of a shade, for the legend."""
    return (
        '<svg class="swatch" viewBox="0 0 28 12" width="28" height="12" aria-hidden="true">'
        '<path class="l s0" d="M4 6H24" stroke-width="12" '
        f'opacity="{opacity(shade, shades):.3g}"/></svg>'
    )


def figure(run: RunLog, time: Axis, most: int, *, ident: str, title: str, seed: str = "") -> str:
    """The raster of a run as a ``<figure>`` with its caption and legend.

    Args:
        time: its axis, from 0 to a positive `high`.
        most: uploads in a bin that the darkest shade covers.
        seed: what to say of the run's seed.
    """
    end = time.high or 1.0
    shown = rows(run, end)
    caption = (
        f"Merged uploads in each {number(end / TIMES, 1 if end < 1000 else 0)} s, densest class first; lines "
        "part the classes. Bars: mean staleness of a client’s uploads, in windows." + seed
    )
    head = f"<figcaption><h3>{name(title)}</h3><p>{escape(caption)}</p></figcaption>"
    if not any(row.uploads for row in shown):
        return f'<figure>{head}<p class="empty">Nothing was recorded for this figure.</p></figure>'
    words = ranges(levels(most), most)
    legend = "".join(f"<li>{sample(i, len(words))}{escape(text)}</li>" for i, text in enumerate(words))
    said = f"{caption} " + "; ".join(f"client {row.label}: {row.uploads} uploads" for row in shown)
    svg = draw(shown, time, most, ident=ident, title=title, description=said)
    return (
        f'<figure>{head}<ul class="legend"><li>uploads:</li>{legend}</ul>'
        f'<div class="plot" tabindex="0">{svg}</div></figure>'
    )


def draw(shown: Sequence[Row], time: Axis, most: int, *, ident: str, title: str, description: str) -> str:
    """The raster as an ``<svg>`` element.

    Args:
        shown: at least one row.
        time: its axis, from 0 to a positive `high`.
        most: uploads in a bin that the darkest shade covers.
    """
    step = min(19.0, max(6.0, 250.0 / len(shown)))
    bottom = TOP + step * len(shown)
    height = bottom + BOTTOM
    end = time.high or 1.0
    parts = [
        f'<svg class="chart raster" viewBox="0 0 {WIDTH} {height:.0f}" role="img" '
        f'aria-labelledby="{ident}-t {ident}-d"><title id="{ident}-t">{escape(title)}</title>'
        f'<desc id="{ident}-d">{escape(description)}</desc>'
        '<text class="label" x="0" y="14">client</text>'
        f'<text class="label" x="{BAR}" y="14">mean staleness</text>'
    ]
    parts += _labels(shown, step)
    parts += _cells(shown, levels(most), step)
    parts += _bars(shown, step)
    cuts = [i for i in range(1, len(shown)) if shown[i].density != shown[i - 1].density]
    parts += [
        f'<line class="cut" x1="{LEFT - 6}" y1="{y:.1f}" x2="{WIDTH - 6}" y2="{y:.1f}"/>'
        for y in (TOP + step * i for i in cuts)
    ]
    ticks = nice_ticks(0.0, end, 4)
    for at in ticks:
        if at <= end * (1 + 1e-6):
            x = LEFT + (EDGE - LEFT) * at / end
            parts.append(
                f'<line class="tick" x1="{x:.1f}" y1="{bottom:.1f}" x2="{x:.1f}" y2="{bottom + 5:.1f}"/>'
            )
            parts.append(
                f'<text x="{x:.1f}" y="{bottom + 18:.1f}" text-anchor="middle">'
                f"{escape(plain(at, ticks[1] - ticks[0]))}</text>"
            )
    parts.append(f'<line class="base" x1="{LEFT}" y1="{bottom:.1f}" x2="{EDGE}" y2="{bottom:.1f}"/>')
    parts.append(
        f'<text class="label" x="{EDGE}" y="{height - 6:.1f}" text-anchor="end">{escape(time.label)}</text>'
    )
    return "".join(parts) + "</svg>"


def _labels(shown: Sequence[Row], step: float) -> list[str]:
    """Clients' names, as many as have room."""
    every = math.ceil(14 / step)
    return [
        f'<text x="{LEFT - 8}" y="{TOP + step * (i + 0.5) + 4:.1f}" text-anchor="end">'
        f"{escape(row.label)}</text>"
        for i, row in enumerate(shown)
        if i % every == 0
    ]


def _cells(shown: Sequence[Row], edges: Sequence[int], step: float) -> list[str]:
    """One path for each shade; neighbouring cells of one shade are one stroke."""
    unit = (EDGE - LEFT) / TIMES
    paths: list[list[str]] = [[] for _ in edges]
    for place, row in enumerate(shown):
        y = TOP + step * (place + 0.5)
        shade = np.searchsorted(edges, row.arrivals, side="right") - 1
        starts = np.flatnonzero(np.diff(shade, prepend=-2))
        for start, stop in zip(starts, [*starts[1:], TIMES], strict=True):
            if shade[start] >= 0:
                paths[shade[start]].append(f"M{LEFT + unit * start:.1f} {y:.1f}H{LEFT + unit * stop:.1f}")
    lanes = "".join(
        f'<line class="lane" x1="{LEFT}" y1="{TOP + step * (i + 0.5):.1f}" x2="{EDGE}" '
        f'y2="{TOP + step * (i + 0.5):.1f}"/>'
        for i in range(len(shown))
    )
    drawn = [
        f'<path class="l s0" d="{"".join(path)}" stroke-width="{step * 0.76:.1f}" '
        f'opacity="{opacity(i, len(edges)):.3g}"/>'
        for i, path in enumerate(paths)
        if path
    ]
    return [lanes, *drawn]


def _bars(shown: Sequence[Row], step: float) -> list[str]:
    """Mean staleness as a bar with its number, and each row's note."""
    largest = max((row.staleness for row in shown if row.staleness > 0), default=1.0)
    digits = 2 if largest < 10 else 1
    parts = []
    if step < NUMBERED:  # no room for a number in each row: that of the longest bar instead
        below = TOP + step * len(shown) + 18
        parts.append(
            f'<text x="{BAR_END}" y="{below:.1f}" text-anchor="middle">{number(largest, digits)}</text>'
        )
    for place, row in enumerate(shown):
        y = TOP + step * place
        if row.staleness > 0:
            width = (BAR_END - BAR) * row.staleness / largest
            parts.append(
                f'<rect class="f s6" x="{BAR}" y="{y + step * 0.2:.1f}" width="{max(width, 0.8):.1f}" '
                f'height="{step * 0.6:.1f}"/>'
            )
        if step >= NUMBERED:
            parts.append(
                f'<text x="{WIDTH - 6}" y="{y + step / 2 + 4:.1f}" text-anchor="end">'
                f"{number(row.staleness, digits)}</text>"
            )
        note = (
            f"client {row.label}, initial density {row.density:g}: {number(row.uploads)} uploads, "
            f"mean staleness {number(row.staleness, 2)}"
        )
        parts.append(
            f'<rect class="row" x="0" y="{y:.1f}" width="{WIDTH}" height="{step:.1f}">'
            f"<title>{escape(note)}</title></rect>"
        )
    return parts
