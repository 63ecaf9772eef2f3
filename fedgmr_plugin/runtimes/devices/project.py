"""A script of a run with devices: functions from which server, devices and replays build the same things.

make_model(args) -> torch.nn.Module
train_data(args, client) -> the samples of one device
test_data(args) -> the samples of the server
"""

from __future__ import annotations

import runpy
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from fedgmr_plugin.errors import ConfigError
from fedgmr_plugin.runtimes import config_file


class Project(NamedTuple):
    """The functions of a script."""

    make_model: Callable[[Any], Any]
    train_data: Callable[[Any, int], Any]
    test_data: Callable[[Any], Any]


def load_project(script: str | Path) -> Project:
    """The functions that a Python file defines; its ``if __name__ == "__main__"`` part does not run.

    Raises:
        ConfigError: GMR-113 if one is missing.
    """
    found: Mapping[str, Any] = runpy.run_path(str(script), run_name="__fedgmr_project__")
    missing = [name for name in Project._fields if not callable(found.get(name))]
    if missing:
        raise ConfigError("GMR-113", f"{', '.join(missing)} not defined", where=str(script))
    return Project(*(found[name] for name in Project._fields))


def arguments(path: str) -> SimpleNamespace:
    """FedML's arguments from a YAML file, as FedML flattens them, without importing FedML.

    Raises:
        ConfigError: GMR-108.
    """
    flat = config_file.flatten(config_file.load(path))
    named = {key: value for key, value in flat.items() if isinstance(key, str)}
    return SimpleNamespace(**{**named, "yaml_config_file": path})
