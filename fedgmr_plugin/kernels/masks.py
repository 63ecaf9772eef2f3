"""Nested masks for all densities at once.

Legend: D coordinates, P prunable coordinates (in layout order), R rungs (requested densities, ascending).

A `Ranking` gives every coordinate the first rung whose sub-model holds it. Sub-models of one ranking are
nested by construction, each is a *prefix* of one coordinate order, and what a larger one adds is a slice.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedgmr_plugin.errors import ModelError
from fedgmr_plugin.kernels.blocks import block_length, blocks
from fedgmr_plugin.kernels.layout import ModelLayout

Score = Literal["magnitude", "weight_change", "per_cost", "random"]
_HISTOGRAM_BITS = 16


class Segment(NamedTuple):
    """Coordinates `start` to `stop` of a ranking's order, all of one rung and one kind."""

    start: int
    stop: int
    rung: int
    is_buffer: bool


@dataclass(frozen=True, eq=False)
class Ranking:
    """A nested family of masks.

    Attributes:
        densities: requested densities, strictly ascending [R].
        rung_D: int16 [D], smallest rung whose mask holds the coordinate; R where none does. Coordinates
            that are never pruned have rung 0.
    """

    densities: tuple[float, ...]
    rung_D: Tensor

    @property
    def order_D(self) -> Tensor:
        """int64 [D]: coordinates by rung, increasing within one rung (a new tensor)."""
        return self._coordinates(self.rung_D.numel())

    @property
    def place_D(self) -> Tensor:
        """int32 [D]: `order_D`, each coordinate counted from the start of its block of the layout.

        Those of one rung in one block are a slice of it (`crossings`). Blocks are those of `blocks`; int64
        where one has 2^31 coordinates or more.
        """
        return self._blockwise[0]

    @cached_property
    def _blockwise(self) -> tuple[Tensor, list[list[int]]]:
        """`place_D`, and where each rung's slice of it crosses the blocks' edges [R + 1][blocks + 1]."""
        size = self.rung_D.numel()
        kind = torch.int32 if block_length(self.rung_D) < 2**31 else torch.int64
        place_D = torch.empty(size, dtype=kind, device=self.rung_D.device)
        crossings = [[start] for start in (0, *self.ends)]
        for at in blocks(0, size, self.rung_D):
            rung_B, index_B = torch.sort(self.rung_D[at], stable=True)
            counts = torch.bincount(rung_B, minlength=len(crossings)).tolist()
            for crossed, part in zip(crossings, index_B.split(counts), strict=True):
                crossed.append(crossed[-1] + len(part))
                place_D[crossed[-2] : crossed[-1]] = part
        return place_D, crossings

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """Length of the prefix of `order_D` that each rung's sub-model takes [R]."""
        rungs = len(self.densities)
        count_R = torch.zeros(rungs + 1, dtype=torch.int64, device=self.rung_D.device)
        for at in blocks(0, self.rung_D.numel(), self.rung_D):
            count_R += torch.bincount(self.rung_D[at], minlength=rungs + 1)
        return tuple(count_R.cumsum(0)[:rungs].tolist())

    @cached_property
    def digest(self) -> str:
        """SHA-256 (first 16 hex digits) of densities and rungs: equal digests, equal masks."""
        payload = self.rung_D.cpu().contiguous().numpy().astype("<i2").tobytes()
        head = ",".join(repr(d) for d in self.densities).encode()
        return hashlib.sha256(head + b"|" + payload).hexdigest()[:16]

    def to(self, device: torch.device) -> Ranking:
        """The same family on another device; itself where it is there already."""
        if self.rung_D.device == device:
            return self
        return Ranking(self.densities, self.rung_D.to(device))

    def rung(self, density: float) -> int:
        """Index of `density` among the requested ones.

        Raises:
            ValueError: if it was not requested.
        """
        return self.densities.index(density)

    def segments(self, buffers: int = 0) -> Iterator[Segment]:
        """The order's non-empty segments; rung R is what no sub-model holds.

        Args:
            buffers: number of trailing coordinates of the layout that are buffers: the last ones of rung 0.
        """
        size = self.rung_D.numel()
        bounds = (0, self.ends[0] - buffers, *self.ends, size)
        for i, (start, stop) in enumerate(itertools.pairwise(bounds)):
            if stop > start:
                yield Segment(start, stop, max(i - 1, 0), i == 1)

    def ranked(self, flat_D: Tensor, out: Tensor | None = None) -> Tensor:
        """A vector [D] in the layout's order, in the order of the ranking (a new tensor, or `out`)."""
        return self._gather(flat_D, torch.empty_like(flat_D) if out is None else out)

    def flat(self, ranked_D: Tensor) -> Tensor:
        """A vector [D] in the order of the ranking, in the layout's order (a new tensor)."""
        return self.place(ranked_D, torch.empty_like(ranked_D))

    def cut(self, flat_D: Tensor, rung: int) -> Tensor:
        """Payload [S] of the rung's sub-model of a vector [D] in the layout's order (a new tensor)."""
        return self._gather(flat_D, flat_D.new_empty(self.ends[rung]))

    def place(self, values_S: Tensor, flat_D: Tensor) -> Tensor:
        """Write a payload [S] to its coordinates of a vector [D] in the layout's order; returns that."""
        for part, at in self._pieces(len(values_S)):
            flat_D[at].scatter_(0, self.place_D[part].to(torch.int64), values_S[part])
        return flat_D

    @torch.no_grad()
    def _gather(self, flat_D: Tensor, out_S: Tensor) -> Tensor:
        """The first S of a vector [D] in the ranking's order, into `out_S`; returns that."""
        for part, at in self._pieces(len(out_S)):
            torch.index_select(flat_D[at], 0, self.place_D[part], out=out_S[part])
        return out_S

    def _pieces(self, stop: int) -> Iterator[tuple[slice, slice]]:
        """The order up to `stop` in slices, and of which block of the layout each is."""
        size, (_, crossings) = self.rung_D.numel(), self._blockwise
        if block_length(self.rung_D) >= size:
            yield slice(0, stop), slice(0, size)
            return
        for k, at in enumerate(blocks(0, size, self.rung_D)):
            for crossed in crossings:
                if crossed[k] < stop:
                    yield slice(crossed[k], min(crossed[k + 1], stop)), at

    def _coordinates(self, stop: int) -> Tensor:
        """int64 [stop]: the head of the order (a new tensor)."""
        index_S = torch.empty(stop, dtype=torch.int64, device=self.rung_D.device)
        for part, at in self._pieces(stop):
            index_S[part].copy_(self.place_D[part]).add_(at.start)
        return index_S

    def crossings(self, edges: Sequence[int]) -> list[list[int]]:
        """Where the order crosses `edges` of the layout (ascending, E of them), rung by rung [R + 1][E].

        Coordinates increase within a rung, so those between two edges are a slice of it.
        """
        (place_D, crossings), length = self._blockwise, block_length(self.rung_D)

        def crossing(crossed: list[int], edge: int) -> int:
            block, offset = divmod(edge, length)
            if offset == 0:
                return crossed[block]
            of_block_B = place_D[crossed[block] : crossed[block + 1]]
            return crossed[block] + int(torch.searchsorted(of_block_B, offset))

        return [[crossing(crossed, edge) for edge in edges] for crossed in crossings]

    def support(self, rung: int) -> Tensor:
        """int64 [S]: coordinates of the rung's sub-model, in the order of its payload (a new tensor)."""
        return self._coordinates(self.ends[rung])

    def mask(self, rung: int) -> Tensor:
        """bool [D]: the rung's mask."""
        return self.rung_D <= rung

    def coverage(self, weight_R: Sequence[float]) -> Tensor:
        """float32 [D]: share of the clients' weight that holds each coordinate.

        Args:
            weight_R: total weight of the clients whose sub-model is of that rung [R].
        """
        return self.scale_by_coverage(torch.ones(self.rung_D.shape, device=self.rung_D.device), weight_R)

    def scale_by_coverage(self, flat_D: Tensor, weight_R: Sequence[float]) -> Tensor:
        """Multiply a vector [D] in the layout's order by `coverage`, in place; returns it."""
        weight = np.asarray(weight_R, dtype=np.float64)
        at_least = np.concatenate([weight[::-1].cumsum()[::-1], [0.0]]) / weight.sum()
        table = torch.from_numpy(at_least.astype(np.float32)).to(self.rung_D.device, flat_D.dtype)
        for at in blocks(0, len(flat_D), flat_D):
            flat_D[at] *= table.index_select(0, self.rung_D[at].to(torch.int32))
        return flat_D


