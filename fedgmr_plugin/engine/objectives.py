"""Local steps that see less of a sub-model than the client holds: ordered dropout, thresholds.

Before each step a *view* makes the parameters what the step sees, x * m_k; behind its backward pass they are
x again, and their gradients those of x. What the optimizer then does is the same for every objective.

    ordered dropout    m_k: a smaller sub-model of the same family, drawn for each step (FjORD)
    straight through   m_k: |x| >= theta; d(x m_k)/dx = m_k (1 + 2 theta |x| / (|x| + theta)^2)  (FIARSE)

The second derivative is that of the product where the step function |x| >= theta has the surrogate
2 |x| / (|x| + theta), which is 1 at the threshold. See the methods page.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

Masks = Mapping[str, Tensor]


class Context(NamedTuple):
    """What a local objective needs to know besides the sub-model.

    Attributes:
        narrower: masks by parameter name of the family's sub-models that steps may see, the client's own
            among them; None for the whole model. Empty: steps see all of the sub-model.
        threshold: theta; None where there is none.
        pruned: names of the parameters that `threshold` is about.
        classes: bool [C], the classes of the client's data; None for all.
    """

    narrower: Sequence[Masks | None] = ()
    threshold: float | None = None
    pruned: frozenset[str] = frozenset()
    classes: Tensor | None = None

    @property
    def limits_steps(self) -> bool:
        """Whether steps see less than the sub-model."""
        return bool(self.narrower) or self.threshold is not None

    def view(self, model: nn.Module) -> View:
        """The view of `model` that steps have."""
        parameters = dict(model.named_parameters())
        if self.narrower:
            return OrderedDropout(parameters, self.narrower)
        if self.threshold is not None:
            return StraightThrough({n: parameters[n] for n in self.pruned if n in parameters}, self.threshold)
        return Whole()


#: Of clients that minimise the loss on all of their sub-model.
PLAIN = Context()


class View(ABC):
    """What steps see of a model."""

    @contextmanager
    def step(self) -> Iterator[None]:
        """For a forward and a backward pass; parameters with a gradient then have that of x."""
        held = self._hide()
        yield
        self._show(held)

    @abstractmethod
    def _hide(self) -> list[_Hidden]: ...

    @torch.no_grad()
    def _show(self, held: list[_Hidden]) -> None:
        for parameter, x, factor in held:
            parameter.copy_(x)
            if parameter.grad is not None:
                grad = parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad
                parameter.grad = grad * factor


class _Hidden(NamedTuple):
    """A parameter that a step sees part of: x, and d(x m_k)/dx."""

    parameter: nn.Parameter
    x: Tensor
    factor: Tensor


class Whole(View):
    """Steps see everything."""

    def _hide(self) -> list[_Hidden]:
        return []


class OrderedDropout(View):
    """Steps see one of `narrower`, drawn uniformly from torch's global generator."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], narrower: Sequence[Masks | None]) -> None:
        self._parameters, self._narrower = parameters, narrower

    @torch.no_grad()
    def _hide(self) -> list[_Hidden]:
        drawn = self._narrower[int(torch.randint(len(self._narrower), ()))]
        held = []
        for name, mask in (drawn or {}).items():
            parameter = self._parameters[name]
            held.append(_Hidden(parameter, parameter.detach().clone(), mask.to(parameter.dtype)))
            parameter.mul_(mask)
        return held


class StraightThrough(View):
    """Steps see the weights of at least `threshold`."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], threshold: float) -> None:
        self._parameters, self._threshold = parameters, threshold

    @torch.no_grad()
    def _hide(self) -> list[_Hidden]:
        theta = self._threshold
        if theta == 0.0:
            return []
        held = []
        for parameter in self._parameters.values():
            x = parameter.detach().clone()
            size = x.abs()
            is_kept = size >= theta
            held.append(_Hidden(parameter, x, is_kept * (1.0 + 2.0 * theta * size / (size + theta).square())))
            parameter.mul_(is_kept)
        return held


@torch.no_grad()
def threshold(model: nn.Module, masks: Masks | None, names: frozenset[str]) -> float:
    """theta of a sub-model (FIARSE): the smallest |x_0| of the weights that it holds; 0 if it holds none.

    Args:
        model: holds x_0.
        masks: parameter name to bool mask, for parameters with a masked coordinate.
        names: of the parameters that are pruned.
    """
    smallest = []
    for name, parameter in model.named_parameters():
        mask = (masks or {}).get(name)
        held = parameter if mask is None else parameter[mask]
        if name in names and held.numel():
            smallest.append(float(held.abs().min()))
    return min(smallest, default=0.0)
