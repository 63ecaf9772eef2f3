"""Clients of one window trained together: their sub-models are stacked, and each step is one pass over all.

Legend: n clients of a group, b samples of a batch, D coordinates of the global vector.

A GPU is idle for most of a small model's step. Stacked (`kernels.stacked`, or ``torch.func.vmap`` over a
model that is no plain stack), the step of n clients takes about as many kernel launches as that of one. Each
client has its own weights, masks, momentum, batches and norms: the result is that of one after another up to
rounding, and the same bits whenever the same clients train together on the same device, if torch's kernels
there are deterministic. Random layers draw for each client, from one seed for the group.

On a CPU it is slower than one client after another (benchmarks/NOTES.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.func import functional_call, vmap

from fedgmr_plugin.engine.client import LocalUpdate, cut_update
from fedgmr_plugin.engine.compact import distances
from fedgmr_plugin.engine.events import Dispatch
from fedgmr_plugin.engine.samples import Batch, Index, take_each
from fedgmr_plugin.engine.seeds import derive, isolated_rng
from fedgmr_plugin.engine.trainer import BuiltinTrainer, LocalStats, Misfit, shapes_of, told
from fedgmr_plugin.engine.workbench import Workbench
from fedgmr_plugin.errors import ModelError
from fedgmr_plugin.kernels.rounding import PAYLOAD_TYPES
from fedgmr_plugin.kernels.stacked import StackedChain

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
            DataError: GMR-304 if it can, and it or the loss raises.
        """
        groups: dict[tuple[float, tuple[int, ...]], list[tuple[Dispatch, list[Index]]]] = {}
        for dispatch in sent:
            indices = self._indices(dispatch)
            key = dispatch.learning_rate_scale, tuple(map(len, indices))
            groups.setdefault(key, []).append((dispatch, indices))
        updates: dict[int, LocalUpdate] = {}
        for alike in groups.values():
            for start in range(0, len(alike), self._most):
                for update in self._train(alike[start : start + self._most]):
                    updates[update.dispatch] = update
        return [updates[dispatch.dispatch] for dispatch in sent]

    def _indices(self, sent: Dispatch) -> list[Index]:
        size = len(self._bench.clients.train(sent.client))
        return list(self._bench.training.plan.batches(sent.client, size, sent.count))

    def _train(self, alike: Sequence[tuple[Dispatch, list[Index]]]) -> list[LocalUpdate]:
        group = [sent for sent, _ in alike]
        if len(group) == 1:
            return [self._bench.train(group[0])]
        batches = [self._read(*read) for read in alike]
        if len({tuple((x.shape, y.shape) for x, y in own) for own in batches}) > 1:  # texts, say
            return [self._bench.train(sent) for sent in group]
        return _Group(self._bench, group).train(batches)

    def _read(self, sent: Dispatch, indices: list[Index]) -> list[Batch]:
        samples, plan = self._bench.clients.train(sent.client), self._bench.training.plan
        with isolated_rng(derive(plan.seed, "training", sent.client, sent.count)):
            return take_each(samples, indices)


