"""Mask-aware aggregation: every coordinate is averaged over the clients that hold it.

Legend: D coordinates of the global vector (P parameters, then buffers), S support of one update.

With c_n the weight of update n and m_nj = 1 where it holds coordinate j (method page, section 5):

    mask_aware      w_j <- sum_n c_n m_nj x_nj / sum_n c_n m_nj      where somebody holds j, else w_j
    global_average  w_j <- w_j + sum_n c_n m_nj (x_nj - w_j) / sum_n c_n
    plain_average   w_j <- sum_n c_n m_nj x_nj / sum_n c_n

in the replacement form; the delta form has w_j + (the same mean of x_nj - x0_nj). Sums run in float64 in
the order of `updates`, so equal inputs give equal bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Rule = Literal["mask_aware", "global_average", "plain_average"]
Form = Literal["delta", "replacement"]


class MaskedUpdate(NamedTuple):
    """One client's update, restricted to its sub-model.

    Attributes:
        index_S: int64 [S], distinct coordinates of the sub-model.
        values_S: floats [S]: x_K - x_0 in the delta form, x_K in the replacement form; x_K for buffers in
            both.
        weight: c_n > 0, staleness factor times samples.
    """

    index_S: Tensor
    values_S: Tensor
    weight: float


class Merge(NamedTuple):
    """Result of `merge`.

    Attributes:
        w_D: new global vector, in the dtype of the old one.
        weight_D: float64 [D], sum of the c_n that hold each coordinate.
    """

    w_D: Tensor
    weight_D: Tensor


def merge(
    w_D: Tensor,
    updates: Sequence[MaskedUpdate],
    *,
    rule: Rule = "mask_aware",
    form: Form = "delta",
    parameters: int | None = None,
    server_step: float = 1.0,
    participation: float = 1.0,
) -> Merge:
    """Merge `updates` into the global vector.

    Coordinates that nobody holds keep their value (except under ``plain_average``, which counts zeros
    for them). Buffers are averaged in the replacement form whatever `form` is: differences of running
    variances from different versions could add up to a negative variance.

    Args:
        w_D: global vector.
        updates: at least one; the order fixes the order of the sums.
        rule: see the module's formulas.
        form: what `MaskedUpdate.values_S` holds.
        parameters: number of leading coordinates that are parameters; all of them by default.
        server_step: factor on the merged change of parameters.
        participation: P of the mixing ablation, w <- P merged + (1 - P) w; 1 turns it off.
    """
    size = w_D.numel()
    parameters = size if parameters is None else parameters
    sum_D = torch.zeros(size, dtype=torch.float64, device=w_D.device)
    weight_D = torch.zeros(size, dtype=torch.float64, device=w_D.device)
    unit = updates[0].weight if len(updates) == 1 else 1.0  # a lone client's values pass without rounding
    for update in updates:
        c = update.weight / unit
        sum_D.index_add_(0, update.index_S, update.values_S.to(torch.float64), alpha=c)
        weight_D.index_add_(0, update.index_S, torch.ones_like(update.index_S, dtype=torch.float64), alpha=c)
    held_D = weight_D > 0
    total = sum(update.weight for update in updates) / unit

    old_D = w_D.to(torch.float64)
    merged_D = torch.where(held_D, sum_D / weight_D, old_D)  # mean over the holders
    head = slice(0, parameters)
    if rule == "mask_aware":
        if form == "delta":
            merged_D[head] += old_D[head]
    elif rule == "global_average":
        change = sum_D[head] if form == "delta" else sum_D[head] - weight_D[head] * old_D[head]
        merged_D[head] = old_D[head] + change / total
    else:
        merged_D[head] = sum_D[head] / total
    if server_step != 1.0:
        merged_D[head] = old_D[head] + server_step * (merged_D[head] - old_D[head])
    if participation != 1.0:
        merged_D = participation * merged_D + (1.0 - participation) * old_D
    if rule != "plain_average":
        merged_D = torch.where(held_D, merged_D, old_D)
    return Merge(merged_D.to(w_D.dtype), weight_D * unit)


def holders(updates: Sequence[MaskedUpdate], size: int) -> Tensor:
    """int32 [D]: number of updates that hold each of `size` coordinates."""
    count_D = torch.zeros(size, dtype=torch.int32)
    if updates:
        count_D = count_D.to(updates[0].index_S.device)
    for update in updates:
        count_D.index_add_(0, update.index_S, torch.ones_like(update.index_S, dtype=torch.int32))
    return count_D
