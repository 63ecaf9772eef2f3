"""Line, step and bar charts as self-contained SVG.

Colours come from the page's style sheet through the classes ``s0`` to ``s6`` (a colour-blind-safe
palette), so that one drawing serves light, dark and print. Everything that tells two series apart by
colour tells them apart by dash pattern, marker or filling too, for print and for eyes that see no colour.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedgmr_plugin.report.scales import TINY, nice_ticks, plain, same, thin
from fedgmr_plugin.report.text import escape, shorten

Array = NDArray[np.float64]

WIDTH, HEIGHT = 560, 320
#: Size of one of several charts beside each other.
SMALL = (400, 250)
TOP, BOTTOM, LEFT, RIGHT = 30, 42, 52, 16
#: Longest label at the end of a line, in characters, and the room for one character.
LABEL_LENGTH, LABEL_STEP = 16, 7.6
#: Room for one character of a tick's number.
TICK_STEP = 8.6
COLOURS = 7
DASHES = ("", "9 3", "3 2.5", "10 3 2.5 3", "6 2 2 2 2 2", "14 4", "1.5 2.5")
#: Opacity of the filling of bars, which keep their outline.
FILLS = (1.0, 0.45, 0.1, 0.7, 0.25, 0.85, 0.0)
#: Outlines of the markers about their centre, in user units; the first marker is a disc.
SHAPES = (
    (),
    ((-3.4, -3.4), (3.4, -3.4), (3.4, 3.4), (-3.4, 3.4)),
    ((0.0, -4.6), (4.4, 3.2), (-4.4, 3.2)),
    ((0.0, -4.8), (4.8, 0.0), (0.0, 4.8), (-4.8, 0.0)),
    ((0.0, 4.6), (4.4, -3.2), (-4.4, -3.2)),
    ((-4.2, -4.0), (4.2, -4.0), (-4.2, 4.0), (4.2, 4.0)),
    ((-4.0, -4.2), (-4.0, 4.2), (4.0, -4.2), (4.0, 4.2)),
)
#: Markers on a line of many points, and points up to which each has its marker.
MARKERS, FEW = 6, 12


class Series(NamedTuple):
    """One curve or one set of bars.

    Attributes:
        label: its name.
        x: coordinates [points], increasing.
        y: values [points]; NaN interrupts a line.
        colour: index of the palette.
        kind: straight lines, steps (a value holds until the next x), or bars (x is a category).
        dash: SVG dash pattern; empty for a solid line.
        width: of the line, in user units.
        faint: draw it in the background of the others.
        at_end: write the label at the end of the line.
        notes: text shown when the pointer rests on a point, one for each point, or nothing.
        low, high: ends of an interval around each value [points], drawn as a band where finite.
        marker: put markers on a line of many points too.
        context: draw it grey and thin, behind everything: what the others are to be seen against.
    """

    label: str
    x: Array
    y: Array
    colour: int = 0
    kind: Literal["line", "steps", "bars"] = "line"
    dash: str = ""
    width: float = 2.0
    faint: bool = False
    at_end: bool = False
    notes: Sequence[str] = ()
    low: Array | None = None
    high: Array | None = None
    marker: bool = False
    context: bool = False


class Axis(NamedTuple):
    """One axis.

    Attributes:
        label: what it shows, with the unit.
        low, high: limits; taken from the data where None.
        write: a tick's value and its step as text.
        ticks: positions and texts to use instead of computed ones.
    """

    label: str
    low: float | None = None
    high: float | None = None
    write: Callable[[float, float], str] | None = None
    ticks: Sequence[tuple[float, str]] = ()


def swatch(
    colour: int,
    dash: str = "",
    width: float = 2.0,
    *,
    kind: str = "line",
    faint: bool = False,
    marker: bool = False,
) -> str:
    """A short sample of a line or bar, for legends and tables."""
    if kind == "bars":
        drawn = _bar(colour, dash, 8, 1, 12, 10)
    else:
        drawn = (
            f'<line class="l s{colour % COLOURS}" x1="0" y1="6" x2="28" y2="6"{_pen(dash, width, faint)}/>'
        )
        drawn += point(colour, dash, 14, 6) if marker else ""
    return f'<svg class="swatch" viewBox="0 0 28 12" width="28" height="12" aria-hidden="true">{drawn}</svg>'


def chart(
    series: Sequence[Series],
    x: Axis,
    y: Axis,
    *,
    ident: str,
    title: str,
    description: str,
    marks: Sequence[float] = (),
    size: tuple[int, int] = (WIDTH, HEIGHT),
) -> str:
    """One chart as an ``<svg>`` element.

    Args:
        series: what to draw; the first is drawn last, on top. Series without a finite point are left out.
        x, y: axes.
        ident: unique in the page; the title's and description's ids are made from it.
        title, description: read out by screen readers.
        marks: places on the x axis to mark by a thin vertical line.
        size: its width and height in user units.
    """
    known = [s._replace(y=np.where(np.isfinite(s.x), s.y, np.nan)) for s in series]
    drawn = [s for s in known if np.isfinite(s.y).any()]
    labels = [min(len(s.label), LABEL_LENGTH) for s in drawn if s.at_end]
    right = 14 + LABEL_STEP * max(labels) if labels else RIGHT
    box = _Box(*_limits(drawn, x, "x"), *_limits(drawn, y, "y"), right, *size)
    parts = [
        f'<svg class="chart" viewBox="0 0 {box.width} {box.height}" role="img" '
        f'aria-labelledby="{ident}-t {ident}-d"><title id="{ident}-t">{escape(title)}</title>'
        f'<desc id="{ident}-d">{escape(description)}</desc>',
        _axes(box, x, y),
    ]
    parts += [
        f'<line class="mark" x1="{box.x(at):.1f}" y1="{TOP}" x2="{box.x(at):.1f}" y2="{box.bottom}"/>'
        for at in marks
        if box.x_low <= at <= box.x_high
    ]
    parts += [_band(box, s) for s in reversed(drawn) if s.low is not None and s.high is not None]
    bars = [s for s in drawn if s.kind == "bars"]
    parts += [_bars(box, s, place, len(bars)) for place, s in enumerate(bars)]
    curves = [s for s in drawn if s.kind != "bars"]
    parts += [_curve(box, s) for s in reversed(curves) if s.context]
    parts += [_curve(box, s) for s in reversed(curves) if not s.context]
    parts += [_notes(box, s) for s in curves if s.notes]
    parts.append(_end_labels(box, [s for s in curves if s.at_end]))
    return "".join(parts) + "</svg>"


class _Box(NamedTuple):
    """Data limits of the plot area, and the way from data to user units."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float
    right: float
    width: int = WIDTH
    height: int = HEIGHT

    @property
    def bottom(self) -> int:
        """Where the x axis is."""
        return self.height - BOTTOM

    def x(self, value: float) -> float:
        share = (value - self.x_low) / (self.x_high - self.x_low)
        return LEFT + share * (self.width - LEFT - self.right)

    def y(self, value: float) -> float:
        share = (value - self.y_low) / (self.y_high - self.y_low)
        return self.bottom - share * (self.bottom - TOP)


