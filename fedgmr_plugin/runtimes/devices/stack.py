"""A plain torch stack that computes what the graph of an .mnn file does.

Graphs are those that FedML's users have: one input, then one operator after the other; convolution, matrix
product and sum with trained tensors, pooling, activations, a reshape to rows, softmax. Changes of memory
format disappear. Values are taken over to the bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from fedgmr_plugin.runtimes.devices import graph as ops
from fedgmr_plugin.runtimes.devices.flatbuffer import Table
from fedgmr_plugin.runtimes.devices.graph import Graph, Operator, Tensor, stored

_VALID = 1  # padding: none
_LARGEST = 2**15  # of a stride, a kernel or a padding


class Untranslated(ValueError):
    """An operator has no counterpart."""


def stack_of(graph: Graph) -> nn.Sequential:
    """The stack of a graph's operators, in evaluation mode.

    Raises:
        Untranslated: the graph is no such chain.
        Damaged: a tensor or table of it is not there.
    """
    chain = [op for op in graph.operators if op.kind not in (ops.CONSTANT, ops.TRAINABLE)]
    if not chain or chain[0].kind != ops.INPUT:
        raise Untranslated("the graph does not start with its input")
    layers: list[nn.Module] = []
    for before, op in pairwise(chain):
        if op.inputs[:1] != before.outputs:
            raise Untranslated(f"operator {op.name!r} does not take the output of the one before it")
        tensors = [_tensor(graph, op, number) for number in op.inputs[1:]]
        for layer in _translate(op, tensors, layers[-1] if before.kind == ops.MATMUL else None):
            layers.append(layer)
    return nn.Sequential(*layers).eval()


def _tensor(graph: Graph, op: Operator, number: int) -> Tensor:
    maker = graph.makers[number]
    if maker.kind not in (ops.CONSTANT, ops.TRAINABLE):
        raise Untranslated(f"operator {op.name!r} takes the output of two others")
    return stored(maker)


def _translate(op: Operator, tensors: list[Tensor], product: Any) -> Iterator[nn.Module]:
    """The layers of one operator; none where it changes nothing, or where `product` before it takes it in."""
    if op.kind == ops.CONVERT:
        return
    if op.kind == ops.BINARY:
        _add_bias(op, tensors, product)
        return
    if op.kind == ops.CONVOLUTION:
        yield from _convolution(op, tensors)
    elif op.kind == ops.MATMUL:
        yield _linear(op, tensors)
    elif tensors:
        raise Untranslated(f"operator {op.name!r} of kind {op.kind} has {len(tensors)} tensors")
    else:
        yield _plain(op)


def _plain(op: Operator) -> nn.Module:
    """The layer of an operator without tensors."""
    if op.kind == ops.RELU:
        slope = op.options.real(0)
        return nn.LeakyReLU(slope) if slope else nn.ReLU()
    if op.kind == ops.RELU6 and (op.options.real(0), op.options.real(1, 6.0)) == (0.0, 6.0):
        return nn.ReLU6()
    if op.kind == ops.UNARY and op.options.integer(0) in _UNARY:
        return _UNARY[op.options.integer(0)]()
    if op.kind == ops.SOFTMAX:
        return nn.Softmax(op.options.integer(0))
    if op.kind == ops.POOLING:
        return _pooling(op)
    if op.kind == ops.RESHAPE and op.options.integers(0, 8) == (0, -1):
        return nn.Flatten()
    raise Untranslated(f"operator {op.name!r} of kind {op.kind} is not known, or not with these options")


_UNARY: dict[int, type[nn.Module]] = {29: nn.Sigmoid, 30: nn.Tanh}


def _pooling(op: Operator) -> nn.Module:
    options = op.options
    kind, padding = options.integer(7, "<b"), options.integer(8, "<b")
    if padding != _VALID or options.integer(2, "<B") or kind not in (0, 1):
        raise Untranslated(f"pooling {op.name!r} pads, or is global")
    kernel, stride = _pair(op, options, 4, 3), _pair(op, options, 6, 5)
    return nn.AvgPool2d(kernel, stride) if kind else nn.MaxPool2d(kernel, stride)


def _pair(op: Operator, options: Table, y: int, x: int, default: int = 0, least: int = 1) -> tuple[int, int]:
    """Two positive numbers of the slots `y` and `x`: along height and width, as torch has them."""
    found = options.integer(y, default=default), options.integer(x, default=default)
    if not least <= min(found) <= max(found) <= _LARGEST:
        raise Untranslated(f"operator {op.name!r} has sizes {found}")
    return found


def _convolution(op: Operator, tensors: list[Tensor]) -> Iterator[nn.Module]:
    options = op.options.table(0)
    stride, dilation = _pair(op, options, 5, 4, 1), _pair(op, options, 7, 6, 1)
    mode = options.integer(8, "<b")
    padding = (0, 0) if mode == _VALID else _pair(op, options, 1, 0, least=0)
    shape = tensors[0].shape if tensors else ()
    if len(shape) != 4 or len(tensors) > 2 or options.integer(9, default=1) != 1:
        raise Untranslated(f"convolution {op.name!r} has groups, or its weights are not tensors of the file")
    if _pair(op, options, 3, 2, 1) != shape[2:]:
        raise Untranslated(f"convolution {op.name!r} is of another size than its weights {shape}")
    if mode not in (0, _VALID) or options.integers(14, 8) or options.integers(15, 8):
        raise Untranslated(f"convolution {op.name!r} pads in a way that is not known")
    bias = len(tensors) == 2
    layer = nn.utils.skip_init(
        nn.Conv2d, shape[1], shape[0], shape[2:], stride, padding, dilation=dilation, bias=bias
    )
    _fill(op, layer.weight, tensors[0])
    if bias:
        _fill(op, layer.bias, tensors[1])
    yield layer
    if options.integer(12, "<B"):
        yield nn.ReLU()
    if options.integer(13, "<B"):
        yield nn.ReLU6()


def _linear(op: Operator, tensors: list[Tensor]) -> nn.Module:
    shape = tensors[0].shape if len(tensors) == 1 else ()
    if len(shape) != 2 or op.options.integer(1, "<B") or not op.options.integer(2, "<B"):
        raise Untranslated(f"product {op.name!r} is not x W^T with a tensor W of the file")
    layer = nn.utils.skip_init(nn.Linear, shape[1], shape[0], bias=False)
    _fill(op, layer.weight, tensors[0])
    return layer


def _add_bias(op: Operator, tensors: list[Tensor], product: Any) -> None:
    """Take a sum behind a matrix product into it, as its bias."""
    plain = isinstance(product, nn.Linear) and getattr(product, "bias", None) is None and len(tensors) == 1
    if not plain or op.options.integer(0):
        raise Untranslated(f"operator {op.name!r} is not the sum of a product and a tensor of the file")
    product.bias = nn.Parameter(product.weight.new_empty(product.out_features))
    _fill(op, product.bias, tensors[0])


@torch.no_grad()
def _fill(op: Operator, parameter: torch.Tensor, tensor: Tensor) -> None:
    shape = tuple(parameter.shape)
    if tensor.shape not in (shape, (1, *shape)):
        raise Untranslated(f"a tensor of {op.name!r} has shape {tensor.shape} instead of {shape}")
    parameter.copy_(torch.from_numpy(tensor.values).view(shape))
