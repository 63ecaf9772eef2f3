"""What a client's optimizer moves: whole parameters, or only the support of a sparse linear layer's weight.

Legend: S coordinates of one parameter that are in the sub-model.

A *leaf* is a tensor with a gradient that the optimizer steps. For most parameters it is the parameter itself,
its gradient's masked coordinates set to 0 before the step. The weight of a large linear layer of which few
coordinates are left has instead a leaf of its values on S: the layer computes with those alone
(`fedgmr_plugin.kernels.sparse_linear`), and gradient, momentum, norm and step are of size S. After each step
the values are written into the parameter, so that the model holds x_k whenever anybody looks; after the last
one only, where nobody can (a *private* leaf).

Both are the same step up to rounding. Which of them a layer takes depends on its size and density only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedgmr_plugin.kernels.sparse_linear import Support, available, flat_index, sparse_linear, support

#: Largest density of a weight that is trained on its support, and the fewest coordinates it must have.
#: Measured (benchmarks/NOTES.md, "Client step").
SPARSE_DENSITY = 0.25
SPARSE_SIZE = 2**17

_CHUNK = 2**17  # coordinates of a distance that are summed at a time: 1.5 MB of scratch
_BITS = {torch.float32: torch.int32, torch.float64: torch.int64}


class Masks(dict[str, Tensor]):
    """Parameter name to bool mask; remembers the supports that were asked for."""

    _supports: dict[str, tuple[Tensor, Support]]

    def __init__(self, *entries: Any) -> None:
        super().__init__(*entries)
        self._supports = {}

    def copy(self) -> Masks:
        """A dict of the same masks, with the same memory."""
        other = Masks(self)
        other._supports = self._supports
        return other

    def support(self, name: str) -> Support:
        """The support of a matrix's mask."""
        mask = self[name]
        known = self._supports.get(name)
        if known is None or known[0] is not mask:
            known = mask, support((mask.shape[0], mask.shape[1]), flat_index(mask))
            self._supports[name] = known
        return known[1]


@dataclass(frozen=True)
class Leaf:
    """One tensor that is trained.

    Attributes:
        parameter: the model's parameter.
        tensor: what the optimizer steps: `parameter`, or its values on S.
        start: `tensor` at x_0.
        keep: for a masked whole parameter, integers of its shape: all bits set inside the sub-model, none
            outside.
        where: for values on S, which coordinates they are.
        private: nobody but its layer looks at the parameter before training ends.
    """

    parameter: nn.Parameter
    tensor: Tensor
    start: Tensor
    keep: Tensor | None = None
    where: Support | None = None
    private: bool = False

    def restrict(self) -> None:
        """After backward: the gradient of `tensor` is that of the sub-model; masked coordinates have none.

        Bits are cleared, not multiplied by 0: outside the sub-model a gradient may be infinite.
        """
        grad = self.parameter.grad
        if grad is None:
            return
        if grad.is_sparse:  # an embedding's that asks for it
            grad = self.parameter.grad = grad.to_dense()
        if self.keep is not None:
            grad.view(self.keep.dtype).bitwise_and_(self.keep)
        elif self.where is not None:  # the weight was used by more than its layer
            extra_S = grad.reshape(-1).index_select(0, self.where.index_E)
            self.tensor.grad = extra_S if self.tensor.grad is None else self.tensor.grad + extra_S
            self.parameter.grad = None

    def publish(self) -> None:
        """After a step: the parameter holds what `tensor` does."""
        if self.where is not None:
            self.parameter.detach().view(-1).scatter_(0, self.where.index_E, self.tensor.detach())

    def distance_sq(self) -> Tensor:
        """||x - x_0||^2 of this leaf, summed in float64."""
        x, start = self.tensor.detach(), self.start
        if x.device.type != "cpu" or not x.is_contiguous():
            far: Tensor = torch.linalg.vector_norm(x - start, dtype=torch.float64)
            return far.square()
        total: Tensor | None = None
        for a, b in zip(x.view(-1).split(_CHUNK), start.view(-1).split(_CHUNK), strict=True):
            moved = (a - b).double()
            part = torch.dot(moved, moved)
            total = part if total is None else total + part
        return torch.zeros((), dtype=torch.float64) if total is None else total


