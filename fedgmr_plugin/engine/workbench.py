"""Where one process trains clients and measures models: a scratch model, and everything but the server.

Every process that trains clients of a run has a workbench of its own. What comes off it depends on the
dispatch, the clients' data and the seed only, so it does not matter whose it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from fedgmr_plugin.config import FedGMRConfig
from fedgmr_plugin.engine.client import LocalUpdate, RecentMasks, train_dispatch
from fedgmr_plugin.engine.events import Dispatch
from fedgmr_plugin.engine.objectives import PLAIN, Context, threshold
from fedgmr_plugin.engine.samples import Batch, BatchPlan, Samples, split
from fedgmr_plugin.engine.seeds import derive, isolated_rng
from fedgmr_plugin.engine.trainer import LocalTrainer, Metrics
from fedgmr_plugin.kernels.layout import ModelLayout
from fedgmr_plugin.kernels.rounding import PAYLOAD_TYPES

#: Measures a model on batches.
Evaluator = Callable[[nn.Module, Iterable[Batch]], Metrics]


@dataclass(frozen=True)
class Clients:
    """The clients' training data, read when needed and split into training and validation.

    Attributes:
        samples: client to its samples.
        fraction: share held out for validation.
        seed: root of the seed tree.
        count: N.
    """

    samples: Callable[[int], Samples]
    fraction: float
    seed: int
    count: int
    _parts: dict[int, tuple[Samples, Samples | None]] = field(default_factory=dict, repr=False)

    def train(self, client: int) -> Samples:
        """The part that the client trains on."""
        return self._split(client)[0]

    def validation(self, client: int) -> Samples | None:
        """The part held out."""
        return self._split(client)[1]

    @property
    def anything_held_out(self) -> bool:
        """Whether any client has validation samples."""
        return self.fraction > 0 and any(self.validation(n) is not None for n in range(self.count))

    def _split(self, client: int) -> tuple[Samples, Samples | None]:
        if client not in self._parts:
            self._parts[client] = split(self.samples(client), self.fraction, self.seed, client)
        return self._parts[client]


@dataclass(frozen=True)
class Training:
    """How clients train.

    Attributes:
        trainer: makes the steps.
        plan: which batches.
        learning_rate: eta.
        classes: bool [C], the classes of a client's data; needed for `label_masks`.
    """

    trainer: LocalTrainer
    plan: BatchPlan
    learning_rate: float
    classes: Callable[[int], Tensor | None] = lambda client: None


@dataclass(frozen=True)
class HeldOut:
    """Validation data of the server's own, the same for every client, whose training data are elsewhere.

    Attributes:
        samples: None for none.
        seed: root of the seed tree.
        count: N.
    """

    samples: Samples | None
    seed: int
    count: int

    def train(self, client: int) -> Samples:
        """Not here."""
        raise RuntimeError(f"client {client} trains somewhere else")

    def validation(self, client: int) -> Samples | None:
        """What the server holds."""
        return self.samples

    @property
    def anything_held_out(self) -> bool:
        """Whether there are validation samples."""
        return self.samples is not None and len(self.samples) > 0


class Workbench:
    """A scratch model on which clients are trained and models are measured, one after another.

    Args:
        config: validated options.
        layout: map of the global vector.
        model: the scratch model; overwritten. Its modes and the buffers that are not in the layout are those
            of every training.
        clients: training and validation data.
        training: trainer, batch plan, learning rate.

    Attributes:
        masks: those of the rungs used last.
        room: lends a vector [D] that a training may overwrite, or None, if it has one.
    """

    def __init__(
        self,
        config: FedGMRConfig,
        layout: ModelLayout,
        model: nn.Module,
        clients: Clients | HeldOut,
        training: Training,
    ) -> None:
        self.config, self.layout, self.model = config, layout, model
        self.clients, self.training = clients, training
        self.fixed = {n: b.clone() for n, b in model.named_buffers() if n not in layout.by_name}
        self._modes = [module.training for module in model.modules()]
        self.masks = RecentMasks(layout)
        self.room: Callable[[], Tensor | None] = lambda: None

    def train(
        self,
        sent: Dispatch,
        on_step: Callable[[], None] | None = None,
        interrupt: Callable[[], None] | None = None,
    ) -> LocalUpdate:
        """Train one dispatch; `on_step` and `interrupt` as for `train_dispatch`.

        The model may be on another device than the dispatch, to whose the update comes back.
        """
        self.reset()
        device = self.device
        there = sent.values_S.device
        if device != there:
            sent = replace(sent, ranking=sent.ranking.to(device), values_S=sent.values_S.to(device))
        update = train_dispatch(
            sent,
            model=self.model,
            layout=self.layout,
            trainer=self.training.trainer,
            samples=self.clients.train(sent.client),
            plan=self.training.plan,
            learning_rate=self.training.learning_rate,
            form=sent.form or self.config.update_form,
            on_step=on_step,
            interrupt=interrupt,
            recent=self.masks,
            room_D=self.room() if device == there else None,
            payload_dtype=PAYLOAD_TYPES[self.config.payload_dtype],
            context=self._context if self._has_objective else None,
        )
        return update._replace(values_S=update.values_S.to(there))

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @property
    def _has_objective(self) -> bool:
        return self.config.label_masks or self.config.local_objective != "plain"

    def _context(self, sent: Dispatch, model: nn.Module, masks: RecentMasks) -> Context:
        """What the local objective of a dispatch needs to know; `model` holds x_0."""
        context = PLAIN
        if self.config.label_masks:
            context = context._replace(classes=self.training.classes(sent.client))
        if self.config.local_objective == "ordered_dropout":
            ladder = self.config.density_ladder
            densities = sent.ranking.densities[: sent.rung]
            rungs = [rung for rung, density in enumerate(densities) if density in ladder]
            narrower = [masks(sent.ranking, rung) for rung in (*rungs, sent.rung)]
            context = context._replace(narrower=narrower)
        elif self.config.local_objective == "straight_through":
            names = frozenset(e.name for e in self.layout.of_kind("prunable"))
            theta = threshold(model, masks(sent.ranking, sent.rung), names)
            context = context._replace(threshold=theta, pruned=names)
        return context

    def place(self, w_D: Tensor) -> None:
        """Put the vector `w_D` [D] into the scratch model; other buffers as they were at the start."""
        self.layout.scatter(self.model, w_D)
        self.reset()

    def measure(self, w_D: Tensor, batches: Iterable[Batch], evaluate: Evaluator | None = None) -> Metrics:
        """Metrics of the vector `w_D` on `batches`; random transforms see the same draws each time."""
        self.place(w_D)
        with isolated_rng(derive(self.clients.seed, "measure")):
            return (evaluate or self.training.trainer.evaluate)(self.model, batches)

    def reset(self) -> None:
        """The modules' modes, and the buffers that are not in the layout (integers, not persistent), as they
        were at the beginning: every training starts so."""
        for module, mode in zip(self.model.modules(), self._modes, strict=True):
            module.training = mode
        own = dict(self.model.named_buffers())
        names = [name for name in self.fixed if name in own]
        if names:
            torch._foreach_copy_([own[name] for name in names], [self.fixed[name] for name in names])
