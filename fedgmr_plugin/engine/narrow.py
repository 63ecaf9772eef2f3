"""A sub-model that lacks whole units is trained as the smaller stack that it is.

A hidden unit of a plain stack is *absent* if its weights, its bias, its norm's entries and the weights behind
it are all masked: they are 0, and stay so. Without absent units the stack has the same outputs and the same
gradients, up to rounding, and less to compute. Sub-models of widths (HeteroFL, FjORD, FedRolex) lack units;
where weights are chosen one by one, few units lose all of theirs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fedgmr_plugin.engine.compact import Masks
from fedgmr_plugin.engine.objectives import Context
from fedgmr_plugin.errors import ModelError
from fedgmr_plugin.kernels.chain import layers
from fedgmr_plugin.kernels.width import Axis, axes

#: Largest share of a stack's parameters at which the smaller stack is worth its making.
_WORTH = 0.9
_RANDOM = (nn.Dropout, nn.Dropout2d)  # their draws depend on how many units there are


class Box(NamedTuple):
    """The rows and columns of a parameter that a smaller stack has; None for all of them."""

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

    Models that are no plain stack of known layers, and those of which little is absent, stay as they are.

    Args:
        model: a plain stack, which holds x_0.
        masks: parameter name to bool mask, for parameters with a masked coordinate.
    """
    boxes = _boxes(model, masks) if masks else {}
    if not boxes or masks is None:
        yield masks, context
        return
    held = {name: model.get_parameter(name) for name in boxes}
    stack: list[tuple[str, Any]] = list(layers(model))
    features = {layer: layer.num_features for _, layer in stack if hasattr(layer, "num_features")}
    narrower = [cut and _masks_of(cut, boxes) for cut in context.narrower]
    try:
        for name, whole in held.items():
            part = nn.Parameter(boxes[name].cut(whole.detach()), requires_grad=whole.requires_grad)
            _set(model, name, part)
        _declare_features(stack, held)
        yield _masks_of(masks, boxes), context._replace(narrower=narrower)
    finally:
        for name, whole in held.items():
            boxes[name].put(model.get_parameter(name).detach(), whole.detach())
            _set(model, name, whole)
        for norm, number in features.items():
            norm.num_features = number


def _declare_features(stack: Iterable[tuple[str, Any]], held: Mapping[str, nn.Parameter]) -> None:
    """Give norms, of which some look, the number of their units; `held` are the whole parameters."""
    share = Fraction(1)
    for name, layer in stack:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            share = Fraction(len(layer.weight), len(held[f"{name}.weight"]))
        elif hasattr(layer, "num_features"):
            layer.num_features = int(layer.num_features * share)


def _boxes(model: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, Box]:
    """What is left of each parameter without absent units; nothing if that is not worth while."""
    if any(isinstance(layer, _RANDOM) for layer in model.modules()):
        return {}
    try:
        cut = axes(model)
    except ModelError:
        return {}
    present = _present_units(model, cut, masks)
    if all(bool(units.all()) for units in present.values()):
        return {}
    boxes: dict[str, Box] = {}
    kept = total = 0
    for name, levels in _levels(model, cut).items():
        parameter = model.get_parameter(name)
        if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
            return {}
        box = boxes[name] = Box(
            tuple(
                _entries(present[level], axis.block, parameter.device) if level in present else None
                for axis, level in zip(cut[name], levels, strict=True)
            )
        )
        total += parameter.numel()
        kept += _size(parameter, box)
    return boxes if kept <= _WORTH * total else {}


def _levels(model: nn.Module, cut: Mapping[str, tuple[Axis, ...]]) -> dict[str, tuple[int, ...]]:
    """For every axis in `cut` whose units it has: those of the weighted layer of that number, from 1 on."""
    found: dict[str, tuple[int, ...]] = {}
    level = 0
    for layer_name, layer in layers(model):
        prefix = f"{layer_name}." if layer_name else ""
        if isinstance(layer, nn.Conv2d | nn.Linear):
            level += 1
        for key, parameter in layer._parameters.items():
            if parameter is not None:
                name = prefix + key
                found[name] = (level, level - 1)[: len(cut[name])]
    return found


def _present_units(
    model: nn.Module, cut: Mapping[str, tuple[Axis, ...]], masks: Mapping[str, Tensor]
) -> dict[int, Tensor]:
    """For every hidden layer, by its number: bool [units], the units with a coordinate that is not masked."""
    by_level: dict[int, list[tuple[str, int]]] = {}
    for name, levels in _levels(model, cut).items():
        for position, (axis, level) in enumerate(zip(cut[name], levels, strict=True)):
            if axis.hidden:
                by_level.setdefault(level, []).append((name, position))
    present: dict[int, Tensor] = {}
    for level, places in by_level.items():
        if not all(name in masks for name, _ in places):
            continue  # a parameter is whole: all units are there
        units = torch.zeros(cut[places[0][0]][places[0][1]].units, dtype=torch.bool)
        for name, position in places:
            others = [d for d in range(masks[name].dim()) if d != position]
            entries = masks[name].any(dim=others) if others else masks[name]
            units |= entries.view(len(units), -1).any(1).cpu()
        units[0] |= ~units.any()  # no layer is empty
        present[level] = units
    return present


def _entries(units: Tensor, block: int, device: torch.device) -> Tensor | None:
    """int64 indices of the entries of `units` (bool), each of `block`; None if they are all."""
    if bool(units.all()):
        return None
    return units.repeat_interleave(block).nonzero().squeeze(1).to(device)


def _size(parameter: Tensor, box: Box) -> int:
    size = parameter.numel()
    for axis, index in enumerate(box.index_by_axis):
        if index is not None:
            size = size // parameter.shape[axis] * len(index)
    return size


def _masks_of(masks: Mapping[str, Tensor], boxes: Mapping[str, Box]) -> Masks:
    """`masks` of the smaller stack's parameters; those that mask nothing there are left out."""
    parts = ((name, boxes[name].cut(mask)) for name, mask in masks.items())
    return Masks((name, part) for name, part in parts if not bool(part.all()))


def _set(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, key = name.rpartition(".")
    model.get_submodule(owner)._parameters[key] = parameter
