"""FedML's cross-silo client as a mask-aware FedGMR client."""

from __future__ import annotations

import queue
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedgmr_plugin.engine.trainer import BuiltinTrainer, LocalTrainer
from fedgmr_plugin.errors import ConfigError
from fedgmr_plugin.runtimes.devices.client import OWN_FILE, DeviceProcess, Parts
from fedgmr_plugin.runtimes.devices.connection import connection, device_keys
from fedgmr_plugin.runtimes.settings import fedml_keys, options
from fedgmr_plugin.runtimes.setup import builtin_trainer, refuse_for_trainer, refuse_without_trainer
from fedgmr_plugin.runtimes.silos.data import SiloSamples
from fedgmr_plugin.runtimes.silos.grpc import GrpcLink, most_bytes, peers
from fedgmr_plugin.runtimes.silos.objects import Objects
from fedgmr_plugin.runtimes.trainer import FedMLTrainer


def build(args: Any, device: Any, dataset: Any, model: nn.Module, model_trainer: Any = None) -> DeviceProcess:
    """A silo from what FedML's `FedMLCrossSiloClient` is constructed with.

    Args:
        args: FedML's arguments.
        dataset: FedML's 8-element list, of which this silo's own training data are used.
        model_trainer: a user's own ClientTrainer, honoured.

    Raises:
        ConfigError, ModelError, DataError, HostError: everything wrong with them, before anything is sent.
    """
    config, keys, here = options(args), fedml_keys(args), connection(args)
    if config.device_submodel != "wire":
        raise ConfigError(
            "GMR-106",
            f"device_submodel={config.device_submodel} is for FedML's own clients: start this one with "
            "federated_optimizer=FedAvg, or choose wire",
            where="fedgmr_args.device_submodel",
        )
    me = here.devices[0] if len(here.devices) == 1 else int(getattr(args, "rank", 0))
    place = torch.device(device) if device is not None else torch.device("cpu")
    trainer: LocalTrainer = builtin_trainer(config, keys, place)
    if model_trainer is not None:
        refuse_for_trainer(config)
        fallback = BuiltinTrainer(device=place, loss=config.loss)
        trainer = FedMLTrainer(model_trainer, args, place, fallback=fallback)
    else:
        refuse_without_trainer(args)
    samples = SiloSamples(dataset[5])

    def over_grpc(hears: str, inbox: queue.Queue[Any]) -> tuple[GrpcLink, Objects]:
        path = str(getattr(args, "grpc_ipconfig_path", ""))
        rows = peers(path)
        if not {me, here.server} <= set(rows):
            raise ConfigError(
                "GMR-112", f"no row for silo {me}, or for the server, {here.server}", where=path
            )
        rank = rows[me].rank
        if rank is not None and rank != int(getattr(args, "rank", rank)):
            problem = f"--rank {args.rank} was given, but the row of silo {me} has rank={rank}"
            raise ConfigError(
                "GMR-112", f"{problem}: a wrong --rank, or another silo's file", where=path, hint=OWN_FILE
            )
        expected = {name: (tuple(t.shape), t.dtype) for name, t in model.state_dict().items()}
        most = most_bytes(expected)
        objects = Objects(most, own=most)
        keys = device_keys(config, (me,), getattr(args, "yaml_config_file", "") or "args")
        known = {hears: None if keys is None else keys[me]}
        link = GrpcLink(here.run, me, here.server, rows, inbox, objects, expected, known, plain=False)
        return link, objects

    folder = Path(config.output_dir) / f"silo-{here.run}-{me}"
    transport = over_grpc if getattr(args, "backend", None) == "GRPC" else None
    client = max(int(getattr(args, "rank", me)) - 1, 0)  # FedML's convention: rank 1 is client 0
    parts = Parts(samples, len(samples(client)), trainer, client)
    return DeviceProcess(args, me, parts, model, place, folder, transport)
