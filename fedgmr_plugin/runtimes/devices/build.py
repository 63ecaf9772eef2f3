"""The graph of a plain torch stack in MNN's own terms, with the operators that FedML's models have.

Only this module imports MNN.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from fedgmr_plugin.errors import HostError, ModelError
from fedgmr_plugin.kernels.chain import is_chain, layers

_KNOWN = (
    "Conv2d (no groups, zeros as padding), Linear, ReLU, LeakyReLU, ReLU6, Sigmoid, Tanh, "
    "MaxPool2d and AvgPool2d (no padding), Flatten, Softmax, Dropout, Identity"
)


def mnn() -> ModuleType:
    """The package MNN.

    Raises:
        HostError: GMR-511, it is missing or cannot be loaded.
    """
    try:
        import MNN
    except (ImportError, OSError) as error:
        raise HostError("GMR-511", f"MNN cannot be imported: {error}") from error
    return MNN


def save(model: nn.Module, input_shape: Sequence[int], path: Path) -> None:
    """Write the graph of `model` for batches of `input_shape`; its parameters are trainable there.

    Raises:
        HostError: GMR-511, MNN is missing.
        ModelError: GMR-210, a layer has no counterpart, or the shape does not fit the model.
    """
    check(model, input_shape)
    expr = mnn().expr
    x = expr.placeholder(list(input_shape), expr.NCHW)
    x.name = "input"
    for name, layer in layers(model):
        x = _LAYERS[type(layer)](_Terms(mnn(), name), layer, x)
    expr.save([_Terms(mnn(), "").rows(x)], str(path), False)  # False: keep what is trainable


def check(model: nn.Module, input_shape: Sequence[int]) -> None:
    """Refuse a stack that has no such graph; MNN itself would end the process on some.

    Raises:
        ModelError: GMR-210.
    """
    if not is_chain(model):
        raise _refusal(model, "the model is not a Sequential of torch's own layers")
    for name, layer in layers(model):
        if not _translates(layer):
            raise _refusal(model, f"layer {name} is {layer}")
    parameters = list(model.parameters())
    if any(p.dtype != torch.float32 for p in parameters):
        raise _refusal(model, "parameters are not float32")
    shape = tuple(input_shape)
    probe = copy.deepcopy(model).to("meta").eval()
    try:
        for name, layer in layers(probe):
            if isinstance(layer, nn.Linear) and len(shape) != 2:
                raise _refusal(model, f"layer {name} is Linear on an input of shape {shape}")
            if isinstance(layer, nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d) and len(shape) != 4:
                raise _refusal(model, f"layer {name} is for images on an input of shape {shape}")
            shape = tuple(layer(torch.empty(shape, device="meta")).shape)
    except (RuntimeError, ValueError, IndexError) as error:
        raise _refusal(model, f"an input of shape {tuple(input_shape)} does not fit: {error}") from error


def _translates(layer: Any) -> bool:
    kind = type(layer)
    if kind is nn.Conv2d:
        return bool(
            layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
        )
    if kind is nn.MaxPool2d:
        plain = _pair(layer.dilation) == (1, 1) and not layer.return_indices
        return plain and _pair(layer.padding) == (0, 0) and not layer.ceil_mode
    if kind is nn.AvgPool2d:
        plain = _pair(layer.padding) == (0, 0) and not layer.ceil_mode
        return plain and layer.divisor_override is None
    if kind is nn.Flatten:
        return bool((layer.start_dim, layer.end_dim) == (1, -1))
    if kind is nn.Softmax:
        return bool(layer.dim is not None and layer.dim > 0)
    return kind in _LAYERS


def _refusal(model: nn.Module, reason: str) -> ModelError:
    hint = f"A model file takes {_KNOWN}."
    return ModelError("GMR-210", reason, where=type(model).__name__, hint=hint)


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


def _xy(size: Any) -> list[int]:
    """A size of torch's, (height, width), in MNN's order."""
    return list(_pair(size))[::-1]


class _Terms:
    """MNN's expressions, for one layer called `name`.

    Attributes:
        engine: what `expr` wraps: some of its functions cast their arguments, and such are trained no more.
    """

    def __init__(self, package: ModuleType, name: str) -> None:
        self.nn, self.expr, self.engine, self.name = package.nn, package.expr, package.expr._F, name

    def trained(self, parameter: torch.Tensor, name: str, shape: Sequence[int]) -> Any:
        """A trainable tensor with the values of `parameter`."""
        values = parameter.detach().cpu().reshape(tuple(shape)).contiguous().numpy()
        found = self.expr.const(values, list(shape), self.expr.NCHW)
        found.fix_as_trainable()
        found.name = f"{self.name}.{name}" if self.name else name
        return found

    def images(self, x: Any) -> Any:
        """`x` in the memory format of convolutions."""
        return x if x.data_format == self.expr.NC4HW4 else self.expr.convert(x, self.expr.NC4HW4)

    def rows(self, x: Any) -> Any:
        """`x` in the usual memory format."""
        return x if x.data_format == self.expr.NCHW else self.expr.convert(x, self.expr.NCHW)


def _conv(t: _Terms, layer: Any, x: Any) -> Any:
    weight = t.trained(layer.weight, "weight", layer.weight.shape)
    caffe = t.expr.Padding_Mode.CAFFE  # as many zeros on both sides as said
    sizes = _xy(layer.stride), _xy(layer.padding), _xy(layer.dilation)
    if layer.bias is not None:
        bias = t.trained(layer.bias, "bias", layer.bias.shape)
        return t.expr.conv2d(t.images(x), weight, bias, *sizes, 1, caffe)
    module = t.nn.conv(
        *(layer.in_channels, layer.out_channels),
        **dict(
            zip(
                ("kernel_size", "stride", "padding", "dilation"),
                (_xy(layer.kernel_size), *sizes),
                strict=True,
            )
        ),
        bias=False,
        padding_mode=caffe,
    )
    module.load_parameters([weight])
    return module.forward(t.images(x))


def _linear(t: _Terms, layer: Any, x: Any) -> Any:
    weight = t.trained(layer.weight, "weight", layer.weight.shape)
    x = t.engine.matmul(x, weight, False, True)
    return x if layer.bias is None else x + t.trained(layer.bias, "bias", (1, layer.out_features))


def _pool(t: _Terms, layer: Any, x: Any) -> Any:
    pool = t.expr.max_pool if type(layer) is nn.MaxPool2d else t.expr.avg_pool
    return pool(t.images(x), _xy(layer.kernel_size), _xy(layer.stride))


_LAYERS: dict[type[nn.Module], Callable[[_Terms, Any, Any], Any]] = {
    nn.Conv2d: _conv,
    nn.Linear: _linear,
    nn.MaxPool2d: _pool,
    nn.AvgPool2d: _pool,
    nn.ReLU: lambda t, layer, x: t.expr.relu(x),
    nn.LeakyReLU: lambda t, layer, x: t.expr.relu(x, layer.negative_slope),
    nn.ReLU6: lambda t, layer, x: t.expr.relu6(x),
    nn.Sigmoid: lambda t, layer, x: t.engine.sigmoid(x),
    nn.Tanh: lambda t, layer, x: t.engine.tanh(x),
    nn.Flatten: lambda t, layer, x: t.expr.reshape(t.rows(x), [0, -1]),
    nn.Softmax: lambda t, layer, x: t.expr.softmax(t.rows(x), layer.dim),
    nn.Dropout: lambda t, layer, x: x,
    nn.Identity: lambda t, layer, x: x,
}
