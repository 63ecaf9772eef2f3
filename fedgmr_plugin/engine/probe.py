"""Loss and gradients on a fixed probe set: what the theory check and the ``gradient`` trigger look at.

Legend: P parameters of the global vector, N clients.

F_n is client n's mean loss on its part of the probe set, F = (1/N) sum F_n. Models are measured in
evaluation mode, so batch normalisation uses its running statistics and dropout is off.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from fedgmr_plugin.engine.samples import Batch, Samples
from fedgmr_plugin.engine.seeds import numpy_generator
from fedgmr_plugin.kernels.layout import ModelLayout


class HasLoss(Protocol):
    """A trainer whose loss can be differentiated."""

    device: torch.device

    def loss_of(self, output: Tensor, y: Tensor) -> Tensor:
        """Mean loss of a batch."""
        ...


class Gradient(NamedTuple):
    """F and its gradient: `loss` F(w), `grad_P` grad F(w)."""

    loss: float
    grad_P: Tensor


class ProbeSet(NamedTuple):
    """Fixed samples of each client: `parts` for F_n, `pairs` of disjoint batches for the noise [N]."""

    parts: tuple[Batch, ...]
    pairs: tuple[tuple[Batch, Batch] | None, ...]


def probe_set(clients: Sequence[Samples], seed: int, samples: int, batch_size: int) -> ProbeSet:
    """At most `samples` of each client's data, and two disjoint batches of at most `batch_size`."""
    parts: list[Batch] = []
    pairs: list[tuple[Batch, Batch] | None] = []
    for n, data in enumerate(clients):
        order = numpy_generator(seed, "probe", n).permutation(len(data))
        parts.append(data.take(order[:samples]))
        size = min(batch_size, len(data) // 2)
        pairs.append((data.take(order[:size]), data.take(order[size : 2 * size])) if size else None)
    return ProbeSet(tuple(parts), tuple(pairs))


class Probe:
    """Measures gradients at given vectors; overwrites `model`."""

    def __init__(self, model: nn.Module, layout: ModelLayout, trainer: HasLoss, data: ProbeSet) -> None:
        self._model, self._layout, self._trainer, self._data = model, layout, trainer, data

    def gradient(self, w_D: Tensor) -> Gradient:
        """F and grad F at w."""
        self._layout.scatter(self._model, w_D)
        total: Tensor | None = None
        loss = 0.0
        for part in self._data.parts:
            client = self._of(part)
            loss += client.loss
            total = client.grad_P if total is None else total.add_(client.grad_P)
        if total is None:
            raise ValueError("a probe set needs a client")
        return Gradient(loss / len(self._data.parts), total / len(self._data.parts))

    def client_gradient(self, client: int, w_D: Tensor) -> Tensor:
        """grad F_n at w, float64 [P]."""
        self._layout.scatter(self._model, w_D)
        return self._of(self._data.parts[client]).grad_P.to(torch.float64)

    def client_gradients(self, w_D: Tensor) -> list[Tensor]:
        """grad F_n at w of every client n, float64 [P] each."""
        self._layout.scatter(self._model, w_D)
        return [self._of(part).grad_P.to(torch.float64) for part in self._data.parts]

    def before(self, w_D: Tensor, uncovered_P: Tensor) -> tuple[Gradient, dict[str, Any]]:
        """The part of a `probe` record that is known before the merge, and the gradient for `after`."""
        here = self.gradient(w_D)
        client_sq, gap_sq = [], []
        for part in self._data.parts:
            grad_P = self._of(part).grad_P
            client_sq.append(_sq(grad_P))
            gap_sq.append(_sq(grad_P - here.grad_P))
        noise = [
            0.5 * _sq(self._of(first).grad_P - self._of(second).grad_P)
            for first, second in (pair for pair in self._data.pairs if pair is not None)
        ]
        return here, {
            "loss": here.loss,
            "grad_sq": _sq(here.grad_P),
            "grad_uncovered_sq": _sq(here.grad_P[uncovered_P]),
            "client_grad_sq": client_sq,
            "client_gap_sq": gap_sq,
            "noise_sq": sum(noise) / len(noise) if noise else None,
        }

    def after(self, here: Gradient, step_P: Tensor, w_D: Tensor) -> dict[str, Any]:
        """The rest of the record, from the merged vector and the step that led to it."""
        there = self.gradient(w_D)
        return {
            "loss_next": there.loss,
            "grad_next_sq": _sq(there.grad_P),
            "grad_dot_step": float(here.grad_P.to(torch.float64) @ step_P.to(torch.float64)),
            "grad_change_sq": _sq(there.grad_P - here.grad_P),
            "step_sq": _sq(step_P),
        }

    def _of(self, batch: Batch) -> Gradient:
        """F_n and its gradient at the vector that the model holds."""
        model, trainer = self._model.eval(), self._trainer
        model.zero_grad(set_to_none=True)
        loss = trainer.loss_of(model(batch[0].to(trainer.device)), batch[1].to(trainer.device))
        loss.backward()
        pieces = [
            (p.grad if p.grad is not None else torch.zeros_like(p)).reshape(-1) for p in model.parameters()
        ]
        model.zero_grad(set_to_none=True)
        return Gradient(float(loss.detach()), torch.cat(pieces))


def _sq(v: Tensor) -> float:
    return float(v.to(torch.float64).square().sum())
