"""A client's work on one dispatch: place the sub-model, train it, cut the update.

Legend: D coordinates of the global vector, S support of the sub-model, b samples of a batch.

x_0 = m * w_s; K masked SGD steps x <- x - eta m grad f(x; batch); the update holds x_K (or x_K - x_0) on the
support of m. Masked coordinates start at 0 and have zero gradient, so neither momentum nor weight decay
moves them. See the method page, section 4.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from fedgmr_plugin.engine.compact import Leaf, Masks, drift_sq, leaves_of
from fedgmr_plugin.engine.events import Dispatch
from fedgmr_plugin.engine.formats import fast_formats
from fedgmr_plugin.engine.narrow import without_absent_units
from fedgmr_plugin.engine.objectives import PLAIN, Context
from fedgmr_plugin.engine.seeds import derive, isolated_rng, numpy_generator
from fedgmr_plugin.kernels.blocks import sum_sq
from fedgmr_plugin.kernels.chain import is_chain
from fedgmr_plugin.kernels.layout import ModelLayout
from fedgmr_plugin.kernels.masks import Ranking
from fedgmr_plugin.kernels.rounding import travelled

#: Masks are kept for the next client of their density up to this many bytes; making them is a pass over D.
_KEPT_BYTES = 2**24
#: Coordinates of a mask that are looked at first.
_PEEK = 2**12

Batch = tuple[Any, Any]
Index = NDArray[np.int64]


class Samples(Protocol):
    """Labelled samples, map style."""

    def __len__(self) -> int: ...

    def take(self, index: Index) -> Batch:
        """The samples at `index` (int64 [b]): x [b, ...], y [b, ...]."""
        ...


@dataclass(frozen=True)
class Subset:
    """The samples of `parent` at `index` (int64 [n])."""

    parent: Samples
    index: Index

    def __len__(self) -> int:
        return len(self.index)

    def take(self, index: Index) -> Batch:
        return self.parent.take(self.index[index])


@dataclass(frozen=True)
class TensorSamples:
    """Samples held as two tensors of equal length."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.x)

    def take(self, index: Index) -> Batch:
        position = torch.from_numpy(np.ascontiguousarray(index))
        return self.x[position], self.y[position]


def split(samples: Samples, fraction: float, seed: int, client: int) -> tuple[Samples, Samples | None]:
    """Hold ``int(fraction * n)`` samples out for validation: (training part, validation part or None).

    The validation part is read without random transforms where `samples` know how (`unaugmented`).
    """
    held = int(fraction * len(samples))
    if held == 0:
        return samples, None
    order = numpy_generator(seed, "split", client).permutation(len(samples))
    plain = getattr(samples, "unaugmented", None) or samples
    return Subset(samples, np.sort(order[held:])), Subset(plain, np.sort(order[:held]))


def in_batches(samples: Samples, batch_size: int) -> Iterator[Batch]:
    """All samples in order, in batches of at most `batch_size`."""
    for start in range(0, len(samples), batch_size):
        yield samples.take(np.arange(start, min(start + batch_size, len(samples))))


