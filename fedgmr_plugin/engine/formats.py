"""How a plain stack of layers computes on the CPU: the same values, in an order that is faster.

torch's max pooling, and the gradient of a convolution of few input channels, take several times longer on
images whose channels are the second axis in memory than on those where they are the last; convolutions of
many channels are a little faster the first way. And a ReLU before a max pooling works on several times as
many numbers as one after it, which gives the same output and gradients to the bit: max(relu(x)) =
relu(max(x)), and where no x of a window is positive neither has a gradient.

Values are the same up to the rounding of convolutions. Only stacks are touched whose every layer is torch's
own and does not mind (no dropout, whose draws follow memory), and whose images end in a ``Flatten``, which
gives the usual order back: no other code sees them. A user's own ``forward`` may call ``x.view(len(x), -1)``,
which fails on images whose channels are last.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from fedgmr_plugin.kernels.chain import is_chain, layers

#: Convolutions of at least this many input channels keep channels first (benchmarks/NOTES.md, "Client step").
WIDE_CHANNELS = 32

_INDIFFERENT = (nn.Identity, nn.ReLU, nn.LeakyReLU, nn.Tanh, nn.Sigmoid, nn.GELU, nn.BatchNorm2d)
Forward = Callable[[Tensor], Tensor]


@contextmanager
def fast_formats(model: nn.Module) -> Iterator[None]:
    """Inside, `model` computes the faster way if it is a plain stack; afterwards as before."""
    head = _images(model) if is_chain(model) else []
    for layer in set(head):
        if isinstance(layer, nn.Conv2d):
            wide = layer.weight.shape[1] * layer.groups >= WIDE_CHANNELS
            _replace(layer, _on(layer.forward, torch.contiguous_format if wide else torch.channels_last))
        elif isinstance(layer, nn.MaxPool2d):
            _replace(layer, _on(layer.forward, torch.channels_last))
    uses = Counter(head)
    for first, second in pairwise(head):
        once = uses[first] == uses[second] == 1
        if once and isinstance(first, nn.ReLU) and isinstance(second, nn.MaxPool2d):
            _replace(first, _same)
            _replace(second, _then_relu(second.forward))
    try:
        yield
    finally:
        for layer in head:
            layer.__dict__.pop("forward", None)


def _images(model: nn.Module) -> list[nn.Module]:
    """The layers before the first ``Flatten``, in order, with repetitions; none if some layer might mind."""
    head: list[nn.Module] = []
    stack = [layer for _, layer in layers(model)]
    for layer in stack:
        kind = type(layer)
        if kind is nn.Flatten:
            return head if layer.start_dim == 1 and not set(head) & set(stack[len(head) :]) else []
        known = kind is nn.Conv2d or (kind is nn.MaxPool2d and not layer.return_indices)
        if not known and kind not in _INDIFFERENT:
            break
        if "forward" in layer.__dict__ or any(p.device.type != "cpu" for p in layer.parameters()):
            break
        head.append(layer)
    return []


def _replace(layer: nn.Module, forward: Forward) -> None:
    layer.__dict__["forward"] = forward


def _on(compute: Forward, format_: torch.memory_format) -> Forward:
    """`compute` on images in `format_`."""

    def forward(x: Tensor) -> Tensor:
        if x.dim() == 4 and (x.stride(1) == 1) != (format_ is torch.channels_last):
            x = _Formatted.apply(x, format_)  # type: ignore[no-untyped-call]  # torch does not type it
        return compute(x)

    return forward


def _then_relu(compute: Forward) -> Forward:
    return lambda x: torch.relu(compute(x))


def _same(x: Tensor) -> Tensor:
    return x


class _Formatted(torch.autograd.Function):
    """Images in another order of axes, and their gradient in the order they came in."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, format_: torch.memory_format) -> Tensor:
        ctx.back = torch.channels_last if x.stride(1) == 1 else torch.contiguous_format
        return x.to(memory_format=format_, copy=True)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].contiguous(memory_format=ctx.back), None
