"""FedML's cross-device server, `ServerMNN`, as an asynchronous FedGMR server."""

from __future__ import annotations

import copy
import logging
import os
import queue
import socket
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from fedgmr_plugin.config import FedGMRConfig
from fedgmr_plugin.engine.examiner import Examiner
from fedgmr_plugin.engine.samples import BatchPlan, in_batches, split
from fedgmr_plugin.engine.workbench import HeldOut, Training, Workbench
from fedgmr_plugin.errors import ConfigError
from fedgmr_plugin.kernels.layout import build_layout, validate
from fedgmr_plugin.kernels.rounding import PAYLOAD_TYPES
from fedgmr_plugin.methods import options_of
from fedgmr_plugin.protocol.desk import Desk
from fedgmr_plugin.protocol.pieces import Pieces
from fedgmr_plugin.protocol.presence import Presence
from fedgmr_plugin.runtimes import resume
from fedgmr_plugin.runtimes.command import next_run
from fedgmr_plugin.runtimes.data import ClientSamples, EvaluationBatches, FederatedData
from fedgmr_plugin.runtimes.devices.codecs import codec_of
from fedgmr_plugin.runtimes.devices.connection import connection, device_ids, device_keys, services
from fedgmr_plugin.runtimes.devices.hands import Store, ThreadedHands
from fedgmr_plugin.runtimes.devices.inbox import Inbox
from fedgmr_plugin.runtimes.devices.live_run import Clock, Connected, LiveRun, initial_as_before, token_of
from fedgmr_plugin.runtimes.devices.mqtt import MqttLink
from fedgmr_plugin.runtimes.devices.office import Office
from fedgmr_plugin.runtimes.devices.plain import Codec, PlainOffice
from fedgmr_plugin.runtimes.devices.store import S3Store
from fedgmr_plugin.runtimes.run import fedml_metrics, run_directory, run_header, serving
from fedgmr_plugin.runtimes.samples import samples_of
from fedgmr_plugin.runtimes.settings import fedml_keys, options
from fedgmr_plugin.runtimes.setup import Setup, builtin_trainer, dense_megabytes

_log = logging.getLogger(__name__)
#: What needs the clients' data, or a clock that is simulated.
_SIMULATED = ("bandwidth_traces", "compute_slowdown")


class Transport(NamedTuple):
    """How a run reaches its devices.

    Attributes:
        link: messages.
        store: objects.
    """

    link: Connected
    store: Store


def build(
    args: Any, device: Any, test_dataloader: Any, model: nn.Module, server_aggregator: Any = None
) -> LiveRun:
    """A run with devices from what FedML's `ServerMNN` is constructed with.

    Args:
        args: FedML's arguments; see docs/devices.md.
        device: where models are evaluated.
        test_dataloader: the server's own data, of which `validation_fraction` serves triggers and model
            choice, and the rest tests.
        model: the global model; overwritten during the run, and holds the shipped model at its end.
        server_aggregator: a user's own, honoured.

    Raises:
        ConfigError, ModelError, DataError, HostError: everything wrong with them, before anything is sent.
    """
    setup = prepare_server(args, device, test_dataloader, model)
    codec: Codec | None = None
    if setup.config.device_submodel != "wire":
        x, _ = next(iter(setup.data.test))
        codec = codec_of(setup.config, copy.deepcopy(model), setup.layout, (1, *x.shape[1:]))
    broker, bucket = services(args)
    return assemble_live(
        setup,
        server_aggregator,
        lambda desk, inbox: Transport(MqttLink(broker, desk.topics, inbox), S3Store(bucket)),
        codec,
    )


def assemble_live(
    setup: Setup,
    server_aggregator: Any,
    transport: Callable[[Desk, queue.Queue[Any]], Transport],
    codec: Codec | None = None,
    *,
    numbered: bool = True,
) -> LiveRun:
    """A run with real clients.

    Args:
        transport: from the desk and the inbox; nothing is sent before the run begins.
        codec: how sub-models are written for clients that know nothing of masks; None for those that do.
        numbered: of `PlainOffice`.

    Raises:
        ConfigError, HostError: what is wrong with the connection, the aggregator, or the directory.
    """
    args, config = setup.args, setup.config
    here = connection(args)
    resumed = resume.take()
    if resumed is not None:
        initial_as_before(resumed, setup)
    # What arrives is in this machine's memory, and what leaves must be: so the global vector is there, too.
    server, evaluate, hooked = serving(setup, server_aggregator, torch.device("cpu"))
    where = getattr(args, "yaml_config_file", "") or "args"
    desk = Desk(here.run, here.server, here.devices, device_keys(config, here.devices, where))
    directory = resumed or run_directory(config)
    token = token_of(directory, resumed is not None)
    inbox = Inbox()
    link, store = transport(desk, inbox)
    hands = ThreadedHands(store, link, inbox)
    clock = Clock()
    presence = None
    if isinstance(link, MqttLink):
        place = f"process {os.getpid()} on {socket.gethostname()}"
        presence = Presence(here.run, here.server, desk.keys.values(), place)
        link.watch(presence)
    run: LiveRun
    given = (
        server,
        Examiner(server, setup.bench, lambda: setup.data.test, evaluate),
        lambda fields: run.record(fields),
        desk,
        Pieces(here.run, token, PAYLOAD_TYPES[config.payload_dtype]),
        token,
        hands,
        clock,
    )
    office: Office
    if codec is None:
        office = Office(*given, measured=measured_by(config))
    else:
        office = PlainOffice(*given, codec=codec, steps=setup.steps or 0, numbered=numbered)
    header = run_header(setup, directory.name, dense_megabytes(config, setup.layout), hooked=hooked)
    run = LiveRun(
        office.live,
        setup.model,
        header,
        directory,
        fedml_metrics(args),
        next_run(),
        resumed=resumed is not None,
        office=office,
        hands=hands,
        link=link,
        inbox=inbox,
        clock=clock,
        presence=presence,
    )
    _log.info("run %s waits for %s", here.run, here.devices)
    return run


