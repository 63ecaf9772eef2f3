"""Ticks of axes, their texts, and curves made shorter."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from fedgmr_plugin.report.text import number

Array = NDArray[np.float64]

#: Below this a number counts as zero on an axis.
TINY = 1e-100
#: Points of a line that shows means over many windows.
BINS = 40


def same(low: float, high: float) -> bool:
    """Whether two limits are too close for an axis between them."""
    return not high - low > max(1e-9 * max(abs(low), abs(high)), TINY)


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` multiples of 1, 2, 2.5 or 5 times a power of ten that cover [low, high].

    The first is at most `low`, the last at least `high`.
    """
    if same(low, high):
        pad = abs(low) / 2 if abs(low) > TINY else 0.5
        low, high = low - pad, high + pad
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def plain(value: float, step: float) -> str:
    """A tick's value with the decimals that its step needs."""
    decimals = 0
    while decimals < 6 and abs(step * 10**decimals - round(step * 10**decimals)) > 1e-6:
        decimals += 1
    return number(value, decimals)


def as_percent(value: float, step: float) -> str:
    """A tick that is a share of 1, in per cent."""
    return plain(100 * value, 100 * step)


def thin(x: Array, y: Array, limit: int = 600) -> tuple[Array, Array]:
    """At most about `limit` points of a curve: the smallest and the largest of each run of points."""
    if len(x) <= limit:
        return x, y
    keep = {0, len(x) - 1}
    for part in np.array_split(np.arange(len(x)), limit // 2):
        finite = part[np.isfinite(y[part])]
        if len(finite):
            keep |= {int(finite[y[finite].argmin()]), int(finite[y[finite].argmax()])}
    index = np.array(sorted(keep))
    return x[index], y[index]


def bin_means(x: Array, y: Array, bins: int = BINS) -> tuple[Array, Array]:
    """Means of x and of y (without NaN) over runs of equally many points; unchanged if few."""
    if len(x) <= bins:
        return x, y
    parts = np.array_split(np.arange(len(x)), bins)
    means = [y[part][np.isfinite(y[part])] for part in parts]
    return (
        np.array([x[part].mean() for part in parts]),
        np.array([part.mean() if len(part) else math.nan for part in means]),
    )