class _Group:
    """The stacked sub-models of some dispatches.

    Whatever is done to all clients or parameters is one operation, where torch has it.

    Attributes:
        trained: parameter name to x_k [n, ...]; the optimizer steps these.
        fixed: all other parameters and buffers [n, ...].
        holes: of each of `trained`, where a client's sub-model has nothing [n, ...]; None if all are whole.
    """

    def __init__(self, bench: Workbench, group: Sequence[Dispatch]) -> None:
        bench.reset()
        self._bench, self._group, self._model = bench, group, bench.model
        self._trainer: BuiltinTrainer = bench.training.trainer  # type: ignore[assignment]  # see `Batched`
        layout, values_S = bench.layout, group[0].values_S
        x_nD = values_S.new_zeros((len(group), layout.size), dtype=layout.dtype)
        for sent, x_D in zip(group, x_nD, strict=True):
            sent.ranking.place(sent.values_S, x_D)
        tensors = {**dict(self._model.named_parameters()), **dict(self._model.named_buffers())}
        stacked = {name: t.new_empty((len(group), *t.shape)) for name, t in tensors.items()}
        placed = self._by_name(x_nD)
        source = [placed.get(name, t.detach().expand_as(stacked[name])) for name, t in tensors.items()]
        torch._foreach_copy_(list(stacked.values()), source)
        wanted = {name for name, p in self._model.named_parameters() if p.requires_grad}
        self.trained = {name: t.requires_grad_() for name, t in stacked.items() if name in wanted}
        self.fixed = {name: t for name, t in stacked.items() if name not in wanted}
        self._is_mapped = not StackedChain.fits(self._model)
        model = self._model  # not of `self`: a cycle would keep the stacks until the collector comes
        #: Scores [n, b, ...] from all tensors [n, ...] and samples [n, b, ...].
        self._scores: Callable[[Stacked, Tensor], Tensor] = (
            vmap(lambda tensors, x: functional_call(model, tensors, (x,)), randomness="different")
            if self._is_mapped
            else StackedChain(model, len(group))
        )
        self.holes = self._holes() if any(len(sent.values_S) < layout.size for sent in group) else None

    def _by_name(self, t_nD: Tensor) -> Stacked:
        """Entry name to a view of `t_nD` [n, D] in the entry's shape [n, ...]."""
        return {e.name: t_nD[:, e.slice].view(-1, *e.shape) for e in self._bench.layout.entries}

    def _holes(self) -> Stacked:
        rankings = {sent.ranking.digest: sent.ranking for sent in self._group}
        if len(rankings) == 1:
            rung_nD = self._group[0].ranking.rung_D.unsqueeze(0)
        else:
            rung_nD = torch.stack([sent.ranking.rung_D for sent in self._group])
        rung_n = torch.tensor([sent.rung for sent in self._group], dtype=torch.int16, device=rung_nD.device)
        return self._by_name(rung_nD > rung_n.unsqueeze(1))

    def train(self, batches: Sequence[Sequence[Batch]]) -> list[LocalUpdate]:
        """The updates of the group.

        Args:
            batches: each client's, of equal shapes.

        Raises:
            ModelError, DataError: GMR-211, GMR-304.
        """
        training, trainer, first = self._bench.training, self._trainer, self._group[0]
        leaves = list(self.trained.values())
        start = [leaf.detach().clone() for leaf in leaves]
        step = trainer.optimizer_of(leaves, training.learning_rate * first.learning_rate_scale)
        loss_n = torch.zeros(len(self._group), device=trainer.device)
        drift_n = torch.zeros(len(self._group), dtype=torch.float64, device=trainer.device)
        samples = steps = 0
        self._model.train()
        with isolated_rng(derive(training.plan.seed, "training", first.client, first.count)):
            for together in zip(*batches, strict=True):
                if steps:
                    drift_n += _drift_sq(leaves, start)
                x, y = (torch.stack(part).to(trainer.device) for part in zip(*together, strict=True))
                for leaf in leaves:
                    leaf.grad = None
                loss = self._differentiated(x, y)
                self._restrict(start)
                step()
                loss_n += loss.detach()
                samples += y.shape[1]
                steps += 1
        if not steps:
            return self._updates([LocalStats(0, 0, None, None)] * len(self._group))
        means = zip((loss_n / steps).tolist(), (drift_n / steps).tolist(), strict=True)
        return self._updates([LocalStats(steps, samples, *of_client) for of_client in means])

    def _differentiated(self, x: Tensor, y: Tensor) -> Tensor:
        """The losses [n], after their gradients were left at the leaves."""
        tensors = {**self.trained, **self.fixed}
        try:
            with told(x, y):
                try:
                    scores = self._scores(tensors, x)
                except torch.OutOfMemoryError:
                    raise
                except (RuntimeError, ValueError, NotImplementedError) as error:
                    if self._is_mapped and self._runs_alone(tensors, x):
                        message = f"{type(error).__name__}: {error} (batch: {shapes_of(x, y)})"
                        raise ModelError("GMR-211", message, where=type(self._model).__name__) from error
                    raise
                loss = self._trainer.losses_of(scores, y)
                loss.sum().backward()
        except Misfit as misfit:
            whose = f"one of the clients {', '.join(str(sent.client) for sent in self._group)}"
            raise misfit.refusal(whose, self._model) from misfit.__cause__
        return loss

    @torch.no_grad()
    def _runs_alone(self, tensors: Stacked, x: Tensor) -> bool:
        """Whether the first client's model takes its samples by itself."""
        try:
            functional_call(self._model, {name: t[0].clone() for name, t in tensors.items()}, (x[0],))
        except Exception:  # noqa: BLE001  (whatever a user's forward raises)
            return False
        return True

    @torch.no_grad()
    def _restrict(self, start: Sequence[Tensor]) -> None:
        """Mask the gradients, pull them back to x_0, clip them: as for one client, each client's own."""
        mu, most = self._trainer.proximal, self._trainer.gradient_clip
        for (name, x), x_0 in zip(self.trained.items(), start, strict=True):
            if x.grad is not None and self.holes is not None:
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
    def _updates(self, stats: Sequence[LocalStats]) -> list[LocalUpdate]:
        bench, ended = self._bench, {**self.trained, **self.fixed}
        for x in self.trained.values():
            x.grad = None
        values_S, layout = self._group[0].values_S, bench.layout
        x_nD = values_S.new_empty((len(self._group), layout.size), dtype=layout.dtype)
        views = self._by_name(x_nD)
        torch._foreach_copy_(list(views.values()), [ended[name].detach() for name in views])
        form, dtype = bench.config.update_form, PAYLOAD_TYPES[bench.config.payload_dtype]
        return [
            cut_update(sent, x_D, layout, form, dtype, of_client)
            for sent, x_D, of_client in zip(self._group, x_nD, stats, strict=True)
        ]


def _norm(x: Tensor) -> Tensor:
    """Norm of each client's part [n]."""
    return x.flatten(1).norm(dim=1) if x.dim() > 1 else x.abs()


def _drift_sq(x: Sequence[Tensor], start: Sequence[Tensor]) -> Tensor:
    """||x_k - x_0||^2 of each client over all parameters, float64 [n]."""
    moved = [part for parameter in x for part in parameter.detach().unbind()]
    since = [part for parameter in start for part in parameter.unbind()]
    return distances(moved, since).view(len(x), -1).square().sum(0)