def prepare_server(
    args: Any,
    device: Any,
    test_dataloader: Any,
    model: nn.Module,
    train_loaders: Mapping[Hashable, Any] | None = None,
    test_loaders: Mapping[Hashable, Any] | None = None,
) -> Setup:
    """The parts of a run whose clients' data are elsewhere.

    Args:
        train_loaders, test_loaders: what a user's aggregator is shown, if FedML gave any.

    Raises:
        ConfigError, ModelError, DataError: everything wrong with them.
    """
    config, keys = options(args), fedml_keys(args)
    _refuse_impossible(config, has_store=getattr(args, "backend", None) != "GRPC")
    # What is logged is what is sent, on a real clock.
    measured = {"payload_rule": "encoded", "model_megabytes": None, "aggregation_seconds": 0.0}
    config = config.model_copy(update=measured)
    ids = device_ids(args)
    if len(ids) != keys.clients:
        raise ConfigError(
            "GMR-112", f"client_id_list has {len(ids)} ids for client_num_in_total={keys.clients}"
        )
    if config.clients_at_start > keys.clients:
        raise ConfigError(
            "GMR-106",
            f"clients_at_start={config.clients_at_start} are more than client_num_in_total={keys.clients}",
            where="fedgmr_args.clients_at_start",
        )
    where = torch.device(device) if device is not None else torch.device("cpu")
    model.to(where)
    layout = build_layout(model, config.dense_layers)
    for finding in validate(model, config.dense_layers):
        _log.info("%s %s", finding.code, finding.message)
    test, held = split(
        samples_of(test_dataloader, "the server"), config.validation_fraction, keys.seed, client=-1
    )
    steps = config.local_steps if isinstance(config.local_steps, int) else None
    plan = BatchPlan(keys.batch_size, steps, keys.epochs, config.shuffle, keys.seed)
    trainer = builtin_trainer(config, keys, where)
    clients = HeldOut(held, keys.seed, keys.clients)
    bench = Workbench(config, layout, model, clients, Training(trainer, plan, keys.learning_rate))
    batches = EvaluationBatches([(list(in_batches(test, 256)), "the server's test data")])
    loaders = train_loaders or {}, test_loaders or {}
    data = FederatedData(ids, ClientSamples((), {}, {}), batches, *loaders, None)
    densities = config.initial_densities(keys.clients)
    counts = (1,) * keys.clients
    return Setup(args, config, keys, where, data, model, layout, counts, densities, bench)


def _refuse_impossible(config: FedGMRConfig, *, has_store: bool) -> None:
    """What has no meaning without the clients' data, on a real clock, or with these clients."""
    of_method = options_of(config.method)

    def from_where(key: str) -> str:
        """Nobody finds an option in a file that only the method sets."""
        is_theirs = key in of_method and of_method[key] == getattr(config, key)
        return f" (of method={config.method})" if is_theirs else ""

    wrong = [
        f"{key} belongs to a simulated network" for key in _SIMULATED if getattr(config, key) is not None
    ]
    if config.probe:
        wrong.append("probe=true needs the clients' data")
    if config.trigger == "gradient":
        wrong.append("trigger=gradient needs the clients' data")
    for key in ("upload", "download"):
        if getattr(config, key) != "full":
            wrong.append(f"{key}={getattr(config, key)}{from_where(key)} is known to simulated clients only")
    if config.label_masks:
        wrong.append(f"label_masks=true{from_where('label_masks')} needs the clients' data")
    if config.local_objective != "plain":
        shown = f"local_objective={config.local_objective}{from_where('local_objective')}"
        wrong.append(f"{shown} is known to simulated clients only")
    if config.device_submodel != "wire" and config.proximal:
        wrong.append(
            f"proximal={config.proximal:g}{from_where('proximal')}: with "
            f"device_submodel={config.device_submodel}, FedML's own clients train, which know no proximal "
            "term"
        )
    if config.device_submodel != "wire" and config.warmup_windows:
        wrong.append(
            f"warmup_windows={config.warmup_windows}: with device_submodel={config.device_submodel}, FedML's "
            "own clients train, at the learning rate of their own file"
        )
    if config.measured_densities and not (has_store and config.device_submodel == "wire"):
        wrong.append(
            "measured_densities=true: clients measure their way to the store, which there is none of over "
            "gRPC; FedML's own measure nothing"
        )
    if config.workers > 1:
        wrong.append(f"workers={config.workers}: devices train")
    if config.batch_clients > 1:
        wrong.append(f"batch_clients={config.batch_clients}: devices train")
    if wrong:
        raise ConfigError("GMR-106", "; ".join(wrong), where="fedgmr_args")


def measured_by(config: FedGMRConfig) -> Callable[[float | None, float | None], float | None]:
    """Initial density of a device by its measured bandwidth, where `measured_densities` asks for it."""

    def density(up: float | None, down: float | None) -> float | None:
        if not config.measured_densities or up is None:
            return None
        reached = [rung for rung in config.density_ladder if rung <= up / config.client_upload]
        return max(reached, default=config.density_ladder[0])

    return density
