"""Mask-aware aggregation of ten clients' updates of an 11-million-weight model.

    python -m benchmarks.bench aggregate

The floor counts every value and mask bit read once, and the global vector read and written once. One
ranking: all updates are cut from the vector's own. Several: six of ten are stale, from two older rankings
made of weights that have moved since.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from benchmarks.measure import Row, against_floor, seconds
from fedgmr_plugin.kernels.aggregate import MaskedUpdate, merge
from fedgmr_plugin.kernels.masks import Ranking

SIZE = 11_172_170
#: 29.8 million values together.
DENSITIES = (1.0, 0.5, 0.5, 0.2, 0.2, 0.1, 0.05, 0.05, 0.05, 0.02)
LADDER = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


def world() -> tuple[Tensor, list[Ranking]]:
    """A vector [D], and rankings by the magnitude of it and of two earlier ones."""
    generator = torch.Generator().manual_seed(0)
    w_D = torch.randn(SIZE, generator=generator)
    counts = torch.tensor([int(d * SIZE) for d in LADDER])
    rankings = []
    for age in range(3):
        moved_D = w_D + 0.1 * age * torch.randn(SIZE, generator=generator)
        place_D = torch.empty(SIZE, dtype=torch.int64)
        place_D[torch.argsort(moved_D.abs(), descending=True)] = torch.arange(SIZE)
        rankings.append(Ranking(LADDER, torch.searchsorted(counts, place_D, right=True).to(torch.int16)))
    return w_D, rankings


def updates_of(rankings: list[Ranking]) -> list[MaskedUpdate]:
    """One update per density; `rankings` [N]."""
    generator = torch.Generator().manual_seed(1)
    result = []
    for n, (density, ranking) in enumerate(zip(DENSITIES, rankings, strict=True)):
        rung = ranking.rung(density)
        values_S = 0.01 * torch.randn(ranking.ends[rung], generator=generator)
        result.append(MaskedUpdate(ranking, rung, values_S, 100.0 + n))
    return result


def tensor_loop(w_D: Tensor, masks: list[Tensor], values: list[Tensor], weights: list[float]) -> Tensor:
    """The per-tensor reference: sum(mask * w) / sum(mask), on dense masks and values [N, D] of one model."""
    result = []
    for at in torch.arange(SIZE).split(2**20):  # tensors of a million weights
        here = slice(int(at[0]), int(at[-1]) + 1)
        top = torch.zeros(len(at))
        bottom = torch.zeros(len(at))
        for mask_D, value_D, weight in zip(masks, values, weights, strict=True):
            mask = mask_D[here].float()
            top += weight * (mask * value_D[here])
            bottom += weight * mask
        result.append(torch.where(bottom > 0, w_D[here] + top / bottom, w_D[here]))
    return torch.cat(result)


def measure() -> list[Row]:
    """The rows of this benchmark."""
    torch.set_num_threads(1)
    w_D, rankings = world()
    home = rankings[0]
    rows = []
    for name, owners, goal in (
        ("aggregation, one ranking", [home] * 10, "<= 1.5"),
        (
            "aggregation, several rankings",
            [home, rankings[1], rankings[2], home, *rankings[1:], home, *rankings[1:], home],
            "<= 8",
        ),
    ):
        updates = updates_of(owners)
        ranked_D, new_D = home.ranked(w_D), torch.empty(SIZE)
        values = sum(len(u.values_S) for u in updates)
        moved = 4 * values + len(updates) * SIZE / 8 + 8 * SIZE

        ratio, taken, bandwidth = against_floor(partial(merge, ranked_D, home, updates, out=new_D), moved)
        detail = f"{1e3 * taken:.1f} ms, floor {1e3 * moved / bandwidth:.1f} ms at {bandwidth / 1e9:.1f} GB/s"
        rows.append(Row(name, "floor", ratio, goal, detail))

        masks = [u.ranking.mask(u.rung) for u in updates]
        dense = [torch.zeros(SIZE).index_put_((u.index_S,), u.values_S) for u in updates]
        weights = [u.weight for u in updates]
        reference = tensor_loop(w_D, masks, dense, weights)
        assert torch.allclose(home.flat(new_D), reference, atol=1e-6)
        loop = seconds(partial(tensor_loop, w_D, masks, dense, weights))
        rows.append(Row(name, "per-tensor loop", loop / taken, ">= 10", f"{1e3 * loop:.0f} ms"))
    return rows
