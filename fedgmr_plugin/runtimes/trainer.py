"""A user's FedML ClientTrainer as the engine's `LocalTrainer`: sub-models without telling it about masks.

The trainer runs its own loop with its own optimizer on the model it was built with. We only watch:

- a hook on every masked parameter zeroes the masked part of its gradient as soon as it is accumulated, so
  clipping by norm sees the masked gradient;
- a hook after every optimizer step projects the parameters back, x <- m * x, so that momentum, weight decay,
  Adam's moments or noise of earlier steps never leave a masked coordinate moved (method page, section 4);
- the same hook counts steps and measures drift, ||x_k - x_0||^2.

All hooks are gone when the call returns or raises. At density 1 no gradient and no parameter is touched, so
the result is bitwise that of the trainer alone.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedgmr_plugin.engine.objectives import PLAIN, Context
from fedgmr_plugin.engine.samples import Batch
from fedgmr_plugin.engine.trainer import LocalStats, LocalTrainer, Metrics
from fedgmr_plugin.errors import FedGMRError, HostError
from fedgmr_plugin.runtimes.data import FederatedData
from fedgmr_plugin.runtimes.watch import Watch

_log = logging.getLogger(__name__)
_ABSENT = object()


class FedMLTrainer:
    """Runs a FedML `ClientTrainer` (a user's, or one of FedML's own) for the engine.

    A training call does, in FedML's order: ``set_id``, ``update_dataset``, ``on_before_local_training``,
    ``train``, ``on_after_local_training``, ``get_model_params``; a trainer that lacks one of the hooks is
    taken as it is. Meanwhile ``args.learning_rate`` is the learning rate asked for and ``args.epochs`` is 1,
    both on FedML's `args` and on ``trainer.args``; both are restored. FedML's tag-prediction trainer reads
    ``args.lr`` and ``args.wd``: where these are absent, or equal to ``learning_rate``, they follow.

    Args:
        trainer: an object with FedML's ClientTrainer interface.
        args: FedML's arguments.
        device: where it trains; the CPU when None.
        data: the data set that the clients come from; ``set_id`` then gets FedML's client id, and
            ``update_dataset`` the client's test data and number of samples. Without it they get the
            engine's client number, None, and the number of batches times ``args.batch_size``.
        fallback: measures models where the trainer's ``test`` returns no metrics.

    Raises:
        HostError: GMR-504 if homomorphic encryption is enabled.
    """

    def __init__(
        self,
        trainer: Any,
        args: Any,
        device: torch.device | None = None,
        *,
        data: FederatedData | None = None,
        fallback: LocalTrainer | None = None,
    ) -> None:
        refuse_encryption(args)
        self.trainer = trainer
        self._args = args
        self._device = torch.device("cpu") if device is None else device
        self._data = data
        self._fallback = fallback
        self._warned = False

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
        """Train `model` in place with the user's loop; see `fedgmr_plugin.engine.trainer.LocalTrainer`.

        `LocalStats.train_loss` is None (FedML's trainers do not return it). If the trainer takes no step
        with a torch optimizer, ``steps`` is the number of batches and ``drift_sq`` is None.

        Raises:
            HostError: GMR-506 if the trainer raises (its exception is the cause) or returns other weights
                than the model has.
        """
        home = _device_of(model)
        with self._blamed("set_model_params", client):
            working = self._working_model(model)
        values = self._overrides(learning_rate)
        counted = _Counted(batches)
        with (
            _temporarily([self._args, getattr(self.trainer, "args", None)], values),
            Watch(working, masks) as watch,
        ):
            with self._blamed("train", client):
                result = self._run(counted, client)
        model.to(home)
        _read_back(model, result, client)
        if masks:
            _project(dict(model.named_parameters(remove_duplicate=False)), masks)
            if not watch.steps and not self._warned:
                self._warned = True
                _log.warning(
                    "%s takes no step with a torch optimizer on its model: masked weights are set to zero "
                    "only after its training, not after every step",
                    type(self.trainer).__name__,
                )
        return LocalStats(
            steps=watch.steps or counted.read,
            samples=counted.samples,
            train_loss=None,
            drift_sq=watch.drift_sq,
        )

    def evaluate(self, model: nn.Module, batches: Iterable[Batch]) -> Metrics:
        """Measure `model` with the trainer's ``test``, or the fallback where that returns no metrics.

        Raises:
            HostError: GMR-506 if ``test`` raises (its exception is the cause).
        """
        home, mode = _device_of(model), model.training
        data = batches if isinstance(batches, Sized) else list(batches)
        with self._blamed("test", None):
            self._working_model(model)
            result = self.trainer.test(data, self._device, self._args)
        model.to(home).train(mode)
        metrics = metrics_of(result)
        return (
            metrics if is_known(metrics) or self._fallback is None else self._fallback.evaluate(model, data)
        )

    @contextmanager
    def _blamed(self, what: str, client: int | None) -> Iterator[None]:
        """Turn an exception of the user's code into one that names it, and the client."""
        try:
            yield
        except FedGMRError:
            raise
        except Exception as error:
            who = "" if client is None else f"client={client}: "
            raise HostError(
                "GMR-506",
                f"{who}{type(self.trainer).__name__}.{what} raised {type(error).__name__}: {error}",
                where="client_trainer",
                hint="The exception above has the trainer's own traceback.",
            ) from error

    def _working_model(self, model: nn.Module) -> nn.Module:
        """The module that the trainer will train, holding the weights of `model`."""
        own = getattr(self.trainer, "model", None)
        if own is model:
            return model
        if not isinstance(own, nn.Module):
            self.trainer.model = model
            return model
        self.trainer.set_model_params({name: value.clone() for name, value in model.state_dict().items()})
        return own

    def _overrides(self, learning_rate: float) -> dict[str, Any]:
        values: dict[str, Any] = {"learning_rate": learning_rate, "epochs": 1}
        configured = getattr(self._args, "learning_rate", _ABSENT)
        if getattr(self._args, "lr", configured) == configured:
            values["lr"] = learning_rate
        if not hasattr(self._args, "wd"):
            values["wd"] = getattr(self._args, "weight_decay", 0.0)
        return values

    def _run(self, batches: Sequence[Batch], client: int) -> Mapping[str, Any]:
        trainer, device, args = self.trainer, self._device, self._args
        name, test, count = self._client(client, batches)
        if hasattr(trainer, "set_id"):
            trainer.set_id(name)
        data: Any = batches
        if hasattr(trainer, "update_dataset"):
            trainer.update_dataset(batches, test, count)
            data = self._perhaps_poisoned(batches)
        if hasattr(trainer, "on_before_local_training"):
            trainer.on_before_local_training(data, device, args)
        trainer.train(data, device, args)
        if hasattr(trainer, "on_after_local_training"):
            trainer.on_after_local_training(data, device, args)
        result: Mapping[str, Any] = trainer.get_model_params()
        return result

    def _client(self, client: int, batches: Sequence[Batch]) -> tuple[Any, Any, int]:
        """FedML's id, test data and number of training samples of a client."""
        if self._data is None:
            return client, None, len(batches) * int(getattr(self._args, "batch_size", 1))
        name = self._data.ids[client]
        return name, self._data.test_loaders.get(name), len(self._data.clients[client])

    def _perhaps_poisoned(self, batches: Sequence[Batch]) -> Any:
        """FedML's data-poisoning attacks swap the dataset in ``update_dataset``; train on what they left."""
        from fedml.core.security.fedml_attacker import FedMLAttacker

        if not FedMLAttacker.get_instance().is_enabled:
            return batches
        return getattr(self.trainer, "local_train_dataset", batches)


def refuse_encryption(args: Any) -> None:
    """Raise GMR-504 if FedML's homomorphic encryption is asked for or already on."""
    from fedml.core.fhe.fhe_agg import FedMLFHE

    if getattr(args, "enable_fhe", False) or FedMLFHE.get_instance().is_fhe_enabled():
        raise HostError("GMR-504", "enable_fhe=true", where="args.enable_fhe")


# -- metrics -------------------------------------------------------------------------------------------


def is_known(metrics: Metrics) -> bool:
    """Whether a measurement says anything."""
    return metrics.accuracy is not None or metrics.loss is not None


def metrics_of(result: Any, samples: int = 0) -> Metrics:
    """What FedML's ``test`` methods return, as `Metrics`.

    Understood are FedML's sums ``{test_correct, test_total, test_loss, test_precision, test_recall}``, means
    ``{test_acc, test_loss}`` without a total, and tuples ``(accuracy, loss, ...)``. Anything else, and any
    number that is not finite, is unknown (None).

    Args:
        samples: number of samples, where `result` does not say it.
    """
    if isinstance(result, Mapping):
        numbers = {key: value for key in result if (value := _number(result[key])) is not None}
        total = numbers.pop("test_total", None)
        if total == 0:
            return Metrics(None, None, 0, {})
        if total is None:
            accuracy = numbers.pop("test_acc", None)
            return Metrics(accuracy, numbers.pop("test_loss", None), samples, _plain(numbers))
        correct, loss = numbers.pop("test_correct", None), numbers.pop("test_loss", None)
        for key in ("test_precision", "test_recall"):
            if key in numbers:
                numbers[key] /= total
        return Metrics(
            None if correct is None else correct / total,
            None if loss is None else loss / total,
            int(total),
            _plain(numbers),
        )
    if isinstance(result, (tuple, list)) and result:
        return Metrics(_number(result[0]), _number(result[1]) if len(result) > 1 else None, samples, {})
    return Metrics(None, None, 0, {})


def _number(value: Any) -> float | None:
    if isinstance(value, (Tensor, np.ndarray, np.generic)) and value.ndim == 0:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def _plain(numbers: Mapping[Any, float]) -> dict[str, float]:
    return {str(key): value for key, value in numbers.items()}


# -- around the trainer ------------------------------------------------------------------------------


class _Counted(Sequence[Batch]):
    """The engine's batches, remembering which ones the trainer has read."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self._batches = batches
        self._sizes: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, position: Any) -> Any:
        if isinstance(position, slice):
            return [self[i] for i in range(*position.indices(len(self)))]
        position = range(len(self))[position]
        batch = self._batches[position]
        self._sizes[position] = len(batch[1])
        return batch

    @property
    def read(self) -> int:
        """Batches read, each counted once."""
        return len(self._sizes)

    @property
    def samples(self) -> int:
        """Samples in them."""
        return sum(self._sizes.values())


@contextmanager
def _temporarily(objects: Sequence[Any], values: Mapping[str, Any]) -> Iterator[None]:
    """Set attributes of `objects` (None is skipped); restore them on exit, absence included."""
    distinct = list({id(o): o for o in objects if o is not None}.values())
    before = [(o, name, getattr(o, name, _ABSENT)) for o in distinct for name in values]
    for o in distinct:
        for name, value in values.items():
            setattr(o, name, value)
    try:
        yield
    finally:
        for o, name, value in before:
            if value is _ABSENT:
                delattr(o, name)
            else:
                setattr(o, name, value)


def _device_of(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


@torch.no_grad()
def _read_back(model: nn.Module, result: Mapping[str, Any], client: int) -> None:
    """Copy the trainer's weights into `model` by name; buffers that it leaves out stay as they are."""
    parameters = {name for name, _ in model.named_parameters()}
    for name, target in model.state_dict().items():
        if name not in result:
            if name in parameters:
                raise _wrong_weights(client, f"get_model_params lacks {name}")
            continue
        value = torch.as_tensor(result[name])
        if value.shape != target.shape:
            raise _wrong_weights(client, f"get_model_params has {name} of shape {tuple(value.shape)}")
        if value.device != target.device or value.data_ptr() != target.data_ptr():
            target.copy_(value)


def _wrong_weights(client: int, problem: str) -> HostError:
    return HostError(
        "GMR-506",
        f"client={client}: {problem}",
        where="client_trainer",
        hint="Return the whole state dictionary of the model that the trainer was built with.",
    )


@torch.no_grad()
def _project(parameters: Mapping[str, nn.Parameter], masks: Mapping[str, Tensor]) -> None:
    for name, mask in masks.items():
        parameter = parameters[name]
        parameter.masked_fill_(~mask.to(parameter.device), 0)
