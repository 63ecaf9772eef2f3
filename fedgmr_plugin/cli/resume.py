"""`fedgmr resume RUN`: go on with a run that was interrupted, to the same bits."""

from __future__ import annotations

import os
from pathlib import Path

import click

from fedgmr_plugin.cli.run import run_script
from fedgmr_plugin.runtimes.resume import command_of, resuming


@click.command()
@click.argument("run", type=click.Path(exists=True, file_okay=False, path_type=Path))
def resume(run: Path) -> None:
    """Continue RUN, the directory of an interrupted run, from its last checkpoint.

    The script that started it runs again, with the same arguments and in the same folder. Without a
    checkpoint the run begins anew in its directory. It has to be the first run of its script.
    """
    run = run.absolute()
    command = command_of(run)
    click.echo(f"resuming {command.script} {' '.join(command.arguments)} in {command.folder}", err=True)
    os.chdir(command.folder)
    with resuming(run):
        run_script(command.script, command.arguments)
