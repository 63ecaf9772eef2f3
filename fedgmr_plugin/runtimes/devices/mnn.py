"""Model files of devices (.mnn) and torch models.

Legend: P trained tensors of a file, in MNN's order.

MNN's order is that of ``MNN.nn.load_module(...).parameters``: layers last to first; of a convolution weight,
then bias; of a linear layer bias (of shape [1, outputs]), then weight. For FedML's lenet that is fc2.b,
fc2.w, fc1.b, fc1.w, conv2.w, conv2.b, conv1.w, conv1.b.

Files are read without MNN, whose loader ends the process on some damaged files: from any bytes whatever comes
an answer or a `ModelError`. Values are copied to the bit; whether they are finite is for admission to check.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from fedgmr_plugin.errors import ModelError
from fedgmr_plugin.kernels.chain import is_chain, layers
from fedgmr_plugin.runtimes.devices import build
from fedgmr_plugin.runtimes.devices.flatbuffer import Damaged
from fedgmr_plugin.runtimes.devices.graph import INPUT, TRAINABLE, Graph, Values, parse
from fedgmr_plugin.runtimes.devices.stack import Untranslated, stack_of

Shapes = Sequence[tuple[int, ...]]
MOST_BYTES = 2**30  # of a file, unless told otherwise


def read(path: Path, shapes: Shapes | None = None, *, most_bytes: int = MOST_BYTES) -> list[Values]:
    """The trained tensors of a file [P], float32.

    Args:
        path: the file; every operator and tensor of it is checked before a value is copied.
        shapes: the shapes that they must have [P]; None takes any.
        most_bytes: a longer file is refused, and not read beyond that.

    Raises:
        ModelError: GMR-208, the file is damaged; GMR-209, its tensors have other shapes.
    """
    return loads(_content(path, most_bytes), shapes, most_bytes=most_bytes, where=str(path))


def loads(
    content: bytes | bytearray | memoryview,
    shapes: Shapes | None = None,
    *,
    most_bytes: int = MOST_BYTES,
    where: str = "",
) -> list[Values]:
    """As `read`, of a file's bytes; `where` they come from is for the error."""
    graph = _graph(content, most_bytes, where)
    _compare(graph, shapes, where)
    return [tensor.values for tensor in graph.parameters]


def fill(template: Path, values: Sequence[Values], path: Path, *, most_bytes: int = MOST_BYTES) -> None:
    """Write the file `template` with other `values` [P] of the same shapes, all marked as trained.

    The graph stays as it is, operator by operator, whether this package knows them or not.

    Raises:
        ModelError: GMR-208, `template` is damaged; GMR-209, its tensors have other shapes than `values`.
    """
    content = _content(template, most_bytes)
    data = filled(content, values, most_bytes=most_bytes, where=str(template))
    _replace(path, lambda new_path: new_path.write_bytes(data))


def filled(
    template: bytes, values: Sequence[Values], *, most_bytes: int = MOST_BYTES, where: str = ""
) -> bytearray:
    """As `fill`, from the template's bytes to the file's."""
    graph = _graph(template, most_bytes, where)
    _compare(graph, [v.shape for v in values], where)
    data = bytearray(graph.data)
    for tensor, new in zip(graph.parameters, values, strict=True):
        place, kind = tensor.place, tensor.operator.table.place(5)
        data[place.start : place.start + 4 * place.count] = np.ascontiguousarray(new, "<f4").tobytes()
        if kind is not None:
            struct.pack_into("<i", data, kind, TRAINABLE)
    return data


def parameter_order(model: nn.Module) -> list[tuple[str, tuple[int, ...]]]:
    """Names of a stack's parameters and the shapes that they have in its file [P].

    Raises:
        ModelError: GMR-210, `model` is no stack.
    """
    if not is_chain(model):
        raise ModelError("GMR-210", "the model is not a Sequential of torch's own layers")
    found: list[tuple[str, tuple[int, ...]]] = []
    for name, layer in reversed(list(layers(model))):
        own = {f"{name}.{key}".lstrip("."): tuple(p.shape) for key, p in layer.named_parameters()}
        if isinstance(layer, nn.Linear):
            own = {key: (1, *shape) if len(shape) == 1 else shape for key, shape in reversed(own.items())}
        found += own.items()
    return found


