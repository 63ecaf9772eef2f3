"""What a sub-model costs: bytes, seconds, and the cost of one weight of each layer.

Units: MB are 10^6 bytes, rates MB/s, times seconds. See the method page, sections 3 and 7.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedgmr_plugin.kernels.layout import ModelLayout


def fair_shares(capacity: float, demands: Sequence[float]) -> list[float]:
    """Max-min fair division of `capacity` (MB/s) among links that can use at most `demands` (MB/s)."""
    shares = [0.0] * len(demands)
    left = capacity
    for position, n in enumerate(sorted(range(len(demands)), key=lambda i: demands[i])):
        shares[n] = min(demands[n], left / (len(demands) - position))
        left -= shares[n]
    return shares


def window_seconds(
    model_megabytes: float,
    *,
    client_download: float = 20.0,
    client_upload: float = 5.0,
    server_upload: float = 10.0,
    compute_seconds: float = 0.5,
    window_slack: float = 0.5,
    aggregation_seconds: float = 0.5,
) -> float:
    """Mean length of a window, T: a full-density client's flight, then slack and aggregation."""
    transfer = model_megabytes * (1.0 / min(client_download, server_upload) + 1.0 / client_upload)
    return transfer + compute_seconds + window_slack + aggregation_seconds


def flight_seconds(
    model_megabytes: float,
    density: float,
    initial_density: float,
    *,
    client_download: float = 20.0,
    client_upload: float = 5.0,
    server_upload: float = 10.0,
    compute_seconds: float = 0.5,
) -> float:
    """Mean seconds from dispatch to arrival of a client of `initial_density` that holds `density`."""
    down = min(server_upload, client_download * initial_density)
    return (
        model_megabytes * density * (1.0 / down + 1.0 / (client_upload * initial_density)) + compute_seconds
    )


@torch.no_grad()
def macs_per_weight(model: nn.Module, layout: ModelLayout, example: Tensor) -> list[float]:
    """Multiply-accumulates per weight and sample of each prunable layer, in layout order.

    A linear weight is used once per position, a convolution's weight once per output pixel, a transposed
    convolution's once per input pixel; a module that runs twice counts twice. Layers that a forward pass of
    `example` does not reach, or that are not modules of their own, count 1.
    """
    uses: dict[str, float] = {}
    handles = []

    def count(name: str, weight: Tensor, axis: int) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, inputs: Any, output: Any) -> None:
            pixels = inputs[0] if axis == 1 else output
            units = weight.shape[0]  # input units of a transposed convolution, else output units
            if isinstance(pixels, Tensor):
                uses[name] = uses.get(name, 0.0) + pixels.numel() / max(len(example), 1) / units

        return hook

    for module_name, module in model.named_modules():
        name = f"{module_name}.weight" if module_name else "weight"
        entry = layout.by_name.get(name)
        if (
            entry is not None
            and entry.kind == "prunable"
            and not isinstance(module, (nn.Embedding, nn.EmbeddingBag))
        ):
            handles.append(module.register_forward_hook(count(name, module.weight, entry.output_axis)))
    was_training = model.training
    try:
        model.eval()(example)
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    return [uses.get(e.name, 1.0) for e in layout.of_kind("prunable")]


def cost_of_layer(layout: ModelLayout, macs: Sequence[float]) -> list[float]:
    """c_layer of the ``per_cost`` score: one weight's share of all bytes plus its share of all operations.

    Scaled so that a weight of an average layer costs 2 (dimensionless). The shares make the two kinds of
    cost comparable without a device's numbers.

    Args:
        macs: multiply-accumulates per weight of each prunable layer, as from `macs_per_weight`.
    """
    sizes = [e.size for e in layout.of_kind("prunable")]
    mean = sum(n * m for n, m in zip(sizes, macs, strict=True)) / sum(sizes)
    return [1.0 + m / mean for m in macs]
