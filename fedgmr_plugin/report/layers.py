"""Coverage layer by layer: a row for each pruned layer, the darker the more updates hold of it, as SVG.

Legend: W windows with a merge, L rows (layers, or bundles of layers), B bins of virtual time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedgmr_plugin.protocol.runlog import RunLog
from fedgmr_plugin.report.scales import nice_ticks, plain
from fedgmr_plugin.report.svg import BOTTOM, TOP, WIDTH, Axis
from fedgmr_plugin.report.text import escape, name, percent, shorten

Array = NDArray[np.float64]

#: Most rows, bins of time, and shades between 0 and 1.
ROWS, TIMES, SHADES = 40, 80, 20
#: Where the rows begin and end; longest name of a layer in characters.
START, END, LONGEST = 156.0, WIDTH - 62.0, 20


class Layers(NamedTuple):
    """Coverage of a run's pruned layers.

    Attributes:
        names: of the rows [L].
        end: virtual seconds at which the windows end [W].
        shares: of the coordinates of a row, times that of merged updates, what is held [W, L].
    """

    names: tuple[str, ...]
    end: Array
    shares: Array


def layers(run: RunLog) -> Layers | None:
    """The coverage of a run's pruned layers; None where its log has nothing of it, or nothing that fits."""
    found = [layer for layer in run.header["layout"].get("layers") or () if isinstance(layer, dict)]
    found = [layer for layer in found if layer.get("kind") != "buffer"]
    sizes = [layer.get("size") for layer in found]
    places = [place for place, layer in enumerate(found) if layer.get("kind") == "prunable"]
    if not places or not run.count("layers") or not all(isinstance(size, int) and size > 0 for size in sizes):
        return None
    size_L = np.array(sizes, dtype=np.float64)
    window, end, coverage = run.columns("window", "window", "end", "coverage").values()
    at = {int(number): place for place, number in enumerate(window)}
    ends, shares = [], []
    each = math.ceil(len(places) / ROWS)
    cuts = np.arange(0, len(places), each)
    for record in run.records("layers"):
        place, held_L = at.get(record["window"]), np.array(record["held"], dtype=np.float64)
        if place is None or len(held_L) != len(size_L) or not coverage[place] > 0:
            continue
        updates = round(held_L.sum() / (coverage[place] * size_L.sum()))
        total = np.add.reduceat(size_L[places], cuts) * max(updates, 1)
        shares.append(np.add.reduceat(held_L[places], cuts) / total)
        ends.append(end[place])
    if not ends:
        return None
    names = [str(found[place].get("name", place)).removesuffix(".weight") for place in places]
    rows = [part[0] if len(part) == 1 else f"{part[0]} …" for part in (names[i : i + each] for i in cuts)]
    return Layers(tuple(rows), np.array(ends), np.clip(np.array(shares), 0.0, 1.0))


def binned(found: Layers, end: float) -> Array:
    """Means over the windows that end in a bin, or the window that covers it; NaN behind the last [B, L]."""
    place = np.minimum((found.end / end * TIMES).astype(np.int64), TIMES - 1)
    values = np.full((TIMES, len(found.names)), np.nan)
    for bin_ in range(TIMES):
        inside = found.shares[place == bin_]
        if len(inside):
            values[bin_] = inside.mean(axis=0)
        elif (later := np.flatnonzero(place > bin_)).size:
            values[bin_] = found.shares[later[0]]
    return values


def figure(found: Layers, time: Axis, *, ident: str, title: str, seed: str = "") -> str:
    """The layers as a ``<figure>`` with its caption and legend.

    Args:
        time: its axis, from 0 to a positive `high`.
        ident: unique in the page.
        seed: what to say of the run's seed.
    """
    values = binned(found, time.high or 1.0)
    caption = (
        "Pruned layers from the first to the last; the darker, the more of the layer’s coordinates a merged "
        f"update holds. Number: at the end.{seed}"
    )
    legend = "".join(
        f'<li><svg class="swatch" viewBox="0 0 28 12" width="28" height="12" aria-hidden="true">'
        f'<path class="l s0" d="M4 6H24" stroke-width="12" opacity="{share:g}"/></svg>'
        f"{percent(share, 0)}</li>"
        for share in (0.05, 0.25, 0.5, 0.75, 1.0)
    )
    svg = _draw(found.names, values, time, ident=ident, title=title, description=caption)
    return (
        f"<figure><figcaption><h3>{name(title)}</h3><p>{escape(caption)}</p></figcaption>"
        f'<ul class="legend"><li>held:</li>{legend}</ul><div class="plot" tabindex="0">{svg}</div></figure>'
    )


def _draw(
    names: Sequence[str], values: Array, time: Axis, *, ident: str, title: str, description: str
) -> str:
    step = min(19.0, max(7.0, 280.0 / len(names)))
    bottom, end = TOP + step * len(names), time.high or 1.0
    last = [column[np.isfinite(column)][-1] for column in values.T]
    said = "; ".join(f"{one}: {percent(share)}" for one, share in zip(names, last, strict=True))
    parts = [
        f'<svg class="chart layers" viewBox="0 0 {WIDTH} {bottom + BOTTOM:.0f}" role="img" '
        f'aria-labelledby="{ident}-t {ident}-d"><title id="{ident}-t">{escape(title)}</title>'
        f'<desc id="{ident}-d">{escape(f"{description} {said}")}</desc>'
    ]
    every = math.ceil(13 / step)
    for place, (one, share) in enumerate(zip(names, last, strict=True)):
        if place % every == 0:
            y = TOP + step * (place + 0.5) + 4
            parts.append(
                f'<text x="{START - 8}" y="{y:.1f}" text-anchor="end">{escape(shorten(one, LONGEST))}'
                f'<title>{escape(one)}</title></text><text x="{WIDTH - 4}" y="{y:.1f}" text-anchor="end">'
                f"{percent(float(share), 0)}</text>"
            )
    parts += _cells(values, step)
    ticks = nice_ticks(0.0, end, 4)
    for at in ticks:
        if at <= end * (1 + 1e-6):
            x = START + (END - START) * at / end
            text = escape(plain(at, ticks[1] - ticks[0]))
            parts.append(f'<line class="tick" x1="{x:.1f}" y1="{bottom}" x2="{x:.1f}" y2="{bottom + 5}"/>')
            parts.append(f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{text}</text>')
    parts.append(f'<line class="base" x1="{START}" y1="{bottom}" x2="{END}" y2="{bottom}"/>')
    label = f'<text class="label" x="{END}" y="{bottom + 36}" text-anchor="end">{escape(time.label)}</text>'
    return "".join([*parts, label]) + "</svg>"


def _cells(values: Array, step: float) -> list[str]:
    """One path for each shade; neighbouring cells of one shade are one stroke."""
    unit = (END - START) / TIMES
    paths: dict[int, list[str]] = {}
    for row, column in enumerate(values.T):
        y = TOP + step * (row + 0.5)
        shade = np.where(np.isfinite(column), np.round(column * SHADES), 0).astype(np.int64)
        starts = np.flatnonzero(np.diff(shade, prepend=-1))
        for start, stop in zip(starts, [*starts[1:], TIMES], strict=True):
            if shade[start]:
                line = f"M{START + unit * start:.1f} {y:.1f}H{START + unit * stop:.1f}"
                paths.setdefault(int(shade[start]), []).append(line)
    return [
        f'<path class="l s0" d="{"".join(path)}" stroke-width="{step * 0.84:.1f}" '
        f'opacity="{shade / SHADES:g}"/>'
        for shade, path in sorted(paths.items())
    ]
