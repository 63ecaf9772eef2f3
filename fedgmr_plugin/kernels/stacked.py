"""The scores of several models of one architecture at once, for plain stacks of layers (`kernels.chain`).

Legend: n models, b samples of each, C channels, F features.

Between layers, values are *rows* [n, b, ...], which linear layers take as products of stacked matrices, or
*images* [b, n C, ...], which convolutions take as groups: n models are as many operations as one. A layer
gets the other form only where it needs that. ``torch.func.vmap`` does the same for any model, at more
operations a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedgmr_plugin.kernels.chain import is_chain, layers

#: Layers of images, and along how many axes they work.
_CONVOLUTIONS: dict[type[nn.Module], int] = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}
_CONVOLVE: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_POOLS: dict[type[nn.Module], int] = {
    **{nn.MaxPool1d: 1, nn.AvgPool1d: 1, nn.AdaptiveAvgPool1d: 1, nn.AdaptiveMaxPool1d: 1},
    **{nn.MaxPool2d: 2, nn.AvgPool2d: 2, nn.AdaptiveAvgPool2d: 2, nn.AdaptiveMaxPool2d: 2},
    **{nn.MaxPool3d: 3, nn.AvgPool3d: 3, nn.AdaptiveAvgPool3d: 3, nn.AdaptiveMaxPool3d: 3},
}
#: Work on each value by itself.
_ELEMENTWISE = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish),
    *(nn.Tanh, nn.Sigmoid, nn.Softplus, nn.Hardswish, nn.Hardtanh, nn.Identity, nn.Dropout),
)
#: Take rows; the others take images.
_OF_ROWS = nn.Linear, nn.Flatten, nn.Unflatten


class StackedChain:
    """The scores of n models, each on samples of its own.

    Args:
        model: the architecture, and the layers' modes; its weights are not used.
        n: how many.

    Raises:
        ValueError: `fits` is false.
    """

    def __init__(self, model: nn.Module, n: int) -> None:
        if not self.fits(model):
            raise ValueError(f"{type(model).__name__} is no plain stack of known layers")
        self._layers = [layer for _, layer in layers(model)]
        self._name_of = {id(p): name for name, p in model.named_parameters()}
        self._n = n

    @staticmethod
    def fits(model: nn.Module) -> bool:
        """Whether `model` is a plain stack of layers that are known here."""
        return is_chain(model) and all(_is_known(layer) for _, layer in layers(model))

    def __call__(self, tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """Scores [n, b, ...].

        Args:
            tensors: parameter name to the models' values [n, ...].
            x: samples [n, b, ...].
        """
        are_rows = True
        for layer in self._layers:
            if isinstance(layer, _ELEMENTWISE):
                x = layer(x)
                continue
            weight, bias = (self._parameter(tensors, layer, name) for name in ("weight", "bias"))
            axes = _POOLS.get(type(layer))
            if axes is not None and x.dim() != axes + 2 + are_rows:  # no channels: an axis less
                x, are_rows = _each(layer, x if are_rows else self._rows(x)), True
            elif isinstance(layer, _OF_ROWS):
                x, are_rows = _on_rows(layer, x if are_rows else self._rows(x), weight, bias), True
            else:
                x, are_rows = self._on_images(layer, self._images(x) if are_rows else x, weight, bias), False
        return x if are_rows else self._rows(x)

    def _parameter(self, tensors: Mapping[str, Tensor], layer: nn.Module, name: str) -> Any:
        """A layer's parameter of all models; None if it has none."""
        own = layer._parameters.get(name)
        return None if own is None else tensors[self._name_of[id(own)]]

    def _images(self, x: Tensor) -> Tensor:
        """[n, b, C, ...] as [b, n C, ...]."""
        return x.transpose(0, 1).flatten(1, 2)

    def _rows(self, x: Tensor) -> Tensor:
        """[b, n C, ...] as [n, b, C, ...]."""
        return x.view(len(x), self._n, x.shape[1] // self._n, *x.shape[2:]).transpose(0, 1)

    def _on_images(self, layer: Any, x: Tensor, weight: Any, bias: Any) -> Tensor:
        """The output of a layer that takes images.

        Raises:
            ValueError: it takes others.
        """
        if type(layer) in _POOLS:
            pooled: Tensor = layer(x)
            return pooled
        axes, channels = _CONVOLUTIONS.get(type(layer)), x.shape[1] // self._n
        expected = layer.num_channels if axes is None else layer.in_channels
        if channels != expected or (axes is not None and x.dim() != axes + 2):
            shape = [len(x), channels, *x.shape[2:]]
            raise ValueError(f"{type(layer).__name__} of {expected} channels got input of shape {shape}")
        flat_bias = None if bias is None else bias.flatten()
        if axes is None:
            flat_weight = None if weight is None else weight.flatten()
            return F.group_norm(x, self._n * layer.num_groups, flat_weight, flat_bias, layer.eps)
        form = layer.stride, layer.padding, layer.dilation, self._n * layer.groups
        return _CONVOLVE[axes](x, weight.flatten(0, 1), flat_bias, *form)


def _is_known(layer: nn.Module) -> bool:
    kind = type(layer)
    for name in ("weight", "bias"):
        if getattr(layer, name, None) is not layer._parameters.get(name):
            return False  # a buffer, say
    if kind in _CONVOLUTIONS:
        return bool(layer.padding_mode == "zeros")
    if kind is nn.Flatten:
        return bool(layer.start_dim == 1 and layer.end_dim == -1)
    if kind is nn.Unflatten:
        return bool(layer.dim == 1)
    if kind in _POOLS:
        return not getattr(layer, "return_indices", False)
    return kind in _ELEMENTWISE or kind in (nn.Linear, nn.GroupNorm)


def _each(layer: nn.Module, x: Tensor) -> Tensor:
    """The output of a layer that takes samples without channels, for rows [n, b, ...]."""
    y: Tensor = layer(x.flatten(0, 1))
    return y.view(*x.shape[:2], *y.shape[1:])


def _on_rows(layer: Any, x: Tensor, weight: Any, bias: Any) -> Tensor:
    """The output of a layer that takes rows [n, b, ...]."""
    if isinstance(layer, nn.Flatten):
        return x.flatten(2)
    if isinstance(layer, nn.Unflatten):
        return x.reshape(*x.shape[:2], *layer.unflattened_size, *x.shape[3:])
    inputs, by = x.flatten(1, -2), weight.transpose(1, 2)
    scores = torch.bmm(inputs, by) if bias is None else torch.baddbmm(bias.unsqueeze(1), inputs, by)
    return scores.view(*x.shape[:-1], weight.shape[1])
