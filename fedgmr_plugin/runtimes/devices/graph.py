"""What an .mnn file holds: operators in the order they run, and the tensors that training moves.

The format is a FlatBuffers message (MNN's schema/default/MNN.fbs). It is read by `flatbuffer` and not by MNN,
whose loader ends the process on some damaged files.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from fedgmr_plugin.runtimes.devices.flatbuffer import Damaged, Table, Vector

#: MNN's numbers of the operators that are known here.
BINARY, CONSTANT, CONVOLUTION, INPUT, MATMUL, POOLING = 7, 11, 12, 34, 39, 47
RELU, RELU6, RESHAPE, SOFTMAX, UNARY, CONVERT, TRAINABLE = 69, 70, 73, 85, 101, 129, 266

_BLOB, _FLOAT = 7, 1  # the kind of an operator's table that is a tensor, and its element type
_OPERATORS, _INPUTS, _DIMENSIONS, _NAME = 2**14, 2**6, 8, 2**10  # the most of each

Values = NDArray[np.float32]


@dataclass(frozen=True)
class Operator:
    """One operator.

    Attributes:
        name: its name, for messages.
        kind: MNN's number of it.
        inputs: numbers of the tensors that it takes.
        outputs: numbers of the tensors that it makes.
        table: its entry of the file.
    """

    name: str
    kind: int
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    table: Table

    @property
    def options(self) -> Table:
        """Its own table: strides of a convolution, say."""
        return self.table.table(2)


@dataclass(frozen=True)
class Tensor:
    """A tensor that the file holds.

    Attributes:
        operator: the operator whose output it is.
        shape: its shape.
        place: where its float32 values are.
    """

    operator: Operator
    shape: tuple[int, ...]
    place: Vector

    @property
    def values(self) -> Values:
        """Its values (a copy)."""
        flat = np.frombuffer(self.operator.table.data, "<f4", self.place.count, self.place.start)
        return flat.reshape(self.shape).astype(np.float32)


@dataclass(frozen=True)
class Graph:
    """The operators of a file of bytes `data`, in its order: each stands behind those that it needs."""

    data: bytes
    operators: tuple[Operator, ...]

    @cached_property
    def makers(self) -> dict[int, Operator]:
        """Tensor number to the operator that makes it."""
        return {number: op for op in self.operators for number in op.outputs}

    @cached_property
    def trainable(self) -> bool:
        """Whether the file says which tensors are trained; a fresh one, without training, does not."""
        return any(op.kind == TRAINABLE for op in self.operators)

    @cached_property
    def parameters(self) -> tuple[Tensor, ...]:
        """The trained tensors in MNN's order: operators last to first, each one's inputs first to last.

        In a file that does not say which are trained, all floating-point constants with a dimension.
        """
        wanted = TRAINABLE if self.trainable else CONSTANT
        found: dict[int, Tensor] = {}
        for op in reversed(self.operators):
            for number in op.inputs:
                maker = self.makers.get(number)
                if maker is None or maker.kind != wanted or number in found:
                    continue
                if self.trainable or _is_float(maker):
                    tensor = stored(maker)
                    if self.trainable or tensor.shape:
                        found[number] = tensor
        if sum(4 * tensor.place.count for tensor in found.values()) > len(self.data):
            raise Damaged("tensors overlap")
        return tuple(found.values())


def parse(data: bytes) -> Graph:
    """The graph of a file's bytes.

    Raises:
        Damaged: they are none, whatever else they are.
    """
    net = Table.root(data)
    operators = tuple(_operators(net.tables(3, _OPERATORS)))
    if not operators:
        raise Damaged("the file has no operator")
    return Graph(data, operators)


def _operators(tables: list[Table]) -> Iterator[Operator]:
    made: set[int] = set()
    for table in tables:
        op = Operator(
            table.text(3, _NAME),
            table.integer(5),
            table.integers(0, _INPUTS),
            table.integers(4, _INPUTS),
            table,
        )
        if not made.issuperset(op.inputs) or not made.isdisjoint(op.outputs):
            raise Damaged(f"operator {op.name!r} takes a tensor that is not there, or makes one again")
        made.update(op.outputs)
        yield op


def _is_float(op: Operator) -> bool:
    return op.table.integer(1, "<B") == _BLOB and op.options.integer(2, default=_FLOAT) == _FLOAT


def stored(op: Operator) -> Tensor:
    """The tensor of a `CONSTANT` or `TRAINABLE` operator.

    Raises:
        Damaged: its shape and values do not agree, or it is not of float32 in this file.
    """
    if not _is_float(op):
        raise Damaged(f"tensor {op.name!r} is not float32")
    shape = op.options.integers(0, _DIMENSIONS)
    place = op.options.vector(7, 4, len(op.table.data) // 4)
    if any(n < 1 for n in shape) or math.prod(shape) != place.count:
        raise Damaged(f"tensor {op.name!r} of shape {shape} has {place.count} values")
    return Tensor(op, shape, place)
