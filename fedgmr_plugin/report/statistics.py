"""What several seeds say together: means, intervals, paired differences, time and bytes to a target.

Legend: n seeds, E evaluations of one run, G places of a grid. Pure functions of NumPy arrays.

Intervals of means are Student's t over seeds. For normal values they hold at any n >= 2, and the few seeds of
a paper leave nothing better: with n = 3 the percentile bootstrap of a mean is [smallest, largest]
(each of them is drawn three times with probability 1/27 > 2.5 %), which covers the true mean in 3 cases of 4
instead of 19 of 20, and BCa estimates its acceleration from three jackknife values. `bootstrap` is there for
many seeds, and for statistics that have no t interval, such as the interquartile mean.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

Array = NDArray[np.float64]
Verdict = Literal["better", "worse", "not enough seeds to tell"]

#: Pairs below which no verdict is given: with two, one outlier is half of what is known.
FEWEST_PAIRS = 3
#: Resamples up to which a bootstrap enumerates all of them: n^n for n <= 6.
ENUMERATED = 6**6


class Estimate(NamedTuple):
    """A statistic and its interval; NaN where `n` is too small for it.

    Attributes:
        value: of the sample.
        low, high: ends of the interval.
        n: finite values.
    """

    value: float
    low: float
    high: float
    n: int

    @property
    def half(self) -> float:
        """Half the interval's width."""
        return (self.high - self.low) / 2


class Difference(NamedTuple):
    """Ours minus theirs, paired.

    Attributes:
        value: mean of the differences.
        low, high: ends of Student's t interval; NaN for fewer than two pairs.
        p: two-sided p-value of Student's paired t test; NaN for fewer than two pairs.
        n: pairs.
    """

    value: float
    low: float
    high: float
    p: float
    n: int


class Target(NamedTuple):
    """The first evaluation that reaches a target; infinite, and `place` None, where none does."""

    seconds: float
    bytes: float
    place: int | None


class Curves(NamedTuple):
    """Several curves on one grid: `at` [G], increasing; `values` [n, G]."""

    at: Array
    values: Array


class Band(NamedTuple):
    """Mean and interval of n curves at each place of a grid, all [G]; `low` and `high` are NaN for n = 1."""

    at: Array
    mean: Array
    low: Array
    high: Array
    n: int


def mean(values: ArrayLike, level: float = 0.95) -> Estimate:
    """Mean of the finite `values` [n] with Student's t interval, mean ± t_(n-1) s / sqrt(n)."""
    known = _finite(values)
    (centre,), (low,), (high,), count = _student(known[:, None], level)
    return Estimate(float(centre), float(low), float(high), count)


def iqm(values: ArrayLike) -> float:
    """Interquartile mean of the finite `values` [n]: without the floor(n/4) smallest and largest."""
    known = _finite(values)
    return float(trimmed(known)) if len(known) else math.nan


def trimmed(values: Array) -> Array:
    """Interquartile mean over the last axis [..., n], which must be finite; a statistic for `bootstrap`."""
    cut = values.shape[-1] // 4
    ordered = np.sort(values, axis=-1)
    return np.asarray(ordered[..., cut : values.shape[-1] - cut].mean(axis=-1), dtype=np.float64)


def bootstrap(
    values: ArrayLike,
    statistic: Callable[[Array], Array] = lambda sample: np.asarray(sample.mean(axis=-1)),
    level: float = 0.95,
    *,
    resamples: int = 9999,
    seed: int = 0,
) -> Estimate:
    """A statistic of the finite `values` [n] with its percentile bootstrap interval.

    All n^n resamples are enumerated where they are few (n <= 6): the interval then has no chance in it, and
    `resamples` and `seed` do not matter. For n < 20 it is too narrow: see the module's text.

    Args:
        values: at least one finite value.
        statistic: of samples [..., n], over the last axis; the mean by default.
        level: coverage that is wanted, in (0, 1).
        resamples: drawn with replacement, in chunks of bounded size.
        seed: of NumPy's PCG64.
    """
    known = _finite(values)
    n = len(known)
    if n == 0:
        return Estimate(math.nan, math.nan, math.nan, 0)
    value = float(statistic(known))
    if n == 1:
        return Estimate(value, math.nan, math.nan, 1)
    if n**n <= ENUMERATED:
        index = np.array(list(itertools.product(range(n), repeat=n)))
        found = statistic(known[index])
    else:
        generator = np.random.Generator(np.random.PCG64(seed))
        chunk = max(1, 1_000_000 // n)
        sizes = [min(chunk, resamples - start) for start in range(0, resamples, chunk)]
        found = np.concatenate([statistic(known[generator.integers(n, size=(size, n))]) for size in sizes])
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2], method="inverted_cdf")
    return Estimate(value, float(low), float(high), n)


def paired(ours: ArrayLike, theirs: ArrayLike, level: float = 0.95) -> Difference:
    """Mean difference of values [n] that belong together (the same seed), with Student's paired t.

    Pairs of which either is not finite are left out. Where all differences are equal the interval is a
    point, and p is 0 or (no difference at all) 1.
    """
    gains = _finite(np.asarray(ours, dtype=np.float64) - np.asarray(theirs, dtype=np.float64))
    value, low, high, n = mean(gains, level)
    if n < 2:
        return Difference(value, low, high, math.nan, n)
    with np.errstate(over="ignore", invalid="ignore"):
        error = float(gains.std(ddof=1)) / math.sqrt(n)
    if error == 0:
        return Difference(value, low, high, 1.0 if value == 0 else 0.0, n)
    return Difference(value, low, high, float(2 * special.stdtr(n - 1, -abs(value) / error)), n)


