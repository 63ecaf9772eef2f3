"""FedGMR in FedML's single-process simulator: one process, and forks of it where `workers` asks for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fedgmr_plugin.config import FedGMRConfig
from fedgmr_plugin.engine.batched import Batched
from fedgmr_plugin.engine.trainer import BuiltinTrainer, LocalTrainer
from fedgmr_plugin.errors import ConfigError
from fedgmr_plugin.runtimes.distributed.forks import forked
from fedgmr_plugin.runtimes.run import Run, assemble
from fedgmr_plugin.runtimes.setup import prepare


def build(
    args: Any,
    device: Any,
    dataset: Any,
    model: nn.Module,
    client_trainer: Any = None,
    server_aggregator: Any = None,
) -> Run:
    """A run of FedGMR from what FedML's simulator is constructed with.

    Args:
        args: FedML's arguments.
        device: where clients train and models are evaluated.
        dataset: FedML's 8-element list.
        model: the global model; overwritten during the run, and holds the shipped model at its end.
        client_trainer, server_aggregator: a user's own, honoured.

    Raises:
        ConfigError, ModelError, DataError, HostError: everything wrong with them, before any training.
    """
    setup = prepare(args, device, dataset, model, client_trainer)
    config = setup.config
    if config.batch_clients > 1:
        _check_batches(config)
        return assemble(setup, server_aggregator, Batched(setup.bench, config.batch_clients))
    workers = None
    if config.workers > 1:
        _check_workers(config, setup.device, setup.trainer)
        workers = forked(setup.bench.train, config.workers, setup.work)
    return assemble(setup, server_aggregator, workers)


def _check_batches(config: FedGMRConfig) -> None:
    """Raise GMR-106 beside options that look at one client's steps, or train somewhere else."""
    asked = {
        f"workers={config.workers}": config.workers > 1,
        f"local_objective={config.local_objective}": config.local_objective != "plain",
        "label_masks=true": config.label_masks,
        "probe=true": config.probe,
    }
    for key, is_asked in asked.items():
        if is_asked:
            raise ConfigError(
                "GMR-106",
                f"batch_clients={config.batch_clients} does not go together with {key}",
                where="fedgmr_args.batch_clients",
            )


def _check_workers(config: FedGMRConfig, device: torch.device, trainer: LocalTrainer) -> None:
    """Raise GMR-106 where forked processes cannot stand in for this one."""
    obstacle = None
    if not isinstance(trainer, BuiltinTrainer):
        obstacle = "a ClientTrainer of its own may remember something between clients"
    elif device.type != "cpu":
        obstacle = f"a process that uses {device} cannot be forked"
    elif config.cpu_threads != 1:
        obstacle = f"each trains on one thread, but cpu_threads={config.cpu_threads}"
    if obstacle:
        raise ConfigError("GMR-106", f"workers={config.workers}: {obstacle}", where="fedgmr_args.workers")
