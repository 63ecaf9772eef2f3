"""Mask-aware aggregation: every coordinate is averaged over the clients that hold it.

Legend: D coordinates of the global vector in the order of one ranking, S support of one update (a prefix of
its own ranking's order), B coordinates of one block.

With c_n the weight of update n and m_nj = 1 where it holds coordinate j (method page, section 5):

    mask_aware      w_j <- sum_n c_n m_nj x_nj / sum_n c_n m_nj      where somebody holds j, else w_j
    global_average  w_j <- w_j + sum_n c_n m_nj (x_nj - w_j) / sum_n c_n
    plain_average   w_j <- sum_n c_n m_nj x_nj / sum_n c_n

in the replacement form; the delta form has w_j + (the same mean of x_nj - x0_nj). All are computed as a
change of w_j from sum_n c_n m_nj (x_nj - w_j), so that rounding is relative to the change: with u the unit
roundoff of the vector's type, n holders and sums in that type, the new value is within

    u |w'_j| + (n + 3) u sum_n c_n m_nj |x_nj - w_j| / sum_n c_n m_nj

of the exact one (with |x_nj - x0_nj| in the delta form). The only update of a merge, and a lone holder's
values among updates of the vector's own ranking, pass as they are.

Updates that were cut from the vector's own ranking are prefixes of it: their sums run over contiguous
memory, block by block, with one weight for a whole rung. Updates of older rankings are summed among
themselves first, as prefixes of their own order, and then placed once per ranking. Sums run ranking by
ranking (the vector's own first) and within one in the order of `updates`: equal inputs give equal bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fedgmr_plugin.kernels.blocks import BLOCK, blocks
from fedgmr_plugin.kernels.masks import Ranking, Segment

Rule = Literal["mask_aware", "global_average", "plain_average"]
Form = Literal["delta", "replacement"]


#: Weights below this share of the largest are raised to it: nothing where somebody else holds the coordinate,
#: and products with it stay above float32's smallest numbers.
_LEAST_WEIGHT = 2.0**-100


class MaskedUpdate(NamedTuple):
    """One client's update, restricted to its sub-model.

    Attributes:
        ranking, rung: the mask: the rung's prefix of the ranking's order.
        values_S: floats [S] in that order: x_K - x_0 in the delta form, x_K in the replacement form; x_K for
            buffers in both.
        weight: c_n > 0, staleness factor times samples.
    """

    ranking: Ranking
    rung: int
    values_S: Tensor
    weight: float

    @property
    def index_S(self) -> Tensor:
        """int64 [S]: coordinates in the layout's order."""
        return self.ranking.support(self.rung)


class Coverage(NamedTuple):
    """Who holds the parameters.

    Attributes:
        uncovered: parameters that nobody holds.
        least_holders: Gamma, the smallest number of holders of a covered parameter; 0 if there is none.
        held: sum over parameters of their holders.
        shares: for each update, pibar_n = max_j c_n m_nj / sum_k c_k m_kj; 0 if it holds nothing.
    """

    uncovered: int
    least_holders: int
    held: int
    shares: tuple[float, ...]


class Merge(NamedTuple):
    """Result of `merge`.

    Attributes:
        w_D: new global vector, in the dtype and order of the old one.
        coverage: who held what.
    """

    w_D: Tensor
    coverage: Coverage


class _Rule(NamedTuple):
    """How the summed change of a coordinate becomes its new value; see `merge`."""

    rule: Rule
    form: Form
    step: float
    total: float

    def factors(self, weight: float) -> tuple[float, float]:
        """(a, b) of w' = a w + b sum_n c_n m_nj (x_nj - w_j) where the holders weigh `weight` together."""
        if self.rule == "plain_average":
            return 1.0 - self.step * (1.0 - weight / self.total), self.step / self.total
        if weight == 0.0:
            return 1.0, 0.0
        return 1.0, self.step / (weight if self.rule == "mask_aware" else self.total)

    def settle(self, old_B: Tensor, new_B: Tensor, weight_B: Tensor, nobody_B: Tensor) -> None:
        """Turn `new_B` from summed changes into new values, in place.

        Args:
            weight_B: sum of the holders' weights, float64.
            nobody_B: where there is no holder.
        """
        if self.rule == "plain_average":
            keep_B = (1.0 - self.step) + weight_B * (self.step / self.total)
            torch.add(keep_B.to(old_B.dtype) * old_B, new_B, alpha=self.step / self.total, out=new_B)
            return
        if self.rule == "mask_aware":
            new_B.div_(weight_B.to(new_B.dtype))
        torch.add(
            old_B, new_B, alpha=self.step / (1.0 if self.rule == "mask_aware" else self.total), out=new_B
        )
        new_B.copy_(torch.where(nobody_B, old_B, new_B))

    def is_mean(self) -> bool:
        """Whether the new value is the holders' mean, nothing else mixed in."""
        return self.rule == "mask_aware" and self.step == 1.0


