"""Sub-models of a plain stack that are smaller plain stacks: its first units, layer by layer.

Legend: D coordinates of the vector, S of them in one sub-model, R rungs (requested densities, ascending).

Width p in (0, 1] keeps the first ceil(p C) of the C output units of every hidden layer (HeteroFL's static
slices; method page, section 11), all inputs of the first layer and all outputs of the last one. A linear
layer behind ``Flatten`` keeps the columns of every channel that is kept. Sub-models of ascending widths are
nested.

A *density* is, here as elsewhere, a share of the layout's prunable weights. Unlike other masks a width takes
away coordinates that the layout calls dense (columns of the last layer, norms' units), as the smaller stack
does not have them. Stacks with running statistics are refused: a ranking has every buffer in every sub-model.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fedgmr_plugin.errors import ModelError
from fedgmr_plugin.kernels.chain import is_chain, layers
from fedgmr_plugin.kernels.layout import Entry, ModelLayout
from fedgmr_plugin.kernels.masks import Ranking

_WEIGHTED = (nn.Conv2d, nn.Linear)
_IMAGE_NORMS = (nn.BatchNorm2d, nn.InstanceNorm2d)
_POOLS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveMaxPool2d, nn.AdaptiveAvgPool2d)
_POINTWISE = (
    *(nn.Identity, nn.Dropout, nn.Dropout2d, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU),
    *(nn.GELU, nn.SiLU, nn.Mish, nn.Tanh, nn.Sigmoid, nn.Softplus, nn.Softsign, nn.Hardtanh, nn.Hardswish),
)


class Axis(NamedTuple):
    """One axis of a tensor: `units`, each of `block` consecutive entries; only hidden units are cut."""

    units: int
    block: int = 1
    hidden: bool = False

    @property
    def size(self) -> int:
        """Entries of the axis."""
        return self.units * self.block

    def kept(self, width: Fraction) -> int:
        """Entries of the axis at `width`: the first ones."""
        return math.ceil(width * self.units) * self.block if self.hidden else self.size

    def places(self, first: int) -> Tensor:
        """int64 [size]: how many entries come before each one if unit `first` (modulo units) comes first."""
        entry = torch.arange(self.size)
        return entry if not self.hidden else (entry - first % self.units * self.block) % self.size


#: Axes that a width cuts, of every parameter by name: the leading ones of its shape.
Axes = dict[str, tuple[Axis, ...]]


class Narrow(NamedTuple):
    """A sub-model as a stack of its own."""

    model: nn.Module
    index_S: (
        Tensor  # int64 [S], increasing: coordinate in the full layout of each of its own layout's, in order
    )


def axes(model: nn.Module) -> Axes:
    """The axes that a width cuts of every parameter of a plain stack.

    Stacks are of ``Conv2d`` (without groups) and ``Linear``; between the first and the last of them may stand
    pointwise layers, pooling, ``Flatten`` and norms of single channels without running statistics.

    Raises:
        ModelError: GMR-207, `model` is none.
    """
    stack: list[tuple[str, Any]] = list(layers(model))
    if not is_chain(model):
        raise _refusal(model, "", "it is not a Sequential of torch's own layers")
    weighted = [i for i, (_, layer) in enumerate(stack) if type(layer) in _WEIGHTED]
    if len(weighted) < 2:
        raise _refusal(model, "", "it has no hidden Conv2d or Linear layer")
    held = [id(parameter) for _, layer in stack for parameter in layer.parameters()]
    if len(held) > len(set(held)):
        raise _refusal(model, "", "layers share parameters")

    found: Axes = {}
    units, flat = Axis(0), False  # the output of the layer before; whether it has no image axes
    for i, (name, layer) in enumerate(stack):
        if i in weighted:
            inputs = _inputs(model, name, layer, units if i > weighted[0] else None, flat)
            units = Axis(len(layer.weight), hidden=i < weighted[-1])
            flat = type(layer) is nn.Linear
            _add(found, name, layer, (units, inputs), (units,))
        elif weighted[0] < i < weighted[-1]:
            flat = _between(model, name, layer, flat)
            if any(True for _ in layer.parameters()):
                per_unit = Axis(units.units, _block(model, name, layer.num_features, units), True)
                _add(found, name, layer, (per_unit,), (per_unit,))
        elif any(True for _ in layer.parameters()) or any(True for _ in layer.buffers()):
            raise _refusal(model, name, "it stands before the first or behind the last Conv2d or Linear")
    return found


def _inputs(model: nn.Module, name: str, layer: Any, before: Axis | None, flat: bool) -> Axis:
    """The axis of inputs of a weighted layer behind units `before`; None where it is the first one."""
    if type(layer) is nn.Conv2d:
        if layer.groups != 1:
            raise _refusal(model, name, f"it has groups={layer.groups}")
        if before is not None and flat:
            raise _refusal(model, name, "it stands behind a Linear or Flatten")
    elif before is not None and not flat:
        raise _refusal(model, name, "it works on images: a Flatten is missing before it")
    size = layer.weight.shape[1]
    if before is None:
        return Axis(size)
    return Axis(before.units, _block(model, name, size, before), True)


def _block(model: nn.Module, name: str, size: int, units: Axis) -> int:
    """Entries of each of the `units` before a layer of `size` inputs."""
    if size % units.units:
        raise _refusal(model, name, f"it has {size} inputs, which {units.units} channels do not divide")
    return size // units.units


def _between(model: nn.Module, name: str, layer: Any, flat: bool) -> bool:
    """Whether the output of a layer without weights has no image axes; refuses layers that mix units."""
    kind = type(layer)
    if kind is nn.Flatten and (layer.start_dim, layer.end_dim) == (1, -1):
        return True
    norm = kind in _IMAGE_NORMS if not flat else kind is nn.BatchNorm1d
    if norm and layer.running_mean is not None:
        raise _refusal(model, name, "it has running statistics: give it track_running_stats=False")
    pool = kind in _POOLS and not flat and not getattr(layer, "return_indices", False)
    if not (norm or pool or kind in _POINTWISE):
        raise _refusal(model, name, "it is not known to treat units one by one")
    return flat


def _add(found: Axes, name: str, layer: nn.Module, weight: tuple[Axis, ...], bias: tuple[Axis, ...]) -> None:
    prefix = f"{name}." if name else ""
    for key, parameter in layer._parameters.items():
        if parameter is not None:
            found[prefix + key] = weight if key == "weight" else bias


def _refusal(model: nn.Module, name: str, reason: str) -> ModelError:
    what = f"layer {name} ({type(model.get_submodule(name)).__name__})" if name else type(model).__name__
    return ModelError("GMR-207", f"{what} has no width: {reason}", where=type(model).__name__)


def widths(model: nn.Module, layout: ModelLayout, densities: Sequence[float]) -> tuple[Fraction, ...]:
    """For each density d the largest width whose sub-model has at most ``int(d * D_p)`` prunable weights [R].

    A width keeps a unit of every layer at least: where that is more than the density asks for, the smallest.

    Raises:
        ModelError: GMR-207, `model` has no widths.
    """
    cut = axes(model)
    counts = {axis.units for per_entry in cut.values() for axis in per_entry if axis.hidden}
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
    return sum(math.prod(_shape(e, cut[e.name], width)) for e in layout.of_kind("prunable"))


def _shape(entry: Entry, cut: tuple[Axis, ...], width: Fraction) -> tuple[int, ...]:
    """Shape of an entry in the sub-model of `width`."""
    return (*(axis.kept(width) for axis in cut), *entry.shape[len(cut) :])


def rank_widths(model: nn.Module, layout: ModelLayout, densities: Sequence[float], first: int = 0) -> Ranking:
    """Masks of all `densities`: exactly the coordinates of the stacks of their `widths`, nested.

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
        for position, axis in enumerate(cut[entry.name]):
            kept_R = torch.tensor([axis.kept(width) for width in width_R])
            first_rung = torch.searchsorted(kept_R, axis.places(first), right=True).to(torch.int16)
            ahead = (1,) * position, (1,) * (grid.dim() - position - 1)
            torch.maximum(grid, first_rung.view(*ahead[0], -1, *ahead[1]), out=grid)
    return Ranking(tuple(densities), rung_D)


