"""Defences against updates that mean harm: a bound on their size, and trimming coordinate by coordinate.

Legend: D coordinates of the global vector in the layout's order, S support of one update, B coordinates of
one block, n updates of a merge, c holders of a coordinate among them.

Both change updates before they are merged, so that every rule of `fedgmr_plugin.kernels.aggregate` follows.
Trimming at fraction f drops the k = floor(f c) smallest and the k largest values of a coordinate, among those
who hold it. Their places take the weighted mean of the rest, which makes the merge the trimmed mean. Where
fewer than 1/f hold a coordinate, k = 0: nobody can be outvoted there, and that share is told.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fedgmr_plugin.kernels.aggregate import MaskedUpdate
from fedgmr_plugin.kernels.blocks import BLOCK


class Trimmed(NamedTuple):
    """Result of `trimmed`.

    Attributes:
        updates: as given, with other values.
        undefended: share of the held parameters of which nothing could be trimmed.
    """

    updates: list[MaskedUpdate]
    undefended: float


def bounded(
    updates: Sequence[MaskedUpdate],
    w_D: Tensor,
    bound: float,
    form: Literal["delta", "replacement"],
    buffers: int,
) -> tuple[list[MaskedUpdate], int]:
    """Scale down updates whose change per weight is beyond `bound` times the median of all.

    The change per weight is the root mean square of the change of an update's parameters, so that sub-models
    of all sizes compare.

    Args:
        w_D: global vector in the layout's order.
        buffers: number of trailing coordinates that are buffers.

    Returns:
        The updates, and how many were scaled down.
    """
    sizes = [_rms(_change(u, w_D, form, buffers), u, len(w_D) - buffers) for u in updates]
    most = bound * statistics.median(sizes)
    within = [size <= most or size == 0.0 for size in sizes]
    result = [
        update if is_within else scaled(update, most / size, w_D, form, buffers)
        for update, size, is_within in zip(updates, sizes, within, strict=True)
    ]
    return result, within.count(False)


def scaled(
    update: MaskedUpdate, factor: float, w_D: Tensor, form: Literal["delta", "replacement"], buffers: int
) -> MaskedUpdate:
    """The update whose change of the global vector is `factor` times that of `update`.

    In the delta form buffers, which are not changes, stay.

    Args:
        w_D: global vector in the layout's order.
        buffers: number of trailing coordinates that are buffers.
    """
    if factor == 1.0:
        return update
    values_S = _change(update, w_D, form, buffers) * factor
    if form == "replacement":
        values_S += w_D[update.index_S]
    elif buffers:
        values_S = torch.where(update.index_S < len(w_D) - buffers, values_S, update.values_S)
    return update._replace(values_S=values_S)


def _change(update: MaskedUpdate, w_D: Tensor, form: str, buffers: int) -> Tensor:
    """How far an update would move the global vector [S]; of buffers in the delta form, 0."""
    if form == "replacement":
        return update.values_S - w_D[update.index_S]
    if not buffers:
        return update.values_S
    return update.values_S * (update.index_S < len(w_D) - buffers)


def _rms(change_S: Tensor, update: MaskedUpdate, parameters: int) -> float:
    inside = change_S[update.index_S < parameters].to(torch.float64)
    return math.sqrt(float(inside.square().mean())) if len(inside) else 0.0


def trimmed(updates: Sequence[MaskedUpdate], fraction: float, size: int, parameters: int) -> Trimmed:
    """Replace the extreme values of every coordinate by the weighted mean of the others.

    Takes memory for two more values and an index of each value of `updates`.

    Args:
        fraction: f in [0, 1/2).
        size: coordinates of the model, D.
        parameters: of them, the first so many are no buffers.
    """
    orders = [update.index_S.argsort() for update in updates]
    index = [update.index_S[order] for update, order in zip(updates, orders, strict=True)]
    values = [update.values_S[order] for update, order in zip(updates, orders, strict=True)]
    weight_n = torch.tensor([update.weight for update in updates], dtype=torch.float64)
    held = undefended = 0
    for start in range(0, size, BLOCK):
        stop = min(start + BLOCK, size)
        places = [_between(i, start, stop) for i in index]
        dense_nB = torch.full((len(updates), stop - start), math.inf, dtype=torch.float64)
        for row, (i, v, at) in enumerate(zip(index, values, places, strict=True)):
            dense_nB[row, i[at] - start] = v[at].to(torch.float64)
        holders_B = dense_nB.isfinite().sum(0)
        k_B = (fraction * holders_B.to(torch.float64)).floor().to(torch.int64)
        inside = slice(0, max(0, min(parameters, stop) - start))
        held += int((holders_B[inside] > 0).sum())
        undefended += int(((holders_B[inside] > 0) & (k_B[inside] == 0)).sum())
        if not bool(k_B.any()):
            continue
        rank_nB = dense_nB.argsort(dim=0, stable=True).argsort(dim=0)
        is_held_nB = dense_nB.isfinite()
        keep_nB = is_held_nB & (rank_nB >= k_B) & (rank_nB < holders_B - k_B)
        kept_nB = weight_n[:, None] * keep_nB
        mean_B = (kept_nB * dense_nB.where(keep_nB, torch.zeros(()).double())).sum(0) / kept_nB.sum(0)
        for row, (i, v, at) in enumerate(zip(index, values, places, strict=True)):
            here = i[at] - start
            dropped = ~keep_nB[row, here]
            v[at] = torch.where(dropped, mean_B[here].to(v.dtype), v[at])
    result = []
    for update, order, changed in zip(updates, orders, values, strict=True):
        values_S = torch.empty_like(update.values_S)
        values_S[order] = changed
        result.append(update._replace(values_S=values_S))
    return Trimmed(result, undefended / held if held else 0.0)


def _between(index_S: Tensor, start: int, stop: int) -> slice:
    """Where an increasing index lies in [start, stop)."""
    first, last = torch.searchsorted(index_S, torch.tensor([start, stop])).tolist()
    return slice(first, last)