def merge(
    w_D: Tensor,
    ranking: Ranking,
    updates: Sequence[MaskedUpdate],
    *,
    rule: Rule = "mask_aware",
    form: Form = "delta",
    buffers: int = 0,
    server_step: float = 1.0,
    participation: float = 1.0,
    out: Tensor | None = None,
) -> Merge:
    """Merge `updates` into the global vector.

    Coordinates that nobody holds keep their value (except under ``plain_average``, which counts zeros
    for them). Buffers are averaged in the replacement form whatever `form` is: differences of running
    variances from different versions could add up to a negative variance.

    Args:
        w_D: global vector in the order of `ranking`; untouched.
        updates: at least one; the order fixes the order of the sums.
        rule: see the module's formulas.
        form: what `MaskedUpdate.values_S` holds.
        buffers: number of trailing coordinates of the layout that are buffers. Every ranking has them in
            rung 0, hence in every update, as the last of it.
        server_step: factor on the merged change of parameters.
        participation: P of the mixing ablation, w <- P merged + (1 - P) w; 1 turns it off.
        out: where to write the new vector [D]; a new tensor by default.
    """
    new_D = torch.empty_like(w_D) if out is None else out
    largest = 2.0 ** math.frexp(max(u.weight for u in updates))[1]  # a power of two: scaling by it is exact
    updates = [u._replace(weight=max(u.weight / largest, _LEAST_WEIGHT)) for u in updates]
    total = sum(u.weight for u in updates)
    of_parameters = _Rule(rule, form, server_step * participation, total)
    of_buffers = _Rule("mask_aware", "replacement", participation, total)
    rules = (of_parameters, of_buffers)
    own = all(u.ranking is ranking or u.ranking.digest == ranking.digest for u in updates)
    work = _merge_prefixes if own else _merge_scattered
    return Merge(new_D, work(w_D, ranking, updates, rules, buffers, new_D))


def _merge_prefixes(
    w_D: Tensor,
    ranking: Ranking,
    updates: Sequence[MaskedUpdate],
    rules: tuple[_Rule, _Rule],
    buffers: int,
    new_D: Tensor,
) -> Coverage:
    """`merge` where every update is a prefix of the vector's own order."""
    uncovered, held, counts = 0, 0, []
    least = [0.0] * len(updates)
    scratch = _Scratch(w_D)
    for segment in ranking.segments(buffers):
        holders = [u for u in updates if u.rung >= segment.rung]
        weight = sum(u.weight for u in holders)
        least = [weight if u.rung >= segment.rung else w for u, w in zip(updates, least, strict=True)]
        if not segment.is_buffer:
            length = segment.stop - segment.start
            held += length * len(holders)
            uncovered += 0 if holders else length
            counts += [len(holders)] if holders else []
        rule = rules[segment.is_buffer]
        keep, gain = rule.factors(weight)
        for at in blocks(segment.start, segment.stop, w_D):
            old_B, new_B = w_D[at], new_D[at]
            if not holders:
                torch.mul(old_B, keep, out=new_B) if keep != 1.0 else new_B.copy_(old_B)
            elif len(holders) == 1 and rule.is_mean():
                own_B = holders[0].values_S[at]
                torch.add(old_B, own_B, out=new_B) if rule.form == "delta" else new_B.copy_(own_B)
            else:
                change_B = scratch.sum_of(holders, at, old_B if rule.form == "replacement" else None)
                torch.add(old_B if keep == 1.0 else old_B * keep, change_B, alpha=gain, out=new_B)
    shares = tuple(u.weight / w if w else 0.0 for u, w in zip(updates, least, strict=True))
    return Coverage(uncovered, min(counts, default=0), held, shares)