@contextmanager
def leaves_of(
    model: nn.Module, masks: Mapping[str, Tensor] | None, *, watched: bool = True
) -> Iterator[list[Leaf]]:
    """The leaves of `model`, which holds x_0; on leaving it holds what they do, and computes as before.

    Args:
        watched: somebody looks at the model between steps.
    """
    remembered = masks if isinstance(masks, Masks) else Masks(masks or {})
    sparse = _sparse_layers(model, remembered)
    private = bool(sparse) and not watched and _is_chain(model)
    leaves = []
    layers = [layer for of_weight in sparse.values() for layer in of_weight]
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        mask = remembered.get(name)
        if parameter in sparse:
            where = remembered.support(name)
            values_S = parameter.detach().view(-1).index_select(0, where.index_E).requires_grad_()
            leaf = Leaf(parameter, values_S, values_S.detach().clone(), where=where, private=private)
            for layer in sparse[parameter]:
                _compute_on(layer, values_S, where)
        else:
            keep = None if mask is None else -mask.to(_BITS[parameter.dtype])
            leaf = Leaf(parameter, parameter, parameter.detach().clone(), keep=keep)
        leaves.append(leaf)
    try:
        yield leaves
    finally:
        for leaf in leaves:
            leaf.publish()
        for layer in layers:
            del layer.__dict__["forward"]


def drift_sq(leaves: Sequence[Leaf]) -> Tensor:
    """||x_k - x_0||^2 over all leaves, float64."""
    return torch.stack([leaf.distance_sq() for leaf in leaves]).sum()


def _sparse_layers(model: nn.Module, masks: Mapping[str, Tensor]) -> dict[Tensor, list[nn.Linear]]:
    """Weights that are trained on their support, and the layers that compute with them.

    Not those with hooks on the weight, nor of layers that are not exactly ``nn.Linear`` (subclasses and
    parametrised ones compute something else), nor anything inside a compiled model.
    """
    large = {n: m for n, m in masks.items() if m.numel() >= SPARSE_SIZE and m.dim() == 2}
    if not large or not available():
        return {}
    modules = list(model.modules())
    if any(m._compiled_call_impl is not None or hasattr(m, "_orig_mod") for m in modules):
        return {}
    weights = {
        p
        for n, p in model.named_parameters()
        if n in large
        and p.device.type == "cpu"
        and p.is_contiguous()
        and not p._backward_hooks
        and not p._post_accumulate_grad_hooks
        and torch.count_nonzero(large[n]) <= SPARSE_DENSITY * p.numel()
    }
    found: dict[Tensor, list[nn.Linear]] = {}
    for module in modules:
        if type(module) is nn.Linear and module.weight in weights and "forward" not in module.__dict__:
            found.setdefault(module.weight, []).append(module)
    return found


def _is_chain(model: nn.Module) -> bool:
    """Whether `model` is torch's own layers in sequence, without hooks: no code but theirs sees a weight."""
    return all(
        type(m).__module__.startswith("torch.nn.modules.")
        and not (m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks)
        and (type(m) is nn.Sequential or not any(True for _ in m.children()))
        for m in model.modules()
    )


def _compute_on(layer: nn.Linear, values_S: Tensor, where: Support) -> None:
    """From now on `layer` computes with `values_S` alone, wherever its input allows that."""

    def forward(x: Tensor) -> Tensor:
        plain = type(x) is Tensor and x.dtype == values_S.dtype and x.layout == torch.strided
        if plain and not torch.is_autocast_enabled("cpu"):
            return sparse_linear(x, values_S, layer.weight, layer.bias, where)
        return F.linear(x, layer.weight, layer.bias)

    layer.__dict__["forward"] = forward
