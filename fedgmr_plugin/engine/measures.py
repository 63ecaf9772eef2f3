"""What the run log says of a merge and of a dispatched model.

Legend: D coordinates of the global vector in the order of a ranking, P of them parameters, R rungs, O
coordinates that are parameters and not prunable, L layers that are no buffers.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from fedgmr_plugin.kernels.aggregate import MaskedUpdate
from fedgmr_plugin.kernels.blocks import blocks
from fedgmr_plugin.kernels.layout import ModelLayout
from fedgmr_plugin.kernels.masks import Ranking

#: Rankings whose counts are remembered.
_MOST = 64


class Norms(NamedTuple):
    """||v||^2, and ||v - m v||^2 for the mask of each rung [R]."""

    total: float
    masked: tuple[float, ...]


def norms(ranked_D: Tensor, ranking: Ranking, others_O: Tensor, buffers: int) -> tuple[Norms, Norms]:
    """Squared norms over prunable coordinates, and over all parameters.

    Args:
        others_O: int64, increasing: where parameters that are not prunable stand in the ranking's order.
        buffers: number of buffers; see `Ranking.segments`.
    """
    rungs = len(ranking.densities) + 1
    prunable, others = [0.0] * rungs, [0.0] * rungs
    for segment in ranking.segments(buffers):
        if segment.is_buffer:
            continue
        for at in blocks(segment.start, segment.stop, ranked_D):
            values_B = ranked_D[at].to(torch.float64, copy=True)
            first, last = torch.searchsorted(
                others_O, torch.tensor([at.start, at.stop], device=others_O.device)
            )
            if last > first:
                here = others_O[first:last] - at.start
                others[segment.rung] += float(values_B[here].square().sum())
                values_B[here] = 0.0
            prunable[segment.rung] += float(torch.dot(values_B, values_B))
    return _tails(prunable), _tails([a + b for a, b in zip(prunable, others, strict=True)])


def _tails(by_rung: list[float]) -> Norms:
    tails = [0.0]
    for square in reversed(by_rung):
        tails.append(tails[-1] + square)
    total, *masked, _ = reversed(tails)
    return Norms(total, tuple(masked))


def step_sq(old_D: Tensor, new_D: Tensor, ranking: Ranking, buffers: int) -> float:
    """||new - old||^2 over parameters; not finite where a value of `new_D` is not, buffers included."""
    total = 0.0
    for segment in ranking.segments(buffers):
        for at in blocks(segment.start, segment.stop, new_D):
            step_B = (new_D[at] - old_D[at]).to(torch.float64)
            square = float(torch.dot(step_B, step_B))
            total += square if not segment.is_buffer else 0.0 * square
    return total


class LayerCounts:
    """How much of each layer the sub-models of updates hold."""

    def __init__(self, layout: ModelLayout) -> None:
        starts = [entry.slice.start for entry in layout.entries if entry.kind != "buffer"]
        self._edges = [*starts, layout.parameters]
        self._known: OrderedDict[str, list[list[int]]] = OrderedDict()

    def held(self, updates: Sequence[MaskedUpdate]) -> list[int]:
        """Coordinates of each layer, once for each update that holds them [L]."""
        counts = [self._counts(update.ranking)[update.rung] for update in updates]
        return [sum(of_layer) for of_layer in zip(*counts, strict=True)]

    def _counts(self, ranking: Ranking) -> list[list[int]]:
        """Coordinates of each layer in the sub-model of each rung [R][L]."""
        if ranking.digest not in self._known:
            crossed = ranking.crossings(self._edges)[:-1]
            of_rung = [[stop - start for start, stop in pairwise(places)] for places in crossed]
            sums = accumulate(of_rung, lambda below, own: [a + b for a, b in zip(below, own, strict=True)])
            self._known[ranking.digest] = list(sums)
        self._known.move_to_end(ranking.digest)
        if len(self._known) > _MOST:
            self._known.popitem(last=False)
        return self._known[ranking.digest]
