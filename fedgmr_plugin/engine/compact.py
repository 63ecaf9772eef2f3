"""What a client's optimizer moves: whole parameters, or only the values of a thin one.

Legend: S coordinates of one parameter that are in the sub-model.

A *leaf* is a tensor with a gradient that the optimizer steps. For most parameters it is the parameter itself,
its gradient's masked coordinates set to 0 before the step. A large parameter of which few coordinates are
left has instead a leaf of its values on S: gradient, momentum, norm and step are of size S, and after each
step the values are written into the parameter. A linear layer of very few weights also computes with those
values alone (`fedgmr_plugin.kernels.sparse_linear`).

All are the same step up to rounding. Which of them a parameter takes depends on its size and density only.
The model holds x_k whenever anybody can look; a *private* leaf is written back once, after the last step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

from fedgmr_plugin.kernels.sparse_linear import Support, available, flat_index, sparse_linear, support

#: Largest densities at which a parameter is stepped on its values, and at which a linear layer computes with
#: them, and the fewest coordinates of either. Measured: benchmarks/NOTES.md, "Client step".
THIN_DENSITY = 0.4
SPARSE_DENSITY = 0.2
THIN_SIZE = 2**17

_CHUNK = 2**16  # coordinates of a large tensor that are worked on at a time: scratch that stays in the cache
_BITS = {torch.float32: torch.int32, torch.float64: torch.int64}


class Masks(dict[str, Tensor]):
    """Parameter name to bool mask; remembers the indices and supports that were asked for."""

    _known: dict[tuple[str, str], tuple[Tensor, Any]]

    def __init__(self, *entries: Any) -> None:
        super().__init__(*entries)
        self._known = {}

    def copy(self) -> Masks:
        """A dict of the same masks, with the same memory."""
        other = Masks(self)
        other._known = self._known
        return other

    def share(self, name: str) -> float:
        """Density of a mask."""
        count: int = self._remember("count", name, lambda m: int(torch.count_nonzero(m)))
        return count / max(1, self[name].numel())

    def hole(self, name: str) -> Tensor:
        """What a mask lacks, bool of its shape."""
        missing: Tensor = self._remember("hole", name, torch.logical_not)
        return missing

    def index(self, name: str) -> Tensor:
        """int64 [S]: coordinates of a mask in its flattened parameter, increasing."""
        index_S: Tensor = self._remember("index", name, flat_index)
        return index_S

    def support(self, name: str) -> Support:
        """The support of a matrix's mask."""
        index_S = self.index(name)
        found: Support = self._remember("support", name, lambda m: support((m.shape[0], m.shape[1]), index_S))
        return found

    def _remember(self, what: str, name: str, make: Callable[[Tensor], Any]) -> Any:
        mask = self[name]
        known = self._known.get((what, name))
        if known is None or known[0] is not mask:
            known = self._known[what, name] = mask, make(mask)
        return known[1]


@dataclass
class Leaf:
    """One tensor that is trained.

    Attributes:
        parameter: the model's parameter.
        tensor: what the optimizer steps: `parameter`, or its values on S.
        start: `tensor` at x_0.
        mask: for a masked whole parameter of the CPU, bool of its shape.
        hole: for one on another device, what its mask lacks, bool of its shape.
        index_S: for values on S, their coordinates in the flattened parameter, increasing.
        private: nobody but its layers looks at the parameter before training ends.
        version: of the parameter's memory, when it last held what `tensor` does.
    """

    parameter: nn.Parameter
    tensor: Tensor
    start: Tensor
    mask: Tensor | None = None
    hole: Tensor | None = None
    index_S: Tensor | None = None
    private: bool = False
    version: int = 0

    def restrict(self) -> None:
        """After backward: the gradient of `tensor` is that of the sub-model; masked coordinates have none."""
        if self.index_S is not None and self.parameter._version != self.version:
            # The model wrote into it, as an embedding of a largest norm does.
            values_S = self.parameter.detach().view(-1).index_select(0, self.index_S)
            self.tensor.detach().copy_(values_S)
        grad = self.parameter.grad
        if grad is None:
            return
        if grad.is_sparse:  # an embedding's that asks for it
            grad = self.parameter.grad = grad.to_dense()
        if self.mask is not None:
            _clear(grad, self.mask)
        elif self.hole is not None:
            grad.masked_fill_(self.hole, 0.0)
        elif self.index_S is not None:
            grad_S = grad.reshape(-1).index_select(0, self.index_S)
            # A sparse layer's own part is there already; this is of whatever else used its weight.
            self.tensor.grad = grad_S if self.tensor.grad is None else self.tensor.grad + grad_S
            self.parameter.grad = None

    def publish(self) -> None:
        """After a step: the parameter holds what `tensor` does."""
        if self.index_S is not None:
            self.parameter.detach().view(-1).scatter_(0, self.index_S, self.tensor.detach())
            self.version = self.parameter._version