def _limits(series: Sequence[Series], axis: Axis, which: Literal["x", "y"]) -> tuple[float, float]:
    """Limits of an axis: given, or those of the data; y limits are widened to ticks."""
    low, high = math.inf, -math.inf
    for s in series:
        shown = s.x[np.isfinite(s.y)] if which == "x" else s.y[np.isfinite(s.y)]
        low, high = min(low, float(shown.min())), max(high, float(shown.max()))
    low = low if axis.low is None else axis.low
    high = high if axis.high is None else axis.high
    if not (math.isfinite(low) and math.isfinite(high)):
        low, high = 0.0, 1.0
    if same(low, high):
        pad = abs(low) * 0.1 if abs(low) > TINY else 1.0
        low, high = (low, low + pad) if axis.low is not None else (low - pad, low + pad)
    if which == "y":
        ticks = nice_ticks(low, high)
        low = ticks[0] if axis.low is None else low
        high = ticks[-1] if axis.high is None else high
    return low, high


def _axes(box: _Box, x: Axis, y: Axis) -> str:
    """Grid, ticks and labels."""
    bottom, end = box.bottom, box.width - box.right
    parts = ['<g class="axes">']
    for at, text in _ticks(y, box.y_low, box.y_high, 5):
        parts.append(f'<line class="rule" x1="{LEFT}" y1="{box.y(at):.1f}" x2="{end}" y2="{box.y(at):.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{box.y(at) + 4:.1f}" text-anchor="end">{text}</text>')
    for at, text in _ticks(x, box.x_low, box.x_high, 6 if end - LEFT > 450 else 5 if end > 350 else 4):
        parts.append(
            f'<line class="tick" x1="{box.x(at):.1f}" y1="{bottom}" x2="{box.x(at):.1f}" y2="{bottom + 5}"/>'
        )
        middle = min(box.x(at), box.width - TICK_STEP / 2 * len(text))  # the last one is not cut off
        parts.append(f'<text x="{middle:.1f}" y="{bottom + 18}" text-anchor="middle">{text}</text>')
    parts.append(f'<line class="base" x1="{LEFT}" y1="{bottom}" x2="{end}" y2="{bottom}"/>')
    parts.append(
        f'<text class="label" x="{end}" y="{box.height - 6}" text-anchor="end">{escape(x.label)}</text>'
    )
    parts.append(f'<text class="label" x="0" y="14">{escape(y.label)}</text></g>')
    return "".join(parts)