@torch.no_grad()
def narrow(model: nn.Module, layout: ModelLayout, width: Fraction) -> Narrow:
    """The sub-model of `width` as a stack of its own, with the values that `model` has.

    Its output is that of `model` with every other coordinate 0, up to rounding; dropout draws differ.

    Raises:
        ModelError: GMR-207, `model` has no widths.
    """
    cut = axes(model)
    small = copy.deepcopy(model)
    inside_D = torch.zeros(layout.size, dtype=torch.bool)
    for entry in layout.entries:
        box = tuple(slice(n) for n in _shape(entry, cut[entry.name], width))
        inside_D[entry.slice].view(entry.shape)[box] = True
        owner, _, key = entry.name.rpartition(".")
        layer = small.get_submodule(owner)
        whole = getattr(layer, key)
        setattr(layer, key, nn.Parameter(whole[box].clone(), requires_grad=whole.requires_grad))
    _declare_sizes(model, small)
    return Narrow(small, inside_D.nonzero().squeeze(1))


def _declare_sizes(model: nn.Module, small: nn.Module) -> None:
    """Give the layers of `small`, which has its tensors already, the sizes that their attributes state."""
    share = Fraction(1)  # of the units of the layer before
    pairs: Iterator[tuple[Any, Any]] = zip(layers(model), layers(small), strict=True)
    for (_, old), (_, new) in pairs:
        if type(new) is nn.Conv2d:
            new.out_channels, new.in_channels = new.weight.shape[:2]
        elif type(new) is nn.Linear:
            new.out_features, new.in_features = new.weight.shape
        elif hasattr(new, "num_features"):
            new.num_features = int(old.num_features * share)
        if type(new) in _WEIGHTED:
            share = Fraction(len(new.weight), len(old.weight))