@contextmanager
def leaves_of(
    model: nn.Module, masks: Mapping[str, Tensor] | None, *, watched: bool = True, whole: bool = False
) -> Iterator[list[Leaf]]:
    """The leaves of `model`, which holds x_0; on leaving it holds what they do, and computes as before.

    Args:
        watched: somebody looks at the model between steps, or it has code of its own (not `kernels.chain`).
        whole: every leaf is a whole parameter.
    """
    known = masks if isinstance(masks, Masks) else Masks(masks or {})
    thin = {
        name
        for name, parameter in model.named_parameters()
        if not whole and name in known and _is_thin(parameter) and known.share(name) <= THIN_DENSITY
    }
    layers = _sparse_layers(model, {n for n in thin if known.share(n) <= SPARSE_DENSITY})
    leaves = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if name not in thin:
            is_here = parameter.device.type == "cpu"
            mask = known.get(name) if is_here else None
            hole = known.hole(name) if name in known and not is_here else None
            leaves.append(Leaf(parameter, parameter, _scratch_of(model, name, parameter), mask, hole))
            continue
        index_S = known.index(name)
        values_S = parameter.detach().view(-1).index_select(0, index_S)
        start_S = values_S.clone()
        of_weight = layers.get(name, [])
        private = not watched and len(of_weight) == _holders(model, parameter)
        leaf = Leaf(
            parameter,
            values_S.requires_grad_(),
            start_S,
            index_S=index_S,
            private=private,
            version=parameter._version,
        )
        leaves.append(leaf)
        for layer in of_weight:
            layer.__dict__["forward"] = _OnValues(layer, leaf, known.support(name))
    unthinned = [leaf for leaf in leaves if leaf.index_S is None]
    if unthinned:
        now = [leaf.parameter.detach() for leaf in unthinned]
        torch._foreach_copy_([leaf.start for leaf in unthinned], now)
    try:
        yield leaves
    finally:
        for leaf in leaves:
            leaf.publish()
        for of_weight in layers.values():
            for layer in of_weight:
                del layer.__dict__["forward"]


#: x_0 of a model's large parameters, kept between trainings: fresh memory costs more than the copy.
_scratch: WeakKeyDictionary[nn.Module, dict[str, Tensor]] = WeakKeyDictionary()


def _scratch_of(model: nn.Module, name: str, parameter: Tensor) -> Tensor:
    """A tensor like `parameter`, with any content; large ones are the same at each call."""
    if parameter.numel() < THIN_SIZE:
        return torch.empty_like(parameter.detach())
    held = _scratch.setdefault(model, {}).get(name)
    if held is None or _form(held) != _form(parameter):
        held = _scratch[model][name] = torch.empty_like(parameter.detach())
    return held


def _form(t: Tensor) -> tuple[Any, ...]:
    return t.shape, t.stride(), t.dtype, t.device


def _clear(grad: Tensor, mask: Tensor) -> None:
    """Set `grad` to 0 where `mask` is false, whatever it is there (it may be infinite).

    Its bits are and-ed with all ones or none: a tenth of the time of filling under a mask.
    """
    bits = grad.view(_BITS[grad.dtype])
    if bits.numel() <= _CHUNK or not (bits.is_contiguous() and mask.is_contiguous()):
        bits.bitwise_and_(mask.view(torch.int8).neg())
        return
    for part, keep in zip(bits.view(-1).split(_CHUNK), mask.view(-1).split(_CHUNK), strict=True):
        part.bitwise_and_(keep.view(torch.int8).neg())


def drift_sq(leaves: Sequence[Leaf]) -> Tensor:
    """||x_k - x_0||^2 over all leaves, float64."""
    return distance_sq([leaf.tensor.detach() for leaf in leaves], [leaf.start for leaf in leaves])


