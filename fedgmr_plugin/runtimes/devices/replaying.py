"""`fedgmr replay`: a run with devices once more, in this process, from its log and its script."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from fedgmr_plugin.engine.examiner import Examiner
from fedgmr_plugin.engine.replay import Comparison, Replay
from fedgmr_plugin.engine.workbench import Clients, Workbench
from fedgmr_plugin.errors import RunLogError
from fedgmr_plugin.protocol.runlog import LOG_NAME, read_run
from fedgmr_plugin.runtimes.config_file import path_from
from fedgmr_plugin.runtimes.devices.live_run import INITIAL
from fedgmr_plugin.runtimes.devices.project import arguments, load_project
from fedgmr_plugin.runtimes.devices.server import prepare_server
from fedgmr_plugin.runtimes.recorded import threads
from fedgmr_plugin.runtimes.registration import register
from fedgmr_plugin.runtimes.resume import COMMAND
from fedgmr_plugin.runtimes.run import serving
from fedgmr_plugin.runtimes.samples import samples_of
from fedgmr_plugin.runtimes.settings import SECTION


def replay(run: Path) -> Comparison:
    """Replay a run's log; devices are trained here, from their data in the run's script.

    Args:
        run: its directory.

    Raises:
        RunLogError: GMR-601 to GMR-603 for a log that cannot be read, GMR-608 for a run that cannot be
            replayed.
        ConfigError: GMR-113 if the script lacks a function.
    """
    register()  # FedML's aggregator measures, and its import needs our help
    log = read_run(run)
    given = _json(run / COMMAND)
    folder, script = str(given.get("folder", "")), str(given.get("script", ""))
    config = path_from([str(a) for a in given.get("arguments", [])])
    if not script or config is None or not (run / INITIAL).is_file():
        raise RunLogError("GMR-608", "its script, its --cf or its initial model is not known", where=str(run))
    before = os.getcwd()
    os.chdir(folder)  # where the script's own relative paths begin
    try:
        project, args = load_project(script), arguments(config)
        for key, value in log.header["fedml"].items():
            setattr(args, key, value)
        setattr(args, SECTION, log.header["config"])
        model = project.make_model(args)
        setup = prepare_server(args, None, project.test_data(args), model)
        samples = {
            n: samples_of(project.train_data(args, n), f"client {n}") for n in range(setup.keys.clients)
        }
    finally:
        os.chdir(before)
    initial_D = load_file(str(run / INITIAL))["w"]
    if initial_D.numel() != setup.layout.size:
        raise RunLogError("GMR-608", "the script makes another model than the run had", where=str(run))
    setup.layout.scatter(model, initial_D)
    server, evaluate, _ = serving(setup)
    training = setup.bench.training
    clients = Clients(samples.__getitem__, 0.0, setup.keys.seed, setup.keys.clients)
    bench = Workbench(setup.config, setup.layout, project.make_model(args), clients, training)
    examiner = Examiner(server, setup.bench, lambda: setup.data.test, evaluate)
    records = _records(run / LOG_NAME)
    with threads(setup.config.cpu_threads), torch.random.fork_rng(devices=[]):
        return Replay(server, examiner, bench.train).run(records)


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
