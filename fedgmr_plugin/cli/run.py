"""`fedgmr run main.py --cf fedml_config.yaml`: an unchanged FedML script, with fedgmr registered."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from fedgmr_plugin.errors import ConfigError, FedGMRError
from fedgmr_plugin.runtimes.config_file import flatten, load, path_from


@click.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.argument("script", type=click.Path(exists=True, dir_okay=False))
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def run(script: str, arguments: tuple[str, ...]) -> None:
    """Run a FedML SCRIPT in which `federated_optimizer: fedgmr` works.

    All ARGUMENTS after the script are the script's own, such as `--cf fedml_config.yaml`.
    """
    try:
        for note in notes(arguments):
            click.echo(f"note: {note}", err=True)
        run_script(script, arguments)
    except FedGMRError as error:
        click.echo(str(error), err=True)
        sys.exit(2)
    except Exception:
        if path_from(arguments) is None:
            click.echo("note: the script was given no --cf; fedml.init() needs one", err=True)
        raise


def notes(arguments: Sequence[str]) -> list[str]:
    """What is likely a slip, though FedML makes something of it. A YAML file that cannot be read is refused
    when the script hands it to FedML, not here."""
    try:
        path = path_from(arguments)
        sections = load(path) if path is not None else {}
    except ConfigError:
        return []
    name = str(flatten(sections).get("federated_optimizer", ""))
    if "fedgmr_args" in sections and name.lower() != "fedgmr":
        return [f"fedgmr_args has no effect: federated_optimizer={name!r} is not fedgmr"]
    return []


def run_script(script: str, arguments: Sequence[str]) -> None:
    """Run a Python file as `__main__`, as `python script arguments` would, after registering.

    Raises:
        FedGMRError: what registering refuses (see `registration.register`), or the run itself.
    """
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).resolve().parent))
    from fedgmr_plugin.runtimes.registration import register

    register()
    runpy.run_path(script, run_name="__main__")