def distance_sq(x: list[Tensor], start: list[Tensor]) -> Tensor:
    """sum_i ||x_i - start_i||^2, each difference in its own type, squares and their sum in float64."""
    if any(t.device.type != "cpu" for t in x):
        return distances(x, start).square().sum()
    return torch.stack([_distance_sq(a, b) for a, b in zip(x, start, strict=True)]).sum()


def distances(x: list[Tensor], start: list[Tensor]) -> Tensor:
    """||x_i - start_i|| of each pair [pairs], by as few kernels as torch has for it.

    In float64, where the device has that.
    """
    kind = torch.float32 if x[0].device.type == "mps" else torch.float64
    norms = torch._foreach_norm(torch._foreach_sub(x, start), 2, dtype=kind)
    return torch.stack([norm.to(norms[0].device) for norm in norms])


def _distance_sq(x: Tensor, start: Tensor) -> Tensor:
    """||x - start||^2, of large tensors in pieces."""
    if not x.is_contiguous() or not start.is_contiguous() or x.numel() <= _CHUNK:
        moved = (x - start).double().reshape(-1)
        return torch.dot(moved, moved)
    room, parts = x.new_empty(_CHUNK // 2, dtype=torch.float64), []
    for a, b in zip(x.view(-1).split(len(room)), start.view(-1).split(len(room)), strict=True):
        part = torch.sub(a, b, out=room[: len(a)])  # subtracted in their own type
        parts.append(torch.dot(part, part))
    return torch.stack(parts).sum()


def _is_thin(parameter: nn.Parameter) -> bool:
    """Whether a parameter may be stepped on its values: large, on the CPU, its gradient seen by nobody."""
    return (
        parameter.numel() >= THIN_SIZE
        and parameter.requires_grad
        and parameter.device.type == "cpu"
        and parameter.is_contiguous()
        and not parameter._backward_hooks
        and not parameter._post_accumulate_grad_hooks
    )


def _sparse_layers(model: nn.Module, names: Set[str]) -> dict[str, list[nn.Linear]]:
    """Those of the parameters `names` that are weights of linear layers, and the layers.

    Only layers that are exactly ``nn.Linear`` (subclasses and parametrised ones compute something else), in a
    model that is not compiled.
    """
    if not names or not available():
        return {}
    modules = list(model.modules())
    if any(m._compiled_call_impl is not None or hasattr(m, "_orig_mod") for m in modules):
        return {}
    name_of: dict[Tensor, str] = {p: n for n, p in model.named_parameters() if n in names}
    found: dict[str, list[nn.Linear]] = {}
    for module in modules:
        if type(module) is nn.Linear and module.weight in name_of and "forward" not in module.__dict__:
            found.setdefault(name_of[module.weight], []).append(module)
    return found


def _holders(model: nn.Module, parameter: nn.Parameter) -> int:
    """How many modules of `model` have `parameter`."""
    return sum(any(p is parameter for p in m._parameters.values()) for m in model.modules())


class _OnValues:
    """The ``forward`` of a linear layer that computes with the values of `leaf` where its input allows."""

    def __init__(self, layer: nn.Linear, leaf: Leaf, where: Support) -> None:
        self._layer, self._leaf, self._where = layer, leaf, where

    def __call__(self, x: Tensor) -> Tensor:
        layer, leaf = self._layer, self._leaf
        values_S, weight = leaf.tensor, layer.weight
        if weight is not leaf.parameter or weight._version != leaf.version:
            # Another weight for this call (``torch.func.functional_call``), or the model wrote into its own.
            return F.linear(x, weight, layer.bias)
        if _is_plain(x) and x.dtype == values_S.dtype:
            return sparse_linear(x, values_S, weight, layer.bias, self._where)
        flat = weight.detach().view(-1).scatter(0, self._where.index_E, values_S)
        return F.linear(x, flat.view(self._where.shape), layer.bias)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[[Tensor], Tensor]:
        """A copy of the layer computes with its own weight."""
        copied: Callable[[Tensor], Tensor] = nn.Linear.forward.__get__(copy.deepcopy(self._layer, memo))
        return copied


def _is_plain(x: Tensor) -> bool:
    """Whether `x` is nothing but numbers: no subclass, no automatic type, no other differentiation."""
    return (
        type(x) is Tensor
        and x.layout == torch.strided
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._are_functorch_transforms_active()
        and forward_ad.unpack_dual(x).tangent is None
    )
