"""Mask-aware aggregation: every coordinate is averaged over the clients that hold it.

Legend: D coordinates of the global vector in the order of one ranking, S support of one update (a prefix of
its own ranking's order), B coordinates of one block.

With c_n the weight of update n and m_nj = 1 where it holds coordinate j (method page, section 5):

    mask_aware      w_j <- sum_n c_n m_nj x_nj / sum_n c_n m_nj      where somebody holds j, else w_j
    global_average  w_j <- w_j + sum_n c_n m_nj (x_nj - w_j) / sum_n c_n
    plain_average   w_j <- sum_n c_n m_nj x_nj / sum_n c_n

in the replacement form; the first two have a delta form, w_j + (the same mean of x_nj - x0_nj). All are
computed as a change of w_j from sum_n c_n m_nj (x_nj - w_j), so that rounding is relative to the change: with
u the unit roundoff of the vector's type, n holders and sums in that type, the new value is within

    u |w'_j| + (n + 3) u sum_n c_n m_nj |x_nj - w_j| / sum_n c_n m_nj

of the exact one (with |x_nj - x0_nj| in the delta form, and 4 u |w_j| more under plain_average, which scales
w_j). Weights are taken to be at least 2^-100 of the largest: what is lighter counts as that. A lone holder's
values among updates of the vector's own ranking pass as they are, and so, in the replacement form, does the
only update of a merge.

Updates that were cut from the vector's own ranking are prefixes of it: their sums run over contiguous
memory, block by block, with one weight for a whole rung. With updates of other rankings, blocks are of the
layout's order instead, in which each rung of each ranking is a slice of that ranking's order: updates of one
ranking are summed among themselves and placed together; those of the vector's own are added to that one by
one. All sums run in the order of `updates`, rankings in that in which they first appear: equal inputs give
equal bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import count, pairwise
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedgmr_plugin.kernels.blocks import block_length, blocks
from fedgmr_plugin.kernels.masks import Ranking

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]
Rule = Literal["mask_aware", "global_average", "plain_average"]
Form = Literal["delta", "replacement"]


#: Weights below this share of the largest are raised to it: products with it stay above float32's smallest
#: numbers.
_LEAST_WEIGHT = 2.0**-100

#: Combinations of rungs in one table; beyond it, a block's own are numbered anew.
_MOST_COMBINATIONS = 2**16


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

    def factors(self, weight_C: Floats) -> tuple[Floats, Floats]:
        """(a, b) of w' = a w + b sum_n c_n m_nj (x_nj - w_j) by what the holders weigh together [C].

        b is 0 just where there are no holders.
        """
        is_held_C = weight_C > 0.0
        by_C = np.where(is_held_C, weight_C, 1.0) if self.rule == "mask_aware" else self.total
        gain_C = np.where(is_held_C, self.step / by_C, 0.0)
        if self.rule == "plain_average":
            return 1.0 - self.step * (1.0 - weight_C / self.total), gain_C
        return np.ones_like(weight_C), gain_C

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

    Raises:
        ValueError: ``plain_average`` in the delta form, which does not exist.
    """
    if rule == "plain_average" and form == "delta":
        raise ValueError("plain_average averages weights: it has no delta form")
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
        keep, gain = (float(f[0]) for f in rule.factors(np.array([weight])))
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
    """Room for the vectors of one block."""

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._size = min(block_length(like), like.numel())
        self._room: dict[str, Tensor] = {}

    def take(self, use: str, length: int, dtype: torch.dtype | None = None) -> Tensor:
        """The vector [length] of one use, with what was left in it."""
        if use not in self._room:
            self._room[use] = self._like.new_empty(self._size, dtype=dtype)
        return self._room[use][:length]

    def wide(self, place_S: Tensor) -> Tensor:
        """Places as int64, as which alone scattering is fast."""
        return self.take("wide", len(place_S), torch.int64).copy_(place_S)

    def look_up(self, use: str, table_C: Floats, index_B: Tensor) -> Tensor:
        """The entries [B] of a table, as the vector has them."""
        entries_C = torch.from_numpy(table_C).to(self._like)
        return torch.index_select(entries_C, 0, index_B, out=self.take(use, len(index_B)))

    def sum_of(self, updates: Sequence[MaskedUpdate], at: slice, base_B: Tensor | None) -> Tensor:
        """sum_n c_n (v_n - base) [B] over the positions `at` of updates that all reach that far."""
        length = at.stop - at.start
        first, *rest = updates
        sum_B = torch.mul(self._change(first, at, base_B), first.weight, out=self.take("sum", length))
        self.add_to(sum_B, rest, at, base_B)
        return sum_B

    def add_to(
        self, sum_B: Tensor, updates: Sequence[MaskedUpdate], at: slice, base_B: Tensor | None
    ) -> None:
        """Add that sum to `sum_B`, update by update."""
        for u in updates:
            sum_B.add_(self._change(u, at, base_B), alpha=u.weight)

    def _change(self, update: MaskedUpdate, at: slice, base_B: Tensor | None) -> Tensor:
        values_B = update.values_S[at]
        return values_B if base_B is None else torch.sub(values_B, base_B, out=self.take("part", len(base_B)))


