"""Line charts as SVG text, with nothing but the standard library and numpy."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

#: Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
#: Values beyond this are drawn at it.
_LARGEST = 1e300
_POINTS = 600
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 720, 260, 64, 16, 34, 40


class Line(NamedTuple):
    """One line: label, x and y ``[n]`` (nan breaks it), dashed or not."""

    label: str
    x: Floats
    y: Floats
    dashed: bool = False


def chart(title: str, lines: Sequence[Line], *, x_label: str, y_label: str, log_y: bool = False) -> str:
    """An ``<svg>`` element; '' when no line has a point.

    Args:
        log_y: logarithmic y axis; values at or below 0 are left out.
    """
    cleaned = [_finite(line, log_y) for line in lines]
    shown = [line for line in cleaned if np.isfinite(line.y).any()]
    if not shown:
        return ""
    x_low, x_high = _range([line.x[np.isfinite(line.y)] for line in shown])
    y_low, y_high = _range([line.y[np.isfinite(line.y)] for line in shown])
    if not log_y:
        y_low = min(y_low, 0.0)
    inner_w, inner_h = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM

    def px(x: Floats) -> Floats:
        return _LEFT + (x - x_low) / (x_high - x_low) * inner_w

    def py(y: Floats) -> Floats:
        return _TOP + (1 - (y - y_low) / (y_high - y_low)) * inner_h

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'font-family="sans-serif" font-size="11"><title>{escape(title)}</title>',
        f'<text x="{_LEFT}" y="14" font-size="13" font-weight="bold">{escape(title)}</text>',
        f'<rect x="{_LEFT}" y="{_TOP}" width="{inner_w}" height="{inner_h}" fill="none" stroke="#999"/>',
    ]
    for tick in _ticks(x_low, x_high):
        at = float(px(np.array(tick)))
        parts.append(f'<text x="{at:.1f}" y="{_HEIGHT - _BOTTOM + 15}" text-anchor="middle">{tick:g}</text>')
    for tick in _ticks(y_low, y_high):
        at = float(py(np.array(tick)))
        text = f"1e{tick:g}" if log_y else f"{tick:g}"
        parts.append(f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{text}</text>')
    for i, line in enumerate(shown):
        colour = COLOURS[i % len(COLOURS)]
        dash = ' stroke-dasharray="5 3"' if line.dashed else ""
        for x, y in _pieces(line):
            points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(px(x), py(y), strict=True))
            parts.append(
                f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.5"{dash}/>'
            )
        legend = _LEFT + i * (inner_w / len(shown))
        parts.append(
            f'<line x1="{legend:.0f}" x2="{legend + 18:.0f}" y1="25" y2="25" stroke="{colour}"{dash}/>'
        )
        parts.append(f'<text x="{legend + 22:.0f}" y="29">{escape(line.label)}</text>')
    middle = _LEFT + inner_w / 2
    parts.append(f'<text x="{middle}" y="{_HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>')
    turned = f'transform="rotate(-90 12 {_TOP + inner_h / 2})"'
    parts.append(
        f'<text x="12" y="{_TOP + inner_h / 2}" text-anchor="middle" {turned}>{escape(y_label)}</text>'
    )
    return "".join(parts) + "</svg>"


def _finite(line: Line, log_y: bool) -> Line:
    y = np.asarray(line.y, dtype=np.float64)
    if log_y:
        with np.errstate(divide="ignore", invalid="ignore"):
            y = np.where(y > 0, np.log10(y), np.nan)
    x = np.asarray(line.x, dtype=np.float64)
    return line._replace(x=np.clip(x, -_LARGEST, _LARGEST), y=np.clip(y, -_LARGEST, _LARGEST))


def _range(values: Sequence[Floats]) -> tuple[float, float]:
    flat = np.concatenate(values)
    low, high = float(flat.min()), float(flat.max())
    pad = max(0.5, 1e-6 * abs(low))
    return (low, high) if high - low > 1e-12 * abs(high) else (low - pad, high + pad)


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers between the ends."""
    raw = (high - low) / 5
    power = 10.0 ** np.floor(np.log10(raw))
    step = power * min((1, 2, 5, 10), key=lambda m: abs(m * power - raw))
    first = np.ceil(low / step - 1e-9)
    return [round(float(k * step), 12) for k in np.arange(first, np.floor(high / step + 1e-9) + 1)]


def _pieces(line: Line) -> list[tuple[Floats, Floats]]:
    """Stretches without nan, thinned to at most `_POINTS` points that keep each bin's extremes."""
    keep = np.isfinite(line.y)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], keep.astype(np.int8), [0]])))
    pieces = []
    for begin, end in zip(edges[::2], edges[1::2], strict=True):
        x, y = line.x[begin:end], line.y[begin:end]
        if len(x) > _POINTS:
            bins = np.array_split(np.arange(len(x)), _POINTS // 2)
            index = np.unique([i for b in bins for i in (b[np.argmin(y[b])], b[np.argmax(y[b])])])
            x, y = x[index], y[index]
        pieces.append((x, y))
    return pieces
