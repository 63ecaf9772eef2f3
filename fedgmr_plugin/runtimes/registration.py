"""`federated_optimizer: fedgmr`, dispatched from FedML's own constructors.

FedML has no registry: six constructors compare `args.federated_optimizer` with strings. `register`
wraps them; the wrapper takes over if the optimizer is "fedgmr" in any letter case, and otherwise
calls FedML's constructor with its arguments untouched.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import sys
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import click

from fedgmr_plugin.config import FedGMRConfig
from fedgmr_plugin.errors import HostError
from fedgmr_plugin.runtimes import command, config_file, host, uncaught
from fedgmr_plugin.runtimes.distributed import job
from fedgmr_plugin.runtimes.settings import SECTION, check_file, options

OPTIMIZER = "fedgmr"
#: Options of ours that are keys of FedML too, with another meaning; `norm_bound` where it defends.
FEDML_READS = frozenset({"run_name", "output_dir"})

#: (constructed object, FedML's arguments, the constructor's further arguments) -> None
Builder = Callable[..., None]


class Dispatch(NamedTuple):
    """One constructor of FedML that chooses an algorithm by name."""

    module: str
    name: str
    build: Builder


class _Wrapped(NamedTuple):
    original: Callable[..., None]
    wrapper: Callable[..., None]


_wrapped: dict[type, _Wrapped] = {}


def register() -> None:
    """Teach FedML the optimizer "fedgmr"; a second call changes nothing.

    The YAML that `--cf` of this process names is checked first, because FedML would ignore its faults. An
    error of ours that nobody catches ends the program with its message instead of a traceback.

    Raises:
        ConfigError: GMR-108 for a missing or broken YAML file; what its `fedgmr_args` are refused for.
        HostError: GMR-501 or GMR-505 if FedML is not usable; GMR-502 if the YAML asks for fedgmr
            under a runtime that it does not support.
    """
    uncaught.install()
    command.note()
    check_command_line(sys.argv[1:])
    host.prepare()
    from fedgmr_plugin.runtimes.distributed import fedml_nccl

    fedml_nccl.supply()
    for dispatch in TABLE:
        try:
            module = importlib.import_module(dispatch.module)
        except ModuleNotFoundError:
            continue  # an optional dependency (MNN) is missing, so FedML cannot dispatch there either
        wrap(getattr(module, dispatch.name), dispatch.build)


def unregister() -> None:
    """Give FedML its constructors, and its cloud, back, and Python its hook for uncaught exceptions.

    Without `register` before, do nothing.
    """
    for cls, wrapped in list(_wrapped.items()):
        if cls.__init__ is wrapped.wrapper:  # type: ignore[misc]
            cls.__init__ = wrapped.original  # type: ignore[misc]
        del _wrapped[cls]
    fedml_nccl = sys.modules.get("fedgmr_plugin.runtimes.distributed.fedml_nccl")
    if fedml_nccl is not None:
        fedml_nccl.withdraw()
    host.restore()
    uncaught.restore()


def registered() -> tuple[str, ...]:
    """Names of the FedML classes that know "fedgmr" now."""
    return tuple(cls.__name__ for cls in _wrapped)


def is_fedgmr(optimizer: object) -> bool:
    """Whether a value of `federated_optimizer` names this method."""
    return isinstance(optimizer, str) and optimizer.lower() == OPTIMIZER


def wrap(cls: type, build: Builder) -> None:
    """Let `build(self, args, ...)` construct `cls` where `args.federated_optimizer` is fedgmr.

    A class that is wrapped already stays as it is. If somebody else wraps our wrapper, `unregister`
    cannot take it out; it then only passes on.
    """
    if cls in _wrapped:
        return
    original: Callable[..., None] = cls.__init__  # type: ignore[misc]

    @functools.wraps(original)
    def __init__(self: Any, args: Any, *rest: Any, **keywords: Any) -> None:
        current = _wrapped.get(cls)
        mine = current is not None and current.wrapper is __init__
        if mine and is_fedgmr(getattr(args, "federated_optimizer", None)):
            build(self, args, *rest, **keywords)
        else:
            original(self, args, *rest, **keywords)

    _wrapped[cls] = _Wrapped(original, __init__)
    cls.__init__ = __init__  # type: ignore[misc]


#: What runs with real clients: training type and backend.
LIVE = frozenset({("cross_device", "MQTT_S3_MNN"), ("cross_silo", "MQTT_S3"), ("cross_silo", "GRPC")})


def check_command_line(arguments: Sequence[str]) -> None:
    """Check the YAML that a command line gives to FedML, as far as it can be known beforehand.

    FedML initialises a runtime (broker, MPI, cloud) before it looks at the optimizer, so a runtime
    that fedgmr cannot serve is refused here already; so are wrong options, before data and model are built.

    Raises:
        ConfigError: GMR-108 for a missing or broken file; what `settings.check_file` raises, under fedgmr.
        HostError: GMR-502 for fedgmr under another `training_type` or `backend` than supported; what
            `job.check` raises for several processes, and `job.refuse_copies` for several of one.
    """
    path = config_file.path_from(arguments)
    if path is None:
        return
    sections = config_file.load(path)
    settings = config_file.flatten(sections)
    if is_fedgmr(settings.get("federated_optimizer")):
        training_type, backend = settings.get("training_type"), settings.get("backend")
        is_simulation = training_type in (None, "simulation") and backend in (None, "sp", *job.LAUNCH)
        if not is_simulation and (training_type, backend) not in LIVE:
            raise _unsupported(training_type, backend, where=path)
        if backend in job.LAUNCH:
            job.check(backend, settings, sections.get(SECTION, {}), path)
        else:
            job.refuse_copies(backend, path)
        named = {key: value for key, value in settings.items() if isinstance(key, str)}
        check_file(SimpleNamespace(**{**named, "yaml_config_file": path}), source=path)
    if not _wrapped and job.rank() == 0:
        for note in [*notes(sections), *config_file.repeated(path)]:
            click.echo(f"note: {note}", err=True)


def notes(sections: config_file.Sections) -> list[str]:
    """What is likely a slip in a YAML file, though FedML makes something of it."""
    settings = config_file.flatten(sections)
    optimizer = settings.get("federated_optimizer")
    if optimizer == "FedAvg" and settings.get("backend") == "NCCL":
        taken = ", ".join(sorted(job.RECORDING))
        return [
            f"{key} in {SECTION} has no effect: FedML's FedAvg under NCCL takes only {taken}"
            for key in sections.get(SECTION, {})
            if key not in job.RECORDING
        ]
    if not is_fedgmr(optimizer):
        message = f"federated_optimizer={optimizer!r} is not fedgmr"
        if optimizer is None:
            message = 'there is no `federated_optimizer: "fedgmr"` in train_args'
        elif difflib.get_close_matches(str(optimizer).lower(), [OPTIMIZER], cutoff=0.8):
            return [f'{message}; did you mean "{OPTIMIZER}"?']
        return [f"{SECTION} has no effect: {message}"] if SECTION in sections else []
    of_fedml = FEDML_READS | ({"norm_bound"} if settings.get("enable_defense") else frozenset())
    return [
        f"{key} in {section} has no effect: options of fedgmr belong in the section {SECTION}"
        for section, keys in sections.items()
        for key in keys
        if section != SECTION and key in FedGMRConfig.model_fields and key not in of_fedml
    ]


def _single_process(
    simulator: Any,
    args: Any,
    device: Any,
    dataset: Any,
    model: Any,
    client_trainer: Any = None,
    server_aggregator: Any = None,
) -> None:
    from fedgmr_plugin.runtimes import single_process
    from fedgmr_plugin.runtimes.distributed import ranks

    simulator.fl_trainer = single_process.build(
        args, device, dataset, model, client_trainer, server_aggregator
    )
    ranks.say_threads(options(args).cpu_threads)


def _mpi(simulator: Any, *given: Any, **named: Any) -> None:
    from fedgmr_plugin.runtimes.distributed import ranks

    simulator.fl_trainer = ranks.build("MPI", *given, **named)
    simulator.run = simulator.fl_trainer.train  # FedML's own does nothing: its algorithms run while built


def _nccl(simulator: Any, *given: Any, **named: Any) -> None:
    from fedgmr_plugin.runtimes.distributed import ranks

    simulator.simulator = ranks.build("NCCL", *given, **named)


def _devices(
    server: Any,
    args: Any,
    device: Any,
    test_dataloader: Any,
    model: Any,
    server_aggregator: Any = None,
) -> None:
    _require(server, args, "MQTT_S3_MNN")
    from fedgmr_plugin.runtimes.devices.server import build

    run = build(args, device, test_dataloader, model, server_aggregator)
    server.run = run.train  # FedML's own does nothing: its server runs while it is built


def _silo_server(
    server: Any, args: Any, device: Any, dataset: Any, model: Any, server_aggregator: Any = None
) -> None:
    _require(server, args, "MQTT_S3", "GRPC")
    from fedgmr_plugin.runtimes.silos.server import build

    run = build(args, device, dataset, model, server_aggregator)
    server.run = run.train


def _silo_client(
    client: Any, args: Any, device: Any, dataset: Any, model: Any, model_trainer: Any = None
) -> None:
    _require(client, args, "MQTT_S3", "GRPC")
    from fedgmr_plugin.runtimes.silos.client import build

    client.run = build(args, device, dataset, model, model_trainer).run


def _require(instance: Any, args: Any, *backends: str) -> None:
    """Refuse the transports of FedML that fedgmr does not have, and its silos of several processes."""
    backend = getattr(args, "backend", None)
    where = f"{type(instance).__module__}.{type(instance).__name__}"
    if backend not in backends:
        raise _unsupported(getattr(args, "training_type", None), backend, where=where)
    if getattr(args, "scenario", "horizontal") != "horizontal":
        raise HostError("GMR-502", f"scenario={args.scenario!r} is not horizontal", where=where)


def _unsupported(training_type: object, backend: object, *, where: str) -> HostError:
    runtime = f"training_type={training_type!r}, backend={backend!r}"
    return HostError("GMR-502", f"federated_optimizer=fedgmr does not run under {runtime}", where=where)


TABLE = (
    Dispatch("fedml.simulation.simulator", "SimulatorSingleProcess", _single_process),
    Dispatch("fedml.simulation.simulator", "SimulatorMPI", _mpi),
    Dispatch("fedml.simulation.simulator", "SimulatorNCCL", _nccl),
    Dispatch("fedml.cross_silo.fedml_server", "FedMLCrossSiloServer", _silo_server),
    Dispatch("fedml.cross_silo.fedml_client", "FedMLCrossSiloClient", _silo_client),
    Dispatch("fedml.cross_device.mnn_server", "ServerMNN", _devices),
)