def holm(p: ArrayLike) -> Array:
    """Holm's step-down correction of p-values [m], for as many comparisons.

    Rejecting where the result is below alpha rejects even one true hypothesis with probability alpha at most.
    The k-th smallest becomes the largest of (m - j) p_(j) over j <= k (from 0), at most 1. NaN stay NaN and
    do not count.
    """
    given = np.asarray(p, dtype=np.float64)
    corrected = np.full(given.shape, np.nan)
    order = [place for place in np.argsort(given, kind="stable") if math.isfinite(given[place])]
    least = 0.0
    for rank, place in enumerate(order):
        least = max(least, min(1.0, (len(order) - rank) * float(given[place])))
        corrected[place] = least
    return corrected


def verdict(difference: Difference, p: float | None = None, *, level: float = 0.95) -> Verdict:
    """What a difference allows to say of ours.

    ``better`` or ``worse`` where at least `FEWEST_PAIRS` pairs give p < 1 - level, which for one comparison
    is the interval leaving out 0; otherwise ``not enough seeds to tell``, which is no claim of equality.

    Args:
        difference: of values of which larger is better.
        p: corrected for several comparisons (`holm`); that of `difference` where None.
        level: of confidence.
    """
    chance = difference.p if p is None else p
    if difference.n < FEWEST_PAIRS or not chance < 1 - level or difference.value == 0:
        return "not enough seeds to tell"
    return "better" if difference.value > 0 else "worse"


def to_target(accuracy: ArrayLike, target: float, seconds: ArrayLike, sent: ArrayLike) -> Target:
    """Virtual seconds and bytes at a run's first evaluation that reaches `target`.

    Args:
        accuracy: of the evaluations in their order [E]; NaN where not measured.
        target: accuracy to reach, inclusively.
        seconds, sent: virtual time and cumulative bytes of each evaluation [E].
    """
    reached = np.flatnonzero(np.asarray(accuracy, dtype=np.float64) >= target)
    if not len(reached):
        return Target(math.inf, math.inf, None)
    first = int(reached[0])
    return Target(float(np.asarray(seconds)[first]), float(np.asarray(sent)[first]), first)


def median(values: ArrayLike) -> float:
    """Median of `values` [n] in which infinity means "later than all": infinite where half or more are."""
    given = np.asarray(values, dtype=np.float64)
    given = np.sort(given[~np.isnan(given)])
    if not len(given):
        return math.nan
    low, high = given[(len(given) - 1) // 2], given[len(given) // 2]
    return float(high if math.isinf(high) else (low + high) / 2)


def align(curves: Sequence[tuple[ArrayLike, ArrayLike]], *, steps: bool = False, most: int = 300) -> Curves:
    """Curves on the places that any of them has, within the range that all of them have.

    Between its points a curve is interpolated linearly; points that are not finite are left out, and of
    several at one place the last counts. A curve without points makes the grid empty.

    Args:
        curves: places [E_i], not decreasing, and values [E_i] of each curve.
        steps: a value holds until the curve's next point instead.
        most: places that the grid has at most, evenly chosen.
    """
    known = [_points(x, y) for x, y in curves]
    empty = Curves(np.empty(0), np.empty((len(known), 0)))
    if not known or any(len(x) == 0 for x, _ in known):
        return empty
    low, high = max(x[0] for x, _ in known), min(x[-1] for x, _ in known)
    grid = np.unique(np.concatenate([x for x, _ in known]))
    grid = grid[(grid >= low) & (grid <= high)]
    if not len(grid):
        return empty
    if len(grid) > most:
        grid = grid[np.unique(np.linspace(0, len(grid) - 1, most).round().astype(int))]
    if steps:
        return Curves(grid, np.array([y[np.searchsorted(x, grid, side="right") - 1] for x, y in known]))
    return Curves(grid, np.array([np.interp(grid, x, y) for x, y in known]))


def band(curves: Curves, level: float = 0.95) -> Band:
    """Mean of aligned curves and Student's t interval over them, place by place.

    Each place has the level by itself; the band as a whole does not.
    """
    return Band(curves.at, *_student(curves.values, level))


def _student(values: Array, level: float) -> tuple[Array, Array, Array, int]:
    """Mean [G] of values [n, G], the ends of its interval [G] (NaN for n < 2), and n."""
    count, unknown = len(values), np.full(values.shape[1], np.nan)
    if count == 0:
        return unknown, unknown, unknown, 0
    with np.errstate(over="ignore", invalid="ignore"):  # infinity says that the numbers were too large
        centre = values.mean(axis=0)
        if count == 1:
            return centre, unknown, unknown, 1
        factor = float(special.stdtrit(count - 1, (1 + level) / 2)) / math.sqrt(count)
        half = factor * values.std(axis=0, ddof=1)
        return centre, centre - half, centre + half, count


def _finite(values: ArrayLike) -> Array:
    given = np.asarray(values, dtype=np.float64)
    return given[np.isfinite(given)]


def _points(x: ArrayLike, y: ArrayLike) -> tuple[Array, Array]:
    """The finite points of a curve, the last of those at one place."""
    at, value = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    known = np.isfinite(at) & np.isfinite(value)
    at, value = at[known], value[known]
    last = np.append(at[1:] != at[:-1], True)[: len(at)]
    return at[last], value[last]