class _Scratch:
    """Room for the sums of one block."""

    def __init__(self, like: Tensor) -> None:
        size = min(BLOCK, like.numel()) if like.device.type == "cpu" else like.numel()
        self._sum, self._part = like.new_empty(size), like.new_empty(size)

    def sum_of(self, updates: Sequence[MaskedUpdate], at: slice, base_B: Tensor | None) -> Tensor:
        """sum_n c_n (v_n - base) [B] over the positions `at` of updates that all reach that far."""
        length = at.stop - at.start
        sum_B, part_B = self._sum[:length], self._part[:length]
        for n, u in enumerate(updates):
            value_B = u.values_S[at] if base_B is None else torch.sub(u.values_S[at], base_B, out=part_B)
            torch.mul(value_B, u.weight, out=sum_B) if n == 0 else sum_B.add_(value_B, alpha=u.weight)
        return sum_B


def _merge_scattered(
    w_D: Tensor,
    ranking: Ranking,
    updates: Sequence[MaskedUpdate],
    rules: tuple[_Rule, _Rule],
    buffers: int,
    new_D: Tensor,
) -> Coverage:
    """`merge` of updates from several rankings; `new_D` holds the sums until they are complete."""
    if len(updates) == 1 and rules[0].is_mean() and rules[1].is_mean() and rules[0].form == "replacement":
        place_S = ranking.places(updates[0].index_S)
        new_D.copy_(w_D).index_copy_(0, place_S.to(torch.int64), updates[0].values_S)
        parameters = w_D.numel() - buffers
        held = len(place_S) - buffers
        return Coverage(parameters - held, int(held > 0), held, (float(len(place_S) > 0),))

    weight_D = torch.zeros(w_D.numel(), dtype=torch.float64, device=w_D.device)
    count_D = torch.zeros(w_D.numel(), dtype=torch.int16, device=w_D.device)
    new_D.zero_()
    scratch = _Scratch(w_D)
    groups: dict[str, list[MaskedUpdate]] = {ranking.digest: []}
    for u in updates:
        groups.setdefault(u.ranking.digest, []).append(u)
    for digest, group in groups.items():
        for at, segment, place_B in _reached(group, None if digest == ranking.digest else ranking, buffers):
            holders = [u for u in group if u.rung >= segment.rung]
            weight = weight_D.new_tensor(sum(u.weight for u in holders)).expand(at.stop - at.start)
            count = count_D.new_tensor(len(holders)).expand(at.stop - at.start)
            base_B = None
            if rules[segment.is_buffer].form == "replacement":
                base_B = w_D[at] if place_B is None else torch.index_select(w_D, 0, place_B)
            change_B = scratch.sum_of(holders, at, base_B)
            for whole_D, part_B in ((new_D, change_B), (weight_D, weight), (count_D, count)):
                if place_B is None:
                    whole_D[at] += part_B
                else:
                    whole_D.index_add_(0, place_B, part_B)

    uncovered, least_holders = 0, len(updates)
    for segment in ranking.segments(buffers):
        for at in blocks(segment.start, segment.stop, w_D):
            nobody_B = count_D[at] == 0
            if not segment.is_buffer:
                uncovered += int(nobody_B.sum())
                least_holders = min(least_holders, int(count_D[at].masked_fill(nobody_B, len(updates)).min()))
            rules[segment.is_buffer].settle(w_D[at], new_D[at], weight_D[at], nobody_B)

    held = sum(len(u.values_S) - buffers for u in updates)
    least_weight = {id(u): math.inf for u in updates}
    for digest, group in groups.items():
        for at, segment, place_B in _reached(group, None if digest == ranking.digest else ranking, buffers):
            lowest = float((weight_D[at] if place_B is None else weight_D.index_select(0, place_B)).min())
            for u in group:
                if u.rung >= segment.rung:
                    least_weight[id(u)] = min(lowest, least_weight[id(u)])
    shares = tuple(u.weight / least_weight[id(u)] for u in updates)
    return Coverage(uncovered, least_holders if held else 0, held, shares)


def _reached(
    group: Sequence[MaskedUpdate], home: Ranking | None, buffers: int
) -> Iterator[tuple[slice, Segment, Tensor | None]]:
    """Blocks of the order of a group's ranking that some update of the group reaches.

    With `home`, each comes with the places of its coordinates in that ranking's order (int32 [B]).
    """
    longest = max((u.rung for u in group), default=-1)
    for segment in group[0].ranking.segments(buffers) if group else ():
        if segment.rung > longest:
            return
        for at in blocks(segment.start, segment.stop, group[0].values_S):
            yield at, segment, None if home is None else home.places(group[0].ranking.order_D[at])