@torch.no_grad()
def load_into(path: Path, model: nn.Module, *, most_bytes: int = MOST_BYTES) -> None:
    """Copy the trained tensors of a file into a stack of the same layers, by `parameter_order`.

    Raises:
        ModelError: GMR-208, the file is damaged; GMR-209, it is of another model; the model is as before.
    """
    order = parameter_order(model)
    found = read(path, [shape for _, shape in order], most_bytes=most_bytes)
    for (name, _), values in zip(order, found, strict=True):
        parameter = model.get_parameter(name)
        parameter.copy_(torch.from_numpy(values).view(parameter.shape))


def write(model: nn.Module, input_shape: Sequence[int], path: Path) -> None:
    """Write a stack as a file for devices, with trainable parameters; dropout is left out.

    Args:
        model: a ``Sequential`` of float32 layers that `build` knows.
        input_shape: of one batch, batch axis first: (1, 1, 28, 28).
        path: appears, or is replaced, when the whole file is written.

    Raises:
        HostError: GMR-511, MNN is missing.
        ModelError: GMR-210, a layer has no counterpart or the shape does not fit the model.
        OSError: there is no space, which MNN itself would end the process of.
    """
    room = 8 * sum(p.numel() for p in model.parameters()) + 2**16

    def save(new_path: Path) -> None:
        new_path.write_bytes(bytes(room))
        build.save(model, input_shape, new_path)

    _replace(path, save)


def to_torch(path: Path, *, most_bytes: int = MOST_BYTES) -> nn.Sequential:
    """A stack that computes what the graph of a file does, with its values, in evaluation mode.

    Raises:
        ModelError: GMR-208, the file is damaged; GMR-210, the graph is no chain of operators known here.
    """
    graph = _graph(_content(path, most_bytes), most_bytes, str(path))
    try:
        return stack_of(graph)
    except Untranslated as error:
        raise ModelError("GMR-210", str(error), where=str(path)) from error
    except Damaged as error:
        raise ModelError("GMR-208", str(error), where=str(path)) from error


def input_shape(path: Path, *, most_bytes: int = MOST_BYTES) -> tuple[int, ...]:
    """The shape of a batch that a file was written for.

    Raises:
        ModelError: GMR-208, the file is damaged; GMR-210, it has not one input.
    """
    graph = _graph(_content(path, most_bytes), most_bytes, str(path))
    inputs = [op for op in graph.operators if op.kind == INPUT]
    if len(inputs) != 1:
        raise ModelError("GMR-210", f"the graph has {len(inputs)} inputs", where=str(path))
    try:
        return inputs[0].options.integers(0, 8)
    except Damaged as error:
        raise ModelError("GMR-208", str(error), where=str(path)) from error


def _content(path: Path, most_bytes: int) -> bytes:
    """A file's bytes, no more than one beyond `most_bytes`."""
    with open(path, "rb") as file:
        return file.read(most_bytes + 1)


def _graph(content: bytes | bytearray | memoryview, most_bytes: int, where: str) -> Graph:
    """The checked graph of a file of at most `most_bytes`."""
    if len(content) > most_bytes:
        raise ModelError("GMR-208", f"the file is longer than {most_bytes} bytes", where=where)
    try:
        graph = parse(bytes(content))
        _ = graph.parameters
    except Damaged as error:
        raise ModelError("GMR-208", str(error), where=where) from error
    return graph


def _compare(graph: Graph, shapes: Shapes | None, where: str) -> None:
    """Refuse a file whose trained tensors are not of `shapes`."""
    found = [tensor.shape for tensor in graph.parameters]
    if shapes is None or found == [tuple(shape) for shape in shapes]:
        return
    if len(found) != len(shapes):
        raise ModelError("GMR-209", f"{len(found)} tensors instead of {len(shapes)}", where=where)
    place = next(i for i, shape in enumerate(shapes) if found[i] != tuple(shape))
    message = f"tensor {place} has shape {found[place]} instead of {tuple(shapes[place])}"
    raise ModelError("GMR-209", message, where=where)


def _replace(path: Path, make: Callable[[Path], object]) -> None:
    """Have `make` write a file beside `path`, and put it there."""
    new_path = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        make(new_path)
        new_path.replace(path)
    finally:
        new_path.unlink(missing_ok=True)
