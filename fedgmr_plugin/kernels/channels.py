"""Which axes of which parameters are the same units, found by following a model's layers.

A layer's output units are the input units of the layers that read it, and of everything that is added to its
output. Units that reach neither the model's input nor its output are *hidden*: they can be cut, everywhere at
once, and a smaller model of the same kind is left.

Plain stacks are read as they stand; other models are traced (``torch.fx``), on a copy, so that nothing that
their ``forward`` leaves behind is left in the model.
"""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fedgmr_plugin.errors import ModelError
from fedgmr_plugin.kernels.chain import is_chain, layers

_WEIGHTED = (nn.Conv2d, nn.Linear)
_IMAGE_NORMS = (nn.BatchNorm2d, nn.InstanceNorm2d)
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
    ``Flatten`` and norms of single channels without running statistics between them.

    Raises:
        ModelError: GMR-207, `model` is none.
    """
    form = [(name, p.shape) for name, p in model.named_parameters()]
    if model in _known and _known[model][0] == form:
        return _known[model][1]
    found = _Follower(model).follow()
    if not is_chain(model):  # to read a stack again costs less than to be wrong about one that was changed
        _known[model] = form, found
    return found


_known: WeakKeyDictionary[nn.Module, tuple[list[Any], Axes]] = WeakKeyDictionary()


class _Step(NamedTuple):
    """One operation: a layer, or a function of tensors.

    Attributes:
        name: of the layer or the function.
        does: the layer, the function, or a method's name; None for an input.
        inputs: numbers of the steps whose outputs it takes.
        given: its other arguments.
    """

    name: str
    does: Any
    inputs: tuple[int, ...] = ()
    given: tuple[Any, ...] = ()


class _Value(NamedTuple):
    """Output of a step: units of `group` (None: the model's input, or no tensor), with image axes or not."""

    group: int | None
    flat: bool


def _stack_steps(model: nn.Module) -> Iterator[_Step]:
    yield _Step("", None)
    for number, (name, layer) in enumerate(layers(model)):
        yield _Step(name, layer, (number,))


def _traced_steps(model: nn.Module) -> Iterator[_Step]:
    if any(
        m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks
        for m in model.modules()
    ):
        raise _refusal(model, "it has hooks")
    try:
        graph = fx.Tracer().trace(copy.deepcopy(model))
    except Exception as error:  # whatever a user's forward raises
        raise _refusal(model, f"it cannot be traced: {error}") from error
    number_of: dict[fx.Node, int] = {}
    for number, node in enumerate(graph.nodes):
        number_of[node] = number
        inputs = tuple(number_of[n] for n in node.all_input_nodes)
        given = tuple(a for a in (*node.args, *node.kwargs.values()) if not isinstance(a, fx.Node))
        if node.op == "call_module":
            yield _Step(node.target, model.get_submodule(node.target), inputs, given)
        elif node.op in ("call_function", "call_method"):
            yield _Step(getattr(node.target, "__name__", str(node.target)), node.target, inputs, given)
        else:  # an input; the output, which takes everything that leaves; a parameter or buffer by itself
            yield _Step(node.op, None, inputs)


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

    def follow(self) -> Axes:
        """The axes of the model."""
        values: list[_Value] = []
        read = _stack_steps if is_chain(self._model) else _traced_steps
        for step in read(self._model):
            values.append(self._visit(step, [values[i] for i in step.inputs]))
        if is_chain(self._model):
            self._fix(values[-1:])
        return self._result()

    def _result(self) -> Axes:
        fixed = {self._root(group) for group in self._fixed}
        for group, problem in self._obstacles:
            if self._root(group) not in fixed:
                raise problem
        for name, _ in self._model.named_buffers():
            raise _refusal(self._model, f"it has a buffer, {name}")
        for name in self._parameters:
            if name not in self._found:
                raise _refusal(
                    self._model, f"parameter {name} is of no Conv2d, Linear or norm that is called"
                )

        def final(axis: Axis) -> Axis:
            if axis.group < 0:
                return axis
            root = self._root(axis.group)
            return axis._replace(group=root, hidden=root not in fixed)

        found = {name: tuple(final(axis) for axis in of) for name, of in self._found.items()}
        if not any(axis.hidden for of in found.values() for axis in of):
            raise _refusal(self._model, "it has no hidden Conv2d or Linear layer")
        return Axes(found, {name: final(axis) for name, axis in self._norms.items()}, self._draws)

    # -- steps ----------------------------------------------------------------------------------------------

    def _visit(self, step: _Step, inputs: Sequence[_Value]) -> _Value:
        """The output of a step."""
        if step.does is None:
            self._fix(inputs)
            return _Value(None, False)
        is_layer = isinstance(step.does, nn.Module)
        if len(inputs) == 1 and type(step.does) in _WEIGHTED:
            return self._weighted(step, *inputs)
        if len(inputs) == 1 and is_layer and _is_norm(step.does, inputs[0]):
            return self._norm(step, *inputs)
        if len(inputs) == 2 and not is_layer and step.does in _ADDITIONS and not step.given:
            return self._addition(step, *inputs)
        if len(inputs) == 1 and (_same_units if is_layer else _same_units_call)(step, inputs[0]):
            self._draws |= type(step.does) in _DROPOUTS or (not is_layer and step.does in _DROPOUT_CALLS)
            return inputs[0]
        if inputs and (_flattens if is_layer else _flattens_call)(step):
            return _Value(inputs[0].group, True)
        if _asks_for_shape(step, inputs):
            return _Value(None, False)
        for value in inputs:
            self._oppose(value.group, step, "it is not known to treat units one by one")
        return inputs[0] if inputs else _Value(None, False)

    def _weighted(self, step: _Step, value: _Value) -> _Value:
        layer = step.does
        conv = type(layer) is nn.Conv2d
        depthwise = conv and layer.groups == layer.in_channels == layer.out_channels > 1
        if depthwise and value.group is not None:
            own = self._axis(step, value, layer.out_channels)
            self._add(step, (own,), (own,))
            return value
        group = self._new_group(len(layer.weight))
        if conv and value.flat:
            self._oppose(value.group, step, "it stands behind a Linear or Flatten")
        elif not conv and not value.flat:
            self._oppose(value.group, step, "it works on images: a Flatten is missing before it")
        if conv and layer.groups != 1:
            for each in (group, value.group):
                self._oppose(each, step, f"it has groups={layer.groups}")
            inputs = Axis(layer.weight.shape[1])
        else:
            inputs = self._axis(step, value, layer.weight.shape[1])
        units = Axis(len(layer.weight), group=group)
        self._add(step, (units, inputs), (units,))
        return _Value(group, not conv)

    def _norm(self, step: _Step, value: _Value) -> _Value:
        axis = self._axis(step, value, step.does.num_features)
        if step.does.running_mean is not None:
            raise _layer_refusal(
                step, self._model, "it has running statistics: give it track_running_stats=False"
            )
        if step.name in self._norms and self._norms[step.name] != axis:
            self._oppose(value.group, step, "it is called for several layers")
        self._norms[step.name] = axis
        self._add(step, (axis,), (axis,))
        return value

    def _addition(self, step: _Step, one: _Value, other: _Value) -> _Value:
        if one.group is None or other.group is None:
            self._fix((one, other))
        elif one.flat != other.flat or self._counts[one.group] != self._counts[other.group]:
            for value in (one, other):
                self._oppose(value.group, step, "what it adds has other units")
        else:
            self._parents[self._root(other.group)] = self._root(one.group)
        return one if one.group is not None else other

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

    def _axis(self, step: _Step, value: _Value, size: int) -> Axis:
        """The axis of `size` entries that an input has."""
        if value.group is None:
            return Axis(size)
        units = self._counts[value.group]
        if size % units:
            reason = f"it has {size} inputs, which {units} channels do not divide"
            self._oppose(value.group, step, reason)
            return Axis(size)
        return Axis(units, size // units, group=value.group)

    def _add(self, step: _Step, weight: tuple[Axis, ...], bias: tuple[Axis, ...]) -> None:
        prefix = f"{step.name}." if step.name else ""
        for key, parameter in step.does._parameters.items():
            if parameter is None:
                continue
            if self._parameters.get(prefix + key) is not parameter or prefix + key in self._found:
                raise _refusal(self._model, "layers share parameters")
            self._found[prefix + key] = weight if key == "weight" else bias

    def _oppose(self, group: int | None, step: _Step, reason: str) -> None:
        if group is not None:
            self._obstacles.append((group, _layer_refusal(step, self._model, reason)))


def _is_norm(layer: nn.Module, value: _Value) -> bool:
    return type(layer) is nn.BatchNorm1d if value.flat else type(layer) in _IMAGE_NORMS


def _same_units(step: _Step, value: _Value) -> bool:
    """Whether a layer without weights gives its units what it makes of each by itself."""
    pool = type(step.does) in _POOLS and not value.flat and not getattr(step.does, "return_indices", False)
    return pool or type(step.does) in _POINTWISE


def _same_units_call(step: _Step, value: _Value) -> bool:
    if step.does in _POOL_CALLS:
        return not value.flat
    by_number = step.does in {*_ADDITIONS, operator.mul, operator.truediv} and all(
        isinstance(a, int | float) for a in step.given
    )
    return by_number or step.does in _POINTWISE_CALLS or step.does in _DROPOUT_CALLS


def _flattens(step: _Step) -> bool:
    return type(step.does) is nn.Flatten and (step.does.start_dim, step.does.end_dim) == (1, -1)


def _flattens_call(step: _Step) -> bool:
    if step.does in (torch.flatten, "flatten"):
        return step.given in ((1,), (1, -1))
    if step.does in ("view", "reshape", torch.reshape):
        return step.given in ((-1,), ((-1,),))  # x.view(n, -1), where n comes from a step
    if step.does in (torch.mean, "mean"):
        return len(step.given) == 1 and sorted(_numbers(step.given[0])) in ([2, 3], [-2, -1])
    return False


def _asks_for_shape(step: _Step, inputs: Sequence[_Value]) -> bool:
    """Whether a step's output is about a tensor's form, or part of such an output."""
    if step.does is operator.getitem:
        return inputs[0].group is None
    return step.does in ("size", "dim") or (step.does is getattr and step.given == ("shape",))


def _numbers(given: Any) -> list[int]:
    return list(given) if isinstance(given, Sequence) else [given]


def _layer_refusal(step: _Step, model: nn.Module, reason: str) -> ModelError:
    kind = type(step.does).__name__ if isinstance(step.does, nn.Module) else ""
    what = f"layer {step.name} ({kind})" if kind else f"{type(model).__name__}, which calls {step.name},"
    return ModelError("GMR-207", f"{what} has no width: {reason}", where=type(model).__name__)


def _refusal(model: nn.Module, reason: str) -> ModelError:
    name = type(model).__name__
    return ModelError("GMR-207", f"{name} has no width: {reason}", where=name)