@dataclass(frozen=True)
class BatchPlan:
    """Which samples a client's steps see, as a function of how often it was dispatched before.

    A client walks through seeded permutations of its data, one after another across dispatches, as a
    shuffling loader would; with `epochs` each dispatch makes whole passes instead.

    Attributes:
        steps: local steps K, or None for `epochs` passes.
        shuffle: false keeps the data's order.
    """

    batch_size: int
    steps: int | None
    epochs: int
    shuffle: bool
    seed: int

    def batches(self, client: int, size: int, count: int) -> Iterator[Index]:
        """Sample indices (int64 [b]) of each batch of the client's dispatch number `count`.

        With steps, every batch is full unless the client has fewer samples than `batch_size`.
        """
        if self.steps is None:
            for epoch in range(count * self.epochs, (count + 1) * self.epochs):
                order = self._order(client, size, epoch)
                for start in range(0, size, self.batch_size):
                    yield order[start : start + self.batch_size]
            return
        width = min(self.batch_size, size)
        position = count * self.steps * width
        orders: dict[int, Index] = {}
        for _ in range(self.steps):
            epochs = range(position // size, (position + width - 1) // size + 1)
            orders = {e: orders[e] if e in orders else self._order(client, size, e) for e in epochs}
            joined = np.concatenate([orders[e] for e in epochs])
            offset = position - epochs[0] * size
            yield joined[offset : offset + width]
            position += width

    def _order(self, client: int, size: int, epoch: int) -> Index:
        if not self.shuffle:
            return np.arange(size)
        return numpy_generator(self.seed, "batches", client, epoch).permutation(size)


class LocalStats(NamedTuple):
    """What a local training run reports.

    Attributes:
        steps: optimizer steps made.
        samples: samples processed.
        train_loss: mean loss over the steps.
        drift_sq: mean over k = 0..K-1 of ||x_k - x_0||^2 over parameters.
    """

    steps: int
    samples: int
    train_loss: float | None
    drift_sq: float | None


class Metrics(NamedTuple):
    """Measured on a set of samples; None where the trainer does not say."""

    accuracy: float | None
    loss: float | None
    samples: int
    extra: Mapping[str, float] = MappingProxyType({})


class LocalTrainer(Protocol):
    """How a client trains and how a model is measured."""

    def train(
        self,
        model: nn.Module,
        batches: Sequence[Batch],
        masks: dict[str, Tensor] | None,
        *,
        learning_rate: float,
        client: int,
        context: Context = PLAIN,
    ) -> LocalStats:
        """Train `model` in place; on return masked coordinates are exactly 0.

        Args:
            model: holds x_0.
            masks: parameter name to bool mask of its shape, for parameters with a masked coordinate; None at
                density 1.
            context: of the local objective; only the built-in trainer has others than the plain one.
        """
        ...

    def evaluate(self, model: nn.Module, batches: Iterable[Batch]) -> Metrics:
        """Measure `model` on `batches`."""
        ...


@dataclass(frozen=True)
class BuiltinTrainer:
    """SGD or Adam on masked gradients, with cross-entropy or binary cross-entropy.

    Attributes:
        loss: ``bce`` takes one-hot labels, mean over classes and samples.
        optimizer: ``sgd``, whose weight decay adds wd * w to the gradient, or ``adam`` (AMSGrad, as FedML's).
        gradient_clip: largest norm of the masked gradient, applied after backward; None turns it off.
        top_k: highest scores among which a label counts as found.
        proximal: mu of the term (mu / 2) ||x - x_0||^2, which is not part of the loss that is reported.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    loss: Literal["cross_entropy", "bce"] = "cross_entropy"
    optimizer: Literal["sgd", "adam"] = "sgd"
    momentum: float = 0.0
    weight_decay: float = 0.0
    gradient_clip: float | None = None
    proximal: float = 0.0
    top_k: int = 1

    def train(
        self,
        model: nn.Module,
        batches: Sequence[Batch],
        masks: dict[str, Tensor] | None,
        *,
        learning_rate: float,
        client: int,
        context: Context = PLAIN,
    ) -> LocalStats:
        model.train()
        if isinstance(batches, BatchList) and batches.watched:
            return self._steps(model, batches, masks, context, learning_rate, watched=True)
        with without_absent_units(model, masks, context) as (own_masks, own_context):
            watched = not is_chain(model)
            return self._steps(model, batches, own_masks, own_context, learning_rate, watched=watched)

    def _steps(
        self,
        model: nn.Module,
        batches: Sequence[Batch],
        masks: Mapping[str, Tensor] | None,
        context: Context,
        learning_rate: float,
        *,
        watched: bool,
    ) -> LocalStats:
        """`train` on all of `model`; whether it is `watched` as for `leaves_of`."""
        view, limited = context.view(model), context.limits_steps
        loss_sum = torch.zeros((), device=self.device)
        drift = torch.zeros((), dtype=torch.float64, device=self.device)
        samples = steps = 0
        with fast_formats(model), leaves_of(model, masks, watched=watched, whole=limited) as leaves:
            step = self.optimizer_of([leaf.tensor for leaf in leaves], learning_rate)
            for x, y in batches:
                if steps:
                    drift += drift_sq(leaves)
                x, y = x.to(self.device), y.to(self.device)
                for leaf in leaves:
                    leaf.parameter.grad = leaf.tensor.grad = None
                with view.step():
                    loss = self.loss_of(_scores(model(x), context.classes), y)
                    loss.backward()
                for leaf in leaves:
                    leaf.restrict()
                    if self.proximal:
                        _pull_back(leaf, self.proximal)
                if self.gradient_clip is not None:
                    torch.nn.utils.clip_grad_norm_([leaf.tensor for leaf in leaves], self.gradient_clip)
                step()
                for leaf in leaves:
                    if not leaf.private:
                        leaf.publish()
                loss_sum += loss.detach()
                samples += len(y)
                steps += 1
        mean_loss = float(loss_sum) / steps if steps else None
        return LocalStats(steps, samples, mean_loss, float(drift) / steps if steps else None)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, batches: Iterable[Batch]) -> Metrics:
        model.eval()
        correct = total = positions = 0
        loss_sum = 0.0
        with fast_formats(model):
            for x, y in batches:
                x, y = x.to(self.device), y.to(self.device)
                output, is_labelled = model(x), y >= 0  # other targets, such as a text's filling, are none
                labels = int(is_labelled.sum())
                if labels == 0:
                    continue
                loss_sum += float(self.loss_of(output, y)) * labels
                correct += self._found(output, y)
                positions += labels
                total += len(y)
        if total == 0:
            return Metrics(None, None, 0)
        return Metrics(correct / positions, loss_sum / positions, total)

    def _found(self, output: Tensor, y: Tensor) -> int:
        """How many labels are among the highest scores."""
        if self.top_k == 1:
            return int((output.argmax(dim=1) == y).sum())
        highest = output.topk(min(self.top_k, output.shape[1]), dim=1).indices
        return int((highest == y.unsqueeze(1)).sum())

    def loss_of(self, output: Tensor, y: Tensor) -> Tensor:
        """Mean loss of `output` [b, classes, ...] for labels `y` [b, ...]."""
        y = y.long()
        if self.loss == "cross_entropy":
            return F.cross_entropy(output, y)
        one_hot = F.one_hot(y, output.shape[1]).movedim(-1, 1).to(output.dtype)
        return F.binary_cross_entropy_with_logits(output, one_hot)

    def optimizer_of(self, tensors: list[Tensor], learning_rate: float) -> Callable[[], object]:
        """One step of the optimizer on the gradients of `tensors`."""
        if self.optimizer == "sgd":
            return SGD(tensors, learning_rate, self.momentum, self.weight_decay).step
        adam = torch.optim.Adam(tensors, lr=learning_rate, weight_decay=self.weight_decay, amsgrad=True)
        return adam.step


def _scores(output: Tensor, classes: Tensor | None) -> Tensor:
    """Scores [b, C, ...] that a loss is to see: those of classes not in `classes` (bool [C]) are 0."""
    if classes is None:
        return output
    is_known_C = classes.to(output.device).view(-1, *[1] * (output.dim() - 2))
    return output.masked_fill(~is_known_C, 0.0)


def _pull_back(leaf: Leaf, proximal: float) -> None:
    """Add the gradient of (mu / 2) ||x - x_0||^2 to that of a leaf."""
    x, grad = leaf.tensor.detach(), leaf.tensor.grad
    pull = proximal * (x - leaf.start)
    leaf.tensor.grad = pull if grad is None else grad.add_(pull)


class SGD:
    """v <- mu v + (g + wd x), x <- x - eta v; v starts at the first gradient.

    The operations of ``torch.optim.SGD`` in its order, to the bit, without its cost per call: a small model's
    step is as short as that.
    """

    def __init__(
        self, tensors: Sequence[Tensor], learning_rate: float, momentum: float, weight_decay: float
    ) -> None:
        self._tensors, self._rate = tensors, learning_rate
        self._momentum, self._weight_decay = momentum, weight_decay
        self._velocity: dict[int, Tensor] = {}

    @torch.no_grad()
    def step(self) -> None:
        """Move every tensor that has a gradient."""
        for i, x in enumerate(self._tensors):
            grad = x.grad
            if grad is None:
                continue
            if self._weight_decay:
                grad = grad.add(x, alpha=self._weight_decay)
            if self._momentum:
                if i in self._velocity:
                    self._velocity[i].mul_(self._momentum).add_(grad)
                else:
                    self._velocity[i] = grad.detach().clone()
                grad = self._velocity[i]
            x.add_(grad, alpha=-self._rate)


class LocalUpdate(NamedTuple):
    """A trained dispatch: `values_S` and `change_sq` as in `fedgmr_plugin.engine.events.UploadArrived`."""

    dispatch: int
    client: int
    values_S: Tensor
    change_sq: float
    stats: LocalStats


def train_dispatch(
    sent: Dispatch,
    *,
    model: nn.Module,
    layout: ModelLayout,
    trainer: LocalTrainer,
    samples: Samples,
    plan: BatchPlan,
    learning_rate: float,
    form: Literal["delta", "replacement"],
    on_step: Callable[[], None] | None = None,
    interrupt: Callable[[], None] | None = None,
    recent: RecentMasks | None = None,
    room_D: Tensor | None = None,
    payload_dtype: torch.dtype | None = None,
    context: Callable[[Dispatch, nn.Module, RecentMasks], Context] | None = None,
) -> LocalUpdate:
    """Carry out one dispatch on `model`, whose content is of no use afterwards.

    `on_step` is called before each batch is read; with the built-in trainer `model` then holds x_k.
    `interrupt` is called then, too, and does not look at the model; what it raises ends the training.
    `recent` shares masks among calls. `room_D` is a vector [D] to be overwritten, instead of a new one.
    `payload_dtype` is the type in which the update travels. `context` makes that of the local objective
    from a model that holds x_0; the objective is the plain one without it.

    The result depends on `sent`, the client's samples, the plan and the seed only: all global random
    generators are seeded for this dispatch and restored afterwards.
    """
    if room_D is None:
        x_D = torch.zeros(layout.size, dtype=layout.dtype, device=sent.values_S.device)
    else:
        x_D = room_D if len(sent.values_S) == layout.size else room_D.zero_()
    sent.ranking.place(sent.values_S, x_D)
    recent = recent or RecentMasks(layout)
    batches = BatchList(
        samples, list(plan.batches(sent.client, len(samples), sent.count)), on_step, interrupt
    )
    with layout.placed(model, x_D):
        masks = recent(sent.ranking, sent.rung)
        beside = {} if context is None else {"context": context(sent, model, recent)}
        with isolated_rng(derive(plan.seed, "training", sent.client, sent.count)):
            stats = trainer.train(
                model,
                batches,
                masks,
                learning_rate=learning_rate * sent.learning_rate_scale,
                client=sent.client,
                **beside,
            )
    return cut_update(sent, x_D, layout, form, payload_dtype, stats)


def cut_update(
    sent: Dispatch,
    x_D: Tensor,
    layout: ModelLayout,
    form: Literal["delta", "replacement"],
    payload_dtype: torch.dtype | None,
    stats: LocalStats,
) -> LocalUpdate:
    """The update of a dispatch whose training ended at x_K (method page, section 4).

    Args:
        x_D: x_K in the layout's order [D].
        form: whether parameters travel as x_K - x_0 or as x_K; buffers always travel as they are.
        payload_dtype: type in which the update travels; None is the model's own.
    """
    values_S = sent.ranking.cut(x_D, sent.rung)
    stop = sent.ranking.ends[0]
    first_buffer = stop - (layout.size - layout.parameters)
    if form == "delta":
        buffers = values_S[first_buffer:stop].clone()
        values_S -= sent.values_S
        values_S[first_buffer:stop] = buffers
    values_S = travelled(values_S, payload_dtype)
    change_sq = sum(
        sum_sq(values_S[part], None if form == "delta" else sent.values_S[part])
        for part in (slice(0, first_buffer), slice(stop, None))
    )
    return LocalUpdate(sent.dispatch, sent.client, values_S, change_sq, stats)


class BatchList(Sequence[Batch]):
    """Batches that are read when asked for, in order or by position."""

    def __init__(
        self,
        samples: Samples,
        indices: list[Index],
        on_read: Callable[[], None] | None = None,
        interrupt: Callable[[], None] | None = None,
    ) -> None:
        self._samples, self._indices = samples, indices
        self._on_read, self._interrupt = on_read, interrupt

    @property
    def watched(self) -> bool:
        """Whether somebody who looks at the model is called before each batch is read."""
        return self._on_read is not None

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, position: Any) -> Any:
        if isinstance(position, slice):
            return BatchList(self._samples, self._indices[position], self._on_read, self._interrupt)
        index = self._indices[position]
        for call in (self._interrupt, self._on_read):
            if call is not None:
                call()
        return self._samples.take(index)


def parameter_masks(layout: ModelLayout, mask_D: Tensor) -> dict[str, Tensor] | None:
    """bool mask of each parameter that has a masked coordinate; None if there is none."""
    masks = Masks(
        (e.name, mask_D[e.slice].view(e.shape))
        for e in layout.entries
        if e.kind != "buffer" and not _is_full(mask_D[e.slice])
    )
    return masks or None


def _is_full(mask: Tensor) -> bool:
    """Whether a flat mask holds everything; one that does not has a hole near its beginning, mostly."""
    return bool(mask[:_PEEK].all()) and bool(mask[_PEEK:].all())


class RecentMasks:
    """`parameter_masks` of the rungs used last: clients of one density share the work.

    Kept are up to eight of one layout's, fewer of a large one (`_KEPT_BYTES`), at least the last.
    """

    def __init__(self, layout: ModelLayout) -> None:
        self._layout, self._most = layout, min(max(_KEPT_BYTES // layout.size, 1), 8)
        self._known: OrderedDict[tuple[str, int], dict[str, Tensor] | None] = OrderedDict()

    def __call__(self, ranking: Ranking, rung: int) -> dict[str, Tensor] | None:
        """The masks of a rung; the dict is the caller's own."""
        if ranking.ends[rung] == self._layout.size:
            return None
        key = ranking.digest, rung
        if key not in self._known:
            while len(self._known) >= self._most:
                self._known.popitem(last=False)
            self._known[key] = parameter_masks(self._layout, ranking.mask(rung))
        self._known.move_to_end(key)
        masks = self._known[key]
        return None if masks is None else masks.copy()