def refuse_empty(ranking: Ranking) -> None:
    """Refuse a family whose smallest sub-model holds nothing.

    Raises:
        ModelError: GMR-214.
    """
    if ranking.ends[0] == 0:
        size = ranking.rung_D.numel()
        raise ModelError(
            "GMR-214", f"density={ranking.densities[0]:g} of {size} coordinates holds none", where="model"
        )


def prunable_values(layout: ModelLayout, flat_D: Tensor) -> Tensor:
    """The prunable coordinates of `flat_D` [D], in layout order [P]."""
    return torch.cat([flat_D[e.slice] for e in layout.of_kind("prunable")])


def scores(
    score: Score,
    layout: ModelLayout,
    w_D: Tensor,
    *,
    change_D: Tensor | None = None,
    cost_of_layer: Sequence[float] | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Score of each prunable coordinate [P], non-negative; larger scores are kept (method page, section 3).

    Args:
        score: ``magnitude`` |w|; ``weight_change`` |w dw|; ``per_cost`` |w| / c_layer; ``random`` uniform.
        w_D: global vector.
        change_D: change of w over the last interval, for ``weight_change``.
        cost_of_layer: cost of one weight of each prunable layer, in layout order, for ``per_cost``.
        generator: source of ``random``, on the CPU.
    """
    w_P = prunable_values(layout, w_D)
    if score == "magnitude":
        return w_P.abs_()
    if score == "weight_change":
        if change_D is None:
            raise ValueError("weight_change needs change_D")
        return (w_P * prunable_values(layout, change_D)).abs()
    if score == "per_cost":
        if cost_of_layer is None:
            raise ValueError("per_cost needs cost_of_layer")
        pieces = [
            flat.abs() / cost
            for flat, cost in zip(
                w_P.split([e.size for e in layout.of_kind("prunable")]), cost_of_layer, strict=True
            )
        ]
        return torch.cat(pieces)
    if generator is None:
        raise ValueError("random needs a generator")
    return torch.rand(w_P.numel(), generator=generator, dtype=torch.float32).to(w_P.device)


def rank(
    layout: ModelLayout,
    w_D: Tensor,
    score_P: Tensor,
    densities: Sequence[float],
    *,
    layer_floor: float = 0.0,
    prune_biases: bool = True,
) -> Ranking:
    """Masks of all `densities`, nested, each of exactly ``int(d * D_p)`` prunable coordinates.

    First come, layer by layer, the ``int(layer_floor * size)`` weights of largest |w|; then all others;
    each group by descending score, ties by coordinate. Scores must be finite and non-negative.

    Args:
        densities: strictly ascending, in (0, 1].
        layer_floor: share of each layer that precedes all other weights (method page, section 3).
        prune_biases: give a bias the first rung that holds any weight of its row; else rung 0.
    """
    total = layout.prunable
    counts = [int(d * total) for d in densities]
    floor_P = _floor(layout, w_D, layer_floor)
    if floor_P is None:
        rung_P = _rungs(score_P, counts)
    else:
        first = floor_P.nonzero().squeeze(1)
        rung_P = _rungs(score_P.masked_fill(floor_P, -1.0), [max(k - len(first), 0) for k in counts])
        rung_P[first] = _rungs(score_P[first], [min(k, len(first)) for k in counts])

    rung_D = torch.zeros(layout.size, dtype=torch.int16, device=w_D.device)
    start = 0
    for entry in layout.of_kind("prunable"):
        rung_D[entry.slice] = rung_P[start : start + entry.size]
        start += entry.size
    if prune_biases:
        for bias in layout.of_kind("bias"):
            weight = layout.by_name[bias.rows or ""]
            grid = rung_D[weight.slice].view(weight.shape).movedim(weight.output_axis, 0)
            rung_D[bias.slice] = grid.reshape(bias.size, -1).amin(dim=1)
    return Ranking(tuple(densities), rung_D)


def _floor(layout: ModelLayout, w_D: Tensor, share: float) -> Tensor | None:
    """bool [P]: the ``int(share * size)`` weights of largest |w| of every layer; None if that is nobody."""
    if share == 0.0:
        return None
    pieces = []
    for entry in layout.of_kind("prunable"):
        count = int(share * entry.size)
        pieces.append(_rungs(w_D[entry.slice].abs(), [count]) == 0)
    floor_P = torch.cat(pieces)
    return floor_P if bool(floor_P.any()) else None


def _rungs(score: Tensor, counts: Sequence[int]) -> Tensor:
    """int16: for each element the first r with (its rank by descending score, ties by position) < counts[r].

    `counts` ascend; scores are non-negative, or -1, which ranks last. Nothing is sorted but the bins of a
    histogram that hold a threshold.
    """
    cuts = _cuts(score, counts)
    rung = torch.zeros(score.numel(), dtype=torch.int16, device=score.device)
    for at in blocks(0, score.numel(), score):
        score_B, rung_B = score[at], rung[at]
        for first in range(0, len(cuts), 255):
            below_B = torch.zeros(len(score_B), dtype=torch.uint8, device=score.device)
            for cut in cuts[first : first + 255]:
                below_B += (score_B < cut.value).view(torch.uint8)
            rung_B += below_B
    for cut in cuts:
        if cut.ties > cut.inside:
            rung[(score == cut.value).nonzero().squeeze(1)[cut.inside :]] += 1
    return rung


class _Cut(NamedTuple):
    """The k largest of some scores: those above `value`, and the first `inside` of `ties` that equal it."""

    value: float
    inside: int = 0
    ties: int = 0


def _cuts(score: Tensor, counts: Sequence[int]) -> list[_Cut]:
    """The cut of each k in `counts` that leaves somebody out."""
    count = torch.zeros(2**_HISTOGRAM_BITS + 1, dtype=torch.int64, device=score.device)
    for at in blocks(0, score.numel(), score):
        count += torch.bincount(_bins(score[at]), minlength=len(count))
    from_top = count.flip(0).cumsum(0).flip(0)  # elements of each bin and those above it
    wanted = [k for k in counts if k < score.numel()]
    bin_of = {k: int((from_top >= k).sum()) - 1 for k in wanted if k > 0}
    is_wanted = torch.zeros(len(count), dtype=torch.bool, device=score.device)
    is_wanted[list(bin_of.values())] = True
    members = [score.new_empty(0)]
    for at in blocks(0, score.numel(), score) if bin_of else ():
        members.append(score[at][is_wanted.index_select(0, _bins(score[at]))])
    member = torch.cat(members)
    ordered = {b: torch.sort(member[_bins(member) == b], descending=True).values for b in bin_of.values()}
    cuts = []
    for k in wanted:
        if k == 0:
            cuts.append(_Cut(math.inf))
            continue
        inside_bin = ordered[bin_of[k]]
        place = k - int(from_top[bin_of[k]]) + len(inside_bin) - 1
        value = inside_bin[place]
        larger = int((inside_bin > value).sum())
        cuts.append(_Cut(float(value), place + 1 - larger, int((inside_bin == value).sum())))
    return cuts


def _bins(score_B: Tensor) -> Tensor:
    """Histogram bin of each score, in the order of the scores; 0 for those below 0."""
    kind, bits = (torch.int32, 31) if score_B.dtype == torch.float32 else (torch.int64, 63)
    key_B = (score_B + 0.0).view(
        kind
    )  # bits of non-negative floats are ordered as they are; -0.0 becomes 0.0
    return (key_B >> (bits - _HISTOGRAM_BITS)).clamp_min_(-1).add_(1)