def _ticks(axis: Axis, low: float, high: float, count: int) -> list[tuple[float, str]]:
    """Positions within the limits, and their texts."""
    if axis.ticks:
        return [(at, escape(text)) for at, text in axis.ticks if low <= at <= high]
    places = nice_ticks(low, high, count)
    step = places[1] - places[0]
    slack = (high - low) * 1e-6
    write = axis.write or plain
    return [(at, escape(write(at, step))) for at in places if low - slack <= at <= high + slack]


def _pen(dash: str, width: float, faint: bool) -> str:
    text = f' stroke-width="{width:g}"'
    if dash:
        text += f' stroke-dasharray="{dash}"'
    return text + (' opacity="0.6"' if faint else "")


def _bar(colour: int, dash: str, x: float, y: float, width: float, height: float, note: str = "") -> str:
    """A rectangle whose filling, which goes with the dash pattern, tells it apart without colour."""
    fill = FILLS[_place(dash)]
    inside = f' fill-opacity="{fill:g}" stroke-width="1"' if fill < 1 else ""
    return (
        f'<rect class="f s{colour % COLOURS}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" '
        f'height="{height:.1f}"{inside}>{note}</rect>'
    )


def _place(dash: str) -> int:
    """Index of a dash pattern; 0 for one that is not of `DASHES`."""
    return DASHES.index(dash) if dash in DASHES else 0


def point(colour: int, dash: str, x: float, y: float) -> str:
    """A marker in one colour, of the shape that goes with the dash pattern."""
    shape = SHAPES[_place(dash)]
    if not shape:
        return f'<circle class="p s{colour % COLOURS}" cx="{x:.1f}" cy="{y:.1f}" r="3.6"/>'
    corners = "L".join(f"{x + dx:.1f} {y + dy:.1f}" for dx, dy in (*shape, shape[0]))
    return f'<path class="p s{colour % COLOURS}" d="M{corners}"/>'


def _band(box: _Box, s: Series) -> str:
    """The area between a series' `low` and `high`, cut at the plot's edges, and its outline."""
    if s.low is None or s.high is None:
        return ""
    low, high = (np.clip(end, box.y_low, box.y_high) for end in (s.low, s.high))
    known = np.flatnonzero(np.isfinite(low) & np.isfinite(high) & np.isfinite(s.x))
    parts = []
    for part in np.split(known, np.flatnonzero(np.diff(known) > 1) + 1):
        if len(part) < 2:
            continue
        top, bottom = (
            [f"{box.x(float(s.x[i])):.1f} {box.y(float(end[i])):.1f}" for i in part] for end in (high, low)
        )
        parts.append(
            f'<path class="b s{s.colour % COLOURS}" d="M{"L".join([*top, *reversed(bottom)])}"/>'
            f'<path class="l s{s.colour % COLOURS}" d="M{"L".join(top)}M{"L".join(bottom)}"'
            f"{_pen(s.dash, 0.8, True)}/>"
        )
    return "".join(parts)


def _marked(box: _Box, s: Series) -> list[int]:
    """The points of a line that get a marker: all where they are few, else some, shifted by its colour."""
    finite = np.flatnonzero(np.isfinite(s.y))
    if s.faint or s.kind == "steps":
        return finite.tolist() if len(finite) == 1 else []
    if len(finite) <= FEW:
        return finite.tolist()
    if not s.marker:
        return []
    start, end = float(s.x[finite[0]]), float(s.x[finite[-1]])
    wanted = start + (end - start) * (np.arange(MARKERS) + (s.colour % COLOURS + 0.5) / COLOURS) / MARKERS
    return sorted({int(finite[np.abs(s.x[finite] - at).argmin()]) for at in wanted})


