"""What a replay of a run between silos takes from the server's script: what it gives to FedMLRunner."""

from __future__ import annotations

import copy
import runpy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import nn

from fedgmr_plugin.engine.trainer import BuiltinTrainer, LocalTrainer
from fedgmr_plugin.errors import RunLogError
from fedgmr_plugin.runtimes.devices.server import prepare_server
from fedgmr_plugin.runtimes.replaying import Rebuilt, Script
from fedgmr_plugin.runtimes.silos.data import SiloSamples
from fedgmr_plugin.runtimes.trainer import FedMLTrainer


class Given(NamedTuple):
    """Arguments of FedML's ``FedMLRunner``."""

    args: Any
    device: Any
    dataset: Any
    model: nn.Module
    client_trainer: Any = None
    server_aggregator: Any = None
    algorithm_flow: Any = None


def rebuild(script: Script) -> Rebuilt:
    """Run the script until it constructs a FedMLRunner, which it does not get; nothing is sent.

    Raises:
        RunLogError: GMR-608 if it constructs none, if it does not have every silo's data, or if the silos
            were FedML's own clients.
    """
    given = _given(script.path)
    script.settle(given.args)
    dataset, loaders = given.dataset, given.dataset[5]
    setup = prepare_server(given.args, given.device, dataset[3], given.model, loaders, dataset[6])
    if setup.config.device_submodel != "wire":
        raise RunLogError("GMR-608", "its silos were FedML's own clients", where=script.path)
    if len(loaders) < setup.keys.clients:
        problem = f"the server's script has the data of {len(loaders)} of {setup.keys.clients} silos"
        raise RunLogError("GMR-608", problem, where=script.path)
    trainer: LocalTrainer | None = None
    if given.client_trainer is not None:
        fallback = BuiltinTrainer(device=setup.device, loss=setup.config.loss)
        trainer = FedMLTrainer(given.client_trainer, given.args, setup.device, fallback=fallback)
    model = copy.deepcopy(given.model)
    return Rebuilt(setup, model, SiloSamples(loaders), trainer, given.server_aggregator)


class _Found(BaseException):
    """Ends the script where it has given what is needed."""

    def __init__(self, given: Given) -> None:
        self.given = given


def _given(script: str) -> Given:
    try:
        with _interrupted():
            runpy.run_path(script, run_name="__main__")
    except _Found as found:
        return found.given
    raise RunLogError("GMR-608", "its script constructs no FedMLRunner", where=script)


@contextmanager
def _interrupted() -> Iterator[None]:
    """Within, constructing a FedMLRunner raises what it is given."""
    from fedml import FedMLRunner

    original = FedMLRunner.__init__

    def found(self: Any, *given: Any, **named: Any) -> None:
        raise _Found(Given(*given, **named))

    FedMLRunner.__init__ = found
    try:
        yield
    finally:
        FedMLRunner.__init__ = original
