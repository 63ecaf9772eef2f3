"""How a client trains: masked steps of an optimizer on its batches; and how a model is measured.

Masked coordinates start at 0 and have zero gradient, so neither momentum nor weight decay moves them. See the
method page, section 4.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedgmr_plugin.engine.compact import Leaf, drift_sq, leaves_of
from fedgmr_plugin.engine.formats import fast_formats
from fedgmr_plugin.engine.narrow import without_absent_units
from fedgmr_plugin.engine.objectives import PLAIN, Context
from fedgmr_plugin.engine.samples import Batch, BatchList
from fedgmr_plugin.errors import DataError, FedGMRError
from fedgmr_plugin.kernels.chain import is_chain

#: Labels that cross-entropy leaves out.
_NO_LABEL = -100


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
        """As `LocalTrainer.train`.

        Raises:
            DataError: GMR-304 if the model or the loss raises (its exception is the cause).
        """
        model.train()
        try:
            if isinstance(batches, BatchList) and batches.watched:
                return self._steps(model, batches, masks, context, learning_rate, watched=True)
            with without_absent_units(model, masks, context) as (own_masks, own_context):
                watched = not is_chain(model)
                return self._steps(model, batches, own_masks, own_context, learning_rate, watched=watched)
        except Misfit as misfit:
            raise misfit.refusal(f"client={client}", model) from misfit.__cause__

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
                with told(x, y), view.step():
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
        if not steps:
            return LocalStats(0, 0, None, None)
        mean_loss, mean_drift = (torch.stack([loss_sum.double(), drift]) / steps).tolist()
        return LocalStats(steps, samples, mean_loss, mean_drift)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, batches: Iterable[Batch]) -> Metrics:
        model.eval()
        total = 0
        losses, found = [], []  # on the device, where nobody waits for them between batches
        labelled = []
        with fast_formats(model):
            for x, y in batches:
                x, y = x.to(self.device), y.to(self.device)
                output, is_labelled = model(x), y >= 0  # other targets, such as a text's filling, are none
                labels = int(is_labelled.sum())
                if labels == 0:
                    continue
                losses.append(self.loss_of(output, y))
                found.append(self._found(output, y))
                labelled.append(labels)
                total += len(y)
        if total == 0:
            return Metrics(None, None, 0)
        loss_sum = sum(loss * n for loss, n in zip(torch.stack(losses).tolist(), labelled, strict=True))
        correct = int(torch.stack(found).sum())
        return Metrics(correct / sum(labelled), loss_sum / sum(labelled), total)

    def _found(self, output: Tensor, y: Tensor) -> Tensor:
        """How many labels y [b, ...] are among the highest scores of `output` [b, classes, ...]; int64 []."""
        if self.top_k == 1:
            return (output.argmax(dim=1) == y).sum()
        highest = output.topk(min(self.top_k, output.shape[1]), dim=1).indices
        return (highest == y.unsqueeze(1)).sum()

    def loss_of(self, output: Tensor, y: Tensor) -> Tensor:
        """Mean loss of `output` [b, classes, ...] for labels `y` [b, ...]."""
        y = y.long()
        if self.loss == "cross_entropy":
            return F.cross_entropy(output, y)
        one_hot = F.one_hot(y, output.shape[1]).movedim(-1, 1).to(output.dtype)
        return F.binary_cross_entropy_with_logits(output, one_hot)

    def losses_of(self, output_n: Tensor, y_n: Tensor) -> Tensor:
        """`loss_of` of n clients at once [n]: `output_n` [n, b, classes, ...], labels `y_n` [n, b, ...]."""
        y = y_n.long()
        if self.loss == "cross_entropy":
            each = F.cross_entropy(output_n.flatten(0, 1), y.flatten(0, 1), reduction="none")
            is_labelled = y != _NO_LABEL
            return each.view(len(y), -1).sum(1) / is_labelled.flatten(1).sum(1)
        one_hot = F.one_hot(y, output_n.shape[2]).movedim(-1, 2).to(output_n.dtype)
        each = F.binary_cross_entropy_with_logits(output_n, one_hot, reduction="none")
        return each.flatten(1).mean(1)

    def optimizer_of(self, tensors: list[Tensor], learning_rate: float) -> Callable[[], object]:
        """One step of the optimizer on the gradients of `tensors`."""
        if self.optimizer == "sgd":
            return SGD(tensors, learning_rate, self.momentum, self.weight_decay).step
        adam = torch.optim.Adam(tensors, lr=learning_rate, weight_decay=self.weight_decay, amsgrad=True)
        return adam.step


class Misfit(Exception):
    """The batch on which a model or a loss raised what is the cause."""

    def refusal(self, whose: str, model: nn.Module) -> DataError:
        """GMR-304, to be raised from the cause."""
        cause = self.__cause__
        message = f"{whose}: {type(cause).__name__}: {cause} (batch: {self})"
        return DataError("GMR-304", message, where=type(model).__name__)


@contextmanager
def told(x: Tensor, y: Tensor) -> Iterator[None]:
    """Raise `Misfit` for what is raised in a step on a batch, but for a want of memory."""
    try:
        yield
    except (FedGMRError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever a user's forward raises
        raise Misfit(shapes_of(x, y)) from error


def shapes_of(x: Tensor, y: Tensor) -> str:
    """Types and shapes of a batch x [b, ...], y [b, ...], for an error's message."""
    return ", ".join(f"{n} {str(t.dtype)[6:]} {list(t.shape)}" for n, t in (("x", x), ("y", y)))


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
        moving = {i: x.grad for i, x in enumerate(self._tensors) if x.grad is not None}
        if not moving:
            return
        tensors, grads = [self._tensors[i] for i in moving], list(moving.values())
        if self._weight_decay:
            grads = list(torch._foreach_add(grads, tensors, alpha=self._weight_decay))
        if self._momentum:
            slope_of = dict(zip(moving, grads, strict=True))
            known = [i for i in moving if i in self._velocity]
            if known:
                velocities = [self._velocity[i] for i in known]
                torch._foreach_mul_(velocities, self._momentum)
                torch._foreach_add_(velocities, [slope_of[i] for i in known])
            for i in moving.keys() - self._velocity.keys():
                self._velocity[i] = slope_of[i].detach().clone()
            grads = [self._velocity[i] for i in moving]
        torch._foreach_add_(tensors, grads, alpha=-self._rate)