def _merge_scattered(
    w_D: Tensor,
    ranking: Ranking,
    updates: Sequence[MaskedUpdate],
    rules: tuple[_Rule, _Rule],
    buffers: int,
    new_D: Tensor,
) -> Coverage:
    """`merge` of updates from several rankings, block by block of the layout's order.

    There, a block's coordinates of one rung are a slice of the ranking's order, so all memory is read as
    streams; and who holds a coordinate, hence its factors, depends on its rungs alone.
    """
    parameters = w_D.numel() - buffers
    held = sum(len(u.values_S) - buffers for u in updates)
    if len(updates) == 1 and all(rule.is_mean() and rule.form == "replacement" for rule in rules):
        ranking.ranked(updates[0].ranking.place(updates[0].values_S, ranking.flat(w_D)), out=new_D)
        return Coverage(parameters - held, int(held > 0), held, (float(len(updates[0].values_S) > 0),))

    pieces = list(_pieces(w_D, parameters))
    owners = {ranking.digest: ranking}
    for u in updates:
        owners.setdefault(u.ranking.digest, u.ranking)
    home, *others = (_Group.of(owner, updates, pieces, owner is ranking) for owner in owners.values())
    groups = [home, *others] if any(home.holders) else others
    scratch, tally = _Scratch(w_D), _Tally(len(updates))
    for piece in pieces:
        at, length = piece.at, piece.at.stop - piece.at.start
        rule = rules[at.start >= parameters]
        change_B = _sum_of_others(w_D, home, others, piece, rule.form, scratch)
        code_B, weight_C, holds_CN = _combinations(groups, at, scratch)
        index_B = scratch.take("index of code", length, torch.int32).copy_(code_B)
        keep_C, gain_C = rule.factors(weight_C)
        # What the tally does not know is marked by a minus; after some blocks it is seldom there.
        marked_C = np.where(tally.is_news(weight_C, holds_CN), -gain_C, gain_C)
        gain_B = scratch.look_up("gain", marked_C, index_B)
        if float(gain_B.min()) <= 0.0:
            tally.add(torch.bincount(code_B, minlength=len(weight_C)).cpu().numpy(), weight_C, holds_CN)
            gain_B.abs_()
        keep_B = scratch.look_up("keep", keep_C, index_B) if rule.rule == "plain_average" else None
        for holders, (part, place_S) in zip(home.holders, home.slices(piece), strict=True):
            old_S, size = w_D[part], len(place_S)
            change_S = torch.index_select(change_B, 0, place_S, out=scratch.take("change here", size))
            gain_S = torch.index_select(gain_B, 0, place_S, out=scratch.take("gain here", size))
            scratch.add_to(change_S, holders, part, old_S if rule.form == "replacement" else None)
            kept_S = old_S if keep_B is None else old_S * torch.index_select(keep_B, 0, place_S)
            torch.addcmul(kept_S, gain_S, change_S, out=new_D[part])
    return tally.coverage(updates, held)


class _Tally:
    """Who holds what, added up block by block."""

    def __init__(self, updates: int) -> None:
        self._uncovered, self._least_holders = 0, updates
        self._least_N = np.full(updates, np.inf)  # smallest weight that an update shares a coordinate with

    def is_news(self, weight_C: Floats, holds_CN: Bools) -> Bools:
        """Which combinations of some holders [C] would change the tally, if a block had them."""
        holders_C = holds_CN.sum(axis=1)
        is_lighter_C = (holds_CN & (weight_C[:, None] < self._least_N)).any(axis=1)
        is_news_C: Bools = is_lighter_C | ((holders_C > 0) & (holders_C < self._least_holders))
        return is_news_C

    def add(self, count_C: Ints, weight_C: Floats, holds_CN: Bools) -> None:
        """A block with `count_C` coordinates of each combination."""
        holders_C = holds_CN.sum(axis=1)
        self._uncovered += int(count_C[holders_C == 0].sum())
        held_C = (count_C > 0) & (holders_C > 0)
        self._least_holders = min([self._least_holders, *holders_C[held_C].tolist()])
        least_CN = np.where(holds_CN & held_C[:, None], weight_C[:, None], np.inf)
        self._least_N = np.minimum(self._least_N, least_CN.min(axis=0))

    def coverage(self, updates: Sequence[MaskedUpdate], held: int) -> Coverage:
        """The sum; `held` as in `Coverage`."""
        shares = (u.weight / least for u, least in zip(updates, self._least_N.tolist(), strict=True))
        return Coverage(self._uncovered, self._least_holders if held else 0, held, tuple(shares))


class _Piece(NamedTuple):
    """Coordinates of one block of the layout.

    Attributes:
        number: counted from 0.
        at: which coordinates.
        offset: of the first of them from the start of the block.
    """

    number: int
    at: slice
    offset: int


