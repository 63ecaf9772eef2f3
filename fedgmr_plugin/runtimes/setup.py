"""What FedML hands over, made into what every process of a run needs: checked, before any training.

Everything of FedML is translated here (arguments, data, trainer); everything of FedGMR happens in
`fedgmr_plugin.engine`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from fedgmr_plugin.config import FedGMRConfig
from fedgmr_plugin.engine.network import Links, LogNormalLinks, TraceLinks
from fedgmr_plugin.engine.restricted import known_classes
from fedgmr_plugin.engine.samples import BatchPlan
from fedgmr_plugin.engine.seeds import derive, isolated_rng
from fedgmr_plugin.engine.trainer import BuiltinTrainer, LocalTrainer
from fedgmr_plugin.engine.workbench import Clients, Training, Workbench
from fedgmr_plugin.errors import ConfigError, DataError
from fedgmr_plugin.kernels.layout import ModelLayout, build_layout, validate
from fedgmr_plugin.kernels.rounding import PAYLOAD_TYPES
from fedgmr_plugin.runtimes.data import FederatedData, read_dataset
from fedgmr_plugin.runtimes.settings import FedMLKeys, fedml_keys, options
from fedgmr_plugin.runtimes.traces import load_traces
from fedgmr_plugin.runtimes.trainer import FedMLTrainer

_log = logging.getLogger(__name__)
#: Data sets for which FedML has trainers of its own that are not plain classification.
_FEDML_TRAINED = ("stackoverflow_lr", "fed_shakespeare", "stackoverflow_nwp")


@dataclass(frozen=True)
class Setup:
    """A run's parts, but for its server.

    Attributes:
        args: FedML's arguments.
        device: where clients train and models are evaluated.
        model: the global model; overwritten during the run, and holds the shipped model at its end.
        counts: training samples of each client, after the validation split [N].
        densities: initial densities [N].
        bench: where this process trains and measures.
    """

    args: Any
    config: FedGMRConfig
    keys: FedMLKeys
    device: torch.device
    data: FederatedData
    model: nn.Module
    layout: ModelLayout
    counts: tuple[int, ...]
    densities: tuple[float, ...]
    bench: Workbench

    @property
    def trainer(self) -> LocalTrainer:
        """How clients train."""
        return self.bench.training.trainer

    @property
    def steps(self) -> int | None:
        """Local steps K; None for whole epochs."""
        return self.bench.training.plan.steps

    def work(self, client: int) -> float:
        """What a client's training is longer by than another's: its samples, where it trains on all."""
        return float(self.counts[client]) if self.steps is None else 1.0


def prepare(args: Any, device: Any, dataset: Any, model: nn.Module, client_trainer: Any = None) -> Setup:
    """The parts of a run from what FedML's simulators are constructed with.

    Args:
        dataset: FedML's 8-element list.
        client_trainer: a user's own, honoured.

    Raises:
        ConfigError, ModelError, DataError, HostError: everything wrong with them, before any training.
    """
    config, keys = options(args), fedml_keys(args)
    device = torch.device(device) if device is not None else torch.device("cpu")
    data = read_dataset(dataset, keys.clients)
    refuse_top_k(config, data.classes)
    counts = _training_samples(config, keys, data)
    densities = config.initial_densities(keys.clients)
    model.to(device)
    layout = build_layout(model, config.dense_layers)
    for finding in validate(model, config.dense_layers):
        _log.info("%s %s", finding.code, finding.message)
    trainer = _trainer(args, keys, config, device, model, client_trainer, data)
    steps = config.local_steps if isinstance(config.local_steps, int) else None
    plan = BatchPlan(keys.batch_size, steps, keys.epochs, config.shuffle, keys.seed)
    clients = Clients(data.clients.__getitem__, config.validation_fraction, keys.seed, keys.clients)
    training = Training(trainer, plan, keys.learning_rate)
    if config.label_masks:
        last_layer(model, data)
        training = replace(training, classes=_classes_of(clients, data))
    bench = Workbench(config, layout, model, clients, training)
    return Setup(args, config, keys, device, data, model, layout, counts, densities, bench)


def refuse_top_k(config: FedGMRConfig, classes: int | None) -> None:
    """Refuse a measure that counts every answer as right; `classes` is FedML's ``class_num``, if known.

    Raises:
        ConfigError: GMR-106.
    """
    if classes is not None and config.top_k >= classes > 1:
        raise ConfigError(
            "GMR-106",
            f"top_k={config.top_k} finds every label right: the data have class_num={classes}",
            where="fedgmr_args.top_k",
        )


def _training_samples(config: FedGMRConfig, keys: FedMLKeys, data: FederatedData) -> tuple[int, ...]:
    """Training samples of each client, after the validation split."""
    counts = []
    for n in range(keys.clients):
        size = len(data.clients[n])
        counts.append(size - int(config.validation_fraction * size))
        if counts[-1] < 1:
            raise DataError("GMR-301", f"client {data.ids[n]} has no training sample left of {size}")
    return tuple(counts)


def last_layer(model: nn.Module, data: FederatedData) -> str:
    """Name of the linear layer whose outputs are the classes.

    Raises:
        ConfigError: GMR-106 if the last one has another number of outputs.
    """
    name, layer = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)][-1]
    if layer.out_features != data.classes:
        raise ConfigError(
            "GMR-106",
            f"label_masks=true needs a last linear layer with an output for each class, but {name} has "
            f"{layer.out_features} for class_num={data.classes}",
            where="fedgmr_args.label_masks",
        )
    return name


def _classes_of(clients: Clients, data: FederatedData) -> Callable[[int], Tensor]:
    """Which classes each client trains on, bool [C], read once."""

    @cache
    def of(client: int) -> Tensor:
        with isolated_rng(derive(clients.seed, "classes", client)):
            return known_classes(clients.train(client), data.classes or 0)

    return of


def _trainer(
    args: Any,
    keys: FedMLKeys,
    config: FedGMRConfig,
    device: torch.device,
    model: nn.Module,
    client_trainer: Any,
    data: FederatedData,
) -> LocalTrainer:
    """The user's trainer, FedML's for its language tasks, or the built-in one."""
    if client_trainer is None and keys.dataset in _FEDML_TRAINED:
        from fedml.ml.trainer.trainer_creator import create_model_trainer

        client_trainer = create_model_trainer(model, args)
    if client_trainer is not None:
        refuse_for_trainer(config)
        fallback = BuiltinTrainer(device=device, loss=config.loss)
        return FedMLTrainer(client_trainer, args, device, data=data, fallback=fallback)
    refuse_without_trainer(args)
    return builtin_trainer(config, keys, device)


def refuse_for_trainer(config: FedGMRConfig) -> None:
    """Refuse options that only the built-in trainer follows, beside a ClientTrainer.

    Raises:
        ConfigError: GMR-106.
    """
    asked = {
        "probe=true": config.probe,
        "trigger=gradient": config.trigger == "gradient",
        f"local_objective={config.local_objective}": config.local_objective != "plain",
        f"proximal={config.proximal:g}": config.proximal > 0,
        "label_masks=true": config.label_masks,
        f"batch_clients={config.batch_clients}": config.batch_clients > 1,
    }
    for key, is_asked in asked.items():
        if is_asked:
            raise ConfigError(
                "GMR-106",
                f"{key} needs the built-in trainer: a ClientTrainer does not give its loss",
                where="fedgmr_args",
            )


def refuse_without_trainer(args: Any) -> None:
    """Refuse what FedML does in the hooks of a ClientTrainer, where there is none.

    Raises:
        ConfigError: GMR-106.
    """
    asked = {("enable_dp", "dp_solution_type"): "ldp", ("enable_attack", "attack_type"): "label_flipping"}
    for (switch, key), kind in asked.items():
        if getattr(args, switch, False) and str(getattr(args, key, "")).strip() == kind:
            raise ConfigError(
                "GMR-106",
                f"{key}={kind} is what FedML does in the hooks of a ClientTrainer, and there is none",
                where=key,
                hint="Give FedMLRunner a `client_trainer` of your own.",
            )


def builtin_trainer(config: FedGMRConfig, keys: FedMLKeys, device: torch.device) -> BuiltinTrainer:
    """The built-in trainer as a configuration describes it."""
    return BuiltinTrainer(
        device=device,
        loss=config.loss,
        optimizer=keys.optimizer,
        momentum=config.client_momentum,
        weight_decay=keys.weight_decay,
        gradient_clip=config.gradient_clip,
        proximal=config.proximal,
        top_k=config.top_k,
    )


def dense_megabytes(config: FedGMRConfig, layout: ModelLayout) -> float:
    """Size S of the dense model as it travels, in MB: given or measured, less for a narrow type."""
    narrow = PAYLOAD_TYPES[config.payload_dtype]
    share = 1.0 if narrow is None else narrow.itemsize / layout.dtype.itemsize
    return share * (config.model_megabytes or layout.size * layout.dtype.itemsize / 1e6)


def links(config: FedGMRConfig, densities: tuple[float, ...], seed: int) -> Links:
    """The simulated links of a run: measured where `bandwidth_traces` is given, else log-normal.

    Raises:
        DataError: GMR-303 for traces that cannot be used.
    """
    if config.bandwidth_traces is None:
        return LogNormalLinks(config, densities, seed)
    return TraceLinks(config, densities, seed, load_traces(config.bandwidth_traces, config.trace_family))