def _curve(box: _Box, s: Series) -> str:
    """A line or steps, with a gap at each NaN; points where the curve has few of them."""
    xs, ys = (s.x, s.y) if s.kind == "steps" else thin(s.x, s.y)
    path, last = [], math.nan
    for at, value in zip(xs.tolist(), ys.tolist(), strict=True):
        if math.isnan(value):
            last = math.nan
            continue
        px, py = box.x(at), box.y(value)
        if math.isnan(last):
            path.append(f"M{px:.1f} {py:.1f}")
        elif s.kind == "line":
            path.append(f"L{px:.1f} {py:.1f}")
        elif value != last:
            path.append(f"H{px:.1f}V{py:.1f}")
        elif path[-1].startswith("H") and "V" not in path[-1]:
            path[-1] = f"H{px:.1f}"
        else:
            path.append(f"H{px:.1f}")
        last = value
    if s.context:
        return f'<path class="l context" d="{"".join(path)}"><title>{escape(s.label)}</title></path>'
    drawn = f'<path class="l s{s.colour % COLOURS}" d="{"".join(path)}"{_pen(s.dash, s.width, s.faint)}/>'
    return drawn + "".join(
        point(s.colour, s.dash, box.x(float(s.x[i])), box.y(float(s.y[i]))) for i in _marked(box, s)
    )


def _notes(box: _Box, s: Series) -> str:
    """Invisible points that show their note when the pointer rests on them (at most 150)."""
    every = max(1, math.ceil(len(s.x) / 150))
    return "".join(
        f'<circle class="note" cx="{box.x(s.x[i]):.1f}" cy="{box.y(s.y[i]):.1f}" r="7">'
        f"<title>{escape(s.notes[i])}</title></circle>"
        for i in range(0, len(s.x), every)
        if math.isfinite(s.y[i])
    )


def _bars(box: _Box, s: Series, place: int, groups: int) -> str:
    """Bars of one series, beside those of the others: a category is one unit of x wide."""
    unit = box.x(1.0) - box.x(0.0)
    width = unit * 0.8 / groups
    parts = []
    for i, (at, value) in enumerate(zip(s.x.tolist(), s.y.tolist(), strict=True)):
        if not value > 0:
            continue
        left = box.x(at) - unit * 0.4 + place * width
        note = f"<title>{escape(s.notes[i])}</title>" if s.notes else ""
        height = box.y(0.0) - box.y(value)
        parts.append(_bar(s.colour, s.dash, left, box.y(value), max(width - 1.5, 0.8), height, note))
    return "".join(parts)


def _end_labels(box: _Box, series: Sequence[Series]) -> str:
    """Names at the ends of the lines, moved up or down where they would overlap."""
    spots: list[tuple[float, float, Series]] = []
    for s in series:
        last = int(np.flatnonzero(np.isfinite(s.y))[-1])
        spots.append((box.x(float(s.x[last])), box.y(float(s.y[last])), s))
    spots.sort(key=lambda spot: spot[:2])
    groups: list[list[tuple[float, float, Series]]] = []
    for spot in spots:  # labels that start within one label's width of each other may overlap
        if groups and spot[0] - groups[-1][-1][0] < LABEL_LENGTH * LABEL_STEP:
            groups[-1].append(spot)
        else:
            groups.append([spot])
    return "".join(_end_group(group, box.bottom) for group in groups)


def _end_group(spots: list[tuple[float, float, Series]], bottom: float) -> str:
    """Labels that stand beside each other, one below the other."""
    spots.sort(key=lambda spot: spot[1])
    rows = _spread([y for _, y, _ in spots], 14.0, TOP + 2.0, bottom - 6.0)
    parts = []
    for row, (x, y, s) in zip(rows, spots, strict=True):
        if abs(row - y) > 5:
            parts.append(f'<path class="leader" d="M{x + 3:.1f} {y:.1f}L{x + 9:.1f} {row:.1f}"/>')
        parts.append(
            f'<text class="end t{s.colour % COLOURS}" x="{x + 11:.1f}" y="{row + 4:.1f}">'
            f"{escape(shorten(s.label, LABEL_LENGTH))}<title>{escape(s.label)}</title></text>"
        )
    return "".join(parts)


def _spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions near the `wanted` ones (increasing), at least `gap` apart if [low, high] has the room."""
    gap = min(gap, (high - low) / max(1, len(wanted) - 1)) if len(wanted) > 1 else gap
    rows: list[float] = []
    for value in wanted:
        rows.append(max(value, low, rows[-1] + gap if rows else low))
    limit = high
    for place in range(len(rows) - 1, -1, -1):
        rows[place] = min(rows[place], limit)
        limit = rows[place] - gap
    return rows
