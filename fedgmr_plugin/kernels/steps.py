"""What a model does, step by step: the layers that its ``forward`` calls, and the functions between them.

Plain stacks are read as they stand; other models are traced (``torch.fx``), on a copy, so that nothing that
their ``forward`` leaves behind is left in the model.
"""

from __future__ import annotations

import copy
import inspect
import operator
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

from torch import fx, nn

from fedgmr_plugin.errors import ModelError
from fedgmr_plugin.kernels.chain import layers

#: Stands for the output of a step among the arguments of another one.
OUTPUT: Final = object()

_SIZES = ("in_channels", "out_channels", "groups", "in_features", "out_features", "num_features")


class Step(NamedTuple):
    """One operation: a layer, or a function of tensors.

    Attributes:
        name: of the layer or the function.
        does: the layer, the function, or a method's name; ``input`` and ``output`` of the model; None for a
            constant.
        inputs: numbers of the steps whose outputs it takes, each once.
        given: its arguments, `OUTPUT` for each of those, then pairs of keyword and argument; lists as tuples.
    """

    name: str
    does: Any
    inputs: tuple[int, ...] = ()
    given: tuple[Any, ...] = ()


def stack_steps(model: nn.Module) -> Iterator[Step]:
    """The steps of a plain stack (`kernels.chain`)."""
    yield Step("input", "input")
    last = 0
    for name, layer in layers(model):
        yield Step(name, layer, (last,), (OUTPUT,))
        last += 1
    yield Step("output", "output", (last,))


def traced_steps(model: nn.Module, training: bool) -> Iterator[Step]:
    """The steps of ``model(x)``, in training or in evaluation.

    Raises:
        ModelError: GMR-207, they are not known, or may depend on how many units layers have.
    """
    tracer = fx.Tracer()
    try:
        graph = tracer.trace(_without_sizes(model).train(training), _defaults(model))
    except Exception as error:  # whatever a user's forward raises
        reason = f"it cannot be traced where its layers' numbers of units are not known: {error}"
        raise refusal(model, reason) from error
    number_of: dict[fx.Node, int] = {}
    for number, node in enumerate(graph.nodes):
        number_of[node] = number
        inputs = tuple(number_of[n] for n in node.all_input_nodes)
        given = _plain((*node.args, *node.kwargs.items()))
        if node.op == "call_module":
            yield Step(node.target, model.get_submodule(node.target), inputs, given)
        elif node.op in ("placeholder", "output"):
            yield Step(node.op, "input" if node.op == "placeholder" else "output", inputs)
        elif node.op == "get_attr":
            value = operator.attrgetter(node.target)(tracer.root)
            if isinstance(value, nn.Parameter) or getattr(value, "requires_grad", False):
                raise refusal(model, f"its forward works with parameters itself ({node.target})")
            yield Step(node.target, None)
        elif node.target is operator.getitem and not node.users:
            yield Step(node.name, None)  # of b, c, h, w = x.shape
        else:
            yield Step(getattr(node.target, "__name__", str(node.target)), node.target, inputs, given)


def refusal(model: nn.Module, reason: str, step: Step | None = None) -> ModelError:
    """The error of a model without widths, because of a step or as a whole."""
    what = name = type(model).__name__
    if step is not None and isinstance(step.does, nn.Module):
        what = f"layer {step.name} ({type(step.does).__name__})"
    elif step is not None:
        what = f"{name}, which calls {step.name},"
    return ModelError("GMR-207", f"{what} has no width: {reason}", where=name)


def _without_sizes(model: nn.Module) -> nn.Module:
    """A copy whose layers do not state their numbers of units, which a smaller model has others of."""
    copied = copy.deepcopy(model)
    for layer in copied.modules():
        if type(layer).__module__.startswith("torch.nn."):
            for key in _SIZES:
                layer.__dict__.pop(key, None)
    return copied


def _defaults(model: nn.Module) -> dict[str, Any]:
    """The arguments of ``forward`` that ``model(x)`` does not give."""
    parameters = inspect.signature(type(model).forward).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def _plain(argument: Any) -> Any:
    if isinstance(argument, fx.Node):
        return OUTPUT
    return tuple(map(_plain, argument)) if isinstance(argument, tuple | list) else argument
