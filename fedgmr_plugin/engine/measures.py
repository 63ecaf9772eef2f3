"""What the run log says of a merge and of a dispatched model.

Legend: D coordinates of the global vector, P of them parameters, R rungs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fedgmr_plugin.kernels.aggregate import MaskedUpdate, holders


class Merged(NamedTuple):
    """What the run log says of one merge; see its `window` and `arrival` records."""

    uncovered: int
    gamma_min: int = 0
    coverage: float = 0.0
    step_sq: float = 0.0
    pibar: tuple[float, ...] = ()


def measure_merge(
    old_D: Tensor, new_D: Tensor, updates: list[MaskedUpdate], parameters: int, weight_D: Tensor | None
) -> Merged:
    """Measure a merge; `weight_D`, where given, makes the largest shares pibar meaningful."""
    count_P = holders(updates, len(old_D))[:parameters]
    covered = count_P > 0
    return Merged(
        uncovered=parameters - int(covered.sum()),
        gamma_min=int(count_P[covered].min()) if bool(covered.any()) else 0,
        coverage=float(count_P.sum(dtype=torch.int64)) / (parameters * len(updates)),
        step_sq=norm_sq(new_D[:parameters] - old_D[:parameters]),
        pibar=() if weight_D is None else tuple(u.weight / float(weight_D[u.index_S].min()) for u in updates),
    )


class Norms(NamedTuple):
    """||v||^2, and ||v - m v||^2 for the mask of each rung [R]."""

    total: float
    masked: tuple[float, ...]


def norms_by_rung(by_rung: Tensor) -> Norms:
    tails = by_rung.flip(0).cumsum(0).flip(0).tolist()  # tails[r]: rungs r and above
    return Norms(tails[0], tuple(tails[1:]))


def norm_sq(v: Tensor) -> float:
    return float(v.to(torch.float64).square().sum())
