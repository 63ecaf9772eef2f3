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

_CONVOLVE: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.Conv1d: F.conv1d,
    nn.Conv2d: F.conv2d,
    nn.Conv3d: F.conv3d,
}
#: Work on each channel by itself.
_POOLS = (
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
)
#: Work on each value by itself.
_ELEMENTWISE = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish),
    *(nn.Tanh, nn.Sigmoid, nn.Softplus, nn.Hardswish, nn.Hardtanh, nn.Identity, nn.Dropout),
)


#: Take rows; all others that are known but those take images.
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
            if isinstance(layer, _OF_ROWS):
                x = _on_rows(layer, x if are_rows else self._rows(x), weight, bias)
            else:
                x = self._on_images(layer, self._images(x) if are_rows else x, weight, bias)
            are_rows = isinstance(layer, _OF_ROWS)
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
        return x.view(len(x), self._n, -1, *x.shape[2:]).transpose(0, 1)

    def _on_images(self, layer: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """The output of a layer that takes images."""
        flat_bias = None if bias is None else bias.flatten()
        if isinstance(layer, nn.GroupNorm):
            flat_weight = None if weight is None else weight.flatten()
            return F.group_norm(x, self._n * layer.num_groups, flat_weight, flat_bias, layer.eps)
        if weight is None:  # a pooling
            pooled: Tensor = layer(x)
            return pooled
        form = layer.stride, layer.padding, layer.dilation
        return _CONVOLVE[type(layer)](x, weight.flatten(0, 1), flat_bias, *form, self._n * layer.groups)


def _is_known(layer: nn.Module) -> bool:
    kind = type(layer)
    if kind in _CONVOLVE:
        return bool(layer.padding_mode == "zeros")
    if kind is nn.Flatten:
        return bool(layer.start_dim == 1 and layer.end_dim == -1)
    if kind is nn.Unflatten:
        return bool(layer.dim == 1)
    if kind in _POOLS:
        return not getattr(layer, "return_indices", False)
    return kind in _ELEMENTWISE or kind in (nn.Linear, nn.GroupNorm)


def _on_rows(layer: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """The output of a layer that takes rows [n, b, ...]."""
    if isinstance(layer, nn.Flatten):
        return x.flatten(2)
    if weight is None:
        return x.reshape(*x.shape[:2], *layer.unflattened_size, *x.shape[3:])
    inputs, by = x.flatten(1, -2), weight.transpose(1, 2)
    scores = torch.bmm(inputs, by) if bias is None else torch.baddbmm(bias.unsqueeze(1), inputs, by)
    return scores.view(*x.shape[:-1], -1)
