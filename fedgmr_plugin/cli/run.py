"""`fedgmr run main.py --cf fedml_config.yaml`: an unchanged FedML script, with fedgmr registered."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from fedgmr_plugin.errors import FedGMRError
from fedgmr_plugin.runtimes.config_file import path_from
from fedgmr_plugin.runtimes.distributed import job
from fedgmr_plugin.runtimes.uncaught import tell


@click.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.argument("script", type=click.Path(exists=True, dir_okay=False))
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def run(script: str, arguments: tuple[str, ...]) -> None:
    """Run a FedML SCRIPT in which `federated_optimizer: fedgmr` works.

    All ARGUMENTS after the script are the script's own, such as `--cf fedml_config.yaml`.
    """
    try:
        run_script(script, arguments)
    except FedGMRError as error:
        tell(error)
        job.abandon(2)
        sys.exit(2)
    except Exception:
        if path_from(arguments) is None:
            form = f"fedgmr run {script} --cf fedml_config.yaml"
            click.echo(f"note: the script was given no --cf; fedml.init() needs one: {form}", err=True)
        raise


def run_script(script: str, arguments: Sequence[str]) -> None:
    """Run a Python file as `__main__`, as `python script arguments` would, after registering.

    Raises:
        FedGMRError: what registering refuses (see `registration.register`), or the run itself.
    """
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).resolve().parent))
    from fedgmr_plugin.runtimes import command
    from fedgmr_plugin.runtimes.registration import register

    command.note(script)
    register()
    runpy.run_path(script, run_name="__main__")
