"""FedML's cross-silo server as an asynchronous FedGMR server."""

from __future__ import annotations

import copy
import queue
from typing import Any

from torch import nn

from fedgmr_plugin.errors import ConfigError, DataError
from fedgmr_plugin.protocol.desk import Desk
from fedgmr_plugin.runtimes.devices.connection import connection, services
from fedgmr_plugin.runtimes.devices.live_run import LiveRun
from fedgmr_plugin.runtimes.devices.mqtt import MqttLink
from fedgmr_plugin.runtimes.devices.server import Transport, assemble_live, prepare_server
from fedgmr_plugin.runtimes.devices.store import S3Store
from fedgmr_plugin.runtimes.setup import refuse_top_k
from fedgmr_plugin.runtimes.silos.grpc import GrpcLink, most_bytes, peers
from fedgmr_plugin.runtimes.silos.objects import Objects
from fedgmr_plugin.runtimes.silos.pickles import PickledModels


def build(args: Any, device: Any, dataset: Any, model: nn.Module, server_aggregator: Any = None) -> LiveRun:
    """A run between silos from what FedML's `FedMLCrossSiloServer` is constructed with.

    With `device_submodel: wire` the silos run fedgmr too; with ``masked`` they are FedML's own clients, which
    train dense models.

    Args:
        args: FedML's arguments; see docs/devices.md.
        dataset: FedML's 8-element list; the server's own data are its ``test_data_global``.
        server_aggregator: a user's own, honoured, and FedML's defences with it.

    Raises:
        ConfigError, ModelError, DataError, HostError: everything wrong with them, before anything is sent.
    """
    if dataset[3] is None:
        raise DataError("GMR-302", "the server has no test data: test_data_global is None", where="dataset")
    setup = prepare_server(args, device, dataset[3], model, dataset[5], dataset[6])
    config = setup.config
    refuse_top_k(config, None if dataset[7] is None else int(dataset[7]))
    if config.device_submodel == "width":
        raise ConfigError(
            "GMR-106",
            "device_submodel=width writes model files for devices; silos take wire or masked",
            where="fedgmr_args.device_submodel",
        )
    models = PickledModels(copy.deepcopy(model), setup.layout)
    is_plain = config.device_submodel == "masked"

    def transport(desk: Desk, inbox: queue.Queue[Any]) -> Transport:
        if getattr(args, "backend", None) == "GRPC":
            here, objects = connection(args), Objects(most_bytes(models.expected))
            rows = peers(str(getattr(args, "grpc_ipconfig_path", "")))
            if here.server not in rows:
                raise ConfigError("GMR-112", f"grpc_ipconfig_path has no row for the server, {here.server}")
            ends = (here.run, here.server, here.server, rows)
            known = (models.expected, desk.keys_by_topic)
            link = GrpcLink(*ends, inbox, objects, *known, plain=is_plain)
            return Transport(link, objects)
        broker, bucket = services(args)
        return Transport(MqttLink(broker, desk.topics, inbox), S3Store(bucket))

    return assemble_live(setup, server_aggregator, transport, models if is_plain else None, numbered=False)
