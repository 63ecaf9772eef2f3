"""Sub-models that are smaller models of the same kind: the first units of every hidden layer.

Legend: D coordinates of the vector, S of them in one sub-model, R rungs (requested densities, ascending).

Width p in (0, 1] keeps the first ceil(p C) of the C output units of every hidden layer (HeteroFL's static
slices; method page, section 11), all inputs of the first layer and all outputs of the last one. A linear
layer behind ``Flatten`` keeps the columns of every channel that is kept. Sub-models of ascending widths are
nested. Which layers have the same units is found by `fedgmr_plugin.kernels.channels`.

A *density* is, here as elsewhere, a share of the layout's prunable weights. Unlike other masks a width takes
away coordinates that the layout calls dense (columns of the last layer, norms' units), as the smaller model
does not have them. Models with buffers are refused: a ranking has every buffer in every sub-model.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fedgmr_plugin.kernels.channels import Axes, Axis, axes, is_depthwise
from fedgmr_plugin.kernels.layout import Entry, ModelLayout
from fedgmr_plugin.kernels.masks import Ranking


class Narrow(NamedTuple):
    """A sub-model as a model of its own."""

    model: nn.Module
    index_S: (
        Tensor  # int64 [S], increasing: coordinate in the full layout of each of its own layout's, in order
    )


def widths(model: nn.Module, layout: ModelLayout, densities: Sequence[float]) -> tuple[Fraction, ...]:
    """For each density d the largest width whose sub-model has at most ``int(d * D_p)`` prunable weights [R].

    A width keeps a unit of every layer at least: where that is more than the density asks for, the smallest.

    Raises:
        ModelError: GMR-207, `model` has no widths.
    """
    cut = axes(model)
    counts = {axis.units for per_entry in cut.parameters.values() for axis in per_entry if axis.hidden}
    steps = sorted({Fraction(j, c) for c in counts for j in range(1, c + 1)})
    total = layout.prunable
    return tuple(steps[_last(layout, cut, steps, int(d * total))] for d in densities)


def _last(layout: ModelLayout, cut: Axes, steps: Sequence[Fraction], budget: int) -> int:
    """Index of the last step of at most `budget` prunable weights, which grow along `steps`; 0 if none."""
    low, high = 0, len(steps)
    while high - low > 1:
        middle = (low + high) // 2
        if prunable_kept(layout, cut, steps[middle]) <= budget:
            low = middle
        else:
            high = middle
    return low


def prunable_kept(layout: ModelLayout, cut: Axes, width: Fraction) -> int:
    """Prunable weights of the sub-model of `width`."""
    return sum(math.prod(_shape(e, cut.parameters[e.name], width)) for e in layout.of_kind("prunable"))


def _shape(entry: Entry, cut: tuple[Axis, ...], width: Fraction) -> tuple[int, ...]:
    """Shape of an entry in the sub-model of `width`."""
    return (*(axis.kept(width) for axis in cut), *entry.shape[len(cut) :])


def rank_widths(model: nn.Module, layout: ModelLayout, densities: Sequence[float], first: int = 0) -> Ranking:
    """Masks of all `densities`: exactly the coordinates of the smaller models of their `widths`, nested.

    Args:
        densities: strictly ascending, in (0, 1].
        first: unit of every hidden layer (modulo its units) where sub-models begin; units behind the last one
            are the first ones again (FedRolex's rolling windows).

    Raises:
        ModelError: GMR-207, `model` has no widths.
    """
    cut = axes(model)
    width_R = widths(model, layout, densities)
    rung_D = torch.zeros(layout.size, dtype=torch.int16)
    for entry in layout.entries:
        grid = rung_D[entry.slice].view(entry.shape)
        for position, axis in enumerate(cut.parameters[entry.name]):
            kept_R = torch.tensor([axis.kept(width) for width in width_R])
            first_rung = torch.searchsorted(kept_R, axis.places(first), right=True).to(torch.int16)
            ahead = (1,) * position, (1,) * (grid.dim() - position - 1)
            torch.maximum(grid, first_rung.view(*ahead[0], -1, *ahead[1]), out=grid)
    return Ranking(tuple(densities), rung_D)


@torch.no_grad()
def narrow(model: nn.Module, layout: ModelLayout, width: Fraction) -> Narrow:
    """The sub-model of `width` as a model of its own, with the values that `model` has.

    Its output is that of `model` with every other coordinate 0, up to rounding; dropout draws differ.

    Raises:
        ModelError: GMR-207, `model` has no widths.
    """
    cut = axes(model)
    small = copy.deepcopy(model)
    inside_D = torch.zeros(layout.size, dtype=torch.bool)
    for entry in layout.entries:
        box = tuple(slice(n) for n in _shape(entry, cut.parameters[entry.name], width))
        inside_D[entry.slice].view(entry.shape)[box] = True
        owner, _, key = entry.name.rpartition(".")
        layer = small.get_submodule(owner)
        whole = getattr(layer, key)
        setattr(layer, key, nn.Parameter(whole[box].clone(), requires_grad=whole.requires_grad))
    _declare_sizes(small, cut, width)
    return Narrow(small, inside_D.nonzero().squeeze(1))


def _declare_sizes(small: nn.Module, cut: Axes, width: Fraction) -> None:
    """Give the layers of `small`, which has its tensors already, the sizes that their attributes state."""
    for layer in small.modules():
        if type(layer) is nn.Conv2d:
            if is_depthwise(layer):
                layer.groups = len(layer.weight)
            layer.out_channels, layer.in_channels = len(layer.weight), layer.weight.shape[1] * layer.groups
        elif type(layer) is nn.Linear:
            layer.out_features, layer.in_features = layer.weight.shape
    for name, axis in cut.norms.items():
        norm: Any = small.get_submodule(name)
        norm.num_features = axis.kept(width)
