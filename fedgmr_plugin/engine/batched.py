"""Clients of one window trained together: their sub-models are stacked, and each step is one pass over all.

Legend: n clients of a group, b samples of a batch, D coordinates of the global vector.

A GPU is idle for most of a small model's step. Stacked (``torch.func.vmap`` over the model), the step of n
clients takes as many kernel launches as that of one. Each client has its own weights, masks, momentum,
batches and norms: the result is that of one after another up to rounding, and the same bits whenever the same
clients train together on the same device. Random layers draw once for the group.

On a CPU it is slower than one client after another (benchmarks/NOTES.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.func import functional_call, vmap

from fedgmr_plugin.engine.client import LocalUpdate, cut_update
from fedgmr_plugin.engine.events import Dispatch
from fedgmr_plugin.engine.samples import Batch, Index
from fedgmr_plugin.engine.seeds import derive, isolated_rng
from fedgmr_plugin.engine.trainer import BuiltinTrainer, LocalStats
from fedgmr_plugin.engine.workbench import Workbench
from fedgmr_plugin.errors import ModelError
from fedgmr_plugin.kernels.rounding import PAYLOAD_TYPES

Stacked = dict[str, Tensor]


class Batched:
    """An `Executor` that trains a window's dispatches in groups of equal batch sizes.

    Args:
        bench: with the built-in trainer and the plain local objective.
        most: clients of a group, at most.
    """

    def __init__(self, bench: Workbench, most: int) -> None:
        self._bench, self._most = bench, most

    def begin(self, sent: Dispatch) -> None:
        """Nothing: what never arrives is never trained."""

    def finish(self, sent: Sequence[Dispatch]) -> list[LocalUpdate]:
        """See `Executor`.

        Raises:
            ModelError: GMR-211 if the model cannot be stacked.
        """
        groups: dict[tuple[float, tuple[int, ...]], list[Dispatch]] = {}
        for dispatch in sent:
            sizes = tuple(map(len, self._indices(dispatch)))
            groups.setdefault((dispatch.learning_rate_scale, sizes), []).append(dispatch)
        updates: dict[int, LocalUpdate] = {}
        for alike in groups.values():
            for start in range(0, len(alike), self._most):
                for update in self._train(alike[start : start + self._most]):
                    updates[update.dispatch] = update
        return [updates[dispatch.dispatch] for dispatch in sent]

    def _indices(self, sent: Dispatch) -> list[Index]:
        size = len(self._bench.clients.train(sent.client))
        return list(self._bench.training.plan.batches(sent.client, size, sent.count))

    def _train(self, group: Sequence[Dispatch]) -> list[LocalUpdate]:
        if len(group) == 1:
            return [self._bench.train(group[0])]
        batches = [self._read(sent) for sent in group]
        if len({tuple((x.shape, y.shape) for x, y in own) for own in batches}) > 1:  # texts, say
            return [self._bench.train(sent) for sent in group]
        return _Group(self._bench, group).train(batches)

    def _read(self, sent: Dispatch) -> list[Batch]:
        samples, plan = self._bench.clients.train(sent.client), self._bench.training.plan
        with isolated_rng(derive(plan.seed, "training", sent.client, sent.count)):
            return [samples.take(index) for index in self._indices(sent)]


class _Group:
    """The stacked sub-models of some dispatches.

    Attributes:
        trained: parameter name to x_k [n, ...]; the optimizer steps these.
        fixed: all other parameters and buffers [n, ...].
        holes: for parameters that are masked for somebody, where a client's sub-model has nothing [n, ...].
    """

    def __init__(self, bench: Workbench, group: Sequence[Dispatch]) -> None:
        bench.reset()
        self._bench, self._group, self._model = bench, group, bench.model
        self._trainer: BuiltinTrainer = bench.training.trainer  # type: ignore[assignment]  # see `Batched`
        room_D = bench.room()
        if room_D is None:
            values_S = group[0].values_S
            room_D = torch.empty(bench.layout.size, dtype=bench.layout.dtype, device=values_S.device)
        self._room_D = room_D
        tensors = dict(self._tensors())
        stacked = {name: t.new_empty((len(group), *t.shape)) for name, t in tensors.items()}
        self.holes: Stacked = {}
        for n, sent in enumerate(group):
            bench.layout.scatter(self._model, sent.ranking.place(sent.values_S, self._room_D.zero_()))
            for name, t in tensors.items():
                stacked[name][n] = t.detach()
            for name, mask in (bench.masks(sent.ranking, sent.rung) or {}).items():
                if name not in self.holes:
                    self.holes[name] = torch.zeros_like(stacked[name], dtype=torch.bool)
                torch.logical_not(mask, out=self.holes[name][n])
        wanted = {name for name, p in self._model.named_parameters() if p.requires_grad}
        self.trained = {name: t.requires_grad_() for name, t in stacked.items() if name in wanted}
        self.fixed = {name: t for name, t in stacked.items() if name not in wanted}

    def _tensors(self) -> list[tuple[str, Tensor]]:
        return [*self._model.named_parameters(), *self._model.named_buffers()]

    def train(self, batches: Sequence[Sequence[Batch]]) -> list[LocalUpdate]:
        """The updates of the group.

        Args:
            batches: each client's, of equal shapes.

        Raises:
            ModelError: GMR-211.
        """
        training, trainer, first = self._bench.training, self._trainer, self._group[0]
        leaves = list(self.trained.values())
        start = [leaf.detach().clone() for leaf in leaves]
        step = trainer.optimizer_of(leaves, training.learning_rate * first.learning_rate_scale)
        loss_n = torch.zeros(len(self._group), device=trainer.device)
        drift_n = torch.zeros(len(self._group), dtype=torch.float64, device=trainer.device)
        losses = vmap(self._loss, randomness="different")
        samples = steps = 0
        self._model.train()
        with isolated_rng(derive(training.plan.seed, "training", first.client, first.count)):
            for together in zip(*batches, strict=True):
                if steps:
                    drift_n += sum(_sum_sq(x.detach() - x_0) for x, x_0 in zip(leaves, start, strict=True))
                x, y = (torch.stack(part).to(trainer.device) for part in zip(*together, strict=True))
                for leaf in leaves:
                    leaf.grad = None
                loss = self._differentiated(losses, x, y)
                self._restrict(start)
                step()
                loss_n += loss.detach()
                samples += y.shape[1]
                steps += 1
        means = zip((loss_n / steps).tolist(), (drift_n / steps).tolist(), strict=True)
        return [self._update(n, LocalStats(steps, samples, *of_client)) for n, of_client in enumerate(means)]

    def _loss(self, trained: Stacked, fixed: Stacked, x: Tensor, y: Tensor) -> Tensor:
        """One client's loss on x [b, ...] and y [b, ...]."""
        return self._trainer.loss_of(functional_call(self._model, {**trained, **fixed}, (x,)), y)

    def _differentiated(self, losses: Callable[..., Tensor], x: Tensor, y: Tensor) -> Tensor:
        """The losses [n], after their gradients were left at the leaves."""
        try:
            loss: Tensor = losses(self.trained, self.fixed, x, y)
            loss.sum().backward()
        except torch.cuda.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, NotImplementedError) as error:
            raise ModelError(
                "GMR-211", f"{type(error).__name__}: {error}", where=type(self._model).__name__
            ) from error
        return loss

    @torch.no_grad()
    def _restrict(self, start: Sequence[Tensor]) -> None:
        """Mask the gradients, pull them back to x_0, clip them: as for one client, each client's own."""
        mu, most = self._trainer.proximal, self._trainer.gradient_clip
        for (name, x), x_0 in zip(self.trained.items(), start, strict=True):
            if x.grad is not None and name in self.holes:
                x.grad.masked_fill_(self.holes[name], 0.0)
            if mu:
                pull = mu * (x - x_0)
                x.grad = pull if x.grad is None else x.grad.add_(pull)
        if most is not None:
            grads = [x.grad for x in self.trained.values() if x.grad is not None]
            norm_n = torch.stack([_norm(grad) for grad in grads]).square().sum(0).sqrt()
            factor_n = (most / (norm_n + 1e-6)).clamp(max=1.0)
            for grad in grads:
                grad *= factor_n.view(-1, *[1] * (grad.dim() - 1))

    @torch.no_grad()
    def _update(self, n: int, stats: LocalStats) -> LocalUpdate:
        bench, sent = self._bench, self._group[n]
        for name, t in self._tensors():
            t.copy_((self.trained if name in self.trained else self.fixed)[name][n])
        x_D = bench.layout.gather(self._model, out=self._room_D)
        dtype = PAYLOAD_TYPES[bench.config.payload_dtype]
        return cut_update(sent, x_D, bench.layout, bench.config.update_form, dtype, stats)


def _norm(x: Tensor) -> Tensor:
    """Norm of each client's part [n]."""
    return x.flatten(1).norm(dim=1) if x.dim() > 1 else x.abs()


def _sum_sq(x: Tensor) -> Tensor:
    """Sum of squares of each client's part [n], in float64."""
    return x.double().square().flatten(1).sum(1) if x.dim() > 1 else x.double().square()
