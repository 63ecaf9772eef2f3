"""A sub-model that lacks whole units is trained as the smaller model that it is.

A hidden unit (`fedgmr_plugin.kernels.channels`) is *absent* if its weights, its bias, its norm's entries and
the weights behind it are all masked: they are 0, and stay so. Without absent units the model has the same
outputs and the same gradients, up to rounding, and less to compute. Sub-models of widths (HeteroFL, FjORD,
FedRolex) lack units; where weights are chosen one by one, few units lose all of theirs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fedgmr_plugin.engine.compact import Masks
from fedgmr_plugin.engine.objectives import Context
from fedgmr_plugin.errors import ModelError
from fedgmr_plugin.kernels.channels import Axes, axes

#: Largest share of a model's parameters at which the smaller model is worth its making.
_WORTH = 0.9


class Box(NamedTuple):
    """The rows and columns of a parameter that a smaller model has; None for all of them."""

    index_by_axis: tuple[Tensor | None, ...]

    def cut(self, whole: Tensor) -> Tensor:
        """The part of `whole` inside, a tensor of its own unless it is all of it."""
        for axis, index in enumerate(self.index_by_axis):
            if index is not None:
                whole = whole.index_select(axis, index)
        return whole

    def put(self, part: Tensor, whole: Tensor, axis: int = 0) -> None:
        """Write `part` into `whole`."""
        if axis == len(self.index_by_axis):
            whole.copy_(part)
            return
        index = self.index_by_axis[axis]
        if index is None:
            self.put(part, whole, axis + 1)
        else:
            rows = whole.index_select(axis, index)
            self.put(part, rows, axis + 1)
            whole.index_copy_(axis, index, rows)


@contextmanager
def without_absent_units(
    model: nn.Module, masks: Mapping[str, Tensor] | None, context: Context
) -> Iterator[tuple[Mapping[str, Tensor] | None, Context]]:
    """Inside, `model` has no absent units, and the masks and the context that belong to it; then all units.

    Models whose units cannot be followed, and those of which little is absent, stay as they are.

    Args:
        model: holds x_0.
        masks: parameter name to bool mask, for parameters with a masked coordinate.
    """
    known = _smaller(model, masks) if masks and _may_lack_units(masks) else None
    if known is None or masks is None:
        yield masks, context
        return
    boxes, units = known
    held = {name: model.get_parameter(name) for name in boxes}
    parts = {
        name: nn.Parameter(boxes[name].cut(whole.detach()), requires_grad=whole.requires_grad)
        for name, whole in held.items()
    }
    stated = [(layer, key, getattr(layer, key)) for layer, key, _ in units]
    narrower = [cut and _masks_of(cut, boxes) for cut in context.narrower]
    inside = _masks_of(masks, boxes), context._replace(narrower=narrower)
    try:
        _place(model, parts, units)
        yield inside
    finally:
        _place(model, held, stated)
        for name, part in parts.items():
            boxes[name].put(part.detach(), held[name].detach())


def _may_lack_units(masks: Mapping[str, Tensor]) -> bool:
    """Whether a bias or a norm's entry is masked, or the smallest matrix lacks a row or a column: a glance
    before the model is read."""
    if any(mask.dim() == 1 for mask in masks.values()):
        return True
    smallest = min(masks.values(), key=Tensor.numel)
    return not all(bool(smallest.transpose(0, axis).flatten(1).any(1).all()) for axis in (0, 1))


#: How many units a layer states: the layer, the attribute, the number.
Stated = list[tuple[Any, str, int]]


def _smaller(model: nn.Module, masks: Mapping[str, Tensor]) -> tuple[dict[str, Box], Stated] | None:
    """What is left of each parameter without absent units, and of layers; None if that is not worth while."""
    try:
        cut = axes(model)
    except ModelError:
        return None
    if cut.draws or any(p._backward_hooks or p._post_accumulate_grad_hooks for p in model.parameters()):
        return None
    present = _present_units(cut, masks)
    if not present:
        return None
    boxes: dict[str, Box] = {}
    kept = total = 0
    for name, parameter in model.named_parameters():
        index_by_axis = []
        size = parameter.numel()
        for axis in cut.parameters[name]:
            units = present.get(axis.group)
            index = None if units is None else _entries(units, axis.block, parameter.device)
            index_by_axis.append(index)
            size = size if index is None else size // axis.size * len(index)
        boxes[name] = Box(tuple(index_by_axis))
        total += parameter.numel()
        kept += size
    if kept > _WORTH * total:
        return None
    return boxes, _stated(model, cut, present)


def _stated(model: nn.Module, cut: Axes, present: Mapping[int, Tensor]) -> Stated:
    """The numbers of units that layers look at while they compute."""
    stated: Stated = []
    for name, axis in cut.norms.items():
        if axis.group in present:
            count = int(present[axis.group].sum()) * axis.block
            stated.append((model.get_submodule(name), "num_features", count))
    for name, layer in model.named_modules():
        if type(layer) is nn.Conv2d and layer.groups > 1:
            group = cut.parameters[f"{name}.weight"][0].group
            if group in present:
                stated.append((layer, "groups", int(present[group].sum())))
    return stated


def _present_units(cut: Axes, masks: Mapping[str, Tensor]) -> dict[int, Tensor]:
    """For every group of hidden units of which some are absent: bool [units], those with a coordinate that
    is not masked."""
    places: dict[int, list[tuple[str, int]]] = {}
    for name, of in cut.parameters.items():
        for position, axis in enumerate(of):
            if axis.hidden:
                places.setdefault(axis.group, []).append((name, position))
    present: dict[int, Tensor] = {}
    for group, where in places.items():
        if not all(name in masks for name, _ in where):
            continue  # a parameter is whole: all units are there
        name, position = where[0]
        units = torch.zeros(cut.parameters[name][position].units, dtype=torch.bool)
        for name, position in where:
            others = [d for d in range(masks[name].dim()) if d != position]
            entries = masks[name].any(dim=others) if others else masks[name]
            units |= entries.view(len(units), -1).any(1).cpu()
        units[0] |= ~units.any()  # no layer is empty
        if not bool(units.all()):
            present[group] = units
    return present


def _entries(units: Tensor, block: int, device: torch.device) -> Tensor:
    """int64 indices of the entries of `units` (bool), each of `block`."""
    return units.repeat_interleave(block).nonzero().squeeze(1).to(device)


def _masks_of(masks: Mapping[str, Tensor], boxes: Mapping[str, Box]) -> Masks:
    """`masks` of the smaller model's parameters; those that mask nothing there are left out."""
    parts = ((name, boxes[name].cut(mask)) for name, mask in masks.items())
    return Masks((name, part) for name, part in parts if not bool(part.all()))


def _place(model: nn.Module, parameters: Mapping[str, nn.Parameter], stated: Stated) -> None:
    """Give `model` these parameters, and its layers the numbers that belong to them."""
    for name, parameter in parameters.items():
        owner, _, key = name.rpartition(".")
        model.get_submodule(owner)._parameters[key] = parameter
    for layer, key, count in stated:
        setattr(layer, key, count)
