"""What the run log says of a merge and of a dispatched model.

Legend: D coordinates of the global vector in the order of a ranking, P of them parameters, R rungs, O
coordinates that are parameters and not prunable.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fedgmr_plugin.kernels.blocks import blocks
from fedgmr_plugin.kernels.masks import Ranking


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
