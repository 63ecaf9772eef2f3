"""Masks, counts and measures the optimizer steps of a training loop that we did not write.

Legend: x_k the parameters after k steps, m the mask, K steps.

Hooks on parameters see gradients as they are accumulated; torch's global optimizer hooks see every step of
every optimizer, and act on those that hold parameters of the watched model. See the method page, section 4.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from fedgmr_plugin.engine.compact import distance_sq


class Watch:
    """Masks gradients, projects parameters and counts steps while a foreign loop trains `model`.

    A trainer may deep-copy the model and train the copy, or replace its parameters. An optimizer that holds
    none of the model's parameters, but as many of the same shapes *and values* before its first step, is
    taken to train such a copy and is treated alike.
    """

    def __init__(self, model: nn.Module, masks: Mapping[str, Tensor] | None) -> None:
        named = dict(model.named_parameters(remove_duplicate=False))
        self._masked = {id(named[name]): ~mask for name, mask in (masks or {}).items()}
        self._parameters = list(model.parameters())
        self._start = {id(p): p.detach().clone() for p in self._parameters}
        #: parameter of a copy -> parameter of the model that it was copied from
        self._original: dict[int, Tensor] = {}
        self._copies: list[Tensor] = []
        self._handles: list[Any] = []
        self._steps_of: dict[int, int] = {}
        self._drift_sum: Tensor | float = 0.0  # where the model is: nobody waits for it between steps

    def __enter__(self) -> Watch:
        for p in self._parameters:
            if id(p) in self._masked and p.requires_grad:
                self._handles.append(
                    p.register_post_accumulate_grad_hook(partial(_mask_gradient, self._mask))
                )
        self._handles.append(register_optimizer_step_pre_hook(self._before_step))
        self._handles.append(register_optimizer_step_post_hook(self._after_step))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    @property
    def steps(self) -> int:
        """K: steps of the parameter that was stepped most often (optimizers may share out the parameters)."""
        return max(self._steps_of.values(), default=0)

    @property
    def drift_sq(self) -> float | None:
        """Mean over k = 0..K-1 of ||x_k - x_0||^2; None if no step was seen."""
        return float(self._drift_sum) / self.steps if self.steps else None

    def _key(self, p: Tensor) -> int:
        """Identity of the model's parameter that `p` is, or is a copy of."""
        return id(self._original.get(id(p), p))

    def _mask(self, p: Tensor) -> Tensor | None:
        """Where `p` (of the model or of a copy) is masked, on its device; None if nowhere."""
        key = self._key(p)
        if key not in self._masked:
            return None
        if self._masked[key].device != p.device:
            self._masked[key] = self._masked[key].to(p.device)
        return self._masked[key]

    def _owned(self, optimizer: Optimizer) -> list[Tensor]:
        return [
            p
            for group in optimizer.param_groups
            for p in group["params"]
            if id(p) in self._start or id(p) in self._original
        ]

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, *_: Any) -> None:
        if not self._steps_of and not self._owned(optimizer):
            self._adopt_copy(optimizer)
        steps = self.steps
        if steps and any(self._steps_of.get(self._key(p)) == steps for p in self._owned(optimizer)):
            self._drift_sum = self._drift_sum + self._drift()  # x_k, about to make step k + 1; x_0 adds 0

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        for p in self._owned(optimizer):
            masked = self._mask(p)
            if masked is not None:
                p.masked_fill_(masked, 0)
            self._steps_of[self._key(p)] = self._steps_of.get(self._key(p), 0) + 1

    def _adopt_copy(self, optimizer: Optimizer) -> None:
        params = [p for group in optimizer.param_groups for p in group["params"]]
        originals = [p for p in self._parameters if p.requires_grad]
        if len(params) != len(originals) or not all(
            a.shape == b.shape and torch.equal(a.detach().cpu(), self._start[id(b)].cpu())
            for a, b in zip(params, originals, strict=True)
        ):
            return
        self._copies = params
        self._original = {id(a): b for a, b in zip(params, originals, strict=True)}
        for p in params:
            if self._mask(p) is not None:
                _mask_gradient(self._mask, p)
                self._handles.append(
                    p.register_post_accumulate_grad_hook(partial(_mask_gradient, self._mask))
                )

    def _drift(self) -> Tensor:
        """||x - x_0||^2 over all parameters, float64."""
        trained = self._copies or self._parameters
        for p in trained:
            if self._start[self._key(p)].device != p.device:
                self._start[self._key(p)] = self._start[self._key(p)].to(p.device)
        return distance_sq([p.detach() for p in trained], [self._start[self._key(p)] for p in trained])


def _mask_gradient(mask_of: Any, p: Tensor) -> None:
    """Zero the masked part of ``p.grad``, dense or sparse (embedding rows)."""
    masked = mask_of(p)
    if p.grad is None or masked is None:
        return
    if not p.grad.is_sparse:
        p.grad.masked_fill_(masked, 0)
        return
    grad = p.grad.coalesce()
    grad.values().masked_fill_(masked[tuple(grad.indices())], 0)  # a view of the gradient's own values
    p.grad = grad
