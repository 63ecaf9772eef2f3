"""`fedgmr replay`: a run with real clients once more, in this process, from its log and its script."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import nn

from fedgmr_plugin.engine.examiner import Examiner
from fedgmr_plugin.engine.replay import Comparison, Replay
from fedgmr_plugin.engine.samples import Samples
from fedgmr_plugin.engine.trainer import LocalTrainer
from fedgmr_plugin.engine.workbench import Clients, Training, Workbench
from fedgmr_plugin.errors import RunLogError
from fedgmr_plugin.protocol.runlog import LOG_NAME, read_run
from fedgmr_plugin.runtimes.config_file import path_from
from fedgmr_plugin.runtimes.devices.live_run import INITIAL
from fedgmr_plugin.runtimes.devices.project import arguments
from fedgmr_plugin.runtimes.recorded import threads
from fedgmr_plugin.runtimes.registration import register
from fedgmr_plugin.runtimes.resume import COMMAND
from fedgmr_plugin.runtimes.run import serving
from fedgmr_plugin.runtimes.settings import SECTION
from fedgmr_plugin.runtimes.setup import Setup


class Rebuilt(NamedTuple):
    """What a run's script builds again.

    Attributes:
        setup: of the server, whose model is overwritten.
        model: another one, in which clients are trained.
        samples: client to its training samples.
        trainer: how clients train; the server's built-in one where None.
        aggregator: a user's own.
    """

    setup: Setup
    model: nn.Module
    samples: Callable[[int], Samples]
    trainer: LocalTrainer | None = None
    aggregator: Any = None


class Script(NamedTuple):
    """The server's script.

    Attributes:
        path: of the Python file.
        arguments: it was given.
        config: FedML's YAML file among them.
        settle: gives FedML's arguments the values that the run had.
    """

    path: str
    arguments: list[str]
    config: str
    settle: Callable[[Any], None]


def replay(run: Path) -> Comparison:
    """Replay a run's log; clients are trained here, from their data as the run's script has them.

    Args:
        run: its directory.

    Raises:
        RunLogError: GMR-601 to GMR-603 for a log that cannot be read, GMR-608 for a run that cannot be
            replayed.
        ConfigError: GMR-113 if the script of a run with devices lacks a function.
    """
    register()  # FedML's aggregator measures, and its import needs our help
    log = read_run(run)
    if "training_type" not in log.header["fedml"]:
        raise RunLogError(
            "GMR-608",
            "this is a simulation, which has no devices to repeat",
            where=str(run),
            hint="Run its script once more: the same seed and options give the same model.",
        )
    given = _json(run / COMMAND)
    folder, path = str(given.get("folder", "")), str(given.get("script", ""))
    passed = [str(a) for a in given.get("arguments", [])]
    config = path_from(passed)
    if not path or config is None or not (run / INITIAL).is_file():
        raise RunLogError("GMR-608", "its script, its --cf or its initial model is not known", where=str(run))

    def settle(args: Any) -> None:
        for key, value in log.header["fedml"].items():
            setattr(args, key, value)
        setattr(args, SECTION, log.header["config"])

    with _as_it_was_started(folder, path, passed):
        rebuilt = _rebuild(Script(path, passed, config, settle))
    return _replayed(run, rebuilt)


def _rebuild(script: Script) -> Rebuilt:
    # After registering, which lets FedML be imported
    from fedgmr_plugin.runtimes.devices import rebuilding as devices
    from fedgmr_plugin.runtimes.silos import rebuilding as silos

    args = arguments(script.config)
    is_silo = getattr(args, "training_type", None) == "cross_silo"
    return silos.rebuild(script) if is_silo else devices.rebuild(script)


def _replayed(run: Path, rebuilt: Rebuilt) -> Comparison:
    setup = rebuilt.setup
    initial_D = load_file(str(run / INITIAL))["w"]
    if initial_D.numel() != setup.layout.size:
        raise RunLogError("GMR-608", "the script makes another model than the run had", where=str(run))
    setup.layout.scatter(setup.model, initial_D)
    server, evaluate, _ = serving(setup, rebuilt.aggregator, torch.device("cpu"))
    training = setup.bench.training
    if rebuilt.trainer is not None:
        training = Training(rebuilt.trainer, training.plan, training.learning_rate)
    clients = Clients(rebuilt.samples, 0.0, setup.keys.seed, setup.keys.clients)
    bench = Workbench(setup.config, setup.layout, rebuilt.model, clients, training)
    examiner = Examiner(server, setup.bench, lambda: setup.data.test, evaluate)
    records = _records(run / LOG_NAME)
    with threads(setup.config.cpu_threads), torch.random.fork_rng(devices=[]):
        return Replay(server, examiner, bench.train).run(records)


@contextmanager
def _as_it_was_started(folder: str, script: str, passed: list[str]) -> Iterator[None]:
    """In the script's folder, where its relative paths begin, and with its own arguments."""
    before = os.getcwd(), sys.argv, list(sys.path)
    os.chdir(folder)
    sys.argv = [script, *passed]
    sys.path.insert(0, str(Path(script).parent))
    try:
        yield
    finally:
        os.chdir(before[0])
        sys.argv, sys.path[:] = before[1], before[2]


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunLogError(
            "GMR-608", f"{path.name} cannot be read: {error}", where=str(path.parent)
        ) from error
    return found if isinstance(found, dict) else {}


def _records(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a log that `read_run` has read, in order."""
    lines = path.read_bytes().split(b"\n")
    return [json.loads(line) for line in lines[:-1] if line]
