"""Which axes of which parameters are the same units, found by following a model's layers.

A layer's output units are the input units of the layers that read it, and of everything that is added to its
output. Units that reach neither the model's input nor its output are *hidden*: they can be cut, everywhere at
once, and a smaller model of the same kind is left. Steps come from ``kernels/steps.py``.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import Any, Literal, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedgmr_plugin.errors import ModelError
from fedgmr_plugin.kernels.chain import is_chain, is_intercepted
from fedgmr_plugin.kernels.steps import OUTPUT, Step, refusal, stack_steps, traced_steps

_WEIGHTED = (nn.Conv2d, nn.Linear)
_IMAGE_NORMS = (nn.BatchNorm2d, nn.InstanceNorm2d)
_NORMS = {"image": _IMAGE_NORMS, "flattened": (nn.BatchNorm1d,), "vectors": (nn.BatchNorm1d,)}
_POOLS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveMaxPool2d, nn.AdaptiveAvgPool2d)
_DROPOUTS = (nn.Dropout, nn.Dropout2d)
_POINTWISE = (
    *(nn.Identity, *_DROPOUTS, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU),
    *(nn.GELU, nn.SiLU, nn.Mish, nn.Tanh, nn.Sigmoid, nn.Softplus, nn.Softsign, nn.Hardtanh, nn.Hardswish),
)
_POOL_CALLS = {F.max_pool2d, F.avg_pool2d, F.adaptive_max_pool2d, F.adaptive_avg_pool2d, torch.max_pool2d}
_DROPOUT_CALLS = {F.dropout, F.dropout2d, torch.dropout}
_POINTWISE_CALLS: set[Any] = {
    *(F.relu, F.relu6, F.leaky_relu, F.elu, F.selu, F.celu, F.gelu, F.silu, F.mish, F.tanh, F.sigmoid),
    *(F.softplus, F.softsign, F.hardtanh, F.hardswish, torch.relu, torch.tanh, torch.sigmoid),
    *("relu", "relu_", "tanh", "sigmoid", "contiguous", "clone"),
}
_ADDITIONS = {operator.add, operator.iadd, torch.add, "add", "add_"}
_FLATTENING = ((OUTPUT, 1), (OUTPUT, 1, -1), (OUTPUT, ("start_dim", 1)))
_VIEWS = ((OUTPUT, OUTPUT, -1), (OUTPUT, (OUTPUT, -1)))  # x.view(n, -1)
_MEANS = tuple(
    (OUTPUT, axes) for pair in ((2, 3), (-2, -1), (-1, -2)) for axes in (pair, ("dim", pair))
)  # over both axes of an image


class Axis(NamedTuple):
    """One axis of a tensor: `units`, each of `block` consecutive entries; only hidden units are cut.

    Axes of the same units have the same `group`.
    """

    units: int
    block: int = 1
    hidden: bool = False
    group: int = -1

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


class Axes(NamedTuple):
    """The axes of a model that can be cut.

    Attributes:
        parameters: of every parameter by name, the leading ones of its shape.
        norms: by layer, the axis of the units of every norm.
        draws: numbers are drawn for units (dropout), so that other numbers are drawn for fewer units.
    """

    parameters: dict[str, tuple[Axis, ...]]
    norms: dict[str, Axis]
    draws: bool


def axes(model: nn.Module) -> Axes:
    """The axes that can be cut of every parameter.

    Models are of ``Conv2d`` (plain or depthwise) and ``Linear``, with pointwise layers, pooling, additions,
    ``Flatten`` and norms of single channels without running statistics between them. They are called as
    ``model(x)``. A ``Linear`` may work on vectors with other axes before their last one, but the second axis
    must be that of the units where a ``BatchNorm1d`` follows, which is not looked at.

    Raises:
        ModelError: GMR-207, `model` is none.
    """
    if is_chain(model):  # to read a stack again costs less than to be wrong about one that was changed
        return _Follower(model).follow(stack_steps(model))
    layers = [(name, type(m), is_intercepted(m)) for name, m in model.named_modules()]
    sizes = [(name, t.shape) for name, t in (*model.named_parameters(), *model.named_buffers())]
    if model not in _known or _known[model].form != (layers, sizes):
        _known[model] = _Known((layers, sizes), _axes_or_message(model))
    found = _known[model].found
    if isinstance(found, str):
        raise ModelError("GMR-207", found, where=type(model).__name__)
    return found


class _Known(NamedTuple):
    """What was found of a model that looked like `form`, or why it was refused."""

    form: tuple[list[Any], list[Any]]
    found: Axes | str


_known: WeakKeyDictionary[nn.Module, _Known] = WeakKeyDictionary()


def _axes_or_message(model: nn.Module) -> Axes | str:
    try:
        return _axes_of_traces(model)
    except ModelError as error:
        return error.message  # an error that is kept would keep the model


def _axes_of_traces(model: nn.Module) -> Axes:
    if any(is_intercepted(m) for m in model.modules()):
        raise refusal(model, "it has hooks, or a forward that is not its class's")
    trained, evaluated = (_Follower(model).follow(traced_steps(model, mode)) for mode in (True, False))
    if (trained.parameters, trained.norms) != (evaluated.parameters, evaluated.norms):
        raise refusal(model, "its units are others in training than in evaluation")
    return trained._replace(draws=trained.draws or evaluated.draws)


class _Value(NamedTuple):
    """Output of a step.

    Attributes:
        group: of the units that it has, or is made of; None if there are none that could be cut.
        form: where they are: an ``image`` [b, units, ...], one that is ``flattened`` [b, units * block],
            ``vectors`` [..., units]; what is put in is ``input`` [b, ...]; a ``shape`` is that of any of
            these, and the number b in it that of ``samples``.
    """

    group: int | None = None
    form: Literal["image", "flattened", "vectors", "shape", "input", "samples", "other"] = "other"

    def flatten(self) -> _Value:
        """All but the first axis as one."""
        return self._replace(form="flattened") if self.form == "image" else self


class _Follower:
    """Follows units from layer to layer.

    Groups of units are joined where they are added, hence one `_root` for all that were joined. Those in
    `_fixed` are not hidden. What stands in the way of cutting a group counts if it turns out to be hidden.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._parameters = dict(model.named_parameters())
        self._counts: list[int] = []
        self._parents: list[int] = []
        self._fixed: set[int] = set()
        self._obstacles: list[tuple[int, ModelError]] = []
        self._found: dict[str, tuple[Axis, ...]] = {}
        self._norms: dict[str, Axis] = {}
        self._draws = False

    def follow(self, steps: Iterable[Step]) -> Axes:
        """The axes of the model that takes these steps."""
        values: list[_Value] = []
        for step in steps:
            inputs = [values[i] for i in step.inputs]
            output = self._visit(step, inputs)
            if output is None:
                for value in inputs:
                    self._oppose(value.group, step, "it is not known to treat units one by one")
                output = _Value(inputs[0].group) if inputs else _Value()
            values.append(output)
        return self._result()

    def _result(self) -> Axes:
        fixed = {self._root(group) for group in self._fixed}
        for group, problem in self._obstacles:
            if self._root(group) not in fixed:
                raise problem
        for name, _ in self._model.named_buffers():
            raise refusal(self._model, f"it has a buffer, {name}")
        for name in self._parameters:
            if name not in self._found:
                raise refusal(self._model, f"parameter {name} is of no Conv2d, Linear or norm that is called")

        def final(axis: Axis) -> Axis:
            if axis.group < 0:
                return axis
            root = self._root(axis.group)
            return axis._replace(group=root, hidden=root not in fixed)

        found = {name: tuple(final(axis) for axis in of) for name, of in self._found.items()}
        if not any(axis.hidden for of in found.values() for axis in of):
            raise refusal(self._model, "it has no hidden Conv2d or Linear layer")
        return Axes(found, {name: final(axis) for name, axis in self._norms.items()}, self._draws)

    # -- steps: each gives the output, or None if it is not known to treat units one by one -----------------

    def _visit(self, step: Step, inputs: Sequence[_Value]) -> _Value | None:
        does = step.does
        if does in (None, "input", "output"):
            self._fix(inputs)
            return _Value(form="input") if does == "input" else _Value()
        if isinstance(does, nn.Module):
            return self._layer(step, *inputs) if len(inputs) == 1 else None
        if len(inputs) == 2 and does in _ADDITIONS and step.given == (OUTPUT, OUTPUT):
            return self._addition(step, *inputs)
        if len(inputs) == 2 and does in ("view", "reshape", torch.reshape) and step.given in _VIEWS:
            return inputs[0].flatten() if inputs[1].form == "samples" else None
        return self._call(step, *inputs) if len(inputs) == 1 else None

    def _layer(self, step: Step, value: _Value) -> _Value | None:
        layer, kind = step.does, type(step.does)
        if kind in _WEIGHTED:
            return self._weighted(step, value)
        if kind in _NORMS.get(value.form, (*_IMAGE_NORMS, nn.BatchNorm1d)):
            return self._norm(step, value)
        if kind is nn.Flatten and (layer.start_dim, layer.end_dim) == (1, -1):
            return value.flatten()
        self._draws |= kind in _DROPOUTS and value.group is not None
        is_pool = kind in _POOLS and value.form == "image" and not getattr(layer, "return_indices", False)
        return value if is_pool or kind in _POINTWISE else None

    def _call(self, step: Step, value: _Value) -> _Value | None:
        """The output of a function or method of one tensor, or of its shape."""
        does, given = step.does, step.given
        if value.form == "shape":
            return _Value(form="samples") if does is operator.getitem and given == (OUTPUT, 0) else None
        if value.form in ("samples", "other"):
            return None
        if does == "dim":
            return _Value()
        if does == "size" and given == (OUTPUT, 0):
            return _Value(form="samples")
        if (does, *given) in (("size", OUTPUT), (getattr, OUTPUT, "shape")):
            return _Value(value.group, "shape")
        if does in (torch.flatten, "flatten") and given in _FLATTENING:
            return value.flatten()
        if does in (torch.mean, "mean") and given in _MEANS and value.form == "image":
            return _Value(value.group, "vectors")
        self._draws |= does in _DROPOUT_CALLS and value.group is not None
        by_number = (
            does in {*_ADDITIONS, operator.mul, operator.truediv}
            and all(a is OUTPUT or isinstance(a, int | float) for a in given)
            and (given[0] is OUTPUT or does is not operator.truediv)  # 1 / 0 of a masked unit is not finite
        )
        is_pool = does in _POOL_CALLS and value.form == "image"
        return value if by_number or is_pool or does in _POINTWISE_CALLS | _DROPOUT_CALLS else None

    def _weighted(self, step: Step, value: _Value) -> _Value:
        layer = step.does
        self._demand_own_parameters(step)
        units, size = layer.weight.shape[:2]
        conv = type(layer) is nn.Conv2d
        if conv and value.form in ("flattened", "vectors"):
            self._oppose(value.group, step, "it stands behind a Linear or Flatten")
        elif not conv and value.form == "image":
            self._oppose(value.group, step, "it works on images: a Flatten is missing before it")
        groups = layer.groups if conv else 1
        if is_depthwise(layer) and value.group is not None:
            own = self._axis(step, value, units)
            self._add(step, (own,), (own,))
            return value
        group = self._new_group(units)
        if groups == 1:
            inputs = self._axis(step, value, size)
        else:
            inputs = Axis(size)
            for each in (group, value.group):
                self._oppose(each, step, f"it has groups={groups}")
        own = Axis(units, group=group)
        self._add(step, (own, inputs), (own,))
        return _Value(group, "image" if conv else "vectors")

    def _norm(self, step: Step, value: _Value) -> _Value:
        if step.does.running_mean is not None:
            reason = "it has running statistics: give it track_running_stats=False"
            raise refusal(self._model, reason, step)
        self._demand_own_parameters(step)
        axis = self._axis(step, value, step.does.num_features)
        before = self._norms.setdefault(step.name, axis)
        if before != axis:
            for each in (before.group, axis.group):
                self._oppose(each, step, "it is called for several layers")
        self._add(step, (axis,), (axis,))
        return value

    def _addition(self, step: Step, one: _Value, other: _Value) -> _Value | None:
        if one.group is None or other.group is None:
            self._fix((one, other))
            return one if one.group is not None else other
        forms = {one.form, other.form}
        is_alike = len(forms) == 1 or forms == {"flattened", "vectors"}
        if not is_alike or "shape" in forms or self._counts[one.group] != self._counts[other.group]:
            for value in (one, other):
                self._oppose(value.group, step, "what it adds has other units")
            return _Value()
        self._parents[self._root(other.group)] = self._root(one.group)
        return one if one.form == "vectors" else other

    # -- groups ---------------------------------------------------------------------------------------------

    def _new_group(self, units: int) -> int:
        self._counts.append(units)
        self._parents.append(len(self._parents))
        return len(self._parents) - 1

    def _root(self, group: int) -> int:
        while self._parents[group] != group:
            group = self._parents[group]
        return group

    def _fix(self, values: Iterable[_Value]) -> None:
        self._fixed.update(value.group for value in values if value.group is not None)

    def _axis(self, step: Step, value: _Value, size: int) -> Axis:
        """The axis of `size` entries that an input has."""
        if value.group is None:
            return Axis(size)
        units = self._counts[value.group]
        block, rest = divmod(size, units)
        if rest or (block > 1 and value.form != "flattened"):
            self._oppose(value.group, step, f"its {size} inputs are not those of the {units} units before it")
            return Axis(size)
        return Axis(units, block, group=value.group)

    def _demand_own_parameters(self, step: Step) -> None:
        if set(step.does._parameters) != {"weight", "bias"}:
            raise refusal(self._model, "its parameters are not its weight and bias", step)

    def _add(self, step: Step, weight: tuple[Axis, ...], bias: tuple[Axis, ...]) -> None:
        prefix = f"{step.name}." if step.name else ""
        for key, parameter in step.does._parameters.items():
            if parameter is None:
                continue
            if self._parameters.get(prefix + key) is not parameter or prefix + key in self._found:
                raise refusal(self._model, "layers share parameters")
            self._found[prefix + key] = weight if key == "weight" else bias

    def _oppose(self, group: int | None, step: Step, reason: str) -> None:
        if group is not None and group >= 0:
            self._obstacles.append((group, refusal(self._model, reason, step)))


def is_depthwise(layer: nn.Module) -> bool:
    """Whether a layer is a convolution of single channels."""
    return type(layer) is nn.Conv2d and layer.groups == layer.in_channels == layer.out_channels > 1
