"""Nested masks from one ranking, as the method page defines them (magnitude score)."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from theory.laboratory.problems import Bools, Floats, Problem

Ints = NDArray[np.int64]


def ranking(w: Floats, prunable: Bools, *, floor: float = 0.0, layers: tuple[int, ...] = ()) -> Ints:
    """Prunable coordinates, most important first, ``[D_p]``.

    Args:
        w: model ``[D]``.
        prunable: ``[D]``.
        floor: share of every layer (largest magnitudes, rounded down) that is ranked before the rest.
        layers: sizes of the prunable layers, in coordinate order; one layer when empty.
    """
    index = np.flatnonzero(prunable)
    magnitude = np.abs(w[index])
    first = np.zeros(len(index), dtype=bool)
    begin = 0
    for size in layers or (len(index),):
        inside = np.argsort(-magnitude[begin : begin + size], kind="stable")[: int(floor * size)]
        first[begin + inside] = True
        begin += size
    return np.asarray(index[np.lexsort((-magnitude, ~first))], dtype=np.int64)


def mask(problem: Problem, order: Ints, density: float) -> Bools:
    """The sub-model of `density`: the first ``int(density * D_p)`` of `order`, and what is never pruned.

    A bias listed in ``problem.rows`` is dropped when its whole row is.
    """
    keep = ~problem.prunable
    keep[order[: int(density * len(order))]] = True
    for bias, row in problem.rows:
        keep[bias] = keep[list(row)].any()
    return np.asarray(keep)


def digest(order: Ints) -> str:
    """A short name of a ranking."""
    return hashlib.sha256(np.ascontiguousarray(order, dtype="<i8").tobytes()).hexdigest()[:16]
