"""What a replay of a run with devices takes from its script."""

from __future__ import annotations

from fedgmr_plugin.runtimes.devices.project import arguments, load_project
from fedgmr_plugin.runtimes.devices.server import prepare_server
from fedgmr_plugin.runtimes.replaying import Rebuilt, Script
from fedgmr_plugin.runtimes.samples import samples_of


def rebuild(script: Script) -> Rebuilt:
    """Model and data by the script's functions; its ``__main__`` part does not run.

    Raises:
        ConfigError: GMR-113 if a function is missing.
    """
    project, args = load_project(script.path), arguments(script.config)
    script.settle(args)
    setup = prepare_server(args, None, project.test_data(args), project.make_model(args))
    ids = range(setup.keys.clients)
    samples = {n: samples_of(project.train_data(args, n), f"client {n}") for n in ids}
    return Rebuilt(setup, project.make_model(args), samples.__getitem__)