def _pieces(w_D: Tensor, parameters: int) -> Iterator[_Piece]:
    """The blocks of a vector in the layout's order; one with parameters and buffers is two pieces."""
    number = count()
    for at in blocks(0, w_D.numel(), w_D):
        edges = sorted({at.start, min(max(parameters, at.start), at.stop), at.stop})
        for start, stop in pairwise(edges):
            yield _Piece(next(number), slice(start, stop), start - at.start)


def _sum_of_others(
    w_D: Tensor,
    home: _Group,
    others: Sequence[_Group],
    piece: _Piece,
    form: Form,
    scratch: _Scratch,
) -> Tensor:
    """sum_n c_n m_nj (x_nj - w_j), or of x_nj - x0_nj, over a piece in the layout's order [B].

    Of the updates of other rankings than the vector's own.
    """
    length = piece.at.stop - piece.at.start
    base_B = None
    if form == "replacement":
        base_B = scratch.take("base", length)
        for part, place_S in home.slices(piece):
            base_B.scatter_(0, scratch.wide(place_S), w_D[part])
    change_B = scratch.take("change", length).fill_(-0.0)  # which changes no number that is added to it
    for group in others:
        for holders, (part, place_S) in zip(group.holders, group.slices(piece), strict=False):
            if holders:
                base_S = None
                if base_B is not None:
                    base_S = torch.index_select(base_B, 0, place_S, out=scratch.take("old", len(place_S)))
                change_B.scatter_add_(0, scratch.wide(place_S), scratch.sum_of(holders, part, base_S))
    return change_B


class _Group(NamedTuple):
    """The updates of one ranking of R rungs; here rung R is what none of its sub-models holds.

    Attributes:
        ranking: theirs.
        holders: of each rung, the updates that hold it, in the order of the merge [R + 1].
        weight_R: sum of their weights [R + 1].
        holds_RN: which of the merge's updates they are [R + 1, N].
        crossings: where each rung's slice of the order crosses the edges of the pieces; of the rungs that
            anybody holds only, but for the vector's own ranking.
    """

    ranking: Ranking
    holders: list[list[MaskedUpdate]]
    weight_R: Floats
    holds_RN: Bools
    crossings: list[list[int]]

    @classmethod
    def of(
        cls, ranking: Ranking, updates: Sequence[MaskedUpdate], pieces: Sequence[_Piece], is_home: bool
    ) -> _Group:
        """Those of `updates` that were cut from `ranking`; `is_home` for the vector's own."""
        reach = [u.rung if u.ranking.digest == ranking.digest else -1 for u in updates]
        rungs = range(len(ranking.densities) + 1)
        holds = [[r >= rung for r in reach] for rung in rungs]
        holders = [[u for u, has in zip(updates, row, strict=True) if has] for row in holds]
        weight_R = np.array([sum(u.weight for u in those) for those in holders], dtype=np.float64)
        crossings = ranking.crossings([0, *(piece.at.stop for piece in pieces)])
        crossings = crossings[: len(rungs) if is_home else max(reach) + 1]
        return cls(ranking, holders, weight_R, np.array(holds, dtype=np.bool_), crossings)

    def slices(self, piece: _Piece) -> Iterator[tuple[slice, Tensor]]:
        """For each rung its slice of the ranking's order in a piece, and the places there, from 0 on."""
        place_D = self.ranking.place_D
        for edges in self.crossings:
            part = slice(edges[piece.number], edges[piece.number + 1])
            yield part, place_D[part] - piece.offset if piece.offset else place_D[part]


def _combinations(groups: Sequence[_Group], at: slice, scratch: _Scratch) -> tuple[Tensor, Floats, Bools]:
    """Which combination of rungs each coordinate of a block has, and what the combinations mean.

    Returns:
        code_B: int16 [B], or int32 where there are more combinations: their numbers.
        weight_C: sum of the holders' weights.
        holds_CN: which updates hold it.
    """
    length = at.stop - at.start
    first, *rest = groups
    most = math.prod(len(group.weight_R) for group in groups)
    kind = torch.int16 if most <= min(2**15, _MOST_COMBINATIONS) else torch.int32
    code_B = scratch.take("code", length, kind).copy_(first.ranking.rung_D[at])
    weight_C, holds_CN = first.weight_R, first.holds_RN
    for group in rest:
        rungs = len(group.weight_R)
        if len(weight_C) * rungs > _MOST_COMBINATIONS:
            present, renumbered_B = torch.unique(code_B, return_inverse=True)
            code_B.copy_(renumbered_B)
            kept = present.cpu().numpy()
            weight_C, holds_CN = weight_C[kept], holds_CN[kept]
        torch.add(group.ranking.rung_D[at], code_B, alpha=rungs, out=code_B)
        weight_C = (weight_C[:, None] + group.weight_R).reshape(-1)
        holds_CN = (holds_CN[:, None] | group.holds_RN).reshape(len(weight_C), -1)
    return code_B, weight_C, holds_CN
